/* exp_avx2.c - avx2.h's exp as a function, for test_simd.c. */
#include "backends/cpu/avx2.h"

#include "exp.h"

#if defined(__x86_64__)
AVX2 void avx2_exp(float *y, const float *x, int n) {
    for (int i = 0; i < n; i += 8) store_first(y + i, exp8(load_first(x + i, n - i)), n - i);
}
#endif
