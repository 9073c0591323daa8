/* test_serve_cache.c - what the server's cache keeps, what it evicts, and in which order. */
#include "frontends/server/cache.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* A key. Keys with the same i % 1024 share a bucket. */
static const uint8_t *key(int i) {
    static _Thread_local uint8_t k[KEY_BYTES];
    memset(k, 0, sizeof k);
    k[0] = (uint8_t)i;
    k[1] = (uint8_t)(i >> 8 & 3);
    k[20] = (uint8_t)(i >> 10);
    k[21] = (uint8_t)(i >> 18);
    return k;
}

static void put(cache *c, int i) {
    vector *v = vector_new(&(float){(float)i}, 1);
    cache_put(c, key(i), v);
    vector_drop(v);
}

/* The number under key i, or -1. */
static int get(cache *c, int i) {
    vector *v = cache_get(c, key(i));
    const int x = v ? (int)v->v[0] : -1;
    vector_drop(v);
    return x;
}

static size_t entry_size(void) {
    cache *c = cache_new(1 << 20);
    put(c, 1);
    const size_t bytes = cache_bytes(c);
    cache_free(c);
    return bytes;
}

Test(serve_cache, finds_what_was_put) {
    cache *c = cache_new(10 << 20);
    for (int i = 0; i < 5000; i++) put(c, i); /* the table grows meanwhile */
    for (int i = 0; i < 5000; i++) cr_assert_eq(get(c, i), i);
    cr_expect_eq(get(c, 5000), -1);
    cr_expect_eq(cache_bytes(c), 5000 * entry_size());
    cache_free(c);
}

Test(serve_cache, the_least_recently_used_goes_first) {
    cache *c = cache_new(3 * entry_size());
    put(c, 1);
    put(c, 2);
    put(c, 3);
    cr_expect_eq(get(c, 1), 1); /* now 2 is the least recently used */
    put(c, 4);
    cr_expect(get(c, 2) == -1 && get(c, 1) == 1 && get(c, 3) == 3 && get(c, 4) == 4);
    put(c, 5);
    put(c, 6);
    cr_expect(get(c, 1) == -1 && get(c, 3) == -1 && get(c, 4) == 4);
    cr_expect_eq(cache_bytes(c), 3 * entry_size());
    cache_free(c);
}

Test(serve_cache, the_same_key_twice_counts_once) {
    cache *c = cache_new(1 << 20);
    put(c, 1);
    put(c, 1);
    cr_expect_eq(cache_bytes(c), entry_size());
    cache_free(c);
}

Test(serve_cache, what_is_too_large_stays_out) {
    cache *c = cache_new(entry_size());
    float many[64] = {1};
    vector *v = vector_new(many, 64);
    put(c, 1);
    cache_put(c, key(2), v);
    cr_expect(get(c, 1) == 1 && get(c, 2) == -1);
    vector_drop(v);
    cache_free(c);
}

Test(serve_cache, a_vector_outlives_its_entry) {
    cache *c = cache_new(entry_size());
    put(c, 1);
    vector *v = cache_get(c, key(1));
    put(c, 2);
    cr_expect_eq(get(c, 1), -1);
    cache_free(c);
    cr_expect_eq(v->v[0], 1);
    vector_drop(v);
}

static cache *shared;

static void *user(void *arg) {
    for (int i = (int)(intptr_t)arg, n = 0; n < 20000; n++, i = (i * 31 + 7) % 300) {
        const int x = get(shared, i);
        if (x != -1 && x != i) return "a wrong vector";
        put(shared, i);
    }
    return NULL;
}

Test(serve_cache, threads) {
    pthread_t t[3];
    shared = cache_new(100 * entry_size());
    for (int i = 0; i < 3; i++) pthread_create(&t[i], NULL, user, (void *)(intptr_t)i);
    for (int i = 0; i < 3; i++) {
        void *wrong;
        pthread_join(t[i], &wrong);
        cr_expect_null(wrong);
    }
    cr_expect_eq(cache_bytes(shared), 100 * entry_size());
    cache_free(shared);
}
