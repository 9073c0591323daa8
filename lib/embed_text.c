/* embed_text.c - texts to vectors: a model file, tokenizer and model behind one pointer. */
#include "text_ids.h"

#include <stdlib.h>
#include <string.h>

/* What an embedder has room for beside one longest text, as multiples of batch_tokens: the ids and
 * the texts of a batch. Both may outnumber its rows, since equal texts and a shared prompt are
 * computed once. */
#define SHARED ((size_t)16)

struct qemb_embedder {
    qemb_file *file;
    qemb_tokenizer *tokenizer;
    text_ids text;
    qemb_model *model;
    qemb_batch *batch;
    int32_t *ids; /* (max_ids) of the batch's distinct texts */
    int *row;     /* (max_texts) of `vectors`, of each text of the batch */
    size_t max_ids, max_texts;
    float *vectors; /* (batch_tokens, D) not yet cut and normalized */
};

static int out_of_memory(qemb_err *err) {
    return qemb_fail(err, "out_of_memory", "embedder: out of memory");
}

static int open_batch(qemb_embedder *e, qemb_err *err) {
    const qemb_options *o = qemb_options_of(e->model);
    const size_t rows = (size_t)o->batch_tokens;
    e->max_texts = SHARED * rows;
    e->max_ids = SHARED * rows + (size_t)o->max_tokens;
    e->batch = qemb_batch_new(e->model);
    e->ids = malloc(e->max_ids * sizeof *e->ids);
    e->row = malloc(e->max_texts * sizeof *e->row);
    e->vectors = malloc(rows * (size_t)qemb_embedder_dim(e) * sizeof *e->vectors);
    return e->batch && e->ids && e->row && e->vectors ? 0 : out_of_memory(err);
}

static int open_parts(qemb_embedder *e, const char *path, const qemb_ops *ops, qemb_options opt,
                      qemb_err *err) {
    if (!ops) ops = qemb_cpu_choose(NULL, QEMB_MATH_F32);
    if (opt.batch_tokens <= 0) opt.batch_tokens = 1; /* one text at a time, however long */
    if (qemb_file_open(&e->file, path, err)) return -1;
    const qemb_config *c = &e->file->config;
    if (c->kind == QEMB_RERANKER)
        return qemb_fail(err, "model_file", "%.128s: a reranker, which has no vectors", path);
    if (opt.max_tokens > c->max_positions)
        return qemb_fail(err, "usage", "max_tokens: more than the model can (got %d, want 1..%d)",
                         opt.max_tokens, c->max_positions);
    if (qemb_file_tokenizer(&e->tokenizer, e->file, err) ||
        qemb_open(&e->model, e->file, ops, &opt, err) ||
        text_ids_open(&e->text, e->file, e->tokenizer, qemb_options_of(e->model)->max_tokens, err))
        return -1;
    return open_batch(e, err);
}

int qemb_embedder_open(qemb_embedder **out, const char *path, const qemb_ops *ops,
                       const qemb_options *opt, qemb_err *err) {
    qemb_embedder *e = calloc(1, sizeof *e);
    if (!e) return out_of_memory(err);
    if (open_parts(e, path, ops, opt ? *opt : (qemb_options){0}, err)) {
        qemb_embedder_close(e);
        return -1;
    }
    *out = e;
    return 0;
}

void qemb_embedder_close(qemb_embedder *e) {
    if (!e) return;
    free(e->vectors);
    free(e->row);
    free(e->ids);
    qemb_batch_free(e->batch);
    text_ids_close(&e->text);
    qemb_close(e->model);
    qemb_tokenizer_close(e->tokenizer);
    qemb_file_close(e->file);
    free(e);
}

const char *qemb_version(void) { return QEMB_VERSION; }

int qemb_embedder_dim(const qemb_embedder *e) { return qemb_dim(&e->file->config); }

int qemb_embedder_max_tokens(const qemb_embedder *e) { return e->text.max_tokens; }

const char *qemb_embedder_prompt(const qemb_embedder *e, const char *name) {
    return qemb_file_prompt(e->file, name);
}

const char *qemb_embedder_prompt_name(const qemb_embedder *e, int i) {
    return i >= 0 && i < e->file->n_prompts ? e->file->prompts[i].name : NULL;
}

int qemb_embedder_task_prompt(const qemb_embedder *e, const char *task, char **prompt,
                              qemb_err *err) {
    const char *end = text_ids_task_end(e->file);
    if (!end)
        return qemb_fail(err, "no_task",
                         "task: this model's prompts have none (want one of its prompts, by name)");
    char *made = text_ids_task_prompt(task, strlen(task), end, NULL);
    if (!made) return out_of_memory(err);
    *prompt = made;
    return 0;
}

/* Adds the text to the batch, its ids behind the *used ones. Returns the row of its vector, or -1
 * if the batch has no room, or -2 if the text fails. */
static int add(qemb_embedder *e, const qemb_text_options *o, const char *text, size_t len,
               size_t *used, qemb_err *err) {
    const char *const part[] = {o->prompt, text};
    const size_t part_len[] = {o->prompt ? strlen(o->prompt) : 0, len};
    size_t cut;
    const int n = text_ids_encode(&e->text, part, part_len, 2, o->truncate ? &cut : NULL, err);
    if (n < 0) return -2;
    if ((size_t)n > e->max_ids - *used) return -1;
    int32_t *ids = e->ids + *used;
    memcpy(ids, e->text.ids, (size_t)n * sizeof *ids);
    const int rows = qemb_batch_rows(e->batch), row = qemb_pack_add(e->batch, ids, n);
    if (row == rows) *used += (size_t)n; /* else the batch has equal ids, or did not take these */
    return row;
}

int qemb_embed_texts(qemb_embedder *e, const qemb_text_options *o, const char *const text[],
                     const size_t len[], int n, float *out, qemb_err *err) {
    const int most = qemb_embedder_dim(e);
    size_t used = 0;
    int k = 0, row = 0;
    if (o->dim < 1 || o->dim > most)
        return qemb_fail(err, "bad_dim", "dim: out of range (got %d, want 1..%d)", o->dim, most);
    qemb_batch_clear(e->batch);
    for (; k < n && (size_t)k < e->max_texts; k++) {
        row = add(e, o, text[k], len[k], &used, err);
        if (row < 0) break;
        e->row[k] = row;
    }
    if (!k) return row < 0 ? -1 : 0;
    qemb_embed(e->model, e->batch, e->vectors);
    const char *failure = qemb_health_of(e->model).failure;
    if (failure)
        return qemb_file_check(e->file, err) ? -1 : qemb_fail(err, "device", "%s", failure);
    for (int i = 0; i < k; i++) {
        const float *vector = e->vectors + (size_t)e->row[i] * (size_t)most;
        if (!qemb_l2_normalize(out + (size_t)i * (size_t)o->dim, vector, o->dim)) continue;
        return i ? i : qemb_fail(err, "non_finite", "vector: its length is zero or not finite");
    }
    return k;
}

int qemb_embed_text(qemb_embedder *e, const char *prompt, const char *text, size_t len, float *out,
                    int dim, qemb_err *err) {
    const qemb_text_options o = {.prompt = prompt, .dim = dim};
    return qemb_embed_texts(e, &o, &text, &len, 1, out, err) < 0 ? -1 : 0;
}
