/* word_cache.h - the ids of words that were tokenized before, for one thread.
 *
 * Two tables: words of up to 15 bytes with up to 4 ids, and words of up to 31 bytes with up to 8.
 * An entry has a key of W 64-bit words, which are the word's bytes and, in the last byte, its
 * length; then 2 W ids, the first of which carries their number. An empty entry's length is 0. Two
 * entries make a bucket; a new entry goes to the front and replaces the one at the back. */
#ifndef WORD_CACHE_H
#define WORD_CACHE_H

#include "lib/tokenizer.h"

enum {
    WORD_CACHE_MAX = 31,         /* bytes of a word */
    WORD_CACHE_SHORT = 15,       /* bytes of a word for the first table */
    WORD_CACHE_SHORT_BITS = 16,  /* entries of 32 bytes: 2 MiB */
    WORD_CACHE_LONG_BITS = 14,   /* entries of 64 bytes: 1 MiB */
    WORD_CACHE_IDS = 8,          /* room that a hit needs */
    WORD_CACHE_COUNT_SHIFT = 24, /* bits of an entry's first id from here on: the number of ids */
};

#define GOLDEN UINT64_C(0x9E3779B97F4A7C15) /* 2^64 / golden ratio: spreads a multiplied key */

typedef struct {
    uint64_t *few, *more; /* the two tables */
} word_cache;

/* A word to be looked up. */
typedef struct {
    const uint8_t *p; /* WORD_CACHE_MAX + 1 bytes can be read */
    size_t n;
    uint64_t *bucket;
    uint64_t key[4];
} cached_word;

/* -1: out of memory. */
static inline int word_cache_new(word_cache *c) {
    c->few = calloc((size_t)1 << WORD_CACHE_SHORT_BITS, 4 * sizeof *c->few);
    c->more = calloc((size_t)1 << WORD_CACHE_LONG_BITS, 8 * sizeof *c->more);
    return c->few && c->more ? 0 : -1;
}

static inline void word_cache_free(word_cache *c) {
    free(c->few);
    free(c->more);
}

/* word_cache_find for a table whose keys have W words. */
static inline void word_cache_find_in(uint64_t *table, cached_word *w, const unsigned W,
                                      const unsigned bits) {
    /* 32 bytes of ones, then 32 of zeros: at 32 - n begin n ones */
    static const uint64_t ones[8] = {~UINT64_C(0), ~UINT64_C(0), ~UINT64_C(0), ~UINT64_C(0)};
    const uint8_t *mask = (const uint8_t *)ones + 32 - w->n;
    uint64_t hash = 0;
    for (unsigned i = 0; i < W; i++) {
        w->key[i] = load64(w->p + 8 * i) & load64(mask + 8 * i);
        if (i == W - 1) w->key[i] |= (uint64_t)w->n << 56;
        hash = (hash ^ w->key[i]) * GOLDEN;
        hash ^= hash >> 32;
    }
    w->bucket = table + (size_t)(hash * GOLDEN >> (65 - bits)) * 4 * W;
    __builtin_prefetch(w->bucket);
    if (W == 4) __builtin_prefetch(w->bucket + 2 * W);
}

/* Finds the key and bucket of w, of up to WORD_CACHE_MAX bytes, and prefetches the bucket. */
static inline void word_cache_find(const word_cache *c, cached_word *w) {
    if (w->n <= WORD_CACHE_SHORT)
        word_cache_find_in(c->few, w, 2, WORD_CACHE_SHORT_BITS);
    else
        word_cache_find_in(c->more, w, 4, WORD_CACHE_LONG_BITS);
}

static inline size_t word_cache_get_in(const cached_word *w, const unsigned W, uint32_t *ids) {
    for (uint64_t *e = w->bucket; e <= w->bucket + 2 * W; e += 2 * W) {
        uint64_t differs = 0;
        for (unsigned i = 0; i < W; i++) differs |= e[i] ^ w->key[i];
        if (differs) continue;
        memcpy(ids, e + W, 8 * W);
        const size_t k = ids[0] >> WORD_CACHE_COUNT_SHIFT;
        ids[0] &= ((uint32_t)1 << WORD_CACHE_COUNT_SHIFT) - 1;
        return k;
    }
    return 0;
}

/* The ids of w, whose bucket was found, into ids, which has room for WORD_CACHE_IDS. Returns how
 * many; 0: not there. */
static inline size_t word_cache_get(const cached_word *w, uint32_t *ids) {
    return w->n <= WORD_CACHE_SHORT ? word_cache_get_in(w, 2, ids) : word_cache_get_in(w, 4, ids);
}

/* Keeps the ids (k > 0), each below 2^WORD_CACHE_COUNT_SHIFT, of w if an entry has the room. */
static inline void word_cache_put(const cached_word *w, const uint32_t *ids, size_t k) {
    const unsigned W = w->n <= WORD_CACHE_SHORT ? 2 : 4;
    uint64_t *bucket = w->bucket;
    if (k > 2 * W) return;
    const uint32_t first = ids[0] | (uint32_t)k << WORD_CACHE_COUNT_SHIFT;
    memcpy(bucket + 2 * W, bucket, 16 * W);
    memcpy(bucket, w->key, 8 * W);
    memset(bucket + W, 0, 8 * W);
    memcpy(bucket + W, ids, 4 * k);
    memcpy(bucket + W, &first, sizeof first);
}

#endif
