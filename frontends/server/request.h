/* request.h - a request on its way through the server: what the files of the HTTP server share.
 *
 * http.c receives it and sends its answer, http_work.c gets vectors and scores for it, http_tell.c
 * answers those about the server itself. */
#ifndef QEMB_REQUEST_H
#define QEMB_REQUEST_H

#include "http_header.h"
#include "http_options.h"
#include "listen.h"

#include <microhttpd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

/* An open connection. */
typedef struct conn {
    struct conn *prev, *next;
    int fd, requests;
    int timed; /* 1: the client has to send or read, since `since` */
    double since;
} conn;

/* Names of ignored keys that a server logs, each once. */
enum { IGNORED_NAMES = 64 };

struct http {
    http_options opt;
    models *models;
    struct MHD_Daemon *daemon;
    int listen_fd, port;
    keys *keys; /* NULL: no key is needed */
    uint32_t id_start;
    atomic_uint id_next;
    atomic_size_t held; /* bytes of bodies and of responses to come */
    atomic_int draining, active;
    pthread_t acceptor;
    pthread_mutex_t lock; /* guards the members below */
    conn *conns;
    int n_accepted, n_fresh; /* open sockets; those not yet in conns */
    double last_change;
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

typedef struct {
    work work; /* has to be first: a pending_request is cast to its request */
    http *h;
    struct MHD_Connection *connection;
    conn *conn;
    model_set *models; /* those that it is answered with, from the end of its body on; or NULL */
    reload_call reload;
    route route;
    const char *model; /* of ROUTE_MODEL: its name, which libmicrohttpd owns */
    int is_options;    /* 1: the method is OPTIONS */
    enum { RECEIVING, WAITING, ANSWERED } phase;
    char id[65];
    char trace[TRACE_ROOM], span[SPAN_ROOM]; /* of the client's trace; "": none */
    double start;
    api_error error;       /* if status is not 0: the response */
    compression coding;    /* of the body */
    decompressor *decoder; /* NULL: COMPRESSION_NONE */
    char *body;
    size_t len, cap, held, thrown;
    api_request api;
    int texts, status;
} request;

#define JSON "application/json"

/* ---- http.c ---------------------------------------------------------------------------------- */

/* Counts n more bytes for r. Fails beyond the bound on memory, unless r is the only request. */
int request_hold(request *r, size_t n, api_error *e);
void request_release(request *r, size_t n);
/* Frees the body and its decoder. */
void request_drop_body(request *r);
/* Queues the response and takes over body's memory. If body->data is NULL (out of memory), closes
 * the connection. type NULL: the response has no body. */
enum MHD_Result request_answer(request *r, int status, buffer *body, const char *type);
enum MHD_Result request_answer_error(request *r); /* r->error */
/* Whether the request is one to rerank. */
int request_ranks(const request *r);
/* The name of w's model in responses. */
const char *http_name_of(const http *h, const model_worker *w);
/* The worker of the request's models with that name, or NULL. */
model_worker *http_worker_named(const request *r, const char *name);

/* ---- http_work.c ----------------------------------------------------------------------------- */

/* Starts the work of a request whose body has arrived: its answer is queued, or its connection is
 * suspended until http_finish_work can queue it. */
enum MHD_Result http_start_work(request *r);
enum MHD_Result http_finish_work(request *r);
enum MHD_Result http_tokenize(request *r);
/* Takes the models that answer r; drops them, after which nothing may look at a worker. */
void http_take_models(request *r);
void http_drop_models(request *r);
/* Frees what the work holds; the request does not wait. */
void http_end_work(request *r);

/* ---- http_tell.c ----------------------------------------------------------------------------- */

enum MHD_Result http_tell(request *r);

/* ---- http_admin.c ---------------------------------------------------------------------------- */

/* Loads the models again: like http_start_work, and called again when that is done. */
enum MHD_Result http_reload(request *r);

#endif
