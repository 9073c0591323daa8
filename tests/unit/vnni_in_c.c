/* vnni_in_c.c - the tables for AVX-VNNI with its two instructions in C, after the definitions in
 * Intel's manual, so that any CPU with AVX2 runs all of their code but these. For test_simd.c. */
#include "vnni_in_c.h"

#include <string.h>

#define avx2_int16_ops    in_c_unused_int16_ops
#define avx2_int8_ops     in_c_unused_int8_ops
#define avxvnni_int16_ops in_c_avxvnni_int16_ops
#define avxvnni_int8_ops  in_c_avxvnni_int8_ops

/* sum, x, w: 32 bytes. A sum wraps around. */
static void vpdpwssd(void *sum, const void *x, const void *w) {
    uint32_t s[8];
    int16_t a[16], b[16];
    memcpy(s, sum, 32), memcpy(a, x, 32), memcpy(b, w, 32);
    for (int i = 0; i < 16; i++) s[i / 2] += (uint32_t)(a[i] * b[i]);
    memcpy(sum, s, 32);
}

static void vpdpbusd(void *sum, const void *x, const void *w) {
    uint32_t s[8];
    uint8_t a[32];
    int8_t b[32];
    memcpy(s, sum, 32), memcpy(a, x, 32), memcpy(b, w, 32);
    for (int i = 0; i < 32; i++) s[i / 4] += (uint32_t)(a[i] * b[i]);
    memcpy(sum, s, 32);
}

#define VPDPWSSD(sum, x, w) vpdpwssd(&(sum), &(x), &(w))
#define VPDPBUSD(sum, x, w) vpdpbusd(&(sum), &(x), &(w))
#include "backends/cpu/avx2_integers.c"
