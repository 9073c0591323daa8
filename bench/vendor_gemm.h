/* vendor_gemm.h - matrix products of other libraries: oneDNN, OpenBLAS. */
#ifndef BENCH_VENDOR_GEMM_H
#define BENCH_VENDOR_GEMM_H

#include "qemb.h"

enum { OTHER_GEMMS = 2 }; /* oneDNN, OpenBLAS */
typedef struct other_gemm other_gemm;

/* The product y (T, N) = x W^T by library `which` in `math`, ready to run, with weights W (N, K)
 * packed in the library's own form; *name is the library's. Its result has been compared with sums
 * in double. NULL: the library is not installed, or has no such product. */
other_gemm *other_gemm_open(int which, qemb_math math, int T, int N, int K, const float *W,
                            const char **name);
void other_gemm_run(void *g, int i); /* for measure */
void other_gemm_close(other_gemm *g);

/* Returns the table `own` with oneDNN packing the matrices and computing the GEMMs. There can be
 * one at a time, for one model. NULL: oneDNN is not installed or lacks this arithmetic (its int8
 * has one scale per row). */
const qemb_ops *table_with_onednn(const qemb_ops *own);
/* The values (rows, cols) of an F16 matrix, zeros for an INT8 one. The caller frees. */
float *floats_of(const qemb_mat *w);

#endif
