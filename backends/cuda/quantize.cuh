/* quantize.cuh - 8-bit numbers: kernels that dequantize INT8 weights to FP16 and quantize rows to
 * e4m3.
 *
 *   INT8  W[r][c] = scale[r][c / 64] * q[r][c], q in -127 .. 127: as in the file
 *   FP8   row[c] = scale * code[c], scale = max |row| / 448, code in e4m3 (3 bits of fraction)
 *
 * FP8 has one scale per row of W and per token. Token 0 has activations hundreds of times larger
 * than the other tokens; with one scale for all, the others would round to zero. A row with NaN or
 * Inf becomes NaN.
 */
#ifndef QUANTIZE_CUH
#define QUANTIZE_CUH

#include "kernels.cuh"

/* ---- dequantize ---------------------------------------------------------------------------------
 * y (N, K) = scale (N, groups) * q (N, K), rounded to A: what the product reads. 8 numbers, all of
 * one group, per thread and step, grid-stride. 3 N K bytes. */
enum { DEQUANTIZE_THREADS = 256 };
static_assert(QEMB_GROUP % 8 == 0, "8 numbers have one scale");
template <class A>
__global__ void __launch_bounds__(DEQUANTIZE_THREADS)
    dequantize_kernel(A *y, const int8_t *q, const float *scale, int N, int K) {
    const unsigned K8 = (unsigned)K / 8, n = (unsigned)N * K8, groups = QEMB_GROUPS((unsigned)K);
    for (unsigned i = blockIdx.x * DEQUANTIZE_THREADS + threadIdx.x; i < n;
         i += gridDim.x * DEQUANTIZE_THREADS) {
        union {
            uint2 bytes;
            int8_t q[8];
        } u = {((const uint2 *)q)[i]};
        const unsigned row = i / K8, group = i % K8 / (QEMB_GROUP / 8);
        const float s = scale[row * groups + group];
        eight<A> o;
#pragma unroll
        for (int k = 0; k < 4; k++) o.v[k] = to_pair<A>(s * u.q[2 * k], s * u.q[2 * k + 1]);
        *(eight<A> *)(y + (size_t)i * 8) = o;
    }
}

/* ---- scale --------------------------------------------------------------------------------------
 * y (T, N) = alpha x_scale[t] w_scale[n] sums[t][n], or += where ADD: what the sums of e4m3
 * products become where cuBLASLt applies no scales. 8 numbers per thread and step, grid-stride. 4 +
 * sizeof(Y) bytes per number, and 4 more where ADD. */
enum { SCALE_THREADS = 256 };
template <class Y, bool ADD>
__global__ void __launch_bounds__(SCALE_THREADS)
    scale_kernel(Y *y, const float *sums, const float *x_scale, const float *w_scale, float alpha,
                 int T, int N) {
    const unsigned N8 = (unsigned)N / 8, n = (unsigned)T * N8;
    for (unsigned i = blockIdx.x * SCALE_THREADS + threadIdx.x; i < n;
         i += gridDim.x * SCALE_THREADS) {
        const float4 *from = (const float4 *)sums + (size_t)i * 2;
        const float4 *w = (const float4 *)w_scale + i % N8 * 2;
        const float s = alpha * x_scale[i / N8];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float4 v = from[k], b = w[k];
            Y *to = y + (size_t)i * 8 + k * 4;
            float4 r = make_float4(s * b.x * v.x, s * b.y * v.y, s * b.z * v.z, s * b.w * v.w);
            if constexpr (ADD) {
                const float4 old = *(const float4 *)to;
                r = make_float4(old.x + r.x, old.y + r.y, old.z + r.z, old.w + r.w);
            }
            store4(to, r.x, r.y, r.z, r.w);
        }
    }
}

/* ---- rows to e4m3 -------------------------------------------------------------------------------
 * A block per row, grid-stride. A thread keeps V groups of 8 numbers in registers between the
 * maximum and the rounding: numbers (j * ROW_THREADS + thread) * 8 .. + 7, V * 8 * ROW_THREADS >=
 * K. */
constexpr float E4M3_MAX = 448;

struct largest {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class A> __device__ __forceinline__ void load_eight(float (&v)[8], const A *from) {
    const eight<A> e = *(const eight<A> *)from;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const float2 f = to_float2(e.v[k]);
        v[2 * k] = f.x, v[2 * k + 1] = f.y;
    }
}
__device__ __forceinline__ void load_eight(float (&v)[8], const float *from) {
    const float4 a = ((const float4 *)from)[0], b = ((const float4 *)from)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
__device__ __forceinline__ void load_eight(float (&v)[8], const int8_t *from) {
    union {
        uint2 bytes;
        int8_t q[8];
    } u = {*(const uint2 *)from};
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = u.q[e];
}

/* Writes codes (K) and *scale of the row v. fmaxf ignores NaN, whose code is NaN; Inf * 0 is
 * NaN. */
template <int V>
__device__ __forceinline__ void store_row(uint8_t *codes, float *scale, const float (&v)[V][8],
                                          int K, float *part) {
    float top = 0;
#pragma unroll
    for (int j = 0; j < V; j++)
#pragma unroll
        for (int e = 0; e < 8; e++) top = fmaxf(top, fabsf(v[j][e]));
    top = fmaxf(block_reduce(top, part, largest()), 0x1p-100f); /* a row of zeros becomes zeros */
    const float to_code = E4M3_MAX / top;
    if (threadIdx.x == 0) *scale = top / E4M3_MAX;
#pragma unroll
    for (int j = 0; j < V; j++) {
        const int i = (j * ROW_THREADS + threadIdx.x) * 8;
        if (i >= K) continue;
        uint32_t two[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float *w = v[j] + 4 * h;
            two[h] = e4m3_pair(w[0] * to_code, w[1] * to_code) |
                     e4m3_pair(w[2] * to_code, w[3] * to_code) << 16;
        }
        *(uint2 *)(codes + i) = make_uint2(two[0], two[1]);
    }
}

/* Quantizes x (T, K) to codes (T, K) and scales (T). x is FP16, or INT8 with x_scales (T, groups);
 * else x_scales is NULL. sizeof x + 1 bytes per number. */
template <class X, int V>
__global__ void __launch_bounds__(ROW_THREADS)
    quantize_kernel(uint8_t *codes, float *scales, const X *x, const float *x_scales, int T,
                    int K) {
    SHARED_BYTES(smem); /* float (ROW_WARPS) */
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        float v[V][8];
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * ROW_THREADS + threadIdx.x) * 8;
#pragma unroll
            for (int e = 0; e < 8; e++) v[j][e] = 0;
            if (i >= K) continue;
            load_eight(v[j], x + (size_t)t * K + i);
            if constexpr (sizeof(X) == 1) {
                const float s = x_scales[(size_t)t * QEMB_GROUPS(K) + i / QEMB_GROUP];
#pragma unroll
                for (int e = 0; e < 8; e++) v[j][e] *= s;
            }
        }
        store_row(codes + (size_t)t * K, scales + t, v, K, (float *)smem);
    }
}

/* rmsnorm (kernels.cuh), quantized to e4m3. 5 D bytes, 6 D flops. */
template <int V>
__global__ void __launch_bounds__(ROW_THREADS)
    rmsnorm_e4m3_kernel(uint8_t *codes, float *scales, const float *x, const float *w, int T, int D,
                        float eps) {
    SHARED_BYTES(smem); /* float (ROW_WARPS) */
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        float v[V][8], sum = 0;
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * ROW_THREADS + threadIdx.x) * 8;
#pragma unroll
            for (int e = 0; e < 8; e++) v[j][e] = 0;
            if (i < D) load_eight(v[j], x + (size_t)t * D + i);
#pragma unroll
            for (int e = 0; e < 8; e++) sum += v[j][e] * v[j][e];
        }
        const float s = rsqrtf(block_reduce(sum, (float *)smem, total()) / D + eps);
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * ROW_THREADS + threadIdx.x) * 8;
            if (i >= D) continue;
            float g[8];
            load_eight(g, w + i);
#pragma unroll
            for (int e = 0; e < 8; e++) v[j][e] *= s * g[e];
        }
        store_row(codes + (size_t)t * D, scales + t, v, D, (float *)smem);
    }
}

/* layernorm (kernels.cuh), y quantized to e4m3. 9 D bytes, 10 D flops. */
template <int V>
__global__ void __launch_bounds__(ROW_THREADS)
    layernorm_e4m3_kernel(uint8_t *codes, float *scales, float *x, const float *bias,
                          const float *w, const float *b, int T, int D, float eps) {
    SHARED_BYTES(smem); /* float (ROW_WARPS) */
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        float *row = x + (size_t)t * D, v[V][8], sum = 0, squares = 0;
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * ROW_THREADS + threadIdx.x) * 8;
            float c[8] = {};
#pragma unroll
            for (int e = 0; e < 8; e++) v[j][e] = 0;
            if (i >= D) continue;
            load_eight(v[j], row + i);
            if (bias) load_eight(c, bias + i);
#pragma unroll
            for (int e = 0; e < 8; e++) sum += v[j][e] += c[e];
        }
        const float mean = block_reduce(sum, (float *)smem, total()) / D;
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * ROW_THREADS + threadIdx.x) * 8;
            if (i >= D) continue; /* ln_tail: what is missing is no number */
#pragma unroll
            for (int e = 0; e < 8; e++) {
                v[j][e] -= mean;
                squares += v[j][e] * v[j][e];
            }
        }
        const float s = rsqrtf(block_reduce(squares, (float *)smem, total()) / D + eps);
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * ROW_THREADS + threadIdx.x) * 8;
            if (i >= D) continue;
            float g[8], c[8];
            load_eight(g, w + i);
            load_eight(c, b + i);
#pragma unroll
            for (int e = 0; e < 8; e++) v[j][e] = v[j][e] * s * g[e] + c[e];
#pragma unroll
            for (int k = 0; k < 8; k += 4)
                store4(row + i + k, v[j][k], v[j][k + 1], v[j][k + 2], v[j][k + 3]);
        }
        store_row(codes + (size_t)t * D, scales + t, v, D, (float *)smem);
    }
}

/* gelu(y + bias) (kernels.cuh's bias) of y (T, F), quantized to e4m3. 3 F bytes. */
template <class A, int V>
__global__ void __launch_bounds__(ROW_THREADS)
    gelu_e4m3_kernel(uint8_t *codes, float *scales, const A *y, const float *bias, int T, int F) {
    SHARED_BYTES(smem); /* float (ROW_WARPS) */
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        float v[V][8];
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * ROW_THREADS + threadIdx.x) * 8;
#pragma unroll
            for (int e = 0; e < 8; e++) v[j][e] = 0;
            if (i >= F) continue;
            float c[8];
            load_eight(v[j], y + (size_t)t * F + i);
            load_eight(c, bias + i);
#pragma unroll
            for (int e = 0; e < 8; e++) v[j][e] = gelu(v[j][e] + c[e]);
        }
        store_row(codes + (size_t)t * F, scales + t, v, F, (float *)smem);
    }
}

/* swiglu (kernels.cuh), quantized to e4m3. Nothing is clamped: the scale covers the range. gu (T,
 * 2F): gate, then up. 5 F bytes, 9 F flops. */
template <class A, int V>
__global__ void __launch_bounds__(ROW_THREADS)
    swiglu_e4m3_kernel(uint8_t *codes, float *scales, const A *gu, int T, int F) {
    SHARED_BYTES(smem); /* float (ROW_WARPS) */
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        float v[V][8];
#pragma unroll
        for (int j = 0; j < V; j++) {
            const int i = (j * ROW_THREADS + threadIdx.x) * 8;
#pragma unroll
            for (int e = 0; e < 8; e++) v[j][e] = 0;
            if (i >= F) continue;
            float up[8];
            load_eight(v[j], gu + (size_t)t * 2 * F + i);
            load_eight(up, gu + (size_t)t * 2 * F + F + i);
#pragma unroll
            for (int e = 0; e < 8; e++)
                v[j][e] = silu(v[j][e]) * up[e] * (1.0f / (1 << SWIGLU_SHIFT));
        }
        store_row(codes + (size_t)t * F, scales + t, v, F, (float *)smem);
    }
}

#endif
