/* dispatch.c - the tables that this machine's CPU can run, and the choice among them. */
#include "cpu.h"

#include <string.h>

#if defined(__x86_64__)

#include "amx.h"

#include <cpuid.h>

/* The builtins know which registers the system saves. Not every compiler's know F16C (bit 29 of ECX
 * in leaf 1), AVX-VNNI and BF16 (bits 4 and 5 of EAX in leaf 7, 1); these use the registers of AVX2
 * and AVX-512. */
unsigned cpu_features(void) {
    unsigned eax, ebx, ecx, edx, found = 0;
    if (__builtin_cpu_is("intel")) found |= CPU_INTEL;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx >> 29 & 1)
        found |= CPU_AVX2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("bmi2"))
        found |= CPU_AVX512;
    if (__builtin_cpu_supports("avx512vnni")) found |= CPU_AVX512_VNNI;
    if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
        if (eax >> 4 & 1) found |= CPU_AVX_VNNI;
        if (eax >> 5 & 1) found |= CPU_AVX512_BF16;
    }
    if (!amx_open()) found |= CPU_AMX;
    return found;
}

#else

unsigned cpu_features(void) { return 0; }

#endif

/* The second number of a row is its speed on AMD's and other CPUs, the third on Intel's. Only the
 * ratios within a column count.
 *
 * AMD: tokens/s of the forward of the 0.6B's shape, texts of 64 tokens, 2 threads, Zen 4
 * (docs/benchmarks.md; avx2: docs/speed-log.md, in the row of int16 with AVX2). As measured on Zen
 * 3, plain has 0.28 of avx2 and avx2-int16 1.5 times; avx2-int8 had as much, and its products are
 * 1.2 to 1.3 times as fast now. AVX-VNNI: 1.8 and 3.2 times avx2, as measured on Zen 5.
 *
 * Intel: billions of multiply-adds per second of one thread of a Sapphire Rapids or Emerald Rapids,
 * many rows. Its vdpbf16ps has half the rate of its FMA in float, so without tiles int16 serves
 * bf16. avx2 has half the width of avx512, and plain the same share of avx2 as on Zen 3; both were
 * not timed. Tiles: amx.c's loops in a program of their own, weights of 8 bits (others: 108, 195,
 * 499, 459). bf16 is faster than int8, which has to make bfloat16 of its bytes, so it serves int8.
 * No AMD CPU has tiles: the first column has Intel's ratios to avx512.
 *
 * The tables for bfloat16 need VNNI, since their attention multiplies 16-bit integers. */
enum { TILES = CPU_AVX512 | CPU_AVX512_VNNI | CPU_AMX };
const cpu_table cpu_tables[] = {
    {&qemb_cpu_ops, 0, {62, 10}},
#if defined(__x86_64__)
    {&avx2_ops, CPU_AVX2, {225, 36}},
    {&avx2_int16_ops, CPU_AVX2, {337, 54}},
    {&avx2_int8_ops, CPU_AVX2, {420, 67}},
    {&avxvnni_int16_ops, CPU_AVX2 | CPU_AVX_VNNI, {405, 72}},
    {&avxvnni_int8_ops, CPU_AVX2 | CPU_AVX_VNNI, {720, 144}},
    {&avx512_ops, CPU_AVX512, {245, 72}},
    {&avx512_bf16_ops, CPU_AVX512 | CPU_AVX512_VNNI | CPU_AVX512_BF16, {454, 37}},
    {&avx512_int16_ops, CPU_AVX512 | CPU_AVX512_VNNI, {452, 140}},
    {&avx512_int8_ops, CPU_AVX512 | CPU_AVX512_VNNI, {806, 250}},
    {&amx_ops, TILES, {840, 247}},
    {&amx_int16_ops, TILES, {1211, 356}},
    {&amx_int8_ops, TILES, {1562, 459}},
    {&amx_bf16_ops, TILES, {1698, 499}},
#endif
};
const int n_cpu_tables = sizeof cpu_tables / sizeof *cpu_tables;

/* The largest relative L2 error of an F16 file's vectors, by any table (docs/accuracy.md).
 * Arithmetics that only GPUs have are 0, which is less than any table's. */
static const float errors[] = {
    [QEMB_MATH_F32] = 2.7e-6f,  [QEMB_MATH_INT16] = 2.4e-4f, [QEMB_MATH_BF16] = 6.2e-3f,
    [QEMB_MATH_INT8] = 5.4e-2f, [QEMB_MATH_FP8] = 0,         [QEMB_MATH_F16] = 0};

static int runs(const cpu_table *t, unsigned features) { return (t->needs & features) == t->needs; }

/* Names are those of the instructions, and for other arithmetic than float, with that:
 * avx512-bf16. The instructions alone name all their tables. */
static int is_named(const qemb_ops *ops, const char *name) {
    const size_t n = strlen(name);
    return !strcmp(ops->name, name) || (!strncmp(ops->name, name, n) && ops->name[n] == '-');
}

const qemb_ops *cpu_choose(unsigned features, const char *name, qemb_math math) {
    const int kind = (features & CPU_INTEL) != 0;
    const cpu_table *found = NULL;
    for (const cpu_table *t = cpu_tables; t < cpu_tables + n_cpu_tables; t++)
        if (runs(t, features) && (!name || is_named(t->ops, name)) &&
            errors[t->ops->math] <= errors[math] && (!found || t->speed[kind] > found->speed[kind]))
            found = t;
    return found ? found->ops : NULL;
}

const qemb_ops *qemb_cpu_choose(const char *name, qemb_math math) {
    return cpu_choose(cpu_features(), name, math);
}

const qemb_ops *qemb_cpu_table(int i) {
    const unsigned features = cpu_features();
    for (int k = 0; i >= 0 && k < n_cpu_tables; k++)
        if (runs(&cpu_tables[k], features) && !i--) return cpu_tables[k].ops;
    return NULL;
}

const qemb_ops *qemb_cpu_mapped(void) {
    const qemb_ops *found = NULL;
    for (int i = 0; qemb_cpu_table(i); i++)
        if (qemb_cpu_table(i)->math == QEMB_MATH_F32 && !qemb_cpu_table(i)->repacked_bytes)
            found = qemb_cpu_table(i);
    return found;
}
