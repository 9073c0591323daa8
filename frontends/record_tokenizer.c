/* record_tokenizer.c - a record of input -> token ids; see frontend.h. */
#include "frontend.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char query_start[] = "Instruct: ", query_end[] = "\nQuery:";

int record_tokenizer_open(record_tokenizer *e, const source *s, const options *o, qemb_err *err) {
    const qemb_config *c = &s->file->config;
    *e = (record_tokenizer){.eos = c->eos_id, .truncate = o->truncate, .prompt = ""};
    if (o->engine.max_tokens > c->max_positions)
        return qemb_fail(err, "usage", "--max-tokens: more than the model can (got %d, want 1..%d)",
                         o->engine.max_tokens, c->max_positions);
    if (o->dim > c->hidden)
        return qemb_fail(err, "usage", "--dim: out of range (got %d, want 1..%d)", o->dim,
                         c->hidden);
    e->max_tokens = o->engine.max_tokens ? o->engine.max_tokens : c->max_positions;
    e->dim = o->dim ? o->dim : c->hidden;
    e->one_dim = !format_is_text(o->output);
    if (o->query) {
        e->prompt = qemb_file_prompt(s->file, "query");
        if (!e->prompt)
            return qemb_fail(err, "model_file",
                             "%.128s: no prompt named query (want --instruct TASK)", o->model);
    } else if (o->instruct) {
        const size_t room = sizeof query_start + sizeof query_end + strlen(o->instruct);
        e->prompt = e->own_prompt = need(malloc(room));
        snprintf(e->own_prompt, room, "%s%s%s", query_start, o->instruct, query_end);
    }
    e->prompt_len = strlen(e->prompt);
    e->state = need(qemb_tokenizer_state_new(s->tokenizer));
    qemb_tokenizer_result r; /* a prompt that is no UTF-8 should not be the fault of every text */
    qemb_err why;
    if (o->instruct &&
        qemb_tokenizer_encode(e->state, e->prompt, e->prompt_len, SIZE_MAX, &r, &why))
        return qemb_fail(err, "usage", "--instruct: %s", why.msg);
    if (o->jsonl) e->parser = need(input_parser_new(c->vocab, c->hidden));
    return 0;
}

void record_tokenizer_close(record_tokenizer *e) {
    qemb_tokenizer_state_free(e->state);
    input_parser_free(e->parser);
    free(e->own_prompt);
    free(e->joined);
}

/* The parts one after another at e->joined. Returns their end; NULL: out of memory. */
static char *join(record_tokenizer *e, const char *const part[], const size_t len[], int n) {
    size_t total = 0;
    for (int i = 0; i < n; i++) total += len[i];
    if (total > e->joined_cap || e->joined_cap > (size_t)4 << 20) { /* a rare long one: not kept */
        free(e->joined);
        e->joined_cap = total < 65536 ? 65536 : total;
        e->joined = malloc(e->joined_cap);
        if (!e->joined) e->joined_cap = 0;
    }
    char *p = e->joined;
    for (int i = 0; p && i < n; i++) {
        memcpy(p, part[i], len[i]);
        p += len[i];
    }
    return p;
}

static int too_long(const record_tokenizer *e, qemb_err *err) {
    return qemb_fail(err, "too_long",
                     "text: too long (got more than %d tokens, want at most %d "
                     "with the end-of-text)",
                     e->max_tokens - 1, e->max_tokens);
}

/* text (len) after the prompt of instruct (instruct_len), or the run's if instruct is NULL. */
int tokenize_text(record_tokenizer *e, const char *text, size_t len, const char *instruct,
                  size_t instruct_len, record_ids *out, qemb_err *err) {
    const char *whole = text;
    size_t whole_len = len;
    const char *const run[] = {e->prompt, text};
    const size_t run_len[] = {e->prompt_len, len};
    const char *const own[] = {query_start, instruct, query_end, text};
    const size_t own_len[] = {sizeof query_start - 1, instruct_len, sizeof query_end - 1, len};
    if (instruct ? instruct_len : e->prompt_len) {
        const char *end = instruct ? join(e, own, own_len, 4) : join(e, run, run_len, 2);
        if (!end) return qemb_fail(err, "out_of_memory", "text: out of memory (%zu bytes)", len);
        whole = e->joined;
        whole_len = (size_t)(end - whole);
    }
    qemb_tokenizer_result r;
    if (qemb_tokenizer_encode(e->state, whole, whole_len, (size_t)e->max_tokens - 1, &r, err)) {
        /* The byte that the message names should be counted from where the user's text begins. */
        if (whole != text) qemb_tokenizer_encode(e->state, text, len, SIZE_MAX, &r, err);
        return -1;
    }
    if (r.bytes_left && !e->truncate) return too_long(e, err);
    out->ids = r.ids;
    out->n = (int)r.n;
    out->cut_bytes = r.bytes_left < len ? r.bytes_left : len;
    return 0;
}

int tokenize_ids(const record_tokenizer *e, const int32_t *ids, size_t n, record_ids *out,
                 qemb_err *err) {
    const int ends = n && ids[n - 1] == e->eos;
    const size_t most = (size_t)e->max_tokens, body = n - (size_t)ends;
    if (body + 1 > most && !e->truncate) return too_long(e, err);
    out->cut_tokens = body + 1 > most ? body + 1 - most : 0;
    out->ids = ids;
    out->n = (int)(body - out->cut_tokens);
    return 0;
}

/* The token ids of a record. What *out points to lives until the next call. -1: out->id and id_len
 * are set all the same. */
int tokenize_record(record_tokenizer *e, const input_record *r, record_ids *out, qemb_err *err) {
    *out = (record_ids){.dim = e->dim};
    if (r->too_large)
        return qemb_fail(err, "out_of_memory", "record: no memory for a line so long");
    if (!e->parser) return tokenize_text(e, r->text, r->len, NULL, 0, out, err);
    input_object in;
    const int bad = input_parse(e->parser, r->text, r->len, &in, err);
    out->id = in.id, out->id_len = in.id_len;
    if (bad) return -1;
    if (in.dim && e->one_dim && in.dim != e->dim)
        return qemb_fail(err, "bad_dim",
                         "\"dim\": all vectors of this output are alike "
                         "(got %d, want %d)",
                         in.dim, e->dim);
    if (in.dim) out->dim = in.dim;
    if (in.ids) return tokenize_ids(e, in.ids, in.n_ids, out, err);
    return tokenize_text(e, in.text, in.text_len, in.instruct, in.instruct_len, out, err);
}
