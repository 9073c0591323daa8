/* qemb.cu - the CUDA backend: one more table of ops. The kernels are in kernels.cuh and attention.cuh,
 * the matrix products in gemm.cuh; here are the device's memory, the way of a batch to it and back, and
 * the launches. One stream; host and device meet in the two staging slots and in pool.
 */
#include "backends/cuda/qemb_cuda.h"

#include "backends/cuda/attention.cuh"
#include "backends/cuda/quantize.cuh"
#include "backends/cuda/gemm.cuh"
#include "backends/cuda/hopper.cuh"
#include "backends/cuda/kernels.cuh"

#include <algorithm>
#include <cassert>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

typedef __half act; /* what a qemb_act is here */

enum { SLOTS = 2 };
constexpr size_t SLOT_BYTES = (size_t)8 << 20;
/* Rows that the MLP works on at a time: enough to fill the GPU with tiles of the down projection (4B:
 * 32 x 20 of 128 x 128), little enough beside the weights. */
enum { MLP_ROWS = 4096 };
enum { WIDE_FROM = 512 }; /* texts of that many tokens get 128-row attention tiles */
enum {
    GATE_UP_FROM = 256
}; /* Hopper's gate_up multiplies 128 rows at a time; fewer leave it idle */
enum { BLOCKS_PER_SM = 8 }; /* of grid-stride kernels */
constexpr double MIB = 1 << 20;

/* Small batches run as CUDA graphs: 400 launches (4B) cost the host about as long as a short text costs
 * the GPU. A graph's sizes are fixed, so the engine fills a batch up to one of these numbers of rows (pad_rows)
 * and each (rows, texts) has a graph of its own: a server of single queries lives on a dozen. Longer
 * batches keep the GPU busy for longer than their launches take, and rounding them up would cost more. */
constexpr int GRAPH_ROWS[] = {16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024};
enum { GRAPH_SIZES = 13, GRAPH_TEXTS = 5 }; /* texts: four, and the one that fills up */

/* Pinned host memory and device memory of the same size: everything that crosses passes through. */
struct staging {
    char *host, *dev;
    cudaEvent_t free; /* recorded after the last device work that uses the slot */
};

/* A batch on the device; one upload brings it all. Offsets depend on the capacities alone. */
struct batch_view {
    int *pos, *slot; /* (T)  position; which distinct table row */
    int *last;       /* (B)  row of each text's last token */
    att_tile *tiles; /* 64-row tiles, then 128-row tiles, then one tile per text's last token */
};

struct batch_graph {
    int seen; /* batches of this class: the first runs plainly and loads what it needs */
    cudaGraphExec_t exec;
};
enum graph_mode { PLAIN, RECORD, REPLAY };

/* Device memory, part by part. */
struct device_sizes {
    size_t staging, lists, workspace, counter, rope, weights;
    size_t dense[2]; /* INT8 files in FP16: a dequantized wgu, and any other matrix */
    size_t codes;    /* FP8: rows of attention output */
};

struct qemb_backend {
    const qemb_config *c;
    cudaStream_t st;
    char failure[160];    /* the first one; empty: none */
    int sms, threads, lg; /* H/K = 1 << lg */
    bool wide;            /* 128-row attention tiles fit this GPU */
    bool fp8;
    hopper_state hopper;
    void (*on_layer_loaded)(int layers, int of); /* the options' */
    gemm_state gemm;
    size_t used, budget;      /* device bytes allocated; allowed (0: all there is) */
    void *device[QEMB_PARTS]; /* what close frees */
    int n_device;
    char *cache_path;  /* of the timed algorithms; NULL: none */
    qemb_mat timed[4]; /* weights to time with, a layer's */
    float2 *rope;      /* (max_tokens, hd/2) cos, sin */
    unsigned long long *clamps, n_clamped;
    staging slots[SLOTS];
    char *batch_host, *batch_dev; /* a batch_view's memory, pinned and on the device */
    cudaEvent_t batch_free;
    int max_rows;
    batch_view dev; /* the batch that computes */
    int n_narrow, n_wide, n_unique;
    int32_t *unique;  /* (max_rows) distinct tokens of the batch, in order of appearance */
    int32_t *slot_of; /* (V) their index, valid where unique agrees */
    att_tile *narrow, *wide_tiles; /* (2 max_rows + 1) tiles being listed */

    act *dense[2];           /* INT8: see device_sizes */
    const void *dense_of[2]; /* whose numbers are in there now */
    uint8_t *codes;          /* FP8: attention output of a matmul_add */
    const qemb_act *coded;   /* FP8: the buffer that gate_up filled with codes */

    bool graphs_off;
    enum graph_mode mode;
    batch_graph *graph; /* of the batch that computes, if its class has one */
    batch_graph graphs[GRAPH_SIZES][GRAPH_TEXTS + 1];
};

/* ---- failures --------------------------------------------------------------------------------- */

static void note_failure(qemb_backend *be, const char *op, const char *why) {
    if (!be->failure[0]) snprintf(be->failure, sizeof be->failure, "GPU: %s failed (%s)", op, why);
}
static bool good(qemb_backend *be, cudaError_t e, const char *op) {
    if (e != cudaSuccess) note_failure(be, op, cudaGetErrorString(e));
    return e == cudaSuccess;
}
static void cuda_health(const qemb_backend *be, qemb_health *h) {
    h->clamped += be->n_clamped;
    h->failure = be->failure[0] ? be->failure : nullptr;
}

/* Rows that a batch is filled up to: a graph's, later a multiple of 16, which FP8 products want. */
static int pad_rows(int T) {
    for (int rows : GRAPH_ROWS)
        if (T <= rows) return rows;
    return (T + 15) / 16 * 16;
}

/* ---- memory ----------------------------------------------------------------------------------- */

static void *device_alloc(qemb_backend *be, size_t bytes, const char *what, qemb_err *err) {
    size_t left = 0, total = 0;
    void *p = nullptr;
    assert(be->n_device < (int)(sizeof be->device / sizeof *be->device));
    cudaMemGetInfo(&left, &total);
    if (be->budget) left = std::min(left, be->budget - std::min(be->used, be->budget));
    if (bytes > left || cudaMalloc(&p, bytes) != cudaSuccess) {
        cudaGetLastError(); /* reported here, not by the next launch */
        qemb_fail(
            err, "device",
            "GPU memory: not enough for %s (got %.0f MiB left, want %.0f MiB); qemb-cuda plan "
            "lists it all",
            what, floor((double)left / MIB), ceil((double)bytes / MIB));
        return nullptr;
    }
    be->used += bytes;
    return be->device[be->n_device++] = p;
}

static int pinned_alloc(void **p, size_t bytes, qemb_err *err) {
    if (cudaHostAlloc(p, bytes, cudaHostAllocDefault) == cudaSuccess) return 0;
    cudaGetLastError();
    return qemb_fail(err, "out_of_memory", "pinned memory: cannot get %.0f MiB",
                     ceil((double)bytes / MIB));
}

/* Copies host memory of any kind to the device through the slots. Complete when the stream is. */
static bool upload(qemb_backend *be, void *dst, const void *src, size_t bytes, int *turn) {
    bool ok = true;
    for (size_t at = 0; at < bytes && ok; at += SLOT_BYTES, ++*turn) {
        staging *s = &be->slots[*turn % SLOTS];
        const size_t n = std::min(SLOT_BYTES, bytes - at);
        ok = good(be, cudaEventSynchronize(s->free),
                  "upload"); /* slot_upload: the last copy from it */
        if (ok) memcpy(s->host, (const char *)src + at, n);
        ok = ok &&
             good(be, cudaMemcpyAsync((char *)dst + at, s->host, n, cudaMemcpyHostToDevice, be->st),
                  "upload");
        ok = ok && good(be, cudaEventRecord(s->free, be->st), "upload");
    }
    return ok;
}

static size_t align256(size_t n) { return (n + 255) / 256 * 256; }

/* Where the parts of a batch of up to T rows and B texts lie; returns its bytes. */
static size_t view_batch(batch_view *v, char *base, size_t T, size_t B, size_t tiles) {
    const size_t ints = align256((2 * T + B) * sizeof(int));
    if (v) {
        v->pos = (int *)base;
        v->slot = v->pos + T;
        v->last = v->slot + T;
        v->tiles = (att_tile *)(base + ints);
    }
    return ints + tiles * sizeof(att_tile);
}

/* Of m's scales on the device: e4m3's, a row's each, or INT8's own. */
static size_t scale_bytes(const qemb_mat *m, bool fp8) {
    const size_t groups = fp8 ? 1 : m->dtype == QEMB_I8 ? QEMB_GROUPS(m->cols) : 0;
    return m->rows * groups * sizeof(float);
}

/* What the backend will take for layers like y (NULL: not told yet, nothing for them). */
static device_sizes size_parts(const qemb_config *c, const qemb_options *opt, const qemb_layer *y,
                               bool fp8) {
    const size_t R = (size_t)pad_rows(std::max(opt->batch_tokens, opt->max_tokens));
    const size_t D = (size_t)c->hidden, hd = (size_t)c->head_dim, Q = c->n_heads * hd;
    device_sizes s = {};
    s.staging = SLOTS * SLOT_BYTES;
    s.lists = view_batch(nullptr, nullptr, R, R, 5 * R + 2);
    s.workspace = GEMM_WORKSPACE;
    s.counter = sizeof(unsigned long long);
    s.rope = (size_t)opt->max_tokens * (hd / 2) * sizeof(float2);
    if (fp8) s.codes = R * Q + R * sizeof(float);
    if (!y) return s;
    size_t layer = 2 * (align256(D * sizeof(float)) + align256(hd * sizeof(float)));
    for (const qemb_mat *m : {&y->wqkv, &y->wo, &y->wgu, &y->wdown}) {
        const size_t n = (size_t)m->rows * m->cols;
        const bool bytes = fp8 || m->dtype == QEMB_I8;
        layer += align256(bytes ? n : n * sizeof(act)) + align256(scale_bytes(m, fp8));
        if (!fp8 && bytes) {
            size_t *dense = &s.dense[m != &y->wgu];
            *dense = std::max(*dense, n * sizeof(act));
        }
    }
    s.weights = c->n_layers * layer + align256(D * sizeof(float));
    return s;
}

/* Nodes of a graph, at a guess of 1 KiB each: the driver's memory, taken when a graph is first needed. */
static size_t graph_bytes(const qemb_config *c, bool eight) {
    return (size_t)GRAPH_SIZES * GRAPH_TEXTS * c->n_layers * (eight ? 14 : 10) << 10;
}

static int plan(qemb_part *p, const qemb_file *f, const qemb_options *opt, size_t arena, bool fp8) {
    const qemb_layer *y = &f->weights.layers[0];
    const device_sizes s = size_parts(&f->config, opt, y, fp8);
    const bool eight = fp8 || y->wqkv.dtype == QEMB_I8;
    const qemb_part all[] = {
        {fp8     ? "weights of the layers, e4m3 with a scale per row"
         : eight ? "weights of the layers, int8 with a scale per 64 of a row"
                 : "weights of the layers, FP16",
         s.weights},
        {"a layer's matrices in FP16, made from int8 before each product", s.dense[0] + s.dense[1]},
        {"activations", arena},
        {"rows of attention output as e4m3", s.codes},
        {"cuBLASLt's workspace", s.workspace},
        {"transfers, as much again pinned in main memory", s.staging},
        {"a batch's lists, as much again pinned in main memory", s.lists + s.counter},
        {"the rope table", s.rope},
        {"CUDA graphs, at most (an estimate; taken when first used)",
         opt->no_graphs ? 0 : graph_bytes(&f->config, eight)}};
    int n = 0;
    for (const qemb_part &part : all)
        if (part.bytes) p[n++] = part;
    return n;
}

/* ---- open, close ------------------------------------------------------------------------------ */

static int check_config(const qemb_config *c, bool fp8, qemb_err *err) {
    const int G = c->n_heads / c->n_kv_heads;
    if (c->head_dim != 64 && c->head_dim != 128)
        return qemb_fail(err, "device",
                         "GPU kernels: head size not supported (got %d, want 64 or 128)",
                         c->head_dim);
    if ((G & (G - 1)) || G > 64)
        return qemb_fail(
            err, "device",
            "GPU kernels: query heads per key head not supported (got %d, want a power of "
            "two up to 64)",
            G);
    if (fp8 && (c->hidden % 16 || c->ffn % 16 || c->ffn > 8 * 8 * ROW_THREADS))
        return qemb_fail(err, "device",
                         "FP8 products: sizes not supported (got hidden %d, ffn %d, want multiples "
                         "of 16 and ffn up to %d)",
                         c->hidden, c->ffn, 8 * 8 * ROW_THREADS);
    if (c->hidden % 8 || c->ffn % 8 || c->hidden > 8 * 4 * NORM_THREADS)
        return qemb_fail(
            err, "device",
            "GPU kernels: sizes not supported (got hidden %d, ffn %d, want multiples of 8 "
            "and hidden up to %d)",
            c->hidden, c->ffn, 8 * 4 * NORM_THREADS);
    return 0;
}

/* The file for this GPU and library under dir; NULL: out of memory. */
static char *cache_file(const char *dir, bool fp8) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, 0) != cudaSuccess) return nullptr;
    for (char *s = p.name; *s; s++)
        if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.", *s))
            *s = '-';
    const size_t n = strlen(dir) + strlen(p.name) + 96;
    char *path = (char *)malloc(n);
    if (path)
        snprintf(path, n, "%s/cublaslt-%zu-%s-sm%d%d-%d%s", dir, cublasLtGetVersion(), p.name,
                 p.major, p.minor, p.multiProcessorCount, fp8 ? "-fp8" : "");
    return path;
}

/* Finds device 0 and proves that this program has code for it. */
static int check_device(qemb_backend *be, qemb_err *err) {
    int n = 0, major = 0, minor = 0, driver = 0, shared = 0;
    cudaFuncAttributes attributes;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e == cudaErrorInsufficientDriver) {
        cudaDriverGetVersion(&driver);
        return qemb_fail(
            err, "device",
            "NVIDIA driver: missing or too old (got one for CUDA %d.%d, want %d.%d or newer)",
            driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    }
    if (e != cudaSuccess || n == 0)
        return qemb_fail(err, "device", "GPU: none found (%s)", cudaGetErrorString(e));
    cudaSetDevice(0);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
    cudaDeviceGetAttribute(&be->sms, cudaDevAttrMultiProcessorCount, 0);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    if (major < 8)
        return qemb_fail(err, "device",
                         "GPU: too old (got compute capability %d.%d, want 8.0 or newer)", major,
                         minor);
    if (be->fp8 && (major != 9 || minor != 0 || cublasLtGetVersion() < 120900))
        return qemb_fail(err, "device",
                         "FP8 products: not on this GPU (got compute capability %d.%d and cuBLASLt "
                         "%zu, want 9.0 and 120900 or newer); --math f16 computes here",
                         major, minor, cublasLtGetVersion());
    e = cudaFuncGetAttributes(&attributes, (const void *)gather_last_kernel<float4>);
    if (e != cudaSuccess)
        return qemb_fail(err, "device",
                         "GPU: this build has no code for compute capability %d.%d (%s)", major,
                         minor, cudaGetErrorString(e));
    be->wide = major < 12 && shared >= att_shared_bytes<128, 2>();
    be->hopper.on = be->hopper.on && major == 9 && minor == 0;
    return 0;
}

template <int HD, int M> static cudaError_t allow_shared() {
    return cudaFuncSetAttribute((const void *)attention_kernel<act, HD, M>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                att_shared_bytes<HD, M>());
}

static int open_device(qemb_backend *be, const qemb_options *opt, qemb_err *err) {
    cudaError_t e = cudaStreamCreateWithFlags(&be->st, cudaStreamNonBlocking);
    for (int i = 0; i < SLOTS && e == cudaSuccess; i++)
        e = cudaEventCreateWithFlags(&be->slots[i].free, cudaEventDisableTiming);
    if (e == cudaSuccess) e = cudaEventCreateWithFlags(&be->batch_free, cudaEventDisableTiming);
    if (e == cudaSuccess) e = allow_shared<64, 1>();
    if (e == cudaSuccess) e = allow_shared<128, 1>();
    if (e == cudaSuccess && be->wide) e = allow_shared<64, 2>();
    if (e == cudaSuccess && be->wide) e = allow_shared<128, 2>();
    if (e == cudaSuccess && be->hopper.on) e = hopper_open<act>(&be->hopper, be->sms);
    if (e != cudaSuccess)
        return qemb_fail(err, "device", "GPU: cannot start (%s)", cudaGetErrorString(e));

    const qemb_config *c = be->c;
    const int hd = c->head_dim, Q = c->n_heads * hd, KV = c->n_kv_heads * hd;
    cublasStatus_t s = gemm_open(&be->gemm, opt->deterministic, be->fp8);
    if (!s) s = gemm_add_shape(&be->gemm, Q + 2 * KV, c->hidden, false);
    if (!s) s = gemm_add_shape(&be->gemm, c->hidden, Q, true);
    if (!s) s = gemm_add_shape(&be->gemm, 2 * c->ffn, c->hidden, false);
    if (!s) s = gemm_add_shape(&be->gemm, c->hidden, c->ffn, true);
    if (s) return qemb_fail(err, "device", "cuBLASLt: cannot start (status %d)", (int)s);
    if (opt->cache_dir && !opt->deterministic) be->cache_path = cache_file(opt->cache_dir, be->fp8);
    return 0;
}

/* cos and sin of every position's angles. As transformers has them: the frequency and its product with
 * the position are rounded to float (Su et al. 2021). */
static int make_rope(qemb_backend *be, int positions, qemb_err *err) {
    const int half = be->c->head_dim / 2;
    const size_t bytes = (size_t)positions * half * sizeof(float2);
    float2 *table = (float2 *)malloc(bytes);
    if (!table) return qemb_fail(err, "out_of_memory", "rope table: out of memory");
    be->rope = (float2 *)device_alloc(be, bytes, "the rope table", err);
    int turn = 0;
    if (be->rope) {
#pragma omp parallel for num_threads(be->threads)
        for (int p = 0; p < positions; p++)
            for (int i = 0; i < half; i++) {
                const float freq = (float)(1 / pow(be->c->rope_theta, (double)i / half));
                const float angle = (float)p * freq;
                table[(size_t)p * half + i] = make_float2((float)cos(angle), (float)sin(angle));
            }
        if (!upload(be, be->rope, table, bytes, &turn)) {
            qemb_fail(err, "device", "%s", be->failure);
            be->rope = nullptr;
        }
    }
    free(table);
    return be->rope ? 0 : -1;
}

static int open_buffers(qemb_backend *be, const qemb_options *opt, qemb_err *err) {
    const size_t R = (size_t)be->max_rows, V = (size_t)be->c->vocab;
    const device_sizes s = size_parts(be->c, opt, nullptr, be->fp8);
    be->unique = (int32_t *)malloc(R * sizeof *be->unique);
    be->slot_of = (int32_t *)calloc(V, sizeof *be->slot_of);
    be->narrow = (att_tile *)malloc((2 * R + 1) * sizeof *be->narrow);
    be->wide_tiles = (att_tile *)malloc((2 * R + 1) * sizeof *be->wide_tiles);
    if (!be->unique || !be->slot_of || !be->narrow || !be->wide_tiles)
        return qemb_fail(err, "out_of_memory", "batch lists: out of memory");
    char *dev = (char *)device_alloc(be, s.staging, "transfers", err);
    if (!dev || pinned_alloc((void **)&be->slots[0].host, s.staging, err)) return -1;
    for (int i = 0; i < SLOTS; i++) {
        be->slots[i].dev = dev + i * SLOT_BYTES;
        be->slots[i].host = be->slots[0].host + i * SLOT_BYTES;
    }
    be->batch_dev = (char *)device_alloc(be, s.lists, "a batch's lists", err);
    if (!be->batch_dev || pinned_alloc((void **)&be->batch_host, s.lists, err)) return -1;
    be->gemm.workspace = device_alloc(be, s.workspace, "cuBLASLt's workspace", err);
    be->clamps = (unsigned long long *)device_alloc(be, s.counter, "a counter", err);
    if (!be->gemm.workspace || !be->clamps) return -1;
    if (s.codes && !(be->codes = (uint8_t *)device_alloc(be, s.codes, "attention output", err)))
        return -1;
    if (!good(be, cudaMemsetAsync(be->clamps, 0, s.counter, be->st), "memset"))
        return qemb_fail(err, "device", "%s", be->failure);
    return make_rope(be, opt->max_tokens, err);
}

static void cuda_close(qemb_backend *be) {
    if (!be) return;
    if (be->st) cudaStreamSynchronize(be->st);
    for (auto &sizes : be->graphs)
        for (batch_graph &g : sizes)
            if (g.exec) cudaGraphExecDestroy(g.exec);
    gemm_close(&be->gemm);
    for (int i = 0; i < be->n_device; i++) cudaFree(be->device[i]);
    if (be->slots[0].host) cudaFreeHost(be->slots[0].host);
    if (be->batch_host) cudaFreeHost(be->batch_host);
    for (int i = 0; i < SLOTS; i++)
        if (be->slots[i].free) cudaEventDestroy(be->slots[i].free);
    if (be->batch_free) cudaEventDestroy(be->batch_free);
    if (be->st) cudaStreamDestroy(be->st);
    free(be->cache_path);
    free(be->unique);
    free(be->slot_of);
    free(be->narrow);
    free(be->wide_tiles);
    free(be);
}

/* An FP8 product that the library does not have should be known now. */
static int check_fp8(qemb_backend *be, qemb_err *err) {
    for (int i = 0; i < be->gemm.n_shapes; i++) {
        cublasLtMatmulHeuristicResult_t found;
        int n;
        const float *somewhere = (const float *)be->codes;
        cublasStatus_t s = gemm_scales(&be->gemm, somewhere, somewhere);
        if (!s) s = gemm_ask(&be->gemm, &be->gemm.shapes[i], 16, &found, 1, &n);
        if (s)
            return qemb_fail(
                err, "device",
                "FP8 products: cuBLASLt %zu has none with a scale per row here (status "
                "%d); --math f16 computes here",
                cublasLtGetVersion(), (int)s);
    }
    return 0;
}

static int open_math(qemb_backend **out, const qemb_config *c, const qemb_options *opt, bool fp8,
                     qemb_err *err) {
    if (check_config(c, fp8, err)) return -1;
    qemb_backend *be = (qemb_backend *)calloc(1, sizeof *be);
    if (!be) return qemb_fail(err, "out_of_memory", "backend: out of memory");
    be->c = c;
    be->threads = std::max(opt->threads, 1);
    be->max_rows = pad_rows(std::max(opt->batch_tokens, opt->max_tokens));
    be->budget = opt->vram;
    be->fp8 = fp8;
    be->graphs_off = opt->no_graphs;
    be->hopper.on = opt->hopper && !opt->deterministic;
    be->on_layer_loaded = opt->on_layer_loaded;
    while (1 << be->lg < c->n_heads / c->n_kv_heads) be->lg++;
    if (check_device(be, err) || open_device(be, opt, err) || open_buffers(be, opt, err) ||
        (fp8 && check_fp8(be, err))) {
        cuda_close(be);
        return -1;
    }
    *out = be;
    return 0;
}

/* ---- rows as e4m3 ------------------------------------------------------------------------------ */

static unsigned blocks(size_t n, int per_block) {
    return (unsigned)((n + per_block - 1) / per_block);
}
static unsigned stride_blocks(const qemb_backend *be, size_t wanted) {
    return (unsigned)std::min(wanted, (size_t)be->sms * BLOCKS_PER_SM);
}

/* In FP8 an activation's buffer, which has two bytes per number, holds T rows of K codes and behind them
 * the T scales. Products read rows up to the next multiple of 16. */
struct coded_rows {
    uint8_t *codes; /* (T, K) */
    float *scales;  /* (T) */
};
static coded_rows coded(void *buffer, int T, int K) {
    uint8_t *codes = (uint8_t *)buffer;
    return {codes, (float *)(codes + (size_t)(T + 15) / 16 * 16 * K)};
}

/* f(V) for the V of the e4m3 kernels that rows of K numbers need. */
template <class F> static void by_columns(int K, F f) {
    const int groups = (K + 8 * ROW_THREADS - 1) / (8 * ROW_THREADS);
    if (groups <= 1)
        f(std::integral_constant<int, 1>());
    else if (groups <= 2)
        f(std::integral_constant<int, 2>());
    else if (groups <= 4)
        f(std::integral_constant<int, 4>());
    else if (groups <= 6)
        f(std::integral_constant<int, 6>());
    else
        f(std::integral_constant<int, 8>());
}

template <class X>
static void launch_quantize(qemb_backend *be, uint8_t *codes, float *scales, const X *x,
                            const float *x_scales, int T, int K) {
    by_columns(K, [&](auto v) {
        good(be,
             launch(quantize_kernel<X, v>, dim3(stride_blocks(be, T)), dim3(ROW_THREADS),
                    ROW_WARPS * sizeof(float), be->st, codes, scales, x, x_scales, T, K),
             "quantize");
    });
}

/* ---- weights and arena ------------------------------------------------------------------------ */

/* A matrix's rows, of INT8 their scales behind them, through the slots and quantized on the device to
 * codes and scales. Rows as long as ffn are far shorter than a slot. */
static bool place_e4m3(qemb_backend *be, const qemb_mat *m, uint8_t *codes, float *scales,
                       int *turn) {
    const size_t row = (size_t)m->cols * (m->dtype == QEMB_I8 ? 1 : sizeof(act));
    const size_t groups = m->dtype == QEMB_I8 ? QEMB_GROUPS(m->cols) : 0;
    const int step = (int)(SLOT_BYTES / (row + groups * sizeof(float)));
    bool ok = true;
    for (int r = 0; r < m->rows && ok; r += step, ++*turn) {
        staging *s = &be->slots[*turn % SLOTS];
        const int n = std::min(step, m->rows - r);
        const size_t own = n * groups * sizeof(float); /* rows are multiples of 16 bytes */
        uint8_t *to = codes + (size_t)r * m->cols;
        ok = good(be, cudaEventSynchronize(s->free), "upload"); /* slot_quantize: as in upload */
        if (ok) memcpy(s->host, (const char *)m->data + r * row, n * row);
        if (ok && own) memcpy(s->host + n * row, m->scale + r * groups, own);
        ok = ok &&
             good(be,
                  cudaMemcpyAsync(s->dev, s->host, n * row + own, cudaMemcpyHostToDevice, be->st),
                  "upload");
        if (own)
            launch_quantize(be, to, scales + r, (const int8_t *)s->dev,
                            (const float *)(s->dev + n * row), n, m->cols);
        else
            launch_quantize(be, to, scales + r, (const act *)s->dev, nullptr, n, m->cols);
        ok = ok && good(be, cudaEventRecord(s->free, be->st), "upload");
    }
    return ok && !be->failure[0];
}

/* Moves m to the device at *at and *at past it. */
static bool place_matrix(qemb_backend *be, qemb_mat *m, char **at, int *turn) {
    const size_t n = (size_t)m->rows * m->cols, scales = scale_bytes(m, be->fp8);
    char *data = *at, *scale = data + align256(n);
    const bool bytes = be->fp8 || m->dtype == QEMB_I8;
    bool ok = true;
    if (be->fp8)
        ok = place_e4m3(be, m, (uint8_t *)data, (float *)scale, turn);
    else if (m->dtype == QEMB_I8)
        ok = upload(be, data, m->data, n, turn) && upload(be, scale, m->scale, scales, turn);
    else
        ok = upload(be, data, m->data, n * sizeof(act), turn);
    m->data = data;
    m->scale = bytes ? (const float *)scale : nullptr;
    *at = bytes ? scale + align256(scales) : data + align256(n * sizeof(act));
    return ok;
}

static bool place_vector(qemb_backend *be, const float **v, int n, char **at, int *turn) {
    const bool ok = upload(be, *at, *v, n * sizeof(float), turn);
    *v = (const float *)*at;
    *at += align256(n * sizeof(float));
    return ok;
}

static int cuda_load_weights(qemb_backend *be, qemb_weights *w, qemb_err *err) {
    const qemb_config *c = be->c;
    const qemb_options opt = {}; /* sizes of weights do not depend on them */
    const device_sizes s = size_parts(c, &opt, &w->layers[0], be->fp8);
    for (int i = 0; i < 2; i++)
        if (s.dense[i] &&
            !(be->dense[i] = (act *)device_alloc(be, s.dense[i], "a dequantized matrix", err)))
            return -1;
    char *dev = (char *)device_alloc(be, s.weights, "the weights", err), *at = dev;
    if (!dev) return -1;
    bool ok = true;
    int turn = 0;
    for (int l = 0; l < c->n_layers && ok; l++) {
        qemb_layer *y = &w->layers[l];
        ok = place_vector(be, &y->attn_norm, c->hidden, &at, &turn) &&
             place_vector(be, &y->q_norm, c->head_dim, &at, &turn) &&
             place_vector(be, &y->k_norm, c->head_dim, &at, &turn) &&
             place_vector(be, &y->mlp_norm, c->hidden, &at, &turn);
        for (qemb_mat *m : {&y->wqkv, &y->wo, &y->wgu, &y->wdown})
            ok = ok && place_matrix(be, m, &at, &turn);
        if (!be->fp8) y->wdown.alpha *= 1 << SWIGLU_SHIFT;
        if (ok && be->on_layer_loaded) be->on_layer_loaded(l + 1, c->n_layers);
    }
    ok = ok && place_vector(be, &w->final_norm, c->hidden, &at, &turn);
    if (!ok) return qemb_fail(err, "device", "%s", be->failure);
    assert(at == dev + s.weights);
    const qemb_layer *y = &w->layers[0];
    const qemb_mat mats[] = {y->wqkv, y->wo, y->wgu,
                             y->wdown}; /* the order of open_device's shapes */
    std::copy(mats, mats + 4, be->timed);
    for (int i = 0; i < 4; i++)
        if (be->dense[0]) be->timed[i].data = be->dense[i != 2]; /* what the products read */
    return 0;
}

/* Takes the algorithms from the cache file and times those that it lacks, in the memory that the
 * activations will use. Buckets that no batch reaches are left alone. */
static void tune(qemb_backend *be, char *arena, size_t bytes) {
    gemm_bench b = {be->st, nullptr, nullptr, arena, bytes};
    gemm_load(&be->gemm, be->cache_path);
    bool ok =
        good(be, cudaMemsetAsync(arena, 0x2c, bytes, be->st), "timing") && /* halves of 0.066 */
        good(be, cudaEventCreateWithFlags(&b.start, cudaEventDefault), "timing") &&
        good(be, cudaEventCreateWithFlags(&b.stop, cudaEventDefault), "timing");
    for (int i = 0; ok && i < be->gemm.n_shapes; i++) {
        gemm_shape *p = &be->gemm.shapes[i];
        const bool mlp = p->N == 2 * be->c->ffn || p->K == be->c->ffn;
        const int rows = mlp ? std::min(be->max_rows, (int)MLP_ROWS) : be->max_rows;
        const qemb_mat *w = be->timed;
        while (w->rows != p->N || w->cols != p->K) w++;
        for (int k = 0; k <= gemm_bucket(&be->gemm, rows); k++)
            if (!p->buckets[k].ready && gemm_tune(&be->gemm, p, k, &b, w->data))
                gemm_save(&be->gemm, p, k, be->cache_path);
    }
    if (b.start) cudaEventDestroy(b.start);
    if (b.stop) cudaEventDestroy(b.stop);
}

static void *cuda_arena(qemb_backend *be, size_t bytes, qemb_err *err) {
    void *arena = device_alloc(be, bytes, "the activations", err);
    if (arena && be->cache_path) tune(be, (char *)arena, bytes);
    return arena;
}

/* ---- begin: the batch's lists ----------------------------------------------------------------- */

/* Lists the tiles of a text: tokens 0..len-1 in rows row0.., behind the prefix. */
static void list_tiles(qemb_backend *be, int row0, int len, int prefix) {
    const bool wide = be->wide && prefix + len >= WIDE_FROM;
    const int tokens = (wide ? 128 : 64) >> be->lg;
    att_tile *to = wide ? be->wide_tiles : be->narrow;
    int *n = wide ? &be->n_wide : &be->n_narrow;
    for (int t = 0; t < len; t += tokens) to[(*n)++] = att_tile{t, row0, len, prefix, row0, {}};
}

/* Tiles with the most keys first: the last blocks to run are short ones. */
static void sort_tiles(att_tile *t, int n) {
    std::stable_sort(t, t + n, [](const att_tile &a, const att_tile &b) {
        return a.prefix + a.t0 > b.prefix + b.t0;
    });
}

/* Takes the batch's class up: its lists are filled up with empty tiles to sizes that depend on T and B
 * alone, since a graph's launches are as wide as they were when it was made. Every text and the prefix
 * begin a tile of their own, so there are at most T / tokens + B + 1 of either kind. */
static void choose_graph(qemb_backend *be, const qemb_packed_batch *b) {
    const int *size = std::find(GRAPH_ROWS, GRAPH_ROWS + GRAPH_SIZES, b->T);
    be->mode = PLAIN;
    be->graph = nullptr;
    if (be->graphs_off || size == GRAPH_ROWS + GRAPH_SIZES || b->B > GRAPH_TEXTS) return;
    be->graph = &be->graphs[size - GRAPH_ROWS][b->B];
    be->mode = be->graph->exec ? REPLAY : be->graph->seen++ ? RECORD : PLAIN;
    const auto fill = [&](att_tile *tiles, int *n, int tokens) {
        const int full = b->T / tokens + b->B + 1;
        while (*n < full) tiles[(*n)++] = att_tile{};
    };
    fill(be->narrow, &be->n_narrow, 64 >> be->lg);
    if (be->wide && b->T >= WIDE_FROM) fill(be->wide_tiles, &be->n_wide, 128 >> be->lg);
}

static void list_unique(qemb_backend *be, int *slot, const qemb_packed_batch *b) {
    be->n_unique = 0;
    for (int t = 0; t < b->T; t++) {
        const int token = b->tokens[t];
        assert(token >= 0 && token < be->c->vocab);
        int s = be->slot_of[token];
        if (s >= be->n_unique || be->unique[s] != token) {
            s = be->slot_of[token] = be->n_unique++;
            be->unique[s] = token;
        }
        slot[t] = s;
    }
}

static void cuda_begin(qemb_backend *be, const qemb_packed_batch *b) {
    assert(b->T <= be->max_rows && b->B >= 1 && b->cu[0] == b->P && b->cu[b->B] == b->T);
    be->n_narrow = be->n_wide = 0;
    if (b->P) list_tiles(be, 0, b->P, 0);
    for (int i = 0; i < b->B; i++) list_tiles(be, b->cu[i], b->cu[i + 1] - b->cu[i], b->P);
    sort_tiles(be->narrow, be->n_narrow);
    sort_tiles(be->wide_tiles, be->n_wide);
    choose_graph(be, b);

    batch_view host;
    const int tiles = be->n_narrow + be->n_wide + b->B;
    const size_t bytes = view_batch(&host, be->batch_host, b->T, b->B, tiles);
    view_batch(&be->dev, be->batch_dev, b->T, b->B, tiles);
    good(be, cudaEventSynchronize(be->batch_free),
         "begin"); /* batch_free: its upload has read it */
    list_unique(be, host.slot, b);
    memcpy(host.pos, b->pos, (size_t)b->T * sizeof *host.pos);
    std::copy(be->narrow, be->narrow + be->n_narrow, host.tiles);
    std::copy(be->wide_tiles, be->wide_tiles + be->n_wide, host.tiles + be->n_narrow);
    att_tile *last = host.tiles + be->n_narrow + be->n_wide;
    for (int i = 0; i < b->B; i++) {
        const int len = b->cu[i + 1] - b->cu[i];
        assert(len >= 1);
        host.last[i] = b->cu[i + 1] - 1;
        last[i] = att_tile{len - 1, b->cu[i], len, b->P, i - (len - 1), {}};
    }
    good(be, cudaMemcpyAsync(be->batch_dev, be->batch_host, bytes, cudaMemcpyHostToDevice, be->st),
         "begin");
    good(be, cudaEventRecord(be->batch_free, be->st), "begin");
}

/* ---- the ops, in the forward's order ---------------------------------------------------------- */

static void cuda_embed(qemb_backend *be, float *x, const qemb_mat *tok_emb,
                       const qemb_packed_batch *b) {
    const int D = be->c->hidden, rows = (int)(SLOT_BYTES / (D * sizeof(act)));
    assert(tok_emb->dtype == QEMB_F16 && tok_emb->cols == D);
    const act *table = (const act *)tok_emb->data;
    for (int first = 0, turn = 0; first < be->n_unique; first += rows, turn++) {
        const int n = std::min(rows, be->n_unique - first);
        staging *s = &be->slots[turn % SLOTS];
        good(be, cudaEventSynchronize(s->free),
             "embed"); /* slot_embed: the chunk two before is done */
        act *host = (act *)s->host;
#pragma omp parallel for num_threads(be->threads) if (n > 256)
        for (int i = 0; i < n; i++)
            memcpy(host + (size_t)i * D, table + (size_t)be->unique[first + i] * D,
                   D * sizeof(act));
        good(be,
             cudaMemcpyAsync(s->dev, s->host, (size_t)n * D * sizeof(act), cudaMemcpyHostToDevice,
                             be->st),
             "embed");
        good(be,
             launch(embed_kernel<act>, dim3(blocks(b->T, EMBED_WARPS)), dim3(EMBED_WARPS * 32), 0,
                    be->st, x, (const act *)s->dev, be->dev.slot, first, n, b->T, D),
             "embed");
        good(be, cudaEventRecord(s->free, be->st), "embed");
    }
    if (be->mode == RECORD) /* what follows, up to pool, is the same for the whole class */
        good(be, cudaStreamBeginCapture(be->st, cudaStreamCaptureModeThreadLocal), "graph");
}

template <class A, int V>
static void launch_rmsnorm(qemb_backend *be, A *y, const float *x, const float *w, int T) {
    good(be,
         launch(rmsnorm_kernel<A, V>, dim3(stride_blocks(be, T)), dim3(NORM_THREADS),
                NORM_WARPS * sizeof(float), be->st, y, x, w, T, be->c->hidden, be->c->rms_eps),
         "rmsnorm");
}
template <class A>
static void any_rmsnorm(qemb_backend *be, A *y, const float *x, const float *w, int T) {
    const int D = be->c->hidden, step = 4 * NORM_THREADS;
    if (D <= step)
        launch_rmsnorm<A, 1>(be, y, x, w, T);
    else if (D <= 2 * step)
        launch_rmsnorm<A, 2>(be, y, x, w, T);
    else if (D <= 4 * step)
        launch_rmsnorm<A, 4>(be, y, x, w, T);
    else
        launch_rmsnorm<A, 8>(be, y, x, w, T);
}
static void cuda_rmsnorm(qemb_backend *be, qemb_act *y, const float *x, const float *w, int T) {
    if (be->mode == REPLAY) return;
    if (!be->fp8) return any_rmsnorm(be, (act *)y, x, w, T);
    const int D = be->c->hidden;
    const coded_rows to = coded(y, T, D);
    by_columns(D, [&](auto v) {
        good(be,
             launch(rmsnorm_e4m3_kernel<v>, dim3(stride_blocks(be, T)), dim3(ROW_THREADS),
                    ROW_WARPS * sizeof(float), be->st, to.codes, to.scales, x, w, T, D,
                    be->c->rms_eps),
             "rmsnorm");
    });
}

/* w in FP16: of an INT8 file made so in dense[i], unless it still is. */
static qemb_mat dense_matrix(qemb_backend *be, const qemb_mat *w, int i) {
    if (be->fp8 || w->dtype != QEMB_I8) return *w;
    if (be->dense_of[i] != w->data) {
        const size_t n = (size_t)w->rows * w->cols;
        good(be,
             launch(dequantize_kernel<act>,
                    dim3(stride_blocks(be, blocks(n / 8, DEQUANTIZE_THREADS))),
                    dim3(DEQUANTIZE_THREADS), 0, be->st, be->dense[i], (const int8_t *)w->data,
                    w->scale, w->rows, w->cols),
             "dequantize");
        be->dense_of[i] = w->data;
    }
    return qemb_mat{be->dense[i], w->rows, w->cols, QEMB_F16, w->alpha, nullptr};
}

/* x (T, in): halves; in FP8 codes and scales, as `coded` lays them. */
static void run_gemm(qemb_backend *be, void *y, const void *x, const qemb_mat *w, bool add, int T,
                     int dense = 1) {
    const qemb_mat m = dense_matrix(be, w, dense);
    const cublasStatus_t s =
        gemm_run(&be->gemm, y, x, be->fp8 ? coded((void *)x, T, w->cols).scales : nullptr, &m, add,
                 T, be->st);
    char why[32];
    snprintf(why, sizeof why, "cuBLASLt status %d", (int)s);
    if (s) note_failure(be, add ? "matmul_add" : "matmul", why);
}
static void cuda_matmul(qemb_backend *be, qemb_act *y, const qemb_act *x, const qemb_mat *w,
                        int T) {
    if (be->mode == REPLAY) return;
    run_gemm(be, y, x, w, false, T);
}
static void cuda_matmul_add(qemb_backend *be, float *x, const qemb_act *a, const qemb_mat *w,
                            int T) {
    if (be->mode == REPLAY) return;
    if (!be->fp8 || a == be->coded) return run_gemm(be, x, a, w, true, T);
    const coded_rows to = coded(be->codes, T, w->cols); /* attention's output is in halves */
    launch_quantize(be, to.codes, to.scales, (const act *)a, nullptr, T, w->cols);
    run_gemm(be, x, be->codes, w, true, T);
}

template <int HD>
static void launch_rope(qemb_backend *be, act *qkv, const float *q_norm, const float *k_norm,
                        int T) {
    const int H = be->c->n_heads, K = be->c->n_kv_heads, per_block = ROPE_THREADS / (HD / 4);
    good(be,
         launch(qknorm_rope_kernel<act, HD>, dim3(blocks((size_t)T * (H + K), per_block)),
                dim3(ROPE_THREADS), 0, be->st, qkv, q_norm, k_norm, be->dev.pos, be->rope, T, H, K,
                be->c->rms_eps),
         "qknorm_rope");
}
static void cuda_qknorm_rope(qemb_backend *be, qemb_act *qkv, const float *q_norm,
                             const float *k_norm, const qemb_packed_batch *b) {
    if (be->mode == REPLAY) return;
    if (be->c->head_dim == 64)
        launch_rope<64>(be, (act *)qkv, q_norm, k_norm, b->T);
    else
        launch_rope<128>(be, (act *)qkv, q_norm, k_norm, b->T);
}

template <int HD, int M>
static void launch_attention(qemb_backend *be, act *att, const act *qkv, const att_tile *tiles,
                             int n) {
    if (!n) return;
    const int H = be->c->n_heads, K = be->c->n_kv_heads;
    const float scale_log2e = (float)(1.4426950408889634 / sqrt((double)HD));
    good(be,
         launch(attention_kernel<act, HD, M>, dim3((unsigned)n, (unsigned)K), dim3(ATT_THREADS),
                att_shared_bytes<HD, M>(), be->st, att, qkv, tiles, H, K, be->lg, scale_log2e),
         "attention");
}
/* The 128-row tiles. */
template <int HD>
static void wide_attention(qemb_backend *be, act *att, const act *qkv, const att_tile *tiles) {
    if (!be->hopper.on) return launch_attention<HD, 2>(be, att, qkv, tiles, be->n_wide);
    if (be->n_wide)
        good(be,
             attention_hopper_launch<act, HD>(
                 &be->hopper, att, qkv, tiles, be->n_wide, be->c->n_heads, be->c->n_kv_heads,
                 be->lg, (float)(1.4426950408889634 / sqrt((double)HD)), be->st),
             "attention");
}
template <int HD>
static void any_attention(qemb_backend *be, act *att, const act *qkv, int B, int last_only) {
    const att_tile *narrow = be->dev.tiles, *wide = narrow + be->n_narrow,
                   *last = wide + be->n_wide;
    if (last_only) return launch_attention<HD, 1>(be, att, qkv, last, B);
    wide_attention<HD>(be, att, qkv, wide);
    launch_attention<HD, 1>(be, att, qkv, narrow, be->n_narrow);
}
static void cuda_attention(qemb_backend *be, qemb_act *att, const qemb_act *qkv,
                           const qemb_packed_batch *b, int last_only) {
    if (be->mode == REPLAY) return;
    if (be->c->head_dim == 64)
        any_attention<64>(be, (act *)att, (const act *)qkv, b->B, last_only);
    else
        any_attention<128>(be, (act *)att, (const act *)qkv, b->B, last_only);
}

static void cuda_gate_up(qemb_backend *be, qemb_act *h, qemb_act *gu, const qemb_act *x,
                         const qemb_mat *w, int T) {
    const int F = be->c->ffn;
    if (be->mode == REPLAY) return;
    if (be->hopper.on && !be->fp8 && T >= GATE_UP_FROM) {
        const qemb_mat m = dense_matrix(be, w, 0);
        good(be,
             gate_up_launch(&be->hopper, (act *)h, (const act *)x, (const act *)m.data, m.alpha, T,
                            F, m.cols, be->clamps, be->st),
             "gate_up");
        return;
    }
    run_gemm(be, gu, x, w, false, T, 0); /* wgu has one to itself: its rows come in chunks */
    if (be->fp8) {
        const coded_rows to = coded(h, T, F);
        be->coded = h;
        return by_columns(F, [&](auto v) {
            good(be,
                 launch(swiglu_e4m3_kernel<act, v>, dim3(stride_blocks(be, T)), dim3(ROW_THREADS),
                        ROW_WARPS * sizeof(float), be->st, to.codes, to.scales, (const act *)gu, T,
                        F),
                 "gate_up");
        });
    }
    const size_t wanted = blocks((size_t)T * F / 8, SWIGLU_THREADS);
    good(be,
         launch(swiglu_kernel<act>, dim3(stride_blocks(be, wanted)), dim3(SWIGLU_THREADS), 0,
                be->st, (act *)h, (const act *)gu, T, F, be->clamps),
         "gate_up");
}

static void cuda_gather_last(qemb_backend *be, float *y, const float *x,
                             const qemb_packed_batch *b) {
    if (be->mode == REPLAY) return;
    good(be,
         launch(gather_last_kernel<float4>, dim3((unsigned)b->B), dim3(GATHER_THREADS), 0, be->st,
                (float4 *)y, (const float4 *)x, be->dev.last, be->c->hidden / 4),
         "gather_last");
}

/* The recorded ops as a graph, now and for all later batches of the class. */
static void finish_graph(qemb_backend *be) {
    cudaGraph_t recorded = nullptr;
    if (be->mode == RECORD && good(be, cudaStreamEndCapture(be->st, &recorded), "graph") &&
        !good(be, cudaGraphInstantiate(&be->graph->exec, recorded, 0), "graph"))
        be->graph->exec = nullptr;
    if (recorded) cudaGraphDestroy(recorded);
    if (be->mode != PLAIN && be->graph->exec)
        good(be, cudaGraphLaunch(be->graph->exec, be->st), "graph");
    be->mode = PLAIN;
}

/* Rows from x on, normed into a slot and on their way to its host side. */
static void start_pool(qemb_backend *be, staging *s, const float *x, const float *w, int n) {
    const size_t bytes = (size_t)n * be->c->hidden * sizeof(float);
    good(be, cudaEventSynchronize(s->free), "pool");
    any_rmsnorm(be, (float *)s->dev, x, w, n);
    good(be, cudaMemcpyAsync(s->host, s->dev, bytes, cudaMemcpyDeviceToHost, be->st), "pool");
    good(be, cudaEventRecord(s->free, be->st), "pool");
}

static void cuda_pool(qemb_backend *be, float *out, const float *x, const float *w, int B) {
    const int rows = (int)(SLOT_BYTES / (be->c->hidden * sizeof(float)));
    const size_t D = (size_t)be->c->hidden;
    finish_graph(be);
    start_pool(be, &be->slots[0], x, w, std::min(rows, B));
    for (int first = 0, turn = 0; first < B; first += rows, turn++) {
        staging *s = &be->slots[turn % SLOTS];
        const int n = std::min(rows, B - first), next = first + rows;
        if (next < B) /* the next chunk computes while this one is copied out */
            start_pool(be, &be->slots[(turn + 1) % SLOTS], x + next * D, w,
                       std::min(rows, B - next));
        good(be, cudaEventSynchronize(s->free), "pool"); /* slot_pool: the copy to its host side */
        memcpy(out + first * D, s->host, n * D * sizeof(float));
    }
    staging *s = &be->slots[0];
    good(be,
         cudaMemcpyAsync(s->host, be->clamps, sizeof *be->clamps, cudaMemcpyDeviceToHost, be->st),
         "pool");
    if (good(be, cudaStreamSynchronize(be->st), "pool"))
        memcpy(&be->n_clamped, s->host, sizeof be->n_clamped);
    if (be->failure[0]) std::fill(out, out + B * D, NAN);
}

static int cuda_open(qemb_backend **be, const qemb_config *c, const qemb_options *opt,
                     qemb_err *err) {
    return open_math(be, c, opt, false, err);
}
static int cuda_fp8_open(qemb_backend **be, const qemb_config *c, const qemb_options *opt,
                         qemb_err *err) {
    return open_math(be, c, opt, true, err);
}
static int cuda_plan(qemb_part *p, const qemb_file *f, const qemb_options *opt, size_t arena) {
    return plan(p, f, opt, arena, false);
}
static int cuda_fp8_plan(qemb_part *p, const qemb_file *f, const qemb_options *opt, size_t arena) {
    return plan(p, f, opt, arena, true);
}

#define TABLE(NAME, MATH, OPEN, PLAN)                                                              \
    {                                                                                              \
        .name = NAME, .math = MATH, .act_size = sizeof(act), .batch_tokens = 8192,                 \
        .mlp_rows = MLP_ROWS, .fallback = qemb_cpu_mapped, .pad_rows = pad_rows, .plan = PLAN,     \
        .repacked_bytes = nullptr, .health = cuda_health, .open = OPEN, .close = cuda_close,       \
        .load_weights = cuda_load_weights, .arena = cuda_arena, .begin = cuda_begin,               \
        .embed = cuda_embed, .rmsnorm = cuda_rmsnorm, .matmul = cuda_matmul,                       \
        .matmul_add = cuda_matmul_add, .qknorm_rope = cuda_qknorm_rope,                            \
        .attention = cuda_attention, .gate_up = cuda_gate_up, .gather_last = cuda_gather_last,     \
        .pool = cuda_pool,                                                                         \
    }
const qemb_ops qemb_cuda_ops = TABLE("cuda", QEMB_MATH_F16, cuda_open, cuda_plan);
const qemb_ops qemb_cuda_fp8_ops = TABLE("cuda-fp8", QEMB_MATH_FP8, cuda_fp8_open, cuda_fp8_plan);

const qemb_ops *qemb_cuda_table(int i) {
    return i == 0 ? &qemb_cuda_ops : i == 1 ? &qemb_cuda_fp8_ops : nullptr;
}
