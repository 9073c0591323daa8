/* queue.h - waiting requests, and the batches made of their texts. */
#ifndef QEMB_QUEUE_H
#define QEMB_QUEUE_H

#include "metrics.h"
#include "qemb.h"
#include "vector.h"

#include <stdint.h>

/* Size of a key, a SHA-256. */
#define KEY_BYTES 32

typedef struct pending_text pending_text;
typedef struct pending_request pending_request;

/* A distinct text in flight. Two texts of a queue have equal keys if and only if they have equal
 * ids: a batch has one row per distinct text. */
typedef struct text {
    uint8_t key[KEY_BYTES];
    struct text *next;     /* in its bucket of the index */
    pending_text *waiters; /* the requests' texts that wait for it */
    int computing;         /* it is in a batch, and stays until that is done */
    int n;
    int32_t ids[]; /* (n), with the tokens that the model's file adds */
} text;

text *text_new(const uint8_t key[KEY_BYTES], int n); /* the caller fills ids. NULL: out of memory */

/* Why a text has no vector. */
typedef enum {
    TEXT_GOOD,
    TEXT_NOT_FINITE, /* its vector has no finite length, or its logit is not finite */
    TEXT_NO_MEMORY   /* for its vector */
} text_failure;

/* One text of a request. It waits for `text`, has its `vector`, or has failed. */
struct pending_text {
    pending_request *request;
    text *text;
    vector *vector;
    pending_text *prev, *next; /* in the text's list of waiters */
    text_failure failed;
    size_t cut_bytes, cut_tokens; /* what truncation removed, or 0 */
};

typedef enum {
    REQUEST_NEW,     /* never submitted */
    REQUEST_WAITING, /* in the queue: the caller may not touch it */
    REQUEST_DONE,    /* every text has its vector or has failed */
    REQUEST_EXPIRED, /* its deadline has passed before a batch took one of its texts */
    REQUEST_GONE,    /* the client has left */
    REQUEST_STOPPED  /* the queue was stopped */
} request_state;

/* A request in the queue. The caller fills texts (n), each with text or vector, the deadline and
 * the functions. */
struct pending_request {
    pending_text *texts;
    int n;
    double deadline; /* as seconds_now */
    /* Called once, when the state is final, on any thread, without locks held. The request then
     * belongs to the caller again. */
    void (*done)(pending_request *t);
    int (*departed)(pending_request *t); /* 1: the client has left. May be NULL; must not block. */
    request_state state;
    /* private to the queue */
    int pending, cursor;
    int begun;         /* a batch has taken one of its texts: it does not expire */
    long long waiting; /* tokens of its texts that no batch has taken */
    uint64_t passed_over; /* the number of the batch that had no place for its next text */
    pending_request *ring_prev, *ring_next; /* if it has texts that no batch has taken */
    pending_request *live_prev, *live_next; /* waiting requests by age */
    pending_request *next_done;
};

/* Frees what the texts hold. Not to be called while the request waits. */
void pending_request_clear(pending_request *t);

typedef struct queue queue;

typedef struct {
    int texts, tokens; /* distinct, not taken by a batch */
    int requests;      /* waiting */
} queue_depth;

/* Makes a queue for max_tokens with batches of about batch_tokens, of which a request gets `share`
 * in its turn. m has to outlive it. Returns NULL if out of memory. */
queue *queue_new(int max_tokens, int batch_tokens, int share, metrics *m);
void queue_free(queue *q); /* q has to be empty */

/* Why a request was not taken. */
typedef struct {
    enum {
        QUEUE_STOPPED,
        QUEUE_FULL,
        QUEUE_LATE,  /* other requests and it would take until after its deadline */
        QUEUE_LARGE, /* so would it alone */
    } why;
    long long tokens; /* of the request, and of the work before it that it would wait for */
    double rate;      /* tokens a second, of recent batches; QUEUE_LATE and QUEUE_LARGE only */
    double seconds;   /* that the tokens would take */
    int retry_after;  /* seconds, at least 1 */
} queue_refusal;

/* Adds t if its texts fit beside the waiting ones, and if it can be done by its deadline as far as
 * recent batches tell; an empty queue takes any number of tokens. The queue then owns its texts.
 * Texts already in flight are shared, and *shared is set to their number. Returns -1 with nothing
 * done but *no filled if t is not taken. */
int queue_submit(queue *q, pending_request *t, int *shared, queue_refusal *no);
/* Waits for texts, adds a batch of them to b (empty) and sets taken[row] (room for batch_tokens).
 * Returns their number, or 0 if the queue is stopped. Several threads may take batches. Each batch
 * then goes to queue_finish or queue_give_back. */
int queue_take(queue *q, qemb_batch *b, text **taken);
/* The same for a thread that has something to compute: returns 0 instead of waiting, and also if
 * fewer than `tokens` tokens wait, or if a thread that has nothing to compute waits for them. The
 * batch may have fewer rows than tokens waited, for texts that share a prefix; what arrives later
 * has another query and would seldom have joined it. */
int queue_try_take(queue *q, int tokens, qemb_batch *b, text **taken);
/* The same for a thread between two steps of a text of more than batch_tokens tokens: returns 0
 * instead of waiting, and leaves such texts in the queue. */
int queue_take_between(queue *q, qemb_batch *b, text **taken);
/* Whether a request waits for one of the taken texts (n). If none does, queue_give_back forgets
 * them. */
int queue_is_wanted(queue *q, text *const *taken, int n);
/* Gives vectors (n) to the waiters of the taken texts; NULL fails them for that reason. Each waiter
 * takes a reference; the caller keeps its own. */
void queue_finish(queue *q, text **taken, vector **vectors, int n, text_failure why);
/* Puts the taken texts (n) back, to be taken first. */
void queue_give_back(queue *q, text **taken, int n);
/* Ends requests whose client has left, and those whose deadline has passed unless a batch has taken
 * one of their texts. */
void queue_tick(queue *q, double now);
/* Stops the queue: ends every request; queue_take returns 0 and queue_submit -1 from then on. */
void queue_stop(queue *q);
queue_depth queue_depth_of(queue *q);
/* Estimated seconds until the waiting texts are computed, at least 1. */
int queue_retry_after(queue *q);

#endif
