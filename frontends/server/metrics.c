/* metrics.c - counters, histograms, gauges; see metrics.h. */
#include "metrics.h"

#include "frontends/console.h"
#include "log.h"
#include "qemb.h"

#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- counters -------------------------------------------------------------------------------- */

const char *route_path(route r) {
    static const char *const paths[N_ROUTES] = {
        "/v1/embeddings",  "/embed",          "/api/embed", "/api/embeddings", "/v1/rerank",
        "/v2/rerank",      "/rerank",         "/tokenize",  "/admin/reload",   "/api/show",
        "/v1/models",      "/v1/models/{id}", "/info",      "/api/tags",       "/api/version",
        "/health",         "/metrics",        "other"};
    return paths[r];
}

const char *role_name(role r) {
    static const char *const names[N_ROLES] = {"main", "fallback", "reranker"};
    return names[r];
}

static const struct {
    const char *name, *help;
} counters[N_COUNTS] = {
    [COUNT_TEXTS] = {"texts", "Texts of requests that were answered with vectors."},
    [COUNT_TOKENS] = {"tokens", "Their tokens."},
    [COUNT_DOCUMENTS] = {"documents", "Documents of requests that were answered with scores."},
    [COUNT_DOCUMENT_TOKENS] = {"document_tokens", "Their tokens, with query and prompt."},
    [COUNT_COMPUTED_TEXTS] = {"computed_texts", "Distinct texts that went through a model."},
    [COUNT_COMPUTED_TOKENS] = {"computed_tokens", "Their tokens."},
    [COUNT_DEDUP] = {"dedup_hits", "Texts that shared the computation of an equal one in flight."},
    [COUNT_NON_FINITE] = {"non_finite", "Texts for which a model has no finite vector or score."},
    [COUNT_CLAMPED] = {"clamped",
                       "Numbers cut to the largest that an activation can be, on a GPU."},
    [COUNT_RECOMPUTED] = {"recomputed", "Vectors that a GPU could not give and the CPU computed."},
    [COUNT_FAILED_DEVICES] = {"failed_devices", "GPUs that failed."},
    [COUNT_MODEL_CHANGES] = {"model_changes", "Model files that were written to while in use."},
    [COUNT_RELOADS] = {"reloads", "Times that the models were loaded again and took over."},
    [COUNT_RELOAD_FAILURES] = {"reload_failures", "Times that they could not: nothing changed."},
    [COUNT_FALLBACKS] = {"fallbacks", "Requests that the fallback took, as they allow."},
    [COUNT_DEPARTED] = {"departed", "Requests dropped because their client had left."},
    [COUNT_EXPIRED] = {"expired", "Requests whose deadline came before a batch took their texts."},
    [COUNT_GIVEN_UP] = {"given_up",
                        "Long texts not computed to their end, as no request waited for them."},
    [COUNT_REFUSED] = {"refused", "Requests that could not be done by their deadline."},
    [COUNT_REAPED] = {"reaped", "Connections closed for sending or reading too slowly."},
    [COUNT_IGNORED_KEYS] = {"ignored_keys", "Keys of requests that no served API has."},
    [COUNT_LOG_LOST] = {"log_lines_lost", "Log lines that standard error did not take."},
    [COUNT_CACHE_HITS] = {"cache_hits", "Texts whose vectors or scores were in memory."},
    [COUNT_CACHE_MISSES] = {"cache_misses", "Texts whose vectors or scores were in no cache."},
    [COUNT_REDIS_HITS] = {"redis_hits", "Texts whose vectors or scores were in Redis."},
    [COUNT_REDIS_ERRORS] = {"redis_errors",
                            "Failures of Redis and stores that it refused; a pause follows."},
    [COUNT_REDIS_DROPPED] = {"redis_dropped", "Vectors and scores that were not stored in Redis."},
    [COUNT_REDIS_BAD] = {"redis_bad_values", "Values in Redis that are no vector of the model."},
    [COUNT_REDIS_CHECKED] = {"redis_checked", "Vectors of Redis that were computed again."},
    [COUNT_REDIS_MISMATCHES] = {"redis_mismatches",
                                "Those of them that differed; Redis is not used after the first."},
};

/* 499: the client has left. The last entry counts all other codes. */
static const int codes[] = {200, 204, 400, 401, 403, 404, 405, 409, 413, 414, 415, 417,
                            422, 424, 429, 431, 499, 500, 501, 503, 505, 0};

/* ---- histograms ------------------------------------------------------------------------------ */

#define MAX_BOUNDS 16
#define TEXTS      1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048
#define TOKENS     16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768
#define SECONDS    .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10

static const struct {
    const char *name, *help;
    double bounds[MAX_BOUNDS]; /* ascending; ends with 0 */
} histograms[N_HISTOGRAMS] = {
    [HISTOGRAM_BATCH_TEXTS] = {"batch_texts",
                               "Distinct texts of a batch of the first model or the fallback.",
                               {TEXTS}},
    [HISTOGRAM_BATCH_TOKENS] = {"batch_tokens", "Tokens of such a batch.", {TOKENS}},
    [HISTOGRAM_BATCH_SECONDS] = {"batch_seconds", "Time it took to compute.", {SECONDS}},
    [HISTOGRAM_RERANKER_BATCH_TEXTS] = {"reranker_batch_texts",
                                        "Distinct documents of a batch of --reranker.",
                                        {TEXTS}},
    [HISTOGRAM_RERANKER_BATCH_TOKENS] = {"reranker_batch_tokens",
                                         "Tokens of such a batch, with query and prompt.",
                                         {TOKENS}},
    [HISTOGRAM_RERANKER_BATCH_SECONDS] = {"reranker_batch_seconds",
                                          "Time it took to compute.",
                                          {SECONDS}},
    [HISTOGRAM_REQUEST_SECONDS] = {"request_seconds",
                                   "Time from an embedding request's header to its answer.",
                                   {SECONDS, 30, 60}},
    [HISTOGRAM_RERANK_SECONDS] = {"rerank_seconds",
                                  "Time from a rerank request's header to its answer.",
                                  {SECONDS, 30, 60}},
};

struct metrics {
    atomic_ullong counts[N_COUNTS];
    atomic_ullong requests[N_ROUTES][LENGTH(codes)];
    struct {
        pthread_mutex_t lock;
        uint64_t n[MAX_BOUNDS + 1]; /* by bound; the last one counts all larger values */
        double sum;
    } observed[N_HISTOGRAMS];
};

void metrics_add(metrics *m, count c, uint64_t n) {
    atomic_fetch_add_explicit(&m->counts[c], n, memory_order_relaxed);
}

void metrics_request(metrics *m, route r, int status) {
    int i = 0;
    while (codes[i] && codes[i] != status) i++;
    atomic_fetch_add_explicit(&m->requests[r][i], 1, memory_order_relaxed);
}

static int bucket_of(histogram h, double x) {
    int i = 0;
    while (i < MAX_BOUNDS && histograms[h].bounds[i] > 0 && x > histograms[h].bounds[i]) i++;
    return i;
}

void metrics_observe(metrics *m, histogram h, double x) {
    pthread_mutex_lock(&m->observed[h].lock);
    m->observed[h].n[bucket_of(h, x)]++;
    m->observed[h].sum += x;
    pthread_mutex_unlock(&m->observed[h].lock);
}

static void histogram_text(metrics *m, buffer *out, histogram h) {
    const char *name = histograms[h].name;
    const int last = bucket_of(h, INFINITY);
    uint64_t total = 0;
    buffer_printf(out, "# HELP qemb_%s %s\n# TYPE qemb_%s histogram\n", name, histograms[h].help,
                  name);
    pthread_mutex_lock(&m->observed[h].lock);
    for (int i = 0; i < last; i++) {
        total += m->observed[h].n[i];
        buffer_printf(out, "qemb_%s_bucket{le=\"%g\"} %" PRIu64 "\n", name, histograms[h].bounds[i],
                      total);
    }
    total += m->observed[h].n[last];
    buffer_printf(out, "qemb_%s_bucket{le=\"+Inf\"} %" PRIu64 "\nqemb_%s_sum %.9g\n", name, total,
                  name, m->observed[h].sum);
    buffer_printf(out, "qemb_%s_count %" PRIu64 "\n", name, total);
    pthread_mutex_unlock(&m->observed[h].lock);
}

metrics *metrics_new(void) {
    metrics *m = calloc(1, sizeof *m);
    for (int h = 0; m && h < N_HISTOGRAMS; h++) pthread_mutex_init(&m->observed[h].lock, NULL);
    return m;
}

void metrics_free(metrics *m) {
    for (int h = 0; m && h < N_HISTOGRAMS; h++) pthread_mutex_destroy(&m->observed[h].lock);
    free(m);
}

/* ---- all of it ------------------------------------------------------------------------------- */

static void gauge_text(buffer *out, const char *name, const char *help, size_t value) {
    buffer_printf(out, "# HELP qemb_%s %s\n# TYPE qemb_%s gauge\nqemb_%s %zu\n", name, help, name,
                  name, value);
}

/* Writes a label's value: printable ASCII, with quotes and backslashes escaped. */
static void label_text(buffer *out, const char *s) {
    for (; *s; s++) {
        if (*s == '"' || *s == '\\') buffer_printf(out, "\\");
        buffer_printf(out, "%c", *s >= ' ' && *s < 0x7f ? *s : '?');
    }
}

static uint64_t counted(const metrics *m, count c) {
    return c == COUNT_LOG_LOST ? log_lines_lost() : (uint64_t)atomic_load(&m->counts[c]);
}

void metrics_text(metrics *m, buffer *out, const gauges *g) {
    buffer_printf(out, "# HELP qemb_requests_total Requests by path and status; 499: the client "
                       "left.\n# TYPE qemb_requests_total counter\n");
    for (int r = 0; r < N_ROUTES; r++)
        for (int i = 0; i < LENGTH(codes); i++) {
            const uint64_t n = atomic_load_explicit(&m->requests[r][i], memory_order_relaxed);
            if (!n) continue;
            buffer_printf(out, "qemb_requests_total{path=\"%s\",code=\"", route_path((route)r));
            buffer_printf(out, codes[i] ? "%d\"} " : "other\"} ", codes[i]);
            buffer_printf(out, "%" PRIu64 "\n", n);
        }
    for (int c = 0; c < N_COUNTS; c++)
        buffer_printf(
            out,
            "# HELP qemb_%s_total %s\n# TYPE qemb_%s_total counter\nqemb_%s_total %" PRIu64 "\n",
            counters[c].name, counters[c].help, counters[c].name, counters[c].name,
            counted(m, (count)c));
    gauge_text(out, "healthy", "1 when /health says 200.", (size_t)g->healthy);
    gauge_text(out, "connections", "Open connections.", (size_t)g->connections);
    gauge_text(out, "devices", "GPUs that compute the model, or 1 for the CPU.",
               (size_t)g->devices);
    gauge_text(out, "queue_texts", "Distinct texts that wait for a batch of the first model.",
               (size_t)g->worker[ROLE_MAIN].queue_texts);
    gauge_text(out, "queue_tokens", "Their tokens.", (size_t)g->worker[ROLE_MAIN].queue_tokens);
    gauge_text(out, "queue_requests", "Requests that wait for the first model.",
               (size_t)g->worker[ROLE_MAIN].queue_requests);
    gauge_text(out, "fallback_queue_tokens", "Tokens that wait for the fallback.",
               (size_t)g->worker[ROLE_FALLBACK].queue_tokens);
    gauge_text(out, "reranker_queue_texts", "Documents that wait for a batch of --reranker.",
               (size_t)g->worker[ROLE_RERANKER].queue_texts);
    gauge_text(out, "reranker_queue_tokens", "Their tokens, with query and prompt.",
               (size_t)g->worker[ROLE_RERANKER].queue_tokens);
    gauge_text(out, "reranker_queue_requests", "Requests that wait for --reranker.",
               (size_t)g->worker[ROLE_RERANKER].queue_requests);
    gauge_text(out, "cache_bytes", "Memory that the cache takes.", g->cache_bytes);
    buffer_printf(out, "# HELP qemb_model_info The models that are served.\n"
                       "# TYPE qemb_model_info gauge\n");
    for (int i = 0; i < N_ROLES; i++) {
        if (!g->worker[i].model) continue;
        buffer_printf(out, "qemb_model_info{role=\"%s\",model=\"", role_name((role)i));
        label_text(out, g->worker[i].model);
        buffer_printf(out, "\",table=\"%s\",fingerprint=\"%s\",version=\"%s\"} 1\n",
                      g->worker[i].table, g->worker[i].fingerprint, QEMB_VERSION);
    }
    for (int h = 0; h < N_HISTOGRAMS; h++) histogram_text(m, out, (histogram)h);
}
