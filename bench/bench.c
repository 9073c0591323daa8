/* bench.c - how fast the product's own parts are, beside the limits of the machine.
 *
 *   bench tables                    the ops tables of this machine, one `name math` a line
 *   bench limits   MODEL            the CPU's rates: arithmetic of each kind, reading the weights
 *   bench ops      MODEL [OP...]    the ops of the table, or those named, at the model's shapes
 *   bench matmul   MODEL            one product by the oracle and by every table (docs/matmul.md)
 *   bench gemm     MODEL [OP...]    the products in turns with other libraries', if installed
 *   bench forward  MODEL LENGTH...  the whole forward, texts of LENGTH tokens, and each op's share
 *   bench beside   MODEL LENGTH...  the forward in turns with one whose products are oneDNN's
 *   bench turns    MODEL COMMAND FILE   the texts of FILE, a line each, in turns with a program
 *                                   that computes them whenever it reads a line, and then
 *                                   prints the line "done" (bench/peers/)
 *   bench tokenizer MODEL TEXT...   MB of text per second
 *   bench print    MODEL            vectors per second, per output kind
 *   bench scan     MODEL LINES...   an index of LINES lines for `qemb grep`: reading its vectors,
 *                                   their products with a query, and those with their digests
 * with --threads N (all), --math f32|bf16|int16|int8 (f32), --cpu NAME (the fastest table),
 * --tokens N (a batch of forward; 1024) and --cpu-time (CPU time per thread instead of the clock's,
 * for machines that other programs keep busy). --math names exactly that arithmetic, where qemb may
 * take a faster table that is more exact. Standard error names the table.
 *
 * Each row of the CSV on standard output: group, name, n, median, p10, p90, unit, percent of limit,
 * limit, calls that counted of those made. Where the CPU has a tile unit (AMX), only calls between
 * two probes of it at full speed count (measure_gate), and a row has no figures if fewer than 3
 * were found within a minute. Elsewhere all count, and that column is empty. A measurement runs
 * once to warm up, then for at least 0.3 s and 7 rounds; what takes 20 s runs 3 rounds. What an op
 * computes is compared with the plain op first. Limits are measured in the same run, by all
 * threads, and are the p90 of their rates. Other programs on the machine show in p10..p90.
 */
#include "limits.h"
#include "measure.h"
#include "vendor_gemm.h"

#include "backends/cpu/dot_f16.h"
#include "frontends/cli/line_index.h"
#include "frontends/console.h"
#include "frontends/format.h"
#include "frontends/select_ops.h"
#include "lib/text_ids.h"
#include "tests/unit/oracle.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_ROWS = 4096, VERIFY_ROWS = 33, MATMUL_ROWS = 64, VECTORS = 256 };

static const qemb_file *file;
static const qemb_ops *table;
static int batch_tokens = QEMB_BATCH_TOKENS;

/* Bytes moved, or products and sums, beside the limit of the one or the other. */
static void row_read(const char *name, int n, quantiles s, double bytes) {
    row("ops", name, n, s, bytes, 1e9, "GB/s", limit_read());
}

static void row_math(const char *group, const char *name, int n, quantiles s, double flops) {
    row(group, name, n, s, flops, 1e9, limit_of(table)->unit, limit_of(table));
}

/* ---- ops ------------------------------------------------------------------------------------- */

/* UP is gate_up, of QEMB_BERT matmul_gelu. */
enum { QKV, WO, UP, DOWN, EMBED, RMSNORM, LAYERNORM, QKNORM_ROPE, ATTENTION, N_OPS };
static const char *op_names[N_OPS] = {"matmul qkv",      "matmul_add wo", "gate_up",
                                      "matmul_add down", "embed",         "rmsnorm",
                                      "layernorm",       "qknorm_rope",   "attention"};

static int is_bert(void) { return file->config.architecture == QEMB_BERT; }

/* Whether the file's architecture has the op. */
static int has_op(int op) {
    return op == LAYERNORM ? is_bert() : op == RMSNORM || op == QKNORM_ROPE ? !is_bert() : 1;
}

typedef struct { /* a table, the op that runs next, its batch and buffers */
    const qemb_ops *op;
    qemb_backend *be;
    qemb_weights w; /* as the table's load_weights left them */
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
    const qemb_options opt = {
        .batch_tokens = MAX_ROWS, .max_tokens = MAX_ROWS, .threads = measure_threads()};
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

/* A batch of B texts of n tokens */
static void lay(setup *s, int B, int n) {
    const int bidirectional = file->config.attention == QEMB_BIDIRECTIONAL;
    s->b = (qemb_packed_batch){B, B * n, 0, s->tokens, s->pos, s->cu, bidirectional, 0, 0};
    for (int t = 0; t < s->b.T; t++) {
        s->tokens[t] = (int32_t)((unsigned)t * 7919u % (unsigned)file->config.vocab);
        s->pos[t] = is_bert() ? t % n % qemb_position_rows(&file->config) : t % n;
    }
    for (int i = 0; i <= B; i++) s->cu[i] = i * n;
    s->op->begin(s->be, &s->b);
}

static const qemb_mat *matrix(const setup *s, int i) {
    qemb_mat *m[QEMB_LAYER_MATRICES];
    qemb_layer_matrices(&s->w.layers[s->cold ? i % file->config.n_layers : 0], m);
    return m[s->which];
}

static void run_op(void *arg, int i) {
    setup *s = arg;
    qemb_act *in = (qemb_act *)s->in, *out = (qemb_act *)s->out;
    switch (s->which) {
    case EMBED:
        s->op->embed(s->be, s->out, &s->w.tok_emb, s->w.pos_emb, &s->b);
        break;
    case RMSNORM:
        s->op->rmsnorm(s->be, out, s->in, s->w.final_norm, s->b.T);
        break;
    case LAYERNORM: /* of its own result, again and again */
        s->op->layernorm(s->be, out, s->gu, s->w.layers[0].bo, s->w.emb_norm, s->w.emb_norm_bias,
                         s->b.T);
        break;
    case QKNORM_ROPE:
        s->op->qknorm_rope(s->be, out, s->ones, s->ones, &s->b);
        break;
    case UP:
        if (is_bert())
            s->op->matmul_gelu(s->be, out, in, matrix(s, i), s->w.layers[0].bup, s->b.T);
        else
            s->op->gate_up(s->be, out, (qemb_act *)s->gu, in, matrix(s, i), s->b.T);
        break;
    case ATTENTION:
        s->op->attention(s->be, out, in, &s->b, QEMB_ALL_ROWS);
        break;
    case WO:
    case DOWN:
        s->op->matmul_add(s->be, s->out, in, matrix(s, i), s->b.T);
        break;
    default:
        s->op->matmul(s->be, out, in, matrix(s, i), s->w.layers[0].bqkv, s->b.T);
        break;
    }
}

/* The largest relative L2 difference of an op from the plain one. f32: each is within 1e-5 of the
 * exact result. bf16: each of the two factors has an error of at most 2^-9, and the errors of a
 * sum's products are
 *   independent.
 * int8: a factor's error is at most half a step, and a step is the largest of its group / 127.
 * Inputs
 *   uniform in -1 .. 1 have a relative error of 0.0023 / 0.58, normal weights with the largest at 4
 *   standard deviations 0.0091: together 0.010, doubled for rows that are less even. With AVX2 a
 *   step of inputs is their group's range / 128, 0.0045 / 0.58: together 0.012.
 * int16: a step is a 46330th of the length of 64 numbers, for W up to two of them: 5e-5 and 1e-4 of
 *   the inputs and weights above. In attention 1.4e-4 for weights, whose sum is 8 x 32767, and 6e-5
 *   for values. Doubled. */
static double tolerance(int which) {
    static const double of_math[] = {2e-5, 3e-3, 5e-4, 2.4e-2};
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
        memcpy(both[i]->gu, both[i]->in, n * sizeof(float));
        run_op(both[i], 0);
    }
    for (size_t i = 0; i < n; i++) {
        diff += ((double)s->out[i] - plain->out[i]) * ((double)s->out[i] - plain->out[i]);
        size += plain->out[i] != plain->in[i] ? (double)plain->out[i] * plain->out[i]
                                              : 0; /* what the op wrote */
    }
    if (!(size > 0 && sqrt(diff / size) <= tolerance(which))) {
        fprintf(stderr, "bench: %s: differs from the plain op by %g (want at most %g)\n",
                op_names[which], sqrt(diff / size), tolerance(which));
        exit(1);
    }
}

static double weights_of(const setup *s) { return (double)matrix(s, 0)->rows * matrix(s, 0)->cols; }

/* Of a weight in memory, in the form in which the table reads it, its scales included */
static double bytes_of_weight(const qemb_ops *op) {
    double weights = 0;
    qemb_mat *all[QEMB_LAYER_MATRICES];
    qemb_memory memory;
    qemb_layer layer = file->weights.layers[0];
    qemb_plan(file, op, NULL, &memory);
    qemb_layer_matrices(&layer, all);
    for (int i = 0; i < QEMB_LAYER_MATRICES; i++)
        weights += (double)all[i]->rows * all[i]->cols * file->config.n_layers;
    return (double)(memory.repacked_bytes ? memory.repacked_bytes : memory.weights) / weights;
}

/* Cold: every call reads the next layer's weights, from memory; warm: the same weights again. Up to
 * 16 rows of x reading them is the limit, above that arithmetic. */
static void bench_product(setup *s) {
    const double weight_bytes = bytes_of_weight(s->op);
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

/* The op on warm weights in turns with other libraries, whose weights are packed beforehand. */
static void bench_others(setup *s, const setup *plain) {
    const qemb_mat *w = matrix(plain, 0);
    const double flops = 2 * s->b.T * weights_of(s);
    float *W = floats_of(w);
    for (int which = 0; which < OTHER_GEMMS; which++) {
        const char *library = other_gemms[which].name;
        const limit *theirs = limit_of_library(other_gemms[which].math);
        char name[60];
        quantiles us, them, ratio;
        other_gemm *g = NULL;
        if (other_gemms[which].beside >> table->math & 1)
            g = other_gemm_open(which, s->b.T, w->rows, w->cols, W);
        if (!g) continue;
        s->cold = 0;
        measure_turns((timed_call){run_op, s}, (timed_call){other_gemm_run, g}, &us, &them, &ratio);
        other_gemm_close(g);
        snprintf(name, sizeof name, "%s beside %s", op_names[s->which], library);
        row_math("gemm", name, s->b.T, us, flops);
        snprintf(name, sizeof name, "%s: %s", op_names[s->which], library);
        row("gemm", name, s->b.T, them, flops, 1e9, theirs->unit, theirs);
        snprintf(name, sizeof name, "%s of %s", op_names[s->which], library);
        row_ratio("gemm", name, s->b.T, ratio);
    }
    free(W);
}

static const int row_counts[] = {1, 4, 16, 64, 256, 512, 1024, 2048, 4096};

/* Whether the op ever gets T rows: the MLP's ops get at most QEMB_MLP_ROWS. */
static int occurs(int op, int T) { return T <= QEMB_MLP_ROWS || (op != UP && op != DOWN); }

static void bench_op(setup *s, int op) {
    const qemb_config *c = &file->config;
    const double Q = (double)c->n_heads * c->head_dim, KV = (double)c->n_kv_heads * c->head_dim;
    const double bytes[N_OPS] = {[EMBED] = (is_bert() ? 10.0 : 6.0) * c->hidden,
                                 [RMSNORM] = 8.0 * c->hidden,
                                 [LAYERNORM] = 12.0 * c->hidden,
                                 [QKNORM_ROPE] = 8 * (Q + KV)};
    for (int i = 0; i < (int)(sizeof row_counts / sizeof *row_counts); i++) {
        const int T = row_counts[i];
        if (!occurs(op, T)) continue;
        if (op == ATTENTION) {
            lay(s, MAX_ROWS / T, T);
            const double keys = s->b.bidirectional ? T : (T + 1.0) / 2; /* that a row sees */
            row_math("ops", op_names[op], T, measure(run_op, s), 4 * Q * keys * MAX_ROWS);
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
    if (is_bert()) op_names[UP] = "matmul_gelu";
    for (int op = 0; op < N_OPS; op++) {
        if (!has_op(op)) continue;
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

/* ---- one product, step by step (docs/matmul.md) ---------------------------------------------- */

/* wqkv of layer 0 times MATMUL_ROWS rows, y (T, N) = x (T, K) W^T, as the oracle has it */
typedef struct {
    const setup *s;
    double *x, *y, *size; /* (T, K), (T, N), (T, N): sums of |x| |W| */
} oracle_matmul;

static void run_oracle(void *arg, int i) {
    const oracle_matmul *o = arg;
    const qemb_mat *w = &file->weights.layers[0].wqkv;
    double *size = i ? NULL : o->size; /* the round that warms up makes the bounds */
    for (int t = 0; t < MATMUL_ROWS; t++)
        oracle_matvec(o->y + (size_t)t * w->rows, size ? size + (size_t)t * w->rows : NULL,
                      o->x + (size_t)t * w->cols, w);
}

/* The largest error of a number of y, as a share of its sum of magnitudes. */
static double largest_error(const setup *s, const oracle_matmul *o) {
    double worst = 0;
    for (size_t i = 0; i < (size_t)MATMUL_ROWS * (size_t)file->weights.layers[0].wqkv.rows; i++)
        worst = fmax(worst, fabs(s->out[i] - o->y[i]) / o->size[i]);
    return worst;
}

static void matmul_row(const char *name, const qemb_ops *ops, quantiles t, double error) {
    const qemb_mat *w = &file->weights.layers[0].wqkv;
    row("matmul", name, MATMUL_ROWS, t, 2.0 * MATMUL_ROWS * w->rows * w->cols, 1e9, "GFLOP/s",
        limit_of(ops));
    printf("matmul,%s: error,%d,%.2g,,,of the sum of magnitudes,,,\n", name, MATMUL_ROWS, error);
}

static void bench_matmul(void) {
    const qemb_mat *w = &file->weights.layers[0].wqkv;
    const size_t nx = (size_t)MATMUL_ROWS * w->cols, ny = (size_t)MATMUL_ROWS * w->rows;
    static setup s;
    oracle_matmul o = {&s, zeroed(nx * sizeof(double)), zeroed(ny * sizeof(double)),
                       zeroed(ny * sizeof(double))};
    setup_open(&s, &qemb_cpu_ops);
    for (size_t i = 0; i < nx; i++) o.x[i] = s.in[i];
    matmul_row("oracle", &qemb_cpu_ops, measure(run_oracle, &o), 0);
    setup_close(&s);
    for (int k = 0; (table = qemb_cpu_table(k)); k++) {
        setup_open(&s, table);
        s.which = QKV;
        lay(&s, 1, MATMUL_ROWS);
        const quantiles t = measure(run_op, &s);
        matmul_row(table->name, table, t, largest_error(&s, &o));
        setup_close(&s);
    }
    free(o.x), free(o.y), free(o.size);
}

/* ---- the forward, and where its time goes ---------------------------------------------------- */

enum { TIMED_OPS = 10 };
/* seconds of each call; turns have numbers 1 larger */
static double spent[MEASURE_ROUNDS + 2][TIMED_OPS];
static int spent_in; /* the call that runs */
static const char *const spent_names[TIMED_OPS] = {
    "embed",     "rmsnorm", "matmul",      "matmul_add", "qknorm_rope",
    "attention", "gate_up", "gather_mean", "layernorm",  "matmul_gelu"};

#define TIMED(i, op, params, args)                                                                 \
    static void timed_##op params {                                                                \
        const double start = measure_now();                                                        \
        table->op args;                                                                            \
        spent[spent_in][i] += measure_now() - start;                                               \
    }
TIMED(0, embed,
      (qemb_backend * be, float *x, const qemb_mat *m, const float *p, const qemb_packed_batch *b),
      (be, x, m, p, b))
TIMED(1, rmsnorm, (qemb_backend * be, qemb_act *y, const float *x, const float *w, int T),
      (be, y, x, w, T))
TIMED(2, matmul,
      (qemb_backend * be, qemb_act *y, const qemb_act *x, const qemb_mat *w, const float *b, int T),
      (be, y, x, w, b, T))
TIMED(3, matmul_add, (qemb_backend * be, float *x, const qemb_act *a, const qemb_mat *w, int T),
      (be, x, a, w, T))
TIMED(4, qknorm_rope,
      (qemb_backend * be, qemb_act *v, const float *q, const float *k, const qemb_packed_batch *b),
      (be, v, q, k, b))
TIMED(5, attention,
      (qemb_backend * be, qemb_act *o, const qemb_act *v, const qemb_packed_batch *b, qemb_rows r),
      (be, o, v, b, r))
TIMED(6, gate_up,
      (qemb_backend * be, qemb_act *h, qemb_act *gu, const qemb_act *x, const qemb_mat *w, int T),
      (be, h, gu, x, w, T))
TIMED(7, gather_mean,
      (qemb_backend * be, float *y, float *x, const float *w, const qemb_packed_batch *b),
      (be, y, x, w, b))
TIMED(8, layernorm,
      (qemb_backend * be, qemb_act *y, float *x, const float *c, const float *w, const float *b,
       int T),
      (be, y, x, c, w, b, T))
TIMED(9, matmul_gelu,
      (qemb_backend * be, qemb_act *h, const qemb_act *x, const qemb_mat *w, const float *b, int T),
      (be, h, x, w, b, T))

typedef struct {
    qemb_model *m;
    qemb_batch *b;
    int32_t *ids;
    float *out;
} forward;

static void run_forward(void *arg, int i) {
    const forward *f = arg;
    spent_in = i;
    memset(spent[i], 0, sizeof spent[i]); /* a call may be repeated */
    qemb_embed(f->m, f->b, f->out);
}

/* Rows that the last layer's attention and all that follows it compute */
static double last_rows(int B, int n) {
    return file->config.pooling == QEMB_POOL_MEAN ? (double)B * n : B;
}

/* Multiplications and additions of the linear layers for a batch. */
static double linear_flops(int B, int n) {
    const qemb_config *c = &file->config;
    const double D = c->hidden, Q = (double)c->n_heads * c->head_dim,
                 KV = (double)c->n_kv_heads * c->head_dim, T = (double)B * n;
    const double qkv = D * (Q + 2 * KV), rest = Q * D + (is_bert() ? 2 : 3) * D * c->ffn;
    return 2 * (c->n_layers * T * qkv + (c->n_layers - 1) * T * rest + last_rows(B, n) * rest);
}

static double attention_flops(int B, int n) {
    const qemb_config *c = &file->config;
    const double Q = (double)c->n_heads * c->head_dim, T = (double)B * n;
    const double all = c->attention == QEMB_BIDIRECTIONAL ? T * n : T * (n + 1) / 2;
    const double last = c->pooling == QEMB_POOL_MEAN ? all : T; /* a last token sees n */
    return 2 * 2 * Q * ((c->n_layers - 1) * all + last);
}

/* A model over these ops with a batch of B texts of n tokens */
static void forward_open(forward *f, const qemb_ops *ops, int B, int n) {
    const qemb_options opt = {.batch_tokens = B * n, .max_tokens = n, .threads = measure_threads()};
    qemb_err err;
    f->ids = zeroed(sizeof *f->ids * (size_t)B * (size_t)n);
    if (qemb_open(&f->m, file, ops, &opt, &err)) die(err.msg);
    if (!(f->b = qemb_batch_new(f->m))) die("out of memory");
    f->out = zeroed(sizeof(float) * (size_t)B * (size_t)qemb_dim(&file->config));
    for (int i = 0; i < B * n; i++)
        f->ids[i] = (int32_t)((unsigned)i * 7919u % (unsigned)file->config.vocab);
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
    limit l = *limit_of(table);
    l.rate *= B * n / (linear_flops(B, n) + attention_flops(B, n));
    row(group, name, n, t, B * n, 1, "tokens/s", &l);
}

static void bench_forward(int n) {
    const int B = texts_of(n);
    qemb_ops timed = *table;
    timed.embed = timed_embed, timed.rmsnorm = timed_rmsnorm, timed.matmul = timed_matmul;
    timed.matmul_add = timed_matmul_add, timed.qknorm_rope = timed_qknorm_rope;
    timed.attention = timed_attention, timed.gate_up = timed_gate_up;
    timed.gather_mean = timed_gather_mean, timed.layernorm = timed_layernorm;
    timed.matmul_gelu = timed_matmul_gelu;
    forward f;
    forward_open(&f, &timed, B, n);
    const quantiles t = measure(run_forward, &f);
    const double linear = linear_flops(B, n), all_flops = linear + attention_flops(B, n);
    limit texts = *limit_of(table);
    texts.rate *= B / all_flops;
    tokens_row("forward", "tokens", B, n, t);
    row("forward", "texts", n, t, B, 1, "texts/s", &texts);
    row_math("forward", "all products", n, t, all_flops);
    row_math("forward", "linear layers alone", n, t, linear);
    double all = 0;
    for (int i = 0; i < TIMED_OPS; i++) all += spent[t.i][i];
    for (int i = 0; i < TIMED_OPS && t.i; i++) /* of the call that took the median */
        printf("share,%s,%d,%.2f,,,%%,,,\n", spent_names[i], n, 100 * spent[t.i][i] / all);
    forward_close(&f);
}

/* Both vectors have the error of their arithmetic (docs/accuracy.md): they may differ by twice
 * float's, or twice bfloat16's, which is the larger one. */
static void bench_beside(int n, qemb_math math) {
    const int B = texts_of(n), D = qemb_dim(&file->config);
    const qemb_ops *theirs = table_with_onednn(table, math);
    if (!theirs || file->weights.layers[0].wo.dtype != QEMB_F16) return;
    forward us, them;
    char name[60];
    quantiles t_us, t_them, ratio;
    double diff = 0, size = 0;
    limit l = *limit_of_library(math);
    forward_open(&us, table, B, n);
    forward_open(&them, theirs, B, n);
    run_forward(&us, 0), run_forward(&them, 0);
    for (int i = 0; i < B * D; i++)
        diff += ((double)us.out[i] - them.out[i]) * ((double)us.out[i] - them.out[i]),
            size += (double)us.out[i] * us.out[i];
    if (!(size > 0 && sqrt(diff / size) <= (math == QEMB_MATH_F32 ? 2e-5 : 1.2e-2)))
        die("oneDNN's products make other vectors");
    measure_turns((timed_call){run_forward, &us}, (timed_call){run_forward, &them}, &t_us, &t_them,
                  &ratio);
    snprintf(name, sizeof name, "forward beside oneDNN %s", math_name(math));
    tokens_row("gemm", name, B, n, t_us);
    l.rate *= B * n / (linear_flops(B, n) + attention_flops(B, n));
    snprintf(name, sizeof name, "forward: oneDNN %s", math_name(math));
    row("gemm", name, n, t_them, B * n, 1, "tokens/s", &l);
    snprintf(name, sizeof name, "forward of oneDNN %s", math_name(math));
    row_ratio("gemm", name, n, ratio);
    forward_close(&us);
    forward_close(&them);
}

/* ---- in turns with another program ----------------------------------------------------------- */

typedef struct { /* all texts, in batches */
    qemb_model *m;
    qemb_batch *b[1024];
    int n;
    float *out;
} texts;

static void run_texts(void *arg, int i) {
    const texts *t = arg;
    (void)i;
    for (int k = 0; k < t->n; k++) qemb_embed(t->m, t->b[k], t->out);
}

/* Fills batches with the lines of a file. Returns their tokens. */
static int read_texts(texts *t, FILE *in) {
    char *line = NULL;
    size_t room = 0;
    int tokens = 0;
    qemb_tokenizer *tokenizer;
    qemb_err err;
    if (qemb_file_tokenizer(&tokenizer, file, &err)) die(err.msg);
    text_ids ids;
    if (text_ids_open(&ids, file, tokenizer, qemb_options_of(t->m)->max_tokens, &err)) die(err.msg);
    for (ssize_t bytes; (bytes = getline(&line, &room, in)) > 0;) {
        const char *part[] = {line};
        const size_t len[] = {(size_t)bytes - (line[bytes - 1] == '\n')};
        const int n = text_ids_encode(&ids, part, len, 1, NULL, &err);
        if (n < 0) die(err.msg);
        int32_t *own = zeroed(sizeof *own * (size_t)n); /* until the program ends */
        memcpy(own, ids.ids, sizeof *own * (size_t)n);
        if (!t->n || qemb_pack_add(t->b[t->n - 1], own, n) < 0) {
            if (t->n == LENGTH(t->b)) die("too many texts");
            if (!(t->b[t->n] = qemb_batch_new(t->m))) die("out of memory");
            qemb_pack_add(t->b[t->n++], own, n);
        }
        tokens += n;
    }
    free(line);
    text_ids_close(&ids);
    qemb_tokenizer_close(tokenizer);
    return tokens;
}

typedef struct {
    FILE *to, *from;
    pid_t id;
} peer;

static void peer_open(peer *p, const char *command) {
    int to[2], from[2];
    if (pipe(to) || pipe(from) || (p->id = fork()) < 0) die("a peer: cannot be started");
    if (!p->id) {
        dup2(to[0], 0), dup2(from[1], 1);
        close(to[0]), close(to[1]), close(from[0]), close(from[1]);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    close(to[0]), close(from[1]);
    p->to = fdopen(to[1], "w"), p->from = fdopen(from[0], "r");
    if (!p->to || !p->from) die("out of memory");
}

/* Other lines than "done" are what libraries say. */
static void run_peer(void *arg, int i) {
    const peer *p = arg;
    char line[4096] = "";
    (void)i;
    if (fputs("\n", p->to) < 0 || fflush(p->to)) die("a peer does not listen");
    while (strcmp(line, "done\n"))
        if (!fgets(line, sizeof line, p->from)) die("a peer ended before it was done");
}

static void bench_turns(const char *command, const char *path) {
    const qemb_options opt = {.batch_tokens = batch_tokens, .threads = measure_threads()};
    static texts t;
    peer them;
    quantiles t_us, t_them, ratio;
    qemb_err err;
    FILE *in = fopen(path, "r");
    if (!in) die("the texts cannot be read");
    signal(SIGPIPE, SIG_IGN); /* a peer that has ended is an error of fflush */
    peer_open(&them, command);
    if (qemb_open(&t.m, file, table, &opt, &err)) die(err.msg);
    t.out = zeroed(sizeof(float) * (size_t)batch_tokens * (size_t)file->config.hidden);
    const int tokens = read_texts(&t, in);
    if (!tokens) die("the file has no texts");
    measure_turns((timed_call){run_texts, &t}, (timed_call){run_peer, &them}, &t_us, &t_them,
                  &ratio);
    row("turns", "qemb", tokens, t_us, tokens, 1, "tokens/s", NULL);
    row("turns", "peer", tokens, t_them, tokens, 1, "tokens/s", NULL);
    row_ratio("turns", "qemb of peer", tokens, ratio);
    fclose(in), fclose(them.to), fclose(them.from);
    waitpid(them.id, NULL, 0);
    for (int i = 0; i < t.n; i++) qemb_batch_free(t.b[i]);
    qemb_close(t.m);
    free(t.out);
}

/* ---- a reranker's documents ------------------------------------------------------------------ */

/* Tokens of Qwen3-Reranker's prompt with its default task and a query of 7 tokens, before a
 * document and behind it. */
enum { HEAD = 69, TAIL = 9, DOCUMENTS = 100 };

/* Batches of texts of HEAD + n + TAIL random tokens. Their first HEAD and last TAIL are equal,
 * except the first one if they are apart. Returns the tokens that are computed. */
static int make_documents(texts *t, int n, int apart, int32_t *ids) {
    const int len = HEAD + n + TAIL;
    uint32_t seed = 1;
    int computed = 0;
    for (int d = 0; d < DOCUMENTS; d++, ids += len) {
        for (int i = 0; i < len; i++) {
            seed = seed * 1664525 + 1013904223;
            const int shared = i < HEAD || i >= HEAD + n;
            ids[i] = (int32_t)((shared ? (uint32_t)i : seed >> 8) % (uint32_t)file->config.vocab);
        }
        if (apart) ids[0] = d;
        if (!t->n || qemb_pack_add(t->b[t->n - 1], ids, len) < 0) {
            if (!(t->b[t->n] = qemb_batch_new(t->m))) die("out of memory");
            qemb_pack_add(t->b[t->n++], ids, len);
        }
    }
    for (int i = 0; i < t->n; i++) computed += (int)qemb_batch_tokens_computed(t->b[i]);
    return computed;
}

/* One query with DOCUMENTS documents of n tokens: with what they share computed once a batch, and
 * with all of it computed for each. */
static void bench_rerank(int n) {
    const qemb_options opt = {.batch_tokens = batch_tokens, .threads = measure_threads()};
    static texts t[2];
    quantiles seconds[2], ratio;
    qemb_model *m;
    qemb_err err;
    if (qemb_open(&m, file, table, &opt, &err)) die(err.msg);
    float *out = zeroed(sizeof(float) * DOCUMENTS * (size_t)qemb_dim(&file->config));
    int32_t *ids[2];
    int computed[2];
    for (int i = 0; i < 2; i++) {
        t[i] = (texts){.m = m, .out = out};
        ids[i] = zeroed(sizeof **ids * DOCUMENTS * (size_t)(HEAD + n + TAIL));
        computed[i] = make_documents(&t[i], n, i, ids[i]);
    }
    measure_turns((timed_call){run_texts, &t[0]}, (timed_call){run_texts, &t[1]}, &seconds[0],
                  &seconds[1], &ratio);
    row("rerank", "shared", computed[0], seconds[0], DOCUMENTS, 1, "documents/s", NULL);
    row("rerank", "apart", computed[1], seconds[1], DOCUMENTS, 1, "documents/s", NULL);
    row_ratio("rerank", "shared of apart", n, ratio);
    for (int i = 0; i < 2; i++) {
        for (int k = 0; k < t[i].n; k++) qemb_batch_free(t[i].b[k]);
        free(ids[i]);
    }
    qemb_close(m);
    free(out);
}

/* ---- tokenizer and printing, one thread ------------------------------------------------------ */

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
    if (qemb_file_tokenizer(&t, file, &err)) die(err.msg);
    if (!(c.s = qemb_tokenizer_state_new(t))) die("out of memory");
    c.text = text;
    start = measure_now();
    run_tokenizer(&c, 0);
    const double took = measure_now() - start;
    const quantiles first = {took, took, took, 1, 1, 1};
    row("tokenizer first", path, 1, first, (double)c.bytes, 1e6, "MB/s", NULL);
    row("tokenizer again", path, 1, measure(run_tokenizer, &c), (double)c.bytes, 1e6, "MB/s", NULL);
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
    for (int i = 0; i < VECTORS * dim; i++) /* of about the size of a unit vector's numbers */
        seed = seed * 6364136223846793005u + 1442695040888963407u,
        v[i] = (float)((double)(seed >> 11) * 0x1p-53 * 0.1 - 0.05);
    for (int k = 0; k < LENGTH(kinds); k++) {
        printing p = {kinds[k], dim, v, NULL};
        p.room = zeroed(format_vector_room(p.kind, dim));
        row("print", format_names[kinds[k]], dim, measure(run_print, &p), VECTORS, 1, "vectors/s",
            NULL);
        free(p.room);
    }
    free(v);
}

/* ---- the index of lines ---------------------------------------------------------------------- */

typedef struct {
    line_index x;
    struct cpu_pool *pool;
    dot_f16 *dot;
    float *q, *scores;
} search;

static void run_block(const void *job, work_item item) {
    const search *s = job;
    const size_t first = (size_t)item.i * LINE_INDEX_BLOCK, left = s->x.n_rows - first;
    s->dot(s->scores + first, s->q, s->x.vectors + first * (size_t)s->x.stride,
           left < LINE_INDEX_BLOCK ? left : LINE_INDEX_BLOCK, s->x.stride);
}

static void run_dots(void *arg, int i) {
    const search *s = arg;
    (void)i;
    cpu_parallel(s->pool, (int)((s->x.n_rows + LINE_INDEX_BLOCK - 1) / LINE_INDEX_BLOCK), run_block,
                 s);
}

static void run_scan(void *arg, int i) {
    const search *s = arg;
    qemb_err err;
    (void)i;
    if (line_index_scan(&s->x, "index", s->q, s->scores, measure_threads(), &err)) die(err.msg);
}

/* An index of n random vectors in s->x. Its file has no name any more. */
static void make_index(search *s, int n) {
    const int dim = file->config.hidden;
    const line_index_key key = {.dim = (uint32_t)dim};
    line_index_file text = {.text.bytes = 1};
    const line_index_row row = {0, 0, 1};
    uint16_t *v = zeroed((size_t)dim * sizeof *v);
    line_index_writer *w;
    char path[64];
    qemb_err err;
    snprintf(path, sizeof path, "/var/tmp/qemb-bench-%ld.qidx", (long)getpid());
    if (line_index_create(&w, path, &key, &text, 1, &err)) die(err.msg);
    uint32_t seed = 1;
    for (int i = 0; i < n; i++) {
        for (int k = 0; k < dim; k++)
            seed = seed * 1664525u + 1013904223u, v[k] = seed >> 16 & 0xabff; /* finite, < 1 */
        if (line_index_add(w, 0, &row, v, &err)) die(err.msg);
    }
    if (line_index_finish(w, &s->x, &err)) die(err.msg);
    unlink(path);
    free(v);
}

static void bench_scan(int n) {
    search s = {.dot = dot_f16_choose()};
    qemb_err err;
    if (n < 1) die("scan: no number of lines");
    make_index(&s, n);
    s.q = zeroed((size_t)s.x.stride * sizeof *s.q);
    s.scores = zeroed((size_t)n * sizeof *s.scores);
    for (int k = 0; k < file->config.hidden; k++) s.q[k] = 1 / (float)(k + 1);
    const size_t bytes = (size_t)n * (size_t)s.x.stride * sizeof *s.x.vectors;
    limits_measure_read(s.x.vectors, bytes);
    if (cpu_pool_open(&s.pool, measure_threads(), &err)) die(err.msg);
    row("scan", "dot products", n, measure(run_dots, &s), (double)bytes, 1e9, "GB/s", limit_read());
    row("scan", "digests and dot products", n, measure(run_scan, &s), (double)bytes, 1e9, "GB/s",
        limit_read());
    cpu_pool_close(s.pool);
    line_index_close(&s.x);
    free(s.q), free(s.scores);
}

static int tables(void) {
    for (int i = 0; qemb_cpu_table(i); i++)
        printf("%s %s\n", qemb_cpu_table(i)->name, math_name(qemb_cpu_table(i)->math));
    return 0;
}

/* The table that is timed: of an arithmetic the fastest, which is the last. Dies where it would be
 * one of another arithmetic than math. */
static const qemb_ops *asked(const char *cpu, const char *math) {
    const qemb_ops *found = NULL;
    qemb_err err;
    for (int i = 0; math && !cpu && qemb_cpu_table(i); i++)
        if (!strcmp(math_name(qemb_cpu_table(i)->math), math)) found = qemb_cpu_table(i);
    if (!found && !(found = select_ops(cpu, math, &err))) die(err.msg);
    if (math && strcmp(math_name(found->math), math))
        die("--math: another arithmetic would serve it here (want --cpu with a name of `tables`)");
    fprintf(stderr, "bench: table %s\n", found->name);
    return found;
}

int main(int argc, char **argv) {
    const char *cpu = NULL, *math = NULL;
    int n = 1, threads = 0, cpu_time = 0;
    qemb_err err;
    for (int i = 1; i < argc; i++) { /* options leave argv */
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
    if (n < 3 || (!strcmp(argv[1], "turns") && n != 5))
        die("usage: bench tables | "
            "limits|ops|matmul|gemm|forward|beside|turns|rerank|tokenizer|print|scan "
            "MODEL "
            "[OP...|LENGTH...|COMMAND FILE|TEXT...|LINES...] [--threads N] [--math "
            "f32|bf16|int16|int8] "
            "[--cpu NAME] "
            "[--tokens N] [--cpu-time]");
    measure_open(threads < 1 ? qemb_cpu_count() : threads, cpu_time);
    table = asked(cpu, math);
    if (qemb_file_open((qemb_file **)&file, argv[2], &err)) die(err.msg);
    const char *what = argv[1];
    if (strcmp(what, "tokenizer") && strcmp(what, "print") && limits_probe())
        measure_gate(limits_probe());
    if (!strstr("tokenizer print turns rerank scan", what)) limits_measure(file);
    if (!strcmp(what, "ops") || !strcmp(what, "gemm"))
        bench_ops(argv + 3, n - 3, !strcmp(what, "gemm"));
    if (!strcmp(what, "matmul")) bench_matmul();
    if (!strcmp(what, "print")) bench_print();
    if (!strcmp(what, "turns")) bench_turns(argv[3], argv[4]);
    for (int i = 3; i < n; i++) {
        if (!strcmp(what, "forward")) bench_forward(atoi(argv[i]));
        if (!strcmp(what, "rerank")) bench_rerank(atoi(argv[i]));
        for (int m = QEMB_MATH_F32; m <= QEMB_MATH_BF16; m++)
            if (!strcmp(what, "beside")) bench_beside(atoi(argv[i]), (qemb_math)m);
        if (!strcmp(what, "tokenizer")) bench_tokenizer(argv[i]);
        if (!strcmp(what, "scan")) bench_scan(atoi(argv[i]));
    }
    qemb_file_close((qemb_file *)file);
    return 0;
}
