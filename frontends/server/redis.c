/* redis.c - a cache of vectors in Redis, shared by servers; see redis.h.
 *
 * Only threads of this file talk to Redis. A request gives its MGET to one of the getters and waits
 * for a bounded time; what comes later is thrown away. The setter stores new vectors from a bounded
 * list; if the list is full they are not stored. After a failure Redis is not used for PAUSE
 * seconds, so a Redis that is absent or slow costs a request one time-out per pause.
 *
 * A name is PREFIX, the checksum of the loaded weights, and the text's key. So servers share
 * vectors only if what they compute with is equal to the bit. A value is the whole vector as
 * little-endian floats, and the CRC-32 of the name and the floats: what was damaged or stands under
 * another name is no hit. A part of the hits is kept as samples instead of being served, and
 * compared when the model has computed the text.
 */
#include "redis.h"

#include "frontends/console.h"
#include "frontends/format.h"
#include "log.h"
#include "redis_link.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>
#include <zlib.h>

#define PAUSE       1.0 /* seconds */
#define STORE_TIME  1.0 /* seconds for the setter's exchange, for which nobody waits */
#define GETTERS     4
#define MAX_PENDING 4096
#define MAX_SAMPLES 1024
#define PIPELINE    128
#define PREFIX      "qemb:2:" /* 2: the version of names and values */
#define NAME_BYTES  (sizeof PREFIX - 1 + WEIGHTS_BYTES + KEY_BYTES)
#define SUM_BYTES   4

typedef struct {
    uint8_t name[NAME_BYTES];
    vector *vector;
} entry;

/* The MGET of a request. Belongs to the request's thread, which waits, until that gives up. */
typedef struct job {
    struct job *next; /* that waits for a getter */
    double deadline;
    redis_link *link; /* of the getter that has it, or NULL */
    int is_ended, failed, abandoned;
    char reason[REDIS_TEXT_ROOM]; /* if failed */
    redis_reply reply;
    char *command;
    size_t command_len;
    uint8_t *names; /* (n, NAME_BYTES) */
    uint8_t *values, *found;
} job;

typedef struct {
    redis *redis;
    pthread_t thread;
    redis_link link;
} worker;

struct redis {
    metrics *metrics;
    redis_options opt;
    redis_server server;
    int stop_fd;
    worker getters[GETTERS], setter;
    entry batch[PIPELINE]; /* the setter's */
    redis_reply replies[PIPELINE];
    pthread_mutex_t lock; /* guards the members below */
    pthread_cond_t asked, answered, added;
    job *first_job, **last_job;
    int stopped, was_down, refuses, distrusted;
    double not_before;          /* the end of a pause after a failure */
    double no_put_before;       /* after a refused store */
    entry ring[MAX_PENDING];    /* (n) from `first` on: what is to be stored */
    entry samples[MAX_SAMPLES]; /* (n_samples) the oldest at next_sample if there is no room */
    int first, n, n_samples, next_sample;
    uint64_t random;
};

/* ---- failures -------------------------------------------------------------------------------- */

/* Writes a line about Redis. text (up to REDIS_TEXT_ROOM) is printable. */
static void tell(const redis *r, const char *level, const char *event, const char *text) {
    const redis_address *a = &r->server.address;
    char host[sizeof a->host], quoted_host[6 * sizeof host + 3], quoted[6 * REDIS_TEXT_ROOM + 3];
    const size_t n = (size_t)(put_printable(host, a->host, strlen(a->host)) - host);
    *format_json_string(quoted_host, host, n < 80 ? n : 80) = 0;
    *format_json_string(quoted, text, strlen(text)) = 0;
    log_line(level, event, "\"host\":%s,\"port\":%d,\"tls\":%s,\"reason\":%s", quoted_host, a->port,
             a->tls ? "true" : "false", quoted);
}

static void failed(redis *r, const char *reason) {
    pthread_mutex_lock(&r->lock);
    const int stopped = r->stopped, news = !stopped && !r->was_down;
    r->not_before = seconds_now() + PAUSE;
    r->was_down = 1;
    pthread_mutex_unlock(&r->lock);
    if (!stopped) metrics_add(r->metrics, COUNT_REDIS_ERRORS, 1);
    if (news) tell(r, "warning", "redis_down", reason);
}

static void succeeded(redis *r) {
    pthread_mutex_lock(&r->lock);
    const int news = r->was_down;
    r->was_down = 0;
    pthread_mutex_unlock(&r->lock);
    if (news) tell(r, "info", "redis_up", "");
}

/* Redis replied to `n` of the stores with an error. */
static void refused(redis *r, int n, const char *reply) {
    metrics_add(r->metrics, COUNT_REDIS_ERRORS, (uint64_t)n);
    metrics_add(r->metrics, COUNT_REDIS_DROPPED, (uint64_t)n);
    pthread_mutex_lock(&r->lock);
    const int news = !r->refuses;
    r->refuses = 1;
    r->no_put_before = seconds_now() + PAUSE;
    pthread_mutex_unlock(&r->lock);
    if (news) tell(r, "warning", "redis_refuses", reply);
}

/* ---- names and values ------------------------------------------------------------------------ */

static void make_name(uint8_t *name, const redis_kind *k, const uint8_t *key) {
    memcpy(name, PREFIX, sizeof PREFIX - 1);
    memcpy(name + sizeof PREFIX - 1, k->weights, WEIGHTS_BYTES);
    memcpy(name + sizeof PREFIX - 1 + WEIGHTS_BYTES, key, KEY_BYTES);
}

static size_t value_bytes(int dim) { return (size_t)dim * sizeof(float) + SUM_BYTES; }

static uint32_t sum_of(const uint8_t *name, const void *floats, size_t n) {
    const uLong sum = crc32(0, name, NAME_BYTES);
    return (uint32_t)crc32_z(sum, floats, n);
}

/* Reads a value of the right length as a vector. NULL if it is none of this model. */
static vector *read_value(const redis_kind *k, const uint8_t *name, const uint8_t *value) {
    const size_t n = (size_t)k->dim * sizeof(float);
    uint32_t sum;
    memcpy(&sum, value + n, sizeof sum);
    if (sum != sum_of(name, value, n)) return NULL;
    vector *v = vector_new((const float *)(const void *)value, k->dim);
    double squares = 0;
    for (int i = 0; v && i < k->dim; i++) squares += (double)v->v[i] * (double)v->v[i];
    if (!v || (squares <= k->longest * k->longest && k->is_good(v->v, k->dim))) return v;
    vector_drop(v);
    return NULL;
}

/* ---- samples --------------------------------------------------------------------------------- */

/* Whether the next hit is to be computed again. Call it with the lock. */
static int is_chosen(redis *r) {
    r->random ^= r->random << 13; /* xorshift64 */
    r->random ^= r->random >> 7;
    r->random ^= r->random << 17;
    return (double)(r->random >> 11) * 0x1p-53 < r->opt.check;
}

/* Keeps v as a sample, if it is chosen; then the caller's reference is gone. */
static int keep_sample(redis *r, const uint8_t *name, vector *v) {
    vector *old = NULL;
    pthread_mutex_lock(&r->lock);
    const int chosen = is_chosen(r);
    if (chosen) {
        entry *e = &r->samples[r->next_sample];
        if (r->n_samples == MAX_SAMPLES) old = e->vector;
        if (r->n_samples < MAX_SAMPLES) r->n_samples++;
        memcpy(e->name, name, NAME_BYTES);
        e->vector = v;
        r->next_sample = (r->next_sample + 1) % MAX_SAMPLES;
    }
    pthread_mutex_unlock(&r->lock);
    vector_drop(old);
    return chosen;
}

/* Takes a sample of that name out. NULL: there is none. */
static vector *take_sample(redis *r, const uint8_t *name) {
    vector *v = NULL;
    pthread_mutex_lock(&r->lock);
    for (int i = 0; i < r->n_samples && !v; i++) {
        entry *e = &r->samples[i];
        if (memcmp(e->name, name, NAME_BYTES)) continue;
        v = e->vector;
        *e = r->samples[--r->n_samples];
        r->next_sample = r->n_samples;
    }
    pthread_mutex_unlock(&r->lock);
    return v;
}

static int agree(const redis_kind *k, const vector *a, const vector *b) {
    if (k->tolerance <= 0) return !memcmp(a->v, b->v, (size_t)k->dim * sizeof *a->v);
    double squares = 0, difference = 0;
    for (int i = 0; i < k->dim; i++) {
        const double d = (double)a->v[i] - (double)b->v[i];
        squares += (double)a->v[i] * (double)a->v[i];
        difference += d * d;
    }
    const double length = k->dim > 1 ? sqrt(squares) : k->longest;
    return sqrt(difference) <= k->tolerance * length;
}

/* Compares the samples of that name with v, which was computed here. Returns 1 if one differs. */
static int compare(redis *r, const redis_kind *k, const uint8_t *name, const vector *v) {
    int differs = 0;
    for (vector *stored; (stored = take_sample(r, name)); vector_drop(stored)) {
        metrics_add(r->metrics, COUNT_REDIS_CHECKED, 1);
        if (agree(k, v, stored)) continue;
        differs = 1;
        metrics_add(r->metrics, COUNT_REDIS_MISMATCHES, 1);
        pthread_mutex_lock(&r->lock);
        const int news = !r->distrusted;
        r->distrusted = 1;
        pthread_mutex_unlock(&r->lock);
        if (news)
            tell(r, "error", "redis_mismatch",
                 "a stored vector differs from the one computed here: Redis is not used any more");
    }
    return differs;
}

int redis_is_distrusted(redis *r) {
    pthread_mutex_lock(&r->lock);
    const int yes = r->distrusted;
    pthread_mutex_unlock(&r->lock);
    return yes;
}

/* ---- asking ---------------------------------------------------------------------------------- */

static void job_free(job *j) {
    if (!j) return;
    free(j->command);
    free(j->names);
    free(j->values);
    free(j->found);
    free(j);
}

/* The MGET of the n texts of t that have a text. NULL: out of memory. */
static job *job_new(const redis_kind *k, const pending_request *t, int n) {
    job *j = calloc(1, sizeof *j);
    if (!j) return NULL;
    j->names = malloc((size_t)n * NAME_BYTES);
    j->values = malloc((size_t)n * value_bytes(k->dim));
    j->found = malloc((size_t)n);
    j->command = malloc((size_t)(n + 2) * (NAME_BYTES + REDIS_PART_ROOM));
    if (!j->names || !j->values || !j->found || !j->command) {
        job_free(j);
        return NULL;
    }
    redis_reply_start(&j->reply, n, value_bytes(k->dim), j->values, j->found);
    char *p = j->command + sprintf(j->command, "*%d\r\n", n + 1);
    p = redis_put_part(p, "MGET", 4);
    for (int i = 0, m = 0; i < t->n; i++) {
        if (!t->texts[i].text) continue;
        uint8_t *name = j->names + (size_t)m++ * NAME_BYTES;
        make_name(name, k, t->texts[i].text->key);
        p = redis_put_part(p, name, NAME_BYTES);
    }
    j->command_len = (size_t)(p - j->command);
    return j;
}

/* Waits until a getter has ended the job. Returns 0, or -1 with the reason, and *owned is NULL if a
 * getter still has the job and will free it. */
static int wait_for_job(redis *r, job **owned, char reason[REDIS_TEXT_ROOM]) {
    job *j = *owned;
    struct timespec until = {.tv_sec = (time_t)j->deadline};
    until.tv_nsec = (long)(1e9 * (j->deadline - (double)until.tv_sec));
    pthread_mutex_lock(&r->lock);
    *r->last_job = j;
    r->last_job = &j->next;
    pthread_cond_signal(&r->asked);
    while (!j->is_ended && !r->stopped)
        if (pthread_cond_timedwait(&r->answered, &r->lock, &until) == ETIMEDOUT) break;
    const int bad = !j->is_ended || j->failed;
    if (j->is_ended) {
        memcpy(reason, j->reason, sizeof j->reason);
    } else if (j->link) {
        snprintf(reason, REDIS_TEXT_ROOM, "%s: not done within %d ms", atomic_load(&j->link->step),
                 r->opt.timeout_ms);
        j->abandoned = 1;
        *owned = NULL;
    } else {
        snprintf(reason, REDIS_TEXT_ROOM, "all connections are busy (waited %d ms)",
                 r->opt.timeout_ms);
        job **p = &r->first_job;
        while (*p != j) p = &(*p)->next;
        *p = j->next;
        if (r->last_job == &j->next) r->last_job = p;
    }
    pthread_mutex_unlock(&r->lock);
    return bad ? -1 : 0;
}

/* Takes the vectors out of the reply to j. */
static int take_values(redis *r, const redis_kind *k, const job *j, pending_request *t) {
    int hits = 0, bad = 0;
    for (int i = 0, m = 0; i < t->n; i++) {
        pending_text *s = &t->texts[i];
        if (!s->text) continue;
        const uint8_t *name = j->names + (size_t)m * NAME_BYTES;
        const uint8_t *value = j->values + (size_t)m * value_bytes(k->dim);
        const int found = j->found[m++];
        vector *v = found == REDIS_FOUND ? read_value(k, name, value) : NULL;
        bad += found != REDIS_ABSENT && !v;
        if (!v || keep_sample(r, name, v)) continue;
        s->vector = v;
        hits++;
    }
    metrics_add(r->metrics, COUNT_REDIS_BAD, (uint64_t)bad);
    return hits;
}

static int is_used(redis *r) {
    pthread_mutex_lock(&r->lock);
    const int yes = !r->stopped && !r->distrusted && seconds_now() >= r->not_before;
    pthread_mutex_unlock(&r->lock);
    return yes;
}

int redis_get(redis *r, const redis_kind *k, pending_request *t) {
    char reason[REDIS_TEXT_ROOM];
    int n = 0, hits = 0;
    for (int i = 0; i < t->n; i++) n += t->texts[i].text != NULL;
    job *j = n && is_used(r) ? job_new(k, t, n) : NULL;
    if (!j) return 0;
    j->deadline = seconds_now() + 1e-3 * r->opt.timeout_ms;
    if (wait_for_job(r, &j, reason))
        failed(r, reason);
    else
        hits = take_values(r, k, j, t);
    if (j) job_free(j);
    return hits;
}

/* Takes the next job. NULL: the server is being stopped. */
static job *next_job(redis *r, redis_link *link) {
    pthread_mutex_lock(&r->lock);
    while (!r->first_job && !r->stopped) pthread_cond_wait(&r->asked, &r->lock);
    job *j = r->stopped ? NULL : r->first_job;
    if (j) {
        r->first_job = j->next;
        if (!r->first_job) r->last_job = &r->first_job;
        j->link = link;
        atomic_store(&link->step, "start");
    }
    pthread_mutex_unlock(&r->lock);
    return j;
}

static void *getter_main(void *arg) {
    worker *w = arg;
    redis *r = w->redis;
    for (job *j; (j = next_job(r, &w->link));) {
        int bad =
            redis_link_exchange(&w->link, j->deadline, j->command, j->command_len, &j->reply, 1);
        const char *reason = w->link.reason;
        if (!bad && j->reply.progress == REDIS_ERROR) { /* no password, still loading */
            bad = -1;
            reason = j->reply.text;
        }
        if (!bad) succeeded(r);
        pthread_mutex_lock(&r->lock);
        const int abandoned = j->abandoned;
        if (!abandoned) {
            j->failed = bad;
            if (bad) memcpy(j->reason, reason, sizeof j->reason);
            j->is_ended = 1;
            pthread_cond_broadcast(&r->answered);
        }
        pthread_mutex_unlock(&r->lock);
        if (abandoned) job_free(j);
    }
    redis_link_close(&w->link);
    return NULL;
}

/* ---- storing --------------------------------------------------------------------------------- */

int redis_put(redis *r, const redis_kind *k, const uint8_t key[KEY_BYTES], vector *v) {
    uint8_t name[NAME_BYTES];
    make_name(name, k, key);
    const int differs = compare(r, k, name, v);
    pthread_mutex_lock(&r->lock);
    const double now = seconds_now();
    const int room = r->n < MAX_PENDING && now >= r->not_before && now >= r->no_put_before &&
                     !r->distrusted && !r->stopped;
    if (room) {
        entry *e = &r->ring[(r->first + r->n++) % MAX_PENDING];
        memcpy(e->name, name, NAME_BYTES);
        e->vector = vector_take(v);
        pthread_cond_signal(&r->added);
    }
    pthread_mutex_unlock(&r->lock);
    if (!room) metrics_add(r->metrics, COUNT_REDIS_DROPPED, 1);
    return differs;
}

/* Takes up to PIPELINE vectors to store into r->batch. Returns 0 at the end. */
static int next_entries(redis *r) {
    int n = 0;
    pthread_mutex_lock(&r->lock);
    while (!r->n && !r->stopped) pthread_cond_wait(&r->added, &r->lock);
    for (; r->n && n < PIPELINE && !r->stopped; r->n--, n++) {
        r->batch[n] = r->ring[r->first];
        r->first = (r->first + 1) % MAX_PENDING;
    }
    pthread_mutex_unlock(&r->lock);
    return n;
}

/* The SETs of r->batch (n). NULL: out of memory. */
static char *make_sets(const redis *r, int n, size_t *len) {
    size_t room = 0;
    char ttl[16], *commands, *p;
    const int ttl_len = snprintf(ttl, sizeof ttl, "%d", r->opt.ttl);
    for (int i = 0; i < n; i++)
        room += 6 * REDIS_PART_ROOM + NAME_BYTES + value_bytes(r->batch[i].vector->n);
    p = commands = malloc(room);
    for (int i = 0; p && i < n; i++) {
        const entry *e = &r->batch[i];
        const size_t bytes = (size_t)e->vector->n * sizeof(float);
        const uint32_t sum = sum_of(e->name, e->vector->v, bytes);
        p += sprintf(p, "*%d\r\n", r->opt.ttl ? 5 : 3);
        p = redis_put_part(p, "SET", 3);
        p = redis_put_part(p, e->name, NAME_BYTES);
        p += sprintf(p, "$%zu\r\n", bytes + SUM_BYTES);
        memcpy(p, e->vector->v, bytes);
        memcpy(p + bytes, &sum, SUM_BYTES);
        memcpy(p + bytes + SUM_BYTES, "\r\n", 2);
        p += bytes + SUM_BYTES + 2;
        if (!r->opt.ttl) continue;
        p = redis_put_part(p, "EX", 2);
        p = redis_put_part(p, ttl, (size_t)ttl_len);
    }
    *len = (size_t)(p - commands);
    return commands;
}

static void store(redis *r, int n) {
    size_t len;
    char *commands = is_used(r) ? make_sets(r, n, &len) : NULL;
    if (!commands) {
        metrics_add(r->metrics, COUNT_REDIS_DROPPED, (uint64_t)n);
        return;
    }
    const double timeout = 1e-3 * r->opt.timeout_ms;
    const double deadline = seconds_now() + (timeout > STORE_TIME ? timeout : STORE_TIME);
    int n_refused = 0, last = 0;
    for (int i = 0; i < n; i++) redis_reply_start(&r->replies[i], 0, 0, NULL, NULL);
    const int bad = redis_link_exchange(&r->setter.link, deadline, commands, len, r->replies, n);
    free(commands);
    if (bad) {
        metrics_add(r->metrics, COUNT_REDIS_DROPPED, (uint64_t)n);
        failed(r, r->setter.link.reason);
        return;
    }
    succeeded(r);
    for (int i = 0; i < n; i++)
        if (r->replies[i].progress == REDIS_ERROR) n_refused++, last = i;
    if (n_refused) {
        refused(r, n_refused, r->replies[last].text);
        return;
    }
    pthread_mutex_lock(&r->lock);
    r->refuses = 0;
    pthread_mutex_unlock(&r->lock);
}

static void *setter_main(void *arg) {
    worker *w = arg;
    redis *r = w->redis;
    for (int n; (n = next_entries(r));) {
        store(r, n);
        for (int i = 0; i < n; i++) vector_drop(r->batch[i].vector);
    }
    redis_link_close(&w->link);
    return NULL;
}

/* ---- start, end ------------------------------------------------------------------------------ */

static void start(redis *r, worker *w, void *(*run)(void *)) {
    w->redis = r;
    redis_link_init(&w->link, &r->server, r->stop_fd);
    const int error = pthread_create(&w->thread, NULL, run, w);
    if (error) DIE(STATUS_MODEL, "thread: cannot start it (%s)", strerror(error));
}

redis *redis_new(const redis_options *o, metrics *m) {
    redis *r = need(calloc(1, sizeof *r));
    r->metrics = m;
    r->opt = *o;
    redis_server_open(&r->server, o->address, o->password_file, o->ca);
    r->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (r->stop_fd < 0) DIE(STATUS_MODEL, "eventfd: %s", strerror(errno));
    if (getrandom(&r->random, sizeof r->random, GRND_NONBLOCK) != sizeof r->random || !r->random)
        r->random = (uint64_t)getpid() << 32 | 1;
    r->last_job = &r->first_job;
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->asked, NULL);
    pthread_cond_init(&r->added, NULL);
    pthread_condattr_t a;
    pthread_condattr_init(&a);
    pthread_condattr_setclock(&a, CLOCK_MONOTONIC);
    pthread_cond_init(&r->answered, &a);
    pthread_condattr_destroy(&a);
    for (int i = 0; i < GETTERS; i++) start(r, &r->getters[i], getter_main);
    start(r, &r->setter, setter_main);
    return r;
}

void redis_stop(redis *r) {
    if (!r) return;
    pthread_mutex_lock(&r->lock);
    r->stopped = 1;
    eventfd_write(r->stop_fd, 1);
    pthread_cond_broadcast(&r->asked);
    pthread_cond_broadcast(&r->added);
    pthread_cond_broadcast(&r->answered);
    pthread_mutex_unlock(&r->lock);
}

int redis_free(redis *r, double seconds) {
    if (!r) return 1;
    redis_stop(r);
    const double end = seconds_now() + seconds;
    int joined = join_within(r->setter.thread, seconds);
    for (int i = 0; i < GETTERS && joined; i++)
        joined = join_within(r->getters[i].thread, end - seconds_now());
    if (!joined) return 0;
    for (; r->n; r->n--, r->first = (r->first + 1) % MAX_PENDING)
        vector_drop(r->ring[r->first].vector);
    for (int i = 0; i < r->n_samples; i++) vector_drop(r->samples[i].vector);
    close(r->stop_fd);
    redis_server_close(&r->server);
    pthread_cond_destroy(&r->asked);
    pthread_cond_destroy(&r->answered);
    pthread_cond_destroy(&r->added);
    pthread_mutex_destroy(&r->lock);
    free(r);
    return 1;
}
