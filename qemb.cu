/* qemb.cu - the CUDA backend: one more table of ops. The kernels are in kernels.cuh and attention.cuh,
 * the matrix products in gemm.cuh; here are the device's memory, the way of a batch to it and back, and
 * the launches. One stream; host and device meet in the two staging slots and in pool.
 */
#include "qemb_cuda.h"

#include "attention.cuh"
#include "gemm.cuh"
#include "kernels.cuh"

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
enum { WIDE_FROM = 512 };   /* texts of that many tokens get 128-row attention tiles */
enum { BLOCKS_PER_SM = 8 }; /* of grid-stride kernels */
constexpr double MIB = 1 << 20;

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

struct qemb_backend {
    const qemb_config *c;
    cudaStream_t st;
    char failure[160];    /* the first one; empty: none */
    int sms, threads, lg; /* H/K = 1 << lg */
    bool wide;            /* 128-row attention tiles fit this GPU */
    gemm_state gemm;
    size_t used, budget; /* device bytes allocated; allowed (0: all there is) */
    void *device[8];     /* what close frees */
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
    att_tile *narrow, *wide_tiles; /* (max_rows + 1) tiles being listed */
};

/* ---- failures --------------------------------------------------------------------------------- */

static void note_failure(qemb_backend *be, const char *op, const char *why) {
    if (!be->failure[0]) snprintf(be->failure, sizeof be->failure, "GPU: %s failed (%s)", op, why);
}
static bool good(qemb_backend *be, cudaError_t e, const char *op) {
    if (e != cudaSuccess) note_failure(be, op, cudaGetErrorString(e));
    return e == cudaSuccess;
}
const char *qemb_cuda_failure(const qemb_backend *be) {
    return be->failure[0] ? be->failure : nullptr;
}
unsigned long long qemb_cuda_clamped(const qemb_backend *be) { return be->n_clamped; }

/* ---- memory ----------------------------------------------------------------------------------- */

static void *device_alloc(qemb_backend *be, size_t bytes, const char *what, qemb_err *err) {
    size_t left = 0, total = 0;
    void *p = nullptr;
    assert(be->n_device < (int)(sizeof be->device / sizeof *be->device));
    cudaMemGetInfo(&left, &total);
    if (be->budget) left = std::min(left, be->budget - std::min(be->used, be->budget));
    if (bytes > left || cudaMalloc(&p, bytes) != cudaSuccess) {
        cudaGetLastError(); /* reported here, not by the next launch */
        qemb_fail(err, "device", "GPU memory: not enough for %s (got %.0f MiB left, want %.0f MiB)",
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

/* ---- open, close ------------------------------------------------------------------------------ */

static int check_config(const qemb_config *c, qemb_err *err) {
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
    if (c->hidden % 8 || c->ffn % 8 || c->hidden > 8 * 4 * NORM_THREADS)
        return qemb_fail(
            err, "device",
            "GPU kernels: sizes not supported (got hidden %d, ffn %d, want multiples of 8 "
            "and hidden up to %d)",
            c->hidden, c->ffn, 8 * 4 * NORM_THREADS);
    return 0;
}

/* The file for this GPU and library under dir; NULL: out of memory. */
static char *cache_file(const char *dir) {
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, 0) != cudaSuccess) return nullptr;
    for (char *s = p.name; *s; s++)
        if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.", *s))
            *s = '-';
    const size_t n = strlen(dir) + strlen(p.name) + 96;
    char *path = (char *)malloc(n);
    if (path)
        snprintf(path, n, "%s/cublaslt-%zu-%s-sm%d%d-%d", dir, cublasLtGetVersion(), p.name,
                 p.major, p.minor, p.multiProcessorCount);
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
    e = cudaFuncGetAttributes(&attributes, (const void *)gather_last_kernel<float4>);
    if (e != cudaSuccess)
        return qemb_fail(err, "device",
                         "GPU: this build has no code for compute capability %d.%d (%s)", major,
                         minor, cudaGetErrorString(e));
    be->wide = major < 12 && shared >= att_shared_bytes<128, 2>();
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
    if (e != cudaSuccess)
        return qemb_fail(err, "device", "GPU: cannot start (%s)", cudaGetErrorString(e));

    const qemb_config *c = be->c;
    const int hd = c->head_dim, Q = c->n_heads * hd, KV = c->n_kv_heads * hd;
    cublasStatus_t s = gemm_open(&be->gemm, opt->deterministic);
    if (!s) s = gemm_add_shape(&be->gemm, Q + 2 * KV, c->hidden, false);
    if (!s) s = gemm_add_shape(&be->gemm, c->hidden, Q, true);
    if (!s) s = gemm_add_shape(&be->gemm, 2 * c->ffn, c->hidden, false);
    if (!s) s = gemm_add_shape(&be->gemm, c->hidden, c->ffn, true);
    if (s) return qemb_fail(err, "device", "cuBLASLt: cannot start (status %d)", (int)s);
    if (opt->cache_dir && !opt->deterministic) be->cache_path = cache_file(opt->cache_dir);
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
    const size_t bytes = view_batch(nullptr, nullptr, R, R, 2 * R + 1);
    be->unique = (int32_t *)malloc(R * sizeof *be->unique);
    be->slot_of = (int32_t *)calloc(V, sizeof *be->slot_of);
    be->narrow = (att_tile *)malloc((R + 1) * sizeof *be->narrow);
    be->wide_tiles = (att_tile *)malloc((R + 1) * sizeof *be->wide_tiles);
    if (!be->unique || !be->slot_of || !be->narrow || !be->wide_tiles)
        return qemb_fail(err, "out_of_memory", "batch lists: out of memory");
    char *dev = (char *)device_alloc(be, SLOTS * SLOT_BYTES, "transfers", err);
    if (!dev || pinned_alloc((void **)&be->slots[0].host, SLOTS * SLOT_BYTES, err)) return -1;
    for (int i = 0; i < SLOTS; i++) {
        be->slots[i].dev = dev + i * SLOT_BYTES;
        be->slots[i].host = be->slots[0].host + i * SLOT_BYTES;
    }
    be->batch_dev = (char *)device_alloc(be, bytes, "a batch's lists", err);
    if (!be->batch_dev || pinned_alloc((void **)&be->batch_host, bytes, err)) return -1;
    be->gemm.workspace = device_alloc(be, GEMM_WORKSPACE, "cuBLASLt's workspace", err);
    be->clamps = (unsigned long long *)device_alloc(be, sizeof *be->clamps, "a counter", err);
    if (!be->gemm.workspace || !be->clamps) return -1;
    if (!good(be, cudaMemsetAsync(be->clamps, 0, sizeof *be->clamps, be->st), "memset"))
        return qemb_fail(err, "device", "%s", be->failure);
    return make_rope(be, opt->max_tokens, err);
}

static void cuda_close(qemb_backend *be) {
    if (!be) return;
    if (be->st) cudaStreamSynchronize(be->st);
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

static int cuda_open(qemb_backend **out, const qemb_config *c, const qemb_options *opt,
                     qemb_err *err) {
    if (check_config(c, err)) return -1;
    qemb_backend *be = (qemb_backend *)calloc(1, sizeof *be);
    if (!be) return qemb_fail(err, "out_of_memory", "backend: out of memory");
    be->c = c;
    be->threads = std::max(opt->threads, 1);
    be->max_rows = std::max(opt->batch_tokens, opt->max_tokens);
    be->budget = opt->vram;
    while (1 << be->lg < c->n_heads / c->n_kv_heads) be->lg++;
    if (check_device(be, err) || open_device(be, opt, err) || open_buffers(be, opt, err)) {
        cuda_close(be);
        return -1;
    }
    *out = be;
    return 0;
}

/* ---- weights and arena ------------------------------------------------------------------------ */

/* Calls f(pointer to data, bytes) for everything of w that moves to the device. */
template <class F> static void each_weight(const qemb_config *c, qemb_weights *w, F f) {
    const size_t D = (size_t)c->hidden * sizeof(float), hd = (size_t)c->head_dim * sizeof(float);
    for (int l = 0; l < c->n_layers; l++) {
        qemb_layer *y = &w->layers[l];
        f((const void **)&y->attn_norm, D);
        f((const void **)&y->q_norm, hd);
        f((const void **)&y->k_norm, hd);
        f((const void **)&y->mlp_norm, D);
        for (qemb_mat *m : {&y->wqkv, &y->wo, &y->wgu, &y->wdown})
            f(&m->data, (size_t)m->rows * m->cols * sizeof(act));
    }
    f((const void **)&w->final_norm, D);
}

static int cuda_place(qemb_backend *be, qemb_weights *w, qemb_err *err) {
    const qemb_config *c = be->c;
    for (int l = 0; l < c->n_layers; l++)
        for (const qemb_mat *m :
             {&w->layers[l].wqkv, &w->layers[l].wo, &w->layers[l].wgu, &w->layers[l].wdown})
            if (m->dtype != QEMB_F16)
                return qemb_fail(err, "device",
                                 "layers.%d: weights not supported on a GPU (got dtype %d, "
                                 "want %d, FP16)",
                                 l, (int)m->dtype, (int)QEMB_F16);
    size_t total = 0, at = 0;
    each_weight(c, w, [&](const void **, size_t bytes) { total += align256(bytes); });
    char *dev = (char *)device_alloc(be, total, "the weights", err);
    if (!dev) return -1;
    bool ok = true;
    int turn = 0;
    each_weight(c, w, [&](const void **p, size_t bytes) {
        ok = ok && upload(be, dev + at, *p, bytes, &turn);
        *p = dev + at;
        at += align256(bytes);
    });
    if (!ok) return qemb_fail(err, "device", "%s", be->failure);
    for (int l = 0; l < c->n_layers; l++) w->layers[l].wdown.alpha *= 1 << SWIGLU_SHIFT;
    const qemb_layer *y = &w->layers[0];
    const qemb_mat mats[] = {y->wqkv, y->wo, y->wgu,
                             y->wdown}; /* the order of open_device's shapes */
    std::copy(mats, mats + 4, be->timed);
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
        const int rows = mlp ? std::min(be->max_rows, QEMB_MLP_ROWS) : be->max_rows;
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

static void list_unique(qemb_backend *be, int *slot, const qemb_layout *b) {
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

static void cuda_begin(qemb_backend *be, const qemb_layout *b) {
    assert(b->T <= be->max_rows && b->B >= 1 && b->cu[0] == b->P && b->cu[b->B] == b->T);
    be->n_narrow = be->n_wide = 0;
    if (b->P) list_tiles(be, 0, b->P, 0);
    for (int i = 0; i < b->B; i++) list_tiles(be, b->cu[i], b->cu[i + 1] - b->cu[i], b->P);
    sort_tiles(be->narrow, be->n_narrow);
    sort_tiles(be->wide_tiles, be->n_wide);

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

static unsigned blocks(size_t n, int per_block) {
    return (unsigned)((n + per_block - 1) / per_block);
}
static unsigned stride_blocks(const qemb_backend *be, size_t wanted) {
    return (unsigned)std::min(wanted, (size_t)be->sms * BLOCKS_PER_SM);
}

static void cuda_embed(qemb_backend *be, float *x, const qemb_mat *tok_emb, const qemb_layout *b) {
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
    any_rmsnorm(be, (act *)y, x, w, T);
}

static void run_gemm(qemb_backend *be, void *y, const qemb_act *x, const qemb_mat *w, bool add,
                     int T) {
    const cublasStatus_t s = gemm_run(&be->gemm, y, x, w, add, T, be->st);
    char why[32];
    snprintf(why, sizeof why, "cuBLASLt status %d", (int)s);
    if (s) note_failure(be, add ? "matmul_add" : "matmul", why);
}
static void cuda_matmul(qemb_backend *be, qemb_act *y, const qemb_act *x, const qemb_mat *w,
                        int T) {
    run_gemm(be, y, x, w, false, T);
}
static void cuda_matmul_add(qemb_backend *be, float *x, const qemb_act *a, const qemb_mat *w,
                            int T) {
    run_gemm(be, x, a, w, true, T);
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
                             const float *k_norm, const qemb_layout *b) {
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
template <int HD>
static void any_attention(qemb_backend *be, act *att, const act *qkv, int B, int last_only) {
    const att_tile *narrow = be->dev.tiles, *wide = narrow + be->n_narrow,
                   *last = wide + be->n_wide;
    if (last_only) return launch_attention<HD, 1>(be, att, qkv, last, B);
    launch_attention<HD, 2>(be, att, qkv, wide, be->n_wide);
    launch_attention<HD, 1>(be, att, qkv, narrow, be->n_narrow);
}
static void cuda_attention(qemb_backend *be, qemb_act *att, const qemb_act *qkv,
                           const qemb_layout *b, int last_only) {
    if (be->c->head_dim == 64)
        any_attention<64>(be, (act *)att, (const act *)qkv, b->B, last_only);
    else
        any_attention<128>(be, (act *)att, (const act *)qkv, b->B, last_only);
}

static void cuda_gate_up(qemb_backend *be, qemb_act *h, qemb_act *gu, const qemb_act *x,
                         const qemb_mat *w, int T) {
    const int F = be->c->ffn;
    cuda_matmul(be, gu, x, w, T);
    const size_t wanted = blocks((size_t)T * F / 8, SWIGLU_THREADS);
    good(be,
         launch(swiglu_kernel<act>, dim3(stride_blocks(be, wanted)), dim3(SWIGLU_THREADS), 0,
                be->st, (act *)h, (const act *)gu, T, F, be->clamps),
         "gate_up");
}

static void cuda_gather_last(qemb_backend *be, float *y, const float *x, const qemb_layout *b) {
    good(be,
         launch(gather_last_kernel<float4>, dim3((unsigned)b->B), dim3(GATHER_THREADS), 0, be->st,
                (float4 *)y, (const float4 *)x, be->dev.last, be->c->hidden / 4),
         "gather_last");
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

const qemb_ops qemb_cuda_ops = {
    .name = "cuda",
    .math = QEMB_MATH_F32,
    .act_size = sizeof(act),
    .open = cuda_open,
    .close = cuda_close,
    .place = cuda_place,
    .arena = cuda_arena,
    .begin = cuda_begin,
    .embed = cuda_embed,
    .rmsnorm = cuda_rmsnorm,
    .matmul = cuda_matmul,
    .matmul_add = cuda_matmul_add,
    .qknorm_rope = cuda_qknorm_rope,
    .attention = cuda_attention,
    .gate_up = cuda_gate_up,
    .gather_last = cuda_gather_last,
    .pool = cuda_pool,
};
