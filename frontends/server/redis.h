/* redis.h - a cache of vectors in Redis, shared by servers. Thread-safe. */
#ifndef QEMB_REDIS_H
#define QEMB_REDIS_H

#include "frontends/fingerprint.h"
#include "queue.h"

typedef struct redis redis;

typedef struct {
    const char *address;       /* of redis_address.h */
    const char *password_file; /* or NULL */
    const char *ca;            /* file with certificates, or NULL: the system's */
    int timeout_ms;            /* bounds what a request waits */
    int ttl;                   /* seconds that a vector stays, 0: for ever */
    double check;              /* share of the hits that are computed again */
} redis_options;

/* The vectors of one model. */
typedef struct {
    uint8_t weights[WEIGHTS_BYTES]; /* the checksum of its loaded weights */
    int dim;
    double longest; /* no vector is longer; for one number: no number is larger */
    /* Two computations of a text differ by at most this share of the vector's length; for one
     * number, of `longest`. 0: not at all. */
    double tolerance;
    int (*is_good)(const float *v, int n); /* whether it can be answered */
} redis_kind;

/* Ends the process with a message if an option is wrong. Connects at the first use. */
redis *redis_new(const redis_options *o, metrics *m);
/* Ends every wait; the functions below then do nothing. */
void redis_stop(redis *r); /* r may be NULL */
/* Stops it and frees it. Returns 0 if a thread still looks up a name after `seconds`: then r stays,
 * and the process has to end. */
int redis_free(redis *r, double seconds); /* r may be NULL */

/* Sets the vectors of those texts of t that have a text, for which Redis has a vector that passes
 * all checks, and that are not to be computed again. Returns their number. Takes at most the
 * time-out; returns 0 at once in a pause. */
int redis_get(redis *r, const redis_kind *k, pending_request *t);
/* Stores a computed vector later; does not block. Returns 1 if Redis had another one: from then on
 * it is not used. */
int redis_put(redis *r, const redis_kind *k, const uint8_t key[KEY_BYTES], vector *v);
/* Whether redis_put has returned 1. */
int redis_is_distrusted(redis *r);

#endif
