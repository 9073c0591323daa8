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
    device d = {1, 9, 0, 4, (size_t)8 << 30, 227 << 10, true, true, cudaSuccess, 0, false, 0};
    const char *s = getenv("QEMB_EMU");
    char name[32];
    long value;
    for (int n = 0; s && sscanf(s, " %31[a-z_]=%ld%n", name, &value, &n) == 2; s += n) {
        const std::string key = name;
        if (key == "count") d.count = (int)value;
        if (key == "driver") d.driver = value != 0;
        if (key == "image") d.image = value != 0;
        if (key == "major") d.major = (int)value;
        if (key == "minor") d.minor = (int)value;
        if (key == "memory") d.memory = (size_t)value << 20;
        if (key == "fault_after") d.fault_after = value;
    }
    return d;
}
device dev = from_environment();

/* ---- the device heap ------------------------------------------------------------------------- */

enum : size_t { HEAP_BYTES = (size_t)64 << 30, PAGE = 4096 };

struct allocation {
    char *base;   /* pages */
    size_t pages; /* bytes of them */
    char *user;
    size_t bytes;
};
static char *heap, *heap_top;
static std::vector<allocation> live_blocks, free_blocks;
static size_t heap_used;
static int heap_opened;

static void on_fault(int, siginfo_t *info, void *) {
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
        if (mprotect(a.base, a.pages, prot)) die("mprotect failed");
}
struct heap_open {
    heap_open() {
        if (!heap_opened++) heap_access(PROT_READ | PROT_WRITE);
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
    /* The block ends as near to the inaccessible page as cudaMalloc's alignment of 256 allows. */
    a.user = a.base + (a.pages - bytes) / 256 * 256;
    live_blocks.push_back(a);
    heap_used += a.pages;
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
        heap_used -= a.pages;
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
    std::deque<std::function<void()>> queue;
    uint64_t submitted = 0, done = 0;
    graph *capture = nullptr;
};
struct event {
    stream *st = nullptr;
    uint64_t at = 0;
    double clock = 0;
};
static std::vector<stream *> streams;
static stream null_stream;
double clock_ms; /* a device clock that advances with the work done */

static stream *of(cudaStream_t st) { return st ? (stream *)st : &null_stream; }

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
static void push(stream *s, std::function<void()> f) {
    s->queue.push_back(std::move(f));
    s->submitted++;
    if (current_schedule() == IN_ORDER) drain(s, s->submitted);
}
cudaError_t submit(cudaStream_t st, std::function<void()> f) {
    stream *s = of(st);
    if (s->capture)
        s->capture->work.push_back(std::move(f));
    else
        push(s, std::move(f));
    return cudaSuccess;
}

static std::map<const void *, size_t> shared_limit;
static cudaError_t last_error;
static cudaError_t fail(cudaError_t e) { return last_error = e; }

cudaError_t submit_launch(cudaStream_t st, const launch_info &info) {
    if (dev.fault_after && !--dev.fault_after) dev.fault = cudaErrorIllegalAddress;
    if (dev.fault != cudaSuccess) return fail(dev.fault);
    if (dev.capture_fault == 2 && of(st)->capture) return fail(cudaErrorStreamCaptureUnsupported);
    dim3 g = info.grid, b = info.block;
    size_t limit = shared_limit.count(info.kernel) ? shared_limit[info.kernel] : 48 << 10;
    if (info.shared > limit || (size_t)b.x * b.y * b.z > MAX_THREADS || !b.x || !b.y || !b.z ||
        !g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
        return fail(cudaErrorInvalidValue);
    return submit(st, [info] { run_launch(info); });
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
    if (heap_used + n > dev.memory) return fail(cudaErrorMemoryAllocation);
    count.allocations++;
    *p = heap_alloc(n);
    return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
    cudaDeviceSynchronize();
    if (p) heap_free((char *)p);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned) {
    char *q = (char *)aligned_alloc(PAGE, (n + PAGE - 1) / PAGE * PAGE);
    if (!q) return fail(cudaErrorMemoryAllocation);
    count.allocations++;
    pinned[q] = n;
    *p = q;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p) {
    cudaDeviceSynchronize();
    if (p) pinned.erase((char *)p);
    free(p);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *dst, const void *src, size_t n, cudaMemcpyKind) {
    cudaDeviceSynchronize();
    if (dev.fault != cudaSuccess) return fail(dev.fault);
    heap_open access;
    return copy(dst, src, n);
}
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t n, cudaMemcpyKind, cudaStream_t st) {
    if (dev.fault != cudaSuccess) return fail(dev.fault);
    if (!in_device_heap(dst)) need_pinned(dst, n, "destination");
    if (!in_device_heap(src)) need_pinned(src, n, "source");
    return submit(st, [=] { copy(dst, src, n); });
}
cudaError_t cudaMemset(void *dst, int v, size_t n) {
    cudaDeviceSynchronize();
    heap_open access;
    memset(dst, v, n);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *dst, int v, size_t n, cudaStream_t st) {
    if (dev.fault != cudaSuccess) return fail(dev.fault);
    return submit(st, [=] { memset(dst, v, n); });
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = dev.memory;
    *free_bytes = dev.memory - std::min(heap_used, dev.memory);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *st, unsigned) {
    streams.push_back(new stream);
    *st = (cudaStream_t)streams.back();
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t st) {
    cudaStreamSynchronize(st);
    streams.erase(std::find(streams.begin(), streams.end(), of(st)));
    delete of(st);
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t st) {
    if (of(st)->capture) return fail(cudaErrorStreamCaptureUnsupported);
    drain(of(st), of(st)->submitted);
    return dev.fault == cudaSuccess ? cudaSuccess : fail(dev.fault);
}
cudaError_t cudaDeviceSynchronize() {
    drain(&null_stream, null_stream.submitted);
    for (stream *s : streams) drain(s, s->submitted);
    return dev.fault == cudaSuccess ? cudaSuccess : fail(dev.fault);
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) {
    *e = (cudaEvent_t) new event;
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    cudaDeviceSynchronize();
    delete (event *)e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t st) {
    event *v = (event *)e;
    v->st = of(st);
    v->at = v->st->submitted + 1;
    push(v->st, [v] { v->clock = clock_ms; });
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    event *v = (event *)e;
    if (v->st) drain(v->st, v->at);
    return dev.fault == cudaSuccess ? cudaSuccess : fail(dev.fault);
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    *ms = (float)(((event *)b)->clock - ((event *)a)->clock);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t st, cudaStreamCaptureMode) {
    if (dev.capture_fault == 1) return fail(cudaErrorStreamCaptureUnsupported);
    of(st)->capture = new graph;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t st, cudaGraph_t *g) {
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
    if (dev.capture_fault == 4) return fail(cudaErrorMemoryAllocation);
    *x = (cudaGraphExec_t) new graph(*(graph *)g);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t st) {
    if (dev.fault != cudaSuccess) return fail(dev.fault);
    count.graph_launches++;
    for (auto &f : ((graph *)x)->work) submit(st, f);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) {
    delete (graph *)g;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x) {
    cudaDeviceSynchronize();
    delete (graph *)x;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *n) {
    *n = dev.count;
    if (!dev.driver) return fail(cudaErrorInsufficientDriver);
    return dev.count ? cudaSuccess : fail(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int) {
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
    default:
        die("device attribute %d is not modelled", (int)a);
    }
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
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
    shared_limit[f] = (size_t)v;
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
