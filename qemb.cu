/* qemb.cu - the CUDA backend: one more table of ops, in the order of the forward.
 *
 * An op computes its grid and launches: the kernels are in kernels.cuh, attention.cuh, quantize.cuh
 * and hopper.cuh, the matrix products in gemm.cuh. device.cuh has the device's memory and the
 * weights, graphs.cuh a batch's lists and the graphs.
 */
#include "backends/cuda/device.cuh"
#include "backends/cuda/graphs.cuh"

/* ---- the ops --------------------------------------------------------------------------------- */

static void cuda_embed(qemb_backend *be, float *x, const qemb_mat *tok_emb, const float *pos_emb,
                       const qemb_packed_batch *b) {
    assert(tok_emb->dtype == QEMB_F16 && tok_emb->cols == be->c->hidden);
    good(be,
         launch(embed_kernel<act>, dim3(blocks(b->T, EMBED_WARPS)), dim3(EMBED_WARPS * 32), 0,
                be->st, x, (const act *)tok_emb->data, be->dev.tokens, pos_emb, be->dev.pos, b->T,
                be->c->hidden),
         "embed");
}

/* f(V) for the V of the norms' kernels that rows of D numbers need. */
template <class F> static void by_norm_columns(int D, F f) {
    const int step = 4 * ROW_THREADS;
    if (D <= step)
        f(std::integral_constant<int, 1>());
    else if (D <= 2 * step)
        f(std::integral_constant<int, 2>());
    else if (D <= 4 * step)
        f(std::integral_constant<int, 4>());
    else
        f(std::integral_constant<int, 8>());
}
template <class A>
static void any_rmsnorm(qemb_backend *be, A *y, const float *x, const float *w, int T) {
    by_norm_columns(be->c->hidden, [&](auto v) {
        good(be,
             launch(rmsnorm_kernel<A, v>, dim3(stride_blocks(be, T)), dim3(ROW_THREADS),
                    ROW_WARPS * sizeof(float), be->st, y, x, w, T, be->c->hidden, be->c->norm_eps),
             "rmsnorm");
    });
}
static void cuda_rmsnorm(qemb_backend *be, qemb_act *y, const float *x, const float *w, int T) {
    if (!be->fp8) return any_rmsnorm(be, (act *)y, x, w, T);
    const int D = be->c->hidden;
    const coded_rows to(y, T, D);
    by_columns(D, [&](auto v) {
        good(be,
             launch(rmsnorm_e4m3_kernel<v>, dim3(stride_blocks(be, T)), dim3(ROW_THREADS),
                    ROW_WARPS * sizeof(float), be->st, to.codes, to.scales, x, w, T, D,
                    be->c->norm_eps),
             "rmsnorm");
    });
}

static void cuda_layernorm(qemb_backend *be, qemb_act *y, float *x, const float *bias,
                           const float *w, const float *b, int T) {
    const int D = be->c->hidden;
    const dim3 grid(stride_blocks(be, T)), threads(ROW_THREADS);
    const size_t shared = ROW_WARPS * sizeof(float);
    if (!be->fp8)
        return by_norm_columns(D, [&](auto v) {
            good(be,
                 launch(layernorm_kernel<act, v>, grid, threads, shared, be->st, (act *)y, x, bias,
                        w, b, T, D, be->c->norm_eps),
                 "layernorm");
        });
    const coded_rows to(y, T, D);
    by_columns(D, [&](auto v) {
        good(be,
             launch(layernorm_e4m3_kernel<v>, grid, threads, shared, be->st, to.codes, to.scales, x,
                    bias, w, b, T, D, be->c->norm_eps),
             "layernorm");
    });
}

/* w in FP16. An INT8 matrix is dequantized into dense[i], unless dense[i] holds it already. */
static qemb_mat dense_matrix(qemb_backend *be, const qemb_mat *w, int i) {
    if (be->fp8 || w->dtype != QEMB_I8) return *w;
    if (be->dense_of[i] != w->data) {
        const size_t n = (size_t)w->rows * w->cols;
        good(be,
             launch(dequantize_kernel<act>,
                    dim3(stride_blocks(be, blocks(n / 8, DEQUANTIZE_THREADS))),
                    dim3(DEQUANTIZE_THREADS), 0, be->st, be->dense[i], (const int8_t *)w->data,
                    w->scale, w->rows, w->cols),
             "dequantize");
        be->dense_of[i] = w->data;
    }
    return qemb_mat{be->dense[i], w->rows, w->cols, QEMB_F16, w->alpha, nullptr, QEMB_BITS_UNKNOWN};
}

/* y (T, N) = alpha sums, with the scales of x's rows and w's, or += where ADD. */
template <class Y, bool ADD>
static void apply_scales(qemb_backend *be, Y *y, const coded_rows &x, const qemb_mat *w, int T) {
    good(be,
         launch(scale_kernel<Y, ADD>,
                dim3(stride_blocks(be, blocks((size_t)T * w->rows / 8, SCALE_THREADS))),
                dim3(SCALE_THREADS), 0, be->st, y, (const float *)be->sums, (const float *)x.scales,
                w->scale, w->alpha, T, w->rows),
         "scale");
}

/* y = x W^T or, add, y += x W^T; x (T, in). dense: which memory an INT8 file's matrix is
 * dequantized to. */
static void run_gemm(qemb_backend *be, void *y, const qemb_act *x, const qemb_mat *w, bool add,
                     int T, int dense = 1) {
    const coded_rows rows(x, T, w->cols); /* FP8: what x holds */
    const bool unscaled = be->gemm.kind == GEMM_E4M3_SUMS;
    const qemb_mat m = dense_matrix(be, w, dense);
    const cublasStatus_t s =
        gemm_run(&be->gemm, unscaled ? be->sums : y, x, rows.scales, &m, add, T, be->st);
    char why[32];
    snprintf(why, sizeof why, "cuBLASLt status %d", (int)s);
    if (s) note_failure(be, add ? "matmul_add" : "matmul", why);
    if (unscaled && add) apply_scales<float, true>(be, (float *)y, rows, w, T);
    if (unscaled && !add) apply_scales<act, false>(be, (act *)y, rows, w, T);
}
/* y (T, N) += bias, or gelu of that, in place */
template <bool GELU>
static void launch_bias(qemb_backend *be, act *y, const float *bias, int T, int N) {
    good(be,
         launch(bias_kernel<act, GELU>,
                dim3(stride_blocks(be, blocks((size_t)T * N / 8, BIAS_THREADS))),
                dim3(BIAS_THREADS), 0, be->st, y, bias, T, N),
         GELU ? "matmul_gelu" : "matmul");
}
static void cuda_matmul(qemb_backend *be, qemb_act *y, const qemb_act *x, const qemb_mat *w,
                        const float *bias, int T) {
    run_gemm(be, y, x, w, false, T);
    if (bias) launch_bias<false>(be, (act *)y, bias, T, w->rows);
}
static void cuda_matmul_gelu(qemb_backend *be, qemb_act *h, const qemb_act *x, const qemb_mat *w,
                             const float *bias, int T) {
    const int F = w->rows;
    /* dense[0] is for wup alone, since every chunk of the MLP needs it again. */
    run_gemm(be, be->fp8 ? be->halves : (act *)h, x, w, false, T, 0);
    if (!be->fp8) return launch_bias<true>(be, (act *)h, bias, T, F);
    const coded_rows to(h, T, F);
    by_columns(F, [&](auto v) {
        good(be,
             launch(gelu_e4m3_kernel<act, v>, dim3(stride_blocks(be, T)), dim3(ROW_THREADS),
                    ROW_WARPS * sizeof(float), be->st, to.codes, to.scales, (const act *)be->halves,
                    bias, T, F),
             "matmul_gelu");
    });
}
static void cuda_matmul_add(qemb_backend *be, float *x, const qemb_act *a, const qemb_mat *w,
                            int T) {
    run_gemm(be, x, a, w, true, T);
}

template <int HD>
static void launch_rope(qemb_backend *be, act *qkv, const float *q_norm, const float *k_norm,
                        int T) {
    const int H = be->c->n_heads, K = be->c->n_kv_heads, per_block = ROPE_THREADS / (HD / 4);
    good(be,
         launch(qknorm_rope_kernel<act, HD>, dim3(blocks((size_t)T * (H + K), per_block)),
                dim3(ROPE_THREADS), 0, be->st, qkv, q_norm, k_norm, be->dev.pos, be->rope, T, H, K,
                be->c->norm_eps),
         "qknorm_rope");
}
static void cuda_qknorm_rope(qemb_backend *be, qemb_act *qkv, const float *q_norm,
                             const float *k_norm, const qemb_packed_batch *b) {
    if (be->c->head_dim == 64)
        launch_rope<64>(be, (act *)qkv, q_norm, k_norm, b->T);
    else
        launch_rope<128>(be, (act *)qkv, q_norm, k_norm, b->T);
}

template <int HD, int M, bool ALL = false>
static void launch_attention(qemb_backend *be, act *att, const act *qkv, const att_tile *tiles,
                             int n) {
    if (!n) return;
    const int H = be->c->n_heads, K = be->c->n_kv_heads;
    const float scale_log2e = (float)(1.4426950408889634 / sqrt((double)HD));
    good(be,
         launch(attention_kernel<act, HD, M, ALL>, dim3((unsigned)n, (unsigned)K),
                dim3(ATT_THREADS), att_shared_bytes<HD, M>(), be->st, att, qkv, tiles, H, K, be->lg,
                scale_log2e),
         "attention");
}
/* Causal attention of the 128-row tiles */
template <int HD>
static void wide_attention(qemb_backend *be, act *att, const act *qkv, const att_tile *tiles) {
    if (!be->hopper.on) return launch_attention<HD, 2>(be, att, qkv, tiles, be->n_wide);
    if (be->n_wide)
        good(be,
             attention_hopper_launch<act, HD>(
                 &be->hopper, att, qkv, be->max_rows, tiles, be->n_wide, be->c->n_heads,
                 be->c->n_kv_heads, be->lg, (float)(1.4426950408889634 / sqrt((double)HD)), be->st),
             "attention");
}
/* Where one row of each text is wanted, a tile has one token. Only QEMB_BERT, which is
 * bidirectional, has heads of 32. */
template <int HD>
static void any_attention(qemb_backend *be, act *att, const act *qkv, const qemb_packed_batch *b,
                          qemb_rows rows) {
    const att_tile *narrow = be->dev.tiles, *wide = narrow + be->n_narrow, *one = wide + be->n_wide;
    if (b->bidirectional) {
        if (rows != QEMB_ALL_ROWS) return launch_attention<HD, 1, true>(be, att, qkv, one, b->B);
        launch_attention<HD, 2, true>(be, att, qkv, wide, be->n_wide);
        launch_attention<HD, 1, true>(be, att, qkv, narrow, be->n_narrow);
    } else if constexpr (HD != 32) {
        if (rows != QEMB_ALL_ROWS) return launch_attention<HD, 1>(be, att, qkv, one, b->B);
        wide_attention<HD>(be, att, qkv, wide);
        launch_attention<HD, 1>(be, att, qkv, narrow, be->n_narrow);
    }
}
static void cuda_attention(qemb_backend *be, qemb_act *att, const qemb_act *qkv,
                           const qemb_packed_batch *b, qemb_rows rows) {
    const int n = rows == QEMB_ALL_ROWS ? b->T : b->B, Q = be->c->n_heads * be->c->head_dim;
    act *out = be->fp8 ? be->halves : (act *)att;
    assert(rows == QEMB_ALL_ROWS || be->first == (rows == QEMB_FIRST_ROWS));
    if (be->c->head_dim == 32)
        any_attention<32>(be, out, (const act *)qkv, b, rows);
    else if (be->c->head_dim == 64)
        any_attention<64>(be, out, (const act *)qkv, b, rows);
    else
        any_attention<128>(be, out, (const act *)qkv, b, rows);
    if (be->fp8) launch_quantize(be, coded_rows(att, n, Q), (const act *)out, nullptr, n, Q);
}

static void hopper_gate_up(qemb_backend *be, qemb_act *h, qemb_act *gu, const qemb_act *x,
                           const qemb_mat *w, int T) {
    const int F = be->c->ffn;
    if (be->fp8) { /* gu takes h in halves, the first half of its memory */
        const coded_rows from(x, T, w->cols);
        good(be,
             gate_up_e4m3_launch(&be->hopper, (act *)gu, from.codes, from.scales,
                                 (const uint8_t *)w->data, w->scale, T, F, w->cols, be->clamps,
                                 be->st),
             "gate_up");
        launch_quantize(be, coded_rows(h, T, F), (const act *)gu, nullptr, T, F);
        return;
    }
    const qemb_mat m = dense_matrix(be, w, 0);
    good(be,
         gate_up_launch(&be->hopper, (act *)h, (const act *)x, (const act *)m.data, m.alpha, T, F,
                        m.cols, be->clamps, be->st),
         "gate_up");
}

static void cuda_gate_up(qemb_backend *be, qemb_act *h, qemb_act *gu, const qemb_act *x,
                         const qemb_mat *w, int T) {
    const int F = be->c->ffn;
    if (be->hopper.on && T >= GATE_UP_FROM) return hopper_gate_up(be, h, gu, x, w, T);
    /* dense[0] is for wgu alone, since every chunk of the MLP needs it again. */
    run_gemm(be, gu, x, w, false, T, 0);
    if (be->fp8) {
        const coded_rows to(h, T, F);
        return by_columns(F, [&](auto v) {
            good(be,
                 launch(swiglu_e4m3_kernel<act, v>, dim3(stride_blocks(be, T)), dim3(ROW_THREADS),
                        ROW_WARPS * sizeof(float), be->st, to.codes, to.scales, (const act *)gu, T,
                        F),
                 "gate_up");
        });
    }
    const size_t wanted = blocks((size_t)T * F / 8, SWIGLU_THREADS);
    good(be,
         launch(swiglu_kernel<act>, dim3(stride_blocks(be, wanted)), dim3(SWIGLU_THREADS), 0,
                be->st, (act *)h, (const act *)gu, T, F, be->clamps),
         "gate_up");
}

static void cuda_gather(qemb_backend *be, float *y, const float *x, const qemb_packed_batch *b,
                        qemb_rows rows) {
    assert(rows == (be->first ? QEMB_FIRST_ROWS : QEMB_LAST_ROWS));
    good(be,
         launch(gather_rows_kernel<float4>, dim3((unsigned)b->B), dim3(GATHER_THREADS), 0, be->st,
                (float4 *)y, (const float4 *)x, be->dev.rows, be->c->hidden / 4),
         "gather");
}
static void cuda_gather_mean(qemb_backend *be, float *y, float *x, const float *w,
                             const qemb_packed_batch *b) {
    const att_tile *texts = be->dev.tiles + be->n_narrow + be->n_wide; /* one a text */
    const int n = be->c->hidden / 4;
    /* in place: a block reads its row before it writes it */
    if (w) any_rmsnorm(be, x, x, w, b->T);
    good(be,
         launch(gather_mean_kernel<float4>, dim3((unsigned)b->B, blocks(n, MEAN_COLUMNS)),
                dim3(MEAN_THREADS), 0, be->st, (float4 *)y, (const float4 *)x, texts, n),
         "gather_mean");
}

static int cuda_pool(qemb_backend *be, float *out, float *x, const float *w, int B) {
    const size_t bytes = (size_t)B * be->c->hidden * sizeof(float);
    if (finish_graph(be)) return 1;
    assert(be->n_pooled < IN_FLIGHT);
    pooled_batch *p = &be->pooled[(be->first_pooled + be->n_pooled++) % IN_FLIGHT];
    p->out = out, p->B = B;
    if (w) any_rmsnorm(be, x, x, w, B); /* in place */
    good(be, cudaMemcpyAsync(p->vectors, x, bytes, cudaMemcpyDeviceToHost, be->st), "pool");
    good(be,
         cudaMemcpyAsync(p->clamps, be->clamps, sizeof *p->clamps, cudaMemcpyDeviceToHost, be->st),
         "pool");
    good(be, cudaEventRecord(p->done, be->st), "pool");
    return 0;
}

static void cuda_collect(qemb_backend *be) {
    cudaSetDevice(be->device);
    assert(be->n_pooled);
    const pooled_batch *p = &be->pooled[be->first_pooled];
    const size_t n = (size_t)p->B * be->c->hidden;
    be->first_pooled = (be->first_pooled + 1) % IN_FLIGHT;
    be->n_pooled--;
    if (good(be, cudaEventSynchronize(p->done), "collect")) { /* pooled */
        memcpy(p->out, p->vectors, n * sizeof(float));
        be->n_clamped = *p->clamps;
    }
    if (be->failure[0]) std::fill(p->out, p->out + n, NAN);
}

/* ---- the tables ------------------------------------------------------------------------------ */

static int cuda_devices(void) {
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}
static size_t cuda_free_memory(int device) {
    size_t left = 0, total = 0;
    if (device >= cuda_devices() || cudaSetDevice(device) != cudaSuccess ||
        cudaMemGetInfo(&left, &total) != cudaSuccess)
        return 0;
    return left;
}

static void cuda_health(const qemb_backend *be, qemb_health *h) {
    h->clamped += be->n_clamped;
    h->failure = be->failure[0] ? be->failure : nullptr;
}

static int cuda_open(qemb_backend **be, const qemb_config *c, const qemb_options *opt,
                     qemb_err *err) {
    return open_math(be, c, opt, false, err);
}
static int cuda_fp8_open(qemb_backend **be, const qemb_config *c, const qemb_options *opt,
                         qemb_err *err) {
    return open_math(be, c, opt, true, err);
}
static int cuda_plan(qemb_part *p, const qemb_file *f, const qemb_options *opt, size_t arena) {
    return plan(p, f, opt, arena, false);
}
static int cuda_fp8_plan(qemb_part *p, const qemb_file *f, const qemb_options *opt, size_t arena) {
    return plan(p, f, opt, arena, true);
}

#define TABLE(NAME, MATH, OPEN, PLAN)                                                              \
    {                                                                                              \
        .name = NAME, .math = MATH, .act_size = sizeof(act), .batch_tokens = 8192,                 \
        .mlp_rows = MLP_ROWS, .in_flight = IN_FLIGHT, .fallback = qemb_cpu_mapped,                 \
        .pad_rows = pad_rows, .plan = PLAN, .repacked_bytes = nullptr,                             \
        .free_memory = cuda_free_memory, .devices = cuda_devices, .health = cuda_health,           \
        .open = OPEN, .close = cuda_close, .arena = cuda_arena, .load_weights = cuda_load_weights, \
        .begin = cuda_begin, .embed = cuda_embed, .rmsnorm = cuda_rmsnorm,                         \
        .layernorm = cuda_layernorm, .matmul = cuda_matmul, .matmul_add = cuda_matmul_add,         \
        .qknorm_rope = cuda_qknorm_rope, .attention = cuda_attention, .gate_up = cuda_gate_up,     \
        .matmul_gelu = cuda_matmul_gelu, .gather = cuda_gather, .gather_mean = cuda_gather_mean,   \
        .pool = cuda_pool, .collect = cuda_collect,                                                \
    }
const qemb_ops qemb_cuda_ops = TABLE("cuda", QEMB_MATH_F16, cuda_open, cuda_plan);
const qemb_ops qemb_cuda_fp8_ops = TABLE("cuda-fp8", QEMB_MATH_FP8, cuda_fp8_open, cuda_fp8_plan);

const qemb_ops *qemb_cuda_table(int i) {
    return i == 0 ? &qemb_cuda_ops : i == 1 ? &qemb_cuda_fp8_ops : nullptr;
}
