/* test_batch.c - what qemb.c does around the forward: which texts share a batch, what of them is
 * computed once, and the dense layer behind the pooling. */
#include "spied_tables.h"

#include <stdlib.h>
#include <string.h>

/* ---- the dense layer ------------------------------------------------------------------------- */

static const int32_t some_ids[3][4] = {{3, 17, 4, 299}, {3, 16, 4, 299}, {3, 17, 299, 299}};

static qemb_config with_dense(int rows, qemb_activation activation) {
    qemb_config c = small_configs[0];
    c.dense_rows = rows, c.activation = activation;
    return c;
}

/* The sum in double of D products and the bias errs by (D + 1) 2^-53 of the sum of
 * their magnitudes, the one here by as much. tanh has a slope of at most 1, and libm's error is a
 * few ulp. The result is rounded to float. */
static void check_dense(const qemb_config *c, const qemb_file *f, const float *row,
                        const float *got) {
    const int D = c->hidden;
    for (int r = 0; r < c->dense_rows; r++) {
        double y = (double)f->weights.dense_bias[r], magnitude = fabs(y);
        for (int k = D - 1; k >= 0; k--) {
            const double p = (double)f->weights.dense[r * D + k] * (double)row[k];
            y += p, magnitude += fabs(p);
        }
        if (c->activation == QEMB_TANH) y = tanh(y);
        const double tol = 2 * (D + 1) * 0x1p-53 * magnitude + 0x1p-50 + U * fabs(y);
        cr_assert_not(far_off((double)got[r], y, tol), "%d of %d: %g, want %g", r, c->dense_rows,
                      (double)got[r], y);
    }
}

/* The layer's input is the vector of a model of the same weights without it. make_model draws its
 * numbers last. */
static void check_dense_layer(int rows, qemb_activation activation) {
    const qemb_config c = with_dense(rows, activation);
    qemb_file *f = open_model(&c, 4, 1), *without = open_model(&small_configs[0], 4, 1);
    qemb_model *m = open_with(f, ops, (qemb_options){.batch_tokens = 50, .threads = 2});
    qemb_model *bare = open_with(without, ops, (qemb_options){.batch_tokens = 50, .threads = 2});
    float *out = malloc(3 * (size_t)rows * sizeof *out);
    float *alone = malloc((size_t)rows * sizeof *alone), row[64];
    qemb_batch *b = qemb_batch_new(m);
    for (int i = 0; i < 3; i++) cr_assert_eq(qemb_pack_add(b, some_ids[i], 4), i);
    qemb_embed(m, b, out);
    for (int i = 0; i < 3; i++) {
        embed_alone(bare, some_ids[i], 4, row);
        check_dense(&c, f, row, out + (size_t)i * (size_t)rows);
        embed_alone(m, some_ids[i], 4, alone);
        cr_assert_arr_eq(out + (size_t)i * (size_t)rows, alone, (size_t)rows * sizeof *alone,
                         "text %d", i);
    }
    free(out), free(alone);
    qemb_batch_free(b);
    qemb_close(m), qemb_close(bare);
    qemb_file_close(f), qemb_file_close(without);
}

Test(batch, dense_layer) {
    FOR_CPU_TABLES {
        check_dense_layer(1, QEMB_IDENTITY);
        check_dense_layer(7, QEMB_TANH);
        check_dense_layer(64, QEMB_IDENTITY);
        check_dense_layer(150, QEMB_TANH); /* more than hidden */
    }
}

/* A hidden size that no part of the sum divides. */
Test(batch, dense_layer_of_an_odd_width) {
    qemb_config c = small_configs[3], bare = c;
    c.dense_rows = 2;
    qemb_file *f = open_model(&c, 9, 1), *without = open_model(&bare, 9, 1);
    qemb_model *m = open_with(f, ops, (qemb_options){0});
    qemb_model *n = open_with(without, ops, (qemb_options){0});
    float row[33], out[2];
    embed_alone(n, some_ids[0], 4, row);
    embed_alone(m, some_ids[0], 4, out);
    check_dense(&c, f, row, out);
    qemb_close(m), qemb_close(n);
    qemb_file_close(f), qemb_file_close(without);
}

/* Behind the first rows of an encoder. */
Test(batch, dense_layer_of_an_encoder) {
    FOR_CPU_TABLES {
        const qemb_config *c = &bert_configs[4];
        qemb_config bare = *c;
        bare.dense_rows = 0;
        qemb_file *f = open_model(c, 9, 1), *without = open_model(&bare, 9, 1);
        qemb_model *m = open_with(f, ops, (qemb_options){0});
        qemb_model *n = open_with(without, ops, (qemb_options){0});
        float row[128], out[5];
        cr_assert(c->dense_rows == 5 && c->hidden == 128);
        embed_alone(n, some_ids[0], 4, row);
        embed_alone(m, some_ids[0], 4, out);
        check_dense(c, f, row, out);
        qemb_close(m), qemb_close(n);
        qemb_file_close(f), qemb_file_close(without);
    }
}

static int spoiled; /* the row that gets an infinity, as from an overflow */
static const char *failure;

static int spoiling_pool(qemb_backend *be, float *out, float *x, const float *w, int B) {
    ops->pool(be, out, x, w, B);
    if (spoiled < B) out[spoiled * small_configs[0].hidden + 9] = INFINITY;
    return 0;
}

static void health(const qemb_backend *be, qemb_health *h) {
    (void)be;
    h->failure = failure;
}

/* A row that overflowed is computed again before the dense layer reads it. tanh would hide an
 * infinity. A failed device's is not. */
static void check_fallback(void) {
    const qemb_config c = with_dense(5, QEMB_TANH);
    qemb_file *f = open_model(&c, 4, 1);
    qemb_ops table = *ops;
    table.pool = spoiling_pool, table.health = health, table.fallback = qemb_cpu_mapped;
    const qemb_options opt = {.batch_tokens = 100, .threads = 2};
    qemb_model *m = open_with(f, &table, opt), *cpu = open_with(f, qemb_cpu_mapped(), opt);
    qemb_model *same = open_with(f, ops, opt);
    float out[3 * 5], want[5];
    qemb_batch *b = qemb_batch_new(m);
    for (int i = 0; i < 3; i++) qemb_pack_add(b, some_ids[i], 4);
    for (spoiled = 0; spoiled < 3; spoiled++) {
        qemb_embed(m, b, out);
        for (int i = 0; i < 3; i++) {
            embed_alone(i == spoiled ? cpu : same, some_ids[i], 4, want);
            cr_assert_arr_eq(out + i * 5, want, sizeof want, "text %d of %d", i, spoiled);
        }
        cr_assert_eq(qemb_health_of(m).recomputed, (uint64_t)spoiled + 1);
    }
    failure = "the device is gone", spoiled = 1;
    qemb_embed(m, b, out);
    cr_assert_eq(qemb_health_of(m).recomputed, 3);
    failure = NULL;
    qemb_batch_free(b);
    qemb_close(m), qemb_close(cpu), qemb_close(same);
    qemb_file_close(f);
}

Test(batch, dense_layer_of_what_overflowed) { FOR_CPU_TABLES check_fallback(); }

/* Without a fallback, a reranker's logit is not finite, which the front ends report. */
Test(batch, dense_layer_of_a_row_that_is_not_finite) {
    const qemb_config c = with_dense(1, QEMB_IDENTITY);
    qemb_file *f = open_model(&c, 4, 1);
    qemb_ops table = *ops;
    table.pool = spoiling_pool;
    qemb_model *m = open_with(f, &table, (qemb_options){0});
    float logit;
    spoiled = 0;
    embed_alone(m, some_ids[0], 4, &logit);
    cr_assert_not(isfinite(logit));
    qemb_close(m);
    qemb_file_close(f);
}

/* ---- the dense layer of batches in flight ---------------------------------------------------- */

static struct {
    float *rows[2], *out[2]; /* of batches between pool and collect */
    size_t bytes[2];
    int n, early; /* early: out is written before collect */
} later;

static int later_pool(qemb_backend *be, float *out, float *x, const float *w, int B) {
    const size_t bytes = (size_t)B * (size_t)small_configs[0].hidden * sizeof(float);
    float *rows = malloc(bytes);
    ops->pool(be, rows, x, w, B);
    if (later.early) memcpy(out, rows, bytes);
    cr_assert_lt(later.n, 2);
    later.rows[later.n] = rows, later.out[later.n] = out, later.bytes[later.n++] = bytes;
    return 0;
}

static void later_collect(qemb_backend *be) {
    (void)be;
    if (!later.early) memcpy(later.out[0], later.rows[0], later.bytes[0]);
    free(later.rows[0]);
    later.rows[0] = later.rows[1], later.out[0] = later.out[1], later.bytes[0] = later.bytes[1];
    later.n--;
}

/* Each of the two has rows of its own until it is collected; the third takes the first one's. An
 * empty batch takes its turn. */
Test(batch, dense_layer_of_batches_in_flight) {
    const qemb_config c = with_dense(3, QEMB_TANH);
    qemb_file *f = open_model(&c, 4, 1);
    qemb_ops table = *ops;
    table.pool = later_pool, table.collect = later_collect, table.in_flight = 2;
    const qemb_options opt = {.batch_tokens = 100, .threads = 2};
    qemb_model *m = open_with(f, &table, opt), *plain = open_with(f, ops, opt);
    qemb_batch *b[3], *none = qemb_batch_new(m);
    float out[3][3] = {{0}}, want[3][3];
    for (int i = 0; i < 3; i++) {
        b[i] = qemb_batch_new(m);
        qemb_pack_add(b[i], some_ids[i], 4);
        embed_alone(plain, some_ids[i], 4, want[i]);
    }
    for (int round = 0; round < 3; round++) {
        memset(out, 0, sizeof out);
        later.early = round % 2;
        qemb_submit(m, b[0], out[0]);
        qemb_submit(m, b[1], out[1]);
        qemb_collect(m);
        cr_assert(out[0][0] != 0 && out[1][0] == 0);
        qemb_submit(m, b[2], out[2]);
        qemb_collect(m);
        qemb_submit(m, none, NULL);
        qemb_collect(m);
        qemb_collect(m);
        cr_assert_arr_eq(out, want, sizeof want, "round %d", round);
    }
    for (int i = 0; i < 3; i++) qemb_batch_free(b[i]);
    qemb_batch_free(none);
    qemb_close(m), qemb_close(plain);
    qemb_file_close(f);
}

/* ---- the packer ------------------------------------------------------------------------------ */

/* What a further batch costs, beside its prefix: a sixteenth of a table's rows, or of fewer. */
enum { START = QEMB_BATCH_TOKENS / 16 };
enum { HEAD = 30, QUERY = 46, DOCUMENT = 10, PAIR = HEAD + QUERY + DOCUMENT };

/* ids (PAIR) of document d for query q: a head that all have, the query, the document */
static void pair(int32_t *ids, int q, int d) {
    for (int i = 0; i < PAIR; i++) ids[i] = i < HEAD ? 7 : i < HEAD + QUERY ? 20 + q : 100 + d;
    ids[PAIR - 1] = 50; /* they end alike */
}

/* n documents of query 0 have HEAD + QUERY + n DOCUMENT rows. A document of query 1 would give each
 * of them the query again, but the first; a further batch costs the head and START. */
Test(batch, another_query_begins_a_batch_when_the_first_would_lose_more) {
    qemb_file *f = open_model(&small_configs[0], 4, 1);
    qemb_model *m = open_spied(f, (qemb_options){.batch_tokens = 8192});
    int joined = 0;
    for (int n = 1; n < 40; n++) {
        static int32_t ids[41][PAIR];
        qemb_batch *b = qemb_batch_new(m);
        for (int d = 0; d < n; d++) {
            pair(ids[d], 0, d);
            cr_assert_eq(qemb_pack_add(b, ids[d], PAIR), d, "documents of one query are together");
        }
        const size_t rows = HEAD + QUERY + (size_t)n * DOCUMENT;
        cr_assert_eq(qemb_batch_tokens_computed(b), rows);
        pair(ids[n], 1, 0);
        const int joins = (n - 1) * QUERY <= HEAD + START;
        cr_assert_eq(qemb_pack_add(b, ids[n], PAIR), joins ? n : -1, "%d documents", n);
        cr_assert_eq(qemb_batch_tokens_computed(b),
                     joins ? HEAD + (size_t)(n + 1) * (QUERY + DOCUMENT) : rows);
        cr_assert_eq(qemb_batch_rows(b), joins ? n + 1 : n, "a refused text leaves no trace");
        cr_assert_eq(qemb_pack_add(b, ids[n - 1], PAIR), n - 1, "an equal text is found");
        joined += joins;
        qemb_batch_free(b);
    }
    cr_assert(joined > 1 && joined < 5);
    qemb_close(m);
    qemb_file_close(f);
}

/* A document of query 0, then many of query 1: each of these has the query again, until that has
 * cost more than a further batch. Then they have a batch of their own. After a clear, nothing is
 * remembered. */
Test(batch, documents_leave_a_batch_in_which_they_share_less) {
    qemb_file *f = open_model(&small_configs[0], 4, 1);
    qemb_model *m = open_spied(f, (qemb_options){.batch_tokens = 8192});
    qemb_batch *b = qemb_batch_new(m);
    for (int round = 0; round < 2; round++) {
        static int32_t ids[60][PAIR];
        pair(ids[0], 0, 0);
        cr_assert_eq(qemb_pack_add(b, ids[0], PAIR), 0);
        int n = 1, row = 0;
        for (; n < 60 && row >= 0; n += row >= 0) {
            pair(ids[n], 1, n);
            row = qemb_pack_add(b, ids[n], PAIR);
            cr_assert_eq(row, (n - 1) * QUERY <= HEAD + START ? n : -1, "%d", n);
        }
        cr_assert_lt(n, 60);
        qemb_batch_clear(b);
        for (int d = n; d < 60; d++) {
            pair(ids[d], 1, d);
            cr_assert_eq(qemb_pack_add(b, ids[d], PAIR), d - n);
        }
        qemb_batch_clear(b);
    }
    qemb_batch_free(b);
    qemb_close(m);
    qemb_file_close(f);
}

/* Neighbours that share ids which the others do not have. A run of them closes the batch when its
 * ids have been computed again for more than START rows, if they are 16 or more a text. Runs are
 * not added up: another batch could save one of them at most. */
Test(batch, neighbours_that_share) {
    qemb_file *f = open_model(&small_configs[0], 4, 1);
    qemb_model *m = open_spied(f, (qemb_options){.batch_tokens = 8192});
    for (int shared = 14; shared <= 18; shared++)
        for (int group = 2; group <= 7; group++) {
            static int32_t ids[100][20];
            qemb_batch *b = qemb_batch_new(m);
            const int others = group; /* the first ones share nothing */
            int n = 0, row = 0, closes = 0;
            for (int run = 1; run < group; run++) closes |= shared >= 16 && run * shared > START;
            for (; n < 100 && row >= 0; n += row >= 0) {
                for (int i = 0; i < 20; i++)
                    ids[n][i] = i < shared && n >= others ? n / group : 150 + (n + i) % 40;
                if (n < others) ids[n][0] = 100 + n;
                row = qemb_pack_add(b, ids[n], 20);
            }
            cr_assert_eq(n, closes ? others + 1 + START / shared : 100, "%d in groups of %d: %d",
                         shared, group, n);
            qemb_batch_free(b);
        }
    qemb_close(m);
    qemb_file_close(f);
}

/* With a small budget, a further batch costs a sixteenth of it: 6 of 100 rows. */
Test(batch, a_small_budget) {
    qemb_file *f = open_model(&small_configs[0], 4, 1);
    qemb_model *m = open_spied(f, (qemb_options){.batch_tokens = 100});
    for (int n = 2; n < 8; n++)
        for (int shared = 0; shared < 8; shared++) {
            int32_t ids[9][10];
            qemb_batch *b = qemb_batch_new(m);
            for (int d = 0; d <= n; d++)
                for (int i = 0; i < 10; i++) ids[d][i] = d == n && i >= shared ? 90 : i < 8 ? 7 : d;
            for (int d = 0; d < n; d++) cr_assert_eq(qemb_pack_add(b, ids[d], 10), d);
            cr_assert_eq(qemb_pack_add(b, ids[n], 10),
                         (n - 1) * (8 - shared) <= shared + 6 ? n : -1, "%d %d", n, shared);
            qemb_batch_free(b);
        }
    qemb_close(m);
    qemb_file_close(f);
}

/* Two texts never undo a sharing, since there is none before. */
Test(batch, a_second_text_joins_whatever_it_shares) {
    qemb_file *f = open_model(&small_configs[0], 4, 1);
    qemb_model *m = open_spied(f, (qemb_options){.batch_tokens = 4096});
    int32_t a[600], z[600];
    for (int i = 0; i < 600; i++) a[i] = 1, z[i] = 2;
    qemb_batch *b = qemb_batch_new(m);
    cr_assert_eq(qemb_pack_add(b, a, 600), 0);
    cr_assert_eq(qemb_pack_add(b, z, 600), 1);
    cr_assert_eq(qemb_batch_tokens_computed(b), 1200);
    qemb_batch_free(b);
    qemb_close(m);
    qemb_file_close(f);
}

enum { TEXTS = 60, LONGEST = 120 };

typedef struct {
    int32_t ids[LONGEST];
    int n;
} text;

/* Texts that begin with a part of one of three others, some of them equal. */
static void random_texts(rng *r, text *texts) {
    for (int i = 0; i < TEXTS; i++) {
        text *t = &texts[i];
        t->n = 1 + (int)(rng_u64(r) % LONGEST);
        const int32_t query = (int32_t)(rng_u64(r) % 3);
        const int shared = (int)(rng_u64(r) % (LONGEST + 1));
        for (int k = 0; k < t->n; k++)
            t->ids[k] = k < shared ? query + k / 40 : (int32_t)(rng_u64(r) % 4);
        if (i && rng_u64(r) % 5 == 0) *t = texts[rng_u64(r) % (uint64_t)i];
    }
}

/* The longest prefix that the distinct texts of a batch share, without the last token of any. */
static int common_prefix(const text *const *in, int n) {
    int p = in[0]->n - 1;
    for (int i = 1; i < n; i++) {
        int k = 0;
        while (k < p && k < in[i]->n - 1 && in[i]->ids[k] == in[0]->ids[k]) k++;
        p = k;
    }
    return n > 1 ? p : 0;
}

/* Computes a batch with the distinct texts in[0..n-1] and checks its layout and its vectors. */
static void check_batch(qemb_model *m, const qemb_batch *b, const text *const *in, int n, int D,
                        int shares) {
    static float out[TEXTS * 64], alone[64];
    size_t want = 0;
    const int P = shares ? common_prefix(in, n) : 0;
    for (int i = 0; i < n; i++) want += (size_t)(in[i]->n - P);
    want += (size_t)P;
    cr_assert_eq(qemb_batch_rows(b), n);
    cr_assert_eq(qemb_batch_tokens_computed(b), want);
    cr_assert_eq(qemb_batch_tokens_saved(b), (size_t)P * (size_t)(n - 1));
    qemb_embed(m, b, out);
    cr_assert(seen.P == P && seen.B == n && seen.T == (int)want && seen.bidirectional == !shares);
    for (int t = 0; t < P; t++) cr_assert(seen.tokens[t] == in[0]->ids[t] && seen.pos[t] == t);
    for (int i = 0; i < n; i++) {
        cr_assert_eq(seen.cu[i + 1] - seen.cu[i], in[i]->n - P);
        for (int t = seen.cu[i], p = P; t < seen.cu[i + 1]; t++, p++)
            cr_assert(seen.tokens[t] == in[i]->ids[p] && seen.pos[t] == p);
    }
    for (int i = 0; i < n; i++) {
        embed_alone(m, in[i]->ids, in[i]->n, alone);
        cr_assert_arr_eq(out + i * D, alone, (size_t)D * sizeof *alone, "text %d of %d", i, n);
    }
}

/* Fills batches as the programs do: a text that is refused begins the next one. Every text has the
 * row of its own ids, and no batch is larger than it may be. */
static void pack_all(qemb_model *m, const text *texts, int budget, int D, int shares) {
    qemb_batch *b = qemb_batch_new(m);
    const text *in[TEXTS];
    int n = 0;
    for (int i = 0; i < TEXTS; i++) {
        int row = qemb_pack_add(b, texts[i].ids, texts[i].n);
        if (row < 0) {
            cr_assert_gt(n, 0, "an empty batch takes every text");
            check_batch(m, b, in, n, D, shares);
            qemb_batch_clear(b);
            n = 0;
            row = qemb_pack_add(b, texts[i].ids, texts[i].n);
        }
        cr_assert(row >= 0 && row <= n);
        if (row == n) in[n++] = &texts[i];
        cr_assert(in[row]->n == texts[i].n &&
                  !memcmp(in[row]->ids, texts[i].ids, (size_t)texts[i].n * sizeof(int32_t)));
        for (int k = 0; k < n; k++)
            cr_assert(k == row || in[k]->n != texts[i].n ||
                          memcmp(in[k]->ids, texts[i].ids, (size_t)texts[i].n * sizeof(int32_t)),
                      "a text is computed twice");
        cr_assert(n == 1 || qemb_batch_tokens_computed(b) <= (size_t)budget);
    }
    check_batch(m, b, in, n, D, shares);
    qemb_batch_free(b);
}

static void check_packing(qemb_attention attention, int rounds) {
    qemb_config c = small_configs[3];
    c.n_layers = 1, c.attention = attention;
    qemb_file *f = open_model(&c, 4, 1);
    rng r = {11};
    static text texts[TEXTS];
    for (int round = 0; round < rounds; round++) {
        static const int budgets[] = {1, 50, 200, 1000, 4096};
        const int budget = budgets[round % 5];
        qemb_model *m = open_spied(f, (qemb_options){.batch_tokens = budget, .threads = 2});
        random_texts(&r, texts);
        pack_all(m, texts, budget, c.hidden, attention == QEMB_CAUSAL);
        qemb_close(m);
    }
    qemb_file_close(f);
}

Test(batch, nothing_is_lost_or_computed_twice) { check_packing(QEMB_CAUSAL, 40); }
/* A token sees the rest of its text, so no row of a prefix serves two texts. */
Test(batch, bidirectional_texts_share_nothing) { check_packing(QEMB_BIDIRECTIONAL, 10); }

/* ---- the longest text ------------------------------------------------------------------------ */

Test(batch, the_window_is_the_default_limit) {
    static const int given[] = {0, 1, 119, 120, 121, 300, 301, 100000};
    static const int want[] = {120, 1, 119, 120, 121, 300, 300, 300};
    qemb_config c = small_configs[3];
    c.window = 120;
    qemb_file *f = open_model(&c, 4, 1);
    for (int i = 0; i < 8; i++) {
        qemb_model *m = open_with(f, ops, (qemb_options){.max_tokens = given[i]});
        cr_assert_eq(qemb_options_of(m)->max_tokens, want[i], "%d", given[i]);
        qemb_close(m);
    }
    qemb_file_close(f);
}
