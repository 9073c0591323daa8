/* bench.h - what the benchmarks share: measuring, the machine's limits, other libraries' GEMM. */
#ifndef BENCH_H
#define BENCH_H

#include "qemb.h"

extern int threads; /* of the limits, the ops and the others' GEMM alike */

void die(const char *what); /* ends the program */
void *zeroed(size_t bytes); /* its pages there, aligned to 256; or dies */

typedef struct {
    double median, p10, p90;
} quantiles;

typedef struct {
    void (*run)(void *arg, int i); /* i = 0 to warm up, then 1, 2, ... */
    void *arg;
} timed_call;

/* Seconds of one call. */
quantiles measure(void (*run)(void *arg, int i), void *arg);
/* Of two calls in turns; *ratio is of both times of a round, b's by a's. */
void measure_turns(timed_call a, timed_call b, quantiles *ta, quantiles *tb, quantiles *ratio);

/* A row of the CSV: `work` a call, as a rate in units of `unit_size`. limit_rate 0: no limit. */
void row(const char *group, const char *name, int n, quantiles seconds, double work,
         double unit_size, const char *unit, const char *limit, double limit_rate);

/* ---- limits.c ---- */

typedef struct {
    const char *name;
    double rate; /* operations or bytes per second by all threads; 0: not on this CPU */
} limit;

/* Measures and prints all that this CPU can. The weights of f are what `read` reads. */
void limits_measure(const qemb_file *f);
const limit *limit_of(qemb_math math); /* multiply-adds, counted as two operations */
const limit *limit_read(void);

/* ---- vendor_gemm.c ---- */

enum { OTHER_GEMMS = 2 }; /* oneDNN, OpenBLAS */
typedef struct other_gemm other_gemm;

/* y (T, N) = x W^T of library `which` in `math`, ready to run on weights W (N, K) that it has
 * packed as it likes; *name is the library's. NULL: not installed, or it has no such product. What
 * it computes is compared with sums in double first. */
other_gemm *other_gemm_open(int which, qemb_math math, int T, int N, int K, const float *W,
                            const char **name);
void other_gemm_run(void *g, int i); /* for measure */
void other_gemm_close(other_gemm *g);

/* The table `own`, but its matrices are packed and its products computed by oneDNN. One at a time, for
 * one model. NULL: not installed, or not in this arithmetic (int8: oneDNN has one scale a row). */
const qemb_ops *table_with_onednn(const qemb_ops *own);
float *floats_of(const qemb_mat *w); /* (rows, cols) of F16; the caller frees them */

#endif
