/* exp_avx512.c - avx512.h's exp as a function, for test_simd.c. */
#include "backends/cpu/avx512.h"

#include "exp.h"

#if defined(__x86_64__)
AVX512 void avx512_exp(float *y, const float *x, int n) {
    for (int i = 0; i < n; i += 16) store_first(y + i, exp16(load_first(x + i, n - i)), n - i);
}
#endif
