/* cpu.h - what the CPU's ops tables share: qemb.c's plain one and the faster ones of cpu_simd.c. */
#ifndef CPU_H
#define CPU_H

#include "qemb.h"

#ifdef _OPENMP
#include <omp.h>
#else /* a build that wants no second thread: see the Makefile */
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_procs(void) { return 1; }
#endif

/* A CPU backend's state. On the CPU an activation is a float. */
struct qemb_backend {
    const qemb_config *c;
    int threads;
    float *rope; /* (rope_rows, hd): per position hd/2 cosines, then hd/2 sines; grows by begin */
    int rope_rows;
    float *scratch; /* (threads, scratch_floats): attention's tiles, aligned to 64 bytes */
    size_t scratch_floats;
    struct cpu_pool
        *pool;     /* cpu_simd.c's threads; NULL: none, or the plain table, which has OpenMP */
    void *maps[3]; /* what close unmaps: rope, scratch, arena */
    size_t map_bytes[3];
};

/* The ops that have nothing to gain from vectors. cpu_open_scratch is a table's open, given the
 * floats that one thread's attention works in. */
int cpu_open_scratch(qemb_backend **be, const qemb_config *c, const qemb_options *opt,
                     size_t scratch_floats, qemb_err *err);
void cpu_close(qemb_backend *be);
int cpu_place(qemb_backend *be, qemb_weights *w, qemb_err *err);
void *cpu_arena(qemb_backend *be, size_t bytes, qemb_err *err);
void cpu_begin(qemb_backend *be, const qemb_layout *b);
void cpu_gather_last(qemb_backend *be, float *y, const float *x, const qemb_layout *b);

/* y (n) = exp(x), the AVX2 table's, for tests: needs a CPU that the table runs on. Error at most
 * 1 ulp; x above ln FLT_MAX gives Inf, below ln FLT_MIN 0, NaN NaN. */
void avx2_exp(float *y, const float *x, int n);

#endif
