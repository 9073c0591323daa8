/* packed_gemm.h - matrix products of panels: how x and W are cut, packed and shared out among threads
 * (packed_gemm.c), and what an arithmetic with its instructions adds to that. */
#ifndef CPU_PACKED_GEMM_H
#define CPU_PACKED_GEMM_H

#include "cpu.h"

enum {
    MR = 12,   /* rows of x and ... */
    NR = 32,   /* ... rows of W in a tile. A panel is NR rows of W, their k-th dwords together. */
    KC = 3072, /* dwords of a panel that meet a tile at a time: KC x NR, 384 KiB of an L2 cache */
};

typedef struct { /* what becomes of a tile's sums: y (rows, cols) = (add ? y : 0) + factor sum */
    float *y;
    size_t ldy;
    int cols, add;
    float factor;
    const float *factors; /* integers' instead, one a row */
    /* The panel that comes next: tile `share` of so many that meet this one fetches its share. NULL:
     * nothing is to be fetched */
    const float *prefetch;
    int prefetch_floats; /* of columns that come together */
    int prefetch_part, prefetch_parts;
} epilogue;

/* For every so many columns of a panel; returns what is ahead of the next */
static inline const float *prefetch_part(const epilogue *o, const float *next) {
    if (!next) return NULL;
    for (int i = 16 * o->prefetch_part; i < o->prefetch_floats; i += 16 * o->prefetch_parts)
        __builtin_prefetch(next + i, 0, 2);
    return next + o->prefetch_floats;
}

typedef struct {
    const qemb_mat *w;
    int row[2]; /* of W, where the panel's halves of 16 begin */
} w_panel;

typedef void microkernel(const epilogue *o, int rows, const float *x, const float *panel, int n);

/* An arithmetic: how numbers become dwords, and what multiplies them */
typedef struct gemm_type {
    int per_dword;
    int columns;            /* that come together */
    int x_floats, w_floats; /* that they take of a tile of x and of a placed panel of W */
    /* A tile of `rows` rows of x (rows, K), MR at most; those that it is short of are zeros */
    void (*pack_x)(float *to, const float *x, int rows, int K);
    struct { /* of F16, of I8 */
        int repacked;
        /* Columns k0 .. k1-1. `ahead`: how many numbers on those lie that will be packed next */
        void (*pack_w)(float *panel, const w_panel *p, int k0, int k1, size_t prefetch_distance);
        microkernel *multiply; /* rows <= MR of x, n dwords */
    } by_dtype[2];
    /* Where an I8's panel suits many rows better: makes it of an F16's, n dwords. Or NULL */
    void (*panel_f16_to_f32)(float *to, const float *panel, int n);
    /* h (rows, cols), ldh apart, = silu of sums' (rows, NR) first 16 columns times the others; cols
     * may be more than 16 */
    void (*swiglu)(float *h, size_t ldh, int rows, int cols, const float *sums);
} gemm_type;

/* A table's open, what it says of `repacked_bytes`, and its ops */
int packed_open(qemb_backend **be, const gemm_type *a, const cpu_kernels *kernels,
                const qemb_config *c, const qemb_options *opt, qemb_err *err);
size_t packed_bytes(const gemm_type *a, const qemb_weights *w, int n_layers);
int packed_load_weights(qemb_backend *be, qemb_weights *w, qemb_err *err);
void packed_matmul(qemb_backend *be, qemb_act *y, const qemb_act *x, const qemb_mat *w, int T);
void packed_matmul_add(qemb_backend *be, float *x, const qemb_act *a, const qemb_mat *w, int T);
void packed_gate_up(qemb_backend *be, qemb_act *h, qemb_act *gu, const qemb_act *x,
                    const qemb_mat *w, int T);

#define PACKED_TABLE(table, label, of_math, with, kernels)                                         \
    static int open_##table(qemb_backend **be, const qemb_config *c, const qemb_options *opt,      \
                            qemb_err *err) {                                                       \
        return packed_open(be, &(with), &(kernels), c, opt, err);                                  \
    }                                                                                              \
    static size_t bytes_##table(const qemb_weights *w, int n_layers) {                             \
        return packed_bytes(&(with), w, n_layers);                                                 \
    }                                                                                              \
    const qemb_ops table = {.name = label,                                                         \
                            .math = of_math,                                                       \
                            .act_size = sizeof(float),                                             \
                            .open = open_##table,                                                  \
                            .close = simd_close,                                                   \
                            .load_weights = packed_load_weights,                                   \
                            .repacked_bytes = bytes_##table,                                       \
                            .arena = cpu_arena,                                                    \
                            .begin = cpu_begin,                                                    \
                            .embed = simd_embed,                                                   \
                            .rmsnorm = simd_rmsnorm,                                               \
                            .matmul = packed_matmul,                                               \
                            .matmul_add = packed_matmul_add,                                       \
                            .qknorm_rope = simd_qknorm_rope,                                       \
                            .attention = simd_attention,                                           \
                            .gate_up = packed_gate_up,                                             \
                            .gather_last = cpu_gather_last,                                        \
                            .pool = simd_pool};

#endif
