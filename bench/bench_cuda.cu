/* bench_cuda.cu - the CUDA backend's own ops, timed on a GPU. Each line: op, sizes, microseconds,
 * and GB/s of the bytes in the kernel's header or TFLOP/s of the product. tests/cuda/gpu_day.py
 * runs it; --json for that.
 *
 *   bench_cuda [--json] [--math f16|fp8] [--only TEXT] [D H K hd F]
 *
 * The five numbers are the shape; without them it is Qwen3-Embedding-4B's. --only: the rows whose
 * op and sizes, as they are printed, contain TEXT.
 *
 * fp8 times what it alone has: products of codes, gate_up, and rmsnorm.
 *
 * Times are the median of RUNS runs of BATCH calls, after a warm-up, taken on the host: the ops run
 * on the backend's own stream. Device memory holds random numbers: zeros draw less power and clock
 * higher. A product takes the next of several copies of its weights in every call, together twice
 * the L2 cache or more: in a forward each layer's weights come from memory.
 */
#include "backends/cuda/qemb_cuda.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <vector>

#include <cuda_fp16.h>
#include <cuda_runtime.h>

constexpr int RUNS = 7, BATCH = 10;

static void die(const char *what, const char *why) {
    fprintf(stderr, "bench_cuda: %s: %s\n", what, why);
    exit(2);
}
static void ok(cudaError_t e, const char *what) {
    if (e != cudaSuccess) die(what, cudaGetErrorString(e));
}

struct bench {
    qemb_config c;
    const qemb_ops *ops;
    qemb_backend *be;
    bool json;
    const char *only; /* part of a row's op and sizes; null: all rows */
    size_t l2;        /* bytes of the L2 cache */
    bool hopper;      /* be runs Hopper's own kernels where it has them */
    int T;
    std::vector<int32_t> tokens, pos, cu;
    qemb_packed_batch b;
};

/* A number from 64 random bits (xorshift): signs, and all sizes up to 1. */
static uint64_t random_bits() {
    static uint64_t x = 0x9e3779b97f4a7c15u;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x;
}
template <class T> static T random_number() {
    return (T)((float)(random_bits() >> 40) * 0x1p-23f - 1);
}
template <> uint8_t random_number<uint8_t>() {
    return (uint8_t)(random_bits() >> 56) & 0xb7; /* e4m3: both signs, below 1, no NaN */
}

/* n numbers of device memory, random in -1 .. 1. */
template <class T> static T *random_device(size_t n) {
    const size_t period = 1 << 20;
    std::vector<T> v(std::min(n, period));
    for (T &x : v) x = random_number<T>();
    T *p;
    ok(cudaMalloc((void **)&p, n * sizeof(T)), "cudaMalloc");
    for (size_t at = 0; at < n; at += period)
        ok(cudaMemcpy(p + at, v.data(), std::min(n - at, period) * sizeof(T),
                      cudaMemcpyHostToDevice),
           "upload");
    return p;
}

/* Copies of W (N, K) as the table multiplies it, and x (T, K); in FP8 codes, and behind them a
 * scale for each row, of whole sixteens of rows. */
struct operands {
    void *w;
    __half *x;
    float *scale;
    size_t bytes, count, turn; /* of a copy; copies; the next */
    qemb_mat first;
    operands(const bench *s, int N, int K, int T) : scale(nullptr), turn(0) {
        const bool fp8 = s->ops->math == QEMB_MATH_FP8;
        const size_t n = (size_t)N * K;
        bytes = n * (fp8 ? 1 : sizeof(__half));
        count = 1 + (2 * s->l2 + bytes - 1) / bytes;
        w = fp8 ? (void *)random_device<uint8_t>(count * n)
                : (void *)random_device<__half>(count * n);
        if (fp8) {
            const size_t rows = (size_t)(T + 15) / 16 * 16, codes = rows * K;
            float *scales = random_device<float>(rows);
            scale = random_device<float>((size_t)N);
            x = (__half *)random_device<uint8_t>(codes + rows * sizeof(float));
            ok(cudaMemcpy((char *)x + codes, scales, rows * sizeof(float),
                          cudaMemcpyDeviceToDevice),
               "copy");
            cudaFree(scales);
        } else {
            x = random_device<__half>((size_t)T * K);
        }
        first = {w, N, K, QEMB_F16, 1, scale, QEMB_BITS_UNKNOWN};
    }
    qemb_mat next() {
        qemb_mat m = first;
        m.data = (char *)w + turn++ % count * bytes;
        return m;
    }
    operands(const operands &) = delete;
    ~operands() {
        for (void *p : {w, (void *)x, (void *)scale}) cudaFree(p);
    }
};

template <class F> static double microseconds(F f) {
    std::vector<double> t;
    for (int run = 0; run <= RUNS; run++) {
        timespec a, z;
        ok(cudaDeviceSynchronize(), "before");
        clock_gettime(CLOCK_MONOTONIC, &a);
        for (int i = 0; i < BATCH; i++) f();
        ok(cudaDeviceSynchronize(), "op");
        clock_gettime(CLOCK_MONOTONIC, &z);
        if (run)
            t.push_back(((double)(z.tv_sec - a.tv_sec) * 1e9 + (double)(z.tv_nsec - a.tv_nsec)) /
                        1e3 / BATCH);
    }
    std::sort(t.begin(), t.end());
    return t[t.size() / 2];
}

/* Whether a row is asked for */
static bool chosen(const bench *s, const char *op, const char *sizes) {
    char row[128];
    snprintf(row, sizeof row, "%s %s", op, sizes);
    return !s->only || strstr(row, s->only);
}

static void report(const bench *s, const char *op, const char *sizes, double us, double bytes,
                   double flops) {
    if (s->json)
        printf("{\"op\": \"%s\", \"sizes\": \"%s\", \"us\": %.3f, \"gb_s\": %.1f, \"tflop_s\": "
               "%.2f}\n",
               op, sizes, us, bytes / us / 1e3, flops / us / 1e6);
    else if (flops > 0)
        printf("%-14s %-28s %12.2f us %10.1f TFLOP/s\n", op, sizes, us, flops / us / 1e6);
    else
        printf("%-14s %-28s %12.2f us %10.1f GB/s\n", op, sizes, us, bytes / us / 1e3);
    fflush(stdout);
}

/* T rows as texts of n tokens. */
static void layout(bench *s, int T, int n) {
    s->tokens.assign((size_t)T, 0), s->pos.clear(), s->cu.clear();
    for (int t = 0; t < T; t++) {
        if (t % n == 0) s->cu.push_back(t);
        s->pos.push_back(t % n);
    }
    s->cu.push_back(T);
    const int texts = (int)s->cu.size() - 1;
    s->b = qemb_packed_batch{texts,          T, 0, s->tokens.data(), s->pos.data(), s->cu.data(),
                             s->c.attention, 0, 0};
    s->T = T;
    s->ops->begin(s->be, &s->b);
}

static void memory_bound(bench *s, int T) {
    const qemb_ops *op = s->ops;
    const double D = s->c.hidden, hd = s->c.head_dim, H = s->c.n_heads, K = s->c.n_kv_heads;
    char sizes[64];
    snprintf(sizes, sizeof sizes, "T %d", T);
    if (!chosen(s, "rmsnorm", sizes) && !chosen(s, "qknorm_rope", sizes)) return;
    layout(s, T, std::min(T, 512));
    float *x = random_device<float>((size_t)(T * D)),
          *w = random_device<float>((size_t)std::max(D, hd));
    __half *a = random_device<__half>((size_t)(T * (H + 2 * K) * hd));
    __half *o = random_device<__half>((size_t)(T * D));
    if (chosen(s, "rmsnorm", sizes)) {
        const double us = microseconds([&] { op->rmsnorm(s->be, (qemb_act *)o, x, w, T); });
        report(s, "rmsnorm", sizes, us, 6 * D * T, 0);
    }
    if (chosen(s, "qknorm_rope", sizes)) {
        const double us = microseconds([&] { op->qknorm_rope(s->be, (qemb_act *)a, w, w, &s->b); });
        report(s, "qknorm_rope", sizes, us, 4 * (H + K) * hd * T, 0);
    }
    for (void *p : {(void *)x, (void *)w, (void *)a, (void *)o}) cudaFree(p);
}

static void attention(bench *s, int T, int n) {
    const double hd = s->c.head_dim, H = s->c.n_heads, K = s->c.n_kv_heads;
    const bool all = s->c.attention == QEMB_BIDIRECTIONAL;
    const char *op = all ? "attention_all" : s->hopper ? "attention_hopper" : "attention";
    char sizes[64];
    snprintf(sizes, sizeof sizes, "T %d, texts of %d", T, n);
    if (!chosen(s, op, sizes)) return;
    layout(s, T, n);
    __half *qkv = random_device<__half>((size_t)(T * (H + 2 * K) * hd)),
           *att = random_device<__half>((size_t)(T * H * hd));
    const double us = microseconds(
        [&] { s->ops->attention(s->be, (qemb_act *)att, (qemb_act *)qkv, &s->b, QEMB_ALL_ROWS); });
    report(s, op, sizes, us, 4 * hd * (H + K) * T, 4 * hd * H * T * (all ? 2 * n : n + 1) / 2);
    cudaFree(qkv);
    cudaFree(att);
}

static void product(bench *s, const char *name, int N, int K, bool add, int T) {
    const char *op = add ? "matmul_add" : "matmul";
    char sizes[64];
    snprintf(sizes, sizeof sizes, "%s T %d N %d K %d", name, T, N, K);
    if (!chosen(s, op, sizes)) return;
    operands in(s, N, K, T);
    float *y = random_device<float>((size_t)T * N);
    const double us = microseconds([&] {
        const qemb_mat w = in.next();
        if (add)
            s->ops->matmul_add(s->be, y, (qemb_act *)in.x, &w, T);
        else
            s->ops->matmul(s->be, (qemb_act *)y, (qemb_act *)in.x, &w, nullptr, T);
    });
    report(s, op, sizes, us, 2.0 * N * K, 2.0 * T * N * K);
    cudaFree(y);
}

static void gate_up(bench *s, int T) {
    const int D = s->c.hidden, F = s->c.ffn;
    const char *op = s->hopper ? "gate_up_hopper" : "gate_up";
    char sizes[64];
    snprintf(sizes, sizeof sizes, "T %d F %d D %d", T, F, D);
    if (!chosen(s, op, sizes)) return;
    operands in(s, 2 * F, D, T);
    __half *gu = random_device<__half>((size_t)T * 2 * F),
           *h = random_device<__half>((size_t)T * F);
    const double us = microseconds([&] {
        const qemb_mat w = in.next();
        s->ops->gate_up(s->be, (qemb_act *)h, (qemb_act *)gu, (qemb_act *)in.x, &w, T);
    });
    report(s, op, sizes, us, 4.0 * F * D, 4.0 * T * F * D);
    for (void *p : {(void *)gu, (void *)h}) cudaFree(p);
}

static void layernorm(bench *s, int T) {
    const int D = s->c.hidden;
    char sizes[64];
    snprintf(sizes, sizeof sizes, "T %d D %d", T, D);
    if (!chosen(s, "layernorm", sizes)) return;
    float *x = random_device<float>((size_t)T * D), *w = random_device<float>((size_t)D);
    __half *y = random_device<__half>((size_t)T * D);
    const double us = microseconds([&] { s->ops->layernorm(s->be, (qemb_act *)y, x, w, w, w, T); });
    report(s, "layernorm", sizes, us, 10.0 * D * T, 0);
    for (void *p : {(void *)x, (void *)w, (void *)y}) cudaFree(p);
}

static void matmul_gelu(bench *s, int T) {
    const int D = s->c.hidden, F = s->c.ffn;
    char sizes[64];
    snprintf(sizes, sizeof sizes, "T %d F %d D %d", T, F, D);
    if (!chosen(s, "matmul_gelu", sizes)) return;
    operands in(s, F, D, T);
    __half *h = random_device<__half>((size_t)T * F);
    float *bias = random_device<float>((size_t)F);
    const double us = microseconds([&] {
        const qemb_mat w = in.next();
        s->ops->matmul_gelu(s->be, (qemb_act *)h, (qemb_act *)in.x, &w, bias, T);
    });
    report(s, "matmul_gelu", sizes, us, 2.0 * F * D, 2.0 * T * F * D);
    for (void *p : {(void *)h, (void *)bias}) cudaFree(p);
}

static void copy_ceiling(bench *s) {
    if (!chosen(s, "device_copy", "256 MiB")) return;
    const size_t n = (size_t)256 << 20;
    char *a = (char *)random_device<float>(n / 4), *b = (char *)random_device<float>(n / 4);
    const double us =
        microseconds([&] { ok(cudaMemcpyAsync(b, a, n, cudaMemcpyDeviceToDevice, 0), "copy"); });
    report(s, "device_copy", "256 MiB", us, 2.0 * (double)n, 0);
    cudaFree(a);
    cudaFree(b);
}

static void open_backend(bench *s, int rows) {
    qemb_options opt = {};
    opt.batch_tokens = opt.max_tokens = opt.mlp_rows = rows;
    opt.threads = 1;
    opt.hopper = s->hopper;
    qemb_err err = {};
    if (s->ops->open(&s->be, &s->c, &opt, &err)) die(err.code, err.msg);
}

static void close_backend(bench *s) {
    qemb_health health = {};
    s->ops->health(s->be, &health);
    if (health.failure) die("device", health.failure);
    s->ops->close(s->be);
}

/* One layer, 16 rows in the table */
static qemb_config config(int D, int H, int K, int hd, int F, int max) {
    qemb_config c = {};
    c.n_layers = 1, c.hidden = D, c.n_heads = H, c.n_kv_heads = K, c.head_dim = hd, c.ffn = F;
    c.vocab = 16, c.max_positions = max, c.rope_theta = 1e6f, c.norm_eps = 1e-6f;
    return c;
}

/* The largest product that the tensor cores could wish for. */
static void product_ceiling(const bench *from) {
    bench s = *from;
    s.c = config(8192, 2, 1, 64, 4096, 8192);
    if (!chosen(&s, "matmul", "ceiling T 8192 N 8192 K 8192")) return;
    open_backend(&s, 8192);
    product(&s, "ceiling", 8192, 8192, false, 8192);
    close_backend(&s);
}

/* What QEMB_BERT alone has, and attention over whole texts, at bge-m3's shape */
static void encoder(const bench *from) {
    bench s = *from;
    s.c = config(1024, 16, 16, 64, 4096, 8192);
    s.c.architecture = QEMB_BERT, s.c.attention = QEMB_BIDIRECTIONAL;
    s.c.pooling = QEMB_POOL_FIRST, s.c.first_position = 2;
    open_backend(&s, 8192);
    for (int T : {32, 512, 8192}) layernorm(&s, T), matmul_gelu(&s, T);
    for (int n : {16, 64, 512, 2048, 8192})
        if (s.ops->math != QEMB_MATH_FP8) attention(&s, 8192, n);
    close_backend(&s);
}

static void read_arguments(bench *s, int argc, char **argv) {
    int32_t *shape[] = {&s->c.hidden, &s->c.n_heads, &s->c.n_kv_heads, &s->c.head_dim, &s->c.ffn};
    int i = 1, n = 0;
    for (; i < argc; i++) {
        if (!strcmp(argv[i], "--json"))
            s->json = true;
        else if (!strcmp(argv[i], "--math") && i + 1 < argc)
            s->ops = strcmp(argv[++i], "fp8") ? &qemb_cuda_ops : &qemb_cuda_fp8_ops;
        else if (!strcmp(argv[i], "--only") && i + 1 < argc)
            s->only = argv[++i];
        else if (n < 5 && atoi(argv[i]) > 0)
            *shape[n++] = atoi(argv[i]);
        else
            break;
    }
    if (i < argc || (n && n < 5))
        die("usage", "bench_cuda [--json] [--math f16|fp8] [--only TEXT] [D H K hd F]");
}

int main(int argc, char **argv) {
    bench s = {};
    int count = 0, major = 0, l2 = 0;
    s.ops = &qemb_cuda_ops;
    s.c = config(2560, 32, 8, 128, 9728, 32768);
    read_arguments(&s, argc, argv);
    if (cudaGetDeviceCount(&count) != cudaSuccess || !count) {
        puts("skipped: no GPU");
        return 77;
    }
    ok(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "attribute");
    ok(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, 0), "attribute");
    s.l2 = (size_t)l2;
    const bool fp8 = s.ops->math == QEMB_MATH_FP8;
    open_backend(&s, 32768);
    const int D = s.c.hidden, F = s.c.ffn, Q = s.c.n_heads * s.c.head_dim,
              KV = s.c.n_kv_heads * s.c.head_dim;
    if (!fp8) copy_ceiling(&s);
    product_ceiling(&s);
    for (int T : {32, 512, 8192}) memory_bound(&s, T);
    for (int n : {16, 32, 64, 128, 512, 2048, 8192, 32768})
        if (!fp8) attention(&s, std::max(n, 8192), n);
    for (int T = 16; T <= 16384; T *= 2) {
        product(&s, "qkv", Q + 2 * KV, D, false, T);
        product(&s, "o", D, Q, true, T);
        product(&s, "gate_up", 2 * F, D, false, T);
        gate_up(&s, T);
        product(&s, "down", D, F, true, T);
    }
    close_backend(&s);
    encoder(&s);

    /* The same calls with Hopper's own kernels, in rows of their own. */
    if (major != 9 || fp8) return 0;
    s.hopper = true;
    open_backend(&s, 32768);
    for (int n : {512, 2048, 8192, 32768}) attention(&s, std::max(n, 8192), n);
    for (int T = 256; T <= 16384; T *= 2) gate_up(&s, T);
    close_backend(&s);
    return 0;
}
