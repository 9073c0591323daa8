/* embed_text.c - one text, one vector: a model file, tokenizer and model behind one pointer. */
#include "text_ids.h"

#include <stdlib.h>
#include <string.h>

struct qemb_embedder {
    qemb_file *file;
    qemb_tokenizer *tokenizer;
    text_ids text;
    qemb_model *model;
    qemb_batch *batch;
    float *vector; /* (D) not yet cut and normalized */
};

static int open_parts(qemb_embedder *e, const char *path, const qemb_ops *ops, qemb_options opt,
                      qemb_err *err) {
    if (!ops) ops = qemb_cpu_choose(NULL, QEMB_MATH_F32);
    if (!opt.batch_tokens) opt.batch_tokens = 1; /* one text at a time, however long */
    if (qemb_file_open(&e->file, path, err)) return -1;
    const qemb_config *c = &e->file->config;
    if (c->kind == QEMB_RERANKER)
        return qemb_fail(err, "model_file", "%.128s: a reranker, which has no vectors", path);
    if (qemb_file_tokenizer(&e->tokenizer, e->file, err) ||
        qemb_open(&e->model, e->file, ops, &opt, err) ||
        text_ids_open(&e->text, e->file, e->tokenizer, qemb_options_of(e->model)->max_tokens, err))
        return -1;
    e->batch = qemb_batch_new(e->model);
    e->vector = malloc((size_t)qemb_dim(c) * sizeof *e->vector);
    if (!e->batch || !e->vector) return qemb_fail(err, "out_of_memory", "embedder: out of memory");
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
    qemb_batch_free(e->batch);
    text_ids_close(&e->text);
    qemb_close(e->model);
    qemb_tokenizer_close(e->tokenizer);
    qemb_file_close(e->file);
    free(e);
}

int qemb_embedder_dim(const qemb_embedder *e) { return qemb_dim(&e->file->config); }

const char *qemb_embedder_prompt(const qemb_embedder *e, const char *name) {
    return qemb_file_prompt(e->file, name);
}

int qemb_embed_text(qemb_embedder *e, const char *prompt, const char *text, size_t len, float *out,
                    int dim, qemb_err *err) {
    const int most = qemb_embedder_dim(e);
    if (dim < 1 || dim > most)
        return qemb_fail(err, "bad_dim", "dim: out of range (got %d, want 1..%d)", dim, most);
    const char *const part[] = {prompt, text};
    const size_t part_len[] = {prompt ? strlen(prompt) : 0, len};
    const int n = text_ids_encode(&e->text, part, part_len, 2, NULL, err);
    if (n < 0) return -1;
    qemb_batch_clear(e->batch);
    qemb_pack_add(e->batch, e->text.ids, n);
    qemb_embed(e->model, e->batch, e->vector);
    const char *failure = qemb_health_of(e->model).failure;
    if (failure) return qemb_fail(err, "device", "%s", failure);
    if (qemb_l2_normalize(out, e->vector, dim))
        return qemb_fail(err, "non_finite", "vector: its length is zero or not finite");
    return 0;
}
