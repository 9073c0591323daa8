/* tokenizer_kinds.c - the functions of qemb.h that serve both kinds of tokenizer. */
#include "lib/tokenizer.h"

void qemb_tokenizer_close(qemb_tokenizer *t) {
    if (t) t->kind->close(t);
}

uint32_t qemb_tokenizer_n_ids(const qemb_tokenizer *t) { return t->n_ids; }

qemb_tokenizer_state *qemb_tokenizer_state_new(const qemb_tokenizer *t) {
    return t->kind->state_new(t);
}

void qemb_tokenizer_state_free(qemb_tokenizer_state *s) {
    if (s) s->kind->state_free(s);
}

int qemb_tokenizer_encode(qemb_tokenizer_state *s, const char *text, size_t len, size_t limit,
                          qemb_tokenizer_result *r, qemb_err *err) {
    return s->kind->encode(s, text, len, limit, r, err);
}

size_t qemb_tokenizer_token_bytes(const qemb_tokenizer *t, uint32_t id, uint8_t *buf, size_t cap) {
    return t->kind->token_bytes(t, id, buf, cap);
}
