/* http.c - connections, routes, limits and responses, on libmicrohttpd; see http.h.
 *
 * When the header of a request has arrived, its path, method, key, type and length are checked. If
 * one is wrong, the body is still read and dropped before the error is sent: many clients read
 * nothing until they have sent all, and would lose an earlier response. A good request is parsed
 * and tokenized when its body has arrived. Then its connection is suspended until the queue has the
 * vectors, and the connection's thread sends the response.
 *
 * A request with "fallback": true is computed by the second model, if there is one, while the first
 * one is loading, failing, or has a full queue. The response's "model" then names the second one,
 * and qemb_fallbacks_total counts the request. A request with token ids never falls back, since ids
 * belong to one model.
 *
 * A request to rerank goes the same way to the server's reranker; its documents are the texts.
 */
#include "http.h"

#include "api_rerank.h"
#include "frontends/console.h"
#include "frontends/format.h"
#include "listen.h"
#include "log.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <microhttpd.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* A body of more than PATIENCE times the limit is not read to its end. */
#define PATIENCE 4
/* Seconds that a drain waits for a further request on an idle connection, and for the first request
 * on a new one. */
#define LINGER        0.25
#define FIRST_REQUEST 5.0

/* An open connection. */
typedef struct conn {
    struct conn *prev, *next;
    int fd, requests;
    int timed; /* 1: the client has to send or read, since `since` */
    double since;
} conn;

struct http {
    http_options opt;
    model_worker *workers[N_ROLES]; /* all but the first may be NULL */
    struct MHD_Daemon *daemon;
    int listen_fd, port;
    keys *keys; /* NULL: no key is needed */
    uint32_t id_start;
    atomic_uint id_next;
    atomic_size_t held; /* bytes of bodies and of responses to come */
    atomic_int draining, active;
    time_t created;
    pthread_t acceptor;
    pthread_mutex_t lock; /* guards the members below */
    conn *conns;
    int n_accepted, n_fresh; /* open sockets; those not yet in conns */
    double last_change;
};

/* The part of a request that belongs to one worker. */
typedef struct {
    pending_request pending;
    model_worker *worker; /* NULL: none yet */
    int dim, cached, shared;
    uint64_t tokens;
    size_t held; /* bytes counted for the response */
} work;

typedef struct {
    work work; /* has to be first: a pending_request is cast to its request */
    http *h;
    struct MHD_Connection *connection;
    conn *conn;
    route route;
    enum { RECEIVING, WAITING, ANSWERED } phase;
    char id[65];
    double start;
    api_error error; /* if status is not 0: the response */
    char *body;
    size_t len, cap, held, thrown;
    api_request api;
    int base64, texts, status;
} request;

/* ---- memory ---------------------------------------------------------------------------------- */

/* Counts n more bytes for r. Fails beyond the bound on memory, unless r is the only request. */
static int hold(request *r, size_t n, api_error *e) {
    http *h = r->h;
    const size_t before = atomic_fetch_add(&h->held, n);
    if (before == r->held || before + n <= h->opt.max_memory) {
        r->held += n;
        return 0;
    }
    atomic_fetch_sub(&h->held, n);
    api_fail(e, 429, "server_overloaded", NULL, "server: no memory left for this request now");
    e->retry_after = model_worker_retry_after(h->workers[ROLE_MAIN]);
    return -1;
}

static void release(request *r, size_t n) {
    atomic_fetch_sub(&r->h->held, n);
    r->held -= n;
}

static void drop_body(request *r) {
    free(r->body);
    release(r, r->cap);
    r->body = NULL;
    r->len = r->cap = 0;
}

/* ---- answers --------------------------------------------------------------------------------- */

/* Queues the response and takes over body's memory. If body->data is NULL (out of memory), closes
 * the connection. */
static enum MHD_Result answer(request *r, int status, buffer *body, const char *type) {
    http *h = r->h;
    r->phase = ANSWERED;
    r->status = status;
    api_request_free(&r->api);
    if (!body->data) return MHD_NO;
    struct MHD_Response *m =
        MHD_create_response_from_buffer(body->len, body->data, MHD_RESPMEM_MUST_FREE);
    if (!m) {
        free(body->data);
        return MHD_NO;
    }
    MHD_add_response_header(m, "Content-Type", type);
    MHD_add_response_header(m, "x-request-id", r->id);
    if (r->error.retry_after) {
        char seconds[16];
        snprintf(seconds, sizeof seconds, "%d", r->error.retry_after);
        MHD_add_response_header(m, "Retry-After", seconds);
    }
    if (status == 401) MHD_add_response_header(m, "WWW-Authenticate", "Bearer");
    if (status == 405)
        MHD_add_response_header(m, "Allow", r->route <= ROUTE_TOKENIZE ? "POST" : "GET, HEAD");
    if (atomic_load(&h->draining)) MHD_add_response_header(m, "Connection", "close");
    pthread_mutex_lock(&h->lock); /* from now on the client has to read */
    r->conn->timed = 1;
    r->conn->since = seconds_now();
    pthread_mutex_unlock(&h->lock);
    const enum MHD_Result result = MHD_queue_response(r->connection, (unsigned)status, m);
    MHD_destroy_response(m);
    return result;
}

#define JSON "application/json"

/* Whether the request is one to rerank. */
static int ranks(const request *r) {
    return r->route >= ROUTE_RERANK_V1 && r->route <= ROUTE_RERANK;
}

static enum MHD_Result answer_error(request *r) {
    buffer body = {0};
    if (ranks(r))
        api_rerank_error(&body, r->api.is_tei, &r->error);
    else
        api_error_json(&body, &r->error);
    return answer(r, r->error.status, &body, JSON);
}

/* ---- the header ------------------------------------------------------------------------------ */

static const char *header(request *r, const char *name) {
    return MHD_lookup_connection_value(r->connection, MHD_HEADER_KIND, name);
}

/* The other names of paths, which llama.cpp's server has. */
static const struct {
    const char *path;
    route route;
} aliases[] = {{"/v1/reranking", ROUTE_RERANK_V1}, {"/reranking", ROUTE_RERANK}};

static route find_route(const char *url) {
    for (int i = 0; i < LENGTH(aliases); i++)
        if (!strcmp(url, aliases[i].path)) return aliases[i].route;
    for (int i = 0; i < ROUTE_OTHER; i++)
        if (!strcmp(url, route_path((route)i))) return (route)i;
    return ROUTE_OTHER;
}

/* Uses the client's request id if it is safe to log, otherwise makes one. */
static void make_id(request *r) {
    const char *id = header(r, "x-request-id");
    size_t n = 0;
    while (id && n < sizeof r->id &&
           (isalnum((unsigned char)id[n]) || (id[n] && strchr("._-", id[n]))))
        n++;
    if (n && n < sizeof r->id && !id[n])
        memcpy(r->id, id, n + 1);
    else
        snprintf(r->id, sizeof r->id, "%08" PRIx32 "%08x", r->h->id_start,
                 atomic_fetch_add(&r->h->id_next, 1));
}

static int check_key(request *r) {
    const char *given = header(r, "Authorization");
    if (!r->h->keys || r->route == ROUTE_HEALTH || r->route == ROUTE_METRICS) return 0;
    if (given && !strncasecmp(given, "Bearer ", 7) && keys_match(r->h->keys, given + 7)) return 0;
    return api_fail(&r->error, 401, "invalid_api_key", NULL,
                    given ? "Authorization: not a key of this server"
                          : "Authorization: missing (want Bearer and a key)");
}

static int check_method(request *r, const char *method) {
    if (r->route == ROUTE_OTHER)
        return api_fail(&r->error, 404, "unknown_url", NULL,
                        "path: not here (want /v1/embeddings, /v1/rerank, /v1/reranking, "
                        "/v2/rerank, /rerank, /reranking, /tokenize, /v1/models, /health or "
                        "/metrics)");
    const int post = r->route <= ROUTE_TOKENIZE;
    if (post ? !strcmp(method, "POST") : !strcmp(method, "GET") || !strcmp(method, "HEAD"))
        return 0;
    return api_fail(&r->error, 405, "method_not_allowed", NULL, "method: not for %s (want %s)",
                    route_path(r->route), post ? "POST" : "GET");
}

/* Whether type is application/json, with charset UTF-8 or none. */
static int is_json(const char *type) {
    if (strncasecmp(type, JSON, sizeof JSON - 1)) return 0;
    type += sizeof JSON - 1;
    while (*type == ' ') type++;
    if (!*type) return 1;
    if (*type++ != ';') return 0;
    const char *charset = strcasestr(type, "charset=");
    if (!charset) return 1;
    charset += 8;
    return !strncasecmp(charset + (*charset == '"'), "utf-8", 5);
}

static int check_body(request *r) {
    const char *type = header(r, "Content-Type"), *encoding = header(r, "Content-Encoding");
    const char *length = header(r, "Content-Length");
    if (r->route > ROUTE_TOKENIZE) return 0;
    if ((type && !is_json(type)) || (encoding && strcasecmp(encoding, "identity")))
        return api_fail(&r->error, 415, "unsupported_media_type", NULL,
                        "Content-Type: not one that is understood (want application/json in "
                        "UTF-8, not encoded)");
    if (length && strtoull(length, NULL, 10) > r->h->opt.max_body)
        return api_fail(&r->error, 413, "body_too_large", NULL,
                        "body: too large (got %.20s bytes, want at most %zu)", length,
                        r->h->opt.max_body);
    return 0;
}

static request *request_new(http *h, struct MHD_Connection *c, const char *url) {
    request *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    r->h = h;
    r->connection = c;
    r->route = find_route(url);
    r->start = seconds_now();
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(c, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    r->conn = info->socket_context;
    make_id(r);
    atomic_fetch_add(&h->active, 1);
    pthread_mutex_lock(&h->lock);
    r->conn->requests++;
    r->conn->timed = 1;
    r->conn->since = r->start; /* the timeout starts again for the body */
    pthread_mutex_unlock(&h->lock);
    return r;
}

static enum MHD_Result on_header(request *r, const char *method) {
    const int bad = check_method(r, method) || check_key(r) ||
                    check_body(r); /* the first that fails sets error */
    if (!bad) return MHD_YES;
    const char *length = header(r, "Content-Length");
    const int endless = length && strtoull(length, NULL, 10) / PATIENCE > r->h->opt.max_body;
    return endless || header(r, "Expect") ? answer_error(r) : MHD_YES;
}

/* ---- the body -------------------------------------------------------------------------------- */

static int grow_body(request *r, size_t n) {
    if (r->len + n > r->h->opt.max_body)
        return api_fail(&r->error, 413, "body_too_large", NULL,
                        "body: too large (want at most %zu bytes)", r->h->opt.max_body);
    if (r->len + n <= r->cap) return 0;
    size_t cap = 2 * (r->len + n) > 4096 ? 2 * (r->len + n) : 4096;
    if (cap > r->h->opt.max_body) cap = r->h->opt.max_body;
    if (hold(r, cap - r->cap, &r->error)) return -1;
    char *body = realloc(r->body, cap);
    if (!body) {
        release(r, cap - r->cap);
        return api_fail(&r->error, 503, "out_of_memory", NULL, "body: out of memory");
    }
    r->body = body;
    r->cap = cap;
    return 0;
}

static enum MHD_Result on_body(request *r, const char *data, size_t n) {
    if (!r->error.status && r->route <= ROUTE_TOKENIZE && !grow_body(r, n)) {
        memcpy(r->body + r->len, data, n);
        r->len += n;
        return MHD_YES;
    }
    drop_body(r);
    r->thrown += n;
    return r->thrown / PATIENCE > r->h->opt.max_body ? MHD_NO : MHD_YES;
}

/* ---- the work -------------------------------------------------------------------------------- */

static void resume(pending_request *t) { MHD_resume_connection(((request *)t)->connection); }

/* Whether the client has left. A client that has shut down its sending half counts as gone, since
 * the server cannot tell it from one that has closed the socket. */
static int departed(pending_request *t) {
    struct pollfd p = {.fd = ((request *)t)->conn->fd, .events = POLLRDHUP};
    return poll(&p, 1, 0) == 1 && p.revents & (POLLRDHUP | POLLHUP | POLLERR);
}

static const char *name_of(const http *h, const model_worker *w) {
    const http_options *o = &h->opt;
    return w == h->workers[ROLE_MAIN]       ? o->names[0]
           : w == h->workers[ROLE_FALLBACK] ? o->fallback_name
                                            : o->reranker_name;
}

/* Returns the worker of the model of that name, or NULL. */
static model_worker *worker_named(const http *h, const char *name) {
    for (int i = 0; i < h->opt.n_names; i++)
        if (!strcmp(name, h->opt.names[i])) return h->workers[ROLE_MAIN];
    for (int i = ROLE_MAIN + 1; i < N_ROLES; i++)
        if (h->workers[i] && !strcmp(name, name_of(h, h->workers[i]))) return h->workers[i];
    return NULL;
}

/* Returns the worker that computes the request: of the model that it names, or of the server's
 * model of the kind that it needs. NULL: there is none. */
static model_worker *choose_worker(request *r) {
    const http *h = r->h;
    const char *name = r->api.model;
    const char *kind = ranks(r) ? "reranker" : "embedding model";
    model_worker *own = h->workers[ROLE_MAIN];
    if (model_worker_is_reranker(own) != ranks(r))
        own = ranks(r) ? h->workers[ROLE_RERANKER] : NULL;
    if (!own) {
        api_fail(&r->error, 400, "wrong_model_kind", "model", "model: this server has no %s", kind);
        return NULL;
    }
    model_worker *w = name ? worker_named(h, name) : own;
    if (!w)
        api_fail(&r->error, 404, "model_not_found", "model",
                 "model: not served here (got %.80s, want %.80s)", name, name_of(h, own));
    if (!w || model_worker_is_reranker(w) == ranks(r)) return w;
    api_fail(&r->error, 400, "wrong_model_kind", "model", "model: no %s (got %.80s, want %.80s)",
             kind, name, name_of(h, own));
    return NULL;
}

/* Frees w. Its request does not wait. */
static void work_clear(request *r, work *w) {
    pending_request_clear(&w->pending);
    release(r, w->held);
    w->held = 0;
}

/* Tokenizes the request's texts for worker into *w and counts the memory of the response. On
 * failure returns -1 with *e, and *w holds nothing. */
static int prepare(request *r, model_worker *worker, work *w, api_error *e) {
    const int whole = model_worker_dim(worker);
    *w = (work){.worker = worker, .dim = r->api.dimensions ? r->api.dimensions : whole};
    if (w->dim > whole)
        return api_fail(e, 400, "invalid_dimensions", "dimensions",
                        "dimensions: out of range (got %d, want 1..%d)", w->dim, whole);
    if (r->route != ROUTE_TOKENIZE) {
        const size_t name_len = strlen(name_of(r->h, worker));
        const size_t room = ranks(r) ? api_rerank_room(&r->api, name_len)
                                     : api_embeddings_room(r->texts, w->dim, r->base64, name_len);
        if (hold(r, room, e)) return -1;
        w->held = room;
    }
    if (!model_worker_tokenize(worker, &r->api, &w->pending, &w->tokens, e)) return 0;
    work_clear(r, w);
    return -1;
}

static int parse(request *r) {
    const api_kind kind = r->route == ROUTE_EMBEDDINGS ? API_EMBEDDINGS : API_TOKENIZE;
    const char *body = r->body ? r->body : "";
    const int most = r->h->opt.max_texts;
    if (!ranks(r)) return api_parse(&r->api, kind, body, r->len, most, &r->error);
    return api_rerank_parse(&r->api, r->route == ROUTE_RERANK, body, r->len, most, &r->error);
}

/* Parses the body, tokenizes its texts, frees the body. */
static int read_request(request *r) {
    model_worker *worker = NULL;
    int bad = parse(r) || !(worker = choose_worker(r));
    r->texts = r->api.n;
    r->base64 = r->api.base64;
    bad = bad || prepare(r, worker, &r->work, &r->error);
    drop_body(r);
    return bad ? -1 : 0;
}

/* Writes the response of a request whose texts are computed. */
static int write_response(request *r, buffer *body) {
    const work *w = &r->work;
    const char *name = name_of(r->h, w->worker);
    if (!ranks(r))
        return api_embeddings(body, w->pending.texts, r->texts, w->dim, r->base64, name, w->tokens,
                              &r->error);
    const api_rerank_frame frame = {.id = r->id,
                                    .model = name,
                                    .version = r->route == ROUTE_RERANK_V2 ? "2" : "1",
                                    .tokens = w->tokens};
    return api_rerank(body, &r->api, w->pending.texts, &frame, &r->error);
}

static enum MHD_Result finish_work(request *r) {
    metrics *m = r->h->opt.metrics;
    buffer body = {0};
    switch (r->work.pending.state) {
    case REQUEST_DONE:
        if (write_response(r, &body)) break;
        metrics_add(m, ranks(r) ? COUNT_DOCUMENTS : COUNT_TEXTS, (uint64_t)r->texts);
        metrics_add(m, ranks(r) ? COUNT_DOCUMENT_TOKENS : COUNT_TOKENS, r->work.tokens);
        metrics_add(m, COUNT_DEDUP, (uint64_t)r->work.shared);
        return answer(r, 200, &body, JSON);
    case REQUEST_GONE:
        r->status = 499;
        return MHD_NO;
    case REQUEST_EXPIRED:
        api_fail(&r->error, 503, "deadline_exceeded", NULL,
                 "server: no %s after %g s, the most a request may take",
                 ranks(r) ? "scores" : "vectors", r->h->opt.deadline);
        r->error.retry_after = model_worker_retry_after(r->work.worker);
        break;
    case REQUEST_STOPPED:
        api_fail(&r->error, 503, "shutting_down", NULL, "server: it is being stopped");
        r->error.retry_after = 1;
        break;
    case REQUEST_NEW:
    case REQUEST_WAITING: /* not accepted: error is set */
        break;
    }
    return answer_error(r);
}

/* Puts the texts into the worker's queue. After it returns 0, r may be resumed at any time. */
static int submit(request *r, api_error *e) {
    if (!model_worker_submit(r->work.worker, &r->work.pending, &r->work.shared)) return 0;
    api_fail(e, 429, "queue_full", NULL, "server: too many tokens wait already");
    e->retry_after = model_worker_retry_after(r->work.worker);
    return -1;
}

static void start_waiting(request *r, work *w) {
    w->pending.deadline = r->start + r->h->opt.deadline;
    w->pending.done = resume;
    w->pending.departed = departed;
}

/* Gives r to the fallback, if r allows it and the fallback can take it. Returns 0 if r waits there,
 * 1 if r has all its vectors already, -1 if r is unchanged. */
static int fall_back(request *r) {
    model_worker *worker = r->h->workers[ROLE_FALLBACK];
    api_error ignored; /* r keeps the error of the first model */
    work other;
    if (!r->api.fallback || !worker || r->work.worker == worker ||
        model_worker_state_of(worker) != WORKER_READY)
        return -1;
    for (int i = 0; i < r->texts; i++) /* ids belong to the first model */
        if (!r->api.inputs[i].text) return -1;
    if (prepare(r, worker, &other, &ignored)) return -1;
    other.cached = model_worker_lookup(worker, &other.pending);
    start_waiting(r, &other);
    work own = r->work;
    const api_error error = r->error;
    r->work = other; /* before submit: the queue keeps its address */
    r->error = (api_error){0};
    const int known = other.cached == r->texts;
    if (known) r->work.pending.state = REQUEST_DONE;
    if (!known && submit(r, &ignored)) {
        work_clear(r, &r->work);
        r->work = own;
        r->error = error;
        return -1;
    }
    work_clear(r, &own);
    metrics_add(r->h->opt.metrics, COUNT_FALLBACKS, 1);
    return known;
}

/* Returns 0 if r waits, 1 if it has all its vectors, -1 with its error set. */
static int submit_or_fall_back(request *r) {
    int fallen;
    switch (model_worker_state_of(r->work.worker)) {
    case WORKER_READY:
        return submit(r, &r->error) ? fall_back(r) : 0;
    case WORKER_FAILING:
        fallen = fall_back(r);
        return fallen < 0 ? submit(r, &r->error) : fallen;
    case WORKER_DEAD:
        return api_fail(&r->error, 503, "shutting_down", NULL, "server: its device has failed");
    case WORKER_LOADING:
        break;
    }
    api_fail(&r->error, 503, "loading", NULL, "server: the model is being loaded");
    r->error.retry_after = 1;
    return fall_back(r);
}

static enum MHD_Result start_work(request *r) {
    if (read_request(r)) return answer_error(r);
    r->work.cached = model_worker_lookup(r->work.worker, &r->work.pending);
    r->phase = WAITING;
    if (r->work.cached == r->texts) {
        r->work.pending.state = REQUEST_DONE;
        return finish_work(r);
    }
    start_waiting(r, &r->work);
    pthread_mutex_lock(&r->h->lock);
    r->conn->timed = 0; /* the client waits for the server */
    pthread_mutex_unlock(&r->h->lock);
    /* Before submit, since another thread may resume the connection right after it. */
    MHD_suspend_connection(r->connection);
    if (submit_or_fall_back(r)) MHD_resume_connection(r->connection);
    /* r belongs to this thread until it returns, even if resumed */
    if (!r->api.with_texts) api_request_free(&r->api);
    return MHD_YES;
}

static enum MHD_Result tokenize(request *r) {
    buffer body = {0};
    if (read_request(r) ||
        api_tokens(&body, r->work.pending.texts, r->texts, model_worker_max_tokens(r->work.worker),
                   name_of(r->h, r->work.worker), r->work.tokens, &r->error))
        return answer_error(r);
    return answer(r, 200, &body, JSON);
}

static const char *state_name(model_worker *l) {
    static const char *const names[] = {"loading", "ok", "failing", "failing"};
    return names[model_worker_state_of(l)];
}

/* The state of the first model; if that is good, of the reranker beside it. */
static const char *health_of(const http *h) {
    model_worker *w = h->workers[ROLE_MAIN], *reranker = h->workers[ROLE_RERANKER];
    if (atomic_load(&h->draining)) return "draining";
    if (reranker && model_worker_state_of(w) == WORKER_READY) w = reranker;
    return state_name(w);
}

static enum MHD_Result tell_health(request *r) {
    buffer body = {0};
    const char *health = health_of(r->h);
    buffer_printf(&body, "{\"status\":\"%s\"", health);
    for (int i = ROLE_MAIN + 1; i < N_ROLES; i++)
        if (r->h->workers[i])
            buffer_printf(&body, ",\"%s\":\"%s\"", role_name((role)i),
                          state_name(r->h->workers[i]));
    buffer_printf(&body, "}");
    return answer(r, strcmp(health, "ok") ? 503 : 200, &body, JSON);
}

static enum MHD_Result tell_metrics(request *r) {
    http *h = r->h;
    buffer body = {0};
    gauges g = {.healthy = !strcmp(health_of(h), "ok"),
                .devices = model_worker_devices(h->workers[ROLE_MAIN]),
                .cache_bytes = model_worker_cache_bytes(h->workers[ROLE_MAIN])};
    for (int i = 0; i < N_ROLES; i++) {
        model_worker *w = h->workers[i];
        if (!w) continue;
        const queue_depth d = model_worker_depth(w);
        g.worker[i].model = name_of(h, w);
        g.worker[i].table = model_worker_table(w);
        g.worker[i].fingerprint = model_worker_fingerprint(w);
        g.worker[i].queue_texts = d.texts;
        g.worker[i].queue_tokens = d.tokens;
        g.worker[i].queue_requests = d.requests;
    }
    pthread_mutex_lock(&h->lock);
    g.connections = h->n_accepted;
    pthread_mutex_unlock(&h->lock);
    metrics_text(h->opt.metrics, &body, &g);
    return answer(r, 200, &body, "text/plain; version=0.0.4; charset=utf-8");
}

static enum MHD_Result tell_models(request *r) {
    const http_options *o = &r->h->opt;
    const int ranks_only = model_worker_is_reranker(r->h->workers[ROLE_MAIN]);
    api_model models[MAX_NAMES + N_ROLES];
    int n = 0;
    buffer body = {0};
    for (; n < o->n_names; n++) models[n] = (api_model){o->names[n], ranks_only};
    if (o->fallback_name) models[n++] = (api_model){o->fallback_name, 0};
    if (o->reranker_name) models[n++] = (api_model){o->reranker_name, 1};
    api_models(&body, models, n, (long)r->h->created);
    return answer(r, 200, &body, JSON);
}

static enum MHD_Result on_complete(request *r) {
    if (r->error.status) return answer_error(r);
    switch (r->route) {
    case ROUTE_EMBEDDINGS:
    case ROUTE_RERANK_V1:
    case ROUTE_RERANK_V2:
    case ROUTE_RERANK:
        return start_work(r);
    case ROUTE_TOKENIZE:
        return tokenize(r);
    case ROUTE_HEALTH:
        return tell_health(r);
    case ROUTE_METRICS:
        return tell_metrics(r);
    case ROUTE_MODELS:
        return tell_models(r);
    case ROUTE_OTHER:
    case N_ROUTES:
        break;
    }
    return MHD_NO;
}

/* ---- libmicrohttpd's calls ------------------------------------------------------------------- */

static enum MHD_Result on_request(void *cls, struct MHD_Connection *c, const char *url,
                                  const char *method, const char *version, const char *data,
                                  size_t *n, void **cookie) {
    (void)version;
    request *r = *cookie;
    if (!r) {
        r = *cookie = request_new(cls, c, url);
        return r ? on_header(r, method) : MHD_NO;
    }
    if (*n) {
        const size_t got = *n;
        *n = 0;
        return on_body(r, data, got);
    }
    if (r->phase == ANSWERED) return MHD_YES;
    return r->phase == WAITING ? finish_work(r) : on_complete(r);
}

/* Called once per request, when its response is sent or its connection lost. */
static void on_completed(void *cls, struct MHD_Connection *c, void **cookie,
                         enum MHD_RequestTerminationCode how) {
    (void)c;
    http *h = cls;
    request *r = *cookie;
    if (!r) return;
    *cookie = NULL;
    const double seconds = seconds_now() - r->start;
    const int sent = how == MHD_REQUEST_TERMINATED_COMPLETED_OK && r->phase == ANSWERED;
    if (!sent && r->status != 499) r->status = 499;
    metrics_request(h->opt.metrics, r->route, r->status);
    if (r->route == ROUTE_EMBEDDINGS)
        metrics_observe(h->opt.metrics, HISTOGRAM_REQUEST_SECONDS, seconds);
    if (ranks(r)) metrics_observe(h->opt.metrics, HISTOGRAM_RERANK_SECONDS, seconds);
    log_line(r->status >= 500 ? "error" : "info", "request",
             "\"request_id\":\"%s\",\"path\":\"%s\",\"status\":%d,\"code\":\"%s\",\"texts\":%d,"
             "\"tokens\":%" PRIu64 ",\"shared\":%d,\"cached\":%d,\"fallback\":%s,\"ms\":%.3f",
             r->id, route_path(r->route), r->status, r->error.status ? r->error.code : "", r->texts,
             r->work.tokens, r->work.shared, r->work.cached,
             r->work.worker && r->work.worker == h->workers[ROLE_FALLBACK] ? "true" : "false",
             1e3 * seconds);
    work_clear(r, &r->work);
    api_request_free(&r->api);
    drop_body(r);
    release(r, r->held);
    pthread_mutex_lock(&h->lock);
    r->conn->timed = 1;
    r->conn->since = h->last_change = seconds_now();
    pthread_mutex_unlock(&h->lock);
    free(r);
    atomic_fetch_sub(&h->active, 1);
}

static void on_connection(void *cls, struct MHD_Connection *c, void **context,
                          enum MHD_ConnectionNotificationCode what) {
    http *h = cls;
    conn *k = *context;
    if (what == MHD_CONNECTION_NOTIFY_STARTED) {
        *context = k = need(calloc(1, sizeof *k));
        k->fd = MHD_get_connection_info(c, MHD_CONNECTION_INFO_CONNECTION_FD)->connect_fd;
        k->timed = 1;
        pthread_mutex_lock(&h->lock);
        k->since = h->last_change = seconds_now();
        k->next = h->conns;
        if (k->next) k->next->prev = k;
        h->conns = k;
        h->n_fresh--;
        pthread_mutex_unlock(&h->lock);
    } else if (k) { /* the socket is still open, so http_tick cannot see its number reused */
        pthread_mutex_lock(&h->lock);
        *(k->prev ? &k->prev->next : &h->conns) = k->next;
        if (k->next) k->next->prev = k->prev;
        h->n_accepted--;
        pthread_mutex_unlock(&h->lock);
        free(k);
        *context = NULL;
    }
}

/* Logs the format alone: the arguments may hold a client's data. */
static void on_message(void *cls, const char *fmt, va_list ap) {
    (void)cls;
    (void)ap;
    char quoted[6 * 128 + 3];
    const size_t n = strlen(fmt);
    *format_json_string(quoted, fmt, n < 128 ? n : 128) = 0;
    log_line("warning", "http", "\"message\":%s", quoted);
}

/* ---- accepting ------------------------------------------------------------------------------- */

/* This thread accepts connections and passes them to libmicrohttpd, for two faults of version
 * 0.9.75. MHD_quiesce_daemon may let two threads remove the listening socket from one epoll set,
 * and then ends the process. A connection beyond its limit leaves a mutex locked. So the limit is
 * applied here, and the library's own is never reached. */

/* The length of the listen queue: a drain still accepts the connections in it. */
#define BACKLOG 1024
#define POLL_MS 50

static void count_connection(http *h, int n) {
    pthread_mutex_lock(&h->lock);
    h->n_accepted += n;
    h->n_fresh += n;
    h->last_change = seconds_now();
    pthread_mutex_unlock(&h->lock);
}

/* Returns 1 if it accepted a connection, 0 if none waits or no descriptor is left. */
static int accept_one(http *h) {
    struct sockaddr_storage from;
    socklen_t n = sizeof from;
    const int fd =
        accept4(h->listen_fd, (struct sockaddr *)&from, &n, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) return errno == EINTR || errno == ECONNABORTED;
    count_connection(h, 1);
    if (MHD_add_connection(h->daemon, fd, (struct sockaddr *)&from, n) == MHD_NO)
        count_connection(h, -1); /* libmicrohttpd has closed fd */
    return 1;
}

static void *accept_main(void *arg) {
    http *h = arg;
    struct pollfd p = {.fd = h->listen_fd, .events = POLLIN};
    while (!atomic_load(&h->draining)) {
        pthread_mutex_lock(&h->lock);
        const int full = h->n_accepted >= h->opt.max_connections;
        pthread_mutex_unlock(&h->lock);
        const int wait = full || (poll(&p, 1, POLL_MS) == 1 && !accept_one(h));
        if (wait) poll(NULL, 0, 1); /* wait for a connection to end */
    }
    for (int i = 0; i < BACKLOG && accept_one(h);) i++;
    close(h->listen_fd); /* further connections are refused */
    return NULL;
}

/* ---- start, tick, end ------------------------------------------------------------------------ */

http *http_start(const http_options *o, model_worker *const workers[N_ROLES]) {
    http *h = need(calloc(1, sizeof *h));
    h->opt = *o;
    memcpy(h->workers, workers, sizeof h->workers);
    h->created = time(NULL);
    pthread_mutex_init(&h->lock, NULL);
    if (getrandom(&h->id_start, sizeof h->id_start, 0) != sizeof h->id_start)
        h->id_start = (uint32_t)h->created;
    if (o->key_file) h->keys = keys_read(o->key_file);
    h->listen_fd = listen_open(o->host, o->port, &h->port);
    h->opt.max_connections = listen_connections(o->max_connections);
    const unsigned threads = (unsigned)o->http_threads; /* the limit is split evenly among them */
    const unsigned most = threads * ((unsigned)h->opt.max_connections + BACKLOG + 1);
    h->daemon =
        MHD_start_daemon(MHD_USE_EPOLL_INTERNAL_THREAD | MHD_USE_NO_LISTEN_SOCKET | MHD_USE_ITC |
                             MHD_ALLOW_SUSPEND_RESUME | MHD_USE_ERROR_LOG,
                         0, NULL, NULL, on_request, h, MHD_OPTION_EXTERNAL_LOGGER, on_message, NULL,
                         MHD_OPTION_THREAD_POOL_SIZE, threads, MHD_OPTION_CONNECTION_LIMIT, most,
                         MHD_OPTION_NOTIFY_COMPLETED, on_completed, h, MHD_OPTION_NOTIFY_CONNECTION,
                         on_connection, h, MHD_OPTION_END);
    if (!h->daemon) DIE(STATUS_MODEL, "libmicrohttpd: cannot start");
    const int error = pthread_create(&h->acceptor, NULL, accept_main, h);
    if (error) DIE(STATUS_MODEL, "thread: cannot start it (%s)", strerror(error));
    return h;
}

int http_port(const http *h) { return h->port; }

void http_tick(http *h, double now) {
    pthread_mutex_lock(&h->lock);
    for (conn *k = h->conns; k; k = k->next) {
        if (!k->timed || now - k->since < h->opt.receive_timeout) continue;
        shutdown(k->fd, SHUT_RDWR); /* its thread sees the end of input and cleans up */
        k->timed = 0;
        metrics_add(h->opt.metrics, COUNT_REAPED, 1);
    }
    pthread_mutex_unlock(&h->lock);
}

void http_drain(http *h) {
    atomic_store(&h->draining, 1);
    pthread_join(h->acceptor, NULL);
    pthread_mutex_lock(&h->lock);
    h->last_change = seconds_now();
    pthread_mutex_unlock(&h->lock);
}

int http_idle(http *h, double now) {
    int idle = !atomic_load(&h->active);
    pthread_mutex_lock(&h->lock);
    if (h->n_fresh || now - h->last_change < LINGER) idle = 0;
    for (conn *k = h->conns; k && idle; k = k->next) /* a new connection gets time for a request */
        if (!k->requests && now - k->since < FIRST_REQUEST) idle = 0;
    pthread_mutex_unlock(&h->lock);
    return idle;
}

void http_stop(http *h) {
    MHD_stop_daemon(h->daemon);
    assert(!h->conns);
    pthread_mutex_destroy(&h->lock);
    keys_free(h->keys);
    free(h);
}
