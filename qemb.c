/* qemb.c - the model: Qwen3-Embedding from token ids to vectors, in plain C.
 *
 * Top to bottom: the ops in the order in which a token meets them (embed, rmsnorm, matmul,
 * qknorm_rope, attention, gate_up, pool); the table of these ops; the forward, qemb_forward, which
 * calls them and is the same for every backend; opening and closing; and the packer, which lays
 * many texts end to end so that nothing is padded.
 *
 * Every op computes a row from that row's inputs alone, attention and gather_mean from those of its
 * text. The instructions and their order are the same whatever T is and however threads divide the
 * rows. Therefore a text's vector has the same bits alone, in any batch and with any number of
 * threads.
 */
#include "lib/model.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum {
    MR = 6,    /* rows of x in a register tile, and */
    NR = 16,   /* rows of W: the tile's MR x NR sums stay in registers */
    KC = 256,  /* columns of a packed panel: KC x NR floats are half of a 32 KiB L1 cache */
    KEYS = 64, /* keys of an attention tile; tiles begin at multiples of it in absolute position */
    QUERIES = 32, /* tokens of an attention block */
};

static float *f32(qemb_act *a) { return (float *)a; }
static const float *cf32(const qemb_act *a) { return (const float *)a; }

/* What the items of an op read and write, which threads take one by one (threads.c). An op uses
 * some of these. */
typedef struct {
    const qemb_backend *be;
    float *y;
    float *x2;                      /* an input that is written too */
    const float *x, *w, *w2, *bias; /* inputs; weights that are vectors */
    const qemb_mat *matrix;
    const qemb_packed_batch *b;
    int T, flag;
} op_job;

enum { ROWS = 8 }; /* rows of an item of the ops that compute row by row */
static int row_items(int T) { return ceil_div(T, ROWS); }
/* Item i has rows ROWS*i .. rows_end-1. */
static int rows_end(const op_job *j, int i) { return min_int(j->T, ROWS * (i + 1)); }

/* ---- embed: rows of a table, or of two ------------------------------------------------------- */

/* x (T, D) = rows of tok_emb (V, D), plus rows of pos_emb (positions, D) */
static void cpu_embed(qemb_backend *be, float *x, const qemb_mat *tok_emb, const float *pos_emb,
                      const qemb_packed_batch *b) {
    const int D = be->c->hidden;
    for (int t = 0; t < b->T; t++) {
        assert(b->tokens[t] >= 0 && b->tokens[t] < tok_emb->rows);
        const uint16_t *row = (const uint16_t *)tok_emb->data + (size_t)b->tokens[t] * D;
        float *y = x + (size_t)t * D;
        for (int i = 0; i < D; i++) y[i] = half_to_float(row[i]);
        if (pos_emb) cpu_add_row(y, pos_emb + (size_t)b->pos[t] * D, D);
    }
}

/* ---- rmsnorm: y = x / sqrt(mean(x^2) + eps) * w  (Zhang and Sennrich 2019) ------------------- */

/* One row of n numbers; y may be x. The sum is in double, so its order does not matter to a
 * float. */
static void rmsnorm_row(float *y, const float *x, const float *w, int n, float eps) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)x[i] * x[i];
    const float scale = (float)(1 / sqrt(sum / n + eps));
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * w[i];
}

static void rmsnorm_item(const void *job, work_item item) {
    const op_job *j = job;
    const int D = j->be->c->hidden;
    for (int t = ROWS * item.i; t < rows_end(j, item.i); t++)
        rmsnorm_row(j->y + (size_t)t * D, j->x + (size_t)t * D, j->w, D, j->be->c->norm_eps);
}

static void cpu_rmsnorm(qemb_backend *be, qemb_act *y, const float *x, const float *w, int T) {
    const op_job j = {be, f32(y), .x = x, .w = w, .T = T};
    cpu_parallel(be->pool, row_items(T), rmsnorm_item, &j);
}

/* ---- layernorm: x = (x - mean) / sqrt(variance + eps) * w + b  (Ba et al. 2016) -------------- */

void cpu_layernorm_row(float *y, float *x, const float *bias, const float *w, const float *b, int n,
                       float eps) {
    double sum = 0, squares = 0;
    if (bias) cpu_add_row(x, bias, n);
    for (int i = 0; i < n; i++) sum += x[i];
    const double mean = sum / n;
    for (int i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
    const double scale = 1 / sqrt(squares / n + (double)eps);
    for (int i = 0; i < n; i++) y[i] = x[i] = (float)((x[i] - mean) * scale) * w[i] + b[i];
}

static void layernorm_item(const void *job, work_item item) {
    const op_job *j = job;
    const int D = j->be->c->hidden;
    for (int t = ROWS * item.i; t < rows_end(j, item.i); t++)
        cpu_layernorm_row(j->y + (size_t)t * D, j->x2 + (size_t)t * D, j->bias, j->w, j->w2, D,
                          j->be->c->norm_eps);
}

static void cpu_layernorm(qemb_backend *be, qemb_act *y, float *x, const float *bias,
                          const float *w, const float *b, int T) {
    const op_job j = {be, f32(y), .x2 = x, .bias = bias, .w = w, .w2 = b, .T = T};
    cpu_parallel(be->pool, row_items(T), layernorm_item, &j);
}

/* ---- matmul: y = x W^T + bias -------------------------------------------------------------------
 * Nearly all of the model's time. matmul_panel converts NR rows of W to float and packs them into a
 * panel, in which the k-th numbers of all NR rows are neighbours. Then MR rows of x at a time pass
 * over the panel, and each of the MR x NR sums has a register. A sum covers KC columns; then it is
 * added to y. The rounding error grows with KC + K/KC terms instead of K. docs/matmul.md explains
 * this product and the faster ones. */

/* acc (MR, NR) += x (MR, n) w (n, NR): row i of x starts at x[i], row k of w at w + k*ldw. */
INLINE void tile(float acc[MR][NR], const float *const x[MR], const float *w, size_t ldw, int n) {
    for (int k = 0; k < n; k++)
        for (int i = 0; i < MR; i++)
            for (int j = 0; j < NR; j++) acc[i][j] += x[i][k] * w[(size_t)k * ldw + j];
}

/* rows (MR) = pointers to rows t .. t+MR-1 of x (T, ld). Past the end the last row is repeated: a
 * tile is always whole, so that a row meets the same instructions wherever it stands. */
INLINE void tile_rows(const float *rows[MR], const float *x, size_t ld, int t, int T) {
    for (int i = 0; i < MR; i++) rows[i] = x + (size_t)min_int(t + i, T - 1) * ld;
}

/* W[r][c] */
INLINE float weight(const qemb_mat *w, int r, int c) {
    const size_t i = (size_t)r * w->cols + c;
    if (w->dtype == QEMB_F16) return half_to_float(((const uint16_t *)w->data)[i]);
    return w->scale[(size_t)r * QEMB_GROUPS(w->cols) + c / QEMB_GROUP] *
           ((const int8_t *)w->data)[i];
}

/* Columns n0 .. n0+NR-1 of y (T, N) = (add ? y : 0) + alpha * x (T, K) W^T,  W (N, K) */
static void matmul_panel(float *y, const float *x, const qemb_mat *w, int T, int n0, int add) {
    const int N = w->rows, K = w->cols, cols = min_int(NR, N - n0);
    float panel[KC * NR] __attribute__((aligned(64)));
    for (int k0 = 0; k0 < K; k0 += KC) {
        const int n = min_int(KC, K - k0);
        for (int j = 0; j < NR; j++) {
            const int row = min_int(n0 + j, N - 1);
            for (int k = 0; k < n; k++) panel[k * NR + j] = weight(w, row, k0 + k);
        }
        for (int t = 0; t < T; t += MR) {
            float acc[MR][NR] = {{0}};
            const float *rows[MR];
            tile_rows(rows, x + k0, (size_t)K, t, T);
            tile(acc, rows, panel, NR, n);
            for (int i = 0; i < min_int(MR, T - t); i++) {
                float *yi = y + (size_t)(t + i) * N + n0;
                for (int j = 0; j < cols; j++)
                    yi[j] = (add || k0 ? yi[j] : 0) + w->alpha * acc[i][j];
            }
        }
    }
}

static void matmul_item(const void *job, work_item item) {
    const op_job *j = job;
    matmul_panel(j->y, j->x, j->matrix, j->T, NR * item.i, j->flag);
}

static void matmul_all(qemb_backend *be, float *y, const float *x, const qemb_mat *w, int T,
                       int add) {
    assert(w->dtype == QEMB_F16 || w->dtype == QEMB_I8);
    const op_job j = {be, y, .x = x, .matrix = w, .T = T, .flag = add};
    cpu_parallel(be->pool, ceil_div(w->rows, NR), matmul_item, &j);
}

void cpu_add_row(float *y, const float *x, int n) {
    for (int i = 0; i < n; i++) y[i] += x[i];
}

static void bias_item(const void *job, work_item item) {
    const op_job *j = job;
    const int N = j->matrix->rows;
    for (int t = ROWS * item.i; t < rows_end(j, item.i); t++)
        cpu_add_row(j->y + (size_t)t * N, j->bias, N);
}

/* y (T, out) = alpha x W^T + bias */
static void cpu_matmul(qemb_backend *be, qemb_act *y, const qemb_act *x, const qemb_mat *w,
                       const float *bias, int T) {
    matmul_all(be, f32(y), cf32(x), w, T, 0);
    const op_job j = {be, f32(y), .matrix = w, .bias = bias, .T = T};
    if (bias) cpu_parallel(be->pool, row_items(T), bias_item, &j);
}

/* x (T, out) += alpha a W^T: a projection with its residual connection */
static void cpu_matmul_add(qemb_backend *be, float *x, const qemb_act *a, const qemb_mat *w,
                           int T) {
    matmul_all(be, x, cf32(a), w, T, 1);
}

/* ---- qknorm_rope: normalise every query and key head, then rotate it by its position --------- */

/* Extends the table of cosines and sines to n positions. As in transformers, the frequency
 * theta^(-2i/hd) and its product with the position are rounded to float (Su et al. 2021). */
static void rope_extend(qemb_backend *be, int n) {
    const int half = be->c->head_dim / 2;
    for (; be->rope_rows < n; be->rope_rows++) {
        float *cosines = be->rope + (size_t)be->rope_rows * 2 * half, *sines = cosines + half;
        for (int i = 0; i < half; i++) {
            const float freq = (float)(1 / pow(be->c->rope_theta, (double)i / half));
            const float angle = (float)be->rope_rows * freq;
            cosines[i] = (float)cos(angle);
            sines[i] = (float)sin(angle);
        }
    }
}

/* (a, b) -> (a cos - b sin, b cos + a sin) for a in the head's first half and b in its second */
static void rotate(float *head, const float *cosines, const float *sines, int half) {
    for (int i = 0; i < half; i++) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

static void qknorm_rope_item(const void *job, work_item item) {
    const op_job *j = job;
    const qemb_config *c = j->be->c;
    const int H = c->n_heads, K = c->n_kv_heads, hd = c->head_dim;
    for (int t = ROWS * item.i; t < rows_end(j, item.i); t++) {
        const float *cosines = j->be->rope + (size_t)j->b->pos[t] * hd, *sines = cosines + hd / 2;
        float *head = j->y + (size_t)t * (H + 2 * K) * hd;
        for (int h = 0; h < H + K; h++, head += hd) { /* the K value heads stay as they are */
            rmsnorm_row(head, head, h < H ? j->w : j->w2, hd, c->norm_eps);
            rotate(head, cosines, sines, hd / 2);
        }
    }
}

static void cpu_qknorm_rope(qemb_backend *be, qemb_act *qkv, const float *q_norm,
                            const float *k_norm, const qemb_packed_batch *b) {
    const op_job j = {be, f32(qkv), .w = q_norm, .w2 = k_norm, .b = b, .T = b->T};
    cpu_parallel(be->pool, row_items(b->T), qknorm_rope_item, &j);
}

/* ---- attention: grouped queries, softmax computed online ----------------------------------------
 * Each of the K key/value heads serves G = H/K query heads. A block is QUERIES tokens x G heads of
 * one kv head. Its rows walk over the keys in tiles of KEYS. A row keeps a running maximum m, a sum
 * l and weighted values O. A tile with scores s_j and values v_j updates them:
 *
 *   m' = max(m, max_j s_j)
 *   l' = exp(m - m') l + sum_j exp(s_j - m')
 *   O' = exp(m - m') O + sum_j exp(s_j - m') v_j
 *
 * from m = -inf, l = 0, O = 0; in the end the row's output is O / l (Milakov and Gimelshein 2018;
 * Dao et al. 2022). Memory does not grow with the text. Tiles begin at multiples of KEYS in
 * absolute position, whether a key lies in the shared prefix or in the text's own rows: sharing the
 * prefix changes no bit. */

typedef struct {      /* the keys and values that a block may see, and its scratch memory */
    const float *qkv; /* (T, ld) */
    size_t ld;
    int prefix, own; /* position p is row p of qkv if p < prefix, else row own + p - prefix */
    int all;         /* keys that every row sees; 0: those up to its own position */
    int q_col, k_col, v_col; /* where the heads begin in a row */
    int G, hd, hdp;          /* hdp: hd rounded up to NR */
    float *kt;               /* (hd, KEYS)        a tile's keys, transposed */
    float *v;                /* (KEYS, hdp)       its values */
    float *q;                /* (QUERIES*G, hd)   the block's queries, scaled */
    float *s;                /* (QUERIES*G, KEYS) scores, then weights */
    float *acc;              /* (QUERIES*G, hdp)  O */
    float *m, *l;            /* (QUERIES*G) */
} attention_work;

static size_t attention_scratch_floats(const qemb_config *c) {
    const size_t R = (size_t)QUERIES * (size_t)(c->n_heads / c->n_kv_heads);
    const size_t hd = (size_t)c->head_dim, hdp = (size_t)round_up(c->head_dim, NR);
    return KEYS * (hd + hdp) + R * (hd + KEYS + hdp + 2);
}

static const float *attention_row(const attention_work *w, int p) {
    return w->qkv + (size_t)(p < w->prefix ? p : w->own + p - w->prefix) * w->ld;
}

/* Pass 1: load the tile's keys and values, positions k0 .. k0+n-1, and zeros for missing keys. */
INLINE void attention_load(const attention_work *w, int k0, int n) {
    for (int j = 0; j < KEYS; j++) {
        const float *row = attention_row(w, k0 + min_int(j, n - 1));
        for (int d = 0; d < w->hd; d++) w->kt[d * KEYS + j] = j < n ? row[w->k_col + d] : 0;
        for (int d = 0; d < w->hdp; d++)
            w->v[j * w->hdp + d] = j < n && d < w->hd ? row[w->v_col + d] : 0;
    }
}

/* Pass 2: s (R, KEYS) = q k^T */
INLINE void attention_scores(const attention_work *w, int R) {
    for (int r = 0; r < R; r += MR) {
        const float *rows[MR];
        tile_rows(rows, w->q, (size_t)w->hd, r, R);
        for (int j = 0; j < KEYS; j += NR) {
            float acc[MR][NR] = {{0}};
            tile(acc, rows, w->kt + j, KEYS, w->hd);
            for (int i = 0; i < min_int(MR, R - r); i++)
                memcpy(w->s + (size_t)(r + i) * KEYS + j, acc[i], sizeof acc[i]);
        }
    }
}

/* The number of keys, from position 0 on, that row r of a block sees that begins at position q0 */
static int keys_seen(const attention_work *w, int q0, int r) {
    return w->all ? w->all : q0 + r / w->G + 1;
}

/* Pass 3: m, l and O as above; scores become weights. A row sees `visible` keys of the tile. */
INLINE void attention_softmax(const attention_work *w, int R, int q0, int k0) {
    for (int r = 0; r < R; r++) {
        float *s = w->s + (size_t)r * KEYS, *acc = w->acc + (size_t)r * w->hdp;
        const int visible = max_int(0, min_int(KEYS, keys_seen(w, q0, r) - k0));
        float m = w->m[r], sum = 0;
        for (int j = 0; j < visible; j++) m = s[j] > m ? s[j] : m;
        for (int j = 0; j < visible; j++) sum += s[j] = expf(s[j] - m);
        for (int j = visible; j < KEYS; j++) s[j] = 0;
        const float older = expf(w->m[r] - m);
        for (int d = 0; d < w->hdp; d++) acc[d] *= older;
        w->l[r] = w->l[r] * older + sum;
        w->m[r] = m;
    }
}

/* Pass 4: O (R, hdp) += s v */
INLINE void attention_values(const attention_work *w, int R) {
    for (int r = 0; r < R; r += MR) {
        const float *rows[MR];
        tile_rows(rows, w->s, KEYS, r, R);
        for (int d = 0; d < w->hdp; d += NR) {
            float acc[MR][NR];
            for (int i = 0; i < MR; i++)
                memcpy(acc[i], w->acc + (size_t)min_int(r + i, R - 1) * w->hdp + d, sizeof acc[i]);
            tile(acc, rows, w->v + d, (size_t)w->hdp, KEYS);
            for (int i = 0; i < min_int(MR, R - r); i++)
                memcpy(w->acc + (size_t)(r + i) * w->hdp + d, acc[i], sizeof acc[i]);
        }
    }
}

/* Attention of the tokens at positions q0 .. q0+n-1, n <= QUERIES. Token i's output, G heads of hd
 * numbers, goes to att + i*ld_att. */
static void attention_block(const attention_work *w, float *att, size_t ld_att, int q0, int n) {
    const int G = w->G, hd = w->hd, R = n * G;
    const float scale = (float)(1 / sqrt(hd));
    for (int r = 0; r < R; r++) {
        const float *q = attention_row(w, q0 + r / G) + w->q_col + r % G * hd;
        for (int d = 0; d < hd; d++) w->q[r * hd + d] = q[d] * scale;
        w->m[r] = -INFINITY;
        w->l[r] = 0;
    }
    memset(w->acc, 0, (size_t)R * w->hdp * sizeof(float));
    const int seen = keys_seen(w, q0, R - 1);
    for (int k0 = 0; k0 < seen; k0 += KEYS) {
        attention_load(w, k0, min_int(KEYS, seen - k0));
        attention_scores(w, R);
        attention_softmax(w, R, q0, k0);
        attention_values(w, R);
    }
    for (int r = 0; r < R; r++)
        for (int d = 0; d < hd; d++) /* + 0 turns -0, an underflow, into 0 */
            att[r / G * ld_att + r % G * hd + d] = w->acc[r * w->hdp + d] / w->l[r] + 0.0f;
}

static attention_work attention_setup(const qemb_backend *be, const float *qkv, int kv_head,
                                      int thread) {
    const qemb_config *c = be->c;
    const int H = c->n_heads, K = c->n_kv_heads, hd = c->head_dim, G = H / K, R = QUERIES * G;
    attention_work w = {.qkv = qkv, .ld = (size_t)(H + 2 * K) * hd, .G = G, .hd = hd};
    w.hdp = round_up(hd, NR);
    w.q_col = kv_head * G * hd;
    w.k_col = (H + kv_head) * hd;
    w.v_col = (H + K + kv_head) * hd;
    w.kt = be->scratch + (size_t)thread * be->scratch_floats;
    w.v = w.kt + hd * KEYS;
    w.q = w.v + KEYS * w.hdp;
    w.s = w.q + (size_t)R * hd;
    w.acc = w.s + (size_t)R * KEYS;
    w.m = w.acc + (size_t)R * w.hdp;
    w.l = w.m + R;
    return w;
}

/* An item is a kv head of a segment. Segment 0 is the shared prefix, which attends to itself;
 * segment i is text i-1. */
static void attention_item(const void *job, work_item item) {
    const op_job *j = job;
    const qemb_packed_batch *b = j->b;
    const int K = j->be->c->n_kv_heads, i = item.i / K;
    const size_t ld_att = (size_t)j->be->c->n_heads * j->be->c->head_dim;
    attention_work w = attention_setup(j->be, j->x, item.i % K, item.thread);
    const int first = i ? b->cu[i - 1] : 0, end = b->cu[i];
    const int stop = min_int(end, qemb_end_row(b));
    w.prefix = i ? b->P : 0;
    w.own = first;
    w.all = b->bidirectional ? end - first : 0;
    float *out = j->y + w.q_col;
    if (j->flag != QEMB_ALL_ROWS) {
        const int q0 = j->flag == QEMB_FIRST_ROWS ? 0 : w.prefix + end - 1 - first;
        if (i) attention_block(&w, out + (i - 1) * ld_att, ld_att, q0, 1);
        return;
    }
    for (int t = max_int(first, qemb_first_row(b)); t < stop; t += QUERIES)
        attention_block(&w, out + t * ld_att, ld_att, w.prefix + t - first,
                        min_int(QUERIES, stop - t));
}

static void cpu_attention(qemb_backend *be, qemb_act *att, const qemb_act *qkv,
                          const qemb_packed_batch *b, qemb_rows rows) {
    const op_job j = {be, f32(att), .x = cf32(qkv), .b = b, .flag = (int)rows};
    cpu_parallel(be->pool, (b->B + 1) * be->c->n_kv_heads, attention_item, &j);
}

/* ---- gate_up: h = silu(gate) * up  (Shazeer 2020) -------------------------------------------- */

static void swiglu_item(const void *job, work_item item) {
    const op_job *j = job;
    const int F = j->be->c->ffn;
    for (int t = ROWS * item.i; t < rows_end(j, item.i); t++) {
        const float *gate = j->x + (size_t)t * 2 * F, *up = gate + F;
        float *h = j->y + (size_t)t * F;
        for (int i = 0; i < F; i++) h[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
    }
}

static void cpu_gate_up(qemb_backend *be, qemb_act *h, qemb_act *gu, const qemb_act *x,
                        const qemb_mat *w, int T) {
    cpu_matmul(be, gu, x, w, NULL, T);
    const op_job j = {be, f32(h), .x = cf32(gu), .T = T};
    cpu_parallel(be->pool, row_items(T), swiglu_item, &j);
}

/* ---- matmul_gelu: h = gelu(x W^T + bias)  (Hendrycks and Gimpel 2016) ------------------------ */

void cpu_gelu_row(float *h, const float *bias, int n) {
    for (int i = 0; i < n; i++) {
        const double t = (double)h[i] + (double)bias[i];
        h[i] = (float)(t / 2 * erfc(-t * M_SQRT1_2)); /* 1 + erf(t) loses what cancels: t < 0 */
    }
}

static void gelu_item(const void *job, work_item item) {
    const op_job *j = job;
    const int F = j->matrix->rows;
    for (int t = ROWS * item.i; t < rows_end(j, item.i); t++)
        cpu_gelu_row(j->y + (size_t)t * F, j->bias, F);
}

static void cpu_matmul_gelu(qemb_backend *be, qemb_act *h, const qemb_act *x, const qemb_mat *w,
                            const float *bias, int T) {
    cpu_matmul(be, h, x, w, NULL, T);
    const op_job j = {be, f32(h), .matrix = w, .bias = bias, .T = T};
    cpu_parallel(be->pool, row_items(T), gelu_item, &j);
}

/* ---- pool: a text's vector is its last or first token's row, or the mean of its rows --------- */

void cpu_gather(qemb_backend *be, float *y, const float *x, const qemb_packed_batch *b,
                qemb_rows rows) {
    const size_t D = (size_t)be->c->hidden;
    for (int i = 0; i < b->B; i++) {
        const int row = rows == QEMB_FIRST_ROWS ? b->cu[i] : b->cu[i + 1] - 1;
        memcpy(y + i * D, x + row * D, D * sizeof *y);
    }
}

/* sum (n) += rows first .. end-1 of x, ld apart */
static void add_rows(double *sum, const float *x, size_t ld, int first, int end, int n) {
    for (int t = first; t < end; t++)
        for (int k = 0; k < n; k++) sum[k] += x[t * ld + k];
}

/* Every column is summed in double in the order of positions: the prefix first, once for all
 * texts. */
void cpu_mean_rows(const qemb_backend *be, float *y, const float *x, const qemb_packed_batch *b) {
    enum { COLUMNS = 64 };
    const size_t D = (size_t)be->c->hidden;
    for (size_t d = 0; d < D; d += COLUMNS) {
        const int n = min_int(COLUMNS, (int)(D - d));
        double prefix[COLUMNS] = {0};
        add_rows(prefix, x + d, D, 0, b->P, n);
        for (int i = 0; i < b->B; i++) {
            double sum[COLUMNS];
            memcpy(sum, prefix, sizeof sum);
            add_rows(sum, x + d, D, b->cu[i], b->cu[i + 1], n);
            for (int k = 0; k < n; k++)
                y[i * D + d + k] = (float)(sum[k] / (b->P + b->cu[i + 1] - b->cu[i]));
        }
    }
}

static void cpu_gather_mean(qemb_backend *be, float *y, float *x, const float *w,
                            const qemb_packed_batch *b) {
    if (w) cpu_rmsnorm(be, (qemb_act *)x, x, w, b->T);
    cpu_mean_rows(be, y, x, b);
}

static int cpu_pool(qemb_backend *be, float *out, float *x, const float *w, int B) {
    if (w)
        cpu_rmsnorm(be, (qemb_act *)out, x, w, B);
    else
        memcpy(out, x, (size_t)B * (size_t)be->c->hidden * sizeof *x);
    return 0;
}

static double sum_of_squares(const float *x, int n) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)x[i] * x[i];
    return sum;
}

/* False for NaN, Inf and 0. */
static int is_length(double sum) { return sum > 0 && sum <= DBL_MAX; }

int qemb_has_length(const float *src, int dim) { return is_length(sum_of_squares(src, dim)); }

int qemb_l2_normalize(float *dst, const float *src, int dim) {
    const double sum = sum_of_squares(src, dim);
    if (!is_length(sum)) return -1;
    const double scale = 1 / sqrt(sum);
    for (int i = 0; i < dim; i++) dst[i] = (float)(src[i] * scale);
    return 0;
}

/* ---- the table ------------------------------------------------------------------------------- */

static int plain_open(qemb_backend **out, const qemb_config *c, const qemb_options *opt,
                      qemb_err *err) {
    return cpu_open(out, c, opt, attention_scratch_floats(c), 0, err);
}

int cpu_begin(qemb_backend *be, const qemb_packed_batch *b) {
    assert(!b->bidirectional || b->P == 0);
    int longest = b->P;
    for (int i = 0; i < b->B; i++) longest = max_int(longest, b->P + b->cu[i + 1] - b->cu[i]);
    if (be->rope) rope_extend(be, longest);
    return 0;
}

const qemb_ops qemb_cpu_ops = {
    .name = "plain",
    .act_size = sizeof(float),
    .open = plain_open,
    .close = cpu_close,
    .load_weights = cpu_load_weights,
    .arena = cpu_arena,
    .begin = cpu_begin,
    .embed = cpu_embed,
    .rmsnorm = cpu_rmsnorm,
    .layernorm = cpu_layernorm,
    .matmul = cpu_matmul,
    .matmul_add = cpu_matmul_add,
    .qknorm_rope = cpu_qknorm_rope,
    .attention = cpu_attention,
    .gate_up = cpu_gate_up,
    .matmul_gelu = cpu_matmul_gelu,
    .gather = cpu_gather,
    .gather_mean = cpu_gather_mean,
    .pool = cpu_pool,
};

/* ---- the model ------------------------------------------------------------------------------- */

static int padded_rows(const qemb_ops *ops, int T) { return ops->pad_rows ? ops->pad_rows(T) : T; }

/* Lays buffers for that many rows and texts, C rows in the MLP, end to end from base; returns their
 * bytes. a: NULL to count only. */
static size_t plan_activations(activations *a, const qemb_config *c, const qemb_ops *ops, int rows,
                               int texts, int mlp_rows, char *base) {
    const size_t R = (size_t)padded_rows(ops, rows), B = (size_t)padded_rows(ops, texts);
    const size_t C = (size_t)min_int((int)R, mlp_rows), D = (size_t)c->hidden;
    const size_t act = ops->act_size;
    const size_t Q = (size_t)c->n_heads * c->head_dim, KV = (size_t)c->n_kv_heads * c->head_dim;
    const size_t F = (size_t)c->ffn, gu = c->architecture == QEMB_QWEN3 ? C * 2 * F * act : 0;
    const size_t bytes[7] = {R * D * sizeof(float),
                             B * D * sizeof(float),
                             R * D * act,
                             R * (Q + 2 * KV) * act,
                             R * Q * act,
                             gu,
                             C * F * act};
    size_t at[8] = {0};
    for (int i = 0; i < 7; i++) at[i + 1] = at[i] + (bytes[i] + 255) / 256 * 256;
    if (a)
        *a = (activations){(float *)(base + at[0]),    (float *)(base + at[1]),
                           (qemb_act *)(base + at[2]), (qemb_act *)(base + at[3]),
                           (qemb_act *)(base + at[4]), (qemb_act *)(base + at[5]),
                           (qemb_act *)(base + at[6])};
    return at[7];
}

/* A long text has small steps, if the options name a function to be called between them. A step of
 * attention has fewer rows the more keys they see: with STEP_PAIRS pairs of query and key for each
 * thread it takes about as long as the other steps. */
steps steps_of(const qemb_model *m, const qemb_packed_batch *b) {
    enum { STEP_ROWS = 512, STEP_PAIRS = 1 << 20, FEW_QUERIES = 64 };
    const int mlp = m->opt.mlp_rows;
    if (!m->opt.between_steps || b->T <= m->opt.batch_tokens) return (steps){b->T, b->T, mlp, 0};
    const int queries = (int)((int64_t)STEP_PAIRS * m->opt.threads / b->T);
    return (steps){STEP_ROWS, max_int(FEW_QUERIES, min_int(queries, STEP_ROWS)),
                   min_int(mlp, STEP_ROWS), 1};
}

/* Rows r .. r+n-1 of b, or as many as there are, as a batch for qknorm_rope. */
static qemb_packed_batch rows_of(const qemb_packed_batch *b, int r, int n) {
    qemb_packed_batch some = *b;
    some.T = min_int(n, b->T - r);
    some.pos = b->pos + r;
    return some;
}

/* clang-format off */

/* The model, written once for every backend: x_last (B, D) = the texts' last rows, or the means of
 * their rows after the final norm. Returns 0, or 1 if the batch was given up between two steps. */
static int qemb_forward(qemb_model *m, const qemb_packed_batch *b) {
    const qemb_config *c = &m->file->config;
    const int mean = c->pooling == QEMB_POOL_MEAN, D = c->hidden, Q = c->n_heads * c->head_dim;
    const int QKV = Q + 2 * c->n_kv_heads * c->head_dim;
    const qemb_ops *op = m->ops;
    qemb_backend *be = m->be;
    const activations *a = &m->now.a;
    const steps step = steps_of(m, b);
    float *x = a->x;

    op->embed(be, x, &m->w.tok_emb, NULL, b);                               /* x   (T, D)         */
    for (int l = 0; l < c->n_layers; l++) {
        const qemb_layer *w = &m->w.layers[l];
        const int last = !mean && l == c->n_layers - 1; /* only the texts' last rows go on */
        const int rows = last ? b->B : b->T;

        for (int r = 0; r < b->T; r += step.rows) {
            const qemb_packed_batch some = rows_of(b, r, step.rows);
            qemb_act *qkv = act_row(op, a->qkv, r, QKV);
            op->rmsnorm(be, a->xn, x + (size_t)r * D, w->attn_norm, some.T); /* xn (n, D)         */
            op->matmul(be, qkv, a->xn, &w->wqkv, NULL, some.T);             /* qkv (n, (H+2K)*hd) */
            op->qknorm_rope(be, qkv, w->q_norm, w->k_norm, &some);
            if (pause_after_step(m, &step)) return 1;
        }
        for (int r = 0; r < rows; r += last ? rows : step.queries) {
            const qemb_packed_batch some = last ? *b : queries_of(b, r, step.queries);
            op->attention(be, a->att, a->qkv, &some, last ? QEMB_LAST_ROWS : QEMB_ALL_ROWS);
            if (pause_after_step(m, &step)) return 1;                       /* att (n, H*hd)      */
        }
        if (last) op->gather(be, a->x_last, x, b, QEMB_LAST_ROWS), x = a->x_last; /* (rows, D)    */
        for (int r = 0; r < rows; r += step.rows) {
            const int n = min_int(step.rows, rows - r);
            op->matmul_add(be, x + (size_t)r * D, act_row(op, a->att, r, Q), /* x  += att Wo^T    */
                           &w->wo, n);
            if (pause_after_step(m, &step)) return 1;
        }
        for (int r = 0; r < rows; r += step.mlp) {
            const int n = min_int(step.mlp, rows - r);
            float *xr = x + (size_t)r * D;                                  /* xr  (n, D)         */
            op->rmsnorm(be, a->xn, xr, w->mlp_norm, n);                     /* xn  (n, D)         */
            op->gate_up(be, a->h, a->gu, a->xn, &w->wgu, n);                /* h   (n, F)         */
            op->matmul_add(be, xr, a->h, &w->wdown, n);                     /* xr += h Wdown^T    */
            if (pause_after_step(m, &step)) return 1;
        }
    }
    if (mean) op->gather_mean(be, a->x_last, x, m->w.final_norm, b);
    return 0;
}

/* clang-format on */

/* out (n_out, D) = the vectors of the first n_out texts. Returns 1 if the batch was given up. */
static int run_batch(qemb_model *m, const qemb_packed_batch *b, float *out, int n_out) {
    const qemb_ops *op = m->ops;
    const qemb_config *c = &m->file->config;
    const float *norm = c->pooling == QEMB_POOL_MEAN ? NULL : m->w.final_norm;
    int (*const forward)(qemb_model *, const qemb_packed_batch *) =
        c->architecture == QEMB_BERT ? encoder_forward : qemb_forward;
    do {
        if (!op->begin(m->be, b) && forward(m, b)) return 1;
    } while (op->pool(m->be, out, m->now.a.x_last, norm, n_out));
    return 0;
}

/* ---- opening --------------------------------------------------------------------------------- */

int qemb_batch_tokens(const qemb_ops *ops) {
    return ops->batch_tokens ? ops->batch_tokens : QEMB_BATCH_TOKENS;
}

/* Rows of the largest batch: batch_tokens, or one longer text. */
static int max_rows(const qemb_options *o) { return max_int(o->batch_tokens, o->max_tokens); }

static size_t batch_bytes(const qemb_config *c, const qemb_ops *ops, const qemb_options *o) {
    return plan_activations(NULL, c, ops, o->batch_tokens, o->batch_tokens, o->mlp_rows, NULL);
}

static size_t long_bytes(const qemb_config *c, const qemb_ops *ops, const qemb_options *o) {
    return plan_activations(NULL, c, ops, max_rows(o), o->batch_tokens, o->mlp_rows, NULL);
}

static size_t arena_bytes(const qemb_config *c, const qemb_ops *ops, const qemb_options *o) {
    return long_bytes(c, ops, o) + (o->between_steps ? batch_bytes(c, ops, o) : 0);
}

/* Whether options o leave a sixteenth of what a GPU has free, or of vram. */
static int fits(const qemb_file *f, const qemb_ops *ops, const qemb_options *o) {
    qemb_part parts[QEMB_PARTS];
    const int n = ops->plan(parts, f, o, arena_bytes(&f->config, ops, o));
    size_t sum = 0, left = ops->free_memory(o->device);
    for (int i = 0; i < n; i++) sum += parts[i].bytes;
    if (o->vram && o->vram < left) left = o->vram;
    return sum <= left / 16 * 15;
}

/* On a GPU with memory for it, the defaults of batch_tokens and mlp_rows are doubled. */
static qemb_options fill_options(const qemb_file *f, const qemb_ops *ops, const qemb_options *opt) {
    qemb_options o = opt ? *opt : (qemb_options){0}, large;
    const int window = qemb_window(&f->config), max_positions = f->config.max_positions;
    const int any_batch = o.batch_tokens <= 0, any_mlp = o.mlp_rows <= 0;
    if (any_batch) o.batch_tokens = qemb_batch_tokens(ops);
    if (any_mlp) o.mlp_rows = ops->mlp_rows ? ops->mlp_rows : QEMB_MLP_ROWS;
    o.mlp_rows = padded_rows(ops, o.mlp_rows); /* a product may write as many */
    if (o.max_tokens <= 0) o.max_tokens = window;
    o.max_tokens = min_int(o.max_tokens, max_positions);
    /* A reranker's documents share much, which is computed once a batch. As many rows as the
     * longest text has need hardly more memory than that. */
    if (any_batch && f->config.kind == QEMB_RERANKER)
        o.batch_tokens = max_int(o.batch_tokens, min_int(window, o.max_tokens));
    if (o.threads <= 0) o.threads = qemb_cpu_count();
    if (ops->in_flight || o.max_tokens <= o.batch_tokens) o.between_steps = NULL;
    large = o;
    if (any_batch) large.batch_tokens *= 2;
    if (any_mlp) large.mlp_rows *= 2;
    return ops->free_memory && fits(f, ops, &large) ? large : o;
}

static size_t matrix_bytes(const qemb_mat *m) {
    const size_t rows = (size_t)m->rows, n = rows * (size_t)m->cols;
    if (m->dtype == QEMB_F16) return n * sizeof(uint16_t);
    return n + rows * QEMB_GROUPS((size_t)m->cols) * sizeof *m->scale;
}

/* What comes from the pooling before the dense layer, of all batches in flight. */
static size_t pooled_floats(const qemb_config *c, const qemb_ops *ops, const qemb_options *o) {
    return (size_t)max_int(ops->in_flight, 1) * (size_t)o->batch_tokens * (size_t)c->hidden;
}

void qemb_plan(const qemb_file *f, const qemb_ops *ops, const qemb_options *opt, qemb_memory *mem) {
    const qemb_config *c = &f->config;
    const qemb_options o = fill_options(f, ops, opt);
    qemb_mat *m[QEMB_LAYER_MATRICES];
    qemb_layer_matrices(&f->weights.layers[0], m); /* all layers are alike */
    mem->batch_tokens = o.batch_tokens;
    mem->arena_batch = batch_bytes(c, ops, &o);
    mem->arena_between = o.between_steps ? mem->arena_batch : 0;
    mem->arena_text = plan_activations(NULL, c, ops, o.max_tokens, 1, o.mlp_rows, NULL);
    if (c->dense_rows) mem->arena_batch += pooled_floats(c, ops, &o) * sizeof(float);
    mem->weights = 0;
    for (int i = 0; i < QEMB_LAYER_MATRICES; i++)
        mem->weights += (size_t)c->n_layers * matrix_bytes(m[i]);
    mem->table = matrix_bytes(&f->weights.tok_emb);
    if (f->weights.pos_emb)
        mem->table += (size_t)qemb_position_rows(c) * (size_t)c->hidden * sizeof(float);
    mem->repacked_bytes = ops->repacked_bytes ? ops->repacked_bytes(&f->weights, c->n_layers) : 0;
    mem->n_parts = ops->plan ? ops->plan(mem->parts, f, &o, arena_bytes(c, ops, &o)) : 0;
}

/* The fallback takes one text at a time. It is opened at the start, so that nothing can be missing
 * when a vector overflows; until then its memory is only address space. */
static int open_fallback(qemb_model *m, qemb_err *err) {
    qemb_options o = m->opt;
    o.batch_tokens = 1, o.mlp_rows = 0, o.between_steps = NULL;
    return qemb_open(&m->fallback, m->file, m->ops->fallback(), &o, err);
}

/* Room for the lists of a batch of that many rows. Returns -1 if out of memory. */
static int workspace_open(workspace *s, int rows) {
    s->tokens = malloc((3 * (size_t)rows + 1) * sizeof *s->tokens);
    if (!s->tokens) return -1;
    s->pos = s->tokens + rows;
    s->cu = s->pos + rows; /* rows + 1: a text has at least one row */
    return 0;
}

static int open_arena(qemb_model *m, qemb_err *err) {
    const qemb_config *c = &m->file->config;
    const qemb_options *o = &m->opt;
    char *base = m->ops->arena(m->be, arena_bytes(c, m->ops, o), err);
    if (!base) return -1;
    const size_t used =
        plan_activations(&m->now.a, c, m->ops, max_rows(o), o->batch_tokens, o->mlp_rows, base);
    if (o->between_steps)
        plan_activations(&m->between.a, c, m->ops, o->batch_tokens, o->batch_tokens, o->mlp_rows,
                         base + used);
    return 0;
}

int qemb_open(qemb_model **out, const qemb_file *f, const qemb_ops *ops, const qemb_options *opt,
              qemb_err *err) {
    const qemb_config *c = &f->config;
    qemb_model *m = calloc(1, sizeof *m);
    if (!m) return qemb_fail(err, "out_of_memory", "model: out of memory");
    m->file = f, m->ops = ops, m->opt = fill_options(f, ops, opt), m->w = f->weights;
    const int rows = padded_rows(ops, max_rows(&m->opt));
    const size_t layers_bytes = c->n_layers * sizeof *m->w.layers;
    m->w.layers = malloc(layers_bytes);
    if (c->dense_rows) m->pooled = malloc(pooled_floats(c, ops, &m->opt) * sizeof *m->pooled);
    int bad = !m->w.layers || workspace_open(&m->now, rows) || (c->dense_rows && !m->pooled) ||
              (m->opt.between_steps && workspace_open(&m->between, m->opt.batch_tokens));
    if (bad)
        qemb_fail(err, "out_of_memory", "model: out of memory");
    else
        memcpy(m->w.layers, f->weights.layers, layers_bytes);
    bad = bad || ops->open(&m->be, c, &m->opt, err) || open_arena(m, err);
    bad = bad || ops->load_weights(m->be, &m->w, err);
    bad = bad || (ops->fallback && open_fallback(m, err));
    if (c->dense_rows && ops->in_flight)
        bad = bad || cpu_pool_open(&m->dense_pool, m->opt.threads, err);
    bad = bad || qemb_file_check(f, err); /* after all that load_weights has read */
    if (bad) {
        qemb_close(m);
        return -1;
    }
    *out = m;
    return 0;
}

void qemb_close(qemb_model *m) {
    if (!m) return;
    cpu_pool_close(m->dense_pool);
    m->ops->close(m->be);
    qemb_close(m->fallback);
    free(m->w.layers);
    free(m->now.tokens);
    free(m->between.tokens);
    free(m->pooled);
    free(m);
}

const qemb_options *qemb_options_of(const qemb_model *m) { return &m->opt; }

qemb_health qemb_health_of(const qemb_model *m) {
    qemb_health h = {.recomputed = m->recomputed};
    if (m->ops->health) m->ops->health(m->be, &h);
    if (!h.failure && m->changed.code) h.failure = m->changed.msg;
    return h;
}

/* ---- the packer ------------------------------------------------------------------------------ */

typedef struct {
    const int32_t *ids; /* the caller's */
    int n;
    uint64_t hash;
} packed_text;

struct qemb_batch {
    int max_texts, max_rows; /* of a bulk batch; max_texts = max_rows */
    int vocab, longest;      /* what may be added: ids below vocab, texts of up to longest ids */
    int shares;              /* texts may share a prefix */
    int start_rows;          /* what a further batch costs, as rows: see qemb_pack_add */
    size_t lost, run;        /* rows computed more than once: see qemb_pack_add */
    int B;                   /* distinct texts */
    int prefix;              /* ids of their longest common prefix, fewer than any of them has */
    size_t sum;              /* ids of all texts */
    packed_text *texts;      /* (max_texts) */
    int32_t *slots;          /* (n_slots, a power of two) hash table of indices into texts, or -1 */
    uint32_t n_slots;
};

qemb_batch *qemb_batch_new(const qemb_model *m) {
    qemb_batch *b = calloc(1, sizeof *b);
    if (!b) return NULL;
    b->max_texts = b->max_rows = m->opt.batch_tokens;
    b->vocab = m->file->config.vocab, b->longest = m->opt.max_tokens;
    b->shares = m->file->config.attention == QEMB_CAUSAL;
    b->start_rows = min_int(qemb_batch_tokens(m->ops), b->max_rows) / 16;
    for (b->n_slots = 16; b->n_slots < 2 * (uint32_t)b->max_texts; b->n_slots *= 2) {}
    b->texts = malloc((size_t)b->max_texts * sizeof *b->texts);
    b->slots = malloc(b->n_slots * sizeof *b->slots);
    if (!b->texts || !b->slots) {
        qemb_batch_free(b);
        return NULL;
    }
    memset(b->slots, -1, b->n_slots * sizeof *b->slots);
    return b;
}

void qemb_batch_free(qemb_batch *b) {
    if (!b) return;
    free(b->texts);
    free(b->slots);
    free(b);
}

void qemb_batch_clear(qemb_batch *b) {
    memset(b->slots, -1, b->n_slots * sizeof *b->slots);
    b->B = b->prefix = 0;
    b->sum = b->lost = b->run = 0;
}

static uint64_t hash_ids(const int32_t *ids, int n) {
    uint64_t h = (uint64_t)n;
    for (int i = 0; i < n; i++) {
        h = (h ^ (uint32_t)ids[i]) * 0x9e3779b97f4a7c15u;
        h ^= h >> 29;
    }
    return h;
}

/* Ids (n) that a text shares with the one before it in the batch, more than the `prefix` that all
 * share. Fewer than WORTH are 0: as in a sorted list, they are chance. */
static int shared_with_last(const qemb_batch *b, const int32_t *ids, int n, int prefix) {
    enum { WORTH = 16 };
    const packed_text *last = &b->texts[b->B - 1];
    const int most = b->shares ? min_int(n, last->n) - 1 : 0;
    int common = prefix;
    while (common < most && ids[common] == last->ids[common]) common++;
    return common - prefix < WORTH ? 0 : common - prefix;
}

/* A text that shortens the prefix gives every text so far those ids again (`lost`). A text that
 * shares more with the one before it has that much once more, and so have those that follow it and
 * share as much (`run`). When both are more than a new batch would cost, the prefix again and
 * start_rows for its start, the batch is closed. So a reranker's documents stay with their query.
 *
 * start_rows is 64 on a CPU. A batch of 64 rows takes as long there as about 73 in a large one
 * (f32, docs/benchmarks.md), so batches are rather kept than closed. */
int qemb_pack_add(qemb_batch *b, const int32_t *ids, int n) {
    assert(n >= 1 && n <= b->longest);
    for (int i = 0; i < n; i++) assert(ids[i] >= 0 && ids[i] < b->vocab);

    const uint64_t hash = hash_ids(ids, n);
    uint32_t slot = (uint32_t)hash & (b->n_slots - 1);
    for (; b->slots[slot] >= 0; slot = (slot + 1) & (b->n_slots - 1)) {
        const packed_text *t = &b->texts[b->slots[slot]];
        if (t->hash == hash && t->n == n && !memcmp(t->ids, ids, (size_t)n * sizeof *ids))
            return b->slots[slot];
    }

    /* The last token stays the text's own, since its row is pooled. */
    int prefix = b->shares ? n - 1 : 0;
    size_t lost = 0, run = 0;
    if (b->B) {
        const int limit = min_int(prefix, b->B == 1 ? b->texts[0].n - 1 : b->prefix);
        for (prefix = 0; prefix < limit && ids[prefix] == b->texts[0].ids[prefix];) prefix++;
        const size_t rows = b->sum + (size_t)n - (size_t)b->B * (size_t)prefix;
        if (rows > (size_t)b->max_rows) return -1; /* each text has a row: B < max_texts */
        const int shared = shared_with_last(b, ids, n, prefix);
        lost = b->lost + (b->B > 1 ? (size_t)(b->B - 1) * (size_t)(b->prefix - prefix) : 0);
        run = shared ? b->run + (size_t)shared : 0;
        if (lost + run > (size_t)(prefix + b->start_rows)) return -1;
    }
    b->lost = lost, b->run = run;
    b->texts[b->B] = (packed_text){ids, n, hash};
    b->slots[slot] = b->B;
    b->sum += (size_t)n;
    b->prefix = prefix;
    return b->B++;
}

int qemb_batch_rows(const qemb_batch *b) { return b->B; }

size_t qemb_batch_tokens_saved(const qemb_batch *b) {
    return b->B > 1 ? (size_t)b->prefix * (size_t)(b->B - 1) : 0;
}

size_t qemb_batch_tokens_computed(const qemb_batch *b) {
    return b->sum - qemb_batch_tokens_saved(b);
}

/* Rows t .. t+n-1 of s = ids (n), at positions p, p+1, ... Those of QEMB_BERT are rows of its
 * table: they begin at first_position; pad_id has the row before, and takes no position from the
 * others. */
static void put_ids(workspace *s, const qemb_config *c, int t, const int32_t *ids, int n, int p) {
    const int is_bert = c->architecture == QEMB_BERT, pad = is_bert ? c->pad_id : QEMB_NO_TOKEN;
    const int first = is_bert ? c->first_position : 0;
    for (int i = 0, next = first + p; i < n; i++) {
        s->tokens[t + i] = ids[i];
        s->pos[t + i] = ids[i] == pad ? first - 1 : next++;
    }
}

/* Packs b into m's arrays and pads it to the rows that the table wants, with a text of tokens 0. */
static qemb_packed_batch pack(qemb_model *m, const qemb_batch *b) {
    workspace *s = &m->now;
    const int P = b->B > 1 ? b->prefix : 0; /* one text has nothing to share */
    const qemb_config *c = &m->file->config;
    int t = P, B = b->B;
    put_ids(s, c, 0, b->texts[0].ids, P, 0);
    for (int i = 0; i < B; i++) {
        s->cu[i] = t;
        put_ids(s, c, t, b->texts[i].ids + P, b->texts[i].n - P, P);
        t += b->texts[i].n - P;
    }
    s->cu[B] = t;
    const int T = padded_rows(m->ops, t);
    if (T > t) s->cu[++B] = T;
    for (; t < T; t++) s->tokens[t] = 0, s->pos[t] = 0;
    return (qemb_packed_batch){.B = B,
                               .T = T,
                               .P = P,
                               .tokens = s->tokens,
                               .pos = s->pos,
                               .cu = s->cu,
                               .bidirectional = c->attention == QEMB_BIDIRECTIONAL};
}

static int all_finite(const float *x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(x[i]) <= FLT_MAX)) return 0;
    return 1;
}

/* out (D) = the pooled row of one text, computed by the fallback */
static void compute_again(qemb_model *m, const packed_text *text, float *out) {
    packed_text texts[1] = {*text};
    const qemb_batch alone = {.B = 1, .texts = texts};
    const qemb_packed_batch packed = pack(m->fallback, &alone);
    run_batch(m->fallback, &packed, out, 1); /* a table for CPUs: out is written */
    m->recomputed++;
}

int qemb_in_flight(const qemb_model *m) { return max_int(m->ops->in_flight, 1); }

void qemb_submit(qemb_model *m, const qemb_batch *b, float *out) {
    assert(m->n_running < qemb_in_flight(m));
    float *rows = out;
    if (m->pooled) {
        rows = m->pooled + (size_t)m->next_pooled * b->max_texts * m->file->config.hidden;
        m->next_pooled = (m->next_pooled + 1) % qemb_in_flight(m);
    }
    m->running[m->n_running].b = b;
    m->running[m->n_running].out = out;
    m->running[m->n_running].rows = rows;
    m->running[m->n_running].given_up = 0;
    const int i = m->n_running++;
    if (!b->B) return;
    const qemb_packed_batch packed = pack(m, b);
    m->running[i].given_up = run_batch(m, &packed, rows, b->B);
}

/* The double sum of a and b (n), in eight interleaved parts, in this order on every machine. */
static double dot(const float *a, const float *b, int n) {
    double part[8] = {0}, sum = 0;
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; k++) part[k] += (double)a[i + k] * b[i + k];
    for (; i < n; i++) part[i % 8] += (double)a[i] * b[i];
    for (int k = 0; k < 8; k++) sum += part[k];
    return sum;
}

/* The dense layer of B texts. */
typedef struct {
    const qemb_file *file;
    float *out;        /* (B, dense_rows) */
    const float *rows; /* (B, D) */
    size_t n;          /* numbers of out */
} dense_job;

enum { DENSE = 64 }; /* numbers of an item */

static void dense_item(const void *job, work_item item) {
    const dense_job *j = job;
    const qemb_config *c = &j->file->config;
    const qemb_weights *w = &j->file->weights;
    const size_t N = (size_t)c->dense_rows, D = (size_t)c->hidden, first = (size_t)item.i * DENSE;
    for (size_t i = first; i < j->n && i < first + DENSE; i++) {
        const float *row = j->rows + i / N * D, *weights = w->dense + i % N * D;
        const double y = dot(row, weights, (int)D) + (double)w->dense_bias[i % N];
        j->out[i] = (float)(c->activation == QEMB_TANH ? tanh(y) : y);
    }
}

/* out (B, dense_rows) = activation(rows dense^T + dense_bias),  rows (B, D). On the host and in
 * double, so that every table gives the same bits. It is a small part of a CPU's work, which the
 * compute thread does alone; beside a GPU the host's other cores are free. */
static void dense_layer(const qemb_model *m, float *out, const float *rows, int B) {
    const dense_job j = {m->file, out, rows, (size_t)B * (size_t)m->file->config.dense_rows};
    cpu_parallel(m->dense_pool, (int)((j.n + DENSE - 1) / DENSE), dense_item, &j);
}

/* out = the vectors of b, whose pooled rows (B, D) are there, but for those of a GPU's batch. */
static void finish(qemb_model *m, const qemb_batch *b, float *rows, float *out) {
    const size_t D = (size_t)m->file->config.hidden;
    if (m->ops->in_flight) m->ops->collect(m->be);
    const int failed = qemb_health_of(m).failure != NULL; /* a failed device ends the run */
    for (int i = 0; m->fallback && !failed && i < b->B; i++)
        if (!all_finite(rows + (size_t)i * D, D))
            compute_again(m, &b->texts[i], rows + (size_t)i * D);
    if (m->pooled) dense_layer(m, out, rows, b->B);
    if (!m->changed.code && !qemb_file_check(m->file, &m->changed)) return;
    for (size_t i = 0; i < (size_t)b->B * (size_t)qemb_dim(&m->file->config); i++) out[i] = NAN;
}

void qemb_collect(qemb_model *m) {
    assert(m->n_running);
    const qemb_batch *b = m->running[0].b;
    float *out = m->running[0].out, *rows = m->running[0].rows;
    const int given_up = m->running[0].given_up;
    memmove(m->running, m->running + 1, (size_t)--m->n_running * sizeof *m->running);
    if (given_up)
        for (int i = 0; i < b->B * qemb_dim(&m->file->config); i++) out[i] = NAN;
    else if (b->B)
        finish(m, b, rows, out);
}

/* The long text has not reached its pooling, so `pooled` is free. */
void qemb_embed_between(qemb_model *m, const qemb_batch *b, float *out) {
    assert(m->in_step && qemb_batch_tokens_computed(b) <= (size_t)m->opt.batch_tokens);
    float *rows = m->pooled ? m->pooled : out;
    const workspace longer = m->now;
    m->now = m->between;
    m->in_step = 0;
    if (b->B) {
        const qemb_packed_batch packed = pack(m, b);
        run_batch(m, &packed, rows, b->B);
        finish(m, b, rows, out);
    }
    m->in_step = 1;
    m->now = longer;
}

void qemb_embed(qemb_model *m, const qemb_batch *b, float *out) {
    qemb_submit(m, b, out);
    qemb_collect(m);
}
