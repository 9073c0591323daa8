/* vector.h - a vector, shared by the requests and caches that hold it. */
#ifndef QEMB_VECTOR_H
#define QEMB_VECTOR_H

#include <stdatomic.h>

/* A text's vector as qemb_embed gave it, before cut and L2: good for every dimension. Shared by
 * reference, never changed. */
typedef struct {
    atomic_int refs;
    int n;
    float v[]; /* (n) */
} vector;

vector *vector_new(const float *v, int n); /* one reference, the caller's. NULL: out of memory */
vector *vector_take(vector *v);            /* one more */
void vector_drop(vector *v);               /* one less; v may be NULL */

#endif
