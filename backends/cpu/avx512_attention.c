/* avx512_attention.c - attention with AVX-512, with floats and with 16-bit integers.
 *
 * A block of R rows (tokens x query heads of one kv head) walks over the keys in tiles of CPU_KEYS.
 * A row keeps a maximum m, a sum l and weighted values O. Scores s_j and values v_j of a tile
 * update them (Milakov and Gimelshein 2018; Dao et al. 2022):
 *
 *   m' = max(m, max_j s_j)
 *   l' = exp(m - m') l + sum_j exp(s_j - m')
 *   O' = exp(m - m') O + sum_j exp(s_j - m') v_j
 *
 * In the end the row's output is O / l. The passes over a tile: 1 pack keys and values, 2 scores, 3
 * softmax (m', l' and the weights), 4 values (O'). Passes 2 and 4 are products by the microkernel:
 * keys are panels of NR keys, queries tiles of MR rows, values panels of NR dimensions, weights
 * rows of CPU_KEYS numbers. Scores, softmax and all sums are float. Register tiles above the
 * diagonal are skipped: their weights are zeros, and adding zeros changes nothing.
 *
 * With integers a dword holds two 16-bit numbers: twice the speed of float, with more bits of a
 * number than bfloat16 keeps. Each scale belongs to one query, one key, one value or one row of
 * weights, so that a row's bits never depend on other rows. Bounds keep every sum below 2^31:
 *   - A query and a key are scaled to length INT16_LENGTH: their product is at most INT16_LENGTH^2
 *     (Cauchy and Schwarz), about 2^30.
 *   - A value is scaled to a largest magnitude of VALUE_MOST. A row's weights of a tile, each
 *     multiplied by its value's scale, are scaled to at most INT16_MOST each and WEIGHTS_MOST
 *     together. So a sum of values is at most WEIGHTS_MOST x VALUE_MOST plus the rounding of
 *     CPU_KEYS weights. Where weights are even, both factors have rounding errors of similar size.
 */
#include "avx512.h"

#if defined(__x86_64__)

/* Microkernels: queries (dwords, MR) times keys; weights (rows, CPU_KEYS) times values */
TILE(scores_f32, F32, DWORDS, 1, MR)
TILE(scores_int16, INT16, DWORDS, 1, MR)
TILE(values_f32, F32, DWORDS, CPU_KEYS, 1)
TILE(values_int16, INT16, DWORDS, CPU_KEYS, 1)

enum { INT16_LENGTH = 32700, VALUE_MOST = 8187, WEIGHTS_MOST = 8 * INT16_MOST };

TEMPLATE int per_dword(dword_of of) { return of == INT16 ? 2 : 1; }
TEMPLATE int head_dwords(dword_of of, const attention_tile *w) {
    return ceil_div(w->hd, per_dword(of));
}

/* (16) Maxima of 16 rows; r[i] has the lanewise ones of row i. A NaN may be lost here, but its exp
 * is NaN. */
TEMPLATE __m512 maxima_of(__m512 r[16]) {
    transpose(r);
    UNROLL
    for (int step = 8; step; step /= 2) {
        UNROLL
        for (int i = 0; i < step; i++) r[i] = _mm512_max_ps(r[i], r[i + step]);
    }
    return r[0];
}

/* The scales (16) that map rows (n) to length INT16_LENGTH, and inverse (16) their inverses */
TEMPLATE __m512 length_scales(float inverse[16], const float *const row[16], int rows, int n) {
    __m512 r[16];
    UNROLL
    for (int i = 0; i < 16; i++) r[i] = _mm512_setzero_ps();
    UNROLL
    for (int i = 0; i < rows; i++)
        for (int d = 0; d < n; d += 16) {
            const __m512 v = load_first(row[i] + d, n - d);
            r[i] = _mm512_fmadd_ps(v, v, r[i]);
        }
    return scales(inverse, _mm512_sqrt_ps(sums_of(r)), INT16_LENGTH);
}

/* r = 16 dwords of each of the rows (n) from number k on, transposed. Integers are multiplied by
 * inverse[i], floats by `scale`. */
TEMPLATE void head_rows(dword_of of, __m512 r[16], const float *const row[16], int rows, int k,
                        int n, const float *inverse, __m512 scale) {
    UNROLL
    for (int i = 0; i < 16; i++) r[i] = _mm512_setzero_ps();
    UNROLL
    for (int i = 0; i < rows; i++) {
        const __m512 v = load_first(row[i] + k, n - k);
        if (of == INT16) {
            const __m512 f = _mm512_set1_ps(inverse[i]),
                         next = load_first(row[i] + k + 16, n - k - 16);
            r[i] = to_int16(_mm512_mul_ps(v, f), _mm512_mul_ps(next, f));
        } else {
            r[i] = _mm512_mul_ps(v, scale);
        }
    }
    transpose(r);
}

/* Pass 1: packs the keys of positions k0 .. k0+n-1. The last 16 are filled up with the last key;
 * what a panel holds beyond that is never used. */
TEMPLATE void attention_load_keys(dword_of of, const attention_tile *w, int k0, int n) {
    const int dwords = head_dwords(of, w);
    for (int j = 0; j < n; j += 16) {
        const float *row[16];
        float *to = w->keys + j / NR * NR * dwords + j % NR, inverse[16];
        for (int i = 0; i < 16; i++)
            row[i] = simd_attention_row(w, k0 + min_int(j + i, n - 1)) + w->k_col;
        if (of == INT16) _mm512_storeu_ps(w->key_scale + j, length_scales(inverse, row, 16, w->hd));
        for (int d = 0; d < dwords; d += 16) {
            __m512 r[16];
            head_rows(of, r, row, 16, d * per_dword(of), w->hd, inverse, _mm512_set1_ps(1));
            if (dwords - d >= 16) {
                UNROLL
                for (int c = 0; c < 16; c++) _mm512_storeu_ps(to + (d + c) * NR, r[c]);
            } else {
                for (int c = 0; c < dwords - d; c++) _mm512_storeu_ps(to + (d + c) * NR, r[c]);
            }
        }
    }
}

/* Pass 1: packs the values. If n is odd, the last value is paired with itself, with a weight of
 * 0. */
TEMPLATE void attention_load_values(dword_of of, const attention_tile *w, int k0, int n) {
    const int hd = w->hd, per = per_dword(of);
    for (int j = 0; j < n; j += 16) {
        const float *row[16];
        float inverse[16];
        for (int i = 0; i < 16; i++)
            row[i] = simd_attention_row(w, k0 + min_int(j + i, n - 1)) + w->v_col;
        if (of == INT16) {
            __m512 r[16];
            for (int i = 0; i < 16; i++) {
                __m512i most = _mm512_setzero_si512();
                for (int d = 0; d < hd; d += 16)
                    most = larger(most, load_first(row[i] + d, hd - d));
                r[i] = _mm512_castsi512_ps(most);
            }
            _mm512_storeu_ps(w->value_scale + j, scales(inverse, largest_of(r), VALUE_MOST));
        }
        for (int i = 0; i < min_int(16, n - j); i += per) {
            float *to = w->values + (j + i) / per * NR;
            for (int d = 0; d < w->hdp; d += 16) {
                __m512 v = load_first(row[i] + d, hd - d);
                if (of == INT16) {
                    const __m512 next = load_first(row[i + 1] + d, hd - d);
                    const __m512i a =
                        _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(inverse[i])));
                    const __m512i b =
                        _mm512_cvtps_epi32(_mm512_mul_ps(next, _mm512_set1_ps(inverse[i + 1])));
                    v = _mm512_castsi512_ps(
                        _mm512_mask_mov_epi16(_mm512_slli_epi32(b, 16), 0x55555555, a));
                }
                _mm512_storeu_ps(to + d / NR * (CPU_KEYS / per) * NR + d % NR, v);
            }
        }
    }
}

/* Pass 2: s (R, n) = q k^T, for whole tiles of rows; pass 3 masks the scores of keys that a row
 * does not see. Integer scores still lack their keys' scales. */
TEMPLATE void attention_scores(dword_of of, const attention_tile *w, int R, int q0, int k0, int n) {
    const int dwords = head_dwords(of, w);
    for (int j = 0; j < n; j += NR)
        for (int r = simd_first_seeing(w, q0, k0 + j) / MR * MR; r < R; r += MR) {
            const epilogue o = {.y = w->s + (size_t)r * CPU_KEYS + j,
                                .ldy = CPU_KEYS,
                                .cols = NR,
                                .factor = 1,
                                .factors = w->query_scale + r};
            const float *q = w->q + (size_t)r * dwords, *keys = w->keys + j * dwords;
            if (of == INT16)
                scores_int16(&o, min_int(MR, R - r), q, keys, dwords);
            else
                scores_f32(&o, min_int(MR, R - r), q, keys, dwords);
        }
}

/* Scores j .. j+15 of a row; -inf for keys that it does not see */
TEMPLATE __m512 scores16(dword_of of, const attention_tile *w, const float *s, int j,
                         __mmask16 visible) {
    const __m512 low = _mm512_set1_ps(-INFINITY), v = _mm512_mask_loadu_ps(low, visible, s + j);
    if (of != INT16) return v;
    return _mm512_mask_mul_ps(low, visible, v, _mm512_loadu_ps(w->key_scale + j));
}

/* The number of the tile's keys that row r of the block sees */
static int keys_seen(const attention_tile *w, int r, int q0, int k0) {
    return min_int(CPU_KEYS, simd_keys_seen(w, q0, r) - k0);
}

/* Pass 3: m', l', the weights exp(s - m') in place of the scores, and exp(m - m') O. 16 rows at a
 * time, so that independent rows hide each other's latency. */
TEMPLATE void attention_softmax(dword_of of, const attention_tile *w, int R, int q0, int k0,
                                int n) {
    const int end = round_up(n, NR);
    for (int first = simd_first_seeing(w, q0, k0); first < R; first += 16) {
        const int rows = min_int(16, R - first);
        const __m512 low = _mm512_set1_ps(-INFINITY), zero = _mm512_setzero_ps();
        float *s = w->s + (size_t)first * CPU_KEYS, *max = w->max + first, older[16];
        __m512 m[16], sum[16], weighted[16], top[16];
        for (int i = 0; i < rows; i++) {
            const int seen = keys_seen(w, first + i, q0, k0);
            m[i] = low;
            for (int j = 0; j < seen; j += 16)
                m[i] = _mm512_max_ps(m[i], scores16(of, w, s + i * CPU_KEYS, j, first16(seen - j)));
        }
        for (int i = rows; i < 16; i++) m[i] = zero;
        const __m512 before = load_first(max, rows), most = _mm512_max_ps(maxima_of(m), before);
        const __m512 factor = exp16(_mm512_sub_ps(before, most));
        store_first(max, most, rows);
        _mm512_storeu_ps(older, factor);
        for (int i = 0; i < rows; i++) {
            const int seen = keys_seen(w, first + i, q0, k0);
            const __m512 mi = _mm512_set1_ps(max[i]);
            float *e = s + i * CPU_KEYS;
            sum[i] = weighted[i] = top[i] = zero;
            for (int j = 0; j < seen; j += 16) {
                const __mmask16 some = first16(seen - j);
                __m512 v = _mm512_sub_ps(scores16(of, w, e, j, some), mi);
                v = of == INT16 ? _mm512_maskz_mov_ps(some, exp16_rough(v)) : exp16(v);
                sum[i] = _mm512_add_ps(sum[i], v);
                if (of == INT16) {
                    v = _mm512_maskz_mul_ps(some, v, _mm512_loadu_ps(w->value_scale + j));
                    weighted[i] = _mm512_add_ps(weighted[i], v);
                    top[i] = _mm512_max_ps(top[i], v);
                }
                _mm512_storeu_ps(e + j, v);
            }
            for (int j = round_up(seen, 16); j < end; j += 16) _mm512_storeu_ps(e + j, zero);
        }
        for (int i = rows; i < 16; i++) sum[i] = weighted[i] = top[i] = zero;
        const __m512 old = load_first(w->sum + first, rows);
        store_first(w->sum + first, _mm512_fmadd_ps(old, factor, sums_of(sum)), rows);
        if (of == INT16) {
            float to[16];
            const __m512 share =
                _mm512_mul_ps(sums_of(weighted), _mm512_set1_ps((float)INT16_MOST / WEIGHTS_MOST));
            store_first(w->weight_scale + first,
                        scales(to, _mm512_max_ps(maxima_of(top), share), INT16_MOST), rows);
            for (int i = 0; i < rows; i++) {
                float *e = s + i * CPU_KEYS;
                const __m512 f = _mm512_set1_ps(to[i]);
                for (int j = 0; j < end; j += 32) {
                    const __m512 lo = _mm512_loadu_ps(e + j), hi = _mm512_loadu_ps(e + j + 16);
                    _mm512_storeu_ps(e + j / 2,
                                     to_int16(_mm512_mul_ps(lo, f), _mm512_mul_ps(hi, f)));
                }
            }
        }
        for (int i = 0; k0 && i < rows; i++) { /* in the first tile O is still empty */
            float *acc = w->acc + (size_t)(first + i) * w->hdp;
            if (older[i] == 1) continue;
            for (int d = 0; d < w->hdp; d += 16)
                _mm512_storeu_ps(acc + d,
                                 _mm512_mul_ps(_mm512_loadu_ps(acc + d), _mm512_set1_ps(older[i])));
        }
    }
}

/* Pass 4: O (R, hdp) = (k0 ? O : 0) + s v. Rows that see about the same number of keys are
 * multiplied together, in steps of NR keys. */
TEMPLATE void attention_values(dword_of of, const attention_tile *w, int R, int q0, int k0, int n) {
    const int per = per_dword(of);
    for (int r = simd_first_seeing(w, q0, k0), end; r < R; r = end) {
        const int depth = min_int(n, round_up(keys_seen(w, r, q0, k0), NR));
        end = depth == n ? R : simd_first_seeing(w, q0, k0 + depth);
        for (int d = 0; d < w->hdp; d += NR)
            for (int i = r; i < end; i += MR) {
                const epilogue o = {.y = w->acc + (size_t)i * w->hdp + d,
                                    .ldy = (size_t)w->hdp,
                                    .cols = NR,
                                    .add = k0,
                                    .factor = 1,
                                    .factors = w->weight_scale + i};
                const float *s = w->s + (size_t)i * CPU_KEYS, *v = w->values + d * (CPU_KEYS / per);
                if (of == INT16)
                    values_int16(&o, min_int(MR, end - i), s, v, ceil_div(depth, 2));
                else
                    values_f32(&o, min_int(MR, end - i), s, v, depth);
            }
    }
}

TEMPLATE void attention_queries(dword_of of, const attention_tile *w, int R, int q0) {
    const int G = w->G, dwords = head_dwords(of, w);
    const __m512 scale = _mm512_set1_ps((float)(1 / sqrt(w->hd)));
    for (int t = 0; t < R; t += MR) {
        const float *q[16];
        float inverse[16];
        for (int i = 0; i < MR; i++) {
            const int row = min_int(t + i, R - 1);
            q[i] = simd_attention_row(w, q0 + row / G) + w->q_col + row % G * w->hd;
        }
        if (of == INT16)
            store_first(w->query_scale + t,
                        _mm512_mul_ps(length_scales(inverse, q, MR, w->hd), scale), MR);
        for (int d = 0; d < dwords; d += 16) {
            __m512 r[16];
            head_rows(of, r, q, MR, d * per_dword(of), w->hd, inverse, scale);
            float *to = w->q + (size_t)t * dwords + d * MR;
            for (int c = 0; c < min_int(16, dwords - d); c++)
                _mm512_mask_storeu_ps(to + c * MR, (1u << MR) - 1, r[c]);
        }
    }
}

TEMPLATE void attention_of(dword_of of, const attention_tile *w, float *att, size_t ld_att, int q0,
                           int n) {
    const int G = w->G, hd = w->hd, R = n * G;
    attention_queries(of, w, R, q0);
    for (int r = 0; r < R; r++) w->max[r] = -INFINITY, w->sum[r] = 0;
    const int seen = simd_keys_seen(w, q0, R - 1);
    for (int k0 = 0; k0 < seen; k0 += CPU_KEYS) {
        const int keys = min_int(CPU_KEYS, seen - k0);
        attention_load_keys(of, w, k0, keys);
        attention_load_values(of, w, k0, keys);
        attention_scores(of, w, R, q0, k0, keys);
        attention_softmax(of, w, R, q0, k0, keys);
        attention_values(of, w, R, q0, k0, keys);
    }
    for (int r = 0; r < R; r++) {
        float *out = att + r / G * ld_att + r % G * hd;
        const __m512 inverse = _mm512_set1_ps(1 / w->sum[r]);
        for (int d = 0; d < hd; d += 16) { /* + 0 turns -0, an underflow, into 0 */
            const __m512 v = _mm512_loadu_ps(w->acc + (size_t)r * w->hdp + d);
            store_first(out + d, _mm512_fmadd_ps(v, inverse, _mm512_setzero_ps()), hd - d);
        }
    }
}

AVX512 void avx512_attention_f32(const attention_tile *w, float *att, size_t ld_att, int q0,
                                 int n) {
    attention_of(F32, w, att, ld_att, q0, n);
}

AVX512 void avx512_attention_int16(const attention_tile *w, float *att, size_t ld_att, int q0,
                                   int n) {
    attention_of(INT16, w, att, ld_att, q0, n);
}

#endif
