/* cache.c - an LRU cache of vectors; see cache.h. */
#include "cache.h"

#include "frontends/console.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef struct entry {
    struct entry *next;          /* in its bucket */
    struct entry *newer, *older; /* by last use */
    vector *vector;
    uint8_t key[KEY_BYTES];
} entry;

struct cache {
    pthread_mutex_t lock;
    size_t max_bytes, bytes;
    entry **buckets; /* (n_buckets, a power of two) */
    size_t n_buckets, n;
    entry *newest, *oldest;
};

/* Bytes of an entry, with about 16 per object for the allocator. */
static size_t entry_bytes(const vector *v) {
    return sizeof(entry) + sizeof *v + (size_t)v->n * sizeof *v->v + 32 + sizeof(entry *);
}

cache *cache_new(size_t max_bytes) {
    cache *c = calloc(1, sizeof *c);
    if (!c) return NULL;
    c->n_buckets = 1024;
    c->buckets = calloc(c->n_buckets, sizeof *c->buckets);
    if (!c->buckets) {
        free(c);
        return NULL;
    }
    c->max_bytes = max_bytes;
    pthread_mutex_init(&c->lock, NULL);
    return c;
}

static entry **place(const cache *c, const uint8_t *key) {
    uint64_t h; /* the key is a digest, so any of its bits serve as a hash */
    memcpy(&h, key, sizeof h);
    entry **p = &c->buckets[h & (c->n_buckets - 1)];
    while (*p && memcmp((*p)->key, key, KEY_BYTES)) p = &(*p)->next;
    return p;
}

static void unlink_entry(cache *c, entry *e) {
    *(e->newer ? &e->newer->older : &c->newest) = e->older;
    *(e->older ? &e->older->newer : &c->oldest) = e->newer;
}

static void link_newest(cache *c, entry *e) {
    e->newer = NULL;
    e->older = c->newest;
    *(c->newest ? &c->newest->newer : &c->oldest) = e;
    c->newest = e;
}

static void drop_oldest(cache *c) {
    entry *e = c->oldest;
    *place(c, e->key) = e->next;
    unlink_entry(c, e);
    c->bytes -= entry_bytes(e->vector);
    c->n--;
    vector_drop(e->vector);
    free(e);
}

/* Doubles the buckets. If memory runs out the cache keeps the old ones and is slower. */
static void grow(cache *c) {
    const size_t n = 2 * c->n_buckets;
    entry **old = c->buckets, **buckets = calloc(n, sizeof *buckets);
    if (!buckets) return;
    const size_t n_old = c->n_buckets;
    c->buckets = buckets;
    c->n_buckets = n;
    for (size_t i = 0; i < n_old; i++)
        for (entry *e = old[i], *next; e; e = next) {
            next = e->next;
            e->next = NULL;
            *place(c, e->key) = e;
        }
    free(old);
}

vector *cache_get(cache *c, const uint8_t key[KEY_BYTES]) {
    pthread_mutex_lock(&c->lock);
    entry *e = *place(c, key);
    vector *v = NULL;
    if (e) {
        unlink_entry(c, e);
        link_newest(c, e);
        v = vector_take(e->vector);
    }
    pthread_mutex_unlock(&c->lock);
    return v;
}

void cache_put(cache *c, const uint8_t key[KEY_BYTES], vector *v) {
    const size_t bytes = entry_bytes(v);
    if (bytes > c->max_bytes) return;
    entry *new = malloc(sizeof *new);
    pthread_mutex_lock(&c->lock);
    entry **p = place(c, key);
    if (new && !*p) {
        *new = (entry){.vector = vector_take(v)};
        memcpy(new->key, key, KEY_BYTES);
        *p = new;
        link_newest(c, new);
        c->bytes += bytes;
        c->n++;
        new = NULL;
        while (c->bytes > c->max_bytes) drop_oldest(c);
        if (c->n > c->n_buckets) grow(c);
    }
    pthread_mutex_unlock(&c->lock);
    free(new);
}

size_t cache_bytes(cache *c) {
    pthread_mutex_lock(&c->lock);
    const size_t bytes = c->bytes;
    pthread_mutex_unlock(&c->lock);
    return bytes;
}

void cache_clear(cache *c) {
    pthread_mutex_lock(&c->lock);
    while (c->oldest) drop_oldest(c);
    pthread_mutex_unlock(&c->lock);
}

void cache_free(cache *c) {
    if (!c) return;
    while (c->oldest) drop_oldest(c);
    pthread_mutex_destroy(&c->lock);
    free(c->buckets);
    free(c);
}
