/* pipeline.c - a run over many texts: threads read, compute and write at the same time.
 *
 *   a stream's next ──> reader thread: record_tokenizer.c, qemb_pack_add ──> a batch
 *                   ──> a compute thread a device: qemb_submit, qemb_collect
 *                   ──> writer thread: qemb_l2_normalize ──> the stream's record and batch_end
 *
 * embed.c, rerank.c and grep.c have the streams: where records come from and what becomes of their
 * vectors.
 *
 * A fixed number of batches circulates between the threads. Reading stops while all are in use. The
 * reader hands a batch to the compute threads when the next text does not fit, when the input has
 * no bytes ready and a compute thread is idle, or at the end of input. So a file is computed in
 * full batches; a program that writes one line and waits gets its answer at once; and texts that
 * arrive during a computation are computed together afterwards.
 *
 * Compute threads take batches from one list. A batch has a turn, its place in the input; the
 * writer writes them by turn. If a device fails, the batches that it has not finished go back into
 * the list.
 */
#include "cli.h"

#include "frontends/console.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- the window: batches on their way -------------------------------------------------------- */

/* A batch has at most this many records (or its token budget, if that is less), ... */
#define JOB_RECORDS 16384
/* ... this many ids, since repeated texts and a shared prompt are free in the budget, ... */
#define JOB_IDS ((size_t)4 << 20)
/* ... and this many bytes of record ids, messages and texts that are kept. */
#define JOB_NOTES ((size_t)4 << 20)
#define BLOCK_IDS ((size_t)64 << 10)

typedef struct {
    uint64_t line;
    origin from;
    const char *code;  /* NULL: it has a vector; else the error code */
    size_t id, id_len; /* offset in notes; id_len 0: none */
    size_t kept, kept_len;
    size_t note, note_len; /* the message of an error; of a vector the text, kept or not */
    size_t cut_bytes, cut_tokens;
    int row, dim, tokens;
} record;

typedef struct block {
    struct block *next;
    size_t used, cap;
    int32_t ids[]; /* (cap) */
} block;

typedef struct job {
    struct job *next; /* in the list that has it */
    uint64_t turn;    /* its place in the input */
    qemb_batch *batch;
    record *records; /* (max_records), n in use */
    int n, max_records;
    block *ids; /* newest first: pointers into it stay valid while it grows */
    size_t n_ids;
    char *notes; /* (notes_cap), notes_len in use */
    size_t notes_len, notes_cap;
    float *out; /* (rows, dim of the model), out_cap floats */
    size_t out_cap;
    uint64_t bytes; /* of input, when the batch was closed */
} job;

static void job_open(job *j, const qemb_model *m) {
    const int batch_tokens = qemb_options_of(m)->batch_tokens;
    *j = (job){.batch = need(qemb_batch_new(m))};
    j->max_records = batch_tokens > JOB_RECORDS ? batch_tokens : JOB_RECORDS;
    j->records = need(malloc((size_t)j->max_records * sizeof *j->records));
}

static void job_clear(job *j) {
    qemb_batch_clear(j->batch);
    for (block *b = j->ids; b;) {
        block *next = b->next;
        if (next || b->cap > BLOCK_IDS) {
            free(b);
            b = next;
        } else {
            b->used = 0; /* keep one block of the usual size */
            break;
        }
        j->ids = b;
    }
    if (j->notes_cap > 2 * JOB_NOTES) {
        free(j->notes);
        j->notes = NULL, j->notes_cap = 0;
    }
    j->n = 0;
    j->n_ids = j->notes_len = 0;
}

static void job_free(job *j) {
    job_clear(j);
    free(j->ids);
    free(j->notes);
    free(j->records);
    free(j->out);
    qemb_batch_free(j->batch);
}

static int32_t *job_ids(job *j, size_t n) {
    if (!j->ids || j->ids->cap - j->ids->used < n) {
        const size_t cap = n > BLOCK_IDS ? n : BLOCK_IDS;
        block *b = need(malloc(sizeof *b + cap * sizeof *b->ids));
        *b = (block){.next = j->ids, .cap = cap};
        j->ids = b;
    }
    return j->ids->ids + j->ids->used;
}

static size_t job_note(job *j, const char *s, size_t len) {
    if (j->notes_len + len > j->notes_cap) {
        j->notes_cap =
            j->notes_len + len > 2 * j->notes_cap ? j->notes_len + len : 2 * j->notes_cap;
        j->notes = need(realloc(j->notes, j->notes_cap));
    }
    if (len) memcpy(j->notes + j->notes_len, s, len);
    j->notes_len += len;
    return j->notes_len - len;
}

static int job_full(const job *j) {
    return j->n == j->max_records || j->n_ids >= JOB_IDS || j->notes_len >= JOB_NOTES;
}

/* Returns the row of the text's vector, or -1 if the batch has no room. */
static int job_add_text(job *j, const record_ids *t) {
    const size_t n = (size_t)t->n;
    int32_t *ids = job_ids(j, n);
    memcpy(ids, t->ids, n * sizeof *ids);
    const int row = qemb_pack_add(j->batch, ids, t->n);
    if (row < 0) return -1;
    j->ids->used += n;
    j->n_ids += n;
    return row;
}

/* Lists keep their jobs in the order of their turns, except those of append. */
static void insert(job **list, job *j) {
    while (*list && (*list)->turn < j->turn) list = &(*list)->next;
    j->next = *list;
    *list = j;
}

static void append(job **list, job *j) {
    while (*list) list = &(*list)->next;
    j->next = NULL;
    *list = j;
}

/* Takes the first job, or returns NULL. */
static job *pop(job **list) {
    job *j = *list;
    if (j) *list = j->next;
    return j;
}

static int length(const job *list) {
    int n = 0;
    for (; list; list = list->next) n++;
    return n;
}

/* A model on one device, and the thread that computes with it. */
typedef struct {
    pipeline *p;
    qemb_model *model;
    int device;
    int running; /* thread is started in this run */
    pthread_t thread;
    job *submitted; /* and not collected, oldest first */
    int n_submitted;
    /* under the pipeline's lock */
    qemb_health health; /* after its last batch; failure: its thread has ended */
    uint64_t batches, texts;
} replica;

struct pipeline {
    pthread_mutex_t lock; /* guards the members up to the empty line */
    pthread_cond_t changed;
    job *free, *ready, *done;
    job *offered; /* the batch being filled, while the reader waits for input */
    int reader_ended;
    int computing;           /* batches that compute threads have */
    int idle, ended, failed; /* compute threads: without a batch, ended, ended by their device */
    uint64_t filled;         /* batches that were given a turn */

    const options *opt;
    const stream *stream;
    replica *replicas;
    int n_replicas;
    size_t dim; /* of the model's vectors */
    record_tokenizer *record_tokenizer;
    job *jobs;
    int n_jobs;
    float *unit; /* (dim), of the writer */
};

static void pass(pipeline *p, job **list, job *j) {
    pthread_mutex_lock(&p->lock);
    insert(list, j);
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
}

/* ---- the reader ------------------------------------------------------------------------------ */

static atomic_int stop_signal;
static int wake_pipe[2];

/* The first SIGINT, SIGTERM, SIGHUP or SIGQUIT ends the input. The second one ends the process. */
static void on_signal(int sig) {
    const int saved = errno;
    if (atomic_exchange(&stop_signal, sig)) {
        signal(sig, SIG_DFL);
        raise(sig);
    }
    const ssize_t n = write(wake_pipe[1], "", 1);
    (void)n; /* if the pipe is full, a wake is already pending */
    errno = saved;
}

int catch_signals(void) {
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
    if (pipe2(wake_pipe, O_CLOEXEC | O_NONBLOCK))
        DIE(STATUS_MODEL, "pipe: cannot create it (%s)", strerror(errno));
    for (int i = 0; i < LENGTH(signals); i++) {
        struct sigaction act = {.sa_handler = on_signal}, old;
        sigaction(signals[i], NULL, &old);
        if (old.sa_handler != SIG_IGN) sigaction(signals[i], &act, NULL);
    }
    return wake_pipe[0];
}

int signal_caught(void) { return atomic_load(&stop_signal); }

void end_by_signal(void) {
    const int sig = atomic_load(&stop_signal);
    if (!sig) return;
    signal(sig, SIG_DFL);
    raise(sig);
}

static job *next_free(pipeline *p) {
    pthread_mutex_lock(&p->lock);
    while (!p->free) pthread_cond_wait(&p->changed, &p->lock);
    job *j = pop(&p->free);
    j->turn = p->filled++;
    pthread_mutex_unlock(&p->lock);
    return j;
}

static void offer(pipeline *p, job *j) {
    j->bytes = p->stream->bytes(p->stream->self);
    pthread_mutex_lock(&p->lock);
    p->offered = j;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
}

/* Returns the batch to fill: the one offered, or another if a compute thread took it. */
static job *after_offer(pipeline *p) {
    pthread_mutex_lock(&p->lock);
    job *j = p->offered;
    p->offered = NULL;
    pthread_mutex_unlock(&p->lock);
    return j ? j : next_free(p);
}

static job *close_batch(pipeline *p, job *j) {
    j->bytes = p->stream->bytes(p->stream->self);
    pass(p, &p->ready, j);
    return next_free(p);
}

/* Adds a record to batch j, or to the next one. Returns the batch that it went to. */
static job *add_record(pipeline *p, job *j, const input_record *in, origin from) {
    record_ids t;
    qemb_err err;
    const int bad = p->stream->tokenize
                        ? p->stream->tokenize(p->stream->self, p->record_tokenizer, in, &t, &err)
                        : tokenize_record(p->record_tokenizer, in, &t, &err);
    record r = {.line = in->line, .from = from, .dim = t.dim};
    if (job_full(j)) j = close_batch(p, j);
    if (bad) {
        r.code = err.code;
        r.note_len = strlen(err.msg);
        r.note = job_note(j, err.msg, r.note_len);
        r.dim = p->record_tokenizer->dim;
    } else {
        r.tokens = t.n;
        r.cut_bytes = t.cut_bytes, r.cut_tokens = t.cut_tokens;
        r.row = job_add_text(j, &t);
        if (r.row < 0) {
            j = close_batch(p, j);
            r.row = job_add_text(j, &t);
            assert(r.row == 0);
        }
        r.note_len = in->len;
        if (p->stream->keep_texts) r.note = job_note(j, in->text, in->len);
    }
    r.id_len = t.id_len;
    r.id = job_note(j, t.id, t.id_len);
    r.kept_len = t.kept_len;
    r.kept = job_note(j, t.kept, t.kept_len);
    j->records[j->n++] = r;
    return j;
}

static void *reader_main(void *arg) {
    pipeline *p = arg;
    const stream *s = p->stream;
    job *j = next_free(p);
    while (!atomic_load(&stop_signal)) {
        input_record r;
        origin from = {0};
        input_status status = s->next(s->self, 0, &r, &from);
        if (status == INPUT_WAIT) {
            const int offered = j->n > 0; /* from here on a compute thread may own j */
            if (offered) offer(p, j);
            status = s->next(s->self, 1, &r, &from);
            if (offered) j = after_offer(p);
        }
        if (status != INPUT_RECORD) break;
        j = add_record(p, j, &r, from);
    }
    j->bytes = p->stream->bytes(p->stream->self);
    pthread_mutex_lock(&p->lock);
    insert(j->n ? &p->ready : &p->free, j);
    p->reader_ended = 1;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

/* ---- the computation ------------------------------------------------------------------------- */

/* Returns the next batch for r. Without one, waits if r has none submitted; otherwise returns NULL.
 * Returns NULL at the end too: then no batch can come back from another device.
 *
 * A thread that has a batch takes a second one only from the ready ones, and only if the idle
 * threads have one each. */
static job *take(replica *r) {
    pipeline *p = r->p;
    job *j = NULL;
    pthread_mutex_lock(&p->lock);
    if (r->n_submitted) {
        if (length(p->ready) > p->idle) j = pop(&p->ready);
    } else {
        p->idle++;
        while (!p->ready && !p->offered && (!p->reader_ended || p->computing))
            pthread_cond_wait(&p->changed, &p->lock);
        p->idle--;
        j = pop(&p->ready);
        if (!j) {
            j = p->offered;
            p->offered = NULL;
        }
    }
    p->computing += j != NULL;
    pthread_mutex_unlock(&p->lock);
    return j;
}

static void submit(replica *r, job *j) {
    const size_t floats = (size_t)qemb_batch_rows(j->batch) * r->p->dim;
    if (floats > j->out_cap) {
        free(j->out);
        j->out = need(malloc(floats * sizeof *j->out));
        j->out_cap = floats;
    }
    append(&r->submitted, j);
    r->n_submitted++;
    qemb_submit(r->model, j->batch, j->out);
}

/* Passes the oldest batch on to the writer. If the device has failed, gives all of r's batches back
 * instead and returns -1. */
static int collect(replica *r) {
    pipeline *p = r->p;
    qemb_collect(r->model);
    const qemb_health h = qemb_health_of(r->model);
    pthread_mutex_lock(&p->lock);
    r->health = h;
    if (h.failure) {
        p->computing -= r->n_submitted;
        for (job *j; (j = pop(&r->submitted));) insert(&p->ready, j);
        p->failed++;
    } else {
        job *j = pop(&r->submitted);
        r->n_submitted--;
        p->computing--;
        r->batches += qemb_batch_rows(j->batch) > 0;
        r->texts += (uint64_t)qemb_batch_rows(j->batch);
        insert(&p->done, j);
    }
    const int others = p->n_replicas - p->failed;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
    if (!h.failure) return 0;
    if (p->n_replicas > 1)
        say("device %d: %s; %s", r->device, h.failure,
            others ? "the other devices take its batches" : "no device is left");
    return -1;
}

/* Computes until the last batch, or until the device fails. */
static void *compute_main(void *arg) {
    replica *r = arg;
    pipeline *p = r->p;
    for (int failed = 0; !failed;) {
        job *j = take(r);
        if (j)
            submit(r, j);
        else if (!r->n_submitted)
            break;
        if (!j || r->n_submitted == qemb_in_flight(r->model)) failed = collect(r);
    }
    pthread_mutex_lock(&p->lock);
    p->ended++;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

/* ---- the writer ------------------------------------------------------------------------------ */

/* Returns the batch of this turn, or NULL if it does not come any more. */
static job *next_done(pipeline *p, uint64_t turn) {
    pthread_mutex_lock(&p->lock);
    while (!(p->done && p->done->turn == turn) && p->ended < p->n_replicas)
        pthread_cond_wait(&p->changed, &p->lock);
    job *j = p->done && p->done->turn == turn ? pop(&p->done) : NULL;
    pthread_mutex_unlock(&p->lock);
    return j;
}

/* Sets the numbers of x: out, if they are logits, else p->unit. -1: they are not finite. */
static int give_numbers(const pipeline *p, const float *out, result *x) {
    const int logits = p->stream->logits;
    if (logits ? !isfinite(*out) : qemb_l2_normalize(p->unit, out, x->dim)) {
        x->code = "non_finite", x->tokens = 0;
        x->message =
            logits ? "score: not a finite number" : "vector: no finite length other than zero";
        x->message_len = strlen(x->message);
        return -1;
    }
    x->unit = logits ? out : p->unit;
    return 0;
}

static void give_record(pipeline *p, const job *j, const record *r) {
    const char *note = j->notes + r->note;
    result x = {.head = {.id = j->notes + r->id,
                         .id_len = r->id_len,
                         .kept = j->notes + r->kept,
                         .kept_len = r->kept_len,
                         .line = r->line},
                .from = r->from,
                .cut_bytes = r->cut_bytes,
                .cut_tokens = r->cut_tokens,
                .dim = r->dim,
                .tokens = r->tokens};
    if (r->code)
        x.code = r->code, x.message = note, x.message_len = r->note_len;
    else if (!give_numbers(p, j->out + (size_t)r->row * p->dim, &x))
        x.text = p->stream->keep_texts ? note : NULL, x.text_len = r->note_len;
    p->stream->record(p->stream->self, &x);
}

static void *writer_main(void *arg) {
    pipeline *p = arg;
    uint64_t turn = 0;
    for (job *j; (j = next_done(p, turn)); turn++) {
        const batch_totals b = {qemb_batch_rows(j->batch), qemb_batch_tokens_saved(j->batch),
                                qemb_batch_tokens_computed(j->batch), j->bytes};
        if (p->stream->batch_begin) p->stream->batch_begin(p->stream->self, &b);
        for (int i = 0; i < j->n; i++) give_record(p, j, &j->records[i]);
        p->stream->batch_end(p->stream->self, &b);
        job_clear(j);
        pass(p, &p->free, j);
    }
    return NULL;
}

/* ---- all of it ------------------------------------------------------------------------------- */

static void start_thread(pthread_t *t, void *(*main)(void *), void *arg) {
    const int error = pthread_create(t, NULL, main, arg);
    if (error) DIE(STATUS_MODEL, "thread: cannot start it (%s)", strerror(error));
}

/* The jobs: one that is filled, and for each replica those that may be submitted and one that is
 * written or waits for its turn. */
static void open_jobs(pipeline *p, qemb_model *const *m) {
    const qemb_model *least = m[0]; /* any replica may get any batch, and GPUs' memory may differ */
    p->n_jobs = 1 + p->n_replicas * (qemb_in_flight(m[0]) + 1);
    p->jobs = need(calloc((size_t)p->n_jobs, sizeof *p->jobs));
    for (int i = 1; i < p->n_replicas; i++)
        if (qemb_options_of(m[i])->batch_tokens < qemb_options_of(least)->batch_tokens)
            least = m[i];
    for (int i = 0; i < p->n_jobs; i++) {
        job_open(&p->jobs[i], least);
        insert(&p->free, &p->jobs[i]);
    }
}

pipeline *pipeline_new(const options *o, qemb_model *const *m, int dim, record_tokenizer *t) {
    pipeline *p = need(calloc(1, sizeof *p));
    *p = (pipeline){.lock = PTHREAD_MUTEX_INITIALIZER,
                    .changed = PTHREAD_COND_INITIALIZER,
                    .opt = o,
                    .dim = (size_t)dim,
                    .record_tokenizer = t,
                    .n_replicas = o->model.n_devices};
    p->replicas = need(calloc((size_t)p->n_replicas, sizeof *p->replicas));
    for (int i = 0; i < p->n_replicas; i++)
        p->replicas[i] = (replica){.p = p, .model = m[i], .device = o->model.devices[i]};
    p->unit = need(malloc(p->dim * sizeof *p->unit));
    open_jobs(p, m);
    return p;
}

void pipeline_free(pipeline *p) {
    for (int i = 0; i < p->n_jobs; i++) job_free(&p->jobs[i]);
    free(p->jobs);
    free(p->replicas);
    free(p->unit);
    free(p);
}

int pipeline_run(pipeline *p, const stream *s) {
    pthread_t reader_thread, writer_thread;
    p->stream = s;
    p->filled = 0;
    p->reader_ended = 0;
    p->ended = p->failed; /* devices that failed in an earlier run */
    for (int i = 0; i < p->n_replicas; i++) p->replicas[i].running = !p->replicas[i].health.failure;
    start_thread(&reader_thread, reader_main, p);
    start_thread(&writer_thread, writer_main, p);
    for (int i = 0; i < p->n_replicas; i++)
        if (p->replicas[i].running)
            start_thread(&p->replicas[i].thread, compute_main, &p->replicas[i]);
    for (int i = 0; i < p->n_replicas; i++)
        if (p->replicas[i].running) pthread_join(p->replicas[i].thread, NULL);
    const int failed = p->failed == p->n_replicas;
    if (!failed) pthread_join(reader_thread, NULL); /* otherwise it may be blocked on input */
    pthread_join(writer_thread, NULL);              /* what could be computed is written */
    return failed ? -1 : 0;
}

void pipeline_die(const pipeline *p) {
    if (p->n_replicas > 1) leave(STATUS_MODEL);
    DIE(STATUS_MODEL, "%s", p->replicas[0].health.failure);
}

void pipeline_say_devices(pipeline *p) {
    qemb_health sum = {0};
    pthread_mutex_lock(&p->lock);
    for (int i = 0; i < p->n_replicas; i++) {
        sum.recomputed += p->replicas[i].health.recomputed;
        sum.clamped += p->replicas[i].health.clamped;
    }
    if (p->opt->model.ops->fallback)
        say("%" PRIu64 " vectors recomputed on the CPU, %" PRIu64 " numbers clamped",
            sum.recomputed, sum.clamped);
    if (p->n_replicas > 1) say("%d devices, %d failed", p->n_replicas, p->failed);
    for (int i = 0; i < p->n_replicas && p->n_replicas > 1; i++) {
        const replica *r = &p->replicas[i];
        say("device %d: %" PRIu64 " batches, %" PRIu64 " distinct texts%s", r->device, r->batches,
            r->texts, r->health.failure ? ", failed" : "");
    }
    pthread_mutex_unlock(&p->lock);
}
