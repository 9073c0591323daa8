/* main.c - the server program qemb-serve: options, start, signals, drain. */
#include "http.h"

#include "frontends/console.h"
#include "log.h"
#include "probe.h"

#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Seconds between checks for deadlines and departed clients. */
#define TICK 0.1
/* Seconds for the last responses, and for the last batch, after a drain has timed out. */
#define LAST_ANSWERS 2.0
#define LAST_BATCH   1.0

/* ---- options --------------------------------------------------------------------------------- */

typedef struct {
    models_options models;
    http_options http;
    int cache_mib, redis_check, probe;
    redis_options redis; /* address NULL: none */
    char name[N_ROLES][256]; /* of the models, from their file names */
} options;

static const char *checked_name(const char *option, const char *name) {
    if (!*name || strlen(name) > 255) usage("--%s: bad length (want 1..255 bytes)", option);
    return name;
}

static void add_name(void *to, const char *option, const char *name) {
    http_options *h = &((options *)to)->http;
    if (h->n_names == MAX_NAMES) usage("--name: too many (want at most %d)", MAX_NAMES);
    h->names[h->n_names++] = checked_name(option, name);
}

#define HOURS 24 * 3600 /* the maximum of options in seconds: a day */
#define AT(m) .at = offsetof(options, m)

/* clang-format off */
static const option_row rows[] = {
    {"host", "ADDRESS", "where to listen", "127.0.0.1", OPTION_STRING, AT(http.host)},
    {"port", "N", "0: any free one, which the log names", "8080",
     OPTION_INT, AT(http.port), .min = 0, .max = 65535},
    {"probe", NULL, "ask the server there for its health, and end", NULL,
     OPTION_FLAG, AT(probe), .value = 1},
    {"name", "NAME", "the model's name; repeat for more names", NULL,
     OPTION_CALL, .unset = "the file's", .call = add_name},
    {"fallback", "FILE", "another model, for requests that allow it", NULL,
     OPTION_STRING, AT(models.fallback), .suffix = ".qemb"},
    {"fallback-name", "NAME", "its name", NULL,
     OPTION_STRING, AT(http.fallback_name), .unset = "the file's"},
    {"reranker", "FILE", "a model that ranks, beside one that embeds", NULL,
     OPTION_STRING, AT(models.reranker), .suffix = ".qemb"},
    {"reranker-name", "NAME", "its name", NULL,
     OPTION_STRING, AT(http.reranker_name), .unset = "the file's"},
    {"reranker-max-tokens", "N", "its longest pair, prompt included", NULL,
     OPTION_INT, AT(models.reranker_max_tokens), .unset = "the model's", .min = 1, .max = INT_MAX},
    {"api-key-file", "FILE", "a key per line: requests must bring one", NULL,
     OPTION_STRING, AT(http.key_file)},
    {"allow-token-ids", NULL, "also ids without the tokens around a text", NULL,
     OPTION_FLAG, AT(models.worker.allow_token_ids), .value = 1},
    {"cors-origin", "ORIGIN", "web pages that may read answers, or *", NULL,
     OPTION_STRING, AT(http.cors_origin), .unset = "none"},
    {"http-threads", "N", "threads that parse, tokenize and format", "2",
     OPTION_INT, AT(http.http_threads), .min = 2, .max = 256},
    {"max-connections", "N", "connections at a time", "1024",
     OPTION_INT, AT(http.max_connections), .min = 1, .max = 1 << 20},
    {"max-body", "KIB", "body of a request", "4096",
     OPTION_SIZE, AT(http.max_body), .min = 1, .max = 1 << 20, .shift = 10},
    {"max-texts", "N", "texts of a request", "2048",
     OPTION_INT, AT(http.max_texts), .min = 1, .max = 1 << 20},
    {"max-queue", "TOKENS", "tokens that may wait, also of one request", "262144",
     OPTION_INT, AT(models.worker.max_queue_tokens), .min = 1, .max = 1 << 28},
    {"max-memory", "MIB", "bodies and answers at a time", "1024",
     OPTION_SIZE, AT(http.max_memory), .min = 1, .max = 1 << 24, .shift = 20},
    {"deadline", "SECONDS", "most time for a request's vectors", "60",
     OPTION_DOUBLE, AT(http.deadline), .min = 1, .max = HOURS},
    {"receive-timeout", "SECONDS", "without progress in sending or reading", "30",
     OPTION_DOUBLE, AT(http.receive_timeout), .min = 1, .max = HOURS},
    {"keep-alive", "SECONDS", "between two requests of a connection", "75",
     OPTION_DOUBLE, AT(http.keep_alive), .min = 1, .max = HOURS},
    {"drain", "SECONDS", "after SIGTERM, for requests under way", "30",
     OPTION_DOUBLE, AT(http.drain), .min = 0, .max = HOURS},
    {"cache", "MIB", "vectors kept in memory, 0: none", "64",
     OPTION_INT, AT(cache_mib), .min = 0, .max = 1 << 24},
    {"redis", "ADDRESS", "a Redis that keeps vectors too: HOST:PORT or a URL", NULL,
     OPTION_STRING, AT(redis.address)},
    {"redis-password-file", "FILE", "its password", NULL,
     OPTION_STRING, AT(redis.password_file)},
    {"redis-ca", "FILE", "rediss://: who may sign its certificate", NULL,
     OPTION_STRING, AT(redis.ca), .unset = "the system's"},
    {"redis-timeout", "MS", "after which it is left alone for a second", "50",
     OPTION_INT, AT(redis.timeout_ms), .min = 1, .max = 60000},
    {"redis-ttl", "SECONDS", "that a vector stays there, 0: for ever", "604800",
     OPTION_INT, AT(redis.ttl), .min = 0, .max = 10 * 366 * 24 * 3600},
    {"redis-check", "PERCENT", "of its vectors, computed again and compared", "1",
     OPTION_INT, AT(redis_check), .min = 0, .max = 100},
    {"gpu-cache", "DIR", "GPU: time cuBLASLt's algorithms, keep the best here", NULL,
     OPTION_STRING, AT(models.worker.model.engine.cache_dir), .gpu = 1},
};
/* clang-format on */

static const char synopsis[] =
    "qemb-serve " QEMB_VERSION ": vectors of texts and reranking over HTTP\n"
    "  qemb-serve -m MODEL.qemb [OPTION]...\n"
    "  qemb-serve --probe [--host ADDRESS] [--port N]\n";
static const char ending[] = "Status: 0 good, 1 usage or not healthy, 2 model.\n"
                             "Requests, errors, metrics and the log: man qemb-serve\n";

/* name = path without directory and ".qemb" */
static const char *name_by_file(char name[256], const char *path) {
    const char *slash = strrchr(path, '/');
    snprintf(name, 256, "%s", slash ? slash + 1 : path);
    char *dot = strrchr(name, '.');
    if (dot && dot > name && !strcmp(dot, ".qemb")) *dot = 0;
    return name;
}

/* Sets the name of the model `file` with that role; NULL: there is none. */
static void set_name(options *o, role role, const char *file, const char **name) {
    const http_options *h = &o->http;
    const char *option = role_name(role);
    char name_option[32];
    snprintf(name_option, sizeof name_option, "%s-name", option);
    if (*name && !file) usage("--%s: of no model (want --%s)", name_option, option);
    if (!file) return;
    if (!*name) *name = name_by_file(o->name[role], file);
    checked_name(name_option, *name);
    for (int i = 0; i < h->n_names; i++)
        if (!strcmp(h->names[i], *name))
            usage("--%s: the model's own name (got %.80s): answers could not tell", name_option,
                  *name);
}

static void check_names(options *o) {
    http_options *h = &o->http;
    const char *file = o->models.worker.model.model;
    if (!h->n_names) add_name(o, "name", name_by_file(o->name[ROLE_MAIN], file));
    set_name(o, ROLE_FALLBACK, o->models.fallback, &h->fallback_name);
    set_name(o, ROLE_RERANKER, o->models.reranker, &h->reranker_name);
    if (o->models.reranker_max_tokens && !o->models.reranker)
        usage("--reranker-max-tokens: of no model (want --reranker)");
    if (h->fallback_name && h->reranker_name && !strcmp(h->fallback_name, h->reranker_name))
        usage("--reranker-name: the fallback's name (got %.80s): answers could not tell",
              h->reranker_name);
}

/* An origin as browsers send it: without a path. */
static void check_origin(const char *origin) {
    const char *host = origin ? strstr(origin, "://") : NULL;
    if (!origin || !strcmp(origin, "*")) return;
    if (!host || host == origin || !host[3] || host[3 + strcspn(host + 3, "/?#, \t\r\n")])
        usage("--cors-origin: not an origin (got %.80s, want SCHEME://HOST, with :PORT if it is "
              "not the usual one, or *)",
              origin);
}

static void parse_options(options *o, int argc, char **argv) {
    *o = (options){0};
    model_options *model = &o->models.worker.model;
    option_table t = {.synopsis = synopsis,
                      .ending = ending,
                      .sections = {{model_option_rows, n_model_option_rows, model},
                                   {rows, LENGTH(rows), o}}};
    options_parse(&t, argc, argv);
    if (o->probe) leave(probe(o->http.host, o->http.port));
    model_options_check(model);
    options_check(&t, ~0u, "", !!model->ops->plan);
    check_names(o);
    check_origin(o->http.cors_origin);
}

/* ---- the run --------------------------------------------------------------------------------- */

/* Waits up to TICK for a signal of the set. Returns it, or 0. */
static int wait_signal(const sigset_t *set) {
    const struct timespec tick = {.tv_nsec = (long)(TICK * 1e9)};
    const int sig = sigtimedwait(set, NULL, &tick);
    return sig > 0 ? sig : 0;
}

/* Whether the signal asks the server to end. */
static int ends(int sig) { return sig == SIGINT || sig == SIGTERM || sig == SIGQUIT; }

/* Serves until a signal ends it, which it returns, or until a device has failed: 0. */
static int serve(const sigset_t *set, models *m) {
    int sig = 0;
    while (!ends(sig) && !models_dead(m)) {
        sig = wait_signal(set);
        if (sig == SIGHUP)
            models_want_reload(m);
        else if (sig && !ends(sig))
            log_line("warning", "signal_ignored", "\"signal\":%d", sig);
        models_tick(m, seconds_now());
    }
    return ends(sig) ? sig : 0;
}

/* Answers the requests under way for up to o->drain seconds, then the rest with 503. */
static void drain(const options *all, const sigset_t *set, models *m, http *h) {
    const http_options *o = &all->http;
    const double start = seconds_now();
    models_end_reloads(m);
    http_drain(h);
    log_line("info", "draining", "\"seconds\":%g",
             o->drain); /* from here on new connections are refused */
    while (!http_idle(h) && seconds_now() - start < o->drain) {
        if (ends(wait_signal(set))) break; /* a second signal ends the drain */
        models_tick(m, seconds_now());
    }
    redis_stop(all->models.worker.redis); /* requests may wait for it longer than for a model */
    models_stop(m);
    const double stopped = seconds_now();
    while (!http_idle(h) && seconds_now() - stopped < LAST_ANSWERS) wait_signal(set);
}

static void open_caches(options *o) {
    if (o->cache_mib) o->models.worker.cache = need(cache_new((size_t)o->cache_mib << 20));
    if (!o->redis.address) return;
    o->redis.check = 1e-2 * o->redis_check;
    o->models.worker.redis = redis_new(&o->redis, o->models.worker.metrics);
}

int main(int argc, char **argv) {
    static const int signals[] = {SIGINT, SIGTERM, SIGQUIT, SIGHUP, SIGUSR1, SIGUSR2, SIGALRM};
    options o;
    sigset_t set;
    console_open("qemb-serve");
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&set);
    for (int i = 0; i < LENGTH(signals); i++) sigaddset(&set, signals[i]);
    pthread_sigmask(SIG_BLOCK, &set, NULL); /* inherited by all threads; wait_signal takes them */
    parse_options(&o, argc, argv);
    o.http.metrics = o.models.worker.metrics = need(metrics_new());
    open_caches(&o);
    models *m = models_open(&o.models);
    http *h = http_start(&o.http, m);
    log_line("info", "listening", "\"port\":%d,\"pid\":%ld", http_port(h), (long)getpid());
    models_start(m);
    const int sig = serve(&set, m);
    drain(&o, &set, m, h);
    const int status = sig ? STATUS_GOOD : STATUS_MODEL;
    int joined = models_join(m, LAST_BATCH); /* before http_stop, so that no worker resumes a
                                                connection */
    http_stop(h);
    log_line("info", "stopped", "\"signal\":%d", sig);
    joined = joined && redis_free(o.models.worker.redis, LAST_BATCH);
    if (!joined) leave(status); /* a worker is in a long batch, or Redis' name in a look-up */
    models_free(m);
    cache_free(o.models.worker.cache);
    metrics_free(o.models.worker.metrics);
    return status;
}
