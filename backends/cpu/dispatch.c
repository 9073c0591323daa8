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

static int has_avx512_bf16(void) {
    unsigned eax, ebx, ecx, edx;
    return has_avx512() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 5 & 1;
}

static int has_avx512_vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

#endif

const qemb_ops *qemb_cpu_table(int i) {
    const qemb_ops *tables[6] = {&qemb_cpu_ops};
    int n = 1;
#if defined(__x86_64__)
    if (has_avx2()) tables[n++] = &avx2_ops;
    if (has_avx512()) tables[n++] = &avx512_ops;
    if (has_avx512_vnni() && has_avx512_bf16()) tables[n++] = &avx512_bf16_ops;
    if (has_avx512_vnni()) tables[n++] = &avx512_int16_ops, tables[n++] = &avx512_int8_ops;
#endif
    return i >= 0 && i < n ? tables[i] : NULL;
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
