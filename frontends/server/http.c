/* http.c - routes, limits, bodies and responses; see http.h.
 *
 * When the head of a request has arrived, its path, method, key, type and length are checked. If
 * one is wrong, the body is still read and dropped before the error is sent: many clients read
 * nothing until they have sent all, and would lose an earlier response. But a body whose end is
 * uncertain, or much too far, is not read: the error is sent at once, and the connection closed.
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
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>

/* A body of more than PATIENCE times the limit is not read to its end. */
#define PATIENCE 4
/* The largest window of a zstd body, 8 MiB, is the most that RFC 9659 allows in HTTP. */
#define WINDOW_LOG 23

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

static const char *header(const request *r, const char *name) { return http_field(&r->head, name); }

/* For browsers: which origin may read the response, and in answer to OPTIONS, what it may send. */
static void allow_origin(const request *r, buffer *out) {
    const char *origin = r->h->opt.cors_origin;
    const char *asked = header(r, "Access-Control-Request-Headers");
    if (!origin) return;
    buffer_printf(out, "Access-Control-Allow-Origin: %s\r\n", origin);
    if (strcmp(origin, "*")) buffer_printf(out, "Vary: Origin\r\n");
    buffer_printf(out, "Access-Control-Expose-Headers: x-request-id, x-qemb-fingerprint, "
                       "Retry-After\r\n");
    if (!r->is_options) return;
    buffer_printf(out, "Access-Control-Allow-Methods: %s\r\n", route_methods(r->route));
    if (asked && is_header_list(asked))
        buffer_printf(out, "Access-Control-Allow-Headers: %s\r\n", asked);
    buffer_printf(out, "Access-Control-Max-Age: 86400\r\n");
}

static int has_results(const request *r) {
    return r->status == 200 && r->route < ROUTE_TOKENIZE && !r->is_options;
}

static const char *reason(int status) {
    static const struct {
        int status;
        const char *reason;
    } reasons[] = {{200, "OK"},
                   {204, "No Content"},
                   {400, "Bad Request"},
                   {401, "Unauthorized"},
                   {403, "Forbidden"},
                   {404, "Not Found"},
                   {405, "Method Not Allowed"},
                   {409, "Conflict"},
                   {413, "Content Too Large"},
                   {414, "URI Too Long"},
                   {415, "Unsupported Media Type"},
                   {417, "Expectation Failed"},
                   {422, "Unprocessable Content"},
                   {424, "Failed Dependency"},
                   {429, "Too Many Requests"},
                   {431, "Request Header Fields Too Large"},
                   {500, "Internal Server Error"},
                   {501, "Not Implemented"},
                   {503, "Service Unavailable"},
                   {505, "HTTP Version Not Supported"}};
    for (int i = 0; i < LENGTH(reasons); i++)
        if (reasons[i].status == status) return reasons[i].reason;
    return "Other"; /* a client needs the number alone */
}

void request_write_head(request *r, buffer *out) {
    http *h = r->h;
    const int status = r->status;
    const time_t now = time(NULL);
    struct tm tm;
    char date[64];
    gmtime_r(&now, &tm);
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", &tm);
    buffer_printf(out, "HTTP/1.1 %d %s\r\nDate: %s\r\n", status, reason(status), date);
    if (r->type)
        buffer_printf(out, "Content-Type: %s\r\nContent-Length: %zu\r\n", r->type, r->answer.len);
    buffer_printf(out, "x-request-id: %s\r\n", r->id);
    if (r->error.retry_after) buffer_printf(out, "Retry-After: %d\r\n", r->error.retry_after);
    if (status == 401) buffer_printf(out, "WWW-Authenticate: Bearer\r\n");
    if (status == 405 || status == 204)
        buffer_printf(out, "Allow: %s\r\n", route_methods(r->route));
    if (has_results(r)) buffer_printf(out, "x-qemb-fingerprint: %s\r\n", r->work.recipe);
    allow_origin(r, out);
    r->closes |= !r->head.keep_alive || atomic_load(&h->draining);
    if (r->closes)
        buffer_printf(out, "Connection: close\r\n\r\n");
    else
        buffer_printf(out, "Connection: keep-alive\r\nKeep-Alive: timeout=%.0f\r\n\r\n",
                      h->opt.keep_alive);
    if (!strcmp(r->head.method, "HEAD")) r->answer.len = 0;
}

void request_answer(request *r, int status, buffer *body, const char *type) {
    r->status = status;
    r->answer = *body;
    r->type = type;
}

int request_ranks(const request *r) {
    return r->route >= ROUTE_RERANK_V1 && r->route <= ROUTE_RERANK;
}

void request_answer_error(request *r) {
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
    /* other APIs have other numbers for what a body lacks, not for what is no HTTP */
    request_answer(r, r->malformed ? r->malformed : r->error.status, &body, JSON);
}

static void answer_options(request *r) {
    buffer nothing = {.data = malloc(1)};
    request_answer(r, 204, &nothing, NULL);
}

/* ---- the header ------------------------------------------------------------------------------ */

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
                 r->h->id_next++);
}

static int takes_body(const request *r) { return route_takes_body(r->route) && !r->is_options; }

static int check_key(request *r) {
    const char *given = header(r, "Authorization");
    /* Browsers send OPTIONS without the key. */
    if (!r->h->keys || r->is_options || r->route == ROUTE_HEALTH || r->route == ROUTE_METRICS)
        return 0;
    if (given && !strncasecmp(given, "Bearer ", 7) &&
        keys_match(r->h->keys, given + 7 + strspn(given + 7, " \t")))
        return 0;
    return api_fail(&r->error, 401, "invalid_api_key", NULL,
                    given ? "Authorization: not a key of this server"
                          : "Authorization: missing (want Bearer and a key)");
}

static int check_method(request *r) {
    const char *method = r->head.method;
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

static int too_large(request *r) {
    char got[64] = "";
    if (r->head.has_length) snprintf(got, sizeof got, "got %" PRIu64 " bytes, ", r->head.length);
    return api_fail(&r->error, 413, "body_too_large", NULL,
                    "body: too large (%swant at most %zu bytes)", got, r->h->opt.max_body);
}

/* Whether the body, of `length` bytes or more, is not read to its end. */
static int is_endless(const request *r, uint64_t length) {
    return length / PATIENCE > r->h->opt.max_body;
}

static int check_body(request *r) {
    if (is_endless(r, r->head.length)) return too_large(r);
    if (!takes_body(r)) return 0;
    if (!is_json_type(header(r, "Content-Type")))
        return api_fail(&r->error, 415, "unsupported_media_type", NULL,
                        "Content-Type: not one that is understood (want application/json in "
                        "UTF-8)");
    r->coding = coding_of(header(r, "Content-Encoding"));
    if (r->coding == COMPRESSION_UNKNOWN)
        return api_fail(&r->error, 415, "unsupported_media_type", NULL,
                        "Content-Encoding: not one that is understood (want gzip, deflate, zstd or "
                        "none)");
    return r->head.length > r->h->opt.max_body ? too_large(r) : 0;
}

void request_malformed(request *r, int status, const char *code, const char *why) {
    r->malformed = status;
    r->closes = 1;
    api_fail(&r->error, status, code, NULL, "%s", why);
}

request *request_new(http *h, conn *c, const char *head, size_t n) {
    request *r = calloc(1, sizeof *r);
    if (r) r->head_bytes = malloc(n + 1);
    if (!r || !r->head_bytes) {
        free(r);
        return NULL;
    }
    memcpy(r->head_bytes, head, n);
    const http_fault *fault = http_parse(&r->head, r->head_bytes, n);
    r->h = h;
    r->conn = c;
    r->coding = COMPRESSION_NONE;
    r->route = route_of(r->head.method, r->head.path, &r->model);
    r->is_options = !strcmp(r->head.method, "OPTIONS");
    r->start = h->last_change = seconds_now();
    h->active++;
    make_id(r);
    trace_parse(header(r, "traceparent"), r->trace, r->span);
    if (fault) request_malformed(r, fault->status, fault->code, fault->why);
    return r;
}

int request_check(request *r) {
    if (!r->malformed) {
        if (!check_method(r) && !check_key(r) && !check_body(r)) return 0;
        if (!is_endless(r, r->head.length) && !r->head.expects) return 0;
    }
    r->closes = 1;
    request_answer_error(r);
    return 1;
}

/* ---- the body -------------------------------------------------------------------------------- */

static int grow_body(request *r, size_t n) {
    if (r->len + n > r->h->opt.max_body) return too_large(r);
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

int request_add_body(request *r, const char *data, size_t n) {
    if (!r->error.status && takes_body(r) && !grow_body(r, n)) {
        memcpy(r->body + r->len, data, n);
        r->len += n;
        return 0;
    }
    request_drop_body(r);
    r->thrown += n;
    if (!is_endless(r, r->thrown)) return 0;
    if (!r->error.status) too_large(r);
    r->closes = 1;
    request_answer_error(r);
    return -1;
}

static int damaged(request *r, const decompressor *d) {
    const char *why = decompressor_error(d);
    return api_fail(&r->error, 400, "invalid_encoding", NULL,
                    "body: not what its Content-Encoding says (%s)", *why ? why : "cut off");
}

/* Appends what data (n) decodes to. Behind a body of the full size, one more byte is tried. */
static int add_decoded(request *r, decompressor *d, const char *data, size_t n) {
    const char *end = data + n;
    for (;;) {
        char more;
        const int full = r->len == r->h->opt.max_body;
        if (!full && r->len == r->cap && grow_body(r, 1)) return -1;
        const size_t room = full ? 1 : r->cap - r->len;
        char *to = full ? &more : r->body + r->len;
        const ptrdiff_t got = decompress(d, &data, (size_t)(end - data), to, room);
        if (got < 0 || *decompressor_error(d)) return damaged(r, d);
        if (full && got) return too_large(r);
        if (!full) r->len += (size_t)got;
        if ((size_t)got < room) return decompressor_at_end(d) ? 0 : damaged(r, d);
    }
}

/* Replaces the body by what it decodes to. */
static int decode(request *r) {
    const size_t room = decompressor_room(r->coding, WINDOW_LOG), cap = r->cap;
    if (r->coding == COMPRESSION_NONE) return 0;
    if (request_hold(r, room, &r->error)) return -1;
    decompressor *d = decompressor_new(r->coding, WINDOW_LOG);
    char *encoded = r->body;
    const size_t n = r->len;
    r->body = NULL;
    r->len = r->cap = 0;
    const int bad = d ? add_decoded(r, d, encoded ? encoded : "", n)
                      : api_fail(&r->error, 503, "out_of_memory", NULL, "body: out of memory");
    decompressor_free(d);
    free(encoded);
    request_release(r, room + cap);
    return bad;
}

/* ---- the work -------------------------------------------------------------------------------- */

int request_complete(request *r) {
    if (r->error.status)
        request_answer_error(r);
    else if (r->is_options)
        answer_options(r);
    else if (!takes_body(r))
        http_tell(r);
    if (r->status) return 1;
    pool_work(r->h->pool, r);
    return 0;
}

int request_work(request *r) {
    buffer none = {0};
    if (atomic_load(&r->gone)) {
        metrics_add(r->h->opt.metrics, COUNT_DEPARTED, 1);
        request_answer(r, 499, &none, NULL);
    } else if (decode(r)) {
        request_answer_error(r);
    } else if (r->route == ROUTE_TOKENIZE) {
        http_tokenize(r);
    } else if (r->route == ROUTE_RELOAD) {
        return http_reload(r);
    } else if (r->route < ROUTE_TOKENIZE) {
        return http_start_work(r);
    } else {
        http_tell(r);
    }
    return 1;
}

void request_end(request *r, int sent) {
    http *h = r->h;
    const double now = seconds_now(), seconds = now - r->start;
    const int status = sent ? r->status : 499;
    metrics_request(h->opt.metrics, r->route, status);
    if (r->route < ROUTE_RERANK_V1 && !r->is_options)
        metrics_observe(h->opt.metrics, HISTOGRAM_REQUEST_SECONDS, seconds);
    if (request_ranks(r) && !r->is_options)
        metrics_observe(h->opt.metrics, HISTOGRAM_RERANK_SECONDS, seconds);
    char trace[TRACE_ROOM + SPAN_ROOM + 32] = "";
    if (*r->trace)
        snprintf(trace, sizeof trace, ",\"trace_id\":\"%s\",\"span_id\":\"%s\"", r->trace, r->span);
    log_line(status >= 500 ? "error" : "info", "request",
             "\"request_id\":\"%s\",\"path\":\"%s\",\"status\":%d,\"code\":\"%s\",\"texts\":%d,"
             "\"tokens\":%" PRIu64 ",\"shared\":%d,\"cached\":%d,\"fallback\":%s,\"ms\":%.3f%s",
             r->id, route_path(r->route), status, r->error.status ? r->error.code : "", r->texts,
             r->work.tokens, r->work.shared, r->work.cached,
             r->work.role == ROLE_FALLBACK ? "true" : "false", 1e3 * seconds, trace);
    request_drop_body(r);
    free(r->answer.data);
    request_release(r, r->held);
    free(r->head_bytes);
    free(r);
    h->active--;
    h->last_change = now;
}

/* ---- start, end ------------------------------------------------------------------------------ */

http *http_start(const http_options *o, models *m) {
    http *h = need(calloc(1, sizeof *h));
    h->opt = *o;
    h->models = m;
    pthread_mutex_init(&h->lock, NULL);
    if (getrandom(&h->id_start, sizeof h->id_start, 0) != sizeof h->id_start)
        h->id_start = (uint32_t)time(NULL);
    if (o->key_file) h->keys = keys_read(o->key_file);
    h->opt.max_connections = listen_connections(o->max_connections);
    h->connections = connections_open(h, &h->port);
    h->pool = pool_start(h);
    connections_start(h->connections);
    return h;
}

int http_port(const http *h) { return h->port; }

void http_drain(http *h) {
    atomic_store(&h->draining, 1);
    connections_drain(h->connections);
}

int http_idle(http *h) { return connections_idle(h->connections); }

void http_stop(http *h) {
    connections_stop(h->connections);
    pool_free(h->pool);
    connections_free(h->connections);
    assert(!h->active && !atomic_load(&h->held));
    pthread_mutex_destroy(&h->lock);
    keys_free(h->keys);
    free(h);
}
