/* vector.h - a vector, shared by the requests and caches that hold it. */
#ifndef QEMB_VECTOR_H
#define QEMB_VECTOR_H

#include <stdatomic.h>

/* A vector as qemb_embed returns it, not yet cut or normalized, so it serves every dimension; a
 * reranker's is one logit.
 * Counted by references, never changed. */
typedef struct {
    atomic_int refs;
    int n;
    float v[]; /* (n) */
} vector;

vector *vector_new(const float *v, int n); /* with one reference. NULL: out of memory */
vector *vector_take(vector *v);            /* adds a reference */
void vector_drop(vector *v);               /* drops one; v may be NULL */

#endif
