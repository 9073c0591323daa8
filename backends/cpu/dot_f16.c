/* dot_f16.c - dot products of one query, in float, with many rows of halves.
 *
 *   lane l:  s[l] = fma(row[i], q[i], s[l])  for i = l, l + 32, l + 64, ...
 *   then     s[l] += s[l + 16] for l < 16, s[l] += s[l + 8] for l < 8, + 4, + 2, + 1
 *
 * The order of the sums is part of the result: every version gives the same bits, so a score does
 * not depend on the CPU, on the other rows or on the threads. Each fma rounds once.
 *
 * AVX2: the 32 lanes are four registers, so that four chains of fma run side by side; a row is read
 * once, q stays in the L1 cache. A half is 2 bytes and 2 operations, one byte an operation: rows
 * that come from memory are limited by it long before the arithmetic is (docs/benchmarks.md), which
 * is why there is no version with AVX-512.
 */
#include "dot_f16.h"

#include <math.h>

static void dot_plain(float *scores, const float *q, const uint16_t *rows, size_t n, int stride) {
    for (size_t r = 0; r < n; r++, rows += stride) {
        float s[DOT_F16_LANES] = {0};
        for (int i = 0; i < stride; i += DOT_F16_LANES)
            for (int l = 0; l < DOT_F16_LANES; l++)
                s[l] = fmaf(half_to_float(rows[i + l]), q[i + l], s[l]);
        for (int half = DOT_F16_LANES / 2; half; half /= 2)
            for (int l = 0; l < half; l++) s[l] += s[l + half];
        scores[r] = s[0];
    }
}

#if defined(__x86_64__)

#include <immintrin.h>

__attribute__((target("avx2,fma,f16c"))) static void
dot_avx2(float *scores, const float *q, const uint16_t *rows, size_t n, int stride) {
    for (size_t r = 0; r < n; r++, rows += stride) {
        __m256 s[4];
        for (int k = 0; k < 4; k++) s[k] = _mm256_setzero_ps();
        for (int i = 0; i < stride; i += DOT_F16_LANES)
            for (int k = 0; k < 4; k++) {
                const __m128i halves = _mm_load_si128((const __m128i *)(rows + i + 8 * k));
                s[k] =
                    _mm256_fmadd_ps(_mm256_cvtph_ps(halves), _mm256_load_ps(q + i + 8 * k), s[k]);
            }
        const __m256 lanes8 = _mm256_add_ps(_mm256_add_ps(s[0], s[2]), _mm256_add_ps(s[1], s[3]));
        const __m128 lanes4 =
            _mm_add_ps(_mm256_castps256_ps128(lanes8), _mm256_extractf128_ps(lanes8, 1));
        const __m128 lanes2 = _mm_add_ps(lanes4, _mm_movehl_ps(lanes4, lanes4));
        scores[r] = _mm_cvtss_f32(_mm_add_ss(lanes2, _mm_movehdup_ps(lanes2)));
    }
}

#endif

const dot_f16_version dot_f16_versions[] = {
    {"plain", 0, dot_plain},
#if defined(__x86_64__)
    {"avx2", CPU_AVX2, dot_avx2},
#endif
};
const int n_dot_f16_versions = sizeof dot_f16_versions / sizeof *dot_f16_versions;

dot_f16 *dot_f16_choose(void) {
    const unsigned features = cpu_features();
    dot_f16 *found = dot_plain;
    for (int i = 0; i < n_dot_f16_versions; i++)
        if (!(dot_f16_versions[i].needs & ~features)) found = dot_f16_versions[i].run;
    return found;
}
