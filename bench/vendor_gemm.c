/* vendor_gemm.c - matrix products of other libraries; see vendor_gemm.h.
 *
 * oneDNN is linked if its headers are installed (see the Makefile): f32, bf16, u8 x s8 and s8 x s8,
 * with weights in the form that it asks for and activations already in the type of the product. It
 * uses the tile unit by itself where it may (dnnl_cpu_isa_avx512_core_amx, unless DNNL_MAX_CPU_ISA
 * forbids it); limits_probe has asked for the permission by then. It configures and releases tiles
 * itself, as our ops do. OpenBLAS is loaded if it is installed. */
#include "vendor_gemm.h"

#include "limits.h"
#include "measure.h"

#include "backends/cpu/cpu.h"

#include <assert.h>
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__has_include) &&                                                                      \
    defined(__x86_64__) /* the SIMD tables, which it is compared with, are for x86 */
#if __has_include(<oneapi/dnnl/dnnl.h>)
#include <oneapi/dnnl/dnnl.h>
#define HAVE_DNNL
#endif
#endif

typedef void (*blas_fn)(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a,
                        int lda, const float *b, int ldb, float beta, float *c, int ldc);

struct other_gemm {
    int T, N, K;
    float *x, *W, *y; /* the numbers that are multiplied, exactly as floats, and the result */
    blas_fn blas;
#ifdef HAVE_DNNL
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    dnnl_primitive_t product;
    dnnl_exec_arg_t args[3];
#endif
};

enum { DNNL_F32, DNNL_BF16, DNNL_U8S8, DNNL_S8S8, OPENBLAS };
enum { F32_BIT = 1 << QEMB_MATH_F32, BF16_BITS = 1 << QEMB_MATH_BF16 | 1 << QEMB_MATH_INT16 };
const struct other_gemm_kind other_gemms[OTHER_GEMMS] = {
    [DNNL_F32] = {"oneDNN f32", QEMB_MATH_F32, F32_BIT},
    [DNNL_BF16] = {"oneDNN bf16", QEMB_MATH_BF16, F32_BIT | BF16_BITS},
    [DNNL_U8S8] = {"oneDNN u8s8", QEMB_MATH_INT8, 1 << QEMB_MATH_INT8},
    [DNNL_S8S8] = {"oneDNN s8s8", QEMB_MATH_INT8, 1 << QEMB_MATH_INT8},
    [OPENBLAS] = {"OpenBLAS", QEMB_MATH_F32, F32_BIT}};

/* Rounds to numbers that the arithmetic holds exactly: to 8 significant bits for f32 and bf16, to
 * whole numbers for int8, x in 0 .. 255 or -127 .. 127 and W in -63 .. 63. Without VNNI oneDNN adds
 * two products in 16 bits, and 128 to an x of s8: 2 * 255 * 63 fits, 2 * 255 * 127 does not. */
static float round_to(qemb_math math, float v) {
    if (math == QEMB_MATH_INT8) return rintf(v);
    if (v == 0 || !isfinite(v)) return 0;
    int exponent;
    const float m = frexpf(v, &exponent);
    return ldexpf(rintf(m * 256), exponent - 8);
}

static void fill(other_gemm *g, int kind, const float *W) {
    const qemb_math math = other_gemms[kind].math;
    const size_t nw = (size_t)g->N * (size_t)g->K, nx = (size_t)g->T * (size_t)g->K;
    float greatest = 0;
    for (size_t i = 0; i < nw; i++) greatest = fmaxf(greatest, fabsf(W[i]));
    const float scale = math == QEMB_MATH_INT8 && greatest > 0 ? 63 / greatest : 1;
    for (size_t i = 0; i < nw; i++) g->W[i] = round_to(math, W[i] * scale);
    for (size_t i = 0; i < nx; i++) {
        const float v = (float)(i * 2654435761u % 2001) / 1000 - 1;
        g->x[i] = round_to(math, kind == DNNL_U8S8   ? 127.5f * (v + 1)
                                 : kind == DNNL_S8S8 ? 127 * v
                                                     : v);
    }
}

/* Compares every 97th number of y with the sum in double. Products of such numbers are exact in
 * float; a sum of K floats has an error of at most K 2^-24 of the sum of magnitudes, in any
 * order. */
static int is_right(const other_gemm *g) {
    for (size_t i = 0; i < (size_t)g->T * (size_t)g->N; i += 97) {
        const float *x = g->x + i / (size_t)g->N * (size_t)g->K;
        const float *w = g->W + i % (size_t)g->N * (size_t)g->K;
        double sum = 0, size = 0;
        for (int k = 0; k < g->K; k++)
            sum += (double)x[k] * w[k], size += fabs((double)x[k] * w[k]);
        if (!(fabs(g->y[i] - sum) <= g->K * 0x1p-24 * size)) return 0;
    }
    return 1;
}

void other_gemm_run(void *arg, int i) {
    other_gemm *g = arg;
    (void)i;
    if (g->blas) {
        g->blas(101, 111, 112, g->T, g->N, g->K, 1, g->x, g->K, g->W, g->K, 0, g->y, g->N);
        return;
    }
#ifdef HAVE_DNNL
    if (dnnl_primitive_execute(g->product, g->stream, 3, g->args) || dnnl_stream_wait(g->stream))
        die("oneDNN: a product failed");
#endif
}

static int blas_open(other_gemm *g) {
    void *library = dlopen("libopenblas.so.0", RTLD_NOW);
    void *p = library ? dlsym(library, "cblas_sgemm") : NULL;
    void (*set_threads)(int) = NULL;
    if (!p) return -1;
    memcpy(&g->blas, &p, sizeof p);
    if ((p = dlsym(library, "openblas_set_num_threads"))) {
        memcpy(&set_threads, &p, sizeof p);
        set_threads(measure_threads());
    }
    return 0;
}

float *floats_of(const qemb_mat *w) {
    const qemb_config c = {.hidden = w->cols};
    qemb_backend be = {.c = &c, .threads = 1};
    int32_t *ids = zeroed(sizeof *ids * (size_t)w->rows);
    const qemb_packed_batch all = {1, w->rows, 0, ids, NULL, NULL, 0, 0, 0};
    float *W = zeroed(sizeof(float) * (size_t)w->rows * (size_t)w->cols);
    for (int i = 0; i < w->rows; i++) ids[i] = i;
    if (w->dtype == QEMB_F16) qemb_cpu_ops.embed(&be, W, w, NULL, &all);
    free(ids);
    return W;
}

/* ---- oneDNN, versions 2 and 3 ---------------------------------------------------------------- */

#ifdef HAVE_DNNL

#if DNNL_VERSION_MAJOR < 3
typedef dnnl_memory_desc_t shape;
typedef const dnnl_memory_desc_t *const_shape;
static const_shape seen(const shape *s) { return s; }
static int shape_of(shape *s, int rows, int cols, dnnl_data_type_t type, dnnl_format_tag_t tag) {
    return dnnl_memory_desc_init_by_tag(s, 2, (dnnl_dims_t){rows, cols}, type, tag);
}
static void shape_free(shape *s) { (void)s; }
static int product_desc(dnnl_primitive_desc_t *d, dnnl_engine_t engine, const_shape x,
                        const_shape w, const_shape y, const_dnnl_primitive_attr_t attr) {
    dnnl_matmul_desc_t op;
    return dnnl_matmul_desc_init(&op, x, w, NULL, y) ||
           dnnl_primitive_desc_create(d, &op, attr, engine, NULL);
}
static int append_sum(dnnl_post_ops_t p) { return dnnl_post_ops_append_sum(p, 1); }
#else
typedef dnnl_memory_desc_t shape;
typedef const_dnnl_memory_desc_t const_shape;
static const_shape seen(const shape *s) { return *s; }
static int shape_of(shape *s, int rows, int cols, dnnl_data_type_t type, dnnl_format_tag_t tag) {
    return dnnl_memory_desc_create_with_tag(s, 2, (dnnl_dims_t){rows, cols}, type, tag);
}
static void shape_free(shape *s) { dnnl_memory_desc_destroy(*s); }
static int product_desc(dnnl_primitive_desc_t *d, dnnl_engine_t engine, const_shape x,
                        const_shape w, const_shape y, const_dnnl_primitive_attr_t attr) {
    return dnnl_matmul_primitive_desc_create(d, engine, x, w, NULL, y, attr);
}
static int append_sum(dnnl_post_ops_t p) {
    return dnnl_post_ops_append_sum(p, 1, 0, dnnl_data_type_undef);
}
#endif

static const dnnl_data_type_t x_type[] = {
    [DNNL_F32] = dnnl_f32, [DNNL_BF16] = dnnl_bf16, [DNNL_U8S8] = dnnl_u8, [DNNL_S8S8] = dnnl_s8};
static const dnnl_data_type_t w_type[] = {
    [DNNL_F32] = dnnl_f32, [DNNL_BF16] = dnnl_bf16, [DNNL_U8S8] = dnnl_s8, [DNNL_S8S8] = dnnl_s8};

/* *m = memory of the form `to` with floats (rows, cols) in it, converted */
static int converted(dnnl_engine_t engine, dnnl_stream_t stream, dnnl_memory_t *m, float *floats,
                     int rows, int cols, dnnl_format_tag_t tag, const_shape to) {
    shape plain;
    dnnl_memory_t from = NULL;
    dnnl_primitive_desc_t d = NULL;
    dnnl_primitive_t reorder = NULL;
    int bad = shape_of(&plain, rows, cols, dnnl_f32, tag);
    if (bad) return bad;
    bad = dnnl_memory_create(&from, seen(&plain), engine, floats) ||
          dnnl_memory_create(m, to, engine, DNNL_MEMORY_ALLOCATE) ||
          dnnl_reorder_primitive_desc_create(&d, seen(&plain), engine, to, engine, NULL) ||
          dnnl_primitive_create(&reorder, d);
    if (!bad) {
        const dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, *m}};
        bad = dnnl_primitive_execute(reorder, stream, 2, args) || dnnl_stream_wait(stream);
    }
    if (reorder) dnnl_primitive_destroy(reorder);
    if (d) dnnl_primitive_desc_destroy(d);
    if (from) dnnl_memory_destroy(from);
    shape_free(&plain);
    return bad;
}

static int dnnl_start(dnnl_engine_t *engine, dnnl_stream_t *stream) {
#ifdef _OPENMP
    omp_set_num_threads(measure_threads());
#endif
    return dnnl_engine_create(engine, dnnl_cpu, 0) ||
           dnnl_stream_create(stream, *engine, dnnl_stream_default_flags);
}

static int dnnl_open(other_gemm *g, int kind) {
    shape x, w, y;
    dnnl_primitive_desc_t d = NULL;
    int bad = dnnl_start(&g->engine, &g->stream) ||
              shape_of(&x, g->T, g->K, x_type[kind], dnnl_ab) ||
              shape_of(&w, g->K, g->N, w_type[kind], dnnl_format_tag_any) ||
              shape_of(&y, g->T, g->N, dnnl_f32, dnnl_ab);
    if (bad) die("oneDNN: does not start");
    bad = product_desc(&d, g->engine, seen(&x), seen(&w), seen(&y), NULL) ||
          dnnl_primitive_create(&g->product, d);
    if (!bad) {
        const_shape packed = dnnl_primitive_desc_query_md(d, dnnl_query_weights_md, 0);
        g->args[0].arg = DNNL_ARG_SRC, g->args[1].arg = DNNL_ARG_WEIGHTS;
        g->args[2].arg = DNNL_ARG_DST;
        /* W (N, K) by rows is W^T (K, N) by columns */
        bad = converted(g->engine, g->stream, &g->args[0].memory, g->x, g->T, g->K, dnnl_ab,
                        seen(&x)) ||
              converted(g->engine, g->stream, &g->args[1].memory, g->W, g->K, g->N, dnnl_ba,
                        packed) ||
              dnnl_memory_create(&g->args[2].memory, seen(&y), g->engine, g->y);
    }
    if (d) dnnl_primitive_desc_destroy(d);
    shape_free(&x), shape_free(&w), shape_free(&y);
    return bad ? -1 : 0;
}

static void dnnl_close(other_gemm *g) {
    for (int i = 0; i < 3; i++)
        if (g->args[i].memory) dnnl_memory_destroy(g->args[i].memory);
    if (g->product) dnnl_primitive_destroy(g->product);
    if (g->stream) dnnl_stream_destroy(g->stream);
    if (g->engine) dnnl_engine_destroy(g->engine);
}

/* ---- a table with oneDNN's products ---------------------------------------------------------- */

/* Everything but the products is the table's that it is made from. There is one at a time. Packed
 * matrices and oneDNN's other objects are made once for a kind, and live as long as the program. */

typedef struct { /* of matrices (N, K): how oneDNN wants W */
    int kind, N, K;
    const_shape packed;
} weights_form;

typedef struct { /* y (T, N) = (add ? y : 0) + x W^T */
    int kind, T, N, K, add;
    dnnl_primitive_t product, narrow; /* narrow: x to what is multiplied; NULL in float */
    dnnl_memory_t x, narrowed, y;     /* x and y are told where they are in every call */
} lib_product;

static struct {
    qemb_ops table;
    int kind;                 /* DNNL_F32 or DNNL_BF16 */
    dnnl_memory_t *packed[2]; /* of each kind: the model's matrices, layer by layer */
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    weights_form forms[8];
    lib_product products[128];
    int n_forms, n_products;
} lib;

static const weights_form *form_of(int N, int K) {
    for (int i = 0; i < lib.n_forms; i++) {
        const weights_form *f = &lib.forms[i];
        if (f->kind == lib.kind && f->N == N && f->K == K) return f;
    }
    shape x, w, y;
    dnnl_primitive_desc_t d; /* the form is its property */
    if (lib.n_forms == sizeof lib.forms / sizeof *lib.forms ||
        shape_of(&x, QEMB_MLP_ROWS, K, x_type[lib.kind], dnnl_ab) ||
        shape_of(&w, K, N, w_type[lib.kind], dnnl_format_tag_any) ||
        shape_of(&y, QEMB_MLP_ROWS, N, dnnl_f32, dnnl_ab) ||
        product_desc(&d, lib.engine, seen(&x), seen(&w), seen(&y), NULL))
        die("oneDNN: no form for a matrix");
    weights_form *f = &lib.forms[lib.n_forms++];
    *f = (weights_form){lib.kind, N, K, dnnl_primitive_desc_query_md(d, dnnl_query_weights_md, 0)};
    return f;
}

static dnnl_memory_t pack(const qemb_mat *w) {
    float *W = floats_of(w);
    dnnl_memory_t m;
    if (converted(lib.engine, lib.stream, &m, W, w->cols, w->rows, dnnl_ba,
                  form_of(w->rows, w->cols)->packed))
        die("oneDNN: a matrix cannot be packed");
    free(W);
    return m;
}

static int lib_load_weights(qemb_backend *be, qemb_weights *w, qemb_err *err) {
    const size_t n = (size_t)be->c->n_layers * QEMB_LAYER_MATRICES;
    (void)err;
    const int made = lib.packed[lib.kind] != NULL;
    if (!made) lib.packed[lib.kind] = zeroed(n * sizeof(dnnl_memory_t));
    for (size_t i = 0; i < n; i++) {
        dnnl_memory_t *m = &lib.packed[lib.kind][i];
        qemb_mat *all[QEMB_LAYER_MATRICES];
        qemb_layer_matrices(&w->layers[i / QEMB_LAYER_MATRICES], all);
        qemb_mat *matrix = all[i % QEMB_LAYER_MATRICES];
        if (!made) *m = pack(matrix);
        matrix->data = *m;
    }
    return 0;
}

static lib_product *product_of(int T, int N, int K, int add) {
    for (int i = 0; i < lib.n_products; i++) {
        lib_product *p = &lib.products[i];
        if (p->kind == lib.kind && p->T == T && p->N == N && p->K == K && p->add == add) return p;
    }
    if (lib.n_products == sizeof lib.products / sizeof *lib.products) die("too many shapes");
    lib_product *p = &lib.products[lib.n_products++];
    *p = (lib_product){lib.kind, T, N, K, add, NULL, NULL, NULL, NULL, NULL};
    shape floats, x, y;
    dnnl_primitive_desc_t d, narrow;
    dnnl_post_ops_t sum;
    dnnl_primitive_attr_t attr;
    const dnnl_data_type_t type = x_type[lib.kind];
    int bad = shape_of(&floats, T, K, dnnl_f32, dnnl_ab) || shape_of(&x, T, K, type, dnnl_ab) ||
              shape_of(&y, T, N, dnnl_f32, dnnl_ab) || dnnl_post_ops_create(&sum) ||
              (add && append_sum(sum)) || dnnl_primitive_attr_create(&attr) ||
              dnnl_primitive_attr_set_post_ops(attr, sum) ||
              product_desc(&d, lib.engine, seen(&x), form_of(N, K)->packed, seen(&y), attr) ||
              dnnl_primitive_create(&p->product, d) ||
              dnnl_memory_create(&p->x, seen(&floats), lib.engine, DNNL_MEMORY_NONE) ||
              dnnl_memory_create(&p->y, seen(&y), lib.engine, DNNL_MEMORY_NONE);
    if (!bad && type != dnnl_f32)
        bad = dnnl_memory_create(&p->narrowed, seen(&x), lib.engine, DNNL_MEMORY_ALLOCATE) ||
              dnnl_reorder_primitive_desc_create(&narrow, seen(&floats), lib.engine, seen(&x),
                                                 lib.engine, NULL) ||
              dnnl_primitive_create(&p->narrow, narrow);
    if (bad) die("oneDNN: no such product");
    return p;
}

static void lib_multiply(float *y, const float *x, const qemb_mat *w, int T, int add) {
    const lib_product *p = product_of(T, w->rows, w->cols, add);
    const dnnl_exec_arg_t narrow[] = {{DNNL_ARG_FROM, p->x}, {DNNL_ARG_TO, p->narrowed}};
    const dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, p->narrow ? p->narrowed : p->x},
                                    {DNNL_ARG_WEIGHTS, (dnnl_memory_t)(uintptr_t)w->data},
                                    {DNNL_ARG_DST, p->y}};
    assert(w->alpha == 1);
    if (dnnl_memory_set_data_handle(p->x, (void *)(uintptr_t)x) ||
        dnnl_memory_set_data_handle(p->y, y) ||
        (p->narrow && dnnl_primitive_execute(p->narrow, lib.stream, 2, narrow)) ||
        dnnl_primitive_execute(p->product, lib.stream, 3, args) || dnnl_stream_wait(lib.stream))
        die("oneDNN: a product failed");
}

static void lib_matmul(qemb_backend *be, qemb_act *y, const qemb_act *x, const qemb_mat *w,
                       const float *bias, int T) {
    lib_multiply((float *)y, (const float *)x, w, T, 0);
    simd_add_bias(be, y, bias, T, w->rows);
}

static void lib_matmul_gelu(qemb_backend *be, qemb_act *h, const qemb_act *x, const qemb_mat *w,
                            const float *bias, int T) {
    lib_multiply((float *)h, (const float *)x, w, T, 0);
    simd_gelu(be, h, bias, T, w->rows);
}

static void lib_matmul_add(qemb_backend *be, float *x, const qemb_act *a, const qemb_mat *w,
                           int T) {
    (void)be;
    lib_multiply(x, (const float *)a, w, T, 1);
}

static void lib_gate_up(qemb_backend *be, qemb_act *h, qemb_act *gu, const qemb_act *x,
                        const qemb_mat *w, int T) {
    lib_multiply((float *)gu, (const float *)x, w, T, 0);
    simd_swiglu(be, h, gu, T);
}

/* Whether the CPU has an instruction for bfloat16: oneDNN has its products on every CPU with
 * AVX-512, in float. */
static int has_bf16(void) { return limit_of_library(QEMB_MATH_BF16)->rate > 0; }

const qemb_ops *table_with_onednn(const qemb_ops *own, qemb_math math) {
    const int kind = math == QEMB_MATH_F32 ? DNNL_F32 : DNNL_BF16;
    if (!(other_gemms[kind].beside >> own->math & 1) || own == &qemb_cpu_ops) return NULL;
    if (kind == DNNL_BF16 && !has_bf16()) return NULL;
    if (!lib.engine && dnnl_start(&lib.engine, &lib.stream)) die("oneDNN: does not start");
    lib.kind = kind, lib.table = *own;
    lib.table.repacked_bytes = NULL, lib.table.load_weights = lib_load_weights;
    lib.table.matmul = lib_matmul, lib.table.matmul_gelu = lib_matmul_gelu;
    lib.table.matmul_add = lib_matmul_add, lib.table.gate_up = lib_gate_up;
    return &lib.table;
}

#else

const qemb_ops *table_with_onednn(const qemb_ops *own, qemb_math math) {
    (void)own, (void)math;
    return NULL;
}

#endif

/* ---- both ------------------------------------------------------------------------------------ */

other_gemm *other_gemm_open(int kind, int T, int N, int K, const float *W) {
    other_gemm *g = calloc(1, sizeof *g);
    if (!g) die("out of memory");
    g->T = T, g->N = N, g->K = K;
    g->x = zeroed(sizeof(float) * (size_t)T * (size_t)K);
    g->W = zeroed(sizeof(float) * (size_t)N * (size_t)K);
    g->y = zeroed(sizeof(float) * (size_t)T * (size_t)N);
    fill(g, kind, W);
    int bad = -1;
    if (kind == OPENBLAS) bad = blas_open(g);
#ifdef HAVE_DNNL
    if (kind != OPENBLAS) bad = dnnl_open(g, kind);
#endif
    if (bad) {
        other_gemm_close(g);
        return NULL;
    }
    other_gemm_run(g, 0);
    if (!is_right(g)) {
        fprintf(stderr, "bench: %s: not the product that was asked for\n", other_gemms[kind].name);
        exit(1);
    }
    return g;
}

void other_gemm_close(other_gemm *g) {
#ifdef HAVE_DNNL
    dnnl_close(g);
#endif
    free(g->x), free(g->W), free(g->y);
    free(g);
}
