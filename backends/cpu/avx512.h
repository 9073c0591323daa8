/* avx512.h - what AVX-512's products and attention share: lanes, exp, the microkernel, a
 * transposition, scales. All of it is inlined.
 */
#ifndef CPU_AVX512_H
#define CPU_AVX512_H

#include "gelu.h"
#include "packed_gemm.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,bmi2")))
/* A function that is inlined with constant arguments, so that its loops unroll into registers. */
#define TEMPLATE static inline __attribute__((always_inline)) AVX512
#define UNROLL   _Pragma("GCC unroll 16")

/* The mask of the first n of 16 lanes; no lane if n < 1 */
TEMPLATE __mmask16 first16(int n) {
    return (__mmask16)_bzhi_u32(0xffff, (unsigned)max_int(0, min_int(n, 16)));
}
TEMPLATE __m512 load_first(const float *p, int n) { return _mm512_maskz_loadu_ps(first16(n), p); }
TEMPLATE void store_first(float *p, __m512 v, int n) { _mm512_mask_storeu_ps(p, first16(n), v); }

/* ---- exp ----------------------------------------------------------------------------------------
 * As avx2.c's, with its bound of one ulp: exp(x) = 2^n exp(r), a polynomial of degree 7. */

/* p 2^n, for normal p and 2^n. On Zen 4 scalef costs two multiplications, this integer addition
 * none. */
TEMPLATE __m512 times_2_to(__m512 p, __m512i n) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(n, 23)));
}

TEMPLATE __m512 exp16(__m512 x) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)));
    const __m512 n = _mm512_cvtepi32_ps(whole);
    /* ln 2 as a sum of two numbers. The first has 9 bits, so its product with n is exact. */
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.63p-1f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-0x1.bd0106p-13f), r);
    __m512 p = _mm512_set1_ps((float)(1.0 / 5040));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps((float)(1.0 / 720)));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps((float)(1.0 / 120)));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps((float)(1.0 / 24)));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps((float)(1.0 / 6)));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    p = times_2_to(p, whole);
    /* where 2^n is not normal, the result is Inf or 0; NaN stays NaN */
    p = _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, _mm512_set1_ps(88.72283f), _CMP_GT_OQ),
                           _mm512_set1_ps(INFINITY));
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.33654f), _CMP_NLT_UQ), p);
}

/* exp(x) with x clamped to [-86, 87] and a relative error of 0.35^5 / 5! = 2^-14.5 (a polynomial of
 * degree 4), for results that are rounded to 8 bits or are one term of many. NaN stays NaN. */
TEMPLATE __m512 exp16_rough(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(87), _mm512_max_ps(_mm512_set1_ps(-86), x));
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)));
    const __m512 r = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(0x1.62e43p-1f), x);
    __m512 p = _mm512_set1_ps((float)(1.0 / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps((float)(1.0 / 6)));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    return times_2_to(p, whole);
}

/* ---- gelu: see gelu.h ------------------------------------------------------------------------ */

TEMPLATE __m512 gelu16(__m512 t) {
    const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1);
    /* of a NaN and a number, min is the second one */
    const __m512 a = _mm512_min_ps(_mm512_set1_ps(13.5f), _mm512_abs_ps(t));
    const __m512 r = _mm512_div_ps(one, _mm512_add_ps(a, _mm512_set1_ps(3)));
    const __m512 v = _mm512_fnmadd_ps(_mm512_set1_ps(6), r, one);
    const __m512 square = _mm512_mul_ps(a, a), rest = _mm512_fmsub_ps(a, a, square);
    __m512 p = _mm512_set1_ps(gelu_tail[0]);
    UNROLL
    for (int k = 1; k <= GELU_DEGREE; k++) p = _mm512_fmadd_ps(p, v, _mm512_set1_ps(gelu_tail[k]));
    __m512 e = exp16(_mm512_mul_ps(square, _mm512_set1_ps(-0.5f)));
    e = _mm512_fnmadd_ps(_mm512_mul_ps(e, half), rest, e);
    const __m512 tail = _mm512_mul_ps(e, _mm512_mul_ps(p, r)); /* Phi(-a) */
    const __mmask16 negative = _mm512_cmp_ps_mask(t, _mm512_setzero_ps(), _CMP_LT_OQ);
    const __m512 phi = _mm512_mask_mov_ps(_mm512_sub_ps(one, tail), negative, tail);
    return _mm512_fmadd_ps(t, phi, _mm512_setzero_ps()); /* + 0 turns -0 into 0 */
}

/* ---- the microkernel ----------------------------------------------------------------------------
 * For each k, two loads of a panel's NR dwords and one broadcast per row of x feed two
 * multiply-adds per row: 24 for 12 rows, with sums in 24 of the 32 registers. The loop is the same
 * for every kind of dword. */

/* The contents of a dword. Integers are signed, except for the bytes of x. */
typedef enum { F32, BF16, INT16, INT8 } dword_of;

/* sum += the products of the dwords of x and w. In assembler for two reasons: a function compiled
 * for CPUs without the instruction may not contain its intrinsic, and gcc 12 keeps the sums of the
 * bytes' intrinsic in memory. */
TEMPLATE __m512 multiply_add(dword_of of, __m512 sum, __m512 x, __m512 w) {
    if (of == F32) return _mm512_fmadd_ps(x, w, sum);
    if (of == BF16)
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    else if (of == INT16)
        __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    else
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return sum;
}

/* The contents of a panel: dwords, or halves, which are converted to float as they are loaded */
typedef enum { DWORDS, HALVES } panel_kind;
enum { DWORD_ROW = NR, HALF_ROW = NR / 2 }; /* memory of NR of them, in floats */

/* Row k of a panel: numbers 16h .. 16h+15 of its NR */
TEMPLATE __m512 panel16(panel_kind kind, const float *panel, int k, int h) {
    if (kind == DWORDS) return _mm512_load_ps(panel + k * DWORD_ROW + 16 * h);
    return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)(panel + k * HALF_ROW + 8 * h)));
}

/* acc += rows of x times a panel (n, NR). Dword k of row i is x[i*next_row + k*next_k]. */
TEMPLATE void tile(dword_of of, panel_kind kind, __m512 (*acc)[2], int rows, const float *x,
                   int next_row, int next_k, const float *panel, int n) {
    for (int k = 0; k < n; k++) {
        __m512 w0 = panel16(kind, panel, k, 0), w1 = panel16(kind, panel, k, 1);
        __asm__("" : "+v"(w0), "+v"(w1)); /* pinned: gcc 12 loads them again for every row */
        UNROLL
        for (int i = 0; i < rows; i++) {
            const __m512 xi = _mm512_set1_ps(x[i * next_row + k * next_k]);
            acc[i][0] = multiply_add(of, acc[i][0], xi, w0);
            acc[i][1] = multiply_add(of, acc[i][1], xi, w1);
        }
    }
}

/* No branch may depend on i: compilers would then keep the sums in memory throughout the tile. */
TEMPLATE void tile_write(const epilogue *o, int own_factor, int rows, __m512 (*acc)[2], int add) {
    const __mmask16 m0 = first16(o->cols), m1 = first16(o->cols - 16);
    UNROLL
    for (int i = 0; i < rows; i++) {
        const __m512 factor = _mm512_set1_ps(own_factor ? o->factors[i] : o->factor);
        float *y = o->y + i * o->ldy;
        const __m512 y0 = add ? _mm512_maskz_loadu_ps(m0, y) : _mm512_setzero_ps();
        const __m512 y1 = add ? _mm512_maskz_loadu_ps(m1, y + 16) : _mm512_setzero_ps();
        _mm512_mask_storeu_ps(y, m0, _mm512_fmadd_ps(acc[i][0], factor, y0));
        _mm512_mask_storeu_ps(y + 16, m1, _mm512_fmadd_ps(acc[i][1], factor, y1));
    }
}

TEMPLATE void tile_end(const epilogue *o, int own_factor, int rows, __m512 (*acc)[2]) {
    if (o->add)
        tile_write(o, own_factor, rows, acc, 1);
    else
        tile_write(o, own_factor, rows, acc, 0);
}

TEMPLATE void tile_begin(const epilogue *o, int rows, __m512 (*acc)[2]) {
    UNROLL
    for (int i = 0; i < rows; i++) {
        acc[i][0] = acc[i][1] = _mm512_setzero_ps();
        _mm_prefetch((const char *)(o->y + i * o->ldy), _MM_HINT_T0);
        _mm_prefetch((const char *)(o->y + i * o->ldy + 16), _MM_HINT_T0);
    }
}

TEMPLATE void tile_rows(dword_of of, panel_kind kind, const epilogue *o, int rows, const float *x,
                        int next_row, int next_k, const float *panel, int n) {
    __m512 acc[MR][2];
    const float *next = o->prefetch;
    const int step = 16 * (kind == HALVES ? HALF_ROW : DWORD_ROW);
    tile_begin(o, rows, acc);
    for (int k = 0; k < n; k += 16, panel += step) {
        next = prefetch_step(o, next);
        tile(of, kind, acc, rows, x + k * next_k, next_row, next_k, panel, min_int(16, n - k));
    }
    UNROLL
    for (int i = 0; i < rows; i++) {
        UNROLL
        for (int h = 0; h < 2; h++)
            if (of == INT16) acc[i][h] = _mm512_cvtepi32_ps(_mm512_castps_si512(acc[i][h]));
    }
    tile_end(o, of == INT16, rows, acc);
}

/* TILE defines the microkernel `name`. Dword k of row i of x is x[i*next_row + k*next_k]. */
#define CASE(n, call)                                                                              \
    case n:                                                                                        \
        call;                                                                                      \
        break;
#define TILE(name, of, kind, next_row, next_k)                                                     \
    AVX512 static void name(const epilogue *o, int rows, const float *x, const float *panel,       \
                            int n) {                                                               \
        switch (rows) {                                                                            \
            CASE(1, tile_rows(of, kind, o, 1, x, next_row, next_k, panel, n))                      \
            CASE(2, tile_rows(of, kind, o, 2, x, next_row, next_k, panel, n))                      \
            CASE(3, tile_rows(of, kind, o, 3, x, next_row, next_k, panel, n))                      \
            CASE(4, tile_rows(of, kind, o, 4, x, next_row, next_k, panel, n))                      \
            CASE(5, tile_rows(of, kind, o, 5, x, next_row, next_k, panel, n))                      \
            CASE(6, tile_rows(of, kind, o, 6, x, next_row, next_k, panel, n))                      \
            CASE(7, tile_rows(of, kind, o, 7, x, next_row, next_k, panel, n))                      \
            CASE(8, tile_rows(of, kind, o, 8, x, next_row, next_k, panel, n))                      \
            CASE(9, tile_rows(of, kind, o, 9, x, next_row, next_k, panel, n))                      \
            CASE(10, tile_rows(of, kind, o, 10, x, next_row, next_k, panel, n))                    \
            CASE(11, tile_rows(of, kind, o, 11, x, next_row, next_k, panel, n))                    \
            CASE(12, tile_rows(of, kind, o, 12, x, next_row, next_k, panel, n))                    \
        }                                                                                          \
    }

/* Transposes 16 x 16 dwords in place */
TEMPLATE void transpose(__m512 r[16]) {
    __m512 a[16];
    UNROLL
    for (int j = 0; j < 16; j += 2) {
        a[j] = _mm512_unpacklo_ps(r[j], r[j + 1]);
        a[j + 1] = _mm512_unpackhi_ps(r[j], r[j + 1]);
    }
    UNROLL
    for (int j = 0; j < 16; j += 4) /* r[4g + c] = columns c, 4+c, 8+c, 12+c of rows 4g .. 4g+3 */
        for (int h = 0; h < 2; h++) {
            const __m512d lo = _mm512_castps_pd(a[j + h]), hi = _mm512_castps_pd(a[j + h + 2]);
            r[j + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
            r[j + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
        }
    UNROLL
    for (int c = 0; c < 4; c++) {
        const __m512 p0 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
        const __m512 p1 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
        const __m512 q0 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
        const __m512 q1 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
        r[c] = _mm512_shuffle_f32x4(p0, q0, 0x88);
        r[4 + c] = _mm512_shuffle_f32x4(p1, q1, 0x88);
        r[8 + c] = _mm512_shuffle_f32x4(p0, q0, 0xdd);
        r[12 + c] = _mm512_shuffle_f32x4(p1, q1, 0xdd);
    }
}

/* ---- scales ---------------------------------------------------------------------------------- */

/* (16) Sums of 16 rows; r[i] has the lanewise sums of row i */
TEMPLATE __m512 sums_of(__m512 r[16]) {
    transpose(r);
    UNROLL
    for (int step = 8; step; step /= 2) {
        UNROLL
        for (int i = 0; i < step; i++) r[i] = _mm512_add_ps(r[i], r[i + step]);
    }
    return r[0];
}

/* The larger of a and |v|, as integers: they compare as floats do, and NaN is the largest. */
TEMPLATE __m512i larger(__m512i a, __m512 v) {
    return _mm512_max_epu32(
        a, _mm512_and_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
}

/* (16) Largest magnitudes of 16 rows; r[i] has the lanewise ones of row i */
TEMPLATE __m512 largest_of(__m512 r[16]) {
    transpose(r);
    __m512i most = _mm512_castps_si512(r[0]);
    UNROLL
    for (int i = 1; i < 16; i++) most = _mm512_max_epu32(most, _mm512_castps_si512(r[i]));
    return _mm512_castsi512_ps(most);
}

/* The scales (16) that map sizes v (16) to n: v / n. inverse (16) = n / v, or 0 where v is 0. */
TEMPLATE __m512 scales(float inverse[16], __m512 v, float n) {
    const __mmask16 some = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    _mm512_storeu_ps(inverse, _mm512_maskz_div_ps(some, _mm512_set1_ps(n), v));
    return _mm512_div_ps(v, _mm512_set1_ps(n));
}

/* ---- 16-bit integers ------------------------------------------------------------------------- */

enum { INT16_MOST = 32767 };

/* 32 floats, lo and hi, rounded to nearest even: dword i has numbers 2i and 2i+1. */
TEMPLATE __m512 to_int16(__m512 lo, __m512 hi) {
    const __m512i lanes = _mm512_packs_epi32(_mm512_cvtps_epi32(lo), _mm512_cvtps_epi32(hi));
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi64(order, lanes));
}

/* ---- avx512_attention.c ---------------------------------------------------------------------- */

/* cpu_kernels.attention, with floats and with 16-bit integers (VNNI). */
void avx512_attention_f32(const attention_tile *w, float *att, size_t ld_att, int q0, int n);
void avx512_attention_int16(const attention_tile *w, float *att, size_t ld_att, int q0, int n);

#endif
#endif
