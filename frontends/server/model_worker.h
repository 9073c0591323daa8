/* model_worker.h - a model, its queue of requests and the threads that compute, one a device.
 *
 * A reranker's texts are pairs of a query and a document, and the "vector" of one is its logit. */
#ifndef QEMB_MODEL_WORKER_H
#define QEMB_MODEL_WORKER_H

#include "api.h"
#include "cache.h"
#include "frontends/fingerprint.h"
#include "frontends/model_options.h"
#include "redis.h"

/* WORKER_DEAD: all devices have failed and the queue is stopped; the process has to end.
 * WORKER_CHANGED: the model's file was written to, and the queue is stopped for good. */
typedef enum {
    WORKER_LOADING,
    WORKER_READY,
    WORKER_FAILING,
    WORKER_DEAD,
    WORKER_CHANGED
} model_worker_state;

typedef struct model_worker model_worker;

typedef struct {
    model_options model;
    role role;
    int max_queue_tokens;
    int allow_token_ids; /* 1: also ids without the tokens around a text */
    cache *cache;        /* or NULL */
    redis *redis;        /* or NULL */
    metrics *metrics;    /* has to outlive the worker */
} model_worker_options;

/* Opens the file and the tokenizer. Returns NULL with *err on failure; code "usage": the options do
 * not fit the model, or it is not of the kind that the role needs. */
model_worker *model_worker_open(const model_worker_options *o, qemb_err *err);
/* Starts the threads that open the model on the devices, which may take long, and then compute. On
 * failure returns -1 with *err; then stop, join and free it. */
int model_worker_start(model_worker *w, qemb_err *err);
/* -1 with *err if its threads could not open the model. */
int model_worker_failed(model_worker *w, qemb_err *err);
/* stop ends every wait. join waits for the threads and returns 0 if that takes too long; it may be
 * called again then. */
void model_worker_stop(model_worker *w);
int model_worker_join(model_worker *w, double seconds);
void model_worker_free(model_worker *w); /* after model_worker_join returned 1 */

model_worker_state model_worker_state_of(model_worker *w);
void model_worker_tick(model_worker *w, double now); /* call it a few times per second */
int model_worker_dim(const model_worker *w);         /* numbers of a whole vector */
int model_worker_is_reranker(const model_worker *w);
role model_worker_role(const model_worker *w);
int model_worker_max_tokens(const model_worker *w);
size_t model_worker_cache_bytes(const model_worker *w);
const char *model_worker_table(const model_worker *w); /* the name of the ops table */
/* 64 hex digits that stand for the file and the ops table: all that vectors depend on beside
 * ids. */
const char *model_worker_fingerprint(const model_worker *w);

const qemb_file *model_worker_file(const model_worker *w);
const model_options *model_worker_model_options(const model_worker *w);

/* Tokenizes the inputs of r: allocates t->texts (r->n) with ids and keys, sets *tokens to the
 * number of tokens and recipe to the fingerprint of model, table and prompt. On failure returns -1
 * with *e, and t holds nothing. */
int model_worker_tokenize(model_worker *w, const api_request *r, pending_request *t,
                          uint64_t *tokens, char recipe[RECIPE_ROOM], api_error *e);

/* Sets the vectors of those texts of t that are cached. Returns their number. */
int model_worker_lookup(model_worker *w, pending_request *t);

/* The functions of queue.h on the worker's queue. */
int model_worker_submit(model_worker *w, pending_request *t, int *shared, queue_refusal *no);
int model_worker_retry_after(model_worker *w);
queue_depth model_worker_depth(model_worker *w);
int model_worker_devices(model_worker *w); /* those that have not failed */

#endif
