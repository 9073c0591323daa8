/* ptx_hopper.cuh - wrappers of the PTX instructions of sm_90a: mbarrier, TMA, wgmma. Like ptx.cuh,
 * PTX under nvcc and the emulation of tests/cuda/emu with -DQEMB_EMU. Other architectures lack
 * wgmma, so a kernel that uses it has a body where HOPPER_CODE is defined and a trap elsewhere. The
 * tests "ptx_" in tests/cuda/test_cuda_hopper.cu check mbarrier, TMA, clusters and wgmma.
 */
#ifndef PTX_HOPPER_CUH
#define PTX_HOPPER_CUH

#include "ptx.cuh"

#include <cuda.h> /* CUtensorMap; nothing of libcuda is linked */

#if defined(QEMB_EMU)

#define HOPPER_CODE 1

inline uint32_t shared_offset(shared_addr p) { return emu::shared_offset(p); }
inline void barrier_init(shared_addr b, int arrivals) { emu::barrier_init(b, arrivals); }
inline void barrier_init_done() {}
inline void barrier_arrive(shared_addr b) { emu::barrier_arrive(b, 0); }
inline void barrier_expect(shared_addr b, int bytes) { emu::barrier_arrive(b, bytes); }
inline void barrier_arrive_at(shared_addr b, int rank) { emu::barrier_arrive_at(b, rank); }
inline void barrier_wait(shared_addr b, int parity) { emu::barrier_wait(b, parity); }
inline int cluster_rank() { return emu::cluster_rank(); }
inline void cluster_sync() { emu::cluster_sync(); }
inline void fence_async() { emu::fence_async(); }
inline void tma_load(shared_addr d, const CUtensorMap *m, shared_addr b, int x, int y) {
    emu::tma_load(d, m, b, x, y);
}
inline void tma_multicast(shared_addr d, const CUtensorMap *m, shared_addr b, int x, int y,
                          unsigned blocks) {
    emu::tma_multicast(d, m, b, x, y, blocks);
}
inline void wgmma_fence() { emu::wgmma_fence(); }
inline void wgmma_commit() { emu::wgmma_commit(); }
template <int N> inline void wgmma_wait() { emu::wgmma_wait(N); }
template <int N, int J> inline void wgmma_wait(float (&)[J][4]) { emu::wgmma_wait(N); }
template <class X>
constexpr emu::operand operand_of = sizeof(X) == 1                          ? emu::E4M3
                                    : std::is_same<X, __nv_bfloat16>::value ? emu::BF16
                                                                            : emu::F16;
template <class X> inline void wgmma256(float (&d)[32][4], uint64_t a, uint64_t b, bool add) {
    emu::wgmma({256, d[0], nullptr, a, b, add, false, operand_of<X>});
}
template <class A, bool ACROSS, int N>
inline void wgmma_regs(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
    emu::wgmma({N, d[0], a, 0, b, add, ACROSS, operand_of<A>});
}
template <int N> inline void registers_raise() {}
template <int N> inline void registers_lower() {}

#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define HOPPER_CODE 1

__device__ __forceinline__ uint32_t shared_offset(shared_addr p) { return p; }

/* An mbarrier, 8 bytes of shared memory: a phase ends when `arrivals` threads have arrived and all
 * bytes that were announced have landed. Phases alternate in parity, the first one is 0. */
__device__ __forceinline__ void barrier_init(shared_addr b, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(b), "r"(arrivals) : "memory");
}
/* After the last barrier_init, before the __syncthreads that lets others use them. */
__device__ __forceinline__ void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(shared_addr b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(b) : "memory");
}
/* Arrives, and announces bytes that tma_load will bring. */
__device__ __forceinline__ void barrier_expect(shared_addr b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(b), "r"(bytes)
                 : "memory");
}
/* Arrives at block `rank`'s barrier in the place of b. It says that a wgmma has read what the other
 * block's loader may now overwrite, and passes no memory between blocks: release at cluster scope,
 * and acquire at the wait, would cost a memory barrier and L1's contents for every stage. */
__device__ __forceinline__ void barrier_arrive_at(shared_addr b, int rank) {
    asm volatile("{\n"
                 ".reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
                 "}\n" ::"r"(b),
                 "r"(rank)
                 : "memory");
}
/* Returns when the phase of that parity has ended; of a barrier that was just made, parity 1
 * has. */
__device__ __forceinline__ void barrier_wait(shared_addr b, int parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(b),
                 "r"(parity)
                 : "memory");
}
/* This block's number in its cluster. */
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
    return rank;
}
/* The barrier of all threads of the cluster; those that have exited do not count. */
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}
/* What this thread has written to shared memory becomes visible to wgmma and the copy engine. */
__device__ __forceinline__ void fence_async() {
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}
/* Starts the copy of m's box at column x, row y; what lies outside of the matrix becomes zeros. */
__device__ __forceinline__ void tma_load(shared_addr d, const CUtensorMap *m, shared_addr b, int x,
                                         int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];\n" ::"r"(d),
                 "l"(m), "r"(x), "r"(y), "r"(b)
                 : "memory");
}
/* The same copy to the places of d in all blocks of the cluster whose bits are set; each gets the
 * bytes announced at its own barrier in the place of b. */
__device__ __forceinline__ void tma_multicast(shared_addr d, const CUtensorMap *m, shared_addr b,
                                              int x, int y, unsigned blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(d),
                 "l"(m), "r"(x), "r"(y), "r"(b), "h"((uint16_t)blocks)
                 : "memory");
}
/* Before the first wgmma, and before one whose registers the thread has touched. */
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
/* Waits for this warp's part of all groups but the newest N. */
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}
/* The same, and d is read after it: without this the compiler may move arithmetic on d in front. */
template <int N, int J> __device__ __forceinline__ void wgmma_wait(float (&d)[J][4]) {
    wgmma_wait<N>();
#pragma unroll
    for (int j = 0; j < J; j++)
        asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}
/* The warpgroup's registers per thread from now on; multiples of 8. */
template <int N> __device__ __forceinline__ void registers_raise() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_lower() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(N));
}

/* d (64, N) = a (64, 16) b (16, N), or +=, by a warpgroup; of e4m3 (uint8_t) 32 instead of 16, the
 * same bytes. Warp w has rows 16w..16w+15 of d in
 * blocks of eight columns, each as mma16816 has it. a and b by descriptors (wgmma_tile), or a in
 * the registers of mma16816. ACROSS: b lies as rows of k, else as rows of n. clang-format would
 * make pages of the lists. */
/* clang-format off */
#define WGMMA_D4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define WGMMA_D32(j) WGMMA_D4(j), WGMMA_D4(j + 1), WGMMA_D4(j + 2), WGMMA_D4(j + 3), \
    WGMMA_D4(j + 4), WGMMA_D4(j + 5), WGMMA_D4(j + 6), WGMMA_D4(j + 7)
#define WGMMA_R0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                          \
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_R1 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                \
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_R2 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"                \
                 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define WGMMA_R3 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"    \
                 "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA_256(TYPES, ORDER) /* ORDER: neither matrix is transposed; e4m3 never is */           \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"                                 \
                 "wgmma.mma_async.sync.aligned.m64n256" TYPES " {"                                 \
                 WGMMA_R0 "," WGMMA_R1 "," WGMMA_R2 "," WGMMA_R3                                   \
                 "}, %128, %129, add, 1, 1" ORDER ";\n}\n"                                         \
                 : WGMMA_D32(0), WGMMA_D32(8), WGMMA_D32(16), WGMMA_D32(24)                        \
                 : "l"(a), "l"(b), "r"((int)add))
#define WGMMA_128(TYPE, ACROSS)                                                                    \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"                                  \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                 \
                 WGMMA_R0 "," WGMMA_R1 "}, {%64,%65,%66,%67}, %68, add, 1, 1, %70;\n}\n"           \
                 : WGMMA_D32(0), WGMMA_D32(8)                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add),              \
                   "n"((int)ACROSS))
#define WGMMA_64(TYPE, ACROSS)                                                                     \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                  \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                  \
                 WGMMA_R0 "}, {%32,%33,%34,%35}, %36, add, 1, 1, %38;\n}\n"                        \
                 : WGMMA_D32(0)                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add),              \
                   "n"((int)ACROSS))
template <class X>
__device__ __forceinline__ void wgmma256(float (&d)[32][4], uint64_t a, uint64_t b, bool add) {
    if constexpr (sizeof(X) == 1) WGMMA_256("k32.f32.e4m3.e4m3", "");
    else if constexpr (std::is_same<X, __nv_bfloat16>::value)
        WGMMA_256("k16.f32.bf16.bf16", ", 0, 0");
    else WGMMA_256("k16.f32.f16.f16", ", 0, 0");
}
template <class A, bool ACROSS, int N>
__device__ __forceinline__ void wgmma_regs(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b,
                                           bool add) {
    static_assert(N == 64 || N == 128, "the sizes that attention needs");
    if constexpr (std::is_same<A, __nv_bfloat16>::value) {
        if constexpr (N == 128) WGMMA_128("bf16", ACROSS);
        else WGMMA_64("bf16", ACROSS);
    } else {
        if constexpr (N == 128) WGMMA_128("f16", ACROSS);
        else WGMMA_64("f16", ACROSS);
    }
}
/* clang-format on */

#endif

#if defined(HOPPER_CODE)
/* The descriptor of a tile in shared memory that consists of blocks of rows of 128 bytes, 16-byte
 * chunk c of row r at r * 128 + (c ^ r % 8) * 16, blocks at multiples of 1024. A block that is
 * wider than 64 numbers continues `next` bytes on; rows of k only (a row of n ends where k does).
 * A wgmma's step along k: 2048 bytes for rows of k, 32 for rows of n. */
__device__ __forceinline__ uint64_t wgmma_tile(shared_addr p, int next = 16) {
    return (uint64_t)((shared_offset(p) & 0x3FFFF) >> 4) | (uint64_t)(next >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
#endif

#endif
