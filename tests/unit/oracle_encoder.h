/* oracle_encoder.h - the formulas that only BERT's forward has, in double precision; see oracle.h. */
#ifndef ORACLE_ENCODER_H
#define ORACLE_ENCODER_H

/* y (n) = (x - mean x) / sqrt(mean (x - mean x)^2 + eps) * w + b; y may be x */
void oracle_layernorm(double *y, const double *x, const float *w, const float *b, int n,
                      double eps);
/* t Phi(t), Phi being the distribution function of the normal distribution */
double oracle_gelu(double t);

#endif
