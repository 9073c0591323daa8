/* tokenizer.h - what the two kinds of tokenizer share: tokenizer.c (byte-level BPE) and
 * lib/unigram.c. lib/tokenizer_kinds.c has the functions of qemb.h that serve both. */
#ifndef TOKENIZER_H
#define TOKENIZER_H

#include "qemb.h"

#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the tokenizers read words of text and numbers of sections as little-endian"
#endif

/* What a kind does for the function qemb_tokenizer_* of the same name. */
typedef struct {
    void (*close)(qemb_tokenizer *t);
    qemb_tokenizer_state *(*state_new)(const qemb_tokenizer *t);
    void (*state_free)(qemb_tokenizer_state *s);
    int (*encode)(qemb_tokenizer_state *s, const char *text, size_t len, size_t limit,
                  qemb_tokenizer_result *r, qemb_err *err);
    size_t (*token_bytes)(const qemb_tokenizer *t, uint32_t id, uint8_t *buf, size_t cap);
} tokenizer_kind;

/* The first member of each kind's own struct. */
struct qemb_tokenizer {
    const tokenizer_kind *kind;
    uint32_t n_ids;
};
struct qemb_tokenizer_state {
    const tokenizer_kind *kind;
};

enum {
    TOKENIZER_WORD_MAX = 1 << 23,   /* bytes of a word: the longest text, 32,768 tokens, has no
                                       more */
    TOKENIZER_KEEP_BYTES = 4 << 20, /* of each array in a state, from one text to the next */
};

static inline uint64_t load64(const void *p) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline uint32_t load32(const void *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void set_bit(uint64_t *bits, size_t i) { bits[i >> 6] |= UINT64_C(1) << (i & 63); }
static inline int get_bit(const uint64_t *bits, size_t i) { return bits[i >> 6] >> (i & 63) & 1; }

static inline int tokenizer_no_memory(qemb_err *err, const char *what) {
    return qemb_fail(err, "out_of_memory", "tokenizer: no memory for %s", what);
}

static inline int tokenizer_word_too_long(qemb_err *err, size_t n) {
    return qemb_fail(err, "too_long", "text: a word too long (got %zu bytes, want at most %d)", n,
                     TOKENIZER_WORD_MAX);
}

static inline int tokenizer_invalid_utf8(qemb_err *err, size_t at, uint8_t byte) {
    return qemb_fail(err, "invalid_utf8",
                     "text: invalid UTF-8 at byte %zu (got 0x%02X, want a character)", at, byte);
}

/* Makes *array hold need elements of size bytes, keeping what is there. -1: out of memory. */
static inline int reserve(void *array, size_t *cap, size_t need, size_t size) {
    void *grown;
    if (need <= *cap) return 0;
    if (need > SIZE_MAX / 2 / size) return -1;
    need += need / 2;
    memcpy(&grown, array, sizeof grown); /* array points to a pointer of any type */
    grown = realloc(grown, need * size);
    if (!grown) return -1;
    memcpy(array, &grown, sizeof grown);
    *cap = need;
    return 0;
}

/* Frees an array that has grown over TOKENIZER_KEEP_BYTES for an unusually long text. */
static inline void trim(void *array, size_t *cap, size_t size) {
    void *old, *none = NULL;
    if (*cap <= TOKENIZER_KEEP_BYTES / size) return;
    memcpy(&old, array, sizeof old);
    free(old);
    memcpy(array, &none, sizeof none);
    *cap = 0;
}

#endif
