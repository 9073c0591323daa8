/* request.h - a request on its way through the server: what the files of the HTTP server share.
 *
 * The event thread receives it (http_conn.c), checks its head and answers errors and what is asked
 * about the server itself (http.c, http_tell.c). A thread of the pool does the rest (http_pool.c,
 * http_work.c) and gives it back, to be sent. A request belongs to one of these threads, or to the
 * queue of a model worker; only `gone` is for all. */
#ifndef QEMB_REQUEST_H
#define QEMB_REQUEST_H

#include "http_header.h"
#include "http_options.h"
#include "http_parse.h"
#include "listen.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

typedef struct request request;
typedef struct conn conn;
typedef struct connections connections;
typedef struct pool pool;

/* Names of ignored keys that a server logs, each once. */
enum { IGNORED_NAMES = 64 };

struct http {
    http_options opt;
    models *models;
    connections *connections;
    pool *pool;
    int port;
    keys *keys; /* NULL: no key is needed */
    atomic_size_t held; /* bytes of bodies and of responses to come */
    atomic_int draining;
    /* of the event thread: */
    uint32_t id_start, id_next;
    int active; /* requests that have not ended */
    double last_change;
    pthread_mutex_t lock; /* guards the members below */
    char ignored[IGNORED_NAMES][API_IGNORED_NAME]; /* (n_ignored) in the log already */
    int n_ignored;
};

/* The part of a request that belongs to one worker. */
typedef struct {
    pending_request pending;
    model_worker *worker; /* of the request's models; NULL: none yet */
    role role;            /* the worker's, also when that is gone */
    int dim, cached, shared;
    uint64_t tokens;
    size_t held;              /* bytes counted for the response */
    char recipe[RECIPE_ROOM]; /* the fingerprint of model, table and prompt */
} work;

struct request {
    work work; /* has to be first: a pending_request is cast to its request */
    http *h;
    conn *conn;       /* of the event thread. NULL: the client has left */
    request *next;    /* in a list of the pool, or of what is to be sent */
    atomic_int gone;  /* 1: the client has left */
    atomic_int owners; /* that have yet to let go of a request in a queue (http_work.c) */
    http_head head;
    char *head_bytes;
    model_set *models; /* those that it is answered with, from the end of its body on; or NULL */
    reload_call reload;
    route route;
    const char *model; /* of ROUTE_MODEL: its name, in head_bytes */
    int is_options;    /* 1: the method is OPTIONS */
    int malformed;     /* not 0: it is no HTTP/1.1, and this is the status */
    int closes;        /* 1: the connection ends with the response */
    char id[65];
    char trace[TRACE_ROOM], span[SPAN_ROOM]; /* of the client's trace; "": none */
    double start;
    api_error error;    /* if status is not 0: the response */
    compression coding; /* of the body */
    char *body;
    size_t len, cap, held, thrown;
    api_request api;
    int texts;
    int status;       /* of the response; 0: there is none yet */
    buffer answer;    /* its body. data NULL: none, the connection is closed */
    const char *type; /* NULL: the response has no body */
};

#define JSON "application/json"

/* ---- http.c ---------------------------------------------------------------------------------- */

/* A request with this head (n). NULL: out of memory. */
request *request_new(http *h, conn *c, const char *head, size_t n);
/* Sets the error of a request behind which nothing can be read. */
void request_malformed(request *r, int status, const char *code, const char *why);
/* Checks what the head says. Returns 1 if the request has its response already. */
int request_check(request *r);
/* Takes a piece of the body, or drops it. Returns -1, with a response, if it is read no further. */
int request_add_body(request *r, const char *data, size_t n);
/* The body has arrived. Returns 1 if the request has its response, 0 if the pool now has it. */
int request_complete(request *r);
/* What the pool does with it. Returns 0 if the request waits in a queue and is no longer the
 * caller's, 1 if it has its response. */
int request_work(request *r);
/* Writes the head of the response. */
void request_write_head(request *r, buffer *out);
/* Counts, logs and frees the request. sent: its response was, as a whole. */
void request_end(request *r, int sent);

/* Counts n more bytes for r. Fails beyond the bound on memory, unless r is the only request. */
int request_hold(request *r, size_t n, api_error *e);
void request_release(request *r, size_t n);
void request_drop_body(request *r);
/* Sets the response and takes over body's memory. If body->data is NULL (out of memory), the
 * connection will be closed. type NULL: the response has no body. */
void request_answer(request *r, int status, buffer *body, const char *type);
void request_answer_error(request *r); /* r->error */
/* Whether the request is one to rerank. */
int request_ranks(const request *r);
/* The name of w's model in responses. */
const char *http_name_of(const http *h, const model_worker *w);
/* The worker of the request's models with that name, or NULL. */
model_worker *http_worker_named(const request *r, const char *name);

/* ---- http_conn.c ----------------------------------------------------------------------------- */

/* Opens the listening sockets; *port is the port. Then starts the event thread. They end the
 * process with a message on failure. */
connections *connections_open(http *h, int *port);
void connections_start(connections *cs);
/* Accepts what waits in the listen queue and closes the listening sockets. */
void connections_drain(connections *cs);
int connections_idle(connections *cs);
/* Ends the event thread and closes all connections. */
void connections_stop(connections *cs);
void connections_free(connections *cs); /* after pool_free */
int connections_count(const connections *cs);
/* Gives a request with its response back to the event thread. For any thread. */
void connections_answer(connections *cs, request *r);

/* ---- http_pool.c ----------------------------------------------------------------------------- */

pool *pool_start(http *h);
/* Gives r to a thread, which does request_work or http_finish_work with it. For any thread. */
void pool_work(pool *p, request *r);
void pool_finish(pool *p, request *r);
/* Does what is left to do and ends the threads. */
void pool_free(pool *p);

/* ---- http_work.c ----------------------------------------------------------------------------- */

/* Starts the work of a request whose body has arrived. Returns 1 if it has its response, 0 if it
 * waits in a queue, which passes it to the pool when http_finish_work can answer it. */
int http_start_work(request *r);
void http_finish_work(request *r);
void http_tokenize(request *r);
/* Takes the models that answer r; drops them, after which nothing may look at a worker. */
void http_take_models(request *r);
void http_drop_models(request *r);
/* Frees the texts and drops the models; the request has its response. */
void http_end_work(request *r);

/* ---- http_tell.c ----------------------------------------------------------------------------- */

void http_tell(request *r);

/* ---- http_admin.c ---------------------------------------------------------------------------- */

/* Loads the models again: like http_start_work and http_finish_work. */
int http_reload(request *r);
void http_end_reload(request *r);

#endif
