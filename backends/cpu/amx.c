/* amx.c - matrix products with Intel's tile unit (Sapphire Rapids and later Xeons).
 *
 * The unit multiplies bfloat16 numbers, of 8 significant bits, and adds in float. A number with
 * more bits is the exact sum of several bfloat16 numbers, its parts:
 *   a float      x = x1 + x2 + x3          24 bits
 *   a half       w = w1 + w2               11 bits
 *   a weight of a BF16 checkpoint          w1 alone, stored as a half or not
 *   a byte       q1 alone
 * Numbers below 2^-126 count as 0 in the unit, so smaller parts are lost.
 *
 * A product of numbers is the sum of products of their parts. So W of 8 bits times x in three parts
 * has the exact terms of a float product, and it adds 32 columns with one rounding of the sum:
 * three tile products are more exact than a chain of multiply-adds, and faster. Leaving out small
 * products leaves out bits:
 *
 *   table      x        W of 8 bits, INT8   other halves           relative error of a term
 *   amx        3 parts  3 products          5: x3w1 x2w1 x1w1 x1w2 x2w2    2^-24, as float
 *   amx-int16  2 parts  2                   3: x2w1 x1w1 x1w2      2^-16, others 2^-15
 *   amx-bf16   1 part   1                   1: W rounded           2^-8 for each rounded factor
 *   amx-int8   as amx-bf16; an F16 file's W becomes bytes, which take half the memory
 *
 * The loops: packed_gemm.c's loops 5 and 4, then multiply_panels of a matmul_job's item:
 *   3. chunks of up to CHUNK columns, and in each all panels of the item
 *   2. tiles of x, 32 rows: with a panel they have 2 x 2 tile registers of sums
 *   1. steps of 32 columns: per part 2 tiles of x and 2 of W, and 4 tile products
 * x and W lie in memory as the tiles that are loaded, one after the other, and stream from the
 * second-level cache past the first.
 *
 * A step of one part keeps the tile unit busy for 64 cycles and has some 10 instructions. So the
 * other work of a product is done between the steps, a little in each (`work`): the sums of the
 * register tile before go to y, the next panel's halves or bytes become bfloat16 tiles, and the
 * panel after it is prefetched.
 *
 * A row's result depends on that row alone: its sum has the order of the columns, in steps, for any
 * number of rows and threads.
 */
#include "packed_gemm.h"

#if defined(__x86_64__) || defined(AMX_EMULATE)

#include "amx.h"

#include <math.h>

/* INLINE: a function of vectors. TEMPLATE: a function that is inlined with constant arguments, so
 * that its branches disappear. */
#ifdef AMX_EMULATE /* branches cost nothing beside the emulation, copies cost time to compile */
#define WITH_AVX512
#define TEMPLATE static
#else
#include <immintrin.h>
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,bmi2")))
#define TEMPLATE    INLINE
#endif
#define INLINE static inline __attribute__((always_inline)) WITH_AVX512
#define UNROLL _Pragma("GCC unroll 16")

enum {
    TILE_BYTES = 1024,
    PAIR = 2 * TILE_BYTES, /* a part of a step: 32 rows of x, or of W, and 32 columns */
    ROWS = 32,             /* of a tile of x; a panel of W has NR = 32, too */
    STEP = 32,             /* columns */
    GROUP = QEMB_GROUP,    /* columns of a row of bytes that share a scale: two steps */
    CHUNK = 1024,          /* columns whose sums stay in tile registers, at most */
    X_CACHED = 1 << 20,    /* bytes of a chunk of packed x, which stay in the second-level cache */
    ITEM_PANELS = 16,
    SUMS = ROWS * NR,
};

/* How the panels of W reach the tile unit. */
typedef enum {
    TILES,        /* memory has bfloat16 tiles */
    HALVES,       /* memory has halves, of which two parts are made */
    SCALED_BYTES, /* memory has bytes, which times their scales are rounded to bfloat16 */
    BYTES         /* memory has bytes, which are exact in bfloat16; sums of groups are scaled */
} w_form;

/* The products of a step, in this order: x[i] and w[i] are the parts of product i. Neighbours share
 * a factor where they can, which saves loading it. */
typedef struct {
    w_form form;
    int x_parts, w_parts, products;
    uint8_t x[5], w[5];
} plan;

static const plan bf16_tiles = {TILES, 1, 1, 1, {0}, {0}};
static const plan x2_tiles = {TILES, 2, 1, 2, {1, 0}, {0, 0}};
static const plan x3_tiles = {TILES, 3, 1, 3, {2, 1, 0}, {0, 0, 0}};
static const plan x2_halves = {HALVES, 2, 2, 3, {1, 0, 0}, {0, 0, 1}};
static const plan x3_halves = {HALVES, 3, 2, 5, {2, 1, 0, 0, 1}, {0, 0, 0, 1, 1}};
static const plan bf16_bytes = {SCALED_BYTES, 1, 1, 1, {0}, {0}};
static const plan x2_bytes = {BYTES, 2, 1, 2, {1, 0}, {0, 0}};
static const plan x3_bytes = {BYTES, 3, 1, 3, {2, 1, 0}, {0, 0, 0}};

static int is_expanded(w_form form) { return form != TILES; }

/* ---- vectors of 16 numbers ------------------------------------------------------------------- */

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t words __attribute__((vector_size(64), aligned(2), may_alias)); /* 32 */

#ifdef AMX_EMULATE
typedef uint16_t u16vec __attribute__((vector_size(32), aligned(2), may_alias));
typedef int8_t s8vec __attribute__((vector_size(16), aligned(1), may_alias));
INLINE vec fma16(vec a, vec b, vec c) {
    for (int i = 0; i < 16; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
/* 16 finite halves. The multiplication makes subnormal ones normal. */
INLINE vec halves16(const void *p) {
    const uvec h = __builtin_convertvector(*(const u16vec *)p, uvec);
    const vec magnitude = (vec)((h & 0x7fff) << 13) * 0x1p112f;
    return (vec)((uvec)magnitude | (h & 0x8000) << 16);
}
INLINE vec bytes16(const void *p) { return __builtin_convertvector(*(const s8vec *)p, vec); }
#else
INLINE vec fma16(vec a, vec b, vec c) {
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
INLINE vec halves16(const void *p) { return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(p)); }
/* gcc 12 would convert a vector of bytes number by number. */
INLINE vec bytes16(const void *p) {
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
}
#endif

INLINE vec all16(float f) { return f - (vec){0}; }

/* Floats, as their bits, rounded to nearest even to the 8 bits of bfloat16. What would round to Inf
 * is cut off instead, so that the rest of a finite number stays finite. Inf and NaN do not become
 * finite. */
INLINE uvec to_bf16(uvec u) {
    const uvec in_range = (uvec)((u & 0x7fffffff) < 0x7f7f8000);
    return (u + (in_range & (0x7fff + (u >> 16 & 1)))) & 0xffff0000;
}

/* 32 bfloat16 numbers: the upper halves of a's and b's bits */
INLINE words upper_halves(uvec a, uvec b) {
    return __builtin_shufflevector((words)a, (words)b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23,
                                   25, 27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55,
                                   57, 59, 61, 63);
}

/* The first n of 16 numbers of p; the others are 0. */
INLINE vec load_first(const float *p, int n) {
    if (n >= 16) return *(const vec *)p;
    if (n <= 0) return (vec){0};
    float v[16] = {0};
    memcpy(v, p, (size_t)n * sizeof *v);
    return *(const vec *)v;
}

/* ---- packing x: [step][part][two tiles][16 rows][64 bytes] --------------------------------------
 * Rows that there are not keep what the memory had: their sums are never read, and each row of a
 * tile has sums of its own. */

/* 32 columns of one row: 64 bytes of each part, PAIR apart. n < 32: the others are 0. */
TEMPLATE void split_row(int parts, uint8_t *to, const float *x, int n) {
    vec a = load_first(x, n), b = load_first(x + 16, n - 16);
    for (int p = 0; p < parts; p++, to += PAIR) {
        const uvec pa = to_bf16((uvec)a), pb = to_bf16((uvec)b);
        *(words *)to = upper_halves(pa, pb);
        a -= (vec)pa, b -= (vec)pb;
    }
}

TEMPLATE void pack_x(int parts, float *to, const float *x, int rows, int K) {
    const int steps = 2 * ceil_div(K, GROUP);
    uint8_t *tiles = (uint8_t *)to;
    for (int i = 0; i < rows; i++)
        for (int s = 0; s < steps; s++)
            split_row(parts, tiles + (size_t)s * parts * PAIR + i / 16 * TILE_BYTES + i % 16 * 64,
                      x + (size_t)i * K + s * STEP, K - s * STEP);
}

#define PACK_X(name, parts)                                                                        \
    WITH_AVX512 static void name(float *to, const float *x, int rows, int K) {                     \
        pack_x(parts, to, x, rows, K);                                                             \
    }
PACK_X(pack_x1, 1)
PACK_X(pack_x2, 2)
PACK_X(pack_x3, 3)

/* ---- packing W ----------------------------------------------------------------------------------
 * TILES:  [step][two tiles][16 pairs of columns][16 rows][2 columns] of bfloat16.
 * HALVES: the same size. A pair of columns has the even column of 16 rows, then the odd one.
 * Bytes:  [group][scales (32)][two steps][two tiles][16 pairs][even column of 16 rows, odd one]. */

enum { GROUP_BYTES = NR * sizeof(float) + 2 * TILE_BYTES, GROUP_TILES = 2 * PAIR };

/* Row i of the panel: 16 from row[0] on and 16 from row[1] on, repeating the last. */
static int panel_row(const w_panel *p, int i) {
    return min_int(p->row[i / 16] + i % 16, p->w->rows - 1);
}

/* v (32) = columns k .. k+31 of row n of an F16 matrix, zeros past its columns */
TEMPLATE void half_columns(uint16_t v[STEP], const qemb_mat *w, int n, int k) {
    const uint16_t *from = (const uint16_t *)w->data + (size_t)n * w->cols + k;
    const int left = w->cols - k;
    if (left >= STEP) {
        memcpy(v, from, STEP * sizeof *v);
        return;
    }
    memset(v, 0, STEP * sizeof *v);
    if (left > 0) memcpy(v, from, (size_t)left * sizeof *v);
}

/* panel, as TILES or HALVES, = columns k0 .. k1-1 of an F16 matrix */
TEMPLATE void pack_f16(w_form form, float *panel, const w_panel *p, int k0, int k1) {
    uint8_t *to = (uint8_t *)panel;
    for (int s = 0; s < 2 * ceil_div(k1 - k0, GROUP); s++, to += PAIR)
        for (int i = 0; i < NR; i++) {
            uint16_t v[STEP];
            uint8_t *tile = to + i / 16 * TILE_BYTES;
            half_columns(v, p->w, panel_row(p, i), k0 + s * STEP);
            if (form == HALVES) {
                for (int k = 0; k < STEP; k++) memcpy(tile + k * 32 + i % 16 * 2, v + k, 2);
                continue;
            }
            *(words *)v = upper_halves(to_bf16((uvec)halves16(v)), to_bf16((uvec)halves16(v + 16)));
            for (int k = 0; k < STEP; k += 2) memcpy(tile + k * 32 + i % 16 * 4, v + k, 4);
        }
}

#define PACK_F16(name, form)                                                                       \
    WITH_AVX512 static void name(float *panel, const w_panel *p, int k0, int k1,                   \
                                 size_t prefetch_distance) {                                       \
        (void)prefetch_distance;                                                                   \
        pack_f16(form, panel, p, k0, k1);                                                          \
    }
PACK_F16(pack_tiles, TILES)
PACK_F16(pack_halves, HALVES)

/* A group of bytes q (64) of row i of a panel */
TEMPLATE void put_group(uint8_t *group, int i, const int8_t q[GROUP], float scale) {
    memcpy(group + i * sizeof scale, &scale, sizeof scale);
    uint8_t *row = group + NR * sizeof scale + i / 16 * (TILE_BYTES / 2) + i % 16;
    for (int s = 0; s < 2; s++, row += TILE_BYTES, q += STEP)
        for (int k = 0; k < STEP; k++) row[k * 16] = (uint8_t)q[k];
}

WITH_AVX512 static void pack_bytes(float *panel, const w_panel *p, int k0, int k1,
                                   size_t prefetch_distance) {
    const qemb_mat *w = p->w;
    (void)prefetch_distance;
    for (int g = 0; g < ceil_div(k1 - k0, GROUP); g++)
        for (int i = 0; i < NR; i++) {
            const int n = panel_row(p, i), k = k0 + g * GROUP;
            int8_t q[GROUP] = {0};
            memcpy(q, (const int8_t *)w->data + (size_t)n * w->cols + k,
                   (size_t)min_int(GROUP, w->cols - k));
            put_group((uint8_t *)panel + g * GROUP_BYTES, i, q,
                      w->scale[(size_t)n * QEMB_GROUPS(w->cols) + k / QEMB_GROUP]);
        }
}

/* Makes of halves what an INT8 file has: the operations of convert_weights.py, in its order. */
WITH_AVX512 static void quantize_halves(float *panel, const w_panel *p, int k0, int k1,
                                        size_t prefetch_distance) {
    (void)prefetch_distance;
    for (int g = 0; g < ceil_div(k1 - k0, GROUP); g++)
        for (int i = 0; i < NR; i++) {
            uint16_t v[GROUP];
            float w[GROUP], most;
            uint32_t magnitude[GROUP], largest = 0;
            int8_t q[GROUP];
            for (int s = 0; s < 2; s++)
                half_columns(v + s * STEP, p->w, panel_row(p, i), k0 + g * GROUP + s * STEP);
            for (int k = 0; k < GROUP; k += 16) {
                const vec numbers = halves16(v + k);
                *(vec *)(w + k) = numbers;
                *(uvec *)(magnitude + k) = (uvec)numbers & 0x7fffffff;
            }
            /* The bits of positive floats have their order; compilers find the largest integer with
             * vectors, but not the largest float. */
            for (int k = 0; k < GROUP; k++)
                largest = largest < magnitude[k] ? magnitude[k] : largest;
            memcpy(&most, &largest, sizeof most);
            const float inverse = most > 0 ? 127 / most : 0;
            for (int k = 0; k < GROUP; k++) q[k] = (int8_t)rintf(w[k] * inverse);
            put_group((uint8_t *)panel + g * GROUP_BYTES, i, q, most / 127);
        }
}

/* ---- the work between the steps -------------------------------------------------------------- */

typedef struct {
    /* Sums that are folded into y: of the register tile before, or of its last group. */
    float *sums; /* (rows, NR) */
    int row, rows;
    const float *scale; /* (NR) of the group; BYTES alone */
    float *groups;      /* (ROWS, NR) the scaled sums of the groups before */
    int first, last;    /* group */
    float *y;
    size_t ldy;
    int cols, add;
    float alpha;
    /* gate_up's last chunk: h (rows, h_cols) = swiglu of y + alpha sums; else NULL */
    float *h;
    size_t ldh;
    int h_cols;
    void (*swiglu)(float *h, size_t ldh, int rows, int cols, const float *sums);
    /* The next panel, which becomes bfloat16: rows of 32 numbers, one of each tile row */
    const uint8_t *from;
    uint8_t *to;
    int expanded, to_expand;
    /* Bytes to prefetch, `lines` cache lines a step */
    const uint8_t *prefetch, *prefetch_end;
    int lines;
} work;

/* y[0 .. n-1] = (add ? y : 0) + alpha v, n <= 16 */
INLINE void store_y(float *y, vec v, int n, int add, float alpha) {
    const vec sum = fma16(v, all16(alpha), load_first(y, add ? n : 0));
    if (n >= 16)
        *(vec *)y = sum;
    else if (n > 0)
        memcpy(y, &sum, (size_t)n * sizeof *y);
}

TEMPLATE void fold_row(const plan *a, work *b) {
    const int i = b->row++;
    float *sums = b->sums + i * NR;
    UNROLL
    for (int h = 0; h < NR; h += 16) {
        vec v = *(const vec *)(sums + h);
        if (a->form == BYTES) {
            vec *before = (vec *)(b->groups + i * NR + h);
            v = fma16(v, *(const vec *)(b->scale + h), b->first ? all16(0) : *before);
            if (!b->last) {
                *before = v;
                continue;
            }
        }
        float *y = b->y + i * b->ldy + h;
        if (b->h)
            *(vec *)(sums + h) = fma16(v, all16(b->alpha), load_first(y, b->add ? 16 : 0));
        else
            store_y(y, v, b->cols - h, b->add, b->alpha);
    }
    if (b->h && (a->form != BYTES || b->last))
        b->swiglu(b->h + i * b->ldh, b->ldh, 1, b->h_cols, sums);
}

/* Row r of the next panel: 32 numbers become 64 bytes of each part. */
TEMPLATE void expand_row(const plan *a, work *b) {
    const int r = b->expanded++, step = r / STEP, in = r % STEP; /* `in` two tiles */
    uint8_t *to = b->to + step * a->w_parts * PAIR + in * 64;
    vec even, odd;
    if (a->form == HALVES) {
        even = halves16(b->from + (size_t)r * 64), odd = halves16(b->from + (size_t)r * 64 + 32);
    } else {
        const uint8_t *group = b->from + step / 2 * GROUP_BYTES;
        const float *scale = (const float *)group + in / 16 * 16;
        const int8_t *q = (const int8_t *)group + NR * sizeof *scale + step % 2 * TILE_BYTES;
        even = bytes16(q + in * 32), odd = bytes16(q + in * 32 + 16);
        if (a->form == SCALED_BYTES) even *= *(const vec *)scale, odd *= *(const vec *)scale;
    }
    const uvec e = to_bf16((uvec)even), o = to_bf16((uvec)odd);
    *(uvec *)to = e >> 16 | o;
    if (a->w_parts == 2) /* what is left of each has 3 bits */
        *(uvec *)(to + PAIR) = (uvec)(even - (vec)e) >> 16 | (uvec)(odd - (vec)o);
}

/* A step's share of the work: `folds` and `expands` times the steps are all of it. */
TEMPLATE void do_work(const plan *a, work *b, int folds, int expands) {
    for (int i = 0; i < folds && b->row < b->rows; i++) fold_row(a, b);
    if (is_expanded(a->form))
        for (int i = 0; i < expands && b->expanded < b->to_expand; i++) expand_row(a, b);
    for (int i = 0; i < b->lines && b->prefetch < b->prefetch_end; i++, b->prefetch += 64)
        __builtin_prefetch(b->prefetch, 0, 2);
}

/* ---- the products ---------------------------------------------------------------------------- */

/* One step. two: the tile of x has more than 16 rows. Tiles 0 to 3 hold the sums: rows 0 .. 15
 * times the panel's two tiles, then rows 16 .. 31; 4 and 5 hold x, 6 and 7 W. */
TEMPLATE void multiply_step(const plan *a, const uint8_t *x, const uint8_t *w, int two) {
    UNROLL
    for (int i = 0; i < a->products; i++) {
        const int new_x = !i || a->x[i] != a->x[i - 1], new_w = !i || a->w[i] != a->w[i - 1];
        const uint8_t *xi = x + a->x[i] * PAIR, *wi = w + a->w[i] * PAIR;
        if (new_w) tile_stream(6, wi, 64);
        if (new_x) tile_stream(4, xi, 64);
        tile_dp_bf16(0, 4, 6);
        if (two) {
            if (new_x) tile_stream(5, xi + TILE_BYTES, 64);
            tile_dp_bf16(2, 5, 6);
        }
        if (new_w) tile_stream(7, wi + TILE_BYTES, 64);
        tile_dp_bf16(1, 4, 7);
        if (two) tile_dp_bf16(3, 5, 7);
    }
}

/* A thread's scratch. */
typedef struct {
    uint8_t panel[2][2 * CHUNK * NR * 2]; /* bfloat16 of two parts: in use, and being made */
    float sums[SUMS];
    float groups[SUMS];
    /* gate_up with several chunks: (panel of the item, tile of x, ROWS, NR) */
    float gate_up[ITEM_PANELS * (X_CACHED / (CHUNK * ROWS * 2)) * SUMS];
} scratch;

/* Columns k0 .. k1-1 of panel p: what a register tile multiplies. */
typedef struct {
    int p, k0, k1;
} block;

/* The next one: all panels of a chunk, then the next chunk. 0: there is none. */
static int next_block(block *c, int first, int last, int columns, int K) {
    if (++c->p < last) return 1;
    c->p = first, c->k0 = c->k1, c->k1 = min_int(K, c->k0 + columns);
    return c->k0 < K;
}

/* The columns of a chunk: even shares of K, which is a multiple of GROUP. */
static int chunk_columns(int K) { return round_up(ceil_div(K, ceil_div(K, CHUNK)), GROUP); }

/* Steps 0 .. steps-1 of a register tile. The work between them is what `b` has. */
TEMPLATE void multiply_steps(const plan *a, work *b, const uint8_t *x, const uint8_t *w, int steps,
                             int rows, int expands) {
    const int folds = ceil_div(ROWS, steps), two = rows > 16;
    const int x_step = a->x_parts * PAIR, w_step = a->w_parts * PAIR;
    tile_zero(0), tile_zero(1), tile_zero(2), tile_zero(3);
    if (two)
        for (int s = 0; s < steps; s++) {
            multiply_step(a, x + s * x_step, w + s * w_step, 1);
            do_work(a, b, folds, expands);
        }
    else
        for (int s = 0; s < steps; s++) {
            multiply_step(a, x + s * x_step, w + s * w_step, 0);
            do_work(a, b, folds, expands);
        }
    float *sums = b->sums; /* of the tile before, all folded */
    tile_store(0, sums, NR * sizeof *sums), tile_store(1, sums + 16, NR * sizeof *sums);
    if (two) {
        tile_store(2, sums + SUMS / 2, NR * sizeof *sums);
        tile_store(3, sums + SUMS / 2 + 16, NR * sizeof *sums);
    }
    b->row = 0, b->rows = rows;
}

/* Where the sums of tile i of x and block c go. */
static void set_target(work *b, const matmul_job *j, scratch *r, const block *c, int first, int i,
                       int last_chunk) {
    const int N = j->w->rows, t = i * ROWS;
    b->alpha = j->w->alpha, b->add = j->add || c->k0, b->h = NULL;
    if (!j->is_gate_up) {
        b->y = j->y + (size_t)t * N + (size_t)c->p * NR, b->ldy = (size_t)N;
        b->cols = min_int(NR, N - c->p * NR);
        return;
    }
    b->y = r->gate_up + ((size_t)(c->p - first) * j->tiles + i) * SUMS, b->ldy = NR, b->cols = NR;
    if (!last_chunk) return;
    b->ldh = (size_t)N / 2, b->h = j->y + (size_t)t * b->ldh + (size_t)c->p * 16;
    b->h_cols = min_int(16, N / 2 - c->p * 16);
    b->swiglu = j->be->gemm_type->swiglu;
}

/* A tile of x times a block. BYTES: each group has sums of its own. */
TEMPLATE void multiply_tile(const plan *a, work *b, const matmul_job *j, scratch *r, const block *c,
                            int first, int i, int last_chunk, const uint8_t *w, const float *scales,
                            int expands) {
    const gemm_type *type = j->be->gemm_type;
    const int steps = (c->k1 - c->k0) / STEP, each = a->form == BYTES ? GROUP / STEP : steps;
    const uint8_t *x =
        (const uint8_t *)(j->packed + i * x_floats(type, j->w->cols) + x_floats(type, c->k0));
    for (int s = 0; s < steps; s += each) {
        multiply_steps(a, b, x + s * a->x_parts * PAIR, w + s * a->w_parts * PAIR, each,
                       min_int(ROWS, j->T - i * ROWS), expands);
        set_target(b, j, r, c, first, i, last_chunk);
        b->scale = (const float *)((const uint8_t *)scales + s / 2 * GROUP_BYTES);
        b->groups = r->groups, b->first = s == 0, b->last = s + each == steps;
    }
}

/* Panels first .. last-1 times all tiles of x */
TEMPLATE void multiply_item(const plan *a, const matmul_job *j, int first, int last, float *room) {
    scratch *r = (scratch *)room;
    const gemm_type *type = j->be->gemm_type;
    const weight_kind kind = packed_kind(type, j->w);
    const int K = round_up(j->w->cols, GROUP), columns = chunk_columns(K);
    const uint8_t *tiles = j->w->data;
    const size_t panel = w_floats(type, kind, K) * sizeof(float);
    const amx_config whole = amx_whole_tiles();
    work b = {.sums = r->sums};
    block c = {first, 0, min_int(K, columns)}, ahead = c;
    int side = 0;
#define IN_MEMORY(block)                                                                           \
    (tiles + (block).p * panel + w_floats(type, kind, (block).k0) * sizeof(float))
    tile_config(&whole);
    if (is_expanded(a->form)) { /* no products have come before the first panel */
        b.from = IN_MEMORY(c), b.to = r->panel[0], b.to_expand = c.k1 - c.k0;
        while (b.expanded < b.to_expand) expand_row(a, &b);
    }
    for (int more = 1; more; c = ahead, side ^= 1) {
        const int turns = (c.k1 - c.k0) / STEP * j->tiles;
        const uint8_t *w = is_expanded(a->form) ? r->panel[side] : IN_MEMORY(c);
        more = next_block(&ahead, first, last, columns, K);
        b.expanded = b.to_expand = 0;
        if (more && is_expanded(a->form))
            b.from = IN_MEMORY(ahead), b.to = r->panel[side ^ 1], b.to_expand = ahead.k1 - ahead.k0;
        block fetched = ahead;
        b.prefetch = b.prefetch_end = NULL;
        if (more && (!is_expanded(a->form) || next_block(&fetched, first, last, columns, K))) {
            b.prefetch = IN_MEMORY(fetched);
            b.prefetch_end =
                b.prefetch + w_floats(type, kind, fetched.k1 - fetched.k0) * sizeof(float);
        }
        b.lines = ceil_div((int)(b.prefetch_end - b.prefetch) / 64, turns);
        for (int i = 0; i < j->tiles; i++)
            multiply_tile(a, &b, j, r, &c, first, i, c.k1 == K, w, (const float *)IN_MEMORY(c),
                          ceil_div(b.to_expand, turns));
    }
    while (b.row < b.rows) fold_row(a, &b);
    tile_release();
#undef IN_MEMORY
}

#define MULTIPLY(name, a)                                                                          \
    WITH_AVX512 static void name(const matmul_job *j, int first, int last, float *room) {          \
        multiply_item(&(a), j, first, last, room);                                                 \
    }
MULTIPLY(multiply_bf16, bf16_tiles)
MULTIPLY(multiply_x2, x2_tiles)
MULTIPLY(multiply_x3, x3_tiles)
MULTIPLY(multiply_x2_halves, x2_halves)
MULTIPLY(multiply_x3_halves, x3_halves)
MULTIPLY(multiply_bf16_bytes, bf16_bytes)
MULTIPLY(multiply_x2_bytes, x2_bytes)
MULTIPLY(multiply_x3_bytes, x3_bytes)

/* ---- the tables ------------------------------------------------------------------------------ */

enum { TILE_FLOATS = GROUP_TILES / sizeof(float), BYTE_FLOATS = GROUP_BYTES / sizeof(float) };

/* The members that all have. x_tiles: as many as keep a chunk of x in X_CACHED bytes. */
#define GEMM_TYPE(parts, pack, of_swiglu)                                                          \
    .per_dword = 2, .columns = GROUP, .x_floats = (parts)*TILE_FLOATS, .tile_rows = ROWS,          \
    .x_tiles = X_CACHED / ((parts)*CHUNK * ROWS * 2), .item_panels = ITEM_PANELS,                  \
    .scratch_floats = sizeof(scratch) / sizeof(float), .pack_x = (pack), .swiglu = (of_swiglu)

static const gemm_type f32 = {
    GEMM_TYPE(3, pack_x3, avx512_swiglu_f32),
    .weights = {[W_F16] = {1, TILE_FLOATS, pack_halves, NULL, multiply_x3_halves},
                [W_BF16] = {1, TILE_FLOATS, pack_tiles, NULL, multiply_x3},
                [W_I8] = {1, BYTE_FLOATS, pack_bytes, NULL, multiply_x3_bytes}}};
static const gemm_type int16 = {
    GEMM_TYPE(2, pack_x2, avx512_swiglu_f32),
    .weights = {[W_F16] = {1, TILE_FLOATS, pack_halves, NULL, multiply_x2_halves},
                [W_BF16] = {1, TILE_FLOATS, pack_tiles, NULL, multiply_x2},
                [W_I8] = {1, BYTE_FLOATS, pack_bytes, NULL, multiply_x2_bytes}}};
static const gemm_type bf16 = {
    GEMM_TYPE(1, pack_x1, avx512_swiglu_8bit),
    .weights = {[W_F16] = {1, TILE_FLOATS, pack_tiles, NULL, multiply_bf16},
                [W_I8] = {1, BYTE_FLOATS, pack_bytes, NULL, multiply_bf16_bytes}}};
static const gemm_type int8 = {
    GEMM_TYPE(1, pack_x1, avx512_swiglu_8bit),
    .weights = {[W_F16] = {1, BYTE_FLOATS, quantize_halves, NULL, multiply_bf16_bytes},
                [W_I8] = {1, BYTE_FLOATS, pack_bytes, NULL, multiply_bf16_bytes}}};

PACKED_TABLE(amx_ops, "amx", QEMB_MATH_F32, f32, avx512_with_f32_attention)
PACKED_TABLE(amx_int16_ops, "amx-int16", QEMB_MATH_INT16, int16, avx512_with_int16_attention)
PACKED_TABLE(amx_bf16_ops, "amx-bf16", QEMB_MATH_BF16, bf16, avx512_with_int16_attention)
PACKED_TABLE(amx_int8_ops, "amx-int8", QEMB_MATH_INT8, int8, avx512_with_int16_attention)

#endif
