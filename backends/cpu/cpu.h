/* cpu.h - what the CPU's ops tables share: qemb.c's plain one, AVX2's of avx2.c, AVX-512's of
 * avx512.c. */
#ifndef CPU_H
#define CPU_H

#include "qemb.h"

#ifdef _OPENMP
#include <omp.h>
#else /* a build that wants no second thread: see the Makefile */
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_procs(void) { return 1; }
#endif

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }
static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
static inline int round_up(int a, int to) { return ceil_div(a, to) * to; }

/* What the vector tables' ops do with their instructions: one row, or one block of attention. Sizes
 * are the model's and may be odd; nothing past them is read or written. */
struct attention_tile;
typedef struct {
    int attention_rows; /* tokens x query heads of an attention block, or one token: what its memory
                           (see attention_tile) leaves in an L2 cache */
    /* y (n) = x, halves */
    void (*half)(float *y, const uint16_t *x, int n);
    /* y (n) = x / sqrt(mean(x^2) + eps) * w; y may be x */
    void (*rmsnorm)(float *y, const float *x, const float *w, int n, float eps);
    /* head (2 half) as rmsnorm makes it, then (a, b) -> (a cos - b sin, b cos + a sin), a in its first
     * half, b in its second */
    void (*norm_rotate)(float *head, const float *w, const float *cosines, const float *sines,
                        int half, float eps);
    /* h (n) = silu(gate) * up */
    void (*swiglu)(float *h, const float *gate, const float *up, int n);
    /* Tokens at positions q0 .. q0+n-1; token i's output goes to att + i*ld_att, G heads of hd. */
    void (*attention)(const struct attention_tile *w, float *att, size_t ld_att, int q0, int n);
} cpu_kernels;

/* What a backend may map. */
enum { CPU_MAP_ROPE, CPU_MAP_SCRATCH, CPU_MAP_ARENA, CPU_MAP_PACKED, CPU_MAP_WEIGHTS, CPU_MAPS };

/* A CPU backend's state. On the CPU an activation is a float. */
struct qemb_backend {
    const qemb_config *c;
    int threads;
    float *rope; /* (rope_rows, hd): per position hd/2 cosines, then hd/2 sines; grows by begin */
    int rope_rows;
    float *scratch; /* (threads, scratch_floats): an op's tiles and panels, aligned to 64 bytes */
    size_t scratch_floats;
    void (*on_layer_loaded)(int layers, int of); /* the options' */
    const struct gemm_type *gemm_type;           /* of a table with panels: see packed_gemm.h */
    const cpu_kernels *kernels; /* this and the next: NULL in a plain table, which has OpenMP */
    struct cpu_pool *pool;      /* NULL as well where there is one thread */
    float *packed;              /* a matmul's x as its tiles want it */
    void *maps[CPU_MAPS];       /* what close unmaps */
    size_t map_bytes[CPU_MAPS];
};

/* The ops that have nothing to gain from vectors. cpu_open_scratch is a table's open, given the
 * floats that one thread works in and those of `packed`, 0 for none. */
int cpu_open_scratch(qemb_backend **be, const qemb_config *c, const qemb_options *opt,
                     size_t scratch_floats, size_t packed_floats, qemb_err *err);
void cpu_close(qemb_backend *be);
/* Zeros, aligned to a page, that close unmaps; NULL: out of memory */
void *cpu_map(qemb_backend *be, int slot, size_t bytes, qemb_err *err);
int cpu_load_weights(qemb_backend *be, qemb_weights *w, qemb_err *err);
void *cpu_arena(qemb_backend *be, size_t bytes, qemb_err *err);
void cpu_begin(qemb_backend *be, const qemb_packed_batch *b);
void cpu_gather_last(qemb_backend *be, float *y, const float *x, const qemb_packed_batch *b);

/* ---- row_ops.c: what the vector tables share ------------------------------------------------ */

/* run(job, 0 .. items-1, ...), each once, in this thread (number 0) and its helpers (1, 2, ...) */
typedef void (*cpu_item)(const void *job, int item, int thread);
void cpu_parallel(struct cpu_pool *p, int items, cpu_item run, const void *job);
/* threads - 1 helpers; 0, or -1 with err filled. The caller closes; NULL may be closed. */
int cpu_pool_open(struct cpu_pool **p, int threads, qemb_err *err);
void cpu_pool_close(struct cpu_pool *p);

/* Takes a file's mapped pages within [p, p + bytes) out of this process's memory */
void cpu_drop_pages(const void *p, size_t bytes);

enum {
    CPU_KEYS = 128, /* keys per attention tile, aligned to absolute positions */
    CPU_PAD = 32,   /* heads of values and of output are padded to this */
};

/* What a block of attention works on and in: some tokens of one text with the G query heads of one
 * kv head, R = attention_rows at most, or G. */
typedef struct attention_tile {
    const float *qkv; /* (T, ld) */
    size_t ld;
    int prefix, own; /* position p is row p of qkv if p < prefix, else row own + p - prefix */
    int q_col, k_col, v_col; /* where the heads begin in a row */
    int G, hd, hdp;          /* hdp: hd rounded up to CPU_PAD */
    float *keys;             /* (CPU_KEYS, hd)  in the kernel's order */
    float *values;           /* (CPU_KEYS, hdp) in the kernel's order */
    float *q;         /* (R + 16, hd)    the block's queries, scaled, in the kernel's order */
    float *s;         /* (R, CPU_KEYS)   scores, then weights */
    float *acc;       /* (R, hdp)        weighted values so far */
    float *max, *sum; /* (R)             of the scores and the weights so far */
    /* Of integers: what one is worth of a key, a value (CPU_KEYS), a query (R + 16) and of the tile's
     * weights (R) */
    float *key_scale, *value_scale, *query_scale, *weight_scale;
} attention_tile;

static inline const float *simd_attention_row(const attention_tile *w, int p) {
    return w->qkv + (size_t)(p < w->prefix ? p : w->own + p - w->prefix) * w->ld;
}

/* A table's open and close: threads, and scratch for attention or scratch_floats per thread. */
int simd_open(qemb_backend **be, const qemb_config *c, const qemb_options *opt,
              const cpu_kernels *kernels, size_t scratch_floats, size_t packed_floats,
              qemb_err *err);
void simd_close(qemb_backend *be);
void simd_embed(qemb_backend *be, float *x, const qemb_mat *tok_emb, const qemb_packed_batch *b);
void simd_rmsnorm(qemb_backend *be, qemb_act *y, const float *x, const float *w, int T);
void simd_qknorm_rope(qemb_backend *be, qemb_act *qkv, const float *q_norm, const float *k_norm,
                      const qemb_packed_batch *b);
void simd_attention(qemb_backend *be, qemb_act *att, const qemb_act *qkv,
                    const qemb_packed_batch *b, int last_only);
void simd_swiglu(qemb_backend *be, qemb_act *h, const qemb_act *gu, int T);
void simd_pool(qemb_backend *be, float *out, const float *x, const float *w, int B);

/* avx2.c: for CPUs with AVX2, FMA and F16C. */
extern const qemb_ops avx2_ops;
/* avx512.c: for CPUs with BMI2 and AVX-512 F, BW, DQ and VL; the second wants BF16 and VNNI as well,
 * the others VNNI. Their attention multiplies integers of 16 bits, the first one's floats. */
extern const qemb_ops avx512_ops, avx512_bf16_ops, avx512_int16_ops, avx512_int8_ops;

/* y (n) = exp(x), a table's, for tests: needs a CPU that the table runs on. Error at most 1 ulp; x
 * above ln FLT_MAX gives Inf, below ln FLT_MIN 0, NaN NaN. */
void avx2_exp(float *y, const float *x, int n);
void avx512_exp(float *y, const float *x, int n);

#endif
