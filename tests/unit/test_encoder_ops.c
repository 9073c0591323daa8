/* test_encoder_ops.c - the ops of BERT's forward in every CPU table, compared with the
 * double-precision oracle; what they share with Qwen3's is in test_ops.c, which derives the bounds.
 */
#include "emulated_amx.h"
#include "oracle.h"
#include "oracle_encoder.h"
#include "table_support.h"

static qemb_config norm_config(int D, float eps) {
    return (qemb_config){
        .hidden = D, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2, .norm_eps = eps};
}

/* ---- layernorm ------------------------------------------------------------------------------- */

/* Numbers off a mean err by 2 U, as the mean has two parts; so their squares do by 4, and the root
 * by 2; the scale, its product and the one with w by 1 each: 7 U without b, and 1 of the result.
 * The mean itself errs by 2^-48 of its size, and by the sum's n roundings in double: in the oracle,
 * too. */
static double layernorm_tolerance(const double *t, const float *w, const float *b, int n, int i,
                                  double want, double eps) {
    double mean = 0, size = 0, variance = 0;
    for (int k = 0; k < n; k++) mean += t[k] / n, size += fabs(t[k]) / n;
    for (int k = 0; k < n; k++) variance += (t[k] - mean) * (t[k] - mean) / n;
    const double of_mean = 2 * (n * 0x1p-53 + 0x1p-48) * size / sqrt(variance + eps);
    return SLACK * (7 * U * fabs(want - b[i]) + U * fabs(want) + of_mean * fabs((double)w[i]));
}

/* Rows: near 0, where eps matters; all equal; with a mean far above the deviation; with a massive
 * number; others. */
static void check_layernorm(const qemb_ops *op, int D, int with_bias, float eps) {
    enum { T = 11 };
    const qemb_config c = norm_config(D, eps);
    rng r = {(uint64_t)D};
    qemb_backend *be = backend(op, &c, T, 2);
    float *x = numbers(&r, (size_t)T * D, 3), *w = numbers(&r, (size_t)D, 2);
    float *b = numbers(&r, (size_t)D, 1), *bias = numbers(&r, (size_t)D, 1);
    float *y = numbers(&r, (size_t)T * D, 1);
    double *t = malloc((size_t)D * sizeof *t), *want = malloc((size_t)D * sizeof *want);
    for (int i = 0; i < D; i++) {
        x[i] = x[i] * 1e-3f - (with_bias ? bias[i] : 0);
        x[D + i] = 0.7f;
        x[2 * D + i] += 5000;
    }
    x[3 * D] = 1e9f;
    float *before = malloc((size_t)T * D * sizeof *x);
    memcpy(before, x, (size_t)T * D * sizeof *x);
    op->layernorm(be, (qemb_act *)y, x, with_bias ? bias : NULL, w, b, T);
    cr_assert_arr_eq(x, y, (size_t)T * D * sizeof *x, "%s: x is not y", op->name);
    for (int row = 0; row < T; row++) {
        for (int i = 0; i < D; i++) {
            const float sum = before[row * D + i] + (with_bias ? bias[i] : 0); /* rounded */
            t[i] = sum;
        }
        oracle_layernorm(want, t, w, b, D, eps);
        for (int i = 0; i < D; i++) {
            const double tol = layernorm_tolerance(t, w, b, D, i, want[i], eps);
            cr_assert_not(far_off(y[row * D + i], want[i], tol), "%s D=%d (%d,%d): %g, want %g",
                          op->name, D, row, i, (double)y[row * D + i], want[i]);
        }
    }
    free(x), free(w), free(b), free(bias), free(y), free(t), free(want), free(before);
    op->close(be);
}

Test(encoder_ops, layernorm) {
    const int sizes[] = {1, 2, 7, 8, 9, 16, 31, 33, 384, 1024, 2565};
    for (int o = 0; test_table(o); o++)
        for (int s = 0; s < (int)(sizeof sizes / sizeof *sizes); s++)
            for (int with_bias = 0; with_bias < 2; with_bias++)
                check_layernorm(test_table(o), sizes[s], with_bias, s % 2 ? 1e-5f : 1e-12f);
}

/* A number that is not finite spoils its own row alone. */
Test(encoder_ops, layernorm_of_numbers_that_are_not_finite) {
    enum { T = 9, D = 37 };
    const qemb_config c = norm_config(D, 1e-5f);
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int o = 0; test_table(o); o++) {
        rng r = {3};
        qemb_backend *be = backend(test_table(o), &c, T, 2);
        float *x = numbers(&r, T * D, 1), *w = numbers(&r, D, 1), *b = numbers(&r, D, 1), y[T * D];
        for (int i = 0; i < 3; i++) x[(2 * i + 1) * D + 36 - i] = bad[i];
        test_table(o)->layernorm(be, (qemb_act *)y, x, NULL, w, b, T);
        for (int i = 0; i < T * D; i++)
            cr_assert_eq(!isfinite(y[i]), i / D % 2 && i / D < 6, "%s row %d: %g",
                         test_table(o)->name, i / D, (double)y[i]);
        free(x), free(w), free(b);
        test_table(o)->close(be);
    }
}

/* ---- products with a bias -------------------------------------------------------------------- */

typedef struct { /* a table with W (N, K) loaded, and what it multiplies */
    const qemb_ops *op;
    qemb_backend *be;
    qemb_mat w;
    uint16_t *W;
    float *x, *bias; /* (T, K), (N) */
    int T, N, K;
} product;

static void product_open(product *p, const qemb_ops *op, int T, int N, int K, int threads) {
    const qemb_config c = {
        .n_layers = 1, .hidden = K, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2, .ffn = N};
    rng r = {(uint64_t)(T + N + K)};
    *p = (product){op, backend(op, &c, T, threads), .T = T, .N = N, .K = K};
    p->W = malloc((size_t)N * K * sizeof *p->W);
    rng_halves(&r, p->W, (size_t)N * K, 1);
    p->x = numbers(&r, (size_t)T * K, 2), p->bias = numbers(&r, (size_t)N, 5);
    p->w = (qemb_mat){p->W, N, K, QEMB_F16, 1, NULL, QEMB_BITS_UNKNOWN};
    load_matrices(op, p->be, &p->w, NULL);
}

static void product_close(product *p) {
    p->op->close(p->be);
    free(p->W), free(p->x), free(p->bias);
}

/* Without a bias test_ops compares the product with the oracle. With one, the sums are the same; y
 * is rounded when the bias is added, and, as in the product without, once for each part of K, of 64
 * columns or more. Terms: sums of |x| |W|, and the bias. */
static void check_bias(const qemb_ops *op, int T, int N, int K) {
    product p;
    product_open(&p, op, T, N, K, 2);
    float *plain = numbers(&(rng){1}, (size_t)T * N, 1), *y = numbers(&(rng){2}, (size_t)T * N, 1);
    op->matmul(p.be, (qemb_act *)plain, (qemb_act *)p.x, &p.w, NULL, T);
    op->matmul(p.be, (qemb_act *)y, (qemb_act *)p.x, &p.w, p.bias, T);
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) {
            double size = fabs((double)p.bias[n]);
            for (int k = 0; k < K; k++)
                size += fabs(p.x[t * K + k] * oracle_half(p.W[(size_t)n * K + k]));
            const double want = (double)plain[t * N + n] + p.bias[n];
            cr_assert_not(far_off(y[t * N + n], want, SLACK * 2 * (K / 64 + 2) * U * size),
                          "%s T=%d N=%d K=%d (%d,%d): %g, want %g", op->name, T, N, K, t, n,
                          (double)y[t * N + n], want);
        }
    free(plain), free(y);
    product_close(&p);
}

Test(encoder_ops, matmul_with_bias) {
    const int Ts[] = {1, 5, 6, 13, 40}, Ns[] = {1, 15, 33, 50}, Ks[] = {1, 64, 300, 2100};
    for (int o = 0; test_table(o); o++) {
        for (int i = 0; i < 5 * 4 * 4; i++)
            check_bias(test_table(o), Ts[i % 5], Ns[i / 5 % 4], Ks[i / 20]);
        check_bias(test_table(o), 14, 33, 6400); /* several parts of K in every table */
    }
}

/* gelu(t) errs by 15 U of itself (gelu.h). Below t = -13.2, where exp(-t^2 / 2) is below 2^-126 and
 * so may be 0, it errs by all of |t Phi(t)| = exp(-t^2 / 2) / sqrt(2 pi), less than 2^-127. A table
 * may add the bias in double or fused, and so have a t that errs by U less than matmul's: times
 * gelu's slope, Phi + t phi. */
static double gelu_tolerance(double t) {
    const double phi = exp(-t * t / 2) / sqrt(2 * acos(-1)), cdf = erfc(-t / sqrt(2)) / 2;
    return SLACK * (15 * U * fabs(oracle_gelu(t)) + U * fabs(t * (cdf + t * phi))) + 0x1p-127;
}

/* Biases from -20 to 20 make all of GELU's range, also far below -13, where it is 0. The tables'
 * own matmul with this bias makes its argument. */
static void check_gelu(const qemb_ops *op, int T, int N, int K) {
    product p;
    product_open(&p, op, T, N, K, 2);
    for (int n = 0; n < N; n++) p.bias[n] = 40 * ((float)n / (float)N - 0.5f);
    float *t = numbers(&(rng){1}, (size_t)T * N, 1), *h = numbers(&(rng){2}, (size_t)T * N, 1);
    op->matmul(p.be, (qemb_act *)t, (qemb_act *)p.x, &p.w, p.bias, T);
    op->matmul_gelu(p.be, (qemb_act *)h, (qemb_act *)p.x, &p.w, p.bias, T);
    for (int i = 0; i < T * N; i++) {
        const double want = oracle_gelu(t[i]), tol = gelu_tolerance(t[i]);
        cr_assert_not(far_off(h[i], want, tol), "%s T=%d N=%d K=%d gelu(%g): %g, want %g +- %g",
                      op->name, T, N, K, (double)t[i], (double)h[i], want, tol);
    }
    free(t), free(h);
    product_close(&p);
}

Test(encoder_ops, matmul_gelu) {
    for (int o = 0; test_table(o); o++) {
        check_gelu(test_table(o), 7, 1003, 5);
        check_gelu(test_table(o), 40, 77, 64);
        check_gelu(test_table(o), 3, 65, 2100);
        check_gelu(test_table(o), 14, 33, 6400);
    }
}

/* W is 0 and the bias is the argument: all that is special, and each at every place of a vector. */
Test(encoder_ops, gelu_of_special_numbers) {
    enum { N = 45, K = 3 };
    const float special[] = {0, -0.0f, 1e-30f, -1e-30f, INFINITY, -INFINITY, NAN, 1e30f, -1e30f};
    for (int o = 0; test_table(o); o++)
        for (int shift = 0; shift < 9; shift++) {
            product p;
            float h[2 * N];
            product_open(&p, test_table(o), 2, N, K, 1);
            memset(p.x, 0, 2 * K * sizeof *p.x);
            for (int n = 0; n < N; n++) p.bias[n] = special[(n + shift) % 9];
            p.op->matmul_gelu(p.be, (qemb_act *)h, (qemb_act *)p.x, &p.w, p.bias, 2);
            for (int i = 0; i < 2 * N; i++) {
                const double t = p.bias[i % N], want = t < -1e29 ? 0 : oracle_gelu(t);
                if (isnan(t) || t == -INFINITY) /* as of -Inf the plain table makes NaN */
                    cr_assert(isnan(h[i]), "%s gelu(%g): %g", p.op->name, t, (double)h[i]);
                else if (t == INFINITY)
                    cr_assert_eq(h[i], INFINITY, "%s gelu(Inf): %g", p.op->name, (double)h[i]);
                else
                    cr_assert_not(far_off(h[i], want, 15 * U * fabs(want)), "%s gelu(%g): %g",
                                  p.op->name, t, (double)h[i]);
            }
            product_close(&p);
        }
}

/* A row has the bits that it has alone, in any number of rows and for any number of threads. */
Test(encoder_ops, rows_have_the_same_bits_in_any_batch) {
    enum { T = 97, N = 77, K = 300 };
    const int Ts[] = {2, 5, 6, 7, 13, 37, T};
    for (int o = 0; test_table(o); o++) {
        const qemb_ops *op = test_table(o);
        static float want[3][T * N], got[3][T * N], x[T * N];
        for (int threads = 1; threads <= 3; threads += 2)
            for (int i = threads == 1 ? -1 : 0; i < 7; i++) {
                const int rows = i < 0 ? 1 : Ts[i];
                product p;
                product_open(&p, op, T, N, K, threads);
                const qemb_config c = norm_config(N, 1e-5f);
                qemb_backend *norm = backend(op, &c, T, threads);
                float(*to)[T * N] = i < 0 ? want : got;
                for (int t = i < 0 ? 0 : T - rows; t < T; t += rows) {
                    qemb_act *in = (qemb_act *)(p.x + (size_t)t * K);
                    op->matmul(p.be, (qemb_act *)(to[0] + t * N), in, &p.w, p.bias, rows);
                    op->matmul_gelu(p.be, (qemb_act *)(to[1] + t * N), in, &p.w, p.bias, rows);
                    memcpy(x, to[0] + t * N, (size_t)rows * N * sizeof *x);
                    op->layernorm(norm, (qemb_act *)(to[2] + t * N), x, p.bias, p.bias, p.bias,
                                  rows);
                }
                for (int k = 0; i >= 0 && k < 3; k++)
                    cr_assert_arr_eq(got[k] + (T - rows) * N, want[k] + (T - rows) * N,
                                     (size_t)rows * N * sizeof **got, "%s op %d T=%d %d threads",
                                     op->name, k, rows, threads);
                product_close(&p);
                op->close(norm);
            }
    }
}

/* ---- memory ---------------------------------------------------------------------------------- */

/* Vectors and rows of odd sizes, the last numbers of a page: nothing behind them is read or
 * written. */
Test(encoder_ops, nothing_behind_a_row_is_touched) {
    enum { T = 3, K = 5 };
    for (int o = 0; test_table(o); o++)
        for (int N = 1; N < 36; N += N % 16 == 15 ? 1 : 3) {
            const qemb_ops *op = test_table(o);
            const qemb_config c = norm_config(N, 1e-5f);
            product p;
            product_open(&p, op, T, N, K, 2);
            float *x = at_page_end(p.bias, (size_t)N * sizeof *p.bias),
                  *y = at_page_end(p.bias, (size_t)N * sizeof *p.bias);
            float *w = at_page_end(p.bias, (size_t)N * sizeof *p.bias),
                  *b = at_page_end(p.bias, (size_t)N * sizeof *p.bias);
            float *bias = at_page_end(p.bias, (size_t)N * sizeof *p.bias),
                  *h = calloc((size_t)T * N, sizeof *h);
            float *out = at_page_end(h, (size_t)T * N * sizeof *h);
            qemb_backend *be = backend(op, &c, 1, 1);
            op->layernorm(be, (qemb_act *)y, x, bias, w, b, 1);
            op->matmul(p.be, (qemb_act *)out, (qemb_act *)p.x, &p.w, bias, T);
            op->matmul_gelu(p.be, (qemb_act *)out, (qemb_act *)p.x, &p.w, bias, T);
            free(h);
            op->close(be);
            product_close(&p);
        }
}

/* ---- embed, gather, gather_mean -------------------------------------------------------------- */

/* The sum of two floats, rounded once: the same bits in every table. The positions' table ends
 * where a page ends. */
Test(encoder_ops, embed_with_positions) {
    enum { V = 50, ROWS = 9, T = 70 };
    const int sizes[] = {1, 7, 16, 37, 384};
    for (int o = 0; test_table(o); o++)
        for (int s = 0; s < 5; s++) {
            const int D = sizes[s];
            const qemb_config c = {
                .hidden = D, .vocab = V, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2};
            rng r = {(uint64_t)D};
            uint16_t *table = malloc((size_t)V * D * sizeof *table);
            rng_halves(&r, table, (size_t)V * D, 1);
            float *drawn = numbers(&r, (size_t)ROWS * D, 1), *x = numbers(&r, (size_t)T * D, 1);
            const float *pos_emb = at_page_end(drawn, (size_t)ROWS * D * sizeof *drawn);
            const qemb_mat m = {table, V, D, QEMB_F16, 1, NULL, QEMB_BITS_UNKNOWN};
            int32_t tokens[T], pos[T], cu[] = {0, T};
            for (int t = 0; t < T; t++) tokens[t] = t * 7 % V, pos[t] = (t * 5 + 8) % ROWS;
            const qemb_packed_batch b = {1, T, 0, tokens, pos, cu, 1, 0, 0};
            qemb_backend *be = backend(test_table(o), &c, T, 2);
            test_table(o)->begin(be, &b);
            test_table(o)->embed(be, x, &m, pos_emb, &b);
            for (int t = 0; t < T; t++)
                for (int i = 0; i < D; i++) {
                    const float want = (float)(oracle_half(table[tokens[t] * D + i]) +
                                               (double)pos_emb[pos[t] * D + i]);
                    cr_assert_eq(x[t * D + i], want, "%s D=%d (%d,%d)", test_table(o)->name, D, t,
                                 i);
                }
            free(table), free(drawn), free(x);
            test_table(o)->close(be);
        }
}

/* The first rows are copied; the means are of rows as they are, summed in double. */
Test(encoder_ops, gather_first_and_gather_mean) {
    enum { D = 131, T = 600, B = 4 };
    const qemb_config c = norm_config(D, 1e-5f);
    const int32_t cu[] = {0, 2, 3, 10, T};
    int32_t pos[T] = {0};
    const qemb_packed_batch b = {B, T, 0, NULL, pos, cu, 1, 0, 0};
    for (int o = 0; test_table(o); o++) {
        rng r = {6};
        qemb_backend *be = backend(test_table(o), &c, T, 2);
        float *x = numbers(&r, T * D, 3), y[B * D];
        test_table(o)->begin(be, &b);
        test_table(o)->gather(be, y, x, &b, QEMB_FIRST_ROWS);
        for (int i = 0; i < B; i++)
            cr_assert_arr_eq(y + i * D, x + cu[i] * D, D * sizeof *y, "%s", test_table(o)->name);
        test_table(o)->gather_mean(be, y, x, NULL, &b);
        for (int i = 0; i < B * D; i++) {
            double want = 0, size = 0;
            const int n = cu[i / D + 1] - cu[i / D];
            for (int t = cu[i / D]; t < cu[i / D + 1]; t++)
                want += (double)x[t * D + i % D] / n, size += fabs((double)x[t * D + i % D]) / n;
            cr_assert_not(far_off(y[i], want, U * fabs(want) + 2 * T * 0x1p-53 * size),
                          "%s (%d,%d): %g, want %g", test_table(o)->name, i / D, i % D,
                          (double)y[i], want);
        }
        free(x);
        test_table(o)->close(be);
    }
}

/* ---- attention of whole texts ---------------------------------------------------------------- */

/* Only the rows of text i, from its own rows of qkv; the bounds of check_attention in test_ops. */
static void compare_text(const qemb_ops *op, const qemb_config *c, const float *att,
                         const float *qkv, int n) {
    const int H = c->n_heads, hd = c->head_dim, Q = H * hd;
    double *one = malloc((size_t)n * 3 * Q * sizeof *one);
    double *want = malloc((size_t)n * Q * sizeof *want),
           *size = malloc((size_t)n * Q * sizeof *size);
    double *reach = malloc((size_t)n * H * sizeof *reach);
    for (int i = 0; i < n * 3 * Q; i++) one[i] = qkv[i];
    oracle_attention(want, size, reach, one, n, H, H, hd, 1);
    for (int i = 0; i < n * Q; i++) {
        const double score = (hd + 2) * U * reach[i / hd];
        const double e = expm1(2 * score) + (2 * n + 4 * ((n - 1) / 64 + 1) + 5) * U;
        cr_assert_not(far_off(att[i], want[i], SLACK * 2 * e * size[i]),
                      "%s hd=%d n=%d (%d,%d): %g, want %g", op->name, hd, n, i / Q, i % Q,
                      (double)att[i], want[i]);
    }
    free(one), free(want), free(size), free(reach);
}

/* Texts around the edges of tiles and blocks. Tables that attend in float are compared with the
 * oracle. In all, a text has the bits that it has alone, its first row those of FIRST_ROWS, and
 * rows that are computed some at a time those of all at once. */
static void check_whole_texts(const qemb_ops *op, int H, int hd) {
    enum { B = 8 };
    const int lengths[B] = {1, 2, 33, 127, 128, 129, 300, 5}, ld = 3 * H * hd, Q = H * hd;
    const qemb_config c = {.n_layers = 1,
                           .hidden = Q,
                           .n_heads = H,
                           .n_kv_heads = H,
                           .head_dim = hd,
                           .attention = QEMB_BIDIRECTIONAL};
    int32_t cu[B + 1] = {0}, pos[1024] = {0};
    for (int i = 0; i < B; i++) cu[i + 1] = cu[i] + lengths[i];
    const int T = cu[B];
    rng r = {(uint64_t)hd};
    float *qkv = numbers(&r, (size_t)T * ld, 1), *att = numbers(&r, (size_t)T * Q, 1);
    float *other = numbers(&r, (size_t)T * Q, 1);
    qemb_backend *be = backend(op, &c, T, 2);
    qemb_packed_batch b = {B, T, 0, NULL, pos, cu, 1, 0, 0};
    op->begin(be, &b);
    op->attention(be, (qemb_act *)att, (qemb_act *)qkv, &b, QEMB_ALL_ROWS);
    op->attention(be, (qemb_act *)other, (qemb_act *)qkv, &b, QEMB_FIRST_ROWS);
    for (int i = 0; i < B; i++)
        cr_assert_arr_eq(other + i * Q, att + cu[i] * Q, (size_t)Q * sizeof *att,
                         "%s hd=%d: first row of text %d", op->name, hd, i);
    for (b.first = 0; b.first < T; b.first += b.rows) {
        b.rows = T - b.first < 50 ? T - b.first : 50;
        op->attention(be, (qemb_act *)other, (qemb_act *)qkv, &b, QEMB_ALL_ROWS);
    }
    cr_assert_arr_eq(other, att, (size_t)T * Q * sizeof *att, "%s hd=%d: in steps", op->name, hd);
    for (int i = 0; i < B; i++) {
        const int32_t alone[] = {0, lengths[i]};
        const qemb_packed_batch one = {1, lengths[i], 0, NULL, pos, alone, 1, 0, 0};
        const float *own = qkv + (size_t)cu[i] * ld;
        op->attention(be, (qemb_act *)other, (const qemb_act *)own, &one, QEMB_ALL_ROWS);
        cr_assert_arr_eq(other, att + cu[i] * Q, (size_t)lengths[i] * Q * sizeof *att,
                         "%s hd=%d: text %d alone", op->name, hd, i);
        if (op->math == QEMB_MATH_F32 || !strncmp(op->name, "avx2-", 5))
            compare_text(op, &c, other, own, lengths[i]);
    }
    free(qkv), free(att), free(other);
    op->close(be);
}

Test(encoder_ops, attention_of_whole_texts) {
    for (int o = 0; test_table(o); o++) {
        check_whole_texts(test_table(o), 3, 64);
        check_whole_texts(test_table(o), 2, 32);
        check_whole_texts(test_table(o), 2, 18);
        check_whole_texts(test_table(o), 1, 2);
    }
}
