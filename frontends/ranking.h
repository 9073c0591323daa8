/* ranking.h - a reranker's logits -> documents in their order. */
#ifndef QEMB_RANKING_H
#define QEMB_RANKING_H

#include <stddef.h>

/* Logits are kept, not scores: from about 17 on the score of every logit is the float 1. */
typedef struct {
    size_t index; /* of the document in its list */
    float logit;  /* finite */
} ranked;

/* The probability of a logit, 0..1: that the document answers the query. */
float ranking_score(float logit);
/* Sorts by logit, the highest first; equal ones by index. */
void ranking_sort(ranked *r, size_t n);

#endif
