/* ranking.c - a reranker's logits -> documents in their order; see ranking.h. */
#include "ranking.h"

#include <math.h>
#include <stdlib.h>

float ranking_score(float logit) { return (float)(1 / (1 + exp(-(double)logit))); }

static int compare(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->logit != y->logit) return x->logit < y->logit ? 1 : -1;
    return x->index > y->index ? 1 : -1;
}

void ranking_sort(ranked *r, size_t n) { qsort(r, n, sizeof *r, compare); }
