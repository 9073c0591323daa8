/* hopper.cuh - two kernels for sm_90a, built on wgmma: the gate and up projections with SwiGLU
 * fused, in 16 bits and in e4m3, and attention for long texts. They have not been measured, so
 * they run only with qemb_options.hopper.
 *
 * Both are persistent kernels with one block per multiprocessor. One warpgroup loads; two multiply,
 * 64 rows each. Tiles pass through a ring of stages in shared memory. A stage has two mbarriers:
 * `full` (its bytes have arrived) and `empty` (all multiplying warps have finished with it). The
 * i-th use of a stage waits for the i-th phase of `full`; the next refill waits for the phase of
 * `empty` that ends with that use.
 */
#ifndef HOPPER_CUH
#define HOPPER_CUH

#include "attention.cuh"
#include "kernels.cuh"
#include "ptx_hopper.cuh"

enum { HOPPER_THREADS = 384, HOPPER_ROWS = 128, HOPPER_WARPS = 8 }; /* warps that multiply */
enum { HOPPER_LOADER_REGS = 40, HOPPER_REGS = 232 }; /* 128 * 40 + 256 * 232 <= 65536 */
constexpr int HOPPER_ROW = 128;                      /* bytes of a row of a tile in shared memory */

/* A position i in the ring: stage i % N, in its i / N-th use. */
template <int N, int BYTES> struct hopper_ring {
    shared_addr base; /* N stages, then N pairs of mbarriers */
    int i = 0;
    __device__ __forceinline__ shared_addr stage(int j) const { return base + j % N * BYTES; }
    __device__ __forceinline__ shared_addr full(int j) const {
        return base + N * BYTES + j % N * 16;
    }
    __device__ __forceinline__ shared_addr empty(int j) const { return full(j) + 8; }
    __device__ __forceinline__ int parity(int j) const { return j / N & 1; }
};
template <int N, int BYTES> constexpr int hopper_ring_bytes = N *(BYTES + 16);

#if defined(HOPPER_CODE)
template <int N, int BYTES>
__device__ __forceinline__ void hopper_init(const hopper_ring<N, BYTES> &ring, int loaders,
                                            int readers = HOPPER_WARPS) {
    for (int j = 0; j < N; j++) {
        barrier_init(ring.full(j), loaders);
        barrier_init(ring.empty(j), readers);
    }
}
#endif

/* ---- gate_up ------------------------------------------------------------------------------------
 * h (T, F) = silu(gate) * up * 2^-SWIGLU_SHIFT as swiglu_kernel has it, clamps counted, gate and up
 * (T, F) = x W^T by halves of W (2F, D),  x (T, D), scaled: by alpha, or where x and W are e4m3 by
 * x_scale (T) of the row and w_scale (2F) of the column. Sums FP32, not rounded on the way. Rows of
 * x and W are multiples of 16 bytes, F of 8. maps: boxes of 128 bytes and 128 rows of x and W.
 *
 * Tile: 128 rows x 128 columns of gate and the same 128 of up, 128 bytes of D per stage. A
 * warpgroup's wgmma has 64 rows, 128 columns of gate and 128 of up, so a thread holds both halves
 * of its outputs.
 *
 * Clusters: the two blocks of a cluster take neighbouring tiles of rows and share their columns.
 * Each loads its own x, and one half of W, gate or up, for both. So a stage is refilled when the
 * warpgroups of both blocks have read it. A block without rows works on zeros: its half of W is
 * needed.
 *
 * Overlap: the second warpgroup starts GU_LAG stages behind the first. While the first runs its
 * epilogue, the second multiplies the stages between them; then the second runs its epilogue and
 * the first multiplies the next tile's stages, up to GU_STAGES of them. Two warpgroups with whole
 * tiles of their own, in turns (ping-pong), would overlap everything, but their tiles of 128 x 128
 * move too many bytes through shared memory, which moves 128 a clock. Per stage and warpgroup, 32
 * KiB are written and 8 wgmmas (64 x 128) read 6 KiB each while the tensor cores need 512 clocks:
 * 160 bytes a clock. Here 48 KiB are written and 8 wgmmas (64 x 256) read 10 KiB each in 1,024
 * clocks: 125. Calculated, not measured.
 *
 * Per stage and block 32 KiB come from L2. Neighbouring clusters work on the same rows of W, and
 * all of them on GU_GROUP pairs of tiles of x, which stay in L2. h is 2 F bytes per token, 4 F D
 * flops.
 *
 * e4m3: the tensor cores shift the 32 products of a wgmma and the sum so far to the exponent of the
 * largest and drop what is below 2^-13 of it, so each of the 33 errs by less than 2^-13 M, M the
 * largest magnitude among all of them. The D / 32 wgmmas of a sum err by less than (D / 32) 33
 * 2^-13 M: 0.52 M for D = 4096, if every term loses all it can and all signs agree. Products of
 * either sign lose toward zero in either direction: with independent signs, uniform losses have a
 * root mean square of 2^-13 M / sqrt(3), D of them 2^-13 M sqrt(D / 3), or 0.0045 M. The codes
 * themselves are off by up to 2^-4, uniformly by 2.6 % of a number, hence 3.7 % of the sum's
 * spread. Promoting partial sums to FP32, as cuBLASLt does without fast accumulation, needs a
 * second set of 128 registers. */
constexpr int GU_COLUMNS = 128, GU_STAGES = 4, GU_GROUP = 8, GU_CLUSTER = 2, GU_LAG = 2;
constexpr int GU_PART = HOPPER_ROWS * HOPPER_ROW; /* bytes of x, of gate's rows, of up's rows */
template <class X> constexpr int gu_depth = HOPPER_ROW / (int)sizeof(X); /* of D per stage */
typedef hopper_ring<GU_STAGES, 3 * GU_PART> gate_up_ring;
constexpr int gate_up_shared_bytes = hopper_ring_bytes<GU_STAGES, 3 * GU_PART> + 8;

/* What sums are multiplied by: row(r) * columns(c), columns(c) of c and c + 1. */
struct gate_up_alpha {
    float alpha;
    __device__ __forceinline__ float row(int) const { return alpha; }
    __device__ __forceinline__ float2 columns(int, bool) const { return make_float2(1, 1); }
};
struct gate_up_scales {
    const float *x, *w; /* w aligned to 8 bytes */
    __device__ __forceinline__ float row(int r) const { return x[r]; }
    __device__ __forceinline__ float2 columns(int c, bool ok) const {
        return ok ? *(const float2 *)(w + c) : make_float2(0, 0);
    }
};

#if defined(HOPPER_CODE)

/* Transposes 4 x 4 words among four lanes: word j of lane i becomes word i of lane j. */
__device__ __forceinline__ void hopper_transpose(uint32_t (&w)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            const uint32_t got =
                __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i | bit], (unsigned)bit);
            w[i] = upper ? got : w[i];
            w[i | bit] = upper ? w[i | bit] : got;
        }
    }
}

/* d: blocks 0..15 gate, 16..31 up. r: the thread's first row, c: the tile's first column. Beyond
 * T and F, x or up is zero, so h is zero and counts no clamp. */
template <class A, class S>
__device__ __forceinline__ void gate_up_store(A *h, const float (&d)[32][4], const S &scale, int r,
                                              int c, int T, int F, int *clamped) {
    const int lane = threadIdx.x % 32;
    float by_row[2];
#pragma unroll
    for (int e = 0; e < 2; e++) by_row[e] = r + e * 8 < T ? scale.row(r + e * 8) : 0;
#pragma unroll
    for (int j = 0; j < 16; j += 4) {
        const int column = c + (j + lane % 4) * 8; /* after the transposition */
        uint32_t w[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float(&g)[4] = d[j + i], (&u)[4] = d[16 + j + i];
            const int own = c + (j + i) * 8 + lane % 4 * 2;
            const float2 sg = scale.columns(own, own < F), su = scale.columns(F + own, own < F);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float s = by_row[e];
                w[e][i] = to_bits<A>(
                    swiglu_one(s * sg.x * g[2 * e], s * su.x * u[2 * e], clamped),
                    swiglu_one(s * sg.y * g[2 * e + 1], s * su.y * u[2 * e + 1], clamped));
            }
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const uint32_t(&v)[4] = w[e];
            hopper_transpose(w[e], lane);
            if (r + e * 8 < T && column < F)
                *(uint4 *)(h + (size_t)(r + e * 8) * F + column) =
                    make_uint4(v[0], v[1], v[2], v[3]);
        }
    }
}

/* The order of a GEMM's tiles, a cluster's pair of them at a time: groups of GU_GROUP pairs along
 * T; within a group, T first. */
struct gate_up_tiles {
    int pairs, columns, steps; /* along T and F; stages along D */

    __device__ __forceinline__ int count() const { return pairs * columns; }
    __device__ __forceinline__ static int first() { return (int)blockIdx.x / GU_CLUSTER; }
    __device__ __forceinline__ static int stride() { return (int)gridDim.x / GU_CLUSTER; }
    __device__ __forceinline__ void place(int t, int rank, int *row, int *column) const {
        const int first = t / (GU_GROUP * columns) * GU_GROUP,
                  in_group = min(GU_GROUP, pairs - first);
        t -= first * columns;
        *row = ((first + t % in_group) * GU_CLUSTER + rank) * HOPPER_ROWS;
        *column = t / in_group * GU_COLUMNS;
    }
};

/* The loading warpgroup; one thread does it all. The other block may bring its half of W before
 * this one has announced the bytes: the phase waits for the announcement's arrival as well. */
template <class X>
__device__ __forceinline__ void gate_up_load(gate_up_ring ring, const gate_up_tiles &tiles,
                                             const CUtensorMap *x, const CUtensorMap *w, int F) {
    const int rank = cluster_rank();
    for (int t = tiles.first(); t < tiles.count(); t += tiles.stride()) {
        int row, column;
        tiles.place(t, rank, &row, &column);
        for (int k = 0; k < tiles.steps; k++, ring.i++) {
            const shared_addr to = ring.stage(ring.i), full = ring.full(ring.i);
            barrier_wait(ring.empty(ring.i), ring.parity(ring.i) ^ 1); /* gu_empty */
            barrier_expect(full, 3 * GU_PART);
            tma_load(to, x, full, k * gu_depth<X>, row);
            tma_multicast(to + (1 + rank) * GU_PART, w, full, k * gu_depth<X>, column + rank * F,
                          (1 << GU_CLUSTER) - 1);
        }
    }
}

/* A warp has read a stage: says so to the loaders of both blocks. */
__device__ __forceinline__ void gate_up_release(shared_addr empty) {
    if (threadIdx.x % 32 > 0) return;
#pragma unroll
    for (int rank = 0; rank < GU_CLUSTER; rank++) barrier_arrive_at(empty, rank);
}

/* One of the two multiplying warpgroups, the one of rows 64 half .. 64 half + 63. lag: the mbarrier
 * at which the second one waits for the first. */
template <class X, class A, class S>
__device__ __forceinline__ void gate_up_multiply(gate_up_ring ring, const gate_up_tiles &tiles,
                                                 shared_addr lag, A *h, const S &scale, int T,
                                                 int F, int half, unsigned long long *clamps) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, rank = cluster_rank();
    const int ahead = min(GU_LAG, tiles.steps) - 1;
    int clamped = 0;
    float d[32][4];
    if (half && tiles.first() < tiles.count()) barrier_wait(lag, 0); /* gu_lag */
    for (int t = tiles.first(); t < tiles.count(); t += tiles.stride()) {
        int row, column;
        tiles.place(t, rank, &row, &column);
        for (int k = 0; k < tiles.steps; k++, ring.i++) {
            barrier_wait(ring.full(ring.i), ring.parity(ring.i)); /* gu_full */
            const shared_addr at = ring.stage(ring.i);
            const uint64_t x = wgmma_tile(at + half * 64 * HOPPER_ROW),
                           w = wgmma_tile(at + GU_PART);
            wgmma_fence(); /* gu_fence */
#pragma unroll
            for (int s = 0; s < HOPPER_ROW / 32; s++) /* descriptors count in 16 bytes */
                wgmma256<X>(d, x + s * 2, w + s * 2, k + s > 0);
            wgmma_commit();
            if (!half && ring.i == ahead && lane == 0) barrier_arrive(lag);
            wgmma_wait<1>(); /* gu_step: the previous stage has been multiplied */
            if (k > 0) gate_up_release(ring.empty(ring.i - 1));
        }
        wgmma_wait<0>(d);                        /* gu_sums */
        gate_up_release(ring.empty(ring.i - 1)); /* gu_last */
        gate_up_store(h, d, scale, row + half * 64 + warp * 16 + lane / 4, column, T, F, &clamped);
    }
    if (clamped) atomicAdd(clamps, (unsigned long long)clamped);
}
#endif

/* X: the type of x and W. S: gate_up_alpha or gate_up_scales. */
template <class X, class A, class S>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    gate_up_kernel(A *h, const __grid_constant__ CUtensorMap x,
                   const __grid_constant__ CUtensorMap w, S scale, int T, int F, int D,
                   unsigned long long *clamps) {
#if defined(HOPPER_CODE)
    SHARED_BYTES(smem);
    const gate_up_ring ring = {shared_address(smem)};
    const shared_addr lag = shared_address(smem) + gate_up_shared_bytes - 8;
    constexpr int pair = GU_CLUSTER * (int)HOPPER_ROWS, depth = gu_depth<X>;
    const gate_up_tiles tiles = {(T + pair - 1) / pair, (F + GU_COLUMNS - 1) / GU_COLUMNS,
                                 (D + depth - 1) / depth};
    if (threadIdx.x == 0) {
        hopper_init(ring, 1, GU_CLUSTER * HOPPER_WARPS);
        barrier_init(lag, HOPPER_WARPS / 2);
        barrier_init_done();
    }
    cluster_sync(); /* gu_init: the mbarriers of both blocks are made before anyone uses one */
    if (threadIdx.x < 128) {
        registers_lower<HOPPER_LOADER_REGS>();
        if (threadIdx.x == 0) gate_up_load<X>(ring, tiles, &x, &w, F);
    } else {
        registers_raise<HOPPER_REGS>();
        gate_up_multiply<X>(ring, tiles, lag, h, scale, T, F, threadIdx.x / 128 - 1, clamps);
    }
    cluster_sync(); /* gu_exit: the other block arrives at this one's mbarriers until its end */
#else
    __trap(); /* the host launches it on sm_90a alone */
#endif
}

/* ---- attention ----------------------------------------------------------------------------------
 * What attention.cuh's kernel computes, on the same 128-row tiles and the same tiles of 64 keys, q
 * and the weights as wgmma's register operand. While the tensor cores multiply a tile's weights
 * with v, the next tile's scores are on their way and its softmax is computed.
 *
 * A whole tile of keys, 64 rows of qkv that follow each other, is loaded by TMA. The other tiles
 * are copied by cp.async: one crosses from the prefix's rows into the text's, or has keys past
 * the end, which must be zeros. A stage holds a tile's K, then V, each in blocks of 64 columns:
 * K's rows are n of q k^T, V's are k of p v.
 *
 * Either kind may refill a stage that held either kind. Before a loader writes, all multiplying
 * warps have waited for the wgmmas that read the stage and arrived at `empty`; a wgmma that has
 * ended needs no proxy fence. Copies by cp.async were followed by fence_async in their threads
 * before `full`, so TMA's later writes to the same bytes come after them. */
enum { AH_STAGES = 4 };
template <int HD> constexpr int ah_stage_bytes = 2 * att_tile_bytes<HD>;
template <int HD> using ah_ring = hopper_ring<AH_STAGES, ah_stage_bytes<HD>>;
template <int HD> constexpr int ah_rows_bytes = HOPPER_ROWS *HD * 2; /* of q, of the output */
/* The ring, q, the output before it is stored, the mbarriers of q. */
template <int HD>
constexpr int attention_hopper_shared_bytes = (hopper_ring_bytes<AH_STAGES, ah_stage_bytes<HD>> +
                                               1023) /
                                                  1024 * 1024 +
                                              2 * ah_rows_bytes<HD> + 16;

#if defined(HOPPER_CODE)

/* The kernel's work items: every query tile with every kv head; a tile's heads are adjacent. */
template <class A, int HD> struct ah_work {
    const A *qkv;
    const CUtensorMap *map; /* of qkv */
    const att_tile *tiles;
    int n_tiles, H, K, lg;
    unsigned char *rest; /* behind the ring */

    __device__ __forceinline__ int count() const { return n_tiles * K; }
    __device__ __forceinline__ int head(int n) const { return n % K; }
    __device__ __forceinline__ att_tile tile(int n) const { return tiles[n / K]; }
    __device__ __forceinline__ unsigned char *q() const { return rest; }
    __device__ __forceinline__ unsigned char *out() const { return rest + ah_rows_bytes<HD>; }
    __device__ __forceinline__ shared_addr q_full() const {
        return shared_address(rest) + 2 * ah_rows_bytes<HD>;
    }
    __device__ __forceinline__ shared_addr q_empty() const { return q_full() + 8; }
    __device__ __forceinline__ att_view<A> view(int n, const att_tile &w) const {
        att_view<A> s;
        s.k = qkv + (size_t)(H + head(n)) * HD;
        s.to_v = K * HD;
        s.ld = (H + 2 * K) * HD;
        s.prefix = w.prefix;
        s.own = w.row0 - w.prefix;
        s.first = w.prefix + w.t0;
        s.keys = w.prefix + min(w.len, w.t0 + (HOPPER_ROWS >> lg));
        s.lg = lg;
        s.warp = threadIdx.x / 32 - 4;
        s.lane = threadIdx.x % 32;
        return s;
    }
};
__device__ __forceinline__ int ah_key_tiles(int keys) { return (keys + ATT_KEYS - 1) / ATT_KEYS; }

template <class A> __device__ __forceinline__ int ah_row(const att_view<A> &s, int p) {
    return p < s.prefix ? p : s.own + p;
}
/* Whether key tile n consists of rows that follow each other. Rows ascend with the position. */
template <class A> __device__ __forceinline__ bool ah_whole(const att_view<A> &s, int n) {
    const int p = n * ATT_KEYS, last = p + ATT_KEYS - 1;
    return last < s.keys && ah_row(s, last) - ah_row(s, p) == ATT_KEYS - 1;
}
/* A whole tile. `full` counts 128 arrivals for either kind of tile. */
template <class A, int HD>
__device__ __forceinline__ void ah_load_whole(const ah_work<A, HD> &work, const att_view<A> &s,
                                              shared_addr stage, shared_addr full, int n) {
    if (threadIdx.x > 0) return barrier_arrive(full);
    const int row = ah_row(s, n * ATT_KEYS), column = (int)(s.k - work.qkv);
    barrier_expect(full, ah_stage_bytes<HD>);
#pragma unroll
    for (int c = 0; c < HD; c += 64) {
        const shared_addr to = stage + c * (ATT_KEYS * 2);
        tma_load(to, work.map, full, column + c, row);
        tma_load(to + att_tile_bytes<HD>, work.map, full, column + s.to_v + c, row);
    }
}
template <class A, int HD>
__device__ __forceinline__ void ah_load_kv(const att_view<A> &s, shared_addr stage, int n) {
    constexpr int CHUNKS = HD / 8, STEPS = ATT_KEYS * CHUNKS / 128;
#pragma unroll 4 /* more would spill in the loader's 40 registers */
    for (int i = 0; i < STEPS; i++) {
        const int id = (int)threadIdx.x + i * 128, r = id / CHUNKS, c = id % CHUNKS;
        const int p = n * ATT_KEYS + r;
        const bool ok = p < s.keys;
        const int row = ok ? ah_row(s, p) : 0;
        const A *k = s.k + (size_t)row * s.ld + c * 8;
        const shared_addr to = stage + c / 8 * (ATT_KEYS * HOPPER_ROW) + att_swizzle<64>(r, c % 8);
        cp_async16(to, k, ok);
        cp_async16(to + att_tile_bytes<HD>, k + s.to_v, ok);
    }
    cp_async_commit();
}

/* The loading warpgroup. It signals that a group of copies has landed after issuing the next tile.
 * A whole tile signals by itself; its empty group keeps one group per tile. */
template <class A, int HD>
__device__ __forceinline__ void ah_load(const ah_work<A, HD> &work, ah_ring<HD> ring) {
    shared_addr landing = 0; /* the mbarrier of the group before; 0: the group is empty */
    int turn = 0;
    for (int n = blockIdx.x; n < work.count(); n += gridDim.x, turn ^= 1) {
        const att_tile w = work.tile(n);
        if (w.t0 >= w.len) break; /* padding of the list in a graph */
        const att_view<A> s = work.view(n, w);
        for (int t = -1; t < ah_key_tiles(s.keys); t++) { /* -1: q */
            shared_addr full = 0;
            if (t < 0) {
                barrier_wait(work.q_empty(), turn ^ 1); /* ah_q_empty */
                att_load_q<A, HD, 2>(work.qkv + (size_t)(work.head(n) << work.lg) * HD, s.ld, w,
                                     work.lg, shared_address(work.q()));
                full = work.q_full();
            } else {
                barrier_wait(ring.empty(ring.i), ring.parity(ring.i) ^ 1); /* ah_empty */
                if (ah_whole(s, t)) {
                    ah_load_whole(work, s, ring.stage(ring.i), ring.full(ring.i), t);
                    cp_async_commit(); /* ah_group: cp_async_wait counts it */
                } else {
                    ah_load_kv<A, HD>(s, ring.stage(ring.i), t);
                    full = ring.full(ring.i);
                }
                ring.i++;
            }
            if (landing) {
                cp_async_wait<1>(); /* ah_landed */
                fence_async();      /* ah_fence: wgmma will read what these copies wrote */
                barrier_arrive(landing);
            }
            landing = full;
        }
    }
    cp_async_wait<0>(); /* ah_landed_last */
    fence_async();      /* ah_fence_last */
    if (landing) barrier_arrive(landing);
}

/* p (64, 64) = q k^T with the stage's K. */
template <class A, int HD>
__device__ __forceinline__ void ah_scores(float (&p)[8][4], const uint32_t (&q)[HD / 16][4],
                                          shared_addr K) {
#pragma unroll
    for (int k = 0; k < HD / 16; k++)
        wgmma_regs<A, false, ATT_KEYS>(
            p, q[k], wgmma_tile(K + k / 4 * (ATT_KEYS * HOPPER_ROW)) + k % 4 * 2, k > 0);
    wgmma_commit();
}
/* o (64, HD) += p v with the stage's V. */
template <class A, int HD>
__device__ __forceinline__ void ah_values(float (&o)[HD / 8][4], const uint32_t (&a)[4][4],
                                          shared_addr V, bool add) {
#pragma unroll
    for (int k = 0; k < ATT_KEYS / 16; k++)
        wgmma_regs<A, true, HD>(o, a[k], wgmma_tile(V, ATT_KEYS * HOPPER_ROW) + k * 128,
                                add || k > 0);
    wgmma_commit();
}
/* Rounds p to A, in the registers that wgmma reads as its first operand. */
template <class A>
__device__ __forceinline__ void ah_weights(uint32_t (&a)[4][4], const float (&p)[8][4]) {
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int e = 0; e < 4; e++)
            a[k][e] = to_bits<A>(p[2 * k + e / 2][e % 2 * 2], p[2 * k + e / 2][e % 2 * 2 + 1]);
}

/* One of the two multiplying warpgroups: att_softmax's recurrence over the tiles of keys. The
 * scores of tile t and the product with V of tile t - 1 run at the same time. */
template <class A, int HD>
__device__ __forceinline__ void ah_multiply(const ah_work<A, HD> &work, ah_ring<HD> ring, A *att,
                                            float scale_log2e) {
    int turn = 0;
    for (int n = blockIdx.x; n < work.count(); n += gridDim.x, turn ^= 1) {
        const att_tile w = work.tile(n);
        if (w.t0 >= w.len) break;
        const att_view<A> s = work.view(n, w);
        const int lane = s.lane, tiles = ah_key_tiles(s.keys);
        uint32_t q[HD / 16][4], a[4][4];
        float p[1][8][4], o[1][HD / 8][4], m[1][2] = {{-INFINITY, -INFINITY}}, l[1][2] = {},
                                           older[1][2];
        barrier_wait(work.q_full(), turn); /* ah_q_full */
#pragma unroll
        for (int k = 0; k < HD / 16; k++)
            ldmatrix4(q[k], shared_address(work.q()) +
                                att_swizzle<HD>(s.warp * 16 + lane % 16, k * 2 + lane / 16));
        /* All lanes have read q, and stored the tile before, when one says so. */
        __syncwarp(); /* ah_q_read */
        if (lane == 0) barrier_arrive(work.q_empty());

        barrier_wait(ring.full(ring.i), ring.parity(ring.i)); /* ah_full_first */
        wgmma_fence();
        ah_scores<A, HD>(p[0], q, ring.stage(ring.i));
        wgmma_wait<0>(p[0]); /* ah_first */
        att_softmax<A, 1>(s, p, m, l, older, 0, scale_log2e);
        ah_weights<A>(a, p[0]);
        for (int t = 1; t < tiles; t++) { /* scores of tile t, p v of tile t - 1 */
            ring.i++;
            barrier_wait(ring.full(ring.i), ring.parity(ring.i)); /* ah_full */
            wgmma_fence(); /* ah_touched: p, a and o have been written */
            ah_scores<A, HD>(p[0], q, ring.stage(ring.i));
            ah_values<A, HD>(o[0], a, ring.stage(ring.i - 1) + att_tile_bytes<HD>, t > 1);
            wgmma_wait<1>(p[0]); /* ah_scores_done */
            att_softmax<A, 1>(s, p, m, l, older, t, scale_log2e);
            wgmma_wait<0>(o[0]); /* ah_values_done */
            if (lane == 0) barrier_arrive(ring.empty(ring.i - 1));
            att_rescale<HD, 1>(o, older);
            ah_weights<A>(a, p[0]);
        }
        wgmma_fence();
        ah_values<A, HD>(o[0], a, ring.stage(ring.i) + att_tile_bytes<HD>, tiles > 1);
        wgmma_wait<0>(o[0]); /* ah_last */
        if (lane == 0) barrier_arrive(ring.empty(ring.i));
        ring.i++;
        att_store<A, HD, 1>(s, work.tile(n), work.out(),
                            att + (size_t)(work.head(n) << work.lg) * HD, (size_t)work.H * HD, o,
                            l);
    }
}
#endif

/* Grid: one block per multiprocessor. map: of qkv, boxes of 64 columns and 64 rows; the other
 * arguments as in attention_kernel. */
template <class A, int HD>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
    attention_hopper_kernel(A *att, const A *qkv, const __grid_constant__ CUtensorMap map,
                            const att_tile *tiles, int n_tiles, int H, int K, int lg,
                            float scale_log2e) {
#if defined(HOPPER_CODE)
    SHARED_BYTES(smem);
    const ah_ring<HD> ring = {shared_address(smem)};
    unsigned char *rest = smem + attention_hopper_shared_bytes<HD> - 2 * ah_rows_bytes<HD> - 16;
    const ah_work<A, HD> work = {qkv, &map, tiles, n_tiles, H, K, lg, rest};
    if (threadIdx.x == 0) {
        hopper_init(ring, 128);
        barrier_init(work.q_full(), 128);
        barrier_init(work.q_empty(), HOPPER_WARPS);
        barrier_init_done();
    }
    __syncthreads(); /* ah_init: the mbarriers are made before anyone uses one */
    if (threadIdx.x < 128) {
        registers_lower<HOPPER_LOADER_REGS>();
        ah_load<A, HD>(work, ring);
    } else {
        registers_raise<HOPPER_REGS>();
        ah_multiply<A, HD>(work, ring, att, scale_log2e);
    }
#else
    __trap(); /* the host launches it on sm_90a alone */
#endif
}

/* ---- the host's side ------------------------------------------------------------------------- */

struct hopper_state {
    bool on;    /* requested, and the GPU is an sm_90 */
    int blocks; /* multiprocessors */
    decltype(&cuTensorMapEncodeTiled)
        encode; /* looked up in the driver, since libcuda is not linked */
};

template <class A, int HD> static cudaError_t hopper_allow_attention() {
    return cudaFuncSetAttribute((const void *)attention_hopper_kernel<A, HD>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                attention_hopper_shared_bytes<HD>);
}
template <class X, class A, class S> static cudaError_t hopper_allow_gate_up() {
    return cudaFuncSetAttribute((const void *)gate_up_kernel<X, A, S>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize, gate_up_shared_bytes);
}
/* Prepares the kernels of activation type A. Does not change s->on. */
template <class A> static cudaError_t hopper_open(hopper_state *s, int multiprocessors) {
    cudaDriverEntryPointQueryResult found;
    void *f = nullptr;
    s->blocks = multiprocessors;
    cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000,
                                                     cudaEnableDefault, &found);
    if (e == cudaSuccess && !f) e = cudaErrorNotSupported;
    s->encode = (decltype(s->encode))f;
    if (e == cudaSuccess) e = hopper_allow_gate_up<A, A, gate_up_alpha>();
    if (e == cudaSuccess) e = hopper_allow_gate_up<uint8_t, __half, gate_up_scales>();
    if (e == cudaSuccess) e = hopper_allow_attention<A, 64>();
    if (e == cudaSuccess) e = hopper_allow_attention<A, 128>();
    return e;
}

/* Makes the tensor map of p (rows, columns) with boxes of 128 bytes and box_rows rows. uint8_t:
 * e4m3. */
template <class A>
static bool hopper_map(const hopper_state *s, CUtensorMap *map, const A *p, int rows, int columns,
                       int box_rows = HOPPER_ROWS) {
    const cuuint64_t size[2] = {(cuuint64_t)columns, (cuuint64_t)rows},
                     pitch[1] = {(cuuint64_t)columns * sizeof(A)};
    const cuuint32_t box[2] = {HOPPER_ROW / sizeof(A), (cuuint32_t)box_rows}, step[2] = {1, 1};
    const auto type = sizeof(A) == 1                   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                      : std::is_same<A, __half>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    return s->encode(map, type, 2, (void *)p, size, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class X, class A, class S>
static cudaError_t gate_up_launch_scaled(const hopper_state *s, A *h, const X *x, const X *w,
                                         S scale, int T, int F, int D, unsigned long long *clamps,
                                         cudaStream_t st) {
    CUtensorMap x_map, w_map;
    if (!hopper_map(s, &x_map, x, T, D) || !hopper_map(s, &w_map, w, 2 * F, D))
        return cudaErrorInvalidValue;
    const int clusters = s->blocks < GU_CLUSTER ? 1 : s->blocks / GU_CLUSTER;
    return launch_clusters(GU_CLUSTER, gate_up_kernel<X, A, S>,
                           dim3((unsigned)(clusters * GU_CLUSTER)), dim3(HOPPER_THREADS),
                           gate_up_shared_bytes, st, h, x_map, w_map, scale, T, F, D, clamps);
}
template <class A>
static cudaError_t gate_up_launch(const hopper_state *s, A *h, const A *x, const A *w, float alpha,
                                  int T, int F, int D, unsigned long long *clamps,
                                  cudaStream_t st) {
    return gate_up_launch_scaled(s, h, x, w, gate_up_alpha{alpha}, T, F, D, clamps, st);
}
/* x and w are e4m3 codes, D a multiple of 16. h is FP16: a row's codes for the down projection need
 * the maximum over all F columns, which many blocks compute, so quantize_kernel follows. */
inline cudaError_t gate_up_e4m3_launch(const hopper_state *s, __half *h, const uint8_t *x,
                                       const float *x_scale, const uint8_t *w, const float *w_scale,
                                       int T, int F, int D, unsigned long long *clamps,
                                       cudaStream_t st) {
    return gate_up_launch_scaled(s, h, x, w, gate_up_scales{x_scale, w_scale}, T, F, D, clamps, st);
}

/* rows: of the memory at qkv. In a graph they may not depend on the batch. */
template <class A, int HD>
static cudaError_t attention_hopper_launch(const hopper_state *s, A *att, const A *qkv, int rows,
                                           const att_tile *tiles, int n, int H, int K, int lg,
                                           float scale_log2e, cudaStream_t st) {
    CUtensorMap map;
    if (!hopper_map(s, &map, qkv, rows, (H + 2 * K) * HD, ATT_KEYS)) return cudaErrorInvalidValue;
    return launch(attention_hopper_kernel<A, HD>, dim3((unsigned)s->blocks), dim3(HOPPER_THREADS),
                  attention_hopper_shared_bytes<HD>, st, att, qkv, map, tiles, n, H, K, lg,
                  scale_log2e);
}

#endif
