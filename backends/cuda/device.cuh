/* device.cuh - the CUDA backend's state: device memory, uploads, opening, the weights. qemb.cu and
 * graphs.cuh work on it.
 *
 * There is one stream. Host and device meet in begin, which uploads a batch's lists, and in
 * collect, which waits for its vectors. In between a second batch may be launched.
 */
#ifndef CUDA_DEVICE_CUH
#define CUDA_DEVICE_CUH

#include "attention.cuh"
#include "gemm.cuh"
#include "hopper.cuh"
#include "kernels.cuh"
#include "qemb_cuda.h"
#include "quantize.cuh"

#include <algorithm>
#include <cassert>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

typedef __half act; /* a number of a qemb_act */

enum { SLOTS = 2, IN_FLIGHT = 2 };
constexpr size_t SLOT_BYTES = (size_t)8 << 20;
/* Rows that the MLP computes at a time, doubled by the engine where there is memory for it: enough
 * to fill the GPU with tiles of the down projection (4B: 32 x 20 of 128 x 128). */
enum { MLP_ROWS = 4096 };
enum { WIDE_FROM = 512 }; /* texts of at least this many tokens get 128-row attention tiles */
/* Rows from which Hopper's gate_up pays: two blocks take 256, and fewer leave one of them idle. */
enum { GATE_UP_FROM = 256 };
enum { BLOCKS_PER_SM = 8 }; /* of grid-stride kernels */
constexpr double MIB = 1 << 20;
/* Memory that stays free beside the embedding table, for CUDA graphs and cuBLASLt's kernels, which
 * the driver loads when they are first used. */
constexpr size_t TABLE_RESERVE = (size_t)512 << 20;

/* Small batches run as CUDA graphs: 400 launches (4B) take the host about as long as a short text
 * takes the GPU. A graph's sizes are fixed. So the engine pads a batch to one of these numbers of
 * rows (pad_rows), and each class of batches (rows, texts) has its own graph. Larger batches keep
 * the GPU busy for longer than their launches take, and padding them would cost more. */
constexpr int GRAPH_ROWS[] = {16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024};
enum { GRAPH_SIZES = 13, GRAPH_TEXTS = 5 }; /* texts: four, and the one that fills up */

/* Pinned host memory and device memory of the same size, for the upload of weights. */
struct staging {
    char *host, *dev;
    cudaEvent_t free; /* recorded after the last device work that uses the slot */
};

/* A batch between pool and collect. */
struct pooled_batch {
    float *vectors;             /* (batch_tokens, D), pinned; its first B rows are copied to out */
    unsigned long long *clamps; /* behind them: the counter, as this batch left it */
    cudaEvent_t done;           /* both have been copied from the device */
    float *out;
    int B;
};

/* The lists of a batch on the device, uploaded in one copy. */
struct batch_view {
    int *pos, *tokens; /* (T) */
    int *rows;         /* (B)  row of each text's last token, or first */
    att_tile *tiles;   /* 64-row tiles, then 128-row tiles, then one tile per such token */
};

/* FP8: an activation that a product reads, T rows of K numbers. Its memory holds e4m3 codes, then a
 * scale for each row. Products read rows up to the next multiple of 16. Codes and scales of so many
 * rows fit where as many halves would. */
struct coded_rows {
    uint8_t *codes; /* (T, K) */
    float *scales;  /* (T) */
    coded_rows(uint8_t *codes_, float *scales_) : codes(codes_), scales(scales_) {}
    coded_rows(const qemb_act *a, int T, int K)
        : codes((uint8_t *)a), scales((float *)(codes + (size_t)(T + 15) / 16 * 16 * K)) {}
};

struct batch_graph {
    int seen; /* batches of this class so far: the first one is launched op by op */
    cudaGraphExec_t exec;
};
enum graph_mode { PLAIN, RECORD, REPLAY };
enum { UP = 2 }; /* of a layer's matrices: wgu or wup */

/* Device memory, part by part. */
struct device_sizes {
    size_t staging, lists, workspace, counter, rope, weights, positions, table;
    size_t dense[2]; /* INT8 files in FP16: a dequantized wgu or wup, and any other matrix */
    size_t halves;   /* FP8: attention's output, and x wup^T, before they are quantized */
    size_t sums;     /* GEMM_E4M3_SUMS: a product without its scales */
};

struct qemb_backend {
    const qemb_config *c;
    int device;
    cudaStream_t st;
    char failure[160]; /* the first one; empty: none */
    int sms, lg;       /* H/K = 1 << lg */
    bool wide;         /* 128-row attention tiles fit this GPU */
    bool fp8;
    bool first; /* a text's row that becomes its vector: the first, not the last */
    hopper_state hopper;
    void (*on_layer_loaded)(int layers, int of); /* from the options */
    gemm_state gemm;
    size_t used, budget;         /* device bytes allocated; allowed (0: all there is) */
    void *allocated[QEMB_PARTS]; /* freed by close */
    int n_allocated;
    char *cache_path;   /* of the timed algorithms; NULL: none */
    void *pinned_table; /* the embedding table, if it is not on the device */
    float2 *rope;       /* (max_tokens, hd/2) cos, sin */
    unsigned long long *clamps, n_clamped;
    char *arena; /* the activations, also scratch for timing */
    size_t arena_bytes;
    staging slots[SLOTS];
    pooled_batch pooled[IN_FLIGHT];
    int first_pooled, n_pooled;   /* the oldest one; how many are not collected */
    char *batch_host, *batch_dev; /* a batch_view's memory, pinned and on the device */
    cudaEvent_t batch_free;
    int max_rows, mlp_rows;
    batch_view dev; /* of the batch being computed */
    int n_narrow, n_wide;
    att_tile *narrow, *wide_tiles; /* (2 max_rows + 1) tiles being listed */

    act *dense[2];           /* INT8: see device_sizes */
    const void *dense_of[2]; /* the matrix that dense holds */
    act *halves;             /* (max_rows, H*hd) or (mlp_rows, F) FP8: see device_sizes */
    float *sums;             /* (T, N) FP8: see device_sizes */

    bool graphs_off;
    enum graph_mode mode;
    bool unrecorded;    /* RECORD: an op could not be recorded */
    batch_graph *graph; /* of the class of the batch being computed, or NULL */
    batch_graph graphs[GRAPH_SIZES][GRAPH_TEXTS + 1];
};

/* The rows to which a batch is padded: those of a graph, or a multiple of 16, as FP8 products
 * need. */
static int pad_rows(int T) {
    for (int rows : GRAPH_ROWS)
        if (T <= rows) return rows;
    return (T + 15) / 16 * 16;
}

/* ---- failures -------------------------------------------------------------------------------- */

/* While a graph is recorded nothing runs: a failure then ends the recording alone. */
static void note_failure(qemb_backend *be, const char *op, const char *why) {
    if (be->mode == RECORD)
        be->unrecorded = true;
    else if (!be->failure[0])
        snprintf(be->failure, sizeof be->failure, "GPU: %s failed (%s)", op, why);
}
static bool good(qemb_backend *be, cudaError_t e, const char *op) {
    if (e != cudaSuccess) note_failure(be, op, cudaGetErrorString(e));
    return e == cudaSuccess;
}
/* ---- memory ---------------------------------------------------------------------------------- */

/* Bytes that may still be allocated: what the device has free, less the reserve, within the
 * budget. */
static size_t memory_left(const qemb_backend *be, size_t reserve) {
    size_t left = 0, total = 0;
    cudaMemGetInfo(&left, &total);
    left -= std::min(left, reserve);
    return be->budget ? std::min(left, be->budget - std::min(be->used, be->budget)) : left;
}

static void *device_alloc(qemb_backend *be, size_t bytes, const char *what, qemb_err *err) {
    const size_t left = memory_left(be, 0);
    void *p = nullptr;
    assert(be->n_allocated < (int)(sizeof be->allocated / sizeof *be->allocated));
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
    return be->allocated[be->n_allocated++] = p;
}

static int pinned_alloc(void **p, size_t bytes, qemb_err *err) {
    if (cudaHostAlloc(p, bytes, cudaHostAllocDefault) == cudaSuccess) return 0;
    cudaGetLastError();
    return qemb_fail(err, "out_of_memory", "pinned memory: cannot get %.0f MiB",
                     ceil((double)bytes / MIB));
}

/* Copies host memory of any kind to the device, through the slots. Complete when the stream is. */
static bool upload(qemb_backend *be, void *dst, const void *src, size_t bytes, int *turn) {
    bool ok = true;
    for (size_t at = 0; at < bytes && ok; at += SLOT_BYTES, ++*turn) {
        staging *s = &be->slots[*turn % SLOTS];
        const size_t n = std::min(SLOT_BYTES, bytes - at);
        /* The slot's last copy has ended. */
        ok = good(be, cudaEventSynchronize(s->free), "upload"); /* slot_upload */
        if (ok) memcpy(s->host, (const char *)src + at, n);
        ok = ok &&
             good(be, cudaMemcpyAsync((char *)dst + at, s->host, n, cudaMemcpyHostToDevice, be->st),
                  "upload");
        ok = ok && good(be, cudaEventRecord(s->free, be->st), "upload");
    }
    return ok;
}

static size_t align256(size_t n) { return (n + 255) / 256 * 256; }

/* Lays out the lists of a batch of T rows, B texts and so many tiles from base; returns their
 * bytes. v: NULL to count only. */
static size_t view_batch(batch_view *v, char *base, size_t T, size_t B, size_t tiles) {
    const size_t ints = align256((2 * T + B) * sizeof(int));
    if (v) {
        v->pos = (int *)base;
        v->tokens = v->pos + T;
        v->rows = v->tokens + T;
        v->tiles = (att_tile *)(base + ints);
    }
    return ints + tiles * sizeof(att_tile);
}

/* How the GPU computes FP8 products: with the scales where cuBLASLt applies them. Without a GPU, as
 * for an sm_90. */
static gemm_kind kind_of(bool fp8, int device) {
    int major = 9, minor = 0;
    if (!fp8) return GEMM_F16;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return major == 9 && minor == 0 ? GEMM_E4M3 : GEMM_E4M3_SUMS;
}

/* Bytes of m's scales on the device: one a row for e4m3, INT8's own otherwise. */
static size_t scale_bytes(const qemb_mat *m, bool fp8) {
    const size_t groups = fp8 ? 1 : m->dtype == QEMB_I8 ? QEMB_GROUPS(m->cols) : 0;
    return m->rows * groups * sizeof(float);
}

/* The vectors of a layer, in the order in which they lie on the device */
struct layer_vector {
    const float **p;
    int n;
};
enum { LAYER_VECTORS = 8 };
static int layer_vectors(const qemb_config *c, qemb_layer *y, layer_vector *v) {
    const int D = c->hidden, hd = c->head_dim, QKV = (c->n_heads + 2 * c->n_kv_heads) * hd;
    const layer_vector qwen3[] = {
        {&y->attn_norm, D}, {&y->q_norm, hd}, {&y->k_norm, hd}, {&y->mlp_norm, D}};
    const layer_vector bert[] = {{&y->bqkv, QKV},         {&y->bo, D},           {&y->attn_norm, D},
                                 {&y->attn_norm_bias, D}, {&y->bup, c->ffn},     {&y->bdown, D},
                                 {&y->mlp_norm, D},       {&y->mlp_norm_bias, D}};
    if (c->architecture == QEMB_BERT) return (int)(std::copy(bert, bert + 8, v) - v);
    return (int)(std::copy(qwen3, qwen3 + 4, v) - v);
}
/* Those beside the layers */
static int other_vectors(const qemb_config *c, qemb_weights *w, layer_vector *v) {
    if (c->architecture != QEMB_BERT) return v[0] = {&w->final_norm, c->hidden}, 1;
    v[0] = {&w->emb_norm, c->hidden}, v[1] = {&w->emb_norm_bias, c->hidden};
    return 2;
}
static size_t vector_bytes(const layer_vector *v, int n) {
    size_t sum = 0;
    for (int i = 0; i < n; i++) sum += align256(v[i].n * sizeof(float));
    return sum;
}

/* The device memory for layers like y. y NULL: without the layers. */
static device_sizes size_parts(const qemb_config *c, const qemb_options *opt, const qemb_layer *y,
                               gemm_kind kind) {
    const bool fp8 = kind != GEMM_F16, bert = c->architecture == QEMB_BERT;
    const size_t R = (size_t)pad_rows(std::max(opt->batch_tokens, opt->max_tokens));
    const size_t D = (size_t)c->hidden, hd = (size_t)c->head_dim, Q = c->n_heads * hd;
    device_sizes s = {};
    s.staging = SLOTS * SLOT_BYTES;
    s.lists = view_batch(nullptr, nullptr, R, R, 5 * R + 2);
    s.workspace = GEMM_WORKSPACE;
    s.counter = sizeof(unsigned long long);
    if (bert)
        s.positions = (size_t)qemb_position_rows(c) * D * sizeof(float);
    else
        s.rope = (size_t)opt->max_tokens * (hd / 2) * sizeof(float2);
    s.table = (size_t)c->vocab * D * sizeof(act);
    const size_t chunk = std::min(R, (size_t)opt->mlp_rows), F = (size_t)c->ffn;
    const size_t up = bert ? F : 2 * F; /* rows of wup or wgu */
    if (fp8) s.halves = std::max(R * Q, bert ? chunk * F : 0) * sizeof(act);
    if (kind == GEMM_E4M3_SUMS)
        s.sums = std::max(R * std::max(D, Q + 2 * c->n_kv_heads * hd), chunk * up) * sizeof(float);
    if (!y) return s;
    qemb_layer copy = *y;
    qemb_weights none = {};
    qemb_mat *matrices[QEMB_LAYER_MATRICES];
    layer_vector v[LAYER_VECTORS];
    qemb_layer_matrices(&copy, matrices);
    size_t layer = vector_bytes(v, layer_vectors(c, &copy, v));
    for (const qemb_mat *m : matrices) {
        const size_t n = (size_t)m->rows * m->cols;
        const bool bytes = fp8 || m->dtype == QEMB_I8;
        layer += align256(bytes ? n : n * sizeof(act)) + align256(scale_bytes(m, fp8));
        if (!fp8 && bytes) {
            size_t *dense = &s.dense[m != matrices[UP]];
            *dense = std::max(*dense, n * sizeof(act));
        }
    }
    s.weights = c->n_layers * layer + vector_bytes(v, other_vectors(c, &none, v));
    return s;
}

/* An estimate of the driver's memory for graphs, 1 KiB a node, allocated when a graph is first
 * used. */
static size_t graph_bytes(const qemb_config *c, bool by_bytes) {
    return (size_t)GRAPH_SIZES * GRAPH_TEXTS * c->n_layers * (by_bytes ? 14 : 10) << 10;
}

static int plan(qemb_part *p, const qemb_file *f, const qemb_options *opt, size_t arena, bool fp8) {
    const qemb_layer *y = &f->weights.layers[0];
    const gemm_kind kind = kind_of(fp8, opt->device);
    const device_sizes s = size_parts(&f->config, opt, y, kind);
    const bool by_bytes = fp8 || y->wqkv.dtype == QEMB_I8;
    const bool bert = f->config.architecture == QEMB_BERT;
    const qemb_part all[] = {
        {fp8        ? "weights of the layers, e4m3 with a scale per row"
         : by_bytes ? "weights of the layers, int8 with a scale per 64 of a row"
                    : "weights of the layers, FP16",
         s.weights},
        {"a layer's matrices in FP16, made from int8 before each product", s.dense[0] + s.dense[1]},
        {"activations", arena},
        {bert ? "outputs of attention and products in FP16, before they are made e4m3"
              : "attention's output in FP16, before it is made e4m3",
         s.halves},
        {"an FP8 product before its scales are applied", s.sums},
        {"cuBLASLt's workspace", s.workspace},
        {"the upload of weights, as much again pinned in main memory", s.staging},
        {"a batch's lists, as much again pinned in main memory", s.lists + s.counter},
        {"the rope table", s.rope},
        {"the table of positions", s.positions},
        {"CUDA graphs, at most (an estimate; taken when first used)",
         opt->no_graphs ? 0 : graph_bytes(&f->config, by_bytes)}};
    int n = 0;
    size_t sum = 0;
    for (const qemb_part &part : all) {
        sum += part.bytes;
        if (part.bytes) p[n++] = part;
    }
    if (!opt->vram || sum + s.table <= opt->vram)
        p[n++] = {"the embedding table, if it fits; else pinned in main memory", s.table};
    return n;
}

/* ---- rows as e4m3 ---------------------------------------------------------------------------- */

static unsigned blocks(size_t n, int per_block) {
    return (unsigned)((n + per_block - 1) / per_block);
}
static unsigned stride_blocks(const qemb_backend *be, size_t wanted) {
    return (unsigned)std::min(wanted, (size_t)be->sms * BLOCKS_PER_SM);
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

/* to = x (T, K), FP16, or INT8 with x_scales. */
template <class X>
static void launch_quantize(qemb_backend *be, const coded_rows &to, const X *x,
                            const float *x_scales, int T, int K) {
    by_columns(K, [&](auto v) {
        good(be,
             launch(quantize_kernel<X, v>, dim3(stride_blocks(be, T)), dim3(ROW_THREADS),
                    ROW_WARPS * sizeof(float), be->st, to.codes, to.scales, x, x_scales, T, K),
             "quantize");
    });
}

/* ---- open, close ----------------------------------------------------------------------------- */

static int check_config(const qemb_config *c, bool fp8, qemb_err *err) {
    const int G = c->n_heads / c->n_kv_heads;
    const bool small = c->architecture == QEMB_BERT; /* whose heads may have 32 numbers */
    if (c->head_dim != 64 && c->head_dim != 128 && !(small && c->head_dim == 32))
        return qemb_fail(err, "device",
                         "GPU kernels: head size not supported (got %d, want %s64 or 128)",
                         c->head_dim, small ? "32, " : "");
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
    if (c->hidden % 8 || c->ffn % 8 || c->hidden > 8 * 4 * ROW_THREADS)
        return qemb_fail(
            err, "device",
            "GPU kernels: sizes not supported (got hidden %d, ffn %d, want multiples of 8 "
            "and hidden up to %d)",
            c->hidden, c->ffn, 8 * 4 * ROW_THREADS);
    return 0;
}

/* The name of the file under dir for this GPU and library. NULL: out of memory. */
static char *cache_file(const char *dir, bool fp8, int device) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, device) != cudaSuccess) return nullptr;
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

/* Finds the device and proves that this program has code for it. */
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
    if (be->device < 0 || be->device >= n)
        return qemb_fail(err, "device", "GPU: no such device (got %d, want 0..%d)", be->device,
                         n - 1);
    e = cudaSetDevice(be->device);
    if (e != cudaSuccess)
        return qemb_fail(err, "device", "GPU %d: cannot be used (%s)", be->device,
                         cudaGetErrorString(e));
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, be->device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, be->device);
    cudaDeviceGetAttribute(&be->sms, cudaDevAttrMultiProcessorCount, be->device);
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, be->device);
    if (major < 8)
        return qemb_fail(err, "device",
                         "GPU: too old (got compute capability %d.%d, want 8.0 or newer)", major,
                         minor);
    if (be->fp8 && (10 * major + minor < 89 || cublasLtGetVersion() < 120900))
        return qemb_fail(err, "device",
                         "FP8 products: not on this GPU (got compute capability %d.%d and cuBLASLt "
                         "%zu, want 8.9 and 120900 or newer); --math f16 computes here",
                         major, minor, cublasLtGetVersion());
    e = cudaFuncGetAttributes(&attributes, (const void *)gather_rows_kernel<float4>);
    if (e != cudaSuccess)
        return qemb_fail(err, "device",
                         "GPU: this build has no code for compute capability %d.%d (%s)", major,
                         minor, cudaGetErrorString(e));
    be->wide = major < 12 && shared >= att_shared_bytes<128, 2>();
    be->hopper.on = be->hopper.on && major == 9 && minor == 0;
    return 0;
}

template <int HD, int M> static cudaError_t allow_shared() {
    cudaError_t e = cudaSuccess;
    for (const void *kernel : {(const void *)attention_kernel<act, HD, M, false>,
                               (const void *)attention_kernel<act, HD, M, true>})
        if (e == cudaSuccess)
            e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     att_shared_bytes<HD, M>());
    return e;
}

static int open_device(qemb_backend *be, qemb_err *err) {
    cudaError_t e = cudaStreamCreateWithFlags(&be->st, cudaStreamNonBlocking);
    for (int i = 0; i < SLOTS && e == cudaSuccess; i++)
        e = cudaEventCreateWithFlags(&be->slots[i].free, cudaEventDisableTiming);
    for (int i = 0; i < IN_FLIGHT && e == cudaSuccess; i++)
        e = cudaEventCreateWithFlags(&be->pooled[i].done, cudaEventDisableTiming);
    if (e == cudaSuccess) e = cudaEventCreateWithFlags(&be->batch_free, cudaEventDisableTiming);
    if (e == cudaSuccess) e = allow_shared<32, 1>();
    if (e == cudaSuccess) e = allow_shared<64, 1>();
    if (e == cudaSuccess) e = allow_shared<128, 1>();
    if (e == cudaSuccess && be->wide) e = allow_shared<32, 2>();
    if (e == cudaSuccess && be->wide) e = allow_shared<64, 2>();
    if (e == cudaSuccess && be->wide) e = allow_shared<128, 2>();
    if (e == cudaSuccess && be->hopper.on) e = hopper_open<act>(&be->hopper, be->sms);
    if (e != cudaSuccess)
        return qemb_fail(err, "device", "GPU: cannot start (%s)", cudaGetErrorString(e));
    return 0;
}

/* Opens cuBLASLt and asks it for the four products of a layer now, so that a missing one is an
 * error of open. */
static int open_products(qemb_backend *be, const qemb_options *opt, qemb_err *err) {
    const qemb_config *c = be->c;
    const int hd = c->head_dim, Q = c->n_heads * hd, KV = c->n_kv_heads * hd;
    const int up = c->architecture == QEMB_BERT ? c->ffn : 2 * c->ffn;
    gemm_state *g = &be->gemm;
    cublasStatus_t s = gemm_open(g, kind_of(be->fp8, be->device), opt->deterministic);
    if (!s) s = gemm_add_shape(g, Q + 2 * KV, c->hidden, false);
    if (!s) s = gemm_add_shape(g, c->hidden, Q, true);
    if (!s) s = gemm_add_shape(g, up, c->hidden, false);
    if (!s) s = gemm_add_shape(g, c->hidden, c->ffn, true);
    if (s) return qemb_fail(err, "device", "cuBLASLt: cannot start (status %d)", (int)s);
    for (int i = 0; i < g->n_shapes; i++) {
        s = gemm_choose(g, &g->shapes[i], be->max_rows);
        if (s)
            return qemb_fail(err, "device",
                             "%s products: cuBLASLt %zu has none of %d x %d that serves here "
                             "(status %d)%s",
                             be->fp8 ? "FP8" : "FP16", cublasLtGetVersion(), g->shapes[i].N,
                             g->shapes[i].K, (int)s, be->fp8 ? "; --math f16 computes here" : "");
    }
    if (opt->cache_dir && !opt->deterministic)
        be->cache_path = cache_file(opt->cache_dir, be->fp8, be->device);
    return 0;
}

/* The table of cosines and sines. As in transformers, the frequency and its product with the
 * position are rounded to float (Su et al. 2021). */
static int make_rope(qemb_backend *be, int positions, qemb_err *err) {
    const int half = be->c->head_dim / 2;
    const size_t bytes = (size_t)positions * half * sizeof(float2);
    float2 *table = (float2 *)malloc(bytes);
    if (!table) return qemb_fail(err, "out_of_memory", "rope table: out of memory");
    be->rope = (float2 *)device_alloc(be, bytes, "the rope table", err);
    int turn = 0;
    if (be->rope) {
        for (int i = 0; i < half; i++) {
            const float freq = (float)(1 / pow(be->c->rope_theta, (double)i / half));
            for (int p = 0; p < positions; p++) {
                const float angle = (float)p * freq;
                table[(size_t)p * half + i] = make_float2((float)cos(angle), (float)sin(angle));
            }
        }
        if (!upload(be, be->rope, table, bytes, &turn)) {
            qemb_fail(err, "device", "%s", be->failure);
            be->rope = nullptr;
        }
    }
    free(table);
    return be->rope ? 0 : -1;
}

/* Lists, and what batches bring back: pinned, and on the device. */
static int open_transfers(qemb_backend *be, const qemb_options *opt, const device_sizes *s,
                          qemb_err *err) {
    char *dev = (char *)device_alloc(be, s->staging, "the upload of weights", err);
    if (!dev || pinned_alloc((void **)&be->slots[0].host, s->staging, err)) return -1;
    for (int i = 0; i < SLOTS; i++) {
        be->slots[i].dev = dev + i * SLOT_BYTES;
        be->slots[i].host = be->slots[0].host + i * SLOT_BYTES;
    }
    be->batch_dev = (char *)device_alloc(be, s->lists, "a batch's lists", err);
    if (!be->batch_dev || pinned_alloc((void **)&be->batch_host, s->lists, err)) return -1;
    const size_t vectors = align256((size_t)opt->batch_tokens * be->c->hidden * sizeof(float));
    for (pooled_batch &p : be->pooled) {
        if (pinned_alloc((void **)&p.vectors, vectors + sizeof *p.clamps, err)) return -1;
        p.clamps = (unsigned long long *)((char *)p.vectors + vectors);
    }
    return 0;
}

static int open_buffers(qemb_backend *be, const qemb_options *opt, qemb_err *err) {
    const size_t R = (size_t)be->max_rows;
    const device_sizes s = size_parts(be->c, opt, nullptr, kind_of(be->fp8, be->device));
    be->narrow = (att_tile *)malloc((2 * R + 1) * sizeof *be->narrow);
    be->wide_tiles = (att_tile *)malloc((2 * R + 1) * sizeof *be->wide_tiles);
    if (!be->narrow || !be->wide_tiles)
        return qemb_fail(err, "out_of_memory", "batch lists: out of memory");
    if (open_transfers(be, opt, &s, err)) return -1;
    be->gemm.workspace = device_alloc(be, s.workspace, "cuBLASLt's workspace", err);
    be->clamps = (unsigned long long *)device_alloc(be, s.counter, "a counter", err);
    if (!be->gemm.workspace || !be->clamps) return -1;
    if (s.halves && !(be->halves = (act *)device_alloc(be, s.halves, "outputs in FP16", err)))
        return -1;
    if (s.sums && !(be->sums = (float *)device_alloc(be, s.sums, "FP8 products", err))) return -1;
    if (!good(be, cudaMemsetAsync(be->clamps, 0, s.counter, be->st), "memset"))
        return qemb_fail(err, "device", "%s", be->failure);
    return s.rope ? make_rope(be, opt->max_tokens, err) : 0;
}

static void cuda_close(qemb_backend *be) {
    if (!be) return;
    cudaSetDevice(be->device);
    if (be->st) cudaStreamSynchronize(be->st);
    for (auto &sizes : be->graphs)
        for (batch_graph &g : sizes)
            if (g.exec) cudaGraphExecDestroy(g.exec);
    gemm_close(&be->gemm);
    for (int i = 0; i < be->n_allocated; i++) cudaFree(be->allocated[i]);
    if (be->slots[0].host) cudaFreeHost(be->slots[0].host);
    if (be->batch_host) cudaFreeHost(be->batch_host);
    if (be->pinned_table) cudaFreeHost(be->pinned_table);
    for (pooled_batch &p : be->pooled) {
        if (p.vectors) cudaFreeHost(p.vectors);
        if (p.done) cudaEventDestroy(p.done);
    }
    for (int i = 0; i < SLOTS; i++)
        if (be->slots[i].free) cudaEventDestroy(be->slots[i].free);
    if (be->batch_free) cudaEventDestroy(be->batch_free);
    if (be->st) cudaStreamDestroy(be->st);
    free(be->cache_path);
    free(be->narrow);
    free(be->wide_tiles);
    free(be);
}

static int open_math(qemb_backend **out, const qemb_config *c, const qemb_options *opt, bool fp8,
                     qemb_err *err) {
    if (check_config(c, fp8, err)) return -1;
    qemb_backend *be = (qemb_backend *)calloc(1, sizeof *be);
    if (!be) return qemb_fail(err, "out_of_memory", "backend: out of memory");
    be->c = c;
    be->device = opt->device;
    be->mlp_rows = opt->mlp_rows;
    be->max_rows = pad_rows(std::max(opt->batch_tokens, opt->max_tokens));
    be->budget = opt->vram;
    be->fp8 = fp8;
    be->first = c->pooling == QEMB_POOL_FIRST;
    be->graphs_off = opt->no_graphs;
    be->hopper.on = opt->hopper && !opt->deterministic;
    be->on_layer_loaded = opt->on_layer_loaded;
    while (1 << be->lg < c->n_heads / c->n_kv_heads) be->lg++;
    if (check_device(be, err) || open_device(be, err) || open_buffers(be, opt, err) ||
        open_products(be, opt, err)) {
        cuda_close(be);
        return -1;
    }
    *out = be;
    return 0;
}

/* ---- weights and arena ----------------------------------------------------------------------- */

/* Uploads a matrix through the slots, row by row (INT8: then the scales), and quantizes it on the
 * device to codes and scales. A slot holds many rows, even of ffn numbers. */
static bool load_e4m3(qemb_backend *be, const qemb_mat *m, uint8_t *codes, float *scales,
                      int *turn) {
    const size_t row = (size_t)m->cols * (m->dtype == QEMB_I8 ? 1 : sizeof(act));
    const size_t groups = m->dtype == QEMB_I8 ? QEMB_GROUPS(m->cols) : 0;
    const int step = (int)(SLOT_BYTES / (row + groups * sizeof(float)));
    bool ok = true;
    for (int r = 0; r < m->rows && ok; r += step, ++*turn) {
        staging *s = &be->slots[*turn % SLOTS];
        const int n = std::min(step, m->rows - r);
        const size_t own = n * groups * sizeof(float); /* rows are multiples of 16 bytes */
        const coded_rows to(codes + (size_t)r * m->cols, scales + r);
        ok = good(be, cudaEventSynchronize(s->free), "upload"); /* slot_quantize */
        if (ok) memcpy(s->host, (const char *)m->data + r * row, n * row);
        if (ok && own) memcpy(s->host + n * row, m->scale + r * groups, own);
        ok = ok &&
             good(be,
                  cudaMemcpyAsync(s->dev, s->host, n * row + own, cudaMemcpyHostToDevice, be->st),
                  "upload");
        if (own)
            launch_quantize(be, to, (const int8_t *)s->dev, (const float *)(s->dev + n * row), n,
                            m->cols);
        else
            launch_quantize(be, to, (const act *)s->dev, nullptr, n, m->cols);
        ok = ok && good(be, cudaEventRecord(s->free, be->st), "upload");
    }
    return ok && !be->failure[0];
}

/* Uploads m to *at, and moves *at past it. */
static bool load_matrix(qemb_backend *be, qemb_mat *m, char **at, int *turn) {
    const size_t n = (size_t)m->rows * m->cols, scales = scale_bytes(m, be->fp8);
    char *data = *at, *scale = data + align256(n);
    const bool bytes = be->fp8 || m->dtype == QEMB_I8;
    bool ok = true;
    if (be->fp8)
        ok = load_e4m3(be, m, (uint8_t *)data, (float *)scale, turn);
    else if (m->dtype == QEMB_I8)
        ok = upload(be, data, m->data, n, turn) && upload(be, scale, m->scale, scales, turn);
    else
        ok = upload(be, data, m->data, n * sizeof(act), turn);
    m->data = data;
    m->scale = bytes ? (const float *)scale : nullptr;
    *at = bytes ? scale + align256(scales) : data + align256(n * sizeof(act));
    return ok;
}

static bool load_vectors(qemb_backend *be, const layer_vector *v, int n, char **at, int *turn) {
    bool ok = true;
    for (int i = 0; i < n && ok; i++) {
        ok = upload(be, *at, *v[i].p, v[i].n * sizeof(float), turn);
        *v[i].p = (const float *)*at;
        *at += align256(v[i].n * sizeof(float));
    }
    return ok;
}

static int load_layers(qemb_backend *be, qemb_weights *w, qemb_err *err) {
    const qemb_config *c = be->c;
    const qemb_options opt = {}; /* sizes of weights do not depend on them */
    const device_sizes s = size_parts(c, &opt, &w->layers[0], be->gemm.kind);
    for (int i = 0; i < 2; i++)
        if (s.dense[i] &&
            !(be->dense[i] = (act *)device_alloc(be, s.dense[i], "a dequantized matrix", err)))
            return -1;
    char *dev = (char *)device_alloc(be, s.weights, "the weights", err), *at = dev;
    if (!dev) return -1;
    bool ok = true;
    int turn = 0;
    layer_vector v[LAYER_VECTORS];
    for (int l = 0; l < c->n_layers && ok; l++) {
        qemb_layer *y = &w->layers[l];
        qemb_mat *matrices[QEMB_LAYER_MATRICES];
        qemb_layer_matrices(y, matrices);
        ok = load_vectors(be, v, layer_vectors(c, y, v), &at, &turn);
        for (qemb_mat *m : matrices) ok = ok && load_matrix(be, m, &at, &turn);
        if (c->architecture == QEMB_QWEN3) y->wdown.alpha *= 1 << SWIGLU_SHIFT;
        if (ok && be->on_layer_loaded) be->on_layer_loaded(l + 1, c->n_layers);
    }
    ok = ok && load_vectors(be, v, other_vectors(c, w, v), &at, &turn);
    if (!ok) return qemb_fail(err, "device", "%s", be->failure);
    assert(at == dev + s.weights);
    return 0;
}

static int load_positions(qemb_backend *be, qemb_weights *w, qemb_err *err) {
    const size_t bytes = (size_t)qemb_position_rows(be->c) * be->c->hidden * sizeof(float);
    float *dev = (float *)device_alloc(be, bytes, "the table of positions", err);
    int turn = 0;
    if (!dev) return -1;
    if (!upload(be, dev, w->pos_emb, bytes, &turn))
        return qemb_fail(err, "device", "%s", be->failure);
    w->pos_emb = dev;
    return 0;
}

/* The embedding table goes to the device, if it fits beside everything else, or else to pinned
 * memory. */
static int load_table(qemb_backend *be, qemb_mat *table, qemb_err *err) {
    const size_t bytes = (size_t)table->rows * table->cols * sizeof(act);
    int turn = 0;
    if (bytes > memory_left(be, TABLE_RESERVE)) {
        if (pinned_alloc(&be->pinned_table, bytes, err)) return -1;
        memcpy(be->pinned_table, table->data, bytes);
        table->data = be->pinned_table;
        return 0;
    }
    void *dev = device_alloc(be, bytes, "the embedding table", err);
    if (!dev) return -1;
    if (!upload(be, dev, table->data, bytes, &turn))
        return qemb_fail(err, "device", "%s", be->failure);
    table->data = dev;
    return 0;
}

/* Reads the algorithms from the cache file and times those that it lacks, in the memory of the
 * activations. Leaves out buckets that no batch reaches; but QEMB_BERT's wqkv gets fewer rows. */
static void tune(qemb_backend *be, qemb_layer *y) {
    qemb_mat *matrices[QEMB_LAYER_MATRICES];
    qemb_layer_matrices(y, matrices);
    gemm_bench b = {be->st, nullptr, nullptr, be->arena, be->arena_bytes};
    gemm_load(&be->gemm, be->cache_path);
    bool ok =
        good(be, cudaMemsetAsync(b.scratch, 0x2c, b.bytes, b.st), "timing") && /* halves of 0.066 */
        good(be, cudaEventCreateWithFlags(&b.start, cudaEventDefault), "timing") &&
        good(be, cudaEventCreateWithFlags(&b.stop, cudaEventDefault), "timing");
    for (int i = 0; ok && i < be->gemm.n_shapes; i++) {
        gemm_shape *p = &be->gemm.shapes[i];
        const bool mlp = p->N == matrices[UP]->rows || p->K == be->c->ffn;
        const int rows = mlp ? std::min(be->max_rows, be->mlp_rows) : be->max_rows;
        const void *w = nullptr; /* what the product reads */
        for (const qemb_mat *m : matrices)
            if (m->rows == p->N && m->cols == p->K)
                w = be->dense[0] ? be->dense[m != matrices[UP]] : m->data;
        for (int k = 0; k <= gemm_bucket(&be->gemm, rows); k++)
            if (!p->buckets[k].timed && gemm_tune(&be->gemm, p, k, &b, w))
                gemm_save(&be->gemm, p, k, be->cache_path);
    }
    if (b.start) cudaEventDestroy(b.start);
    if (b.stop) cudaEventDestroy(b.stop);
}

static int cuda_load_weights(qemb_backend *be, qemb_weights *w, qemb_err *err) {
    cudaSetDevice(be->device);
    const bool bert = be->c->architecture == QEMB_BERT;
    if (load_layers(be, w, err) || (bert && load_positions(be, w, err)) ||
        load_table(be, &w->tok_emb, err))
        return -1;
    if (be->cache_path) tune(be, &w->layers[0]);
    return 0;
}

static void *cuda_arena(qemb_backend *be, size_t bytes, qemb_err *err) {
    cudaSetDevice(be->device);
    be->arena_bytes = bytes;
    return be->arena = (char *)device_alloc(be, bytes, "the activations", err);
}

#endif
