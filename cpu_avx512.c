/* cpu_avx512.c - the CPU's ops with AVX-512 (F, BW, DQ and VL: servers since 2017, Zen 4) and BMI2. A
 * function says for which instructions it is compiled; the tables are handed out only where the CPU
 * has them.
 *
 * The promise is qemb.c's: a row's result depends on that row alone, bit for bit. Every sum has one
 * order: a matmul adds up columns one dword (see cpu_avx512.h) after the other within KC of them, in
 * however many rows a tile has.
 */
#include "cpu_avx512.h"

#if defined(__x86_64__)

#include <assert.h>
#include <string.h>

enum {
    KC = 3072,            /* dwords of a packed panel: KC x NR of them, 384 KiB of an L2 cache */
    ATTENTION_ROWS = 512, /* keys and values are brought in form once for so many */
    ITEM_TILES = 24,      /* tiles of x times panels of W in a work item, or one panel */
    FEW_TILES = 3,        /* up to so many tiles of x read a panel as it was placed */
    X_ROWS = 86 * MR      /* rows of x that are packed at a time, and share one packing of W */
};

static float *f32(qemb_act *a) { return (float *)a; }
static const float *cf32(const qemb_act *a) { return (const float *)a; }

AVX512 void avx512_exp(float *y, const float *x, int n) {
    for (int i = 0; i < n; i += 16) store_first(y + i, exp16(load_first(x + i, n - i)), n - i);
}

/* ---- rows ------------------------------------------------------------------------------------- */

AVX512 static void half_row(float *y, const uint16_t *x, int n) {
    for (int i = 0; i < n; i += 16)
        store_first(y + i, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(n - i), x + i)), n - i);
}

/* 1 / sqrt(mean(x^2) + eps) of one row, summed in double */
TEMPLATE __m512 rms_scale(const float *x, int n, float eps) {
    __m512d sum[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(),
                      _mm512_setzero_pd()};
    for (int i = 0; i < n; i += 32) UNROLL for (int h = 0; h < 2; h++) {
            const __m512 v = load_first(x + i + 16 * h, n - i - 16 * h);
            const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
            const __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
            sum[2 * h] = _mm512_fmadd_pd(a, a, sum[2 * h]);
            sum[2 * h + 1] = _mm512_fmadd_pd(b, b, sum[2 * h + 1]);
        }
    const double all = _mm512_reduce_add_pd(
        _mm512_add_pd(_mm512_add_pd(sum[0], sum[1]), _mm512_add_pd(sum[2], sum[3])));
    return _mm512_set1_ps((float)(1 / sqrt(all / n + eps)));
}

/* Numbers of x from i on, normalised */
TEMPLATE __m512 normed(const float *x, const float *w, int i, int n, __m512 scale) {
    return _mm512_mul_ps(_mm512_mul_ps(load_first(x + i, n - i), scale), load_first(w + i, n - i));
}

AVX512 static void rmsnorm_row(float *y, const float *x, const float *w, int n, float eps) {
    const __m512 scale = rms_scale(x, n, eps);
    for (int i = 0; i < n; i += 16) store_first(y + i, normed(x, w, i, n, scale), n - i);
}

AVX512 static void norm_rotate(float *head, const float *w, const float *cosines,
                               const float *sines, int half, float eps) {
    const __m512 scale = rms_scale(head, 2 * half, eps);
    for (int i = 0; i < half; i += 16) {
        const int n = half - i;
        const __m512 a = normed(head, w, i, half, scale);
        const __m512 b = normed(head + half, w + half, i, half, scale);
        const __m512 c = load_first(cosines + i, n), s = load_first(sines + i, n);
        store_first(head + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), n);
        store_first(head + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), n);
    }
}

/* silu(g) u. What is rounded to 8 bits afterwards may err by 2^-13: of exp 2^-14.5, of rcp 2^-14. */
TEMPLATE __m512 swiglu16(int rough, __m512 g, __m512 u) {
    const __m512 minus = _mm512_sub_ps(_mm512_setzero_ps(), g), one = _mm512_set1_ps(1);
    const __m512 below = _mm512_add_ps(one, rough ? exp16_rough(minus) : exp16(minus));
    return _mm512_mul_ps(rough ? _mm512_mul_ps(g, _mm512_rcp14_ps(below)) : _mm512_div_ps(g, below),
                         u);
}

AVX512 static void swiglu_row(float *h, const float *gate, const float *up, int n) {
    for (int i = 0; i < n; i += 16)
        store_first(h + i, swiglu16(0, load_first(gate + i, n - i), load_first(up + i, n - i)),
                    n - i);
}

/* ---- the products' tiles, of x packed (k, MR) */

TILE(tile_f16, F32, HALVES, 1, MR)
TILE(tile_f32, F32, DWORDS, 1, MR)
TILE(tile_bf16, BF16, DWORDS, 1, MR)

/* Integers come in groups of 64 columns, each with a scale per row. Of x: dwords (n, MR), bytes with
 * 128 added, then scales (MR). Of W: scales (NR), of bytes -128 times the sums of the group's (NR),
 * which takes x's 128 out again, then dwords (n, NR). Sums of a group are exact. */
enum {
    GROUP = 64,
    GROUP_ROWS = MR / 2, /* there are two sums for each, of integers and of floats */
    X_GROUP8 = (GROUP / 4 + 1) * MR,
    X_GROUP16 = (GROUP / 2 + 1) * MR,
    W_GROUP8 = (GROUP / 4 + 2) * NR,
    W_GROUP16 = (GROUP / 2 + 1) * NR,
    PANEL_FLOATS = KC / (GROUP / 4) * W_GROUP8, /* of the largest arithmetic's panel */
};

/* A group's dwords of a row */
TEMPLATE int group_dwords(dword_of of) { return of == INT8 ? GROUP / 4 : GROUP / 2; }
/* Floats of W before them */
TEMPLATE int group_head(dword_of of) { return of == INT8 ? 2 * NR : NR; }

TEMPLATE void tile_rows_groups(dword_of of, const tile_out *o, int rows, const float *x,
                               const float *panel, int groups) {
    __m512 acc[GROUP_ROWS][2];
    const float *ahead = o->ahead;
    tile_begin(o, rows, acc);
    const int n = group_dwords(of), head = group_head(of);
    for (; groups; groups--, x += (n + 1) * MR, panel += head + n * NR) {
        __m512 sum[GROUP_ROWS][2];
        UNROLL for (int i = 0; i < rows; i++) UNROLL for (int h = 0; h < 2; h++) sum[i][h] =
            of == INT8 ? _mm512_load_ps(panel + NR + 16 * h) : _mm512_setzero_ps();
        ahead = fetch(o, ahead);
        tile(of, DWORDS, sum, rows, x, 1, MR, panel + head, n);
        UNROLL for (int h = 0; h < 2; h++) {
            const __m512 w = _mm512_load_ps(panel + 16 * h);
            UNROLL for (int i = 0; i < rows; i++) {
                const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(x[n * MR + i]), w);
                acc[i][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(sum[i][h])),
                                            factor, acc[i][h]);
            }
        }
    }
    tile_end(o, 0, rows, acc);
}

/* name: rows <= MR, n dwords, of which a last group may not have all */
#define TILE_GROUPS(name, of)                                                                      \
    AVX512 static void name(const tile_out *o, int rows, const float *x, const float *panel,       \
                            int n) {                                                               \
        const int groups = ceil_div(n, group_dwords(of));                                          \
        tile_out to = *o;                                                                          \
        for (int left = ceil_div(rows, GROUP_ROWS); left; left--) {                                \
            const int m = ceil_div(rows, left);                                                    \
            switch (m) {                                                                           \
                CASE(1, tile_rows_groups(of, &to, 1, x, panel, groups))                            \
                CASE(2, tile_rows_groups(of, &to, 2, x, panel, groups))                            \
                CASE(3, tile_rows_groups(of, &to, 3, x, panel, groups))                            \
                CASE(4, tile_rows_groups(of, &to, 4, x, panel, groups))                            \
                CASE(5, tile_rows_groups(of, &to, 5, x, panel, groups))                            \
                CASE(6, tile_rows_groups(of, &to, 6, x, panel, groups))                            \
            }                                                                                      \
            x += m, to.y += m * o->ldy, rows -= m, to.ahead = NULL;                                \
        }                                                                                          \
    }
TILE_GROUPS(tile_int8, INT8)
TILE_GROUPS(tile_int16, INT16)

/* ---- matmul: y = alpha x W^T ------------------------------------------------------------------
 * x is packed in tiles of MR rows, in the arithmetic's dwords, all of them before the products. An
 * item is some panels of W and all tiles of x: every tile meets a panel, KC dwords of its columns at a
 * time, and fetches a share of the next. Dwords that a row ends within are filled up with zeros.
 *
 * Most matrices are placed as panels (below); where one is not, packing costs about 0.4 cycles a dword
 * of W, of which each row takes 1/16. In float, panels of F16 matrices are halves; as a conversion
 * takes the time of a multiplication, many tiles have the panel converted for all of them.
 *
 * gate_up's panels are 16 rows of gate's and the same 16 of up's, so that a tile's sums are all that
 * SwiGLU needs. They never reach memory outside a thread's scratch. */

typedef struct {
    const qemb_backend *be;
    float *y; /* (T, N) */
    const float *x;
    const qemb_mat *w;
    float *packed; /* (tiles, x_floats of a row) x */
    int T, add, tiles;
    int gated;  /* y (T, N/2) = silu of the first N/2 columns times the others */
    int few;    /* at most FEW_TILES tiles */
    int panels; /* of an item */
} matmul_job;

typedef struct {
    const qemb_mat *w;
    int row[2]; /* of W, where the panel's halves of 16 begin */
} w_panel;

static int panel_count(const qemb_mat *w, int gated) {
    return gated ? ceil_div(w->rows / 2, 16) : ceil_div(w->rows, NR);
}

/* From a panel's rows on to the next one's */
static int panel_rows(int gated) { return gated ? 16 : NR; }

static w_panel panel_of(const qemb_mat *w, int p, int gated) {
    const int first = p * panel_rows(gated);
    return (w_panel){w, {first, first + (gated ? w->rows / 2 : 16)}};
}

typedef struct { /* an arithmetic: how numbers become dwords, and what multiplies them */
    int per_dword;
    int columns;            /* that come together */
    int x_floats, w_floats; /* that they take of a tile of x and of a placed panel of W */
    void (*pack_x)(const matmul_job *j, int tile, float *to);
    struct { /* of F16, of I8 */
        int placed;
        /* `ahead`: how many numbers on those lie that will be packed next */
        void (*pack_w)(float *panel, const w_panel *p, int k0, int k1, size_t ahead);
        void (*multiply)(const tile_out *o, int rows, const float *x, const float *panel, int n);
    } of[2];
    /* Where an I8's panel suits many rows better: makes it of an F16's, n dwords. Or NULL */
    void (*widen)(float *to, const float *panel, int n);
    void (*swiglu)(const matmul_job *j, int t, int rows, int p, const float *sums);
} arithmetic;

static int tile_start(const matmul_job *j, int i) { return (int)((long)j->T * i / j->tiles); }

/* Where 16 rows of W from row n on lie, those past the last repeating it */
typedef const uint8_t *w_rows[16];

static void find_rows(w_rows row, const qemb_mat *w, int n, int bytes) {
    for (int i = 0; i < 16; i++)
        row[i] = (const uint8_t *)w->data + (size_t)min_int(n + i, w->rows - 1) * w->cols * bytes;
}

/* 64 bytes of each row are worked on; those that come next, `ahead` bytes on, are fetched. */
TEMPLATE void prefetch_rows(const w_rows row, size_t at, size_t ahead) {
    UNROLL for (int i = 0; i < 16; i++)
        _mm_prefetch((const char *)row[i] + at + ahead, _MM_HINT_T1);
}

/* ---- float, bfloat16 */

/* Two vectors of floats, rounded to nearest even: dword i holds numbers 2i and 2i+1 of 32. */
TEMPLATE __m512 to_bf16(__m512 lo, __m512 hi) {
    __m512 v;
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(v) : "v"(lo), "v"(hi));
    return v;
}

/* Of INT8 the same rows' scales, of group g in scale[g % 16]: 16 groups of each are loaded where they
 * begin, or at the first column, k0. */
TEMPLATE void next_scales(float scale[16][16], const qemb_mat *w, int n, int k, int k0) {
    const int groups = QEMB_GROUPS(w->cols), g = k / QEMB_GROUP / 16 * 16;
    if (k > k0 && k % (16 * QEMB_GROUP)) return;
    __m512 r[16];
    UNROLL for (int i = 0; i < 16; i++) r[i] =
        load_first(w->scale + (size_t)min_int(n + i, w->rows - 1) * (size_t)groups + g, groups - g);
    transpose(r);
    UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_ps(scale[i], r[i]);
}

/* Columns k .. k+15 of a row of W, `some` of them */
TEMPLATE __m512 weights16(qemb_dtype dtype, const uint8_t *row, float scale, int k,
                          __mmask16 some) {
    if (dtype == QEMB_I8) {
        const __m512i q = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, row + k));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(scale));
    }
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, row + 2 * (size_t)k));
}

/* 16 dwords from column k on */
TEMPLATE __m512 weight_dwords(dword_of of, qemb_dtype dtype, const uint8_t *row, float scale, int k,
                              const __mmask16 some[2]) {
    const __m512 v = weights16(dtype, row, scale, k, some[0]);
    return of == F32 ? v : to_bf16(v, weights16(dtype, row, scale, k + 16, some[1]));
}

/* The same of a row of x */
TEMPLATE __m512 x_dwords(dword_of of, const float *row, int k, int n) {
    const __m512 v = load_first(row + k, n);
    return of == F32 ? v : to_bf16(v, load_first(row + k + 16, n - 16));
}

/* to (16, MR) = columns; the MR rows that a tile is short of are zeros */
TEMPLATE void store_x(float *to, __m512 r[16]) {
    transpose(r);
    UNROLL for (int c = 0; c < 16; c++) _mm512_mask_storeu_ps(to + c * MR, (1u << MR) - 1, r[c]);
}

TEMPLATE void pack_x(dword_of of, const matmul_job *j, int tile, float *to) {
    const int K = j->w->cols, step = of == F32 ? 16 : 32, t = tile_start(j, tile);
    const int rows = tile_start(j, tile + 1) - t;
    for (int k = 0; k < K; k += step, to += 16 * MR) {
        __m512 r[16];
        UNROLL for (int i = 0; i < 16; i++) r[i] =
            i < rows ? x_dwords(of, j->x + (size_t)(t + i) * K, k, K - k) : _mm512_setzero_ps();
        store_x(to, r);
    }
}

/* panel (dwords, NR) = columns k0 .. k1-1 of W's rows n0 .. n0+NR-1 */
TEMPLATE void pack_w(dword_of of, qemb_dtype dtype, float *panel, const w_panel *p, int k0, int k1,
                     size_t ahead) {
    const int step = of == F32 ? 16 : 32, bytes = dtype == QEMB_I8 ? 1 : 2;
    for (int h = 0; h < 2; h++) {
        w_rows row;
        find_rows(row, p->w, p->row[h], bytes);
        float *to = panel + 16 * h, scale[16][16];
        for (int k = k0; k < k1; k += step, to += 16 * NR) {
            const __mmask16 some[2] = {first16(p->w->cols - k), first16(p->w->cols - k - 16)};
            __m512 r[16];
            const float *s = scale[k / QEMB_GROUP % 16];
            if (dtype == QEMB_I8) next_scales(scale, p->w, p->row[h], k, k0);
            if (k * bytes % 64 == 0) prefetch_rows(row, (size_t)k * bytes, ahead * bytes);
            UNROLL for (int i = 0; i < 16; i++) r[i] =
                weight_dwords(of, dtype, row[i], dtype == QEMB_I8 ? s[i] : 1, k, some);
            transpose(r);
            UNROLL for (int c = 0; c < 16; c++) _mm512_store_ps(to + c * NR, r[c]);
        }
    }
}

/* The same of F16 weights, as they are: pairs of 32 columns are transposed, then parted. */
AVX512 static void pack_halves(float *panel, const w_panel *p, int k0, int k1, size_t ahead) {
    const __m512i part = _mm512_setr_epi32(
        0x020000, 0x060004, 0x0a0008, 0x0e000c, 0x120010, 0x160014, 0x1a0018, 0x1e001c, 0x030001,
        0x070005, 0x0b0009, 0x0f000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d);
    for (int h = 0; h < 2; h++) {
        w_rows row;
        find_rows(row, p->w, p->row[h], 2);
        float *to = panel + 8 * h;
        for (int k = k0; k < k1; k += 32) {
            const int left = k1 - k;
            const __mmask32 some = left >= 32 ? ~0u : (1u << left) - 1;
            __m512 r[16];
            prefetch_rows(row, (size_t)k * 2, ahead * 2);
            UNROLL for (int i = 0; i < 16; i++) r[i] =
                _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(some, row[i] + 2 * (size_t)k));
            transpose(r);
            UNROLL for (int c = 0; c < 16; c++, to += 2 * HALF_ROW) {
                if (c == 8 && left <= 16) break; /* there the panel ends */
                const __m512i v = _mm512_permutexvar_epi16(part, _mm512_castps_si512(r[c]));
                _mm256_store_si256((__m256i *)to, _mm512_castsi512_si256(v));
                _mm256_store_si256((__m256i *)(to + HALF_ROW), _mm512_extracti64x4_epi64(v, 1));
            }
        }
    }
}

/* to (n, NR) = a panel of halves, as floats */
AVX512 static void widen(float *to, const float *panel, int n) {
    for (int k = 0; k < n; k++, to += DWORD_ROW) {
        _mm512_store_ps(to, panel16(HALVES, panel, k, 0));
        _mm512_store_ps(to + 16, panel16(HALVES, panel, k, 1));
    }
}

#define PACK(name, of)                                                                             \
    AVX512 static void name##_x(const matmul_job *j, int tile, float *to) {                        \
        pack_x(of, j, tile, to);                                                                   \
    }                                                                                              \
    AVX512 static void name##_i8(float *panel, const w_panel *p, int k0, int k1, size_t ahead) {   \
        pack_w(of, QEMB_I8, panel, p, k0, k1, ahead);                                              \
    }
PACK(pack_f32, F32)
PACK(pack_bf16, BF16)

AVX512 static void pack_bf16_f16(float *panel, const w_panel *p, int k0, int k1, size_t ahead) {
    pack_w(BF16, QEMB_F16, panel, p, k0, k1, ahead);
}

/* ---- int8, int16: a group's numbers are integers times its scale, which is found for 16 rows at a
 * time. Of 8 bits the largest magnitude becomes 127. Of 16 bits it may become INT16_MOST, but the
 * group's length only GROUP_LENGTH: no sum of x times W can pass 2^31 (Cauchy and Schwarz), rounding
 * included, which adds 4 to a length. Of W the scale is a power of two then: a half whose integer is
 * 1024 or more stays what it is. */

enum { GROUP_LENGTH = 46330 };

TEMPLATE void load_x64(__m512 v[4], const float *row, int n) {
    UNROLL for (int i = 0; i < 4; i++) v[i] = load_first(row + 16 * i, n - 16 * i);
}

TEMPLATE void load_w64(qemb_dtype dtype, __m512 v[4], const uint8_t *row, float scale, int k,
                       int n) {
    UNROLL for (int i = 0; i < 4; i++) v[i] =
        weights16(dtype, row, scale, k + 16 * i, first16(n - 16 * i));
}

/* Lanewise, of up to 16 rows' groups */
typedef struct {
    __m512 most[16], squares[16];
} group_sizes;

TEMPLATE void measure64(dword_of of, group_sizes *s, int i, const __m512 v[4]) {
    __m512i most = _mm512_setzero_si512();
    __m512 squares = _mm512_setzero_ps();
    UNROLL for (int g = 0; g < 4; g++) {
        most = larger(most, v[g]);
        if (of == INT16) squares = _mm512_fmadd_ps(v[g], v[g], squares);
    }
    s->most[i] = _mm512_castsi512_ps(most), s->squares[i] = squares;
}

/* The scales (16), and inverse (16) theirs. What is not finite makes them not finite. Where squares
 * vanish, below 1e-19, sums may pass 2^31 all the same: what that spoils is as small. */
TEMPLATE __m512 group_scales(dword_of of, float inverse[16], group_sizes *s) {
    const __m512 most = largest_of(s->most);
    if (of == INT8) return scales(inverse, most, 127);
    const __m512 share = _mm512_mul_ps(_mm512_sqrt_ps(sums_of(s->squares)),
                                       _mm512_set1_ps((float)INT16_MOST / GROUP_LENGTH));
    return scales(inverse, _mm512_max_ps(share, most), INT16_MOST);
}

/* The next powers of two; of 0 the least that has an inverse */
TEMPLATE __m512 powers_above(float inverse[16], __m512 scale) {
    const __m512 some = _mm512_max_ps(_mm512_set1_ps(0x1p-126f), scale); /* NaN passes */
    const __m512 power = _mm512_scalef_ps(_mm512_set1_ps(2), _mm512_getexp_ps(some));
    _mm512_storeu_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1), power));
    return power;
}

/* 64 floats times inverse, rounded to nearest even, as bytes in their order */
TEMPLATE __m512 to_int8(const __m512 v[4], __m512 inverse) {
    __m512i q[4];
    UNROLL for (int i = 0; i < 4; i++) q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], inverse));
    const __m512i lanes =
        _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi32(order, lanes));
}

/* Dwords 16h .. 16h+15 of a row's group */
TEMPLATE __m512 integers(dword_of of, const __m512 v[4], float inverse, int h) {
    const __m512 f = _mm512_set1_ps(inverse);
    if (of == INT8) return to_int8(v, f);
    return to_int16(_mm512_mul_ps(v[2 * h], f), _mm512_mul_ps(v[2 * h + 1], f));
}

TEMPLATE void pack_x_groups(dword_of of, const matmul_job *j, int tile, float *to) {
    const int K = j->w->cols, t = tile_start(j, tile), rows = tile_start(j, tile + 1) - t;
    const int n = group_dwords(of);
    const __m512 offset = _mm512_castsi512_ps(_mm512_set1_epi8(-128));
    for (int k = 0; k < K; k += GROUP, to += (n + 1) * MR) {
        const float *x = j->x + (size_t)t * K + k;
        float inverse[16];
        __m512 r[16], v[4];
        group_sizes sizes;
        for (int i = 0; i < 16; i++) {
            UNROLL for (int g = 0; g < 4; g++) v[g] = _mm512_setzero_ps();
            if (i < rows) load_x64(v, x + (size_t)i * K, K - k);
            measure64(of, &sizes, i, v);
        }
        store_first(to + n * MR, group_scales(of, inverse, &sizes), MR);
        for (int h = 0; h < n / 16; h++) {
            for (int i = 0; i < 16; i++) {
                r[i] = _mm512_setzero_ps();
                if (i < rows)
                    load_x64(v, x + (size_t)i * K, K - k), r[i] = integers(of, v, inverse[i], h);
                if (of == INT8) r[i] = _mm512_xor_ps(r[i], offset);
            }
            store_x(to + 16 * h * MR, r);
        }
    }
}

/* to: dwords 16h .. 16h+15 of a group of 16 rows of W, of which r has the rows */
TEMPLATE void store_w(dword_of of, float *to, __m512 r[16], int h) {
    const __m512 offset = _mm512_castsi512_ps(_mm512_set1_epi8(-128));
    __m512 sum = _mm512_setzero_ps();
    transpose(r);
    UNROLL for (int c = 0; c < 16; c++) {
        _mm512_store_ps(to + group_head(of) + (16 * h + c) * NR, r[c]);
        if (of == INT8) sum = multiply_add(INT8, sum, offset, r[c]);
    }
    if (of == INT8)
        _mm512_store_si512(to + NR,
                           _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_castps_si512(sum)));
}

TEMPLATE void pack_w_groups(dword_of of, qemb_dtype dtype, float *panel, const w_panel *p, int k0,
                            int k1, size_t ahead) {
    const int bytes = dtype == QEMB_I8 ? 1 : 2, n = group_dwords(of);
    for (int half = 0; half < 2; half++) {
        w_rows row;
        find_rows(row, p->w, p->row[half], bytes);
        float *to = panel + 16 * half, file_scale[16][16];
        for (int k = k0; k < k1; k += GROUP, to += group_head(of) + n * NR) {
            const float *s = file_scale[k / QEMB_GROUP % 16];
            float inverse[16];
            __m512 r[16], v[4];
            group_sizes sizes;
            if (dtype == QEMB_I8) next_scales(file_scale, p->w, p->row[half], k, k0);
            for (int b = 0; b < bytes; b++)
                prefetch_rows(row, (size_t)k * bytes + 64 * b, ahead * bytes);
            for (int i = 0; i < 16; i++) {
                load_w64(dtype, v, row[i], dtype == QEMB_I8 ? s[i] : 1, k, p->w->cols - k);
                measure64(of, &sizes, i, v);
            }
            __m512 scale = group_scales(of, inverse, &sizes);
            if (of == INT16) scale = powers_above(inverse, scale);
            _mm512_store_ps(to, scale);
            for (int h = 0; h < n / 16; h++) {
                for (int i = 0; i < 16; i++) {
                    load_w64(dtype, v, row[i], dtype == QEMB_I8 ? s[i] : 1, k, p->w->cols - k);
                    r[i] = integers(of, v, inverse[i], h);
                }
                store_w(of, to, r, h);
            }
        }
    }
}

#define PACK_GROUPS(name, of)                                                                      \
    AVX512 static void name##_x(const matmul_job *j, int tile, float *to) {                        \
        pack_x_groups(of, j, tile, to);                                                            \
    }                                                                                              \
    AVX512 static void name##_f16(float *panel, const w_panel *p, int k0, int k1, size_t ahead) {  \
        pack_w_groups(of, QEMB_F16, panel, p, k0, k1, ahead);                                      \
    }
PACK_GROUPS(pack_int8, INT8)
PACK_GROUPS(pack_int16, INT16)

AVX512 static void pack_int16_i8(float *panel, const w_panel *p, int k0, int k1, size_t ahead) {
    pack_w_groups(INT16, QEMB_I8, panel, p, k0, k1, ahead);
}

/* An INT8 file's bytes and scales as they are */
AVX512 static void pack_int8_i8(float *panel, const w_panel *p, int k0, int k1, size_t ahead) {
    const qemb_mat *w = p->w;
    for (int h = 0; h < 2; h++) {
        w_rows row;
        float *to = panel + 16 * h, scale[16][16];
        find_rows(row, w, p->row[h], 1);
        for (int k = k0; k < k1; k += GROUP, to += W_GROUP8) {
            __m512 r[16];
            const __mmask64 some = w->cols - k >= 64 ? ~0ull : (1ull << (w->cols - k)) - 1;
            prefetch_rows(row, (size_t)k, ahead);
            UNROLL for (int i = 0; i < 16; i++) r[i] =
                _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(some, row[i] + k));
            next_scales(scale, w, p->row[h], k, k0);
            _mm512_store_ps(to, _mm512_loadu_ps(scale[k / QEMB_GROUP % 16]));
            store_w(INT8, to, r, 0);
        }
    }
}

/* ---- SwiGLU */

/* Rows t .. of y from gate_up's sums (rows, NR), of panel p */
TEMPLATE void swiglu_tile(int rough, const matmul_job *j, int t, int rows, int p,
                          const float *sums) {
    const int F = j->w->rows / 2, n = p * 16;
    float *h = j->y + (size_t)t * F + n;
    for (int i = 0; i < rows; i++, h += F, sums += NR)
        store_first(h, swiglu16(rough, _mm512_load_ps(sums), _mm512_load_ps(sums + 16)), F - n);
}

AVX512 static void swiglu_f32(const matmul_job *j, int t, int rows, int p, const float *sums) {
    swiglu_tile(0, j, t, rows, p, sums);
}

AVX512 static void swiglu_8bit(const matmul_job *j, int t, int rows, int p, const float *sums) {
    swiglu_tile(1, j, t, rows, p, sums);
}

/* ---- the arithmetics */

static const arithmetic arithmetics[] = {
    [QEMB_MATH_F32] = {.per_dword = 1,
                       .columns = 16,
                       .x_floats = 16 * MR,
                       .w_floats = 16 * HALF_ROW,
                       .pack_x = pack_f32_x,
                       .of = {{1, pack_halves, tile_f16}, {0, pack_f32_i8, tile_f32}},
                       .widen = widen,
                       .swiglu = swiglu_f32},
    [QEMB_MATH_BF16] = {.per_dword = 2,
                        .columns = 32,
                        .x_floats = 16 * MR,
                        .w_floats = 16 * DWORD_ROW,
                        .pack_x = pack_bf16_x,
                        .of = {{1, pack_bf16_f16, tile_bf16}, {0, pack_bf16_i8, tile_bf16}},
                        .swiglu = swiglu_8bit},
    [QEMB_MATH_INT16] = {.per_dword = 2,
                         .columns = GROUP,
                         .x_floats = X_GROUP16,
                         .w_floats = W_GROUP16,
                         .pack_x = pack_int16_x,
                         .of = {{1, pack_int16_f16, tile_int16}, {0, pack_int16_i8, tile_int16}},
                         .swiglu = swiglu_f32},
    [QEMB_MATH_INT8] = {.per_dword = 4,
                        .columns = GROUP,
                        .x_floats = X_GROUP8,
                        .w_floats = W_GROUP8,
                        .pack_x = pack_int8_x,
                        .of = {{1, pack_int8_f16, tile_int8}, {1, pack_int8_i8, tile_int8}},
                        .swiglu = swiglu_8bit},
};

/* Floats of a tile of x, a placed panel of W, with the first K columns */
static size_t x_floats(const arithmetic *a, int K) {
    return (size_t)ceil_div(K, a->columns) * (size_t)a->x_floats;
}
static size_t w_floats(const arithmetic *a, int K) {
    return (size_t)ceil_div(K, a->columns) * (size_t)a->w_floats;
}

/* ---- place: matrices become panels when they are given, one after the other, each with all its
 * columns; their pages in the map are not read again. INT8 ones that would become bfloat16 or floats,
 * two and four times their size, are left in the map and packed when they are wanted. */

static int is_placed(const qemb_backend *be, const qemb_mat *w) {
    return (uintptr_t)w->data - (uintptr_t)be->maps[CPU_MAP_WEIGHTS] <
           be->map_bytes[CPU_MAP_WEIGHTS];
}

typedef struct {
    const arithmetic *a;
    qemb_backend *be;
    float *to;
    const qemb_mat *w;
    int gated, mapped;
} placing;

static void place_panel(const void *job, int item, int thread) {
    const placing *p = job;
    const w_panel panel = panel_of(p->w, item, p->gated);
    (void)thread;
    p->a->of[p->w->dtype == QEMB_I8].pack_w(p->to + item * w_floats(p->a, p->w->cols), &panel, 0,
                                            p->w->cols, (size_t)panel_rows(p->gated) * p->w->cols);
}

static void place_matrix(qemb_mat *w, int gated, placing *p) {
    const size_t rows = (size_t)w->rows, cols = (size_t)w->cols;
    p->w = w, p->gated = gated;
    cpu_parallel(p->be->pool, panel_count(w, gated), place_panel, p);
    if (p->mapped) {
        cpu_give_back(w->data, rows * cols * (w->dtype == QEMB_I8 ? 1 : sizeof(uint16_t)));
        if (w->scale) cpu_give_back(w->scale, rows * QEMB_GROUPS(cols) * sizeof *w->scale);
    }
    w->data = p->to;
}

/* Floats of the panels of all the layers' matrices that are placed; p: makes them, too, at p->to on */
static size_t place_layers(const arithmetic *a, qemb_layer *layers, int n_layers, placing *p) {
    size_t floats = 0;
    for (int l = 0; l < n_layers; l++) {
        qemb_layer *y = &layers[l];
        qemb_mat *const all[] = {&y->wqkv, &y->wo, &y->wgu, &y->wdown};
        for (int i = 0; i < 4; i++) {
            if (!a->of[all[i]->dtype == QEMB_I8].placed) continue;
            const int gated = all[i] == &y->wgu;
            const size_t n = panel_count(all[i], gated) * w_floats(a, all[i]->cols);
            if (p) place_matrix(all[i], gated, p), p->to += n;
            floats += n;
        }
        if (p && p->be->placed) p->be->placed(l + 1, n_layers);
    }
    return floats;
}

#define CONVERTED(name, math)                                                                      \
    static size_t name(const qemb_weights *w, int n_layers) {                                      \
        return sizeof(float) * place_layers(&arithmetics[math], w->layers, n_layers, NULL);        \
    }
CONVERTED(f32_converted, QEMB_MATH_F32)
CONVERTED(bf16_converted, QEMB_MATH_BF16)
CONVERTED(int16_converted, QEMB_MATH_INT16)
CONVERTED(int8_converted, QEMB_MATH_INT8)

static int avx512_place(qemb_backend *be, qemb_weights *w, qemb_err *err) {
    placing p = {.a = &arithmetics[be->ops->math], .be = be, .mapped = w->mapped};
    const size_t bytes = be->ops->converted(w, be->c->n_layers);
    if (!bytes) return 0;
    if (!(p.to = cpu_map(be, CPU_MAP_WEIGHTS, bytes, err))) return -1;
    place_layers(p.a, w->layers, be->c->n_layers, &p);
    return 0;
}

/* ---- the products */

static void pack_tile(const void *job, int item, int thread) {
    const matmul_job *j = job;
    (void)thread;
    const arithmetic *a = &arithmetics[j->be->ops->math];
    a->pack_x(j, item, j->packed + item * x_floats(a, j->w->cols));
}

/* Columns k .. end-1 of W's panel p */
typedef struct {
    int p, k, end;
    void (*multiply)(const tile_out *o, int rows, const float *x, const float *panel, int n);
    const float *panel;
    const float *ahead; /* see tile_out */
    /* gate_up's: (MR, NR) of the tile at hand, or of all tiles where the columns do not come all at
     * once */
    float *sums;
} block;

/* y, or gate_up's sums, of tile i of x: (k ? as they are : 0) + x W^T */
static void multiply_tile(const matmul_job *j, const block *b, int i) {
    const arithmetic *a = &arithmetics[j->be->ops->math];
    const int t = tile_start(j, i), rows = tile_start(j, i + 1) - t, n = b->p * NR;
    const int N = j->w->rows, K = j->w->cols;
    const float *x = j->packed + i * x_floats(a, K) + x_floats(a, b->k);
    tile_out o = {.y = j->y + (size_t)t * N + n,
                  .ldy = (size_t)N,
                  .cols = min_int(NR, N - n),
                  .add = j->add || b->k,
                  .factor = j->w->alpha,
                  .ahead = b->ahead,
                  .ahead_floats = a->w_floats,
                  .share = i,
                  .shares = j->tiles};
    if (j->gated) {
        o.y = b->sums + (b->end - b->k < K ? i * MR * NR : 0);
        o.ldy = NR, o.cols = NR;
    }
    b->multiply(&o, rows, x, b->panel, ceil_div(b->end - b->k, a->per_dword));
    if (j->gated && b->end == K) a->swiglu(j, t, rows, b->p, o.y);
}

/* The block's panel: as it was placed, or made in `room` */
static void find_panel(const matmul_job *j, block *b, float *room) {
    const arithmetic *a = &arithmetics[j->be->ops->math];
    const int K = j->w->cols, i8 = j->w->dtype == QEMB_I8;
    b->multiply = a->of[i8].multiply;
    if (!a->of[i8].placed) {
        const w_panel p = panel_of(j->w, b->p, j->gated);
        /* next come the following columns; after the last, the following rows */
        const size_t ahead =
            b->end < K ? (size_t)(b->end - b->k) : (size_t)panel_rows(j->gated) * K - b->k;
        a->of[i8].pack_w(room, &p, b->k, b->end, ahead);
        b->panel = room;
        return;
    }
    b->panel = (const float *)j->w->data + b->p * w_floats(a, K) + w_floats(a, b->k);
    b->ahead = b->panel + w_floats(a, b->end - b->k);
    if (a->widen && !j->few) {
        a->widen(room, b->panel, b->end - b->k);
        b->panel = room, b->multiply = a->of[1].multiply;
    }
}

static void multiply_panels(const void *job, int item, int thread) {
    const matmul_job *j = job;
    const int columns = KC * arithmetics[j->be->ops->math].per_dword, K = j->w->cols;
    const int last = min_int((item + 1) * j->panels, panel_count(j->w, j->gated));
    float *room = j->be->scratch + (size_t)thread * j->be->scratch_floats;
    block b = {.p = item * j->panels, .sums = room + PANEL_FLOATS};
    for (; b.p < last; b.p++)
        for (b.k = 0; b.k < K; b.k = b.end) {
            b.end = min_int(K, b.k + columns);
            find_panel(j, &b, room);
            for (int i = 0; i < j->tiles; i++) multiply_tile(j, &b, i);
        }
}

/* y (T, N) = (add ? y : 0) + alpha x W^T, or gated: y (T, N/2) */
static void matmul_all(qemb_backend *be, float *y, const float *x, const qemb_mat *w, int T,
                       int add, int gated) {
    assert(w->dtype == QEMB_F16 || (w->dtype == QEMB_I8 && w->scale));
    assert(!arithmetics[be->ops->math].of[w->dtype == QEMB_I8].placed || is_placed(be, w));
    const int panels = panel_count(w, gated), chunks = ceil_div(T, X_ROWS);
    matmul_job j = {.be = be, .w = w, .add = add, .gated = gated, .packed = be->packed};
    for (int i = 0; i < chunks; i++) {
        const int t = (int)((long)T * i / chunks);
        j.T = (int)((long)T * (i + 1) / chunks) - t;
        j.tiles = ceil_div(j.T, MR);
        j.few = j.tiles <= FEW_TILES;
        /* Small items, as one has to be last; but a panel is fetched by the tiles of the one before,
         * which is worth it where they are few. */
        j.panels =
            max_int(1, min_int(j.few ? panels : ITEM_TILES / j.tiles, panels / (4 * be->threads)));
        j.x = x + (size_t)t * w->cols;
        j.y = y + (size_t)t * (gated ? w->rows / 2 : w->rows);
        cpu_parallel(be->pool, j.tiles, pack_tile, &j);
        cpu_parallel(be->pool, ceil_div(panels, j.panels), multiply_panels, &j);
    }
}

static void avx512_matmul(qemb_backend *be, qemb_act *y, const qemb_act *x, const qemb_mat *w,
                          int T) {
    matmul_all(be, f32(y), cf32(x), w, T, 0, 0);
}

static void avx512_matmul_add(qemb_backend *be, float *x, const qemb_act *a, const qemb_mat *w,
                              int T) {
    matmul_all(be, x, cf32(a), w, T, 1, 0);
}

static void avx512_gate_up(qemb_backend *be, qemb_act *h, qemb_act *gu, const qemb_act *x,
                           const qemb_mat *w, int T) {
    (void)gu;
    matmul_all(be, f32(h), cf32(x), w, T, 0, 1);
}

/* ---- the tables ------------------------------------------------------------------------------- */

static int open_table(qemb_backend **be, const qemb_ops *ops, const cpu_kernels *kernels,
                      const qemb_config *c, const qemb_options *opt, qemb_err *err) {
    const int widest = max_int(max_int(c->hidden, c->n_heads * c->head_dim), c->ffn);
    if (simd_open(be, c, opt, kernels, PANEL_FLOATS + X_ROWS * NR,
                  (size_t)X_ROWS * (size_t)round_up(widest, 64), err))
        return -1;
    (*be)->ops = ops;
    return 0;
}

/* attended: what attention multiplies in */
#define TABLE(table, label, arithmetic, attended, bytes)                                           \
    static int open_##table(qemb_backend **be, const qemb_config *c, const qemb_options *opt,      \
                            qemb_err *err) {                                                       \
        static const cpu_kernels kernels = {ATTENTION_ROWS, half_row,   rmsnorm_row,               \
                                            norm_rotate,    swiglu_row, attended};                 \
        return open_table(be, &table, &kernels, c, opt, err);                                      \
    }                                                                                              \
    const qemb_ops table = {.name = label,                                                         \
                            .math = arithmetic,                                                    \
                            .act_size = sizeof(float),                                             \
                            .open = open_##table,                                                  \
                            .close = simd_close,                                                   \
                            .place = avx512_place,                                                 \
                            .converted = bytes,                                                    \
                            .arena = cpu_arena,                                                    \
                            .begin = cpu_begin,                                                    \
                            .embed = simd_embed,                                                   \
                            .rmsnorm = simd_rmsnorm,                                               \
                            .matmul = avx512_matmul,                                               \
                            .matmul_add = avx512_matmul_add,                                       \
                            .qknorm_rope = simd_qknorm_rope,                                       \
                            .attention = simd_attention,                                           \
                            .gate_up = avx512_gate_up,                                             \
                            .gather_last = cpu_gather_last,                                        \
                            .pool = simd_pool};

TABLE(avx512_ops, "avx512", QEMB_MATH_F32, avx512_attention_f32, f32_converted)
TABLE(avx512_bf16_ops, "avx512-bf16", QEMB_MATH_BF16, avx512_attention_int16, bf16_converted)
TABLE(avx512_int16_ops, "avx512-int16", QEMB_MATH_INT16, avx512_attention_int16, int16_converted)
TABLE(avx512_int8_ops, "avx512-int8", QEMB_MATH_INT8, avx512_attention_int16, int8_converted)

#endif
