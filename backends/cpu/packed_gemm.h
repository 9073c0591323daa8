/* packed_gemm.h - matrix products of packed weights: y (T, N) = alpha x (T, K) W^T.
 *
 * Terms, after BLIS (Van Zee and van de Geijn 2015):
 *   dword         32 bits along K: one float, two bfloat16 or 16-bit integers, or four bytes
 *   group         64 numbers of a row that share a scale (integers only)
 *   panel         NR rows of W, packed: their k-th dwords lie side by side, for each k in turn
 *   tile of x     MR rows of x, packed in the same way
 *   register tile MR x NR sums of y, which stay in registers while tile and panel are multiplied
 *   microkernel   the loop over k that computes a register tile
 *   epilogue      how the sums of a register tile reach y
 *
 *                 W, packed once                          panel (k, NR)
 *        +--------+--------+--------+            k=0  w0 w1 w2 ... w31
 *        | panel  | panel  | panel  |            k=1  w0 w1 w2 ... w31
 *        |   0    |   1    |   2    |             :         :
 *        +--------+--------+--------+            KC-1 w0 w1 w2 ... w31
 *          NR rows   NR       NR
 *
 *   x, packed per op        y
 *   +-----------+           +--------+--------+--------+
 *   | tile 0    | MR rows   | MR x NR|        |        |     tile (k, MR)
 *   +-----------+           +--------+--------+--------+     k=0  x0 x1 ... x11
 *   | tile 1    |           |        |        |        |     k=1  x0 x1 ... x11
 *   +-----------+           +--------+--------+--------+      :       :
 *
 * The five loops around the multiply-add, from the outside in:
 *   5. up to X_TILES tiles of x at a time (matmul_all): packed, they share one reading of W
 *   4. panels of W (multiply_panels): threads take some of them as a work item
 *   3. KC dwords of the panel's columns: this part of the panel stays in the L2 cache
 *   2. tiles of x (multiply_tile): each meets the part of the panel
 *   1. dwords k of tile and panel (the microkernel): per k, NR/16 loads of W and MR broadcasts of x
 *      feed MR x NR/16 multiply-adds of 16 lanes
 * A table adds a gemm_type: how numbers become dwords, and the microkernel that multiplies them.
 */
#ifndef CPU_PACKED_GEMM_H
#define CPU_PACKED_GEMM_H

#include "cpu.h"

enum {
    MR = 12,   /* rows of a tile of x */
    NR = 32,   /* rows of W in a panel: 12 x 2 of 32 registers hold a register tile's sums */
    KC = 3072, /* dwords of a panel that meet all tiles of x in turn: KC x NR, 384 KiB of L2 */
};

/* y (rows, cols) = (add ? y : 0) + factor * sums, for the rows of one register tile. */
typedef struct {
    float *y;
    size_t ldy;
    int cols, add;
    float factor;
    const float *factors; /* (rows), in place of factor: integers */
    /* The next part of W, or NULL. The tiles that use the current part prefetch it together: this
     * one is number prefetch_part of prefetch_parts. */
    const float *prefetch;
    int prefetch_floats; /* per step of the microkernel */
    int prefetch_part, prefetch_parts;
} epilogue;

/* Prefetches this tile's share of one step of the next part. Returns where the following step
 * begins. */
static inline const float *prefetch_step(const epilogue *o, const float *next) {
    if (!next) return NULL;
    for (int i = 16 * o->prefetch_part; i < o->prefetch_floats; i += 16 * o->prefetch_parts)
        __builtin_prefetch(next + i, 0, 2);
    return next + o->prefetch_floats;
}

/* The rows of W in one panel: 16 from row[0] on and 16 from row[1] on. Rows past the last repeat
 * it. */
typedef struct {
    const qemb_mat *w;
    int row[2];
} w_panel;

/* Computes a register tile of `rows` <= MR rows over n dwords of x (n, MR) and panel (n, NR). */
typedef void microkernel(const epilogue *o, int rows, const float *x, const float *panel, int n);

/* A product y (T, N) = (add ? y : 0) + alpha x W^T, or for gate_up y (T, N/2) = silu of the first
 * N/2 columns times the others. */
typedef struct {
    const qemb_backend *be;
    float *y;
    const float *x; /* (T, K) */
    const qemb_mat *w;
    float *packed; /* (tiles, x_floats): x */
    int T, add, tiles;
    int is_gate_up;
    int few;    /* at most FEW_TILES tiles */
    int panels; /* of an item */
} matmul_job;

/* The numbers of a matrix. An F16 matrix whose numbers have 8 significant bits is W_BF16 if the
 * gemm_type has a form for it, else W_F16. */
typedef enum { W_F16, W_I8, W_BF16, W_KINDS } weight_kind;

/* How a kind of matrix is packed, and what multiplies it. */
typedef struct {
    int repacked; /* load_weights packs such matrices once; 0: each op packs what it needs */
    int w_floats; /* memory of `columns` columns of a panel */
    /* panel = columns k0 .. k1-1 of the panel's rows. Prefetches the weights that are packed
     * next: those prefetch_distance numbers further on in each row. */
    void (*pack_w)(float *panel, const w_panel *p, int k0, int k1, size_t prefetch_distance);
    microkernel *multiply;
    /* Optional, in place of loops 1 to 3: multiplies panels first .. last-1 by all tiles of x.
     * `room` is the thread's scratch, scratch_floats of it. */
    void (*multiply_panels)(const matmul_job *j, int first, int last, float *room);
} packed_weights;

/* A number format of the product, and the instructions for it. */
typedef struct gemm_type {
    int per_dword; /* numbers */
    int columns;   /* packed at a time: a step of packing and prefetching */
    int x_floats;  /* memory of `columns` columns of a tile of x */
    /* With multiply_panels: rows of a tile of x, tiles that are packed at a time, panels of an item
     * at most, and scratch of a thread. 0: MR, X_TILES, as many as ITEM_TILES allows, room for one
     * panel. */
    int tile_rows, x_tiles, item_panels, scratch_floats;
    /* to = x (rows, K), packed. The missing rows of a tile are zeros, or anything if
     * multiply_panels ignores their sums. */
    void (*pack_x)(float *to, const float *x, int rows, int K);
    packed_weights weights[W_KINDS]; /* W_BF16: optional */
    /* Optional. Converts a packed F16 panel of n dwords to float, so that all tiles of x share one
     * conversion. weights[W_I8].multiply then multiplies the float panel. NULL: the panel is used
     * as packed. */
    void (*panel_f16_to_f32)(float *to, const float *panel, int n);
    /* h (rows, min(cols, 16)), ldh apart = silu of the first 16 columns of sums (rows, NR) times
     * the other 16 */
    void (*swiglu)(float *h, size_t ldh, int rows, int cols, const float *sums);
} gemm_type;

weight_kind packed_kind(const gemm_type *a, const qemb_mat *w);
/* Memory of K columns of a tile of x and of a packed panel of W, in floats */
static inline size_t x_floats(const gemm_type *a, int K) {
    return (size_t)ceil_div(K, a->columns) * (size_t)a->x_floats;
}
static inline size_t w_floats(const gemm_type *a, weight_kind kind, int K) {
    return (size_t)ceil_div(K, a->columns) * (size_t)a->weights[kind].w_floats;
}

/* The ops of a table with packed weights. w and opt as in qemb_ops. */
int packed_open(qemb_backend **be, const gemm_type *a, const cpu_kernels *kernels,
                const qemb_config *c, const qemb_options *opt, qemb_err *err);
size_t packed_bytes(const gemm_type *a, const qemb_weights *w, int n_layers);
int packed_load_weights(qemb_backend *be, qemb_weights *w, qemb_err *err);
void packed_matmul(qemb_backend *be, qemb_act *y, const qemb_act *x, const qemb_mat *w,
                   const float *bias, int T);
void packed_matmul_gelu(qemb_backend *be, qemb_act *h, const qemb_act *x, const qemb_mat *w,
                        const float *bias, int T);
void packed_matmul_add(qemb_backend *be, float *x, const qemb_act *a, const qemb_mat *w, int T);
void packed_gate_up(qemb_backend *be, qemb_act *h, qemb_act *gu, const qemb_act *x,
                    const qemb_mat *w, int T);

/* Defines the table `table` of ops with the gemm_type `with`. */
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
                            .close = cpu_close,                                                    \
                            .load_weights = packed_load_weights,                                   \
                            .repacked_bytes = bytes_##table,                                       \
                            .arena = cpu_arena,                                                    \
                            .begin = cpu_begin,                                                    \
                            .embed = simd_embed,                                                   \
                            .rmsnorm = simd_rmsnorm,                                               \
                            .layernorm = simd_layernorm,                                           \
                            .matmul = packed_matmul,                                               \
                            .matmul_add = packed_matmul_add,                                       \
                            .qknorm_rope = simd_qknorm_rope,                                       \
                            .attention = simd_attention,                                           \
                            .gate_up = packed_gate_up,                                             \
                            .matmul_gelu = packed_matmul_gelu,                                     \
                            .gather = cpu_gather,                                                  \
                            .gather_mean = simd_gather_mean,                                       \
                            .pool = simd_pool};

#endif
