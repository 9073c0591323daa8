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
            tma_load(at + GU_PART, &map, bar, x + GU_DEPTH, y + round);
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
            for (int c = 0; c < GU_DEPTH; c++) {
                const int x = x0 + box % 2 * GU_DEPTH + c, y = y0 + r + (box == 3);
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

/* d (64, N) = a b over two steps of 16. a (64, 32) by rows; b (N, 32), or ACROSS (32, N).
 * FROM_SHARED: a by descriptor. Shared memory: a's 64 rows of 64 numbers, b's N rows or N/64 blocks
 * of 64 rows of k. */
template <class A, int N, bool FROM_SHARED, bool ACROSS>
__global__ void __launch_bounds__(128) wgmma_kernel(float *out, const A *a, const A *b) {
#if defined(HOPPER_CODE)
    SHARED_BYTES(smem);
    unsigned char *sb = smem + 64 * 128;
    const int t = threadIdx.x;
    for (int i = t; i < 64 * 32; i += 128)
        *(A *)(smem + i / 32 * 128 + ((i % 32 / 8) ^ (i / 32 % 8)) * 16 + i % 8 * 2) = a[i];
    for (int i = t; i < N * 32; i += 128) {
        const int row = ACROSS ? i / N : i / 32, column = ACROSS ? i % N : i % 32;
        *(A *)(sb + column / 64 * (64 * 128) + row * 128 + ((column % 64 / 8) ^ (row % 8)) * 16 +
               column % 8 * 2) = b[i];
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
template <class A, int N, bool FROM_SHARED, bool ACROSS> static void wgmma_case() {
    if (!hopper_here()) return;
    rng r = {(uint64_t)N + ACROSS};
    std::vector<A> a = random_numbers<A>(&r, 64 * 32, 1), b = random_numbers<A>(&r, N * 32, 1);
    device_array<A> da(a), db(b);
    device_array<float> o(64 * N);
    const size_t shared = 64 * 128 + N * 128;
    cuda_ok(launch(wgmma_kernel<A, N, FROM_SHARED, ACROSS>, dim3(1), dim3(128), shared,
                   (cudaStream_t)0, o.p, da.p, db.p),
            "launch");
    const std::vector<float> got = o.get();
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < N; j++) {
            double want = 0, size = 0;
            for (int k = 0; k < 32; k++) {
                const double p = num(a[i * 32 + k]) * num(b[ACROSS ? k * N + j : j * 32 + k]);
                want += p, size += fabs(p);
            }
            check_near(got[i * N + j], want, size * 32 * 2 * U, "d", /* 32 terms, truncated */
                       (size_t)(i * N + j));
        }
}
TEST_SCHEDULES(ptx_wgmma256) {
    wgmma_case<__half, 256, true, false>();
    wgmma_case<__nv_bfloat16, 256, true, false>();
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

/* h against double precision. gate and up are sums of D products that the tensor cores may
 * truncate: 2 D U of their sizes, times alpha with a rounding. |silu'| <= 1.1, |silu(g)| <= |g|;
 * then swiglu_case's bound. Outputs within that of the limit may be clamped or not. */
template <class A>
static void gate_up_check(const std::vector<A> &got, const std::vector<A> &x,
                          const std::vector<A> &w, double alpha, int T, int F, int D,
                          unsigned long long counted, bool wants_clamps) {
    unsigned long long least = 0, most = 0;
    std::vector<double> xd = doubles(x), wd = doubles(w);
    for (int t = 0; t < T; t++)
        for (int i = 0; i < F; i++) {
            double v[2] = {}, off[2] = {};
            for (int half = 0; half < 2; half++) {
                const double *row = &wd[(size_t)(half * F + i) * D];
                for (int k = 0; k < D; k++)
                    v[half] += xd[(size_t)t * D + k] * row[k],
                        off[half] += fabs(xd[(size_t)t * D + k] * row[k]);
                v[half] *= alpha;
                off[half] = alpha * off[half] * 2 * D * U + fabs(v[half]) * U;
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

/* h lies behind a guard of NaN and before one: what the kernel writes beyond T rows shows. */
template <class A>
static void gate_up_case(int T, int F, int D, int blocks, double scale = 2, double alpha = 1) {
    if (!hopper_here()) return;
    rng r = {(uint64_t)(T + F + D)};
    std::vector<A> x = random_numbers<A>(&r, (size_t)T * D, scale),
                   w = random_numbers<A>(&r, (size_t)2 * F * D, 0.5);
    device_array<A> dx(x), dw(w), dh((size_t)(T + 1) * F);
    device_array<unsigned long long> clamps(std::vector<unsigned long long>{0});
    cuda_ok(gate_up_launch<A>(hopper<A>(blocks), dh.p, dx.p, dw.p, (float)alpha, T, F, D, clamps.p,
                              (cudaStream_t)0),
            "launch");
    std::vector<A> got = dh.get();
    for (int i = 0; i < F; i++)
        if (!check(std::isnan(num(got[(size_t)T * F + i])), "row %d is written", T)) return;
    gate_up_check(got, x, w, alpha, T, F, D, clamps.get()[0], scale > 1000);
}
TEST_SCHEDULES(gate_up_hopper) {
    gate_up_case<__half>(200, 136, 200, 3); /* four tiles, four steps, none of them full */
    gate_up_case<__half>(128, 128, 64, 1);
    gate_up_case<__half>(1, 8, 8, 2);               /* a block has nothing to do */
    gate_up_case<__half>(70, 264, 400, 1, 2, 0.25); /* a ring goes round five times */
}
TEST(gate_up_hopper_clamps) { gate_up_case<__half>(130, 72, 96, 2, 6000); }
TEST(gate_up_hopper_bf16) { gate_up_case<__nv_bfloat16>(130, 72, 96, 2); }
/* A row that is not a number stays one, alone */
TEST(gate_up_hopper_nan) {
    if (!hopper_here()) return;
    const int T = 3, F = 16, D = 64;
    std::vector<__half> x((size_t)T * D, make<__half>(1)), w((size_t)2 * F * D, make<__half>(0.5));
    x[D + 7] = make<__half>(NAN);
    device_array<__half> dx(x), dw(w), dh((size_t)T * F);
    device_array<unsigned long long> clamps(std::vector<unsigned long long>{0});
    cuda_ok(gate_up_launch<__half>(hopper<__half>(1), dh.p, dx.p, dw.p, 1, T, F, D, clamps.p,
                                   (cudaStream_t)0),
            "launch");
    std::vector<__half> got = dh.get();
    for (int i = 0; i < T * F; i++)
        check(std::isnan(num(got[i])) == (i / F == 1), "h[%d] is %g", i, num(got[i]));
    check(clamps.get()[0] == 0, "clamps (got %llu, want 0)", clamps.get()[0]);
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
        tiles.push_back(att_tile{t, row0, own, P, 0, {}});
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
