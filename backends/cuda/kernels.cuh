/* kernels.cuh - the memory-bound kernels: embed, rmsnorm, qknorm_rope, swiglu, gather_last,
 * gather_mean.
 * Templates on the activation type A (__half, __nv_bfloat16; float where a kernel says so).
 *
 * Bytes and flops are per token and count every number once. Each row's sums run in an order that
 * depends on the row's length alone.
 */
#ifndef KERNELS_CUH
#define KERNELS_CUH

#include "attention.cuh" /* att_tile */
#include "ptx.cuh"

__device__ __forceinline__ float group_sum(float v, int lanes) {
    for (int o = lanes / 2; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

/* ---- embed --------------------------------------------------------------------------------------
 * x (T, D) fp32 = rows tokens[t] of table (V, D), which is device memory, or pinned memory that the
 * device reads over the bus. A warp per token, 8 numbers per lane and step. 6 D bytes. */
enum { EMBED_WARPS = 4 };
template <class A>
__global__ void __launch_bounds__(EMBED_WARPS * 32)
    embed_kernel(float *x, const A *table, const int *tokens, int T, int D) {
    const int t = blockIdx.x * EMBED_WARPS + threadIdx.x / 32;
    if (t >= T) return;
    const A *row = table + (size_t)tokens[t] * D;
    for (int i = threadIdx.x % 32 * 8; i < D; i += 256) {
        const eight<A> e = *(const eight<A> *)(row + i);
        const float2 a = to_float2(e.v[0]), b = to_float2(e.v[1]);
        const float2 c = to_float2(e.v[2]), d = to_float2(e.v[3]);
        float4 *to = (float4 *)(x + (size_t)t * D + i);
        to[0] = make_float4(a.x, a.y, b.x, b.y);
        to[1] = make_float4(c.x, c.y, d.x, d.y);
    }
}

/* ---- rmsnorm ------------------------------------------------------------------------------------
 * y (T, D) = x / sqrt(mean(x^2) + eps) * w,  x (T, D) fp32, w (D) fp32; y is A, or float for pool.
 * A block per row, grid-stride; a thread keeps its V x 4 numbers in registers between the two
 * passes. V * 4 * NORM_THREADS >= D. 4 D + sizeof(A) D bytes, 4 D flops. */
enum { NORM_THREADS = 256, NORM_WARPS = NORM_THREADS / 32 };
__device__ __forceinline__ void store4(float *y, float a, float b, float c, float d) {
    *(float4 *)y = make_float4(a, b, c, d);
}
template <class A>
__device__ __forceinline__ void store4(A *y, float a, float b, float c, float d) {
    *(four<A> *)y = four<A>{{to_pair<A>(a, b), to_pair<A>(c, d)}};
}
template <class A, int V>
__global__ void __launch_bounds__(NORM_THREADS)
    rmsnorm_kernel(A *y, const float *x, const float *w, int T, int D, float eps) {
    SHARED_BYTES(smem); /* float (NORM_WARPS) */
    float *part = (float *)smem;
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        const float *row = x + (size_t)t * D;
        float4 v[V];
        float sum = 0;
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * NORM_THREADS + threadIdx.x) * 4;
            v[j] = i < D ? *(const float4 *)(row + i) : make_float4(0, 0, 0, 0);
            sum += v[j].x * v[j].x + v[j].y * v[j].y + v[j].z * v[j].z + v[j].w * v[j].w;
        }
        sum = group_sum(sum, 32);
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
        __syncthreads(); /* norm_sum: every warp's sum is in part before anyone reads it */
        sum = 0;
        for (int i = 0; i < NORM_WARPS; i++) sum += part[i];
        __syncthreads(); /* norm_next: part has been read before the next row's sums overwrite it */
        const float s = rsqrtf(sum / D + eps);
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * NORM_THREADS + threadIdx.x) * 4;
            if (i >= D) continue;
            const float4 g = *(const float4 *)(w + i);
            store4(y + (size_t)t * D + i, v[j].x * s * g.x, v[j].y * s * g.y, v[j].z * s * g.z,
                   v[j].w * s * g.w);
        }
    }
}

/* ---- qknorm_rope --------------------------------------------------------------------------------
 * qkv (T, (H+2K)*HD) in place: head h < H+K becomes rope(rmsnorm(head) * w), w (HD) the q or k
 * norm. RoPE on halves: (a, b) -> (a cos - b sin, b cos + a sin), a in the first half, b in the
 * second. cs (positions, HD/2) holds cos and sin. HD/4 lanes per (token, head); a lane holds dims
 * 2l, 2l+1 of either half. 4 (H+K) HD bytes and (H+K) HD 4 of table, 10 (H+K) HD flops. */
enum { ROPE_THREADS = 128 };
template <class A, int HD>
__global__ void __launch_bounds__(ROPE_THREADS)
    qknorm_rope_kernel(A *qkv, const float *q_norm, const float *k_norm, const int *pos,
                       const float2 *cs, int T, int H, int K, float eps) {
    constexpr int LANES = HD / 4, GROUPS = ROPE_THREADS / LANES;
    const int id = blockIdx.x * GROUPS + threadIdx.x / LANES, l = threadIdx.x % LANES, n = H + K;
    const bool ok = id < T * n; /* all lanes take part in the shuffles */
    const int t = ok ? id / n : 0, h = ok ? id % n : 0;
    A *head = qkv + ((size_t)t * (H + 2 * K) + h) * HD;
    pair_of<A> *pa = (pair_of<A> *)head + l, *pb = pa + HD / 4;
    const float *w = h < H ? q_norm : k_norm;
    float2 a = ok ? to_float2(*pa) : make_float2(0, 0), b = ok ? to_float2(*pb) : make_float2(0, 0);
    const float sum = group_sum(a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y, LANES);
    if (!ok) return;
    const float s = rsqrtf(sum / HD + eps);
    const float2 wa = *(const float2 *)(w + 2 * l), wb = *(const float2 *)(w + HD / 2 + 2 * l);
    a.x *= s * wa.x, a.y *= s * wa.y;
    b.x *= s * wb.x, b.y *= s * wb.y;
    const float4 r = *(const float4 *)(cs + (size_t)pos[t] * (HD / 2) + 2 * l);
    *pa = to_pair<A>(a.x * r.x - b.x * r.y, a.y * r.z - b.y * r.w);
    *pb = to_pair<A>(b.x * r.x + a.x * r.y, b.y * r.z + a.y * r.w);
}

/* ---- swiglu -------------------------------------------------------------------------------------
 * h (T, F) = silu(gate) * up * 2^-SWIGLU_SHIFT, clamped to the largest half,  gu (T, 2F): gate,
 * then up. A few products of an early layer pass 65504; a power of two costs no precision and the
 * down projection's alpha takes it back. What is clamped even so is counted. NaN stays NaN. 8
 * numbers per thread and step, grid-stride. 6 F bytes, 8 F flops. */
enum { SWIGLU_THREADS = 256, SWIGLU_SHIFT = 6 };
__device__ __forceinline__ float silu(float g) { return __fdividef(g, 1 + __expf(-g)); }
__device__ __forceinline__ float swiglu_one(float g, float u, int *clamped) {
    constexpr float limit = 65504;
    const float v = silu(g) * u * (1.0f / (1 << SWIGLU_SHIFT));
    const bool over = v > limit || v < -limit;
    *clamped += over;
    return over ? (v > 0 ? limit : -limit) : v;
}
template <class A>
__global__ void __launch_bounds__(SWIGLU_THREADS)
    swiglu_kernel(A *h, const A *gu, int T, int F, unsigned long long *clamps) {
    const unsigned F8 = (unsigned)F / 8, n = (unsigned)T * F8; /* 32 bits: a division per step */
    int clamped = 0;
    for (unsigned i = blockIdx.x * SWIGLU_THREADS + threadIdx.x; i < n;
         i += gridDim.x * SWIGLU_THREADS) {
        const size_t t = i / F8, c = i % F8 * 8;
        const eight<A> g = *(const eight<A> *)(gu + t * 2 * F + c);
        const eight<A> u = *(const eight<A> *)(gu + t * 2 * F + F + c);
        eight<A> o;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float2 a = to_float2(g.v[k]), b = to_float2(u.v[k]);
            o.v[k] = to_pair<A>(swiglu_one(a.x, b.x, &clamped), swiglu_one(a.y, b.y, &clamped));
        }
        *(eight<A> *)(h + (size_t)i * 8) = o;
    }
    if (clamped) atomicAdd(clamps, (unsigned long long)clamped);
}

/* ---- gather_last --------------------------------------------------------------------------------
 * y (B, D) = rows last[b] of x (T, D), fp32; rows of n = D/4 float4. A block per text. 8 D bytes
 * per text. */
enum { GATHER_THREADS = 128 };
template <class X>
__global__ void __launch_bounds__(GATHER_THREADS)
    gather_last_kernel(X *y, const X *x, const int *last, int n) {
    const X *from = x + (size_t)last[blockIdx.x] * n;
    for (int i = threadIdx.x; i < n; i += GATHER_THREADS) y[(size_t)blockIdx.x * n + i] = from[i];
}

/* ---- gather_mean --------------------------------------------------------------------------------
 * y (B, D) = mean of each text's rows of x (T, D), fp32: those of the prefix, then the text's own,
 * as its tile texts[b] has them; rows of n = D/4 float4. Grid (B, n / MEAN_COLUMNS). A lane sums
 * every fourth position of one column, in double; then the four lanes of a column add up. So the
 * order depends on positions alone, and the sums add nothing to the mean's error. 4 D bytes and D
 * flops per token of every text, the prefix once for each. */
enum { MEAN_WARPS = 4, MEAN_THREADS = 32 * MEAN_WARPS, MEAN_COLUMNS = 8 * MEAN_WARPS };
template <class X>
__global__ void __launch_bounds__(MEAN_THREADS)
    gather_mean_kernel(X *y, const X *x, const att_tile *texts, int n) {
    const att_tile t = texts[blockIdx.x];
    const int lane = threadIdx.x % 32, rows = t.prefix + t.len;
    const int c = blockIdx.y * MEAN_COLUMNS + threadIdx.x / 32 * 8 + lane % 8;
    const bool ok = c < n; /* all lanes take part in the shuffles */
    double sum[4] = {};
#pragma unroll 4
    for (int p = ok ? lane / 8 : rows; p < rows; p += 4) {
        const X v = x[(size_t)(p < t.prefix ? p : t.row0 + p - t.prefix) * n + c];
        sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], 8);
        sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], 16);
        sum[k] /= rows;
    }
    if (ok && lane < 8)
        y[(size_t)blockIdx.x * n + c] =
            X{(float)sum[0], (float)sum[1], (float)sum[2], (float)sum[3]};
}

#endif
