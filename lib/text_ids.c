/* text_ids.c - a text and its prompt -> token ids; see text_ids.h. */
#include "text_ids.h"

#include <stdlib.h>
#include <string.h>

/* A larger string, joined for a rare long text, is freed before the next one. */
#define JOINED_KEPT ((size_t)4 << 20)

static int n_added(const text_ids *t) { return t->n_head + t->n_tail; }

/* Appends ids (n) to t->added. */
static int add(text_ids *t, const int32_t *ids, size_t n, qemb_err *err) {
    const size_t old = (size_t)n_added(t);
    int32_t *grown = realloc(t->added, (old + n + 1) * sizeof *grown);
    if (!grown) return qemb_fail(err, "out_of_memory", "tokens: out of memory");
    if (n) memcpy(grown + old, ids, n * sizeof *ids);
    t->added = grown;
    return 0;
}

static int add_prompt(text_ids *t, const qemb_file *f, const char *name, int *n, qemb_err *err) {
    const char *s = qemb_file_prompt(f, name);
    qemb_tokenizer_result r;
    if (qemb_tokenizer_encode(t->state, s, strlen(s), SIZE_MAX, &r, err) || add(t, r.ids, r.n, err))
        return -1;
    *n = (int)r.n;
    return 0;
}

static int set_added(text_ids *t, const qemb_file *f, qemb_err *err) {
    const int32_t bos = f->config.bos_id, eos = f->config.eos_id;
    if (f->config.kind == QEMB_RERANKER)
        return add_prompt(t, f, "prefix", &t->n_head, err) ||
               add_prompt(t, f, "suffix", &t->n_tail, err);
    if (bos != QEMB_NO_TOKEN && add(t, &bos, 1, err)) return -1;
    t->n_head = bos != QEMB_NO_TOKEN;
    if (eos != QEMB_NO_TOKEN && add(t, &eos, 1, err)) return -1;
    t->n_tail = eos != QEMB_NO_TOKEN;
    t->with = t->n_head ? " with the tokens around the text" : " with the end-of-text";
    return 0;
}

int text_ids_open(text_ids *t, const qemb_file *f, const qemb_tokenizer *tokenizer, int max_tokens,
                  qemb_err *err) {
    *t = (text_ids){.state = qemb_tokenizer_state_new(tokenizer),
                    .max_tokens = max_tokens ? max_tokens : qemb_window(&f->config)};
    int bad = 0;
    if (!t->state) bad = qemb_fail(err, "out_of_memory", "tokenizer: out of memory");
    bad = bad || set_added(t, f, err);
    const int is_reranker = f->config.kind == QEMB_RERANKER, least = n_added(t) + is_reranker;
    if (!bad && t->max_tokens < least)
        bad =
            qemb_fail(err, "usage",
                      "longest text: no room beside the %d tokens of %s (got %d, want %d or more)",
                      n_added(t), is_reranker ? "the prompt" : "every text", t->max_tokens, least);
    if (bad) text_ids_close(t);
    return bad ? -1 : 0;
}

void text_ids_close(text_ids *t) {
    qemb_tokenizer_state_free(t->state);
    free(t->added);
    free(t->joined);
    free(t->ids);
    *t = (text_ids){0};
}

const char *text_ids_task_end(const qemb_file *f) {
    static const char usual[] = "\nQuery:";
    int others = f->config.architecture != QEMB_QWEN3;
    for (int i = 0; i < f->n_prompts; i++) {
        const char *s = f->prompts[i].text, *end = strstr(s, usual);
        if (end && !strncmp(s, TASK_START, sizeof TASK_START - 1) &&
            !end[sizeof usual - 1 + strspn(end + sizeof usual - 1, " ")])
            return end;
        others |= *s != 0;
    }
    return others ? NULL : usual;
}

char *text_ids_task_prompt(const char *task, size_t len, const char *end, size_t *prompt_len) {
    const size_t before = sizeof TASK_START - 1, after = strlen(end);
    char *prompt = malloc(before + len + after + 1);
    if (!prompt) return NULL;
    memcpy(prompt, TASK_START, before);
    memcpy(prompt + before, task, len);
    memcpy(prompt + before + len, end, after + 1);
    if (prompt_len) *prompt_len = before + len + after;
    return prompt;
}

/* The parts (total bytes) as one string, valid until the next call. NULL: out of memory. */
static const char *join(text_ids *t, const char *const part[], const size_t len[], int n,
                        size_t total) {
    if (total > t->joined_cap || t->joined_cap > JOINED_KEPT) {
        free(t->joined);
        t->joined_cap = total < 65536 ? 65536 : total;
        t->joined = malloc(t->joined_cap);
        if (!t->joined) t->joined_cap = 0;
    }
    char *p = t->joined;
    for (int i = 0; p && i < n; i++) {
        if (len[i]) memcpy(p, part[i], len[i]);
        p += len[i];
    }
    return t->joined;
}

/* t->ids = ids (n) between the added tokens. */
static int set_ids(text_ids *t, const int32_t *ids, size_t n, qemb_err *err) {
    const size_t head = (size_t)t->n_head, tail = (size_t)t->n_tail, all = head + n + tail;
    if (!all) return qemb_fail(err, "empty_text", "text: no tokens, and this model adds none");
    if (all > t->ids_cap) {
        int32_t *grown = realloc(t->ids, 2 * all * sizeof *t->ids);
        if (!grown) return qemb_fail(err, "out_of_memory", "text: out of memory (%zu ids)", n);
        t->ids = grown;
        t->ids_cap = 2 * all;
    }
    if (head) memcpy(t->ids, t->added, head * sizeof *ids);
    if (n) memcpy(t->ids + head, ids, n * sizeof *ids);
    if (tail) memcpy(t->ids + head + n, t->added + head, tail * sizeof *ids);
    return (int)all;
}

/* The most tokens of a text beside the added ones. */
static size_t most_ids(const text_ids *t) { return (size_t)(t->max_tokens - n_added(t)); }

static int too_long(const text_ids *t, qemb_err *err) {
    if (!t->with)
        return qemb_fail(err, "too_long",
                         "text: too long (got more than %zu tokens beside the prompt's %d, want at "
                         "most %d in all)",
                         most_ids(t), n_added(t), t->max_tokens);
    return qemb_fail(err, "too_long",
                     "text: too long (got more than %zu tokens, want at most %d%s)", most_ids(t),
                     t->max_tokens, n_added(t) ? t->with : "");
}

/* Tokenizes the n parts as one string, up to `most` ids. *left gets the bytes of the last part, the
 * text, that they do not cover. */
static int encode(text_ids *t, const char *const part[], const size_t len[], int n, size_t most,
                  qemb_tokenizer_result *r, size_t *left, qemb_err *err) {
    const char *text = part[n - 1], *whole = text;
    const size_t text_len = len[n - 1];
    size_t total = 0;
    for (int i = 0; i < n; i++) total += len[i];
    /* The parts are tokenized as one string, since a token may span their border. */
    if (total > text_len && !(whole = join(t, part, len, n, total)))
        return qemb_fail(err, "out_of_memory", "text: out of memory (%zu bytes)", text_len);
    if (qemb_tokenizer_encode(t->state, whole, total, most, r, err)) {
        /* The message has to count bytes from the beginning of the text, not of the prompt. */
        if (whole != text) qemb_tokenizer_encode(t->state, text, text_len, SIZE_MAX, r, err);
        return -1;
    }
    *left = r->bytes_left < text_len ? r->bytes_left : text_len;
    return 0;
}

int text_ids_encode(text_ids *t, const char *const part[], const size_t len[], int n, size_t *cut,
                    qemb_err *err) {
    qemb_tokenizer_result r;
    size_t left = 0;
    if (encode(t, part, len, n, most_ids(t), &r, &left, err)) return -1;
    if (r.bytes_left && !cut) return too_long(t, err);
    if (cut) *cut = left;
    return set_ids(t, r.ids, r.n, err);
}

int text_ids_pair(text_ids *t, const text_pair *p, int max_document, size_t *cut, qemb_err *err) {
    static const char instruct[] = "<Instruct>: ", query[] = "\n<Query>: ";
    static const char document[] = "\n<Document>:"; /* its space belongs to the document's tokens */
    const char *const part[] = {instruct, p->task, query, p->query, document, " ", p->document};
    const size_t len[] = {sizeof instruct - 1, p->task_len, sizeof query - 1, p->query_len,
                          sizeof document - 1, 1,           p->document_len};
    qemb_tokenizer_result r;
    size_t left = 0, most = most_ids(t);
    int limited = 0;
    if (max_document) { /* it counts from the end of the pair without its document */
        if (encode(t, part, len, 5, most, &r, &left, err)) return -1;
        limited = r.n + (size_t)max_document <= most;
        if (limited) most = r.n + (size_t)max_document;
    }
    if (encode(t, part, len, 7, most, &r, &left, err)) return -1;
    if (r.bytes_left && !limited && !cut) {
        if (encode(t, part, len, 5, most, &r, &left, err)) return -1;
        if (!r.bytes_left && r.n < most) return too_long(t, err);
        return qemb_fail(
            err, "query_too_long",
            "query: too long for any document (got more than %zu tokens with the task, "
            "beside the prompt's %d, want at most %d in all)",
            most, n_added(t), t->max_tokens);
    }
    if (cut) *cut = limited ? 0 : left;
    return set_ids(t, r.ids, r.n, err);
}

int text_ids_take(text_ids *t, const int32_t *ids, size_t n, size_t *cut, qemb_err *err) {
    const size_t most = most_ids(t);
    if (n && t->n_head && ids[0] == t->added[0]) ids++, n--;
    if (n && t->n_tail && ids[n - 1] == t->added[t->n_head]) n--;
    if (n > most && !cut) return too_long(t, err);
    if (cut) *cut = n > most ? n - most : 0;
    return set_ids(t, ids, n > most ? most : n, err);
}
