/* model_worker.c - a model, its queue and the threads that compute; see model_worker.h. */
#include "model_worker.h"

#include "frontends/console.h"
#include "frontends/fingerprint.h"
#include "frontends/format.h"
#include "frontends/open_model.h"
#include "frontends/record_tokenizer.h"
#include "frontends/replicas.h"
#include "log.h"

#include <inttypes.h>
#include <math.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Rows of a reranker's batch on a CPU. The documents of a request share the rows of prompt and
 * query, about a hundred, which each further batch computes again: 2.4% of 4096 rows, a tenth of
 * the 1024 that embedding models have. `qemb rerank` takes twice as many rows, since nobody waits
 * behind its batches; here a short request does. It needs no memory that a text of the usual window
 * would not need. */
#define RERANK_BATCH 4096

/* A tokenizer and its buffers, used by one thread at a time. The worker keeps the unused ones. */
typedef struct scratch {
    struct scratch *next;
    record_tokenizer record_tokenizer;
    EVP_MD_CTX *digest;
} scratch;

/* A batch on its way through the model. */
typedef struct {
    qemb_batch *batch;
    text **taken; /* (n) the texts of its rows */
    float *out;   /* (n, dim) their vectors */
    int n;
    int given_up; /* no request waited for its text any more */
    double start; /* when it was submitted */
} job;

/* A model on one device, and the thread that computes with it. */
typedef struct {
    model_worker *worker;
    int i; /* of the options' devices */
    qemb_model *model;
    pthread_t thread;
    int joined;
    job *jobs; /* (n_jobs) a ring: from first on, n_submitted that are submitted, oldest first */
    int n_jobs, first, n_submitted;
    job between;     /* of short texts, between two steps of a long one, where there are any */
    double its_turn; /* until then the long text is computed */
    vector **vectors;   /* of the batch that is finished */
    qemb_health before; /* after the last batch */
    double end;         /* of the last batch */
} replica;

struct model_worker {
    model_worker_options opt;
    model_file file;
    replica *replicas; /* one a device */
    queue *queue;
    int started;         /* replicas whose threads run */
    atomic_int working;  /* devices that have not failed */
    atomic_int state;    /* model_worker_state, but for WORKER_CHANGED */
    atomic_int changed;  /* the file was written to */
    pthread_mutex_t lock; /* guards the members up to the empty line */
    pthread_cond_t loaded;
    int loading;      /* replicas that are not loaded */
    qemb_err failure; /* why one could not be; code NULL: none */
    scratch *unused;

    EVP_MD *sha256;
    uint8_t fingerprint[FINGERPRINT_BYTES];
    char fingerprint_hex[2 * FINGERPRINT_BYTES + 1];
    int is_reranker;
    /* Whether the n numbers of v are a vector that can be answered. */
    int (*is_good)(const float *v, int n);
    redis_kind in_redis;    /* set before has_weights */
    atomic_int has_weights; /* the checksum of the loaded weights is known */
    /* The probe: the empty text, computed to test whether the model works. */
    pending_request probe;
    pending_text probe_text;
    text *probed; /* its ids and key */
    atomic_int probing;
};

/* ---- opening --------------------------------------------------------------------------------- */

static int out_of_memory(qemb_err *err) {
    return qemb_fail(err, "out_of_memory", "model: out of memory");
}

static int make_fingerprint(model_worker *m, qemb_err *err) {
    m->sha256 = EVP_MD_fetch(NULL, "SHA256", NULL);
    if (!m->sha256 || model_fingerprint(m->fingerprint, m->file.file, m->opt.model.ops))
        return qemb_fail(err, "model_file", "SHA-256: not available");
    *format_hex(m->fingerprint_hex, m->fingerprint, FINGERPRINT_BYTES) = 0;
    return 0;
}

static scratch *scratch_new(model_worker *m, qemb_err *err) {
    scratch *s = calloc(1, sizeof *s);
    EVP_MD_CTX *digest = EVP_MD_CTX_new();
    if (!s || !digest)
        out_of_memory(err);
    else if (!record_tokenizer_open(&s->record_tokenizer, &m->file, &m->opt.model,
                                    &(record_options){0}, err)) {
        s->digest = digest;
        return s;
    }
    EVP_MD_CTX_free(digest);
    free(s);
    return NULL;
}

/* Returns NULL with *err on failure. */
static scratch *take_scratch(model_worker *m, qemb_err *err) {
    pthread_mutex_lock(&m->lock);
    scratch *s = m->unused;
    if (s) m->unused = s->next;
    pthread_mutex_unlock(&m->lock);
    return s ? s : scratch_new(m, err);
}

static void give_scratch(model_worker *m, scratch *s) {
    pthread_mutex_lock(&m->lock);
    s->next = m->unused;
    m->unused = s;
    pthread_mutex_unlock(&m->lock);
}

/* The key of a text: the digest of everything that its vector depends on. An end-of-text token,
 * which then every text has, is left out. */
static int make_key(model_worker *m, scratch *s, uint8_t *key, const record_ids *t) {
    const int own = t->n - (m->file.file->config.eos_id != QEMB_NO_TOKEN);
    return EVP_DigestInit_ex(s->digest, m->sha256, NULL) &&
           EVP_DigestUpdate(s->digest, m->fingerprint, sizeof m->fingerprint) &&
           EVP_DigestUpdate(s->digest, t->ids, (size_t)own * sizeof *t->ids) &&
           EVP_DigestFinal_ex(s->digest, key, NULL);
}

/* Returns the text of ids, or NULL if out of memory. */
static text *make_text(model_worker *m, scratch *s, const record_ids *ids) {
    uint8_t key[KEY_BYTES];
    text *t = make_key(m, s, key, ids) ? text_new(key, ids->n) : NULL;
    if (t) memcpy(t->ids, ids->ids, (size_t)ids->n * sizeof *ids->ids);
    return t;
}

/* The empty text, or pair. A model that adds no token to it gets token 0. NULL: out of memory. */
static text *make_probe(model_worker *m, scratch *s) {
    static const int32_t first;
    qemb_err err;
    record_ids ids = {0};
    record_tokenizer *t = &s->record_tokenizer;
    t->truncate = 1;
    if (m->is_reranker ? tokenize_pair(t, &(text_pair){.query = "", .document = ""}, 0, &ids, &err)
                       : tokenize_text(t, "", 0, "", 0, &ids, &err))
        ids = (record_ids){.ids = &first, .n = 1};
    return make_text(m, s, &ids);
}

static int is_finite(const float *v, int n) {
    for (int i = 0; i < n; i++)
        if (!isfinite(v[i])) return 0;
    return 1;
}

static int check_kind(model_worker *m, qemb_err *err) {
    const model_options *o = &m->opt.model;
    m->is_reranker = m->file.file->config.kind == QEMB_RERANKER;
    m->is_good = m->is_reranker ? is_finite : qemb_has_length; /* a logit may be 0 */
    if (m->opt.role == ROLE_RERANKER && !m->is_reranker)
        return qemb_fail(err, "usage", "--reranker: an embedding model (got %.128s)", o->model);
    const int most = m->file.file->config.max_positions;
    if (m->opt.role == ROLE_RERANKER && o->engine.max_tokens > most)
        return qemb_fail(err, "usage",
                         "--reranker-max-tokens: more than the model can (got %d, want 1..%d)",
                         o->engine.max_tokens, most);
    if (m->opt.role == ROLE_FALLBACK && m->is_reranker)
        return qemb_fail(err, "usage",
                         "--fallback: a reranker (got %.128s, want an embedding model)", o->model);
    if (m->is_reranker && (o->query || o->document || o->prompt))
        return qemb_fail(err, "usage",
                         "--query, --document, --prompt: not for a reranker (got %.128s)",
                         o->model);
    return 0;
}

static int open_parts(model_worker *m, qemb_err *err) {
    const model_worker_options *o = &m->opt;
    m->replicas = calloc((size_t)o->model.n_devices, sizeof *m->replicas);
    if (!m->replicas) return out_of_memory(err);
    for (int i = 0; i < o->model.n_devices; i++) m->replicas[i] = (replica){.worker = m, .i = i};
    if (try_model_file(&m->file, &o->model, err) || check_kind(m, err) ||
        make_fingerprint(m, err))
        return -1;
    scratch *s = take_scratch(m, err); /* here, so that wrong options are noticed at the start */
    if (!s) return -1;
    m->probed = make_probe(m, s);
    give_scratch(m, s);
    /* The engine would take larger batches where a GPU has the memory. They are a little faster,
     * and requests would wait twice as long for the one that is being computed. */
    int *batch = &m->opt.model.engine.batch_tokens;
    if (!*batch && m->is_reranker && !o->model.ops->plan) *batch = RERANK_BATCH;
    if (!*batch) *batch = qemb_batch_tokens(o->model.ops);
    /* A reranker's turn is long, so that a batch has so many documents of one query when another
     * request's turn comes that the packer keeps the two apart. */
    const int share = m->is_reranker ? *batch / 2 : *batch / 8;
    m->queue = queue_new(o->max_queue_tokens, *batch, share, o->metrics);
    return m->probed && m->queue ? 0 : out_of_memory(err);
}

model_worker *model_worker_open(const model_worker_options *o, qemb_err *err) {
    model_worker *m = calloc(1, sizeof *m);
    if (!m) {
        out_of_memory(err);
        return NULL;
    }
    m->opt = *o;
    m->working = m->loading = o->model.n_devices;
    pthread_mutex_init(&m->lock, NULL);
    pthread_cond_init(&m->loaded, NULL);
    if (!open_parts(m, err)) return m;
    model_worker_free(m);
    return NULL;
}

/* ---- the replicas' threads ------------------------------------------------------------------- */

/* vectors[i] = row i of out (n, dim), or NULL if it is not good or memory runs out, which sets
 * *why. Returns the number of those that are not good. */
static int make_vectors(const model_worker *m, const float *out, vector **vectors, int n,
                        text_failure *why) {
    const int D = model_worker_dim(m);
    int bad = 0;
    *why = TEXT_NOT_FINITE;
    for (int i = 0; i < n; i++) {
        const float *row = out + (size_t)i * (size_t)D;
        const int good = m->is_good(row, D);
        vectors[i] = good ? vector_new(row, D) : NULL;
        bad += !good;
        if (good && !vectors[i]) *why = TEXT_NO_MEMORY;
    }
    return bad;
}

static int count_tokens(text *const *taken, int n) {
    int sum = 0;
    for (int i = 0; i < n; i++) sum += taken[i]->n;
    return sum;
}

/* What Redis gave before it was distrusted may be in the memory cache. */
static void forget_if_distrusted(model_worker *m) {
    if (m->opt.cache && redis_is_distrusted(m->opt.redis)) cache_clear(m->opt.cache);
}

static void remember(model_worker *m, const uint8_t *key, vector *v) {
    if (m->opt.redis && redis_put(m->opt.redis, &m->in_redis, key, v)) forget_if_distrusted(m);
    if (m->opt.cache) cache_put(m->opt.cache, key, v);
}

static double length_of(const float *v, int n) {
    double squares = 0;
    for (int i = 0; i < n; i++) squares += (double)v[i] * (double)v[i];
    return sqrt(squares);
}

/* The largest length that a vector of the model can have, by Cauchy and Schwarz. Behind the last
 * norm a row is x / rms(x) or (x - mean x) / deviation(x), times w, number by number, so its length
 * is at most max|w| sqrt(D); LayerNorm adds a bias. A mean of rows is no longer. A row of the dense
 * layer adds at most its own length times that, and its bias. 1%: sums of at most 2^16 floats are
 * off by less than 2^-8 of their terms. */
static double longest_vector(const qemb_file *f) {
    const qemb_config *c = &f->config;
    const qemb_weights *w = &f->weights;
    const qemb_layer *last = &w->layers[c->n_layers - 1];
    const int is_bert = c->architecture == QEMB_BERT;
    const float *norm = is_bert ? last->mlp_norm : w->final_norm;
    double most = 0, squares = 0;
    for (int i = 0; i < c->hidden; i++) most = fmax(most, fabs((double)norm[i]));
    double row = most * sqrt(c->hidden);
    if (is_bert) row += length_of(last->mlp_norm_bias, c->hidden);
    if (!c->dense_rows) return 1.01 * row;
    for (int r = 0; r < c->dense_rows; r++) {
        const float *dense = w->dense + (size_t)r * (size_t)c->hidden;
        double y = row * length_of(dense, c->hidden) + fabs((double)w->dense_bias[r]);
        if (c->activation == QEMB_TANH) y = fmin(y, 1);
        squares += y * y;
    }
    return 1.01 * sqrt(squares);
}

/* Sets what Redis may have of the model. The file was read just now, so it is in memory.
 *
 * A vector does not depend on its batch, except on a GPU without --deterministic, where cuBLASLt
 * chooses an algorithm by size. Two of them then differ by at most twice the error of the
 * arithmetic: in FP8 a cosine of 0.987 (docs/accuracy.md) is a distance of 0.16; in FP16 one of
 * 0.9999995 is 0.001. No GPU has been measured, so FP16 has ten times that. */
static void describe_to_redis(model_worker *m) {
    const model_options *o = &m->opt.model;
    redis_kind *k = &m->in_redis;
    const double start = seconds_now();
    weights_checksum(k->weights, m->file.file);
    k->dim = model_worker_dim(m);
    k->longest = longest_vector(m->file.file);
    k->is_good = m->is_good;
    if (o->ops->plan && !o->engine.deterministic)
        k->tolerance = o->ops->math == QEMB_MATH_FP8 ? 0.33 : 0.02;
    char hex[2 * WEIGHTS_BYTES + 1];
    *format_hex(hex, k->weights, WEIGHTS_BYTES) = 0;
    log_line("info", "weights", "\"role\":\"%s\",\"checksum\":\"%s\",\"seconds\":%.3f",
             role_name(m->opt.role), hex, seconds_now() - start);
    atomic_store(&m->has_weights, 1);
}

/* Makes room for the largest batch, so that none runs out of memory. Returns -1 if this does. */
static int new_job(const replica *r, job *j) {
    const size_t most = (size_t)qemb_options_of(r->model)->batch_tokens;
    j->batch = qemb_batch_new(r->model);
    j->taken = malloc(most * sizeof(text *));
    j->out = malloc(most * (size_t)model_worker_dim(r->worker) * sizeof *j->out);
    return j->batch && j->taken && j->out ? 0 : -1;
}

static void free_job(job *j) {
    free(j->out);
    free(j->taken);
    qemb_batch_free(j->batch);
}

static int between_steps(void *arg);

static int open_jobs(replica *r, qemb_err *err) {
    const size_t most = (size_t)qemb_options_of(r->model)->batch_tokens;
    const int n = qemb_in_flight(r->model);
    r->jobs = calloc((size_t)n, sizeof *r->jobs);
    r->vectors = malloc(most * sizeof *r->vectors);
    if (!r->jobs || !r->vectors) return out_of_memory(err);
    r->n_jobs = n;
    int bad = qemb_options_of(r->model)->between_steps && new_job(r, &r->between);
    for (int i = 0; i < n && !bad; i++) bad = new_job(r, &r->jobs[i]);
    return bad ? out_of_memory(err) : 0;
}

/* Opens the model, and on a GPU computes a few batches. */
static int load(replica *r, qemb_err *err) {
    const model_worker *m = r->worker;
    const model_options *o = &m->opt.model;
    model_options own = *o;
    own.engine.between_steps = between_steps;
    own.engine.between_arg = r;
    if (replica_try_open(&r->model, m->file.file, &own, r->i, NULL, err) || open_jobs(r, err))
        return -1;
    if (!o->ops->plan) return 0;
    const double start = seconds_now();
    const int batches = replica_warm_up(r->model, m->file.file, o->ops);
    if (!batches) return out_of_memory(err);
    log_line("info", "warmed_up", "\"device\":%d,\"batches\":%d,\"seconds\":%.3f",
             o->devices[r->i], batches, seconds_now() - start);
    return 0;
}

/* Loads r and waits for the other replicas. Returns -1 if one could not be loaded. */
static int load_all(replica *r) {
    model_worker *m = r->worker;
    qemb_err err;
    const int bad = load(r, &err);
    if (!bad && m->opt.redis && !r->i) describe_to_redis(m);
    pthread_mutex_lock(&m->lock);
    if (bad && !m->failure.code) m->failure = err;
    const int last = !--m->loading && !m->failure.code;
    if (last)
        log_line("info", "loaded",
                 "\"role\":\"%s\",\"devices\":%d,\"table\":\"%s\",\"fingerprint\":\"%s\"",
                 role_name(m->opt.role), m->opt.model.n_devices, m->opt.model.ops->name,
                 m->fingerprint_hex);
    pthread_cond_broadcast(&m->loaded);
    while (m->loading && !m->failure.code) pthread_cond_wait(&m->loaded, &m->lock);
    const int failed = m->failure.code != NULL;
    pthread_mutex_unlock(&m->lock);
    return failed ? -1 : 0;
}

static void unload(replica *r) {
    for (int i = 0; i < r->n_jobs; i++) free_job(&r->jobs[i]);
    free_job(&r->between);
    free(r->jobs);
    free(r->vectors);
}

static void give_back(replica *r) {
    for (; r->n_submitted; r->n_submitted--, r->first = (r->first + 1) % r->n_jobs)
        queue_give_back(r->worker->queue, r->jobs[r->first].taken, r->jobs[r->first].n);
}

/* Gives the texts back to the replicas on other devices. If there is none, the worker is dead:
 * waiting requests get 503, not 422, since their texts are not the cause. */
static void device_failed(replica *r, const char *why) {
    model_worker *m = r->worker;
    char quoted[6 * 256 + 3];
    const size_t n = strlen(why);
    const int left = atomic_fetch_sub(&m->working, 1) - 1;
    *format_json_string(quoted, why, n < 256 ? n : 256) = 0;
    log_line("error", "device_failed", "\"device\":%d,\"working\":%d,\"message\":%s",
             m->opt.model.devices[r->i], left, quoted);
    metrics_add(m->opt.metrics, COUNT_FAILED_DEVICES, 1);
    if (!left) {
        atomic_store(&m->state, WORKER_DEAD);
        queue_stop(m->queue);
    }
    give_back(r);
}

/* Ends all requests: what the file holds now is no model. */
static void file_changed(model_worker *m, const char *why) {
    char quoted[6 * sizeof(qemb_err) + 3];
    if (atomic_exchange(&m->changed, 1)) return;
    *format_json_string(quoted, why, strlen(why)) = 0;
    log_line("error", "model_changed", "\"role\":\"%s\",\"message\":%s", role_name(m->opt.role),
             quoted);
    metrics_add(m->opt.metrics, COUNT_MODEL_CHANGES, 1);
    queue_stop(m->queue);
}

static void count_batch(replica *r, const job *j, const qemb_health *now) {
    metrics *m = r->worker->opt.metrics;
    const int beside = r->worker->opt.role == ROLE_RERANKER;
    const int tokens = count_tokens(j->taken, j->n);
    const double end = seconds_now();
    metrics_add(m, COUNT_CLAMPED, now->clamped - r->before.clamped);
    metrics_add(m, COUNT_RECOMPUTED, now->recomputed - r->before.recomputed);
    r->before = *now;
    /* A batch that was submitted behind another one began when that one ended. */
    metrics_observe(m, beside ? HISTOGRAM_RERANKER_BATCH_SECONDS : HISTOGRAM_BATCH_SECONDS,
                    end - (j->start > r->end ? j->start : r->end));
    r->end = end;
    metrics_observe(m, beside ? HISTOGRAM_RERANKER_BATCH_TEXTS : HISTOGRAM_BATCH_TEXTS, j->n);
    metrics_observe(m, beside ? HISTOGRAM_RERANKER_BATCH_TOKENS : HISTOGRAM_BATCH_TOKENS, tokens);
    metrics_add(m, COUNT_COMPUTED_TEXTS, (uint64_t)j->n);
    metrics_add(m, COUNT_COMPUTED_TOKENS, (uint64_t)tokens);
}

/* Gives the vectors of j to the requests. now: the health after it. */
static void finish(replica *r, job *j, const qemb_health *now) {
    model_worker *m = r->worker;
    count_batch(r, j, now);
    text_failure why;
    const int bad = make_vectors(m, j->out, r->vectors, j->n, &why);
    metrics_add(m->opt.metrics, COUNT_NON_FINITE, (uint64_t)bad);
    /* Before queue_finish, so that a text is always in flight or cached. */
    for (int i = 0; i < j->n; i++)
        if (r->vectors[i]) remember(m, j->taken[i]->key, r->vectors[i]);
    const int state = bad ? WORKER_FAILING : WORKER_READY;
    if (atomic_exchange(&m->state, state) != state)
        log_line(bad ? "error" : "info", bad ? "failing" : "ready",
                 "\"role\":\"%s\",\"texts\":%d,\"non_finite\":%d", role_name(m->opt.role), j->n,
                 bad);
    queue_finish(m->queue, j->taken, r->vectors, j->n, why);
    for (int i = 0; i < j->n; i++) vector_drop(r->vectors[i]);
    qemb_batch_clear(j->batch);
}

/* Between two steps of a long text: gives it up if no request waits for it any more, or computes a
 * batch of waiting texts. Then the long text has as much time as the batch took, so that it takes
 * at most about twice as long as alone. */
static int between_steps(void *arg) {
    replica *r = arg;
    job *outer = &r->jobs[r->first], *j = &r->between;
    if (!queue_is_wanted(r->worker->queue, outer->taken, outer->n)) return outer->given_up = 1;
    if (seconds_now() < r->its_turn) return 0;
    j->n = queue_take_between(r->worker->queue, j->batch, j->taken);
    if (!j->n) return 0;
    const double end = r->end, start = j->start = seconds_now();
    qemb_embed_between(r->model, j->batch, j->out);
    const qemb_health now = qemb_health_of(r->model);
    if (now.failure) { /* collect says why */
        queue_give_back(r->worker->queue, j->taken, j->n);
        return outer->given_up = 1;
    }
    finish(r, j, &now);
    const double took = seconds_now() - start;
    r->its_turn = start + 2 * took;
    r->end = end; /* as if the batch had not been: the long text's time is its own */
    outer->start += took;
    return 0;
}

static void submit(replica *r, job *j) {
    j->start = seconds_now();
    r->n_submitted++;
    qemb_submit(r->model, j->batch, j->out);
}

/* Finishes the oldest batch. Returns -1 if the device has failed or the file was written to. */
static int collect(replica *r) {
    job *j = &r->jobs[r->first];
    qemb_collect(r->model);
    const qemb_health now = qemb_health_of(r->model);
    if (now.failure) {
        qemb_err err;
        if (qemb_file_check(r->worker->file.file, &err)) {
            file_changed(r->worker, err.msg);
            give_back(r);
        } else {
            device_failed(r, now.failure);
        }
        return -1;
    }
    if (j->given_up) {
        j->given_up = 0;
        metrics_add(r->worker->opt.metrics, COUNT_GIVEN_UP, (uint64_t)j->n);
        queue_give_back(r->worker->queue, j->taken, j->n); /* somebody may want it after all */
        qemb_batch_clear(j->batch);
    } else {
        finish(r, j, &now);
    }
    r->n_submitted--;
    r->first = (r->first + 1) % r->n_jobs;
    return 0;
}

/* A second batch is submitted behind the first one only if it is full: otherwise texts that arrive
 * meanwhile would be computed in small batches. */
static void *compute_main(void *arg) {
    replica *r = arg;
    queue *q = r->worker->queue;
    int failed = load_all(r);
    const int full = failed ? 0 : qemb_options_of(r->model)->batch_tokens;
    while (!failed) {
        job *j = &r->jobs[(r->first + r->n_submitted) % r->n_jobs];
        j->n = r->n_submitted ? queue_try_take(q, full, j->batch, j->taken)
                              : queue_take(q, j->batch, j->taken);
        const int got = j->n;
        if (got)
            submit(r, j);
        else if (!r->n_submitted)
            break; /* the queue is stopped */
        if (!got || r->n_submitted == r->n_jobs) failed = collect(r);
    }
    unload(r);
    return NULL;
}

int model_worker_start(model_worker *m, qemb_err *err) {
    for (int i = 0; i < m->opt.model.n_devices; i++) {
        replica *r = &m->replicas[i];
        const int error = pthread_create(&r->thread, NULL, compute_main, r);
        if (error) {
            qemb_fail(err, "device", "thread: cannot start it (%s)", strerror(error));
            pthread_mutex_lock(&m->lock); /* the others do not wait for it */
            m->failure = *err;
            pthread_cond_broadcast(&m->loaded);
            pthread_mutex_unlock(&m->lock);
            return -1;
        }
        m->started++;
    }
    return 0;
}

int model_worker_failed(model_worker *m, qemb_err *err) {
    pthread_mutex_lock(&m->lock);
    const int failed = m->failure.code != NULL;
    if (failed) *err = m->failure;
    pthread_mutex_unlock(&m->lock);
    return failed ? -1 : 0;
}

void model_worker_stop(model_worker *m) { queue_stop(m->queue); }

int model_worker_join(model_worker *m, double seconds) {
    const double end = seconds_now() + seconds;
    for (int i = 0; i < m->started; i++) {
        replica *r = &m->replicas[i];
        if (!r->joined && !join_within(r->thread, end - seconds_now())) return 0;
        r->joined = 1;
    }
    return 1;
}

void model_worker_free(model_worker *m) {
    for (scratch *s = m->unused, *next; s; s = next) {
        next = s->next;
        record_tokenizer_close(&s->record_tokenizer);
        EVP_MD_CTX_free(s->digest);
        free(s);
    }
    queue_free(m->queue);
    free(m->probed);
    for (int i = 0; i < m->started; i++) qemb_close(m->replicas[i].model);
    free(m->replicas);
    EVP_MD_free(m->sha256);
    close_model_file(&m->file);
    pthread_cond_destroy(&m->loaded);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

/* ---- health ---------------------------------------------------------------------------------- */

model_worker_state model_worker_state_of(model_worker *m) {
    return atomic_load(&m->changed) ? WORKER_CHANGED : (model_worker_state)atomic_load(&m->state);
}

static void probe_done(pending_request *t) {
    model_worker *m = (model_worker *)((char *)t - offsetof(model_worker, probe));
    vector_drop(m->probe_text.vector);
    free(m->probe_text.text);
    m->probe_text = (pending_text){0};
    atomic_store(&m->probing, 0);
}

/* Until a batch has succeeded, at the start or after a failed one, the worker computes the empty
 * text. Load balancers send nothing while /health is 503, so no client could show that it
 * works. */
static void probe(model_worker *m, double now) {
    int shared;
    queue_refusal no;
    if (atomic_exchange(&m->probing, 1)) return;
    const size_t bytes = (size_t)m->probed->n * sizeof *m->probed->ids;
    text *t = text_new(m->probed->key, m->probed->n);
    m->probe_text = (pending_text){.text = t};
    m->probe = (pending_request){
        .texts = &m->probe_text, .n = 1, .deadline = now + 1e6, .done = probe_done};
    if (t) memcpy(t->ids, m->probed->ids, bytes);
    if (!t || queue_submit(m->queue, &m->probe, &shared, &no)) probe_done(&m->probe);
}

void model_worker_tick(model_worker *m, double now) {
    qemb_err err;
    queue_tick(m->queue, now);
    if (qemb_file_check(m->file.file, &err)) file_changed(m, err.msg);
    const model_worker_state s = model_worker_state_of(m);
    if (m->started && (s == WORKER_LOADING || s == WORKER_FAILING)) probe(m, now);
}

int model_worker_submit(model_worker *m, pending_request *t, int *shared, queue_refusal *no) {
    return queue_submit(m->queue, t, shared, no);
}

int model_worker_retry_after(model_worker *m) { return queue_retry_after(m->queue); }
int model_worker_devices(model_worker *m) { return atomic_load(&m->working); }
queue_depth model_worker_depth(model_worker *m) { return queue_depth_of(m->queue); }
int model_worker_dim(const model_worker *m) { return qemb_dim(&m->file.file->config); }
int model_worker_is_reranker(const model_worker *m) { return m->is_reranker; }
role model_worker_role(const model_worker *m) { return m->opt.role; }
const char *model_worker_table(const model_worker *m) { return m->opt.model.ops->name; }
const qemb_file *model_worker_file(const model_worker *m) { return m->file.file; }
const model_options *model_worker_model_options(const model_worker *m) { return &m->opt.model; }
const char *model_worker_fingerprint(const model_worker *m) { return m->fingerprint_hex; }

size_t model_worker_cache_bytes(const model_worker *m) {
    return m->opt.cache ? cache_bytes(m->opt.cache) : 0;
}

int model_worker_max_tokens(const model_worker *m) {
    const int n = m->opt.model.engine.max_tokens;
    return n ? n : qemb_window(&m->file.file->config);
}

/* ---- tokenizing ------------------------------------------------------------------------------ */

static int check_ids(const model_worker *m, const char *key, const int32_t *ids, size_t n, int i,
                     api_error *e) {
    for (size_t k = 0; k < n; k++)
        if (ids[k] >= m->file.file->config.vocab)
            return api_fail(e, 400, "invalid_token", key,
                            "%s[%d]: no such token (got %d, want 0..%d)", key, i, ids[k],
                            m->file.file->config.vocab - 1);
    return 0;
}

static int tokenize_failed(const qemb_err *err, const char *key, int i, api_error *e) {
    if (!strcmp(err->code, "query_too_long"))
        return api_fail(e, 400, "context_length_exceeded", "query", "%s", err->msg);
    if (!strcmp(err->code, "too_long"))
        return api_fail(e, 400, "context_length_exceeded", key, "%s[%d]: %s", key, i, err->msg);
    if (!strcmp(err->code, "out_of_memory"))
        return api_fail(e, 503, err->code, NULL, "%s[%d]: %s", key, i, err->msg);
    return api_fail(e, 400, err->code, key, "%s[%d]: %s", key, i, err->msg);
}

/* Ids of another tokenizer give vectors of nothing, so a list has to begin and end as this model's
 * do. */
static int check_origin(const model_worker *m, const api_request *r, int i, api_error *e) {
    const int bos = m->file.file->config.bos_id, eos = m->file.file->config.eos_id;
    const api_input *in = &r->inputs[i];
    const int32_t *ids = r->ids + in->first_id;
    const int first = ids[0], last = ids[in->len - 1];
    const int begins = bos == QEMB_NO_TOKEN || first == bos;
    if (r->any_ids || m->opt.allow_token_ids) return 0;
    if (begins && eos != QEMB_NO_TOKEN && last == eos) return 0;
    char why[64] = "a model without one";
    if (!begins)
        snprintf(why, sizeof why, "got %d, want %d", first, bos);
    else if (eos != QEMB_NO_TOKEN)
        snprintf(why, sizeof why, "got %d, want %d", last, eos);
    return api_fail(e, 400, "foreign_token_ids", r->key,
                    "%s[%d]: token ids that do not %s (%s), as those of /tokenize do. Send text: "
                    "LangChain's OpenAIEmbeddings needs check_embedding_ctx_length=False. Or start "
                    "the server with --allow-token-ids",
                    r->key, i,
                    begins ? "end in the model's end-of-text"
                           : "begin with the model's start-of-text",
                    why);
}

/* What stands before the texts of a request; of a reranker, the task. */
typedef struct {
    const char *text; /* (len) */
    size_t len;
    char *own; /* owns text, or NULL */
} request_prompt;

static int set_prompt(const model_worker *m, const record_tokenizer *t, const api_request *r,
                      request_prompt *p, api_error *e) {
    qemb_err err;
    *p = (request_prompt){.text = t->prompt, .len = t->prompt_len};
    if (!m->is_reranker && !r->inputs->text) {
        *p = (request_prompt){.text = ""}; /* ids are complete */
    } else if (r->prompt_name) {
        const qemb_file *f = m->file.file;
        const int exact = !strcmp(r->prompt_key, "prompt_name");
        p->text =
            exact ? prompt_named(f, r->prompt_name, &err) : prompt_for(f, r->prompt_name, &err);
        if (!p->text)
            return api_fail(e, 400, err.code, r->prompt_key, "%s: %s", r->prompt_key, err.msg);
        p->len = strlen(p->text);
    } else if (r->instruct && (m->is_reranker || !r->instruct_len)) {
        *p = (request_prompt){.text = r->instruct, .len = r->instruct_len};
    } else if (r->instruct && !t->task_end) {
        return api_fail(e, 400, "no_task", "instruct",
                        "instruct: this model's prompts have no task (want prompt_name)");
    } else if (r->instruct) {
        p->text = p->own = text_ids_task_prompt(r->instruct, r->instruct_len, t->task_end, &p->len);
        if (!p->own) return api_fail(e, 503, "out_of_memory", NULL, "request: out of memory");
    }
    return 0;
}

static int tokenize_input(model_worker *m, scratch *s, const api_request *r,
                          const request_prompt *prompt, int i, pending_text *p, api_error *e) {
    const api_input *in = &r->inputs[i];
    record_tokenizer *t = &s->record_tokenizer;
    record_ids ids = {0};
    qemb_err err;
    int bad;
    if (m->is_reranker) {
        const text_pair pair = {.task = prompt->text,
                                .task_len = prompt->len,
                                .query = r->query,
                                .query_len = r->query_len,
                                .document = in->text,
                                .document_len = in->len};
        bad = tokenize_pair(t, &pair, r->max_document, &ids, &err);
    } else if (in->text) {
        bad = tokenize_behind(t, prompt->text, prompt->len, in->text, in->len, &ids, &err);
    } else {
        const int32_t *given = r->ids + in->first_id;
        if (check_origin(m, r, i, e) || check_ids(m, r->key, given, in->len, i, e)) return -1;
        bad = tokenize_ids(t, given, in->len, &ids, &err);
    }
    if (bad) return tokenize_failed(&err, r->key, i, e);
    p->cut_bytes = ids.cut_bytes;
    p->cut_tokens = ids.cut_tokens;
    p->text = make_text(m, s, &ids);
    return p->text ? 0 : api_fail(e, 503, "out_of_memory", NULL, "request: out of memory");
}

/* A request may have a shorter limit than the worker, but room for the tokens of every text. */
static int set_limits(const model_worker *m, record_tokenizer *t, const api_request *r,
                      api_error *e) {
    const int most = model_worker_max_tokens(m), added = t->text.n_head + t->text.n_tail;
    t->truncate = r->truncate >= 0 ? r->truncate : m->opt.model.truncate;
    t->text.max_tokens = r->max_tokens && r->max_tokens < most ? r->max_tokens : most;
    if (t->text.max_tokens >= added) return 0;
    /* text_ids_open refuses a model without room, also in a reload: the limit is the request's. */
    return api_fail(e, 400, "invalid_number", r->max_tokens_key,
                    "%s: no room beside the %d tokens of every text (got %d, want %d or more)",
                    r->max_tokens_key, added, r->max_tokens, added);
}

int model_worker_tokenize(model_worker *m, const api_request *r, pending_request *t,
                          uint64_t *tokens, char recipe[RECIPE_ROOM], api_error *e) {
    request_prompt prompt = {0};
    qemb_err err;
    t->texts = calloc((size_t)r->n, sizeof *t->texts);
    if (!t->texts) return api_fail(e, 503, "out_of_memory", NULL, "request: out of memory");
    t->n = r->n;
    *tokens = 0;
    scratch *s = take_scratch(m, &err);
    if (!s) {
        pending_request_clear(t);
        return api_fail(e, 503, "out_of_memory", NULL, "request: out of memory");
    }
    int bad = set_limits(m, &s->record_tokenizer, r, e) ||
              set_prompt(m, &s->record_tokenizer, r, &prompt, e);
    if (!bad && recipe_fingerprint(recipe, m->fingerprint, prompt.text, prompt.len))
        bad = api_fail(e, 503, "out_of_memory", NULL, "request: out of memory");
    for (int i = 0; i < r->n && !bad; i++) {
        bad = tokenize_input(m, s, r, &prompt, i, &t->texts[i], e);
        if (!bad) *tokens += (uint64_t)t->texts[i].text->n;
        /* Bounds the memory of one request's ids. */
        if (!bad && *tokens > (uint64_t)m->opt.max_queue_tokens)
            bad = api_fail(e, 413, "too_many_tokens", r->key,
                           "%s: too many tokens in one request%s (got %" PRIu64 " or more, want "
                           "at most %d, the server's --max-queue)",
                           r->key,
                           m->is_reranker ? ", with prompt and query once for each document" : "",
                           *tokens, m->opt.max_queue_tokens);
    }
    free(prompt.own);
    give_scratch(m, s);
    if (bad) pending_request_clear(t);
    return bad ? -1 : 0;
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
    if (m->opt.redis && atomic_load(&m->has_weights))
        redis_hits = redis_get(m->opt.redis, &m->in_redis, t);
    for (int i = 0; redis_hits && i < t->n; i++) {
        pending_text *s = &t->texts[i];
        if (!s->text || !s->vector) continue;
        if (m->opt.cache) cache_put(m->opt.cache, s->text->key, s->vector);
        free(s->text);
        s->text = NULL;
    }
    if (redis_hits) forget_if_distrusted(m); /* while this request put them into the cache */
    metrics_add(m->opt.metrics, COUNT_CACHE_HITS, (uint64_t)hits);
    metrics_add(m->opt.metrics, COUNT_REDIS_HITS, (uint64_t)redis_hits);
    metrics_add(m->opt.metrics, COUNT_CACHE_MISSES, (uint64_t)(t->n - hits - redis_hits));
    return hits + redis_hits;
}
