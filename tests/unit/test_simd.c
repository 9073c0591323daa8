/* test_simd.c - what only the CPU tables with vector instructions have. test_ops.c and test_model.c
 * test their ops, with those of all other tables. */
#include "emulated_amx.h"
#include "exp.h"
#include "oracle.h"
#include "support.h"
#include "vnni_in_c.h"

#include "backends/cpu/cpu.h"
#include "backends/cpu/dot_f16.h"
#if defined(__x86_64__)
#include "backends/cpu/amx.h"
#endif

#include <criterion/criterion.h>
#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

Test(simd, the_tables_of_this_machine) {
    cr_assert_eq(qemb_cpu_table(0), &qemb_cpu_ops);
    cr_assert_null(qemb_cpu_table(-1));
    int n = 0;
    for (const qemb_ops *op; (op = qemb_cpu_table(n)); n++) {
        char name[32];
        cr_assert_eq(qemb_cpu_choose(op->name, op->math), op);
        snprintf(name, sizeof name, "%s", op->name);
        name[strlen(name) - 1] = 0;
        cr_assert_null(qemb_cpu_choose(name, QEMB_MATH_INT8));
        for (int m = 0; m <= QEMB_MATH_F16; m++)
            cr_assert_eq(qemb_cpu_choose(op->name, (qemb_math)m),
                         cpu_choose(cpu_features(), op->name, (qemb_math)m));
    }
    cr_assert_null(qemb_cpu_table(n + 1));
    const qemb_ops *avx2 = qemb_cpu_choose("avx2", QEMB_MATH_F32);
    cr_assert_eq(qemb_cpu_mapped(), avx2 ? avx2 : &qemb_cpu_ops);
}

/* Place in the order of errors (docs/accuracy.md), least first. GPUs' arithmetics: before all. */
static int rank(qemb_math math) {
    static const int ranks[] = {[QEMB_MATH_F32] = 1,  [QEMB_MATH_INT16] = 2, [QEMB_MATH_BF16] = 3,
                                [QEMB_MATH_INT8] = 4, [QEMB_MATH_FP8] = 0,   [QEMB_MATH_F16] = 0};
    return ranks[math];
}

/* Whether a CPU with these features may be given t for this name and arithmetic. */
static int allowed(const cpu_table *t, unsigned features, const char *name, qemb_math math) {
    const size_t n = name ? strlen(name) : 0;
    const char *of = t->ops->name;
    const int named = !name || (!strncmp(of, name, n) && (!of[n] || of[n] == '-'));
    return named && !(t->needs & ~features) && rank(t->ops->math) <= rank(math);
}

static void check_choice(unsigned features, const char *name, qemb_math math) {
    const qemb_ops *got = cpu_choose(features, name, math);
    const cpu_table *chosen = NULL;
    const int kind = features & CPU_INTEL ? 1 : 0;
    for (int i = 0; i < n_cpu_tables; i++)
        if (cpu_tables[i].ops == got) chosen = &cpu_tables[i];
    cr_assert_eq(!got, !chosen);
    cr_assert(!chosen || allowed(chosen, features, name, math), "features %x: %s serves math %d",
              features, got->name, math);
    for (int i = 0; i < n_cpu_tables; i++)
        if (allowed(&cpu_tables[i], features, name, math))
            cr_assert(chosen && cpu_tables[i].speed[kind] <= chosen->speed[kind],
                      "features %x, math %d: %s is faster than what was chosen", features, math,
                      cpu_tables[i].ops->name);
}

/* On every CPU that could be, for every name and arithmetic: the table is one that the CPU can run,
 * has no larger error than was accepted, and no other such table is faster. */
Test(simd, the_choice_on_every_cpu) {
    unsigned all = CPU_INTEL;
    for (int i = 0; i < n_cpu_tables; i++) all |= cpu_tables[i].needs;
    for (unsigned features = 0; features <= all; features++) {
        if (features & ~all) continue;
        for (int m = 0; m <= QEMB_MATH_F16; m++) {
            check_choice(features, NULL, (qemb_math)m);
            check_choice(features, "", (qemb_math)m);
            check_choice(features, "mmx", (qemb_math)m);
            for (int i = 0; i < n_cpu_tables; i++) {
                const char *name = cpu_tables[i].ops->name;
                char instructions[32];
                snprintf(instructions, sizeof instructions, "%.*s", (int)strcspn(name, "-"), name);
                check_choice(features, name, (qemb_math)m);
                check_choice(features, instructions, (qemb_math)m);
            }
        }
    }
}

/* bench takes the last table of an arithmetic for its fastest one. */
Test(simd, the_fastest_of_an_arithmetic_is_last) {
    for (int i = 0; i < n_cpu_tables; i++)
        for (int k = 0; k < i; k++)
            for (int kind = 0; kind < 2; kind++)
                cr_assert(cpu_tables[i].ops->math != cpu_tables[k].ops->math ||
                              cpu_tables[i].speed[kind] > cpu_tables[k].speed[kind],
                          "%s after %s", cpu_tables[i].ops->name, cpu_tables[k].ops->name);
}

#if defined(__x86_64__)
/* What known CPUs get for f32, int16, bf16 and int8. */
Test(simd, the_choice_on_known_cpus) {
    enum {
        AVX512 = CPU_AVX2 | CPU_AVX512,
        VNNI = AVX512 | CPU_AVX512_VNNI,
        TILES = CPU_INTEL | VNNI | CPU_AVX512_BF16 | CPU_AMX
    };
    static const qemb_math maths[] = {QEMB_MATH_F32, QEMB_MATH_INT16, QEMB_MATH_BF16,
                                      QEMB_MATH_INT8};
    static const struct {
        const char *cpu;
        unsigned features;
        const char *name, *want[4]; /* NULL: none */
    } known[] = {
        {"no AVX2", 0, NULL, {"plain", "plain", "plain", "plain"}},
        {"Zen 3", CPU_AVX2, NULL, {"avx2", "avx2-int16", "avx2-int16", "avx2-int8"}},
        {"Zen 3", CPU_AVX2, "avx2-int16", {NULL, "avx2-int16", "avx2-int16", "avx2-int16"}},
        {"Zen 3", CPU_AVX2, "plain", {"plain", "plain", "plain", "plain"}},
        {"Zen 3", CPU_AVX2, "avx512", {NULL}},
        {"Zen 4",
         VNNI | CPU_AVX512_BF16,
         NULL,
         {"avx512", "avx512-int16", "avx512-bf16", "avx512-int8"}},
        {"Zen 4",
         VNNI | CPU_AVX512_BF16,
         "avx2",
         {"avx2", "avx2-int16", "avx2-int16", "avx2-int8"}},
        {"Zen 5",
         VNNI | CPU_AVX512_BF16 | CPU_AVX_VNNI,
         NULL,
         {"avx512", "avx512-int16", "avx512-bf16", "avx512-int8"}},
        {"Alder Lake",
         CPU_INTEL | CPU_AVX2 | CPU_AVX_VNNI,
         NULL,
         {"avx2", "avxvnni-int16", "avxvnni-int16", "avxvnni-int8"}},
        {"Skylake", CPU_INTEL | AVX512, NULL, {"avx512", "avx512", "avx512", "avx512"}},
        {"Cascade Lake",
         CPU_INTEL | VNNI,
         NULL,
         {"avx512", "avx512-int16", "avx512-int16", "avx512-int8"}},
        {"Cooper Lake",
         CPU_INTEL | VNNI | CPU_AVX512_BF16,
         NULL,
         {"avx512", "avx512-int16", "avx512-int16", "avx512-int8"}},
        {"Cooper Lake",
         CPU_INTEL | VNNI | CPU_AVX512_BF16,
         "avx512",
         {"avx512", "avx512-int16", "avx512-int16", "avx512-int8"}},
        {"Cooper Lake",
         CPU_INTEL | VNNI | CPU_AVX512_BF16,
         "avx512-bf16",
         {NULL, NULL, "avx512-bf16", "avx512-bf16"}},
        {"Sapphire Rapids", TILES, NULL, {"amx", "amx-int16", "amx-bf16", "amx-bf16"}},
        {"Sapphire Rapids", TILES, "amx", {"amx", "amx-int16", "amx-bf16", "amx-bf16"}},
        {"Sapphire Rapids", TILES, "amx-int8", {NULL, NULL, NULL, "amx-int8"}},
        {"Sapphire Rapids",
         TILES,
         "avx512",
         {"avx512", "avx512-int16", "avx512-int16", "avx512-int8"}},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        for (int m = 0; m < 4; m++) {
            const qemb_ops *got = cpu_choose(known[i].features, known[i].name, maths[m]);
            const char *name = got ? got->name : "none";
            const char *want = known[i].want[m] ? known[i].want[m] : "none";
            cr_assert_str_eq(name, want, "%s, --cpu %s, math %d: %s", known[i].cpu,
                             known[i].name ? known[i].name : "not given", maths[m], name);
        }
}
#endif

/* Whether the kernel lists all of these flags, separated by spaces, for this CPU. */
static int cpuinfo_has(const char *flags) {
    static char line[16384];
    FILE *in = fopen("/proc/cpuinfo", "r");
    int found = 0;
    while (in && !found && fgets(line, sizeof line, in)) found = !strncmp(line, "flags", 5);
    if (in) fclose(in);
    line[strcspn(line, "\n")] = ' ';
    for (const char *f = flags; found && *f;) {
        char word[32] = " ";
        const size_t n = strcspn(f, " ");
        snprintf(word + 1, sizeof word - 1, "%.*s ", (int)n, f);
        found = strstr(line, word) != NULL;
        f += n + (f[n] != 0);
    }
    return found;
}

/* A table is there exactly where the kernel lists its instructions. dispatch.c asks CPUID. */
static void expect_table(const char *cpu, qemb_math math, const char *flags) {
    const int has = cpuinfo_has(flags);
    cr_assert_eq(qemb_cpu_choose(cpu, math) != NULL, has, "%s: flags %s: %d", cpu, flags, has);
    if (!has) cr_skip_test("this CPU lacks one of: %s", flags);
}

#define AVX512_FLAGS "avx512f avx512bw avx512dq avx512vl bmi2"
Test(simd, avx2_table_where_cpuinfo_has_it) {
    expect_table("avx2", QEMB_MATH_F32, "avx2 fma f16c");
}
Test(simd, avx2_int16_table_where_cpuinfo_has_it) {
    expect_table("avx2-int16", QEMB_MATH_INT16, "avx2 fma f16c");
}
Test(simd, avx2_int8_table_where_cpuinfo_has_it) {
    expect_table("avx2-int8", QEMB_MATH_INT8, "avx2 fma f16c");
}
Test(simd, avxvnni_int16_table_where_cpuinfo_has_it) {
    expect_table("avxvnni-int16", QEMB_MATH_INT16, "avx2 fma f16c avx_vnni");
}
Test(simd, avxvnni_int8_table_where_cpuinfo_has_it) {
    expect_table("avxvnni-int8", QEMB_MATH_INT8, "avx2 fma f16c avx_vnni");
}
Test(simd, avx512_table_where_cpuinfo_has_it) {
    expect_table("avx512", QEMB_MATH_F32, AVX512_FLAGS);
}
Test(simd, avx512_bf16_table_where_cpuinfo_has_it) {
    expect_table("avx512-bf16", QEMB_MATH_BF16, AVX512_FLAGS " avx512_bf16 avx512_vnni");
}
Test(simd, avx512_int16_table_where_cpuinfo_has_it) {
    expect_table("avx512-int16", QEMB_MATH_INT16, AVX512_FLAGS " avx512_vnni");
}
Test(simd, avx512_int8_table_where_cpuinfo_has_it) {
    expect_table("avx512-int8", QEMB_MATH_INT8, AVX512_FLAGS " avx512_vnni");
}

#if defined(__x86_64__)
/* The kernel may refuse the permission that tiles need: then the CPU counts as one without. */
Test(simd, amx_tables_where_cpuinfo_and_the_kernel_have_tiles) {
    const char *refused = amx_open();
    const qemb_math maths[] = {QEMB_MATH_F32, QEMB_MATH_INT16, QEMB_MATH_BF16, QEMB_MATH_INT8};
    const char *names[] = {"amx", "amx-int16", "amx-bf16", "amx-int8"};
    for (int i = 0; refused && i < 4; i++)
        cr_assert_null(qemb_cpu_choose(names[i], maths[i]), "%s", refused);
    if (refused) cr_skip_test("%s", refused);
    for (int i = 0; i < 4; i++)
        expect_table(names[i], maths[i], AVX512_FLAGS " avx512_vnni amx_tile amx_bf16");
}

/* Every 257th float of either sign, and special values: exp is within an ulp of the result in
 * double precision, whose own error is about 2^-28 ulp. */
static void check_exp(void (*run)(float *y, const float *x, int n)) {
    enum { N = 4096 };
    static float x[N], y[N];
    double worst = 0;
    for (uint64_t bits = 0, stride = 257; bits < 0x100000000u;) {
        for (int i = 0; i < N; i++, bits += stride) {
            const uint32_t u = (uint32_t)bits;
            memcpy(&x[i], &u, 4);
        }
        run(y, x, N);
        for (int i = 0; i < N; i++) {
            const double want = exp((double)x[i]);
            if (isnan(x[i]))
                cr_assert(isnan(y[i]), "exp(%g): %g", (double)x[i], (double)y[i]);
            else if (want > FLT_MAX)
                cr_assert(isinf(y[i]) && y[i] > 0, "exp(%a): %g", (double)x[i], (double)y[i]);
            else if (want < FLT_MIN)
                cr_assert(y[i] == 0, "exp(%a): %g", (double)x[i], (double)y[i]);
            else {
                const double ulp = ldexp(1, ilogb(want) - 23), off = fabs(y[i] - want) / ulp;
                cr_assert(off <= 1, "exp(%a): %a, want %a, %g ulp", (double)x[i], (double)y[i],
                          want, off);
                worst = fmax(worst, off);
            }
        }
    }
    cr_log_info("exp: at most %g ulp", worst);
    const float edges[] = {-INFINITY, INFINITY, NAN, 0, -0.0f, 88.72283f, -87.33654f, 1e-30f};
    float e[16];
    run(e, edges, 8);
    cr_assert(e[0] == 0 && isinf(e[1]) && isnan(e[2]) && e[3] == 1 && e[4] == 1 && e[7] == 1);
    cr_assert(e[5] > 3.4e38f && e[5] <= FLT_MAX && e[6] >= FLT_MIN);
    for (int n = 1; n < 8; n++) { /* nothing beyond n is touched */
        e[n] = 7;
        run(e, edges, n);
        cr_assert_eq(e[n], 7);
    }
}

Test(simd, avx2_exp) {
    if (!qemb_cpu_choose("avx2", QEMB_MATH_F32)) cr_skip_test("this CPU has no AVX2, FMA and F16C");
    check_exp(avx2_exp);
}

Test(simd, avx512_exp) {
    if (!qemb_cpu_choose("avx512", QEMB_MATH_F32)) cr_skip_test("this CPU has no AVX-512");
    check_exp(avx512_exp);
}

#endif

/* Shapes that reach every path of a matmul: few rows, one block of rows, several, more than one
 * work item; a row has the same bits in all of them, whatever the threads. */
static void check_paths(const qemb_ops *op, qemb_dtype dtype, int N, int K) {
    enum { T = 1100 };
    const int Ts[] = {1, 2, 3, 4, 5, 7, 16, 36, 37, 97, 513, T};
    const qemb_config c = {
        .n_layers = 1, .hidden = K, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2};
    rng r = {(uint64_t)(N + K)};
    uint16_t *W = malloc((size_t)N * K * sizeof *W);
    float *x = malloc((size_t)T * K * sizeof *x), *y = malloc((size_t)T * N * sizeof *y);
    float *want = malloc((size_t)T * N * sizeof *want);
    rng_halves(&r, W, (size_t)N * K, 1);
    rng_floats(&r, x, (size_t)T * K, 2);
    float *scale = malloc((size_t)(N * QEMB_GROUPS(K)) * sizeof *scale);
    rng_floats(&r, scale, (size_t)(N * QEMB_GROUPS(K)), 0.01);
    for (int threads = 1; threads <= 5; threads += 2) {
        const qemb_options opt = {.batch_tokens = T, .max_tokens = T, .threads = threads};
        qemb_backend *be;
        cr_assert_eq(op->open(&be, &c, &opt, NULL), 0);
        /* QEMB_I8 reads the bytes of the halves as weights */
        qemb_mat m = {W, N, K, dtype, 0.3f, dtype == QEMB_I8 ? scale : NULL, QEMB_BITS_UNKNOWN};
        load_matrices(op, be, &m, NULL);
        if (threads == 1)
            for (int t = 0; t < T; t++)
                op->matmul(be, (qemb_act *)(want + (size_t)t * N), (qemb_act *)(x + (size_t)t * K),
                           &m, NULL, 1);
        for (int i = 0; i < 12; i++) {
            op->matmul(be, (qemb_act *)y, (qemb_act *)(x + (size_t)(T - Ts[i]) * K), &m, NULL,
                       Ts[i]);
            cr_assert_arr_eq(y, want + (size_t)(T - Ts[i]) * N, (size_t)Ts[i] * N * sizeof *y,
                             "%s T=%d N=%d K=%d %d threads", op->name, Ts[i], N, K, threads);
        }
        op->close(be);
    }
    free(W), free(x), free(y), free(want), free(scale);
}

Test(simd, a_row_has_the_same_bits_on_every_path) {
    for (int o = 0; qemb_cpu_table(o); o++) {
        check_paths(qemb_cpu_table(o), QEMB_F16, 77, 531);
        check_paths(qemb_cpu_table(o), QEMB_F16, 128, 40);
        check_paths(qemb_cpu_table(o), QEMB_F16, 33, 6200); /* several blocks of columns */
        check_paths(qemb_cpu_table(o), QEMB_I8, 77, 531);
    }
}

/* Resident bytes of the mapping that starts at `map` */
static size_t resident(const uint8_t *map) {
    FILE *f = fopen("/proc/self/smaps", "r");
    char line[512], start[40];
    size_t kib = 0;
    int found = 0;
    snprintf(start, sizeof start, "%zx-", (size_t)(uintptr_t)map);
    while (f && fgets(line, sizeof line, f)) {
        if (strstr(line, start) == line) found = 1;
        if (found && sscanf(line, "Rss: %zu kB", &kib) == 1) break;
    }
    if (f) fclose(f);
    cr_assert(found);
    return kib * 1024;
}

/* What a table has copied it does not keep in the map, too. Where a page is read the kernel may map
 * up to 2 MiB around it, so that a part of a matrix given back can return with the next: of four, 8
 * of 26. */
Test(simd, copied_weights_leave_the_map) {
    const qemb_config c = {.n_layers = 1,
                           .hidden = 512,
                           .n_heads = 4,
                           .n_kv_heads = 2,
                           .head_dim = 64,
                           .ffn = 8192,
                           .vocab = 300,
                           .max_positions = 64,
                           .eos_id = 299,
                           .rope_theta = 1e6f,
                           .norm_eps = 1e-6f};
    const size_t matrices = 2 * 512 * (512 + 256 + 3 * 8192);
    for (int o = 0; qemb_cpu_table(o); o++) {
        const qemb_ops *op = qemb_cpu_table(o);
        qemb_file *f = open_model(&c, 1, 1);
        qemb_model *m;
        cr_assert_eq(qemb_open(&m, f, op, NULL, NULL), 0);
        qemb_batch *b = qemb_batch_new(m);
        const int32_t ids[] = {1, 2, 299};
        float out[512];
        qemb_pack_add(b, ids, 3);
        qemb_embed(m, b, out);
        if (op->repacked_bytes)
            cr_assert_lt(resident(f->map), matrices / 2, "%s", op->name);
        else
            cr_assert_gt(resident(f->map), matrices * 3 / 4, "%s", op->name);
        qemb_batch_free(b);
        qemb_close(m);
        qemb_file_close(f);
    }
}

/* q (N, K) and scale (N, groups) = the halves W (N, K), quantized as convert_weights.py does it */
static void quantize(int8_t *q, float *scale, const uint16_t *W, int N, int K) {
    for (int n = 0; n < N; n++)
        for (int k = 0; k < K; k += 64, scale++) {
            const uint16_t *w = W + (size_t)n * K + k;
            float most = 0;
            for (int i = 0; i < 64 && k + i < K; i++)
                most = fmaxf(most, fabsf((float)oracle_half(w[i])));
            const float inverse = most > 0 ? 127 / most : 0;
            *scale = most / 127;
            for (int i = 0; i < 64 && k + i < K; i++)
                q[(size_t)n * K + k + i] = (int8_t)lrintf((float)oracle_half(w[i]) * inverse);
        }
}

/* Tables for INT8 make of an F16 file's weights what an INT8 file has: the same bits come out. Rows
 * of one large number, of subnormal ones, of zeros; groups of 64 and a last one of 19. */
static void check_int8_weights(const qemb_ops *op) {
    enum { N = 45, K = 531, T = 31 };
    static uint16_t W[N * K];
    static int8_t q[N * K];
    static float scale[N * QEMB_GROUPS(K)], x[T * K], want[T * N], got[T * N];
    rng r = {9};
    rng_halves(&r, W, N * K, 1);
    rng_floats(&r, x, T * K, 2);
    W[K + 200] = 0x7bff;                                                    /* 65504 */
    for (int k = 0; k < K; k++) W[2 * K + k] = (uint16_t)(rng_u64(&r) % 9); /* up to 2^-21 */
    memset(W + 3 * K, 0, K * sizeof *W);
    quantize(q, scale, W, N, K);
    multiply(op, want, x, (qemb_mat){W, N, K, QEMB_F16, 0.3f, NULL, QEMB_BITS_UNKNOWN}, T);
    multiply(op, got, x, (qemb_mat){q, N, K, QEMB_I8, 0.3f, scale, QEMB_BITS_UNKNOWN}, T);
    cr_assert_arr_eq(got, want, sizeof want, "%s", op->name);
}

Test(simd, int8_weights_are_what_halves_become) {
    for (int o = 0; test_table(o); o++)
        if (test_table(o)->math == QEMB_MATH_INT8) check_int8_weights(test_table(o));
}

/* A table gives the bits of another one: rows of every number up to a tile's 12, several parts of a
 * panel (6,144 columns), bytes of -128. */
static void check_same_bits(const qemb_ops *op, const qemb_ops *with, qemb_dtype dtype, int N,
                            int K) {
    enum { T = 78 };
    rng r = {(uint64_t)K};
    uint16_t *W = malloc((size_t)N * K * sizeof *W);
    float *x = malloc((size_t)T * K * sizeof *x), *y = malloc((size_t)2 * T * N * sizeof *y);
    float *scale = malloc((size_t)(N * QEMB_GROUPS(K)) * sizeof *scale);
    rng_halves(&r, W, (size_t)N * K, 1);
    rng_floats(&r, x, (size_t)T * K, 2);
    rng_floats(&r, scale, (size_t)(N * QEMB_GROUPS(K)), 0.01);
    W[1] = 0x8080; /* QEMB_I8 reads the bytes of the halves as weights */
    const qemb_mat m = {W, N, K, dtype, 0.3f, dtype == QEMB_I8 ? scale : NULL, QEMB_BITS_UNKNOWN};
    for (int rows = 1, t = 0; rows <= 12; t += rows++) {
        multiply(op, y, x + (size_t)t * K, m, rows);
        multiply(with, y + T * N, x + (size_t)t * K, m, rows);
        cr_assert_arr_eq(y, y + T * N, (size_t)rows * N * sizeof *y, "%s dtype %d K=%d, %d rows",
                         op->name, (int)dtype, K, rows);
    }
    free(W), free(x), free(y), free(scale);
}

static void check_same_bits_of_all(const qemb_ops *op, const qemb_ops *with) {
    if (!op || !with) return;
    for (int d = 0; d < 2; d++) {
        check_same_bits(op, with, d ? QEMB_I8 : QEMB_F16, 77, 531);
        check_same_bits(op, with, d ? QEMB_I8 : QEMB_F16, 33, 6200);
    }
}

/* Integer sums are exact, and all else is shared */
Test(simd, avx_vnni_gives_the_bits_of_avx2) {
    const qemb_ops *int16 = qemb_cpu_choose("avx2-int16", QEMB_MATH_INT16);
    const qemb_ops *int8 = qemb_cpu_choose("avx2-int8", QEMB_MATH_INT8);
    if (!int16 || !int8) cr_skip_test("this CPU has no AVX2, FMA and F16C");
    check_same_bits_of_all(&in_c_avxvnni_int16_ops, int16);
    check_same_bits_of_all(&in_c_avxvnni_int8_ops, int8);
    check_same_bits_of_all(qemb_cpu_choose("avxvnni-int16", QEMB_MATH_INT16), int16);
    check_same_bits_of_all(qemb_cpu_choose("avxvnni-int8", QEMB_MATH_INT8), int8);
}

/* ---- dot products of halves ------------------------------------------------------------------ */

/* A lane rounds stride / 32 times and the lanes' sum 5 times, each by at most U of a number that is
 * at most the sum of magnitudes. Products of roundings are below a thousandth of that. */
static double dot_tolerance(int stride, double magnitudes) {
    return 1.001 * (stride / DOT_F16_LANES + 5) * U * magnitudes;
}

/* Every version gives the bits of the plain one, which is near the sum in double precision; for
 * rows of all kinds of halves, zeros and subnormal ones too. */
Test(simd, dot_products_of_halves) {
    static const int dims[] = {1, 31, 32, 33, 64, 128, 250, 1024};
    enum { ROWS = 7, MOST = 1024 };
    static _Alignas(64) uint16_t rows[ROWS * MOST];
    static _Alignas(64) float q[MOST];
    const unsigned features = cpu_features();
    rng r = {17};
    for (int d = 0; d < (int)(sizeof dims / sizeof *dims); d++) {
        const int dim = dims[d], stride = dot_f16_stride(dim);
        float want[ROWS], got[ROWS];
        memset(rows, 0, sizeof rows);
        memset(q, 0, sizeof q);
        rng_floats(&r, q, (size_t)dim, 1);
        for (int i = 0; i < ROWS; i++)
            for (int k = 0; k < dim; k++) /* every exponent below infinity's */
                rows[i * stride + k] = (uint16_t)(rng_u64(&r) & (i % 2 ? 0x83ff : 0xbbff));
        dot_f16_versions[0].run(want, q, rows, ROWS, stride);
        for (int i = 0; i < ROWS; i++) {
            double sum = 0, magnitudes = 0;
            for (int k = 0; k < dim; k++) {
                const double product = (double)half_to_float(rows[i * stride + k]) * q[k];
                sum += product, magnitudes += fabs(product);
            }
            cr_assert(!far_off(want[i], sum, dot_tolerance(stride, magnitudes)),
                      "dim %d, row %d: %g, want %g", dim, i, (double)want[i], sum);
        }
        for (int v = 1; v < n_dot_f16_versions; v++) {
            if (dot_f16_versions[v].needs & ~features) continue;
            dot_f16_versions[v].run(got, q, rows, ROWS, stride);
            cr_assert_arr_eq(got, want, sizeof want, "%s, dim %d", dot_f16_versions[v].name, dim);
            dot_f16_versions[v].run(got, q, rows + 3 * stride, 1, stride);
            cr_assert_arr_eq(got, want + 3, sizeof *want, "%s alone", dot_f16_versions[v].name);
        }
    }
}
