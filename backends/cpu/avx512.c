/* avx512.c - the CPU's ops with AVX-512 (F, BW, DQ and VL: servers since 2017, Zen 4) and BMI2.
 *
 * Each function is compiled for the instructions that it names; dispatch.c hands out a table only
 * on a CPU that has them. As in qemb.c, a row's result depends on that row alone, bit for bit:
 * every sum has one order.
 */
#include "avx512.h"

#if defined(__x86_64__)

enum { ATTENTION_ROWS = 512 }; /* rows that share one packing of keys and values */

/* ---- rows ------------------------------------------------------------------------------------ */

AVX512 static void half_row(float *y, const uint16_t *x, int n) {
    for (int i = 0; i < n; i += 16)
        store_first(y + i, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(n - i), x + i)), n - i);
}

/* 1 / sqrt(mean(x^2) + eps) of one row, summed in double */
TEMPLATE __m512 rms_scale(const float *x, int n, float eps) {
    __m512d sum[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(),
                      _mm512_setzero_pd()};
    for (int i = 0; i < n; i += 32) {
        UNROLL
        for (int h = 0; h < 2; h++) {
            const __m512 v = load_first(x + i + 16 * h, n - i - 16 * h);
            const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
            const __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
            sum[2 * h] = _mm512_fmadd_pd(a, a, sum[2 * h]);
            sum[2 * h + 1] = _mm512_fmadd_pd(b, b, sum[2 * h + 1]);
        }
    }
    const double all = _mm512_reduce_add_pd(
        _mm512_add_pd(_mm512_add_pd(sum[0], sum[1]), _mm512_add_pd(sum[2], sum[3])));
    return _mm512_set1_ps((float)(1 / sqrt(all / n + eps)));
}

/* 16 numbers of x from i on, normalised and weighted */
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

/* silu(g) u. rough: for results that are rounded to 8 bits afterwards. Its relative error is 2^-13:
 * 2^-14.5 of exp and 2^-14 of rcp14. */
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

AVX512 static void add_row(float *y, const float *x, int n) {
    for (int i = 0; i < n; i += 16)
        store_first(y + i, _mm512_add_ps(load_first(y + i, n - i), load_first(x + i, n - i)),
                    n - i);
}

AVX512 static void gelu_row(float *h, const float *bias, int n) {
    for (int i = 0; i < n; i += 16)
        store_first(h + i,
                    gelu16(_mm512_add_ps(load_first(h + i, n - i), load_first(bias + i, n - i))),
                    n - i);
}

/* The first n of x - mean, zeros after them. The mean has two parts: the difference from the first
 * one, which is near, is exact or small. */
TEMPLATE __m512 centred(__m512 x, const __m512 mean[2], int n) {
    return _mm512_maskz_sub_ps(first16(n), _mm512_sub_ps(x, mean[0]), mean[1]);
}

/* x += bias, then LayerNorm of x to x and y. The sums are in double. */
AVX512 static void layernorm_row(float *y, float *x, const float *bias, const float *w,
                                 const float *b, int n, float eps) {
    __m512d sum[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    for (int i = 0; i < n; i += 16) {
        __m512 v = load_first(x + i, n - i);
        if (bias) store_first(x + i, v = _mm512_add_ps(v, load_first(bias + i, n - i)), n - i);
        sum[0] = _mm512_add_pd(sum[0], _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
        sum[1] = _mm512_add_pd(sum[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
    }
    const double middle = _mm512_reduce_add_pd(_mm512_add_pd(sum[0], sum[1])) / n;
    const __m512 mean[2] = {_mm512_set1_ps((float)middle),
                            _mm512_set1_ps((float)(middle - (float)middle))};
    sum[0] = sum[1] = _mm512_setzero_pd(); /* of squares */
    for (int i = 0; i < n; i += 16) {
        const __m512 v = centred(load_first(x + i, n - i), mean, n - i);
        const __m512d lo = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
        const __m512d hi = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
        sum[0] = _mm512_fmadd_pd(lo, lo, sum[0]);
        sum[1] = _mm512_fmadd_pd(hi, hi, sum[1]);
    }
    const double variance = _mm512_reduce_add_pd(_mm512_add_pd(sum[0], sum[1])) / n;
    const __m512 scale = _mm512_set1_ps((float)(1 / sqrt(variance + (double)eps)));
    for (int i = 0; i < n; i += 16) {
        __m512 v = _mm512_mul_ps(centred(load_first(x + i, n - i), mean, n - i), scale);
        v = _mm512_fmadd_ps(v, load_first(w + i, n - i), load_first(b + i, n - i));
        store_first(x + i, v, n - i);
        store_first(y + i, v, n - i);
    }
}

/* ---- microkernels, for x packed (k, MR) ------------------------------------------------------ */

TILE(tile_f16, F32, HALVES, 1, MR)
TILE(tile_f32, F32, DWORDS, 1, MR)
TILE(tile_bf16, BF16, DWORDS, 1, MR)

/* Integers come in groups of 64 columns. A group has a scale for each row, and its sums are exact.
 *   x: dwords (n, MR), then scales (MR).
 *   W: scales (NR); bytes only: corrections (NR); then dwords (n, NR).
 * vpdpbusd multiplies unsigned bytes by signed bytes, so bytes of x are stored as x + 128. A group
 * of W therefore begins its sums with corrections: -128 times the sum of the row's bytes, which
 * cancels the offset.
 *
 * 8 bits: a group is scaled so that its largest magnitude becomes 127. 16 bits: its largest
 * magnitude becomes at most INT16_MOST, and its length (the square root of the sum of squares) at
 * most GROUP_LENGTH. By Cauchy and Schwarz no sum of products of x and W can then pass 2^31;
 * rounding, which adds at most 4 to a length, is included. The scales of W are powers of two, so
 * that a half whose integer is 1024 or more keeps its exact value. */
enum {
    GROUP = 64,
    GROUP_LENGTH = 46330,
    GROUP_ROWS =
        MR /
        2, /* rows of x at a time: each has two sums in registers, one of integers, one of floats */
};

/* Memory in floats: a group's dwords of one row; what comes before the dwords of W; a group of x;
 * of W */
#define GROUP_DWORDS(of) ((of) == INT8 ? GROUP / 4 : GROUP / 2)
#define GROUP_HEAD(of)   ((of) == INT8 ? 2 * NR : NR)
#define X_GROUP(of)      ((GROUP_DWORDS(of) + 1) * MR)
#define W_GROUP(of)      (GROUP_HEAD(of) + GROUP_DWORDS(of) * NR)

TEMPLATE void tile_rows_groups(dword_of of, const epilogue *o, int rows, const float *x,
                               const float *panel, int groups) {
    __m512 acc[GROUP_ROWS][2];
    const float *next = o->prefetch;
    tile_begin(o, rows, acc);
    const int n = GROUP_DWORDS(of);
    for (; groups; groups--, x += X_GROUP(of), panel += W_GROUP(of)) {
        __m512 sum[GROUP_ROWS][2];
        UNROLL
        for (int i = 0; i < rows; i++) {
            UNROLL
            for (int h = 0; h < 2; h++)
                sum[i][h] = of == INT8 ? _mm512_load_ps(panel + NR + 16 * h) : _mm512_setzero_ps();
        }
        next = prefetch_step(o, next);
        tile(of, DWORDS, sum, rows, x, 1, MR, panel + GROUP_HEAD(of), n);
        UNROLL
        for (int h = 0; h < 2; h++) {
            const __m512 w = _mm512_load_ps(panel + 16 * h);
            UNROLL
            for (int i = 0; i < rows; i++) {
                const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(x[n * MR + i]), w);
                acc[i][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(sum[i][h])),
                                            factor, acc[i][h]);
            }
        }
    }
    tile_end(o, 0, rows, acc);
}

/* TILE_GROUPS defines the microkernel `name` for groups. The last group may be shorter: n
 * dwords. */
#define TILE_GROUPS(name, of)                                                                      \
    AVX512 static void name(const epilogue *o, int rows, const float *x, const float *panel,       \
                            int n) {                                                               \
        const int groups = ceil_div(n, GROUP_DWORDS(of));                                          \
        epilogue to = *o;                                                                          \
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
            x += m, to.y += m * o->ldy, rows -= m, to.prefetch = NULL;                             \
        }                                                                                          \
    }
TILE_GROUPS(tile_int8, INT8)
TILE_GROUPS(tile_int16, INT16)

/* Pointers to 16 rows of W from row n on. Rows past the last repeat it. */
typedef const uint8_t *w_rows[16];

static void find_rows(w_rows row, const qemb_mat *w, int n, int bytes) {
    for (int i = 0; i < 16; i++)
        row[i] = (const uint8_t *)w->data + (size_t)min_int(n + i, w->rows - 1) * w->cols * bytes;
}

/* Prefetches the cache line of each row that is prefetch_distance bytes after byte `at`. */
TEMPLATE void prefetch_rows(const w_rows row, size_t at, size_t prefetch_distance) {
    UNROLL
    for (int i = 0; i < 16; i++)
        _mm_prefetch((const char *)row[i] + at + prefetch_distance, _MM_HINT_T1);
}

/* ---- float and bfloat16 ---------------------------------------------------------------------- */

/* 32 floats, lo and hi, rounded to nearest even: dword i has numbers 2i and 2i+1. */
TEMPLATE __m512 to_bf16(__m512 lo, __m512 hi) {
    __m512 v;
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(v) : "v"(lo), "v"(hi));
    return v;
}

/* INT8: scale[g % 16] = the scales of group g of the 16 rows. Loads 16 groups at a time: at the
 * first column, k0, and wherever 16 groups begin. */
TEMPLATE void next_scales(float scale[16][16], const qemb_mat *w, int n, int k, int k0) {
    const int groups = QEMB_GROUPS(w->cols), g = k / QEMB_GROUP / 16 * 16;
    if (k > k0 && k % (16 * QEMB_GROUP)) return;
    __m512 r[16];
    UNROLL
    for (int i = 0; i < 16; i++)
        r[i] = load_first(w->scale + (size_t)min_int(n + i, w->rows - 1) * (size_t)groups + g,
                          groups - g);
    transpose(r);
    UNROLL
    for (int i = 0; i < 16; i++) _mm512_storeu_ps(scale[i], r[i]);
}

/* Columns k .. k+15 of a row of W, those that the mask `some` has */
TEMPLATE __m512 weights16(qemb_dtype dtype, const uint8_t *row, float scale, int k,
                          __mmask16 some) {
    if (dtype == QEMB_I8) {
        const __m512i q = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, row + k));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(scale));
    }
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, row + 2 * (size_t)k));
}

/* 16 dwords of a row of W from column k on */
TEMPLATE __m512 weight_dwords(dword_of of, qemb_dtype dtype, const uint8_t *row, float scale, int k,
                              const __mmask16 some[2]) {
    const __m512 v = weights16(dtype, row, scale, k, some[0]);
    return of == F32 ? v : to_bf16(v, weights16(dtype, row, scale, k + 16, some[1]));
}

/* 16 dwords of a row of x from column k on */
TEMPLATE __m512 x_dwords(dword_of of, const float *row, int k, int n) {
    const __m512 v = load_first(row + k, n);
    return of == F32 ? v : to_bf16(v, load_first(row + k + 16, n - 16));
}

/* to (16, MR) = r (16 rows, 16 dwords) transposed, without the rows past MR */
TEMPLATE void store_x(float *to, __m512 r[16]) {
    transpose(r);
    UNROLL
    for (int c = 0; c < 16; c++) _mm512_mask_storeu_ps(to + c * MR, (1u << MR) - 1, r[c]);
}

TEMPLATE void pack_x_dwords(dword_of of, float *to, const float *x, int rows, int K) {
    for (int k = 0, step = of == F32 ? 16 : 32; k < K; k += step, to += 16 * MR) {
        __m512 r[16];
        UNROLL
        for (int i = 0; i < 16; i++)
            r[i] = i < rows ? x_dwords(of, x + (size_t)i * K, k, K - k) : _mm512_setzero_ps();
        store_x(to, r);
    }
}

/* panel (dwords, NR) = columns k0 .. k1-1 of W's rows n0 .. n0+NR-1 */
TEMPLATE void pack_w_dwords(dword_of of, qemb_dtype dtype, float *panel, const w_panel *p, int k0,
                            int k1, size_t prefetch_distance) {
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
            if (k * bytes % 64 == 0)
                prefetch_rows(row, (size_t)k * bytes, prefetch_distance * bytes);
            UNROLL
            for (int i = 0; i < 16; i++)
                r[i] = weight_dwords(of, dtype, row[i], dtype == QEMB_I8 ? s[i] : 1, k, some);
            transpose(r);
            UNROLL
            for (int c = 0; c < 16; c++) _mm512_store_ps(to + c * NR, r[c]);
        }
    }
}

/* panel (columns, NR) of halves = columns k0 .. k1-1 of F16 weights. Pairs of columns are
 * transposed as dwords and then separated. */
AVX512 static void pack_halves(float *panel, const w_panel *p, int k0, int k1,
                               size_t prefetch_distance) {
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
            prefetch_rows(row, (size_t)k * 2, prefetch_distance * 2);
            UNROLL
            for (int i = 0; i < 16; i++)
                r[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(some, row[i] + 2 * (size_t)k));
            transpose(r);
            UNROLL
            for (int c = 0; c < 16; c++, to += 2 * HALF_ROW) {
                if (c == 8 && left <= 16) break; /* the panel has no more columns */
                const __m512i v = _mm512_permutexvar_epi16(part, _mm512_castps_si512(r[c]));
                _mm256_store_si256((__m256i *)to, _mm512_castsi512_si256(v));
                _mm256_store_si256((__m256i *)(to + HALF_ROW), _mm512_extracti64x4_epi64(v, 1));
            }
        }
    }
}

/* to (n, NR) = a panel of halves, converted to float */
AVX512 static void halves_to_floats(float *to, const float *panel, int n) {
    for (int k = 0; k < n; k++, to += DWORD_ROW) {
        _mm512_store_ps(to, panel16(HALVES, panel, k, 0));
        _mm512_store_ps(to + 16, panel16(HALVES, panel, k, 1));
    }
}

/* ---- int8 and int16: the scales of a group are computed for 16 rows at a time ---------------- */

TEMPLATE void load_x64(__m512 v[4], const float *row, int n) {
    UNROLL
    for (int i = 0; i < 4; i++) v[i] = load_first(row + 16 * i, n - 16 * i);
}

TEMPLATE void load_w64(qemb_dtype dtype, __m512 v[4], const uint8_t *row, float scale, int k,
                       int n) {
    UNROLL
    for (int i = 0; i < 4; i++)
        v[i] = weights16(dtype, row, scale, k + 16 * i, first16(n - 16 * i));
}

/* Largest magnitudes and squares of a group of up to 16 rows, lane by lane */
typedef struct {
    __m512 most[16], squares[16];
} group_sizes;

TEMPLATE void measure64(dword_of of, group_sizes *s, int i, const __m512 v[4]) {
    __m512i most = _mm512_setzero_si512();
    __m512 squares = _mm512_setzero_ps();
    UNROLL
    for (int g = 0; g < 4; g++) {
        most = larger(most, v[g]);
        if (of == INT16) squares = _mm512_fmadd_ps(v[g], v[g], squares);
    }
    s->most[i] = _mm512_castsi512_ps(most), s->squares[i] = squares;
}

/* The scales (16) of a group, and inverse (16) their inverses. Numbers that are not finite give
 * scales that are not finite. If all numbers are below 1e-19, their squares vanish and a sum may
 * pass 2^31; the error is then as small as the numbers. */
TEMPLATE __m512 group_scales(dword_of of, float inverse[16], group_sizes *s) {
    const __m512 most = largest_of(s->most);
    if (of == INT8) return scales(inverse, most, 127);
    const __m512 share = _mm512_mul_ps(_mm512_sqrt_ps(sums_of(s->squares)),
                                       _mm512_set1_ps((float)INT16_MOST / GROUP_LENGTH));
    return scales(inverse, _mm512_max_ps(share, most), INT16_MOST);
}

/* The next powers of two above scale; for 0, the smallest one that has an inverse */
TEMPLATE __m512 powers_above(float inverse[16], __m512 scale) {
    const __m512 some = _mm512_max_ps(_mm512_set1_ps(0x1p-126f), scale); /* NaN passes */
    const __m512 power = _mm512_scalef_ps(_mm512_set1_ps(2), _mm512_getexp_ps(some));
    _mm512_storeu_ps(inverse, _mm512_div_ps(_mm512_set1_ps(1), power));
    return power;
}

/* 64 floats times inverse, rounded to nearest even, as 64 bytes */
TEMPLATE __m512 to_int8(const __m512 v[4], __m512 inverse) {
    __m512i q[4];
    UNROLL
    for (int i = 0; i < 4; i++) q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], inverse));
    const __m512i lanes =
        _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi32(order, lanes));
}

/* Dwords 16h .. 16h+15 of one row's group of integers */
TEMPLATE __m512 integers(dword_of of, const __m512 v[4], float inverse, int h) {
    const __m512 f = _mm512_set1_ps(inverse);
    if (of == INT8) return to_int8(v, f);
    return to_int16(_mm512_mul_ps(v[2 * h], f), _mm512_mul_ps(v[2 * h + 1], f));
}

TEMPLATE void pack_x_groups(dword_of of, float *to, const float *x, int rows, int K) {
    const int n = GROUP_DWORDS(of);
    const __m512 offset = _mm512_castsi512_ps(_mm512_set1_epi8(-128));
    for (int k = 0; k < K; k += GROUP, x += GROUP, to += X_GROUP(of)) {
        float inverse[16];
        __m512 r[16], v[4];
        group_sizes sizes;
        for (int i = 0; i < 16; i++) {
            UNROLL
            for (int g = 0; g < 4; g++) v[g] = _mm512_setzero_ps();
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

/* Stores dwords 16h .. 16h+15 of a group of 16 rows of W, r[i] of row i, and the corrections */
TEMPLATE void store_w(dword_of of, float *to, __m512 r[16], int h) {
    const __m512 offset = _mm512_castsi512_ps(_mm512_set1_epi8(-128));
    __m512 sum = _mm512_setzero_ps();
    transpose(r);
    UNROLL
    for (int c = 0; c < 16; c++) {
        _mm512_store_ps(to + GROUP_HEAD(of) + (16 * h + c) * NR, r[c]);
        if (of == INT8) sum = multiply_add(INT8, sum, offset, r[c]);
    }
    if (of == INT8)
        _mm512_store_si512(to + NR,
                           _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_castps_si512(sum)));
}

TEMPLATE void pack_w_groups(dword_of of, qemb_dtype dtype, float *panel, const w_panel *p, int k0,
                            int k1, size_t prefetch_distance) {
    const int bytes = dtype == QEMB_I8 ? 1 : 2, n = GROUP_DWORDS(of);
    for (int half = 0; half < 2; half++) {
        w_rows row;
        find_rows(row, p->w, p->row[half], bytes);
        float *to = panel + 16 * half, file_scale[16][16];
        for (int k = k0; k < k1; k += GROUP, to += W_GROUP(of)) {
            const float *s = file_scale[k / QEMB_GROUP % 16];
            float inverse[16];
            __m512 r[16], v[4];
            group_sizes sizes;
            if (dtype == QEMB_I8) next_scales(file_scale, p->w, p->row[half], k, k0);
            for (int b = 0; b < bytes; b++)
                prefetch_rows(row, (size_t)k * bytes + 64 * b, prefetch_distance * bytes);
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

#define PACK_X(name, with, of)                                                                     \
    AVX512 static void name(float *to, const float *x, int rows, int K) {                          \
        with(of, to, x, rows, K);                                                                  \
    }
PACK_X(pack_f32_x, pack_x_dwords, F32)
PACK_X(pack_bf16_x, pack_x_dwords, BF16)
PACK_X(pack_int16_x, pack_x_groups, INT16)
PACK_X(pack_int8_x, pack_x_groups, INT8)

#define PACK_W(name, with, of, dtype)                                                              \
    AVX512 static void name(float *panel, const w_panel *p, int k0, int k1,                        \
                            size_t prefetch_distance) {                                            \
        with(of, dtype, panel, p, k0, k1, prefetch_distance);                                      \
    }
PACK_W(pack_f32_i8, pack_w_dwords, F32, QEMB_I8)
PACK_W(pack_bf16_f16, pack_w_dwords, BF16, QEMB_F16)
PACK_W(pack_bf16_i8, pack_w_dwords, BF16, QEMB_I8)
PACK_W(pack_int16_f16, pack_w_groups, INT16, QEMB_F16)
PACK_W(pack_int16_i8, pack_w_groups, INT16, QEMB_I8)
PACK_W(pack_int8_f16, pack_w_groups, INT8, QEMB_F16)

/* INT8 weights keep the file's bytes and scales */
AVX512 static void pack_int8_i8(float *panel, const w_panel *p, int k0, int k1,
                                size_t prefetch_distance) {
    const qemb_mat *w = p->w;
    for (int h = 0; h < 2; h++) {
        w_rows row;
        float *to = panel + 16 * h, scale[16][16];
        find_rows(row, w, p->row[h], 1);
        for (int k = k0; k < k1; k += GROUP, to += W_GROUP(INT8)) {
            __m512 r[16];
            const __mmask64 some = w->cols - k >= 64 ? ~0ull : (1ull << (w->cols - k)) - 1;
            prefetch_rows(row, (size_t)k, prefetch_distance);
            UNROLL
            for (int i = 0; i < 16; i++)
                r[i] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(some, row[i] + k));
            next_scales(scale, w, p->row[h], k, k0);
            _mm512_store_ps(to, _mm512_loadu_ps(scale[k / QEMB_GROUP % 16]));
            store_w(INT8, to, r, 0);
        }
    }
}

/* ---- SwiGLU ---------------------------------------------------------------------------------- */

TEMPLATE void swiglu_tile(int rough, float *h, size_t ldh, int rows, int cols, const float *sums) {
    for (int i = 0; i < rows; i++, h += ldh, sums += NR)
        store_first(h, swiglu16(rough, _mm512_load_ps(sums), _mm512_load_ps(sums + 16)), cols);
}

AVX512 void avx512_swiglu_f32(float *h, size_t ldh, int rows, int cols, const float *sums) {
    swiglu_tile(0, h, ldh, rows, cols, sums);
}

AVX512 void avx512_swiglu_8bit(float *h, size_t ldh, int rows, int cols, const float *sums) {
    swiglu_tile(1, h, ldh, rows, cols, sums);
}

/* ---- the gemm_types -------------------------------------------------------------------------- */

static const gemm_type f32 = {
    .per_dword = 1,
    .columns = 16,
    .x_floats = 16 * MR,
    .pack_x = pack_f32_x,
    .weights = {[W_F16] = {1, 16 * HALF_ROW, pack_halves, tile_f16, NULL},
                [W_I8] = {0, 16 * DWORD_ROW, pack_f32_i8, tile_f32, NULL}},
    .panel_f16_to_f32 = halves_to_floats,
    .swiglu = avx512_swiglu_f32};
static const gemm_type bf16 = {
    .per_dword = 2,
    .columns = 32,
    .x_floats = 16 * MR,
    .pack_x = pack_bf16_x,
    .weights = {[W_F16] = {1, 16 * DWORD_ROW, pack_bf16_f16, tile_bf16, NULL},
                [W_I8] = {0, 16 * DWORD_ROW, pack_bf16_i8, tile_bf16, NULL}},
    .swiglu = avx512_swiglu_8bit};
static const gemm_type int16 = {
    .per_dword = 2,
    .columns = GROUP,
    .x_floats = X_GROUP(INT16),
    .pack_x = pack_int16_x,
    .weights = {[W_F16] = {1, W_GROUP(INT16), pack_int16_f16, tile_int16, NULL},
                [W_I8] = {0, W_GROUP(INT16), pack_int16_i8, tile_int16, NULL}},
    .swiglu = avx512_swiglu_f32};
static const gemm_type int8 = {
    .per_dword = 4,
    .columns = GROUP,
    .x_floats = X_GROUP(INT8),
    .pack_x = pack_int8_x,
    .weights = {[W_F16] = {1, W_GROUP(INT8), pack_int8_f16, tile_int8, NULL},
                [W_I8] = {1, W_GROUP(INT8), pack_int8_i8, tile_int8, NULL}},
    .swiglu = avx512_swiglu_8bit};

/* ---- the tables ------------------------------------------------------------------------------ */

#define KERNELS(name, of_attention)                                                                \
    const cpu_kernels name = {.attention_rows = ATTENTION_ROWS,                                    \
                              .half = half_row,                                                    \
                              .rmsnorm = rmsnorm_row,                                              \
                              .norm_rotate = norm_rotate,                                          \
                              .layernorm = layernorm_row,                                          \
                              .add = add_row,                                                      \
                              .gelu = gelu_row,                                                    \
                              .swiglu = swiglu_row,                                                \
                              .attention = of_attention};
KERNELS(avx512_with_f32_attention, avx512_attention_f32)
KERNELS(avx512_with_int16_attention, avx512_attention_int16)

PACKED_TABLE(avx512_ops, "avx512", QEMB_MATH_F32, f32, avx512_with_f32_attention)
PACKED_TABLE(avx512_bf16_ops, "avx512-bf16", QEMB_MATH_BF16, bf16, avx512_with_int16_attention)
PACKED_TABLE(avx512_int16_ops, "avx512-int16", QEMB_MATH_INT16, int16, avx512_with_int16_attention)
PACKED_TABLE(avx512_int8_ops, "avx512-int8", QEMB_MATH_INT8, int8, avx512_with_int16_attention)

#endif
