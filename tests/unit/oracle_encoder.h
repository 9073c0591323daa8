/* oracle_encoder.h - BERT's forward, and the formulas that only it has, in double precision; see
 * oracle.h. */
#ifndef ORACLE_ENCODER_H
#define ORACLE_ENCODER_H

#include "qemb.h"

/* y (n) = (x - mean x) / sqrt(mean (x - mean x)^2 + eps) * w + b; y may be x */
void oracle_layernorm(double *y, const double *x, const float *w, const float *b, int n,
                      double eps);
/* t Phi(t), Phi being the distribution function of the normal distribution */
double oracle_gelu(double t);
/* out (D) = the first row after the last layer, or the mean of all rows, neither cut nor scaled;
 * ids (n) with the tokens that are added to a text. */
void oracle_encode(double *out, const qemb_config *c, const qemb_weights *w, const int32_t *ids,
                   int n);

#endif
