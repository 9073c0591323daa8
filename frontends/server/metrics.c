/* metrics.c - counters, histograms, the log; see server.h. */
#include "server.h"

#include <inttypes.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- text ------------------------------------------------------------------------------------- */

static void out_of_memory(api_text *out) {
    free(out->data);
    *out = (api_text){.cap = SIZE_MAX}; /* remembers: nothing is added to a hole */
}

void text_printf(api_text *out, const char *fmt, ...) {
    va_list ap;
    for (int grown = 0; out->cap != SIZE_MAX; grown = 1) {
        const size_t room = out->cap - out->len;
        va_start(ap, fmt);
        const int n = vsnprintf(out->data ? out->data + out->len : NULL, room, fmt, ap);
        va_end(ap);
        if (n >= 0 && (size_t)n < room) {
            out->len += (size_t)n;
            return;
        }
        const size_t cap = 2 * out->cap + (size_t)(n < 0 ? 0 : n) + 256;
        char *data = n < 0 || grown ? NULL : realloc(out->data, cap);
        if (!data) {
            out_of_memory(out);
            return;
        }
        out->data = data;
        out->cap = cap;
    }
}

/* ---- counters --------------------------------------------------------------------------------- */

const char *route_path(route r) {
    static const char *const paths[N_ROUTES] = {"/v1/embeddings", "/tokenize", "/v1/models",
                                                "/health",        "/metrics",  "other"};
    return paths[r];
}

static const struct {
    const char *name, *help;
} counters[N_COUNTS] = {
    [COUNT_TEXTS] = {"texts", "Texts of requests that were answered with vectors."},
    [COUNT_TOKENS] = {"tokens", "Their tokens."},
    [COUNT_COMPUTED_TEXTS] = {"computed_texts", "Distinct texts that went through the model."},
    [COUNT_COMPUTED_TOKENS] = {"computed_tokens", "Their tokens."},
    [COUNT_DEDUP] = {"dedup_hits", "Texts that shared the computation of an equal one in flight."},
    [COUNT_NON_FINITE] = {"non_finite", "Texts for which the model has no finite vector."},
    [COUNT_CLAMPED] = {"clamped",
                       "Numbers cut to the largest that an activation can be, on a GPU."},
    [COUNT_RECOMPUTED] = {"recomputed", "Vectors that a GPU could not give and the CPU computed."},
    [COUNT_FALLBACKS] = {"fallbacks", "Requests that the fallback took, as they allow."},
    [COUNT_DEPARTED] = {"departed", "Requests dropped because their client had left."},
    [COUNT_EXPIRED] = {"expired", "Requests whose deadline came before their vectors."},
    [COUNT_REAPED] = {"reaped", "Connections closed for sending or reading too slowly."},
    [COUNT_LOG_LOST] = {"log_lines_lost", "Log lines that standard error did not take."},
    [COUNT_CACHE_HITS] = {"cache_hits", "Texts whose vectors were in memory."},
    [COUNT_CACHE_MISSES] = {"cache_misses", "Texts whose vectors were in no cache."},
    [COUNT_REDIS_HITS] = {"redis_hits", "Texts whose vectors were in Redis."},
    [COUNT_REDIS_ERRORS] = {"redis_errors", "Failures of Redis; a pause follows each."},
    [COUNT_REDIS_DROPPED] = {"redis_dropped", "Vectors that were not stored in Redis."},
};
static atomic_ullong counts[N_COUNTS];

void metrics_add(count c, uint64_t n) {
    atomic_fetch_add_explicit(&counts[c], n, memory_order_relaxed);
}

/* 499: the client has left. The last place is for all others. */
static const int codes[] = {200, 400, 401, 404, 405, 413, 415, 422, 429, 499, 503, 0};
static atomic_ullong requests[N_ROUTES][LENGTH(codes)];

void metrics_request(route r, int status) {
    int i = 0;
    while (codes[i] && codes[i] != status) i++;
    atomic_fetch_add_explicit(&requests[r][i], 1, memory_order_relaxed);
}

/* ---- histograms ------------------------------------------------------------------------------- */

#define MAX_BOUNDS 16

static struct {
    const char *name, *help;
    double bounds[MAX_BOUNDS]; /* upwards, 0 ends them */
    pthread_mutex_t lock;
    uint64_t n[MAX_BOUNDS + 1];
    double sum;
} histograms[N_HISTOGRAMS] = {
    [HISTOGRAM_BATCH_TEXTS] = {"batch_texts",
                               "Distinct texts of a batch.",
                               {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048},
                               PTHREAD_MUTEX_INITIALIZER,
                               {0},
                               0},
    [HISTOGRAM_BATCH_TOKENS] = {"batch_tokens",
                                "Tokens of a batch.",
                                {16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768},
                                PTHREAD_MUTEX_INITIALIZER,
                                {0},
                                0},
    [HISTOGRAM_BATCH_SECONDS] = {"batch_seconds",
                                 "Time a batch took to compute.",
                                 {.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
                                 PTHREAD_MUTEX_INITIALIZER,
                                 {0},
                                 0},
    [HISTOGRAM_REQUEST_SECONDS] = {"request_seconds",
                                   "Time from an embedding request's header to its answer.",
                                   {.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10,
                                    30, 60},
                                   PTHREAD_MUTEX_INITIALIZER,
                                   {0},
                                   0},
};

void metrics_observe(histogram h, double x) {
    int i = 0;
    while (i < MAX_BOUNDS && histograms[h].bounds[i] > 0 && x > histograms[h].bounds[i]) i++;
    pthread_mutex_lock(&histograms[h].lock);
    histograms[h].n[i]++;
    histograms[h].sum += x;
    pthread_mutex_unlock(&histograms[h].lock);
}

static void histogram_text(api_text *out, histogram h) {
    const char *name = histograms[h].name;
    uint64_t total = 0;
    text_printf(out, "# HELP qemb_%s %s\n# TYPE qemb_%s histogram\n", name, histograms[h].help,
                name);
    pthread_mutex_lock(&histograms[h].lock);
    for (int i = 0; i < MAX_BOUNDS && histograms[h].bounds[i] > 0; i++) {
        total += histograms[h].n[i];
        text_printf(out, "qemb_%s_bucket{le=\"%g\"} %" PRIu64 "\n", name, histograms[h].bounds[i],
                    total);
    }
    int last = 0;
    while (last < MAX_BOUNDS && histograms[h].bounds[last] > 0) last++;
    total += histograms[h].n[last];
    text_printf(out, "qemb_%s_bucket{le=\"+Inf\"} %" PRIu64 "\nqemb_%s_sum %.9g\n", name, total,
                name, histograms[h].sum);
    text_printf(out, "qemb_%s_count %" PRIu64 "\n", name, total);
    pthread_mutex_unlock(&histograms[h].lock);
}

/* ---- all of it -------------------------------------------------------------------------------- */

static void gauge_text(api_text *out, const char *name, const char *help, size_t value) {
    text_printf(out, "# HELP qemb_%s %s\n# TYPE qemb_%s gauge\nqemb_%s %zu\n", name, help, name,
                name, value);
}

/* A label's value: printable ASCII, quotes and backslashes escaped. */
static void label_text(api_text *out, const char *s) {
    for (; *s; s++) {
        if (*s == '"' || *s == '\\') text_printf(out, "\\");
        text_printf(out, "%c", *s >= ' ' && *s < 0x7f ? *s : '?');
    }
}

void metrics_text(api_text *out, const gauges *g) {
    text_printf(out, "# HELP qemb_requests_total Requests by path and status; 499: the client "
                     "left.\n# TYPE qemb_requests_total counter\n");
    for (int r = 0; r < N_ROUTES; r++)
        for (int i = 0; i < LENGTH(codes); i++) {
            const uint64_t n = atomic_load_explicit(&requests[r][i], memory_order_relaxed);
            if (!n) continue;
            text_printf(out, "qemb_requests_total{path=\"%s\",code=\"", route_path((route)r));
            text_printf(out, codes[i] ? "%d\"} " : "other\"} ", codes[i]);
            text_printf(out, "%" PRIu64 "\n", n);
        }
    for (int c = 0; c < N_COUNTS; c++)
        text_printf(out,
                    "# HELP qemb_%s_total %s\n# TYPE qemb_%s_total counter\nqemb_%s_total %" PRIu64
                    "\n",
                    counters[c].name, counters[c].help, counters[c].name, counters[c].name,
                    (uint64_t)atomic_load(&counts[c]));
    gauge_text(out, "healthy", "1 when /health says 200.", (size_t)g->healthy);
    gauge_text(out, "connections", "Open connections.", (size_t)g->connections);
    const queue_depth q = g->worker[0].queue, f = g->worker[1].queue;
    gauge_text(out, "queue_texts", "Distinct texts that wait for a batch.", (size_t)q.texts);
    gauge_text(out, "queue_tokens", "Their tokens.", (size_t)q.tokens);
    gauge_text(out, "queue_requests", "Requests that wait for vectors.", (size_t)q.requests);
    gauge_text(out, "fallback_queue_tokens", "Tokens that wait for the fallback.",
               (size_t)f.tokens);
    gauge_text(out, "cache_bytes", "Memory that the cache takes.", g->cache_bytes);
    text_printf(out, "# HELP qemb_model_info The models that are served.\n"
                     "# TYPE qemb_model_info gauge\n");
    for (int i = 0; i < 2 && g->worker[i].model; i++) {
        text_printf(out, "qemb_model_info{role=\"%s\",model=\"", i ? "fallback" : "main");
        label_text(out, g->worker[i].model);
        text_printf(out, "\",fingerprint=\"%s\",version=\"%s\"} 1\n", g->worker[i].fingerprint,
                    QEMB_VERSION);
    }
    for (int h = 0; h < N_HISTOGRAMS; h++) histogram_text(out, (histogram)h);
}

/* ---- the log ---------------------------------------------------------------------------------- */

void log_line(const char *level, const char *event, const char *fmt, ...) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    char line[2048]; /* less than PIPE_BUF: a pipe that is ready takes it whole */
    struct timespec t;
    struct tm tm;
    clock_gettime(CLOCK_REALTIME, &t);
    gmtime_r(&t.tv_sec, &tm);
    size_t n = strftime(line, sizeof line, "{\"time\":\"%Y-%m-%dT%H:%M:%S", &tm);
    n += (size_t)snprintf(line + n, sizeof line - n, ".%03ldZ\",\"level\":\"%s\",\"event\":\"%s\"",
                          t.tv_nsec / 1000000, level, event);
    if (*fmt) {
        line[n++] = ',';
        va_list ap;
        va_start(ap, fmt);
        const int m = vsnprintf(line + n, sizeof line - n, fmt, ap);
        va_end(ap);
        if (m < 0 || n + (size_t)m + 2 >= sizeof line) { /* half a line would be no JSON */
            metrics_add(COUNT_LOG_LOST, 1);
            return;
        }
        n += (size_t)m;
    }
    line[n++] = '}';
    line[n++] = '\n';
    pthread_mutex_lock(&lock);
    struct pollfd p = {.fd = STDERR_FILENO, .events = POLLOUT};
    if (poll(&p, 1, 0) != 1 || !(p.revents & POLLOUT) ||
        write(STDERR_FILENO, line, n) != (ssize_t)n)
        metrics_add(COUNT_LOG_LOST, 1);
    pthread_mutex_unlock(&lock);
}
