/* test_amx.c - the tile unit's tables (backends/cpu/amx.c), emulated on every CPU, and their bits
 * on a CPU that has tiles. test_ops and test_model compare them with the oracle and the goldens.
 */
#define AMX_EMULATE
#include "emulated_amx.h"
#include "oracle.h"
#include "support.h"

#include "backends/cpu/amx.h"

#include <criterion/criterion.h>
#include <float.h>
#include <stdlib.h>
#include <string.h>

/* ---- the emulated instruction ---------------------------------------------------------------- */

static uint16_t bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return (uint16_t)(u >> 16);
}

/* Tile 0 = c + a b, for tiles that are the same number everywhere, but for a[0][0]. */
static float one_product(float c, float first, float a, float b) {
    const amx_config whole = amx_whole_tiles();
    uint16_t x[16][32], w[16][32];
    float sums[16][16];
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 32; k++) x[i][k] = bf16(a), w[i][k] = bf16(b);
    x[0][0] = bf16(first);
    for (int i = 0; i < 16; i++)
        for (int n = 0; n < 16; n++) sums[i][n] = c;
    tile_config(&whole);
    tile_stream(0, sums, 64), tile_stream(4, x, 64), tile_stream(6, w, 64);
    tile_dp_bf16(0, 4, 6);
    tile_store(0, sums, 64);
    tile_release();
    return sums[0][3];
}

/* What TDPBF16PS does: the sum of 32 products reaches c with one rounding; even and odd columns
 * have sums of their own; numbers below 2^-126 are 0 as factors, as c and as results. */
Test(amx, emulated_instruction) {
    cr_assert_eq(one_product(0, 1, 1, 1), 32);
    cr_assert_eq(one_product(0x1p24f, 1, 1, 1), 0x1p24f + 32, "one rounding, not 32");
    /* even columns: 2^24 + 15 ones, each lost; odd ones: 16 */
    cr_assert_eq(one_product(0, 0x1p24f, 1, 1), 0x1p24f + 16);
    cr_assert_eq(one_product(0, 0, 0x1p-127f, 0x1p100f), 0, "a factor");
    cr_assert_eq(one_product(0x1p-127f, 0, 0, 1), 0, "c");
    cr_assert_eq(one_product(0, 0x1p-70f, 0, 0x1p-70f), 0, "a product");
    cr_assert_eq(one_product(0, 0x1p-63f, 0, 0x1p-63f), 0x1p-126f, "the smallest");
    cr_assert(isnan(one_product(0, 0, 0, INFINITY)), "zeros times infinity");
    cr_assert(isinf(one_product(0, INFINITY, 1, 1)));
}

/* Bits of bfloat16 numbers with exponents from -127 to +127, every kind of number among them. */
static void wild_tile(rng *r, uint16_t t[16][32], int narrow) {
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 32; k++) {
            t[i][k] = (uint16_t)rng_u64(r);
            if (narrow) t[i][k] = (uint16_t)((t[i][k] & 0x83ff) | 0x3c00); /* 2^-7 .. 2 */
        }
}

static int same_or_nan(float a, float b) {
    return (isnan(a) && isnan(b)) || !memcmp(&a, &b, sizeof a);
}

/* The shortcuts of the emulation and its multiply-adds in registers change no bit: a sum that is
 * written down from the definition, number by number, has the same. */
Test(amx, emulation_is_the_definition) {
    rng r = {4};
    const amx_config whole = amx_whole_tiles();
    for (int round = 0; round < 400; round++) {
        uint16_t x[16][32], w[16][32];
        float c[16][16], got[16][16];
        wild_tile(&r, x, round % 2), wild_tile(&r, w, round % 4 == 1);
        if (round % 3 == 0) memset(x[5], 0, sizeof x[5]);
        for (int i = 0; i < 16; i++) rng_floats(&r, c[i], 16, round % 5 ? 1 : 1e-38);
        tile_config(&whole);
        tile_stream(0, c, 64), tile_stream(4, x, 64), tile_stream(6, w, 64);
        tile_dp_bf16(0, 4, 6);
        tile_store(0, got, 64);
        tile_release();
        for (int i = 0; i < 16; i++)
            for (int n = 0; n < 16; n++) {
                float sum[2] = {0, 0};
                for (int k = 0; k < 32; k++)
                    sum[k % 2] = emulated_fma(emulated_bf16(x[i][k]),
                                              emulated_bf16(w[k / 2][2 * n + k % 2]), sum[k % 2]);
                const float want =
                    emulated_flush(emulated_flush(c[i][n]) + emulated_flush(sum[0] + sum[1]));
                cr_assert(same_or_nan(got[i][n], want), "round %d (%d,%d): %a, want %a", round, i,
                          n, (double)got[i][n], (double)want);
            }
    }
}

/* ---- products -------------------------------------------------------------------------------- */

typedef enum { OF_11_BITS, OF_8_BITS, OF_INT8, N_WEIGHTS } weights;

/* A product's factors, and W loaded by a table. */
typedef struct {
    const qemb_ops *op;
    qemb_backend *be;
    int T, N, K;
    uint16_t *W;
    float *scale, *x, *y;
    qemb_mat original, loaded, gate_up;
} product;

static product open_product(const qemb_ops *op, weights kind, int T, int N, int K, int threads) {
    product p = {.op = op, .T = T, .N = N, .K = K};
    const qemb_config c = {
        .n_layers = 1, .hidden = K, .ffn = N / 2, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2};
    static qemb_config configs[64]; /* the backend keeps a pointer */
    static int n_configs;
    qemb_config *kept = &configs[n_configs++ % 64];
    *kept = c;
    const qemb_options opt = {.batch_tokens = T, .max_tokens = T, .threads = threads};
    rng r = {(uint64_t)(N + K)};
    const size_t nw = (size_t)N * K, ns = (size_t)N * QEMB_GROUPS(K);
    p.W = malloc(nw * sizeof *p.W), p.scale = malloc(ns * sizeof *p.scale);
    p.x = malloc((size_t)T * K * sizeof *p.x), p.y = calloc((size_t)T * N, sizeof *p.y);
    rng_halves(&r, p.W, nw, 1);
    for (size_t i = 0; kind == OF_8_BITS && i < nw; i++) p.W[i] &= (uint16_t)~7;
    rng_floats(&r, p.scale, ns, 0.01), rng_floats(&r, p.x, (size_t)T * K, 2);
    cr_assert_eq(op->open(&p.be, kept, &opt, NULL), 0);
    p.original = (qemb_mat){.data = p.W, .rows = N, .cols = K, .dtype = QEMB_F16, .alpha = 1};
    if (kind == OF_INT8) p.original.dtype = QEMB_I8, p.original.scale = p.scale;
    p.loaded = p.gate_up = p.original;
    load_matrices(op, p.be, &p.loaded, N % 2 ? NULL : &p.gate_up);
    return p;
}

static void close_product(product *p) {
    p->op->close(p->be);
    free(p->W), free(p->scale), free(p->x), free(p->y);
}

/* y (n, N) = rows first .. first+n-1 of x times W */
static void multiply_rows(const product *p, float *y, int first, int n) {
    p->op->matmul(p->be, (qemb_act *)y, (const qemb_act *)(p->x + (size_t)first * p->K), &p->loaded,
                  NULL, n);
}

/* A row alone, in up to T rows and with any number of threads: the same bits. */
static void check_rows(const qemb_ops *op, weights kind, int T, int N, int K) {
    const int Ts[] = {2, 15, 16, 17, 31, 32, 33, 64, 100, 161, T};
    float *want = malloc((size_t)T * N * sizeof *want);
    for (int threads = 1; threads <= 3; threads++) {
        product p = open_product(op, kind, T, N, K, threads);
        if (threads == 1)
            for (int t = 0; t < T; t++) multiply_rows(&p, want + (size_t)t * N, t, 1);
        for (int i = 0; i < 11; i++) {
            multiply_rows(&p, p.y, T - Ts[i], Ts[i]);
            cr_assert_arr_eq(p.y, want + (size_t)(T - Ts[i]) * N, (size_t)Ts[i] * N * sizeof *p.y,
                             "%s weights %d T=%d N=%d K=%d %d threads", op->name, (int)kind, Ts[i],
                             N, K, threads);
        }
        close_product(&p);
    }
    free(want);
}

Test(amx, a_row_has_the_same_bits_on_every_path) {
    for (int o = 0; emulated_amx_table(o); o++)
        for (weights kind = 0; kind < N_WEIGHTS; kind++) {
            check_rows(emulated_amx_table(o), kind, 530, 77, 70); /* packed in two turns or more */
            check_rows(emulated_amx_table(o), kind, 170, 33, 1090); /* two chunks */
        }
}

/* gate_up is what SwiGLU makes of the matmul's numbers, which has its own tests. */
static void check_gate_up(const qemb_ops *op, weights kind, int T, int F, int K) {
    product p = open_product(op, kind, T, 2 * F, K, 1);
    float *h = malloc((size_t)T * F * sizeof *h), *scratch = malloc((size_t)T * 2 * F * sizeof *h);
    for (int i = 0; i < T * K; i++) p.x[i] *= 0.04f;
    p.loaded.alpha = p.gate_up.alpha = 0.5f;
    multiply_rows(&p, p.y, 0, T);
    op->gate_up(p.be, (qemb_act *)h, (qemb_act *)scratch, (const qemb_act *)p.x, &p.gate_up, T);
    cr_assert(emulated_amx_is_released(), "%s", op->name);
    const int rough = op->math == QEMB_MATH_BF16 || op->math == QEMB_MATH_INT8;
    for (int i = 0; i < T * F; i++) {
        const float *y = p.y + (size_t)(i / F) * 2 * F + i % F;
        const double want = oracle_swiglu(y[0], y[F]);
        /* exp, 1 + e, the division and its product with up; rough: as in test_ops */
        const double tol = (6.1 * U + (rough ? 0x1p-13 : 0)) * fabs(want) + 1e-34;
        cr_assert_not(far_off(h[i], want, tol), "%s weights %d (%d): %g, want %g", op->name,
                      (int)kind, i, (double)h[i], want);
    }
    free(h), free(scratch);
    close_product(&p);
}

/* Several tiles of x, chunks, and panels of an item; then as many of each as a thread's scratch has
 * room for. */
Test(amx, gate_up_in_chunks) {
    for (int o = 0; emulated_amx_table(o); o++)
        for (weights kind = 0; kind < N_WEIGHTS; kind++)
            check_gate_up(emulated_amx_table(o), kind, 70, 130, 1100);
    check_gate_up(emulated_amx_table(2), OF_8_BITS, 512, 1024, 1100);
    /* more rows than are packed at a time: 160 */
    check_gate_up(emulated_amx_table(0), OF_8_BITS, 170, 50, 70);
}

/* ---- exactness ------------------------------------------------------------------------------- */

static double l2_error(const float *got, const double *want, int n) {
    double off = 0, size = 0;
    for (int i = 0; i < n; i++)
        off += (got[i] - want[i]) * (got[i] - want[i]), size += want[i] * want[i];
    return sqrt(off / size);
}

/* Three tile products are more exact than a chain of multiply-adds in float, also where a few
 * columns of x are 1000 times larger. By theory: a chain rounds the sum K times, the tile unit adds
 * 32 columns of a part with one rounding of the sum. */
Test(amx, float_is_more_exact_than_multiply_adds) {
    enum { T = 20, N = 64, K = 1024 };
    const qemb_ops *op = emulated_amx_table(0);
    for (int large = 0; large < 2; large++)
        for (weights kind = 0; kind < N_WEIGHTS; kind++) {
            product p = open_product(op, kind, T, N, K, 1);
            double want[T * N];
            float chain[T * N];
            for (int i = 0; large && i < T * K; i++)
                if (i % K % 400 == 7) p.x[i] *= 1000;
            for (int t = 0; t < T; t++) {
                double xd[K];
                for (int k = 0; k < K; k++) xd[k] = p.x[t * K + k];
                oracle_matvec(want + t * N, NULL, xd, &p.original);
                for (int n = 0; n < N; n++) {
                    float sum = 0;
                    for (int k = 0; k < K; k++)
                        sum = fmaf(p.x[t * K + k], (float)oracle_weight(&p.original, n, k), sum);
                    chain[t * N + n] = sum;
                }
            }
            multiply_rows(&p, p.y, 0, T);
            const double tiles = l2_error(p.y, want, T * N), fma = l2_error(chain, want, T * N);
            cr_log_info("weights %d, large %d: tiles %.2g, a chain %.2g", (int)kind, large, tiles,
                        fma);
            cr_assert_lt(tiles, fma, "weights %d, large %d", (int)kind, large);
            close_product(&p);
        }
}

/* y (T) = x times a matrix that is the number 1 */
static void multiply_by_one(const qemb_ops *op, float *y, const float *x, int T) {
    uint16_t one = 0x3c00;
    const qemb_config c = {
        .n_layers = 1, .hidden = 1, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2};
    const qemb_options opt = {.batch_tokens = T, .max_tokens = T, .threads = 1};
    qemb_backend *be;
    qemb_mat w = {.data = &one, .rows = 1, .cols = 1, .dtype = QEMB_F16, .alpha = 1};
    cr_assert_eq(op->open(&be, &c, &opt, NULL), 0);
    load_matrices(op, be, &w, NULL);
    op->matmul(be, (qemb_act *)y, (const qemb_act *)x, &w, NULL, T);
    op->close(be);
}

/* A number times 1, for every number of parts: three parts are all of a float, two parts have its
 * first 16 bits, one its first 8, rounded. Each part rounds to nearest, which errs by 2^-8 of what
 * is left. */
Test(amx, parts_hold_8_bits_each) {
    enum { T = 512 };
    const double tol[] = {0, 0x1p-16, 0x1p-8, 0x1p-8};
    for (int o = 0; o < 4; o++) {
        float x[T], y[T];
        rng r = {7};
        for (int t = 0; t < T; t++) /* exponents from -100 to 127 */
            x[t] = ldexpf((float)(1 + fabs(rng_uniform(&r))), t % 228 - 100);
        x[0] = o ? 3.4e38f : FLT_MAX, x[1] = -x[0]; /* would round to Inf in 8 bits */
        multiply_by_one(emulated_amx_table(o), y, x, T);
        for (int t = 0; t < T; t++)
            cr_assert_not(far_off(y[t], x[t], tol[o] * fabsf(x[t])), "%s: %a, want %a",
                          emulated_amx_table(o)->name, (double)y[t], (double)x[t]);
    }
}

/* One part rounds to nearest, and a number halfway between two to the even one. What would round
 * to Inf is cut off. */
Test(amx, a_part_rounds_to_nearest_even) {
    const float x[] = {0x1.01p0f,     0x1.03p0f,     0x1.010002p0f,   0x1.02fffep0f,
                       0x1.00fffep0f, 0x1.030002p0f, 0x1.fefffep127f, 0x1.ffp127f};
    const float want[] = {1, 0x1.04p0f, 0x1.02p0f,   0x1.02p0f,
                          1, 0x1.04p0f, 0x1.fep127f, 0x1.fep127f};
    enum { T = sizeof x / sizeof *x };
    for (int o = 2; o < 4; o++) {
        float y[T];
        multiply_by_one(emulated_amx_table(o), y, x, T);
        for (int t = 0; t < T; t++)
            cr_assert_eq(y[t], want[t], "%s: %a is %a, want %a", emulated_amx_table(o)->name,
                         (double)x[t], (double)y[t], (double)want[t]);
    }
}

/* Infinity and NaN in a row of x make that row not finite, and no other. */
Test(amx, not_finite) {
    enum { T = 40, N = 40, K = 80 };
    const float bad[] = {INFINITY, -INFINITY, NAN};
    for (int o = 0; emulated_amx_table(o); o++)
        for (int i = 0; i < 3; i++) {
            product p = open_product(emulated_amx_table(o), OF_8_BITS, T, N, K, 2);
            p.x[17 * K + 3] = bad[i];
            multiply_rows(&p, p.y, 0, T);
            for (int t = 0; t < T; t++)
                for (int n = 0; n < N; n++)
                    cr_assert_eq(isfinite(p.y[t * N + n]) != 0, t != 17, "%s (%d,%d)", p.op->name,
                                 t, n);
            close_product(&p);
        }
}

/* Numbers that a larger product left in packed x reach no row of a smaller one: neither from rows
 * that the smaller one lacks, nor from columns past its last, which W's zeros would not hide. */
Test(amx, earlier_numbers_are_forgotten) {
    enum { T = 40, N = 40, K = 128, FEWER_ROWS = 3, FEWER_COLUMNS = 80 };
    for (int o = 0; emulated_amx_table(o); o++) {
        product p = open_product(emulated_amx_table(o), OF_8_BITS, T, N, K, 1);
        qemb_layer layer = {.wo = p.original, .wqkv = p.original};
        const qemb_mat *large = &layer.wo, *small = &layer.wqkv;
        qemb_weights weights = {.layers = &layer};
        float want[FEWER_ROWS * N], y[FEWER_ROWS * N];
        layer.wqkv.cols = FEWER_COLUMNS;
        cr_assert_eq(p.op->load_weights(p.be, &weights, NULL), 0);
        p.op->matmul(p.be, (qemb_act *)want, (qemb_act *)p.x, small, NULL, FEWER_ROWS);
        for (int i = FEWER_ROWS * FEWER_COLUMNS; i < T * K; i++) p.x[i] = NAN;
        p.op->matmul(p.be, (qemb_act *)p.y, (qemb_act *)p.x, large, NULL, T);
        p.op->matmul(p.be, (qemb_act *)y, (qemb_act *)p.x, small, NULL, FEWER_ROWS);
        cr_assert_arr_eq(y, want, sizeof y, "%s", p.op->name);
        close_product(&p);
    }
}

/* ---- weights --------------------------------------------------------------------------------- */

/* load_weights finds out whether a matrix is exact in bfloat16 where the file does not say so. What
 * the file says and what is found give the same bits. */
Test(amx, older_files_are_searched) {
    enum { T = 9, N = 70, K = 200 };
    for (int o = 0; o < 2; o++)
        for (weights kind = OF_11_BITS; kind <= OF_8_BITS; kind++) {
            product p = open_product(emulated_amx_table(o), kind, T, N, K, 1);
            const qemb_bits found = kind == OF_8_BITS ? QEMB_BITS_8 : QEMB_BITS_11;
            cr_assert_eq(p.original.bits, QEMB_BITS_UNKNOWN);
            cr_assert_eq(p.loaded.bits, found);
            multiply_rows(&p, p.y, 0, T);
            const qemb_config c = {
                .n_layers = 1, .hidden = K, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2};
            const qemb_options opt = {.batch_tokens = T, .max_tokens = T, .threads = 1};
            qemb_backend *be;
            qemb_mat w = p.original;
            float y[T * N];
            w.bits = found;
            cr_assert_eq(p.op->open(&be, &c, &opt, NULL), 0);
            load_matrices(p.op, be, &w, NULL);
            p.op->matmul(be, (qemb_act *)y, (const qemb_act *)p.x, &w, NULL, T);
            cr_assert_arr_eq(y, p.y, sizeof y);
            p.op->close(be);
            close_product(&p);
        }
}

/* ---- the hardware ---------------------------------------------------------------------------- */

/* Products of numbers of every size, with tiles and emulated: the same bits. */
Test(amx, hardware_has_the_bits_of_the_emulation) {
    enum { T = 70, N = 100, K = 1100 };
    int found = 0;
    for (int i = 0; qemb_cpu_table(i); i++)
        for (int o = 0; emulated_amx_table(o); o++) {
            const qemb_ops *op = qemb_cpu_table(i), *emulation = emulated_amx_table(o);
            if (strcmp(op->name, emulation->name + strlen("emulated "))) continue;
            found++;
            for (weights kind = 0; kind < N_WEIGHTS; kind++) {
                product a = open_product(op, kind, T, N, K, 2);
                product b = open_product(emulation, kind, T, N, K, 1);
                float ha[T * N / 2], hb[T * N / 2], scratch[T * N];
                for (int n = 0; n < T * K; n++) a.x[n] = ldexpf(a.x[n], n * 7 % 200 - 140);
                memcpy(b.x, a.x, (size_t)T * K * sizeof *a.x);
                multiply_rows(&a, a.y, 0, T), multiply_rows(&b, b.y, 0, T);
                cr_assert_arr_eq(a.y, b.y, (size_t)T * N * sizeof *a.y, "%s weights %d", op->name,
                                 (int)kind);
                op->gate_up(a.be, (qemb_act *)ha, (qemb_act *)scratch, (qemb_act *)a.x, &a.gate_up,
                            T);
                emulation->gate_up(b.be, (qemb_act *)hb, (qemb_act *)scratch, (qemb_act *)b.x,
                                   &b.gate_up, T);
                cr_assert_arr_eq(ha, hb, sizeof ha, "%s weights %d", op->name, (int)kind);
                close_product(&a), close_product(&b);
            }
        }
    if (!found) cr_skip_test("this CPU has no tiles (AMX), or may not use them");
    cr_assert_eq(found, 4);
}
