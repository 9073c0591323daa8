/* redis.h - vectors by key, in a Redis that several servers share. */
#ifndef QEMB_REDIS_H
#define QEMB_REDIS_H

#include "queue.h"

typedef struct redis redis; /* for all threads */

/* address is HOST:PORT; NULL if it is not. Connects when it is asked, not before. timeout_ms: for a
 * connection, and for an answer. */
redis *redis_new(const char *address, int timeout_ms, metrics *m);
void redis_free(redis *r); /* r may be NULL */
/* Vectors of dim numbers into those texts of t that have a text and whose key is there. Returns how
 * many; takes two timeouts at most, nothing while a failure is fresh. */
int redis_get(redis *r, pending_request *t, int dim);
void redis_put(redis *r, const uint8_t key[KEY_BYTES], vector *v); /* does not wait */

#endif
