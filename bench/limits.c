/* limits.c - the highest rates of this machine, measured; see limits.h.
 *
 * Arithmetic: each thread repeats one instruction on 12 registers, which covers a latency of 4 to 6
 * cycles on two units; a multiply-add counts as two operations. Reading: the layers' weights in the
 * file's map, which are far larger than the caches. */
#include "limits.h"

#include "measure.h"

#include <string.h>

enum { LOOPS = 1000000, REGISTERS = 12 };

#if defined(__x86_64__)
#define TWELVE(f)     f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define ZERO(r)       "vpxor %%xmm" #r ",%%xmm" #r ",%%xmm" #r "\n"
#define FMA256(r)     "vfmadd231ps %%ymm12,%%ymm12,%%ymm" #r "\n"
#define FMA512(r)     "vfmadd231ps %%zmm12,%%zmm12,%%zmm" #r "\n"
#define BF16_512(r)   "vdpbf16ps %%zmm12,%%zmm12,%%zmm" #r "\n"
#define INT16_512(r)  "vpdpwssd %%zmm12,%%zmm12,%%zmm" #r "\n"
#define INT8_512(r)   "vpdpbusd %%zmm12,%%zmm12,%%zmm" #r "\n"
#define CONVERT256(r) "vcvtph2ps %%xmm12,%%ymm" #r "\n"
#define CONVERT512(r) "vcvtph2ps %%ymm12,%%zmm" #r "\n"

/* The loop is part of the assembly, since the compiler may use any register between two
 * statements. */
#define LOOP(name, instruction)                                                                    \
    static void name(void *arg, int round) {                                                       \
        (void)arg, (void)round;                                                                    \
        _Pragma("omp parallel num_threads(measure_threads())") {                                   \
            long n = LOOPS;                                                                        \
            __asm__ volatile(                                                                      \
                TWELVE(ZERO) ZERO(12) "1:\n" TWELVE(instruction) "dec %0\njnz 1b\nvzeroupper\n"    \
                : "+r"(n)                                                                          \
                :                                                                                  \
                : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",    \
                  "xmm9", "xmm10", "xmm11", "xmm12");                                              \
        }                                                                                          \
    }
LOOP(fma256, FMA256)
LOOP(fma512, FMA512)
LOOP(bf16_512, BF16_512)
LOOP(int16_512, INT16_512)
LOOP(int8_512, INT8_512)
LOOP(convert256, CONVERT256)
LOOP(convert512, CONVERT512)
#endif

enum { FMA_256, FMA_512, BF16, INT16, INT8, CONVERT_256, CONVERT_512, READ, N_LIMITS };
static limit limits[N_LIMITS] = {{"fma 256", 0},       {"fma 512", 0},  {"vdpbf16ps", 0},
                                 {"vpdpwssd", 0},      {"vpdpbusd", 0}, {"vcvtph2ps 256", 0},
                                 {"vcvtph2ps 512", 0}, {"read", 0}};

const limit *limit_of(qemb_math math) {
    if (math == QEMB_MATH_BF16) return &limits[BF16];
    if (math == QEMB_MATH_INT16) return &limits[INT16];
    if (math == QEMB_MATH_INT8) return &limits[INT8];
    return &limits[limits[FMA_512].rate > limits[FMA_256].rate ? FMA_512 : FMA_256];
}

const limit *limit_read(void) { return &limits[READ]; }

typedef struct {
    const uint64_t *p;
    long blocks; /* of 4 KiB */
} reading;

/* Adds up what it reads, so that no read can be optimized away. */
static void read_blocks(void *arg, int round) {
    const reading *r = arg;
    uint64_t sum = 0;
    (void)round;
#pragma omp parallel for num_threads(measure_threads()) reduction(+ : sum) schedule(static)
    for (long i = 0; i < r->blocks; i++)
        for (int k = 0; k < 512; k++) sum += r->p[i * 512 + k];
    static volatile uint64_t sink;
    sink = sum;
    (void)sink;
}

static void one(int which, void (*run)(void *, int), void *arg, double work, const char *unit) {
    const quantiles t = measure(run, arg);
    limits[which].rate =
        work / t.p10; /* the p90 of rates: other programs on the machine do not lower it */
    row("limits", limits[which].name, measure_threads(), t, work, 1e9, unit, "", 0);
}

void limits_measure(const qemb_file *f) {
    const uint8_t *layers = f->weights.layers[0].wqkv.data;
    const size_t behind = f->map_bytes - (size_t)(layers - f->map);
    reading r = {(const uint64_t *)layers,
                 (long)((behind < 1000000000 ? behind : 1000000000) / 4096)};
    one(READ, read_blocks, &r, 4096.0 * (double)r.blocks, "GB/s");
#if defined(__x86_64__)
    const double n = (double)LOOPS * REGISTERS * measure_threads();
    if (__builtin_cpu_supports("fma")) one(FMA_256, fma256, NULL, 16 * n, "GFLOP/s");
    if (__builtin_cpu_supports("avx512f")) one(FMA_512, fma512, NULL, 32 * n, "GFLOP/s");
    if (__builtin_cpu_supports("avx512bf16")) one(BF16, bf16_512, NULL, 64 * n, "GFLOP/s");
    if (__builtin_cpu_supports("avx512vnni")) one(INT16, int16_512, NULL, 64 * n, "GOP/s");
    if (__builtin_cpu_supports("avx512vnni")) one(INT8, int8_512, NULL, 128 * n, "GOP/s");
    if (__builtin_cpu_supports("avx512f"))
        one(CONVERT_512, convert512, NULL, 16 * n, "Gnumbers/s");
    else if (__builtin_cpu_supports("avx2")) /* every CPU with AVX2 has F16C */
        one(CONVERT_256, convert256, NULL, 8 * n, "Gnumbers/s");
#endif
}
