/* queue.c - waiting requests, and the batches made of their texts; see queue.h.
 *
 * A request's texts are taken in order. Requests with texts left form a ring. A text is long if it
 * has more than `share` tokens. Starting at the ring's head, a batch takes
 *   1. the first long text, if a long text waited while the previous batch took none;
 *   2. short texts, at most `share` rows from each request in turn, round after round;
 *   3. long texts that still fit, one of each request in turn, round after round.
 * So a request with a thousand texts leaves room for the next request. While long texts wait, at
 * least one of two successive batches contains a long text.
 *
 * The packer refuses a text for which the batch has no room. Step 2 then ends. It also refuses a
 * text that would undo the batch's sharing, such as a document of another query. Then only its
 * request is passed over, and the batch goes on with texts that share: a request to rerank usually
 * fills batches of its own. The next batch begins with the first request that was passed over.
 *
 * The rate of recent batches says how long a request will take (seconds_until_done). One that would
 * take until after its deadline is refused when it comes. One that was begun does not expire: what
 * is computed would be lost.
 */
#include "queue.h"

#include "frontends/console.h"

#include <assert.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define INDEX_SLOTS 16384 /* a power of two */

struct queue {
    metrics *metrics;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    text *index[INDEX_SLOTS]; /* texts in flight by key */
    pending_request *ring;    /* the head; circular, n_ring requests */
    int n_ring;
    pending_request *oldest, *newest; /* waiting requests */
    queue_depth depth;
    int max_tokens, batch_tokens, share;
    int long_turn;    /* the next batch begins with a long text */
    uint64_t n_built; /* batches, with the one that is being made */
    int stopped;
    int idle;      /* threads that wait in queue_take */
    int computing; /* batches that are taken and not finished */
    long long computing_tokens;
    double since; /* the last batch was finished, or the first one was taken, then */
    double done_tokens, done_seconds; /* of finished batches; older ones weigh less */
    double rate_at;                   /* the last of them was finished then */
    int between;    /* a batch of queue_take_between is not finished */
    double stopped_for; /* seconds that the text around it had taken since `since` */
};

/* A rate older than this, in seconds, refuses nobody: the machine may be another one by now, and a
 * queue that refused all it could measure would never learn of it. */
#define RATE_LIFE 60

/* ---- texts, requests ------------------------------------------------------------------------- */

text *text_new(const uint8_t key[KEY_BYTES], int n) {
    text *t = malloc(sizeof *t + (size_t)n * sizeof *t->ids);
    if (!t) return NULL;
    memset(t, 0, sizeof *t);
    memcpy(t->key, key, KEY_BYTES);
    t->n = n;
    return t;
}

void pending_request_clear(pending_request *t) {
    assert(t->state != REQUEST_WAITING);
    for (int i = 0; i < t->n; i++) {
        free(t->texts[i].text);
        vector_drop(t->texts[i].vector);
    }
    free(t->texts);
    t->texts = NULL;
    t->n = 0;
}

/* ---- the index of texts in flight ------------------------------------------------------------ */

static text **index_place(queue *q, const uint8_t *key) {
    uint32_t h; /* the key is a digest, so any of its bits serve as a hash */
    memcpy(&h, key, sizeof h);
    text **p = &q->index[h & (INDEX_SLOTS - 1)];
    while (*p && memcmp((*p)->key, key, KEY_BYTES)) p = &(*p)->next;
    return p;
}

static void index_remove(queue *q, text *t) {
    text **p = index_place(q, t->key);
    assert(*p == t);
    *p = t->next;
}

/* ---- rings, lists, waiters ------------------------------------------------------------------- */

static void ring_add(queue *q, pending_request *t) {
    q->n_ring++;
    if (!q->ring) {
        q->ring = t->ring_next = t->ring_prev = t;
    } else { /* before the head, so last in turn */
        t->ring_next = q->ring;
        t->ring_prev = q->ring->ring_prev;
        t->ring_prev->ring_next = t->ring_next->ring_prev = t;
    }
}

static void ring_remove(queue *q, pending_request *t) {
    if (!t->ring_next) return;
    q->n_ring--;
    t->ring_next->ring_prev = t->ring_prev;
    t->ring_prev->ring_next = t->ring_next;
    if (q->ring == t) q->ring = t->ring_next == t ? NULL : t->ring_next;
    t->ring_prev = t->ring_next = NULL;
}

static void live_add(queue *q, pending_request *t) {
    t->live_prev = q->newest;
    t->live_next = NULL;
    *(q->newest ? &q->newest->live_next : &q->oldest) = t;
    q->newest = t;
    q->depth.requests++;
}

static void live_remove(queue *q, pending_request *t) {
    *(t->live_prev ? &t->live_prev->live_next : &q->oldest) = t->live_next;
    *(t->live_next ? &t->live_next->live_prev : &q->newest) = t->live_prev;
    q->depth.requests--;
}

static void wait_for(pending_text *s, text *t) {
    s->text = t;
    s->prev = NULL;
    s->next = t->waiters;
    if (s->next) s->next->prev = s;
    t->waiters = s;
}

static void stop_waiting(queue *q, pending_text *s) {
    text *t = s->text;
    *(s->prev ? &s->prev->next : &t->waiters) = s->next;
    if (s->next) s->next->prev = s->prev;
    s->text = NULL;
    if (t->waiters || t->computing) return;
    index_remove(q, t); /* no request waits for it and no batch has it */
    q->depth.texts--;
    q->depth.tokens -= t->n;
    free(t);
}

/* Takes t out of the queue in its final state and adds it to the list for tell(). */
static void end_request(queue *q, pending_request *t, request_state state,
                        pending_request **ended) {
    for (int i = 0; i < t->n; i++)
        if (t->texts[i].text) stop_waiting(q, &t->texts[i]);
    ring_remove(q, t);
    live_remove(q, t);
    t->state = state;
    t->next_done = *ended;
    *ended = t;
}

static void tell(pending_request *ended) {
    for (pending_request *next; ended; ended = next) {
        next = ended->next_done; /* done() may free the request */
        ended->done(ended);
    }
}

/* ---- in -------------------------------------------------------------------------------------- */

queue *queue_new(int max_tokens, int batch_tokens, int share, metrics *m) {
    queue *q = calloc(1, sizeof *q);
    if (!q) return NULL;
    pthread_mutex_init(&q->lock, NULL);
    pthread_cond_init(&q->changed, NULL);
    q->metrics = m;
    q->max_tokens = max_tokens;
    q->batch_tokens = batch_tokens;
    q->share = share > 0 ? share : 1;
    return q;
}

void queue_free(queue *q) {
    if (!q) return;
    assert(!q->oldest);
    pthread_mutex_destroy(&q->lock);
    pthread_cond_destroy(&q->changed);
    free(q);
}

/* Puts new texts into the index. A text that is there already is shared, not added. */
static int link_texts(queue *q, pending_request *t) {
    int shared = 0;
    for (int i = 0; i < t->n; i++) {
        pending_text *s = &t->texts[i];
        if (!s->text) continue;
        text **place = index_place(q, s->text->key), *own = s->text;
        s->request = t;
        t->pending++;
        if (*place) {
            free(own);
            shared++;
        } else {
            *place = own;
            own->next = NULL;
            q->depth.texts++;
            q->depth.tokens += own->n;
        }
        wait_for(s, *place);
        if ((*place)->computing)
            t->begun = 1;
        else
            t->waiting += (*place)->n;
    }
    return shared;
}

/* ---- how long a request takes ---------------------------------------------------------------- */

/* Tokens a second, or 0 if it is not known. */
static double rate_of(const queue *q, double now) {
    if (!(q->done_tokens > 0) || now - q->rate_at > RATE_LIFE) return 0;
    return q->done_tokens / fmax(q->done_seconds, 1e-9);
}

/* Tokens that are computed before a request of `own` tokens that comes now is done, without its
 * own. As requests take turns of `share` tokens, each of the others gives way when it has had as
 * many turns. What is being computed is a batch, or a text of more tokens, which lets others pass
 * (queue_take_between); what is done of it by now, at that rate, counts no more. */
static long long tokens_before(const queue *q, long long own, double now, double rate) {
    const long long turns = (own + q->share - 1) / q->share * q->share;
    const long long batch = own > q->batch_tokens ? own : q->batch_tokens;
    long long before = 0;
    for (const pending_request *t = q->oldest; t; t = t->live_next)
        before += t->waiting < turns ? t->waiting : turns;
    if (before > q->depth.tokens) before = q->depth.tokens; /* some texts are shared */
    const double done = q->computing ? (now - q->since) * rate : 0;
    const long long left = (long long)fmax((double)q->computing_tokens - done, 0);
    return before + (left < batch ? left : batch);
}

static int whole_seconds(double s) { return s < 1 ? 1 : s > 60 ? 60 : (int)ceil(s); }

static int retry_after(const queue *q, double now) {
    const double rate = rate_of(q, now);
    return whole_seconds(rate > 0 ? (double)q->depth.tokens / rate : 1);
}

/* Whether a request of `own` tokens can be done by its deadline, as far as is known. Retry-After is
 * the time after which it could. */
static int is_in_time(const queue *q, const pending_request *t, long long own, queue_refusal *no) {
    const double now = seconds_now(), left = t->deadline - now, rate = rate_of(q, now);
    if (!(rate > 0) || !own) return 1;
    const long long all = own + tokens_before(q, own, now, rate);
    if ((double)all / rate <= left) return 1;
    const int alone = (double)own / rate > left;
    *no = (queue_refusal){.why = alone ? QUEUE_LARGE : QUEUE_LATE,
                          .tokens = alone ? own : all,
                          .rate = rate,
                          .seconds = (double)(alone ? own : all) / rate};
    no->retry_after = whole_seconds((double)all / rate - left);
    metrics_add(q->metrics, COUNT_REFUSED, 1);
    return 0;
}

int queue_submit(queue *q, pending_request *t, int *shared, queue_refusal *no) {
    pending_request *ended = NULL;
    long long tokens = 0; /* an upper bound: a text twice in t counts twice */
    pthread_mutex_lock(&q->lock);
    for (int i = 0; i < t->n; i++)
        if (t->texts[i].text && !*index_place(q, t->texts[i].text->key))
            tokens += t->texts[i].text->n;
    const int full = q->stopped || (q->depth.tokens && q->depth.tokens + tokens > q->max_tokens);
    if (full)
        *no = (queue_refusal){.why = q->stopped ? QUEUE_STOPPED : QUEUE_FULL,
                              .retry_after = retry_after(q, seconds_now())};
    if (full || !is_in_time(q, t, tokens, no)) {
        pthread_mutex_unlock(&q->lock);
        return -1;
    }
    t->pending = t->cursor = t->begun = 0;
    t->passed_over = 0, t->waiting = 0;
    t->state = REQUEST_WAITING;
    *shared = link_texts(q, t);
    live_add(q, t);
    if (t->pending)
        ring_add(q, t);
    else
        end_request(q, t, REQUEST_DONE, &ended);
    pthread_cond_signal(&q->changed);
    pthread_mutex_unlock(&q->lock);
    tell(ended);
    return 0;
}

/* ---- batches --------------------------------------------------------------------------------- */

typedef struct {
    queue *q;
    qemb_batch *batch;
    text **taken;
    int n, full, has_long;
    int longest;           /* longer texts stay in the queue; 0: all may be taken */
    long long tokens;      /* of the texts taken */
    pending_request *next; /* the first that was passed over: the next batch begins with it */
    pending_request *ended;
} builder;

/* Returns the next text of t that no batch has taken. If there is none, takes t out of the ring and
 * returns NULL. */
static text *next_text(queue *q, pending_request *t) {
    for (; t->cursor < t->n; t->cursor++) {
        text *x = t->texts[t->cursor].text;
        if (x && !x->computing) return x;
    }
    ring_remove(q, t);
    return NULL;
}

static void pass_over(builder *b, pending_request *t, const text *x) {
    t->passed_over = b->q->n_built;
    if (!b->next) b->next = t;
    /* otherwise the batch has room for texts that share more */
    if (qemb_batch_tokens_computed(b->batch) + (size_t)x->n > (size_t)b->q->batch_tokens)
        b->full = 1;
}

/* Adds x, the next text of t, to the batch. Returns 0 if it does not fit; then t gives no text to
 * this batch any more. */
static int take(builder *b, pending_request *t, text *x) {
    if (t->passed_over == b->q->n_built) return 0;
    const int row = qemb_pack_add(b->batch, x->ids, x->n);
    if (row < 0) {
        pass_over(b, t, x);
        return 0;
    }
    assert(row == b->n);
    b->taken[b->n++] = x;
    x->computing = 1;
    b->q->depth.texts--;
    b->q->depth.tokens -= x->n;
    b->tokens += x->n;
    for (pending_text *s = x->waiters; s; s = s->next)
        s->request->begun = 1, s->request->waiting -= x->n;
    b->has_long |= x->n > b->q->share;
    t->cursor++;
    return 1;
}

/* Adds long texts, one of each request in ring order: the first one only, or round after round all
 * that fit. Returns 1 if one is left. */
static int take_long(builder *b, int only_first) {
    queue *q = b->q;
    int left = 0;
    for (int some = 1; some;) {
        pending_request *t = q->ring;
        some = 0;
        for (int i = q->n_ring; i; i--) {
            pending_request *next = t->ring_next; /* next_text may take t out of the ring */
            text *x = next_text(q, t);
            if (x && x->n > q->share && (!b->longest || x->n <= b->longest)) {
                if (take(b, t, x)) {
                    if (only_first) return 1;
                    some = next_text(q, t) != NULL || some;
                } else {
                    left = 1;
                }
            }
            t = next;
        }
    }
    return left;
}

/* Adds short texts of t, at most its share. Returns 1 if it added some. */
static int take_share(builder *b, pending_request *t) {
    const int n = b->n;
    const size_t most = qemb_batch_tokens_computed(b->batch) + (size_t)b->q->share;
    for (text *x; (x = next_text(b->q, t)) && x->n <= b->q->share;)
        if (qemb_batch_tokens_computed(b->batch) + (size_t)x->n > most || !take(b, t, x)) break;
    return b->n > n;
}

/* Adds short texts, round after round, until none is left or there is no room for one. A complete
 * round ends at the ring's head. */
static void take_short(builder *b) {
    queue *q = b->q;
    for (int some = 1; some && !b->full;) {
        some = 0;
        for (int i = q->n_ring; i && !b->full; i--) {
            pending_request *t = q->ring;
            some |= take_share(b, t);
            if (t->ring_next && !b->full) q->ring = t->ring_next;
        }
    }
}

static void drop_departed(queue *q, pending_request **ended) {
    for (pending_request *t = q->oldest, *next; t; t = next) {
        next = t->live_next;
        if (!t->departed || !t->departed(t)) continue;
        end_request(q, t, REQUEST_GONE, ended);
        metrics_add(q->metrics, COUNT_DEPARTED, 1);
    }
}

/* Makes a batch of the waiting texts. It is empty if all clients have left. */
static void build(builder *b) {
    queue *q = b->q;
    q->n_built++;
    drop_departed(q, &b->ended);
    if (q->long_turn) take_long(b, 1);
    take_short(b);
    const int long_left = take_long(b, 0);
    q->long_turn = long_left && !b->has_long;
    if (b->next && b->next->ring_next) q->ring = b->next;
    if (b->n && !q->computing++) q->since = seconds_now();
    q->computing_tokens += b->tokens;
    if (q->ring) pthread_cond_signal(&q->changed); /* there may be a batch for another thread */
}

int queue_take(queue *q, qemb_batch *batch, text **taken) {
    for (;;) {
        builder b = {.q = q, .batch = batch, .taken = taken};
        pthread_mutex_lock(&q->lock);
        q->idle++;
        while (!q->ring && !q->stopped) pthread_cond_wait(&q->changed, &q->lock);
        q->idle--;
        const int stopped = q->stopped;
        if (!stopped) build(&b);
        pthread_mutex_unlock(&q->lock);
        tell(b.ended); /* before waiting, which may take long */
        if (b.n || stopped) return b.n;
    }
}

int queue_try_take(queue *q, int tokens, qemb_batch *batch, text **taken) {
    builder b = {.q = q, .batch = batch, .taken = taken};
    pthread_mutex_lock(&q->lock);
    if (!q->idle && q->depth.tokens >= tokens) build(&b); /* a stopped queue is empty */
    pthread_mutex_unlock(&q->lock);
    tell(b.ended);
    return b.n;
}

/* A batch between two steps has its own time, which does not count for the text around it. */
int queue_take_between(queue *q, qemb_batch *batch, text **taken) {
    builder b = {.q = q, .batch = batch, .taken = taken, .longest = q->batch_tokens};
    pthread_mutex_lock(&q->lock);
    if (q->ring && !q->stopped) build(&b);
    if (b.n) {
        const double now = seconds_now();
        q->between = 1;
        q->stopped_for = now - q->since;
        q->since = now;
    }
    pthread_mutex_unlock(&q->lock);
    tell(b.ended);
    return b.n;
}

int queue_is_wanted(queue *q, text *const *taken, int n) {
    int wanted = 0;
    pthread_mutex_lock(&q->lock);
    for (int i = 0; i < n && !wanted; i++) wanted = taken[i]->waiters != NULL;
    pthread_mutex_unlock(&q->lock);
    return wanted;
}

/* Tokens and seconds are summed apart: of batches that run at the same time, all but the first add
 * tokens in nearly no time. A batch of a few texts says little of the rate of full ones, since
 * reading the weights takes most of its time: those below a sixteenth do not count. */
static void note_rate(queue *q, double tokens, double now) {
    const double keep = 0.95;
    if (tokens * 16 >= q->batch_tokens) {
        q->done_tokens = keep * q->done_tokens + tokens;
        q->done_seconds = keep * q->done_seconds + now - q->since;
        q->rate_at = now;
    }
    q->since = now;
}

/* A batch of queue_take_between has ended: the text around it goes on. */
static void end_between(queue *q, double now) {
    if (q->between) q->since = now - q->stopped_for;
    q->between = 0;
}

void queue_finish(queue *q, text **taken, vector **vectors, int n, text_failure why) {
    pending_request *ended = NULL;
    int tokens = 0;
    pthread_mutex_lock(&q->lock);
    q->computing--;
    for (int i = 0; i < n; i++) {
        text *t = taken[i];
        tokens += t->n;
        for (pending_text *s = t->waiters, *next; s; s = next) {
            next = s->next;
            s->text = NULL;
            if (vectors[i])
                s->vector = vector_take(vectors[i]);
            else
                s->failed = why;
            if (!--s->request->pending) end_request(q, s->request, REQUEST_DONE, &ended);
        }
        index_remove(q, t);
        free(t);
    }
    q->computing_tokens -= tokens;
    const double now = seconds_now();
    note_rate(q, tokens, now);
    end_between(q, now);
    pthread_mutex_unlock(&q->lock);
    tell(ended);
}

void queue_give_back(queue *q, text **taken, int n) {
    pthread_mutex_lock(&q->lock);
    q->computing--;
    end_between(q, seconds_now());
    for (int i = n - 1; i >= 0; i--) { /* so that the first text's request becomes the head */
        text *t = taken[i];
        t->computing = 0;
        q->computing_tokens -= t->n;
        if (!t->waiters) {
            index_remove(q, t);
            free(t);
            continue;
        }
        q->depth.texts++;
        q->depth.tokens += t->n;
        for (pending_text *s = t->waiters; s; s = s->next) {
            pending_request *r = s->request;
            r->waiting += t->n;
            const int at = (int)(s - r->texts);
            if (r->cursor > at) r->cursor = at;
            ring_remove(q, r);
            ring_add(q, r);
            q->ring = r;
        }
    }
    pthread_cond_signal(&q->changed);
    pthread_mutex_unlock(&q->lock);
}

/* ---- time, the end --------------------------------------------------------------------------- */

void queue_tick(queue *q, double now) {
    pending_request *ended = NULL;
    pthread_mutex_lock(&q->lock);
    for (pending_request *t = q->oldest, *next; t; t = next) {
        next = t->live_next;
        if (t->begun || now < t->deadline) continue;
        end_request(q, t, REQUEST_EXPIRED, &ended);
        metrics_add(q->metrics, COUNT_EXPIRED, 1);
    }
    drop_departed(q, &ended);
    pthread_mutex_unlock(&q->lock);
    tell(ended);
}

void queue_stop(queue *q) {
    pending_request *ended = NULL;
    pthread_mutex_lock(&q->lock);
    q->stopped = 1;
    while (q->oldest) end_request(q, q->oldest, REQUEST_STOPPED, &ended);
    pthread_cond_broadcast(&q->changed);
    pthread_mutex_unlock(&q->lock);
    tell(ended);
}

queue_depth queue_depth_of(queue *q) {
    pthread_mutex_lock(&q->lock);
    const queue_depth d = q->depth;
    pthread_mutex_unlock(&q->lock);
    return d;
}

int queue_retry_after(queue *q) {
    pthread_mutex_lock(&q->lock);
    const int seconds = retry_after(q, seconds_now());
    pthread_mutex_unlock(&q->lock);
    return seconds;
}
