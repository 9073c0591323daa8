/* redis.c - a cache of vectors in Redis, shared by servers; see redis.h.
 *
 * The thread of a request asks for its texts in one MGET and waits for a bounded time. A separate
 * thread sets new vectors from a bounded list; if the list is full they are not stored. After a
 * failure Redis is not used for PAUSE seconds, so a Redis that is absent or slow costs two
 * timeouts per pause at most. A value is the whole vector as little-endian floats.
 */
#include "redis.h"

#include "frontends/console.h"
#include "log.h"

#include <hiredis/hiredis.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAUSE       1.0 /* seconds */
#define MAX_IDLE    16
#define MAX_PENDING 4096
#define PIPELINE    128
#define PREFIX      "qemb:1:" /* 1: the version of keys and values */
#define NAME_BYTES  (sizeof PREFIX - 1 + KEY_BYTES)

typedef struct {
    uint8_t key[KEY_BYTES];
    vector *vector;
} pending;

struct redis {
    metrics *metrics;
    char host[256];
    int port;
    struct timeval timeout;
    pthread_t thread;
    pthread_mutex_t lock; /* guards the members below */
    pthread_cond_t changed;
    redisContext *idle[MAX_IDLE];
    int n_idle, stopped, was_down;
    double not_before; /* the end of a pause after a failure */
    pending ring[MAX_PENDING];
    int first, n;
};

/* ---- connections ----------------------------------------------------------------------------- */

static void failed(redis *r, redisContext *c) {
    if (c) redisFree(c);
    metrics_add(r->metrics, COUNT_REDIS_ERRORS, 1);
    pthread_mutex_lock(&r->lock);
    r->not_before = seconds_now() + PAUSE;
    while (r->n_idle) redisFree(r->idle[--r->n_idle]); /* same server, so broken too */
    const int news = !r->was_down;
    r->was_down = 1;
    pthread_mutex_unlock(&r->lock);
    if (news) log_line("warning", "redis_down", "\"port\":%d", r->port);
}

/* Returns a connection, or NULL in a pause or if it cannot connect. */
static redisContext *take(redis *r) {
    pthread_mutex_lock(&r->lock);
    const int paused = seconds_now() < r->not_before;
    redisContext *c = !paused && r->n_idle ? r->idle[--r->n_idle] : NULL;
    pthread_mutex_unlock(&r->lock);
    if (paused || c) return c;
    c = redisConnectWithTimeout(r->host, r->port, r->timeout);
    if (c && !c->err && redisSetTimeout(c, r->timeout) == REDIS_OK) return c;
    failed(r, c);
    return NULL;
}

static void give(redis *r, redisContext *c) {
    pthread_mutex_lock(&r->lock);
    const int news = r->was_down, full = r->n_idle == MAX_IDLE;
    r->was_down = 0;
    if (!full) r->idle[r->n_idle++] = c;
    pthread_mutex_unlock(&r->lock);
    if (full) redisFree(c);
    if (news) log_line("info", "redis_up", "\"port\":%d", r->port);
}

static void make_name(char name[NAME_BYTES], const uint8_t *key) {
    memcpy(name, PREFIX, sizeof PREFIX - 1);
    memcpy(name + sizeof PREFIX - 1, key, KEY_BYTES);
}

/* ---- asking ---------------------------------------------------------------------------------- */

/* Reads a value as a vector of n numbers. NULL if it is none, or not good. */
static vector *read_value(const redisReply *v, int n, int (*is_good)(const float *v, int n)) {
    if (v->type != REDIS_REPLY_STRING || v->len != (size_t)n * sizeof(float)) return NULL;
    vector *x = vector_new((const float *)(const void *)v->str, n);
    if (!x || is_good(x->v, n)) return x;
    vector_drop(x);
    return NULL;
}

/* Sends MGET for the n texts of t that have a text. */
static redisReply *ask(redisContext *c, const pending_request *t, int n) {
    const char **argv = malloc(((size_t)n + 1) * sizeof *argv);
    size_t *lengths = malloc(((size_t)n + 1) * sizeof *lengths);
    char(*names)[NAME_BYTES] = malloc((size_t)n * sizeof *names);
    redisReply *reply = NULL;
    if (argv && lengths && names) {
        argv[0] = "MGET";
        lengths[0] = 4;
        for (int i = 0, k = 0; i < t->n; i++) {
            if (!t->texts[i].text) continue;
            make_name(names[k], t->texts[i].text->key);
            argv[k + 1] = names[k];
            lengths[++k] = NAME_BYTES;
        }
        reply = redisCommandArgv(c, n + 1, argv, lengths);
    }
    free(argv);
    free(lengths);
    free(names);
    return reply;
}

int redis_get(redis *r, pending_request *t, int dim, int (*is_good)(const float *v, int n)) {
    int n = 0, hits = 0;
    for (int i = 0; i < t->n; i++) n += t->texts[i].text != NULL;
    redisContext *c = n ? take(r) : NULL;
    if (!c) return 0;
    redisReply *reply = ask(c, t, n);
    if (!reply || reply->type != REDIS_REPLY_ARRAY || reply->elements != (size_t)n) {
        freeReplyObject(reply);
        failed(r, c);
        return 0;
    }
    for (int i = 0, k = 0; i < t->n; i++) {
        pending_text *s = &t->texts[i];
        if (!s->text) continue;
        s->vector = read_value(reply->element[k++], dim, is_good);
        hits += s->vector != NULL;
    }
    freeReplyObject(reply);
    give(r, c);
    return hits;
}

/* ---- setting --------------------------------------------------------------------------------- */

void redis_put(redis *r, const uint8_t key[KEY_BYTES], vector *v) {
    pthread_mutex_lock(&r->lock);
    const int room = r->n < MAX_PENDING && seconds_now() >= r->not_before;
    if (room) {
        pending *p = &r->ring[(r->first + r->n++) % MAX_PENDING];
        memcpy(p->key, key, KEY_BYTES);
        p->vector = vector_take(v);
        pthread_cond_signal(&r->changed);
    }
    pthread_mutex_unlock(&r->lock);
    if (!room) metrics_add(r->metrics, COUNT_REDIS_DROPPED, 1);
}

/* Takes up to PIPELINE vectors to set. Returns 0 at the end. */
static int next_pending(redis *r, pending *p) {
    int n = 0;
    pthread_mutex_lock(&r->lock);
    while (!r->n && !r->stopped) pthread_cond_wait(&r->changed, &r->lock);
    for (; r->n && n < PIPELINE && !r->stopped; r->n--, n++) {
        p[n] = r->ring[r->first];
        r->first = (r->first + 1) % MAX_PENDING;
    }
    pthread_mutex_unlock(&r->lock);
    return n;
}

/* Sends all commands, then reads all replies. Returns 0, or -1 on failure. */
static int set_all(redisContext *c, const pending *p, int n) {
    for (int i = 0; i < n; i++) {
        char name[NAME_BYTES];
        make_name(name, p[i].key);
        if (redisAppendCommand(c, "SET %b %b", name, sizeof name, p[i].vector->v,
                               (size_t)p[i].vector->n * sizeof(float)) != REDIS_OK)
            return -1;
    }
    for (int i = 0; i < n; i++) {
        void *reply;
        if (redisGetReply(c, &reply) != REDIS_OK) return -1;
        freeReplyObject(reply); /* "out of memory", "read only": not stored */
    }
    return 0;
}

static void *setter_main(void *arg) {
    redis *r = arg;
    pending p[PIPELINE];
    for (int n; (n = next_pending(r, p));) {
        redisContext *c = take(r);
        if (c && set_all(c, p, n))
            failed(r, c);
        else if (c)
            give(r, c);
        for (int i = 0; i < n; i++) vector_drop(p[i].vector);
        if (!c) metrics_add(r->metrics, COUNT_REDIS_DROPPED, (uint64_t)n);
    }
    return NULL;
}

/* ---- start, end ------------------------------------------------------------------------------ */

redis *redis_new(const char *address, int timeout_ms, metrics *m) {
    redis *r = need(calloc(1, sizeof *r));
    const char *colon = strrchr(address, ':');
    char *end = NULL;
    const long port = colon ? strtol(colon + 1, &end, 10) : 0;
    if (!colon || colon == address || (size_t)(colon - address) >= sizeof r->host || *end ||
        end == colon + 1 || port < 1 || port > 65535) {
        free(r);
        return NULL;
    }
    memcpy(r->host, address, (size_t)(colon - address));
    r->metrics = m;
    r->port = (int)port;
    r->timeout = (struct timeval){timeout_ms / 1000, timeout_ms % 1000 * 1000};
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->changed, NULL);
    const int error = pthread_create(&r->thread, NULL, setter_main, r);
    if (error) DIE(STATUS_MODEL, "thread: cannot start it (%s)", strerror(error));
    return r;
}

void redis_free(redis *r) {
    if (!r) return;
    pthread_mutex_lock(&r->lock);
    r->stopped = 1;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
    pthread_join(r->thread, NULL);
    for (; r->n; r->n--, r->first = (r->first + 1) % MAX_PENDING)
        vector_drop(r->ring[r->first].vector);
    while (r->n_idle) redisFree(r->idle[--r->n_idle]);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->changed);
    free(r);
}
