/* attention.cuh - grouped-query attention over texts of any length laid end to end, by the
 * FlashAttention-2 scheme (Dao 2023) on mma.sync, for heads of 32, 64 and 128.
 *
 *   att = softmax(q k^T / sqrt(HD)) v
 *
 * A token sees the shared prefix and the tokens of its own text up to itself or, ALL (bidirectional
 * attention), all tokens of its text, which then has no shared prefix.
 *
 * Tile: 64*M rows = (64*M / G) consecutive tokens x the G query heads of one kv head, so that the
 * heads that use the same K and V load them once. Row r is token r/G, head r%G. Four warps of 16*M
 * rows. Keys come in tiles of 64 at multiples of 64 in ABSOLUTE position, whether a key lies in the
 * prefix or in the text's own rows, and a tile that a row may not see leaves that row as it was:
 * sharing a prefix, the batch and the choice of M change no bit.
 *
 * M = 1: q in registers. M = 2: q stays in shared memory; half the K and V fragment loads per row.
 * Bytes per token: 2 HD (2H + 2K) of q, k, v, att, K and V again from L2 once per tile. Flops per
 * token that sees n keys (causal: its position + 1): 4 HD H n.
 */
#ifndef ATTENTION_CUH
#define ATTENTION_CUH

#include "ptx.cuh"

enum { ATT_THREADS = 128, ATT_KEYS = 64, ATT_STAGES = 2 };

/* A query tile. Rows of qkv: the prefix lies in rows 0..prefix-1, token i of the text in row0 + i;
 * its output goes to row out0 + i of att. Tokens t0 .. t0+64*M/G-1, as far as they are below len.
 * ALL and M = 1: behind the first len tokens the text has `behind` more, which are keys alone. */
struct alignas(16) att_tile {
    int t0, row0, len, prefix;
    int out0, behind, unused[2];
};

/* On sm_12x the 128-row kernel does not fit the register file; the host does not launch it
 * there. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define ATT_WIDE_FITS false
#else
#define ATT_WIDE_FITS true
#endif

template <int HD> constexpr int att_tile_bytes = ATT_KEYS *HD * 2; /* of K, or of V */
/* M = 1: q passes through the second stage on its way to registers. */
template <int HD, int M> constexpr int att_shared_bytes() {
    return 2 * ATT_STAGES * att_tile_bytes<HD> + (M > 1 ? M * 64 * HD * 2 : 0);
}
/* Byte offset of the 16-byte chunk c of row r; rows of HD halves, chunks permuted by row so that
 * the eight rows of an ldmatrix fall into different banks. Two rows of 32 halves span all banks. */
template <int HD> __device__ __forceinline__ int att_swizzle(int r, int c) {
    return r * (HD * 2) + ((c ^ (HD == 32 ? r >> 1 & 3 : r & 7)) << 4);
}

/* What the steps below share. Small on purpose: the 128-row kernel uses all 255 registers. */
template <class A> struct att_view {
    const A *k;      /* this kv head's k in row 0 of qkv */
    int to_v;        /* its v lies that many numbers further */
    int ld;          /* numbers per row of qkv */
    int prefix, own; /* position p lies in row p if p < prefix, else in row own + p */
    int first;       /* position of the tile's first token */
    int keys;        /* key positions 0 .. keys-1 matter to this tile */
    int lg;          /* G = 1 << lg */
    int warp, lane;
};

/* Starts the copy of key tile n. Keys past the end become zeros: 0 * garbage could be NaN. */
template <class A, int HD>
__device__ __forceinline__ void att_load_kv(const att_view<A> &s, shared_addr stage, int n) {
    constexpr int CHUNKS = HD / 8, STEPS = ATT_KEYS * CHUNKS / ATT_THREADS;
#pragma unroll(STEPS / 2) /* more would spill in the 128-row kernel */
    for (int i = 0; i < STEPS; i++) {
        const int id = (int)threadIdx.x + i * ATT_THREADS, r = id / CHUNKS, c = id % CHUNKS;
        const int p = n * ATT_KEYS + r;
        const bool ok = p < s.keys;
        const int row = ok ? (p < s.prefix ? p : s.own + p) : 0;
        const A *k = s.k + (size_t)row * s.ld + c * 8;
        cp_async16(stage + att_swizzle<HD>(r, c), k, ok);
        cp_async16(stage + att_tile_bytes<HD> + att_swizzle<HD>(r, c), k + s.to_v, ok);
    }
    cp_async_commit();
}

/* Starts the copy of the tile's queries; rows of tokens that do not exist become zeros. */
template <class A, int HD, int M>
__device__ __forceinline__ void att_load_q(const A *q, int ld, const att_tile &w, int lg,
                                           shared_addr to) {
    constexpr int CHUNKS = HD / 8, STEPS = 64 * M * CHUNKS / ATT_THREADS;
#pragma unroll(M > 1 ? 4 : STEPS) /* more would spill in hopper.cuh's loader */
    for (int i = 0; i < STEPS; i++) {
        const int id = (int)threadIdx.x + i * ATT_THREADS, r = id / CHUNKS, c = id % CHUNKS;
        const int t = w.t0 + (r >> lg), h = r & ((1 << lg) - 1);
        const bool ok = t < w.len;
        const size_t row = (size_t)(w.row0 + (ok ? t : w.t0));
        cp_async16(to + att_swizzle<HD>(r, c), q + row * ld + h * HD + c * 8, ok);
    }
    cp_async_commit();
}

/* The softmax of key tile n, in place: scores s become weights p. Per row, with the tile's keys j
 * that the row may see:
 *
 *   m' = max(m, max_j s_j)
 *   p_j = exp(s_j - m')
 *   older = exp(m - m')
 *   l' = older l + sum_j p_j
 *   O' = older O + sum_j p_j v_j      by the caller: att_rescale, then the product with V
 *
 * After the last tile, att = O / l. s and m are kept without the factor 1 / sqrt(HD): it is in
 * scale_log2e = log2(e) / sqrt(HD), since exp(x) = 2^(x log2(e)). l is a thread's part of the sum;
 * att_store adds those of a row's four lanes. */
template <class A, int M, bool ALL = false>
__device__ __forceinline__ void att_softmax(const att_view<A> &s, float (&p)[M][8][4],
                                            float (&m)[M][2], float (&l)[M][2],
                                            float (&older)[M][2], int n, float scale_log2e) {
    if constexpr (ALL) {
        if (n * ATT_KEYS + ATT_KEYS > s.keys) { /* it passes the text's end */
            const int left = s.keys - n * ATT_KEYS - s.lane % 4 * 2;
#pragma unroll
            for (int u = 0; u < M; u++)
#pragma unroll
                for (int j = 0; j < 8; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (j * 8 + (e & 1) >= left) p[u][j][e] = -INFINITY;
        }
    } else if (n * ATT_KEYS + ATT_KEYS - 1 > s.first) { /* it passes the first token */
        const int key = n * ATT_KEYS + s.lane % 4 * 2 - s.first;
#pragma unroll
        for (int u = 0; u < M; u++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int row = s.warp * 16 * M + u * 16 + (e >> 1) * 8 + s.lane / 4;
#pragma unroll
                for (int j = 0; j < 8; j++)
                    if (key + j * 8 + (e & 1) > row >> s.lg) p[u][j][e] = -INFINITY;
            }
    }
#pragma unroll
    for (int u = 0; u < M; u++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float top = m[u][h], sum = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) top = fmaxf(top, fmaxf(p[u][j][2 * h], p[u][j][2 * h + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1)); /* four lanes share a row */
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            const float scaled = top * scale_log2e; /* finite: every row sees key 0 */
            older[u][h] = exp2_approx(m[u][h] * scale_log2e - scaled);
            m[u][h] = top;
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 2 * h; e < 2 * h + 2; e++)
                    sum += p[u][j][e] = exp2_approx(p[u][j][e] * scale_log2e - scaled);
            l[u][h] = l[u][h] * older[u][h] + sum;
        }
}
template <int HD, int M>
__device__ __forceinline__ void att_rescale(float (&o)[M][HD / 8][4], const float (&older)[M][2]) {
#pragma unroll
    for (int u = 0; u < M; u++)
#pragma unroll
        for (int j = 0; j < HD / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[u][j][e] *= older[u][e / 2];
}

/* o / l to shared memory, then to att in rows of 16 bytes; each warp its own rows. */
template <class A, int HD, int M>
__device__ __forceinline__ void att_store(const att_view<A> &s, const att_tile &w,
                                          unsigned char *smem, A *att, size_t ld_att,
                                          float (&o)[M][HD / 8][4], float (&l)[M][2]) {
    constexpr int CHUNKS = HD / 8;
#pragma unroll
    for (int u = 0; u < M; u++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float d = l[u][h];
            d += __shfl_xor_sync(0xffffffffu, d, 1);
            d += __shfl_xor_sync(0xffffffffu, d, 2);
            d = 1 / d;
            const int r = s.warp * 16 * M + u * 16 + h * 8 + s.lane / 4;
#pragma unroll
            for (int j = 0; j < CHUNKS; j++)
                *(uint32_t *)(smem + att_swizzle<HD>(r, j) + s.lane % 4 * 4) =
                    to_bits<A>(o[u][j][2 * h] * d, o[u][j][2 * h + 1] * d);
        }
    __syncwarp(); /* att_out: the warp's rows are whole before its lanes read them by chunks */
#pragma unroll
    for (int i = 0; i < 16 * M * CHUNKS / 32; i++) {
        const int id = s.lane + i * 32, r = s.warp * 16 * M + id / CHUNKS, c = id % CHUNKS;
        const int t = w.t0 + (r >> s.lg), h = r & ((1 << s.lg) - 1);
        if (t < w.len)
            *(uint4 *)(att + (size_t)(w.out0 + t) * ld_att + h * HD + c * 8) =
                *(const uint4 *)(smem + att_swizzle<HD>(r, c));
    }
}

/* Grid (tiles, K). qkv (T, (H+2K)*HD): q heads, k heads, v heads; att rows of H*HD. */
template <class A, int HD, int M, bool ALL = false>
__global__ void __launch_bounds__(ATT_THREADS, M == 1 ? 2 : 1)
    attention_kernel(A *att, const A *qkv, const att_tile *tiles, int H, int K, int lg,
                     float scale_log2e) {
    if constexpr (M == 1 || ATT_WIDE_FITS) {
        constexpr int STAGE = 2 * att_tile_bytes<HD>, KSTEPS = HD / 16;
        SHARED_BYTES(smem);
        const att_tile w = tiles[blockIdx.x];
        if (w.t0 >= w.len) return; /* padding of the list in a graph */
        att_view<A> s;
        s.k = qkv + (size_t)(H + blockIdx.y) * HD;
        s.to_v = K * HD;
        s.ld = (H + 2 * K) * HD;
        s.prefix = ALL ? 0 : w.prefix;
        s.own = w.row0 - w.prefix;
        s.first = w.prefix + w.t0;
        s.keys = ALL ? w.len : w.prefix + min(w.len, w.t0 + (64 * M >> lg));
        if constexpr (ALL && M == 1) s.keys += w.behind;
        s.lg = lg;
        s.warp = threadIdx.x / 32;
        s.lane = threadIdx.x % 32;
        const int lane = s.lane, n_tiles = (s.keys + ATT_KEYS - 1) / ATT_KEYS;
        const shared_addr base = shared_address(smem), Q = base + (M == 1 ? 1 : 2) * STAGE;

        att_load_q<A, HD, M>(qkv + (size_t)(blockIdx.y << lg) * HD, s.ld, w, lg, Q);
        att_load_kv<A, HD>(s, base, 0);
        uint32_t q[M == 1 ? KSTEPS : 1][4];
        if constexpr (M == 1) {
            cp_async_wait<1>(); /* att_q_wait: this thread's queries have landed */
            __syncthreads();    /* att_q: everyone's have */
#pragma unroll
            for (int k = 0; k < KSTEPS; k++)
                ldmatrix4(q[k], Q + att_swizzle<HD>(s.warp * 16 + lane % 16, k * 2 + lane / 16));
        } /* the loop's first barrier frees the second stage for tile 1 */
        float o[M][HD / 8][4] = {}, m[M][2], l[M][2] = {};
#pragma unroll
        for (int u = 0; u < M; u++) m[u][0] = m[u][1] = -INFINITY;

        for (int n = 0; n < n_tiles; n++) {
            cp_async_wait<0>(); /* att_kv_wait: this thread's part of tile n has landed */
            __syncthreads();    /* att_kv: all of tile n has; and the other stage has been read */
            if (n + 1 < n_tiles) att_load_kv<A, HD>(s, base + ((n + 1) & 1) * STAGE, n + 1);
            const shared_addr Kt = base + (n & 1) * STAGE, Vt = Kt + att_tile_bytes<HD>;
            float p[M][8][4] = {};
#pragma unroll(M > 1 ? (ALL ? 2 : 4) : KSTEPS) /* more would spill in the 128-row kernel */
            for (int k = 0; k < KSTEPS; k++) { /* p = q k^T */
                uint32_t a[M][4];
#pragma unroll
                for (int u = 0; u < M; u++) {
                    if constexpr (M > 1)
                        ldmatrix4(a[u], Q + att_swizzle<HD>(s.warp * 16 * M + u * 16 + lane % 16,
                                                            k * 2 + lane / 16));
                    else
#pragma unroll
                        for (int e = 0; e < 4; e++) a[u][e] = q[k][e];
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    uint32_t b[4];
                    ldmatrix4(b, Kt + att_swizzle<HD>(j * 16 + (lane & 7) + (lane >> 4) * 8,
                                                      k * 2 + ((lane >> 3) & 1)));
#pragma unroll
                    for (int u = 0; u < M; u++) {
                        mma16816<A>(p[u][2 * j], a[u], b[0], b[1]);
                        mma16816<A>(p[u][2 * j + 1], a[u], b[2], b[3]);
                    }
                }
            }
            float older[M][2];
            att_softmax<A, M, ALL>(s, p, m, l, older, n, scale_log2e);
            att_rescale<HD, M>(o, older);
#pragma unroll
            for (int k = 0; k < ATT_KEYS / 16; k++) { /* o += p v */
                uint32_t a[M][4];
#pragma unroll
                for (int u = 0; u < M; u++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        a[u][e] = to_bits<A>(p[u][2 * k + e / 2][e % 2 * 2],
                                             p[u][2 * k + e / 2][e % 2 * 2 + 1]);
#pragma unroll
                for (int j = 0; j < HD / 16; j++) {
                    uint32_t b[4];
                    ldmatrix4_trans(b, Vt + att_swizzle<HD>(k * 16 + lane % 16, j * 2 + lane / 16));
#pragma unroll
                    for (int u = 0; u < M; u++) {
                        mma16816<A>(o[u][2 * j], a[u], b[0], b[1]);
                        mma16816<A>(o[u][2 * j + 1], a[u], b[2], b[3]);
                    }
                }
            }
        }
        __syncthreads(); /* att_end: all tiles have been read; the stages now take the output */
        att_store<A, HD, M>(s, tiles[blockIdx.x], smem, att + (size_t)(blockIdx.y << lg) * HD,
                            (size_t)H * HD, o, l);
    }
}

#endif
