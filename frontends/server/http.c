/* http.c - connections, routes, limits and responses, on libmicrohttpd; see http.h.
 *
 * When the header of a request has arrived, its path, method, key, type and length are checked. If
 * one is wrong, the body is still read and dropped before the error is sent: many clients read
 * nothing until they have sent all, and would lose an earlier response. A good request is parsed
 * and tokenized when its body has arrived. Then its connection is suspended until the queue has the
 * vectors, and the connection's thread sends the response.
 *
 * request.h says where the rest happens.
 */
#include "http.h"

#include "api_ollama.h"
#include "api_rerank.h"
#include "api_tei.h"
#include "request.h"

#include "frontends/console.h"
#include "log.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

/* A body of more than PATIENCE times the limit is not read to its end. */
#define PATIENCE 4
/* The largest window of a zstd body, 8 MiB, is the most that RFC 9659 allows in HTTP. */
#define WINDOW_LOG 23
/* Seconds that a drain waits for a further request on an idle connection, and for the first request
 * on a new one. */
#define LINGER        0.25
#define FIRST_REQUEST 5.0

/* ---- memory ---------------------------------------------------------------------------------- */

int request_hold(request *r, size_t n, api_error *e) {
    http *h = r->h;
    const size_t before = atomic_fetch_add(&h->held, n);
    if (before == r->held || before + n <= h->opt.max_memory) {
        r->held += n;
        return 0;
    }
    atomic_fetch_sub(&h->held, n);
    api_fail(e, 429, "server_overloaded", NULL, "server: no memory left for this request now");
    e->retry_after = models_retry_after(h->models);
    return -1;
}

void request_release(request *r, size_t n) {
    atomic_fetch_sub(&r->h->held, n);
    r->held -= n;
}

void request_drop_body(request *r) {
    if (r->decoder) request_release(r, decompressor_room(r->coding, WINDOW_LOG));
    decompressor_free(r->decoder);
    r->decoder = NULL;
    free(r->body);
    request_release(r, r->cap);
    r->body = NULL;
    r->len = r->cap = 0;
}

/* ---- models by name -------------------------------------------------------------------------- */

const char *http_name_of(const http *h, const model_worker *w) {
    const http_options *o = &h->opt;
    const role role = model_worker_role(w);
    return role == ROLE_MAIN       ? o->names[0]
           : role == ROLE_FALLBACK ? o->fallback_name
                                   : o->reranker_name;
}

/* Ollama's clients may end a name with the tag ":latest". */
static int is_name(const char *asked, const char *name) {
    const size_t n = strlen(name);
    return !strncmp(asked, name, n) && (!asked[n] || !strcmp(asked + n, ":latest"));
}

model_worker *http_worker_named(const request *r, const char *name) {
    const http *h = r->h;
    model_worker *const *w = r->models->workers;
    for (int i = 0; i < h->opt.n_names; i++)
        if (is_name(name, h->opt.names[i])) return w[ROLE_MAIN];
    for (int i = ROLE_MAIN + 1; i < N_ROLES; i++)
        if (w[i] && is_name(name, http_name_of(h, w[i]))) return w[i];
    return NULL;
}

/* ---- answers --------------------------------------------------------------------------------- */

/* For browsers: which origin may read the response, and in answer to OPTIONS, what it may send. */
static void allow_origin(const request *r, struct MHD_Response *m) {
    const char *origin = r->h->opt.cors_origin;
    const char *asked = MHD_lookup_connection_value(r->connection, MHD_HEADER_KIND,
                                                    "Access-Control-Request-Headers");
    if (!origin) return;
    MHD_add_response_header(m, "Access-Control-Allow-Origin", origin);
    if (strcmp(origin, "*")) MHD_add_response_header(m, "Vary", "Origin");
    MHD_add_response_header(m, "Access-Control-Expose-Headers",
                            "x-request-id, x-qemb-fingerprint, Retry-After");
    if (!r->is_options) return;
    MHD_add_response_header(m, "Access-Control-Allow-Methods", route_methods(r->route));
    if (asked && is_header_list(asked))
        MHD_add_response_header(m, "Access-Control-Allow-Headers", asked);
    MHD_add_response_header(m, "Access-Control-Max-Age", "86400");
}

static int has_results(const request *r) {
    return r->status == 200 && r->route < ROUTE_TOKENIZE && !r->is_options;
}

enum MHD_Result request_answer(request *r, int status, buffer *body, const char *type) {
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
    if (type) MHD_add_response_header(m, "Content-Type", type);
    MHD_add_response_header(m, "x-request-id", r->id);
    if (r->error.retry_after) {
        char seconds[16];
        snprintf(seconds, sizeof seconds, "%d", r->error.retry_after);
        MHD_add_response_header(m, "Retry-After", seconds);
    }
    if (status == 401) MHD_add_response_header(m, "WWW-Authenticate", "Bearer");
    if (status == 405 || status == 204)
        MHD_add_response_header(m, "Allow", route_methods(r->route));
    if (has_results(r)) MHD_add_response_header(m, "x-qemb-fingerprint", r->work.recipe);
    allow_origin(r, m);
    if (atomic_load(&h->draining)) MHD_add_response_header(m, "Connection", "close");
    pthread_mutex_lock(&h->lock); /* from now on the client has to read */
    r->conn->timed = 1;
    r->conn->since = seconds_now();
    pthread_mutex_unlock(&h->lock);
    const enum MHD_Result result = MHD_queue_response(r->connection, (unsigned)status, m);
    MHD_destroy_response(m);
    return result;
}

int request_ranks(const request *r) {
    return r->route >= ROUTE_RERANK_V1 && r->route <= ROUTE_RERANK;
}

enum MHD_Result request_answer_error(request *r) {
    buffer body = {0};
    if (request_ranks(r))
        api_rerank_error(&body, r->api.is_tei, &r->error);
    else if (r->route == ROUTE_TEI || r->route == ROUTE_INFO)
        api_tei_error(&body, &r->error);
    else if (r->route == ROUTE_OLLAMA || r->route == ROUTE_OLLAMA_OLD || r->route == ROUTE_SHOW ||
             r->route == ROUTE_TAGS || r->route == ROUTE_VERSION)
        api_ollama_error(&body, &r->error);
    else
        api_error_json(&body, &r->error);
    return request_answer(r, r->error.status, &body, JSON);
}

static enum MHD_Result answer_options(request *r) {
    buffer nothing = {.data = malloc(1)};
    return request_answer(r, 204, &nothing, NULL);
}

/* ---- the header ------------------------------------------------------------------------------ */

static const char *header(request *r, const char *name) {
    return MHD_lookup_connection_value(r->connection, MHD_HEADER_KIND, name);
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

static int takes_body(const request *r) { return route_takes_body(r->route) && !r->is_options; }

static int check_key(request *r) {
    const char *given = header(r, "Authorization");
    /* Browsers send OPTIONS without the key. */
    if (!r->h->keys || r->is_options || r->route == ROUTE_HEALTH || r->route == ROUTE_METRICS)
        return 0;
    if (given && !strncasecmp(given, "Bearer ", 7) && keys_match(r->h->keys, given + 7)) return 0;
    return api_fail(&r->error, 401, "invalid_api_key", NULL,
                    given ? "Authorization: not a key of this server"
                          : "Authorization: missing (want Bearer and a key)");
}

static int check_method(request *r, const char *method) {
    if (r->route == ROUTE_OTHER)
        return api_fail(&r->error, 404, "unknown_url", NULL, "path: not here (want %s)",
                        route_list);
    if (r->is_options) return 0;
    const int post = route_takes_body(r->route);
    if (post ? !strcmp(method, "POST") : !strcmp(method, "GET") || !strcmp(method, "HEAD"))
        return 0;
    return api_fail(&r->error, 405, "method_not_allowed", NULL, "method: not for %s (want %s)",
                    route_path(r->route), post ? "POST" : "GET");
}

static int open_decoder(request *r) {
    const size_t room = decompressor_room(r->coding, WINDOW_LOG);
    if (request_hold(r, room, &r->error)) return -1;
    r->decoder = decompressor_new(r->coding, WINDOW_LOG);
    if (r->decoder) return 0;
    request_release(r, room);
    return api_fail(&r->error, 503, "out_of_memory", NULL, "body: out of memory");
}

static int check_body(request *r) {
    const char *type = header(r, "Content-Type"), *encoding = header(r, "Content-Encoding");
    const char *length = header(r, "Content-Length");
    if (!takes_body(r)) return 0;
    if (!is_json_type(type))
        return api_fail(&r->error, 415, "unsupported_media_type", NULL,
                        "Content-Type: not one that is understood (want application/json in "
                        "UTF-8)");
    r->coding = coding_of(encoding);
    if (r->coding == COMPRESSION_UNKNOWN)
        return api_fail(&r->error, 415, "unsupported_media_type", NULL,
                        "Content-Encoding: not one that is understood (want gzip, deflate, zstd or "
                        "none)");
    if (length && strtoull(length, NULL, 10) > r->h->opt.max_body)
        return api_fail(&r->error, 413, "body_too_large", NULL,
                        "body: too large (got %.20s bytes, want at most %zu)", length,
                        r->h->opt.max_body);
    return r->coding == COMPRESSION_NONE ? 0 : open_decoder(r);
}

static request *request_new(http *h, struct MHD_Connection *c, const char *method,
                            const char *url) {
    request *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    r->h = h;
    r->connection = c;
    r->route = route_of(method, url, &r->model);
    r->is_options = !strcmp(method, "OPTIONS");
    r->start = seconds_now();
    const union MHD_ConnectionInfo *info =
        MHD_get_connection_info(c, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    r->conn = info->socket_context;
    make_id(r);
    trace_parse(header(r, "traceparent"), r->trace, r->span);
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
    return endless || header(r, "Expect") ? request_answer_error(r) : MHD_YES;
}

/* ---- the body -------------------------------------------------------------------------------- */

static int grow_body(request *r, size_t n) {
    if (r->len + n > r->h->opt.max_body)
        return api_fail(&r->error, 413, "body_too_large", NULL,
                        "body: too large (want at most %zu bytes)", r->h->opt.max_body);
    if (r->len + n <= r->cap) return 0;
    size_t cap = 2 * (r->len + n) > 4096 ? 2 * (r->len + n) : 4096;
    if (cap > r->h->opt.max_body) cap = r->h->opt.max_body;
    if (request_hold(r, cap - r->cap, &r->error)) return -1;
    char *body = realloc(r->body, cap);
    if (!body) {
        request_release(r, cap - r->cap);
        return api_fail(&r->error, 503, "out_of_memory", NULL, "body: out of memory");
    }
    r->body = body;
    r->cap = cap;
    return 0;
}

static int damaged(request *r) {
    const char *why = decompressor_error(r->decoder);
    return api_fail(&r->error, 400, "invalid_encoding", NULL,
                    "body: not what its Content-Encoding says (%s)", *why ? why : "cut off");
}

/* Appends data (n), which is not encoded. */
static int add_plain(request *r, const char *data, size_t n) {
    if (grow_body(r, n)) return -1;
    memcpy(r->body + r->len, data, n);
    r->len += n;
    return 0;
}

/* Appends what data (n) decodes to. Behind a body of the full size, one more byte is tried. */
static int add_decoded(request *r, const char *data, size_t n) {
    const char *end = data + n;
    for (;;) {
        char more;
        const int full = r->len == r->h->opt.max_body;
        if (!full && r->len == r->cap && grow_body(r, 1)) return -1;
        const size_t room = full ? 1 : r->cap - r->len;
        char *to = full ? &more : r->body + r->len;
        const ptrdiff_t got = decompress(r->decoder, &data, (size_t)(end - data), to, room);
        if (got < 0 || *decompressor_error(r->decoder)) return damaged(r);
        if (full) return got ? grow_body(r, 1) : 0; /* too large */
        r->len += (size_t)got;
        if ((size_t)got < room) return 0;
    }
}

static enum MHD_Result on_body(request *r, const char *data, size_t n) {
    if (!r->error.status && takes_body(r) &&
        !(r->decoder ? add_decoded(r, data, n) : add_plain(r, data, n)))
        return MHD_YES;
    request_drop_body(r);
    r->thrown += n;
    return r->thrown / PATIENCE > r->h->opt.max_body ? MHD_NO : MHD_YES;
}

static enum MHD_Result on_complete(request *r) {
    if (r->decoder && !r->error.status && !decompressor_at_end(r->decoder)) damaged(r);
    if (r->error.status) return request_answer_error(r);
    if (r->is_options) return answer_options(r);
    if (r->route == ROUTE_TOKENIZE) return http_tokenize(r);
    return r->route < ROUTE_TOKENIZE ? http_start_work(r) : http_tell(r);
}

/* ---- libmicrohttpd's calls ------------------------------------------------------------------- */

static enum MHD_Result on_request(void *cls, struct MHD_Connection *c, const char *url,
                                  const char *method, const char *version, const char *data,
                                  size_t *n, void **cookie) {
    (void)version;
    request *r = *cookie;
    if (!r) {
        r = *cookie = request_new(cls, c, method, url);
        return r ? on_header(r, method) : MHD_NO;
    }
    if (*n) {
        const size_t got = *n;
        *n = 0;
        return on_body(r, data, got);
    }
    if (r->phase == ANSWERED) return MHD_YES;
    return r->phase == WAITING ? http_finish_work(r) : on_complete(r);
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
    if (r->route < ROUTE_RERANK_V1 && !r->is_options)
        metrics_observe(h->opt.metrics, HISTOGRAM_REQUEST_SECONDS, seconds);
    if (request_ranks(r) && !r->is_options)
        metrics_observe(h->opt.metrics, HISTOGRAM_RERANK_SECONDS, seconds);
    char trace[TRACE_ROOM + SPAN_ROOM + 32] = "";
    if (*r->trace)
        snprintf(trace, sizeof trace, ",\"trace_id\":\"%s\",\"span_id\":\"%s\"", r->trace, r->span);
    log_line(r->status >= 500 ? "error" : "info", "request",
             "\"request_id\":\"%s\",\"path\":\"%s\",\"status\":%d,\"code\":\"%s\",\"texts\":%d,"
             "\"tokens\":%" PRIu64 ",\"shared\":%d,\"cached\":%d,\"fallback\":%s,\"ms\":%.3f%s",
             r->id, route_path(r->route), r->status, r->error.status ? r->error.code : "", r->texts,
             r->work.tokens, r->work.shared, r->work.cached,
             r->work.role == ROLE_FALLBACK ? "true" : "false", 1e3 * seconds, trace);
    http_end_work(r);
    api_request_free(&r->api);
    request_drop_body(r);
    request_release(r, r->held);
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

http *http_start(const http_options *o, models *m) {
    http *h = need(calloc(1, sizeof *h));
    h->opt = *o;
    h->models = m;
    pthread_mutex_init(&h->lock, NULL);
    if (getrandom(&h->id_start, sizeof h->id_start, 0) != sizeof h->id_start)
        h->id_start = (uint32_t)time(NULL);
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
