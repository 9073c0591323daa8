/* test_ops.c - every op of every ops table, compared with the double-precision oracle.
 *
 * Error bounds: U is the relative error of one rounding. The error of a float sum of n products is
 * at most n U sum|terms| to first order (Higham, Accuracy and Stability, 3.1), where n is the
 * longest chain of additions. The factor SLACK covers the second-order terms.
 */
#include "emulated_amx.h"
#include "oracle.h"
#include "table_support.h"

static double *doubles(const float *x, size_t n) {
    double *p = malloc(n * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = x[i];
    return p;
}

Test(ops, comparators_reject_nan) {
    cr_assert(far_off(NAN, 0, 1e30));
    cr_assert(far_off(0, NAN, 1e30));
    cr_assert(far_off(0, 0, NAN));
    cr_assert(far_off(INFINITY, 1, 1e30));
    cr_assert_not(far_off(1, 1, 0));
}

/* All 65,536 halves are converted exactly, Inf, NaN and subnormals included. */
Test(ops, embed_converts_every_half) {
    enum { D = 256, V = 256 };
    const qemb_config c = {.hidden = D, .vocab = V, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2};
    uint16_t table[V * D];
    for (int i = 0; i < V * D; i++) table[i] = (uint16_t)i;
    const qemb_mat m = {table, V, D, QEMB_F16, 1, NULL, QEMB_BITS_UNKNOWN};
    for (int o = 0; qemb_cpu_table(o); o++) {
        qemb_backend *be = backend(qemb_cpu_table(o), &c, V, 1);
        int32_t tokens[V], pos[V], cu[] = {0, V};
        for (int t = 0; t < V; t++) tokens[t] = V - 1 - t, pos[t] = t;
        const qemb_packed_batch b = {1, V, 0, tokens, pos, cu, 0, 0, 0};
        float *x = malloc(V * D * sizeof *x);
        qemb_cpu_table(o)->begin(be, &b);
        qemb_cpu_table(o)->embed(be, x, &m, NULL, &b);
        for (int t = 0; t < V; t++)
            for (int i = 0; i < D; i++) {
                double want = oracle_half(table[tokens[t] * D + i]);
                float got = x[t * D + i];
                if (isnan(want))
                    cr_assert(isnan(got));
                else
                    cr_assert(got == want && !signbit(got) == !signbit(want), "%a, want %a", got,
                              want);
            }
        free(x);
        qemb_cpu_table(o)->close(be);
    }
}

/* Three roundings: of the scale (computed in double), of its product with x, and of that with w. */
Test(ops, rmsnorm) {
    const int sizes[] = {1, 7, 16, 33, 1024, 2560};
    for (int o = 0; qemb_cpu_table(o); o++)
        for (int s = 0; s < 6; s++) {
            const int D = sizes[s], T = 11;
            const qemb_config c = {
                .hidden = D, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2, .norm_eps = 1e-6f};
            rng r = {(uint64_t)D};
            qemb_backend *be = backend(qemb_cpu_table(o), &c, T, 2);
            float *x = numbers(&r, (size_t)T * D, 3), *w = numbers(&r, (size_t)D, 2),
                  *y = numbers(&r, (size_t)T * D, 1);
            for (int i = 0; i < D; i++) x[i] *= 1e-3f; /* row 0: eps matters */
            for (int i = 0; i < D; i++) x[D + i] = 0;  /* row 1: 0 / sqrt(eps) */
            x[2 * D] = 1e9f;                           /* row 2: a massive activation */
            qemb_cpu_table(o)->rmsnorm(be, (qemb_act *)y, x, w, T);
            double *xd = doubles(x, (size_t)T * D), *want = malloc((size_t)D * sizeof *want);
            for (int t = 0; t < T; t++) {
                oracle_rmsnorm(want, xd + (size_t)t * D, w, D, c.norm_eps);
                for (int i = 0; i < D; i++)
                    cr_assert_not(far_off(y[t * D + i], want[i], 3 * SLACK * U * fabs(want[i])),
                                  "%s D=%d (%d,%d): %g, want %g", qemb_cpu_table(o)->name, D, t, i,
                                  (double)y[t * D + i], want[i]);
            }
            free(x), free(w), free(y), free(xd), free(want);
            qemb_cpu_table(o)->close(be);
        }
}

/* What a product errs by because its factors are rounded to integers, summed over a row: x (K), row
 * n of W. An integer errs by half a step, of a group of 64 of x and of W: of 8 bits its largest
 * magnitude / 127, and W that is INT8 already stays what it is; of 16 bits that / 32767 or the
 * group's length / 46330, whichever is larger, and of W up to twice as much, as its steps are
 * powers of two.
 *
 * FROM_LOW: a group of x, filled up with zeros, is its least number and up to 128 steps. That
 * number times the sum of W's, and the steps times W's, are rounded as floats (2U each). */
typedef enum { NO_INTEGERS, AROUND_ZERO, FROM_LOW } integers_of_x;
static double integer_rounding(integers_of_x of_x, qemb_math math, const float *x,
                               const qemb_mat *w, int n) {
    const int K = w->cols;
    double err = 0;
    for (int k0 = 0; k0 < K; k0 += 64) {
        double most[2] = {0, 0}, square[2] = {0, 0}, step[2], size[2] = {0, 0};
        double low = k0 + 64 > K ? 0 : INFINITY, high = k0 + 64 > K ? 0 : -INFINITY;
        for (int k = k0; k < K && k < k0 + 64; k++) {
            const double v[2] = {x[k], oracle_weight(w, n, k)};
            low = fmin(low, v[0]), high = fmax(high, v[0]);
            for (int i = 0; i < 2; i++)
                most[i] = fmax(most[i], fabs(v[i])), square[i] += v[i] * v[i],
                size[i] += fabs(v[i]);
        }
        for (int i = 0; i < 2; i++)
            step[i] = math == QEMB_MATH_INT8 ? most[i] / 127
                                             : fmax(most[i] / 32767, sqrt(square[i]) / 46330);
        if (of_x == NO_INTEGERS) step[0] = 0;
        if (of_x == FROM_LOW) {
            step[0] = (high - low) / 128;
            err += 2 * U * (fabs(low) + high - low) * size[1];
        }
        if (math == QEMB_MATH_INT16) step[1] *= 2;
        if (math == QEMB_MATH_INT8 && w->dtype == QEMB_I8) step[1] = 0;
        err += size[0] * step[1] / 2 + size[1] * step[0] / 2 + 64 * step[0] * step[1] / 4;
    }
    return err;
}

/* What a product errs by because its factors are rounded; size = sum |x| |w|.
 *
 * A number rounded to the 8 bits of bfloat16 errs by at most 2^-8 of itself, so a product of two by
 * at most 2^-7 + 2^-16.
 *
 * The tile unit's tables (amx.c) round so in bf16 and int8, and int8 makes bytes of an F16 file's
 * weights before. In f32 and int16 they multiply parts: x = x1 + .. + xp + e with
 * |e| <= 2^-8p |x|, w = w1 + w2 with |w2| <= 2^-8 |w|. int16 leaves out e (p = 2) and x2 w2:
 * 2 2^-16. f32 leaves out x3 w2: 2^-24. */
static double rounding(const qemb_ops *op, const float *x, const qemb_mat *w, int n, double size) {
    const int tiles = strstr(op->name, "amx") != NULL;
    const double of_bf16 = (0x1p-7 + 0x1p-16) * size;
    switch (op->math) {
    case QEMB_MATH_F32:
        return tiles ? U * size : 0;
    case QEMB_MATH_BF16:
        return of_bf16;
    case QEMB_MATH_INT16:
        return tiles ? 0x1p-15 * size : integer_rounding(AROUND_ZERO, op->math, x, w, n);
    default:
        if (tiles) return integer_rounding(NO_INTEGERS, op->math, x, w, n) + 1.01 * of_bf16;
        return integer_rounding(counts_from_low(op) ? FROM_LOW : AROUND_ZERO, op->math, x, w, n);
    }
}

/* Halves of 11 significant bits, halves of 8 (those of a BF16 checkpoint), and INT8. */
typedef enum { OF_11_BITS, OF_8_BITS, OF_INT8, N_WEIGHTS } weights;

/* y = x W^T and y += alpha x W^T. The longest chain of additions: up to 256 columns in a register
 * tile, one per block of 256, one for the add; plus the product, alpha and INT8's scale: all of K +
 * 4 covers any way of blocking. */
static void check_matmul(const qemb_ops *op, weights kind, int T, int N, int K, float alpha,
                         int add) {
    const qemb_dtype dtype = kind == OF_INT8 ? QEMB_I8 : QEMB_F16;
    const qemb_config c = {
        .n_layers = 1, .hidden = K, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2};
    rng r = {(uint64_t)(T * 1000003 + N * 1009 + K)};
    qemb_backend *be = backend(op, &c, T, 2);
    uint16_t *W = malloc((size_t)N * K * sizeof *W);
    int8_t *Q = malloc((size_t)N * K);
    const int n_scales = N * ((K + 63) / 64);
    float *scale = malloc((size_t)n_scales * sizeof *scale);
    rng_halves(&r, W, (size_t)N * K, 1);
    for (int i = 0; kind == OF_8_BITS && i < N * K; i++) W[i] &= (uint16_t)~7;
    for (int i = 0; i < n_scales; i++) scale[i] = (float)(0.01 + 0.009 * rng_uniform(&r));
    for (int i = 0; i < N * K; i++) Q[i] = (int8_t)(127.99 * rng_uniform(&r));
    float *x = numbers(&r, (size_t)T * K, 2), *y = numbers(&r, (size_t)T * N, 5);
    double *before = doubles(y, (size_t)T * N), *xd = doubles(x, (size_t)T * K);
    const qemb_mat m = {dtype == QEMB_I8 ? (void *)Q : W,
                        N,
                        K,
                        dtype,
                        alpha,
                        dtype == QEMB_I8 ? scale : (float *)NULL,
                        QEMB_BITS_UNKNOWN};
    qemb_mat placed = m;
    load_matrices(op, be, &placed, NULL);
    if (add)
        op->matmul_add(be, y, (qemb_act *)x, &placed, T);
    else
        op->matmul(be, (qemb_act *)y, (qemb_act *)x, &placed, NULL, T);
    double *want = malloc((size_t)N * sizeof *want), *size = malloc((size_t)N * sizeof *size);
    for (int t = 0; t < T; t++) {
        oracle_matvec(want, size, xd + (size_t)t * K, &m);
        for (int n = 0; n < N; n++) {
            const double start = add ? before[t * N + n] : 0;
            const double expected = start + alpha * want[n], most = fabs((double)alpha);
            const double tol = SLACK * ((K + 4) * U * (most * size[n] + fabs(start)) +
                                        most * rounding(op, x + (size_t)t * K, &m, n, size[n]));
            cr_assert_not(far_off(y[t * N + n], expected, tol),
                          "%s weights %d T=%d N=%d K=%d (%d,%d): %g, want %g", op->name, (int)kind,
                          T, N, K, t, n, (double)y[t * N + n], expected);
        }
    }
    free(W), free(x), free(y), free(before), free(xd), free(want), free(size);
    free(Q), free(scale);
    op->close(be);
}

Test(ops, matmul) {
    const int Ts[] = {1, 5, 6, 7, 13}, Ns[] = {1, 15, 16, 33, 50}, Ks[] = {1, 31, 256, 257, 600};
    for (int o = 0; test_table(o); o++) {
        for (weights kind = 0; kind < N_WEIGHTS; kind++) {
            const qemb_ops *op = test_table(o);
            for (int i = 0; i < 5 * 5 * 5; i++)
                check_matmul(op, kind, Ts[i % 5], Ns[i / 5 % 5], Ks[i / 25], 1, i & 1);
            check_matmul(op, kind, 14, 33, 12350, 1, 1);
            check_matmul(op, kind, 40, 50, 3090, 1, 1); /* many rows, two blocks */
            check_matmul(op, kind, 7, 33, 40, 64, 1);
            check_matmul(op, kind, 7, 33, 40, 64, 0);
            check_matmul(op, kind, 7, 33, 2100, 1, 0); /* blocks of up to 2,048 */
        }
    }
}

/* One row, column or weight more or less than tile registers, pairs of them, groups and chunks. */
Test(ops, matmul_at_tile_edges) {
    const int Ts[] = {15, 16, 17, 32, 33, 65}, Ns[] = {31, 32, 65}, Ks[] = {32, 63, 65, 1025};
    for (int o = 0; test_table(o); o++)
        for (weights kind = 0; kind < N_WEIGHTS; kind++)
            for (int i = 0; i < 6 * 3 * 4; i++)
                check_matmul(test_table(o), kind, Ts[i % 6], Ns[i / 6 % 3], Ks[i / 18], 1, i & 1);
}

/* Sums as large as integers of 16 bits make them: x along W, groups of even numbers, of one number
 * and of one among small ones. A sum that passed 2^31 would come back with another sign. */
Test(ops, matmul_of_parallel_rows) {
    enum { T = 5, N = 33, K = 200 };
    const qemb_config c = {
        .n_layers = 1, .hidden = K, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2};
    const double large[] = {1, 1e10, 1e17, 1e-10, 1e-17};
    static uint16_t W[N * K];
    static float x[T * K], y[T * N];
    for (int o = 0; test_table(o); o++)
        for (int sign = -1; sign <= 1; sign += 2) {
            qemb_backend *be = backend(test_table(o), &c, T, 2);
            const qemb_mat m = {W, N, K, QEMB_F16, 1, NULL, QEMB_BITS_UNKNOWN};
            qemb_mat placed = m;
            /* 1 everywhere, in one column of 64, or 63 times 2^-4 */
            for (int n = 0; n < N; n++)
                for (int k = 0; k < K; k++)
                    W[n * K + k] = k % 64 == n % 64 || n % 3 == 0 ? 0x3c00
                                   : n % 3 == 1                   ? 0
                                                                  : 0x2c00;
            for (int t = 0; t < T; t++)
                for (int k = 0; k < K; k++)
                    x[t * K + k] = (float)(sign * large[t] * oracle_half(W[7 * t * K + k]));
            load_matrices(test_table(o), be, &placed, NULL);
            test_table(o)->matmul(be, (qemb_act *)y, (qemb_act *)x, &placed, NULL, T);
            for (int t = 0; t < T; t++) {
                double *xd = doubles(x + t * K, K), want[N], size[N];
                oracle_matvec(want, size, xd, &m);
                for (int n = 0; n < N; n++) {
                    const double tol =
                        (K + 4) * U * size[n] + rounding(test_table(o), x + t * K, &m, n, size[n]);
                    cr_assert_not(far_off(y[t * N + n], want[n], SLACK * tol),
                                  "%s (%d,%d): %g, want %g +- %g", test_table(o)->name, t, n,
                                  (double)y[t * N + n], want[n], tol);
                }
                free(xd);
            }
            test_table(o)->close(be);
        }
}

/* Bytes of -128 and 127 with x that int8 holds exactly (0 and 1, -1 and 1): no sum of products, of
 * two or more, may leave its 16 or 32 bits. */
Test(ops, matmul_of_the_largest_bytes) {
    enum { T = 4, N = 33, K = 128 };
    static int8_t Q[N * K];
    static float x[T * K], y[T * N], scale[N * QEMB_GROUPS(K)];
    for (int i = 0; i < N * QEMB_GROUPS(K); i++) scale[i] = 1;
    for (int i = 0; i < N * K; i++)
        Q[i] = i / K % 3 == 0 ? -128 : i / K % 3 == 1 || i % 2 ? 127 : -128;
    for (int k = 0; k < K; k++)
        x[k] = 1, x[K + k] = k % 2 ? 0 : 1, x[2 * K + k] = k % 2 ? -1 : 1,
        x[3 * K + k] = k % 64 > 0;
    const qemb_mat m = {Q, N, K, QEMB_I8, 1, scale, QEMB_BITS_UNKNOWN};
    for (int o = 0; test_table(o); o++) {
        if (test_table(o)->math != QEMB_MATH_INT8) continue;
        multiply(test_table(o), y, x, m, T);
        for (int t = 0; t < T; t++) {
            double *xd = doubles(x + t * K, K), want[N], size[N];
            oracle_matvec(want, size, xd, &m);
            for (int n = 0; n < N; n++)
                cr_assert_not(far_off(y[t * N + n], want[n], (K + 4) * U * size[n]),
                              "%s (%d,%d): %g, want %g", test_table(o)->name, t, n,
                              (double)y[t * N + n], want[n]);
            free(xd);
        }
    }
}

/* What a step counted from the least number may meet: the range of a group is no float; the least
 * number is large beside it; the range has an inverse just so, and has none: then each number errs
 * by up to the range. W is bytes, which are not rounded. */
Test(ops, matmul_of_groups_counted_from_low) {
    enum { T = 5, N = 9, K = 192, NO_INVERSE = 4 };
    static int8_t Q[N * K];
    static float x[T * K], y[T * N], scale[N * QEMB_GROUPS(K)];
    rng r = {4};
    for (int i = 0; i < N * K; i++) Q[i] = (int8_t)(127.99 * rng_uniform(&r));
    for (int i = 0; i < N * QEMB_GROUPS(K); i++) scale[i] = 0x1p-14f;
    for (int k = 0; k < K; k++) {
        x[k] = k % 3 ? 3e38f : -3e38f;
        x[K + k] = 1000 + (float)(0.01 * rng_uniform(&r));
        x[2 * K + k] = -x[K + k];
        x[3 * K + k] = (float)(k % 64 + 1) * 0x1p-125f; /* 128 over half the range: 2^127 */
        x[NO_INVERSE * K + k] = (float)(k % 64 + 1) * 0x1p-128f;
    }
    const qemb_mat m = {Q, N, K, QEMB_I8, 1, scale, QEMB_BITS_UNKNOWN};
    for (int o = 0; test_table(o); o++) {
        if (!counts_from_low(test_table(o))) continue;
        multiply(test_table(o), y, x, m, T);
        for (int t = 0; t < T; t++) {
            double *xd = doubles(x + t * K, K), want[N], size[N];
            oracle_matvec(want, size, xd, &m);
            for (int n = 0; n < N; n++) {
                double tol =
                    (K + 4) * U * size[n] + rounding(test_table(o), x + t * K, &m, n, size[n]);
                for (int k = 0; t == NO_INVERSE && k < K; k++)
                    tol += 63 * 0x1p-128 * fabs(oracle_weight(&m, n, k));
                cr_assert_not(far_off(y[t * N + n], want[n], tol), "%s (%d,%d): %g, want %g +- %g",
                              test_table(o)->name, t, n, (double)y[t * N + n], want[n], tol);
            }
            free(xd);
        }
    }
}

/* A number of x or W that is not finite makes its row or its column of y not finite, and no other.
 */
Test(ops, matmul_of_numbers_that_are_not_finite) {
    enum { T = 14, N = 35, K = 150 };
    const qemb_config c = {
        .n_layers = 1, .hidden = K, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2};
    static uint16_t W[N * K];
    static float x[T * K], y[T * N];
    rng r = {3};
    rng_halves(&r, W, N * K, 1);
    rng_floats(&r, x, T * K, 2);
    x[2 * K + 149] = NAN, x[7 * K] = INFINITY, x[12 * K + 70] = -INFINITY;
    W[4 * K + 65] = 0x7e00, W[20 * K + 1] = 0x7c00, W[34 * K + 140] = 0xfc00; /* NaN, Inf, -Inf */
    for (int o = 0; qemb_cpu_table(o); o++) {
        qemb_backend *be = backend(qemb_cpu_table(o), &c, T, 2);
        qemb_mat m = {W, N, K, QEMB_F16, 1, NULL, QEMB_BITS_UNKNOWN};
        load_matrices(qemb_cpu_table(o), be, &m, NULL);
        qemb_cpu_table(o)->matmul(be, (qemb_act *)y, (qemb_act *)x, &m, NULL, T);
        for (int t = 0; t < T; t++)
            for (int n = 0; n < N; n++) {
                const int spoiled = t == 2 || t == 7 || t == 12 || n == 4 || n == 20 || n == 34;
                cr_assert_eq(!isfinite(y[t * N + n]), spoiled, "%s (%d,%d): %g",
                             qemb_cpu_table(o)->name, t, n, (double)y[t * N + n]);
            }
        qemb_cpu_table(o)->close(be);
    }
}

/* The last matrix of a file ends where the map ends. */
Test(ops, matmul_reads_nothing_behind_a_matrix) {
    enum { T = 3, N = 45 };
    const int Ks[] = {1, 15, 63, 64, 65, 531};
    for (int o = 0; test_table(o); o++)
        for (int i = 0; i < 2 * 6; i++) {
            const int K = Ks[i / 2], is_i8 = i % 2;
            const qemb_config c = {
                .n_layers = 1, .hidden = K, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2};
            rng r = {(uint64_t)i};
            uint16_t *W = malloc((size_t)N * K * sizeof *W);
            rng_halves(&r, W, (size_t)N * K, 1); /* QEMB_I8 reads their bytes as weights */
            float *x = numbers(&r, (size_t)T * K, 2), y[T * N];
            float *scale = numbers(&r, (size_t)(N * QEMB_GROUPS(K)), 1);
            qemb_backend *be = backend(test_table(o), &c, T, 2);
            qemb_mat m = {at_page_end(W, (size_t)N * K * (is_i8 ? 1 : 2)),
                          N,
                          K,
                          is_i8 ? QEMB_I8 : QEMB_F16,
                          1,
                          is_i8 ? at_page_end(scale, N * QEMB_GROUPS(K) * sizeof *scale) : NULL,
                          QEMB_BITS_UNKNOWN};
            load_matrices(test_table(o), be, &m, NULL);
            test_table(o)->matmul(be, (qemb_act *)y, (qemb_act *)x, &m, NULL, T);
            test_table(o)->close(be);
            free(W), free(x), free(scale);
        }
}

/* The tables with AVX2 compute in float all but the products of matrices. */
static int has_float_attention(const qemb_ops *op) {
    return op->math == QEMB_MATH_F32 || !strncmp(op->name, "avx2-", 5) ||
           !strncmp(op->name, "avxvnni-", 8);
}

/* Rounding: 3U for a head's norm; for a cos - b sin one U each for the table, product and sum. */
Test(ops, qknorm_rope) {
    for (int o = 0; qemb_cpu_table(o); o++)
        for (int s = 0; s < n_small_configs; s++) {
            const qemb_config *c = &small_configs[s];
            const int H = c->n_heads, K = c->n_kv_heads, hd = c->head_dim, T = 40, P = 10;
            const int ld = (H + 2 * K) * hd;
            rng r = {(uint64_t)s + 1};
            qemb_backend *be = backend(qemb_cpu_table(o), c, c->max_positions, 2);
            float *qkv = numbers(&r, (size_t)T * ld, 2), *qn = numbers(&r, (size_t)hd, 2),
                  *kn = numbers(&r, (size_t)hd, 2);
            double *before = doubles(qkv, (size_t)T * ld);
            /* a prefix of 10 rows, then two texts, of 10 and of 20 rows */
            int32_t pos[40], cu[] = {P, 20, T};
            for (int t = 0; t < T; t++) pos[t] = t < 20 ? t : t - 10;
            const qemb_packed_batch b = {2, T, P, NULL, pos, cu, 0, 0, 0};
            qemb_cpu_table(o)->begin(be, &b);
            qemb_cpu_table(o)->qknorm_rope(be, (qemb_act *)qkv, qn, kn, &b);
            for (int t = 0; t < T; t++)
                for (int h = 0; h < H + 2 * K; h++) {
                    double *head = before + (size_t)t * ld + h * hd, normed[1024];
                    const float *got = qkv + (size_t)t * ld + h * hd;
                    if (h < H + K) {
                        oracle_rmsnorm(head, head, h < H ? qn : kn, hd, c->norm_eps);
                        memcpy(normed, head, (size_t)hd * sizeof *head);
                        oracle_rope(head, hd, pos[t], c->rope_theta);
                    }
                    for (int i = 0; i < hd; i++) {
                        double tol = h < H + K
                                         ? 6 * SLACK * U *
                                               (fabs(normed[i]) + fabs(normed[(i + hd / 2) % hd]))
                                         : 0;
                        cr_assert_not(far_off(got[i], head[i], tol),
                                      "%s (%d, head %d, %d): %g, want %g", qemb_cpu_table(o)->name,
                                      t, h, i, (double)got[i], head[i]);
                    }
                }
            free(qkv), free(qn), free(kn), free(before);
            qemb_cpu_table(o)->close(be);
        }
}

/* RoPE's table covers positions up to max_positions-1. */
Test(ops, rope_reaches_the_last_position) {
    qemb_config c = small_configs[0];
    c.max_positions = 32768;
    const int hd = c.head_dim, ld = 3 * c.n_heads * hd, n = c.max_positions;
    for (int o = 0; qemb_cpu_table(o); o++) {
        qemb_backend *be = backend(qemb_cpu_table(o), &c, n, 2);
        float *qkv = calloc((size_t)n * ld, sizeof *qkv), ones[16];
        int32_t *pos = malloc((size_t)n * sizeof *pos), cu[] = {0, n};
        for (int i = 0; i < hd; i++) ones[i] = 1, qkv[(size_t)(n - 1) * ld + i] = (float)(i + 1);
        for (int t = 0; t < n; t++) pos[t] = t;
        double want[16], normed[16];
        for (int i = 0; i < hd; i++) want[i] = i + 1;
        oracle_rmsnorm(want, want, ones, hd, c.norm_eps);
        memcpy(normed, want, sizeof want);
        oracle_rope(want, hd, n - 1, c.rope_theta);
        const qemb_packed_batch b = {1, n, 0, NULL, pos, cu, 0, 0, 0};
        qemb_cpu_table(o)->begin(be, &b);
        qemb_cpu_table(o)->qknorm_rope(be, (qemb_act *)qkv, ones, ones, &b);
        for (int i = 0; i < hd; i++)
            cr_assert_not(far_off(qkv[(size_t)(n - 1) * ld + i], want[i],
                                  6 * SLACK * U * (normed[i] + normed[(i + hd / 2) % hd])));
        free(qkv), free(pos);
        qemb_cpu_table(o)->close(be);
    }
}

/* Lengths around every tile edge, with a shared prefix of several lengths. Error of a weight: its
 * score's, (hd + 2) U sum|q||k|/sqrt(hd) <= (hd + 2) U reach, twice (the maximum's too); expf 2U
 * (glibc: < 1 ulp); one rescaling (expf and product, 4U) per tile of at least 64 keys; the sums (n
 * U each, numerator and denominator); the division 2U, as it may be a product with the inverse.
 *
 * Tables without has_float_attention multiply integers. A number of q errs by half a step, |q| /
 * 32700, one of k likewise: a score by |q||k| / 32700 (Cauchy and Schwarz), for which exp is no
 * longer a line, and exp itself by 2^-14. Of up to 128 keys a weight times its value's scale errs
 * by half of the sum of those / 32767, a value by half of its row's largest / 8187. */
static void check_attention(const qemb_ops *op, const qemb_config *c, const int *lengths, int B,
                            int P, double scale, int last_only, int bidirectional) {
    const int H = c->n_heads, K = c->n_kv_heads, hd = c->head_dim, ld = (H + 2 * K) * hd,
              Q = H * hd;
    int32_t cu[16], *pos;
    int T = P, longest = 0;
    for (int i = 0; i < B; i++)
        cu[i] = T, T += lengths[i], longest = lengths[i] > longest ? lengths[i] : longest;
    cu[B] = T;
    pos = malloc((size_t)T * sizeof *pos);
    for (int t = 0; t < P; t++) pos[t] = t;
    for (int i = 0; i < B; i++)
        for (int t = 0; t < lengths[i]; t++) pos[cu[i] + t] = P + t;
    rng r = {(uint64_t)(P + 17 * T + hd)};
    qemb_backend *be = backend(op, c, T + P, 2);
    float *qkv = numbers(&r, (size_t)T * ld, scale);
    float *att = numbers(&r, (size_t)T * Q, 1);
    const qemb_packed_batch b = {B, T, P, NULL, pos, cu, bidirectional, 0, 0};
    op->begin(be, &b);
    op->attention(be, (qemb_act *)att, (qemb_act *)qkv, &b,
                  last_only ? QEMB_LAST_ROWS : QEMB_ALL_ROWS);
    const int integers = !has_float_attention(op);
    const size_t n_max = (size_t)(P + longest);
    double *one = malloc(n_max * ld * sizeof *one), *want = malloc(n_max * Q * sizeof *want);
    double *size = malloc(n_max * Q * sizeof *size), *reach = malloc(n_max * H * sizeof *reach);
    double *span = calloc(n_max * Q, sizeof *span),
           *length = calloc(n_max * (H + K), sizeof *length);
    for (int i = 0; i < B; i++) {
        const int n = P + lengths[i];
        for (int t = 0; t < n; t++)
            for (int k = 0; k < ld; k++)
                one[(size_t)t * ld + k] = qkv[(size_t)(t < P ? t : cu[i] + t - P) * ld + k];
        oracle_attention(want, size, reach, one, n, H, K, hd, bidirectional);
        /* Keeps the L2 norms of q and k; fills each value row with its largest magnitude. */
        for (int row = 0; integers && row < n * (H + 2 * K); row++) {
            double *head = one + (size_t)row * hd, square = 0, most = 0;
            const int t = row / (H + 2 * K), h = row % (H + 2 * K);
            for (int k = 0; k < hd; k++)
                square += head[k] * head[k], most = fmax(most, fabs(head[k]));
            if (h < H + K) length[t * (H + K) + h] = sqrt(square);
            /* of a key: the largest norm up to this position */
            if (h >= H && h < H + K && t)
                length[t * (H + K) + h] = fmax(sqrt(square), length[(t - 1) * (H + K) + h]);
            for (int k = 0; h >= H + K && k < hd; k++) head[k] = most;
        }
        if (integers) oracle_attention(span, NULL, NULL, one, n, H, K, hd, bidirectional);
        for (int t = last_only ? n - 1 : 0; t < n; t++)
            for (int k = 0; k < Q; k++) {
                const size_t row = last_only ? (size_t)i : (size_t)(t < P ? t : cu[i] + t - P);
                const int h = k / hd, seen = bidirectional ? n : t + 1;
                const double product =
                    length[t * (H + K) + h] * length[(seen - 1) * (H + K) + H + h / (H / K)];
                const double score =
                    (hd + 2) * U * reach[(size_t)t * H + h] + integers * product / 32700;
                const double e = expm1(2 * score) + (2 * seen + 4 * ((seen - 1) / 64 + 1) + 5) * U +
                                 integers * 0x1p-14;
                const double got = att[row * Q + k], w = want[(size_t)t * Q + k];
                const double tol =
                    2 * e * size[(size_t)t * Q + k] +
                    integers * (128. / 32767 + 1. / 8187) / 2 * span[(size_t)t * Q + k];
                cr_assert_not(far_off(got, w, SLACK * tol),
                              "%s%s B=%d P=%d text %d (%d,%d): %g, want %g", op->name,
                              bidirectional ? ", bidirectional" : "", B, P, i, t, k, got, w);
            }
    }
    free(pos), free(qkv), free(att), free(one), free(want), free(size), free(reach);
    free(span), free(length);
    op->close(be);
}

/* AVX2's integer tables have the attention of avx2, which is tested once. */
Test(ops, attention) {
    const int lengths[] = {1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 3};
    const int prefixes[] = {0, 1, 20, 64, 100, 128};
    for (int o = 0; qemb_cpu_table(o); o++)
        for (int s = 0; s < n_small_configs && !strstr(qemb_cpu_table(o)->name, "avx2-"); s++)
            for (int p = 0; p < 6; p++)
                for (int last = 0; last < 2; last++)
                    check_attention(qemb_cpu_table(o), &small_configs[s], lengths, 12, prefixes[p],
                                    1, last, 0);
}

/* Also a text of many tiles and blocks, beside one of a token. */
Test(ops, bidirectional_attention) {
    const int lengths[] = {1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 3}, longer[] = {1, 391, 2};
    for (int o = 0; qemb_cpu_table(o); o++)
        for (int s = 0; s < n_small_configs && !strstr(qemb_cpu_table(o)->name, "avx2-"); s++)
            for (int last = 0; last < 2; last++) {
                check_attention(qemb_cpu_table(o), &small_configs[s], lengths, 12, 0, 1, last, 1);
                check_attention(qemb_cpu_table(o), &small_configs[s], longer, 3, 0, 1, last, 1);
            }
}

/* Scores of several hundred, of both signs: exp overflows unless the maximum is subtracted. */
Test(ops, attention_with_large_scores) {
    const int lengths[] = {70, 200};
    for (int o = 0; qemb_cpu_table(o); o++) {
        check_attention(qemb_cpu_table(o), &small_configs[1], lengths, 2, 5, 8, 0, 0);
        check_attention(qemb_cpu_table(o), &small_configs[1], lengths, 2, 0, 8, 0, 1);
    }
}

/* Equal values, first with equal weights, then with one weight that is nearly 1: integer sums are
 * largest here. The mean of equal numbers is that number, up to n U in each sum and the division;
 * for integers, up to the rounding of weights and values as above. */
Test(ops, attention_of_equal_values) {
    const int T = 300;
    for (int o = 0; qemb_cpu_table(o); o++)
        for (int kind = 0; kind < 4; kind++) {
            const int peak = kind % 2, bidirectional = kind / 2;
            const qemb_ops *op = qemb_cpu_table(o);
            const qemb_config *c = &small_configs[1];
            const int Q = c->n_heads * c->head_dim, KV = c->n_kv_heads * c->head_dim;
            float *qkv = calloc((size_t)T * (Q + 2 * KV), sizeof *qkv);
            float *att = calloc((size_t)T * Q, sizeof *att);
            int32_t cu[] = {0, T}, *pos = malloc((size_t)T * sizeof *pos);
            for (int t = 0; t < T; t++) {
                float *row = qkv + (size_t)t * (Q + 2 * KV);
                pos[t] = t;
                for (int i = 0; i < Q; i++) row[i] = 10;
                for (int i = 0; peak && t == 0 && i < KV; i++) row[Q + i] = 10;
                for (int i = 0; i < KV; i++) row[Q + KV + i] = -3;
            }
            qemb_backend *be = backend(op, c, T, 2);
            const qemb_packed_batch b = {1, T, 0, NULL, pos, cu, bidirectional, 0, 0};
            op->begin(be, &b);
            op->attention(be, (qemb_act *)att, (qemb_act *)qkv, &b, QEMB_ALL_ROWS);
            const double tol =
                3 * (has_float_attention(op) ? (2 * T + 5) * U
                                             : 2 * 0x1p-14 + (128. / 32767 + 1. / 8187) / 2);
            for (int i = 0; i < T * Q; i++)
                cr_assert_not(far_off(att[i], -3, SLACK * tol), "%s (%d): %g", op->name, i,
                              (double)att[i]);
            free(qkv), free(att), free(pos);
            op->close(be);
        }
}

/* Relative, where the result is not below FLT_MIN: expf, 1 + e, the division, times up; what is
 * rounded to 8 bits next may have an exp of 2^-14.5 and an inverse of 2^-14. */
static double swiglu_error(const qemb_ops *op) {
    const int rough = !has_float_attention(op) && op->math != QEMB_MATH_INT16;
    return 6 * SLACK * U + (rough ? 0x1p-13 : 0);
}

/* W is the identity, so gate and up are x exactly, or x as rounded by the arithmetic. */
Test(ops, gate_up) {
    enum { F = 1001, T = 3 };
    const qemb_config c = {
        .n_layers = 1, .hidden = 2 * F, .ffn = F, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2};
    uint16_t *W = calloc((size_t)4 * F * F, sizeof *W);
    float *scratch = malloc((size_t)T * 2 * F * sizeof *scratch);
    float *product = malloc((size_t)T * 2 * F * sizeof *product);
    const qemb_mat m = {W, 2 * F, 2 * F, QEMB_F16, 1, NULL, QEMB_BITS_UNKNOWN};
    for (int i = 0; i < 2 * F; i++) W[(size_t)i * 2 * F + i] = 0x3c00; /* 1 */
    for (int o = 0; test_table(o); o++) {
        rng r = {5};
        qemb_backend *be = backend(test_table(o), &c, T, 2);
        float *gu = numbers(&r, (size_t)T * 2 * F, 4), h[T * F];
        for (int i = 0; i < F; i++) gu[i] = (float)(i - F / 2) * 0.25f; /* -125 .. 125 */
        qemb_mat w = m, wgu = m;
        load_matrices(test_table(o), be, &w, &wgu);
        test_table(o)->matmul(be, (qemb_act *)product, (qemb_act *)gu, &w, NULL, T);
        test_table(o)->gate_up(be, (qemb_act *)h, (qemb_act *)scratch, (qemb_act *)gu, &wgu, T);
        for (int t = 0; t < T; t++)
            for (int i = 0; i < F; i++) {
                const float gate = product[t * 2 * F + i], up = product[t * 2 * F + F + i];
                if (test_table(o)->math == QEMB_MATH_F32)
                    cr_assert(gate == gu[t * 2 * F + i] && up == gu[t * 2 * F + F + i]);
                const double want = oracle_swiglu(gate, up);
                const double tol = swiglu_error(test_table(o)) * fabs(want) + 1e-34 * fabs(up);
                cr_assert_not(far_off(h[t * F + i], want, tol), "%s gate %g up %g: %g, want %g",
                              test_table(o)->name, (double)gate, (double)up, (double)h[t * F + i],
                              want);
            }
        free(gu);
        test_table(o)->close(be);
    }
    free(W), free(scratch), free(product);
}

/* More columns than any table adds up in registers (AVX-512's int8: 12,288): gate and up are what
 * the matmul makes of them, which its own test holds to the oracle. */
Test(ops, gate_up_of_many_columns) {
    enum { F = 21, K = 12350, T = 14 };
    const qemb_config c = {
        .n_layers = 1, .hidden = K, .ffn = F, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2};
    rng r = {9};
    uint16_t *W = malloc((size_t)2 * F * K * sizeof *W);
    float *x = numbers(&r, (size_t)T * K, 0.05), *scratch = numbers(&r, (size_t)T * 2 * F, 1);
    float *product = numbers(&r, (size_t)T * 2 * F, 1), *h = numbers(&r, (size_t)T * F, 1);
    rng_halves(&r, W, (size_t)2 * F * K, 1);
    const qemb_mat m = {W, 2 * F, K, QEMB_F16, 1, NULL, QEMB_BITS_UNKNOWN};
    for (int o = 0; test_table(o); o++) {
        qemb_backend *be = backend(test_table(o), &c, T, 2);
        qemb_mat w = m, wgu = m;
        load_matrices(test_table(o), be, &w, &wgu);
        test_table(o)->matmul(be, (qemb_act *)product, (qemb_act *)x, &w, NULL, T);
        test_table(o)->gate_up(be, (qemb_act *)h, (qemb_act *)scratch, (qemb_act *)x, &wgu, T);
        for (int i = 0; i < T * F; i++) {
            const float gate = product[i / F * 2 * F + i % F],
                        up = product[(i / F * 2 + 1) * F + i % F];
            const double want = oracle_swiglu(gate, up);
            const double tol = swiglu_error(test_table(o)) * fabs(want) + 1e-34 * fabs(up);
            cr_assert_not(far_off(h[i], want, tol), "%s %d: %g, want %g", test_table(o)->name, i,
                          (double)h[i], want);
        }
        test_table(o)->close(be);
    }
    free(W), free(x), free(scratch), free(product), free(h);
}

Test(ops, gather_and_pool) {
    enum { D = 37, T = 9, B = 3 };
    const qemb_config c = {
        .hidden = D, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2, .norm_eps = 1e-6f};
    const int32_t pos[T] = {0, 1, 2, 3, 2, 2, 3, 4, 5}, cu[] = {2, 4, 5, T};
    const qemb_packed_batch b = {B, T, 2, NULL, pos, cu, 0, 0, 0};
    for (int o = 0; qemb_cpu_table(o); o++) {
        rng r = {6};
        qemb_backend *be = backend(qemb_cpu_table(o), &c, T, 2);
        float *x = numbers(&r, T * D, 3), *w = numbers(&r, D, 2), y[B * D], out[B * D];
        qemb_cpu_table(o)->begin(be, &b);
        qemb_cpu_table(o)->gather(be, y, x, &b, QEMB_LAST_ROWS);
        for (int i = 0; i < B; i++)
            cr_assert_arr_eq(y + i * D, x + (cu[i + 1] - 1) * D, D * sizeof *y);
        qemb_cpu_table(o)->pool(be, out, y, w, B);
        for (int i = 0; i < B; i++) {
            double *row = doubles(y + i * D, D), want[D];
            oracle_rmsnorm(want, row, w, D, c.norm_eps);
            for (int k = 0; k < D; k++)
                cr_assert_not(far_off(out[i * D + k], want[k], 3 * SLACK * U * fabs(want[k])));
            free(row);
        }
        free(x), free(w);
        qemb_cpu_table(o)->close(be);
    }
}

/* Lays B texts of two tokens that all have, then own ones: text i's are rows first[i] ..
 * first[i+1]-1 of x (.., D). The two are x's first rows. P: how many of them are shared, 0 or 2. */
static void lay_texts(float *to, int32_t *cu, const float *x, const int *first, int B, size_t D,
                      int P) {
    int T = P;
    memcpy(to, x, (size_t)P * D * sizeof *to);
    for (int i = 0; i < B; i++) {
        const int own = first[i + 1] - first[i];
        cu[i] = T;
        memcpy(to + T * D, x, (size_t)(2 - P) * D * sizeof *to);
        T += 2 - P;
        memcpy(to + T * D, x + first[i] * D, (size_t)own * D * sizeof *to);
        T += own;
    }
    cu[B] = T;
}

/* Three roundings of a normed number, as in rmsnorm; the sum is in double; one of the mean. Numbers
 * of one sign, whose sum in float would err by more. With a shared prefix the same bits as without.
 * pool without weights copies. */
Test(ops, gather_mean) {
    enum { D = 131, B = 3, ROWS = 2005, MOST = ROWS + 4 };
    const qemb_config c = {
        .hidden = D, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2, .norm_eps = 1e-6f};
    const int first[] = {2, 4, ROWS - 1, ROWS};
    for (int o = 0; qemb_cpu_table(o); o++) {
        const qemb_ops *op = qemb_cpu_table(o);
        rng r = {6};
        qemb_backend *be = backend(op, &c, MOST, 2);
        float *x = numbers(&r, ROWS * D, 3), *w = numbers(&r, D, 2),
              *laid = numbers(&r, MOST * D, 1);
        float y[2][B * D], out[B * D];
        for (int i = 0; i < ROWS * D; i++) x[i] = fabsf(x[i]);
        for (int shared = 0; shared < 2; shared++) {
            int32_t pos[MOST] = {0}, cu[B + 1];
            lay_texts(laid, cu, x, first, B, D, 2 * shared);
            const qemb_packed_batch b = {B, cu[B], 2 * shared, NULL, pos, cu, 0, 0, 0};
            op->begin(be, &b);
            op->gather_mean(be, y[shared], laid, w, &b);
        }
        cr_assert_arr_eq(y[0], y[1], sizeof y[0], "%s: sharing changes bits", op->name);
        cr_assert_eq(op->pool(be, out, y[0], NULL, B), 0);
        cr_assert_arr_eq(out, y[1], sizeof out, "%s: pool changes bits", op->name);
        double *rows = doubles(x, ROWS * D), size[D], want[D];
        for (int t = 0; t < ROWS; t++) oracle_rmsnorm(rows + t * D, rows + t * D, w, D, c.norm_eps);
        for (int i = 0; i < B; i++) {
            const int n = 2 + first[i + 1] - first[i];
            memset(want, 0, sizeof want), memset(size, 0, sizeof size);
            for (int t = 0; t < ROWS; t++)
                for (int k = 0; (t < 2 || (t >= first[i] && t < first[i + 1])) && k < D; k++)
                    want[k] += rows[t * D + k] / n, size[k] += fabs(rows[t * D + k]) / n;
            for (int k = 0; k < D; k++)
                cr_assert_not(
                    far_off(y[0][i * D + k], want[k], SLACK * U * (3 * size[k] + fabs(want[k]))),
                    "%s text %d (%d): %g, want %g", op->name, i, k, (double)y[0][i * D + k],
                    want[k]);
        }
        free(x), free(w), free(laid), free(rows);
        op->close(be);
    }
}

Test(ops, unit_cuts_then_scales) {
    const float v[] = {3, 4, 12, 84};
    float out[4];
    cr_assert_eq(qemb_l2_normalize(out, v, 2), 0);
    cr_assert(out[0] == 0.6f && out[1] == 0.8f);
    cr_assert_eq(qemb_l2_normalize(out, v, 4), 0);
    cr_assert(out[3] == (float)(84 / 85.0));
    const float huge[] = {3e38f, 3e38f}, bad[] = {1, NAN}, inf[] = {1, -INFINITY}, zero[] = {0, 0};
    cr_assert_eq(qemb_l2_normalize(out, huge, 2), 0); /* its square is not a float */
    cr_assert_not(far_off(out[1], sqrt(0.5), U));
    cr_assert_eq(qemb_l2_normalize(out, bad, 2), -1);
    cr_assert_eq(qemb_l2_normalize(out, inf, 2), -1);
    cr_assert_eq(qemb_l2_normalize(out, zero, 2), -1);
    cr_assert_eq(qemb_l2_normalize(out, bad, 1), 0);
}
