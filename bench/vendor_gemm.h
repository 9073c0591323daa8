/* vendor_gemm.h - matrix products of other libraries: oneDNN, OpenBLAS. */
#ifndef BENCH_VENDOR_GEMM_H
#define BENCH_VENDOR_GEMM_H

#include "qemb.h"

enum { OTHER_GEMMS = 5 };
typedef struct other_gemm other_gemm;

/* A library's product in its arithmetic, and the arithmetics of ours (bits 1 << qemb_math) that it
 * is compared with. A float product of ours may be faster than a library's in bfloat16, and no
 * library multiplies 16-bit integers. */
extern const struct other_gemm_kind {
    const char *name;
    qemb_math math;
    unsigned beside;
} other_gemms[OTHER_GEMMS];

/* The product y (T, N) = x W^T of that kind, ready to run, with weights W (N, K) packed in the
 * library's own form. Its result has been compared with sums in double. NULL: the library is not
 * installed, or has no such product on this CPU. */
other_gemm *other_gemm_open(int kind, int T, int N, int K, const float *W);
void other_gemm_run(void *g, int i); /* for measure */
void other_gemm_close(other_gemm *g);

/* Returns the table `own` with oneDNN packing the matrices and computing the GEMMs in `math`, f32
 * or bf16. There can be one at a time, for one model. NULL: oneDNN is not installed, this CPU has
 * no bfloat16, or `math` is not what `own` is compared with: f32 with both, bf16 and int16 with
 * bf16, int8 with none, because oneDNN has one int8 scale per row. */
const qemb_ops *table_with_onednn(const qemb_ops *own, qemb_math math);
/* The values (rows, cols) of an F16 matrix, zeros for an INT8 one. The caller frees. */
float *floats_of(const qemb_mat *w);

#endif
