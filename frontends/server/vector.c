/* vector.c - a vector, shared by the requests and caches that hold it; see vector.h. */
#include "vector.h"

#include <stdlib.h>
#include <string.h>

vector *vector_new(const float *v, int n) {
    vector *x = malloc(sizeof *x + (size_t)n * sizeof *x->v);
    if (!x) return NULL;
    atomic_init(&x->refs, 1);
    x->n = n;
    memcpy(x->v, v, (size_t)n * sizeof *x->v);
    return x;
}

vector *vector_take(vector *v) {
    atomic_fetch_add_explicit(&v->refs, 1, memory_order_relaxed);
    return v;
}

void vector_drop(vector *v) {
    if (v && atomic_fetch_sub_explicit(&v->refs, 1, memory_order_acq_rel) == 1) free(v);
}
