/* emu_fibers.cpp - a block's threads as fibers: switching, schedules, barriers, warp collectives,
 * and the sm_80 instructions as warp collectives. */
#include "emu_internal.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <unistd.h>
#if defined(EMU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

cluster_state now;
counters count;

static schedule order = IN_ORDER;
static uint64_t rng = 0x9E3779B97F4A7C15ull;
static void *main_sp, *main_fake;
static const void *main_bottom;
static size_t main_size;

uint64_t random_bits() {
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return rng * 0x2545F4914F6CDD1Dull >> 16;
}
schedule current_schedule() { return order; }
void set_schedule(schedule s, uint64_t seed) {
    cudaDeviceSynchronize(); /* what is queued belongs to the old schedule */
    order = s;
    rng = 0x9E3779B97F4A7C15ull + (seed + 1) * 0xD1342543DE82EF95ull;
}

void die(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "emu: ");
    vfprintf(stderr, fmt, ap);
    va_end(ap);
    if (now.cur)
        fprintf(stderr, " [block (%u,%u,%u) thread %d of %s]", here().index.x, here().index.y,
                here().index.z, now.cur->linear % now.block_threads, now.info.name);
    fprintf(stderr, "\n");
    fflush(stderr);
    _exit(86);
}

uint3 thread_index() { return now.cur->tid; }
uint3 block_index() { return here().index; }
dim3 block_dim() { return now.bdim; }
dim3 grid_dim() { return now.gdim; }
char *dynamic_shared() { return here().shared; }
int lane() { return now.cur->lane; }

/* ---- switching ------------------------------------------------------------------------------- */

/* Saves the callee-saved registers on this stack, its pointer in *save, and takes up `load`. */
extern "C" void emu_switch(void **save, void *load);
#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp,(%rdi); mov %rsi,%rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret
.size emu_switch,.-emu_switch
)");
static void *first_frame(char *top, void (*entry)()) {
    void **sp = (void **)(top - 64);
    *--sp = nullptr; /* keeps the stack aligned as after a call */
    *--sp = (void *)entry;
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.globl emu_switch
.type emu_switch,%function
emu_switch:
    sub sp,sp,#160
    stp x19,x20,[sp]; stp x21,x22,[sp,#16]; stp x23,x24,[sp,#32]; stp x25,x26,[sp,#48]
    stp x27,x28,[sp,#64]; stp x29,x30,[sp,#80]
    stp d8,d9,[sp,#96]; stp d10,d11,[sp,#112]; stp d12,d13,[sp,#128]; stp d14,d15,[sp,#144]
    mov x9,sp; str x9,[x0]; mov sp,x1
    ldp x19,x20,[sp]; ldp x21,x22,[sp,#16]; ldp x23,x24,[sp,#32]; ldp x25,x26,[sp,#48]
    ldp x27,x28,[sp,#64]; ldp x29,x30,[sp,#80]
    ldp d8,d9,[sp,#96]; ldp d10,d11,[sp,#112]; ldp d12,d13,[sp,#128]; ldp d14,d15,[sp,#144]
    add sp,sp,#160; ret
.size emu_switch,.-emu_switch
)");
static void *first_frame(char *top, void (*entry)()) {
    void **sp = (void **)(top - 64) - 20;
    memset(sp, 0, 160);
    sp[11] = (void *)entry;
    return sp;
}
#else
#error "emu_switch: this processor is not known"
#endif

static void go(void **save, void **fake, void *load, const void *bottom, size_t size) {
#if defined(EMU_ASAN)
    __sanitizer_start_switch_fiber(fake, bottom, size);
#endif
    emu_switch(save, load);
#if defined(EMU_ASAN)
    __sanitizer_finish_switch_fiber(fake ? *fake : nullptr, nullptr, nullptr);
#endif
    (void)fake;
    (void)bottom;
    (void)size;
}

/* The next runnable fiber by the schedule, or null. */
static fiber *pick_runnable() {
    cluster_state &s = now;
    if (order == IN_ORDER && s.cur &&
        s.warps[s.cur->warp].runnable) { /* the common case, at once */
        fiber *me = s.cur;
        return &s.fibers[me->warp * WARP + __builtin_ctz(s.warps[me->warp].runnable)];
    }
    if (order == PRIORITY && random_bits() % 97 == 0)
        s.warps[random_bits() % s.n_warps].priority = (int)(random_bits() % 1000);
    int start = order == RANDOM ? (int)(random_bits() % s.n_warps) : 0, best = -1;
    for (int k = 0; k < s.n_warps; k++) {
        int i = order == REVERSE ? s.n_warps - 1 - k : (start + k) % s.n_warps;
        if (!s.warps[i].runnable) continue;
        if (best < 0 || s.warps[i].priority > s.warps[best].priority) best = i;
        if (order != PRIORITY) break;
    }
    if (best < 0) return nullptr;
    uint32_t m = s.warps[best].runnable;
    int l;
    if (order == IN_ORDER) {
        l = __builtin_ctz(m);
    } else if (order == REVERSE) {
        l = 31 - __builtin_clz(m);
    } else {
        int r = (int)(random_bits() & 31);
        l = m >> r ? r + __builtin_ctz(m >> r) : __builtin_ctz(m);
    }
    return &s.fibers[best * WARP + l];
}

/* Copies of the copy engine land as late as may be: when everybody waits; at random in two
 * schedules. */
static fiber *pick() {
    if (order >= RANDOM && random_bits() % 4 == 0) land_one();
    for (;;) {
        fiber *f = pick_runnable();
        if (f || !land_one()) return f;
    }
}

[[noreturn]] static void deadlock() {
    const uint3 b = now.blocks[0].index;
    fprintf(stderr, "emu: DEADLOCK in block (%u,%u,%u) of %s\n", b.x, b.y, b.z, now.info.name);
    for (int i = 0; i < now.n_warps; i++)
        fprintf(stderr,
                "  warp %d: live %08x, in collective %d %08x of %08x, at the barrier %08x, at the "
                "cluster's %08x\n",
                i, now.warps[i].live, now.warps[i].op, now.warps[i].arrived, now.warps[i].mask,
                now.at_barrier[i], now.at_cluster_barrier[i]);
    fflush(stderr);
    _exit(86);
}

/* Leaves the current fiber; something has made it not runnable, or it has just been released. */
static void yield() {
    fiber *me = now.cur, *next = pick();
    if (!next) deadlock();
    if (next == me) return;
    now.cur = next;
    go(&me->sp, &me->fake_stack, next->sp, next->stack, STACK_BYTES);
}

void sleep_here() {
    now.warps[now.cur->warp].runnable &= ~(1u << now.cur->lane);
    yield();
}
void wake(int warp, uint32_t lanes) { now.warps[warp].runnable |= lanes; }

/* ---- barriers and collectives ---------------------------------------------------------------- */

static void release(uint32_t *waiting, int first, int warps) {
    for (int i = first; i < first + warps; i++) {
        now.warps[i].runnable |= waiting[i];
        waiting[i] = 0;
    }
}
static void release_barrier(int b) {
    const int warps = now.n_warps / now.n_blocks;
    release(now.at_barrier, b * warps, warps);
    now.blocks[b].arrived = 0;
    now.blocks[b].epoch++;
    race_block(b);
}
static void release_cluster() {
    release(now.at_cluster_barrier, 0, now.n_warps);
    now.arrived = 0;
    now.epoch++;
}
static void wait_in(uint32_t *waiting) {
    fiber *me = now.cur;
    waiting[me->warp] |= 1u << me->lane;
    now.warps[me->warp].runnable &= ~(1u << me->lane);
}

void sync_threads() {
    wait_in(now.at_barrier);
    if (++here().arrived == here().live) release_barrier(now.cur->block);
    yield();
}
int cluster_rank() { return now.cur->block; }
void cluster_sync() {
    wait_in(now.at_cluster_barrier);
    if (++now.arrived == now.live) release_cluster();
    yield();
}

/* Every lane of mask deposits a pointer; the last to come runs `combine` for the warp. */
void collective(int op, uint32_t mask, void *mine, combine_fn combine) {
    fiber *me = now.cur;
    warp &w = now.warps[me->warp];
    uint32_t bit = 1u << me->lane;
    if (!(mask & bit))
        die("a collective's mask %08x leaves out lane %d, which calls it", mask, me->lane);
    if (mask & ~w.live)
        die("a collective's mask %08x names exited lanes (live %08x)", mask, w.live);
    if (w.arrived && (w.op != op || w.mask != mask))
        die("divergent collective: operation %d and %d, mask %08x and %08x", w.op, op, w.mask,
            mask);
    w.op = op;
    w.mask = mask;
    w.slot[me->lane] = mine;
    w.arrived |= bit;
    w.runnable &= ~bit;
    if (w.arrived == mask) {
        count.collectives++;
        combine(w.slot, mask);
        w.arrived = 0;
        w.runnable |= mask;
    }
    yield();
}

void sync_warp(unsigned mask) {
    collective(OP_SYNC, mask, nullptr, [](void **, uint32_t m) {
        now.warps[now.cur->warp].epoch++;
        race_warp(now.cur->warp, m);
    });
}

struct shuffle_slot {
    uint64_t in, out;
    int from;
};
uint64_t shuffle(unsigned mask, uint64_t v, int from_lane) {
    shuffle_slot s = {v, 0, from_lane};
    collective(OP_SHUFFLE, mask, &s, [](void **slot, uint32_t m) {
        for (int i = 0; i < WARP; i++) {
            if (!(m >> i & 1)) continue;
            shuffle_slot *x = (shuffle_slot *)slot[i];
            if (!(m >> x->from & 1))
                die("a shuffle reads lane %d, which is not in the mask", x->from);
            x->out = ((shuffle_slot *)slot[x->from])->in;
        }
    });
    return s.out;
}

/* ---- cp.async: lands at the wait, so that reading early reads NaN ---------------------------- */

void cp_async16(char *dst, const void *src, bool ok) {
    void *pc = __builtin_return_address(0);
    if (((uintptr_t)dst | (uintptr_t)src) & 15) die("cp.async: address not aligned to 16 bytes");
    if (!in_shared(dst, 16))
        die("cp.async: writes outside of shared memory (offset %ld)", (long)(dst - here().shared));
    if (ok) {
        if (!in_device_heap(src)) die("cp.async: source is not device memory");
        volatile char probe = (char)(((const char *)src)[0] ^ ((const char *)src)[15]);
        (void)probe; /* ASan and the guard pages judge the address when it is issued */
        race_touch(src, 16, false, pc);
    }
    race_touch(dst, 16, true, pc);
    memset(dst, 0xFF, 16);
    race_pending(dst, 16, 1);
    now.cur->copies.push_back({dst, (const char *)src, ok, now.cur->group});
}
void cp_async_commit() { now.cur->group++; }
void cp_async_wait(int newest) {
    void *pc = __builtin_return_address(0);
    std::vector<pending_copy> &q = now.cur->copies;
    size_t keep = 0;
    for (size_t k = 0; k < q.size(); k++) {
        pending_copy c = q[k];
        if (c.group >= now.cur->group - newest) {
            q[keep++] = c;
            continue;
        }
        race_pending(c.dst, 16, 0);
        if (c.ok)
            memcpy(c.dst, c.src, 16);
        else
            memset(c.dst, 0, 16);
        race_touch(c.dst, 16, true, pc);
    }
    q.resize(keep);
}

/* ---- ldmatrix, mma --------------------------------------------------------------------------- */

struct ldmatrix_slot {
    const char *row;
    uint32_t *r;
};
/* Matrix m's row i is at the address lane 8m+i gave; lane l gets elements (l/4, 2(l%4)) and the
 * next one, or with `transposed` (2(l%4), l/4) and the one below. */
template <bool TRANSPOSED> static void ldmatrix_combine(void **slot, uint32_t) {
    for (int m = 0; m < 4; m++) {
        for (int l = 0; l < WARP; l++) {
            uint16_t e[2];
            for (int h = 0; h < 2; h++) {
                int i = l / 4, j = l % 4 * 2 + h;
                if (TRANSPOSED) std::swap(i, j);
                memcpy(&e[h], ((ldmatrix_slot *)slot[m * 8 + i])->row + j * 2, 2);
            }
            ((ldmatrix_slot *)slot[l])->r[m] = e[0] | (uint32_t)e[1] << 16;
        }
    }
}
void ldmatrix_x4(uint32_t *r, const char *row, bool transposed) {
    ldmatrix_slot s = {row, r};
    if ((uintptr_t)row & 15) die("ldmatrix: row not aligned to 16 bytes");
    if (!in_shared(row, 16))
        die("ldmatrix: reads outside of shared memory (offset %ld)", (long)(row - here().shared));
    race_touch(row, 16, false, __builtin_return_address(0));
    if (transposed)
        collective(OP_LDMATRIX_T, ~0u, &s, ldmatrix_combine<true>);
    else
        collective(OP_LDMATRIX, ~0u, &s, ldmatrix_combine<false>);
}

/* n 16-bit numbers to float. A half's exponent and mantissa, shifted into place, give a float that
 * is 2^112 too small, subnormals included; infinity and NaN get their exponent. */
template <bool BF16> static void widen(float *f, const uint16_t *h, int n) {
    for (int i = 0; i < n; i++) {
        union {
            uint32_t u;
            float f;
        } v = {BF16 ? (uint32_t)h[i] << 16 : (uint32_t)(h[i] & 0x7fff) << 13};
        if (!BF16) {
            v.f *= 0x1p112f;
            v.u |= (h[i] & 0x7c00) == 0x7c00 ? 0x7f800000u : 0;
            v.u |= (uint32_t)(h[i] & 0x8000) << 16;
        }
        f[i] = v.f;
    }
}

void to_floats(float *f, const uint16_t *h, int n, bool bf16) {
    if (bf16)
        widen<true>(f, h, n);
    else
        widen<false>(f, h, n);
}

struct mma_slot {
    float *d;
    const uint32_t *a, *b;
};
/* D (16,8) += A (16,16) B (16,8), fragments as the PTX manual lays them out over the lanes. */
template <bool BF16> static void mma_combine(void **slot, uint32_t) {
    uint16_t a[16][16], b[16][8];
    float A[16][16], B[16][8], D[16][8];
    for (int l = 0; l < WARP; l++) {
        const mma_slot *x = (mma_slot *)slot[l];
        int g = l / 4, t = l % 4 * 2;
        for (int k = 0; k < 4; k++) memcpy(&a[g + (k & 1) * 8][t + (k >> 1) * 8], &x->a[k], 4);
        for (int k = 0; k < 2; k++) {
            b[t + k * 8][g] = (uint16_t)x->b[k];
            b[t + k * 8 + 1][g] = (uint16_t)(x->b[k] >> 16);
        }
        for (int k = 0; k < 4; k++) D[g + (k >> 1) * 8][t + (k & 1)] = x->d[k];
    }
    widen<BF16>(A[0], a[0], 256);
    widen<BF16>(B[0], b[0], 128);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) D[i][j] += A[i][k] * B[k][j];
    for (int l = 0; l < WARP; l++)
        for (int k = 0; k < 4; k++)
            ((mma_slot *)slot[l])->d[k] = D[l / 4 + (k >> 1) * 8][l % 4 * 2 + (k & 1)];
}
void mma_16816(float *d, const uint32_t *a, const uint32_t *b, bool bf16) {
    mma_slot s = {d, a, b};
    if (bf16)
        collective(OP_MMA_BF16, ~0u, &s, mma_combine<true>);
    else
        collective(OP_MMA_F16, ~0u, &s, mma_combine<false>);
}

/* ---- a cluster, a launch --------------------------------------------------------------------- */

char *fiber_stacks() {
    static char *stacks =
        (char *)mmap(nullptr, (size_t)MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) die("no memory for the fibers' stacks");
    return stacks;
}

static void fiber_main() {
#if defined(EMU_ASAN)
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!main_bottom) main_bottom = bottom, main_size = size;
#endif
    now.info.call(now.info.args.get());
    fiber *me = now.cur;
    warp &w = now.warps[me->warp];
    if (!me->copies.empty()) die("a thread exits with cp.async in flight");
    w.live &= ~(1u << me->lane);
    w.runnable &= ~(1u << me->lane);
    now.live--;
    here().live--;
    if (!w.live) hopper_exit();
    if (!here().live) hopper_leave();
    if (here().live && here().arrived == here().live) release_barrier(me->block);
    if (now.live && now.arrived == now.live) release_cluster();
    fiber *next = now.live ? pick() : nullptr;
    if (now.live && !next) deadlock();
    now.cur = next;
    if (next)
        go(&me->sp, nullptr, next->sp, next->stack, STACK_BYTES);
    else
        go(&me->sp, nullptr, main_sp, main_bottom, main_size);
    abort();
}

/* Of the blocks whose index and shared memory are set. */
static void run_cluster() {
    now.n_threads = now.live = now.n_blocks * now.block_threads;
    now.n_warps = (now.n_threads + WARP - 1) / WARP;
    now.serial++;
    now.epoch = 0;
    now.arrived = 0;
    for (int b = 0; b < now.n_blocks; b++) {
        now.blocks[b].live = now.block_threads;
        now.blocks[b].arrived = 0;
        now.blocks[b].epoch = 0;
        memset(now.blocks[b].shared, 0xFF, now.shared_bytes); /* NaN in every float format */
    }
    memset(now.at_barrier, 0, sizeof now.at_barrier);
    memset(now.at_cluster_barrier, 0, sizeof now.at_cluster_barrier);
    memset(now.warps, 0, sizeof now.warps);
#if defined(EMU_ASAN)
    __asan_unpoison_memory_region(fiber_stacks(), (size_t)now.n_threads * STACK_BYTES);
#endif
    for (int i = 0; i < now.n_threads; i++) {
        fiber &f = now.fibers[i];
        unsigned u = (unsigned)(i % now.block_threads);
        f.block = i / now.block_threads;
        f.linear = i;
        f.lane = i % WARP;
        f.warp = i / WARP;
        f.group = 0;
        f.fences = 0;
        f.fake_stack = nullptr;
        f.tid = uint3{u % now.bdim.x, u / now.bdim.x % now.bdim.y, u / (now.bdim.x * now.bdim.y)};
        f.stack = fiber_stacks() + (size_t)i * STACK_BYTES;
        /* Equal frames of neighbouring fibers must not fall into the same cache sets. */
        f.sp = first_frame(f.stack + STACK_BYTES - i % 64 * 1216, fiber_main);
        now.warps[f.warp].live |= 1u << f.lane;
    }
    for (int i = 0; i < now.n_warps; i++) {
        now.warps[i].runnable = now.warps[i].live;
        now.warps[i].priority = (int)(random_bits() % 1000);
    }
    hopper_start();
    now.cur = pick();
    go(&main_sp, &main_fake, now.cur->sp, now.cur->stack, STACK_BYTES);
    now.cur = nullptr;
    hopper_end();
}

/* Shared memory for the blocks of a cluster. Each ends where its own allocation ends, so that ASan
 * sees what goes beyond it. */
static void shared_alloc(char **raw) {
    for (int b = 0; b < now.n_blocks; b++) {
        raw[b] = (char *)malloc(now.shared_bytes + 1024);
        if (!raw[b]) die("no memory for shared memory");
        now.blocks[b].shared = (char *)(((uintptr_t)raw[b] + 1023) & ~(uintptr_t)1023);
#if defined(EMU_ASAN)
        __asan_poison_memory_region(raw[b], now.shared_bytes + 1024);
        __asan_unpoison_memory_region(now.blocks[b].shared, now.shared_bytes);
#endif
    }
}
static void shared_free(char **raw) {
    for (int b = 0; b < now.n_blocks; b++) {
#if defined(EMU_ASAN)
        __asan_unpoison_memory_region(raw[b], now.shared_bytes + 1024);
#endif
        free(raw[b]);
    }
    now.n_blocks = 0;
}

void run_launch(const launch_info &info) {
    dim3 g = info.grid, b = info.block;
    count.launches++;
    now.info = info;
    now.launch++;
    now.gdim = g;
    now.bdim = b;
    now.n_blocks = info.cluster;
    now.block_threads = (int)(b.x * b.y * b.z);
    now.shared_bytes = info.shared;
    char *raw[MAX_CLUSTER];
    shared_alloc(raw);
    const uint32_t size = (uint32_t)info.cluster, across = g.x / size;
    std::vector<uint32_t> order_of((size_t)across * g.y * g.z);
    size_t n = order_of.size();
    for (size_t i = 0; i < n; i++) order_of[i] = (uint32_t)i;
    if (order == REVERSE)
        for (size_t i = 0; i < n / 2; i++) std::swap(order_of[i], order_of[n - 1 - i]);
    if (order == RANDOM || order == PRIORITY)
        for (size_t i = n; i > 1; i--) std::swap(order_of[i - 1], order_of[random_bits() % i]);
    for (uint32_t i : order_of) {
        for (uint32_t k = 0; k < size; k++)
            now.blocks[k].index =
                uint3{i % across * size + k, i / across % g.y, i / (across * g.y)};
        run_cluster();
    }
    shared_free(raw);
    now.shared_bytes = 0;
}

} // namespace emu
