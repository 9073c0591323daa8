/* test_embed_text.c - qemb_embed_text against tokenizing, batching and embedding by hand; lists of
 * texts against one text at a time. */
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

/* out = the unit vector of ids (n), by the calls that batch, of a made model */
static void embed_ids(const qemb_config *c, const int32_t *ids, int n, float *out) {
    qemb_file *f = open_model(c, 1, 1);
    qemb_model *m;
    qemb_err err;
    cr_assert_eq(qemb_open(&m, f, qemb_cpu_choose(NULL, QEMB_MATH_F32), NULL, &err), 0);
    embed_alone(m, ids, n, out);
    cr_assert_eq(qemb_l2_normalize(out, out, c->hidden), 0);
    qemb_close(m);
    qemb_file_close(f);
}

/* Of a made vocabulary: "ab c" has the ids 4, 126 and 101. */
Test(embed_text, an_encoder) {
    qemb_config c = bert_configs[0];
    c.max_positions = 12;
    static const int32_t ids[] = {0, 4, 126, 101, 2}, none[] = {0, 2};
    const size_t bytes = (size_t)c.hidden * sizeof(float);
    float got[64], want[64];
    qemb_embedder *e;
    qemb_err err;
    cr_assert_eq(open_made(&e, &c, &err), 0, "%s", err.msg);
    cr_assert_eq(qemb_embedder_max_tokens(e), 12);
    embed_ids(&c, ids, 5, want);
    cr_assert_eq(qemb_embed_text(e, NULL, "ab c", 4, got, 64, &err), 0, "%s", err.msg);
    cr_assert_arr_eq(got, want, bytes);
    cr_assert_eq(qemb_embed_text(e, "ab", " c", 2, got, 64, &err), 0, "%s", err.msg);
    cr_assert_arr_eq(got, want, bytes, "with a prompt");
    embed_ids(&c, none, 2, want);
    cr_assert_eq(qemb_embed_text(e, NULL, "", 0, got, 64, &err), 0, "%s", err.msg);
    cr_assert_arr_eq(got, want, bytes, "an empty text");
    /* "1" and each that follows are pieces of one character; U+2581 is the first token. */
    cr_assert_eq(qemb_embed_text(e, NULL, "123456789", 9, got, 64, &err), 0, "%s", err.msg);
    expect_error(e, NULL, "1234567890", 64, "too_long",
                 "got more than 10 tokens, want at most 12 with the tokens around the text");
    const char *const text[] = {"1234567890", "123456789"};
    const size_t len[] = {10, 9};
    const qemb_text_options o = {.truncate = 1, .dim = 64};
    float both[2 * 64];
    for (int i = 0; i < 2; i++)
        cr_assert_eq(qemb_embed_texts(e, &o, text + i, len + i, 1, both + 64 * i, &err), 1);
    cr_assert_arr_eq(both, got, bytes, "what is left of a text that is cut");
    cr_assert_arr_eq(both + 64, got, bytes);
    char *prompt;
    cr_assert_eq(qemb_embedder_task_prompt(e, "find", &prompt, &err), -1);
    cr_assert_str_eq(err.code, "no_task");
    qemb_embedder_close(e);
}

/* ---- lists of texts -------------------------------------------------------------------------- */

enum { MOST = 512 };

/* Embeds the texts (n) by the loop of qemb.h. failed[i] = the code of text i, or NULL. Returns the
 * number of calls. */
static int embed_list(qemb_embedder *e, const qemb_text_options *o, const char *const text[],
                      const size_t len[], int n, float *out, const char *failed[]) {
    int calls = 0;
    for (int i = 0, k; i < n; i += k, calls++) {
        qemb_err err;
        float *row = out + (size_t)i * (size_t)o->dim;
        k = qemb_embed_texts(e, o, text + i, len + i, n - i, row, &err);
        cr_assert_neq(k, 0);
        for (int j = i; j < i + k; j++) failed[j] = NULL;
        if (k < 0) failed[i] = err.code, k = 1;
    }
    return calls;
}

/* Sentences of 1 to 40 words, some of them equal; *buffer is to be freed. */
static void make_texts(char **buffer, const char *text[], size_t len[], int n) {
    static const char *const words[] = {"gravity ", "is ", "a ", "\n", "force", "Größe "};
    rng r = {7};
    char *p = *buffer = malloc((size_t)n * 40 * 10);
    for (int i = 0; i < n; i++) {
        text[i] = p;
        for (int w = (int)(rng_u64(&r) % 40); w >= 0; w--) p = stpcpy(p, words[rng_u64(&r) % 6]);
        len[i] = (size_t)(p - text[i]);
        if (i % 5 == 4) text[i] = text[i - 3], len[i] = len[i - 3];
    }
}

Test(embed_text, a_list_has_the_bits_of_its_texts) {
    const char *text[MOST], *failed[MOST];
    size_t len[MOST];
    char *buffer;
    make_texts(&buffer, text, len, MOST);
    qemb_embedder *alone = open_embedder(NULL);
    const int D = qemb_embedder_dim(alone);
    float *want = malloc(MOST * (size_t)D * sizeof *want),
          *got = malloc(MOST * (size_t)D * sizeof *got);
    for (int with_prompt = 0; with_prompt < 2; with_prompt++)
        for (int dim = D; dim > D / 3; dim -= D / 2) {
            const char *prompt = with_prompt ? qemb_embedder_prompt(alone, "query") : NULL;
            const qemb_text_options o = {.prompt = prompt, .dim = dim};
            for (int i = 0; i < MOST; i++)
                cr_assert_eq(
                    qemb_embed_text(alone, prompt, text[i], len[i], want + i * dim, dim, NULL), 0);
            for (int rows = 1; rows <= 4096; rows *= 16) {
                qemb_embedder *e = open_embedder(&(qemb_options){.batch_tokens = rows});
                const int calls = embed_list(e, &o, text, len, MOST, got, failed);
                cr_assert_arr_eq(got, want, MOST * (size_t)dim * sizeof *got, "%d rows", rows);
                for (int i = 0; i < MOST; i++) cr_assert_null(failed[i]);
                if (rows == 4096) cr_assert_lt(calls, MOST / 16, "%d calls", calls);
                qemb_embedder_close(e);
            }
        }
    qemb_embedder_close(alone);
    free(buffer);
    free(want);
    free(got);
}

/* A list of equal texts, and one of texts behind a long prompt, have more than 16 texts or ids for
 * each row: neither may pass the room that an embedder has for those of a batch. */
Test(embed_text, a_list_of_more_texts_than_rows) {
    const char *text[MOST], *failed[MOST];
    size_t len[MOST];
    char prompt[101], letters[50];
    memset(prompt, '.', 100); /* "." is a token, also behind another one */
    prompt[100] = 0;
    for (int differ = 1; differ <= 50; differ += 49) {
        /* of 50 texts, 100 rows are the prompt's and 2 each text's */
        qemb_embedder *e = open_embedder(&(qemb_options){.batch_tokens = differ == 1 ? 4 : 200});
        const int D = qemb_embedder_dim(e);
        const qemb_text_options o = {.prompt = differ == 1 ? NULL : prompt, .dim = D};
        float *out = malloc(MOST * (size_t)D * sizeof *out), want[64];
        for (int i = 0; i < MOST; i++) {
            letters[i % differ] = (char)('A' + i % differ);
            text[i] = letters + i % differ, len[i] = 1;
        }
        embed_list(e, &o, text, len, MOST, out, failed);
        for (int i = 0; i < MOST; i++) {
            cr_assert_eq(qemb_embed_text(e, o.prompt, text[i], 1, want, D, NULL), 0);
            cr_assert_arr_eq(out + i * D, want, (size_t)D * sizeof *out);
        }
        free(out);
        qemb_embedder_close(e);
    }
}

Test(embed_text, a_list_goes_on_after_a_text_that_fails) {
    qemb_embedder *e = open_embedder(&(qemb_options){.batch_tokens = 256, .max_tokens = 9});
    const int D = qemb_embedder_dim(e);
    const char *const text[] = {"\xff", "good", "one two three four five six seven eight", "ab\xff",
                                "better"};
    const char *const code[] = {"invalid_utf8", NULL, "too_long", "invalid_utf8", NULL};
    const char *failed[5];
    size_t len[5];
    float out[5][64], want[64];
    for (int i = 0; i < 5; i++) len[i] = strlen(text[i]);
    memset(out, 0, sizeof out);
    cr_assert_eq(D, 32);
    const qemb_text_options o = {.dim = 32};
    embed_list(e, &o, text, len, 5, (float *)out, failed);
    for (int i = 0; i < 5; i++) {
        const float *got = (float *)out + i * D;
        if (code[i])
            cr_assert_str_eq(failed[i], code[i]);
        else
            cr_assert_null(failed[i]);
        memset(want, 0, sizeof want);
        if (!code[i]) cr_assert_eq(qemb_embed_text(e, NULL, text[i], len[i], want, D, NULL), 0);
        cr_assert_arr_eq(got, want, (size_t)D * sizeof *got, "text %d", i);
    }
    qemb_err err;
    cr_assert_eq(qemb_embed_texts(e, &o, NULL, NULL, 0, NULL, &err), 0);
    cr_assert_eq(qemb_embed_texts(e, &(qemb_text_options){.dim = D + 1}, text, len, 5, NULL, &err),
                 -1);
    cr_assert_str_eq(err.code, "bad_dim");
    qemb_embedder_close(e);
}

/* The vector of one token is NaN: only the texts with it fail. */
Test(embed_text, a_list_goes_on_after_a_vector_without_a_length) {
    qemb_config c = small_configs[0];
    size_t bytes;
    char name[64];
    uint8_t *model = make_model(&c, 1, 1, &bytes);
    qemb_file *f = open_model(&c, 1, 1);
    const size_t at = (size_t)((const uint8_t *)f->weights.tok_emb.data - f->map);
    uint16_t *table = (uint16_t *)(model + at);
    const int x = 'x' - '!'; /* byte-level BPE counts the printable bytes from 0 */
    for (int i = 0; i < c.hidden; i++) table[x * c.hidden + i] = 0x7e00; /* NaN */
    qemb_file_close(f);
    write_temporary(name, model, bytes);
    free(model);
    qemb_embedder *e;
    qemb_err err;
    cr_assert_eq(qemb_embedder_open(&e, name, NULL, &(qemb_options){.batch_tokens = 64}, &err), 0);
    unlink(name);
    const char *const text[] = {"1", "x", "2", "3x", "x", "4"};
    const size_t len[] = {1, 1, 1, 2, 1, 1};
    const char *failed[6];
    float out[6 * 64], want[64];
    const qemb_text_options o = {.dim = c.hidden};
    cr_assert_leq(c.hidden, 64);
    embed_list(e, &o, text, len, 6, out, failed);
    for (int i = 0; i < 6; i++) {
        if (text[i][len[i] - 1] == 'x') {
            cr_assert_not_null(failed[i]);
            cr_assert_str_eq(failed[i], "non_finite");
            continue;
        }
        cr_assert_null(failed[i]);
        cr_assert_eq(qemb_embed_text(e, NULL, text[i], len[i], want, c.hidden, &err), 0);
        cr_assert_arr_eq(out + i * c.hidden, want, (size_t)c.hidden * sizeof *want, "text %d", i);
    }
    qemb_embedder_close(e);
}

/* A text that is cut has the vector of its first tokens. Each digit is a token. */
Test(embed_text, cuts_long_texts_if_asked) {
    qemb_embedder *e = open_embedder(&(qemb_options){.max_tokens = 9});
    cr_assert_eq(qemb_embedder_max_tokens(e), 9);
    const int D = qemb_embedder_dim(e);
    const char *const text = "1234567890";
    const size_t len = 10;
    const qemb_text_options o = {.dim = D, .truncate = 1};
    float got[64], want[64];
    qemb_err err;
    cr_assert_eq(qemb_embed_texts(e, &o, &text, &len, 1, got, &err), 1, "%s", err.msg);
    embed_by_hand(text, 8, want, D);
    cr_assert_arr_eq(got, want, (size_t)D * sizeof *got);
    expect_error(e, NULL, text, D, "too_long", "8 tokens");
    qemb_embedder_close(e);
}

Test(embed_text, refuses_a_length_beyond_the_models) {
    qemb_embedder *e = NULL;
    qemb_err err;
    cr_assert_eq(qemb_embedder_open(&e, path, NULL, &(qemb_options){.max_tokens = 201}, &err), -1);
    cr_assert_str_eq(err.code, "usage");
    cr_assert_not_null(strstr(err.msg, "got 201, want 1..200"), "%s", err.msg);
    cr_assert_null(e);
    cr_assert_eq(qemb_embedder_open(&e, path, NULL, NULL, &err), 0);
    cr_assert_eq(qemb_embedder_max_tokens(e), 200);
    qemb_embedder_close(e);
    cr_assert_str_eq(qemb_version(), QEMB_VERSION);
}

/* ---- prompts --------------------------------------------------------------------------------- */

static void expect_task_prompt(const char *file, const char *want) {
    qemb_embedder *e;
    qemb_err err;
    char *got = NULL;
    cr_assert_eq(qemb_embedder_open(&e, file, NULL, NULL, &err), 0, "%s", err.msg);
    const int bad = qemb_embedder_task_prompt(e, "Find it", &got, &err);
    cr_assert_eq(bad, want ? 0 : -1);
    if (want)
        cr_assert_str_eq(got, want);
    else
        cr_assert_str_eq(err.code, "no_task");
    free(got);
    qemb_embedder_close(e);
}

Test(embed_text, a_task_has_the_form_of_the_models_prompts) {
    expect_task_prompt(path, "Instruct: Find it\nQuery:");
    expect_task_prompt("tests/golden/f2llm.qemb", "Instruct: Find it\nQuery: ");
    expect_task_prompt("tests/golden/dense.qemb", "Instruct: Find it\nQuery:"); /* no prompts */
    expect_task_prompt("tests/golden/jina-v5.qemb", NULL);
}

Test(embed_text, lists_the_names_of_prompts) {
    qemb_embedder *e = open_embedder(NULL);
    cr_assert_null(qemb_embedder_prompt_name(e, -1));
    cr_assert_str_eq(qemb_embedder_prompt_name(e, 0), "query");
    cr_assert_str_eq(qemb_embedder_prompt_name(e, 1), "document");
    cr_assert_null(qemb_embedder_prompt_name(e, 2));
    qemb_embedder_close(e);
}
