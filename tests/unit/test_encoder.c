/* test_encoder.c - whole models of QEMB_BERT, compared with the double-precision oracle and with
 * themselves: a text has the same bits alone, in any batch and on any number of threads. */
#include "oracle_encoder.h"
#include "spied_tables.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_DIM = 128 };

/* Ids of a text, n >= 2, between the tokens that the model adds. Every ninth one is pad_id. */
static int32_t *random_ids(rng *r, const qemb_config *c, int n) {
    int32_t *ids = malloc((size_t)n * sizeof *ids);
    for (int i = 0; i < n; i++)
        ids[i] = i % 9 == 4 && c->pad_id >= 0 ? c->pad_id : (int32_t)(rng_u64(r) % 300);
    ids[0] = c->bos_id, ids[n - 1] = c->eos_id;
    return ids;
}

/* ---- the oracle ------------------------------------------------------------------------------ */

/* The largest allowed L2 error of a unit vector.
 *
 * A row's numbers have RMS 1 after every LayerNorm, and the matrices keep that. So the relative
 * error of what an op computes is also an error of the row. There are six such places in a layer:
 * four products, attention, LayerNorms. In float, a product of K terms ends a random walk of K
 * roundings: sqrt(K) U. In other arithmetics the rounding of its factors counts, four times in a
 * layer: e, the RMS of the relative error of a product. A bfloat16 number errs by up to 2^-8 of
 * itself; its RMS is 0.4 of that, of two factors 2.2e-3. A step of 8 bits is 1/127 of the largest
 * of 64 numbers, about 2.5 times their RMS: 2.5 / (127 sqrt(12)), of two factors 8e-3. A step of 16
 * bits is up to 8 / 46330 of the RMS (test_ops): of two factors 7e-5. With steps of x
 * from its least number on, both factors together err 1.52 times as much (test_model).
 *
 * Independent errors add as squares. A layer may double the errors of those before it, through the
 * softmax and GELU. */
static double allowed(const qemb_config *c) {
    static const double e[] = {0, 2.2e-3, 7e-5, 8e-3};
    const int L = c->n_layers, K = c->hidden > c->ffn ? c->hidden : c->ffn;
    const double in_float = sqrt((6 * L + 1) * (double)K) * U;
    return 2 * fmax(in_float, sqrt(4 * L) * e[ops->math] * (counts_from_low(ops) ? 1.52 : 1));
}

/* want (D): the oracle's vector of ids (n), of length 1 */
static void check_oracle(const qemb_file *f, const double *want, const int32_t *ids, int n) {
    const qemb_config *c = &f->config;
    const int D = c->hidden;
    float out[MOST_DIM];
    double off = 0;
    qemb_model *m = open_spied(f, (qemb_options){.batch_tokens = 64, .threads = 2});
    embed_alone(m, ids, n, out);
    cr_assert_eq(qemb_l2_normalize(out, out, D), 0);
    for (int d = 0; d < D; d++) off += ((double)out[d] - want[d]) * ((double)out[d] - want[d]);
    cr_assert_not(far_off(sqrt(off), 0, allowed(c)), "%s D=%d n=%d: off by %g, want at most %g",
                  ops->name, D, n, sqrt(off), allowed(c));
    qemb_close(m);
}

static void check_length(qemb_dtype dtype, qemb_config c, int n) {
    c.dense_rows = 0;
    qemb_file *f = open_model_of(dtype, &c, (uint64_t)n, 1);
    rng r = {(uint64_t)n + 3};
    int32_t *ids = random_ids(&r, &c, n);
    double want[MOST_DIM], length = 0;
    oracle_encode(want, &c, &f->weights, ids, n);
    for (int d = 0; d < c.hidden; d++) length += want[d] * want[d];
    for (int d = 0; d < c.hidden; d++) want[d] /= sqrt(length);
    FOR_TABLES check_oracle(f, want, ids, n);
    free(ids);
    qemb_file_close(f);
}

/* At the last length, max_positions, the last token has the last row of the position table, unless
 * there is a pad_id. */
Test(encoder, oracle) {
    const int lengths[] = {2, 3, 33, 64, 65, 300};
    for (int s = 0; s < n_bert_configs; s++) {
        for (int i = 0; i < 6; i++) check_length(QEMB_F16, bert_configs[s], lengths[i]);
        check_length(QEMB_I8, bert_configs[s], 33);
    }
}

/* ---- rows of a batch ------------------------------------------------------------------------- */

/* Positions, by the rule in qemb.h's words and by hand. */
Test(encoder, pad_takes_no_position) {
    static const int32_t ids[] = {0, 1, 1, 9, 7, 1, 2, 1, 7};
    static const int want[][9] = {{2, 1, 1, 3, 4, 1, 5, 1, 6}, /* pad_id 1, from row 2 on */
                                  {0, 1, 2, 3, 4, 5, 6, 7, 8}, /* no pad_id */
                                  {2, 1, 1, 3, 4, 1, 5, 1, 6},
                                  {1, 2, 3, 4, 0, 5, 6, 7, 0}}; /* pad_id 7, from row 1 on */
    for (int s = 0; s < 4; s++) {
        float out[MOST_DIM];
        ops = &qemb_cpu_ops;
        qemb_file *f = open_model(&bert_configs[s], 4, 1);
        qemb_model *m = open_spied(f, (qemb_options){.batch_tokens = 100});
        qemb_batch *b = qemb_batch_new(m);
        cr_assert_eq(qemb_pack_add(b, ids + 3, 4), 0); /* a text before it moves no position */
        cr_assert_eq(qemb_pack_add(b, ids, 9), 1);
        float both[2 * MOST_DIM];
        qemb_embed(m, b, both);
        cr_assert_arr_eq(seen.pos + 4, want[s], sizeof want[s], "config %d", s);
        cr_assert_arr_eq(seen.tokens + 4, ids, sizeof ids);
        embed_alone(m, ids, 9, out);
        cr_assert_arr_eq(seen.pos, want[s], sizeof want[s], "config %d", s);
        qemb_batch_free(b);
        qemb_close(m);
        qemb_file_close(f);
    }
}

/* Texts that begin alike, in order on one thread, in reverse order on three with an MLP in chunks:
 * the bits that each has alone. None shares a row with another; equal ones share all. */
static void check_batches(const qemb_config *c) {
    enum { N = 9 };
    const int lengths[N] = {130, 2, 3, 63, 64, 65, 128, 129, 200}, D = qemb_dim(c);
    qemb_file *f = open_model(c, 4, 1);
    const size_t bytes = (size_t)D * sizeof(float);
    float alone[N * MOST_DIM], out[N * MOST_DIM];
    int32_t *texts[N];
    int sum = 0;
    for (int i = 0; i < N; i++) {
        rng r = {9}; /* all texts have the same first tokens */
        texts[i] = random_ids(&r, c, lengths[i]);
        sum += lengths[i];
    }
    for (int threads = 1; threads <= 3; threads += 2) {
        const qemb_options opt = {
            .batch_tokens = 2000, .threads = threads, .mlp_rows = threads == 1 ? 0 : 50};
        qemb_model *m = open_spied(f, opt);
        qemb_batch *b = qemb_batch_new(m);
        for (int i = 0; i < N; i++) {
            const int k = threads == 1 ? i : N - 1 - i;
            cr_assert_eq(qemb_pack_add(b, texts[k], lengths[k]), i);
            cr_assert_eq(qemb_pack_add(b, texts[k], lengths[k]), i, "an equal text");
            if (threads == 1) embed_alone(m, texts[i], lengths[i], alone + i * D);
        }
        cr_assert_eq(qemb_batch_tokens_saved(b), 0);
        cr_assert_eq(qemb_batch_tokens_computed(b), (size_t)sum);
        qemb_embed(m, b, out);
        cr_assert(seen.bidirectional && seen.P == 0 && seen.B == N && seen.T == sum);
        for (int i = 0; i < N; i++)
            cr_assert_arr_eq(out + i * D, alone + (threads == 1 ? i : N - 1 - i) * D, bytes,
                             "%s D=%d, %d threads, text %d", ops->name, D, threads, i);
        qemb_batch_free(b);
        qemb_close(m);
    }
    for (int i = 0; i < N; i++) free(texts[i]);
    qemb_file_close(f);
}

Test(encoder, batches) {
    FOR_CPU_TABLES
    for (int s = 0; s < n_bert_configs; s++) check_batches(&bert_configs[s]);
    FOR_TABLES check_batches(&bert_configs[3]);
}

/* ---- memory ---------------------------------------------------------------------------------- */

Test(encoder, the_plan_is_what_is_asked_for) {
    ops = &qemb_cpu_ops;
    const qemb_config *c = &bert_configs[0];
    qemb_file *f = open_model(c, 4, 1);
    qemb_memory plan;
    const qemb_options bulk = {.batch_tokens = 5000, .max_tokens = 100, .threads = 1};
    qemb_plan(f, &qemb_cpu_ops, &bulk, &plan);
    qemb_model *m = open_spied(f, bulk);
    cr_assert_eq(arena_asked, plan.arena_batch);
    /* x, x_last, xn (5000, 64), qkv (5000, 192), att (5000, 64), h (1024, 96) */
    cr_assert_eq(plan.arena_batch, 4 * (5000 * (64 + 64 + 64 + 192 + 64) + 1024 * 96));
    /* tokens in halves, positions from first_position on in floats */
    cr_assert_eq(plan.table, 300 * 64 * 2 + (700 + c->first_position) * 64 * 4);
    cr_assert_eq(plan.weights, 2 * 2 * (192 * 64 + 64 * 64 + 2 * 96 * 64));
    qemb_close(m);
    /* The longest text: h has the MLP's rows, no more. */
    qemb_plan(f, &qemb_cpu_ops, &(qemb_options){.mlp_rows = 64}, &plan);
    cr_assert_eq(plan.arena_text, 4 * (700 * (64 + 64 + 192 + 64) + 64 + 64 * 96));
    m = open_spied(f, (qemb_options){.batch_tokens = 1, .mlp_rows = 64});
    cr_assert_eq(arena_asked, plan.arena_text);
    cr_assert_eq(qemb_options_of(m)->max_tokens, 700);
    qemb_close(m);
    qemb_file_close(f);
    f = open_model_of(QEMB_I8, c, 4, 1); /* one scale per 64 columns: a row of wdown (96) has two */
    qemb_plan(f, &qemb_cpu_ops, NULL, &plan);
    cr_assert_eq(plan.weights,
                 2 * (192 * 64 + 64 * 64 + 2 * 96 * 64 + 4 * (192 + 64 + 96 + 2 * 64)));
    qemb_file_close(f);
}

/* ---- vectors that are not finite ------------------------------------------------------------- */

static int spoiled_row; /* the row of out that gets a NaN, as from an overflow */

static int spoiling_pool(qemb_backend *be, float *out, float *x, const float *w, int B) {
    ops->pool(be, out, x, w, B);
    if (spoiled_row < B) out[spoiled_row * 64 + 9] = NAN;
    return 0;
}
static int pad_to_16(int T) { return (T + 15) / 16 * 16; }

/* As on a GPU: a batch that is padded by one more text, and a row that the fallback computes. */
Test(encoder, overflow_is_computed_again) {
    static const int32_t ids[3][4] = {{0, 17, 4, 2}, {0, 16, 1, 2}, {0, 17, 1, 2}};
    ops = &qemb_cpu_ops;
    qemb_file *f = open_model(&bert_configs[0], 4, 1);
    qemb_ops spy = *ops;
    spy.begin = spy_begin, spy.pool = spoiling_pool, spy.fallback = qemb_cpu_mapped;
    spy.pad_rows = pad_to_16;
    qemb_model *m, *cpu;
    qemb_err err;
    const qemb_options opt = {.batch_tokens = 100, .threads = 2};
    cr_assert_eq(qemb_open(&m, f, &spy, &opt, &err), 0, "%s", err.msg);
    cr_assert_eq(qemb_open(&cpu, f, qemb_cpu_mapped(), &opt, &err), 0, "%s", err.msg);
    float out[3 * 64], alone[64];
    qemb_batch *b = qemb_batch_new(m);
    for (int i = 0; i < 3; i++) cr_assert_eq(qemb_pack_add(b, ids[i], 4), i);
    for (spoiled_row = 0; spoiled_row < 3; spoiled_row++) {
        qemb_embed(m, b, out);
        cr_assert(seen.B == 4 && seen.T == 16 && seen.cu[3] == 12 && seen.cu[4] == 16);
        for (int t = 12; t < 16; t++) cr_assert(seen.pos[t] == 0 && seen.tokens[t] == 0);
        embed_alone(cpu, ids[spoiled_row], 4, alone);
        cr_assert_arr_eq(out + spoiled_row * 64, alone, sizeof alone, "not the CPU's vector");
        for (int i = 0; i < 3; i++) cr_assert_eq(qemb_l2_normalize(alone, out + i * 64, 64), 0);
        cr_assert_eq(qemb_health_of(m).recomputed, (uint64_t)spoiled_row + 1);
    }
    qemb_batch_free(b);
    qemb_close(m), qemb_close(cpu);
    qemb_file_close(f);
}
