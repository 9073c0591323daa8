/* emu_race.cpp - races and stray accesses, whatever the schedule. Compile the code under test with
 * -fsanitize=thread and link without libtsan: the compiler's access hooks land here.
 *
 * Shared memory: two accesses, one of them a write, must have a barrier of their block or cluster
 * (or, inside a warp, a __syncwarp) between them, or a chain of mbarriers; bytes of a cp.async or
 * of the copy engine may not be touched before they have landed, and what ordinary stores wrote for
 * wgmma wants a fence_async. Device memory: two blocks of one launch may not touch the same bytes
 * if one of them writes. Anything else a kernel touches must be its own stack, its arguments or the
 * program's constants.
 */
#include "emu_internal.h"

#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <unistd.h>

#if defined(EMU_RACE)

extern "C" char __executable_start, _end;

namespace emu {

struct access { /* of a 2-byte granule */
    int32_t thread;
    uint32_t epoch, warp_epoch, cluster_epoch, serial;
    uint32_t tick;   /* of its thread's clock; 0: no clocks then */
    uint32_t fences; /* an ordinary write: its thread's fence_async so far, and one; else 0 */
    void *pc;
};
struct shared_cell {
    access write, read[2]; /* two threads' reads, of two warps where two warps read */
    int32_t pending;
};
struct global_cell {
    uint32_t write_launch, write_block, read_launch, read_block;
};
enum : size_t { SHARED_MAX = 256 << 10, GRANULE = 2 };

static shared_cell *shared_cells;
static global_cell *global_cells; /* for a window of the device heap, on demand */
static const char *global_base;

/* clocks.at[t][u]: up to which of its ticks thread u's doings are before thread t's next one. */
struct barrier_clock {
    uint32_t arriving[MAX_THREADS], ended[MAX_THREADS];
};
static struct {
    bool on;
    uint32_t at[MAX_THREADS][MAX_THREADS];
    barrier_clock barriers[MAX_BARRIERS];
} clocks;

static bool ordered(const access &p, int t, uint32_t warp_epoch) {
    if (p.serial != now.serial || p.cluster_epoch != now.epoch || p.thread == t) return true;
    if (clocks.on && p.tick && clocks.at[t][p.thread] >= p.tick) return true;
    const int b = t / now.block_threads;
    return p.thread / now.block_threads == b &&
           (p.epoch != now.blocks[b].epoch ||
            (p.thread / WARP == t / WARP && p.warp_epoch != warp_epoch));
}

static void report(const char *kind, const char *where, int t, int earlier, void *pc,
                   void *earlier_pc) {
    if (count.races++ >= 4) return;
    fprintf(stderr, "emu: RACE %s, %s, in %s: thread or block %d against %d\n", kind, where,
            now.info.name, t, earlier);
    char cmd[256];
    snprintf(cmd, sizeof cmd, "addr2line -s -i -e /proc/%d/exe %p %p 1>&2", getpid(),
             (void *)((char *)pc - 1), (void *)((char *)(earlier_pc ? earlier_pc : pc) - 1));
    fflush(stderr);
    if (system(cmd)) fprintf(stderr, "emu: (no addr2line)\n");
}

static void remember_read(shared_cell *c, const access &mine) {
    int t = mine.thread;
    for (access &r : c->read) {
        if (r.pc && r.thread != t && !ordered(r, t, mine.warp_epoch)) continue;
        r = mine;
        return;
    }
    if (c->read[0].thread / WARP == c->read[1].thread / WARP &&
        c->read[0].thread / WARP != t / WARP)
        c->read[1] = mine;
}

enum how { ORDINARY, ASYNC };
static shared_cell *cell_of(const char *p, int owner) {
    if (!shared_cells) {
        shared_cells =
            (shared_cell *)calloc((size_t)MAX_CLUSTER * SHARED_MAX / GRANULE, sizeof *shared_cells);
        if (!shared_cells) die("no memory for the race detector");
    }
    return shared_cells +
           ((size_t)owner * SHARED_MAX + (size_t)(p - now.blocks[owner].shared)) / GRANULE;
}
static void touch_shared(const char *at, int owner, int bytes, bool write, void *pc, int t,
                         how proxy) {
    uint32_t we = now.warps[t / WARP].epoch;
    const uint32_t epoch = now.blocks[t / now.block_threads].epoch;
    access mine = {t, epoch, we, now.epoch, now.serial, clocks.on ? clocks.at[t][t] : 0, 0, pc};
    if (write && proxy == ORDINARY) mine.fences = now.fibers[t].fences + 1;
    shared_cell *c = cell_of(at, owner);
    for (size_t i = 0; i < (bytes + GRANULE - 1) / GRANULE; i++, c++) {
        const char *kind = nullptr;
        const access *p = &c->write;
        if (c->pending > 0 && c->write.serial == now.serial) {
            kind = write ? "write into a pending copy" : "read of a pending copy";
        } else if (p->pc && !ordered(*p, t, we)) {
            kind = write ? "write after write" : "read after write";
        } else if (proxy == ASYNC && !write && p->serial == now.serial &&
                   p->fences == now.fibers[p->thread].fences + 1) {
            kind = "wgmma read without fence_async after the write";
        } else if (write) {
            for (const access &r : c->read)
                if (r.pc && !ordered(r, t, we)) kind = "write after read", p = &r;
        }
        if (kind) {
            char where[48];
            snprintf(where, sizeof where, "shared byte %td", at - now.blocks[owner].shared);
            report(kind, where, t, p->thread, pc, p->pc);
            return;
        }
        if (write)
            c->write = mine;
        else
            remember_read(c, mine);
    }
}

static void touch_global(const char *p, int bytes, bool write, void *pc, int t) {
    const size_t window = (size_t)8 << 30;
    if (!global_cells) {
        global_base = (const char *)((uintptr_t)p & ~(((uintptr_t)1 << 30) - 1));
        global_cells = (global_cell *)mmap(nullptr, window / GRANULE * sizeof *global_cells,
                                           PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (global_cells == MAP_FAILED) die("no address space for the race detector");
    }
    if (p < global_base || p + bytes > global_base + window)
        die("race detector: device heap outgrew its window");
    const uint3 b = now.blocks[t / now.block_threads].index;
    uint32_t block = b.x + now.gdim.x * (b.y + now.gdim.y * b.z);
    global_cell *c = global_cells + (p - global_base) / GRANULE;
    for (size_t i = 0; i < (bytes + GRANULE - 1) / GRANULE; i++, c++) {
        bool written = c->write_launch == now.launch && c->write_block != block;
        bool read = write && c->read_launch == now.launch && c->read_block != block;
        if (written || read) {
            report(written ? (write ? "write after write of another block"
                                    : "read after write of another block")
                           : "write after read of another block",
                   "device memory", (int)block, (int)(written ? c->write_block : c->read_block), pc,
                   nullptr);
            return;
        }
        if (write)
            c->write_launch = now.launch, c->write_block = block;
        else
            c->read_launch = now.launch, c->read_block = block;
    }
}

void race_touch(const void *at, int bytes, bool write, void *pc, int thread) {
    if (!now.cur) return;
    const char *p = (const char *)at;
    int t = thread < 0 ? now.cur->linear : thread;
    if (in_device_heap(p)) return touch_global(p, bytes, write, pc, t);
    const int owner = shared_owner(p);
    if (owner == t / now.block_threads)
        return touch_shared(p, owner, bytes, write, pc, t, ORDINARY);
    const char *stacks = fiber_stacks(), *args = (const char *)now.info.args.get();
    if (p >= stacks && p < stacks + (size_t)MAX_THREADS * STACK_BYTES) return;
    if (p >= args && p < args + now.info.args_bytes && !write) return;
    if (p >= &__executable_start && p < &_end && !write) return;
    report("stray access: neither device memory nor the block's shared memory",
           write ? "write" : "read", t, t, pc, nullptr);
}

void race_pending(const void *at, int bytes, int pending) {
    const char *p = (const char *)at;
    const int owner = shared_owner(p);
    if (owner < 0) return;
    shared_cell *c = cell_of(p, owner);
    for (size_t i = 0; i < bytes / GRANULE; i++) c[i].pending = pending;
}

void race_async(const void *at, int bytes, bool write, void *pc, int thread) {
    touch_shared((const char *)at, shared_owner(at), bytes, write, pc, thread, ASYNC);
}

static void learn(uint32_t *to, const uint32_t *from) {
    for (int i = 0; i < now.n_threads; i++) to[i] = to[i] > from[i] ? to[i] : from[i];
}
void race_clocks(bool on) {
    if (on && !clocks.on) {
        memset(clocks.barriers, 0, sizeof clocks.barriers);
        for (int i = 0; i < now.n_threads; i++) {
            memset(clocks.at[i], 0, now.n_threads * sizeof clocks.at[i][0]);
            clocks.at[i][i] = 1;
        }
    }
    clocks.on = on;
}
uint32_t race_tick(int t) { return clocks.at[t][t]++; }
void race_arrive(int barrier, int t) {
    learn(clocks.barriers[barrier].arriving, clocks.at[t]);
    race_tick(t);
}
void race_publish(int barrier, int t, uint32_t tick) {
    uint32_t *c = &clocks.barriers[barrier].arriving[t];
    if (*c < tick) *c = tick;
}
void race_phase(int barrier) {
    memcpy(clocks.barriers[barrier].ended, clocks.barriers[barrier].arriving,
           sizeof clocks.barriers[barrier].ended);
}
void race_wait(int barrier, int t) { learn(clocks.at[t], clocks.barriers[barrier].ended); }
static void meet(int first, int n, uint32_t mask) {
    if (!clocks.on) return;
    uint32_t all[MAX_THREADS] = {};
    for (int i = 0; i < n; i++)
        if (mask >> i % WARP & 1) learn(all, clocks.at[first + i]);
    for (int i = 0; i < n; i++)
        if (mask >> i % WARP & 1) learn(clocks.at[first + i], all), race_tick(first + i);
}
void race_warp(int warp, uint32_t mask) { meet(warp * WARP, WARP, mask); }
/* A block that is alone needs no clocks here: `epoch` says what is before the barrier. */
void race_block(int b) {
    if (now.n_blocks > 1) meet(b * now.block_threads, now.block_threads, ~0u);
}

} // namespace emu

#define HOOK(name) extern "C" void name(void *p)
#define HERE       __builtin_return_address(0)
#define HOOKS(n)                                                                                   \
    HOOK(__tsan_read##n) { emu::race_touch(p, n, false, HERE); }                                   \
    HOOK(__tsan_write##n) { emu::race_touch(p, n, true, HERE); }                                   \
    HOOK(__tsan_unaligned_read##n) { emu::race_touch(p, n, false, HERE); }                         \
    HOOK(__tsan_unaligned_write##n) { emu::race_touch(p, n, true, HERE); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" {
void __tsan_read_range(void *p, unsigned long n) { emu::race_touch(p, (int)n, false, HERE); }
void __tsan_write_range(void *p, unsigned long n) { emu::race_touch(p, (int)n, true, HERE); }
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
/* std::shared_ptr counts with it, in host code */
int __tsan_atomic32_fetch_add(volatile int *p, int v, int) {
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
}

#else

namespace emu {
void race_touch(const void *, int, bool, void *, int) {}
void race_pending(const void *, int, int) {}
void race_async(const void *, int, bool, void *, int) {}
void race_clocks(bool) {}
uint32_t race_tick(int) { return 0; }
void race_arrive(int, int) {}
void race_publish(int, int, uint32_t) {}
void race_phase(int) {}
void race_wait(int, int) {}
void race_warp(int, uint32_t) {}
void race_block(int) {}
} // namespace emu

#endif
