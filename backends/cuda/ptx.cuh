/* ptx.cuh - wrappers of PTX instructions. nvcc compiles them to PTX; a plain C++ build with
 * -DQEMB_EMU calls the emulation in tests/cuda/emu instead. Only this file and ptx_hopper.cuh have
 * two versions of anything; all other CUDA code is one source for both builds. The tests "ptx_" in
 * tests/cuda/test_cuda_ops.cu compare every instruction with what the PTX manual says it does.
 */
#ifndef PTX_CUH
#define PTX_CUH

#if defined(QEMB_EMU)

#include "tests/cuda/emu/emu.h"

typedef char *shared_addr;
inline shared_addr shared_address(void *p) { return (char *)p; }
#define SHARED_BYTES(name) unsigned char *name = (unsigned char *)emu::dynamic_shared()

inline void cp_async16(shared_addr d, const void *s, bool ok) { emu::cp_async16(d, s, ok); }
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int N> inline void cp_async_wait() { emu::cp_async_wait(N); }
inline void ldmatrix4(uint32_t (&r)[4], shared_addr p) { emu::ldmatrix_x4(r, p, false); }
inline void ldmatrix4_trans(uint32_t (&r)[4], shared_addr p) { emu::ldmatrix_x4(r, p, true); }
template <class A>
inline void mma16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t b[2] = {b0, b1};
    emu::mma_16816(d, a, b, std::is_same<A, __nv_bfloat16>::value);
}
inline float exp2_approx(float x) { return exp2f(x); }

#else

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <type_traits>
#include <utility>

typedef uint32_t shared_addr; /* an address in the shared window */
__device__ __forceinline__ shared_addr shared_address(void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}
/* The block's dynamic shared memory: the only kind used, so that launch() alone decides its
 * size. */
#define SHARED_BYTES(name) extern __shared__ __align__(1024) unsigned char name[]

/* Starts a copy of 16 bytes from device to shared memory, both aligned to 16; !ok: of zeros. */
__device__ __forceinline__ void cp_async16(shared_addr d, const void *s, bool ok) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(d), "l"(s),
                 "r"(ok ? 16 : 0)
                 : "memory");
}
/* Closes this thread's group of copies. */
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}
/* Waits for this thread's groups, all but the newest N. Others' copies need a barrier as well. */
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}
/* Four 8x8 matrices of 16-bit numbers; lane l gives the address of row l%8 of matrix l/8. */
__device__ __forceinline__ void ldmatrix4(uint32_t (&r)[4], shared_addr p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(p)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix4_trans(uint32_t (&r)[4], shared_addr p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(p)
                 : "memory");
}
/* d (16,8) += a (16,16) b (16,8) in FP32, spread over the warp as the PTX manual draws it. */
template <class A>
__device__ __forceinline__ void mma16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
    if constexpr (std::is_same<A, __nv_bfloat16>::value)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},"
                     "{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},"
                     "{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/* 2^x to 2 units in the last place; 2^-inf = 0 */
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

/* Every launch goes through here: plain C++ in both builds, and one place for launch attributes.
 * Blocks run in clusters of `cluster` neighbours in x. */
template <class... P, class... A>
cudaError_t launch_clusters(int cluster, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                            cudaStream_t st, A &&...args) {
    cudaLaunchAttribute size = {};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = (unsigned)cluster;
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
    cudaLaunchConfig_t c = {};
    c.gridDim = grid;
    c.blockDim = block;
    c.dynamicSmemBytes = shared;
    c.stream = st;
    c.attrs = &size;
    c.numAttrs = cluster > 1; /* before sm_90 the attribute is an error */
    return cudaLaunchKernelEx(&c, kernel, std::forward<A>(args)...);
}

#endif

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t st,
                   A &&...args) {
    return launch_clusters(1, kernel, grid, block, shared, st, std::forward<A>(args)...);
}

/* ---- 16-bit numbers, two and eight at a time ------------------------------------------------- */

template <class A> struct pair_type;
template <> struct pair_type<__half> { typedef __half2 type; };
template <> struct pair_type<__nv_bfloat16> { typedef __nv_bfloat162 type; };
template <class A> using pair_of = typename pair_type<A>::type;

__device__ __forceinline__ float2 to_float2(__half2 v) { return __half22float2(v); }
__device__ __forceinline__ float2 to_float2(__nv_bfloat162 v) { return __bfloat1622float2(v); }
template <class A> __device__ __forceinline__ pair_of<A> to_pair(float a, float b) {
    if constexpr (std::is_same<A, __half>::value)
        return __floats2half2_rn(a, b);
    else
        return __floats2bfloat162_rn(a, b);
}
/* a and b as e4m3 in the low and the next byte: to nearest even, beyond 448 to 448, NaN to NaN. */
__device__ __forceinline__ uint32_t e4m3_pair(float a, float b) {
    return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
}
template <class A> __device__ __forceinline__ uint32_t to_bits(float a, float b) {
    union {
        pair_of<A> pair;
        uint32_t bits;
    } u = {to_pair<A>(a, b)};
    return u.bits;
}
template <class A> struct alignas(8) four { pair_of<A> v[2]; };
template <class A> struct alignas(16) eight { pair_of<A> v[4]; };

#endif
