/* test_long_text.c - a text that is computed in steps: the bits that it has in one piece, batches
 * between the steps, and a text that is given up. */
#include "spied_tables.h"

#include <stdlib.h>
#include <string.h>

enum { BATCH = 64, LONGEST = 2000, MOST_DIM = 96 };

/* What between_steps does: counts, embeds a batch, or gives the text up. */
typedef struct {
    qemb_model *model;
    const qemb_batch *batch; /* embedded in every call; NULL: none */
    float *out;              /* of the batch */
    int calls, give_up;      /* at this call; 0: never */
} visitor;

static int visit(void *arg) {
    visitor *v = arg;
    v->calls++;
    if (v->batch) qemb_embed_between(v->model, v->batch, v->out);
    return v->calls == v->give_up;
}

static qemb_model *open_model_with(const qemb_file *f, visitor *v, int threads) {
    const qemb_options opt = {.batch_tokens = BATCH,
                              .threads = threads,
                              .between_steps = v ? visit : NULL,
                              .between_arg = v};
    qemb_model *m;
    qemb_err err;
    cr_assert_eq(qemb_open(&m, f, ops, &opt, &err), 0, "%s", err.msg);
    if (v) v->model = m;
    return m;
}

static const struct {
    qemb_architecture architecture;
    qemb_attention attention;
    qemb_pooling pooling;
} modes[] = {{QEMB_QWEN3, QEMB_CAUSAL, QEMB_POOL_LAST},
             {QEMB_QWEN3, QEMB_CAUSAL, QEMB_POOL_MEAN},
             {QEMB_QWEN3, QEMB_BIDIRECTIONAL, QEMB_POOL_LAST},
             {QEMB_QWEN3, QEMB_BIDIRECTIONAL, QEMB_POOL_MEAN},
             {QEMB_BERT, QEMB_BIDIRECTIONAL, QEMB_POOL_FIRST},
             {QEMB_BERT, QEMB_BIDIRECTIONAL, QEMB_POOL_MEAN}};
enum { MODES = sizeof modes / sizeof *modes, QWEN3 = 0, BERT = 4 };

static qemb_config long_config(int shape, int mode) {
    qemb_config c =
        modes[mode].architecture == QEMB_BERT ? bert_configs[shape] : small_configs[shape];
    c.max_positions = LONGEST, c.n_layers = 2;
    c.attention = modes[mode].attention, c.pooling = modes[mode].pooling;
    return c;
}

static qemb_file *open_long(int shape, int mode) {
    const qemb_config c = long_config(shape, mode);
    return open_model(&c, 4, 1);
}

static int32_t *random_ids(uint64_t seed, int n) {
    rng r = {seed};
    int32_t *ids = malloc((size_t)n * sizeof *ids);
    for (int i = 0; i < n; i++) ids[i] = (int32_t)(rng_u64(&r) % 300);
    return ids;
}

/* A batch of texts that share a prefix, unless attention is bidirectional. The ids are *ids. */
static qemb_batch *short_texts(const qemb_model *m, int32_t **ids) {
    enum { TEXTS = 4, LENGTH = 15 };
    qemb_batch *b = qemb_batch_new(m);
    *ids = random_ids(99, LENGTH + TEXTS);
    for (int i = 0; i < TEXTS; i++) /* the prefix is the first text but for its last id */
        cr_assert_eq(qemb_pack_add(b, *ids, LENGTH - i), i);
    return b;
}

/* Texts of these lengths (n), the last one the longest, are computed in one piece, in steps, and in
 * steps with a batch between any two, of which the bits count as well. */
static void check_bits(int shape, int mode, const int *lengths, int n_lengths) {
    const int longest = lengths[n_lengths - 1];
    qemb_file *f = open_long(shape, mode);
    const size_t bytes = (size_t)qemb_dim(&f->config) * sizeof(float);
    visitor v = {0}, busy = {0};
    qemb_model *whole = open_model_with(f, NULL, 2), *in_steps = open_model_with(f, &v, 3);
    qemb_model *beside = open_model_with(f, &busy, 1);
    float want[MOST_DIM], got[MOST_DIM], short_want[4 * MOST_DIM], short_got[4 * MOST_DIM];
    int32_t *ids = random_ids(5, longest), *short_ids;
    qemb_batch *b = short_texts(whole, &short_ids);
    qemb_embed(whole, b, short_want);
    busy.batch = b, busy.out = short_got;
    for (int i = 0; i < n_lengths; i++) {
        const int n = lengths[i], parts = (n + 511) / 512;
        embed_alone(whole, ids, n, want);
        v.calls = busy.calls = 0;
        memset(short_got, 0, sizeof short_got);
        embed_alone(in_steps, ids, n, got);
        cr_assert_arr_eq(got, want, bytes, "%s shape %d mode %d: %d", ops->name, shape, mode, n);
        /* of the first layer at least: before attention, attention, behind it, MLP */
        cr_assert(n > BATCH ? v.calls >= 4 * parts : !v.calls, "%d calls for %d", v.calls, n);
        embed_alone(beside, ids, n, got);
        cr_assert_arr_eq(got, want, bytes, "%s shape %d mode %d: %d", ops->name, shape, mode, n);
        if (n <= BATCH) continue;
        cr_assert_arr_eq(short_got, short_want, 4 * bytes, "%s between", ops->name);
    }
    free(ids), free(short_ids);
    qemb_batch_free(b);
    qemb_close(whole), qemb_close(in_steps), qemb_close(beside);
    qemb_file_close(f);
}
#define BITS(shape, mode, ...)                                                                     \
    check_bits(shape, mode, (const int[]){__VA_ARGS__},                                            \
               (int)(sizeof(const int[]){__VA_ARGS__} / sizeof(int)))

/* Lengths around the sizes of steps and of attention's tiles. */
Test(long_text, has_the_bits_of_one_piece) {
    FOR_CPU_TABLES {
        for (int mode = 0; mode < MODES; mode++)
            BITS(mode % n_small_configs, mode, 1, BATCH, BATCH + 1, 513);
        BITS(0, 0, 512, LONGEST);
    }
    FOR_TABLES {
        BITS(1, QWEN3, 513);
        BITS(1, BERT, 513);
    }
}

/* The rows that attention is asked for have the bits of the whole, wherever texts and the prefix
 * begin, and no other row is written. */
static void check_rows_of_attention(int bidirectional) {
    enum { B = 3, TEXT = 150, PART = 37 };
    const int P = bidirectional ? 0 : 70, T = P + B * TEXT;
    qemb_config c = small_configs[1];
    c.max_positions = LONGEST;
    const qemb_options opt = {.batch_tokens = BATCH, .max_tokens = LONGEST, .threads = 2};
    const size_t Q = (size_t)(c.n_heads * c.head_dim);
    const size_t ld = Q + (size_t)(2 * c.n_kv_heads * c.head_dim);
    int32_t cu[B + 1], *pos = malloc((size_t)T * sizeof *pos);
    for (int i = 0; i <= B; i++) cu[i] = P + i * TEXT;
    for (int t = 0; t < T; t++) pos[t] = t < P ? t : P + (t - P) % TEXT;
    qemb_packed_batch b = {
        .B = B, .T = T, .P = P, .pos = pos, .cu = cu, .bidirectional = bidirectional};
    rng r = {3};
    float *qkv = malloc((size_t)T * ld * sizeof *qkv);
    float *want = malloc((size_t)T * Q * sizeof *want), *got = malloc((size_t)T * Q * sizeof *got);
    rng_floats(&r, qkv, (size_t)T * ld, 1);
    qemb_backend *be;
    qemb_err err;
    cr_assert_eq(ops->open(&be, &c, &opt, &err), 0, "%s", err.msg);
    ops->begin(be, &b);
    ops->attention(be, (qemb_act *)want, (qemb_act *)qkv, &b, QEMB_ALL_ROWS);
    for (int t = 0; t < T; t += PART) {
        const int n = T - t < PART ? T - t : PART;
        for (size_t i = 0; i < (size_t)T * Q; i++) got[i] = -7; /* no weighted mean of -1 .. 1 */
        b.first = t, b.rows = n;
        ops->attention(be, (qemb_act *)got, (qemb_act *)qkv, &b, QEMB_ALL_ROWS);
        cr_assert_arr_eq(got + (size_t)t * Q, want + (size_t)t * Q, (size_t)n * Q * sizeof *got,
                         "%s rows from %d", ops->name, t);
        for (int row = 0; row < T; row++)
            cr_assert(got[(size_t)row * Q] == -7 || (row >= t && row < t + n), "%s row %d",
                      ops->name, row);
    }
    ops->close(be);
    free(pos), free(qkv), free(want), free(got);
}

Test(long_text, attention_of_some_rows) {
    FOR_TABLES {
        check_rows_of_attention(0);
        check_rows_of_attention(1);
    }
}

/* A text that is given up has NaN and leaves nothing behind. */
static void check_giving_up(int mode) {
    ops = qemb_cpu_table(0);
    qemb_file *f = open_long(0, mode);
    const int D = qemb_dim(&f->config), n = 520;
    visitor v = {0};
    qemb_model *m = open_model_with(f, &v, 1);
    int32_t *ids = random_ids(5, n);
    float want[MOST_DIM], got[MOST_DIM];
    embed_alone(m, ids, n, want);
    const int calls = v.calls;
    for (v.give_up = 1; v.give_up <= calls; v.give_up++) {
        v.calls = 0;
        embed_alone(m, ids, n, got);
        cr_assert_eq(v.calls, v.give_up, "no step follows");
        for (int d = 0; d < D; d++) cr_assert(isnan(got[d]));
        v.calls = calls; /* beyond give_up */
        embed_alone(m, ids, n, got);
        cr_assert_arr_eq(got, want, (size_t)D * sizeof *got);
    }
    qemb_close(m);
    free(ids);
    qemb_file_close(f);
}

Test(long_text, is_given_up_at_any_step) {
    check_giving_up(QWEN3);
    check_giving_up(BERT);
}

/* With a dense layer both batches write the rows before it. */
Test(long_text, dense_layer_between) {
    FOR_CPU_TABLES {
        qemb_config c = small_configs[0];
        c.max_positions = LONGEST, c.dense_rows = 40;
        qemb_file *f = open_model(&c, 4, 1);
        visitor v = {0};
        qemb_model *whole = open_model_with(f, NULL, 1), *m = open_model_with(f, &v, 1);
        int32_t *ids = random_ids(5, 130), *short_ids;
        qemb_batch *b = short_texts(whole, &short_ids);
        float want[40], got[40], short_want[160], short_got[160] = {0};
        embed_alone(whole, ids, 130, want);
        qemb_embed(whole, b, short_want);
        v.batch = b, v.out = short_got;
        embed_alone(m, ids, 130, got);
        cr_assert_arr_eq(got, want, sizeof want, "%s", ops->name);
        cr_assert_arr_eq(short_got, short_want, sizeof short_want, "%s", ops->name);
        qemb_batch_free(b);
        free(ids), free(short_ids);
        qemb_close(whole), qemb_close(m);
        qemb_file_close(f);
    }
}

/* The second batch's memory is planned where it can be used: where a text may be long. */
Test(long_text, memory_between_is_planned) {
    qemb_file *f = open_long(0, QWEN3);
    qemb_memory plan;
    visitor v;
    qemb_options opt = {.batch_tokens = BATCH, .threads = 1};
    qemb_plan(f, &qemb_cpu_ops, &opt, &plan);
    cr_assert_eq(plan.arena_between, 0);
    opt.between_steps = visit, opt.between_arg = &v;
    qemb_plan(f, &qemb_cpu_ops, &opt, &plan);
    cr_assert_eq(plan.arena_between, plan.arena_batch);
    opt.max_tokens = BATCH;
    qemb_plan(f, &qemb_cpu_ops, &opt, &plan);
    cr_assert_eq(plan.arena_between, 0);
    qemb_file_close(f);
}
