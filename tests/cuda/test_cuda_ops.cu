/* test_cuda_ops.cu - the PTX wrappers, every kernel, and every op of the CUDA table, against double
 * precision. Each bound is derived where it stands; U is half an ulp of float. */
#include "cuda_attention.h"

#include "backends/cuda/kernels.cuh"

/* ---- ptx: one test per wrapper --------------------------------------------------------------- */

/* Each lane's registers after a ldmatrix of a 32 x 8 block of 16-bit numbers. */
template <bool TRANSPOSED> __global__ void ldmatrix_kernel(uint32_t *out, const uint4 *in) {
    SHARED_BYTES(smem);
    ((uint4 *)smem)[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    uint32_t r[4];
    if constexpr (TRANSPOSED)
        ldmatrix4_trans(r, shared_address(smem) + threadIdx.x * 16);
    else
        ldmatrix4(r, shared_address(smem) + threadIdx.x * 16);
    for (int m = 0; m < 4; m++) out[threadIdx.x * 4 + m] = r[m];
}
template <bool TRANSPOSED> static void ldmatrix_case() {
    std::vector<uint16_t> v(256);
    for (size_t i = 0; i < v.size(); i++) v[i] = (uint16_t)(i * 259);
    std::vector<uint4> in(32);
    memcpy(in.data(), v.data(), 512);
    device_array<uint4> d(in);
    device_array<uint32_t> o(128);
    cuda_ok(launch(ldmatrix_kernel<TRANSPOSED>, dim3(1), dim3(32), 512, (cudaStream_t)0, o.p, d.p),
            "launch");
    std::vector<uint32_t> got = o.get();
    for (int l = 0; l < 32; l++)
        for (int m = 0; m < 4; m++)
            for (int h = 0; h < 2; h++) {
                int row = l / 4, col = l % 4 * 2 + h;
                if (TRANSPOSED) std::swap(row, col);
                check((got[l * 4 + m] >> 16 * h & 0xffff) == v[m * 64 + row * 8 + col],
                      "lane %d matrix %d half %d", l, m, h);
            }
}
TEST_SCHEDULES(ptx_ldmatrix) { ldmatrix_case<false>(); }
TEST_SCHEDULES(ptx_ldmatrix_trans) { ldmatrix_case<true>(); }

template <class A>
__global__ void mma_kernel(float *out, const uint32_t *a, const uint32_t *b, const float *c) {
    const int l = threadIdx.x;
    uint32_t ra[4];
    float d[4];
    for (int i = 0; i < 4; i++) ra[i] = a[l * 4 + i], d[i] = c[l * 4 + i];
    mma16816<A>(d, ra, b[l * 2], b[l * 2 + 1]);
    for (int i = 0; i < 4; i++) out[l * 4 + i] = d[i];
}
template <class A> static uint32_t bits_of(A lo, A hi) {
    uint16_t h[2];
    memcpy(&h[0], &lo, 2);
    memcpy(&h[1], &hi, 2);
    return h[0] | (uint32_t)h[1] << 16;
}
/* Fragments by the tables of the PTX manual ("Matrix Fragments for mma.m16n8k16"). */
template <class A> static void mma_case() {
    rng r = {7};
    std::vector<A> a = random_numbers<A>(&r, 256, 1),
                   b = random_numbers<A>(&r, 128, 1); /* (16,16), (16,8) */
    std::vector<float> c = random_numbers<float>(&r, 128, 1), fc(128);
    std::vector<uint32_t> fa(128), fb(64);
    for (int l = 0; l < 32; l++) {
        const int g = l / 4, t = l % 4 * 2;
        for (int i = 0; i < 4; i++) {
            const int row = g + (i & 1) * 8, col = t + (i >> 1) * 8;
            fa[l * 4 + i] = bits_of(a[row * 16 + col], a[row * 16 + col + 1]);
            fc[l * 4 + i] = c[(g + (i >> 1) * 8) * 8 + t + (i & 1)];
        }
        for (int i = 0; i < 2; i++)
            fb[l * 2 + i] = bits_of(b[(t + i * 8) * 8 + g], b[(t + i * 8 + 1) * 8 + g]);
    }
    device_array<uint32_t> da(fa), db(fb);
    device_array<float> dc(fc), o(128);
    cuda_ok(launch(mma_kernel<A>, dim3(1), dim3(32), 0, (cudaStream_t)0, o.p, da.p, db.p, dc.p),
            "launch");
    std::vector<float> got = o.get();
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) {
            const int row = l / 4 + (i >> 1) * 8, col = l % 4 * 2 + (i & 1);
            double want = c[row * 8 + col], size = fabs(want);
            for (int k = 0; k < 16; k++) {
                want += num(a[row * 16 + k]) * num(b[k * 8 + col]);
                size += fabs(num(a[row * 16 + k]) * num(b[k * 8 + col]));
            }
            check_near(got[l * 4 + i], want, size * 17 * 2 * U, "d",
                       l * 4 + i); /* 17 terms, truncated */
        }
}
TEST_SCHEDULES(ptx_mma_f16) { mma_case<__half>(); }
TEST_SCHEDULES(ptx_mma_bf16) { mma_case<__nv_bfloat16>(); }

/* Two groups of copies; the first is waited for alone. Odd threads ask for zeros. */
__global__ void cp_async_kernel(uint4 *out, const uint4 *in) {
    SHARED_BYTES(smem);
    const int t = threadIdx.x, n = blockDim.x;
    const shared_addr at = shared_address(smem) + t * 16;
    cp_async16(at, in + t, t % 2 == 0);
    cp_async_commit();
    cp_async16(at + n * 16, in + n + t, true);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    out[t] = ((uint4 *)smem)[(t + 1) % n];
    cp_async_wait<0>();
    __syncthreads();
    out[n + t] = ((uint4 *)smem)[n + (t + 1) % n];
}
TEST_SCHEDULES(ptx_cp_async) {
    const unsigned n = 64;
    std::vector<uint4> in(2 * n);
    for (unsigned i = 0; i < 2 * n; i++) in[i] = make_uint4(i, i * 3, i * 5, i * 7 + 1);
    device_array<uint4> d(in), o(2 * n);
    cuda_ok(launch(cp_async_kernel, dim3(1), dim3(n), 2 * n * 16, (cudaStream_t)0, o.p, d.p),
            "launch");
    std::vector<uint4> got = o.get();
    for (unsigned i = 0; i < n; i++) {
        const unsigned from = (i + 1) % n;
        uint4 want = from % 2 ? make_uint4(0, 0, 0, 0) : in[from];
        check(!memcmp(&got[i], &want, 16), "first group, chunk %u", i);
        check(!memcmp(&got[n + i], &in[n + from], 16), "second group, chunk %u", i);
    }
}

__global__ void exp2_kernel(float *out, const float *in) {
    out[threadIdx.x] = exp2_approx(in[threadIdx.x]);
}
TEST(ptx_exp2) {
    std::vector<float> in(256);
    for (int i = 0; i < 255; i++) in[i] = (float)(i - 200) * 0.37f;
    in[255] = -INFINITY;
    device_array<float> d(in), o(256);
    cuda_ok(launch(exp2_kernel, dim3(1), dim3(256), 0, (cudaStream_t)0, o.p, d.p), "launch");
    std::vector<float> got = o.get();
    for (size_t i = 0; i < 256; i++)
        check_near(got[i], exp2((double)in[i]), exp2((double)in[i]) * 4 * U, "2^x", i);
}

/* ---- rmsnorm --------------------------------------------------------------------------------- */

template <class A, int V> static void rmsnorm_case(int D, int T, double scale) {
    rng r = {(uint64_t)D + 1};
    std::vector<float> x = random_numbers<float>(&r, (size_t)T * D, scale),
                       w = random_numbers<float>(&r, D, 1, 1);
    device_array<float> dx(x), dw(w);
    device_array<A> dy((size_t)T * D);
    const float eps = 1e-6f;
    cuda_ok(launch(rmsnorm_kernel<A, V>, dim3(3), dim3(ROW_THREADS), ROW_WARPS * sizeof(float),
                   (cudaStream_t)0, dy.p, dx.p, dw.p, T, D, eps),
            "launch");
    std::vector<A> got = dy.get();
    std::vector<double> xd = doubles(x), want(D);
    for (int t = 0; t < T; t++) {
        oracle_rmsnorm(want.data(), &xd[(size_t)t * D], w.data(), D, (double)eps);
        /* 4V sums in a thread, 5 + 8 over the block, and 8 roundings more */
        for (int i = 0; i < D; i++) {
            const double tol = fabs(want[i]) * (rounding<A>() + (4 * V + 21) * U) + tiny<A>();
            if (!check_near(num(got[(size_t)t * D + i]), want[i], tol, "y", (size_t)t * D + i))
                return;
        }
    }
}
TEST_SCHEDULES(rmsnorm) {
    rmsnorm_case<__half, 1>(8, 4, 1);
    rmsnorm_case<__half, 1>(64, 7, 3);
    rmsnorm_case<__half, 1>(1024, 5, 3);
    rmsnorm_case<__half, 2>(1032, 5, 3);
    rmsnorm_case<__half, 4>(2560, 7, 3);
    rmsnorm_case<__half, 8>(8192, 4, 3);
    rmsnorm_case<__half, 1>(64, 2, 0x1p-20); /* eps counts */
    rmsnorm_case<__half, 1>(64, 2, 1e4);
    rmsnorm_case<__nv_bfloat16, 4>(4096, 5, 3);
    rmsnorm_case<float, 1>(72, 5, 3); /* pool */
}

/* ---- qknorm_rope ----------------------------------------------------------------------------- */

template <class A, int HD> static void qknorm_rope_case(int T, int H, int K) {
    rng r = {(uint64_t)(HD + H)};
    const int ld = (H + 2 * K) * HD, positions = 400;
    const double theta = 1e6;
    std::vector<A> qkv = random_numbers<A>(&r, (size_t)T * ld, 2);
    std::vector<float> wq = random_numbers<float>(&r, HD, 1, 1),
                       wk = random_numbers<float>(&r, HD, 1, 1);
    std::vector<int> pos(T);
    for (int t = 0; t < T; t++) pos[t] = t * 37 % positions;
    std::vector<float2> cs((size_t)positions * HD / 2);
    for (int p = 0; p < positions; p++)
        for (int i = 0; i < HD / 2; i++) {
            const float freq = (float)pow(theta, -2.0 * i / HD), angle = freq * (float)p;
            cs[(size_t)p * HD / 2 + i] =
                make_float2((float)cos((double)angle), (float)sin((double)angle));
        }
    device_array<A> d(qkv);
    device_array<float> dq(wq), dk(wk);
    device_array<int> dp(pos);
    device_array<float2> dc(cs);
    const int groups = ROPE_THREADS / (HD / 4);
    cuda_ok(launch(qknorm_rope_kernel<A, HD>, dim3((unsigned)((T * (H + K) + groups - 1) / groups)),
                   dim3(ROPE_THREADS), 0, (cudaStream_t)0, d.p, dq.p, dk.p, dp.p, dc.p, T, H, K,
                   1e-6f),
            "launch");
    std::vector<A> got = d.get();
    for (int t = 0; t < T; t++)
        for (int h = 0; h < H + 2 * K; h++) {
            const size_t at = (size_t)t * ld + h * HD;
            std::vector<double> x(HD), y(HD);
            for (int i = 0; i < HD; i++) x[i] = num(qkv[at + i]);
            if (h < H + K)
                oracle_rmsnorm(y.data(), x.data(), h < H ? wq.data() : wk.data(), HD, 1e-6);
            else
                y = x;
            std::vector<double> normed = y;
            if (h < H + K) oracle_rope(y.data(), HD, pos[t], theta);
            for (int i = 0; i < HD; i++) {
                /* the norm: 4 sums in a lane, 5 over lanes, 8 roundings; the rotation: 4 more. v:
                 * exact */
                const double size = fabs(normed[i]) + fabs(normed[(i + HD / 2) % HD]);
                const double tol =
                    h < H + K ? size * 21 * U + fabs(y[i]) * rounding<A>() + tiny<A>() : 0;
                if (!check_near(num(got[at + i]), y[i], tol, "qkv", at + i)) return;
            }
        }
}
TEST_SCHEDULES(qknorm_rope) {
    qknorm_rope_case<__half, 128>(11, 4, 2);
    qknorm_rope_case<__half, 128>(1, 1, 1);
    qknorm_rope_case<__half, 64>(11, 3, 1);
    qknorm_rope_case<__half, 64>(3, 2,
                                 1); /* 9 heads: the last warp's second half has nothing to do */
    qknorm_rope_case<__nv_bfloat16, 128>(5, 4, 1);
}

/* ---- swiglu ---------------------------------------------------------------------------------- */

template <class A> static void swiglu_case(int T, int F, double scale) {
    rng r = {(uint64_t)F};
    std::vector<A> gu = random_numbers<A>(&r, (size_t)T * 2 * F, scale);
    device_array<A> d(gu), o((size_t)T * F);
    device_array<unsigned long long> clamps(std::vector<unsigned long long>{0});
    cuda_ok(launch(swiglu_kernel<A>, dim3(2), dim3(SWIGLU_THREADS), 0, (cudaStream_t)0, o.p, d.p, T,
                   F, clamps.p),
            "launch");
    std::vector<A> got = o.get();
    unsigned long long over = 0;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < F; i++) {
            const double g = num(gu[(size_t)t * 2 * F + i]), u = num(gu[(size_t)t * 2 * F + F + i]);
            double want = oracle_swiglu(g, u) / 64;
            /* __expf is off by 2 + 1.2 |x| ulp, __fdividef by 2 ulp, and there are 4 roundings */
            double tol = fabs(want) * ((12 + 2.4 * fabs(g)) * U + rounding<A>()) + tiny<A>();
            if (fabs(want) > 65504) over++, want = copysign(65504, want), tol = 0;
            if (std::is_same<A, __nv_bfloat16>::value)
                tol = std::max(tol, fabs(want) * rounding<A>());
            if (!check_near(num(got[(size_t)t * F + i]), want, tol, "h", (size_t)t * F + i)) return;
        }
    const unsigned long long counted = clamps.get()[0];
    check(counted == over, "clamps (got %llu, want %llu)", counted, over);
    check(scale < 1000 || over > 0, "the case clamps nothing");
}
TEST_SCHEDULES(swiglu) {
    swiglu_case<__half>(5, 96, 4);
    swiglu_case<__half>(3, 8, 20);
    swiglu_case<__half>(40, 1024, 4);  /* more work than threads */
    swiglu_case<__half>(3, 96, 60000); /* products of 1.8e9 */
    swiglu_case<__nv_bfloat16>(5, 96, 4);
    swiglu_case<__nv_bfloat16>(3, 96, 60000);
}
/* What is not a number stays so, for the finite check to see; it is no clamp */
TEST(swiglu_nan) {
    std::vector<__half> gu(16, make<__half>(1));
    gu[2] = make<__half>(NAN);
    gu[8 + 5] = make<__half>(NAN);
    gu[7] = make<__half>(INFINITY);
    device_array<__half> d(gu), o(8);
    device_array<unsigned long long> clamps(std::vector<unsigned long long>{0});
    cuda_ok(launch(swiglu_kernel<__half>, dim3(1), dim3(SWIGLU_THREADS), 0, (cudaStream_t)0, o.p,
                   d.p, 1, 8, clamps.p),
            "launch");
    std::vector<__half> got = o.get();
    for (int i = 0; i < 8; i++)
        check(std::isnan(num(got[i])) == (i == 2 || i == 5), "h[%d] is %g", i, num(got[i]));
    check(num(got[7]) == 65504, "infinity is clamped (got %g)", num(got[7]));
    check(clamps.get()[0] == 1, "clamps (got %llu, want 1)", clamps.get()[0]);
}

/* ---- attention ------------------------------------------------------------------------------- */

static const std::vector<int> ragged = {1, 2, 31, 63, 64, 65, 130, 200};
TEST_SCHEDULES(attention_narrow_128) {
    attention_case<__half, 128, 1>(ragged, 0, 1, 2, false);
    attention_case<__half, 128, 1>({1, 33}, 0, 2, 0, false);
    attention_case<__half, 128, 1>({5, 40, 70}, 19, 2, 1, false);
}
TEST_SCHEDULES(attention_narrow_64) {
    attention_case<__half, 64, 1>(ragged, 0, 1, 1, false);
    attention_case<__half, 64, 1>({5, 40, 70}, 64, 1, 3, false);
    attention_case<__half, 64, 1>({3}, 1, 1, 6, false); /* a tile is one token */
}
TEST_SCHEDULES(attention_wide_128) {
    attention_case<__half, 128, 2>(ragged, 0, 1, 2, false);
    attention_case<__half, 128, 2>({5, 40, 70}, 70, 2, 1, false);
}
TEST_SCHEDULES(attention_wide_64) {
    attention_case<__half, 64, 2>(ragged, 0, 1, 1, false);
    attention_case<__half, 64, 2>({5, 40, 70}, 19, 1, 2, false);
}
TEST_SCHEDULES(attention_last_only) {
    attention_case<__half, 128, 1>(ragged, 0, 2, 1, true);
    attention_case<__half, 128, 1>({1, 2, 60, 64}, 67, 1, 2, true);
    attention_case<__half, 64, 1>(ragged, 19, 1, 0, true);
}
TEST_SCHEDULES(attention_bf16) {
    attention_case<__nv_bfloat16, 128, 1>({1, 64, 65, 100}, 0, 1, 2, false);
    attention_case<__nv_bfloat16, 128, 2>({1, 64, 65, 100}, 5, 1, 1, false);
    attention_case<__nv_bfloat16, 64, 1>({1, 65}, 0, 1, 2, false);
}
/* Bidirectional: a last tile of 1, of 63 and of 64 keys; several tiles; one text behind another */
TEST_SCHEDULES(attention_all) {
    attention_case<__half, 128, 1, true>(ragged, 0, 1, 2, false);
    attention_case<__half, 64, 1, true>({5, 193, 3}, 0, 2, 0, false);
    attention_case<__half, 128, 2, true>(ragged, 0, 1, 1, false);
    attention_case<__half, 64, 2, true>({5, 193, 3}, 0, 2, 1, false);
}
/* Scores of hundreds: one key takes all, the running maximum moves */
TEST(attention_sharp) {
    attention_case<__half, 128, 1>({200}, 0, 1, 2, false, 12);
    attention_case<__half, 64, 2>({200}, 3, 1, 2, false, 12);
    attention_case<__half, 64, 1, true>({200}, 0, 1, 2, false, 12);
}

/* ---- the table's ops ------------------------------------------------------------------------- */

/* A backend over a config, and a layout of texts. */
struct bench_backend {
    qemb_config c;
    qemb_backend *be = nullptr;
    std::vector<int32_t> tokens, pos, cu;
    qemb_packed_batch b = {};

    bench_backend(int D, int H, int K, int hd, int F, int V, int rows, qemb_options opt = {},
                  bool bidirectional = false) {
        c = qemb_config{};
        c.n_layers = 1, c.hidden = D, c.n_heads = H, c.n_kv_heads = K, c.head_dim = hd;
        c.ffn = F, c.vocab = V, c.max_positions = rows, c.rope_theta = 1e6f, c.norm_eps = 1e-6f;
        c.attention = bidirectional ? QEMB_BIDIRECTIONAL : QEMB_CAUSAL;
        opt.batch_tokens = opt.max_tokens = rows;
        opt.threads = 2;
        qemb_err err = {};
        check(!qemb_cuda_ops.open(&be, &c, &opt, &err), "open: %s", err.msg);
    }
    ~bench_backend() { qemb_cuda_ops.close(be); }
    void begin(const std::vector<int> &lens, int P, rng *r) {
        tokens.clear(), pos.clear(), cu.clear();
        for (int t = 0; t < P; t++) pos.push_back(t);
        for (int n : lens) {
            cu.push_back((int)pos.size());
            for (int t = 0; t < n; t++) pos.push_back(P + t);
        }
        cu.push_back((int)pos.size());
        for (size_t t = 0; t < pos.size(); t++)
            tokens.push_back((int)(rng_u64(r) % (uint64_t)c.vocab));
        b = qemb_packed_batch{(int)lens.size(),
                              (int)pos.size(),
                              P,
                              tokens.data(),
                              pos.data(),
                              cu.data(),
                              c.attention,
                              0,
                              0};
        qemb_cuda_ops.begin(be, &b);
    }
};

/* Random halves in memory of the host, as a map holds them. */
static std::vector<uint16_t> random_table(rng *r, size_t n) {
    std::vector<uint16_t> v(n);
    rng_halves(r, v.data(), n, 0.5);
    return v;
}

template <class A> static void embed_case(int D, int T, int V) {
    rng r = {(uint64_t)D};
    const std::vector<A> table = random_numbers<A>(&r, (size_t)V * D, 3);
    std::vector<int> tokens(T);
    for (int t = 0; t < T; t++) tokens[t] = t * 7 % V;
    device_array<A> d(table);
    device_array<int> dt(tokens);
    device_array<float> x((size_t)(T + 1) * D);
    cuda_ok(launch(embed_kernel<A>, dim3((unsigned)((T + EMBED_WARPS - 1) / EMBED_WARPS)),
                   dim3(EMBED_WARPS * 32), 0, (cudaStream_t)0, x.p, (const A *)d.p,
                   (const int *)dt.p, (const float *)nullptr, (const int *)nullptr, T, D),
            "launch");
    const std::vector<float> got = x.get();
    for (int t = 0; t <= T; t++) /* the row behind the last one is left alone */
        for (int i = 0; i < D; i++) {
            const float g = got[(size_t)t * D + i];
            if (!check(t == T ? std::isnan(g) : g == num(table[(size_t)tokens[t] * D + i]),
                       "x[%d][%d] is %g", t, i, (double)g))
                return;
        }
}
TEST_SCHEDULES(embed) {
    embed_case<__half>(264, 9, 4);
    embed_case<__nv_bfloat16>(264, 9, 4);
}

/* A batch is begun while the one before is still on its way */
TEST_SCHEDULES(op_embed_back_to_back) {
    rng r = {15};
    bench_backend f(64, 2, 1, 64, 64, 300, 200);
    const std::vector<uint16_t> table = random_table(&r, (size_t)300 * 64);
    device_array<uint16_t> dt(table);
    qemb_mat m = {dt.p, 300, 64, QEMB_F16, 1, nullptr, QEMB_BITS_UNKNOWN};
    device_array<float> a((size_t)100 * 64), b((size_t)100 * 64);
    f.begin({100}, 0, &r);
    const std::vector<int32_t> first = f.tokens;
    qemb_cuda_ops.embed(f.be, a.p, &m, nullptr, &f.b);
    f.begin({60, 40}, 0, &r);
    qemb_cuda_ops.embed(f.be, b.p, &m, nullptr, &f.b);
    std::vector<float> ga = a.get(), gb = b.get();
    for (size_t t = 0; t < 100; t++)
        for (size_t i = 0; i < 64; i++) {
            check(ga[t * 64 + i] == oracle_half(table[(size_t)first[t] * 64 + i]),
                  "first batch, x[%zu][%zu]", t, i);
            check(gb[t * 64 + i] == oracle_half(table[(size_t)f.tokens[t] * 64 + i]),
                  "second batch, x[%zu][%zu]", t, i);
        }
}

TEST_SCHEDULES(op_rmsnorm) {
    rng r = {6};
    for (int D : {64, 1040, 2560, 8192}) {
        bench_backend f(D, 2, 1, 64, 64, 16, 64);
        std::vector<float> x = random_numbers<float>(&r, (size_t)40 * D, 3),
                           w = random_numbers<float>(&r, D, 1, 1);
        device_array<float> dx(x), dw(w);
        device_array<__half> y((size_t)40 * D);
        qemb_cuda_ops.rmsnorm(f.be, (qemb_act *)y.p, dx.p, dw.p, 40);
        std::vector<__half> got = y.get();
        std::vector<double> xd = doubles(x), want(D);
        for (int t = 0; t < 40; t++) {
            oracle_rmsnorm(want.data(), &xd[(size_t)t * D], w.data(), D, 1e-6);
            for (int i = 0; i < D; i++)
                if (!check_near(num(got[(size_t)t * D + i]), want[i],
                                fabs(want[i]) * (0x1p-11 + 60 * U) + 0x1p-25, "y",
                                (size_t)t * D + i))
                    return;
        }
    }
}

static void matmul_case(bool add, int T, double alpha) {
    rng r = {(uint64_t)T};
    bench_backend f(96, 2, 1, 64, 128, 16, 64);
    const int N = add ? 96 : 2 * 128, K = add ? 128 : 96; /* wdown, wgu */
    std::vector<uint16_t> w = random_table(&r, (size_t)N * K);
    std::vector<__half> x = random_numbers<__half>(&r, (size_t)T * K, 2);
    std::vector<float> before = random_numbers<float>(&r, (size_t)T * N, 3), after((size_t)T * N);
    device_array<uint16_t> dw(w);
    device_array<__half> dx(x), dy((size_t)T * N);
    device_array<float> dr(before);
    qemb_mat m = {dw.p, N, K, QEMB_F16, (float)alpha, nullptr, QEMB_BITS_UNKNOWN};
    if (add) {
        qemb_cuda_ops.matmul_add(f.be, dr.p, (qemb_act *)dx.p, &m, T);
        after = dr.get();
    } else {
        qemb_cuda_ops.matmul(f.be, (qemb_act *)dy.p, (qemb_act *)dx.p, &m, nullptr, T);
        std::vector<__half> h = dy.get();
        for (size_t i = 0; i < h.size(); i++) after[i] = (float)num(h[i]);
    }
    check(!failure_of(f.be), "%s", failure_of(f.be));
    std::vector<double> xd = doubles(x), y(N), size(N);
    m.data = w.data(); /* the host's, for the oracle */
    for (int t = 0; t < T; t++) {
        oracle_matvec(y.data(), size.data(), &xd[(size_t)t * K], &m);
        for (int i = 0; i < N; i++) {
            const double start = add ? before[(size_t)t * N + i] : 0, want = start + alpha * y[i];
            /* K products summed in float, truncated by tensor cores; the last roundings */
            double tol = alpha * size[i] * 2 * K * U + fabs(want) * 2 * U + fabs(start) * U;
            if (!add) tol += fabs(want) * 0x1p-11 + 0x1p-25;
            if (!check_near(after[(size_t)t * N + i], want, tol, "y", (size_t)t * N + i)) return;
        }
    }
}
TEST_SCHEDULES(op_matmul) {
    for (int T : {1, 2, 16, 17, 33, 64}) matmul_case(false, T, 1);
}
TEST_SCHEDULES(op_matmul_add) {
    for (int T : {1, 2, 16, 17, 33, 64}) matmul_case(true, T, 1);
    matmul_case(true, 20, 64);
}
/* A shape that open did not announce: a failure, not a crash */
TEST(op_matmul_unknown_shape) {
    bench_backend f(96, 2, 1, 64, 128, 16, 64);
    device_array<__half> w(80 * 96), x(96), y(80);
    qemb_mat m = {w.p, 80, 96, QEMB_F16, 1, nullptr, QEMB_BITS_UNKNOWN};
    qemb_cuda_ops.matmul(f.be, (qemb_act *)y.p, (qemb_act *)x.p, &m, nullptr, 1);
    const char *why = failure_of(f.be);
    check(why && strstr(why, "matmul") && strstr(why, "cuBLASLt status"), "failure (got %s)",
          why ? why : "none");
}

/* qknorm_rope, then attention, on a layout: the lists of begin against the oracle, text by text. */
static void attention_op_case(int hd, int H, int K, const std::vector<int> &lens, int P, bool last,
                              qemb_options opt = {}, bool bidirectional = false) {
    rng r = {(uint64_t)(hd + P)};
    const int ld = (H + 2 * K) * hd;
    bench_backend f(64, H, K, hd, 64, 16, 1400, opt, bidirectional);
    f.begin(lens, P, &r);
    std::vector<__half> qkv = random_numbers<__half>(&r, (size_t)f.b.T * ld, 2);
    std::vector<float> wq = random_numbers<float>(&r, hd, 0.5, 1),
                       wk = random_numbers<float>(&r, hd, 0.5, 1);
    device_array<__half> d(qkv), att((size_t)(last ? f.b.B : f.b.T) * H * hd);
    device_array<float> dq(wq), dk(wk);
    qemb_cuda_ops.qknorm_rope(f.be, (qemb_act *)d.p, dq.p, dk.p, &f.b);
    qemb_cuda_ops.attention(f.be, (qemb_act *)att.p, (qemb_act *)d.p, &f.b,
                            last ? QEMB_LAST_ROWS : QEMB_ALL_ROWS);
    std::vector<__half> got = att.get(), rotated = d.get();
    check(!failure_of(f.be), "%s", failure_of(f.be));
    for (int b = 0; b < f.b.B; b++) {
        const int n = P + lens[b];
        std::vector<double> q((size_t)n * ld), o((size_t)n * H * hd), weighted(o.size()),
            reach((size_t)n * H);
        for (int t = 0; t < n; t++) {
            const size_t row = (size_t)(t < P ? t : f.cu[b] + t - P) * ld;
            for (int i = 0; i < ld; i++) q[(size_t)t * ld + i] = num(rotated[row + i]);
            std::vector<double> head(hd);
            /* Positions and weights: the bound of qknorm_rope_case. */
            for (int h = 0; h < H + K; h++) {
                for (int i = 0; i < hd; i++) head[i] = num(qkv[row + h * hd + i]);
                oracle_rmsnorm(head.data(), head.data(), h < H ? wq.data() : wk.data(), hd, 1e-6);
                std::vector<double> normed = head;
                oracle_rope(head.data(), hd, t, 1e6);
                for (int i = 0; i < hd; i++) {
                    const double size = fabs(normed[i]) + fabs(normed[(i + hd / 2) % hd]);
                    if (!check_near(num(rotated[row + h * hd + i]), head[i],
                                    size * 21 * U + fabs(head[i]) * 0x1p-11 + 0x1p-25, "qkv",
                                    row + h * hd + i))
                        return;
                }
            }
        }
        oracle_attention(o.data(), weighted.data(), reach.data(), q.data(), n, H, K, hd,
                         bidirectional);
        for (int t = last ? n - 1 : P; t < n; t++)
            for (int i = 0; i < H * hd; i++) {
                const size_t at = (size_t)t * H * hd + i,
                             to = (size_t)(last ? b : f.cu[b] + t - P) * H * hd + i;
                const double score =
                    reach[(size_t)t * H + i / hd] * (2 * hd + 8) * U; /* see attention_case */
                const double tol = weighted[at] * (2 * score + 8 * U + 0x1p-11 + (2 * n + 4) * U) +
                                   n * 2 * 0x1p-25 + fabs(o[at]) * 0x1p-11 + 0x1p-25;
                if (!check_near(num(got[to]), o[at], tol, "att", to)) return;
            }
    }
}
TEST_SCHEDULES(op_attention) {
    attention_op_case(64, 4, 2, {1, 90, 3, 64}, 0, false);
    attention_op_case(128, 2, 1, {1, 90, 3, 64}, 37, false);
    attention_op_case(64, 4, 2, {1, 90, 3, 64}, 37, true);
    attention_op_case(128, 2, 2, {70}, 0, true);
}
/* Over WIDE_FROM tokens: both tile sizes in one batch */
TEST(op_attention_long) {
    attention_op_case(64, 2, 1, {530, 7, 64}, 0, false);
    attention_op_case(128, 2, 2, {3, 20}, 515, false);
}
/* Bidirectional; Hopper's kernel, which is causal, is not used */
TEST(op_attention_all) {
    qemb_options opt = {};
    opt.hopper = 1;
    attention_op_case(64, 4, 2, {1, 90, 3, 64}, 0, false, {}, true);
    attention_op_case(128, 2, 1, {1, 90, 3, 64}, 0, true, {}, true);
    attention_op_case(64, 2, 1, {530, 7, 64}, 0, false, {}, true);
    attention_op_case(128, 2, 2, {530, 7, 64}, 0, false, opt, true);
}
TEST(op_attention_hopper) {
    qemb_options opt = {};
    opt.hopper = 1;
    attention_op_case(64, 2, 1, {530, 7, 64}, 0, false, opt);
    attention_op_case(128, 2, 2, {3, 20}, 515, false, opt);
    attention_op_case(128, 2, 2, {600}, 0, true, opt);
}

/* h (T, F) against double precision. Where they pass through FP16, gate and up are off by its
 * rounding; |silu'| <= 1.1, |silu(g)| <= |g|; the rest as in swiglu_case. */
static void gate_up_op_case(int T, qemb_options opt) {
    rng r = {(uint64_t)T};
    const int D = 96, F = 136;
    bench_backend f(D, 2, 1, 64, F, 16, 512, opt);
    std::vector<uint16_t> w = random_table(&r, (size_t)2 * F * D);
    std::vector<__half> x = random_numbers<__half>(&r, (size_t)T * D, 2);
    device_array<uint16_t> dw(w);
    device_array<__half> dx(x), gu((size_t)T * 2 * F), h((size_t)T * F);
    qemb_mat m = {dw.p, 2 * F, D, QEMB_F16, 1, nullptr, QEMB_BITS_UNKNOWN};
    f.begin({T}, 0, &r);
    qemb_cuda_ops.gate_up(f.be, (qemb_act *)h.p, (qemb_act *)gu.p, (qemb_act *)dx.p, &m, T);
    const std::vector<__half> got = h.get();
    std::vector<double> xd = doubles(x), y(2 * F), size(2 * F);
    m.data = w.data(); /* the host's, for the oracle */
    for (int t = 0; t < T; t++) {
        oracle_matvec(y.data(), size.data(), &xd[(size_t)t * D], &m);
        for (int i = 0; i < F; i++) {
            const double g = y[i], u = y[F + i], want = oracle_swiglu(g, u) / 64;
            const double dg = size[i] * 2 * D * U + fabs(g) * 0x1p-11 + 0x1p-25,
                         du = size[F + i] * 2 * D * U + fabs(u) * 0x1p-11 + 0x1p-25;
            const double tol = (1.1 * dg * (fabs(u) + du) + fabs(g) * du) / 64 +
                               fabs(want) * ((12 + 2.4 * fabs(g)) * U + 0x1p-11) + 0x1p-25;
            if (!check_near(num(got[(size_t)t * F + i]), want, tol, "h", (size_t)t * F + i)) return;
        }
    }
}
TEST_SCHEDULES(op_gate_up) {
    for (int T : {1, 33, 300}) gate_up_op_case(T, {});
}
TEST_SCHEDULES(op_gate_up_hopper) {
    qemb_options opt = {};
    opt.hopper = 1;
    for (int T : {33, 300}) gate_up_op_case(T, opt);
}

#if defined(QEMB_EMU)
/* Hopper's kernels run where they are asked for, fit and pay, and nowhere else. */
TEST(op_hopper_choice) {
    const struct {
        int asked, deterministic, major, minor, T;
        bool wgmma;
    } cases[] = {{1, 0, 9, 0, 512, true},  {1, 0, 9, 0, 255, false}, {0, 0, 9, 0, 512, false},
                 {1, 1, 9, 0, 512, false}, {1, 0, 8, 9, 512, false}, {1, 0, 12, 0, 512, false}};
    const emu::device before = emu::dev;
    for (const auto &k : cases) {
        emu::dev.major = k.major, emu::dev.minor = k.minor;
        qemb_options opt = {};
        opt.hopper = k.asked, opt.deterministic = k.deterministic;
        long wgmmas = emu::count.wgmmas;
        gate_up_op_case(k.T, opt);
        check((emu::count.wgmmas > wgmmas) == k.wgmma, "gate_up, hopper %d on %d.%d, T %d: %s",
              k.asked, k.major, k.minor, k.T, k.wgmma ? "not used" : "used");
        wgmmas = emu::count.wgmmas;
        attention_op_case(64, 2, 1, {k.T}, 0, false, opt);
        check((emu::count.wgmmas > wgmmas) == k.wgmma, "attention, hopper %d on %d.%d, T %d: %s",
              k.asked, k.major, k.minor, k.T, k.wgmma ? "not used" : "used");
    }
    emu::dev = before;
}
#endif

/* The bound of rmsnorm for each row; the sums are in double; the mean rounds. Texts of one token
 * more and less than the lanes of a column, and a long one. A shared prefix changes no bit. pool
 * without weights copies. */
TEST_SCHEDULES(op_gather_mean) {
    rng r = {13};
    const int D = 1032;
    const std::vector<int> lens = {1, 2, 3, 4, 5, 300, 9};
    const int B = (int)lens.size();
    std::vector<float> w = random_numbers<float>(&r, D, 1, 1), out((size_t)B * D), y[2];
    std::vector<std::vector<float>> rows; /* every text's: two that all share, then its own */
    const std::vector<float> head = random_numbers<float>(&r, 2 * D, 3);
    for (int n : lens) {
        rows.push_back(head);
        for (float v : random_numbers<float>(&r, (size_t)n * D, 3)) rows.back().push_back(v);
    }
    for (int shared = 0; shared < 2; shared++) {
        bench_backend f(D, 2, 1, 64, 64, 16, 1300);
        std::vector<float> x = shared ? head : std::vector<float>();
        std::vector<int> laid = lens;
        for (int b = 0; b < B; b++) {
            x.insert(x.end(), rows[b].begin() + shared * 2 * D, rows[b].end());
            laid[b] += 2 - 2 * shared;
        }
        f.begin(laid, 2 * shared, &r);
        device_array<float> dx(x), dw(w), dy((size_t)B * D);
        qemb_cuda_ops.gather_mean(f.be, dy.p, dx.p, dw.p, &f.b);
        y[shared] = dy.get();
        check(!qemb_cuda_ops.pool(f.be, out.data(), dy.p, nullptr, B), "pool asks again");
        qemb_cuda_ops.collect(f.be);
        check(out == y[shared], "pool changes bits");
        check(!failure_of(f.be), "%s", failure_of(f.be));
    }
    check(y[0] == y[1], "a shared prefix changes bits");
    for (int b = 0; b < B; b++) {
        const int n = 2 + lens[b];
        const std::vector<double> x = doubles(rows[b]);
        std::vector<double> row(D), want(D), size(D);
        for (int t = 0; t < n; t++) {
            oracle_rmsnorm(row.data(), &x[(size_t)t * D], w.data(), D, 1e-6);
            for (int i = 0; i < D; i++) want[i] += row[i] / n, size[i] += fabs(row[i]) / n;
        }
        for (int i = 0; i < D; i++)
            if (!check_near(y[0][(size_t)b * D + i], want[i], 56 * U * size[i] + U * fabs(want[i]),
                            "mean", (size_t)b * D + i))
                return;
    }
}
/* Two batches are pooled before the first one is collected. */
TEST_SCHEDULES(op_gather_pool) {
    rng r = {9};
    const int D = 1032;
    bench_backend f(D, 2, 1, 64, 64, 16, 1300);
    std::vector<int> lens;
    for (int i = 0; i < 600; i++) lens.push_back(1 + i % 3);
    f.begin(lens, 2, &r);
    std::vector<float> x = random_numbers<float>(&r, (size_t)f.b.T * D, 3),
                       w = random_numbers<float>(&r, D, 1, 1);
    device_array<float> dx(x), dw(w), other(x), dl((size_t)600 * D); /* dl last: see array_set */
    qemb_cuda_ops.gather(f.be, dl.p, dx.p, &f.b, QEMB_LAST_ROWS);
    std::vector<float> out((size_t)600 * D), rows = dl.get(), later(7 * D, 0);
    check(!qemb_cuda_ops.pool(f.be, out.data(), dl.p, dw.p, 600), "pool asks again");
    check(!qemb_cuda_ops.pool(f.be, later.data(), other.p, dw.p, 7), "pool asks again");
    qemb_cuda_ops.collect(f.be);
    check(later[0] == 0, "the second batch is written by the first collect");
    qemb_cuda_ops.collect(f.be);
    std::vector<double> xd = doubles(x), second(D);
    for (int b = 0; b < 7; b++) {
        oracle_rmsnorm(second.data(), &xd[(size_t)b * D], w.data(), D, 1e-6);
        for (int i = 0; i < D; i++)
            if (!check_near(later[(size_t)b * D + i], second[i], fabs(second[i]) * 56 * U,
                            "second batch", (size_t)b * D + i))
                return;
    }
    std::vector<double> want(D), row(D);
    for (int b = 0; b < 600; b++) {
        const float *last = &x[(size_t)(f.cu[b + 1] - 1) * D];
        if (!check(!memcmp(&rows[(size_t)b * D], last, D * sizeof(float)), "gather: row %d", b))
            return;
        std::copy(last, last + D, row.begin());
        oracle_rmsnorm(want.data(), row.data(), w.data(), D, 1e-6);
        for (int i = 0; i < D; i++)
            if (!check_near(out[(size_t)b * D + i], want[i], fabs(want[i]) * 56 * U, "out",
                            (size_t)b * D + i))
                return;
    }
}
