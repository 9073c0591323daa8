/* main.c - qemb-serve: options, start, signals, the clock's tick, the end; see server.h. This is
 * the only file that ends the process. */
#include "server.h"

#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Seconds between two looks at deadlines, departed clients and slow connections. */
#define TICK 0.1
/* After a drain that ran into its bound: for the last answers to be sent, for the last batch. */
#define LAST_ANSWERS 2.0
#define LAST_BATCH   1.0

/* ---- messages --------------------------------------------------------------------------------- */

/* Before there is a server to log: a line for whoever typed the command. */
void say(const char *fmt, ...) {
    char line[1024] = "qemb-serve: ";
    const size_t start = strlen(line);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line + start, sizeof line - start - 1, fmt, ap);
    va_end(ap);
    const size_t len = strlen(line);
    line[len] = '\n';
    const ssize_t n = write(STDERR_FILENO, line, len + 1);
    (void)n; /* nobody is left to tell */
}

void leave(int status) { _exit(status); }

void *need(void *p) {
    if (!p) DIE(STATUS_MODEL, "out of memory");
    return p;
}

/* ---- options ---------------------------------------------------------------------------------- */

enum {
    OPT_HOST = 256,
    OPT_PORT,
    OPT_NAME,
    OPT_FALLBACK,
    OPT_FALLBACK_NAME,
    OPT_API_KEY_FILE,
    OPT_QUERY,
    OPT_INSTRUCT,
    OPT_TRUNCATE,
    OPT_MAX_TOKENS,
    OPT_BATCH_TOKENS,
    OPT_THREADS,
    OPT_CPU,
    OPT_MATH,
    OPT_VRAM,
    OPT_DETERMINISTIC,
    OPT_NO_GRAPHS,
    OPT_GPU_CACHE,
    OPT_HTTP_THREADS,
    OPT_MAX_CONNECTIONS,
    OPT_MAX_BODY,
    OPT_MAX_TEXTS,
    OPT_MAX_QUEUE,
    OPT_MAX_MEMORY,
    OPT_DEADLINE,
    OPT_RECEIVE_TIMEOUT,
    OPT_DRAIN,
    OPT_CACHE,
    OPT_REDIS,
    OPT_REDIS_TIMEOUT
};

static const struct option long_options[] = {
    {"model", required_argument, NULL, 'm'},
    {"host", required_argument, NULL, OPT_HOST},
    {"port", required_argument, NULL, OPT_PORT},
    {"name", required_argument, NULL, OPT_NAME},
    {"fallback", required_argument, NULL, OPT_FALLBACK},
    {"fallback-name", required_argument, NULL, OPT_FALLBACK_NAME},
    {"api-key-file", required_argument, NULL, OPT_API_KEY_FILE},
    {"query", no_argument, NULL, OPT_QUERY},
    {"instruct", required_argument, NULL, OPT_INSTRUCT},
    {"truncate", no_argument, NULL, OPT_TRUNCATE},
    {"max-tokens", required_argument, NULL, OPT_MAX_TOKENS},
    {"batch-tokens", required_argument, NULL, OPT_BATCH_TOKENS},
    {"threads", required_argument, NULL, OPT_THREADS},
    {"cpu", required_argument, NULL, OPT_CPU},
    {"math", required_argument, NULL, OPT_MATH},
    {"vram", required_argument, NULL, OPT_VRAM},
    {"deterministic", no_argument, NULL, OPT_DETERMINISTIC},
    {"no-graphs", no_argument, NULL, OPT_NO_GRAPHS},
    {"gpu-cache", required_argument, NULL, OPT_GPU_CACHE},
    {"http-threads", required_argument, NULL, OPT_HTTP_THREADS},
    {"max-connections", required_argument, NULL, OPT_MAX_CONNECTIONS},
    {"max-body", required_argument, NULL, OPT_MAX_BODY},
    {"max-texts", required_argument, NULL, OPT_MAX_TEXTS},
    {"max-queue", required_argument, NULL, OPT_MAX_QUEUE},
    {"max-memory", required_argument, NULL, OPT_MAX_MEMORY},
    {"deadline", required_argument, NULL, OPT_DEADLINE},
    {"receive-timeout", required_argument, NULL, OPT_RECEIVE_TIMEOUT},
    {"drain", required_argument, NULL, OPT_DRAIN},
    {"cache", required_argument, NULL, OPT_CACHE},
    {"redis", required_argument, NULL, OPT_REDIS},
    {"redis-timeout", required_argument, NULL, OPT_REDIS_TIMEOUT},
    {"help", no_argument, NULL, 'h'},
    {"version", no_argument, NULL, 'V'},
    {NULL, 0, NULL, 0},
};

static const char help[] =
    "qemb-serve " QEMB_VERSION ": Qwen3-Embedding vectors over HTTP, as OpenAI's API has them.\n"
    "  qemb-serve -m MODEL.qemb [OPTION]...\n"
    "  -m, --model FILE       the model (convert_weights.py makes it)\n"
    "  --host ADDRESS         where to listen                          [127.0.0.1]\n"
    "  --port N               0: any free one, which the log names     [8080]\n"
    "  --name NAME            the model's name; repeat for more names  [the file's]\n"
    "  --fallback FILE        another model, for requests that allow it\n"
    "  --fallback-name NAME   its name                                 [the file's]\n"
    "  --api-key-file FILE    a key per line: requests must bring one\n"
    "  --query                texts are queries, unless the request says otherwise\n"
    "  --instruct TASK        texts are queries for TASK, likewise\n"
    "  --truncate             cut longer texts, likewise (else they are errors)\n"
    "  --max-tokens N         longest text, end-of-text included       [the model's]\n"
    "  --batch-tokens N       tokens that are computed together        [1024]\n"
    "  --threads N            CPU threads of the model                 [all]\n"
    "  --cpu NAME             plain, avx2 or avx512: the instructions  [the fastest]\n"
    "  --math NAME            f32, bf16, int16, int8; on a GPU f16, fp8 [f32; f16]\n"
    "  --vram MIB             on a GPU: memory to use at most          [free]\n"
    "  --deterministic        on a GPU: no bit depends on what else is computed\n"
    "  --no-graphs            on a GPU: no CUDA graphs for small batches\n"
    "  --gpu-cache DIR        on a GPU: time algorithms once, keep the times there\n"
    "  --http-threads N       threads that parse, tokenize and format  [2]\n"
    "  --max-connections N    at a time                                [1024]\n"
    "  --max-body KIB         of one request                           [4096]\n"
    "  --max-texts N          in one request                           [2048]\n"
    "  --max-queue TOKENS     that may wait, also in one request       [262144]\n"
    "  --max-memory MIB       of bodies and answers at a time          [1024]\n"
    "  --deadline SECONDS     most time for a request's vectors        [60]\n"
    "  --receive-timeout SECONDS  for a client to send, read or idle   [30]\n"
    "  --drain SECONDS        after SIGTERM, for what is on its way    [30]\n"
    "  --cache MIB            of vectors kept in memory, 0: none       [64]\n"
    "  --redis HOST:PORT      a Redis that keeps vectors, too\n"
    "  --redis-timeout MS     after which it is left alone for a second [50]\n"
    "  -h, --help; -V, --version\n"
    "Status: 0 good, 1 usage, 2 model.\n"
    "All about requests, errors, metrics and the log: man qemb-serve\n";

#define USAGE(...) (say(__VA_ARGS__), DIE(STATUS_USAGE, "hint: qemb-serve --help"))

typedef struct {
    model_worker_options worker;
    http_options http;
    int cache_mib, redis_timeout;
    const char *redis;    /* NULL: none */
    const char *fallback; /* NULL: none */
    char name[2][256];    /* the model's and the fallback's, from the files' */
} serve_options;

static int parse_int(const char *name, const char *s, int min, int max) {
    long long x = 0;
    const char *p = s;
    for (; *p >= '0' && *p <= '9' && x <= max; p++) x = x * 10 + (*p - '0');
    if (p == s || *p || x < min || x > max)
        USAGE("--%s: not a number in range (got %.40s, want %d..%d)", name, s, min, max);
    return (int)x;
}

static const char *checked_name(const char *option, const char *name) {
    if (!*name || strlen(name) > 255) USAGE("--%s: bad length (want 1..255 bytes)", option);
    return name;
}

static void add_name(http_options *o, const char *name) {
    if (o->n_names == MAX_NAMES) USAGE("--name: too many (want at most %d)", MAX_NAMES);
    o->names[o->n_names++] = checked_name("name", name);
}

static void set_option(serve_options *o, int opt, const char *name, const char *arg) {
    options *cli = &o->worker.cli;
    http_options *h = &o->http;
    const int hours = 24 * 3600;
    switch (opt) {
    case 'm':
        cli->model = arg;
        break;
    case OPT_HOST:
        h->host = arg;
        break;
    case OPT_PORT:
        h->port = parse_int(name, arg, 0, 65535);
        break;
    case OPT_NAME:
        add_name(h, arg);
        break;
    case OPT_FALLBACK:
        o->fallback = arg;
        break;
    case OPT_FALLBACK_NAME:
        h->fallback_name = checked_name(name, arg);
        break;
    case OPT_API_KEY_FILE:
        h->key_file = arg;
        break;
    case OPT_QUERY:
        cli->query = 1;
        break;
    case OPT_INSTRUCT:
        cli->instruct = arg;
        break;
    case OPT_TRUNCATE:
        cli->truncate = 1;
        break;
    case OPT_MAX_TOKENS:
        cli->engine.max_tokens = parse_int(name, arg, 1, INT_MAX);
        break;
    case OPT_BATCH_TOKENS:
        cli->engine.batch_tokens = parse_int(name, arg, 1, 1 << 24);
        break;
    case OPT_THREADS:
        cli->engine.threads = parse_int(name, arg, 1, 4096);
        break;
    case OPT_CPU:
        cli->cpu = arg;
        break;
    case OPT_MATH:
        cli->math = arg;
        break;
    case OPT_VRAM:
        cli->engine.vram = (size_t)parse_int(name, arg, 1, 1 << 30) << 20;
        break;
    case OPT_DETERMINISTIC:
        cli->engine.deterministic = 1;
        break;
    case OPT_NO_GRAPHS:
        cli->engine.no_graphs = 1;
        break;
    case OPT_GPU_CACHE:
        cli->engine.cache_dir = arg;
        break;
    case OPT_HTTP_THREADS:
        h->http_threads = parse_int(name, arg, 2, 256);
        break;
    case OPT_MAX_CONNECTIONS:
        h->max_connections = parse_int(name, arg, 1, 1 << 20);
        break;
    case OPT_MAX_BODY:
        h->max_body = (size_t)parse_int(name, arg, 1, 1 << 20) << 10;
        break;
    case OPT_MAX_TEXTS:
        h->max_texts = parse_int(name, arg, 1, 1 << 20);
        break;
    case OPT_MAX_QUEUE:
        o->worker.max_queue_tokens = parse_int(name, arg, 1, 1 << 28);
        break;
    case OPT_MAX_MEMORY:
        h->max_memory = (size_t)parse_int(name, arg, 1, 1 << 24) << 20;
        break;
    case OPT_DEADLINE:
        h->deadline = parse_int(name, arg, 1, hours);
        break;
    case OPT_RECEIVE_TIMEOUT:
        h->receive_timeout = parse_int(name, arg, 1, hours);
        break;
    case OPT_CACHE:
        o->cache_mib = parse_int(name, arg, 0, 1 << 24);
        break;
    case OPT_REDIS:
        o->redis = arg;
        break;
    case OPT_REDIS_TIMEOUT:
        o->redis_timeout = parse_int(name, arg, 1, 60000);
        break;
    case OPT_DRAIN:
        h->drain = parse_int(name, arg, 0, hours);
        break;
    }
}

static void print_and_leave(const char *text) {
    fputs(text, stdout);
    leave(fflush(stdout) ? STATUS_OUTPUT : STATUS_GOOD);
}

static const char *option_name(int opt) {
    for (const struct option *l = long_options; l->name; l++)
        if (l->val == opt) return l->name;
    return "?";
}

/* path without directory and ".qemb" */
static const char *name_by_file(char name[256], const char *path) {
    const char *slash = strrchr(path, '/');
    snprintf(name, 256, "%s", slash ? slash + 1 : path);
    char *dot = strrchr(name, '.');
    if (dot && dot > name && !strcmp(dot, ".qemb")) *dot = 0;
    return name;
}

static void check_names(serve_options *o) {
    http_options *h = &o->http;
    if (!h->n_names) add_name(h, name_by_file(o->name[0], o->worker.cli.model));
    if (h->fallback_name && !o->fallback) USAGE("--fallback-name: of no model (want --fallback)");
    if (o->fallback && !h->fallback_name)
        h->fallback_name = checked_name("fallback-name", name_by_file(o->name[1], o->fallback));
    for (int i = 0; i < h->n_names && o->fallback; i++)
        if (!strcmp(h->names[i], h->fallback_name))
            USAGE("--fallback-name: the model's own name (got %.80s): answers could not tell",
                  h->fallback_name);
}

static void parse_options(serve_options *o, int argc, char **argv) {
    int opt;
    *o = (serve_options){.cache_mib = 64,
                         .redis_timeout = 50,
                         .worker = {.max_queue_tokens = 262144},
                         .http = {.host = "127.0.0.1",
                                  .port = 8080,
                                  .http_threads = 2,
                                  .max_connections = 1024,
                                  .max_texts = 2048,
                                  .max_body = (size_t)4 << 20,
                                  .max_memory = (size_t)1 << 30,
                                  .deadline = 60,
                                  .receive_timeout = 30,
                                  .drain = 30}};
    opterr = 0;
    while ((opt = getopt_long(argc, argv, "-:m:hV", long_options, NULL)) != -1) {
        if (opt == 'h') print_and_leave(help);
        if (opt == 'V') print_and_leave("qemb-serve " QEMB_VERSION "\n");
        if (opt == 1) USAGE("%.80s: an operand that means nothing", optarg);
        if (opt == ':') USAGE("%.80s: needs a value", argv[optind - 1]);
        if (opt == '?') USAGE("%.80s: unknown or ambiguous option", argv[optind - 1]);
        set_option(o, opt, option_name(opt), optarg);
    }
    if (optind < argc) USAGE("%.80s: an operand that means nothing", argv[optind]);
    options *cli = &o->worker.cli;
    qemb_err err;
    cli->ops = choose_ops(cli->cpu, cli->math, &err);
    if (!cli->ops) USAGE("%s", err.msg);
    const qemb_options *e = &cli->engine;
    if (!cli->ops->plan && (e->vram || e->deterministic || e->no_graphs || e->cache_dir))
        USAGE(
            "--vram, --deterministic, --no-graphs, --gpu-cache: only with a GPU (qemb-serve-cuda)");
    if (!cli->model) USAGE("no model (want -m MODEL.qemb)");
    if (cli->query && cli->instruct) USAGE("--query and --instruct: only one of them");
    if (cli->instruct && !*cli->instruct)
        USAGE("--instruct: an empty task (leave it out for documents)");
    check_names(o);
}

/* ---- the run ---------------------------------------------------------------------------------- */

/* Waits for one of the signals, a tick at most. Returns it, or 0. */
static int wait_signal(const sigset_t *set) {
    const struct timespec tick = {.tv_nsec = (long)(TICK * 1e9)};
    const int sig = sigtimedwait(set, NULL, &tick);
    return sig > 0 ? sig : 0;
}

/* The model's, and the fallback's or NULL. */
typedef model_worker *model_workers[2];

static void tick(model_workers l, http *h) {
    const double now = seconds_now();
    for (int i = 0; i < 2 && l[i]; i++) model_worker_tick(l[i], now);
    http_tick(h, now);
}

/* What is on its way is answered, for o->drain seconds at most; then every wait ends, with 503. */
static void drain(const http_options *o, const sigset_t *set, model_workers l, http *h) {
    const double start = seconds_now();
    http_drain(h);
    log_line("info", "draining", "\"seconds\":%g", o->drain); /* from here on it is true */
    while (!http_idle(h, seconds_now()) && seconds_now() - start < o->drain) {
        if (wait_signal(set)) break; /* a second signal: no more patience */
        tick(l, h);
    }
    for (int i = 0; i < 2 && l[i]; i++) model_worker_stop(l[i]);
    const double stopped = seconds_now();
    while (!http_idle(h, seconds_now()) && seconds_now() - stopped < LAST_ANSWERS) wait_signal(set);
}

static void open_caches(serve_options *o) {
    if (o->cache_mib) o->worker.cache = need(cache_new((size_t)o->cache_mib << 20));
    if (!o->redis) return;
    o->worker.redis = redis_new(o->redis, o->redis_timeout);
    if (!o->worker.redis) USAGE("--redis: no address (got %.80s, want HOST:PORT)", o->redis);
}

static void open_workers(const serve_options *o, model_workers l) {
    l[0] = model_worker_open(&o->worker);
    l[1] = NULL;
    if (!o->fallback) return;
    model_worker_options other = o->worker;
    other.cli.model = o->fallback;
    other.is_fallback = 1;
    other.cli.engine.max_tokens =
        0; /* what the model itself can: the first one has been asked before */
    l[1] = model_worker_open(&other);
}

int main(int argc, char **argv) {
    serve_options o;
    sigset_t set;
    model_workers l;
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set, NULL); /* in every thread: this one waits for them */
    parse_options(&o, argc, argv);
    open_caches(&o);
    open_workers(&o, l);
    http *h = http_start(&o.http, l[0], l[1]);
    log_line("info", "listening", "\"port\":%d,\"pid\":%ld", http_port(h), (long)getpid());
    for (int i = 0; i < 2 && l[i]; i++) model_worker_start(l[i]);
    int sig, dead = 0;
    for (; !(sig = wait_signal(&set)) && !dead; tick(l, h))
        for (int i = 0; i < 2 && l[i]; i++) dead |= model_worker_state_of(l[i]) == WORKER_DEAD;
    drain(&o.http, &set, l, h);
    int joined = 1; /* first: then they resume no connection any more */
    for (int i = 0; i < 2 && l[i]; i++) joined &= model_worker_join(l[i], LAST_BATCH);
    http_stop(h);
    log_line("info", "stopped", "\"signal\":%d", sig);
    const int status = dead ? STATUS_MODEL : STATUS_GOOD;
    if (!joined) leave(status); /* in the middle of a long batch that nobody waits for */
    for (int i = 0; i < 2 && l[i]; i++) model_worker_free(l[i]);
    redis_free(o.worker.redis);
    cache_free(o.worker.cache);
    return status;
}
