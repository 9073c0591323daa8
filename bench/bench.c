/* bench.c - how fast the product's own parts are, beside the limits of the machine.
 *
 *   bench tables                    the ops tables of this machine, one `name math` a line
 *   bench limits   MODEL            what the CPU can do: arithmetic of each kind, reading the weights
 *   bench ops      MODEL [OP...]    every op of the table, or those so named, at the model's shapes
 *   bench gemm     MODEL [OP...]    the matrix products in turns with other libraries', if installed
 *   bench forward  MODEL LENGTH...  the whole forward, texts of LENGTH tokens, and each op's share
 *   bench beside   MODEL LENGTH...  the forward in turns with one whose products are oneDNN's
 *   bench tokenizer MODEL TEXT...   MB of text per second
 *   bench print    MODEL            vectors per second, per output kind
 * with --threads N (all), --math f32|bf16|int16|int8 (f32), --cpu NAME (the fastest table),
 * --tokens N (a batch of forward; 1024) and, where other programs keep the machine busy, --cpu-time:
 * CPU time per thread instead of the clock's.
 *
 * Each row of the CSV on stdout: group, name, n, median, p10, p90, unit, percent of limit, limit.
 * A measurement runs once to warm up and then for at least MIN_SECONDS and MIN_ROUNDS, but what
 * takes MAX_SECONDS only FEW_ROUNDS times; what is computed is compared with the plain op first.
 * Limits (limits.c) are measured in the same run, by all threads, and are the p90 of their
 * rates. Other programs on the machine show in p10..p90.
 */
#include "bench.h"
#include "frontends/console.h"
#include "frontends/select_ops.h"
#include "backends/cpu/cpu.h"
#include "frontends/format.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MIN_SECONDS 0.3
#define MAX_SECONDS 20.0
enum {
    FEW_ROUNDS = 3,
    MIN_ROUNDS = 7,
    MAX_ROUNDS = 500,
    MAX_ROWS = 4096,
    VERIFY_ROWS = 33,
    VECTORS = 256
};

int threads;
static const qemb_file *file;
static const qemb_ops *table;
static int batch_tokens = QEMB_BATCH_TOKENS, cpu_time;

void die(const char *what) {
    fprintf(stderr, "bench: %s\n", what);
    exit(1);
}

void *zeroed(size_t bytes) {
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

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static quantiles quantiles_of(double *t, int n) {
    qsort(t, (size_t)n, sizeof *t, by_value);
    return (quantiles){t[n / 2], t[n / 10], t[n - 1 - n / 10]};
}

static double seconds_of(timed_call c, int i) {
    const double start = now();
    c.run(c.arg, i);
    return now() - start;
}

/* Whether another round is to come after n of them. */
static int more(int n, double seconds) {
    if (n < FEW_ROUNDS || seconds < MIN_SECONDS) return n < MAX_ROUNDS;
    return n < MIN_ROUNDS && seconds < MAX_SECONDS;
}

quantiles measure(void (*run)(void *arg, int i), void *arg) {
    const timed_call c = {run, arg};
    double t[MAX_ROUNDS];
    int n = 0;
    run(arg, 0);
    for (double begin = now(); more(n, now() - begin);) t[n] = seconds_of(c, n + 1), n++;
    return quantiles_of(t, n);
}

/* What comes first after the other's turn is not timed: the other's idle threads spin for some
 * milliseconds (OpenMP's do), and threads that were asleep wake up on one core. */
#define SETTLE_SECONDS 0.02
static double turn(timed_call c, int i) {
    nanosleep(&(struct timespec){0, 10000000}, NULL);
    const double begin = now();
    do c.run(c.arg, i);
    while (now() - begin < SETTLE_SECONDS);
    return seconds_of(c, i + 1);
}

void measure_turns(timed_call a, timed_call b, quantiles *ta, quantiles *tb, quantiles *ratio) {
    double t[3][MAX_ROUNDS];
    int n = 0;
    a.run(a.arg, 0), b.run(b.arg, 0);
    for (double begin = now(); more(n, now() - begin); n++) {
        t[0][n] = turn(a, n + 1), t[1][n] = turn(b, n + 1);
        t[2][n] = t[1][n] / t[0][n];
    }
    *ta = quantiles_of(t[0], n), *tb = quantiles_of(t[1], n), *ratio = quantiles_of(t[2], n);
}

void row(const char *group, const char *name, int n, quantiles s, double work, double unit_size,
         const char *unit, const char *limit, double limit_rate) {
    printf("%s,%s,%d,%.4g,%.4g,%.4g,%s,", group, name, n, work / s.median / unit_size,
           work / s.p90 / unit_size, work / s.p10 / unit_size, unit);
    if (limit_rate > 0)
        printf("%.1f,%s\n", 100 * work / s.median / limit_rate, limit);
    else
        printf(",\n");
    fflush(stdout);
}

/* Bytes moved, or products and sums, beside the limit of the one or the other. */
static void row_read(const char *name, int n, quantiles s, double bytes) {
    row("ops", name, n, s, bytes, 1e9, "GB/s", limit_read()->name, limit_read()->rate);
}

static void row_math(const char *group, const char *name, int n, quantiles s, double flops) {
    const limit *l = limit_of(table->math);
    const int integers = table->math == QEMB_MATH_INT8 || table->math == QEMB_MATH_INT16;
    row(group, name, n, s, flops, 1e9, integers ? "GOP/s" : "GFLOP/s", l->name, l->rate);
}

/* ---- ops -------------------------------------------------------------------------------------- */

enum { QKV, WO, GATE_UP, DOWN, EMBED, RMSNORM, QKNORM_ROPE, ATTENTION, N_OPS };
static const char *const op_names[N_OPS] = {"matmul qkv",      "matmul_add wo", "gate_up",
                                            "matmul_add down", "embed",         "rmsnorm",
                                            "qknorm_rope",     "attention"};

typedef struct { /* a table, the op that runs next, its batch and buffers */
    const qemb_ops *op;
    qemb_backend *be;
    qemb_weights w; /* as the table has placed them */
    qemb_packed_batch b;
    int32_t tokens[MAX_ROWS], pos[MAX_ROWS], cu[MAX_ROWS + 1];
    float *in, *out, *gu; /* (MAX_ROWS, widest row) */
    float *ones;          /* (hd): qknorm_rope works in place, again and again, and with a model's
                             weights would end in subnormal numbers */
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
    s->w = file->weights;
    s->w.layers = zeroed(sizeof *s->w.layers * (size_t)file->config.n_layers);
    memcpy(s->w.layers, file->weights.layers, sizeof *s->w.layers * (size_t)file->config.n_layers);
    if (op->open(&s->be, &file->config, &opt, &err) || op->load_weights(s->be, &s->w, &err))
        die(err.msg);
    s->in = zeroed(sizeof(float) * n), s->out = zeroed(sizeof(float) * n);
    s->gu = zeroed(sizeof(float) * n);
    s->ones = zeroed(sizeof(float) * (size_t)file->config.head_dim);
    for (int i = 0; i < file->config.head_dim; i++) s->ones[i] = 1;
    for (size_t i = 0; i < n; i++) s->in[i] = (float)(i * 2654435761u % 2001) / 1000 - 1;
}

static void setup_close(setup *s) {
    s->op->close(s->be);
    free(s->in), free(s->out), free(s->gu), free(s->ones), free(s->w.layers);
}

/* B texts of n tokens, B n rows */
static void lay(setup *s, int B, int n) {
    s->b = (qemb_packed_batch){B, B * n, 0, s->tokens, s->pos, s->cu};
    for (int t = 0; t < s->b.T; t++) {
        s->tokens[t] = (int32_t)((unsigned)t * 7919u % (unsigned)file->config.vocab);
        s->pos[t] = t % n;
    }
    for (int i = 0; i <= B; i++) s->cu[i] = i * n;
    s->op->begin(s->be, &s->b);
}

static const qemb_mat *matrix(const setup *s, int i) {
    const qemb_layer *l = &s->w.layers[s->cold ? i % file->config.n_layers : 0];
    const qemb_mat *const m[] = {&l->wqkv, &l->wo, &l->wgu, &l->wdown};
    return m[s->which];
}

static void run_op(void *arg, int i) {
    setup *s = arg;
    qemb_act *in = (qemb_act *)s->in, *out = (qemb_act *)s->out;
    switch (s->which) {
    case EMBED:
        s->op->embed(s->be, s->out, &s->w.tok_emb, &s->b);
        break;
    case RMSNORM:
        s->op->rmsnorm(s->be, out, s->in, s->w.final_norm, s->b.T);
        break;
    case QKNORM_ROPE:
        s->op->qknorm_rope(s->be, out, s->ones, s->ones, &s->b);
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

/* How far an op may be from the plain one, relative and in L2. f32: each stays below 1e-5 of the
 * truth. bf16: each of the two factors is off by at most 2^-9, and the errors of a sum's products
 * are independent. int8: a factor is off by at most half a step, the greatest of its row by 127;
 * the inputs here, even in -1 .. 1, and normal weights whose greatest lies at 4 deviations are off by
 * 0.0023 / 0.58 and 0.0091 of their size: 0.010 together, and as much again for rows less even.
 * int16: steps are a 46330th of a length of 64, for W up to two: 5e-5 and 1e-4 of even inputs' and
 * normal weights' size; in attention 1.4e-4 for weights, whose sum is 8 x 32767, and 6e-5 for values:
 * twice all that. */
static double tolerance(int which) {
    static const double of_math[] = {2e-5, 3e-3, 5e-4, 2e-2};
    const int product = which <= DOWN || which == ATTENTION;
    return of_math[product ? table->math : QEMB_MATH_F32];
}

static void verify(setup *s, setup *plain, int which) {
    const size_t n = MAX_ROWS * widest();
    double diff = 0, size = 0;
    setup *both[] = {s, plain};
    for (int i = 0; i < 2; i++) {
        both[i]->which = which, both[i]->cold = 0;
        lay(both[i], 3, VERIFY_ROWS / 3);
        memcpy(both[i]->out, both[i]->in, n * sizeof(float));
        run_op(both[i], 0);
    }
    for (size_t i = 0; i < n; i++) {
        diff += ((double)s->out[i] - plain->out[i]) * ((double)s->out[i] - plain->out[i]);
        size +=
            plain->out[i] != plain->in[i] ? (double)plain->out[i] * plain->out[i] : 0; /* written */
    }
    if (!(size > 0 && sqrt(diff / size) <= tolerance(which))) {
        fprintf(stderr, "bench: %s: differs from the plain op by %g (want at most %g)\n",
                op_names[which], sqrt(diff / size), tolerance(which));
        exit(1);
    }
}

static double weights_of(const setup *s) { return (double)matrix(s, 0)->rows * matrix(s, 0)->cols; }

/* Cold, every call reads the next layer's weights from memory; warm, the same ones again. Up to 16
 * rows reading them is the limit, above it arithmetic. */
static void bench_product(setup *s) {
    /* groups in panels of an F16 matrix have a scale, int8's the sum of their numbers beside it */
    const double weight_bytes = matrix(s, 0)->dtype == QEMB_I8   ? 1 + 4.0 / QEMB_GROUP
                                : s->op->math == QEMB_MATH_INT8  ? 1 + 8.0 / QEMB_GROUP
                                : s->op->math == QEMB_MATH_INT16 ? 2 + 4.0 / QEMB_GROUP
                                                                 : 2;
    for (s->cold = 1; s->cold >= 0; s->cold--) {
        char name[40];
        snprintf(name, sizeof name, "%s%s", op_names[s->which], s->cold ? "" : " warm");
        const quantiles t = measure(run_op, s);
        if (s->b.T <= 16)
            row_read(name, s->b.T, t, weight_bytes * weights_of(s));
        else
            row_math("ops", name, s->b.T, t, 2 * s->b.T * weights_of(s));
    }
}

/* Of INT8 zeros: for products that are not compared with a model's */
float *floats_of(const qemb_mat *w) {
    const qemb_config c = {.hidden = w->cols};
    qemb_backend be = {.c = &c, .threads = 1};
    int32_t *ids = zeroed(sizeof *ids * (size_t)w->rows);
    const qemb_packed_batch all = {1, w->rows, 0, ids, NULL, NULL};
    float *W = zeroed(sizeof(float) * (size_t)w->rows * (size_t)w->cols);
    for (int i = 0; i < w->rows; i++) ids[i] = i;
    if (w->dtype == QEMB_F16) qemb_cpu_ops.embed(&be, W, w, &all);
    free(ids);
    return W;
}

/* The op on warm weights in turns with other libraries, whose weights are packed beforehand. */
static void bench_others(setup *s, const setup *plain) {
    const qemb_mat *w = matrix(plain, 0);
    const double flops = 2 * s->b.T * weights_of(s);
    float *W = floats_of(w);
    for (int which = 0; which < OTHER_GEMMS; which++) {
        const char *library;
        char name[60];
        quantiles us, them, ratio;
        other_gemm *g = other_gemm_open(which, table->math, s->b.T, w->rows, w->cols, W, &library);
        if (!g) continue;
        s->cold = 0;
        measure_turns((timed_call){run_op, s}, (timed_call){other_gemm_run, g}, &us, &them, &ratio);
        other_gemm_close(g);
        snprintf(name, sizeof name, "%s beside %s", op_names[s->which], library);
        row_math("gemm", name, s->b.T, us, flops);
        snprintf(name, sizeof name, "%s: %s", op_names[s->which], library);
        row_math("gemm", name, s->b.T, them, flops);
        printf("gemm,%s of %s,%d,%.1f,%.1f,%.1f,%%,,\n", op_names[s->which], library, s->b.T,
               100 * ratio.median, 100 * ratio.p10, 100 * ratio.p90);
    }
    free(W);
}

static const int row_counts[] = {1, 4, 16, 64, 256, 512, 1024, 2048, 4096};

/* Rows that the op meets: of the MLP's matrices never more than QEMB_MLP_ROWS at a time. */
static int occurs(int op, int T) { return T <= QEMB_MLP_ROWS || (op != GATE_UP && op != DOWN); }

static void bench_op(setup *s, int op) {
    const qemb_config *c = &file->config;
    const double Q = (double)c->n_heads * c->head_dim, KV = (double)c->n_kv_heads * c->head_dim;
    const double bytes[N_OPS] = {
        [EMBED] = 6.0 * c->hidden, [RMSNORM] = 8.0 * c->hidden, [QKNORM_ROPE] = 8 * (Q + KV)};
    for (int i = 0; i < (int)(sizeof row_counts / sizeof *row_counts); i++) {
        const int T = row_counts[i];
        if (!occurs(op, T)) continue;
        if (op == ATTENTION) {
            lay(s, MAX_ROWS / T, T);
            row_math("ops", op_names[op], T, measure(run_op, s), 2 * Q * (T + 1.0) * MAX_ROWS);
            continue;
        }
        lay(s, 1, T);
        if (op < EMBED)
            bench_product(s);
        else
            row_read(op_names[op], T, measure(run_op, s), T * bytes[op]);
    }
}

static int asked_for(int op, char **names, int n) {
    for (int i = 0; i < n; i++)
        if (strstr(op_names[op], names[i])) return 1;
    return n == 0;
}

static void bench_ops(char **names, int n, int others) {
    static setup s, plain;
    setup_open(&s, table);
    setup_open(&plain, &qemb_cpu_ops);
    for (int op = 0; op < N_OPS; op++) {
        if (!asked_for(op, names, n) || (others && op >= EMBED)) continue;
        verify(&s, &plain, op);
        plain.which = op;
        if (!others) bench_op(&s, op);
        for (int T = 64; others && T <= 2048; T *= 2) {
            if (!occurs(op, T)) continue;
            lay(&s, 1, T);
            bench_others(&s, &plain);
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
TIMED(0, embed, (qemb_backend * be, float *x, const qemb_mat *m, const qemb_packed_batch *b),
      (be, x, m, b))
TIMED(1, rmsnorm, (qemb_backend * be, qemb_act *y, const float *x, const float *w, int T),
      (be, y, x, w, T))
TIMED(2, matmul, (qemb_backend * be, qemb_act *y, const qemb_act *x, const qemb_mat *w, int T),
      (be, y, x, w, T))
TIMED(3, matmul_add, (qemb_backend * be, float *x, const qemb_act *a, const qemb_mat *w, int T),
      (be, x, a, w, T))
TIMED(4, qknorm_rope,
      (qemb_backend * be, qemb_act *v, const float *q, const float *k, const qemb_packed_batch *b),
      (be, v, q, k, b))
TIMED(5, attention,
      (qemb_backend * be, qemb_act *o, const qemb_act *v, const qemb_packed_batch *b, int last),
      (be, o, v, b, last))
TIMED(6, gate_up,
      (qemb_backend * be, qemb_act *h, qemb_act *gu, const qemb_act *x, const qemb_mat *w, int T),
      (be, h, gu, x, w, T))

typedef struct {
    qemb_model *m;
    qemb_batch *b;
    int32_t *ids;
    float *out;
} forward;

static void run_forward(void *arg, int i) {
    const forward *f = arg;
    if (i <= 1) memset(spent, 0, sizeof spent); /* not the round that warms up */
    qemb_embed(f->m, f->b, f->out);
}

/* Multiplications and additions of a batch: all rows' linear layers but the last layer's, whose
 * last tokens alone go on after attention; and every pair of tokens in attention. */
static double linear_flops(int B, int n) {
    const qemb_config *c = &file->config;
    const double D = c->hidden, Q = (double)c->n_heads * c->head_dim,
                 KV = (double)c->n_kv_heads * c->head_dim, T = (double)B * n;
    const double qkv = D * (Q + 2 * KV), rest = Q * D + 3 * D * c->ffn;
    return 2 * (c->n_layers * T * qkv + (c->n_layers - 1) * T * rest + B * rest);
}

static double attention_flops(int B, int n) {
    const double Q = (double)file->config.n_heads * file->config.head_dim, T = (double)B * n;
    return 2 * (2 * Q * (file->config.n_layers - 1) * T * (n + 1) / 2 + 2 * Q * T);
}

/* A batch of B texts of n tokens, laid out in a model of these ops */
static void forward_open(forward *f, const qemb_ops *ops, int B, int n) {
    const qemb_options opt = {.batch_tokens = B * n, .max_tokens = n, .threads = threads};
    qemb_err err;
    f->ids = zeroed(sizeof *f->ids * (size_t)B * (size_t)n);
    if (qemb_open(&f->m, file, ops, &opt, &err)) die(err.msg);
    if (!(f->b = qemb_batch_new(f->m))) die("out of memory");
    f->out = zeroed(sizeof(float) * (size_t)B * (size_t)file->config.hidden);
    for (int i = 0; i < B * n; i++)
        f->ids[i] = (int32_t)((unsigned)i * 7919u % (unsigned)file->config.eos_id);
    for (int i = 0; i < B; i++)
        if (qemb_pack_add(f->b, f->ids + (size_t)i * n, n) != i) die("a text did not fit");
}

static void forward_close(forward *f) {
    qemb_batch_free(f->b);
    qemb_close(f->m);
    free(f->out), free(f->ids);
}

static int texts_of(int n) { return batch_tokens / n ? batch_tokens / n : 1; }

static void tokens_row(const char *group, const char *name, int B, int n, quantiles t) {
    const limit *l = limit_of(table->math);
    row(group, name, n, t, B * n, 1, "tokens/s", l->name,
        B * n * l->rate / (linear_flops(B, n) + attention_flops(B, n)));
}

static void bench_forward(int n) {
    const int B = texts_of(n);
    qemb_ops timed = *table;
    timed.embed = timed_embed, timed.rmsnorm = timed_rmsnorm, timed.matmul = timed_matmul;
    timed.matmul_add = timed_matmul_add, timed.qknorm_rope = timed_qknorm_rope;
    timed.attention = timed_attention, timed.gate_up = timed_gate_up;
    forward f;
    forward_open(&f, &timed, B, n);
    const quantiles t = measure(run_forward, &f);
    const limit *l = limit_of(table->math);
    const double linear = linear_flops(B, n), all_flops = linear + attention_flops(B, n);
    tokens_row("forward", "tokens", B, n, t);
    row("forward", "texts", n, t, B, 1, "texts/s", l->name, B * l->rate / all_flops);
    row_math("forward", "all products", n, t, all_flops);
    row_math("forward", "linear layers alone", n, t, linear);
    double all = 0;
    for (int i = 0; i < 7; i++) all += spent[i];
    for (int i = 0; i < 7; i++)
        printf("share,%s,%d,%.2f,,,%%,,\n", spent_names[i], n, 100 * spent[i] / all);
    forward_close(&f);
}

/* Its vectors may differ as two of these arithmetics' do: README's errors, once for each. */
static void bench_beside(int n) {
    const int B = texts_of(n), D = file->config.hidden;
    const qemb_ops *theirs = table_with_onednn(table);
    if (!theirs || file->weights.layers[0].wo.dtype != QEMB_F16) return;
    forward us, them;
    quantiles t_us, t_them, ratio;
    double diff = 0, size = 0;
    forward_open(&us, table, B, n);
    forward_open(&them, theirs, B, n);
    run_forward(&us, 0), run_forward(&them, 0);
    for (int i = 0; i < B * D; i++)
        diff += ((double)us.out[i] - them.out[i]) * ((double)us.out[i] - them.out[i]),
            size += (double)us.out[i] * us.out[i];
    if (!(size > 0 && sqrt(diff / size) <= (table->math == QEMB_MATH_F32 ? 2e-5 : 1.2e-2)))
        die("oneDNN's products make other vectors");
    measure_turns((timed_call){run_forward, &us}, (timed_call){run_forward, &them}, &t_us, &t_them,
                  &ratio);
    tokens_row("gemm", "forward beside oneDNN", B, n, t_us);
    tokens_row("gemm", "forward: oneDNN", B, n, t_them);
    printf("gemm,forward of oneDNN,%d,%.1f,%.1f,%.1f,%%,,\n", n, 100 * ratio.median,
           100 * ratio.p10, 100 * ratio.p90);
    forward_close(&us);
    forward_close(&them);
}

/* ---- tokenizer and printing, one thread ------------------------------------------------------- */

enum { DOCUMENT = 3000 }; /* bytes that are encoded at a time, as a service sees them */
typedef struct {
    const qemb_tokenizer *t;
    qemb_tokenizer_state *s;
    const char *text;
    size_t bytes;
} corpus;

static void run_tokenizer(void *arg, int i) {
    corpus *c = arg;
    (void)i;
    for (size_t at = 0, end; at < c->bytes; at = end) {
        qemb_tokenizer_result r;
        qemb_err err;
        end = c->bytes - at > DOCUMENT ? at + DOCUMENT : c->bytes;
        while (end < c->bytes && ((unsigned char)c->text[end] & 0xC0) == 0x80) end--;
        if (qemb_tokenizer_encode(c->s, c->text + at, end - at, SIZE_MAX, &r, &err)) die(err.msg);
    }
}

/* `first` sees every document for the first time, with a new cache; `again` knows its words. */
static void bench_tokenizer(const char *path) {
    corpus c = {0};
    qemb_tokenizer *t;
    qemb_err err;
    double start;
    FILE *in = fopen(path, "rb");
    char *text = zeroed(64 << 20);
    if (!in || !(c.bytes = fread(text, 1, 64 << 20, in))) die("a text cannot be read");
    fclose(in);
    if (qemb_tokenizer_open(&t, file->merges, file->n_merges, file->added, file->added_bytes, &err))
        die(err.msg);
    if (!(c.s = qemb_tokenizer_state_new(t))) die("out of memory");
    c.text = text;
    start = now();
    run_tokenizer(&c, 0);
    const double took = now() - start;
    const quantiles first = {took, took, took};
    row("tokenizer first", path, 1, first, (double)c.bytes, 1e6, "MB/s", "", 0);
    row("tokenizer again", path, 1, measure(run_tokenizer, &c), (double)c.bytes, 1e6, "MB/s", "",
        0);
    qemb_tokenizer_state_free(c.s);
    qemb_tokenizer_close(t);
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
    static const format_kind kinds[] = {FORMAT_JSON, FORMAT_TSV, FORMAT_BASE64, FORMAT_F16,
                                        FORMAT_F32};
    const int dim = file->config.hidden;
    float *v = zeroed(sizeof *v * VECTORS * (size_t)dim);
    uint64_t seed = 1;
    for (int i = 0; i < VECTORS * dim; i++) /* about a unit vector's numbers */
        seed = seed * 6364136223846793005u + 1442695040888963407u,
        v[i] = (float)((double)(seed >> 11) * 0x1p-53 * 0.1 - 0.05);
    for (int k = 0; k < LENGTH(kinds); k++) {
        printing p = {kinds[k], dim, v, NULL};
        p.room = zeroed(format_vector_room(p.kind, dim));
        row("print", format_names[kinds[k]], dim, measure(run_print, &p), VECTORS, 1, "vectors/s", "", 0);
        free(p.room);
    }
    free(v);
}

static int tables(void) {
    for (int i = 0; qemb_cpu_table(i); i++)
        printf("%s %s\n", qemb_cpu_table(i)->name, math_name(qemb_cpu_table(i)->math));
    return 0;
}

int main(int argc, char **argv) {
    const char *cpu = NULL, *math = NULL;
    int n = 1;
    qemb_err err;
    for (int i = 1; i < argc; i++) { /* options out of the way */
        if (i + 1 < argc && !strcmp(argv[i], "--threads"))
            threads = atoi(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "--tokens"))
            batch_tokens = atoi(argv[++i]);
        else if (i + 1 < argc && !strcmp(argv[i], "--cpu"))
            cpu = argv[++i];
        else if (i + 1 < argc && !strcmp(argv[i], "--math"))
            math = argv[++i];
        else if (!strcmp(argv[i], "--cpu-time"))
            cpu_time = 1;
        else
            argv[n++] = argv[i];
    }
    if (n == 2 && !strcmp(argv[1], "tables")) return tables();
    if (n < 3)
        die("usage: bench tables | limits|ops|gemm|forward|beside|tokenizer|print MODEL "
            "[OP...|LENGTH...|TEXT...] [--threads N] [--math f32|bf16|int16|int8] [--cpu NAME] "
            "[--tokens N] [--cpu-time]");
    if (threads < 1) threads = omp_get_num_procs();
    if (!(table = select_ops(cpu, math, &err))) die(err.msg);
    if (qemb_file_open((qemb_file **)&file, argv[2], &err)) die(err.msg);
    const char *what = argv[1];
    if (strcmp(what, "tokenizer") && strcmp(what, "print")) limits_measure(file);
    if (!strcmp(what, "ops") || !strcmp(what, "gemm"))
        bench_ops(argv + 3, n - 3, !strcmp(what, "gemm"));
    if (!strcmp(what, "print")) bench_print();
    for (int i = 3; i < n; i++) {
        if (!strcmp(what, "forward")) bench_forward(atoi(argv[i]));
        if (!strcmp(what, "beside")) bench_beside(atoi(argv[i]));
        if (!strcmp(what, "tokenizer")) bench_tokenizer(argv[i]);
    }
    qemb_file_close((qemb_file *)file);
    return 0;
}
