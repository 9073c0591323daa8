/* bench_cuda.cu - the CUDA backend's own ops, timed on a GPU. Each line: op, sizes, microseconds,
 * and GB/s of the bytes in the kernel's header or TFLOP/s of the product. bench_gpu.py runs it;
 * --json for that.
 *
 *   bench_cuda [--json] [--math f16|fp8] [D H K hd F]   the shape; default Qwen3-Embedding-4B
 *
 * fp8 times what it alone has: products, with the rounding of what is not rounded yet (o's input),
 * and rmsnorm.
 *
 * Times are the median of RUNS runs of BATCH calls, after a warm-up, taken on the host: the ops run
 * on the backend's own stream. Device memory holds random numbers: zeros draw less power and clock
 * higher.
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
    bool hopper; /* be runs Hopper's own kernels where it has them */
    int T;
    std::vector<int32_t> tokens, pos, cu;
    qemb_packed_batch b;
};

/* n halves or floats of device memory, random in -1 .. 1. */
template <class T> static T *random_device(size_t n) {
    const size_t period = 1 << 20;
    std::vector<T> v(std::min(n, period));
    for (T &x : v) x = (T)(float)(2.0 * rand() / RAND_MAX - 1);
    T *p;
    ok(cudaMalloc((void **)&p, n * sizeof(T)), "cudaMalloc");
    for (size_t at = 0; at < n; at += period)
        ok(cudaMemcpy(p + at, v.data(), std::min(n - at, period) * sizeof(T),
                      cudaMemcpyHostToDevice),
           "upload");
    return p;
}

/* W (N, K), random, and x (T, K), as the table multiplies them; FP8: codes of all sizes but NaN,
 * and scales. */
struct operands {
    void *w, *x;
    float *scale;
    qemb_mat m;
    operands(const bench *s, int N, int K, int T) : scale(nullptr) {
        const size_t n = (size_t)N * K, t = (size_t)T * K;
        w = random_device<__half>(n), x = random_device<__half>(t);
        if (s->ops->math == QEMB_MATH_FP8) {
            for (void *p : {w, x}) {
                std::vector<uint8_t> codes(p == w ? n : 2 * t); /* behind x's codes its scales */
                for (uint8_t &v : codes) v = (uint8_t)(rand() & 0x37);
                ok(cudaMemcpy(p, codes.data(), codes.size(), cudaMemcpyHostToDevice), "upload");
            }
            scale = random_device<float>((size_t)N);
        }
        m = qemb_mat{w, N, K, QEMB_F16, 1, scale};
    }
    ~operands() {
        for (void *p : {w, x, (void *)scale}) cudaFree(p);
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
    s->b = qemb_packed_batch{texts, T, 0, s->tokens.data(), s->pos.data(), s->cu.data()};
    s->T = T;
    s->ops->begin(s->be, &s->b);
}

static void memory_bound(bench *s, int T) {
    const qemb_ops *op = s->ops;
    const double D = s->c.hidden, hd = s->c.head_dim, H = s->c.n_heads, K = s->c.n_kv_heads;
    char sizes[64];
    snprintf(sizes, sizeof sizes, "T %d", T);
    layout(s, T, std::min(T, 512));
    float *x = random_device<float>((size_t)(T * D)),
          *w = random_device<float>((size_t)std::max(D, hd));
    __half *a = random_device<__half>((size_t)(T * (H + 2 * K) * hd));
    __half *o = random_device<__half>((size_t)(T * D));
    double us = microseconds([&] { op->rmsnorm(s->be, (qemb_act *)o, x, w, T); });
    report(s, "rmsnorm", sizes, us, 6 * D * T, 0);
    us = microseconds([&] { op->qknorm_rope(s->be, (qemb_act *)a, w, w, &s->b); });
    report(s, "qknorm_rope", sizes, us, 4 * (H + K) * hd * T, 0);
    for (void *p : {(void *)x, (void *)w, (void *)a, (void *)o}) cudaFree(p);
}

static void attention(bench *s, int T, int n) {
    const double hd = s->c.head_dim, H = s->c.n_heads, K = s->c.n_kv_heads;
    char sizes[64];
    snprintf(sizes, sizeof sizes, "T %d, texts of %d", T, n);
    layout(s, T, n);
    __half *qkv = random_device<__half>((size_t)(T * (H + 2 * K) * hd)),
           *att = random_device<__half>((size_t)(T * H * hd));
    const double us =
        microseconds([&] { s->ops->attention(s->be, (qemb_act *)att, (qemb_act *)qkv, &s->b, 0); });
    report(s, s->hopper ? "attention_hopper" : "attention", sizes, us, 4 * hd * (H + K) * T,
           4 * hd * H * T * (n + 1) / 2);
    cudaFree(qkv);
    cudaFree(att);
}

static void product(bench *s, const char *name, int N, int K, bool add, int T) {
    char sizes[64];
    snprintf(sizes, sizeof sizes, "%s T %d N %d K %d", name, T, N, K);
    const operands in(s, N, K, T);
    float *y = random_device<float>((size_t)T * N);
    const double us = microseconds([&] {
        if (add)
            s->ops->matmul_add(s->be, y, (qemb_act *)in.x, &in.m, T);
        else
            s->ops->matmul(s->be, (qemb_act *)y, (qemb_act *)in.x, &in.m, T);
    });
    report(s, add ? "matmul_add" : "matmul", sizes, us, 2.0 * N * K, 2.0 * T * N * K);
    cudaFree(y);
}

static void gate_up(bench *s, int T) {
    const int D = s->c.hidden, F = s->c.ffn;
    char sizes[64];
    snprintf(sizes, sizeof sizes, "T %d F %d D %d", T, F, D);
    const operands in(s, 2 * F, D, T);
    __half *gu = random_device<__half>((size_t)T * 2 * F),
           *h = random_device<__half>((size_t)T * F);
    const double us = microseconds(
        [&] { s->ops->gate_up(s->be, (qemb_act *)h, (qemb_act *)gu, (qemb_act *)in.x, &in.m, T); });
    report(s, s->hopper ? "gate_up_hopper" : "gate_up", sizes, us, 4.0 * F * D, 4.0 * T * F * D);
    for (void *p : {(void *)gu, (void *)h}) cudaFree(p);
}

static void copy_ceiling(bench *s) {
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
    opt.batch_tokens = opt.max_tokens = rows;
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

/* The largest product that the tensor cores could wish for. */
static void product_ceiling(const bench *from) {
    bench s = *from;
    s.c = qemb_config{1, 8192, 2, 1, 64, 4096, 16, 8192, 0, 1e6f, 1e-6f};
    open_backend(&s, 8192);
    product(&s, "ceiling", 8192, 8192, false, 8192);
    close_backend(&s);
}

int main(int argc, char **argv) {
    bench s = {};
    s.ops = &qemb_cuda_ops;
    s.c = qemb_config{1, 2560, 32, 8, 128, 9728, 16, 32768, 0, 1e6f, 1e-6f};
    int first = 1;
    if (argc > first && !strcmp(argv[first], "--json")) s.json = true, first++;
    if (argc > first + 1 && !strcmp(argv[first], "--math"))
        s.ops = strcmp(argv[first + 1], "fp8") ? &qemb_cuda_ops : &qemb_cuda_fp8_ops, first += 2;
    int32_t *shape[] = {&s.c.hidden, &s.c.n_heads, &s.c.n_kv_heads, &s.c.head_dim, &s.c.ffn};
    if (argc > first && argc != first + 5)
        die("usage", "bench_cuda [--json] [--math f16|fp8] [D H K hd F]");
    for (int i = 0; i < 5 && argc > first; i++) *shape[i] = atoi(argv[first + i]);
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

    /* The same calls with Hopper's own kernels, in rows of their own. */
    int major = 0;
    ok(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "attribute");
    if (major != 9 || fp8) return 0;
    s.hopper = true;
    open_backend(&s, 32768);
    for (int n : {512, 2048, 8192, 32768}) attention(&s, std::max(n, 8192), n);
    for (int T = 256; T <= 16384; T *= 2) gate_up(&s, T);
    close_backend(&s);
    return 0;
}
