/* emulated_amx.h - the AMX tables of ops on any CPU: backends/cpu/amx.c over amx_emulation.h. */
#ifndef EMULATED_AMX_H
#define EMULATED_AMX_H

#include "qemb.h"

/* The tables that the tests run: those of this CPU, then amx.c's, emulated; NULL past the end. */
const qemb_ops *test_table(int i);
/* amx.c's four tables, emulated. Their products have the bits of the hardware. What else they
 * compute is AVX-512's where the CPU has it, as on every CPU with tiles, else AVX2's or the plain
 * table's. */
const qemb_ops *emulated_amx_table(int i);
/* Whether this thread has released its tiles. */
int emulated_amx_is_released(void);

#endif
