/* record_tokenizer.c - a record of input -> token ids; see record_tokenizer.h. */
#include "record_tokenizer.h"

#include "console.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char query_start[] = "Instruct: ", query_end[] = "\nQuery:";

/* Sets t->prompt from the options. */
static int set_prompt(record_tokenizer *t, const qemb_file *f, const model_options *o,
                      qemb_err *err) {
    t->prompt = "";
    if (o->query) {
        t->prompt = qemb_file_prompt(f, "query");
        if (!t->prompt)
            return qemb_fail(err, "model_file",
                             "%.128s: no prompt named query (want --instruct TASK)", o->model);
    } else if (o->instruct) {
        const size_t room = sizeof query_start + sizeof query_end + strlen(o->instruct);
        t->prompt = t->own_prompt = need(malloc(room));
        snprintf(t->own_prompt, room, "%s%s%s", query_start, o->instruct, query_end);
        qemb_tokenizer_result r; /* invalid UTF-8 in it would fail every text */
        qemb_err why;
        if (qemb_tokenizer_encode(t->state, t->prompt, strlen(t->prompt), SIZE_MAX, &r, &why))
            return qemb_fail(err, "usage", "--instruct: %s", why.msg);
    }
    t->prompt_len = strlen(t->prompt);
    return 0;
}

int record_tokenizer_open(record_tokenizer *t, const model_file *m, const model_options *o,
                          const record_options *records, qemb_err *err) {
    const qemb_config *c = &m->file->config;
    const int max_tokens = o->engine.max_tokens, dim = records->dim;
    *t = (record_tokenizer){.eos = c->eos_id, .truncate = o->truncate};
    if (max_tokens > c->max_positions)
        return qemb_fail(err, "usage", "--max-tokens: more than the model can (got %d, want 1..%d)",
                         max_tokens, c->max_positions);
    if (dim > c->hidden)
        return qemb_fail(err, "usage", "--dim: out of range (got %d, want 1..%d)", dim, c->hidden);
    t->max_tokens = max_tokens ? max_tokens : c->max_positions;
    t->dim = dim ? dim : c->hidden;
    t->one_dim = records->one_dim;
    t->state = need(qemb_tokenizer_state_new(m->tokenizer));
    if (records->jsonl) t->parser = need(input_parser_new(c->vocab, c->hidden));
    return set_prompt(t, m->file, o, err);
}

void record_tokenizer_close(record_tokenizer *t) {
    qemb_tokenizer_state_free(t->state);
    input_parser_free(t->parser);
    free(t->own_prompt);
    free(t->joined);
    free(t->ids);
}

/* Joins the parts at t->joined. Returns the end of the string, or NULL if out of memory. */
static char *join(record_tokenizer *t, const char *const part[], const size_t len[], int n) {
    size_t total = 0;
    for (int i = 0; i < n; i++) total += len[i];
    if (total > t->joined_cap ||
        t->joined_cap > (size_t)4 << 20) { /* free what a rare long text needed */
        free(t->joined);
        t->joined_cap = total < 65536 ? 65536 : total;
        t->joined = malloc(t->joined_cap);
        if (!t->joined) t->joined_cap = 0;
    }
    char *p = t->joined;
    for (int i = 0; p && i < n; i++) {
        memcpy(p, part[i], len[i]);
        p += len[i];
    }
    return p;
}

/* out = ids (n) and the end-of-text token. It is appended here alone. */
static int set_ids(record_tokenizer *t, const int32_t *ids, size_t n, record_ids *out,
                   qemb_err *err) {
    if (n + 1 > t->ids_cap) {
        int32_t *grown = realloc(t->ids, 2 * (n + 1) * sizeof *t->ids);
        if (!grown) return qemb_fail(err, "out_of_memory", "text: out of memory (%zu ids)", n);
        t->ids = grown;
        t->ids_cap = 2 * (n + 1);
    }
    if (n) memcpy(t->ids, ids, n * sizeof *ids);
    t->ids[n] = t->eos;
    out->ids = t->ids;
    out->n = (int)n + 1;
    return 0;
}

static int too_long(const record_tokenizer *t, qemb_err *err) {
    return qemb_fail(err, "too_long",
                     "text: too long (got more than %d tokens, want at most %d "
                     "with the end-of-text)",
                     t->max_tokens - 1, t->max_tokens);
}

int tokenize_text(record_tokenizer *t, const char *text, size_t len, const char *instruct,
                  size_t instruct_len, record_ids *out, qemb_err *err) {
    const char *whole = text;
    size_t whole_len = len;
    const char *const run[] = {t->prompt, text};
    const size_t run_len[] = {t->prompt_len, len};
    const char *const own[] = {query_start, instruct, query_end, text};
    const size_t own_len[] = {sizeof query_start - 1, instruct_len, sizeof query_end - 1, len};
    if (instruct ? instruct_len : t->prompt_len) {
        const char *end = instruct ? join(t, own, own_len, 4) : join(t, run, run_len, 2);
        if (!end) return qemb_fail(err, "out_of_memory", "text: out of memory (%zu bytes)", len);
        whole = t->joined;
        whole_len = (size_t)(end - whole);
    }
    qemb_tokenizer_result r;
    if (qemb_tokenizer_encode(t->state, whole, whole_len, (size_t)t->max_tokens - 1, &r, err)) {
        /* The message has to count bytes from the beginning of the text, not of the prompt. */
        if (whole != text) qemb_tokenizer_encode(t->state, text, len, SIZE_MAX, &r, err);
        return -1;
    }
    if (r.bytes_left && !t->truncate) return too_long(t, err);
    out->cut_bytes = r.bytes_left < len ? r.bytes_left : len;
    return set_ids(t, r.ids, r.n, out, err);
}

int tokenize_ids(record_tokenizer *t, const int32_t *ids, size_t n, record_ids *out,
                 qemb_err *err) {
    const int ends = n && ids[n - 1] == t->eos;
    const size_t most = (size_t)t->max_tokens, body = n - (size_t)ends;
    if (body + 1 > most && !t->truncate) return too_long(t, err);
    out->cut_tokens = body + 1 > most ? body + 1 - most : 0;
    return set_ids(t, ids, body - out->cut_tokens, out, err);
}

int tokenize_record(record_tokenizer *t, const input_record *r, record_ids *out, qemb_err *err) {
    *out = (record_ids){.dim = t->dim};
    if (r->too_large)
        return qemb_fail(err, "out_of_memory", "record: no memory for a line so long");
    if (!t->parser) return tokenize_text(t, r->text, r->len, NULL, 0, out, err);
    input_object in;
    const int bad = input_parse(t->parser, r->text, r->len, &in, err);
    out->id = in.id, out->id_len = in.id_len;
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
