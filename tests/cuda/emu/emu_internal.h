/* emu_internal.h - what the emulator's files share. Compiled without -fsanitize=thread, so that the
 * access hooks see the program under test only. */
#ifndef EMU_INTERNAL_H
#define EMU_INTERNAL_H

#include "emu.h"
#include <memory>
#include <mutex>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif

namespace emu {

enum { WARP = 32, MAX_THREADS = 1024, STACK_BYTES = 256 << 10 }; /* threads: of a cluster */
enum { MAX_CLUSTER = 8, MAX_BARRIERS = 32 };                     /* barriers: of a cluster */

struct pending_copy { /* a cp.async that has not landed */
    char *dst;
    const char *src;
    bool ok;
    int group;
};

struct fiber {
    void *sp;
    void *fake_stack; /* ASan's */
    char *stack;
    uint3 tid;
    int linear, lane, warp, block; /* in the cluster */
    int group;                     /* open cp.async group */
    uint32_t fences;               /* fence_async so far */
    std::vector<pending_copy> copies;
};

struct warp {
    uint32_t live, runnable, arrived, mask; /* bit per lane */
    int op;                                 /* collective that `arrived` lanes wait in */
    void *slot[WARP];
    uint32_t epoch; /* __syncwarp count */
    int priority;
};

struct block {
    uint3 index;
    char *shared;
    int live, arrived; /* threads; of them, those that wait at the barrier */
    uint32_t epoch;    /* barriers passed */
};

/* The cluster of blocks that runs, one at a time. Without a cluster, it is one block. Threads and
 * warps are numbered through the cluster. */
struct cluster_state {
    fiber *cur; /* null: host code runs */
    block blocks[MAX_CLUSTER];
    int n_blocks, block_threads;
    fiber fibers[MAX_THREADS];
    warp warps[MAX_THREADS / WARP];
    uint32_t at_barrier[MAX_THREADS / WARP];
    uint32_t at_cluster_barrier[MAX_THREADS / WARP];
    int n_threads, n_warps, live, arrived; /* arrived: at the cluster's barrier */
    uint32_t epoch, serial;                /* its barriers passed; clusters run so far */
    uint32_t launch;                       /* launches run so far */
    dim3 bdim, gdim;
    size_t shared_bytes; /* of a block */
    launch_info info;
};
extern cluster_state now;
inline block &here() { return now.blocks[now.cur->block]; }
/* The block of the cluster whose shared memory p is in; -1: none's. */
inline int shared_owner(const void *p) {
    for (int b = 0; b < now.n_blocks; b++)
        if ((char *)p >= now.blocks[b].shared &&
            (char *)p < now.blocks[b].shared + now.shared_bytes)
            return b;
    return -1;
}
/* Bytes of the current block's shared memory. */
inline bool in_shared(const char *p, int bytes) {
    return p >= here().shared && p + bytes <= here().shared + now.shared_bytes;
}

/* ---- fibers (emu_fibers.cpp) ----------------------------------------------------------------- */
uint64_t random_bits();
void sleep_here(); /* until wake; the fiber's lane is not runnable meanwhile */
void wake(int warp, uint32_t lanes);
using combine_fn = void (*)(void **slot, uint32_t mask);
void collective(int op, uint32_t mask, void *mine, combine_fn combine);
enum {
    OP_SYNC = 1,
    OP_SHUFFLE,
    OP_LDMATRIX,
    OP_LDMATRIX_T,
    OP_MMA_F16,
    OP_MMA_BF16,
    OP_WGMMA,
    OP_WGMMA_FENCE,
    OP_WGMMA_COMMIT,
    OP_WGMMA_WAIT
};
void to_floats(float *f, const uint16_t *h, int n, bool bf16);

/* ---- emu_hopper.cpp -------------------------------------------------------------------------- */
bool land_one();     /* one tma_load that is in flight lands; false: none is */
void hopper_start(); /* of a cluster */
void hopper_exit();  /* the current fiber's warp has no lane left */
void hopper_leave(); /* the current fiber's block has no thread left */
void hopper_end();   /* of a cluster */

schedule current_schedule();
void run_launch(const launch_info &info);
char *fiber_stacks(); /* MAX_THREADS * STACK_BYTES, contiguous */

/* ---- memory (emu_runtime.cpp) ---------------------------------------------------------------- */
bool in_device_heap(const void *p);
extern std::recursive_mutex api_lock; /* held in every call and while stream work runs */
int current_device();                 /* of this host thread */
bool device_failed();                 /* the current one */
/* Stream work: runs at once or queues; device memory is accessible only while it runs. */
cudaError_t submit(cudaStream_t st, std::function<void()> work);

/* ---- race detector (emu_race.cpp); without EMU_RACE these do nothing ------------------------- */
#if defined(EMU_RACE)
constexpr bool RACES = true;
#else
constexpr bool RACES = false;
#endif
void race_touch(const void *p, int bytes, bool write, void *pc, int thread = -1);
void race_pending(const void *p, int bytes, int pending);
/* The copy engine's write, or a wgmma's read, before which ordinary writes need their thread's
 * fence_async as well. */
void race_async(const void *p, int bytes, bool write, void *pc, int thread);
/* Order by mbarriers, barrier i of the cluster; by vector clocks, on once a block has one. */
void race_clocks(bool on);
uint32_t race_tick(int thread);            /* its time; later accesses have a later one */
void race_arrive(int barrier, int thread); /* what it did is before the phase's end */
void race_publish(int barrier, int thread, uint32_t tick); /* the same of one asynchronous write */
void race_phase(int barrier);                              /* a phase has ended */
void race_wait(int barrier, int thread);                   /* and this thread knows */
void race_warp(int warp, uint32_t mask);                   /* __syncwarp */
void race_block(int block);                                /* __syncthreads */

} // namespace emu
#endif
