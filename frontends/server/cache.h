/* cache.h - an LRU cache of vectors in memory. Thread-safe. */
#ifndef QEMB_CACHE_H
#define QEMB_CACHE_H

#include "queue.h"

typedef struct cache cache;

cache *cache_new(size_t max_bytes);                        /* NULL: out of memory */
void cache_free(cache *c);                                 /* c may be NULL */
vector *cache_get(cache *c, const uint8_t key[KEY_BYTES]); /* a reference, or NULL */
void cache_put(cache *c, const uint8_t key[KEY_BYTES], vector *v);
void cache_clear(cache *c);
size_t cache_bytes(cache *c);

#endif
