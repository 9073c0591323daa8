/* embed_text.c - one text, one vector: a model file, tokenizer and model behind one pointer. */
#include "qemb.h"

#include <stdlib.h>
#include <string.h>

struct qemb_embedder {
    qemb_file *file;
    qemb_tokenizer *tokenizer;
    qemb_tokenizer_state *state;
    qemb_model *model;
    qemb_batch *batch;
    int32_t *ids;  /* (max_tokens) of the current text */
    float *vector; /* (D) not yet cut and normalized */
};

static int open_parts(qemb_embedder *e, const char *path, const qemb_ops *ops, qemb_options opt,
                      qemb_err *err) {
    if (!ops) ops = qemb_cpu_choose(NULL, QEMB_MATH_F32);
    if (!opt.batch_tokens) opt.batch_tokens = 1; /* one text at a time, however long */
    if (qemb_file_open(&e->file, path, err)) return -1;
    const qemb_file *f = e->file;
    if (qemb_tokenizer_open(&e->tokenizer, f->merges, f->n_merges, f->added, f->added_bytes, err) ||
        qemb_open(&e->model, f, ops, &opt, err))
        return -1;
    e->state = qemb_tokenizer_state_new(e->tokenizer);
    e->batch = qemb_batch_new(e->model);
    e->ids = malloc((size_t)qemb_options_of(e->model)->max_tokens * sizeof *e->ids);
    e->vector = malloc((size_t)f->config.hidden * sizeof *e->vector);
    if (!e->state || !e->batch || !e->ids || !e->vector)
        return qemb_fail(err, "out_of_memory", "embedder: out of memory");
    return 0;
}

int qemb_embedder_open(qemb_embedder **out, const char *path, const qemb_ops *ops,
                       const qemb_options *opt, qemb_err *err) {
    qemb_embedder *e = calloc(1, sizeof *e);
    if (!e) return qemb_fail(err, "out_of_memory", "embedder: out of memory");
    if (open_parts(e, path, ops, opt ? *opt : (qemb_options){0}, err)) {
        qemb_embedder_close(e);
        return -1;
    }
    *out = e;
    return 0;
}

void qemb_embedder_close(qemb_embedder *e) {
    if (!e) return;
    free(e->vector);
    free(e->ids);
    qemb_batch_free(e->batch);
    qemb_tokenizer_state_free(e->state);
    qemb_close(e->model);
    qemb_tokenizer_close(e->tokenizer);
    qemb_file_close(e->file);
    free(e);
}

int qemb_embedder_dim(const qemb_embedder *e) { return e->file->config.hidden; }

const char *qemb_embedder_prompt(const qemb_embedder *e, const char *name) {
    return qemb_file_prompt(e->file, name);
}

/* Tokenizes text into e->ids, with end-of-text. Returns the number of ids, or -1. */
static int tokenize(qemb_embedder *e, const char *text, size_t len, qemb_err *err) {
    const int max_tokens = qemb_options_of(e->model)->max_tokens;
    qemb_tokenizer_result r;
    if (qemb_tokenizer_encode(e->state, text, len, (size_t)max_tokens - 1, &r, err)) return -1;
    if (r.bytes_left)
        return qemb_fail(err, "too_long",
                         "text: too long (got more than %d tokens, want at most %d)",
                         max_tokens - 1, max_tokens - 1);
    memcpy(e->ids, r.ids, r.n * sizeof *e->ids);
    e->ids[r.n] = e->file->config.eos_id;
    return (int)r.n + 1;
}

/* Prompt and text are tokenized as one string, since a token may span their border. */
static int tokenize_after(qemb_embedder *e, const char *prompt, const char *text, size_t len,
                          qemb_err *err) {
    const size_t prompt_len = strlen(prompt);
    char *joined = malloc(prompt_len + len + 1);
    if (!joined) return qemb_fail(err, "out_of_memory", "text: out of memory (%zu bytes)", len);
    memcpy(joined, prompt, prompt_len);
    if (len) memcpy(joined + prompt_len, text, len);
    const int n = tokenize(e, joined, prompt_len + len, err);
    free(joined);
    /* The message has to count bytes from the beginning of the text, not of the prompt. */
    if (n < 0 && err && !strcmp(err->code, "invalid_utf8")) tokenize(e, text, len, err);
    return n;
}

int qemb_embed_text(qemb_embedder *e, const char *prompt, const char *text, size_t len, float *out,
                    int dim, qemb_err *err) {
    const int hidden = e->file->config.hidden;
    if (dim < 1 || dim > hidden)
        return qemb_fail(err, "bad_dim", "dim: out of range (got %d, want 1..%d)", dim, hidden);
    const int n =
        prompt && *prompt ? tokenize_after(e, prompt, text, len, err) : tokenize(e, text, len, err);
    if (n < 0) return -1;
    qemb_batch_clear(e->batch);
    qemb_pack_add(e->batch, e->ids, n);
    qemb_embed(e->model, e->batch, e->vector);
    const char *failure = qemb_health_of(e->model).failure;
    if (failure) return qemb_fail(err, "device", "%s", failure);
    if (qemb_l2_normalize(out, e->vector, dim))
        return qemb_fail(err, "non_finite", "vector: its length is zero or not finite");
    return 0;
}
