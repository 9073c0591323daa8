/* model_worker.c - a model, its queue and the thread that computes; see model_worker.h. */
#include "model_worker.h"

#include "frontends/console.h"
#include "frontends/format.h"
#include "frontends/open_model.h"
#include "frontends/record_tokenizer.h"
#include "log.h"

#include <math.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A tokenizer and its buffers, used by one thread at a time. The worker keeps the unused ones. */
typedef struct scratch {
    struct scratch *next;
    record_tokenizer record_tokenizer;
    EVP_MD_CTX *digest;
} scratch;

struct model_worker {
    model_worker_options opt;
    model_file file;
    qemb_model *model;
    queue *queue;
    pthread_t thread;
    int started;
    atomic_int state; /* model_worker_state */
    pthread_mutex_t lock;
    scratch *unused; /* under lock */
    EVP_MD *sha256;
    uint8_t fingerprint[KEY_BYTES];
    char fingerprint_hex[2 * KEY_BYTES + 1];
    /* The probe: the empty text, computed to test whether the model works. */
    pending_request probe;
    pending_text probe_text;
    uint8_t probe_key[KEY_BYTES];
    atomic_int probing;
};

/* ---- opening --------------------------------------------------------------------------------- */

/* The file's header holds the model's shape and the SHA-256 of the rest. Ops tables round
 * differently, so their vectors are not shared. */
#define HEADER_BYTES 4096

static void make_fingerprint(model_worker *m) {
    const char *backend = m->opt.model.ops->name;
    const uint8_t math = (uint8_t)m->opt.model.ops->math;
    EVP_MD_CTX *c = need(EVP_MD_CTX_new());
    const int good = EVP_DigestInit_ex(c, m->sha256, NULL) &&
                     EVP_DigestUpdate(c, backend, strlen(backend) + 1) &&
                     EVP_DigestUpdate(c, &math, sizeof math) &&
                     EVP_DigestUpdate(c, m->file.file->map, HEADER_BYTES) &&
                     EVP_DigestFinal_ex(c, m->fingerprint, NULL);
    EVP_MD_CTX_free(c);
    if (!good) DIE(STATUS_MODEL, "SHA-256: not available");
    for (int i = 0; i < KEY_BYTES; i++)
        snprintf(m->fingerprint_hex + 2 * i, 3, "%02x", m->fingerprint[i]);
}

static scratch *scratch_new(model_worker *m) {
    qemb_err err;
    scratch *s = need(calloc(1, sizeof *s));
    if (record_tokenizer_open(&s->record_tokenizer, &m->file, &m->opt.model, &(record_options){0},
                              &err))
        DIE(strcmp(err.code, "usage") ? STATUS_MODEL : STATUS_USAGE, "%s", err.msg);
    s->digest = need(EVP_MD_CTX_new());
    return s;
}

static scratch *take_scratch(model_worker *m) {
    pthread_mutex_lock(&m->lock);
    scratch *s = m->unused;
    if (s) m->unused = s->next;
    pthread_mutex_unlock(&m->lock);
    return s ? s : scratch_new(m);
}

static void give_scratch(model_worker *m, scratch *s) {
    pthread_mutex_lock(&m->lock);
    s->next = m->unused;
    m->unused = s;
    pthread_mutex_unlock(&m->lock);
}

/* The key of a text: the digest of everything that its vector depends on. The end-of-text token,
 * which every text has, is left out. */
static int make_key(model_worker *m, scratch *s, uint8_t *key, const record_ids *t) {
    return EVP_DigestInit_ex(s->digest, m->sha256, NULL) &&
           EVP_DigestUpdate(s->digest, m->fingerprint, sizeof m->fingerprint) &&
           EVP_DigestUpdate(s->digest, t->ids, (size_t)(t->n - 1) * sizeof *t->ids) &&
           EVP_DigestFinal_ex(s->digest, key, NULL);
}

model_worker *model_worker_open(const model_worker_options *o) {
    model_worker *m = need(calloc(1, sizeof *m));
    m->opt = *o;
    pthread_mutex_init(&m->lock, NULL);
    open_model_file(&m->file, o->model.model);
    m->sha256 = EVP_MD_fetch(NULL, "SHA256", NULL);
    if (!m->sha256) DIE(STATUS_MODEL, "SHA-256: not available");
    make_fingerprint(m);
    scratch *s = take_scratch(m); /* here, so that wrong options end the process at the start */
    const int32_t eos = m->file.file->config.eos_id;
    if (!make_key(m, s, m->probe_key, &(record_ids){.ids = &eos, .n = 1}))
        DIE(STATUS_MODEL, "SHA-256: not available");
    give_scratch(m, s);
    const int batch = o->model.engine.batch_tokens;
    m->queue = need(queue_new(o->max_queue_tokens, batch ? batch : qemb_batch_tokens(o->model.ops),
                              o->metrics));
    return m;
}

/* ---- the model's thread ---------------------------------------------------------------------- */

/* vectors[i] = row i of out (n, D), or NULL if it has no finite length. Returns the number of
 * NULLs. */
static int make_vectors(const float *out, int D, vector **vectors, int n) {
    int bad = 0;
    for (int i = 0; i < n; i++) {
        const float *row = out + (size_t)i * (size_t)D;
        vectors[i] = qemb_has_length(row, D) ? vector_new(row, D) : NULL;
        bad += !vectors[i];
    }
    return bad;
}

static int count_tokens(text *const *taken, int n) {
    int sum = 0;
    for (int i = 0; i < n; i++) sum += taken[i]->n;
    return sum;
}

static void remember(model_worker *m, const uint8_t *key, vector *v) {
    if (m->opt.cache) cache_put(m->opt.cache, key, v);
    if (m->opt.redis) redis_put(m->opt.redis, key, v);
}

static void load(model_worker *m) {
    qemb_err err;
    if (qemb_open(&m->model, m->file.file, m->opt.model.ops, &m->opt.model.engine, &err))
        DIE(STATUS_MODEL, "%s", err.msg);
    log_line("info", "loaded", "\"fallback\":%s,\"fingerprint\":\"%s\"",
             m->opt.is_fallback ? "true" : "false", m->fingerprint_hex);
}

/* A failed device computes NaN until the process ends. Waiting requests get 503, not 422, since
 * their texts are not the cause. */
static void device_failed(model_worker *m, const char *why) {
    char quoted[6 * 256 + 3];
    const size_t n = strlen(why);
    *format_json_string(quoted, why, n < 256 ? n : 256) = 0;
    log_line("error", "device_failed", "\"message\":%s", quoted);
    atomic_store(&m->state, WORKER_DEAD);
    queue_stop(m->queue);
}

static void *compute_main(void *arg) {
    model_worker *m = arg;
    load(m);
    const size_t D = (size_t)m->file.file->config.hidden;
    const size_t most = (size_t)qemb_options_of(m->model)->batch_tokens;
    qemb_batch *b = need(qemb_batch_new(m->model));
    text **taken = need(malloc(most * sizeof(text *)));
    vector **vectors = need(malloc(most * sizeof(vector *)));
    float *out = NULL;
    size_t rows = 0; /* of out */
    qemb_health before = {0};
    for (int n; (n = queue_take(m->queue, b, taken)); qemb_batch_clear(b)) {
        if ((size_t)n > rows) {
            free(out);
            rows = (size_t)n;
            out = need(malloc(rows * D * sizeof *out));
        }
        const int tokens = count_tokens(taken, n);
        const double start = seconds_now();
        qemb_embed(m->model, b, out);
        const qemb_health now = qemb_health_of(m->model);
        if (now.failure) device_failed(m, now.failure);
        metrics_add(m->opt.metrics, COUNT_CLAMPED, now.clamped - before.clamped);
        metrics_add(m->opt.metrics, COUNT_RECOMPUTED, now.recomputed - before.recomputed);
        before = now;
        metrics_observe(m->opt.metrics, HISTOGRAM_BATCH_SECONDS, seconds_now() - start);
        metrics_observe(m->opt.metrics, HISTOGRAM_BATCH_TEXTS, n);
        metrics_observe(m->opt.metrics, HISTOGRAM_BATCH_TOKENS, tokens);
        metrics_add(m->opt.metrics, COUNT_COMPUTED_TEXTS, (uint64_t)n);
        metrics_add(m->opt.metrics, COUNT_COMPUTED_TOKENS, (uint64_t)tokens);
        const int bad = make_vectors(out, (int)D, vectors, n);
        metrics_add(m->opt.metrics, COUNT_NON_FINITE, (uint64_t)bad);
        /* Before queue_finish, so that a text is always in flight or cached. */
        for (int i = 0; i < n; i++)
            if (vectors[i]) remember(m, taken[i]->key, vectors[i]);
        const int state = now.failure ? WORKER_DEAD : bad ? WORKER_FAILING : WORKER_READY;
        if (!now.failure && atomic_exchange(&m->state, state) != state)
            log_line(bad ? "error" : "info", bad ? "failing" : "ready",
                     "\"texts\":%d,\"non_finite\":%d", n, bad);
        queue_finish(m->queue, taken, vectors, n);
        for (int i = 0; i < n; i++) vector_drop(vectors[i]);
    }
    free(out);
    free(vectors);
    free(taken);
    qemb_batch_free(b);
    return NULL;
}

void model_worker_start(model_worker *m) {
    const int error = pthread_create(&m->thread, NULL, compute_main, m);
    if (error) DIE(STATUS_MODEL, "thread: cannot start it (%s)", strerror(error));
    m->started = 1;
}

void model_worker_stop(model_worker *m) { queue_stop(m->queue); }

int model_worker_join(model_worker *m, double seconds) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    const double until = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec + seconds;
    t.tv_sec = (time_t)until;
    t.tv_nsec = (long)((until - floor(until)) * 1e9);
    return !m->started || !pthread_timedjoin_np(m->thread, NULL, &t);
}

void model_worker_free(model_worker *m) {
    for (scratch *s = m->unused, *next; s; s = next) {
        next = s->next;
        record_tokenizer_close(&s->record_tokenizer);
        EVP_MD_CTX_free(s->digest);
        free(s);
    }
    queue_free(m->queue);
    qemb_close(m->model);
    EVP_MD_free(m->sha256);
    close_model_file(&m->file);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

/* ---- health ---------------------------------------------------------------------------------- */

model_worker_state model_worker_state_of(model_worker *m) {
    return (model_worker_state)atomic_load(&m->state);
}

static void probe_done(pending_request *t) {
    model_worker *m = (model_worker *)((char *)t - offsetof(model_worker, probe));
    vector_drop(m->probe_text.vector);
    free(m->probe_text.text);
    m->probe_text = (pending_text){0};
    atomic_store(&m->probing, 0);
}

/* Until a batch has succeeded, at the start or after a failed one, the worker computes the empty
 * text. Load balancers send nothing while /health is 503, so no client could show that it works. */
static void probe(model_worker *m, double now) {
    int shared;
    if (atomic_exchange(&m->probing, 1)) return;
    text *t = text_new(m->probe_key, 1);
    m->probe_text = (pending_text){.text = t};
    m->probe = (pending_request){
        .texts = &m->probe_text, .n = 1, .deadline = now + 1e6, .done = probe_done};
    if (t) t->ids[0] = m->file.file->config.eos_id;
    if (!t || queue_submit(m->queue, &m->probe, &shared)) probe_done(&m->probe);
}

void model_worker_tick(model_worker *m, double now) {
    queue_tick(m->queue, now);
    const model_worker_state s = model_worker_state_of(m);
    if (m->started && s != WORKER_READY && s != WORKER_DEAD) probe(m, now);
}

int model_worker_submit(model_worker *m, pending_request *t, int *shared) {
    return queue_submit(m->queue, t, shared);
}

int model_worker_retry_after(model_worker *m) { return queue_retry_after(m->queue); }
queue_depth model_worker_depth(model_worker *m) { return queue_depth_of(m->queue); }
int model_worker_hidden(const model_worker *m) { return m->file.file->config.hidden; }
const char *model_worker_fingerprint(const model_worker *m) { return m->fingerprint_hex; }

size_t model_worker_cache_bytes(const model_worker *m) {
    return m->opt.cache ? cache_bytes(m->opt.cache) : 0;
}

int model_worker_max_tokens(const model_worker *m) {
    const int n = m->opt.model.engine.max_tokens;
    return n ? n : m->file.file->config.max_positions;
}

/* ---- tokenizing ------------------------------------------------------------------------------ */

static int check_ids(const model_worker *m, const int32_t *ids, size_t n, int i, api_error *e) {
    for (size_t k = 0; k < n; k++)
        if (ids[k] >= m->file.file->config.vocab)
            return api_fail(e, 400, "invalid_token", "input",
                            "input[%d]: no such token (got %d, want 0..%d)", i, ids[k],
                            m->file.file->config.vocab - 1);
    return 0;
}

static int tokenize_failed(const qemb_err *err, int i, api_error *e) {
    if (!strcmp(err->code, "too_long"))
        return api_fail(e, 400, "context_length_exceeded", "input", "input[%d]: %s", i, err->msg);
    if (!strcmp(err->code, "out_of_memory"))
        return api_fail(e, 503, err->code, NULL, "input[%d]: %s", i, err->msg);
    return api_fail(e, 400, err->code, "input", "input[%d]: %s", i, err->msg);
}

static int tokenize_input(model_worker *m, scratch *s, const api_request *r, int i, pending_text *p,
                          api_error *e) {
    const api_input *in = &r->inputs[i];
    record_ids ids = {0};
    qemb_err err;
    uint8_t key[KEY_BYTES];
    if (in->text) {
        if (tokenize_text(&s->record_tokenizer, in->text, in->len, r->instruct, r->instruct_len,
                          &ids, &err))
            return tokenize_failed(&err, i, e);
    } else {
        const int32_t *given = r->ids + in->first_id;
        if (check_ids(m, given, in->len, i, e)) return -1;
        if (tokenize_ids(&s->record_tokenizer, given, in->len, &ids, &err))
            return tokenize_failed(&err, i, e);
    }
    if (!make_key(m, s, key, &ids) || !(p->text = text_new(key, ids.n)))
        return api_fail(e, 503, "out_of_memory", NULL, "request: out of memory");
    memcpy(p->text->ids, ids.ids, (size_t)ids.n * sizeof *ids.ids);
    return 0;
}

int model_worker_tokenize(model_worker *m, const api_request *r, pending_request *t,
                          uint64_t *tokens, api_error *e) {
    t->texts = calloc((size_t)r->n, sizeof *t->texts);
    if (!t->texts) return api_fail(e, 503, "out_of_memory", NULL, "request: out of memory");
    t->n = r->n;
    *tokens = 0;
    scratch *s = take_scratch(m);
    s->record_tokenizer.truncate = r->truncate >= 0 ? r->truncate : m->opt.model.truncate;
    int bad = 0;
    for (int i = 0; i < r->n && !bad; i++) {
        bad = tokenize_input(m, s, r, i, &t->texts[i], e);
        if (!bad) *tokens += (uint64_t)t->texts[i].text->n;
        /* Bounds the memory of one request's ids. */
        if (!bad && *tokens > (uint64_t)m->opt.max_queue_tokens)
            bad = api_fail(e, 413, "too_many_tokens", "input",
                           "input: too many tokens in one request (got more than %d)",
                           m->opt.max_queue_tokens);
    }
    give_scratch(m, s);
    if (bad) pending_request_clear(t);
    return bad;
}

int model_worker_lookup(model_worker *m, pending_request *t) {
    int hits = 0, redis_hits = 0;
    for (int i = 0; m->opt.cache && i < t->n; i++) {
        pending_text *s = &t->texts[i];
        s->vector = cache_get(m->opt.cache, s->text->key);
        if (!s->vector) continue;
        free(s->text);
        s->text = NULL;
        hits++;
    }
    if (m->opt.redis) redis_hits = redis_get(m->opt.redis, t, model_worker_hidden(m));
    for (int i = 0; redis_hits && i < t->n; i++) {
        pending_text *s = &t->texts[i];
        if (!s->text || !s->vector) continue;
        if (m->opt.cache) cache_put(m->opt.cache, s->text->key, s->vector);
        free(s->text);
        s->text = NULL;
    }
    metrics_add(m->opt.metrics, COUNT_CACHE_HITS, (uint64_t)hits);
    metrics_add(m->opt.metrics, COUNT_REDIS_HITS, (uint64_t)redis_hits);
    metrics_add(m->opt.metrics, COUNT_CACHE_MISSES, (uint64_t)(t->n - hits - redis_hits));
    return hits + redis_hits;
}
