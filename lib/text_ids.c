/* text_ids.c - a text and its prompt -> token ids; see text_ids.h. */
#include "text_ids.h"

#include <stdlib.h>
#include <string.h>

/* A larger string, joined for a rare long text, is freed before the next one. */
#define JOINED_KEPT ((size_t)4 << 20)

void text_ids_close(text_ids *t) {
    qemb_tokenizer_state_free(t->state);
    free(t->joined);
    free(t->ids);
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

/* t->ids = ids (n) and the end-of-text token, which is appended here alone. */
static int set_ids(text_ids *t, const int32_t *ids, size_t n, qemb_err *err) {
    if (n + 1 > t->ids_cap) {
        int32_t *grown = realloc(t->ids, 2 * (n + 1) * sizeof *t->ids);
        if (!grown) return qemb_fail(err, "out_of_memory", "text: out of memory (%zu ids)", n);
        t->ids = grown;
        t->ids_cap = 2 * (n + 1);
    }
    if (n) memcpy(t->ids, ids, n * sizeof *ids);
    t->ids[n] = t->eos;
    return (int)n + 1;
}

static int too_long(const text_ids *t, qemb_err *err) {
    return qemb_fail(err, "too_long",
                     "text: too long (got more than %d tokens, want at most %d "
                     "with the end-of-text)",
                     t->max_tokens - 1, t->max_tokens);
}

int text_ids_encode(text_ids *t, const char *const part[], const size_t len[], int n, size_t *cut,
                    qemb_err *err) {
    const char *text = part[n - 1], *whole = text;
    const size_t text_len = len[n - 1];
    size_t total = 0;
    for (int i = 0; i < n; i++) total += len[i];
    /* Prompt and text are tokenized as one string, since a token may span their border. */
    if (total > text_len && !(whole = join(t, part, len, n, total)))
        return qemb_fail(err, "out_of_memory", "text: out of memory (%zu bytes)", text_len);
    qemb_tokenizer_result r;
    if (qemb_tokenizer_encode(t->state, whole, total, (size_t)t->max_tokens - 1, &r, err)) {
        /* The message has to count bytes from the beginning of the text, not of the prompt. */
        if (whole != text) qemb_tokenizer_encode(t->state, text, text_len, SIZE_MAX, &r, err);
        return -1;
    }
    if (r.bytes_left && !cut) return too_long(t, err);
    if (cut) *cut = r.bytes_left < text_len ? r.bytes_left : text_len;
    return set_ids(t, r.ids, r.n, err);
}

int text_ids_take(text_ids *t, const int32_t *ids, size_t n, size_t *cut, qemb_err *err) {
    const size_t most = (size_t)t->max_tokens - 1;
    if (n && ids[n - 1] == t->eos) n--;
    if (n > most && !cut) return too_long(t, err);
    if (cut) *cut = n > most ? n - most : 0;
    return set_ids(t, ids, n > most ? most : n, err);
}
