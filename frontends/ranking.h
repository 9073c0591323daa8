/* ranking.h - a reranker's logits -> documents in their order. */
#ifndef QEMB_RANKING_H
#define QEMB_RANKING_H

#include <stddef.h>

typedef struct {
    size_t index; /* of the document in its list */
    float score;  /* the probability that the document answers the query, 0..1 */
} ranked;

/* The probability of the reranker's logit, a finite number: callers tell others as errors. */
float ranking_score(float logit);
/* Sorts by score, the highest first; equal scores by index. */
void ranking_sort(ranked *r, size_t n);

#endif
