/* limits.c - the highest rates of this machine, measured; see limits.h.
 *
 * Arithmetic: each thread repeats one instruction, or the two or three that stand for it, on 12
 * registers, which covers a latency of 4 to 6 cycles on two units; a multiply-add counts as two
 * operations. The tile unit: products of the same
 * tiles into four sums; no sum has to wait for another. Reading: the layers' weights in the file's
 * map, which are far larger than the caches. */
#include "limits.h"

#include "measure.h"

#include "backends/cpu/cpu.h"

#include <string.h>

#if defined(__x86_64__) || defined(AMX_EMULATE)
#define HAVE_TILES
#include "backends/cpu/amx.h"
#endif

enum { LOOPS = 1000000, REGISTERS = 12 };

#if defined(__x86_64__)
#include <cpuid.h>

#define TWELVE(f)     f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#define ZERO(r)       "vpxor %%xmm" #r ",%%xmm" #r ",%%xmm" #r "\n"
#define FMA256(r)     "vfmadd231ps %%ymm12,%%ymm12,%%ymm" #r "\n"
#define FMA512(r)     "vfmadd231ps %%zmm12,%%zmm12,%%zmm" #r "\n"
#define BF16_512(r)   "vdpbf16ps %%zmm12,%%zmm12,%%zmm" #r "\n"
#define INT16_512(r)  "vpdpwssd %%zmm12,%%zmm12,%%zmm" #r "\n"
#define INT8_512(r)   "vpdpbusd %%zmm12,%%zmm12,%%zmm" #r "\n"
#define CONVERT256(r) "vcvtph2ps %%xmm12,%%ymm" #r "\n"
#define CONVERT512(r) "vcvtph2ps %%ymm12,%%zmm" #r "\n"
/* 256 bits: AVX2 has no sum in the instruction, AVX-VNNI has (VEX, to be told from AVX-512's) */
#define MADD_256(r)                                                                                \
    "vpmaddwd %%ymm12,%%ymm12,%%ymm13\n"                                                           \
    "vpaddd %%ymm13,%%ymm" #r ",%%ymm" #r "\n"
#define MADDUBS_256(r)                                                                             \
    "vpmaddubsw %%ymm12,%%ymm12,%%ymm13\n"                                                         \
    "vpmaddwd %%ymm12,%%ymm13,%%ymm13\n"                                                           \
    "vpaddd %%ymm13,%%ymm" #r ",%%ymm" #r "\n"
#define INT16_256(r) "%{vex%} vpdpwssd %%ymm12,%%ymm12,%%ymm" #r "\n"
#define INT8_256(r)  "%{vex%} vpdpbusd %%ymm12,%%ymm12,%%ymm" #r "\n"

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
                  "xmm9", "xmm10", "xmm11", "xmm12", "xmm13");                                     \
        }                                                                                          \
    }
LOOP(fma256, FMA256)
LOOP(fma512, FMA512)
LOOP(bf16_512, BF16_512)
LOOP(int16_512, INT16_512)
LOOP(int8_512, INT8_512)
LOOP(madd_256, MADD_256)
LOOP(maddubs_256, MADDUBS_256)
LOOP(int16_256, INT16_256)
LOOP(int8_256, INT8_256)
LOOP(convert256, CONVERT256)
LOOP(convert512, CONVERT512)

#endif

/* ---- the tile unit --------------------------------------------------------------------------- */

#ifdef HAVE_TILES
#ifdef AMX_EMULATE /* a product takes some 10 us instead of 10 ns */
enum { TILE_LOOPS = 4, PROBE_LOOPS = 1 };
static int has_amx_int8(void) { return 1; }
#else
enum {
    TILE_LOOPS = 50000,
    PROBE_LOOPS = 200
}; /* of the probe: 16 cycles a product, 6 us at 2 GHz */
static int has_amx_int8(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 25 & 1;
}
#endif

/* Each loop has 4 products of 16 x 16 sums, in bf16 of 32 products each, in int8 of 64. */
#define TILES(name, product)                                                                       \
    static void name(int loops) {                                                                  \
        const amx_config whole = amx_whole_tiles();                                                \
        tile_config(&whole);                                                                       \
        tile_zero(4), tile_zero(5), tile_zero(6), tile_zero(7);                                    \
        for (int i = 0; i < loops; i++)                                                            \
            product(0, 4, 6), product(1, 4, 7), product(2, 5, 6), product(3, 5, 7);                \
        tile_release();                                                                            \
    }
TILES(tiles_bf16, tile_dp_bf16)
TILES(tiles_int8, tile_dp_int8)

static void tile_bf16(void *arg, int round) {
    (void)arg, (void)round;
#pragma omp parallel num_threads(measure_threads())
    tiles_bf16(TILE_LOOPS);
}

static void tile_int8(void *arg, int round) {
    (void)arg, (void)round;
#pragma omp parallel num_threads(measure_threads())
    tiles_int8(TILE_LOOPS);
}

static void probe_tiles(void) { tiles_bf16(PROBE_LOOPS); }
#endif

void (*limits_probe(void))(void) {
#ifdef HAVE_TILES
    if (!amx_open()) return probe_tiles;
#endif
    return NULL;
}

/* ---- which limit is whose -------------------------------------------------------------------- */

enum {
    FMA_256,
    FMA_512,
    BF16,
    INT16,
    INT8,
    MADD,
    MADDUBS,
    VNNI_INT16,
    VNNI_INT8,
    TILE_BF16,
    TILE_INT8,
    CONVERT_256,
    CONVERT_512,
    READ,
    N_LIMITS
};
static limit limits[N_LIMITS] = {[FMA_256] = {"fma 256", "GFLOP/s", 0},
                                 [FMA_512] = {"fma 512", "GFLOP/s", 0},
                                 [BF16] = {"vdpbf16ps", "GFLOP/s", 0},
                                 [INT16] = {"vpdpwssd", "GOP/s", 0},
                                 [INT8] = {"vpdpbusd", "GOP/s", 0},
                                 [MADD] = {"vpmaddwd 256", "GOP/s", 0},
                                 [MADDUBS] = {"vpmaddubsw 256", "GOP/s", 0},
                                 [VNNI_INT16] = {"vpdpwssd 256", "GOP/s", 0},
                                 [VNNI_INT8] = {"vpdpbusd 256", "GOP/s", 0},
                                 [TILE_BF16] = {"tdpbf16ps", "GFLOP/s", 0},
                                 [TILE_INT8] = {"tdpbssd", "GOP/s", 0},
                                 [CONVERT_256] = {"vcvtph2ps 256", "Gnumbers/s", 0},
                                 [CONVERT_512] = {"vcvtph2ps 512", "Gnumbers/s", 0},
                                 [READ] = {"read", "GB/s", 0}};

/* A table on the tile unit makes a product of several tile products, one for each pair of a part of
 * x and a part of W (backends/cpu/amx.c). limits_measure chooses by the weights of the file: those
 * that bfloat16 holds exactly are one part. */
static const struct {
    int exact, others;
} tile_products[] = {[QEMB_MATH_F32] = {3, 5},
                     [QEMB_MATH_BF16] = {1, 1},
                     [QEMB_MATH_INT16] = {2, 3},
                     [QEMB_MATH_INT8] = {1, 1}};
static limit tile_limits[QEMB_MATH_INT8 + 1];

static int starts(const char *s, const char *with) { return !strncmp(s, with, strlen(with)); }

const limit *limit_of(const qemb_ops *t) {
    static const int avx512[] = {FMA_512, BF16, INT16, INT8},
                     avx2[] = {FMA_256, BF16, MADD, MADDUBS},
                     avx_vnni[] = {FMA_256, BF16, VNNI_INT16, VNNI_INT8};
    if (starts(t->name, "amx")) return &tile_limits[t->math];
    if (t->math == QEMB_MATH_F32) return limit_of_library(t->math);
    const int *of_math = starts(t->name, "avx2")      ? avx2
                         : starts(t->name, "avxvnni") ? avx_vnni
                                                      : avx512;
    return &limits[of_math[t->math]];
}

const limit *limit_of_library(qemb_math math) {
    static const int units[][4] = {[QEMB_MATH_F32] = {FMA_256, FMA_512, FMA_512, FMA_512},
                                   [QEMB_MATH_BF16] = {BF16, TILE_BF16, TILE_BF16, TILE_BF16},
                                   [QEMB_MATH_INT16] = {MADD, VNNI_INT16, INT16, INT16},
                                   [QEMB_MATH_INT8] = {MADDUBS, VNNI_INT8, INT8, TILE_INT8}};
    const limit *best = &limits[units[math][0]];
    for (int i = 1; i < 4; i++)
        if (limits[units[math][i]].rate > best->rate) best = &limits[units[math][i]];
    return best;
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

static void one(int which, void (*run)(void *, int), void *arg, double work) {
    const quantiles t = measure(run, arg);
    limit *l = &limits[which];
    l->rate = work / t.p10; /* the p90 of rates: other programs on the machine do not lower it */
    row("limits", l->name, measure_threads(), t, work, 1e9, l->unit, NULL);
}

/* Whether bfloat16 holds all weights of the layers: at most 8 significant bits each. The bytes of
 * an INT8 file have 7, and their scale comes after the product. */
static int bfloat16_holds(const qemb_file *f) {
    for (int l = 0; l < f->config.n_layers; l++) {
        qemb_layer layer = f->weights.layers[l];
        qemb_mat *all[QEMB_LAYER_MATRICES];
        qemb_layer_matrices(&layer, all);
        for (int m = 0; m < QEMB_LAYER_MATRICES; m++)
            if (qemb_mat_bits(all[m]) == QEMB_BITS_11) return 0;
    }
    return 1;
}

static void measure_tiles(const qemb_file *f) {
#ifdef HAVE_TILES
    static const char *const names[] = {NULL, "tdpbf16ps",    "tdpbf16ps / 2", "tdpbf16ps / 3",
                                        NULL, "tdpbf16ps / 5"};
    if (amx_open()) return;
    const double n = 4.0 * TILE_LOOPS * measure_threads(), sums = 2 * 16 * 16;
    one(TILE_BF16, tile_bf16, NULL, 32 * sums * n);
    if (has_amx_int8()) one(TILE_INT8, tile_int8, NULL, 64 * sums * n);
    const int exact = bfloat16_holds(f);
    for (int m = 0; m <= QEMB_MATH_INT8; m++) {
        const int products = exact ? tile_products[m].exact : tile_products[m].others;
        tile_limits[m] = (limit){names[products], "GFLOP/s", limits[TILE_BF16].rate / products};
    }
#else
    (void)f;
#endif
}

void limits_measure_read(const void *p, size_t bytes) {
    reading r = {p, (long)(bytes / 4096)};
    one(READ, read_blocks, &r, 4096.0 * (double)r.blocks);
}

void limits_measure(const qemb_file *f) {
    const uint8_t *layers = f->weights.layers[0].wqkv.data;
    const size_t behind = f->map_bytes - (size_t)(layers - f->map);
    limits_measure_read(layers, behind < 1000000000 ? behind : 1000000000);
#if defined(__x86_64__)
    const double n = (double)LOOPS * REGISTERS * measure_threads();
    if (__builtin_cpu_supports("fma")) one(FMA_256, fma256, NULL, 16 * n);
    if (__builtin_cpu_supports("avx512f")) one(FMA_512, fma512, NULL, 32 * n);
    if (__builtin_cpu_supports("avx512bf16")) one(BF16, bf16_512, NULL, 64 * n);
    if (__builtin_cpu_supports("avx512vnni")) one(INT16, int16_512, NULL, 64 * n);
    if (__builtin_cpu_supports("avx512vnni")) one(INT8, int8_512, NULL, 128 * n);
    if (__builtin_cpu_supports("avx2")) one(MADD, madd_256, NULL, 32 * n);
    if (__builtin_cpu_supports("avx2")) one(MADDUBS, maddubs_256, NULL, 64 * n);
    if (cpu_features() & CPU_AVX_VNNI) one(VNNI_INT16, int16_256, NULL, 32 * n);
    if (cpu_features() & CPU_AVX_VNNI) one(VNNI_INT8, int8_256, NULL, 64 * n);
    if (__builtin_cpu_supports("avx512f"))
        one(CONVERT_512, convert512, NULL, 16 * n);
    else if (__builtin_cpu_supports("avx2")) /* every CPU with AVX2 has F16C */
        one(CONVERT_256, convert256, NULL, 8 * n);
#endif
    measure_tiles(f);
}
