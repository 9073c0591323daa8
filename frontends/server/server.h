/* server.h - what the files of qemb-serve agree on.
 *
 *   main.c          options, start, signals, the clock's tick, the end
 *   http.c     libmicrohttpd: connections, routes, limits, answers
 *   listen.c   the socket, the keys
 *   api.c      OpenAI's JSON: requests in, responses and errors out
 *   model_worker.c     a model at work: texts -> token ids -> queue -> vectors
 *   queue.c    what waits to be computed; batches out of it
 *   cache.c    vectors by key, in memory
 *   redis.c    vectors by key, in a Redis
 *   metrics.c  counters, histograms, the log
 * Below them the engine (qemb.h), record_tokenizer.c and format.c, as under main.c.
 *
 * Threads: a few of libmicrohttpd's, which parse, tokenize and format; one per model, which alone
 * calls qemb_embed; the main thread, which waits for signals and looks after time. A connection is
 * suspended while its texts wait, and resumed by whoever ends the wait.
 */
#ifndef QEMB_SERVE_H
#define QEMB_SERVE_H

#include "frontends/frontend.h"

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define KEY_BYTES 32

double seconds_now(void); /* monotonic */

/* ---- queue.c --------------------------------------------------------------------------- */

/* A text's vector as qemb_embed gave it, before cut and L2: good for every dimension. Shared by
 * reference, never changed. */
typedef struct {
    atomic_int refs;
    int n;
    float v[]; /* (n) */
} vector;

vector *vector_new(const float *v, int n); /* one reference, the caller's. NULL: out of memory */
vector *vector_take(vector *v);            /* one more */
void vector_drop(vector *v);               /* one less; v may be NULL */

typedef struct pending_text pending_text;
typedef struct pending_request pending_request;

/* A distinct text in flight. Its key stands for model and ids: two texts of a queue have equal keys
 * if and only if they have equal ids, or else the batch would give both the same row. */
typedef struct text {
    uint8_t key[KEY_BYTES];
    struct text *next;     /* in the queue's index */
    pending_text *waiters; /* whose text it is */
    int computing;         /* it is in a batch: stays until that is done */
    int n;
    int32_t ids[]; /* (n), end-of-text included */
} text;

text *text_new(const uint8_t key[KEY_BYTES], int n); /* ids are to be filled. NULL: no memory */

/* One text of a request: it waits for `text`, or has its `vector`, or has failed. */
struct pending_text {
    pending_request *request;
    text *text;
    vector *vector;
    pending_text *prev, *next; /* among the text's waiters */
    int failed;                /* the model has no finite vector for it */
};

typedef enum {
    REQUEST_NEW,     /* never submitted */
    REQUEST_WAITING, /* in the queue: nobody else touches it */
    REQUEST_DONE,    /* every text has its vector or has failed */
    REQUEST_EXPIRED, /* the deadline came first */
    REQUEST_GONE,    /* the client has left */
    REQUEST_STOPPED  /* the queue has ended */
} request_state;

/* A request in the queue. The caller fills texts (n of them, with text or vector), deadline and
 * functions. */
struct pending_request {
    pending_text *texts;
    int n;
    double deadline; /* as seconds_now */
    /* Called once, when the state is final, from any thread and without locks. From then on the
     * request is the caller's again. */
    void (*done)(pending_request *t);
    int (*departed)(
        pending_request *t); /* 1: nobody waits any more. May be NULL; must not block. */
    request_state state;
    /* the queue's own */
    int pending, cursor;
    pending_request *ring_prev, *ring_next; /* has texts that no batch has taken */
    pending_request *live_prev, *live_next; /* waits, by age */
    pending_request *next_done;
};

/* Gives back what the texts hold. Not while the request waits. */
void pending_request_clear(pending_request *t);

typedef struct queue queue;

typedef struct {
    int texts, tokens; /* distinct ones that no batch has taken */
    int requests;      /* that wait */
} queue_depth;

/* A queue that holds max_tokens and makes batches of about batch_tokens. NULL: out of memory */
queue *queue_new(int max_tokens, int batch_tokens);
void queue_free(queue *q); /* nothing waits in it */

/* Hands t over if its texts fit beside what waits (an empty queue takes every request), with texts
 * that are in flight already shared. 0; or -1, nothing done: full, or ended. Texts that wait are
 * the queue's from then on. *shared gets the number of texts that were in flight already. */
int queue_submit(queue *q, pending_request *t, int *shared);
/* Waits for texts, puts a batch of them into b (empty) and names them in taken (room for
 * batch_tokens), row by row. Returns their number; 0 when the queue has ended. */
int queue_take(queue *q, qemb_batch *b, text **taken);
/* The vectors (n; NULL: none that is finite) of the last taken texts: they are the waiters' now. */
void queue_finish(queue *q, text **taken, vector **vectors, int n);
/* Ends the wait of requests whose deadline has passed, and of those whose client has left. */
void queue_tick(queue *q, double now);
/* Ends every wait and the queue: queue_take returns 0, queue_submit refuses. */
void queue_stop(queue *q);
queue_depth queue_depth_of(queue *q);
/* Seconds after which what waits now will have been computed, 1 at least. */
int queue_retry_after(queue *q);

/* ---- api.c ----------------------------------------------------------------------------- */

typedef struct {
    int status;       /* HTTP's */
    const char *code; /* static string */
    char param[32];   /* "": null */
    char msg[480];
    int retry_after; /* seconds, 0: not said */
} api_error;

/* Fills *e and returns -1. param may be NULL. */
int api_fail(api_error *e, int status, const char *code, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));

/* A text, or token ids if text is NULL. */
typedef struct {
    const char *text; /* (len) */
    size_t len;
    int first_id; /* ids[first_id .. first_id + len) of the request */
} api_input;

typedef struct {
    void *json; /* owns the strings */
    const char *model;
    api_input *inputs; /* (n) */
    int n;
    int32_t *ids; /* of all inputs that are ids */
    int n_ids;
    int dimensions; /* 0: not given */
    int base64;
    const char *instruct; /* (instruct_len) or NULL: the server's default */
    size_t instruct_len;
    int truncate; /* -1: the server's default */
    int fallback; /* 1: another model may answer */
} api_request;

typedef enum { API_EMBEDDINGS, API_TOKENIZE } api_kind;

/* The request in body (len). *r is to be freed in any case. Checks form, not what depends on a
 * model (ids and dimensions need only be positive numbers of 31 bits). */
int api_parse(api_request *r, api_kind kind, const char *body, size_t len, int max_texts,
              api_error *e);
void api_request_free(api_request *r);

/* A response under construction: malloc'ed bytes, NULL when memory ran out. */
typedef struct {
    char *data;
    size_t len, cap;
} api_text;

/* Upper bound of the bytes of an embeddings response. */
size_t api_embeddings_room(int n, int dim, int base64, size_t name_len);
/* 0; or -1 and *e: a text's vector has no finite length at dim (422), or out of memory. */
int api_embeddings(api_text *out, const pending_text *texts, int n, int dim, int base64,
                   const char *model, uint64_t tokens, api_error *e);
int api_tokens(api_text *out, const pending_text *texts, int n, int max_tokens, const char *model,
               uint64_t tokens, api_error *e);
void api_models(api_text *out, const char *const *names, int n, long created);
void api_error_json(api_text *out, const api_error *e);

/* ---- cache.c ---------------------------------------------------------------------------- */

typedef struct cache cache; /* for all threads */

cache *cache_new(size_t max_bytes);                        /* NULL: out of memory */
void cache_free(cache *c);                                 /* c may be NULL */
vector *cache_get(cache *c, const uint8_t key[KEY_BYTES]); /* a reference, or NULL */
void cache_put(cache *c, const uint8_t key[KEY_BYTES], vector *v);
size_t cache_bytes(cache *c);

/* ---- redis.c ---------------------------------------------------------------------------- */

typedef struct redis redis; /* for all threads */

/* address is HOST:PORT; NULL if it is not. Connects when it is asked, not before. timeout_ms: for a
 * connection, and for an answer. */
redis *redis_new(const char *address, int timeout_ms);
void redis_free(redis *r); /* r may be NULL */
/* Vectors of dim numbers into those texts of t that have a text and whose key is there. Returns how
 * many; takes two timeouts at most, nothing while a failure is fresh. */
int redis_get(redis *r, pending_request *t, int dim);
void redis_put(redis *r, const uint8_t key[KEY_BYTES], vector *v); /* does not wait */

/* ---- model_worker.c ---------------------------------------------------------------------------- */

/* WORKER_DEAD: its device has failed and its queue has ended; the process is to end. */
typedef enum { WORKER_LOADING, WORKER_READY, WORKER_FAILING, WORKER_DEAD } model_worker_state;

typedef struct model_worker model_worker;

typedef struct {
    options cli; /* for record_tokenizer.c: model, query, instruct, truncate, engine; and ops */
    int max_queue_tokens, is_fallback;
    cache *cache; /* or NULL */
    redis *redis; /* or NULL */
} model_worker_options;

/* Opens the file and the tokenizer; ends the process with a message if that fails. */
model_worker *model_worker_open(const model_worker_options *o);
/* Starts the thread that opens the model, which may take long, and computes. Ends the process likewise. */
void model_worker_start(model_worker *l);
/* Ends every wait. After model_worker_join nothing computes; it returns 0 if that took too long. */
void model_worker_stop(model_worker *l);
int model_worker_join(model_worker *l, double seconds);
void model_worker_free(model_worker *l); /* after model_worker_join returned 1 */

model_worker_state model_worker_state_of(model_worker *l);
void model_worker_tick(model_worker *l, double now); /* a few times a second */
int model_worker_hidden(const model_worker *l);
int model_worker_max_tokens(const model_worker *l);
size_t model_worker_cache_bytes(const model_worker *l);
queue *model_worker_queue(model_worker *l);
/* "ab12..." (64 digits): what vectors depend on beside the ids: the file and the backend. */
const char *model_worker_fingerprint(const model_worker *l);

/* Token ids and keys of the inputs of r into t->texts (r->n), which is made; *tokens gets their
 * sum. -1: *e says why; t holds nothing. */
int model_worker_tokenize(model_worker *l, const api_request *r, pending_request *t,
                          uint64_t *tokens, api_error *e);

/* Vectors of t's texts that are known already: those texts wait for nothing. Returns how many. */
int model_worker_lookup(model_worker *l, pending_request *t);

/* ---- http.c ---------------------------------------------------------------------------- */

#define MAX_NAMES 16

typedef struct {
    const char *host, *key_file;
    int port;
    const char *names[MAX_NAMES]; /* of the model; the first is what responses say */
    int n_names;
    const char *fallback_name; /* of the other model; NULL: there is none */
    int http_threads, max_connections, max_texts;
    size_t max_body, max_memory; /* bytes */
    double deadline, receive_timeout, drain;
} http_options;

typedef struct http http;

/* Listens and answers: 503 until the model_worker is ready. fallback may be NULL: see http.c for when it
 * computes. Ends the process if that cannot be. */
http *http_start(const http_options *o, model_worker *l, model_worker *fallback);
int http_port(const http *h);
/* Closes connections that have taken too long to send a request or to read an answer. */
void http_tick(http *h, double now);
/* No new connections from now on; those that the system has completed already are still served,
 * once. */
void http_drain(http *h);
/* 1 when a draining server has nothing left to answer. */
int http_idle(http *h, double now);
void http_stop(http *h); /* after http_drain; no connection is suspended */

/* ---- listen.c -------------------------------------------------------------------------- */

typedef struct keys keys;

/* The keys of the file, one a line; empty lines and those with # in front do not count. Ends the
 * process if there is none. */
keys *keys_read(const char *path);
void keys_free(keys *k); /* k may be NULL */
int keys_match(const keys *k, const char *given);

/* A listening socket, not blocking; *bound_port is port, or what the system chose for 0. Ends the
 * process if that cannot be. */
int listen_open(const char *host, int port, int *bound_port);
/* Raises the limit on descriptors to what the system allows; the connections that leaves, at most
 * `wanted`. */
int listen_connections(int wanted);

/* ---- metrics.c ------------------------------------------------------------------------- */

typedef enum {
    ROUTE_EMBEDDINGS,
    ROUTE_TOKENIZE,
    ROUTE_MODELS,
    ROUTE_HEALTH,
    ROUTE_METRICS,
    ROUTE_OTHER,
    N_ROUTES
} route;

const char *route_path(route r);

typedef enum {
    COUNT_TEXTS,
    COUNT_TOKENS,
    COUNT_COMPUTED_TEXTS,
    COUNT_COMPUTED_TOKENS,
    COUNT_DEDUP,
    COUNT_NON_FINITE,
    COUNT_CLAMPED,
    COUNT_RECOMPUTED,
    COUNT_FALLBACKS,
    COUNT_DEPARTED,
    COUNT_EXPIRED,
    COUNT_REAPED,
    COUNT_LOG_LOST,
    COUNT_CACHE_HITS,
    COUNT_CACHE_MISSES,
    COUNT_REDIS_HITS,
    COUNT_REDIS_ERRORS,
    COUNT_REDIS_DROPPED,
    N_COUNTS
} count;

typedef enum {
    HISTOGRAM_BATCH_TEXTS,
    HISTOGRAM_BATCH_TOKENS,
    HISTOGRAM_BATCH_SECONDS,
    HISTOGRAM_REQUEST_SECONDS,
    N_HISTOGRAMS
} histogram;

typedef struct {
    int healthy, connections;
    size_t cache_bytes;
    struct {
        const char *model, *fingerprint; /* NULL: there is no such model */
        queue_depth queue;
    } worker[2]; /* the model, the fallback */
} gauges;

void metrics_add(count c, uint64_t n);
void metrics_request(route r, int status);
void metrics_observe(histogram h, double x);
/* Prometheus' text format. */
void metrics_text(api_text *out, const gauges *g);

/* printf onto *out; once memory has run out, nothing more. */
void text_printf(api_text *out, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* {"time":...,"level":level,"event":event, and the fields}: one line on stderr. Each field is a
 * JSON member without braces, as "\"port\":8080"; "" for none. A reader that does not read costs
 * lines, never time. */
void log_line(const char *level, const char *event, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

#endif
