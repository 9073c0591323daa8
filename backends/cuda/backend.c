/* backend.c - linked into a program, makes the GPU its backend. */
#include "backends/backend.h"
#include "qemb_cuda.h"

const qemb_math qemb_backend_math = QEMB_MATH_F16;

const qemb_ops *qemb_backend_choose(qemb_math math) {
    for (int i = 0; qemb_cuda_table(i); i++)
        if (qemb_cuda_table(i)->math == math) return qemb_cuda_table(i);
    return NULL;
}
