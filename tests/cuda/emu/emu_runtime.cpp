/* emu_runtime.cpp - the part of the CUDA runtime that qemb calls: memory, streams, events, graphs,
 * device queries, launches. These are definitions of the library's own functions: the program links
 * against this file instead of libcudart.
 *
 * Device memory is inaccessible to host code (mprotect) except while stream work runs, so a host
 * dereference of a device pointer dies as it would with a GPU. Asynchronous copies demand pinned
 * memory.
 */
#include "emu_internal.h"

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#if defined(EMU_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace emu {

static device from_environment() {
    device d = {1, 9,     0, 4,  (size_t)8 << 30, 227 << 10, true, true, cudaSuccess,
                0, false, 0, -1, false};
    const char *s = getenv("QEMB_EMU");
    char name[32];
    long value;
    for (int n = 0; s && sscanf(s, " %31[a-z_]=%ld%n", name, &value, &n) == 2; s += n) {
        const std::string key = name;
        if (key == "count") d.count = (int)std::min(value, (long)MAX_GPUS);
        if (key == "driver") d.driver = value != 0;
        if (key == "image") d.image = value != 0;
        if (key == "major") d.major = (int)value;
        if (key == "minor") d.minor = (int)value;
        if (key == "memory") d.memory = (size_t)value << 20;
        if (key == "fault_after") d.fault_after = value;
        if (key == "fault_device") d.fault_device = (int)value;
        if (key == "report") d.report = value != 0;
    }
    return d;
}
device dev = from_environment();

static struct reporter {
    ~reporter() {
        for (int i = 0; dev.report && i < dev.count; i++)
            fprintf(stderr, "emulated: device %d: %ld launches\n", i, count.launches_on[i]);
    }
} at_exit;

/* ---- threads and devices --------------------------------------------------------------------- */

std::recursive_mutex api_lock;
struct locked {
    std::lock_guard<std::recursive_mutex> held{api_lock};
};

static thread_local int current;
static thread_local cudaError_t last_error;
static cudaError_t fail(cudaError_t e) { return last_error = e; }

int current_device() { return current; }
static bool fails(int device) { return dev.fault_device < 0 || dev.fault_device == device; }
bool device_failed() { return dev.fault != cudaSuccess && fails(current); }
static cudaError_t device_state() { return device_failed() ? fail(dev.fault) : cudaSuccess; }

/* ---- the device heap ------------------------------------------------------------------------- */

enum : size_t { HEAP_BYTES = (size_t)64 << 30, PAGE = 4096 };

struct allocation {
    char *base;   /* pages */
    size_t pages; /* bytes of them */
    char *user;
    size_t bytes;
    int device;
};
static char *heap, *heap_top;
static std::vector<allocation> live_blocks, free_blocks;
static size_t heap_used[MAX_GPUS];
static int heap_opened, opened_device; /* how often; the memory of which device */

/* The device whose memory has p, or -1. */
static int owner_of(const void *p) {
    for (const allocation &a : live_blocks)
        if ((char *)p >= a.base && (char *)p < a.base + a.pages) return a.device;
    return -1;
}
/* p is host memory or of the current device. */
static void need_own(const void *p, const char *what) {
    const int owner = owner_of(p);
    if (owner >= 0 && owner != current)
        die("%s: memory of device %d while device %d is current", what, owner, current);
}

static void on_fault(int, siginfo_t *info, void *) {
    const int owner = owner_of(info->si_addr);
    if (heap_opened && owner >= 0 && owner != opened_device)
        die("work of device %d touches memory of device %d at %p", opened_device, owner,
            info->si_addr);
    if (in_device_heap(info->si_addr))
        die(now.cur ? "a kernel touches device memory at %p, which is not allocated"
                    : "host code touches device memory at %p",
            info->si_addr);
    signal(SIGSEGV, SIG_DFL);
    raise(SIGSEGV);
}

static void heap_start() {
    if (heap) return;
    heap = (char *)mmap(nullptr, HEAP_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                        -1, 0);
    if (heap == MAP_FAILED) die("no address space for the device heap");
    heap_top = heap;
#if !defined(EMU_ASAN)
    struct sigaction sa = {};
    sa.sa_sigaction = on_fault;
    sa.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &sa, nullptr);
#else
    (void)on_fault;
#endif
}

bool in_device_heap(const void *p) {
    return heap && (char *)p >= heap && (char *)p < heap + HEAP_BYTES;
}

static void heap_access(int prot) {
    for (const allocation &a : live_blocks)
        if (a.device == opened_device && mprotect(a.base, a.pages, prot)) die("mprotect failed");
}
/* Makes the memory of the current device accessible. */
struct heap_open {
    heap_open() {
        if (heap_opened++) return;
        opened_device = current;
        heap_access(PROT_READ | PROT_WRITE);
    }
    ~heap_open() {
        if (!--heap_opened) heap_access(PROT_NONE);
    }
};

static char *heap_alloc(size_t bytes) {
    heap_start();
    size_t pages = (bytes + PAGE - 1) / PAGE * PAGE + PAGE; /* and one that stays inaccessible */
    allocation a = {};
    for (size_t i = 0; i < free_blocks.size(); i++)
        if (free_blocks[i].pages == pages - PAGE) {
            a = free_blocks[i];
            free_blocks.erase(free_blocks.begin() + (long)i);
            break;
        }
    if (!a.base) {
        if (heap_top + pages > heap + HEAP_BYTES) die("the device heap's address space is used up");
        a.base = heap_top;
        heap_top += pages;
    }
    a.pages = pages - PAGE;
    a.bytes = bytes;
    a.device = current;
    /* The block ends as near to the inaccessible page as cudaMalloc's alignment of 256 allows. */
    a.user = a.base + (a.pages - bytes) / 256 * 256;
    live_blocks.push_back(a);
    heap_used[current] += a.pages;
    {
        heap_open access;
        if (mprotect(a.base, a.pages, PROT_READ | PROT_WRITE)) die("mprotect failed");
#if defined(EMU_ASAN)
        __asan_unpoison_memory_region(a.base, a.pages);
#endif
        if (bytes <= (size_t)4 << 20)
            memset(a.base, 0xFF, a.pages); /* NaN; workspaces go without */
#if defined(EMU_ASAN)
        __asan_poison_memory_region(a.base, a.pages);
        __asan_unpoison_memory_region(a.user, bytes);
#endif
    }
    return a.user;
}

static void heap_free(char *p) {
    for (size_t i = 0; i < live_blocks.size(); i++) {
        if (live_blocks[i].user != p) continue;
        allocation a = live_blocks[i];
        madvise(a.base, a.pages, MADV_DONTNEED);
        if (mprotect(a.base, a.pages, PROT_NONE)) die("mprotect failed");
        heap_used[a.device] -= a.pages;
        free_blocks.push_back(a);
        live_blocks.erase(live_blocks.begin() + (long)i);
        return;
    }
    die("cudaFree of %p, which cudaMalloc did not give", (void *)p);
}

/* ---- pinned memory --------------------------------------------------------------------------- */

static std::map<char *, size_t> pinned;

static void need_pinned(const void *p, size_t n, const char *what) {
    auto it = pinned.upper_bound((char *)p);
    if (it != pinned.begin()) {
        --it;
        if ((char *)p >= it->first && (char *)p + n <= it->first + it->second) return;
    }
    die("cudaMemcpyAsync: the %s is neither device nor pinned memory", what);
}

/* ---- streams, events, graphs ----------------------------------------------------------------- */

struct graph {
    std::vector<std::function<void()>> work;
};
struct stream {
    int device = current;
    std::deque<std::function<void()>> queue;
    uint64_t submitted = 0, done = 0;
    graph *capture = nullptr;
};
struct event {
    int device = current;
    stream *st = nullptr;
    uint64_t at = 0;
    double clock = 0;
};
static std::vector<stream *> streams;
static stream null_streams[MAX_GPUS];
double clock_ms; /* a device clock that advances with the work done */

static stream *null_stream() {
    null_streams[current].device = current;
    return &null_streams[current];
}
static stream *of(cudaStream_t st) {
    stream *s = st ? (stream *)st : null_stream();
    if (s->device != current)
        die("a stream of device %d while device %d is current", s->device, current);
    return s;
}
static event *of(cudaEvent_t e) {
    event *v = (event *)e;
    if (v->device != current)
        die("an event of device %d while device %d is current", v->device, current);
    return v;
}

static void drain(stream *s, uint64_t until) {
    if (s->queue.empty() || s->done >= until) return;
    heap_open access;
    while (!s->queue.empty() && s->done < until) {
        std::function<void()> f = std::move(s->queue.front());
        s->queue.pop_front();
        s->done++;
        clock_ms += 0.001;
        f();
    }
}
/* The legacy stream. The program's streams are non-blocking: neither kind waits for the other. */
static void drain_legacy() { drain(null_stream(), null_stream()->submitted); }
static void push(stream *s, std::function<void()> f) {
    s->queue.push_back(std::move(f));
    s->submitted++;
    if (current_schedule() == IN_ORDER) drain(s, s->submitted);
}
cudaError_t submit(cudaStream_t st, std::function<void()> f) {
    locked api;
    stream *s = of(st);
    if (s->capture)
        s->capture->work.push_back(std::move(f));
    else
        push(s, std::move(f));
    return cudaSuccess;
}

static std::map<const void *, size_t> shared_limits[MAX_GPUS];

cudaError_t submit_launch(cudaStream_t st, const launch_info &info) {
    locked api;
    if (dev.fault_after && fails(current) && !--dev.fault_after)
        dev.fault = cudaErrorIllegalAddress;
    if (device_failed()) return device_state();
    if (dev.capture_fault == 2 && of(st)->capture) return fail(cudaErrorStreamCaptureUnsupported);
    dim3 g = info.grid, b = info.block;
    std::map<const void *, size_t> &limits = shared_limits[current];
    size_t limit = limits.count(info.kernel) ? limits[info.kernel] : 48 << 10;
    if (info.shared > limit || (size_t)b.x * b.y * b.z > MAX_THREADS || !b.x || !b.y || !b.z ||
        !g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535 ||
        info.cluster < 1 || info.cluster > MAX_CLUSTER || g.x % (unsigned)info.cluster)
        return fail(cudaErrorInvalidValue);
    if (info.cluster > 1 &&
        (b.x * b.y * b.z % WARP || b.x * b.y * b.z * info.cluster > MAX_THREADS))
        die("a cluster of partial warps, or of more threads than the emulator has");
    return submit(st, [info, on = current] {
        count.launches_on[on]++;
        run_launch(info);
    });
}

static cudaError_t copy(void *dst, const void *src, size_t n) {
    count.copies++;
    memcpy(dst, src, n);
    return cudaSuccess;
}

} // namespace emu

using namespace emu;

extern "C" {

cudaError_t cudaMalloc(void **p, size_t n) {
    locked api;
    if (heap_used[current] + n > dev.memory) return fail(cudaErrorMemoryAllocation);
    count.allocations++;
    *p = heap_alloc(n);
    return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
    locked api;
    cudaDeviceSynchronize();
    need_own(p, "cudaFree");
    if (p) heap_free((char *)p);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned) {
    locked api;
    char *q = (char *)aligned_alloc(PAGE, (n + PAGE - 1) / PAGE * PAGE);
    if (!q) return fail(cudaErrorMemoryAllocation);
    count.allocations++;
    pinned[q] = n;
    *p = q;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p) {
    locked api;
    cudaDeviceSynchronize();
    if (p) pinned.erase((char *)p);
    free(p);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *dst, const void *src, size_t n, cudaMemcpyKind) {
    locked api;
    drain_legacy();
    if (device_failed()) return device_state();
    heap_open access;
    return copy(dst, src, n);
}
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t n, cudaMemcpyKind, cudaStream_t st) {
    locked api;
    if (device_failed()) return device_state();
    need_own(dst, "cudaMemcpyAsync");
    need_own(src, "cudaMemcpyAsync");
    if (!in_device_heap(dst)) need_pinned(dst, n, "destination");
    if (!in_device_heap(src)) need_pinned(src, n, "source");
    return submit(st, [=] { copy(dst, src, n); });
}
cudaError_t cudaMemset(void *dst, int v, size_t n) { return cudaMemsetAsync(dst, v, n, nullptr); }
cudaError_t cudaMemsetAsync(void *dst, int v, size_t n, cudaStream_t st) {
    locked api;
    if (device_failed()) return device_state();
    return submit(st, [=] { memset(dst, v, n); });
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    locked api;
    *total = dev.memory;
    *free_bytes = dev.memory - std::min(heap_used[current], dev.memory);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *st, unsigned) {
    locked api;
    streams.push_back(new stream);
    *st = (cudaStream_t)streams.back();
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t st) {
    locked api;
    cudaStreamSynchronize(st);
    streams.erase(std::find(streams.begin(), streams.end(), of(st)));
    delete of(st);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t st) {
    locked api;
    if (of(st)->capture) return fail(cudaErrorStreamCaptureUnsupported);
    drain(of(st), of(st)->submitted);
    return device_state();
}
cudaError_t cudaDeviceSynchronize() {
    locked api;
    for (stream *s : streams)
        if (s->device == current) drain(s, s->submitted);
    drain_legacy(); /* last: whoever needs its work before a stream's must have waited for it */
    return device_state();
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    locked api;
    *e = (cudaEvent_t) new event;
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    locked api;
    cudaDeviceSynchronize();
    delete of(e);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t st) {
    locked api;
    event *v = of(e);
    v->st = of(st);
    v->at = v->st->submitted + 1;
    push(v->st, [v] { v->clock = clock_ms; });
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    locked api;
    event *v = of(e);
    if (v->st) drain(v->st, v->at);
    return device_state();
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    locked api;
    *ms = (float)(of(b)->clock - of(a)->clock);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t st, cudaStreamCaptureMode) {
    locked api;
    if (dev.capture_fault == 1) return fail(cudaErrorStreamCaptureUnsupported);
    of(st)->capture = new graph;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t st, cudaGraph_t *g) {
    locked api;
    *g = (cudaGraph_t)of(st)->capture;
    of(st)->capture = nullptr;
    if (dev.capture_fault == 3) {
        delete (graph *)*g;
        *g = nullptr;
        return fail(cudaErrorStreamCaptureInvalidated);
    }
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long) {
    locked api;
    if (dev.capture_fault == 4) return fail(cudaErrorMemoryAllocation);
    *x = (cudaGraphExec_t) new graph(*(graph *)g);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t st) {
    locked api;
    if (device_failed()) return device_state();
    count.graph_launches++;
    for (auto &f : ((graph *)x)->work) submit(st, f);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) {
    locked api;
    delete (graph *)g;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x) {
    locked api;
    cudaDeviceSynchronize();
    delete (graph *)x;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *n) {
    *n = dev.count;
    if (!dev.driver) return fail(cudaErrorInsufficientDriver);
    return dev.count ? cudaSuccess : fail(cudaErrorNoDevice);
}
static bool no_device(int device) { return device < 0 || device >= dev.count; }
cudaError_t cudaSetDevice(int device) {
    if (no_device(device)) return fail(cudaErrorInvalidDevice);
    current = device;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int device) {
    if (no_device(device)) return fail(cudaErrorInvalidDevice);
    switch (a) {
    case cudaDevAttrComputeCapabilityMajor:
        *v = dev.major;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *v = dev.minor;
        break;
    case cudaDevAttrMultiProcessorCount:
        *v = dev.sms;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *v = (int)dev.shared_optin;
        break;
    case cudaDevAttrL2CacheSize:
        *v = 256 << 10;
        break;
    default:
        die("device attribute %d is not modelled", (int)a);
    }
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    if (no_device(device)) return fail(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "emulated GPU");
    p->major = dev.major;
    p->minor = dev.minor;
    p->multiProcessorCount = dev.sms;
    p->totalGlobalMem = dev.memory;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *v) {
    *v = dev.driver ? CUDART_VERSION : 0;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *v) {
    *v = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *f, cudaFuncAttribute a, int v) {
    if (a != cudaFuncAttributeMaxDynamicSharedMemorySize)
        die("function attribute %d is not modelled", (int)a);
    if ((size_t)v > dev.shared_optin) return fail(cudaErrorInvalidValue);
    locked api;
    shared_limits[current][f] = (size_t)v;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
    memset(a, 0, sizeof *a);
    return dev.image ? cudaSuccess : fail(cudaErrorNoKernelImageForDevice);
}
const char *cudaGetErrorString(cudaError_t e) {
    switch (e) {
    case cudaSuccess:
        return "no error";
    case cudaErrorMemoryAllocation:
        return "out of memory";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
        return "no CUDA-capable device is detected";
    case cudaErrorNoKernelImageForDevice:
        return "no kernel image is available for execution on the device";
    case cudaErrorInvalidValue:
        return "invalid argument";
    case cudaErrorInvalidDevice:
        return "invalid device ordinal";
    default:
        return "emulated error";
    }
}
cudaError_t cudaGetLastError() {
    cudaError_t e = last_error;
    last_error = cudaSuccess;
    return e;
}

} // extern "C"
