/* test_cuda_hopper.cu - sm_90a's wrappers and the two kernels that use them, against double
 * precision. On a GPU of another kind they are skipped. Bounds as in test_cuda_ops.cu, derived
 * where they stand. */
#include "cuda_attention.h"
#include "cuda_model.h"

#include "backends/cuda/hopper.cuh"

static bool hopper_here() {
    int major = 0;
    cuda_ok(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "attribute");
    if (major != 9) printf("skipped %s: not an sm_90\n", running);
    return major == 9;
}
/* Few blocks, so that each has several tiles. */
template <class A> static const hopper_state *hopper(int blocks) {
    static hopper_state s;
    cuda_ok(hopper_open<A>(&s, blocks), "hopper_open");
    return &s;
}

/* ---- ptx: one test per wrapper --------------------------------------------------------------- */

/* One thread loads two boxes into two stages and says so by one mbarrier; all wait. Then once more:
 * the second phase. out: the bytes as they lie. */
__global__ void __launch_bounds__(128)
    tma_kernel(uint4 *out, const __grid_constant__ CUtensorMap map, int x, int y) {
#if defined(HOPPER_CODE)
    SHARED_BYTES(smem);
    const shared_addr at = shared_address(smem), bar = at + 2 * GU_PART;
    if (threadIdx.x == 0) {
        barrier_init(bar, 1);
        barrier_init_done();
    }
    __syncthreads();
    for (int round = 0; round < 2; round++) {
        if (threadIdx.x == 0) {
            barrier_expect(bar, 2 * GU_PART);
            tma_load(at, &map, bar, x, y);
            tma_load(at + GU_PART, &map, bar, x + gu_depth<__half>, y + round);
        }
        barrier_wait(bar, round);
        for (int i = threadIdx.x; i < 2 * GU_PART / 16; i += blockDim.x)
            out[round * (2 * GU_PART / 16) + i] = ((uint4 *)smem)[i];
        __syncthreads();
    }
#endif
}
TEST_SCHEDULES(ptx_tma) {
    if (!hopper_here()) return;
    const int rows = 150, columns = 136, x0 = 40, y0 = 60; /* both edges are crossed */
    std::vector<__half> v((size_t)rows * columns);
    for (size_t i = 0; i < v.size(); i++) v[i] = make<__half>((double)(i % 2039) + 1);
    device_array<__half> d(v);
    device_array<uint4> o(4 * GU_PART / 16);
    CUtensorMap map;
    check(hopper_map(hopper<__half>(1), &map, d.p, rows, columns), "the map is refused");
    cuda_ok(cudaFuncSetAttribute((const void *)tma_kernel,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, 2 * GU_PART + 8),
            "attribute");
    cuda_ok(
        launch(tma_kernel, dim3(1), dim3(128), 2 * GU_PART + 8, (cudaStream_t)0, o.p, map, x0, y0),
        "launch");
    const std::vector<uint4> got = o.get();
    for (int box = 0; box < 4; box++)
        for (int r = 0; r < HOPPER_ROWS; r++)
            for (int c = 0; c < gu_depth<__half>; c++) {
                const int x = x0 + box % 2 * gu_depth<__half> + c, y = y0 + r + (box == 3);
                __half h;
                memcpy(&h,
                       (const char *)got.data() + box * GU_PART + r * 128 +
                           ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2,
                       2);
                const double want = x < columns && y < rows ? num(v[(size_t)y * columns + x]) : 0;
                if (!check(num(h) == want, "box %d row %d column %d (got %g, want %g)", box, r, c,
                           num(h), want))
                    return;
            }
}

/* Two clusters of two blocks. In each round, block r of a cluster sends box 2r to both blocks and
 * box 2r + 1 to the other block alone, so that each gets boxes 0, 2 and the other's second one, in
 * their places; the next round starts when both have read them. out: the bytes of every block and
 * round; the box that it must not get stays at 0xFF. */
enum { MC_ROUNDS = 3, MC_BYTES = 4 * GU_PART };
__global__ void __launch_bounds__(64)
    multicast_kernel(uint4 *out, const __grid_constant__ CUtensorMap map) {
#if defined(HOPPER_CODE)
    SHARED_BYTES(smem);
    const shared_addr at = shared_address(smem), full = at + MC_BYTES, empty = full + 8;
    const int rank = cluster_rank();
    for (int i = threadIdx.x; i < MC_BYTES / 16; i += blockDim.x)
        ((uint4 *)smem)[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
    fence_async();
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init(empty, 2);
        barrier_init_done();
    }
    cluster_sync();
    for (int round = 0; round < MC_ROUNDS; round++) {
        if (threadIdx.x == 0) {
            barrier_wait(empty, round % 2 ^ 1);
            barrier_expect(full, 3 * GU_PART);
            for (int k = 0; k < 2; k++)
                tma_multicast(at + (2 * rank + k) * GU_PART, &map, full, (2 * rank + k) * 8,
                              (int)blockIdx.x / 2 * 5 + round, k ? 2 >> rank : 3);
        }
        barrier_wait(full, round % 2);
        for (int i = threadIdx.x; i < MC_BYTES / 16; i += blockDim.x)
            out[(blockIdx.x * MC_ROUNDS + round) * (MC_BYTES / 16) + i] = ((uint4 *)smem)[i];
        __syncthreads();
        if (threadIdx.x == 32)
            for (int r = 0; r < 2; r++) barrier_arrive_at(empty, r);
    }
    cluster_sync();
#endif
}
TEST_SCHEDULES(ptx_cluster) {
    if (!hopper_here()) return;
    const int rows = 150, columns = 96;
    std::vector<__half> v((size_t)rows * columns);
    for (size_t i = 0; i < v.size(); i++) v[i] = make<__half>((double)(i % 2039) + 1);
    device_array<__half> d(v);
    device_array<uint4> o((size_t)4 * MC_ROUNDS * MC_BYTES / 16);
    CUtensorMap map;
    check(hopper_map(hopper<__half>(1), &map, d.p, rows, columns), "the map is refused");
    cuda_ok(cudaFuncSetAttribute((const void *)multicast_kernel,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, MC_BYTES + 16),
            "attribute");
    cuda_ok(launch_clusters(2, multicast_kernel, dim3(4), dim3(64), MC_BYTES + 16, (cudaStream_t)0,
                            o.p, map),
            "launch");
    const std::vector<uint4> got = o.get();
    for (int n = 0; n < 4 * MC_ROUNDS * 4; n++) /* block, round, box */
        for (int r = 0; r < HOPPER_ROWS; r++)
            for (int c = 0; c < gu_depth<__half>; c++) {
                const int box = n % 4, block = n / 4 / MC_ROUNDS;
                const bool gets = box % 2 == 0 || box / 2 != block % 2;
                const int x = box * 8 + c, y = block / 2 * 5 + n / 4 % MC_ROUNDS + r;
                uint16_t bits, want = 0xFFFF;
                const char *from = (const char *)got.data() + (size_t)n * GU_PART;
                memcpy(&bits, from + r * 128 + ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2, 2);
                if (gets) {
                    const __half h =
                        x < columns && y < rows ? v[(size_t)y * columns + x] : make<__half>(0);
                    memcpy(&want, &h, 2);
                }
                if (!check(bits == want, "block %d box %d row %d column %d (got %04x, want %04x)",
                           block, box, r, c, bits, want))
                    return;
            }
}

/* d (64, N) = a b over two wgmmas, K numbers of 64 bytes. a (64, K) by rows; b (N, K), or ACROSS
 * (K, N), 16-bit numbers. FROM_SHARED: a by descriptor. Shared memory: a's 64 rows of 128 bytes,
 * b's N rows or N/64 blocks of 64 rows of k. Copied by two bytes, 32 a row. */
template <class A> constexpr int wgmma_depth = 64 / (int)sizeof(A);
template <class A, int N, bool FROM_SHARED, bool ACROSS>
__global__ void __launch_bounds__(128)
    wgmma_kernel(float *out, const uint16_t *a, const uint16_t *b) {
#if defined(HOPPER_CODE)
    SHARED_BYTES(smem);
    unsigned char *sb = smem + 64 * 128;
    const int t = threadIdx.x;
    for (int i = t; i < 64 * 32; i += 128)
        *(uint16_t *)(smem + i / 32 * 128 + ((i % 32 / 8) ^ (i / 32 % 8)) * 16 + i % 8 * 2) = a[i];
    for (int i = t; i < N * 32; i += 128) {
        const int row = ACROSS ? i / N : i / 32, column = ACROSS ? i % N : i % 32;
        *(uint16_t *)(sb + column / 64 * (64 * 128) + row * 128 +
                      ((column % 64 / 8) ^ (row % 8)) * 16 + column % 8 * 2) = b[i];
    }
    fence_async();
    __syncthreads();
    uint32_t r[2][4];
    for (int k = 0; k < 2; k++)
        ldmatrix4(r[k], shared_address(smem) +
                            att_swizzle<64>(t / 32 * 16 + t % 16, k * 2 + t % 32 / 16));
    const uint64_t ta = wgmma_tile(shared_address(smem)),
                   tb = wgmma_tile(shared_address(sb), 64 * 128);
    float d[N / 8][4];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; k++) {
        if constexpr (FROM_SHARED)
            wgmma256<A>(d, ta + k * 2, tb + k * 2, k > 0);
        else
            wgmma_regs<A, ACROSS, N>(d, r[k], tb + k * (ACROSS ? 128 : 2), k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>(d);
    for (int j = 0; j < N / 8; j++)
        for (int e = 0; e < 4; e++)
            out[(t / 32 * 16 + t % 32 / 4 + e / 2 * 8) * N + j * 8 + t % 4 * 2 + e % 2] = d[j][e];
#endif
}

/* e4m3 codes: numbers by value, random ones (all codes but NaN's), and the bound of a sum of K
 * products that start from zero: hopper.cuh derives a wgmma's 33 2^-13 M. M is taken from the exact
 * sums, plus what they may be off by. */
static double num(uint8_t code) {
    __nv_fp8_e4m3 v;
    v.__x = code;
    return (double)(float)v;
}
static std::vector<uint8_t> random_codes(rng *r, size_t n, double scale) {
    std::vector<uint8_t> v(n);
    for (uint8_t &c : v) c = __nv_fp8_e4m3((float)(scale * rng_uniform(r))).__x;
    return v;
}
template <class A, class F> /* products(k), k < K, in order */
static double wgmma_bound(int K, F products) {
    if (sizeof(A) == 2) { /* truncated to FP32, each term twice: into the products, into the sum */
        double size = 0;
        for (int k = 0; k < K; k++) size += fabs(products(k));
        return size * K * 2 * U;
    }
    double sum = 0, off = 0;
    for (int k = 0; k < K;) {
        double most = fabs(sum) + off;
        for (const int end = std::min(K, k + 32); k < end; k++) {
            most = std::max(most, fabs(products(k)));
            sum += products(k);
        }
        off += 33 * 0x1p-13 * most;
    }
    return off;
}

template <class A> static std::vector<A> wgmma_numbers(rng *r, size_t n, double scale) {
    if constexpr (sizeof(A) == 1)
        return random_codes(r, n, scale);
    else
        return random_numbers<A>(r, n, scale);
}
template <class A, int N, bool FROM_SHARED, bool ACROSS> static void wgmma_case() {
    if (!hopper_here()) return;
    constexpr int K = wgmma_depth<A>;
    rng r = {(uint64_t)N + ACROSS};
    std::vector<A> a = wgmma_numbers<A>(&r, 64 * K, 1), b = wgmma_numbers<A>(&r, N * K, 1);
    device_array<A> da(a), db(b);
    device_array<float> o(64 * N);
    const size_t shared = 64 * 128 + N * 128;
    cuda_ok(launch(wgmma_kernel<A, N, FROM_SHARED, ACROSS>, dim3(1), dim3(128), shared,
                   (cudaStream_t)0, o.p, (const uint16_t *)da.p, (const uint16_t *)db.p),
            "launch");
    const std::vector<float> got = o.get();
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < N; j++) {
            auto product = [&](int k) {
                return num(a[i * K + k]) * num(b[ACROSS ? k * N + j : j * K + k]);
            };
            double want = 0;
            for (int k = 0; k < K; k++) want += product(k);
            check_near(got[i * N + j], want, wgmma_bound<A>(K, product), "d", (size_t)(i * N + j));
        }
}
TEST_SCHEDULES(ptx_wgmma256) {
    wgmma_case<__half, 256, true, false>();
    wgmma_case<__nv_bfloat16, 256, true, false>();
    wgmma_case<uint8_t, 256, true, false>();
}
TEST_SCHEDULES(ptx_wgmma_regs) {
    wgmma_case<__half, 64, false, false>();
    wgmma_case<__nv_bfloat16, 64, false, false>();
}
TEST_SCHEDULES(ptx_wgmma_across) {
    wgmma_case<__half, 64, false, true>();
    wgmma_case<__half, 128, false, true>();
    wgmma_case<__nv_bfloat16, 64, false, true>();
    wgmma_case<__nv_bfloat16, 128, false, true>();
}

/* ---- gate_up --------------------------------------------------------------------------------- */

/* What the kernel computes from: x (T, D), w (2F, D), each sum times row(t) * column(c). h lies
 * behind a guard of NaN and before one: what the kernel writes beyond T rows shows. */
template <class X> struct gate_up_inputs {
    int T, F, D;
    std::vector<X> x, w;
    std::vector<float> x_scale, w_scale; /* e4m3 */
    double alpha = 1;

    double scale(int t, int c) const {
        return sizeof(X) == 1 ? (double)x_scale[t] * w_scale[c] : alpha;
    }
};
template <class X>
static gate_up_inputs<X> gate_up_random(int T, int F, int D, double scale, double alpha) {
    rng r = {(uint64_t)(T + F + D)};
    gate_up_inputs<X> in = {T, F, D, {}, {}, {}, {}, alpha};
    /* e4m3: codes up to 448, as quantize_kernel makes them, and their scales */
    constexpr bool codes = sizeof(X) == 1;
    in.x = wgmma_numbers<X>(&r, (size_t)T * D, codes ? 448 : scale);
    in.w = wgmma_numbers<X>(&r, (size_t)2 * F * D, codes ? 448 : 0.5);
    for (int t = 0; t < T; t++)
        in.x_scale.push_back((float)(scale / 448 * (1 + 0.5 * rng_uniform(&r))));
    for (int c = 0; c < 2 * F; c++)
        in.w_scale.push_back((float)(0.5 / 448 * (1 + 0.5 * rng_uniform(&r))));
    return in;
}
template <class X, class A>
static std::vector<A> gate_up_run(const gate_up_inputs<X> &in, int blocks,
                                  unsigned long long *clamped) {
    const int T = in.T, F = in.F, D = in.D;
    device_array<X> dx(in.x), dw(in.w);
    device_array<A> dh((size_t)(T + 1) * F);
    device_array<float> xs(in.x_scale), ws(in.w_scale);
    device_array<unsigned long long> clamps(std::vector<unsigned long long>{0});
    cudaError_t e;
    if constexpr (sizeof(X) == 1)
        e = gate_up_e4m3_launch(hopper<__half>(blocks), dh.p, dx.p, xs.p, dw.p, ws.p, T, F, D,
                                clamps.p, (cudaStream_t)0);
    else
        e = gate_up_launch<A>(hopper<A>(blocks), dh.p, dx.p, dw.p, (float)in.alpha, T, F, D,
                              clamps.p, (cudaStream_t)0);
    cuda_ok(e, "launch");
    std::vector<A> got = dh.get();
    *clamped = clamps.get()[0];
    for (int i = 0; i < F; i++)
        if (!check(std::isnan(num(got[(size_t)T * F + i])), "row %d is written", T)) break;
    return got;
}

/* h against double precision. gate and up are sums of D products, off by wgmma_bound, then scaled
 * with two roundings. |silu'| <= 1.1, |silu(g)| <= |g|; then swiglu_case's bound. Outputs within
 * that of the limit may be clamped or not. */
template <class X, class A>
static void gate_up_check(const gate_up_inputs<X> &in, const std::vector<A> &got,
                          unsigned long long counted, bool wants_clamps) {
    const int T = in.T, F = in.F, D = in.D;
    unsigned long long least = 0, most = 0;
    std::vector<double> xd, wd;
    for (X v : in.x) xd.push_back(num(v));
    for (X v : in.w) wd.push_back(num(v));
    for (int t = 0; t < T; t++)
        for (int i = 0; i < F; i++) {
            double v[2] = {}, off[2] = {};
            for (int half = 0; half < 2; half++) {
                const double *x = &xd[(size_t)t * D], *w = &wd[(size_t)(half * F + i) * D];
                const double scale = in.scale(t, half * F + i);
                for (int k = 0; k < D; k++) v[half] += x[k] * w[k];
                v[half] *= scale;
                off[half] = scale * wgmma_bound<X>(D, [&](int k) { return x[k] * w[k]; }) +
                            2 * fabs(v[half]) * U;
            }
            const double g = v[0], u = v[1], limit = 65504;
            double want = oracle_swiglu(g, u) / 64;
            double tol = (1.1 * off[0] * (fabs(u) + off[1]) + fabs(g) * off[1]) / 64 +
                         fabs(want) * (12 + 2.4 * fabs(g)) * U;
            most += fabs(want) + tol > limit;
            least += fabs(want) - tol > limit;
            if (fabs(want) > limit) want = copysign(limit, want);
            tol += fabs(want) * rounding<A>() + tiny<A>();
            if (!check_near(num(got[(size_t)t * F + i]), want, tol, "h", (size_t)t * F + i)) return;
        }
    check(counted >= least && counted <= most, "clamps (got %llu, want %llu to %llu)", counted,
          least, most);
    check(!wants_clamps || least > 0, "the case clamps nothing");
}
template <class X, class A>
static void gate_up_case(int T, int F, int D, int blocks, double scale = 2, double alpha = 1) {
    if (!hopper_here()) return;
    const gate_up_inputs<X> in = gate_up_random<X>(T, F, D, scale, alpha);
    unsigned long long clamped;
    const std::vector<A> got = gate_up_run<X, A>(in, blocks, &clamped);
    gate_up_check(in, got, clamped, scale > 1000);
}
/* Tiles are 128 rows by 128 columns by 64 of D; a cluster has two tiles of rows. */
TEST_SCHEDULES(gate_up_hopper) {
    gate_up_case<__half, __half>(200, 136, 200, 3); /* two rounds of four steps, none full */
    gate_up_case<__half, __half>(128, 128, 64, 1);  /* half of the cluster is empty */
    gate_up_case<__half, __half>(1, 8, 8, 4);       /* a cluster has nothing to do */
    gate_up_case<__half, __half>(300, 136, 72, 4);  /* four tiles in a wave; one pair is half */
    gate_up_case<__half, __half>(70, 264, 400, 2, 2, 0.25); /* a ring goes round five times */
}
TEST(gate_up_hopper_order) { gate_up_case<__half, __half>(2200, 136, 8, 5); } /* two GU_GROUPs */
TEST(gate_up_hopper_clamps) { gate_up_case<__half, __half>(130, 72, 96, 2, 6000); }
TEST(gate_up_hopper_bf16) { gate_up_case<__nv_bfloat16, __nv_bfloat16>(130, 72, 96, 2); }
/* T and 2F floats end where the device's memory does: a scale beyond them is a fault. */
TEST_SCHEDULES(gate_up_hopper_e4m3) {
    gate_up_case<uint8_t, __half>(192, 96, 400, 3);
    gate_up_case<uint8_t, __half>(64, 160, 1040, 2); /* a ring goes round four times */
    gate_up_case<uint8_t, __half>(1, 16, 16, 2);
}
TEST(gate_up_hopper_e4m3_clamps) { gate_up_case<uint8_t, __half>(130, 80, 96, 2, 6000); }

/* A row that is not a number stays one, alone. */
template <class X> static void gate_up_nan(X nan, X one) {
    if (!hopper_here()) return;
    const int T = 3, F = 16, D = 64;
    gate_up_inputs<X> in = gate_up_random<X>(T, F, D, 1, 1);
    std::fill(in.x.begin(), in.x.end(), one);
    in.x[D + 7] = nan;
    unsigned long long clamped;
    const std::vector<__half> got = gate_up_run<X, __half>(in, 2, &clamped);
    for (int i = 0; i < T * F; i++)
        check(std::isnan(num(got[i])) == (i / F == 1), "h[%d] is %g", i, num(got[i]));
    check(clamped == 0, "clamps (got %llu, want 0)", clamped);
}
TEST(gate_up_hopper_nan) {
    gate_up_nan(make<__half>(NAN), make<__half>(1));
    gate_up_nan<uint8_t>(0x7F, 0x38);
}

/* ---- attention ------------------------------------------------------------------------------- */

template <class A, int HD, int BLOCKS>
static cudaError_t attention_wgmma(const attention_args<A> &a) {
    return attention_hopper_launch<A, HD>(hopper<A>(BLOCKS), a.att, a.qkv, a.T, a.tiles, a.n_tiles,
                                          a.H, a.K, a.lg, a.scale_log2e, (cudaStream_t)0);
}
template <class A, int HD, int BLOCKS = 3>
static void attention_hopper_case(const std::vector<int> &lens, int P, int K, int lg,
                                  double scale = 1.7) {
    if (hopper_here())
        attention_case<A, HD, 2>(lens, P, K, lg, false, scale, attention_wgmma<A, HD, BLOCKS>);
}
TEST_SCHEDULES(attention_hopper_128) {
    attention_hopper_case<__half, 128>({1, 2, 63, 65, 130, 200}, 0, 1, 2);
    attention_hopper_case<__half, 128>({5, 40, 70}, 70, 2,
                                       1);                 /* a key tile crosses the prefix's end */
    attention_hopper_case<__half, 128, 1>({400}, 0, 1, 2); /* the ring goes round */
    attention_hopper_case<__half, 128, 16>({3}, 0, 1, 0);  /* blocks have nothing to do */
}
TEST_SCHEDULES(attention_hopper_64) {
    attention_hopper_case<__half, 64>({1, 2, 63, 65, 130, 200}, 0, 1, 1);
    attention_hopper_case<__half, 64>({5, 40, 70}, 19, 1, 2);
    attention_hopper_case<__half, 64, 1>({300}, 64, 1, 3);
    attention_hopper_case<__half, 64>({3}, 1, 1, 6); /* a tile is two tokens */
}
TEST(attention_hopper_bf16) {
    attention_hopper_case<__nv_bfloat16, 128>({1, 64, 65, 100}, 5, 1, 1);
    attention_hopper_case<__nv_bfloat16, 64>({1, 65, 150}, 0, 1, 2);
}
/* Scores of hundreds: one key takes all, the running maximum moves */
TEST(attention_hopper_sharp) {
    attention_hopper_case<__half, 128>({200}, 0, 1, 2, 12);
    attention_hopper_case<__half, 64>({200}, 3, 1, 2, 12);
}

#if defined(QEMB_EMU)
/* Boxes that the copy engine must bring for a list of tiles: K and V of the key tiles whose 64 rows
 * follow each other. */
static long wanted_boxes(const std::vector<att_tile> &tiles, int HD, int K, int lg) {
    long whole = 0;
    for (const att_tile &w : tiles) {
        const int keys = w.prefix + std::min(w.len, w.t0 + (HOPPER_ROWS >> lg));
        for (int p = 0; p + ATT_KEYS <= keys; p += ATT_KEYS) {
            int breaks = 0;
            for (int i = p + 1; i < p + ATT_KEYS; i++) breaks += i == w.prefix && w.row0 != i;
            whole += !breaks;
        }
    }
    return whole * K * 2 * (HD / 64);
}
#endif
/* att of the tokens P.. of a text, v (n, ld), with the first P as a shared prefix. Rows of NaN lie
 * between the prefix and the others, and behind them. */
template <class A, int HD>
static std::vector<A> attention_behind(const std::vector<A> &v, int n, int P, int gap, int K,
                                       int lg) {
    const int H = K << lg, ld = (H + 2 * K) * HD, own = n - P, row0 = P + gap, T = row0 + own + 70;
    std::vector<att_tile> tiles;
    for (int t = 0; t < own; t += HOPPER_ROWS >> lg)
        tiles.push_back(att_tile{t, row0, own, P, 0, 0, {}});
    std::vector<A> qkv((size_t)T * ld, make<A>(NAN));
    std::copy(v.begin(), v.begin() + (size_t)P * ld, qkv.begin());
    std::copy(v.begin() + (size_t)P * ld, v.end(), qkv.begin() + (size_t)row0 * ld);
    device_array<A> dqkv(qkv), datt((size_t)own * H * HD);
    device_array<att_tile> dt(tiles);
#if defined(QEMB_EMU)
    const long before = emu::count.loads;
#endif
    cuda_ok(attention_wgmma<A, HD, 3>({datt.p, dqkv.p, dt.p, T, (int)tiles.size(), H, K, lg,
                                       (float)(1.4426950408889634 / sqrt((double)HD))}),
            "launch");
    const std::vector<A> got = datt.get();
#if defined(QEMB_EMU)
    const long boxes = emu::count.loads - before, want = wanted_boxes(tiles, HD, K, lg);
    check(boxes == want, "prefix %d, gap %d, %d tokens: %ld boxes (want %ld)", P, gap, n, boxes,
          want);
#endif
    return got;
}
/* A tile of keys can come by TMA or by cp.async: no bit may tell which. */
template <class A, int HD>
static void attention_whole_case(int own, const std::vector<int> &prefixes, int K, int lg) {
    if (!hopper_here()) return;
    for (int P : prefixes) {
        const int H = K << lg, ld = (H + 2 * K) * HD, n = P + own;
        rng r = {(uint64_t)n};
        const std::vector<A> v = random_numbers<A>(&r, (size_t)n * ld, 1.7);
        const std::vector<A> want = attention_behind<A, HD>(v, n, 0, 0, K, lg);
        for (int gap : {0, 5}) {
            const std::vector<A> got = attention_behind<A, HD>(v, n, P, gap, K, lg);
            check(!memcmp(got.data(), want.data() + (size_t)P * H * HD, got.size() * sizeof(A)),
                  "prefix %d, gap %d, %d tokens: other bits", P, gap, n);
            for (const A &x : got)
                if (!check(!std::isnan(num(x)), "prefix %d, gap %d, %d tokens: NaN", P, gap, n))
                    return;
        }
    }
}
TEST_SCHEDULES(attention_hopper_whole) {
    attention_whole_case<__half, 64>(512, {64, 70}, 1, 1);
    attention_whole_case<__half, 64>(130, {1, 62, 63, 65, 127, 128, 129, 200}, 2, 2);
    attention_whole_case<__half, 128>(63, {1, 64, 70, 200}, 1, 1);
}
TEST(attention_hopper_whole_long) {
    attention_whole_case<__half, 128>(577, {70, 200}, 1, 1);
    attention_whole_case<__nv_bfloat16, 128>(600, {128}, 1, 1);
    attention_whole_case<__half, 64>(575, {64, 200}, 1, 2);
}

/* ---- the whole forward ----------------------------------------------------------------------- */

static qemb_options asked_for() {
    qemb_options opt = {};
    opt.hopper = 1;
    return opt;
}
static void hopper_forward_case(const qemb_config &c, int prefix, qemb_dtype dtype) {
    if (!hopper_here()) return;
    qemb_file *f = open_model_of(dtype, &c, 31, 1);
    {
        model cuda(f, &qemb_cuda_ops, 2048, asked_for()), cpu(f, &qemb_cpu_ops, 2048);
        double worst = 1;
        compare(cuda, cpu, random_texts({700, 3, 525, 300}, prefix, 7), &worst);
    }
    qemb_file_close(f);
}
TEST(hopper_forward) {
    hopper_forward_case(config(2, 64, 2, 1, 64, 64, 1200), 0, QEMB_F16);
    hopper_forward_case(config(2, 136, 4, 2, 128, 200, 1200), 70, QEMB_F16);
    hopper_forward_case(config(1, 64, 2, 1, 64, 64, 1200), 0, QEMB_I8); /* made dense first */
}
/* e4m3 gate and up, then the codes of h. The bound of accuracy_case in test_cuda_quantize.cu. */
TEST(hopper_fp8_forward) {
    if (!hopper_here()) return;
    const qemb_config c = config(2, 128, 2, 1, 64, 160, 1200);
    qemb_file *f = open_model(&c, 31, 1);
    {
        model cuda(f, &qemb_cuda_fp8_ops, 2048, asked_for()), cpu(f, &qemb_cpu_ops, 2048);
        double worst = 1;
        if (check(cuda.m, "%s", cuda.err.msg))
            compare(cuda, cpu, random_texts({700, 3, 525, 300}, 0, 7), &worst, 1 - 2.2e-2);
    }
    qemb_file_close(f);
}
/* Batches that run as graphs: launches and tensor maps of the first run serve the ones that
 * follow. */
TEST(hopper_graphs) {
    if (!hopper_here()) return;
    const qemb_config c = config(2, 64, 2, 1, 64, 64, 1200);
    qemb_file *f = open_model(&c, 31, 1);
    {
        qemb_options plain = asked_for();
        plain.no_graphs = 1;
        model graphs(f, &qemb_cuda_ops, 1024, asked_for()), none(f, &qemb_cuda_ops, 1024, plain);
        for (uint64_t seed = 1; seed < 6; seed++) {
            const auto texts = random_texts({550 + (int)seed, 20}, 0, seed);
            const auto got = graphs.embed(texts), want = none.embed(texts);
            for (size_t i = 0; i < texts.size(); i++)
                check(cosine(got[i].data(), want[i].data(), c.hidden) >= MIN_COSINE,
                      "run %d, text %zu: another vector", (int)seed, i);
        }
    }
    qemb_file_close(f);
}
