/* exp.h - the SIMD tables' exp, for tests. Each function needs a CPU that its table runs on. */
#ifndef TEST_EXP_H
#define TEST_EXP_H

/* y (n) = exp(x). Error at most 1 ulp. x above ln FLT_MAX gives Inf, below ln FLT_MIN 0, NaN
 * NaN. */
void avx2_exp(float *y, const float *x, int n);
void avx512_exp(float *y, const float *x, int n);

#endif
