/* emulated_amx.c - backends/cpu/amx.c over emulated tile instructions; see emulated_amx.h. */
#include "emulated_amx.h"

#include "backends/cpu/packed_gemm.h"

#include <math.h>

/* Rows by AVX-512 where the CPU has it, else by AVX2. Without either, the plain table's ops take
 * the place of those that use them. */
static const cpu_kernels none = {.attention_rows = 1,
                                 .layernorm = cpu_layernorm_row,
                                 .add = cpu_add_row,
                                 .gelu = cpu_gelu_row};
#if defined(__x86_64__)
static int has_avx512(void) {
    static int found = -1; /* asking the CPU is slow in a virtual machine */
    if (found < 0) found = qemb_cpu_choose("avx512", QEMB_MATH_F32) != NULL;
    return found;
}
static int has_avx2(void) { return qemb_cpu_choose("avx2", QEMB_MATH_F32) != NULL; }
#define ROWS_OF(kernels)  (*(has_avx512() ? &(kernels) : has_avx2() ? &avx2_kernels : &none))
#define SWIGLU_OF(avx512) (has_avx512() ? (avx512) : swiglu)
#else
static int has_avx512(void) { return 0; }
static int has_avx2(void) { return 0; }
#define ROWS_OF(kernels)  none
#define SWIGLU_OF(avx512) swiglu
#endif

static void swiglu(float *h, size_t ldh, int rows, int cols, const float *sums) {
    for (int i = 0; i < rows; i++, h += ldh, sums += NR)
        for (int n = 0; n < cols; n++)
            h[n] = (float)(sums[n] / (1 + exp(-(double)sums[n])) * sums[16 + n]);
}

static void swiglu_f32(float *h, size_t ldh, int rows, int cols, const float *sums) {
    SWIGLU_OF(avx512_swiglu_f32)(h, ldh, rows, cols, sums);
}

static void swiglu_8bit(float *h, size_t ldh, int rows, int cols, const float *sums) {
    SWIGLU_OF(avx512_swiglu_8bit)(h, ldh, rows, cols, sums);
}

/* amx.c passes vectors of 64 bytes among its functions, which are all inlined. */
#pragma GCC diagnostic ignored "-Wpsabi"

#define AMX_EMULATE
#define amx_ops                     emulated_ops
#define amx_int16_ops               emulated_int16_ops
#define amx_bf16_ops                emulated_bf16_ops
#define amx_int8_ops                emulated_int8_ops
#define avx512_swiglu_f32           swiglu_f32
#define avx512_swiglu_8bit          swiglu_8bit
#define avx512_with_f32_attention   ROWS_OF(avx512_with_f32_attention)
#define avx512_with_int16_attention ROWS_OF(avx512_with_int16_attention)
extern const qemb_ops emulated_ops, emulated_int16_ops, emulated_bf16_ops, emulated_int8_ops;
#include "backends/cpu/amx.c"

const qemb_ops *emulated_amx_table(int i) {
    static const struct {
        const qemb_ops *ops;
        const char *name;
    } all[] = {{&emulated_ops, "emulated amx"},
               {&emulated_int16_ops, "emulated amx-int16"},
               {&emulated_bf16_ops, "emulated amx-bf16"},
               {&emulated_int8_ops, "emulated amx-int8"}};
    enum { N = sizeof all / sizeof *all };
    static qemb_ops tables[N];
    if (i < 0 || i >= N) return NULL;
    qemb_ops *t = &tables[i];
    if (t->name) return t;
    *t = *all[i].ops;
    if (!has_avx512() && !has_avx2()) {
        t->embed = qemb_cpu_ops.embed, t->rmsnorm = qemb_cpu_ops.rmsnorm;
        t->qknorm_rope = qemb_cpu_ops.qknorm_rope, t->attention = qemb_cpu_ops.attention;
        t->pool = qemb_cpu_ops.pool;
    }
    t->name = all[i].name;
    return t;
}

int emulated_amx_is_released(void) { return !emulated.config.palette; }

const qemb_ops *test_table(int i) {
    int n = 0;
    while (qemb_cpu_table(n)) n++;
    return i < n ? qemb_cpu_table(i) : emulated_amx_table(i - n);
}
