/* amx_emulation.h - the tile instructions of backends/cpu/amx.h in plain C, with the bits of the
 * hardware.
 *
 * TDPBF16PS, as measured on a Xeon (7 million results, edge cases included, none differs): numbers
 * below 2^-126 count as 0 with their sign, in a, b, c and every intermediate result. Rounding is to
 * nearest even whatever MXCSR says. In one instruction the products of even k are added from +0 by
 * fused multiply-adds in the order of k, those of odd k likewise, the two sums are added, and that
 * is added to c. So 32 columns cost c one rounding. A NaN's payload is not modelled.
 */
#ifndef AMX_EMULATION_H
#define AMX_EMULATION_H

#include <math.h>

typedef union {
    uint8_t bytes[16][64];
    int8_t s8[16][64];
    uint16_t bf16[16][32];
    int32_t s32[16][16];
    uint32_t pairs[16][16]; /* of bfloat16 */
    float f32[16][16];
} emulated_tile;

static _Thread_local struct {
    amx_config config;
    emulated_tile t[8];
} emulated;

/* A product touches only the tiles above; with sanitizers it would take several times as long. */
#define UNCHECKED __attribute__((no_sanitize("address", "undefined")))

static inline const char *amx_open(void) { return NULL; }

static inline void tile_config(const amx_config *c) {
    emulated.config = *c;
    memset(emulated.t, 0, sizeof emulated.t);
}
/* A product without a configuration is an illegal instruction: rows of 0 bytes here, so it leaves
 * zeros, and results are wrong. */
static inline void tile_release(void) { memset(&emulated, 0, sizeof emulated); }

static inline void tile_stream(int t, const void *p, long stride) {
    memset(&emulated.t[t], 0, sizeof emulated.t[t]);
    for (int i = 0; i < emulated.config.rows[t]; i++)
        memcpy(emulated.t[t].bytes[i], (const uint8_t *)p + i * stride,
               emulated.config.row_bytes[t]);
}
static inline void tile_store(int t, void *p, long stride) {
    for (int i = 0; i < emulated.config.rows[t]; i++)
        memcpy((uint8_t *)p + i * stride, emulated.t[t].bytes[i], emulated.config.row_bytes[t]);
}
static inline void tile_zero(int t) { memset(&emulated.t[t], 0, sizeof emulated.t[t]); }

/* Numbers below 2^-126 become 0 of the same sign. */
UNCHECKED static inline float emulated_flush(float v) {
    return fabsf(v) < 0x1p-126f ? copysignf(0, v) : v;
}

UNCHECKED static inline float emulated_bf16(uint16_t b) {
    const uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return emulated_flush(f);
}

/* a b + c. The hardware flushes a result that would be below 2^-126 if exponents had no lower
 * limit: also one that rounds up to 2^-126 only because floats are 2^-149 apart there. */
UNCHECKED static inline float emulated_fma(float a, float b, float c) {
    const float r = fmaf(a, b, c);
    if (fabsf(r) == 0x1p-126f && fabs((double)a * b + c) < 0x1p-126 - 0x1p-151)
        return copysignf(0, r);
    return emulated_flush(r);
}

/* The exponent of the smallest number other than 0 of a tile, biased by 127; 255 if all are 0. */
UNCHECKED static inline int emulated_lowest(const emulated_tile *t) {
    uint16_t lowest = 255 << 7;
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 32; k++) { /* 0 becomes the largest */
            const uint16_t below = (uint16_t)((t->bf16[i][k] & 0x7fff) - 1);
            lowest = below < lowest ? below : lowest;
        }
    return lowest >> 7;
}

/* The sums of row a for `cols` columns; with `tiny`, flushes. A number of columns that the compiler
 * does not know makes it use vectors. */
UNCHECKED static inline __attribute__((always_inline)) void
emulated_row(float sum[16], const uint16_t *a, float b[16][2][16], int pairs, int cols, int tiny) {
    float even[16] = {0}, odd[16] = {0};
    for (int k = 0; k < pairs; k++) {
        const float a0 = emulated_bf16(a[2 * k]), a1 = emulated_bf16(a[2 * k + 1]);
        for (int n = 0; n < cols; n++) {
            even[n] = tiny ? emulated_fma(a0, b[k][0][n], even[n]) : fmaf(a0, b[k][0][n], even[n]);
            odd[n] = tiny ? emulated_fma(a1, b[k][1][n], odd[n]) : fmaf(a1, b[k][1][n], odd[n]);
        }
    }
    for (int n = 0; n < cols; n++) sum[n] = emulated_flush(even[n] + odd[n]);
}

UNCHECKED static inline int emulated_is_zero(const uint16_t row[32]) {
    uint16_t any = 0;
    for (int k = 0; k < 32; k++) any |= row[k];
    return !(any & 0x7fff);
}

UNCHECKED static inline int emulated_is_finite(const emulated_tile *t) {
    int finite = 1;
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 32; k++) finite &= (t->bf16[i][k] & 0x7f80) != 0x7f80;
    return finite;
}

/* Two shortcuts change no bit. If the smallest factors give products that are multiples of 2^-126,
 * so are all sums, and nothing has to be flushed: a factor of exponent e is a multiple of 2^(e-7).
 * And a row of zeros adds 0, unless the other factor is not finite. */
UNCHECKED static inline __attribute__((always_inline)) void emulated_product(int c, int a, int b) {
    const int rows = emulated.config.rows[c], cols = emulated.config.row_bytes[c] / 4;
    const int pairs = emulated.config.row_bytes[a] / 4;
    const emulated_tile *x = &emulated.t[a], *w = &emulated.t[b];
    emulated_tile *to = &emulated.t[c];
    const int tiny = emulated_lowest(x) + emulated_lowest(w) - 2 * (127 + 7) < -126;
    const int finite = emulated_is_finite(w);
    uint32_t bits[16][2][16];
    float factors[16][2][16], sum[16];
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 16; n++) {
            const uint32_t pair = w->pairs[k][n];
            const uint32_t even = pair << 16, odd = pair & 0xffff0000;
            bits[k][0][n] = even & ((even & 0x7f800000) ? 0xffffffff : 0x80000000);
            bits[k][1][n] = odd & ((odd & 0x7f800000) ? 0xffffffff : 0x80000000);
        }
    memcpy(factors, bits, sizeof factors);
    for (int i = 0; i < rows; i++) {
        if (finite && emulated_is_zero(x->bf16[i]))
            memset(sum, 0, sizeof sum);
        else if (tiny)
            emulated_row(sum, x->bf16[i], factors, pairs, cols, 1);
        else
            emulated_row(sum, x->bf16[i], factors, pairs, cols, 0);
        for (int n = 0; n < cols; n++)
            to->f32[i][n] = emulated_flush(emulated_flush(to->f32[i][n]) + sum[n]);
    }
    for (int i = rows; i < 16; i++) memset(to->bytes[i], 0, 64);
}

#if defined(__x86_64__) /* fmaf in a register where there is one: 20 times as fast */
UNCHECKED __attribute__((target("avx2,fma"))) static void emulated_product_fma(int c, int a,
                                                                               int b) {
    emulated_product(c, a, b);
}
#endif

UNCHECKED static inline void tile_dp_bf16(int c, int a, int b) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        emulated_product_fma(c, a, b);
        return;
    }
#endif
    emulated_product(c, a, b);
}

/* TDPBSSD: sums wrap. */
static inline void tile_dp_int8(int c, int a, int b) {
    for (int i = 0; i < emulated.config.rows[c]; i++)
        for (int k = 0; k < 64; k++)
            for (int n = 0; n < 16; n++)
                emulated.t[c].s32[i][n] =
                    (int32_t)((uint32_t)emulated.t[c].s32[i][n] +
                              (uint32_t)(emulated.t[a].s8[i][k] *
                                         emulated.t[b].s8[k / 4][4 * n + k % 4]));
}

#endif
