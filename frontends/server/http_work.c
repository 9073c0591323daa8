/* http_work.c - the work of a request: parse, choose a model, tokenize, queue, respond; see
 * request.h.
 *
 * A request with "fallback": true is computed by the second model, if there is one, while the first
 * one is loading, failing, or has a full queue. The response's "model" then names the second one,
 * and qemb_fallbacks_total counts the request. A request with token ids never falls back, since ids
 * belong to one model.
 *
 * A request to rerank goes the same way to the server's reranker; its documents are the texts.
 */
#include "api_ollama.h"
#include "api_rerank.h"
#include "api_tei.h"
#include "request.h"

#include "frontends/console.h"
#include "log.h"

#include <stdio.h>

/* Seconds after which a client may ask again whether a changed model has been loaded again. */
#define CHANGED_RETRY 10

/* A request in a queue has two owners, the queue and the thread that has submitted it, which still
 * looks at it. Returns 1 to the last one that lets go: it goes on with the request. */
static int is_last_owner(request *r) { return atomic_fetch_sub(&r->owners, 1) == 1; }

static void resume(pending_request *t) {
    request *r = (request *)t;
    if (is_last_owner(r)) pool_finish(r->h->pool, r);
}

static int departed(pending_request *t) { return atomic_load(&((request *)t)->gone); }

/* Returns the worker that computes the request: of the model that it names, or of the server's
 * model of the kind that it needs. NULL: there is none. */
static model_worker *choose_worker(request *r) {
    const http *h = r->h;
    model_worker *const *workers = r->models->workers;
    const char *name = r->api.model;
    const char *kind = request_ranks(r) ? "reranker" : "embedding model";
    model_worker *own = workers[ROLE_MAIN];
    if (model_worker_is_reranker(own) != request_ranks(r))
        own = request_ranks(r) ? workers[ROLE_RERANKER] : NULL;
    if (!own) {
        api_fail(&r->error, 400, "wrong_model_kind", "model", "model: this server has no %s", kind);
        return NULL;
    }
    model_worker *w = name ? http_worker_named(r, name) : own;
    if (!w)
        api_fail(&r->error, 404, "model_not_found", "model",
                 "model: not served here (got %.80s, want %.80s)", name, http_name_of(h, own));
    if (!w || model_worker_is_reranker(w) == request_ranks(r)) return w;
    api_fail(&r->error, 400, "wrong_model_kind", "model", "model: no %s (got %.80s, want %.80s)",
             kind, name, http_name_of(h, own));
    return NULL;
}

void http_take_models(request *r) {
    if (!r->models) r->models = models_take(r->h->models);
}

void http_drop_models(request *r) {
    if (r->models) models_drop(r->h->models, r->models);
    r->models = NULL;
    r->work.worker = NULL;
}

/* Frees w. Its request does not wait. */
static void work_clear(request *r, work *w) {
    pending_request_clear(&w->pending);
    request_release(r, w->held);
    w->held = 0;
}

/* Tokenizes the request's texts for worker into *w and counts the memory of the response. On
 * failure returns -1 with *e, and *w holds nothing. */
static int prepare(request *r, model_worker *worker, work *w, api_error *e) {
    const int whole = model_worker_dim(worker);
    *w = (work){.worker = worker,
                .role = model_worker_role(worker),
                .dim = r->api.dimensions ? r->api.dimensions : whole};
    if (w->dim > whole)
        return api_fail(e, 400, "invalid_dimensions", "dimensions",
                        "dimensions: out of range (got %d, want 1..%d)", w->dim, whole);
    if (r->route != ROUTE_TOKENIZE) {
        const size_t name_len = strlen(http_name_of(r->h, worker));
        const size_t room = request_ranks(r)
                                ? api_rerank_room(&r->api, name_len)
                                : api_vectors_room(r->texts, w->dim, &r->api.output, name_len);
        if (request_hold(r, room, e)) return -1;
        w->held = room;
    }
    if (!model_worker_tokenize(worker, &r->api, &w->pending, &w->tokens, w->recipe, e)) return 0;
    work_clear(r, w);
    return -1;
}

static int parse(request *r) {
    const char *body = r->body ? r->body : "";
    const int most = r->h->opt.max_texts;
    switch (r->route) {
    case ROUTE_TEI:
        return api_tei_parse(&r->api, body, r->len, most, &r->error);
    case ROUTE_OLLAMA:
    case ROUTE_OLLAMA_OLD:
        return api_ollama_parse(&r->api, r->route == ROUTE_OLLAMA_OLD, body, r->len, most,
                                &r->error);
    case ROUTE_EMBEDDINGS:
        return api_parse(&r->api, API_EMBEDDINGS, body, r->len, most, &r->error);
    case ROUTE_TOKENIZE:
        return api_parse(&r->api, API_TOKENIZE, body, r->len, most, &r->error);
    default:
        return api_rerank_parse(&r->api, r->route == ROUTE_RERANK, body, r->len, most, &r->error);
    }
}

/* Whether the server is to log the name of an ignored key: not if it did before, and not the names
 * beyond IGNORED_NAMES. */
static int is_news(http *h, const char *name) {
    int i = 0;
    pthread_mutex_lock(&h->lock);
    while (i < h->n_ignored && strcmp(h->ignored[i], name)) i++;
    const int news = i == h->n_ignored && i < IGNORED_NAMES;
    if (news) strcpy(h->ignored[h->n_ignored++], name);
    pthread_mutex_unlock(&h->lock);
    return news;
}

static void tell_ignored(request *r) {
    const api_request *a = &r->api;
    if (a->n_ignored) metrics_add(r->h->opt.metrics, COUNT_IGNORED_KEYS, (uint64_t)a->n_ignored);
    for (int i = 0; i < a->n_ignored && i < API_IGNORED; i++)
        if (*a->ignored[i] && is_news(r->h, a->ignored[i]))
            log_line("warning", "ignored_key",
                     "\"request_id\":\"%s\",\"path\":\"%s\",\"key\":\"%s\"", r->id,
                     route_path(r->route), a->ignored[i]);
}

/* Parses the body, tokenizes its texts, frees the body. */
static int read_request(request *r) {
    model_worker *worker = NULL;
    http_take_models(r);
    int bad = parse(r) || !(worker = choose_worker(r));
    r->texts = r->api.n;
    bad = bad || prepare(r, worker, &r->work, &r->error);
    request_drop_body(r);
    if (!bad) tell_ignored(r);
    return bad ? -1 : 0;
}

/* Writes the response of a request whose texts are computed. */
static int write_response(request *r, buffer *body) {
    const work *w = &r->work;
    const char *name = http_name_of(r->h, w->worker);
    const api_answer a = {.texts = w->pending.texts,
                          .n = r->texts,
                          .dim = w->dim,
                          .output = r->api.output,
                          .key = r->api.key,
                          .model = name,
                          .recipe = w->recipe,
                          .tokens = w->tokens,
                          .seconds = seconds_now() - r->start};
    const api_rerank_frame frame = {.id = r->id,
                                    .model = name,
                                    .version = r->route == ROUTE_RERANK_V2 ? "2" : "1",
                                    .tokens = w->tokens};
    switch (r->route) {
    case ROUTE_TEI:
        return api_tei(body, &a, &r->error);
    case ROUTE_OLLAMA:
    case ROUTE_OLLAMA_OLD:
        return api_ollama(body, &a, r->route == ROUTE_OLLAMA_OLD, &r->error);
    case ROUTE_EMBEDDINGS:
        return api_embeddings(body, &a, &r->error);
    default:
        return api_rerank(body, &r->api, w->pending.texts, &frame, &r->error);
    }
}

/* The answer to a request whose model's file was written to. It lasts until a reload. */
static int model_changed(api_error *e) {
    api_fail(e, 503, "model_changed", NULL,
             "server: the model's file was written to while it is in use; no vectors until it is "
             "loaded again");
    e->retry_after = CHANGED_RETRY;
    return -1;
}

static int shutting_down(api_error *e) {
    api_fail(e, 503, "shutting_down", NULL, "server: it is being stopped");
    e->retry_after = 1;
    return -1;
}

static int has_changed(const request *r) {
    return model_worker_state_of(r->work.worker) == WORKER_CHANGED;
}

static void finish(request *r) {
    metrics *m = r->h->opt.metrics;
    buffer body = {0};
    switch (r->work.pending.state) {
    case REQUEST_DONE:
        if (write_response(r, &body)) break;
        metrics_add(m, request_ranks(r) ? COUNT_DOCUMENTS : COUNT_TEXTS, (uint64_t)r->texts);
        metrics_add(m, request_ranks(r) ? COUNT_DOCUMENT_TOKENS : COUNT_TOKENS, r->work.tokens);
        metrics_add(m, COUNT_DEDUP, (uint64_t)r->work.shared);
        request_answer(r, 200, &body, JSON);
        return;
    case REQUEST_GONE:
        request_answer(r, 499, &body, NULL);
        return;
    case REQUEST_EXPIRED:
        api_fail(&r->error, 503, "deadline_exceeded", NULL,
                 "server: no batch had room for this request in %g s, its --deadline",
                 r->h->opt.deadline);
        r->error.retry_after = model_worker_retry_after(r->work.worker);
        break;
    case REQUEST_STOPPED:
        if (has_changed(r)) {
            model_changed(&r->error);
            break;
        }
        shutting_down(&r->error);
        break;
    case REQUEST_NEW:
    case REQUEST_WAITING: /* not accepted: error is set */
        break;
    }
    request_answer_error(r);
}

void http_finish_work(request *r) {
    if (r->route == ROUTE_RELOAD)
        http_end_reload(r);
    else
        finish(r);
}

/* Puts the texts into the worker's queue. */
static int submit(request *r, api_error *e) {
    const double deadline = r->h->opt.deadline;
    queue_refusal no;
    if (!model_worker_submit(r->work.worker, &r->work.pending, &r->work.shared, &no)) return 0;
    if (has_changed(r)) return model_changed(e);
    if (no.why == QUEUE_STOPPED) return shutting_down(e);
    if (no.why == QUEUE_LARGE) /* no Retry-After: clients would send it again in vain */
        return api_fail(e, 413, "too_slow", r->api.key,
                        "%s: too many tokens for the server's --deadline: send fewer texts in a "
                        "request (got %lld tokens, %.3g s at %.3g tokens/s, want at most %g s)",
                        r->api.key, no.tokens, no.seconds, no.rate, deadline);
    if (no.why == QUEUE_LATE)
        api_fail(e, 429, "too_slow", NULL,
                 "server: too busy for its --deadline: retry later (got %lld tokens with those "
                 "before it, %.3g s at %.3g tokens/s, want at most %g s)",
                 no.tokens, no.seconds, no.rate, deadline);
    else
        api_fail(e, 429, "queue_full", NULL, "server: too many tokens wait already");
    e->retry_after = no.retry_after;
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
    model_worker *worker = r->models->workers[ROLE_FALLBACK];
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
    case WORKER_CHANGED:
        model_changed(&r->error);
        return fall_back(r);
    case WORKER_LOADING:
        break;
    }
    api_fail(&r->error, 503, "loading", NULL, "server: the model is being loaded");
    r->error.retry_after = 1;
    return fall_back(r);
}

int http_start_work(request *r) {
    if (read_request(r)) {
        request_answer_error(r);
        return 1;
    }
    if (!has_changed(r)) r->work.cached = model_worker_lookup(r->work.worker, &r->work.pending);
    if (r->work.cached == r->texts) {
        r->work.pending.state = REQUEST_DONE;
        http_finish_work(r);
        return 1;
    }
    start_waiting(r, &r->work);
    atomic_store(&r->owners, 2);
    const int waits = !submit_or_fall_back(r);
    if (!r->api.with_texts) api_request_free(&r->api);
    if (waits && !is_last_owner(r)) return 0;
    http_finish_work(r);
    return 1;
}

void http_tokenize(request *r) {
    buffer body = {0};
    if (read_request(r) || (has_changed(r) && model_changed(&r->error)) ||
        api_tokens(&body, r->work.pending.texts, r->texts, model_worker_max_tokens(r->work.worker),
                   http_name_of(r->h, r->work.worker), r->work.tokens, &r->error))
        request_answer_error(r);
    else
        request_answer(r, 200, &body, JSON);
}

/* The memory of the response stays counted until it is sent. The models are dropped now, since
 * until then a reload keeps them in memory. */
void http_end_work(request *r) {
    pending_request_clear(&r->work.pending);
    http_drop_models(r);
}
