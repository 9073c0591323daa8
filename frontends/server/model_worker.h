/* model_worker.h - a model at work: texts -> token ids -> queue -> vectors. */
#ifndef QEMB_MODEL_WORKER_H
#define QEMB_MODEL_WORKER_H

#include "api.h"
#include "cache.h"
#include "frontends/model_options.h"
#include "redis.h"

/* WORKER_DEAD: its device has failed and its queue has ended; the process is to end. */
typedef enum { WORKER_LOADING, WORKER_READY, WORKER_FAILING, WORKER_DEAD } model_worker_state;

typedef struct model_worker model_worker;

typedef struct {
    model_options model;
    int max_queue_tokens, is_fallback;
    cache *cache;     /* or NULL */
    redis *redis;     /* or NULL */
    metrics *metrics; /* outlives the worker */
} model_worker_options;

/* Opens the file and the tokenizer; ends the process with a message if that fails. */
model_worker *model_worker_open(const model_worker_options *o);
/* Starts the thread that opens the model, which may take long, and computes. Ends the process
 * likewise. */
void model_worker_start(model_worker *w);
/* Ends every wait. After model_worker_join nothing computes; it returns 0 if that took too long. */
void model_worker_stop(model_worker *w);
int model_worker_join(model_worker *w, double seconds);
void model_worker_free(model_worker *w); /* after model_worker_join returned 1 */

model_worker_state model_worker_state_of(model_worker *w);
void model_worker_tick(model_worker *w, double now); /* a few times a second */
int model_worker_hidden(const model_worker *w);
int model_worker_max_tokens(const model_worker *w);
size_t model_worker_cache_bytes(const model_worker *w);
/* "ab12..." (64 digits): what vectors depend on beside the ids: the file and the backend. */
const char *model_worker_fingerprint(const model_worker *w);

/* Token ids and keys of the inputs of r into t->texts (r->n), which is made; *tokens gets their
 * sum. -1: *e says why; t holds nothing. */
int model_worker_tokenize(model_worker *w, const api_request *r, pending_request *t,
                          uint64_t *tokens, api_error *e);

/* Vectors of t's texts that are known already: those texts wait for nothing. Returns how many. */
int model_worker_lookup(model_worker *w, pending_request *t);

/* queue_submit, queue_retry_after and queue_depth_of of the worker's queue. */
int model_worker_submit(model_worker *w, pending_request *t, int *shared);
int model_worker_retry_after(model_worker *w);
queue_depth model_worker_depth(model_worker *w);

#endif
