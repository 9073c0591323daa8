/* model_worker.c - a model at work: texts -> token ids -> queue -> vectors; see server.h. */
#include "server.h"

#include <errno.h>
#include <math.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* What a thread needs to encode; model_workers keep those that nobody uses. */
typedef struct worker {
    struct worker *next;
    record_tokenizer record_tokenizer;
    EVP_MD_CTX *digest;
} worker;

struct model_worker {
    model_worker_options opt;
    source source;
    qemb_model *model;
    queue *queue;
    pthread_t thread;
    int started;
    atomic_int state; /* model_worker_state */
    pthread_mutex_t lock;
    worker *workers; /* under lock */
    EVP_MD *sha256;
    uint8_t fingerprint[KEY_BYTES];
    char fingerprint_hex[2 * KEY_BYTES + 1];
    /* The probe: the empty text, computed to see whether the model works. A client's is the same. */
    pending_request probe;
    pending_text probe_text;
    uint8_t probe_key[KEY_BYTES];
    atomic_int probing;
};

/* ---- opening ---------------------------------------------------------------------------------- */

/* The header holds the shape and the SHA-256 of everything else. Backends and arithmetics round
 * differently, so they do not share vectors. */
#define HEADER_BYTES 4096

static void make_fingerprint(model_worker *l) {
    const char *backend = l->opt.cli.ops->name;
    const uint8_t math = (uint8_t)l->opt.cli.ops->math;
    EVP_MD_CTX *c = need(EVP_MD_CTX_new());
    const int good = EVP_DigestInit_ex(c, l->sha256, NULL) &&
                     EVP_DigestUpdate(c, backend, strlen(backend) + 1) &&
                     EVP_DigestUpdate(c, &math, sizeof math) &&
                     EVP_DigestUpdate(c, l->source.file->map, HEADER_BYTES) &&
                     EVP_DigestFinal_ex(c, l->fingerprint, NULL);
    EVP_MD_CTX_free(c);
    if (!good) DIE(STATUS_MODEL, "SHA-256: not available");
    for (int i = 0; i < KEY_BYTES; i++)
        snprintf(l->fingerprint_hex + 2 * i, 3, "%02x", l->fingerprint[i]);
}

static worker *worker_new(model_worker *l) {
    qemb_err err;
    worker *w = need(calloc(1, sizeof *w));
    if (record_tokenizer_open(&w->record_tokenizer, &l->source, &l->opt.cli, &err))
        DIE(strcmp(err.code, "usage") ? STATUS_MODEL : STATUS_USAGE, "%s", err.msg);
    w->digest = need(EVP_MD_CTX_new());
    return w;
}

static worker *take_worker(model_worker *l) {
    pthread_mutex_lock(&l->lock);
    worker *w = l->workers;
    if (w) l->workers = w->next;
    pthread_mutex_unlock(&l->lock);
    return w ? w : worker_new(l);
}

static void give_worker(model_worker *l, worker *w) {
    pthread_mutex_lock(&l->lock);
    w->next = l->workers;
    l->workers = w;
    pthread_mutex_unlock(&l->lock);
}

static int make_key(model_worker *l, worker *w, uint8_t *key, const record_ids *t) {
    return EVP_DigestInit_ex(w->digest, l->sha256, NULL) &&
           EVP_DigestUpdate(w->digest, l->fingerprint, sizeof l->fingerprint) &&
           EVP_DigestUpdate(w->digest, t->ids, (size_t)t->n * sizeof *t->ids) &&
           EVP_DigestFinal_ex(w->digest, key, NULL);
}

model_worker *model_worker_open(const model_worker_options *o) {
    model_worker *l = need(calloc(1, sizeof *l));
    qemb_err err;
    l->opt = *o;
    pthread_mutex_init(&l->lock, NULL);
    const char *path = o->cli.model;
    if (qemb_file_open(&l->source.file, path, &err)) DIE(STATUS_MODEL, "%s", err.msg);
    const qemb_file *f = l->source.file;
    if (qemb_tokenizer_open(&l->source.tokenizer, f->merges, f->n_merges, f->added, f->added_bytes,
                            &err))
        DIE(STATUS_MODEL, "%.128s: %s", path, err.msg);
    if (qemb_tokenizer_n_ids(l->source.tokenizer) > (uint32_t)f->config.vocab)
        DIE(STATUS_MODEL,
            "%.128s: tokenizer: more ids than rows of the embedding table (got %u, want at most "
            "%d)",
            path, (unsigned)qemb_tokenizer_n_ids(l->source.tokenizer), f->config.vocab);
    l->sha256 = EVP_MD_fetch(NULL, "SHA256", NULL);
    if (!l->sha256) DIE(STATUS_MODEL, "SHA-256: not available");
    make_fingerprint(l);
    worker *w = take_worker(l); /* now, so that wrong options are seen */
    if (!make_key(l, w, l->probe_key, &(record_ids){0}))
        DIE(STATUS_MODEL, "SHA-256: not available");
    give_worker(l, w);
    const int batch = o->cli.engine.batch_tokens;
    l->queue = need(queue_new(o->max_queue_tokens, batch ? batch : qemb_batch_tokens(o->cli.ops)));
    return l;
}

/* ---- the model's thread ------------------------------------------------------------------------- */

/* The rows' vectors; NULL where there is no finite length. Returns the number of those. */
static int make_vectors(const float *out, float *unit, int D, vector **vectors, int n) {
    int bad = 0;
    for (int i = 0; i < n; i++) {
        const float *row = out + (size_t)i * (size_t)D;
        vectors[i] = qemb_l2_normalize(unit, row, D) ? NULL : vector_new(row, D);
        bad += !vectors[i];
    }
    return bad;
}

static int count_tokens(text *const *taken, int n) {
    int sum = 0;
    for (int i = 0; i < n; i++) sum += taken[i]->n;
    return sum;
}

static void remember(model_worker *l, const uint8_t *key, vector *v) {
    if (l->opt.cache) cache_put(l->opt.cache, key, v);
    if (l->opt.redis) redis_put(l->opt.redis, key, v);
}

static void load(model_worker *l) {
    qemb_err err;
    if (qemb_open(&l->model, l->source.file, l->opt.cli.ops, &l->opt.cli.engine, &err))
        DIE(STATUS_MODEL, "%s", err.msg);
    log_line("info", "loaded", "\"fallback\":%s,\"fingerprint\":\"%s\"",
             l->opt.is_fallback ? "true" : "false", l->fingerprint_hex);
}

/* It gives NaN from now on, and only a new process gets it back. Whoever waits is told to come again:
 * the texts are not to blame. */
static void device_failed(model_worker *l, const char *why) {
    char quoted[6 * 256 + 3];
    const size_t n = strlen(why);
    *format_json_string(quoted, why, n < 256 ? n : 256) = 0;
    log_line("error", "device_failed", "\"message\":%s", quoted);
    atomic_store(&l->state, WORKER_DEAD);
    queue_stop(l->queue);
}

static void *compute_main(void *arg) {
    model_worker *l = arg;
    load(l);
    const size_t D = (size_t)l->source.file->config.hidden;
    const size_t most = (size_t)qemb_options_of(l->model)->batch_tokens;
    qemb_batch *b = need(qemb_batch_new(l->model));
    text **taken = need(malloc(most * sizeof(text *)));
    vector **vectors = need(malloc(most * sizeof(vector *)));
    float *unit = need(malloc(D * sizeof *unit)), *out = NULL;
    size_t rows = 0; /* of out */
    qemb_health before = {0};
    for (int n; (n = queue_take(l->queue, b, taken)); qemb_batch_clear(b)) {
        if ((size_t)n > rows) {
            free(out);
            rows = (size_t)n;
            out = need(malloc(rows * D * sizeof *out));
        }
        const int tokens = count_tokens(taken, n);
        const double start = seconds_now();
        qemb_embed(l->model, b, out);
        const qemb_health now = qemb_health_of(l->model);
        if (now.failure) device_failed(l, now.failure);
        metrics_add(COUNT_CLAMPED, now.clamped - before.clamped);
        metrics_add(COUNT_RECOMPUTED, now.recomputed - before.recomputed);
        before = now;
        metrics_observe(HISTOGRAM_BATCH_SECONDS, seconds_now() - start);
        metrics_observe(HISTOGRAM_BATCH_TEXTS, n);
        metrics_observe(HISTOGRAM_BATCH_TOKENS, tokens);
        metrics_add(COUNT_COMPUTED_TEXTS, (uint64_t)n);
        metrics_add(COUNT_COMPUTED_TOKENS, (uint64_t)tokens);
        const int bad = make_vectors(out, unit, (int)D, vectors, n);
        metrics_add(COUNT_NON_FINITE, (uint64_t)bad);
        for (int i = 0; i < n; i++) /* first: whoever misses them in flight finds them there */
            if (vectors[i]) remember(l, taken[i]->key, vectors[i]);
        const int state = now.failure ? WORKER_DEAD : bad ? WORKER_FAILING : WORKER_READY;
        if (!now.failure && atomic_exchange(&l->state, state) != state)
            log_line(bad ? "error" : "info", bad ? "failing" : "ready",
                     "\"texts\":%d,\"non_finite\":%d", n, bad);
        queue_finish(l->queue, taken, vectors, n);
        for (int i = 0; i < n; i++) vector_drop(vectors[i]);
    }
    free(out);
    free(unit);
    free(vectors);
    free(taken);
    qemb_batch_free(b);
    return NULL;
}

void model_worker_start(model_worker *l) {
    const int error = pthread_create(&l->thread, NULL, compute_main, l);
    if (error) DIE(STATUS_MODEL, "thread: cannot start it (%s)", strerror(error));
    l->started = 1;
}

void model_worker_stop(model_worker *l) { queue_stop(l->queue); }

int model_worker_join(model_worker *l, double seconds) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    const double until = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec + seconds;
    t.tv_sec = (time_t)until;
    t.tv_nsec = (long)((until - floor(until)) * 1e9);
    return !l->started || !pthread_timedjoin_np(l->thread, NULL, &t);
}

void model_worker_free(model_worker *l) {
    for (worker *w = l->workers, *next; w; w = next) {
        next = w->next;
        record_tokenizer_close(&w->record_tokenizer);
        EVP_MD_CTX_free(w->digest);
        free(w);
    }
    queue_free(l->queue);
    qemb_close(l->model);
    EVP_MD_free(l->sha256);
    qemb_tokenizer_close(l->source.tokenizer);
    qemb_file_close(l->source.file);
    pthread_mutex_destroy(&l->lock);
    free(l);
}

/* ---- health ----------------------------------------------------------------------------------- */

model_worker_state model_worker_state_of(model_worker *l) {
    return (model_worker_state)atomic_load(&l->state);
}

static void probe_done(pending_request *t) {
    model_worker *l = (model_worker *)((char *)t - offsetof(model_worker, probe));
    vector_drop(l->probe_text.vector);
    free(l->probe_text.text);
    l->probe_text = (pending_text){0};
    atomic_store(&l->probing, 0);
}

/* A model_worker that has not shown to be good computes something until it has: no client will ask a server
 * that says it is ill, so its next good batch has to be its own. */
static void probe(model_worker *l, double now) {
    int shared;
    if (atomic_exchange(&l->probing, 1)) return;
    text *t = text_new(l->probe_key, 1);
    l->probe_text = (pending_text){.text = t};
    l->probe = (pending_request){
        .texts = &l->probe_text, .n = 1, .deadline = now + 1e6, .done = probe_done};
    if (t) t->ids[0] = l->source.file->config.eos_id;
    if (!t || queue_submit(l->queue, &l->probe, &shared)) probe_done(&l->probe);
}

void model_worker_tick(model_worker *l, double now) {
    queue_tick(l->queue, now);
    const model_worker_state s = model_worker_state_of(l);
    if (l->started && s != WORKER_READY && s != WORKER_DEAD) probe(l, now);
}

int model_worker_hidden(const model_worker *l) { return l->source.file->config.hidden; }
queue *model_worker_queue(model_worker *l) { return l->queue; }
const char *model_worker_fingerprint(const model_worker *l) { return l->fingerprint_hex; }

size_t model_worker_cache_bytes(const model_worker *l) {
    return l->opt.cache ? cache_bytes(l->opt.cache) : 0;
}

int model_worker_max_tokens(const model_worker *l) {
    const int n = l->opt.cli.engine.max_tokens;
    return n ? n : l->source.file->config.max_positions;
}

/* ---- encoding --------------------------------------------------------------------------------- */

static int check_ids(const model_worker *l, const int32_t *ids, size_t n, int i, api_error *e) {
    for (size_t k = 0; k < n; k++)
        if (ids[k] >= l->source.file->config.vocab)
            return api_fail(e, 400, "invalid_token", "input",
                            "input[%d]: no such token (got %d, want 0..%d)", i, ids[k],
                            l->source.file->config.vocab - 1);
    return 0;
}

static int tokenize_failed(const qemb_err *err, int i, api_error *e) {
    if (!strcmp(err->code, "too_long"))
        return api_fail(e, 400, "context_length_exceeded", "input", "input[%d]: %s", i, err->msg);
    if (!strcmp(err->code, "out_of_memory"))
        return api_fail(e, 503, err->code, NULL, "input[%d]: %s", i, err->msg);
    return api_fail(e, 400, err->code, "input", "input[%d]: %s", i, err->msg);
}

static int tokenize_input(model_worker *l, worker *w, const api_request *r, int i, pending_text *s,
                          api_error *e) {
    const api_input *in = &r->inputs[i];
    record_ids t = {0};
    qemb_err err;
    uint8_t key[KEY_BYTES];
    if (in->text) {
        if (tokenize_text(&w->record_tokenizer, in->text, in->len, r->instruct, r->instruct_len, &t,
                          &err))
            return tokenize_failed(&err, i, e);
    } else {
        const int32_t *ids = r->ids + in->first_id;
        if (check_ids(l, ids, in->len, i, e)) return -1;
        if (tokenize_ids(&w->record_tokenizer, ids, in->len, &t, &err))
            return tokenize_failed(&err, i, e);
    }
    if (!make_key(l, w, key, &t) || !(s->text = text_new(key, t.n + 1)))
        return api_fail(e, 503, "out_of_memory", NULL, "request: out of memory");
    if (t.n) memcpy(s->text->ids, t.ids, (size_t)t.n * sizeof *t.ids);
    s->text->ids[t.n] = w->record_tokenizer.eos;
    return 0;
}

int model_worker_tokenize(model_worker *l, const api_request *r, pending_request *t,
                          uint64_t *tokens, api_error *e) {
    t->texts = calloc((size_t)r->n, sizeof *t->texts);
    if (!t->texts) return api_fail(e, 503, "out_of_memory", NULL, "request: out of memory");
    t->n = r->n;
    *tokens = 0;
    worker *w = take_worker(l);
    w->record_tokenizer.truncate = r->truncate >= 0 ? r->truncate : l->opt.cli.truncate;
    int bad = 0;
    for (int i = 0; i < r->n && !bad; i++) {
        bad = tokenize_input(l, w, r, i, &t->texts[i], e);
        if (!bad) *tokens += (uint64_t)t->texts[i].text->n;
        /* One request's texts must not be able to take all memory as ids. */
        if (!bad && *tokens > (uint64_t)l->opt.max_queue_tokens)
            bad = api_fail(e, 413, "too_many_tokens", "input",
                           "input: too many tokens in one request (got more than %d)",
                           l->opt.max_queue_tokens);
    }
    give_worker(l, w);
    if (bad) pending_request_clear(t);
    return bad;
}

int model_worker_lookup(model_worker *l, pending_request *t) {
    int hits = 0, redis_hits = 0;
    for (int i = 0; l->opt.cache && i < t->n; i++) {
        pending_text *s = &t->texts[i];
        s->vector = cache_get(l->opt.cache, s->text->key);
        if (!s->vector) continue;
        free(s->text);
        s->text = NULL;
        hits++;
    }
    if (l->opt.redis) redis_hits = redis_get(l->opt.redis, t, model_worker_hidden(l));
    for (int i = 0; redis_hits && i < t->n; i++) {
        pending_text *s = &t->texts[i];
        if (!s->text || !s->vector) continue;
        if (l->opt.cache) cache_put(l->opt.cache, s->text->key, s->vector);
        free(s->text);
        s->text = NULL;
    }
    metrics_add(COUNT_CACHE_HITS, (uint64_t)hits);
    metrics_add(COUNT_REDIS_HITS, (uint64_t)redis_hits);
    metrics_add(COUNT_CACHE_MISSES, (uint64_t)(t->n - hits - redis_hits));
    return hits + redis_hits;
}
