/* gemm.cuh - the four GEMMs of a layer, by cuBLASLt.
 *
 * The row-major product y (T, N) = x (T, K) W^T with W (N, K) is the column-major TN product y (N x
 * T) = W^T (N x K) x (K x T), with W stored as (K x N). Inputs are FP16, sums FP32. The result is
 * FP16, or FP32 and added to the residual stream by the GEMM itself.
 *
 * FP8: W and x are e4m3 codes with one scale per row (quantize.cuh). On sm_90 cuBLASLt applies the
 * scales. Elsewhere it cannot: there the product is FP32 and unscaled, and scale_kernel follows. T,
 * N and K have to be multiples of 16. T is rounded up; buffers have room for the additional rows,
 * whose results are ignored.
 *
 * The heuristic of cuBLASLt depends on T. It is asked at the start, once per shape and bucket of T
 * (16, 32, 64 ...), and its algorithm serves every T in the bucket. A deterministic run has one
 * bucket and no split of K, so the order of a row's sums does not depend on T. Otherwise, if a
 * directory is given, the heuristic's first choices are timed once, and the fastest is kept in a
 * file there, one file per GPU and library version. FP8 algorithms are timed twice: with fast
 * accumulation the tensor cores keep about 13 bits of fraction of a sum; without it partial sums
 * are moved to FP32 registers in between.
 */
#ifndef GEMM_CUH
#define GEMM_CUH

#include "qemb.h"
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <cublasLt.h>

enum { GEMM_SHAPES = 8, GEMM_BUCKETS = 12, GEMM_ALIGN = 16, GEMM_CHOICES = 8, GEMM_RUNS = 5 };
constexpr size_t GEMM_WORKSPACE = (size_t)32 << 20; /* recommended by cuBLAS for sm_90 */

/* GEMM_E4M3_SUMS: the result is the sums of the codes' products; scales are not applied. */
enum gemm_kind { GEMM_F16, GEMM_E4M3, GEMM_E4M3_SUMS };

struct gemm_algo {
    cublasLtMatmulAlgo_t algo;
    bool fast;  /* FP8: with fast accumulation */
    bool timed; /* the fastest of several; else the heuristic's first choice */
};
struct gemm_shape {
    int N, K;
    bool add;                       /* FP32, added to the result; else FP16 */
    cublasLtMatrixLayout_t w, x, y; /* the T of x and y is set at every call */
    gemm_algo buckets[GEMM_BUCKETS];
};
struct gemm_state {
    cublasLtHandle_t lt;
    cublasLtMatmulDesc_t product;
    cublasLtMatmulPreference_t preference;
    void *workspace; /* GEMM_WORKSPACE bytes of device memory, owned by the caller */
    gemm_kind kind;
    bool deterministic;
    int n_shapes;
    gemm_shape shapes[GEMM_SHAPES];
};

/* Bucket i is for T up to 16 << i; the last one also for all larger T. */
inline int gemm_bucket(const gemm_state *g, int T) {
    if (g->deterministic) return 0;
    int i = 0;
    while (i < GEMM_BUCKETS - 1 && T > 16 << i) i++;
    return i;
}
/* The T for which a bucket's algorithm is chosen. */
inline int gemm_bucket_rows(const gemm_state *g, int i) { return g->deterministic ? 256 : 16 << i; }

template <class V>
inline cublasStatus_t gemm_prefer(gemm_state *g, cublasLtMatmulPreferenceAttributes_t a, V v) {
    return cublasLtMatmulPreferenceSetAttribute(g->preference, a, &v, sizeof v);
}

template <class V>
inline cublasStatus_t gemm_describe(gemm_state *g, cublasLtMatmulDescAttributes_t a, V v) {
    return cublasLtMatmulDescSetAttribute(g->product, a, &v, sizeof v);
}

/* Opens the library. g has to be zeroed, but for its workspace. gemm_close frees g, also after a
 * failure. K may be split only if the parts are added in FP32; a deterministic run splits none. */
inline cublasStatus_t gemm_open(gemm_state *g, gemm_kind kind, bool deterministic) {
    g->kind = kind;
    g->deterministic = deterministic;
    cublasStatus_t s = cublasLtCreate(&g->lt);
    if (!s) s = cublasLtMatmulDescCreate(&g->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (!s) s = gemm_describe(g, CUBLASLT_MATMUL_DESC_TRANSA, (int32_t)CUBLAS_OP_T);
    for (cublasLtMatmulDescAttributes_t a :
         {CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_DESC_B_SCALE_MODE})
        if (!s && kind == GEMM_E4M3)
            s = gemm_describe(g, a, (int32_t)CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F);
    if (!s) s = cublasLtMatmulPreferenceCreate(&g->preference);
    if (!s) s = gemm_prefer(g, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (uint64_t)GEMM_WORKSPACE);
    for (cublasLtMatmulPreferenceAttributes_t a :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
        if (!s) s = gemm_prefer(g, a, (uint32_t)GEMM_ALIGN);
    if (!s)
        s = gemm_prefer(g, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                        (uint32_t)(deterministic ? CUBLASLT_REDUCTION_SCHEME_NONE
                                                 : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    return s;
}

inline void gemm_close(gemm_state *g) {
    for (int i = 0; i < g->n_shapes; i++) {
        cublasLtMatrixLayoutDestroy(g->shapes[i].w);
        cublasLtMatrixLayoutDestroy(g->shapes[i].x);
        cublasLtMatrixLayoutDestroy(g->shapes[i].y);
    }
    if (g->preference) cublasLtMatmulPreferenceDestroy(g->preference);
    if (g->product) cublasLtMatmulDescDestroy(g->product);
    if (g->lt) cublasLtDestroy(g->lt);
}

/* Adds a shape. It has to be added before its first use; adding it twice does nothing. */
inline cublasStatus_t gemm_add_shape(gemm_state *g, int N, int K, bool add) {
    for (int i = 0; i < g->n_shapes; i++)
        if (g->shapes[i].N == N && g->shapes[i].K == K && g->shapes[i].add == add)
            return CUBLAS_STATUS_SUCCESS;
    if (g->n_shapes == GEMM_SHAPES) return CUBLAS_STATUS_ALLOC_FAILED;
    gemm_shape *p = &g->shapes[g->n_shapes++];
    *p = gemm_shape{};
    p->N = N, p->K = K, p->add = add;
    const cudaDataType in = g->kind == GEMM_F16 ? CUDA_R_16F : CUDA_R_8F_E4M3;
    const bool fp32 = add || g->kind == GEMM_E4M3_SUMS;
    cublasStatus_t s = cublasLtMatrixLayoutCreate(&p->w, in, K, N, K);
    if (!s) s = cublasLtMatrixLayoutCreate(&p->x, in, K, 1, K);
    if (!s) s = cublasLtMatrixLayoutCreate(&p->y, fp32 ? CUDA_R_32F : CUDA_R_16F, N, 1, N);
    return s;
}

/* FP8: sets the scales of W (N) and x (T). */
inline cublasStatus_t gemm_scales(gemm_state *g, const float *w, const float *x) {
    if (g->kind != GEMM_E4M3) return CUBLAS_STATUS_SUCCESS;
    cublasStatus_t s = gemm_describe(g, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, w);
    return s ? s : gemm_describe(g, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, x);
}

inline cublasStatus_t gemm_set_rows(const gemm_state *g, gemm_shape *p, int T) {
    const uint64_t cols = (uint64_t)(g->kind == GEMM_F16 ? T : (T + 15) / 16 * 16);
    cublasStatus_t s =
        cublasLtMatrixLayoutSetAttribute(p->x, CUBLASLT_MATRIX_LAYOUT_COLS, &cols, 8);
    if (!s) s = cublasLtMatrixLayoutSetAttribute(p->y, CUBLASLT_MATRIX_LAYOUT_COLS, &cols, 8);
    return s;
}

inline cublasStatus_t gemm_fast(gemm_state *g, bool fast) {
    if (g->kind == GEMM_F16) return CUBLAS_STATUS_SUCCESS;
    return gemm_describe(g, CUBLASLT_MATMUL_DESC_FAST_ACCUM, (int8_t)fast);
}

/* Asks the heuristic for at most `want` algorithms for T rows, best first. The scales' addresses
 * have to be set for that, and may be any. */
inline cublasStatus_t gemm_ask(gemm_state *g, gemm_shape *p, int T, bool fast,
                               cublasLtMatmulHeuristicResult_t *found, int want, int *n) {
    const float *any = (const float *)g->workspace;
    cublasStatus_t s = gemm_set_rows(g, p, T);
    if (!s) s = gemm_fast(g, fast);
    if (!s) s = gemm_scales(g, any, any);
    if (!s)
        s = cublasLtMatmulAlgoGetHeuristic(g->lt, g->product, p->w, p->x, p->y, p->y, g->preference,
                                           want, found, n);
    return s ? s : *n ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

inline bool gemm_supports(gemm_state *g, gemm_shape *p, const cublasLtMatmulAlgo_t *algo, int T) {
    cublasLtMatmulHeuristicResult_t r;
    return !gemm_set_rows(g, p, T) &&
           !cublasLtMatmulAlgoCheck(g->lt, g->product, p->w, p->x, p->y, p->y, algo, &r) &&
           r.workspaceSize <= GEMM_WORKSPACE;
}

/* Chooses p's algorithms for up to `rows` rows, by the heuristic. A deterministic run has only one,
 * so that one has to support few rows and many. */
inline cublasStatus_t gemm_choose(gemm_state *g, gemm_shape *p, int rows) {
    cublasLtMatmulHeuristicResult_t found[GEMM_CHOICES];
    for (int i = 0; i <= gemm_bucket(g, rows); i++) {
        int n = 0, k = 0;
        cublasStatus_t s = gemm_ask(g, p, gemm_bucket_rows(g, i), false, found,
                                    g->deterministic ? GEMM_CHOICES : 1, &n);
        if (s) return s;
        const auto serves_all = [&](const cublasLtMatmulAlgo_t *a) {
            for (int T : {1, 16, 64, 256, 1024, rows})
                if (!gemm_supports(g, p, a, T)) return false;
            return true;
        };
        while (g->deterministic && k < n && !serves_all(&found[k].algo)) k++;
        if (k == n) return CUBLAS_STATUS_NOT_SUPPORTED;
        p->buckets[i] = gemm_algo{found[k].algo, false, false};
    }
    return CUBLAS_STATUS_SUCCESS;
}

/* y (T, N) = alpha x W^T, or += ; W (N, K), x (T, K) as the shape says. */
inline cublasStatus_t gemm_launch(gemm_state *g, gemm_shape *p, const gemm_algo *a, void *y,
                                  const void *x, const void *w, float alpha, int T,
                                  cudaStream_t st) {
    const float beta = p->add && g->kind != GEMM_E4M3_SUMS;
    cublasStatus_t s = gemm_set_rows(g, p, T);
    if (!s) s = gemm_fast(g, a->fast);
    if (!s)
        s = cublasLtMatmul(g->lt, g->product, &alpha, w, p->w, x, p->x, &beta, y, p->y, y, p->y,
                           &a->algo, g->workspace, GEMM_WORKSPACE, st);
    return s;
}

/* y (T, w->rows) = alpha x W^T, or += ; w->scale and x_scale (T) are for FP8. */
inline cublasStatus_t gemm_run(gemm_state *g, void *y, const void *x, const float *x_scale,
                               const qemb_mat *w, bool add, int T, cudaStream_t st) {
    gemm_shape *p = g->shapes, *end = p + g->n_shapes;
    while (p < end && !(p->N == w->rows && p->K == w->cols && p->add == add)) p++;
    if (p == end) return CUBLAS_STATUS_INVALID_VALUE;
    const gemm_algo *a = &p->buckets[gemm_bucket(g, T)];
    const float alpha = g->kind == GEMM_E4M3_SUMS ? 1 : w->alpha;
    cublasStatus_t s = gemm_scales(g, w->scale, x_scale);
    if (!s) s = gemm_launch(g, p, a, y, x, w->data, alpha, T, st);
    if (s != CUBLAS_STATUS_NOT_SUPPORTED || g->deterministic) return s;
    /* The bucket's algorithm does not support this T. Ask for one that does. */
    cublasLtMatmulHeuristicResult_t found;
    int n = 0;
    s = gemm_ask(g, p, T, false, &found, 1, &n);
    if (!s) s = gemm_scales(g, w->scale, x_scale);
    const gemm_algo other = {found.algo, false, false};
    return s ? s : gemm_launch(g, p, &other, y, x, w->data, alpha, T, st);
}

/* ---- timing ---------------------------------------------------------------------------------- */

/* For timing: scratch memory for the operands of the largest shape, whose bytes are small finite
 * numbers in any format, and two events. */
struct gemm_bench {
    cudaStream_t st;
    cudaEvent_t start, stop;
    char *scratch;
    size_t bytes;
};

inline double gemm_time(gemm_state *g, gemm_shape *p, const gemm_bench *b, const gemm_algo *algo,
                        const void *w, int T) {
    const size_t x = ((size_t)T * p->K * 2 + 255) / 256 * 256;
    const float *scales = (const float *)b->scratch; /* (N) or (T); any finite values serve */
    float ms = -1;
    if (gemm_scales(g, scales, scales)) return -1; /* gemm_ask's may be NaN */
    for (int i = 0; i <= GEMM_RUNS; i++) {         /* the first one warms up */
        if (i == 1) cudaEventRecord(b->start, b->st);
        if (gemm_launch(g, p, algo, b->scratch + x, b->scratch, w, 1, T, b->st)) return -1;
    }
    cudaEventRecord(b->stop, b->st);
    if (cudaEventSynchronize(b->stop) != cudaSuccess) return -1;
    return cudaEventElapsedTime(&ms, b->start, b->stop) == cudaSuccess ? ms : -1;
}

/* Times the heuristic's choices for the bucket and keeps the fastest. Returns false if no timing
 * succeeded. */
inline bool gemm_tune(gemm_state *g, gemm_shape *p, int bucket, const gemm_bench *b,
                      const void *w) {
    const int T = gemm_bucket_rows(g, bucket);
    const size_t y = p->add || g->kind == GEMM_E4M3_SUMS ? 4 : 2;
    const size_t need = (size_t)T * (p->K * 2 + p->N * y) + 512;
    double best = -1;
    if (need > b->bytes) return false;
    for (int fast = 0; fast <= (g->kind != GEMM_F16); fast++) {
        cublasLtMatmulHeuristicResult_t found[GEMM_CHOICES];
        int n = 0;
        if (gemm_ask(g, p, T, fast, found, GEMM_CHOICES, &n)) continue;
        for (int i = 0; i < n; i++) {
            const gemm_algo a = {found[i].algo, fast != 0, true};
            const double ms = gemm_time(g, p, b, &a, w, T);
            if (ms < 0 || (best >= 0 && ms >= best)) continue;
            best = ms;
            p->buckets[bucket] = a;
        }
    }
    return best >= 0;
}

/* Loads algorithms. The file has one line per shape and bucket: N K add rows fast, then the
 * algorithm's eight words. cuBLAS allows storing them for the same library version. Other lines are
 * skipped. */
inline void gemm_load(gemm_state *g, const char *path) {
    FILE *in = fopen(path, "r");
    char line[512];
    while (in && fgets(line, sizeof line, in)) {
        int N, K, add, rows, fast, at = 0, n = 0;
        cublasLtMatmulAlgo_t algo;
        if (sscanf(line, "%d %d %d %d %d%n", &N, &K, &add, &rows, &fast, &at) != 5) continue;
        for (int words = 0; words < 8; words++, at += n)
            if (sscanf(line + at, "%" SCNx64 "%n", &algo.data[words], &n) != 1) N = 0;
        for (int s = 0; s < g->n_shapes; s++)
            for (int i = 0; i < GEMM_BUCKETS; i++) {
                gemm_shape *p = &g->shapes[s];
                if (p->N == N && p->K == K && p->add == (add != 0) &&
                    gemm_bucket_rows(g, i) == rows && !gemm_fast(g, fast != 0) &&
                    gemm_supports(g, p, &algo, rows))
                    p->buckets[i] = gemm_algo{algo, fast != 0, true};
            }
    }
    if (in) fclose(in);
}

/* Appends a bucket's line. If that fails, the next start times again. */
inline void gemm_save(const gemm_state *g, const gemm_shape *p, int bucket, const char *path) {
    char line[512];
    const gemm_algo *a = &p->buckets[bucket];
    int n = snprintf(line, sizeof line, "%d %d %d %d %d", p->N, p->K, p->add,
                     gemm_bucket_rows(g, bucket), a->fast);
    for (uint64_t word : a->algo.data) n += snprintf(line + n, sizeof line - n, " %" PRIx64, word);
    FILE *out = fopen(path, "a");
    if (!out) return;
    fprintf(out, "%s\n",
            line); /* one write of under 4 KiB, so that lines of two processes do not mix */
    fclose(out);
}

#endif
