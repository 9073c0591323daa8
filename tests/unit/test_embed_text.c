/* test_embed_text.c - qemb_embed_text against tokenizing, batching and embedding by hand. */
#include "support.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char path[] = "tests/golden/hf-tiny.qemb"; /* has a prompt named query */

static qemb_embedder *open_embedder(const qemb_options *opt) {
    qemb_embedder *e;
    qemb_err err;
    cr_assert_eq(qemb_embedder_open(&e, path, NULL, opt, &err), 0, "%s", err.msg);
    return e;
}

/* out (dim) = the unit vector of text, end-of-text appended, by the calls that batch */
static void embed_by_hand(const char *text, size_t len, float *out, int dim) {
    qemb_file *f;
    qemb_tokenizer *t;
    qemb_model *m;
    qemb_tokenizer_result r;
    qemb_err err;
    float vector[1024];
    int32_t ids[512];
    cr_assert_eq(qemb_file_open(&f, path, &err), 0, "%s", err.msg);
    cr_assert_eq(qemb_tokenizer_open(&t, f->merges, f->n_merges, f->added, f->added_bytes, &err),
                 0);
    cr_assert_eq(qemb_open(&m, f, qemb_cpu_choose(NULL, QEMB_MATH_F32), NULL, &err), 0);
    qemb_tokenizer_state *s = qemb_tokenizer_state_new(t);
    cr_assert_eq(qemb_tokenizer_encode(s, text, len, 511, &r, &err), 0, "%s", err.msg);
    memcpy(ids, r.ids, r.n * sizeof *ids);
    ids[r.n] = f->config.eos_id;
    qemb_batch *b = qemb_batch_new(m);
    cr_assert_eq(qemb_pack_add(b, ids, (int)r.n + 1), 0);
    qemb_embed(m, b, vector);
    cr_assert_eq(qemb_l2_normalize(out, vector, dim), 0);
    qemb_batch_free(b);
    qemb_tokenizer_state_free(s);
    qemb_close(m);
    qemb_tokenizer_close(t);
    qemb_file_close(f);
}

static void expect_text(qemb_embedder *e, const char *text, size_t len, int dim) {
    float got[1024], want[1024];
    qemb_err err;
    cr_assert_eq(qemb_embed_text(e, NULL, text, len, got, dim, &err), 0, "%s", err.msg);
    embed_by_hand(text, len, want, dim);
    cr_assert_arr_eq(got, want, (size_t)dim * sizeof *got, "%.20s", text);
}

Test(embed_text, equals_the_calls_that_batch) {
    qemb_embedder *e = open_embedder(NULL);
    const int D = qemb_embedder_dim(e);
    expect_text(e, "What is gravity?", 16, D);
    expect_text(e, "the second text, after another", 30, D);
    expect_text(e, "", 0, D);
    expect_text(e, "a\0b", 3, D); /* NUL is a character */
    expect_text(e, "cut to fewer numbers", 20, D / 2);
    qemb_embedder_close(e);
}

Test(embed_text, puts_the_prompt_before_the_text) {
    qemb_embedder *e = open_embedder(NULL);
    const int D = qemb_embedder_dim(e);
    const char *prompt = qemb_embedder_prompt(e, "query");
    cr_assert_not_null(prompt);
    cr_assert_null(qemb_embedder_prompt(e, "no such prompt"));
    char joined[512];
    snprintf(joined, sizeof joined, "%s%s", prompt, "What is gravity?");
    float got[1024], want[1024];
    qemb_err err;
    cr_assert_eq(qemb_embed_text(e, prompt, "What is gravity?", 16, got, D, &err), 0);
    embed_by_hand(joined, strlen(joined), want, D);
    cr_assert_arr_eq(got, want, (size_t)D * sizeof *got);
    qemb_embedder_close(e);
}

static void expect_error(qemb_embedder *e, const char *prompt, const char *text, int dim,
                         const char *code, const char *says) {
    float out[1024] = {7};
    qemb_err err;
    cr_assert_eq(qemb_embed_text(e, prompt, text, strlen(text), out, dim, &err), -1);
    cr_assert_str_eq(err.code, code);
    cr_assert_not_null(strstr(err.msg, says), "%s", err.msg);
    cr_assert_eq(out[0], 7, "out was written");
}

Test(embed_text, refuses_with_a_code_and_goes_on) {
    qemb_embedder *e = open_embedder(&(qemb_options){.max_tokens = 9});
    const int D = qemb_embedder_dim(e);
    expect_error(e, NULL, "\xff", D, "invalid_utf8", "byte 0");
    expect_error(e, "Query: ", "ab\xff", D, "invalid_utf8", "byte 2");
    expect_error(e, NULL, "one two three four five six seven eight", D, "too_long", "8 tokens");
    expect_error(e, NULL, "a", 0, "bad_dim", "got 0");
    expect_error(e, NULL, "a", D + 1, "bad_dim", "want 1..");
    expect_text(e, "a", 1, D);
    qemb_embedder_close(e);
}

Test(embed_text, refuses_a_vector_without_a_length) {
    /* a model whose final norm is zero: every vector is */
    const qemb_config *c = &small_configs[0];
    size_t bytes;
    uint8_t *model = make_model(c, 1, 1, &bytes);
    memset(model + bytes - (size_t)c->hidden * sizeof(float), 0, (size_t)c->hidden * sizeof(float));
    char name[64];
    write_temporary(name, model, bytes);
    free(model);
    qemb_embedder *e;
    qemb_err err;
    cr_assert_eq(qemb_embedder_open(&e, name, NULL, NULL, &err), 0, "%s", err.msg);
    expect_error(e, NULL, "a", c->hidden, "non_finite", "length");
    qemb_embedder_close(e);
    unlink(name);
}

/* An id without a row would be read from beyond the embedding table. */
Test(embed_text, refuses_a_token_without_a_row) {
    const qemb_config *c = &small_configs[0];
    size_t bytes;
    uint8_t *model = make_model(c, 1, 1, &bytes);
    uint8_t *eos = memmem(model, bytes, "<eos>", 5);
    cr_assert_not_null(eos);
    for (int i = 0; i < 4; i++) eos[i - 8] = (uint8_t)(c->vocab >> 8 * i);
    char name[64];
    write_temporary(name, model, bytes);
    free(model);
    qemb_embedder *e = NULL;
    qemb_err err;
    cr_expect_eq(qemb_embedder_open(&e, name, NULL, NULL, &err), -1);
    cr_expect_str_eq(err.code, "model_file");
    cr_expect_not_null(strstr(err.msg, "more ids than rows"), "%s", err.msg);
    cr_expect_null(e);
    unlink(name);
}

Test(embed_text, opens_nothing_it_cannot_open) {
    qemb_embedder *e = NULL;
    qemb_err err;
    cr_assert_eq(qemb_embedder_open(&e, "tests/no-such.qemb", NULL, NULL, &err), -1);
    cr_assert_str_eq(err.code, "model_file");
    cr_assert_null(e);
    qemb_embedder_close(NULL);
}

/* A made model of this config, opened. */
static int open_made(qemb_embedder **e, const qemb_config *c, qemb_err *err) {
    size_t bytes;
    char name[64];
    uint8_t *model = make_model(c, 1, 1, &bytes);
    write_temporary(name, model, bytes);
    free(model);
    const int bad = qemb_embedder_open(e, name, NULL, NULL, err);
    unlink(name);
    return bad;
}

Test(embed_text, refuses_a_reranker) {
    qemb_config c = small_configs[0];
    c.kind = QEMB_RERANKER, c.dense_rows = 1, c.eos_id = QEMB_NO_TOKEN;
    qemb_embedder *e = NULL;
    qemb_err err;
    cr_assert_eq(open_made(&e, &c, &err), -1);
    cr_assert_str_eq(err.code, "model_file");
    cr_assert_not_null(strstr(err.msg, "a reranker, which has no vectors"), "%s", err.msg);
    cr_assert_null(e);
}

/* A vector has the dense layer's numbers, fewer or more than the hidden size. */
Test(embed_text, vectors_of_a_dense_layer) {
    for (int rows = 5; rows <= 105; rows += 100) {
        qemb_config c = small_configs[0];
        c.dense_rows = rows, c.activation = QEMB_TANH;
        qemb_file *f = open_model(&c, 1, 1);
        qemb_embedder *e;
        qemb_model *m;
        qemb_err err;
        cr_assert_eq(open_made(&e, &c, &err), 0, "%s", err.msg);
        cr_assert_eq(qemb_embedder_dim(e), rows);
        cr_assert_eq(qemb_open(&m, f, qemb_cpu_choose(NULL, QEMB_MATH_F32), NULL, &err), 0);
        const int32_t ids[] = {64, 65 + 1, c.eos_id}; /* "a", "c" */
        float vector[105], want[105], got[105];
        qemb_batch *b = qemb_batch_new(m);
        cr_assert_eq(qemb_pack_add(b, ids, 3), 0);
        qemb_embed(m, b, vector);
        for (int dim = 1; dim <= rows; dim += 2) {
            cr_assert_eq(qemb_l2_normalize(want, vector, dim), 0);
            cr_assert_eq(qemb_embed_text(e, NULL, "ac", 2, got, dim, &err), 0, "%s", err.msg);
            cr_assert_arr_eq(got, want, (size_t)dim * sizeof *got);
        }
        expect_error(e, NULL, "a", rows + 1, "bad_dim", "want 1..");
        qemb_batch_free(b);
        qemb_close(m);
        qemb_embedder_close(e);
        qemb_file_close(f);
    }
}

Test(embed_text, a_model_without_end_of_text) {
    qemb_config c = small_configs[0];
    c.eos_id = QEMB_NO_TOKEN, c.window = 5;
    qemb_embedder *e;
    qemb_err err;
    float out[64];
    cr_assert_eq(open_made(&e, &c, &err), 0, "%s", err.msg);
    expect_error(e, NULL, "", 64, "empty_text", "no tokens");
    expect_error(e, NULL, "123456", 64, "too_long", "5 tokens");
    cr_assert_eq(qemb_embed_text(e, NULL, "12345", 5, out, 64, &err), 0, "%s", err.msg);
    cr_assert_eq(qemb_embed_text(e, "1", "", 0, out, 64, &err), 0, "%s", err.msg);
    qemb_embedder_close(e);
}
