/* avx2.h - what the tables for AVX2 share: loads and stores of some lanes, exp, a transposition,
 * all inlined; and the ops that compute in float in all of them.
 */
#ifndef CPU_AVX2_H
#define CPU_AVX2_H

#include "cpu.h"
#include "gelu.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
/* A template: the caller passes constants, and loops over them unroll into registers. */
#define TEMPLATE static inline __attribute__((always_inline)) AVX2

/* The first n of 8 numbers at p, zeros after them; and the other way round. */
TEMPLATE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

TEMPLATE __m256 load_first(const float *p, int n) {
    return n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first(n));
}

TEMPLATE void store_first(float *p, __m256 v, int n) {
    if (n >= 8)
        _mm256_storeu_ps(p, v);
    else
        _mm256_maskstore_ps(p, first(n), v);
}

/* ---- exp ----------------------------------------------------------------------------------------
 * exp(x) = 2^n exp(r), n = round(x / ln 2), |r| < 0.3467. Error of exp(r), in units of 2^-24 with
 * exp(r) between 0.707 and 1.415: the Taylor polynomial of degree 7 leaves out r^8/8! + ...: 0.1;
 * n times the first part of ln 2 and the difference from it are exact, r's other rounding: 0.25
 * exp(r); Horner's last step 1 where exp(r) >= 1 (an ulp is then 2), else 0.5 (an ulp is 1); the
 * step before it 0.35 times 1 or 0.5; the ones before 0.1. Below an ulp on either side. */
TEMPLATE __m256 exp8(__m256 x) {
    const __m256 top = _mm256_set1_ps(88.72283f), bottom = _mm256_set1_ps(-87.33654f);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(0x1.715476p+0f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* ln 2 in two parts; the first has 9 bits, so that n times it is exact */
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.63p-1f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-0x1.bd0106p-13f), r);
    __m256 p = _mm256_set1_ps((float)(1.0 / 5040));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps((float)(1.0 / 720)));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps((float)(1.0 / 120)));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps((float)(1.0 / 24)));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps((float)(1.0 / 6)));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1));
    const __m256i scale = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), scale));
    p = _mm256_andnot_ps(_mm256_cmp_ps(x, bottom, _CMP_LT_OQ), p);
    /* NaN comes this far by itself: its n converts to 2^31, and that times 2^23 is 0 */
    return _mm256_blendv_ps(p, _mm256_set1_ps(INFINITY), _mm256_cmp_ps(x, top, _CMP_GT_OQ));
}

TEMPLATE __m256 swiglu8(__m256 gate, __m256 up) {
    const __m256 e = exp8(_mm256_sub_ps(_mm256_setzero_ps(), gate));
    return _mm256_mul_ps(_mm256_div_ps(gate, _mm256_add_ps(_mm256_set1_ps(1), e)), up);
}

/* ---- gelu: see gelu.h ------------------------------------------------------------------------ */

TEMPLATE __m256 gelu8(__m256 t) {
    const __m256 sign = _mm256_set1_ps(-0.0f), half = _mm256_set1_ps(0.5f);
    const __m256 one = _mm256_set1_ps(1);
    /* of a NaN and a number, min is the second one */
    const __m256 a = _mm256_min_ps(_mm256_set1_ps(13.5f), _mm256_andnot_ps(sign, t));
    const __m256 r = _mm256_div_ps(one, _mm256_add_ps(a, _mm256_set1_ps(3)));
    const __m256 v = _mm256_fnmadd_ps(_mm256_set1_ps(6), r, one);
    const __m256 square = _mm256_mul_ps(a, a), rest = _mm256_fmsub_ps(a, a, square);
    __m256 p = _mm256_set1_ps(gelu_tail[0]);
    for (int k = 1; k <= GELU_DEGREE; k++) p = _mm256_fmadd_ps(p, v, _mm256_set1_ps(gelu_tail[k]));
    __m256 e = exp8(_mm256_mul_ps(square, _mm256_set1_ps(-0.5f)));
    e = _mm256_fnmadd_ps(_mm256_mul_ps(e, half), rest, e);
    const __m256 tail = _mm256_mul_ps(e, _mm256_mul_ps(p, r)); /* Phi(-a) */
    /* blendv looks at the sign of t */
    const __m256 phi = _mm256_blendv_ps(_mm256_sub_ps(one, tail), tail, t);
    return _mm256_fmadd_ps(t, phi, _mm256_setzero_ps()); /* + 0 turns -0 into 0 */
}

/* ---- lanes ----------------------------------------------------------------------------------- */

TEMPLATE float total(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* The largest of v's numbers */
TEMPLATE float greatest(__m256 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

/* 8 rows of 8 floats -> 8 columns */
TEMPLATE void transpose_floats(__m256 col[8], const float *const row[8], int d) {
    __m256 a[8], b[8];
    for (int j = 0; j < 4; j++)
        for (int h = 0; h < 2; h++) /* a[j + 4h]: numbers 4h .. 4h+3 of rows j and j+4 */
            a[j + 4 * h] =
                _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row[j] + d + 4 * h)),
                                     _mm_loadu_ps(row[j + 4] + d + 4 * h), 1);
    for (int j = 0; j < 8; j += 2) {
        b[j] = _mm256_unpacklo_ps(a[j], a[j + 1]);
        b[j + 1] = _mm256_unpackhi_ps(a[j], a[j + 1]);
    }
    for (int h = 0; h < 2; h++)
        for (int i = 0; i < 2; i++) {
            col[4 * h + 2 * i] = _mm256_shuffle_ps(b[4 * h + i], b[4 * h + 2 + i], 0x44);
            col[4 * h + 2 * i + 1] = _mm256_shuffle_ps(b[4 * h + i], b[4 * h + 2 + i], 0xee);
        }
}

#endif
#endif
