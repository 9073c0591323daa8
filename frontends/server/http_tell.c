/* http_tell.c - answers about the server itself: health, metrics, models; see request.h. */
#include "api_ollama.h"
#include "api_tei.h"
#include "request.h"

#include "frontends/console.h"

#include <stdio.h>

static const char *state_name(model_worker *l) {
    static const char *const names[] = {"loading", "ok", "failing", "failing", "model_changed"};
    return names[model_worker_state_of(l)];
}

/* The state of the first model; if that is good, of the reranker beside it. */
static const char *health_of(const request *r) {
    model_worker *w = r->models->workers[ROLE_MAIN], *reranker = r->models->workers[ROLE_RERANKER];
    if (atomic_load(&r->h->draining)) return "draining";
    if (reranker && model_worker_state_of(w) == WORKER_READY) w = reranker;
    return state_name(w);
}

static void tell_health(request *r) {
    buffer body = {0};
    const char *health = health_of(r);
    model_worker *const *w = r->models->workers;
    buffer_printf(&body, "{\"status\":\"%s\"", health);
    for (int i = ROLE_MAIN + 1; i < N_ROLES; i++)
        if (w[i]) buffer_printf(&body, ",\"%s\":\"%s\"", role_name((role)i), state_name(w[i]));
    if (!strcmp(health, "model_changed"))
        buffer_printf(&body, ",\"reason\":\"the model's file was written to while it is in use; "
                             "put a whole file in its place and reload\"");
    buffer_printf(&body, "}");
    request_answer(r, strcmp(health, "ok") ? 503 : 200, &body, JSON);
}

static void tell_metrics(request *r) {
    http *h = r->h;
    model_worker *const *workers = r->models->workers;
    buffer body = {0};
    gauges g = {.healthy = !strcmp(health_of(r), "ok"),
                .devices = model_worker_devices(workers[ROLE_MAIN]),
                .cache_bytes = model_worker_cache_bytes(workers[ROLE_MAIN])};
    for (int i = 0; i < N_ROLES; i++) {
        model_worker *w = workers[i];
        if (!w) continue;
        const queue_depth d = model_worker_depth(w);
        g.worker[i].model = http_name_of(h, w);
        g.worker[i].table = model_worker_table(w);
        g.worker[i].fingerprint = model_worker_fingerprint(w);
        g.worker[i].queue_texts = d.texts;
        g.worker[i].queue_tokens = d.tokens;
        g.worker[i].queue_requests = d.requests;
    }
    g.connections = connections_count(h->connections);
    metrics_text(h->opt.metrics, &body, &g);
    request_answer(r, 200, &body, "text/plain; version=0.0.4; charset=utf-8");
}

/* ---- models ---------------------------------------------------------------------------------- */

/* Lists the names of all models; returns their number. */
static int list_models(const request *r, api_model models[MAX_NAMES + N_ROLES]) {
    const http_options *o = &r->h->opt;
    const int ranks_only = model_worker_is_reranker(r->models->workers[ROLE_MAIN]);
    int n = 0;
    for (; n < o->n_names; n++) models[n] = (api_model){o->names[n], ranks_only};
    if (o->fallback_name) models[n++] = (api_model){o->fallback_name, 0};
    if (o->reranker_name) models[n++] = (api_model){o->reranker_name, 1};
    return n;
}

static void tell_models(request *r) {
    api_model models[MAX_NAMES + N_ROLES];
    buffer body = {0};
    const int n = list_models(r, models);
    api_models(&body, models, n, (long)r->models->created);
    request_answer(r, 200, &body, JSON);
}

static void no_such_model(request *r, const char *name) {
    api_fail(&r->error, 404, "model_not_found", "model",
             "model: not served here (got %.80s, want %.80s)", name,
             http_name_of(r->h, r->models->workers[ROLE_MAIN]));
    request_answer_error(r);
}

static void tell_model(request *r) {
    buffer body = {0};
    char name[300]; /* longer than any that is served */
    snprintf(name, sizeof name, "%s", r->model);
    for (size_t n = strlen(name); n && name[n - 1] == '/'; n--) name[n - 1] = 0;
    const model_worker *w = http_worker_named(r, name);
    if (!w) {
        no_such_model(r, name);
        return;
    }
    const api_model model = {name, model_worker_is_reranker(w)};
    api_model_json(&body, &model, (long)r->models->created);
    request_answer(r, 200, &body, JSON);
}

static api_ollama_card card_of(const request *r, const model_worker *w, const char *name) {
    return (api_ollama_card){.name = name,
                             .file = model_worker_file(w),
                             .loaded = (long)r->models->created,
                             .max_tokens = model_worker_max_tokens(w)};
}

static void tell_tags(request *r) {
    api_model models[MAX_NAMES + N_ROLES];
    api_ollama_card cards[MAX_NAMES + N_ROLES];
    buffer body = {0};
    const int n = list_models(r, models);
    for (int i = 0; i < n; i++)
        cards[i] = card_of(r, http_worker_named(r, models[i].name), models[i].name);
    api_ollama_tags(&body, cards, n);
    request_answer(r, 200, &body, JSON);
}

static void tell_version(request *r) {
    buffer body = {0};
    buffer_printf(&body, "{\"version\":\"" QEMB_VERSION "\"}");
    request_answer(r, 200, &body, JSON);
}

static void show_model(request *r) {
    const http *h = r->h;
    buffer body = {0};
    if (api_ollama_parse_show(&r->api, r->body ? r->body : "", r->len, &r->error)) {
        request_answer_error(r);
        return;
    }
    const char *name = r->api.model;
    const model_worker *w = name ? http_worker_named(r, name) : r->models->workers[ROLE_MAIN];
    if (!w) {
        no_such_model(r, name);
        return;
    }
    const api_ollama_card card = card_of(r, w, http_name_of(h, w));
    api_ollama_show(&body, &card);
    request_answer(r, 200, &body, JSON);
}

/* ---- text-embeddings-inference --------------------------------------------------------------- */

static const char *dtype_of(qemb_math math) {
    static const char *const names[] = {
        [QEMB_MATH_F32] = "float32", [QEMB_MATH_BF16] = "bfloat16", [QEMB_MATH_INT16] = "int16",
        [QEMB_MATH_INT8] = "int8",   [QEMB_MATH_FP8] = "fp8",       [QEMB_MATH_F16] = "float16"};
    return names[math];
}

static void tell_info(request *r) {
    static const char *const poolings[] = {"last_token", "mean", "cls"};
    const http *h = r->h;
    model_worker *w = r->models->workers[ROLE_MAIN];
    const model_options *o = model_worker_model_options(w);
    const qemb_config *c = &model_worker_file(w)->config;
    buffer body = {0};
    const api_tei_card card = {
        .model = http_name_of(h, w),
        .dtype = dtype_of(o->ops->math),
        .pooling = c->kind == QEMB_RERANKER ? NULL : poolings[c->pooling],
        .max_requests = h->opt.max_connections,
        .max_tokens = model_worker_max_tokens(w),
        .batch_tokens = o->engine.batch_tokens,
        .max_texts = h->opt.max_texts,
        .threads = h->opt.http_threads,
        .truncates = o->truncate,
    };
    api_tei_info(&body, &card);
    request_answer(r, 200, &body, JSON);
}

static void tell(request *r) {
    switch (r->route) {
    case ROUTE_SHOW:
        show_model(r);
        break;
    case ROUTE_MODELS:
        tell_models(r);
        break;
    case ROUTE_MODEL:
        tell_model(r);
        break;
    case ROUTE_INFO:
        tell_info(r);
        break;
    case ROUTE_TAGS:
        tell_tags(r);
        break;
    case ROUTE_VERSION:
        tell_version(r);
        break;
    case ROUTE_METRICS:
        tell_metrics(r);
        break;
    default:
        tell_health(r);
        break;
    }
}

void http_tell(request *r) {
    http_take_models(r);
    tell(r);
    http_drop_models(r);
}
