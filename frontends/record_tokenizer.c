/* record_tokenizer.c - a record of input -> token ids; see record_tokenizer.h. */
#include "record_tokenizer.h"

#include "console.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int no_task(qemb_err *err, const char *object, const char *model) {
    return qemb_fail(err, "no_task",
                     "%s: the prompts of %.128s have no task (want one of its prompts, by name)",
                     object, model);
}

/* The names of f's prompts, as in "query, document". */
static void list_prompts(const qemb_file *f, char *names, size_t room) {
    *names = 0;
    for (int i = 0; i < f->n_prompts && strlen(names) < room - 1; i++) {
        const size_t n = strlen(names);
        snprintf(names + n, room - n, "%s%s", i ? ", " : "", f->prompts[i].name);
    }
}

/* Sets t->prompt to the file's prompt `name`. */
static int set_named(record_tokenizer *t, const qemb_file *f, const model_options *o,
                     const char *name, qemb_err *err) {
    char names[160];
    t->prompt = qemb_file_prompt(f, name);
    if (t->prompt) return 0;
    list_prompts(f, names, sizeof names);
    if (!*names)
        return qemb_fail(err, "model_file",
                         "%.128s: no prompts in the file (convert the model with --prompt "
                         "%.40s=TEXT, or give texts without a prompt)",
                         o->model, name);
    return qemb_fail(err, "model_file",
                     "%.128s: no prompt named %.40s (want --prompt with one of: "
                     "%s)",
                     o->model, name, names);
}

/* Sets t->prompt to what the options say: an embedding model's prompt, or a reranker's task. */
static int set_prompt(record_tokenizer *t, const qemb_file *f, const model_options *o,
                      qemb_err *err) {
    const int is_reranker = f->config.kind == QEMB_RERANKER;
    t->task_end = is_reranker ? "" : text_ids_task_end(f);
    const char *name = o->query ? "query" : is_reranker ? "instruct" : o->prompt;
    const char *document = o->document ? qemb_file_prompt(f, "document") : NULL;
    t->prompt = document ? document : "";
    if (o->instruct) {
        if (!t->task_end) return no_task(err, "--instruct", o->model);
        t->own_prompt =
            is_reranker ? strdup(o->instruct)
                        : text_ids_task_prompt(o->instruct, strlen(o->instruct), t->task_end, NULL);
        t->prompt = need(t->own_prompt);
        qemb_tokenizer_result r; /* invalid UTF-8 in it would fail every text */
        qemb_err why;
        if (qemb_tokenizer_encode(t->text.state, t->prompt, strlen(t->prompt), SIZE_MAX, &r, &why))
            return qemb_fail(err, "usage", "--instruct: %s", why.msg);
    } else if (name && set_named(t, f, o, name, err)) {
        return -1;
    }
    t->prompt_len = strlen(t->prompt);
    return 0;
}

/* The names that public APIs have for what a text is for, and the prompts for it. */
static const struct {
    const char *purpose, *prompts[2]; /* the first that the model has */
    int optional;                     /* 1: a model without them needs none */
} purposes[] = {{"query", {"query"}, 0},
                {"search_query", {"query"}, 0},
                {"retrieval.query", {"query"}, 0},
                {"document", {"document", "passage"}, 1},
                {"passage", {"document", "passage"}, 1},
                {"search_document", {"document", "passage"}, 1},
                {"retrieval.passage", {"document", "passage"}, 1}};

const char *prompt_named(const qemb_file *f, const char *name, qemb_err *err) {
    char names[160];
    const char *prompt = qemb_file_prompt(f, name);
    if (prompt) return prompt;
    list_prompts(f, names, sizeof names);
    qemb_fail(err, "unknown_prompt", "the model has no such prompt (got %.40s, want %s)", name,
              *names ? names : "none, since it has no prompts");
    return NULL;
}

const char *prompt_for(const qemb_file *f, const char *purpose, qemb_err *err) {
    for (int i = 0; i < LENGTH(purposes); i++) {
        if (strcmp(purpose, purposes[i].purpose)) continue;
        const char *prompt = NULL;
        for (int k = 0; k < LENGTH(purposes[i].prompts) && purposes[i].prompts[k] && !prompt; k++)
            prompt = qemb_file_prompt(f, purposes[i].prompts[k]);
        if (prompt) return prompt;
        if (purposes[i].optional) return "";
    }
    return prompt_named(f, purpose, err);
}

int record_tokenizer_open(record_tokenizer *t, const model_file *m, const model_options *o,
                          const record_options *records, qemb_err *err) {
    const qemb_config *c = &m->file->config;
    const int max_tokens = o->engine.max_tokens, dim = records->dim;
    *t = (record_tokenizer){.truncate = o->truncate};
    if (max_tokens > c->max_positions)
        return qemb_fail(err, "usage", "--max-tokens: more than the model can (got %d, want 1..%d)",
                         max_tokens, c->max_positions);
    if (dim > qemb_dim(c))
        return qemb_fail(err, "usage", "--dim: out of range (got %d, want 1..%d)", dim,
                         qemb_dim(c));
    t->dim = dim ? dim : qemb_dim(c);
    t->one_dim = records->one_dim;
    if (text_ids_open(&t->text, m->file, m->tokenizer, max_tokens, err)) return -1;
    if (records->jsonl) t->parser = need(input_parser_new(c->vocab, qemb_dim(c)));
    if (records->keep) input_parser_keep(t->parser);
    return set_prompt(t, m->file, o, err);
}

void record_tokenizer_close(record_tokenizer *t) {
    text_ids_close(&t->text);
    input_parser_free(t->parser);
    free(t->own_prompt);
}

/* The result of a call of text_ids.h that returned n. */
static int give_ids(const record_tokenizer *t, int n, record_ids *out) {
    if (n < 0) return -1;
    out->ids = t->text.ids;
    out->n = n;
    return 0;
}

int tokenize_behind(record_tokenizer *t, const char *prompt, size_t prompt_len, const char *text,
                    size_t len, record_ids *out, qemb_err *err) {
    const char *const run[] = {prompt, text};
    const size_t run_len[] = {prompt_len, len};
    size_t *cut = t->truncate ? &out->cut_bytes : NULL;
    return give_ids(t, text_ids_encode(&t->text, run, run_len, 2, cut, err), out);
}

int tokenize_text(record_tokenizer *t, const char *text, size_t len, const char *instruct,
                  size_t instruct_len, record_ids *out, qemb_err *err) {
    size_t *cut = t->truncate ? &out->cut_bytes : NULL;
    if (!instruct) return tokenize_behind(t, t->prompt, t->prompt_len, text, len, out, err);
    if (instruct_len && !t->task_end) return no_task(err, "instruct", "this model");
    const char *const own[] = {TASK_START, instruct, t->task_end, text};
    const size_t own_len[] = {sizeof TASK_START - 1, instruct_len,
                              t->task_end ? strlen(t->task_end) : 0, len};
    const int first = instruct_len ? 0 : 3; /* "": no prompt */
    return give_ids(t, text_ids_encode(&t->text, own + first, own_len + first, 4 - first, cut, err),
                    out);
}

int tokenize_pair(record_tokenizer *t, const text_pair *pair, int max_document, record_ids *out,
                  qemb_err *err) {
    text_pair p = *pair;
    if (!p.task) p.task = t->prompt, p.task_len = t->prompt_len;
    size_t *cut = t->truncate ? &out->cut_bytes : NULL;
    return give_ids(t, text_ids_pair(&t->text, &p, max_document, cut, err), out);
}

int tokenize_ids(record_tokenizer *t, const int32_t *ids, size_t n, record_ids *out,
                 qemb_err *err) {
    size_t *cut = t->truncate ? &out->cut_tokens : NULL;
    return give_ids(t, text_ids_take(&t->text, ids, n, cut, err), out);
}

int tokenize_record(record_tokenizer *t, const input_record *r, record_ids *out, qemb_err *err) {
    *out = (record_ids){.dim = t->dim};
    if (r->too_large)
        return qemb_fail(err, "out_of_memory", "record: no memory for a line so long");
    if (!t->parser) return tokenize_text(t, r->text, r->len, NULL, 0, out, err);
    input_object in;
    const int bad = input_parse(t->parser, r->text, r->len, &in, err);
    out->id = in.id, out->id_len = in.id_len;
    out->kept = in.kept, out->kept_len = in.kept_len;
    if (bad) return -1;
    if (in.dim && t->one_dim && in.dim != t->dim)
        return qemb_fail(err, "bad_dim",
                         "\"dim\": all vectors of this output are alike "
                         "(got %d, want %d)",
                         in.dim, t->dim);
    if (in.dim) out->dim = in.dim;
    if (in.ids) return tokenize_ids(t, in.ids, in.n_ids, out, err);
    return tokenize_text(t, in.text, in.text_len, in.instruct, in.instruct_len, out, err);
}
