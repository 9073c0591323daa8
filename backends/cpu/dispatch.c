/* dispatch.c - the tables that this machine's CPU can run, and the choice among them. */
#include "cpu.h"

#include <string.h>

#if defined(__x86_64__)

#include <cpuid.h>

/* The builtin knows whether the system saves the wide registers, but not of F16C in every compiler:
 * that is bit 29 of ECX in leaf 1. */
static int has_avx2(void) {
    unsigned eax, ebx, ecx = 0, edx;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx >> 29 & 1;
}

/* The builtin knows what the system saves of AVX-512's registers. Not every compiler's knows BF16:
 * bit 5 of EAX in leaf 7, 1. */
static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("bmi2");
}

static int has_avx512_vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

/* Attention of the table for bfloat16 multiplies 16-bit integers, with VNNI. */
static int has_avx512_bf16(void) {
    unsigned eax, ebx, ecx, edx;
    return has_avx512_vnni() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 5 & 1;
}

#endif

static int always(void) { return 1; }

/* Every table, and whether this CPU has its instructions. Of an arithmetic, the fastest is last. */
static const struct {
    const qemb_ops *ops;
    int (*runs)(void);
} tables[] = {
    {&qemb_cpu_ops, always},
#if defined(__x86_64__)
    {&avx2_ops, has_avx2},
    {&avx512_ops, has_avx512},
    {&avx512_bf16_ops, has_avx512_bf16},
    {&avx512_int16_ops, has_avx512_vnni},
    {&avx512_int8_ops, has_avx512_vnni},
#endif
};

const qemb_ops *qemb_cpu_table(int i) {
    for (size_t k = 0; i >= 0 && k < sizeof tables / sizeof *tables; k++)
        if (tables[k].runs() && !i--) return tables[k].ops;
    return NULL;
}

/* Names are those of the instructions, and for other arithmetic than float, with that:
 * avx512-bf16. */
static int is_named(const qemb_ops *ops, const char *name) {
    const size_t n = strlen(name);
    return !strcmp(ops->name, name) || (n && !strncmp(ops->name, name, n) && ops->name[n] == '-');
}

const qemb_ops *qemb_cpu_mapped(void) {
    const qemb_ops *found = NULL;
    for (int i = 0; qemb_cpu_table(i); i++)
        if (qemb_cpu_table(i)->math == QEMB_MATH_F32 && !qemb_cpu_table(i)->repacked_bytes)
            found = qemb_cpu_table(i);
    return found;
}

const qemb_ops *qemb_cpu_choose(const char *name, qemb_math math) {
    const qemb_ops *found = NULL;
    for (int i = 0; qemb_cpu_table(i); i++)
        if (qemb_cpu_table(i)->math == math && (!name || is_named(qemb_cpu_table(i), name)))
            found = qemb_cpu_table(i);
    return found;
}
