/* queue.h - what waits to be computed, and the batches made of it. */
#ifndef QEMB_QUEUE_H
#define QEMB_QUEUE_H

#include "metrics.h"
#include "qemb.h"
#include "vector.h"

#include <stdint.h>

/* Bytes of a key: a SHA-256. */
#define KEY_BYTES 32

typedef struct pending_text pending_text;
typedef struct pending_request pending_request;

/* A distinct text in flight. Its key stands for model and ids: two texts of a queue have equal keys
 * if and only if they have equal ids, or else the batch would give both the same row. */
typedef struct text {
    uint8_t key[KEY_BYTES];
    struct text *next;     /* in the queue's index */
    pending_text *waiters; /* whose text it is */
    int computing;         /* it is in a batch: stays until that is done */
    int n;
    int32_t ids[]; /* (n), end-of-text included */
} text;

text *text_new(const uint8_t key[KEY_BYTES], int n); /* ids are to be filled. NULL: no memory */

/* One text of a request: it waits for `text`, or has its `vector`, or has failed. */
struct pending_text {
    pending_request *request;
    text *text;
    vector *vector;
    pending_text *prev, *next; /* among the text's waiters */
    int failed;                /* the model has no finite vector for it */
};

typedef enum {
    REQUEST_NEW,     /* never submitted */
    REQUEST_WAITING, /* in the queue: nobody else touches it */
    REQUEST_DONE,    /* every text has its vector or has failed */
    REQUEST_EXPIRED, /* the deadline came first */
    REQUEST_GONE,    /* the client has left */
    REQUEST_STOPPED  /* the queue has ended */
} request_state;

/* A request in the queue. The caller fills texts (n of them, with text or vector), deadline and
 * functions. */
struct pending_request {
    pending_text *texts;
    int n;
    double deadline; /* as seconds_now */
    /* Called once, when the state is final, from any thread and without locks. From then on the
     * request is the caller's again. */
    void (*done)(pending_request *t);
    int (*departed)(
        pending_request *t); /* 1: nobody waits any more. May be NULL; must not block. */
    request_state state;
    /* the queue's own */
    int pending, cursor;
    pending_request *ring_prev, *ring_next; /* has texts that no batch has taken */
    pending_request *live_prev, *live_next; /* waits, by age */
    pending_request *next_done;
};

/* Gives back what the texts hold. Not while the request waits. */
void pending_request_clear(pending_request *t);

typedef struct queue queue;

typedef struct {
    int texts, tokens; /* distinct ones that no batch has taken */
    int requests;      /* that wait */
} queue_depth;

/* A queue that holds max_tokens and makes batches of about batch_tokens. m outlives it. NULL: out
 * of memory. */
queue *queue_new(int max_tokens, int batch_tokens, metrics *m);
void queue_free(queue *q); /* nothing waits in it */

/* Hands t over if its texts fit beside what waits (an empty queue takes every request), with texts
 * that are in flight already shared. 0; or -1, nothing done: full, or ended. Texts that wait are
 * the queue's from then on. *shared gets the number of texts that were in flight already. */
int queue_submit(queue *q, pending_request *t, int *shared);
/* Waits for texts, puts a batch of them into b (empty) and names them in taken (room for
 * batch_tokens), row by row. Returns their number; 0 when the queue has ended. */
int queue_take(queue *q, qemb_batch *b, text **taken);
/* The vectors (n; NULL: none that is finite) of the last taken texts: they are the waiters' now. */
void queue_finish(queue *q, text **taken, vector **vectors, int n);
/* Ends the wait of requests whose deadline has passed, and of those whose client has left. */
void queue_tick(queue *q, double now);
/* Ends every wait and the queue: queue_take returns 0, queue_submit refuses. */
void queue_stop(queue *q);
queue_depth queue_depth_of(queue *q);
/* Seconds after which what waits now will have been computed, 1 at least. */
int queue_retry_after(queue *q);

#endif
