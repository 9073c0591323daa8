/* metrics.h - counters, histograms and gauges. */
#ifndef QEMB_METRICS_H
#define QEMB_METRICS_H

#include "buffer.h"

#include <stdint.h>

/* Those up to ROUTE_SHOW take a body, by POST. */
typedef enum {
    ROUTE_EMBEDDINGS,
    ROUTE_TEI,
    ROUTE_OLLAMA,
    ROUTE_OLLAMA_OLD,
    ROUTE_RERANK_V1,
    ROUTE_RERANK_V2,
    ROUTE_RERANK,
    ROUTE_TOKENIZE,
    ROUTE_RELOAD,
    ROUTE_SHOW,
    ROUTE_MODELS,
    ROUTE_MODEL,
    ROUTE_INFO,
    ROUTE_TAGS,
    ROUTE_VERSION,
    ROUTE_HEALTH,
    ROUTE_METRICS,
    ROUTE_OTHER,
    N_ROUTES
} route;

const char *route_path(route r);

/* The models of a server. */
typedef enum { ROLE_MAIN, ROLE_FALLBACK, ROLE_RERANKER, N_ROLES } role;

const char *role_name(role r);

typedef enum {
    COUNT_TEXTS,
    COUNT_TOKENS,
    COUNT_DOCUMENTS,
    COUNT_DOCUMENT_TOKENS,
    COUNT_COMPUTED_TEXTS,
    COUNT_COMPUTED_TOKENS,
    COUNT_DEDUP,
    COUNT_NON_FINITE,
    COUNT_CLAMPED,
    COUNT_RECOMPUTED,
    COUNT_FAILED_DEVICES,
    COUNT_MODEL_CHANGES,
    COUNT_RELOADS,
    COUNT_RELOAD_FAILURES,
    COUNT_FALLBACKS,
    COUNT_DEPARTED,
    COUNT_EXPIRED,
    COUNT_GIVEN_UP,
    COUNT_REFUSED,
    COUNT_REAPED,
    COUNT_IGNORED_KEYS,
    COUNT_LOG_LOST,
    COUNT_CACHE_HITS,
    COUNT_CACHE_MISSES,
    COUNT_REDIS_HITS,
    COUNT_REDIS_ERRORS,
    COUNT_REDIS_DROPPED,
    COUNT_REDIS_BAD,
    COUNT_REDIS_CHECKED,
    COUNT_REDIS_MISMATCHES,
    N_COUNTS
} count;

/* Batches of the models that embed, or of a reranker that is the first model; and of --reranker. */
typedef enum {
    HISTOGRAM_BATCH_TEXTS,
    HISTOGRAM_BATCH_TOKENS,
    HISTOGRAM_BATCH_SECONDS,
    HISTOGRAM_RERANKER_BATCH_TEXTS,
    HISTOGRAM_RERANKER_BATCH_TOKENS,
    HISTOGRAM_RERANKER_BATCH_SECONDS,
    HISTOGRAM_REQUEST_SECONDS,
    HISTOGRAM_RERANK_SECONDS,
    N_HISTOGRAMS
} histogram;

typedef struct {
    int healthy, connections, devices;
    size_t cache_bytes;
    struct {
        const char *model, *table, *fingerprint;       /* NULL: no such model */
        int queue_texts, queue_tokens, queue_requests; /* waiting */
    } worker[N_ROLES];
} gauges;

/* Counters and histograms of one server. Thread-safe. */
typedef struct metrics metrics;

metrics *metrics_new(void); /* NULL: out of memory */
void metrics_free(metrics *m);
void metrics_add(metrics *m, count c, uint64_t n);
void metrics_request(metrics *m, route r, int status);
void metrics_observe(metrics *m, histogram h, double x);
/* Writes the text format of Prometheus. */
void metrics_text(metrics *m, buffer *out, const gauges *g);

#endif
