/* cuda_attention.h - the attention kernels' test, for all that take attention.cuh's tiles. */
#ifndef CUDA_ATTENTION_H
#define CUDA_ATTENTION_H

#include "cuda_test.h"

#include "backends/cuda/attention.cuh"

template <class A> struct attention_args {
    A *att;
    const A *qkv;
    const att_tile *tiles;
    int T, n_tiles, H, K, lg;
    float scale_log2e;
};
template <class A> using attention_start = cudaError_t (*)(const attention_args<A> &);

template <class A, int HD, int M, bool ALL>
static cudaError_t attention_mma(const attention_args<A> &a) {
    cuda_ok(cudaFuncSetAttribute((const void *)attention_kernel<A, HD, M, ALL>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 att_shared_bytes<HD, M>()),
            "attribute");
    return launch(attention_kernel<A, HD, M, ALL>, dim3((unsigned)a.n_tiles, (unsigned)a.K),
                  dim3(ATT_THREADS), att_shared_bytes<HD, M>(), (cudaStream_t)0, a.att, a.qkv,
                  a.tiles, a.H, a.K, a.lg, a.scale_log2e);
}

/* B texts of lens own tokens behind a shared prefix of P; every text is also run through the
 * oracle. ALL: bidirectional. one: only one row of each text, the last or, ALL, the first. */
template <class A, int HD, int M, bool ALL = false>
static void attention_case(const std::vector<int> &lens, int P, int K, int lg, bool one,
                           double scale = 1.7,
                           attention_start<A> start = attention_mma<A, HD, M, ALL>) {
    const int G = 1 << lg, H = K * G, ld = (H + 2 * K) * HD, tokens = (64 * M) >> lg;
    int T = P;
    std::vector<att_tile> tiles;
    if (P && !one)
        for (int t = 0; t < P; t += tokens) tiles.push_back(att_tile{t, 0, P, 0, 0, 0, {}});
    for (int b = 0; b < (int)lens.size(); b++) {
        const int n = lens[b];
        if (one)
            tiles.push_back(ALL ? att_tile{0, T, 1, 0, b, n - 1, {}}
                                : att_tile{n - 1, T, n, P, b - (n - 1), 0, {}});
        for (int t = 0; !one && t < n; t += tokens) tiles.push_back(att_tile{t, T, n, P, T, 0, {}});
        T += lens[b];
    }
    tiles.insert(tiles.end(), 9, att_tile{}); /* a list may be filled up with empty tiles */
    rng r = {(uint64_t)(HD * M + lg)};
    const int rows = one ? (int)lens.size() : T;
    std::vector<A> qkv = random_numbers<A>(&r, (size_t)T * ld, scale);
    device_array<A> dqkv(qkv), datt((size_t)rows * H * HD);
    device_array<att_tile> dt(tiles);
    cuda_ok(start({datt.p, dqkv.p, dt.p, T, (int)tiles.size(), H, K, lg,
                   (float)(1.4426950408889634 / sqrt((double)HD))}),
            "launch");
    std::vector<A> got = datt.get();
    int row0 = P;
    for (int b = -(P > 0 && !one); b < (int)lens.size(); row0 += b < 0 ? 0 : lens[b], b++) {
        /* the text as the oracle wants it: prefix and own rows in one piece; b = -1: the prefix
         * itself */
        const int own = b < 0 ? P : lens[b], first = b < 0 ? 0 : P, n = first + own;
        std::vector<double> q((size_t)n * ld), att((size_t)n * H * HD), weighted(att.size()),
            reach((size_t)n * H);
        for (int t = 0; t < n; t++) {
            const int row = b < 0 || t < P ? t : row0 + t - P;
            for (int i = 0; i < ld; i++) q[(size_t)t * ld + i] = num(qkv[(size_t)row * ld + i]);
        }
        oracle_attention(att.data(), weighted.data(), reach.data(), q.data(), n, H, K, HD, ALL);
        for (int t = one && !ALL ? n - 1 : first; t < (one && ALL ? 1 : n); t++) {
            const int to = one ? b : b < 0 ? t : row0 + t - first;
            for (int i = 0; i < H * HD; i++) {
                const size_t at = (size_t)t * H * HD + i;
                /* Scores: HD products summed, the tensor cores may truncate: 2 HD U of sum |q||k| /
                 * sqrt(HD), scaled and subtracted with as much again in float. A weight is off by
                 * that twice (it is normalized by others), by the exponential's 4 U, by its
                 * rounding to A; below A's normal range by tiny, times sum |v| <= n * scale. The
                 * sum of n terms: n U. Then the result rounds. */
                const double score = reach[(size_t)t * H + i / HD] * (2 * HD + 8) * U;
                const double tol =
                    weighted[at] * (2 * score + 8 * U + rounding<A>() + (2 * n + 4) * U) +
                    n * scale * tiny<A>() + fabs(att[at]) * rounding<A>() + tiny<A>();
                if (!check_near(num(got[(size_t)to * H * HD + i]), att[at], tol, "att",
                                (size_t)to * H * HD + i))
                    return;
            }
        }
    }
}

#endif
