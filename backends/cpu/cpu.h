/* cpu.h - what the CPU's tables of ops share.
 *
 *   cpu_count.c         how many CPUs a process may use
 *   threads.c           the threads that share out the items of an op
 *   memory.c            a backend's state and memory
 *   row_ops.c           ops that compute row by row, and how attention is cut into blocks
 *   packed_gemm.c       matrix products of repacked weights (packed_gemm.h)
 *   avx2.c, avx2_integers.c, avx512.c, avx512_attention.c, amx.c   the instructions
 *   dispatch.c          which tables a CPU can run, and which of them serves --math
 *   dot_f16.c           products of one vector with many rows of halves (dot_f16.h)
 *
 * Each uses only those above it, and qemb.c's plain ops where nothing is gained from vectors.
 */
#ifndef CPU_H
#define CPU_H

#include "qemb.h"

static inline int min_int(int a, int b) { return a < b ? a : b; }
static inline int max_int(int a, int b) { return a > b ? a : b; }
static inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
static inline int round_up(int a, int to) { return ceil_div(a, to) * to; }

/* IEEE half to float. Exponent and mantissa, shifted into place, give the value times 2^-112, for
 * subnormal halves too; one exact multiplication corrects that. Inf and NaN get float's
 * exponent. */
static inline float half_to_float(uint16_t h) {
    union {
        uint32_t u;
        float f;
    } v = {(uint32_t)(h & 0x7fff) << 13};
    v.f *= 0x1p112f;
    v.u |= (h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
    v.u |= (uint32_t)(h & 0x8000) << 16;
    return v.f;
}

/* ---- CPUs (cpu_count.c) ---------------------------------------------------------------------- */

/* The least quota of this process's control groups, in CPUs, rounded up; INT_MAX: there is none.
 * root is put before /proc and the places of the groups: "", but for tests. */
int cpu_quota(const char *root);

/* ---- the state of a backend (memory.c) ------------------------------------------------------- */

struct attention_tile;

/* What a SIMD table computes with its instructions: one row, or one block of attention. Sizes are
 * the model's and may be odd; nothing beyond them is read or written. */
typedef struct {
    /* Tokens x query heads of an attention block (or one token): as many as keep its memory, an
     * attention_tile, in an L2 cache */
    int attention_rows;
    /* y (n) = x, which are halves */
    void (*half)(float *y, const uint16_t *x, int n);
    /* y (n) = x / sqrt(mean(x^2) + eps) * w; y may be x */
    void (*rmsnorm)(float *y, const float *x, const float *w, int n, float eps);
    /* rmsnorm of head (2 half), then (a, b) -> (a cos - b sin, b cos + a sin) with a in the head's
     * first half and b in its second */
    void (*norm_rotate)(float *head, const float *w, const float *cosines, const float *sines,
                        int half, float eps);
    /* y (n) = x (n) = LayerNorm of x + bias, with weights w and b; bias NULL: none */
    void (*layernorm)(float *y, float *x, const float *bias, const float *w, const float *b, int n,
                      float eps);
    /* y (n) += x */
    void (*add)(float *y, const float *x, int n);
    /* h (n) = gelu(h + bias) */
    void (*gelu)(float *h, const float *bias, int n);
    /* h (n) = silu(gate) * up */
    void (*swiglu)(float *h, const float *gate, const float *up, int n);
    /* The tokens at positions q0 .. q0+n-1. Token i's output, G heads of hd, goes to att +
     * i*ld_att. */
    void (*attention)(const struct attention_tile *w, float *att, size_t ld_att, int q0, int n);
} cpu_kernels;

/* The maps of a backend. */
enum { CPU_MAP_ROPE, CPU_MAP_SCRATCH, CPU_MAP_ARENA, CPU_MAP_PACKED, CPU_MAP_WEIGHTS, CPU_MAPS };

/* A CPU backend. On the CPU an activation is a float. */
struct qemb_backend {
    const qemb_config *c;
    int threads;
    float *rope; /* (rope_rows, hd): per position hd/2 cosines, then hd/2 sines; begin extends it.
                    NULL: the model has no RoPE */
    int rope_rows;
    float *scratch; /* (threads, scratch_floats): an op's tiles and panels, aligned to 64 bytes */
    size_t scratch_floats;
    void (*on_layer_loaded)(int layers, int of); /* from the options */
    const struct gemm_type *gemm_type;           /* of a table with packed weights, else NULL */
    const cpu_kernels *kernels;                  /* NULL in the plain table */
    struct cpu_pool *pool;                       /* NULL with one thread */
    float *packed;                               /* x of a matmul, packed */
    void *maps[CPU_MAPS];                        /* unmapped by close */
    size_t map_bytes[CPU_MAPS];
};

/* A table's open: scratch_floats for each thread, packed_floats for `packed` (0: none). */
int cpu_open(qemb_backend **be, const qemb_config *c, const qemb_options *opt,
             size_t scratch_floats, size_t packed_floats, qemb_err *err);
void cpu_close(qemb_backend *be);
/* Zeroed pages that close unmaps. NULL: out of memory. */
void *cpu_map(qemb_backend *be, int slot, size_t bytes, qemb_err *err);
void *cpu_arena(qemb_backend *be, size_t bytes, qemb_err *err);
int cpu_load_weights(qemb_backend *be, qemb_weights *w,
                     qemb_err *err); /* the map is used as it is */
/* Drops a file's mapped pages within [p, p + bytes) from this process's memory. */
void cpu_drop_pages(const void *p, size_t bytes);

/* ---- qemb.c: plain ops that the SIMD tables use too ---------------------------------------- */

int cpu_begin(qemb_backend *be, const qemb_packed_batch *b);
void cpu_gather(qemb_backend *be, float *y, const float *x, const qemb_packed_batch *b,
                qemb_rows rows);
/* y (B, D) = mean of each text's rows of x (T, D), the shared prefix's included: gather_mean after
 * its rmsnorm */
void cpu_mean_rows(const qemb_backend *be, float *y, const float *x, const qemb_packed_batch *b);
/* As in cpu_kernels, with sums and erf in double */
void cpu_layernorm_row(float *y, float *x, const float *bias, const float *w, const float *b, int n,
                       float eps);
void cpu_add_row(float *y, const float *x, int n);
void cpu_gelu_row(float *h, const float *bias, int n);

/* ---- threads (threads.c) --------------------------------------------------------------------- */

/* Item i of a job, run by thread number `thread`: 0 is the caller's. */
typedef struct {
    int i, thread;
} work_item;
typedef void cpu_work(const void *job, work_item item);

/* Runs items 0 .. items-1, each once, in this thread and the pool's helpers. p may be NULL. */
void cpu_parallel(struct cpu_pool *p, int items, cpu_work *run, const void *job);
/* A pool of threads - 1 helpers; none, and *p stays as it is, with one thread. 0, or -1 with err
 * filled. The caller closes; NULL may be closed. */
int cpu_pool_open(struct cpu_pool **p, int threads, qemb_err *err);
void cpu_pool_close(struct cpu_pool *p);

/* ---- ops by rows and attention's blocks (row_ops.c) ------------------------------------------ */

enum {
    CPU_KEYS = 128, /* keys per attention tile, aligned to absolute positions */
    CPU_PAD = 32,   /* heads of values and of output are padded to this */
};

/* A block of attention and its scratch memory: some tokens of one text with the G query heads of
 * one kv head. R is the number of its rows, at most attention_rows, or G. */
typedef struct attention_tile {
    const float *qkv; /* (T, ld) */
    size_t ld;
    int prefix, own; /* position p is row p of qkv if p < prefix, else row own + p - prefix */
    int all;         /* keys that every row sees; 0: those up to its own position */
    int q_col, k_col, v_col; /* where the heads begin in a row */
    int G, hd, hdp;          /* hdp: hd rounded up to CPU_PAD */
    float *keys;             /* (CPU_KEYS, hd)  in the kernel's order */
    float *values;           /* (CPU_KEYS, hdp) in the kernel's order */
    float *q;         /* (R + 16, hd)    the block's queries, scaled, in the kernel's order */
    float *s;         /* (R, CPU_KEYS)   scores, then weights */
    float *acc;       /* (R, hdp)        weighted values so far */
    float *max, *sum; /* (R)             of the scores and the weights so far */
    /* With integers: the scale of each key and value (CPU_KEYS), of each query (R + 16), and of
     * each row of the tile's weights (R). */
    float *key_scale, *value_scale, *query_scale, *weight_scale;
} attention_tile;

static inline const float *simd_attention_row(const attention_tile *w, int p) {
    return w->qkv + (size_t)(p < w->prefix ? p : w->own + p - w->prefix) * w->ld;
}

/* How many keys of its text, from position 0 on, row r of a block sees that begins at position
 * q0 */
static inline int simd_keys_seen(const attention_tile *w, int q0, int r) {
    return w->all ? w->all : q0 + r / w->G + 1;
}
/* The first row of that block that sees position p */
static inline int simd_first_seeing(const attention_tile *w, int q0, int p) {
    return w->all ? 0 : max_int(0, p - q0) * w->G;
}

/* A table's open, with scratch for attention or scratch_floats per thread, whichever is larger. */
int simd_open(qemb_backend **be, const qemb_config *c, const qemb_options *opt,
              const cpu_kernels *kernels, size_t scratch_floats, size_t packed_floats,
              qemb_err *err);
void simd_embed(qemb_backend *be, float *x, const qemb_mat *tok_emb, const float *pos_emb,
                const qemb_packed_batch *b);
void simd_layernorm(qemb_backend *be, qemb_act *y, float *x, const float *bias, const float *w,
                    const float *b, int T);
/* y (T, n) += bias, unless it is NULL */
void simd_add_bias(qemb_backend *be, qemb_act *y, const float *bias, int T, int n);
/* h (T, n) = gelu(h + bias) */
void simd_gelu(qemb_backend *be, qemb_act *h, const float *bias, int T, int n);
void simd_rmsnorm(qemb_backend *be, qemb_act *y, const float *x, const float *w, int T);
void simd_qknorm_rope(qemb_backend *be, qemb_act *qkv, const float *q_norm, const float *k_norm,
                      const qemb_packed_batch *b);
void simd_attention(qemb_backend *be, qemb_act *att, const qemb_act *qkv,
                    const qemb_packed_batch *b, qemb_rows rows);
void simd_swiglu(qemb_backend *be, qemb_act *h, const qemb_act *gu, int T);
void simd_gather_mean(qemb_backend *be, float *y, float *x, const float *w,
                      const qemb_packed_batch *b);
int simd_pool(qemb_backend *be, float *out, float *x, const float *w, int B);

/* ---- the tables (avx2.c, avx2_integers.c, avx512.c, amx.c) ----------------------------------- */

/* For CPUs with AVX2, FMA and F16C; avxvnni also wants AVX-VNNI. Attention multiplies floats in all
 * of them. */
extern const qemb_ops avx2_ops, avx2_int16_ops, avx2_int8_ops;
extern const qemb_ops avxvnni_int16_ops, avxvnni_int8_ops;
extern const cpu_kernels avx2_kernels; /* their rows and attention */
/* For CPUs with BMI2 and AVX-512 F, BW, DQ and VL; bf16 also wants BF16 and VNNI, the integers
 * VNNI. Attention multiplies floats in the first one, 16-bit integers in the others. */
extern const qemb_ops avx512_ops, avx512_bf16_ops, avx512_int16_ops, avx512_int8_ops;
/* Their rows and attention, and their gemm_type.swiglu: exact to float, or to 13 bits. */
extern const cpu_kernels avx512_with_f32_attention, avx512_with_int16_attention;
void avx512_swiglu_f32(float *h, size_t ldh, int rows, int cols, const float *sums);
void avx512_swiglu_8bit(float *h, size_t ldh, int rows, int cols, const float *sums);
/* For CPUs with tiles (AMX-TILE and AMX-BF16), AVX-512 as above and VNNI. All multiply bfloat16
 * tiles, into which numbers are split: 3, 2 or 1 of x, 1 of W, or 2 if it has more than 8 bits. */
extern const qemb_ops amx_ops, amx_bf16_ops, amx_int16_ops, amx_int8_ops;

/* ---- the choice of a table (dispatch.c) ------------------------------------------------------ */

/* What a CPU is and has. CPU_AVX2 is also FMA and F16C; CPU_AVX512 is F, BW, DQ, VL and BMI2.
 * CPU_AMX is TILE and BF16, and the kernel's permission to use tiles. */
enum {
    CPU_INTEL = 1,
    CPU_AVX2 = 2,
    CPU_AVX512 = 4,
    CPU_AVX512_VNNI = 8,
    CPU_AVX512_BF16 = 16,
    CPU_AMX = 32,
    CPU_AVX_VNNI = 64,
};
unsigned cpu_features(void); /* this machine's */

typedef struct {
    const qemb_ops *ops;
    unsigned needs; /* of the bits above */
    int speed[2];   /* on CPUs without and with CPU_INTEL, relative to the other tables */
} cpu_table;
/* All tables: plain first, the fastest of each arithmetic last. */
extern const cpu_table cpu_tables[];
extern const int n_cpu_tables;
/* qemb_cpu_choose for a CPU with these features. */
const qemb_ops *cpu_choose(unsigned features, const char *name, qemb_math math);

#endif
