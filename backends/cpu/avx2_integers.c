/* avx2_integers.c - matrix products of 16-bit and 8-bit integers for CPUs with AVX2 and without
 * AVX-512. Attention and the ops by rows are avx2.c's, in float.
 *
 * As in avx512.c, groups of 64 columns have a scale for each row; sums are exact within a group,
 * and floats from group to group. Two things differ: int8's x, and int16 keeps an INT8 file's
 * bytes.
 *
 * 16 bits: vpmaddwd has 16 products, as many as two fused multiply-adds of floats have, and vpaddd
 * adds them to the sums. 8 bits: vpmaddubsw multiplies 32 unsigned bytes of x by signed bytes of W
 * and adds neighbours to 16 bits, where they must fit; vpmaddwd by ones and vpaddd follow. So a
 * group of x is 0 to 128, counted from its least number, and not -127 to 127: one bit less, but no
 * step is spent on numbers that do not occur.
 *
 * AVX-VNNI (Alder Lake, Zen 5) has one instruction for vpmaddwd and vpaddd, and one for the three.
 * The sums are exact, so tables with and without it give the same bits.
 */
#include "avx2.h"

#if defined(__x86_64__)

#include "packed_gemm.h"

#include <string.h>

#define UNROLL _Pragma("GCC unroll 16")

/* The layout of a group of W, which begins with scales s (NR), and of x, where scales t (MR) follow
 * the dwords:
 *   WORDS       (32, NR) dwords of two 16-bit integers               x: the same
 *   BYTE_PAIRS  (32, NR) pairs of bytes, which become WORDS as they are loaded          x: WORDS
 *   BYTE_QUADS  s sum(w) (NR), then (16, NR) dwords of four bytes w
 *               x: the same of unsigned bytes b, t, then lows l (MR). A number is l + t b, so a
 *               product of two rows is s (t sum(b w) + l sum(w)). */
typedef enum { WORDS, BYTE_PAIRS, BYTE_QUADS } layout;
enum {
    GROUP = 64,
    /* of a dword, by which the loops around the microkernel count. Of BYTE_QUADS too: parts of a
     * panel are then the same columns in all tables, which gives the same bits. */
    NUMBERS = 2,
    NEAR_GROUPS = 2, /* of a panel: up to 8 KiB */
    MR_PART = 6,     /* rows of x and */
    NR_PART = 16     /* of W at a time: 12 of 16 registers hold their sums */
};

/* Memory in floats: a group's dwords of one row of x; what comes before the dwords of W; NR of
 * these; a group of x; of W */
#define GROUP_DWORDS(of) ((of) == BYTE_QUADS ? GROUP / 4 : GROUP / 2)
#define GROUP_HEAD(of)   ((of) == BYTE_QUADS ? 2 * NR : NR)
#define DWORDS_ROW(of)   ((of) == BYTE_PAIRS ? NR / 2 : NR)
#define X_GROUP(of)      ((GROUP_DWORDS(of) + ((of) == BYTE_QUADS ? 2 : 1)) * MR)
#define W_GROUP(of)      (GROUP_HEAD(of) + GROUP_DWORDS(of) * DWORDS_ROW(of))

/* ---- the microkernels ------------------------------------------------------------------------ */

/* tests/unit/vnni_in_c.c has their definition in C instead. */
#ifndef VPDPWSSD
#define VPDPWSSD(sum, x, w) __asm__("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w))
#define VPDPBUSD(sum, x, w) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w))
#endif

/* sum += the products of the dwords of x and w. In assembler also without VNNI: gcc 12 moves the
 * additions behind all multiplications and keeps sums in memory. w stays in memory where the
 * ones take a register (clang copies it to the stack). */
TEMPLATE __m256i multiply_add(layout of, int vnni, __m256i sum, __m256i x, __m256i w) {
    __m256i products;
    if (of == BYTE_QUADS && vnni)
        VPDPBUSD(sum, x, w);
    else if (of == BYTE_QUADS)
        __asm__("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
                : "+x"(sum), "=&x"(products)
                : "x"(x), "xm"(w), "x"(_mm256_set1_epi16(1)));
    else if (vnni)
        VPDPWSSD(sum, x, w);
    else
        __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
                : "+x"(sum), "=&x"(products)
                : "x"(x), "x"(w));
    return sum;
}

/* Dword k of 8 rows of W, from row n of the panel on */
TEMPLATE __m256i weights8(layout of, const float *dwords, int k, int n) {
    if (of == BYTE_PAIRS)
        return _mm256_cvtepi8_epi16(_mm_castps_si128(_mm_load_ps(dwords + k * NR / 2 + n / 2)));
    return _mm256_castps_si256(_mm256_load_ps(dwords + k * NR + n));
}

/* acc (rows, NR) += one group of rows of x times one of the panel */
TEMPLATE void multiply_group(layout of, int vnni, int rows, float *acc, const float *x,
                             const float *panel) {
    const int n = GROUP_DWORDS(of);
    for (int col = 0; col < NR; col += NR_PART) {
        __m256i sum[MR_PART][2];
        UNROLL
        for (int i = 0; i < rows; i++) {
            UNROLL
            for (int h = 0; h < 2; h++) sum[i][h] = _mm256_setzero_si256();
        }
        for (int k = 0; k < n; k++) {
            __m256i w0 = weights8(of, panel + GROUP_HEAD(of), k, col);
            __m256i w1 = weights8(of, panel + GROUP_HEAD(of), k, col + 8);
            if (of != BYTE_QUADS || vnni) /* pinned: not loaded again for every row */
                __asm__("" : "+x"(w0), "+x"(w1));
            UNROLL
            for (int i = 0; i < rows; i++) {
                const __m256i xi = _mm256_castps_si256(_mm256_broadcast_ss(x + k * MR + i));
                sum[i][0] = multiply_add(of, vnni, sum[i][0], xi, w0);
                sum[i][1] = multiply_add(of, vnni, sum[i][1], xi, w1);
            }
        }
        UNROLL
        for (int h = 0; h < 2; h++) {
            const __m256 scale = _mm256_load_ps(panel + col + 8 * h);
            UNROLL
            for (int i = 0; i < rows; i++) {
                float *to = acc + i * NR + col + 8 * h;
                const __m256 factor = _mm256_mul_ps(_mm256_broadcast_ss(x + n * MR + i), scale);
                __m256 v = _mm256_load_ps(to);
                if (of == BYTE_QUADS)
                    v = _mm256_fmadd_ps(_mm256_broadcast_ss(x + (n + 1) * MR + i),
                                        _mm256_load_ps(panel + NR + col + 8 * h), v);
                _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i][h]), factor, v));
            }
        }
    }
}

/* y (rows, cols) = (add ? y : 0) + factor acc (rows, NR) */
TEMPLATE void write_tile(const epilogue *o, int rows, const float *acc) {
    const __m256 factor = _mm256_set1_ps(o->factor);
    for (int i = 0; i < rows; i++)
        for (int col = 0; col < o->cols; col += 8) {
            float *y = o->y + i * o->ldy + col;
            __m256 v = _mm256_setzero_ps();
            if (o->add) v = load_first(y, o->cols - col);
            store_first(y, _mm256_fmadd_ps(_mm256_load_ps(acc + i * NR + col), factor, v),
                        o->cols - col);
        }
}

#define CASE(n)                                                                                    \
    case n:                                                                                        \
        multiply_group(of, vnni, n, acc + r * NR, x + r, panel);                                   \
        break;

/* n: columns / NUMBERS. Zeros fill up the last group. A group of the panel meets all
 * rows before the next one, so that it is read from the L1 cache after the first of them. */
TEMPLATE void multiply_tile(layout of, int vnni, const epilogue *o, int rows, const float *x,
                            const float *panel, int n) {
    float acc[MR * NR] __attribute__((aligned(32)));
    const float *next = o->prefetch;
    /* One tile leaves nothing of the panel for others: only what follows soon is prefetched. Two
     * panels of 3,072 columns, 200 KiB each, would fill an L2 cache of 512 KiB. */
    if (next && o->prefetch_parts == 1) next = panel + NEAR_GROUPS * W_GROUP(of);
    memset(acc, 0, (size_t)rows * NR * sizeof *acc);
    for (int i = 0; i < rows; i++) {
        _mm_prefetch((const char *)(o->y + i * o->ldy), _MM_HINT_T0);
        _mm_prefetch((const char *)(o->y + i * o->ldy + 16), _MM_HINT_T0);
    }
    for (int groups = ceil_div(n, GROUP / NUMBERS); groups; groups--) {
        next = prefetch_step(o, next);
        for (int r = 0, left = ceil_div(rows, MR_PART), m; left; left--, r += m) {
            m = ceil_div(rows - r, left);
            switch (m) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
        }
        x += X_GROUP(of), panel += W_GROUP(of);
    }
    write_tile(o, rows, acc);
}

#define TILE(name, of, vnni)                                                                       \
    AVX2 static void name(const epilogue *o, int rows, const float *x, const float *panel,         \
                          int n) {                                                                 \
        multiply_tile(of, vnni, o, rows, x, panel, n);                                             \
    }
TILE(tile_words, WORDS, 0)
TILE(tile_byte_pairs, BYTE_PAIRS, 0)
TILE(tile_words_vnni, WORDS, 1)
TILE(tile_byte_pairs_vnni, BYTE_PAIRS, 1)
TILE(tile_byte_quads, BYTE_QUADS, 0)
TILE(tile_byte_quads_vnni, BYTE_QUADS, 1)

/* ---- packing --------------------------------------------------------------------------------- */

/* 8 bits: a group of W is scaled so that its largest magnitude becomes 127; one of x so that its
 * least number becomes 0 and its largest one BYTE_MOST. Two products of such bytes are then between
 * -2 x 128 x 128 and 2 x 128 x 127 (a file may have -128), which fit 16 bits. 16 bits: a group's
 * largest magnitude becomes at most INT16_MOST, and its length at most GROUP_LENGTH, so that no sum
 * of products of x and W passes 2^31; of W by powers of two. avx512.c has the proof. Bytes of W
 * times 16 bits of x: 64 x 128 x 32767 < 2^31. */
typedef enum { INT16, INT8 } integer;
enum { INT16_MOST = 32767, GROUP_LENGTH = 46330, BYTE_MOST = 128 };

/* A group of 8 rows: dwords of two 16-bit integers, or the first 16 of four bytes; and scales */
typedef struct {
    float dwords[8][GROUP / 2] __attribute__((aligned(32)));
    float scale[8], low[8];
} eight_rows;

/* The largest magnitude of v (8 x 8). Magnitudes compare as integers do, and NaN is the largest. */
TEMPLATE float largest(const __m256 v[8]) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i most = _mm256_setzero_si256();
    UNROLL
    for (int i = 0; i < 8; i++)
        most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(m));
}

/* The Euclidean length of v (8 x 8) */
TEMPLATE float length(const __m256 v[8]) {
    __m256 squares = _mm256_setzero_ps();
    UNROLL
    for (int i = 0; i < 8; i++) squares = _mm256_fmadd_ps(v[i], v[i], squares);
    return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(total(squares))));
}

/* The next power of two above scale; for 0, the smallest one that has an inverse. Not finite if
 * scale is not. */
TEMPLATE float power_above(float scale) {
    const __m128 some = _mm_set_ss(scale < 0x1p-126f ? 0x1p-126f : scale); /* NaN passes */
    return 2 * _mm_cvtss_f32(_mm_and_ps(some, _mm_castsi128_ps(_mm_set1_epi32(0x7f800000))));
}

/* to (32 dwords) = v (8 x 8) over the group's scale, rounded to nearest even, as 16-bit integers.
 * Returns the scale, which is not finite if a number is not. If all numbers of x are below 1e-19,
 * their squares vanish and a sum may pass 2^31; the error is then as small as the numbers. */
TEMPLATE float quantize(integer of, int is_w, float *to, const __m256 v[8]) {
    float size = largest(v);
    const float most = of == INT8 ? 127 : INT16_MOST;
    if (of == INT16) {
        const float share = length(v) * ((float)INT16_MOST / GROUP_LENGTH);
        size = share > size ? share : size; /* of NaN: size */
    }
    float scale = size / most, inverse = size != 0 ? most / size : 0;
    if (of == INT16 && is_w) scale = power_above(scale), inverse = 1 / scale;
    const __m256 f = _mm256_set1_ps(inverse);
    UNROLL
    for (int i = 0; i < 8; i += 2) {
        const __m256i q = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(v[i], f)),
                                             _mm256_cvtps_epi32(_mm256_mul_ps(v[i + 1], f)));
        _mm256_store_ps(to + 4 * i, _mm256_castsi256_ps(_mm256_permute4x64_epi64(q, 0xd8)));
    }
    return scale;
}

/* to (32 dwords) = x's group v (8 x 8) as 16-bit integers from 0 to BYTE_MOST: (v - low) / scale,
 * rounded to nearest even, with low the least of v; all 0 if the range is too small to have an
 * inverse. Returns the scale, which is not finite if a number is not. */
TEMPLATE float quantize_from_low(float *to, float *low, const __m256 v[8]) {
    __m256 least = v[0], most = v[0];
    const float size = largest(v);
    UNROLL
    for (int i = 1; i < 8; i++)
        least = _mm256_min_ps(least, v[i]), most = _mm256_max_ps(most, v[i]);
    *low = -greatest(_mm256_sub_ps(_mm256_setzero_ps(), least));
    /* halves: the difference of finite numbers may be infinite */
    const __m256 half = _mm256_set1_ps(0.5f), half_low = _mm256_set1_ps(0.5f * *low);
    const float half_range = 0.5f * greatest(most) - 0.5f * *low;
    const __m256 f = _mm256_set1_ps(BYTE_MOST / half_range);
    UNROLL
    for (int i = 0; i < 8; i += 2) {
        const __m256 a = _mm256_mul_ps(_mm256_fmsub_ps(v[i], half, half_low), f);
        const __m256 b = _mm256_mul_ps(_mm256_fmsub_ps(v[i + 1], half, half_low), f);
        const __m256i q = _mm256_packs_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
        _mm256_store_ps(to + 4 * i, _mm256_castsi256_ps(_mm256_permute4x64_epi64(q, 0xd8)));
    }
    return isfinite(size) ? 2 * (half_range / BYTE_MOST) : size;
}

/* Dwords of two 16-bit integers become dwords of four bytes, signed or not */
TEMPLATE void words_to_bytes(eight_rows *r, int is_w) {
    for (int i = 0; i < 8; i++)
        for (int h = 0; h < 2; h++) {
            const __m256i a = _mm256_castps_si256(_mm256_load_ps(r->dwords[i] + 16 * h));
            const __m256i b = _mm256_castps_si256(_mm256_load_ps(r->dwords[i] + 16 * h + 8));
            const __m256i q = is_w ? _mm256_packs_epi16(a, b) : _mm256_packus_epi16(a, b);
            _mm256_store_ps(r->dwords[i] + 8 * h,
                            _mm256_castsi256_ps(_mm256_permute4x64_epi64(q, 0xd8)));
        }
}

/* col[c] = dword d + c of the 8 rows */
TEMPLATE void columns8(__m256 col[8], const eight_rows *r, int d) {
    const float *const row[8] = {r->dwords[0], r->dwords[1], r->dwords[2], r->dwords[3],
                                 r->dwords[4], r->dwords[5], r->dwords[6], r->dwords[7]};
    transpose_floats(col, row, d);
}

/* Rows past the last stay zeros */
TEMPLATE void pack_x_groups(layout of, float *to, const float *x, int rows, int K) {
    const int n = GROUP_DWORDS(of);
    eight_rows part[2];
    memset(part, 0, sizeof part);
    for (int k = 0; k < K; k += GROUP, x += GROUP, to += X_GROUP(of)) {
        for (int i = 0; i < rows; i++) {
            __m256 v[8];
            UNROLL
            for (int g = 0; g < 8; g++) v[g] = load_first(x + (size_t)i * K + 8 * g, K - k - 8 * g);
            eight_rows *r = &part[i / 8];
            float *dwords = r->dwords[i % 8];
            r->scale[i % 8] = of == BYTE_QUADS ? quantize_from_low(dwords, &r->low[i % 8], v)
                                               : quantize(INT16, 0, dwords, v);
        }
        for (int h = 0; h < 2; h++) {
            if (of == BYTE_QUADS) words_to_bytes(&part[h], 0);
            for (int d = 0; d < n; d += 8) {
                __m256 col[8];
                columns8(col, &part[h], d);
                for (int c = 0; c < 8; c++)
                    store_first(to + (d + c) * MR + 8 * h, col[c], MR - 8 * h);
            }
            store_first(to + n * MR + 8 * h, _mm256_loadu_ps(part[h].scale), MR - 8 * h);
            if (of == BYTE_QUADS)
                store_first(to + (n + 1) * MR + 8 * h, _mm256_loadu_ps(part[h].low), MR - 8 * h);
        }
    }
}

/* Stores a group of 8 rows of W, which are rows n .. n+7 of the panel */
TEMPLATE void store_w(layout of, float *group, int n, eight_rows *r) {
    __m256i sum = _mm256_setzero_si256(); /* of a row's bytes */
    if (of == BYTE_QUADS) words_to_bytes(r, 1);
    _mm256_store_ps(group + n, _mm256_loadu_ps(r->scale));
    float *to = group + GROUP_HEAD(of) + n * DWORDS_ROW(of) / NR;
    for (int d = 0; d < GROUP_DWORDS(of); d += 8) {
        __m256 col[8];
        columns8(col, r, d);
        for (int c = 0; c < 8; c++, to += DWORDS_ROW(of)) {
            const __m256i v = _mm256_castps_si256(col[c]);
            if (of == BYTE_PAIRS) {
                const __m128i lo = _mm256_castsi256_si128(v), hi = _mm256_extracti128_si256(v, 1);
                _mm_store_ps(to, _mm_castsi128_ps(_mm_packs_epi16(lo, hi)));
            } else {
                _mm256_store_ps(to, col[c]);
            }
            if (of == BYTE_QUADS) {
                const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), v);
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
        }
    }
    if (of == BYTE_QUADS)
        _mm256_store_ps(group + NR + n,
                        _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(r->scale)));
}

/* Row i of r = 64 weights. QEMB_I8 keeps its bytes and its scale. */
TEMPLATE void load_w64(integer of, qemb_dtype dtype, eight_rows *r, int i, const uint8_t *w,
                       float scale) {
    __m256 v[8];
    UNROLL
    for (int g = 0; g < 8; g++) {
        if (dtype == QEMB_F16)
            v[g] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)w + g));
        else if (g % 2 == 0)
            _mm256_store_ps(r->dwords[i] + 4 * g,
                            _mm256_castsi256_ps(
                                _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w + g / 2))));
    }
    r->scale[i] = dtype == QEMB_F16 ? quantize(of, 1, r->dwords[i], v) : scale;
}

TEMPLATE void pack_w_groups(integer of, layout to, qemb_dtype dtype, float *panel, const w_panel *p,
                            int k0, int k1, size_t prefetch_distance) {
    const qemb_mat *w = p->w;
    const size_t K = (size_t)w->cols, bytes = dtype == QEMB_I8 ? 1 : 2;
    for (int n = 0; n < NR; n += 8)
        for (int k = k0; k < k1; k += GROUP) {
            float *group = panel + (k - k0) / GROUP * W_GROUP(to);
            eight_rows r;
            for (int i = 0; i < 8; i++) {
                const size_t row = (size_t)min_int(p->row[n / 16] + n % 16 + i, w->rows - 1);
                const uint8_t *from = (const uint8_t *)w->data + (row * K + k) * bytes;
                const float scale =
                    dtype == QEMB_I8 ? w->scale[row * QEMB_GROUPS(K) + k / QEMB_GROUP] : 0;
                uint8_t last[2 * GROUP];
                for (size_t b = 0; b < GROUP * bytes; b += 64)
                    _mm_prefetch((const char *)((uintptr_t)from + b + prefetch_distance * bytes),
                                 _MM_HINT_T1);
                if (k + GROUP > w->cols) {
                    memset(last, 0, sizeof last);
                    from = memcpy(last, from, (size_t)(w->cols - k) * bytes);
                }
                load_w64(of, dtype, &r, i, from, scale);
            }
            store_w(to, group, n, &r);
        }
}

AVX2 static void pack_int16_x(float *to, const float *x, int rows, int K) {
    pack_x_groups(WORDS, to, x, rows, K);
}
AVX2 static void pack_int8_x(float *to, const float *x, int rows, int K) {
    pack_x_groups(BYTE_QUADS, to, x, rows, K);
}

#define PACK_W(name, of, to_layout, dtype)                                                         \
    AVX2 static void name(float *panel, const w_panel *p, int k0, int k1,                          \
                          size_t prefetch_distance) {                                              \
        pack_w_groups(of, to_layout, dtype, panel, p, k0, k1, prefetch_distance);                  \
    }
PACK_W(pack_int16_f16, INT16, WORDS, QEMB_F16)
PACK_W(pack_int16_i8, INT16, BYTE_PAIRS, QEMB_I8)
PACK_W(pack_int8_f16, INT8, BYTE_QUADS, QEMB_F16)
PACK_W(pack_int8_i8, INT8, BYTE_QUADS, QEMB_I8)

/* ---- SwiGLU, the gemm_types, the tables ------------------------------------------------------ */

AVX2 static void swiglu_tile(float *h, size_t ldh, int rows, int cols, const float *sums) {
    for (int i = 0; i < rows; i++, h += ldh, sums += NR)
        for (int c = 0; c < min_int(cols, 16); c += 8)
            store_first(h + c, swiglu8(_mm256_load_ps(sums + c), _mm256_load_ps(sums + 16 + c)),
                        cols - c);
}

/* An INT8 file's bytes stay bytes in both arithmetics. int16 multiplies them by 16 bits of x. */
static const gemm_type int16 = {
    .per_dword = NUMBERS,
    .columns = GROUP,
    .x_floats = X_GROUP(WORDS),
    .pack_x = pack_int16_x,
    .weights = {[W_F16] = {1, W_GROUP(WORDS), pack_int16_f16, tile_words, NULL},
                [W_I8] = {1, W_GROUP(BYTE_PAIRS), pack_int16_i8, tile_byte_pairs, NULL}},
    .swiglu = swiglu_tile};
static const gemm_type int16_vnni = {
    .per_dword = NUMBERS,
    .columns = GROUP,
    .x_floats = X_GROUP(WORDS),
    .pack_x = pack_int16_x,
    .weights = {[W_F16] = {1, W_GROUP(WORDS), pack_int16_f16, tile_words_vnni, NULL},
                [W_I8] = {1, W_GROUP(BYTE_PAIRS), pack_int16_i8, tile_byte_pairs_vnni, NULL}},
    .swiglu = swiglu_tile};
static const gemm_type int8 = {
    .per_dword = NUMBERS,
    .columns = GROUP,
    .x_floats = X_GROUP(BYTE_QUADS),
    .pack_x = pack_int8_x,
    .weights = {[W_F16] = {1, W_GROUP(BYTE_QUADS), pack_int8_f16, tile_byte_quads, NULL},
                [W_I8] = {1, W_GROUP(BYTE_QUADS), pack_int8_i8, tile_byte_quads, NULL}},
    .swiglu = swiglu_tile};
static const gemm_type int8_vnni = {
    .per_dword = NUMBERS,
    .columns = GROUP,
    .x_floats = X_GROUP(BYTE_QUADS),
    .pack_x = pack_int8_x,
    .weights = {[W_F16] = {1, W_GROUP(BYTE_QUADS), pack_int8_f16, tile_byte_quads_vnni, NULL},
                [W_I8] = {1, W_GROUP(BYTE_QUADS), pack_int8_i8, tile_byte_quads_vnni, NULL}},
    .swiglu = swiglu_tile};

PACKED_TABLE(avx2_int16_ops, "avx2-int16", QEMB_MATH_INT16, int16, avx2_kernels)
PACKED_TABLE(avx2_int8_ops, "avx2-int8", QEMB_MATH_INT8, int8, avx2_kernels)
PACKED_TABLE(avxvnni_int16_ops, "avxvnni-int16", QEMB_MATH_INT16, int16_vnni, avx2_kernels)
PACKED_TABLE(avxvnni_int8_ops, "avxvnni-int8", QEMB_MATH_INT8, int8_vnni, avx2_kernels)

#endif
