/* models.h - the models that are served, and the change to the files' new contents while requests
 * run.
 *
 * A set has a worker for each role. A reload makes a second set of the same files' names, and when
 * all its models have computed a vector, it becomes the one that requests take. The old one is
 * closed when the last request that took it has dropped it. So a request sees one set, from its
 * tokens to its answer, and until then both are in memory. */
#ifndef QEMB_MODELS_H
#define QEMB_MODELS_H

#include "model_worker.h"

#include <time.h>

typedef struct {
    model_worker_options worker; /* of the first model; the others' are made from it */
    const char *fallback, *reranker; /* files, or NULL */
    int reranker_max_tokens;
} models_options;

typedef struct models models;

typedef struct model_set {
    model_worker *workers[N_ROLES]; /* all but the first may be NULL */
    time_t created;
    /* private to models.c */
    int refs, stopped;
    struct model_set *next;
} model_set;

/* Opens the models' files. Ends the process with a message on failure. */
models *models_open(const models_options *o);
/* Starts to load them; when that fails, models_tick ends the process with a message. */
void models_start(models *m);

/* The set that serves now. The caller drops it; models_take and models_drop may be called by any
 * thread. */
model_set *models_take(models *m);
void models_drop(models *m, model_set *s);
/* Estimated seconds until the first model can take another request. */
int models_retry_after(models *m);

/* A caller that waits for the end of a reload. */
typedef struct reload_call {
    /* Called once, by the thread that calls models_tick, when error is final; status 0: the new
     * models serve. */
    void (*done)(struct reload_call *c);
    api_error error;
} reload_call;

/* Wants a reload from the next tick on; one that is wanted while one runs follows it. */
void models_want_reload(models *m);
/* The same for a caller that waits. Returns -1 with c->error if one runs or is wanted already. */
int models_reload(models *m, reload_call *c);

/* To be called a few times per second, by one thread. */
void models_tick(models *m, double now);
/* Whether all devices of a model that serves have failed: the process has to end. */
int models_dead(models *m);

/* The end: no reload begins any more, and who waits for one is told. Then stop ends every wait for
 * vectors, join waits for the threads and returns 0 if that takes too long. */
void models_end_reloads(models *m);
void models_stop(models *m);
int models_join(models *m, double seconds);
void models_free(models *m); /* after models_join returned 1 */

#endif
