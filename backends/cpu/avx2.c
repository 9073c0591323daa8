/* avx2.c - the CPU's ops with AVX2, FMA and F16C (x86 since 2013).
 *
 * Each function is compiled for the instructions that it names; dispatch.c hands out the table only
 * on a CPU that has them. As in qemb.c, a row's result depends on that row alone, bit for bit: a
 * matmul adds up columns one by one within KC of them, however many rows a tile has; attention adds
 * key after key.
 */
#include "avx2.h"

#if defined(__x86_64__)

#include <assert.h>
#include <string.h>

enum {
    MR = 6,          /* rows of x in a register tile, and */
    NR = 16,         /* rows of W: 12 of 16 registers hold the sums */
    KC = 256,        /* columns of a packed panel: KC x NR floats, half of a 32 KiB L1 cache */
    GROUP = 8,       /* panels that a work item packs at a time: 128 KiB of an L2 cache */
    FEW_ROWS = 5,    /* up to this many rows of x, no panel is packed: see few_rows */
    BLOCK_ROWS = 96, /* rows of x that meet all panels of a group before the next rows come */
    ITEM_ROWS = 512, /* rows of x in a work item, which share one packing of its panels */
    KEYS = CPU_KEYS,
};

static float *f32(qemb_act *a) { return (float *)a; }
static const float *cf32(const qemb_act *a) { return (const float *)a; }

/* ---- embed ----------------------------------------------------------------------------------- */

AVX2 static void half_row(float *y, const uint16_t *x, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    for (; i < n; i++) y[i] = _cvtsh_ss(x[i]);
}

/* ---- rmsnorm --------------------------------------------------------------------------------- */

/* 1 / sqrt(mean(x^2) + eps) of one row, summed in double */
TEMPLATE float rms_scale(const float *x, int n, float eps) {
    __m256d sum[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    for (int i = 0; i < n; i += 8) {
        const __m256 v = load_first(x + i, n - i);
        const __m256d lo = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
        const __m256d hi = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
        sum[0] = _mm256_fmadd_pd(lo, lo, sum[0]);
        sum[1] = _mm256_fmadd_pd(hi, hi, sum[1]);
    }
    double s[4];
    _mm256_storeu_pd(s, _mm256_add_pd(sum[0], sum[1]));
    return (float)(1 / sqrt(((s[0] + s[1]) + (s[2] + s[3])) / n + eps));
}

/* y may be x */
AVX2 static void rmsnorm_row(float *y, const float *x, const float *w, int n, float eps) {
    const __m256 scale = _mm256_set1_ps(rms_scale(x, n, eps));
    for (int i = 0; i < n; i += 8) {
        const __m256 v = _mm256_mul_ps(load_first(x + i, n - i), scale);
        store_first(y + i, _mm256_mul_ps(v, load_first(w + i, n - i)), n - i);
    }
}

/* ---- rows of an encoder ---------------------------------------------------------------------- */

AVX2 static void add_row(float *y, const float *x, int n) {
    for (int i = 0; i < n; i += 8)
        store_first(y + i, _mm256_add_ps(load_first(y + i, n - i), load_first(x + i, n - i)),
                    n - i);
}

AVX2 static void gelu_row(float *h, const float *bias, int n) {
    for (int i = 0; i < n; i += 8)
        store_first(h + i,
                    gelu8(_mm256_add_ps(load_first(h + i, n - i), load_first(bias + i, n - i))),
                    n - i);
}

TEMPLATE double total_double(const __m256d sum[2]) {
    double s[4];
    _mm256_storeu_pd(s, _mm256_add_pd(sum[0], sum[1]));
    return (s[0] + s[1]) + (s[2] + s[3]);
}

/* The first n of x - mean, zeros after them. The mean has two parts: the difference from the first
 * one, which is near, is exact or small. */
TEMPLATE __m256 centred(__m256 x, const __m256 mean[2], int n) {
    const __m256 v = _mm256_sub_ps(_mm256_sub_ps(x, mean[0]), mean[1]);
    return n >= 8 ? v : _mm256_and_ps(v, _mm256_castsi256_ps(first(n)));
}

/* x += bias, then LayerNorm of x to x and y. The sums are in double. */
AVX2 static void layernorm_row(float *y, float *x, const float *bias, const float *w,
                               const float *b, int n, float eps) {
    __m256d sum[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    for (int i = 0; i < n; i += 8) {
        __m256 v = load_first(x + i, n - i);
        if (bias) store_first(x + i, v = _mm256_add_ps(v, load_first(bias + i, n - i)), n - i);
        sum[0] = _mm256_add_pd(sum[0], _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
        sum[1] = _mm256_add_pd(sum[1], _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    }
    const double middle = total_double(sum) / n;
    const __m256 mean[2] = {_mm256_set1_ps((float)middle),
                            _mm256_set1_ps((float)(middle - (float)middle))};
    sum[0] = sum[1] = _mm256_setzero_pd(); /* of squares */
    for (int i = 0; i < n; i += 8) {
        const __m256 v = centred(load_first(x + i, n - i), mean, n - i);
        const __m256d lo = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
        const __m256d hi = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
        sum[0] = _mm256_fmadd_pd(lo, lo, sum[0]);
        sum[1] = _mm256_fmadd_pd(hi, hi, sum[1]);
    }
    const __m256 scale = _mm256_set1_ps((float)(1 / sqrt(total_double(sum) / n + (double)eps)));
    for (int i = 0; i < n; i += 8) {
        __m256 v = _mm256_mul_ps(centred(load_first(x + i, n - i), mean, n - i), scale);
        v = _mm256_fmadd_ps(v, load_first(w + i, n - i), load_first(b + i, n - i));
        store_first(x + i, v, n - i);
        store_first(y + i, v, n - i);
    }
}

/* ---- matmul: y = alpha x W^T --------------------------------------------------------------------
 * A panel is KC columns of NR rows of W as floats, the k-th numbers of all rows side by side
 * (packed_gemm.h has a picture of panels). A register tile multiplies it by up to MR rows of x: per
 * column two loads and MR broadcasts feed 2 MR multiply-adds of 8 numbers, which keeps both FMA
 * units busy. A work item is GROUP panels times up to ITEM_ROWS rows. Converting a number of W from
 * half costs about 0.3 cycles, shared by the item's rows, each of which costs 1/16 cycle.
 *
 * With up to FEW_ROWS rows of x the time goes into reading W from memory. Then the transposed
 * numbers go from registers into the sums, and no panel is written. */

/* acc += rows of x (at x, x + ldx, ...) times a panel (n, NR) */
TEMPLATE void tile(__m256 acc[MR][2], int rows, const float *x, size_t ldx, const float *panel,
                   int n) {
    const float *row[MR];
    for (int i = 0; i < rows; i++) row[i] = x + i * ldx;
    for (int k = 0; k < n; k++) {
        const __m256 lo = _mm256_load_ps(panel + k * NR), hi = _mm256_load_ps(panel + k * NR + 8);
        for (int i = 0; i < rows; i++) {
            const __m256 xi = _mm256_broadcast_ss(row[i] + k);
            acc[i][0] = _mm256_fmadd_ps(xi, lo, acc[i][0]);
            acc[i][1] = _mm256_fmadd_ps(xi, hi, acc[i][1]);
        }
    }
}

typedef struct { /* y (rows, cols) = (add ? y : 0) + factor * sums */
    float *y;
    size_t ldy;
    int cols, add;
    float factor;
} epilogue;

/* y (rows, cols) = (add ? y : 0) + factor acc. No branch may depend on i or h: compilers would then
 * keep the sums in memory throughout the tile. */
TEMPLATE void tile_write(const epilogue *o, int rows, __m256 acc[MR][2], int whole, int add) {
    const __m256 factor = _mm256_set1_ps(o->factor);
    const __m256i mask[2] = {first(o->cols), first(o->cols - 8)};
    for (int i = 0; i < rows; i++)
        for (int h = 0; h < 2; h++) {
            float *y = o->y + i * o->ldy + 8 * h;
            __m256 v = _mm256_mul_ps(factor, acc[i][h]);
            if (add && whole) v = _mm256_fmadd_ps(factor, acc[i][h], _mm256_loadu_ps(y));
            if (add && !whole)
                v = _mm256_fmadd_ps(factor, acc[i][h], _mm256_maskload_ps(y, mask[h]));
            if (whole)
                _mm256_storeu_ps(y, v);
            else
                _mm256_maskstore_ps(y, mask[h], v);
        }
}

TEMPLATE void tile_store(const epilogue *o, int rows, __m256 acc[MR][2]) {
    if (o->cols < NR) {
        if (o->add)
            tile_write(o, rows, acc, 0, 1);
        else
            tile_write(o, rows, acc, 0, 0);
    } else {
        if (o->add)
            tile_write(o, rows, acc, 1, 1);
        else
            tile_write(o, rows, acc, 1, 0);
    }
}

TEMPLATE void tile_rows(const epilogue *o, int rows, const float *x, size_t ldx, const float *panel,
                        int n) {
    __m256 acc[MR][2];
    for (int i = 0; i < rows; i++) acc[i][0] = acc[i][1] = _mm256_setzero_ps();
    for (int i = 0; i < rows; i++) _mm_prefetch((const char *)(o->y + i * o->ldy), _MM_HINT_T0);
    tile(acc, rows, x, ldx, panel, n);
    tile_store(o, rows, acc);
}

/* All rows of x times one panel, in register tiles of about equal height */
AVX2 static void sweep(epilogue o, int rows, const float *x, size_t ldx, const float *panel,
                       int n) {
    for (int left = ceil_div(rows, MR); left; left--) {
        const int m = ceil_div(rows, left);
        switch (m) {
        case 6:
            tile_rows(&o, 6, x, ldx, panel, n);
            break;
        case 5:
            tile_rows(&o, 5, x, ldx, panel, n);
            break;
        case 4:
            tile_rows(&o, 4, x, ldx, panel, n);
            break;
        case 3:
            tile_rows(&o, 3, x, ldx, panel, n);
            break;
        case 2:
            tile_rows(&o, 2, x, ldx, panel, n);
            break;
        default:
            tile_rows(&o, 1, x, ldx, panel, n);
            break;
        }
        x += m * ldx, o.y += m * o.ldy, rows -= m;
    }
}

/* Pointers to NR rows of W and, of INT8, to their scales. Rows past the last repeat it. */
typedef struct {
    const uint8_t *row[NR];
    const float *scale[NR];
} w_rows;

static int bytes_of(qemb_dtype dtype) { return dtype == QEMB_I8 ? 1 : 2; }

static void find_rows(w_rows *r, const qemb_mat *w, int n0) {
    const size_t bytes = (size_t)w->cols * bytes_of(w->dtype);
    for (int j = 0; j < NR; j++) {
        const size_t n = (size_t)min_int(n0 + j, w->rows - 1);
        r->row[j] = (const uint8_t *)w->data + n * bytes;
        r->scale[j] = w->scale ? w->scale + n * QEMB_GROUPS(w->cols) : NULL;
    }
}

/* scale (NR) = the rows' scales of the group that begins at column k, if one does */
TEMPLATE void next_scales(qemb_dtype dtype, __m256 scale[2], const w_rows *w, int k) {
    float s[NR];
    if (dtype != QEMB_I8 || k % QEMB_GROUP) return;
    for (int j = 0; j < NR; j++) s[j] = w->scale[j][k / QEMB_GROUP];
    scale[0] = _mm256_loadu_ps(s), scale[1] = _mm256_loadu_ps(s + 8);
}

/* Half h of a column of NR weights as they were loaded */
TEMPLATE __m256 column_floats(qemb_dtype dtype, __m256i col, const __m256 scale[2], int h) {
    const __m128i v = h ? _mm256_extracti128_si256(col, 1) : _mm256_castsi256_si128(col);
    if (dtype == QEMB_F16) return _mm256_cvtph_ps(v);
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(v)), scale[h]);
}

/* 8 numbers of 16 bits each: halves, or INT8 weights widened to 16 bits */
TEMPLATE __m128i load8(qemb_dtype dtype, const uint8_t *row) {
    return dtype == QEMB_F16 ? _mm_loadu_si128((const __m128i *)row)
                             : _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)row));
}

/* col[c] = the NR numbers of column k+c, c < 8; zeros for c >= n */
TEMPLATE void transpose_rows(qemb_dtype dtype, __m256i col[8], const w_rows *w, int k, int n) {
    const size_t bytes = bytes_of(dtype);
    const uint8_t *const *row = w->row;
    __m256i a[8], b[8];
    if (n >= 8) {
        for (int j = 0; j < 8; j++)
            a[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(load8(dtype, row[j] + k * bytes)),
                                           load8(dtype, row[j + 8] + k * bytes), 1);
    } else {
        for (int j = 0; j < 8; j++) {
            uint8_t tail[2][16] = {{0}};
            memcpy(tail[0], row[j] + k * bytes, (size_t)n * bytes);
            memcpy(tail[1], row[j + 8] + k * bytes, (size_t)n * bytes);
            a[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(load8(dtype, tail[0])),
                                           load8(dtype, tail[1]), 1);
        }
    }
    for (int j = 0; j < 8; j += 2) {
        b[j] = _mm256_unpacklo_epi16(a[j], a[j + 1]);
        b[j + 1] = _mm256_unpackhi_epi16(a[j], a[j + 1]);
    }
    for (int j = 0; j < 8; j += 4)
        for (int h = 0; h < 2; h++) {
            a[j + 2 * h] = _mm256_unpacklo_epi32(b[j + h], b[j + h + 2]);
            a[j + 2 * h + 1] = _mm256_unpackhi_epi32(b[j + h], b[j + h + 2]);
        }
    for (int c = 0; c < 4; c++) {
        col[2 * c] = _mm256_unpacklo_epi64(a[c], a[c + 4]);
        col[2 * c + 1] = _mm256_unpackhi_epi64(a[c], a[c + 4]);
    }
}

/* The distance in numbers from the columns that are packed now, from k0 on, to those that are
 * packed next: the following KC columns, or the first ones of the following NR rows. */
static ptrdiff_t next_columns(int k0, int K) { return k0 + KC < K ? KC : (ptrdiff_t)NR * K - k0; }

TEMPLATE void prefetch_rows(qemb_dtype dtype, const w_rows *w, int k, ptrdiff_t ahead) {
    const size_t bytes = bytes_of(dtype), next = k * bytes + bytes * (size_t)ahead;
    if (k * bytes % 64 == 0) /* a cache line */
        for (int j = 0; j < NR; j++)
            _mm_prefetch((const char *)((uintptr_t)w->row[j] + next), _MM_HINT_T1);
}

/* panel (n, NR) = columns k0 .. k0+n-1 of the rows */
TEMPLATE void pack_columns(qemb_dtype dtype, float *panel, const w_rows *w, int k0, int n,
                           ptrdiff_t ahead) {
    __m256 scale[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int k = 0; k < n; k += 8) {
        __m256i col[8];
        prefetch_rows(dtype, w, k0 + k, ahead);
        next_scales(dtype, scale, w, k0 + k);
        transpose_rows(dtype, col, w, k0 + k, n - k);
        for (int c = 0; c < min_int(8, n - k); c++)
            for (int h = 0; h < 2; h++)
                _mm256_store_ps(panel + (k + c) * NR + 8 * h,
                                column_floats(dtype, col[c], scale, h));
    }
}

AVX2 static void pack_panel(qemb_dtype dtype, float *panel, const w_rows *w, int k0, int n,
                            ptrdiff_t ahead) {
    if (dtype == QEMB_I8)
        pack_columns(QEMB_I8, panel, w, k0, n, ahead);
    else
        pack_columns(QEMB_F16, panel, w, k0, n, ahead);
}

/* acc += rows of x times the first n of 8 columns of W */
TEMPLATE void few_columns(qemb_dtype dtype, __m256 acc[MR][2], int rows, const float *x, size_t ldx,
                          __m256i col[8], const __m256 scale[2], int n) {
    for (int c = 0; c < n; c++) {
        const __m256 lo = column_floats(dtype, col[c], scale, 0);
        const __m256 hi = column_floats(dtype, col[c], scale, 1);
        for (int i = 0; i < rows; i++) {
            const __m256 xi = _mm256_broadcast_ss(x + i * ldx + c);
            acc[i][0] = _mm256_fmadd_ps(xi, lo, acc[i][0]);
            acc[i][1] = _mm256_fmadd_ps(xi, hi, acc[i][1]);
        }
    }
}

/* Columns n0 .. n0+NR-1 of y for up to FEW_ROWS rows of x */
TEMPLATE void few_rows(qemb_dtype dtype, epilogue o, int rows, const float *x, const qemb_mat *w,
                       int n0) {
    const int K = w->cols;
    __m256 scale[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    w_rows r;
    find_rows(&r, w, n0);
    for (int k0 = 0; k0 < K; k0 += KC, o.add = 1) {
        const int n = min_int(KC, K - k0);
        const ptrdiff_t ahead = next_columns(k0, K);
        __m256 acc[MR][2];
        __m256i col[8];
        for (int i = 0; i < rows; i++) acc[i][0] = acc[i][1] = _mm256_setzero_ps();
        int k = k0;
        for (; k + 8 <= k0 + n; k += 8) {
            prefetch_rows(dtype, &r, k, ahead);
            next_scales(dtype, scale, &r, k);
            transpose_rows(dtype, col, &r, k, 8);
            few_columns(dtype, acc, rows, x + k, (size_t)K, col, scale, 8);
        }
        if (k < k0 + n) {
            next_scales(dtype, scale, &r, k);
            transpose_rows(dtype, col, &r, k, k0 + n - k);
            few_columns(dtype, acc, rows, x + k, (size_t)K, col, scale, k0 + n - k);
        }
        tile_store(&o, rows, acc);
    }
}

TEMPLATE void few_of(qemb_dtype dtype, epilogue o, int T, const float *x, const qemb_mat *w,
                     int n0) {
    switch (T) {
    case 5:
        few_rows(dtype, o, 5, x, w, n0);
        break;
    case 4:
        few_rows(dtype, o, 4, x, w, n0);
        break;
    case 3:
        few_rows(dtype, o, 3, x, w, n0);
        break;
    case 2:
        few_rows(dtype, o, 2, x, w, n0);
        break;
    default:
        few_rows(dtype, o, 1, x, w, n0);
        break;
    }
}

AVX2 static void matmul_few(epilogue o, int T, const float *x, const qemb_mat *w, int n0) {
    if (w->dtype == QEMB_I8)
        few_of(QEMB_I8, o, T, x, w, n0);
    else
        few_of(QEMB_F16, o, T, x, w, n0);
}

/* Rows 0 .. rows-1 of x times `panels` panels of W, from row n0 on */
AVX2 static void matmul_item(epilogue o, int rows, const float *x, const qemb_mat *w, int n0,
                             int panels) {
    const int K = w->cols;
    float packed[GROUP][KC * NR] __attribute__((aligned(64)));
    w_rows r[GROUP];
    for (int p = 0; p < panels; p++) find_rows(&r[p], w, n0 + p * NR);
    for (int k0 = 0; k0 < K; k0 += KC, o.add = 1) {
        const int n = min_int(KC, K - k0);
        for (int t = 0; t < rows; t += BLOCK_ROWS)
            for (int p = 0; p < panels; p++) {
                epilogue to = o;
                to.y += (size_t)t * o.ldy + n0 + p * NR;
                to.cols = w->rows - n0 - p * NR;
                if (!t) pack_panel(w->dtype, packed[p], &r[p], k0, n, next_columns(k0, K));
                sweep(to, min_int(BLOCK_ROWS, rows - t), x + (size_t)t * K + k0, (size_t)K,
                      packed[p], n);
            }
    }
}

typedef struct {
    float *y;
    const float *x;
    const qemb_mat *w;
    int T, add, rows, panels,
        groups; /* an item is rows of x times panels of W, of `groups` of these */
} matmul_job;

static void matmul_part(const void *job, work_item item) {
    const matmul_job *j = job;
    const int t = item.i / j->groups * j->rows, N = j->w->rows, p = item.i % j->groups * j->panels;
    const int end = min_int(p + j->panels, ceil_div(N, NR));
    epilogue o = {j->y + (size_t)t * N, (size_t)N, 0, j->add, j->w->alpha};
    if (j->T > FEW_ROWS) {
        matmul_item(o, min_int(j->rows, j->T - t), j->x + (size_t)t * j->w->cols, j->w, p * NR,
                    end - p);
        return;
    }
    for (int i = p; i < end; i++) {
        o.y = j->y + i * NR, o.cols = N - i * NR;
        matmul_few(o, j->T, j->x, j->w, i * NR);
    }
}

static void matmul_all(qemb_backend *be, float *y, const float *x, const qemb_mat *w, int T,
                       int add) {
    assert(w->dtype == QEMB_F16 || (w->dtype == QEMB_I8 && w->scale));
    const int all_panels = ceil_div(w->rows, NR), blocks = ceil_div(T, ITEM_ROWS);
    matmul_job j = {y, x, w, T, add, ceil_div(ceil_div(T, blocks), MR) * MR, 0, 0};
    /* fewer panels an item where a thread would have fewer than four items, so that threads end
     * together */
    j.panels = max_int(1, min_int(GROUP, all_panels * blocks / (4 * be->threads)));
    j.groups = ceil_div(all_panels, j.panels);
    cpu_parallel(be->pool, ceil_div(T, j.rows) * j.groups, matmul_part, &j);
}

static void avx2_matmul(qemb_backend *be, qemb_act *y, const qemb_act *x, const qemb_mat *w,
                        const float *bias, int T) {
    matmul_all(be, f32(y), cf32(x), w, T, 0);
    simd_add_bias(be, y, bias, T, w->rows);
}

static void avx2_matmul_gelu(qemb_backend *be, qemb_act *h, const qemb_act *x, const qemb_mat *w,
                             const float *bias, int T) {
    matmul_all(be, f32(h), cf32(x), w, T, 0);
    simd_gelu(be, h, bias, T, w->rows);
}

static void avx2_matmul_add(qemb_backend *be, float *x, const qemb_act *a, const qemb_mat *w,
                            int T) {
    matmul_all(be, x, cf32(a), w, T, 1);
}

/* ---- qknorm_rope ----------------------------------------------------------------------------- */

AVX2 static void norm_rotate(float *head, const float *w, const float *cosines, const float *sines,
                             int half, float eps) {
    const __m256 scale = _mm256_set1_ps(rms_scale(head, 2 * half, eps));
    for (int i = 0; i < half; i += 8) {
        const int n = half - i;
        const __m256 a =
            _mm256_mul_ps(_mm256_mul_ps(load_first(head + i, n), scale), load_first(w + i, n));
        const __m256 b = _mm256_mul_ps(_mm256_mul_ps(load_first(head + half + i, n), scale),
                                       load_first(w + half + i, n));
        const __m256 c = load_first(cosines + i, n), s = load_first(sines + i, n);
        store_first(head + i, _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)), n);
        store_first(head + half + i, _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s)), n);
    }
}

/* ---- attention ----------------------------------------------------------------------------------
 * A block of R rows (tokens x query heads of one kv head) walks over the keys in tiles. A row keeps
 * a maximum m, a sum l and weighted values O, which a tile's scores s_j and values v_j update:
 *
 *   m' = max(m, max_j s_j)
 *   l' = exp(m - m') l + sum_j exp(s_j - m')
 *   O' = exp(m - m') O + sum_j exp(s_j - m') v_j
 *
 * The row's output is O / l. Keys are packed as matmul's panels, of NR keys; values as panels of NR
 * dimensions: sweep multiplies both. Register tiles above the diagonal are skipped: their weights
 * are zeros, and adding zeros changes nothing. */

/* Pass 1: packs the keys and values of positions k0 .. k0+n-1. A panel is filled up with the last
 * key. */
AVX2 static void attention_load(const attention_tile *w, int k0, int n) {
    const int hd = w->hd;
    for (int j = 0; j < ceil_div(n, NR) * NR; j += 8) {
        const float *row[8];
        float *to = w->keys + j / NR * NR * hd + j % NR;
        int d = 0;
        for (int i = 0; i < 8; i++)
            row[i] = simd_attention_row(w, k0 + min_int(j + i, n - 1)) + w->k_col;
        for (; d + 8 <= hd; d += 8) {
            __m256 col[8];
            transpose_floats(col, row, d);
            for (int c = 0; c < 8; c++) _mm256_storeu_ps(to + (d + c) * NR, col[c]);
        }
        for (; d < hd; d++)
            for (int i = 0; i < 8; i++) to[d * NR + i] = row[i][d];
    }
    for (int j = 0; j < n; j++) {
        const float *row = simd_attention_row(w, k0 + j) + w->v_col;
        for (int d = 0; d < w->hdp; d += 8)
            _mm256_storeu_ps(w->values + (d / NR * KEYS + j) * NR + d % NR,
                             load_first(row + d, max_int(0, hd - d)));
    }
}

/* Pass 2: s (R, n) = q k^T */
AVX2 static void attention_scores(const attention_tile *w, int R, int q0, int k0, int n) {
    for (int j = 0; j < n; j += NR) {
        const int r = simd_first_seeing(w, q0, k0 + j);
        const epilogue o = {w->s + (size_t)r * KEYS + j, KEYS, NR, 0, 1};
        if (r < R)
            sweep(o, R - r, w->q + (size_t)r * w->hd, (size_t)w->hd, w->keys + j * w->hd, w->hd);
    }
}

/* Pass 3: m', l', the weights exp(s - m') in place of the scores, and exp(m - m') O. */
AVX2 static void attention_softmax(const attention_tile *w, int R, int q0, int k0) {
    for (int r = simd_first_seeing(w, q0, k0); r < R; r++) {
        float *s = w->s + (size_t)r * KEYS, *acc = w->acc + (size_t)r * w->hdp;
        const int visible = min_int(KEYS, simd_keys_seen(w, q0, r) - k0);
        const int end = round_up(visible, 8);
        const float before = w->max[r];
        __m256 m = _mm256_set1_ps(before), sum = _mm256_setzero_ps();
        for (int j = visible; j < end; j++) s[j] = -INFINITY;
        for (int j = 0; j < end; j += 8) m = _mm256_max_ps(m, _mm256_loadu_ps(s + j));
        w->max[r] = greatest(m);
        m = _mm256_set1_ps(w->max[r]);
        for (int j = 0; j < end; j += 8) {
            const __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(s + j), m));
            _mm256_storeu_ps(s + j, e);
            sum = _mm256_add_ps(sum, e);
        }
        for (int j = end; j < KEYS; j += 8) _mm256_storeu_ps(s + j, _mm256_setzero_ps());
        if (before != w->max[r]) { /* otherwise the factor is 1 */
            const __m256 older = exp8(_mm256_sub_ps(_mm256_set1_ps(before), m));
            for (int d = 0; d < w->hdp; d += 8)
                _mm256_storeu_ps(acc + d, _mm256_mul_ps(_mm256_loadu_ps(acc + d), older));
            w->sum[r] *= _mm256_cvtss_f32(older);
        }
        w->sum[r] += total(sum);
    }
}

/* Pass 4: O (R, hdp) += s v. Rows that see about the same number of keys are multiplied together,
 * in steps of NR keys. */
AVX2 static void attention_values(const attention_tile *w, int R, int q0, int k0, int n) {
    for (int r = simd_first_seeing(w, q0, k0), end; r < R; r = end) {
        const int depth = min_int(n, round_up(simd_keys_seen(w, q0, r) - k0, NR));
        end = depth == n ? R : simd_first_seeing(w, q0, k0 + depth);
        for (int d = 0; d < w->hdp; d += NR) {
            const epilogue o = {w->acc + (size_t)r * w->hdp + d, (size_t)w->hdp, NR, 1, 1};
            sweep(o, end - r, w->s + (size_t)r * KEYS, KEYS, w->values + d * KEYS, depth);
        }
    }
}

/* Tokens at positions q0 .. q0+n-1; token i's output goes to att + i*ld_att, G heads of hd. */
AVX2 static void attention_block(const attention_tile *w, float *att, size_t ld_att, int q0,
                                 int n) {
    const int G = w->G, hd = w->hd, R = n * G;
    const __m256 scale = _mm256_set1_ps((float)(1 / sqrt(hd)));
    for (int r = 0; r < R; r++) {
        const float *q = simd_attention_row(w, q0 + r / G) + w->q_col + r % G * hd;
        for (int d = 0; d < hd; d += 8)
            store_first(w->q + (size_t)r * hd + d, _mm256_mul_ps(load_first(q + d, hd - d), scale),
                        hd - d);
        w->max[r] = -INFINITY;
        w->sum[r] = 0;
    }
    memset(w->acc, 0, (size_t)R * w->hdp * sizeof(float));
    const int seen = simd_keys_seen(w, q0, R - 1);
    for (int k0 = 0; k0 < seen; k0 += KEYS) {
        const int keys = min_int(KEYS, seen - k0);
        attention_load(w, k0, keys);
        attention_scores(w, R, q0, k0, keys);
        attention_softmax(w, R, q0, k0);
        attention_values(w, R, q0, k0, keys);
    }
    for (int r = 0; r < R; r++) {
        float *out = att + r / G * ld_att + r % G * hd;
        const __m256 sum = _mm256_set1_ps(w->sum[r]);
        for (int d = 0; d < hd; d += 8) { /* + 0 turns -0, an underflow, into 0 */
            const __m256 v = _mm256_div_ps(_mm256_loadu_ps(w->acc + (size_t)r * w->hdp + d), sum);
            store_first(out + d, _mm256_add_ps(v, _mm256_setzero_ps()), hd - d);
        }
    }
}

/* ---- gate_up --------------------------------------------------------------------------------- */

AVX2 static void swiglu_row(float *h, const float *gate, const float *up, int n) {
    for (int i = 0; i < n; i += 8)
        store_first(h + i, swiglu8(load_first(gate + i, n - i), load_first(up + i, n - i)), n - i);
}

static void avx2_gate_up(qemb_backend *be, qemb_act *h, qemb_act *gu, const qemb_act *x,
                         const qemb_mat *w, int T) {
    avx2_matmul(be, gu, x, w, NULL, T);
    simd_swiglu(be, h, gu, T);
}

/* ---- the table ------------------------------------------------------------------------------- */

const cpu_kernels avx2_kernels = {.attention_rows = 128,
                                  .half = half_row,
                                  .rmsnorm = rmsnorm_row,
                                  .norm_rotate = norm_rotate,
                                  .layernorm = layernorm_row,
                                  .add = add_row,
                                  .gelu = gelu_row,
                                  .swiglu = swiglu_row,
                                  .attention = attention_block};

static int avx2_open(qemb_backend **be, const qemb_config *c, const qemb_options *opt,
                     qemb_err *err) {
    return simd_open(be, c, opt, &avx2_kernels, 0, 0, err);
}

const qemb_ops avx2_ops = {
    .name = "avx2",
    .act_size = sizeof(float),
    .open = avx2_open,
    .close = cpu_close,
    .load_weights = cpu_load_weights,
    .arena = cpu_arena,
    .begin = cpu_begin,
    .embed = simd_embed,
    .rmsnorm = simd_rmsnorm,
    .layernorm = simd_layernorm,
    .matmul = avx2_matmul,
    .matmul_add = avx2_matmul_add,
    .qknorm_rope = simd_qknorm_rope,
    .attention = simd_attention,
    .gate_up = avx2_gate_up,
    .matmul_gelu = avx2_matmul_gelu,
    .gather = cpu_gather,
    .gather_mean = simd_gather_mean,
    .pool = simd_pool,
};

#endif
