/* emu_cublaslt.cpp - the cuBLASLt calls that qemb makes, on the CPU, with the library's own types
 * and with the argument checks that the library applies on sm_80 and later to FP16 TN products, and
 * on sm_89 and later to e4m3 ones; on sm_90 these may have a scale per row of either operand.
 *
 * Algorithms are numbered 0..7 (word 0 of the opaque algorithm, word 1 a seal). They give the same
 * values up to rounding: 2, 3, 6 and 7 sum from the end of K to its beginning, and the odd ones
 * split K in two, as split-K does, where M decides. 1 and 5 add the parts in FP32, 3 and 7 in the
 * type of the result, which the program can forbid. Small products are offered them in another
 * order. A program that asks for no split gets even ones only. Algorithm 2 takes no fewer than four
 * rows.
 *
 * With fast accumulation, 32 e4m3 products and the sum so far are cut to 13 bits of fraction below
 * the largest of them, as the tensor cores of sm_90 are reported to do (DeepSeek-V3 2024).
 */
#include "emu_internal.h"

#include <cublasLt.h>
#include <cstdlib>

namespace emu {
extern double clock_ms;

struct lt_desc {
    cublasComputeType_t compute;
    cudaDataType scale;
    int32_t ta = CUBLAS_OP_N, tb = CUBLAS_OP_N, a_mode = 0, b_mode = 0;
    int8_t fast = 0;
    const float *a_scale = nullptr, *b_scale = nullptr;
};
struct lt_layout {
    cudaDataType type;
    uint64_t rows, cols;
    int64_t ld;
};
struct lt_pref {
    uint64_t workspace = 0;
    uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_MASK;
    uint32_t align[4] = {256, 256, 256, 256};
};
enum : uint64_t { SEAL = 0x71656d62616c676full };

static size_t size_of(cudaDataType t) {
    return t == CUDA_R_32F ? 4 : t == CUDA_R_16F || t == CUDA_R_16BF ? 2 : t == CUDA_R_8F_E4M3;
}
static float get(const void *p, cudaDataType t, size_t i) {
    switch (t) {
    case CUDA_R_16F:
        return __half2float(((const __half *)p)[i]);
    case CUDA_R_16BF:
        return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
    case CUDA_R_8F_E4M3: { /* by the format's definition, not by the header that wrote it */
        const int code = ((const uint8_t *)p)[i], e = code >> 3 & 15, m = code & 7;
        const float size = e ? ldexpf((float)(8 + m), e - 10) : ldexpf((float)m, -9);
        return (code & 127) == 127 ? NAN : code & 128 ? -size : size;
    }
    default:
        return ((const float *)p)[i];
    }
}
static void put(void *p, cudaDataType t, size_t i, float v) {
    switch (t) {
    case CUDA_R_16F:
        ((__half *)p)[i] = __float2half_rn(v);
        break; /* overflows to infinity, as there */
    case CUDA_R_16BF:
        ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(v);
        break;
    default:
        ((float *)p)[i] = v;
    }
}

/* D (N x M, column-major) = alpha A^T B + beta C, A (K x N), B (K x M). */
struct product {
    uint64_t N, M, K;
    float alpha, beta;
    const void *A, *B, *C;
    const float *a_scale, *b_scale; /* (N), (M) of e4m3; else null */
    void *D;
    lt_layout a, b, c;
    bool split, narrow, backwards, fast; /* narrow: the parts of K are added in C's type */
};

/* Rounds to the type of the result. */
static float narrowed(cudaDataType t, float v) {
    return t == CUDA_R_16F ? __half2float(__float2half_rn(v)) : v;
}
/* The sum of w[k] y[k] as a tensor core with 13 bits of fraction adds 32 at a time. */
static float fast_sum(const float *w, const float *y, uint64_t K) {
    double sum = 0;
    for (uint64_t k0 = 0; k0 < K; k0 += 32) {
        const uint64_t end = std::min(k0 + 32, K);
        double top = fabs(sum), next = 0;
        for (uint64_t k = k0; k < end; k++) top = std::max(top, fabs((double)w[k] * y[k]));
        if (!(top > 0)) continue;
        const double unit = ldexp(1, ilogb(top) - 13);
        for (uint64_t k = k0; k < end; k++) next += trunc((double)w[k] * y[k] / unit);
        sum = (next + trunc(sum / unit)) * unit;
    }
    return (float)sum;
}
static void multiply(const product &p) {
    std::vector<float> x(p.N * p.K), y(p.K);
    for (uint64_t i = 0; i < p.N; i++)
        for (uint64_t k = 0; k < p.K; k++) x[i * p.K + k] = get(p.A, p.a.type, k + i * p.a.ld);
    const uint64_t half = p.split ? p.K / (2 + p.M % 3) : p.K; /* which a library may choose by M */
    for (uint64_t j = 0; j < p.M; j++) {
        for (uint64_t k = 0; k < p.K; k++) y[k] = get(p.B, p.b.type, k + j * p.b.ld);
        for (uint64_t i = 0; i < p.N; i++) {
            const float *w = &x[i * p.K];
            float part[8] = {}, tail = 0;
            const uint64_t steps = half / 8;
            for (uint64_t i8 = 0; i8 < steps; i8++) {
                const uint64_t k = (p.backwards ? steps - 1 - i8 : i8) * 8;
                for (int l = 0; l < 8; l++) part[l] += w[k + l] * y[k + l];
            }
            for (uint64_t k = steps * 8; k < p.K; k++) tail += w[k] * y[k];
            if (p.narrow) tail = narrowed(p.c.type, tail);
            float s = 0;
            for (float v : part) s += v;
            s = (p.narrow ? narrowed(p.c.type, s) : s) + tail;
            if (p.fast) s = fast_sum(w, y.data(), p.K);
            s *= p.alpha;
            if (p.a_scale) s *= p.a_scale[i] * p.b_scale[j];
            size_t at = i + j * p.c.ld;
            if (p.beta != 0) s += p.beta * get(p.C, p.c.type, at);
            put(p.D, p.c.type, at, s);
        }
    }
    count.gemms++;
}

/* What the library refuses, for the one form of product that qemb uses. */
static cublasStatus_t check(const lt_desc &d, const lt_layout &a, const lt_layout &b,
                            const lt_layout &c) {
    if (d.compute != CUBLAS_COMPUTE_32F || d.scale != CUDA_R_32F)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (d.ta != CUBLAS_OP_T || d.tb != CUBLAS_OP_N) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (a.rows != b.rows || c.rows != a.cols || c.cols != b.cols)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (!a.rows || !a.cols || !b.cols) return CUBLAS_STATUS_INVALID_VALUE;
    if (a.ld < (int64_t)a.rows || b.ld < (int64_t)b.rows || c.ld < (int64_t)c.rows)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (a.type != b.type || size_of(a.type) > 2 || size_of(c.type) < 2)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (a.ld * size_of(a.type) % 16 || b.ld * size_of(b.type) % 16 || c.ld * size_of(c.type) % 16)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    const bool outer = d.a_mode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F &&
                       d.b_mode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    if (size_of(a.type) == 2)
        return d.a_mode || d.b_mode ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
    /* e4m3: scales per row, which sm_90 alone has, or none */
    if (10 * dev.major + dev.minor < 89 || dev.no_fp8) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (outer ? dev.major != 9 || dev.minor != 0 : d.a_mode || d.b_mode)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (a.rows % 16 || a.cols % 16 || b.cols % 16) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (!outer) return CUBLAS_STATUS_SUCCESS;
    if (!d.a_scale || !d.b_scale || ((uintptr_t)d.a_scale | (uintptr_t)d.b_scale) % 16)
        return CUBLAS_STATUS_INVALID_VALUE;
    return CUBLAS_STATUS_SUCCESS;
}
static bool algo_serves(uint64_t id, uint64_t M) { return id != 2 || M > 3; }
static uint64_t algo_workspace(uint64_t id) { return id % 2 ? (uint64_t)1 << 20 : 0; }

} // namespace emu

using namespace emu;

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) {
    *h = (cublasLtHandle_t)(intptr_t)(current_device() + 1);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t) { return CUBLAS_STATUS_SUCCESS; }
size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t c,
                                        cudaDataType_t s) {
    *d = (cublasLtMatmulDesc_t) new lt_desc{c, s};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
    delete (lt_desc *)d;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d,
                                              cublasLtMatmulDescAttributes_t a, const void *v,
                                              size_t n) {
    lt_desc *x = (lt_desc *)d;
    void *to = nullptr;
    size_t size = 4;
    switch (a) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
        to = &x->ta;
        break;
    case CUBLASLT_MATMUL_DESC_TRANSB:
        to = &x->tb;
        break;
    case CUBLASLT_MATMUL_DESC_FAST_ACCUM:
        to = &x->fast;
        size = 1;
        break;
    case CUBLASLT_MATMUL_DESC_A_SCALE_MODE:
        to = &x->a_mode;
        break;
    case CUBLASLT_MATMUL_DESC_B_SCALE_MODE:
        to = &x->b_mode;
        break;
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER:
        to = &x->a_scale;
        size = 8;
        break;
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER:
        to = &x->b_scale;
        size = 8;
        break;
    default:
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (n != size) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to, v, n);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType t, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
    if (!size_of(t)) return CUBLAS_STATUS_NOT_SUPPORTED;
    *l = (cublasLtMatrixLayout_t) new lt_layout{t, rows, cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    delete (lt_layout *)l;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t l,
                                                cublasLtMatrixLayoutAttribute_t a, const void *v,
                                                size_t n) {
    if (a != CUBLASLT_MATRIX_LAYOUT_COLS || n != 8) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&((lt_layout *)l)->cols, v, n);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    *p = (cublasLtMatmulPreference_t) new lt_pref;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    delete (lt_pref *)p;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t pref,
                                                    cublasLtMatmulPreferenceAttributes_t a,
                                                    const void *v, size_t n) {
    lt_pref *p = (lt_pref *)pref;
    void *to = nullptr;
    size_t size = 4;
    switch (a) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
        to = &p->workspace;
        size = 8;
        break;
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
        to = &p->reduction;
        break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
        to = &p->align[0];
        break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
        to = &p->align[1];
        break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
        to = &p->align[2];
        break;
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
        to = &p->align[3];
        break;
    default:
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (n != size) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to, v, n);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t pref, int want,
                                              cublasLtMatmulHeuristicResult_t *r, int *got) {
    cublasStatus_t s = check(*(lt_desc *)d, *(lt_layout *)a, *(lt_layout *)b, *(lt_layout *)c);
    *got = 0;
    if (s) return s;
    const lt_pref &p = *(lt_pref *)pref;
    const uint64_t first = ((lt_layout *)b)->cols <= 256;
    for (uint64_t k = 0; k < 8 && *got < want; k++) {
        const uint64_t id = (k + first) % 8;
        if (id % 4 == 1 && !(p.reduction & CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE)) continue;
        if (id % 4 == 3 && !(p.reduction & CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE)) continue;
        if (!algo_serves(id, ((lt_layout *)b)->cols)) continue;
        if (algo_workspace(id) > p.workspace) continue;
        cublasLtMatmulHeuristicResult_t &x = r[(*got)++];
        memset(&x, 0, sizeof x);
        x.algo.data[0] = id;
        x.algo.data[1] = SEAL;
        x.workspaceSize = algo_workspace(id);
        x.state = CUBLAS_STATUS_SUCCESS;
    }
    return *got ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t d,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t,
                                       const cublasLtMatmulAlgo_t *algo,
                                       cublasLtMatmulHeuristicResult_t *r) {
    cublasStatus_t s = check(*(lt_desc *)d, *(lt_layout *)a, *(lt_layout *)b, *(lt_layout *)c);
    if (s) return s;
    if (algo->data[1] != SEAL || algo->data[0] > 7) return CUBLAS_STATUS_INVALID_VALUE;
    if (!algo_serves(algo->data[0], ((lt_layout *)b)->cols)) return CUBLAS_STATUS_NOT_SUPPORTED;
    memset(r, 0, sizeof *r);
    r->workspaceSize = algo_workspace(algo->data[0]);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *A, cublasLtMatrixLayout_t la, const void *B,
                              cublasLtMatrixLayout_t lb, const void *beta, const void *C,
                              cublasLtMatrixLayout_t lc, void *D, cublasLtMatrixLayout_t,
                              const cublasLtMatmulAlgo_t *algo, void *ws, size_t ws_bytes,
                              cudaStream_t st) {
    const std::lock_guard<std::recursive_mutex> held(api_lock);
    if ((intptr_t)handle != current_device() + 1)
        die("cublasLtMatmul: a handle of device %d while device %d is current",
            (int)(intptr_t)handle - 1, current_device());
    lt_layout a = *(lt_layout *)la, b = *(lt_layout *)lb, c = *(lt_layout *)lc;
    cublasStatus_t s = check(*(lt_desc *)desc, a, b, c);
    if (s) return s;
    if (device_failed()) return CUBLAS_STATUS_EXECUTION_FAILED;
    if (!algo || algo->data[1] != SEAL || algo->data[0] > 7) return CUBLAS_STATUS_INVALID_VALUE;
    if (((uintptr_t)A | (uintptr_t)B | (uintptr_t)C | (uintptr_t)D) % 16)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (!algo_serves(algo->data[0], b.cols) || algo_workspace(algo->data[0]) > ws_bytes ||
        (ws_bytes && (uintptr_t)ws % 256))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    const lt_desc &d = *(lt_desc *)desc;
    const bool fp8 = size_of(a.type) == 1, scaled = fp8 && d.a_mode;
    for (const void *p : {A, B, C, (const void *)D, scaled ? (const void *)d.a_scale : A,
                          scaled ? (const void *)d.b_scale : A})
        if (!in_device_heap(p)) die("cublasLtMatmul: an operand is not device memory");
    product p = {c.rows,
                 c.cols,
                 a.rows,
                 *(const float *)alpha,
                 *(const float *)beta,
                 A,
                 B,
                 C,
                 scaled ? d.a_scale : nullptr,
                 scaled ? d.b_scale : nullptr,
                 D,
                 a,
                 b,
                 c,
                 algo->data[0] % 2 == 1,
                 algo->data[0] % 4 == 3,
                 algo->data[0] / 2 % 2 == 1,
                 fp8 && d.fast};
    /* Algorithm 3 is the fastest, then 2: tuning has something to find, and to be kept from. */
    double cost = (double)(algo->data[0] ^ 3) * 0.01 + (fp8 && d.fast ? 0 : 0.005);
    submit(st, [p, cost] {
        multiply(p);
        clock_ms += cost;
    });
    return CUBLAS_STATUS_SUCCESS;
}

} // extern "C"
