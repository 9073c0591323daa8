/* kernels.cuh - the memory-bound kernels: embed, rmsnorm, layernorm, qknorm_rope, swiglu, bias,
 * gather_rows, gather_mean.
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

/* Reduces v over a block of 256 threads with op, in a fixed order. part (8) is shared memory. */
enum { ROW_THREADS = 256, ROW_WARPS = ROW_THREADS / 32 };
template <class F> __device__ __forceinline__ float block_reduce(float v, float *part, F op) {
    for (int o = 16; o; o >>= 1) v = op(v, __shfl_xor_sync(0xffffffffu, v, o));
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
    __syncthreads(); /* row_in: every warp's part is there before anyone reads it */
    v = part[0];
    for (int i = 1; i < ROW_WARPS; i++) v = op(v, part[i]);
    __syncthreads(); /* row_out: it has been read before the next reduction overwrites it */
    return v;
}
struct total {
    __device__ float operator()(float a, float b) const { return a + b; }
};

/* ---- embed --------------------------------------------------------------------------------------
 * x (T, D) fp32 = rows tokens[t] of table (V, D), which is device memory, or pinned memory that the
 * device reads over the bus; plus rows pos[t] of pos_emb (positions, D) fp32, unless that is NULL.
 * A warp per token, 8 numbers per lane and step. 6 D bytes, 4 D more with positions. */
enum { EMBED_WARPS = 4 };
template <class A>
__global__ void __launch_bounds__(EMBED_WARPS * 32)
    embed_kernel(float *x, const A *table, const int *tokens, const float *pos_emb, const int *pos,
                 int T, int D) {
    const int t = blockIdx.x * EMBED_WARPS + threadIdx.x / 32;
    if (t >= T) return;
    const A *row = table + (size_t)tokens[t] * D;
    for (int i = threadIdx.x % 32 * 8; i < D; i += 256) {
        const eight<A> e = *(const eight<A> *)(row + i);
        const float2 a = to_float2(e.v[0]), b = to_float2(e.v[1]);
        const float2 c = to_float2(e.v[2]), d = to_float2(e.v[3]);
        float4 *to = (float4 *)(x + (size_t)t * D + i);
        float4 p[2] = {};
        if (pos_emb) {
            const float4 *from = (const float4 *)(pos_emb + (size_t)pos[t] * D + i);
            p[0] = from[0], p[1] = from[1];
        }
        to[0] = make_float4(a.x + p[0].x, a.y + p[0].y, b.x + p[0].z, b.y + p[0].w);
        to[1] = make_float4(c.x + p[1].x, c.y + p[1].y, d.x + p[1].z, d.y + p[1].w);
    }
}

/* ---- rmsnorm ------------------------------------------------------------------------------------
 * y (T, D) = x / sqrt(mean(x^2) + eps) * w,  x (T, D) fp32, w (D) fp32; y is A, or float for pool.
 * A block per row, grid-stride; a thread keeps its V x 4 numbers in registers between the two
 * passes. V * 4 * ROW_THREADS >= D. 4 D + sizeof(A) D bytes, 4 D flops. */
__device__ __forceinline__ void store4(float *y, float a, float b, float c, float d) {
    *(float4 *)y = make_float4(a, b, c, d);
}
template <class A>
__device__ __forceinline__ void store4(A *y, float a, float b, float c, float d) {
    *(four<A> *)y = four<A>{{to_pair<A>(a, b), to_pair<A>(c, d)}};
}
template <class A, int V>
__global__ void __launch_bounds__(ROW_THREADS)
    rmsnorm_kernel(A *y, const float *x, const float *w, int T, int D, float eps) {
    SHARED_BYTES(smem); /* float (ROW_WARPS) */
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        const float *row = x + (size_t)t * D;
        float4 v[V];
        float sum = 0;
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * ROW_THREADS + threadIdx.x) * 4;
            v[j] = i < D ? *(const float4 *)(row + i) : make_float4(0, 0, 0, 0);
            sum += v[j].x * v[j].x + v[j].y * v[j].y + v[j].z * v[j].z + v[j].w * v[j].w;
        }
        const float s = rsqrtf(block_reduce(sum, (float *)smem, total()) / D + eps);
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * ROW_THREADS + threadIdx.x) * 4;
            if (i >= D) continue;
            const float4 g = *(const float4 *)(w + i);
            store4(y + (size_t)t * D + i, v[j].x * s * g.x, v[j].y * s * g.y, v[j].z * s * g.z,
                   v[j].w * s * g.w);
        }
    }
}

/* ---- layernorm ----------------------------------------------------------------------------------
 * x (T, D) fp32 in place = (z - mean(z)) / sqrt(mean((z - mean(z))^2) + eps) * w + b,  z = x +
 * bias; y (T, D) = x as A;  bias, w, b (D) fp32, bias NULL: none. A block per row, grid-stride; a
 * thread keeps its V x 4 numbers in registers between the three passes, and only it reads and
 * writes them.
 * V * 4 * ROW_THREADS >= D. 8 D + sizeof(A) D bytes, 8 D flops. */
template <class A, int V>
__global__ void __launch_bounds__(ROW_THREADS)
    layernorm_kernel(A *y, float *x, const float *bias, const float *w, const float *b, int T,
                     int D, float eps) {
    SHARED_BYTES(smem); /* float (ROW_WARPS) */
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        float *row = x + (size_t)t * D;
        float4 v[V];
        float sum = 0, squares = 0;
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * ROW_THREADS + threadIdx.x) * 4;
            v[j] = make_float4(0, 0, 0, 0);
            if (i >= D) continue;
            v[j] = *(const float4 *)(row + i);
            if (bias) {
                const float4 c = *(const float4 *)(bias + i);
                v[j] = make_float4(v[j].x + c.x, v[j].y + c.y, v[j].z + c.z, v[j].w + c.w);
            }
            sum += v[j].x + v[j].y + v[j].z + v[j].w;
        }
        const float mean = block_reduce(sum, (float *)smem, total()) / D;
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * ROW_THREADS + threadIdx.x) * 4;
            if (i >= D) continue; /* ln_tail: what is missing is no number */
            v[j] = make_float4(v[j].x - mean, v[j].y - mean, v[j].z - mean, v[j].w - mean);
            squares += v[j].x * v[j].x + v[j].y * v[j].y + v[j].z * v[j].z + v[j].w * v[j].w;
        }
        const float s = rsqrtf(block_reduce(squares, (float *)smem, total()) / D + eps);
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * ROW_THREADS + threadIdx.x) * 4;
            if (i >= D) continue;
            const float4 g = *(const float4 *)(w + i), c = *(const float4 *)(b + i);
            const float4 r = make_float4(v[j].x * s * g.x + c.x, v[j].y * s * g.y + c.y,
                                         v[j].z * s * g.z + c.z, v[j].w * s * g.w + c.w);
            *(float4 *)(row + i) = r;
            store4(y + (size_t)t * D + i, r.x, r.y, r.z, r.w);
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

/* ---- bias ---------------------------------------------------------------------------------------
 * y (T, N) in place += bias (N) fp32; GELU: y = gelu(y + bias), gelu(t) = t/2 (1 + erf(t / sqrt
 * 2)). A kernel of its own: cuBLASLt wants a bias of the result's type, which would round it to
 * FP16, and nothing says that it has one where it applies e4m3's scales. Nothing is clamped: a
 * product or sum beyond the range of FP16 is Inf, Inf becomes Inf or NaN in all that follows, and a
 * vector that is not finite is computed again. 8 numbers per thread and step, grid-stride. 4 N
 * bytes. */
enum { BIAS_THREADS = 256 };
__device__ __forceinline__ float gelu(float t) {
    return 0.5f * t * (1 + erff(t * 0.70710678f)); /* 1 / sqrt 2 */
}
template <class A, bool GELU>
__global__ void __launch_bounds__(BIAS_THREADS) bias_kernel(A *y, const float *bias, int T, int N) {
    const unsigned N8 = (unsigned)N / 8, n = (unsigned)T * N8; /* 32 bits: a division per step */
    for (unsigned i = blockIdx.x * BIAS_THREADS + threadIdx.x; i < n;
         i += gridDim.x * BIAS_THREADS) {
        eight<A> e = *(const eight<A> *)(y + (size_t)i * 8);
        const float2 *b = (const float2 *)bias + i % N8 * 4;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float2 a = to_float2(e.v[k]), c = b[k];
            const float u = a.x + c.x, v = a.y + c.y;
            e.v[k] = GELU ? to_pair<A>(gelu(u), gelu(v)) : to_pair<A>(u, v);
        }
        *(eight<A> *)(y + (size_t)i * 8) = e;
    }
}

/* ---- gather_rows --------------------------------------------------------------------------------
 * y (B, D) = rows rows[b] of x (T, D), fp32; rows of n = D/4 float4. A block per text. 8 D bytes
 * per text. */
enum { GATHER_THREADS = 128 };
template <class X>
__global__ void __launch_bounds__(GATHER_THREADS)
    gather_rows_kernel(X *y, const X *x, const int *rows, int n) {
    const X *from = x + (size_t)rows[blockIdx.x] * n;
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
