/* bench.c - how fast the product's own parts are, beside the limits of the machine.
 *
 *   bench limits   MODEL            what the CPU can do: multiply-adds, reading the weights
 *   bench ops      MODEL            every op of the table at the model's shapes
 *   bench forward  MODEL LENGTH...  the whole forward, texts of LENGTH tokens, and each op's share
 *   bench tokenizer MODEL TEXT...   MB of text per second
 *   bench print    MODEL            vectors per second, per output kind
 * with --threads N (all), --cpu NAME (the fastest table), --tokens N (a batch of forward; 4096) and,
 * where other programs keep the machine busy, --cpu-time: CPU time per thread instead of the clock's.
 *
 * Each row of the CSV on stdout: group, name, n, median, p10, p90, unit, percent of limit, limit.
 * A measurement runs once to warm up and then for at least MIN_SECONDS and MIN_ROUNDS; what is
 * computed is compared with the plain op first. Limits are measured in the same run, by all
 * threads: `fma` is independent multiply-adds of the widest kind that the table uses, `read` the
 * weights of the layers, read from the file's map. Other programs on the machine show in p10..p90.
 */
#include "cpu.h"
#include "format.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MIN_SECONDS 0.3
enum { MIN_ROUNDS = 7, MAX_ROUNDS = 500, MAX_ROWS = 4096, VERIFY_ROWS = 33, VECTORS = 256 };

static const qemb_file *file;
static const qemb_ops *table;
static int threads, batch_tokens = 4096, cpu_time;
static double fma_limit, read_limit; /* FLOP/s, bytes/s */

static void die(const char *what) {
    fprintf(stderr, "bench: %s\n", what);
    exit(1);
}

static void *need(size_t bytes) {
    void *p = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!p) die("out of memory");
    return memset(p, 0, bytes); /* so that the pages are there */
}

/* Seconds; with --cpu-time of the whole process's CPU time, per thread. */
static double now(void) {
    struct timespec t;
    clock_gettime(cpu_time ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return ((double)t.tv_sec + 1e-9 * (double)t.tv_nsec) / (cpu_time ? threads : 1);
}

/* ---- measuring -------------------------------------------------------------------------------- */

typedef struct {
    double median, p10, p90;
} seconds; /* of one call */

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static seconds quantiles(double *t, int n) {
    qsort(t, (size_t)n, sizeof *t, by_value);
    return (seconds){t[n / 2], t[n / 10], t[n - 1 - n / 10]};
}

/* run(arg, i) with i = 0 to warm up, then 1, 2, ... */
static seconds measure(void (*run)(void *arg, int i), void *arg) {
    double t[MAX_ROUNDS], begin = now();
    int n = 0;
    run(arg, 0);
    for (begin = now(); n < MAX_ROUNDS && (n < MIN_ROUNDS || now() - begin < MIN_SECONDS); n++) {
        const double start = now();
        run(arg, n + 1);
        t[n] = now() - start;
    }
    return quantiles(t, n);
}

/* A row: `work` per call as a rate in units of `unit_size`. */
static void row(const char *group, const char *name, int n, seconds s, double work,
                double unit_size, const char *unit, const char *limit, double limit_rate) {
    printf("%s,%s,%d,%.4g,%.4g,%.4g,%s,", group, name, n, work / s.median / unit_size,
           work / s.p90 / unit_size, work / s.p10 / unit_size, unit);
    if (limit_rate > 0)
        printf("%.1f,%s\n", 100 * work / s.median / limit_rate, limit);
    else
        printf(",\n");
    fflush(stdout);
}

/* ---- limits ----------------------------------------------------------------------------------- */

enum { FMA_LOOPS = 2000000 };

#if defined(__x86_64__)
/* 12 sums cover an FMA's latency of 4 or 5 cycles on both units. */
__attribute__((target("avx2,fma"))) static void fma_avx2(void *arg, int round) {
    (void)arg, (void)round;
#pragma omp parallel num_threads(threads)
    for (int i = 0; i < FMA_LOOPS; i++)
        __asm__ volatile(
            "vfmadd231ps %%ymm15,%%ymm15,%%ymm0\nvfmadd231ps %%ymm15,%%ymm15,%%ymm1\n"
            "vfmadd231ps %%ymm15,%%ymm15,%%ymm2\nvfmadd231ps %%ymm15,%%ymm15,%%ymm3\n"
            "vfmadd231ps %%ymm15,%%ymm15,%%ymm4\nvfmadd231ps %%ymm15,%%ymm15,%%ymm5\n"
            "vfmadd231ps %%ymm15,%%ymm15,%%ymm6\nvfmadd231ps %%ymm15,%%ymm15,%%ymm7\n"
            "vfmadd231ps %%ymm15,%%ymm15,%%ymm8\nvfmadd231ps %%ymm15,%%ymm15,%%ymm9\n"
            "vfmadd231ps %%ymm15,%%ymm15,%%ymm10\nvfmadd231ps %%ymm15,%%ymm15,%%ymm11\n" ::
                : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                  "xmm10", "xmm11");
}
#endif

/* The layers' weights, at most 1 GB of them, added up 8 bytes at a time. */
static void read_weights(void *arg, int round) {
    (void)round;
    const uint64_t *p = file->weights.layers[0].wqkv.data;
    const long n = (long)(*(size_t *)arg / 4096);
    uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : sum) schedule(static)
    for (long i = 0; i < n; i++)
        for (int k = 0; k < 512; k++) sum += p[i * 512 + k];
    static volatile uint64_t sink;
    sink = sum;
    (void)sink;
}

static void measure_limits(void) {
    const size_t begin = (size_t)((const uint8_t *)file->weights.layers[0].wqkv.data - file->map);
    size_t bytes = file->map_bytes - begin;
    if (bytes > 1000000000) bytes = 1000000000;
    bytes = bytes / 4096 * 4096;
    seconds s = measure(read_weights, &bytes);
    read_limit = (double)bytes / s.median;
    row("limits", "read", threads, s, (double)bytes, 1e9, "GB/s", "", 0);
#if defined(__x86_64__)
    if (!strcmp(table->name, "avx2")) {
        const double flops = 12.0 * 16 * FMA_LOOPS * threads;
        s = measure(fma_avx2, NULL);
        fma_limit = flops / s.median;
        row("limits", "fma", threads, s, flops, 1e9, "GFLOP/s", "", 0);
    }
#endif
}

/* ---- ops -------------------------------------------------------------------------------------- */

enum { QKV, WO, GATE_UP, DOWN, EMBED, RMSNORM, QKNORM_ROPE, ATTENTION, N_OPS };
static const char *const op_names[N_OPS] = {"matmul qkv",      "matmul_add wo", "gate_up",
                                            "matmul_add down", "embed",         "rmsnorm",
                                            "qknorm_rope",     "attention"};

typedef struct { /* a table, the op that runs next, its batch and buffers */
    const qemb_ops *op;
    qemb_backend *be;
    qemb_layout b;
    int32_t tokens[MAX_ROWS], pos[MAX_ROWS], cu[MAX_ROWS + 1];
    float *in, *out, *gu; /* (MAX_ROWS, widest row) */
    int which, cold;      /* cold: every call takes the next layer's weights */
} setup;

static size_t widest(void) {
    const qemb_config *c = &file->config;
    const size_t q = (size_t)(c->n_heads + 2 * c->n_kv_heads) * c->head_dim, f = 2 * (size_t)c->ffn;
    const size_t w = q > f ? q : f, d = (size_t)c->hidden;
    return w > d ? w : d;
}

static void setup_open(setup *s, const qemb_ops *op) {
    const qemb_options opt = {.batch_tokens = MAX_ROWS, .max_tokens = MAX_ROWS, .threads = threads};
    const size_t n = MAX_ROWS * widest();
    qemb_err err;
    memset(s, 0, sizeof *s);
    s->op = op;
    if (op->open(&s->be, &file->config, &opt, &err)) die(err.msg);
    s->in = need(sizeof(float) * n), s->out = need(sizeof(float) * n);
    s->gu = need(sizeof(float) * n);
    for (size_t i = 0; i < n; i++) s->in[i] = (float)(i * 2654435761u % 2001) / 1000 - 1;
}

static void setup_close(setup *s) {
    s->op->close(s->be);
    free(s->in), free(s->out), free(s->gu);
}

/* B texts of n tokens, B n rows */
static void lay(setup *s, int B, int n) {
    s->b = (qemb_layout){B, B * n, 0, s->tokens, s->pos, s->cu};
    for (int t = 0; t < s->b.T; t++) {
        s->tokens[t] = (int32_t)((unsigned)t * 7919u % (unsigned)file->config.vocab);
        s->pos[t] = t % n;
    }
    for (int i = 0; i <= B; i++) s->cu[i] = i * n;
    s->op->begin(s->be, &s->b);
}

static const qemb_mat *matrix(const setup *s, int i) {
    const qemb_layer *l = &file->weights.layers[s->cold ? i % file->config.n_layers : 0];
    const qemb_mat *const m[] = {&l->wqkv, &l->wo, &l->wgu, &l->wdown};
    return m[s->which];
}

static void run_op(void *arg, int i) {
    setup *s = arg;
    const qemb_layer *l = &file->weights.layers[0];
    qemb_act *in = (qemb_act *)s->in, *out = (qemb_act *)s->out;
    switch (s->which) {
    case EMBED:
        s->op->embed(s->be, s->out, &file->weights.tok_emb, &s->b);
        break;
    case RMSNORM:
        s->op->rmsnorm(s->be, out, s->in, file->weights.final_norm, s->b.T);
        break;
    case QKNORM_ROPE:
        s->op->qknorm_rope(s->be, out, l->q_norm, l->k_norm, &s->b);
        break;
    case GATE_UP:
        s->op->gate_up(s->be, out, (qemb_act *)s->gu, in, matrix(s, i), s->b.T);
        break;
    case ATTENTION:
        s->op->attention(s->be, out, in, &s->b, 0);
        break;
    case WO:
    case DOWN:
        s->op->matmul_add(s->be, s->out, in, matrix(s, i), s->b.T);
        break;
    default:
        s->op->matmul(s->be, out, in, matrix(s, i), s->b.T);
        break;
    }
}

/* The relative L2 difference from the plain table's result. Each stays below 1e-5 of the truth. */
static void verify(setup *s, setup *plain, int which) {
    const size_t n = MAX_ROWS * widest();
    double diff = 0, size = 0;
    setup *both[] = {s, plain};
    for (int i = 0; i < 2; i++) {
        both[i]->which = which;
        lay(both[i], 3, VERIFY_ROWS / 3);
        memcpy(both[i]->out, both[i]->in, n * sizeof(float));
        run_op(both[i], 0);
    }
    for (size_t i = 0; i < n; i++) {
        diff += ((double)s->out[i] - plain->out[i]) * ((double)s->out[i] - plain->out[i]);
        size +=
            plain->out[i] != plain->in[i] ? (double)plain->out[i] * plain->out[i] : 0; /* written */
    }
    if (!(size > 0 && diff <= 4e-10 * size)) {
        fprintf(stderr, "bench: %s: differs from the plain op by %g (want at most 2e-5)\n",
                op_names[which], sqrt(diff / size));
        exit(1);
    }
}

/* Somebody else's GEMM, if installed, with weights that are floats already: y (T, N) = x W^T */
typedef void (*blas_fn)(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a,
                        int lda, const float *b, int ldb, float beta, float *c, int ldc);
typedef int (*dnnl_fn)(char ta, char tb, int64_t m, int64_t n, int64_t k, float alpha,
                       const float *a, int64_t lda, const float *b, int64_t ldb, float beta,
                       float *c, int64_t ldc);
typedef struct {
    blas_fn blas;
    dnnl_fn dnnl;
    int T, N, K;
    float *x, *W, *y;
} peer_gemm;

static void run_peer(void *arg, int i) {
    const peer_gemm *p = arg;
    (void)i;
    if (p->blas)
        p->blas(101, 111, 112, p->T, p->N, p->K, 1, p->x, p->K, p->W, p->K, 0, p->y, p->N);
    else
        p->dnnl('N', 'T', p->T, p->N, p->K, 1, p->x, p->K, p->W, p->K, 0, p->y, p->N);
}

/* *fn, a pointer to a function, from a library that may not be there */
static int symbol(const char *library, const char *name, void *fn) {
    void *l = dlopen(library, RTLD_NOW), *p = l ? dlsym(l, name) : NULL;
    memcpy(fn, &p, sizeof p);
    return p != NULL;
}

static void bench_peers(const setup *s) {
    const qemb_mat *w = matrix(s, 0);
    peer_gemm p = {NULL, NULL, s->b.T, w->rows, w->cols, s->in, NULL, s->out};
    int32_t *ids = need(sizeof *ids * (size_t)p.N);
    const qemb_layout all = {1, p.N, 0, ids, NULL, NULL};
    const qemb_config c = {.hidden = p.K};
    qemb_backend be = {.c = &c, .threads = 1};
    char name[60];
    void (*set_threads)(int);
    p.W = need(sizeof(float) * (size_t)p.N * (size_t)p.K);
    for (int i = 0; i < p.N; i++) ids[i] = i;
    qemb_cpu_ops.embed(&be, p.W, w, &all);
    if (symbol("libdnnl.so.3", "dnnl_sgemm", &p.dnnl) ||
        symbol("libdnnl.so.2", "dnnl_sgemm", &p.dnnl)) {
        snprintf(name, sizeof name, "%s (oneDNN)", op_names[s->which]);
        row("ops", name, p.T, measure(run_peer, &p), 2.0 * p.T * p.N * p.K, 1e9, "GFLOP/s", "fma",
            fma_limit);
    }
    if (symbol("libopenblas.so.0", "cblas_sgemm", &p.blas)) {
        if (symbol("libopenblas.so.0", "openblas_set_num_threads", &set_threads))
            set_threads(threads);
        snprintf(name, sizeof name, "%s (OpenBLAS)", op_names[s->which]);
        row("ops", name, p.T, measure(run_peer, &p), 2.0 * p.T * p.N * p.K, 1e9, "GFLOP/s", "fma",
            fma_limit);
    }
    free(p.W), free(ids);
}

static void bench_ops(void) {
    static setup s, plain;
    static const int rows[] = {1, 4, 16, 64, 512, 1024, 4096};
    const qemb_config *c = &file->config;
    const double Q = (double)c->n_heads * c->head_dim, KV = (double)c->n_kv_heads * c->head_dim;
    const double bytes[N_OPS] = {
        [EMBED] = 6.0 * c->hidden, [RMSNORM] = 8.0 * c->hidden, [QKNORM_ROPE] = 8 * (Q + KV)};
    setup_open(&s, table);
    setup_open(&plain, &qemb_cpu_ops);
    for (int op = 0; op < N_OPS; op++) {
        verify(&s, &plain, op);
        for (int i = 0; i < 7; i++) {
            const int T = rows[i];
            if (T > QEMB_MLP_ROWS && (op == GATE_UP || op == DOWN))
                continue; /* never more at a time */
            if (op == ATTENTION) {
                lay(&s, MAX_ROWS / T, T);
                row("ops", op_names[op], T, measure(run_op, &s), 2 * Q * (T + 1.0) * MAX_ROWS, 1e9,
                    "GFLOP/s", "fma", fma_limit);
                continue;
            }
            lay(&s, 1, T);
            s.cold = op < EMBED;
            seconds t = measure(run_op, &s);
            const double n = op < EMBED ? (double)matrix(&s, 0)->rows * matrix(&s, 0)->cols : 0;
            if (op >= EMBED)
                row("ops", op_names[op], T, t, T * bytes[op], 1e9, "GB/s", "read", read_limit);
            else if (T > 16)
                row("ops", op_names[op], T, t, 2 * T * n, 1e9, "GFLOP/s", "fma", fma_limit);
            else { /* reading the weights is the limit; warm: from the caches, as far as they fit */
                char name[40];
                row("ops", op_names[op], T, t, 2 * n, 1e9, "GB/s", "read", read_limit);
                s.cold = 0;
                snprintf(name, sizeof name, "%s warm", op_names[op]);
                row("ops", name, T, measure(run_op, &s), 2 * n, 1e9, "GB/s", "read", read_limit);
            }
            if (op < EMBED && T == 512) bench_peers(&s);
        }
    }
    setup_close(&s);
    setup_close(&plain);
}

/* ---- the forward, and where its time goes ----------------------------------------------------- */

static double spent[7];
static const char *const spent_names[7] = {"embed",       "rmsnorm",   "matmul", "matmul_add",
                                           "qknorm_rope", "attention", "gate_up"};

#define TIMED(i, op, params, args)                                                                 \
    static void timed_##op params {                                                                \
        const double start = now();                                                                \
        table->op args;                                                                            \
        spent[i] += now() - start;                                                                 \
    }
TIMED(0, embed, (qemb_backend * be, float *x, const qemb_mat *m, const qemb_layout *b),
      (be, x, m, b))
TIMED(1, rmsnorm, (qemb_backend * be, qemb_act *y, const float *x, const float *w, int T),
      (be, y, x, w, T))
TIMED(2, matmul, (qemb_backend * be, qemb_act *y, const qemb_act *x, const qemb_mat *w, int T),
      (be, y, x, w, T))
TIMED(3, matmul_add, (qemb_backend * be, float *x, const qemb_act *a, const qemb_mat *w, int T),
      (be, x, a, w, T))
TIMED(4, qknorm_rope,
      (qemb_backend * be, qemb_act *v, const float *q, const float *k, const qemb_layout *b),
      (be, v, q, k, b))
TIMED(5, attention,
      (qemb_backend * be, qemb_act *o, const qemb_act *v, const qemb_layout *b, int last),
      (be, o, v, b, last))
TIMED(6, gate_up,
      (qemb_backend * be, qemb_act *h, qemb_act *gu, const qemb_act *x, const qemb_mat *w, int T),
      (be, h, gu, x, w, T))

typedef struct {
    qemb_model *m;
    qemb_batch *b;
    float *out;
} forward;

static void run_forward(void *arg, int i) {
    const forward *f = arg;
    if (i <= 1) memset(spent, 0, sizeof spent); /* not the round that warms up */
    qemb_embed(f->m, f->b, f->out);
}

/* Multiplications and additions of a batch: all rows' linear layers but the last layer's, whose
 * last tokens alone go on after attention, and every pair of tokens in attention. */
static double forward_flops(int B, int n) {
    const qemb_config *c = &file->config;
    const double D = c->hidden, Q = (double)c->n_heads * c->head_dim,
                 KV = (double)c->n_kv_heads * c->head_dim;
    const double qkv = D * (Q + 2 * KV), rest = Q * D + 3 * D * c->ffn, T = (double)B * n;
    const double pairs = 2 * Q * (c->n_layers - 1) * T * (n + 1) / 2 + 2 * Q * T;
    return 2 * (c->n_layers * T * qkv + (c->n_layers - 1) * T * rest + B * rest + pairs);
}

static void bench_forward(int n) {
    const int B = batch_tokens / n ? batch_tokens / n : 1;
    const qemb_options opt = {.batch_tokens = B * n, .max_tokens = n, .threads = threads};
    qemb_ops timed = *table;
    timed.embed = timed_embed, timed.rmsnorm = timed_rmsnorm, timed.matmul = timed_matmul;
    timed.matmul_add = timed_matmul_add, timed.qknorm_rope = timed_qknorm_rope;
    timed.attention = timed_attention, timed.gate_up = timed_gate_up;
    forward f;
    qemb_err err;
    int32_t *ids = need(sizeof *ids * (size_t)B * (size_t)n);
    if (qemb_open(&f.m, file, &timed, &opt, &err)) die(err.msg);
    if (!(f.b = qemb_batch_new(f.m))) die("out of memory");
    f.out = need(sizeof(float) * (size_t)B * (size_t)file->config.hidden);
    for (int i = 0; i < B * n; i++)
        ids[i] = (int32_t)((unsigned)i * 7919u % (unsigned)file->config.eos_id);
    for (int i = 0; i < B; i++)
        if (qemb_pack_add(f.b, ids + (size_t)i * n, n) != i) die("a text did not fit");
    const seconds t = measure(run_forward, &f);
    row("forward", "tokens", n, t, B * n, 1, "tokens/s", "fma",
        B * n * fma_limit / forward_flops(B, n));
    double all = 0;
    for (int i = 0; i < 7; i++) all += spent[i];
    for (int i = 0; i < 7; i++)
        printf("share,%s,%d,%.2f,,,%%,,\n", spent_names[i], n, 100 * spent[i] / all);
    qemb_batch_free(f.b);
    qemb_close(f.m);
    free(f.out), free(ids);
}

/* ---- tokenizer and printing, one thread ------------------------------------------------------- */

enum { DOCUMENT = 3000 }; /* bytes that are encoded at a time, as a service sees them */
typedef struct {
    const tokenizer *t;
    tokenizer_state *s;
    const char *text;
    size_t bytes;
} corpus;

static void run_tokenizer(void *arg, int i) {
    corpus *c = arg;
    (void)i;
    for (size_t at = 0, end; at < c->bytes; at = end) {
        tokenizer_result r;
        qemb_err err;
        end = c->bytes - at > DOCUMENT ? at + DOCUMENT : c->bytes;
        while (end < c->bytes && ((unsigned char)c->text[end] & 0xC0) == 0x80) end--;
        if (tokenizer_encode(c->s, c->text + at, end - at, SIZE_MAX, &r, &err)) die(err.msg);
    }
}

/* `first` sees every document for the first time, with a new cache; `again` knows its words. */
static void bench_tokenizer(const char *path) {
    corpus c = {0};
    tokenizer *t;
    qemb_err err;
    double start;
    FILE *in = fopen(path, "rb");
    char *text = need(64 << 20);
    if (!in || !(c.bytes = fread(text, 1, 64 << 20, in))) die("a text cannot be read");
    fclose(in);
    if (tokenizer_open(&t, file->merges, file->n_merges, file->added, file->added_bytes, &err))
        die(err.msg);
    if (!(c.s = tokenizer_state_new(t))) die("out of memory");
    c.text = text;
    start = now();
    run_tokenizer(&c, 0);
    seconds first = {now() - start, now() - start, now() - start};
    row("tokenizer first", path, 1, first, (double)c.bytes, 1e6, "MB/s", "", 0);
    row("tokenizer again", path, 1, measure(run_tokenizer, &c), (double)c.bytes, 1e6, "MB/s", "",
        0);
    tokenizer_state_free(c.s);
    tokenizer_close(t);
    free(text);
}

typedef struct {
    format_kind kind;
    int dim;
    const float *v;
    char *room;
} printing;

static void run_print(void *arg, int i) {
    const printing *p = arg;
    (void)i;
    for (int k = 0; k < VECTORS; k++)
        format_vector(p->room, p->kind, p->v + (size_t)k * (size_t)p->dim, p->dim);
}

static void bench_print(void) {
    static const char *const kinds[] = {"json", "tsv", "base64", "f16", "f32"};
    const int dim = file->config.hidden;
    float *v = need(sizeof *v * VECTORS * (size_t)dim);
    uint64_t seed = 1;
    for (int i = 0; i < VECTORS * dim; i++) /* about a unit vector's numbers */
        seed = seed * 6364136223846793005u + 1442695040888963407u,
        v[i] = (float)((double)(seed >> 11) * 0x1p-53 * 0.1 - 0.05);
    for (int k = 0; k < 5; k++) {
        printing p = {(format_kind)format_by_name(kinds[k]), dim, v, NULL};
        p.room = need(format_vector_room(p.kind, dim));
        row("print", kinds[k], dim, measure(run_print, &p), VECTORS, 1, "vectors/s", "", 0);
        free(p.room);
    }
    free(v);
}

int main(int argc, char **argv) {
    const char *cpu = NULL;
    int n = 1;
    qemb_err err;
    for (int i = 1; i < argc; i++) { /* options out of the way */
        if (i + 1 < argc && !strcmp(argv[i], "--threads"))
            threads = atoi(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "--tokens"))
            batch_tokens = atoi(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "--cpu"))
            cpu = argv[++i];
        else if (!strcmp(argv[i], "--cpu-time"))
            cpu_time = 1;
        else
            argv[n++] = argv[i];
    }
    if (n < 3)
        die("usage: bench limits|ops|forward|tokenizer|print MODEL [LENGTH...|TEXT...] [--threads "
            "N] [--cpu NAME] [--tokens N] [--cpu-time]");
    if (threads < 1) threads = omp_get_num_procs();
    if (!(table = qemb_cpu_choose(cpu, QEMB_MATH_F32))) die("--cpu: no such table on this machine");
    if (qemb_file_open((qemb_file **)&file, argv[2], &err)) die(err.msg);
    const char *what = argv[1];
    if (strcmp(what, "tokenizer") && strcmp(what, "print")) measure_limits();
    if (!strcmp(what, "ops")) bench_ops();
    if (!strcmp(what, "print")) bench_print();
    for (int i = 3; i < n; i++) {
        if (!strcmp(what, "forward")) bench_forward(atoi(argv[i]));
        if (!strcmp(what, "tokenizer")) bench_tokenizer(argv[i]);
    }
    qemb_file_close((qemb_file *)file);
    return 0;
}
