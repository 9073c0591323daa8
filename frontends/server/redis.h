/* redis.h - a cache of vectors in Redis, shared by servers. Thread-safe. */
#ifndef QEMB_REDIS_H
#define QEMB_REDIS_H

#include "queue.h"

typedef struct redis redis;

/* Returns NULL if address is not HOST:PORT. Connects at the first use. timeout_ms bounds a connect
 * and a reply. */
redis *redis_new(const char *address, int timeout_ms, metrics *m);
void redis_free(redis *r); /* r may be NULL */
/* Sets the vectors (dim) of those texts of t that have a text and whose stored numbers are good.
 * Returns their number. Takes at most two timeouts; returns 0 at once in a pause. */
int redis_get(redis *r, pending_request *t, int dim, int (*is_good)(const float *v, int n));
void redis_put(redis *r, const uint8_t key[KEY_BYTES], vector *v); /* does not block */

#endif
