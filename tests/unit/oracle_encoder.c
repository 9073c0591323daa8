/* oracle_encoder.c - LayerNorm and GELU in plain loops and double precision. */
#include "oracle_encoder.h"

#include <math.h>

void oracle_layernorm(double *y, const double *x, const float *w, const float *b, int n,
                      double eps) {
    double mean = 0, variance = 0;
    for (int i = 0; i < n; i++) mean += x[i] / n;
    for (int i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean) / n;
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) / sqrt(variance + eps) * w[i] + b[i];
}

/* Phi(t) = (1 + erf(t / sqrt 2)) / 2. For t < 0 that sum cancels; erfc has what remains of it. */
double oracle_gelu(double t) {
    const double root = 0.70710678118654752440;
    return t < 0 ? t * (erfc(-t * root) / 2) : t * ((1 + erf(t * root)) / 2);
}
