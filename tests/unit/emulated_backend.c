/* emulated_backend.c - makes the emulated tile unit (emulated_amx.h) a program's backend, so that
 * `--math` runs every arithmetic on any CPU, also those that no table of this CPU has. */
#include "backends/backend.h"
#include "emulated_amx.h"

const qemb_math qemb_backend_math = QEMB_MATH_F32;

const qemb_ops *qemb_backend_choose(qemb_math math) {
    for (int i = 0; emulated_amx_table(i); i++)
        if (emulated_amx_table(i)->math == math) return emulated_amx_table(i);
    return NULL;
}
