/* test_cuda_encoder.cu - what BERT's forward has of its own: its kernels and ops against double
 * precision, encoders on the CUDA tables against the CPU path and against themselves in other
 * batches. Each bound is derived where it stands; U is half an ulp of float.
 *
 * The bound on cosines is that of test_cuda_model.cu: a layer rounds eight times on the way into
 * the residual stream (two norms; qkv before and behind its bias; weights and output of attention;
 * the MLP's product, h), so the vector's relative error is about sqrt(8 L) * 2^-11 / sqrt(3) =
 * 1.4e-3 for L = 3, four times that if norms and softmax amplify it: 5.5e-3. 1 - cosine is half its
 * square, 1.5e-5. FP8: accuracy_case in test_cuda_quantize.cu, where a branch passes as many
 * products.
 */
#include "cuda_attention.h"
#include "cuda_model.h"

#include "backends/cuda/quantize.cuh"

constexpr double FP8_GAP = 2.2e-2;

/* ---- kernels --------------------------------------------------------------------------------- */

/* A row of layernorm in double, and the error of its numbers in float, but for their last rounding.
 * z is off by U |z|, its mean by the (4 V or 8 V) + 13 sums and a division, each U of the largest
 * |z|: so is every z - mean. The deviation takes as much relative to itself, and half the sums of
 * its squares. */
struct normed_row {
    std::vector<double> want;
    double off = 0;
    normed_row(const float *x, const float *bias, const float *w, const float *b, int D, double eps,
               int sums)
        : want(D) {
        std::vector<double> z(D);
        double most = 0, mean = 0, variance = 0;
        for (int i = 0; i < D; i++) {
            z[i] = (double)x[i] + (bias ? (double)bias[i] : 0);
            most = std::max(most, fabs(z[i]));
            mean += z[i] / D;
        }
        for (double v : z) variance += (v - mean) * (v - mean) / D;
        oracle_layernorm(want.data(), z.data(), w, b, D, eps);
        const double s = 1 / sqrt(variance + eps), e = (sums + 16) * U * most;
        for (int i = 0; i < D; i++)
            off = std::max(off, fabs(w[i]) * s *
                                        (e + fabs(z[i] - mean) * (e * s + (sums / 2 + 12) * U)) +
                                    4 * U * (fabs(want[i]) + fabs(b[i])));
    }
};

/* x is off by the bound of normed_row; y is x, rounded */
template <class A, int V>
static void layernorm_case(int D, int T, double scale, double offset, bool biased) {
    rng r = {(uint64_t)D + 3};
    const float eps = 1e-5f;
    const std::vector<float> x = random_numbers<float>(&r, (size_t)T * D, scale, offset),
                             bias = random_numbers<float>(&r, D, scale),
                             w = random_numbers<float>(&r, D, 1, 1),
                             b = random_numbers<float>(&r, D, 1);
    device_array<float> dx(x), dbias(bias), dw(w), db(b);
    device_array<A> dy((size_t)T * D);
    cuda_ok(launch(layernorm_kernel<A, V>, dim3(3), dim3(ROW_THREADS), ROW_WARPS * sizeof(float),
                   (cudaStream_t)0, dy.p, dx.p, biased ? (const float *)dbias.p : nullptr,
                   (const float *)dw.p, (const float *)db.p, T, D, eps),
            "launch");
    const std::vector<float> stream = dx.get();
    const std::vector<A> y = dy.get();
    for (int t = 0; t < T; t++) {
        const normed_row row(&x[(size_t)t * D], biased ? bias.data() : nullptr, w.data(), b.data(),
                             D, eps, 4 * V);
        for (int i = 0; i < D; i++) {
            const size_t at = (size_t)t * D + i;
            if (!check_near(stream[at], row.want[i], row.off, "x", at) ||
                !check_near(num(y[at]), stream[at],
                            fabs((double)stream[at]) * rounding<A>() + tiny<A>(), "y", at))
                return;
        }
    }
}
TEST_SCHEDULES(layernorm) {
    layernorm_case<__half, 1>(8, 4, 1, 0, true);
    layernorm_case<__half, 1>(384, 7, 3, 2, true);
    layernorm_case<__half, 1>(1024, 5, 3, 0, false);
    layernorm_case<__half, 2>(1032, 5, 3, -30, true); /* what it subtracts is large */
    layernorm_case<__half, 8>(8192, 4, 3, 0, true);
    layernorm_case<__half, 1>(64, 2, 0x1p-12, 0, true); /* eps counts */
    layernorm_case<__nv_bfloat16, 4>(4096, 5, 3, 1, true);
}

template <int V> static void layernorm_e4m3_case(int D, int T, double offset, bool biased) {
    rng r = {(uint64_t)D + 4};
    const float eps = 1e-5f;
    const std::vector<float> x = random_numbers<float>(&r, (size_t)T * D, 3, offset),
                             bias = random_numbers<float>(&r, D, 3),
                             w = random_numbers<float>(&r, D, 1, 1),
                             b = random_numbers<float>(&r, D, 1);
    device_array<float> dx(x), dbias(bias), dw(w), db(b), ds(T);
    device_array<uint8_t> dc((size_t)T * D);
    cuda_ok(launch(layernorm_e4m3_kernel<V>, dim3(2), dim3(ROW_THREADS), ROW_WARPS * sizeof(float),
                   (cudaStream_t)0, dc.p, ds.p, dx.p, biased ? (const float *)dbias.p : nullptr,
                   (const float *)dw.p, (const float *)db.p, T, D, eps),
            "launch");
    const std::vector<uint8_t> codes = dc.get();
    const std::vector<float> scales = ds.get(), stream = dx.get();
    for (int t = 0; t < T; t++) {
        const normed_row row(&x[(size_t)t * D], biased ? bias.data() : nullptr, w.data(), b.data(),
                             D, eps, 8 * V);
        for (int i = 0; i < D; i++)
            if (!check_near(stream[(size_t)t * D + i], row.want[i], row.off, "x",
                            (size_t)t * D + i))
                return;
        if (!row_near(&codes[(size_t)t * D], scales[t], row.want, 4 * U, t, row.off)) return;
    }
}
TEST_SCHEDULES(layernorm_e4m3) {
    layernorm_e4m3_case<1>(64, 5, 2, true);
    layernorm_e4m3_case<1>(1024, 3, 0, false);
    layernorm_e4m3_case<2>(2064, 5, -10, true);
    layernorm_e4m3_case<4>(8192, 3, 0, true);
}

/* The error of gelu in float at t = y + bias. t is off by U |t|, where gelu has a slope below 1.13;
 * its argument to erff by 2 U |t / sqrt 2|, and |x erf'(x)| < 0.49; erff itself by 2 ulp, 4 U; then
 * two sums and two products. (1 + erf) is off by 7 U in all, times |t| / 2. */
static double gelu_off(double t) { return fabs(t) * 7 * U; }

template <class A, bool GELU> static void bias_case(int T, int N, double scale) {
    rng r = {(uint64_t)N};
    std::vector<A> y = random_numbers<A>(&r, (size_t)(T + 1) * N, scale);
    const std::vector<float> bias = random_numbers<float>(&r, N, scale);
    device_array<A> d(y);
    device_array<float> db(bias);
    cuda_ok(launch(bias_kernel<A, GELU>, dim3(2), dim3(BIAS_THREADS), 0, (cudaStream_t)0, d.p,
                   (const float *)db.p, T, N),
            "launch");
    const std::vector<A> got = d.get();
    for (int t = 0; t <= T; t++)
        for (int i = 0; i < N; i++) {
            const size_t at = (size_t)t * N + i;
            const double sum = num(y[at]) + bias[i], want = GELU ? oracle_gelu(sum) : sum;
            const double tol = (GELU ? gelu_off(sum) : fabs(sum) * U) +
                               fabs(want) * rounding<A>() * 1.01 + tiny<A>();
            if (t == T ? !check(num(got[at]) == num(y[at]), "the row behind the last one changes")
                       : !check_near(num(got[at]), want, tol, "y", at))
                return;
        }
}
TEST_SCHEDULES(bias) {
    bias_case<__half, false>(5, 96, 4);
    bias_case<__half, true>(3, 8, 1);
    bias_case<__half, true>(5, 96, 6);
    bias_case<__half, true>(40, 1024, 4); /* more work than threads */
    bias_case<__nv_bfloat16, true>(5, 96, 4);
}
/* What does not fit stays no number, for the finite check to see */
TEST(bias_not_finite) {
    const std::vector<float> in = {INFINITY, -INFINITY, NAN, 65504, 1, 1, 1, 1};
    std::vector<__half> y;
    for (float v : in) y.push_back(make<__half>(v));
    device_array<__half> d(y);
    device_array<float> db(std::vector<float>(8, 600));
    cuda_ok(launch(bias_kernel<__half, true>, dim3(1), dim3(BIAS_THREADS), 0, (cudaStream_t)0, d.p,
                   (const float *)db.p, 1, 8),
            "launch");
    const std::vector<__half> got = d.get();
    for (int i = 0; i < 8; i++)
        check(std::isfinite(num(got[i])) == (i > 3), "%g becomes %g", (double)in[i], num(got[i]));
}

template <class A, int V> static void gelu_e4m3_case(int T, int F, double scale) {
    rng r = {(uint64_t)F};
    const std::vector<A> y = random_numbers<A>(&r, (size_t)T * F, scale);
    const std::vector<float> bias = random_numbers<float>(&r, F, scale);
    device_array<A> d(y);
    device_array<float> db(bias), ds(T);
    device_array<uint8_t> dc((size_t)T * F);
    cuda_ok(launch(gelu_e4m3_kernel<A, V>, dim3(2), dim3(ROW_THREADS), ROW_WARPS * sizeof(float),
                   (cudaStream_t)0, dc.p, ds.p, (const A *)d.p, (const float *)db.p, T, F),
            "launch");
    const std::vector<uint8_t> codes = dc.get();
    const std::vector<float> scales = ds.get();
    for (int t = 0; t < T; t++) {
        std::vector<double> want(F);
        double off = 0;
        for (int i = 0; i < F; i++) {
            const double sum = num(y[(size_t)t * F + i]) + bias[i];
            want[i] = oracle_gelu(sum);
            off = std::max(off, gelu_off(sum));
        }
        if (!row_near(&codes[(size_t)t * F], scales[t], want, 4 * U, t, off)) return;
    }
}
TEST_SCHEDULES(gelu_e4m3) {
    gelu_e4m3_case<__half, 1>(5, 96, 4);
    gelu_e4m3_case<__half, 2>(3, 3072, 20);
    gelu_e4m3_case<__half, 8>(3, 16384, 4);
    gelu_e4m3_case<__nv_bfloat16, 1>(5, 96, 4);
}

TEST_SCHEDULES(embed_positions) {
    rng r = {3};
    const int D = 264, T = 9, V = 4, P = 6;
    const std::vector<__half> table = random_numbers<__half>(&r, (size_t)V * D, 3);
    const std::vector<float> positions = random_numbers<float>(&r, (size_t)P * D, 3);
    std::vector<int> tokens(T), pos(T);
    for (int t = 0; t < T; t++) tokens[t] = t * 7 % V, pos[t] = t * 5 % P;
    device_array<__half> d(table);
    device_array<float> dp(positions), x((size_t)(T + 1) * D);
    device_array<int> dt(tokens), dr(pos);
    cuda_ok(launch(embed_kernel<__half>, dim3((T + EMBED_WARPS - 1) / EMBED_WARPS),
                   dim3(EMBED_WARPS * 32), 0, (cudaStream_t)0, x.p, (const __half *)d.p,
                   (const int *)dt.p, (const float *)dp.p, (const int *)dr.p, T, D),
            "launch");
    const std::vector<float> got = x.get();
    for (int t = 0; t <= T; t++) /* the row behind the last one is left alone */
        for (int i = 0; i < D; i++) {
            const float g = got[(size_t)t * D + i];
            if (t == T ? !check(std::isnan(g), "x[%d][%d] is %g", t, i, (double)g)
                       : !check(g == (float)num(table[(size_t)tokens[t] * D + i]) +
                                         positions[(size_t)pos[t] * D + i],
                                "x[%d][%d] is %g", t, i, (double)g))
                return;
        }
}

static const std::vector<int> ragged = {1, 2, 31, 63, 64, 65, 130, 200};
TEST_SCHEDULES(attention_first) {
    attention_case<__half, 64, 1, true>(ragged, 0, 2, 0, true);
    attention_case<__half, 128, 1, true>({5, 193, 3}, 0, 1, 1, true);
}
TEST_SCHEDULES(attention_32) {
    attention_case<__half, 32, 1, true>(ragged, 0, 2, 0, false);
    attention_case<__half, 32, 2, true>(ragged, 0, 2, 0, false);
    attention_case<__half, 32, 1, true>(ragged, 0, 3, 0, true);
}

/* ---- the table's ops ------------------------------------------------------------------------- */

static qemb_config encoder(int L, int D, int H, int F, int max, qemb_pooling pooling) {
    qemb_config c = {};
    c.architecture = QEMB_BERT;
    c.n_layers = L, c.hidden = D, c.n_heads = c.n_kv_heads = H, c.head_dim = D / H, c.ffn = F;
    c.vocab = 300, c.max_positions = max, c.norm_eps = 1e-5f, c.pooling = pooling;
    c.attention = QEMB_BIDIRECTIONAL;
    c.bos_id = 0, c.eos_id = 2, c.pad_id = 1, c.first_position = 2;
    return c;
}

/* A backend of either table over a config, and texts laid end to end. */
struct encoder_backend {
    qemb_config c;
    const qemb_ops *ops;
    qemb_backend *be = nullptr;
    std::vector<int32_t> tokens, pos, cu = {0};
    qemb_packed_batch b = {};

    encoder_backend(const qemb_config &config, const qemb_ops *table = &qemb_cuda_ops)
        : c(config), ops(table) {
        qemb_options opt = {};
        qemb_err err = {};
        opt.batch_tokens = opt.max_tokens = opt.mlp_rows = c.max_positions;
        opt.threads = 2;
        check(!ops->open(&be, &c, &opt, &err), "open: %s", err.msg);
    }
    ~encoder_backend() { ops->close(be); }
    void begin(const std::vector<int> &lens) {
        for (int n : lens) {
            for (int t = 0; t < n; t++) tokens.push_back(t % 3), pos.push_back(2 + t);
            cu.push_back((int)pos.size());
        }
        b.B = (int)lens.size(), b.T = (int)pos.size(), b.bidirectional = 1;
        b.tokens = tokens.data(), b.pos = pos.data(), b.cu = cu.data();
        ops->begin(be, &b);
    }
};

static std::vector<uint16_t> random_matrix(rng *r, size_t n) {
    std::vector<uint16_t> v(n);
    rng_halves(r, v.data(), n, 0.5);
    return v;
}

/* Through a half: the product, K terms summed in float and truncated by tensor cores; then the sum
 * with the bias, or its gelu, whose slope is below 1.13. */
static void product_case(bool gelu, int T) {
    rng r = {(uint64_t)T + 50};
    const int D = 96, F = 136, N = gelu ? F : 3 * D;
    encoder_backend f(encoder(1, D, 3, F, 64, QEMB_POOL_FIRST));
    std::vector<uint16_t> w = random_matrix(&r, (size_t)N * D);
    const std::vector<__half> x = random_numbers<__half>(&r, (size_t)T * D, 2);
    const std::vector<float> bias = random_numbers<float>(&r, N, 3);
    device_array<uint16_t> dw(w);
    device_array<__half> dx(x), dy((size_t)T * N);
    device_array<float> db(bias);
    qemb_mat m = {dw.p, N, D, QEMB_F16, 1, nullptr, QEMB_BITS_UNKNOWN};
    (gelu ? f.ops->matmul_gelu : f.ops->matmul)(f.be, (qemb_act *)dy.p, (qemb_act *)dx.p, &m, db.p,
                                                T);
    const std::vector<__half> got = dy.get();
    check(!failure_of(f.be), "%s", failure_of(f.be));
    const std::vector<double> xd = doubles(x);
    std::vector<double> y(N), size(N);
    m.data = w.data(); /* the host's, for the oracle */
    for (int t = 0; t < T; t++) {
        oracle_matvec(y.data(), size.data(), &xd[(size_t)t * D], &m);
        for (int i = 0; i < N; i++) {
            const double sum = y[i] + bias[i], want = gelu ? oracle_gelu(sum) : sum;
            const double product = size[i] * 2 * D * U + fabs(y[i]) * 0x1p-11 + 0x1p-25;
            const double tol = (gelu ? 1.13 * product + gelu_off(sum) : product + fabs(sum) * U) +
                               fabs(want) * 0x1p-11 * 1.01 + 0x1p-25;
            if (!check_near(num(got[(size_t)t * N + i]), want, tol, "y", (size_t)t * N + i)) return;
        }
    }
}
TEST_SCHEDULES(op_matmul_bias) {
    for (int T : {1, 17, 64}) product_case(false, T);
}
TEST_SCHEDULES(op_matmul_gelu) {
    for (int T : {1, 17, 64}) product_case(true, T);
}

/* Each number of threads that a row may have */
TEST_SCHEDULES(op_layernorm) {
    rng r = {6};
    for (int D : {64, 1088, 2560, 8192}) {
        encoder_backend f(encoder(1, D, D / 64, 64, 64, QEMB_POOL_FIRST));
        const int T = 20, sums = D > 4096 ? 32 : 16;
        const std::vector<float> x = random_numbers<float>(&r, (size_t)T * D, 3, 1),
                                 w = random_numbers<float>(&r, D, 1, 1),
                                 b = random_numbers<float>(&r, D, 1);
        device_array<float> dx(x), dw(w), db(b);
        device_array<__half> y((size_t)T * D);
        f.ops->layernorm(f.be, (qemb_act *)y.p, dx.p, db.p, dw.p, db.p, T);
        const std::vector<float> got = dx.get();
        for (int t = 0; t < T; t++) {
            const normed_row row(&x[(size_t)t * D], b.data(), w.data(), b.data(), D,
                                 (double)f.c.norm_eps, sums);
            for (int i = 0; i < D; i++)
                if (!check_near(got[(size_t)t * D + i], row.want[i], row.off, "x",
                                (size_t)t * D + i))
                    return;
        }
    }
}

/* The lists of begin: a text's first row has the bits that all its rows have. */
TEST_SCHEDULES(op_attention_first) {
    rng r = {8};
    const std::vector<int> lens = {1, 90, 3, 64, 530};
    for (int hd : {32, 64, 128}) {
        const int D = 2 * hd;
        encoder_backend f(encoder(1, D, 2, 64, 700, QEMB_POOL_FIRST));
        f.begin(lens);
        device_array<__half> qkv(random_numbers<__half>(&r, (size_t)f.b.T * 3 * D, 2)),
            all((size_t)f.b.T * D), first((size_t)f.b.B * D);
        f.ops->attention(f.be, (qemb_act *)all.p, (qemb_act *)qkv.p, &f.b, QEMB_ALL_ROWS);
        f.ops->attention(f.be, (qemb_act *)first.p, (qemb_act *)qkv.p, &f.b, QEMB_FIRST_ROWS);
        const std::vector<__half> a = all.get(), o = first.get();
        for (int b = 0; b < f.b.B; b++)
            check(!memcmp(&o[(size_t)b * D], &a[(size_t)f.cu[b] * D], D * sizeof(__half)),
                  "heads of %d, text %d", hd, b);
        check(!failure_of(f.be), "%s", failure_of(f.be));
    }
}

TEST_SCHEDULES(op_gather_first) {
    rng r = {9};
    const int D = 1024;
    encoder_backend f(encoder(1, D, 16, 64, 200, QEMB_POOL_FIRST));
    f.begin({1, 2, 3, 40, 1});
    const std::vector<float> x = random_numbers<float>(&r, (size_t)f.b.T * D, 3);
    device_array<float> dx(x), y((size_t)5 * D);
    f.ops->gather(f.be, y.p, dx.p, &f.b, QEMB_FIRST_ROWS);
    const std::vector<float> got = y.get();
    for (int b = 0; b < 5; b++)
        check(!memcmp(&got[(size_t)b * D], &x[(size_t)f.cu[b] * D], D * sizeof(float)), "row %d",
              b);
}

/* The sums are in double: the mean rounds once. */
TEST_SCHEDULES(op_gather_mean_bare) {
    rng r = {10};
    const int D = 96;
    const std::vector<int> lens = {1, 2, 3, 4, 5, 300, 9};
    encoder_backend f(encoder(1, D, 3, 64, 400, QEMB_POOL_MEAN));
    f.begin(lens);
    const std::vector<float> x = random_numbers<float>(&r, (size_t)f.b.T * D, 3);
    device_array<float> dx(x), y(lens.size() * D);
    f.ops->gather_mean(f.be, y.p, dx.p, nullptr, &f.b);
    const std::vector<float> got = y.get();
    for (int b = 0; b < f.b.B; b++)
        for (int i = 0; i < D; i++) {
            double mean = 0;
            for (int t = f.cu[b]; t < f.cu[b + 1]; t++) mean += x[(size_t)t * D + i];
            mean /= lens[b];
            if (!check_near(got[(size_t)b * D + i], mean, fabs(mean) * U + 1e-12, "mean",
                            (size_t)b * D + i))
                return;
        }
}

/* ---- encoders -------------------------------------------------------------------------------- */

/* Texts of any ids, also of pad_id, which takes no position */
static std::vector<std::vector<int32_t>> encoder_texts(const std::vector<int> &lens,
                                                       uint64_t seed) {
    std::vector<std::vector<int32_t>> texts = random_texts(lens, 0, seed);
    for (std::vector<int32_t> &t : texts) {
        if (t.size() > 3) t[t.size() / 2] = 1;
        t[0] = 0;
    }
    return texts;
}

static void against_cpu(const qemb_file *f, const qemb_ops *ops, double least,
                        const std::vector<int> &lens, qemb_options opt = {}) {
    model cuda(f, ops, 1024, opt), cpu(f, &qemb_cpu_ops, 1024);
    double worst = 1;
    if (!check(cuda.m && cpu.m, "open: %s%s", cuda.err.msg, cpu.err.msg)) return;
    compare(cuda, cpu, encoder_texts(lens, 5), &worst, least);
    printf("encoder %s, heads of %d, pooling %d: least cosine %.7f\n", ops->name,
           f->config.head_dim, f->config.pooling, worst);
}

static const qemb_config shapes[] = {
    encoder(3, 96, 3, 128, 200, QEMB_POOL_FIRST), encoder(2, 128, 2, 72, 200, QEMB_POOL_MEAN),
    encoder(1, 128, 1, 40, 200, QEMB_POOL_FIRST), encoder(2, 64, 1, 192, 200, QEMB_POOL_FIRST)};

TEST_SCHEDULES(encoder_shapes) {
    for (const qemb_config &c : shapes) {
        qemb_file *f = open_model(&c, 21, 1);
        against_cpu(f, &qemb_cuda_ops, MIN_COSINE, {1, 2, 9, 64, 65, 130});
        against_cpu(f, &qemb_cuda_ops, MIN_COSINE, {5}); /* a batch that is a graph */
        qemb_file_close(f);
    }
}
/* Both tile sizes; Hopper's kernels, which are for another architecture, are asked for. The second
 * model's MLP goes in chunks. */
TEST(encoder_long) {
    for (qemb_pooling pooling : {QEMB_POOL_FIRST, QEMB_POOL_MEAN}) {
        const qemb_config c = encoder(2, 64, 2, 96, 700, pooling);
        qemb_file *f = open_model(&c, 22, 1);
        qemb_options opt = {};
        opt.hopper = 1, opt.mlp_rows = pooling == QEMB_POOL_MEAN ? 64 : 0;
        against_cpu(f, &qemb_cuda_ops, MIN_COSINE, {600, 3, 70}, opt);
        if (has_fp8()) against_cpu(f, &qemb_cuda_fp8_ops, 1 - FP8_GAP, {600, 3, 70}, opt);
        qemb_file_close(f);
    }
}
/* An INT8 file against itself on the CPU: see int8_against_cpu */
TEST_SCHEDULES(encoder_int8) {
    for (const qemb_config &c : shapes) {
        qemb_file *f = open_model_of(QEMB_I8, &c, 23, 1);
        against_cpu(f, &qemb_cuda_ops, MIN_COSINE, {1, 2, 9, 64, 65, 130});
        qemb_file_close(f);
    }
}
static void fp8_case() {
    const qemb_config c[] = {encoder(3, 96, 3, 128, 200, QEMB_POOL_FIRST),
                             encoder(2, 128, 2, 80, 200, QEMB_POOL_MEAN),
                             encoder(1, 64, 1, 4096, 200, QEMB_POOL_FIRST)};
    for (const qemb_config &k : c)
        for (qemb_dtype dtype : {QEMB_F16, QEMB_I8}) {
            qemb_file *f = open_model_of(dtype, &k, 24, 1);
            against_cpu(f, &qemb_cuda_fp8_ops, 1 - FP8_GAP, {1, 2, 9, 64, 65, 130});
            qemb_file_close(f);
        }
}
TEST_SCHEDULES(encoder_fp8) {
    if (has_fp8()) fp8_case();
}
#if defined(QEMB_EMU)
TEST(encoder_fp8_sums) {
    const emu::device standard = emu::dev;
    emu::dev.major = 12, emu::dev.minor = 0;
    fp8_case();
    emu::dev = standard;
}
#endif

/* Alone and packed; equal texts are one. */
TEST_SCHEDULES(encoder_same_bits) {
    for (qemb_pooling pooling : {QEMB_POOL_FIRST, QEMB_POOL_MEAN}) {
        const qemb_config c = encoder(2, 64, 2, 96, 700, pooling);
        qemb_file *f = open_model(&c, 41, 1);
        for (const qemb_ops *ops : {&qemb_cuda_ops, &qemb_cuda_fp8_ops}) {
            if (ops == &qemb_cuda_fp8_ops && !has_fp8()) continue;
            qemb_options opt = {};
            opt.deterministic = 1;
            model cuda(f, ops, 2048, opt);
            if (!check(cuda.m, "%s", cuda.err.msg)) continue;
            auto texts = encoder_texts({1, 40, 64, 90, 129, 5, 600}, 9);
            texts.push_back(texts[1]);
            const auto packed = cuda.embed(texts);
            for (size_t i = 0; i < texts.size(); i++)
                check(cuda.embed({texts[i]})[0] == packed[i], "%s: text %zu differs when packed",
                      ops->name, i);
        }
        qemb_file_close(f);
    }
}

/* (32, 2) 20 23 24; (16, 2) 9 1 14; (16, 3) 5+2 3+4; (640, 2) 600 520 610 */
TEST_SCHEDULES(encoder_graphs) {
    const std::vector<graph_batch> batches = {{{20}, 0},  {{23}, 0},   {{9}, 0},  {{1}, 0},
                                              {{24}, 0},  {{5, 2}, 0}, {{14}, 0}, {{3, 4}, 0},
                                              {{600}, 0}, {{520}, 0},  {{610}, 0}};
    for (qemb_pooling pooling : {QEMB_POOL_FIRST, QEMB_POOL_MEAN}) {
        const qemb_config c = encoder(2, 64, 2, 64, 700, pooling);
        const model_mode mode = {QEMB_BIDIRECTIONAL, pooling};
        for (qemb_dtype dtype : {QEMB_F16, QEMB_I8})
            graph_case(c, dtype, &qemb_cuda_ops, batches, 2 + 2 + 1 + 2, mode);
        if (has_fp8()) graph_case(c, QEMB_F16, &qemb_cuda_fp8_ops, batches, 2 + 2 + 1 + 2, mode);
    }
}

/* A bias beyond the range of FP16 makes h infinite: every vector is the fallback's. */
TEST(encoder_overflow) {
    const qemb_config c = encoder(2, 64, 2, 64, 64, QEMB_POOL_FIRST);
    char path[64];
    size_t bytes;
    uint8_t *data = make_model(&c, 91, 1, &bytes);
    ((float *)section_of(data, "layers.0.bup"))[3] = 70000;
    seal_model(data, bytes);
    write_temporary(path, data, bytes);
    free(data);
    qemb_file *f;
    qemb_err err = {};
    if (check(!qemb_file_open(&f, path, &err), "%s", err.msg)) {
        model cuda(f, &qemb_cuda_ops, 256), cpu(f, qemb_cpu_mapped(), 256);
        const auto texts = encoder_texts({5, 20, 33}, 3);
        check(cuda.embed(texts) == cpu.embed(texts), "not the CPU's own vectors");
        const unsigned long long n = qemb_health_of(cuda.m).recomputed;
        check(n == 3, "recomputed (got %llu, want 3)", n);
    }
    qemb_file_close(f);
    remove(path);
}

TEST(encoder_refuses_shapes) {
    refused(encoder(1, 48, 3, 64, 64, QEMB_POOL_FIRST),
            "head size not supported (got 16, want 32, 64 or 128)");
    refused(encoder(1, 64, 2, 60, 64, QEMB_POOL_FIRST),
            "sizes not supported (got hidden 64, ffn 60");
}
#if defined(QEMB_EMU)
TEST(encoder_plan) {
    for (const qemb_config &c : {encoder(3, 96, 3, 160, 200, QEMB_POOL_FIRST),
                                 encoder(2, 64, 1, 1024, 200, QEMB_POOL_MEAN)})
        for (qemb_dtype dtype : {QEMB_F16, QEMB_I8}) {
            qemb_file *f = open_model_of(dtype, &c, 45, 1);
            plan_case(f, &qemb_cuda_ops);
            plan_case(f, &qemb_cuda_fp8_ops);
            qemb_file_close(f);
        }
}
#endif
