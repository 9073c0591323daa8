/* test_model.c - whole models, compared with transformers (tests/golden), with the double-precision
 * oracle, and with themselves: a text's vector has the same bits alone, in any batch, behind any
 * shared prefix and on any number of threads. */
#include "lib/text_ids.h"
#include "oracle.h"
#include "spied_tables.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>

#define MAX_CASES 64
#define MAX_IDS   4096

typedef struct {
    char label[64];
    char *text; /* NULL: none */
    int text_bytes, n, dim;
    int32_t *ids;
    float *vector;
    double norm;
} golden_case;

typedef struct {
    char model[64];
    double f32_diff;
    int n;
    golden_case cases[MAX_CASES];
} golden;

#define SCAN(n, ...) cr_assert_eq(fscanf(in, __VA_ARGS__), n, "%s: malformed golden", path)

static void read_case(golden_case *c, FILE *in, const char *path) {
    SCAN(2, " case %63s text %d", c->label, &c->text_bytes);
    if (c->text_bytes >= 0) c->text = malloc((size_t)c->text_bytes + 1);
    if (c->text_bytes > 0) fgetc(in); /* the space before the hexadecimal digits */
    for (int i = 0; i < c->text_bytes; i++) {
        unsigned byte;
        SCAN(1, "%2x", &byte);
        c->text[i] = (char)byte;
    }
    SCAN(1, " ids %d", &c->n);
    c->ids = malloc((size_t)c->n * sizeof *c->ids);
    for (int i = 0; i < c->n; i++) SCAN(1, "%d", &c->ids[i]);
    SCAN(2, " norm %la vec %d", &c->norm, &c->dim);
    c->vector = malloc((size_t)c->dim * sizeof *c->vector);
    for (int i = 0; i < c->dim; i++) SCAN(1, "%a", &c->vector[i]);
}

static golden *read_golden(const char *path) {
    FILE *in = fopen(path, "r");
    cr_assert(in, "%s", path);
    golden *g = calloc(1, sizeof *g);
    int version, dim;
    SCAN(3, "golden %d model %63s dim %d", &version, g->model, &dim);
    cr_assert_eq(version, 1);
    SCAN(2, " f32_diff %la f32_cosine %*a max_swiglu %*a cases %d", &g->f32_diff, &g->n);
    cr_assert(g->n > 0 && g->n <= MAX_CASES);
    for (int i = 0; i < g->n; i++) read_case(&g->cases[i], in, path);
    fclose(in);
    return g;
}

static void free_golden(golden *g) {
    for (int i = 0; i < g->n; i++)
        free(g->cases[i].text), free(g->cases[i].ids), free(g->cases[i].vector);
    free(g);
}

static qemb_file *open_file(const char *path) {
    qemb_file *f;
    qemb_err err;
    cr_assert_eq(qemb_file_open(&f, path, &err), 0, "%s", err.msg);
    return f;
}

static qemb_model *open_engine(const qemb_file *f, int batch_tokens, int threads) {
    return open_with(f, ops, (qemb_options){.batch_tokens = batch_tokens, .threads = threads});
}

/* The largest allowed L2 error of a unit vector in this arithmetic; docs/accuracy.md gives measured
 * errors. INFINITY for float, which has a bound per number.
 *
 * Steps from the least number on are 1/128 of a group's range, which is 1.9 times the largest
 * magnitude of 64 random numbers. With W's as before, both errors together are
 * sqrt((1 + 1.9^2) / 2) = 1.52 times as large. */
static double allowed(void) {
    static const double l2[] = {INFINITY, 6e-3, 4e-4, 3.6e-2, 0.2};
    return l2[ops->math] * (counts_from_low(ops) ? 1.52 : 1);
}

/* The same for a golden. Rounding 64 numbers to steps of 1/127 of the largest has an error of
 * c / (127 sqrt(12)) times their root mean square. c^2, over a matrix, is the mean square of these
 * largest divided by the mean square of all numbers. c is 2.5 to 3 for random numbers, and at most
 * 7 in demo's matrices, some of which began as identities.
 *
 * A model amplifies the rounding of every arithmetic alike. What it makes of float32's is known:
 * f32_diff, up to 1.4e-7 in the goldens that allowed() was measured with. */
static double allowed_for(const golden *g) {
    const double c = strcmp(g->model, "demo") ? 3 : 7;
    const double amplified = fmax(1, g->f32_diff / 1.4e-7);
    return allowed() * amplified * (ops->math == QEMB_MATH_INT8 ? c / 3 : 1);
}

/* Every golden of every model. The vectors are exact to float32's rounding; what float32 arithmetic
 * costs is measured by transformers' own float32 run: f32_diff. Ours sums in other orders, so it
 * may err otherwise, but not on another scale: 8 f32_diff. RoPE's angles are rounded to float in
 * both float32 programs and not in the golden: pos * 2^-24 radians, n * 2^-24 / sqrt(D) or so of a
 * unit vector's number.
 *
 * Arithmetics with less than float are held to allowed_for(), the L2 error of a whole vector.
 * `massive` has a neuron that multiplies by 3,200 twice what is above its threshold. It fires at
 * position 0, and in a model this small it comes near to that at position 1 as well
 * (hf_fixture.Massive). Two texts are so close to the threshold that rounding decides. Those two
 * may differ, but no others, and their numbers have to be finite. */
static void check_goldens(const golden *g, const qemb_file *f) {
    qemb_model *m = open_engine(f, 1024, 2);
    const int D = qemb_dim(&f->config);
    int on_threshold = 0;
    float out[4096];
    qemb_tokenizer *tokenizer;
    text_ids t;
    qemb_err err;
    cr_assert_eq(qemb_file_tokenizer(&tokenizer, f, &err), 0, "%s", err.msg);
    cr_assert_eq(text_ids_open(&t, f, tokenizer, 0, &err), 0, "%s", err.msg);
    for (int i = 0; i < g->n; i++) {
        const golden_case *c = &g->cases[i];
        cr_assert_eq(c->dim, D);
        if (c->text) {
            const char *text = c->text;
            const size_t len = (size_t)c->text_bytes;
            const int n = text_ids_encode(&t, &text, &len, 1, NULL, &err);
            cr_assert_eq(n, c->n, "%s %s: %d ids", g->model, c->label, n);
            cr_assert_arr_eq(t.ids, c->ids, (size_t)n * sizeof *c->ids, "%s %s", g->model,
                             c->label);
        }
        embed_alone(m, c->ids, c->n, out);
        cr_assert_eq(qemb_l2_normalize(out, out, D), 0);
        double dot = 0, a = 0, b = 0, worst = 0, off = 0;
        const int exact = ops->math == QEMB_MATH_F32;
        const double tol = 8 * g->f32_diff + c->n * U / sqrt(D);
        for (int d = 0; d < D; d++) {
            cr_assert(isfinite(out[d]), "%s %s %s (%d)", ops->name, g->model, c->label, d);
            cr_assert(!exact || !far_off(out[d], c->vector[d], tol),
                      "%s %s (%d): %g, want %g +- %g", g->model, c->label, d, (double)out[d],
                      (double)c->vector[d], tol);
            worst = fmax(worst, fabs((double)out[d] - c->vector[d]));
            off += ((double)out[d] - c->vector[d]) * ((double)out[d] - c->vector[d]);
            dot += (double)out[d] * c->vector[d];
            a += (double)out[d] * out[d], b += (double)c->vector[d] * c->vector[d];
        }
        if (!exact) {
            on_threshold += !(sqrt(off) <= allowed_for(g));
            continue;
        }
        cr_assert(dot / sqrt(a * b) >= 0.999999, "%s %s", g->model, c->label);
        cr_assert(worst <= 2e-5);
    }
    cr_assert_leq(on_threshold, strcmp(g->model, "massive") ? 0 : 2, "%s %s: %d texts are off",
                  ops->name, g->model, on_threshold);
    text_ids_close(&t);
    qemb_tokenizer_close(tokenizer);
    qemb_close(m);
}

/* All cases of a golden in one batch have the bits that they have alone: in order on 1 thread, in
 * reverse order on 3. */
static void check_batches(const golden *g, const qemb_file *f) {
    const int D = qemb_dim(&f->config);
    float *alone = malloc((size_t)g->n * D * sizeof *alone),
          *out = malloc((size_t)g->n * D * sizeof *out);
    for (int threads = 1; threads <= 3; threads += 2) {
        qemb_model *m = open_engine(f, 8192, threads);
        qemb_batch *b = qemb_batch_new(m);
        int row[MAX_CASES];
        for (int i = 0; i < g->n; i++) {
            const int k = threads == 1 ? i : g->n - 1 - i;
            row[k] = qemb_pack_add(b, g->cases[k].ids, g->cases[k].n);
            cr_assert_geq(row[k], 0);
            if (threads == 1) embed_alone(m, g->cases[i].ids, g->cases[i].n, alone + (size_t)i * D);
        }
        qemb_embed(m, b, out);
        for (int i = 0; i < g->n; i++)
            cr_assert_arr_eq(out + (size_t)row[i] * D, alone + (size_t)i * D,
                             (size_t)D * sizeof *out, "%s %s, %d threads", g->model,
                             g->cases[i].label, threads);
        qemb_batch_free(b);
        qemb_close(m);
    }
    free(alone), free(out);
}

Test(model, goldens) {
    int n = 0;
    DIR *dir = opendir("tests/golden");
    cr_assert(dir, "run from the project's root");
    for (struct dirent *e; (e = readdir(dir));) {
        char path[512];
        const size_t len = strlen(e->d_name);
        if (len < 5 || strcmp(e->d_name + len - 4, ".vec")) continue;
        snprintf(path, sizeof path, "tests/golden/%s", e->d_name);
        golden *g = read_golden(path);
        snprintf(path, sizeof path, "tests/golden/%s.qemb", g->model);
        qemb_file *f = open_file(path);
        FOR_TABLES {
            check_goldens(g, f);
            check_batches(g, f);
        }
        qemb_file_close(f);
        free_golden(g);
        n++;
    }
    closedir(dir);
    cr_assert_geq(n, 18, "all goldens are there");
}

static int32_t *random_ids(rng *r, const qemb_config *c, int n) {
    int32_t *ids = malloc((size_t)n * sizeof *ids);
    for (int i = 0; i < n; i++) ids[i] = (int32_t)(rng_u64(r) % (uint64_t)c->eos_id);
    ids[n - 1] = c->eos_id;
    return ids;
}

/* Shapes and lengths that no golden has: odd sizes; texts longer than the MLP's chunk of rows. A
 * wrong formula changes the first digit. */
static void check_oracle(qemb_dtype dtype, const qemb_config *c, int n, double gate_scale) {
    qemb_file *f = open_model_of(dtype, c, (uint64_t)n, gate_scale);
    f->config.pooling = c->pooling, f->config.attention = c->attention;
    qemb_model *m = open_engine(f, 64, 2);
    rng r = {(uint64_t)n + 3};
    int32_t *ids = random_ids(&r, c, n);
    float *out = malloc((size_t)c->hidden * sizeof *out);
    double *want = malloc((size_t)c->hidden * sizeof *want), length = 0;
    embed_alone(m, ids, n, out);
    oracle_embed(want, NULL, c, &f->weights, ids, n);
    cr_assert_eq(qemb_l2_normalize(out, out, c->hidden), 0);
    /* with 30 times larger gates SwiGLU is nearly a step, which doubles earlier errors */
    const double all = allowed() * (gate_scale > 1 ? 2 : 1);
    const double tol = ops->math == QEMB_MATH_F32 ? 2e-5 : all;
    double off = 0;
    for (int d = 0; d < c->hidden; d++) length += want[d] * want[d];
    for (int d = 0; d < c->hidden; d++) {
        const double e = out[d] - want[d] / sqrt(length);
        cr_assert_not(far_off(e, 0, tol), "%s mean=%d bidirectional=%d n=%d (%d): %g, want %g",
                      ops->name, c->pooling, c->attention, n, d, (double)out[d],
                      want[d] / sqrt(length));
        off += e * e;
    }
    cr_assert(sqrt(off) <= all, "%s n=%d: off by %g", ops->name, n, sqrt(off));
    free(ids), free(out), free(want);
    qemb_close(m);
    qemb_file_close(f);
}

static void check_shapes(void) {
    const int lengths[] = {1, 2, 5, 33, 64, 65, 200};
    for (int s = 0; s < n_small_configs; s++)
        for (int i = 0; i < 7; i++) check_oracle(QEMB_F16, &small_configs[s], lengths[i], 1);
    for (int s = 0; s < n_small_configs; s++) check_oracle(QEMB_I8, &small_configs[s], 33, 1);
    check_oracle(QEMB_F16, &small_configs[3], 299, 30); /* SwiGLU outputs in the hundreds */
    check_oracle(QEMB_F16, &small_configs[3], 300, 1);  /* max_positions */
    qemb_config c = small_configs[3];
    c.n_layers = 2, c.max_positions = 2 * QEMB_MLP_ROWS + 100;
    c.ffn = 17; /* the last layer has one row; the first one's MLP runs in three chunks */
    check_oracle(QEMB_F16, &c, c.max_positions, 1);
}

Test(model, oracle) { FOR_TABLES check_shapes(); }

/* What a text's tokens see, and what becomes its vector, but for that of Qwen3-Embedding. */
static const struct {
    qemb_attention attention;
    qemb_pooling pooling;
} modes[] = {{QEMB_BIDIRECTIONAL, QEMB_POOL_MEAN},
             {QEMB_BIDIRECTIONAL, QEMB_POOL_LAST},
             {QEMB_CAUSAL, QEMB_POOL_MEAN}};
enum { MODES = sizeof modes / sizeof *modes };

static void check_modes(void) {
    const int lengths[] = {1, 65, 200};
    for (int k = 0; k < MODES; k++)
        for (int s = 0; s < n_small_configs; s++) {
            qemb_config c = small_configs[s];
            c.attention = modes[k].attention, c.pooling = modes[k].pooling;
            for (int i = 0; i < 3; i++) check_oracle(QEMB_F16, &c, lengths[i], 1);
        }
}
Test(model, oracle_of_other_modes) { FOR_CPU_TABLES check_modes(); }

/* ---- the packer, watched through the layouts that it hands to the ops ------------------------ */

/* Texts that share longer and longer or shorter and shorter prefixes, some of them equal: the same
 * bits as alone, and one copy of every shared row. */
static void check_shared_prefixes(void) {
    const qemb_config *c = &small_configs[1];
    qemb_file *f = open_model(c, 4, 1);
    qemb_model *m = open_spied(f, (qemb_options){.batch_tokens = 2000, .threads = 2});
    rng r = {8};
    for (int shared = 0; shared <= 130; shared += 13) {
        enum { N = 9 };
        int32_t *texts[N], *head = random_ids(&r, c, 200);
        int n[N], row[N];
        qemb_batch *b = qemb_batch_new(m);
        for (int i = 0; i < N; i++) {
            n[i] = shared + 1 + i * 7;
            texts[i] = random_ids(&r, c, n[i]);
            memcpy(texts[i], head, (size_t)shared * sizeof *head);
            if (n[i] > shared + 1) texts[i][shared] = i; /* the texts differ from here on */
            row[i] = qemb_pack_add(b, texts[i], n[i]);
            cr_assert_eq(row[i], i);
            cr_assert_eq(qemb_pack_add(b, texts[i], n[i]), i, "an equal text shares its row");
        }
        cr_assert_eq(qemb_batch_rows(b), N);
        cr_assert_eq(qemb_batch_tokens_saved(b), (size_t)shared * (N - 1));
        float out[N * 48], alone[48];
        qemb_embed(m, b, out);
        cr_assert(seen.P == shared && seen.B == N);
        cr_assert_eq(seen.T, shared + N + 7 * N * (N - 1) / 2);
        for (int i = 0; i < N; i++) {
            for (int t = seen.cu[i]; t < seen.cu[i + 1]; t++) {
                cr_assert_eq(seen.pos[t], seen.P + t - seen.cu[i]);
                cr_assert_eq(seen.tokens[t], texts[i][seen.pos[t]]);
            }
        }
        for (int i = 0; i < N; i++) {
            embed_alone(m, texts[i], n[i], alone);
            cr_assert(seen.P == 0 && seen.T == n[i]);
            cr_assert_arr_eq(out + i * 48, alone, sizeof alone, "shared %d text %d", shared, i);
        }
        for (int i = 0; i < N; i++) free(texts[i]);
        free(head);
        qemb_batch_free(b);
    }
    qemb_close(m);
    qemb_file_close(f);
}

Test(model, shared_prefixes) { FOR_CPU_TABLES check_shared_prefixes(); }

/* The same of other poolings and attentions: in order on 1 thread, in reverse order on 3 and with
 * an MLP in chunks. A token that sees its whole text shares no rows. */
static void check_mode(qemb_attention attention, qemb_pooling pooling) {
    enum { N = 9, D = 48 };
    const qemb_config *c = &small_configs[1];
    const int lengths[N] = {130, 1, 2, 63, 64, 65, 128, 129, 200};
    qemb_file *f = open_model(c, 4, 1);
    f->config.attention = attention, f->config.pooling = pooling;
    rng r = {9};
    for (int shared = 0; shared <= 50; shared += 50) {
        int32_t *texts[N], *head = random_ids(&r, c, 50);
        float alone[N * D], out[N * D];
        for (int i = 0; i < N; i++) {
            texts[i] = random_ids(&r, c, shared + lengths[i]);
            memcpy(texts[i], head, (size_t)shared * sizeof *head);
            if (lengths[i] > 1) texts[i][shared] = i; /* the texts differ from here on */
        }
        for (int threads = 1; threads <= 3; threads += 2) {
            const qemb_options opt = {
                .batch_tokens = 2000, .threads = threads, .mlp_rows = threads == 1 ? 0 : 50};
            qemb_model *m = open_spied(f, opt);
            qemb_batch *b = qemb_batch_new(m);
            for (int i = 0; i < N; i++) {
                const int k = threads == 1 ? i : N - 1 - i;
                cr_assert_eq(qemb_pack_add(b, texts[k], shared + lengths[k]), i);
                if (threads == 1) embed_alone(m, texts[i], shared + lengths[i], alone + i * D);
            }
            qemb_embed(m, b, out);
            cr_assert_eq(seen.bidirectional, attention == QEMB_BIDIRECTIONAL);
            cr_assert_eq(seen.P, attention == QEMB_BIDIRECTIONAL ? 0 : shared);
            for (int i = 0; i < N; i++)
                cr_assert_arr_eq(out + i * D, alone + (threads == 1 ? i : N - 1 - i) * D,
                                 D * sizeof *out, "%s attention %d pooling %d, %d threads, text %d",
                                 ops->name, attention, pooling, threads, i);
            qemb_batch_free(b);
            qemb_close(m);
        }
        for (int i = 0; i < N; i++) free(texts[i]);
        free(head);
    }
    qemb_file_close(f);
}

Test(model, batches_of_other_modes) {
    FOR_TABLES
    for (int k = 0; k < MODES; k++) check_mode(modes[k].attention, modes[k].pooling);
}

/* A text that is a prefix of another keeps a row of its own for pooling. */
Test(model, a_text_within_a_text) {
    const qemb_config *c = &small_configs[0];
    qemb_file *f = open_model(c, 4, 1);
    qemb_model *m = open_spied(f, (qemb_options){.batch_tokens = 100});
    const int32_t ids[] = {5, c->eos_id, 6, c->eos_id};
    float out[3 * 64], alone[64];
    qemb_batch *b = qemb_batch_new(m);
    cr_assert_eq(qemb_pack_add(b, ids, 4), 0);
    cr_assert_eq(qemb_pack_add(b, ids, 2), 1);
    qemb_embed(m, b, out);
    cr_assert(seen.P == 1 && seen.T == 1 + 3 + 1);
    cr_assert_eq(qemb_pack_add(b, ids, 1), 2); /* its only row is pooled: no prefix */
    qemb_embed(m, b, out);
    cr_assert(seen.P == 0 && seen.T == 4 + 2 + 1);
    for (int i = 0; i < 3; i++) {
        const int n[] = {4, 2, 1};
        embed_alone(m, ids, n[i], alone);
        cr_assert_arr_eq(out + i * 64, alone, sizeof alone);
    }
    qemb_batch_free(b);
    qemb_close(m);
    qemb_file_close(f);
}

/* The budget counts rows as packed, so a prefix that becomes shorter can fill a batch. */
Test(model, the_budget) {
    const qemb_config *c = &small_configs[0];
    qemb_file *f = open_model(c, 4, 1);
    qemb_model *m = open_spied(f, (qemb_options){.batch_tokens = 20});
    int32_t ids[20][12], other[] = {1, 2, 3}, longer[700];
    float out[20 * 64];
    for (int i = 0; i < 20; i++) {
        for (int k = 0; k < 12; k++) ids[i][k] = k;
        ids[i][11] = 100 + i;
    }
    qemb_batch *b = qemb_batch_new(m);
    for (int i = 0; i < 9; i++) cr_assert_eq(qemb_pack_add(b, ids[i], 12), i); /* 11 + 9 rows */
    cr_assert_eq(qemb_pack_add(b, ids[9], 12), -1);
    cr_assert_eq(qemb_pack_add(b, ids[3], 12), 3, "a text that is there always fits");
    cr_assert_eq(qemb_pack_add(b, other, 3), -1, "9 x 12 + 3 rows without a prefix");
    qemb_embed(m, b, out);
    cr_assert(seen.P == 11 && seen.T == 20 && seen.B == 9, "a refused text leaves no trace");
    qemb_batch_clear(b);
    cr_assert_eq(qemb_batch_rows(b), 0);
    for (int i = 0; i < 700; i++) longer[i] = i % 250;
    cr_assert_eq(qemb_pack_add(b, longer, 700), 0, "an empty batch takes every text");
    cr_assert_eq(qemb_pack_add(b, other, 3), -1);
    qemb_embed(m, b, out);
    cr_assert_eq(seen.T, 700);
    qemb_batch_clear(b);
    for (int i = 0; i < 20; i++)
        cr_assert_eq(qemb_pack_add(b, ids[i] + 11, 1), i); /* as many texts as rows */
    cr_assert_eq(qemb_pack_add(b, other, 1), -1);
    qemb_embed(m, b, out);
    cr_assert(seen.B == 20 && seen.T == 20 && seen.P == 0);
    qemb_batch_free(b);
    qemb_close(m);
    qemb_file_close(f);
}

Test(model, the_plan_is_what_is_asked_for) {
    const qemb_config *c = &small_configs[0];
    qemb_file *f = open_model(c, 4, 1);
    qemb_memory plan;
    const qemb_options bulk = {.batch_tokens = 5000, .max_tokens = 100, .threads = 1};
    qemb_plan(f, &qemb_cpu_ops, &bulk, &plan);
    qemb_model *m = open_spied(f, bulk);
    cr_assert_eq(arena_asked, plan.arena_batch);
    /* x, x_last, xn (5000, 64), qkv (5000, 192), att (5000, 64), gu (1024, 192), h (1024, 96) */
    cr_assert_eq(plan.arena_batch, 4 * (5000 * (64 + 64 + 64 + 192 + 64) + 1024 * (192 + 96)));
    cr_assert_eq(plan.table, 300 * 64 * 2);
    cr_assert_eq(plan.weights, 2 * 2 * (192 * 64 + 64 * 64 + 3 * 96 * 64));
    qemb_close(m);
    qemb_plan(f, &qemb_cpu_ops, NULL, &plan);
    cr_assert_eq(plan.arena_text, 4 * (700 * (64 + 64 + 192 + 64) + 64 + 700 * (192 + 96)));
    m = open_spied(f, (qemb_options){0});
    const qemb_options *o = qemb_options_of(m);
    cr_assert(o->batch_tokens == QEMB_BATCH_TOKENS && o->max_tokens == 700 && o->threads >= 1);
    qemb_close(m);
    qemb_file_close(f);
    f = open_model_of(QEMB_I8, c, 4, 1); /* one scale per 64 columns: a row of wdown (96) has two */
    qemb_plan(f, &qemb_cpu_ops, NULL, &plan);
    cr_assert_eq(plan.weights,
                 2 * (192 * 64 + 64 * 64 + 3 * 96 * 64 + 4 * (192 + 64 + 192 + 2 * 64)));
    qemb_file_close(f);
}

/* Weights that are not finite give vectors that qemb_l2_normalize refuses; other texts are fine. */
static void check_not_finite(void) {
    const qemb_config *c = &small_configs[0];
    size_t bytes;
    char path[64];
    uint8_t *data = make_model(c, 4, 1, &bytes);
    const size_t table = (size_t)data[4096 + 4 * 96 + 72] | (size_t)data[4096 + 4 * 96 + 73] << 8;
    const uint16_t inf = 0x7c00;
    memcpy(data + table + 2 * (17 * 64 + 5), &inf, 2); /* token 17 */
    seal_model(data, bytes);
    write_temporary(path, data, bytes);
    qemb_file *f = open_file(path);
    qemb_model *m = open_engine(f, 100, 2);
    const int32_t bad[] = {3, 17, 4, 299}, good[] = {3, 16, 4, 299};
    float out[2 * 64], alone[64];
    qemb_batch *b = qemb_batch_new(m);
    qemb_pack_add(b, bad, 4);
    qemb_pack_add(b, good, 4);
    qemb_embed(m, b, out);
    cr_assert_eq(qemb_l2_normalize(out, out, 64), -1);
    embed_alone(m, good, 4, alone);
    cr_assert_arr_eq(out + 64, alone, sizeof alone, "its neighbour is untouched");
    cr_assert_eq(qemb_l2_normalize(out + 64, out + 64, 64), 0);
    free(data);
    qemb_batch_free(b);
    qemb_close(m);
    qemb_file_close(f);
    remove(path);
}

Test(model, not_finite) { FOR_TABLES check_not_finite(); }

/* ---- a table whose activations overflow ------------------------------------------------------ */

static int spoiled_row; /* the row of out that gets a NaN, as from an overflow */
static const char *spy_failure;

static int spoiling_pool(qemb_backend *be, float *out, float *x, const float *w, int B) {
    const int D = small_configs[0].hidden;
    ops->pool(be, out, x, w, B);
    if (spoiled_row < B) out[spoiled_row * D + 9] = NAN;
    return 0;
}
static void spy_health(const qemb_backend *be, qemb_health *h) {
    (void)be;
    h->clamped += 3;
    h->failure = spy_failure;
}
static int pad_to_16(int T) { return (T + 15) / 16 * 16; }

static void check_fallback(void) {
    const qemb_config *c = &small_configs[0];
    qemb_file *f = open_model(c, 4, 1);
    qemb_ops spy = *ops;
    spy.begin = spy_begin, spy.pool = spoiling_pool, spy.health = spy_health,
    spy.fallback = qemb_cpu_mapped;
    spy.pad_rows = pad_to_16;
    qemb_model *m, *cpu;
    qemb_err err;
    const qemb_options opt = {.batch_tokens = 100, .threads = 2};
    cr_assert_eq(qemb_open(&m, f, &spy, &opt, &err), 0, "%s", err.msg);
    cr_assert_eq(qemb_open(&cpu, f, qemb_cpu_mapped(), &opt, &err), 0, "%s", err.msg);
    const int32_t ids[3][4] = {{3, 17, 4, 299}, {3, 16, 4, 299}, {3, 17, 299, 299}};
    float out[3 * 64], alone[64];
    qemb_batch *b = qemb_batch_new(m);
    for (int i = 0; i < 3; i++) qemb_pack_add(b, ids[i], 4);
    for (spoiled_row = 0; spoiled_row < 3; spoiled_row++) {
        qemb_embed(m, b, out);
        /* a fourth text, which has no vector, pads the batch to 16 rows */
        cr_assert(seen.P == 1 && seen.B == 4 && seen.T == 16 && seen.cu[4] == 16);
        for (int t = seen.cu[3]; t < 16; t++) cr_assert(seen.pos[t] == 0 && seen.tokens[t] == 0);
        embed_alone(cpu, ids[spoiled_row], 4, alone);
        cr_assert_arr_eq(out + spoiled_row * 64, alone, sizeof alone, "not the CPU's vector");
        for (int i = 0; i < 3; i++) cr_assert_eq(qemb_l2_normalize(alone, out + i * 64, 64), 0);
        const qemb_health h = qemb_health_of(m);
        cr_assert(h.recomputed == (uint64_t)spoiled_row + 1 && h.clamped == 3 && !h.failure);
    }
    spy_failure = "the device is gone";
    spoiled_row = 1;
    qemb_embed(m, b, out); /* a failed device's texts are not computed again on the CPU */
    cr_assert(isnan(out[64 + 9]) && qemb_health_of(m).recomputed == 3);
    spy_failure = NULL;
    qemb_batch_free(b);
    qemb_close(m);
    qemb_close(cpu);
    qemb_file_close(f);
}
Test(model, overflow_is_computed_again) { FOR_CPU_TABLES check_fallback(); }

/* ---- a table with two batches in flight ------------------------------------------------------ */

static struct {
    float *rows[2], *out[2]; /* of batches between pool and collect */
    size_t bytes[2];
    int n, refuse; /* refuse: pools that ask for their batch again */
} later;

static int later_pool(qemb_backend *be, float *out, float *x, const float *w, int B) {
    if (later.refuse > 0) return later.refuse--, 1;
    const size_t bytes = (size_t)B * (size_t)small_configs[0].hidden * sizeof(float);
    float *rows = malloc(bytes);
    ops->pool(be, rows, x, w, B);
    cr_assert_lt(later.n, 2);
    later.rows[later.n] = rows, later.out[later.n] = out, later.bytes[later.n++] = bytes;
    return 0;
}
static void later_collect(qemb_backend *be) {
    (void)be;
    memcpy(later.out[0], later.rows[0], later.bytes[0]);
    free(later.rows[0]);
    later.rows[0] = later.rows[1], later.out[0] = later.out[1], later.bytes[0] = later.bytes[1];
    later.n--;
}

/* submit and collect: in order, out untouched until its collect, and a batch that the table asks
 * for again. */
static void check_in_flight(void) {
    qemb_file *f = open_model(&small_configs[0], 4, 1);
    qemb_ops table = *ops;
    table.pool = later_pool, table.collect = later_collect, table.in_flight = 2;
    qemb_model *m, *plain;
    qemb_err err;
    const qemb_options opt = {.batch_tokens = 100, .threads = 2};
    cr_assert_eq(qemb_open(&m, f, &table, &opt, &err), 0, "%s", err.msg);
    cr_assert_eq(qemb_open(&plain, f, ops, &opt, &err), 0, "%s", err.msg);
    cr_assert(qemb_in_flight(m) == 2 && qemb_in_flight(plain) == 1);
    const int32_t ids[3][4] = {{3, 17, 4, 299}, {5, 16, 4, 299}, {3, 17, 299, 299}};
    float out[3][64] = {{0}}, want[3][64];
    qemb_batch *b[3], *none = qemb_batch_new(m);
    for (int i = 0; i < 3; i++) {
        b[i] = qemb_batch_new(m);
        qemb_pack_add(b[i], ids[i], 4);
        embed_alone(plain, ids[i], 4, want[i]);
    }
    qemb_submit(m, b[0], out[0]);
    later.refuse = 1;
    qemb_submit(m, b[1], out[1]);
    cr_assert(out[0][0] == 0 && out[1][0] == 0);
    qemb_collect(m);
    cr_assert(out[1][0] == 0);
    qemb_submit(m, none, out[2]); /* an empty batch takes its turn too */
    qemb_collect(m);
    qemb_collect(m);
    cr_assert(out[2][0] == 0 && later.n == 0);
    qemb_embed(m, b[2], out[2]);
    for (int i = 0; i < 3; i++) {
        cr_assert_arr_eq(out[i], want[i], sizeof want[i], "text %d", i);
        qemb_batch_free(b[i]);
    }
    qemb_batch_free(none);
    qemb_close(m);
    qemb_close(plain);
    qemb_file_close(f);
}
Test(model, batches_in_flight) { FOR_CPU_TABLES check_in_flight(); }
