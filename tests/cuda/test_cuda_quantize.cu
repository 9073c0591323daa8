/* test_cuda_quantize.cu - INT8 weights and FP8 GEMMs: kernels and ops compared with double
 * precision, whole models with FP32 on the CPU, and the error of each arithmetic (the table in
 * docs/accuracy.md).
 */
#include "cuda_model.h"

#include "backends/cuda/gemm.cuh"
#include "backends/cuda/quantize.cuh"

/* ---- ptx ------------------------------------------------------------------------------------- */

__global__ void e4m3_kernel(uint32_t *out, const float2 *in, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = e4m3_pair(in[i].x, in[i].y);
}
/* Every half but the NaNs, against the nearest code; of two the even one */
TEST(ptx_e4m3) {
    std::vector<float2> in;
    for (int h = 0; h < 0x10000; h += 2) {
        const float a = (float)oracle_half((uint16_t)h), b = (float)oracle_half((uint16_t)(h + 1));
        if (!std::isnan(a) && !std::isnan(b)) in.push_back(make_float2(a, b));
    }
    in.push_back(make_float2(NAN, -0.0f));
    device_array<float2> d(in);
    device_array<uint32_t> o(in.size());
    cuda_ok(launch(e4m3_kernel, dim3((unsigned)((in.size() + 255) / 256)), dim3(256), 0,
                   (cudaStream_t)0, o.p, d.p, (int)in.size()),
            "launch");
    const std::vector<uint32_t> got = o.get();
    for (size_t i = 0; i < in.size(); i++)
        for (int h = 0; h < 2; h++) {
            const double x = h ? in[i].y : in[i].x;
            const uint8_t code = (uint8_t)(got[i] >> 8 * h);
            if (std::isnan(x)) {
                check(std::isnan(e4m3(code)), "NaN becomes %02x", code);
                continue;
            }
            int best = 0;
            for (int c = 1; c < 127; c++) {
                const double d0 = fabs(fabs(x) - e4m3((uint8_t)best)),
                             d1 = fabs(fabs(x) - e4m3((uint8_t)c));
                if (d1 < d0 || (d1 == d0 && c % 2 == 0)) best = c;
            }
            if (!check(code == (best | (std::signbit(x) ? 128 : 0)), "%g becomes %02x (want %02x)",
                       x, code, best))
                return;
        }
    check(got[0] >> 16 == 0, "bits above the pair: %08x", got[0]);
}

/* ---- kernels --------------------------------------------------------------------------------- */

template <class X> inline X make_any(double v) { return make<X>(v); }
template <> inline int8_t make_any<int8_t>(double v) { return (int8_t)(127 * v); }
static double num_any(int8_t v) { return v; }
template <class X> static double num_any(X v) { return num(v); }

template <class X, int V> static void quantize_case(int T, int K) {
    rng r = {(uint64_t)K};
    std::vector<X> x((size_t)T * K);
    for (X &v : x) v = make_any<X>(rng_uniform(&r));
    for (int i = 0; i < K; i++) x[(size_t)(T / 2) * K + i] = make_any<X>(0); /* a row of zeros */
    for (int i = 0; i < K; i++) /* and one with an outlier, as token 0 has them */
        if (i != 5) x[i] = make_any<X>(num_any(x[i]) / (sizeof(X) == 1 ? 2000 : 300));
    const int groups = (K + 63) / 64; /* of INT8 */
    const std::vector<float> s = random_numbers<float>(&r, (size_t)T * groups, 0.01, 0.02);
    device_array<X> dx(x);
    device_array<float> dxs(s), ds(T);
    device_array<uint8_t> dc((size_t)T * K);
    cuda_ok(launch(quantize_kernel<X, V>, dim3(3), dim3(ROW_THREADS), ROW_WARPS * sizeof(float),
                   (cudaStream_t)0, dc.p, ds.p, (const X *)dx.p, (const float *)dxs.p, T, K),
            "launch");
    const std::vector<uint8_t> codes = dc.get();
    const std::vector<float> scales = ds.get();
    for (int t = 0; t < T; t++) {
        std::vector<double> want(K);
        for (int i = 0; i < K; i++)
            want[i] = num_any(x[(size_t)t * K + i]) *
                      (sizeof(X) == 1 ? (double)s[(size_t)t * groups + i / 64] : 1);
        if (!row_near(&codes[(size_t)t * K], scales[t], want, 4 * U, t)) return;
    }
}
TEST_SCHEDULES(quantize) {
    quantize_case<__half, 1>(5, 48);
    quantize_case<__half, 2>(4, 2064); /* the second group is almost empty */
    quantize_case<__half, 8>(4, 16384);
    quantize_case<__nv_bfloat16, 1>(5, 128);
    quantize_case<int8_t, 1>(7, 80); /* a group of 64 and one of 16 */
    quantize_case<int8_t, 4>(4, 8192);
}
/* A number that is not one stays so, and its row's others do not hide it */
TEST(quantize_nan) {
    std::vector<__half> x(3 * 16, make<__half>(1));
    x[3] = make<__half>(NAN);
    x[16 + 4] = make<__half>(-INFINITY);
    device_array<__half> d(x);
    device_array<float> s(3);
    device_array<uint8_t> c(3 * 16);
    cuda_ok(launch(quantize_kernel<__half, 1>, dim3(1), dim3(ROW_THREADS),
                   ROW_WARPS * sizeof(float), (cudaStream_t)0, c.p, s.p, (const __half *)d.p,
                   (const float *)nullptr, 3, 16),
            "launch");
    const std::vector<uint8_t> codes = c.get();
    const std::vector<float> scales = s.get();
    check(std::isnan(e4m3(codes[3]) * scales[0]), "NaN became %g", e4m3(codes[3]) * scales[0]);
    check(!std::isfinite(e4m3(codes[20]) * scales[1]), "Inf became a number");
    check_near(e4m3(codes[40]) * scales[2], 1, 4 * U, "the next row", 40);
}

template <int V> static void rmsnorm_e4m3_case(int T, int D) {
    rng r = {(uint64_t)D};
    const std::vector<float> x = random_numbers<float>(&r, (size_t)T * D, 3),
                             w = random_numbers<float>(&r, D, 1, 1);
    device_array<float> dx(x), dw(w), ds(T);
    device_array<uint8_t> dc((size_t)T * D);
    cuda_ok(launch(rmsnorm_e4m3_kernel<V>, dim3(2), dim3(ROW_THREADS), ROW_WARPS * sizeof(float),
                   (cudaStream_t)0, dc.p, ds.p, (const float *)dx.p, (const float *)dw.p, T, D,
                   1e-6f),
            "launch");
    const std::vector<uint8_t> codes = dc.get();
    const std::vector<float> scales = ds.get();
    std::vector<double> xd = doubles(x), want(D);
    /* float sums as in rmsnorm_case: 8V in a thread, 13, 8 roundings */
    for (int t = 0; t < T; t++) {
        oracle_rmsnorm(want.data(), &xd[(size_t)t * D], w.data(), D, 1e-6);
        if (!row_near(&codes[(size_t)t * D], scales[t], want, (8 * V + 23) * U, t)) return;
    }
}
TEST_SCHEDULES(rmsnorm_e4m3) {
    rmsnorm_e4m3_case<1>(5, 64);
    rmsnorm_e4m3_case<2>(5, 2560);
    rmsnorm_e4m3_case<4>(3, 8192);
}

template <class A, int V> static void swiglu_e4m3_case(int T, int F, double scale) {
    rng r = {(uint64_t)F};
    const std::vector<A> gu = random_numbers<A>(&r, (size_t)T * 2 * F, scale);
    device_array<A> d(gu);
    device_array<float> ds(T);
    device_array<uint8_t> dc((size_t)T * F);
    cuda_ok(launch(swiglu_e4m3_kernel<A, V>, dim3(2), dim3(ROW_THREADS), ROW_WARPS * sizeof(float),
                   (cudaStream_t)0, dc.p, ds.p, (const A *)d.p, T, F),
            "launch");
    const std::vector<uint8_t> codes = dc.get();
    const std::vector<float> scales = ds.get();
    for (int t = 0; t < T; t++) {
        std::vector<double> want(F);
        double most = 0;
        for (int i = 0; i < F; i++) {
            const double g = num(gu[(size_t)t * 2 * F + i]), u = num(gu[(size_t)t * 2 * F + F + i]);
            want[i] = oracle_swiglu(g, u) / 64;
            most = std::max(most, fabs(g));
        }
        /* as in swiglu_case; far below zero __fdividef gives 0 for what is below scale * 2^-10
         * anyway */
        if (!row_near(&codes[(size_t)t * F], scales[t], want, (12 + 2.4 * most) * U, t)) return;
    }
}
TEST_SCHEDULES(swiglu_e4m3) {
    swiglu_e4m3_case<__half, 1>(5, 96, 4);
    swiglu_e4m3_case<__half, 2>(3, 3072, 20);
    swiglu_e4m3_case<__half, 6>(3, 9728, 4);
    swiglu_e4m3_case<__half, 1>(3, 96, 60000); /* products of 1.8e9: no clamp, a scale */
    swiglu_e4m3_case<__nv_bfloat16, 1>(5, 96, 4);
}

template <class A> static void dequantize_case(int N, int K) {
    rng r = {(uint64_t)N};
    std::vector<int8_t> q((size_t)N * K);
    for (int8_t &v : q) v = make_any<int8_t>(rng_uniform(&r));
    const int groups = (K + 63) / 64;
    const std::vector<float> s = random_numbers<float>(&r, (size_t)N * groups, 0.001, 0.002);
    device_array<int8_t> dq(q);
    device_array<float> ds(s);
    device_array<A> y((size_t)N * K);
    cuda_ok(launch(dequantize_kernel<A>, dim3(3), dim3(DEQUANTIZE_THREADS), 0, (cudaStream_t)0, y.p,
                   (const int8_t *)dq.p, (const float *)ds.p, N, K),
            "launch");
    const std::vector<A> got = y.get();
    for (size_t i = 0; i < q.size(); i++) {
        const double want = (double)s[i / K * groups + i % K / 64] * q[i];
        if (!check_near(num(got[i]), want, fabs(want) * (rounding<A>() + U) + tiny<A>(), "w", i))
            return;
    }
}
TEST_SCHEDULES(dequantize) {
    dequantize_case<__half>(5, 8);
    dequantize_case<__half>(70, 1032);
    dequantize_case<__nv_bfloat16>(9, 64);
}

/* ---- the table's ops ------------------------------------------------------------------------- */

/* rmsnorm, then a product by FP8 weights: each factor of a term is off by 2^-4 of itself or by
 * 2^-10 of its row's scale; sums as in matmul_case. Then, added to the residual, a product by
 * attention's halves. */
static void fp8_product_case(int T) {
    const int D = 96, Q = 2 * 64, N = Q + 2 * 64; /* wqkv, wo */
    const qemb_config c = config(1, D, 2, 1, 64, 160, 64);
    qemb_options opt = {};
    opt.batch_tokens = opt.max_tokens = 64;
    opt.threads = 1;
    qemb_backend *be = nullptr;
    qemb_err err = {};
    if (!check(!qemb_cuda_fp8_ops.open(&be, &c, &opt, &err), "open: %s", err.msg)) return;
    rng r = {(uint64_t)T};
    const size_t rows = (size_t)(T + 15) / 16 * 16; /* what the library may write */
    for (const bool add : {false, true}) {
        const int n = add ? D : N, k = add ? Q : D;
        const std::vector<__half> w = random_numbers<__half>(&r, (size_t)n * k, 0.3);
        const std::vector<float> x = random_numbers<float>(&r, (size_t)T * k, 3),
                                 g = random_numbers<float>(&r, k, 1, 1),
                                 start = random_numbers<float>(&r, rows * n, 3);
        std::vector<__half> att((size_t)T * k);
        for (size_t i = 0; i < att.size(); i++) att[i] = make<__half>(x[i]);
        device_array<__half> dw(w), datt(att), in_codes(rows * k), y(rows * n);
        device_array<float> dx(x), dg(g), ws(n), res(start);
        device_array<uint8_t> codes((size_t)n * k);
        cuda_ok(launch(quantize_kernel<__half, 1>, dim3(3), dim3(ROW_THREADS),
                       ROW_WARPS * sizeof(float), (cudaStream_t)0, codes.p, ws.p,
                       (const __half *)dw.p, (const float *)nullptr, n, k),
                "launch");
        cuda_ok(cudaDeviceSynchronize(), "quantize");
        const qemb_mat m = {codes.p, n, k, QEMB_F16, 1, ws.p, QEMB_BITS_UNKNOWN};
        qemb_act *in = (qemb_act *)in_codes.p; /* codes, then scales of whole sixteens of rows */
        if (add) {
            cuda_ok(launch(quantize_kernel<__half, 1>, dim3(3), dim3(ROW_THREADS),
                           ROW_WARPS * sizeof(float), (cudaStream_t)0, (uint8_t *)in,
                           (float *)((uint8_t *)in + rows * k), (const __half *)datt.p,
                           (const float *)nullptr, T, k),
                    "launch");
            cuda_ok(cudaDeviceSynchronize(), "quantize");
            qemb_cuda_fp8_ops.matmul_add(be, res.p, in, &m, T);
        } else {
            qemb_cuda_fp8_ops.rmsnorm(be, in, dx.p, dg.p, T);
            qemb_cuda_fp8_ops.matmul(be, (qemb_act *)y.p, in, &m, nullptr, T);
        }
        const std::vector<float> got_res = res.get(), scale = ws.get();
        const std::vector<__half> got_y = y.get();
        const std::vector<double> wd = doubles(w), xd = doubles(x);
        check(!failure_of(be), "%s", failure_of(be));
        for (int t = 0; t < T; t++) {
            std::vector<double> input(k);
            if (add)
                for (int i = 0; i < k; i++) input[i] = num(att[(size_t)t * k + i]);
            else
                oracle_rmsnorm(input.data(), &xd[(size_t)t * k], g.data(), k, 1e-6);
            double top = 0;
            for (double v : input) top = std::max(top, fabs(v));
            for (int i = 0; i < n; i++) {
                double want = add ? start[(size_t)t * n + i] : 0, tol = 0;
                for (int j = 0; j < k; j++) {
                    const double a = input[j], b = wd[(size_t)i * k + j];
                    const double ea = fabs(a) * 0x1.01p-4 + top / 448 * 0x1p-10,
                                 eb = fabs(b) * 0x1.01p-4 + scale[i] * 0x1p-10;
                    want += a * b;
                    tol += fabs(a) * eb + fabs(b) * ea + ea * eb + fabs(a * b) * 2 * k * U;
                }
                tol += fabs(want) * 0x1p-10 + 0x1p-24;
                /* the errors of k terms do not conspire: six standard deviations of their sum, were
                 * each as large as it can be, instead of the sum of them all */
                tol *= 6 / sqrt(k);
                const size_t at = (size_t)t * n + i;
                if (!check_near(add ? got_res[at] : num(got_y[at]), want, tol, "y", at)) break;
            }
        }
    }
    qemb_cuda_fp8_ops.close(be);
}
TEST_SCHEDULES(op_fp8_products) {
    if (!has_fp8()) return;
    for (int T : {1, 16, 17, 50}) fp8_product_case(T);
}
#if defined(QEMB_EMU)
/* Where cuBLASLt applies no scales */
TEST_SCHEDULES(op_fp8_sums) {
    const emu::device standard = emu::dev;
    emu::dev.major = 8, emu::dev.minor = 9;
    for (int T : {1, 16, 17, 50}) fp8_product_case(T);
    emu::dev = standard;
}
#endif

/* y = codes x codes with fast accumulation, against the exact sum. Each step adds 32 products and
 * the sum so far, cut to 2^-13 of the largest among them: unit. A cut moves a term toward zero by
 * less than a unit. The sum so far loses up to a unit a step; the products' errors are independent
 * and of either sign, so their sum stays within six times its largest standard deviation, sqrt(32)
 * units a step (Hoeffding: exceeded once in 10^7). K as in the down projection of the 4B model. */
TEST(fp8_fast_accumulation) {
    if (!has_fp8()) return;
    const int N = 16, T = 16, K = 9728;
    rng r = {5};
    std::vector<uint8_t> w((size_t)N * K), x((size_t)T * K);
    for (std::vector<uint8_t> *v : {&w, &x})
        for (uint8_t &code : *v) do
                code = (uint8_t)rng_u64(&r);
            while ((code & 127) > 0x70); /* up to 128: no code is NaN */
    const std::vector<float> ones(16, 1);
    device_array<uint8_t> dw(w), dx(x);
    device_array<float> scales(ones), y((size_t)T * N);
    device_array<char> workspace(GEMM_WORKSPACE);
    cudaStream_t st;
    cuda_ok(cudaStreamCreateWithFlags(&st, cudaStreamNonBlocking), "stream");
    gemm_state g = {};
    g.workspace = workspace.p;
    gemm_shape *p = g.shapes;
    cublasLtMatmulHeuristicResult_t found;
    int n = 0;
    check(!gemm_open(&g, GEMM_E4M3, false) && !gemm_add_shape(&g, N, K, true) &&
              !gemm_ask(&g, p, T, true, &found, 1, &n) && !gemm_scales(&g, scales.p, scales.p),
          "no product");
    cuda_ok(cudaMemset(y.p, 0, (size_t)T * N * sizeof(float)), "zeros");
    cuda_ok(cudaDeviceSynchronize(), "zeros");
    const gemm_algo fast = {found.algo, true, false};
    check(!gemm_launch(&g, p, &fast, y.p, dx.p, dw.p, 1, T, st), "launch");
    const std::vector<float> got = y.get();
    double error = 0, size = 0;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < N; i++) {
            double sum = 0, units = 0, squares = 0;
            for (int k0 = 0; k0 < K; k0 += 32) {
                double top = fabs(sum);
                for (int k = k0; k < k0 + 32; k++) {
                    const double v = e4m3(w[(size_t)i * K + k]) * e4m3(x[(size_t)t * K + k]);
                    top = std::max(top, fabs(v));
                    sum += v;
                }
                const double unit = std::max(top, fabs(sum)) * 0x1p-13;
                units += unit, squares += 32 * unit * unit;
            }
            const double tol = units + 6 * sqrt(squares);
            check_near(got[(size_t)t * N + i], sum, tol, "y", (size_t)t * N + i);
            error += (got[(size_t)t * N + i] - sum) * (got[(size_t)t * N + i] - sum);
            size += sum * sum;
        }
    printf("fast accumulation, K %d: relative L2 error %.2e\n", K, sqrt(error / size));
    gemm_close(&g);
    cudaStreamDestroy(st);
}

/* ---- whole models ---------------------------------------------------------------------------- */

/* f with its layers' matrices as int8: the nearest 127th of the largest of 64 in a row. Not for
 * qemb_file_close. */
struct int8_file {
    qemb_file f;
    qemb_layer
        *layers; /* not a vector: nvcc 13.0 cannot name the destructor of an unnamed struct */
    std::vector<std::vector<int8_t>> data;
    std::vector<std::vector<float>> scales;
    explicit int8_file(const qemb_file *from) : f(*from) {
        layers = (qemb_layer *)malloc(f.config.n_layers * sizeof *layers);
        std::copy(f.weights.layers, f.weights.layers + f.config.n_layers, layers);
        for (qemb_layer *y = layers; y < layers + f.config.n_layers; y++)
            for (qemb_mat *m : {&y->wqkv, &y->wo, &y->wgu, &y->wdown}) {
                std::vector<int8_t> q((size_t)m->rows * m->cols);
                std::vector<float> s;
                for (int r = 0; r < m->rows; r++)
                    for (int from = 0; from < m->cols; from += 64) {
                        const size_t at = (size_t)r * m->cols + from;
                        const uint16_t *w = (const uint16_t *)m->data + at;
                        const int n = std::min(64, m->cols - from);
                        double top = 0x1p-30;
                        for (int i = 0; i < n; i++) top = std::max(top, fabs(oracle_half(w[i])));
                        s.push_back((float)(top / 127));
                        for (int i = 0; i < n; i++)
                            q[at + i] = (int8_t)lrint(oracle_half(w[i]) / s.back());
                    }
                data.push_back(q);
                scales.push_back(s);
                m->dtype = QEMB_I8;
                m->data = data.back().data();
                m->scale = scales.back().data();
            }
        f.weights.layers = layers;
    }
    int8_file(const int8_file &) = delete;
    ~int8_file() { free(layers); }
};

/* Compares an INT8 file with itself on the CPU, so the error of INT8 is not in it. The bound is
 * FP16's, with one rounding more per layer's matrix, that of W to a half: of the size of those that
 * the bound counts. */
TEST_SCHEDULES(int8_against_cpu) {
    const qemb_config shapes[] = {config(2, 96, 2, 2, 64, 256, 200),
                                  config(2, 64, 4, 1, 128, 96, 200)};
    for (const qemb_config &c : shapes) {
        qemb_file *f = open_model_of(QEMB_I8, &c, 21, 1);
        {
            model cuda(f, &qemb_cuda_ops, 256), cpu(f, &qemb_cpu_ops, 256);
            double worst = 1;
            if (check(cuda.m && cpu.m, "open: %s%s", cuda.err.msg, cpu.err.msg)) {
                compare(cuda, cpu, random_texts({1, 2, 9, 64, 65, 100, 130}, 0, 5), &worst);
                compare(cuda, cpu, random_texts({1, 2, 9, 64}, 20, 5), &worst);
            }
        }
        qemb_file_close(f);
    }
}

/* A matrix larger than a staging slot (8 MiB) is loaded in pieces. Every row must get its scale. */
TEST(int8_loaded_in_pieces) {
    if (!has_fp8()) return;
    const qemb_config c = config(1, 272, 2, 1, 64, 16000, 64);
    qemb_file *f = open_model_of(QEMB_I8, &c, 23, 1);
    qemb_options opt = {};
    opt.batch_tokens = opt.max_tokens = 64;
    opt.threads = 1;
    qemb_layer layer = f->weights.layers[0];
    qemb_weights w = f->weights;
    w.layers = &layer;
    qemb_backend *be = nullptr;
    qemb_err err = {};
    if (check(!qemb_cuda_fp8_ops.open(&be, &c, &opt, &err) &&
                  !qemb_cuda_fp8_ops.load_weights(be, &w, &err),
              "%s", err.msg)) {
        const qemb_mat *m = &f->weights.layers[0].wgu;
        std::vector<float> got(m->rows);
        cuda_ok(cudaDeviceSynchronize(), "place");
        cuda_ok(cudaMemcpy(got.data(), layer.wgu.scale, m->rows * sizeof(float),
                           cudaMemcpyDeviceToHost),
                "copy");
        for (int r = 0; r < m->rows; r++) {
            double top = 0;
            for (int i = 0; i < m->cols; i++) top = std::max(top, fabs(oracle_weight(m, r, i)));
            if (!check_near(got[r] * 448.0, top, top * 4 * U, "scale", r)) break;
        }
        qemb_cuda_fp8_ops.close(be);
    }
    qemb_file_close(f);
}

/* More rows than the MLP takes at a time: a dequantized wgu serves all chunks, and the next layer's
 * follows it. */
TEST(int8_mlp_chunks) {
    const qemb_config c = config(2, 64, 2, 1, 64, 32, 64);
    qemb_file *f = open_model_of(QEMB_I8, &c, 22, 1);
    {
        model cuda(f, &qemb_cuda_ops, 9000), cpu(f, &qemb_cpu_ops, 9000);
        const std::vector<int> lens(150, 60);
        double worst = 1;
        compare(cuda, cpu, random_texts(lens, 0, 5), &worst);
    }
    qemb_file_close(f);
}

static std::vector<std::vector<int32_t>> texts_for(const qemb_config &c,
                                                   const std::vector<int> &lens) {
    std::vector<std::vector<int32_t>> texts = random_texts(lens, 0, 17);
    for (std::vector<int32_t> &t : texts) t.back() = c.eos_id;
    return texts;
}

struct accuracy {
    double cosine = 1, largest = 0; /* least; largest error of a number of a unit vector */
};
static accuracy measure(const qemb_file *f, const qemb_ops *ops,
                        const std::vector<std::vector<int32_t>> &texts,
                        const std::vector<std::vector<float>> &want) {
    model m(f, ops, 512);
    accuracy a;
    if (!check(m.m, "open: %s", m.err.msg)) return a;
    const std::vector<std::vector<float>> got = m.embed(texts);
    for (size_t i = 0; i < texts.size(); i++) {
        std::vector<float> g(m.D), w(m.D);
        check(!qemb_l2_normalize(g.data(), got[i].data(), m.D) &&
                  !qemb_l2_normalize(w.data(), want[i].data(), m.D),
              "text %zu has no length", i);
        a.cosine = std::min(a.cosine, cosine(g.data(), w.data(), m.D));
        for (int k = 0; k < m.D; k++) {
            const double d = fabs((double)g[k] - w[k]);
            if (!(d <= a.largest)) a.largest = d;
        }
    }
    check(!qemb_health_of(m.m).recomputed, "vectors came from the CPU");
    return a;
}

/* Against the CPU's FP32 on the FP16 file. Bounds on 1 - cosine, half the square of the relative
 * error: a branch (attention, or MLP) passes two products, and the residual's sum of branches has
 * the relative error of one. INT8: a rounding is off by up to half a 127th of its group's largest,
 * which is sqrt(3) times the group's size for uniform weights: 2^-8 sqrt(3) / sqrt(3) = 0.39 % RMS,
 * two products 0.6 %. e4m3: up to 2^-4, 2.6 % RMS over a binade, for W and for x: 3.7 %, two
 * products 5.2 %. Norm, softmax and SiLU may double an error on its way: 1.2 % and 10.5 %; normal
 * rows that have outliers (massive) and texts that are worse than the average again: 2.4 % and 21
 * %. So 3e-4 and 2.2e-2; a wrong scale or row is above both.
 */
static void accuracy_case(const char *name, const qemb_file *f) {
    const std::vector<std::vector<int32_t>> texts = texts_for(f->config, {1, 2, 7, 16, 33, 64, 90});
    std::vector<std::vector<float>> want;
    {
        model cpu(f, &qemb_cpu_ops, 512);
        want = cpu.embed(texts);
    }
    int8_file int8(f);
    const struct {
        const char *what;
        const qemb_file *f;
        const qemb_ops *ops;
        double gap;
    } kinds[] = {{"FP16", f, &qemb_cuda_ops, 1 - MIN_COSINE},
                 {"INT8 storage, FP16", &int8.f, &qemb_cuda_ops, 3e-4},
                 {"FP8", f, &qemb_cuda_fp8_ops, 2.2e-2},
                 {"INT8 storage, FP8", &int8.f, &qemb_cuda_fp8_ops, 2.2e-2}};
    const bool fp8 = has_fp8();
    for (const auto &k : kinds) {
        if (k.ops == &qemb_cuda_fp8_ops && !fp8) continue;
        const accuracy a = measure(k.f, k.ops, texts, want);
        check(1 - a.cosine <= k.gap, "%s, %s: cosine %.6f (want %.6f)", name, k.what, a.cosine,
              1 - k.gap);
        printf("accuracy %-8s %-20s least cosine %.6f, largest error %.4f\n", name, k.what,
               a.cosine, a.largest);
    }
}
TEST(accuracy) {
    const qemb_config c = config(4, 256, 4, 2, 64, 512, 200);
    qemb_file *f = open_model(&c, 71, 1);
    accuracy_case("random", f);
    qemb_file_close(f);
    qemb_err err = {};
    if (check(!qemb_file_open(&f, "tests/golden/massive.qemb", &err), "%s", err.msg)) {
        accuracy_case("massive", f);
        qemb_file_close(f);
    }
}

/* Alone and packed: T is rounded up to 16 for the library */
static void fp8_same_bits_case() {
    const qemb_config c = config(2, 64, 4, 2, 64, 96, 200);
    qemb_file *f = open_model(&c, 41, 1);
    {
        qemb_options opt = {};
        opt.deterministic = 1;
        model cuda(f, &qemb_cuda_fp8_ops, 2048, opt);
        if (check(cuda.m, "%s", cuda.err.msg)) {
            const std::vector<std::vector<int32_t>> texts =
                random_texts({1, 40, 64, 90, 129}, 33, 9);
            const std::vector<std::vector<float>> packed = cuda.embed(texts);
            for (size_t i = 0; i < texts.size(); i++)
                check(cuda.embed({texts[i]})[0] == packed[i], "text %zu differs when packed", i);
            model cpu(f, &qemb_cpu_ops, 2048); /* however late the copies of the weights ran */
            const std::vector<std::vector<float>> want = cpu.embed(texts);
            for (size_t i = 0; i < texts.size(); i++) {
                const double cos = cosine(packed[i].data(), want[i].data(), 64);
                check(1 - cos <= 2.2e-2, "text %zu: cosine %.6f", i, cos); /* see accuracy_case */
            }
        }
    }
    qemb_file_close(f);
}
TEST_SCHEDULES(fp8_same_bits) {
    if (has_fp8()) fp8_same_bits_case();
}
#if defined(QEMB_EMU)
TEST_SCHEDULES(fp8_sums_same_bits) {
    const emu::device standard = emu::dev;
    emu::dev.major = 12, emu::dev.minor = 0;
    fp8_same_bits_case();
    emu::dev = standard;
}
#endif

/* The MLP in chunks of rows that are no multiple of 16: a product writes whole sixteens, which must
 * not reach into the next chunk's rows. */
TEST(fp8_mlp_chunks) {
    if (!has_fp8()) return;
    const qemb_config c = config(2, 64, 2, 1, 64, 96, 200);
    qemb_file *f = open_model(&c, 47, 1);
    {
        qemb_options opt = {};
        opt.deterministic = 1;
        model whole(f, &qemb_cuda_fp8_ops, 2048, opt);
        opt.mlp_rows = 20;
        model chunks(f, &qemb_cuda_fp8_ops, 2048, opt);
        const auto texts = random_texts({50, 7, 64, 33}, 0, 9);
        if (check(whole.m && chunks.m, "%s%s", whole.err.msg, chunks.err.msg))
            check(whole.embed(texts) == chunks.embed(texts), "chunks change the vectors");
    }
    qemb_file_close(f);
}

TEST(refuse_fp8_shapes) {
    const qemb_config c = config(1, 72, 2, 1, 64, 64, 64);
    qemb_file *f = open_model(&c, 51, 1);
    {
        model cuda(f, &qemb_cuda_fp8_ops, 64);
        check(!cuda.m && strstr(cuda.err.msg, "FP8 products: sizes not supported (got hidden 72"),
              "message \"%s\"", cuda.err.msg);
    }
    qemb_file_close(f);
}
#if defined(QEMB_EMU)
TEST(refuse_fp8_device) {
    const emu::device standard = emu::dev;
    const qemb_config c = config(1, 64, 2, 1, 64, 64, 64);
    qemb_file *f = open_model(&c, 51, 1);
    emu::dev.minor = 6, emu::dev.major = 8;
    {
        model cuda(f, &qemb_cuda_fp8_ops, 64);
        check(!cuda.m &&
                  strstr(cuda.err.msg, "FP8 products: not on this GPU (got compute capability 8.6"),
              "message \"%s\"", cuda.err.msg);
        model half(f, &qemb_cuda_ops, 64);
        check(half.m, "FP16 on the same GPU: %s", half.err.msg);
    }
    emu::dev = standard;
    emu::dev.no_fp8 = true;
    {
        model cuda(f, &qemb_cuda_fp8_ops, 64);
        check(!cuda.m && strstr(cuda.err.msg, "FP8 products: cuBLASLt ") &&
                  strstr(cuda.err.msg, " has none of 256 x 64 that serves here (status 15)"),
              "message \"%s\"", cuda.err.msg);
    }
    emu::dev = standard;
    qemb_file_close(f);
}
#endif
