/* emu.h - CUDA's device language on the CPU. Test builds only: g++ or clang++ with -DQEMB_EMU and
 * the toolkit's real headers, no preprocessing of the source, no libcudart, no GPU.
 *
 * A CUDA thread is a fiber; clusters run one after the other, the blocks of a cluster together.
 * Fibers switch at barriers and at warp collectives only, in an order that emu::set_schedule draws.
 * The runtime API and cuBLASLt are not macros here: emu_runtime.cpp and emu_cublaslt.cpp define the
 * library's own functions.
 *
 * Shared memory is dynamic only (SHARED_BYTES in ptx.cuh): the emulator knows its bounds, fills it
 * with NaN before every block and shadows it for the race detector (emu_race.cpp).
 *
 * What this cannot see: the PTX text itself, weak memory ordering (of the fences, only a missing
 * fence_async), the tensor cores' rounding (but for e4m3's), the approximate functions, registers,
 * bank conflicts, speed.
 */
#ifndef EMU_H
#define EMU_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#undef __forceinline__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))

namespace emu {

/* ---- what a test controls -------------------------------------------------------------------- */

enum schedule { IN_ORDER, REVERSE, RANDOM, PRIORITY, N_SCHEDULES };

/* Order of blocks, warps and lanes from now on. IN_ORDER also runs stream work at once; the others
 * leave it queued until something waits for it, as late as a device may. */
void set_schedule(schedule s, uint64_t seed);

/* The devices that the program sees, all alike. For whole programs the environment can say
 * otherwise: QEMB_EMU="count=0 driver=0 image=0 major=7 minor=5 memory=MIB fault_after=N
 * fault_device=N report=1", any of them.
 *
 * A host thread has a current device (cudaSetDevice). Streams, events, memory and cuBLASLt handles
 * belong to the device that was current when they were made; use of another device's ends the
 * process. All calls and the work that they run hold one lock. */
enum { MAX_GPUS = 8 };
struct device {
    int count;           /* GPUs; 0: cudaErrorNoDevice */
    int major, minor;    /* compute capability */
    int sms;             /* multiprocessors */
    size_t memory;       /* bytes of each device; cudaMalloc beyond them fails */
    size_t shared_optin; /* dynamic shared bytes a kernel may ask for */
    bool driver;         /* false: cudaErrorInsufficientDriver */
    bool image;          /* false: no kernel image for this device */
    cudaError_t fault;   /* not cudaSuccess: the device has failed; launches and waits say so */
    long fault_after;    /* launches until it does; 0: never */
    bool no_fp8;         /* cuBLASLt has no product of e4m3 here */
    int capture_fault;   /* recording fails: 1 at its begin, 2 a launch, 3 at its end, 4 when it is
                          made executable; 0: never */
    int fault_device;    /* the one that fails; -1: all, and fault_after counts all launches */
    bool report;         /* the process writes each device's launches to standard error at exit */
};
extern device dev;

struct counters {
    long launches, collectives, races, copies, gemms, graph_launches, wgmmas;
    long loads;       /* boxes that tma_load has brought */
    long allocations; /* device and pinned; a test of "nothing is allocated in the hot path" */
    long launches_on[MAX_GPUS];
};
extern counters count;

/* ---- thread coordinates (functions: reading them must not look like a memory access) --------- */

__attribute__((pure)) uint3 thread_index();
__attribute__((pure)) uint3 block_index();
__attribute__((pure)) dim3 block_dim();
__attribute__((pure)) dim3 grid_dim();
__attribute__((pure)) char *dynamic_shared();

/* ---- barriers and warp collectives ----------------------------------------------------------- */

void sync_threads();
void sync_warp(unsigned mask);
uint64_t shuffle(unsigned mask, uint64_t v, int from_lane);
int lane();
[[noreturn]] void die(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

template <class T> inline T shuffle_any(unsigned mask, T v, int from_lane) {
    static_assert(sizeof(T) <= 8, "one register pair");
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof v);
    bits = shuffle(mask, bits, from_lane);
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* ---- sm_80 instructions ---------------------------------------------------------------------- */

void cp_async16(char *dst, const void *src, bool ok); /* !ok: sixteen zero bytes */
void cp_async_commit();
void cp_async_wait(int newest); /* all groups but the newest `newest` */
void ldmatrix_x4(uint32_t *r, const char *row, bool transposed);
void mma_16816(float *d, const uint32_t *a, const uint32_t *b, bool bf16);

/* ---- sm_90a instructions (emu_hopper.cpp) ---------------------------------------------------- */

uint32_t shared_offset(const char *p);
void barrier_init(char *b, int arrivals);
void barrier_arrive(char *b, int bytes);   /* bytes: announced with it */
void barrier_arrive_at(char *b, int rank); /* at block rank's barrier in the place of b */
void barrier_wait(char *b, int parity);
void fence_async();
void tma_load(char *dst, const CUtensorMap *map, char *b, int x, int y);
void tma_multicast(char *dst, const CUtensorMap *map, char *b, int x, int y, unsigned blocks);
int cluster_rank();
void cluster_sync();
enum operand { F16, BF16, E4M3 };
struct wgmma_call {
    int n;             /* columns of d */
    float *d;          /* this thread's n/2 sums */
    const uint32_t *r; /* its four registers of a; null: a by descriptor */
    uint64_t a, b;     /* descriptors */
    bool add, across;
    operand type;
};
void wgmma(const wgmma_call &c);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int newest);

/* ---- launches -------------------------------------------------------------------------------- */

struct launch_info {
    const char *name;
    int cluster; /* blocks, neighbours in x */
    dim3 grid, block;
    size_t shared;
    std::shared_ptr<void> args; /* a held_call */
    size_t args_bytes;          /* for the access checker: a kernel may read them */
    void (*call)(void *args);   /* one thread's work */
    const void *kernel;
};
cudaError_t submit_launch(cudaStream_t st, const launch_info &info);

/* A kernel and its arguments, as they were at the launch. */
template <class... P> struct held_call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> args;
    static void call(void *p) {
        held_call *h = (held_call *)p;
        std::apply(h->kernel, h->args);
    }
};

} // namespace emu

#define threadIdx (emu::thread_index())
#define blockIdx  (emu::block_index())
#define blockDim  (emu::block_dim())
#define gridDim   (emu::grid_dim())

inline void __syncthreads() { emu::sync_threads(); }
inline void __syncwarp(unsigned m = 0xffffffffu) { emu::sync_warp(m); }
template <class T> inline T __shfl_sync(unsigned m, T v, int l) {
    return emu::shuffle_any(m, v, l & 31);
}
template <class T> inline T __shfl_xor_sync(unsigned m, T v, int x) {
    return emu::shuffle_any(m, v, (emu::lane() ^ x) & 31);
}
/* Fibers do not run at the same time: plain arithmetic is atomic. */
template <class T> __attribute__((no_sanitize_thread)) inline T atomicAdd(T *p, T v) {
    T old = *p;
    *p = old + v;
    return old;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int min(int a, int b) { return a < b ? a : b; }

template <class... P, class... A>
cudaError_t launch_clusters(int cluster, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                            cudaStream_t st, A &&...args) {
    typedef emu::held_call<P...> held;
    auto h = std::make_shared<held>(held{kernel, {std::forward<A>(args)...}});
    return emu::submit_launch(st, {__PRETTY_FUNCTION__, cluster, grid, block, shared, h, sizeof *h,
                                   held::call, (const void *)kernel});
}

#endif
