/* row_ops.c - ops that compute row by row, and how attention is cut into blocks, for the vector
 * tables. The instructions for one row or one block are each table's: cpu_kernels.
 */
#include "cpu.h"

#include <assert.h>
#include <string.h>

static float *f32(qemb_act *a) { return (float *)a; }
static const float *cf32(const qemb_act *a) { return (const float *)a; }

/* ---- ops by rows ----------------------------------------------------------------------------- */

/* An op on T rows; an item is `chunk` of them, and `rows` computes rows first .. end-1. */
typedef struct rows_job {
    const qemb_backend *be;
    void (*rows)(const struct rows_job *j, int first, int end);
    int T, chunk;
    float *y, *x2; /* x2: an input that is written too */
    const float *x, *w, *w2, *bias;
    int n; /* numbers of a row, if not D */
    const qemb_mat *table;
    const qemb_packed_batch *b;
} rows_job;

static void run_rows(const void *job, work_item item) {
    const rows_job *j = job;
    j->rows(j, item.i * j->chunk, min_int(j->T, (item.i + 1) * j->chunk));
}

static void for_rows(const rows_job *j) {
    cpu_parallel(j->be->pool, ceil_div(j->T, j->chunk), run_rows, j);
}

static void embed_rows(const rows_job *j, int first, int end) {
    const size_t D = (size_t)j->be->c->hidden;
    for (int t = first; t < end; t++) {
        const int32_t id = j->b->tokens[t];
        assert(id >= 0 && id < j->table->rows);
        j->be->kernels->half(j->y + t * D, (const uint16_t *)j->table->data + id * D, (int)D);
        if (j->w) j->be->kernels->add(j->y + t * D, j->w + j->b->pos[t] * D, (int)D);
    }
}

void simd_embed(qemb_backend *be, float *x, const qemb_mat *tok_emb, const float *pos_emb,
                const qemb_packed_batch *b) {
    for_rows(&(rows_job){be, embed_rows, b->T, 64, .y = x, .w = pos_emb, .table = tok_emb, .b = b});
}

static void layernorm_rows(const rows_job *j, int first, int end) {
    const size_t D = (size_t)j->be->c->hidden;
    for (int t = first; t < end; t++)
        j->be->kernels->layernorm(j->y + t * D, j->x2 + t * D, j->bias, j->w, j->w2, (int)D,
                                  j->be->c->norm_eps);
}

void simd_layernorm(qemb_backend *be, qemb_act *y, float *x, const float *bias, const float *w,
                    const float *b, int T) {
    for_rows(&(rows_job){be, layernorm_rows, T, 16, .y = f32(y), .x2 = x, .bias = bias, .w = w,
                         .w2 = b});
}

static void bias_rows(const rows_job *j, int first, int end) {
    for (int t = first; t < end; t++) j->be->kernels->add(j->y + (size_t)t * j->n, j->bias, j->n);
}

void simd_add_bias(qemb_backend *be, qemb_act *y, const float *bias, int T, int n) {
    if (bias) for_rows(&(rows_job){be, bias_rows, T, 8, .y = f32(y), .bias = bias, .n = n});
}

static void gelu_rows(const rows_job *j, int first, int end) {
    for (int t = first; t < end; t++) j->be->kernels->gelu(j->y + (size_t)t * j->n, j->bias, j->n);
}

void simd_gelu(qemb_backend *be, qemb_act *h, const float *bias, int T, int n) {
    for_rows(&(rows_job){be, gelu_rows, T, 4, .y = f32(h), .bias = bias, .n = n});
}

static void rmsnorm_rows(const rows_job *j, int first, int end) {
    const size_t D = (size_t)j->be->c->hidden;
    for (int t = first; t < end; t++)
        j->be->kernels->rmsnorm(j->y + t * D, j->x + t * D, j->w, (int)D, j->be->c->norm_eps);
}

void simd_rmsnorm(qemb_backend *be, qemb_act *y, const float *x, const float *w, int T) {
    for_rows(&(rows_job){be, rmsnorm_rows, T, 16, .y = f32(y), .x = x, .w = w});
}

void simd_gather_mean(qemb_backend *be, float *y, float *x, const float *w,
                      const qemb_packed_batch *b) {
    if (w) simd_rmsnorm(be, (qemb_act *)x, x, w, b->T);
    cpu_mean_rows(be, y, x, b);
}

int simd_pool(qemb_backend *be, float *out, float *x, const float *w, int B) {
    if (w)
        simd_rmsnorm(be, (qemb_act *)out, x, w, B);
    else
        memcpy(out, x, (size_t)B * (size_t)be->c->hidden * sizeof *x);
    return 0;
}

static void qknorm_rope_rows(const rows_job *j, int first, int end) {
    const qemb_config *c = j->be->c;
    const int H = c->n_heads, K = c->n_kv_heads, hd = c->head_dim;
    for (int t = first; t < end; t++) {
        const float *cosines = j->be->rope + (size_t)j->b->pos[t] * hd, *sines = cosines + hd / 2;
        float *head = j->y + (size_t)t * (H + 2 * K) * hd;
        for (int h = 0; h < H + K; h++, head += hd)
            j->be->kernels->norm_rotate(head, h < H ? j->w : j->w2, cosines, sines, hd / 2,
                                        c->norm_eps);
    }
}

void simd_qknorm_rope(qemb_backend *be, qemb_act *qkv, const float *q_norm, const float *k_norm,
                      const qemb_packed_batch *b) {
    for_rows(&(rows_job){be, qknorm_rope_rows, b->T, 8, .y = f32(qkv), .w = q_norm, .w2 = k_norm,
                         .b = b});
}

static void swiglu_rows(const rows_job *j, int first, int end) {
    const size_t F = (size_t)j->be->c->ffn;
    for (int t = first; t < end; t++)
        j->be->kernels->swiglu(j->y + t * F, j->x + 2 * t * F, j->x + (2 * t + 1) * F, (int)F);
}

void simd_swiglu(qemb_backend *be, qemb_act *h, const qemb_act *gu, int T) {
    for_rows(&(rows_job){be, swiglu_rows, T, 4, .y = f32(h), .x = cf32(gu)});
}

/* ---- attention ------------------------------------------------------------------------------- */

/* Tokens of a block. Its rows are tokens x G. */
static int block_tokens(const qemb_config *c, const cpu_kernels *f) {
    return max_int(1, f->attention_rows / (c->n_heads / c->n_kv_heads));
}

/* Queries are packed in whole register tiles, of up to 16 rows more. */
static size_t attention_floats(const qemb_config *c, const cpu_kernels *f) {
    const size_t R = (size_t)block_tokens(c, f) * (size_t)(c->n_heads / c->n_kv_heads);
    const size_t hd = (size_t)c->head_dim, hdp = (size_t)ceil_div(c->head_dim, CPU_PAD) * CPU_PAD;
    return CPU_KEYS * (hd + hdp + 2) + R * (CPU_KEYS + hdp + 3) + (R + 16) * (hd + 1);
}

static void attention_setup(attention_tile *w, const qemb_backend *be, const float *qkv,
                            int kv_head, int thread) {
    const qemb_config *c = be->c;
    const int H = c->n_heads, K = c->n_kv_heads, hd = c->head_dim, G = H / K;
    const size_t R = (size_t)block_tokens(c, be->kernels) * (size_t)G;
    w->qkv = qkv, w->ld = (size_t)(H + 2 * K) * hd;
    w->G = G, w->hd = hd, w->hdp = ceil_div(hd, CPU_PAD) * CPU_PAD;
    w->q_col = kv_head * G * hd, w->k_col = (H + kv_head) * hd, w->v_col = (H + K + kv_head) * hd;
    w->keys = be->scratch + (size_t)thread * be->scratch_floats;
    w->values = w->keys + CPU_KEYS * hd;
    w->acc = w->values + CPU_KEYS * w->hdp;
    w->s = w->acc + R * w->hdp;
    w->max = w->s + R * CPU_KEYS;
    w->sum = w->max + R;
    w->q = w->sum + R;
    w->key_scale = w->q + (R + 16) * hd;
    w->value_scale = w->key_scale + CPU_KEYS;
    w->query_scale = w->value_scale + CPU_KEYS;
    w->weight_scale = w->query_scale + R + 16;
}

typedef struct {
    const qemb_backend *be;
    float *att;
    const float *qkv;
    const qemb_packed_batch *b;
    qemb_rows rows;
    int windows, first, end; /* the rows that are computed */
} attention_job;

/* An item is one kv head and one window of rows: it computes all blocks that begin in the window.
 * Segment 0 of the batch is the shared prefix, which attends to itself; segment i is text i-1. The
 * last windows are computed first, because in a long text they have the most keys: the items that
 * are left at the end are then short. */
static void attention_part(const void *job, work_item item) {
    const attention_job *j = job;
    const qemb_packed_batch *b = j->b;
    const int K = j->be->c->n_kv_heads, tokens = block_tokens(j->be->c, j->be->kernels);
    const size_t ld_att = (size_t)j->be->c->n_heads * j->be->c->head_dim;
    const int begin = j->first + (j->windows - 1 - item.i / K) * tokens;
    const int end = min_int(begin + tokens, j->end);
    attention_tile w = {0};
    attention_setup(&w, j->be, j->qkv, item.i % K, item.thread);
    if (j->rows != QEMB_ALL_ROWS) {
        const int i = item.i / K, n = b->cu[i + 1] - b->cu[i];
        w.prefix = b->P, w.own = b->cu[i];
        w.all = b->bidirectional ? n : 0; /* the last row sees all keys in any case */
        j->be->kernels->attention(&w, j->att + i * ld_att + w.q_col, ld_att,
                                  j->rows == QEMB_FIRST_ROWS ? 0 : b->P + n - 1, 1);
        return;
    }
    int low = 0, high = b->B; /* the segment that row `begin` is in */
    while (low < high) {
        const int middle = (low + high) / 2;
        if (b->cu[middle] > begin)
            high = middle;
        else
            low = middle + 1;
    }
    for (int i = low; i <= b->B && (i ? b->cu[i - 1] : 0) < end; i++) {
        w.prefix = i ? b->P : 0;
        w.own = i ? b->cu[i - 1] : 0;
        w.all = b->bidirectional ? b->cu[i] - w.own : 0;
        const int from = max_int(w.own, j->first), to = min_int(j->end, b->cu[i]);
        for (int t = from + ceil_div(max_int(0, begin - from), tokens) * tokens;
             t < min_int(end, to); t += tokens)
            j->be->kernels->attention(&w, j->att + t * ld_att + w.q_col, ld_att,
                                      w.prefix + t - w.own, min_int(tokens, to - t));
    }
}

void simd_attention(qemb_backend *be, qemb_act *att, const qemb_act *qkv,
                    const qemb_packed_batch *b, qemb_rows rows) {
    const int first = qemb_first_row(b), end = qemb_end_row(b);
    const int tokens = block_tokens(be->c, be->kernels);
    const int windows = rows != QEMB_ALL_ROWS ? b->B : ceil_div(end - first, tokens);
    const attention_job j = {be, f32(att), cf32(qkv), b, rows, windows, first, end};
    cpu_parallel(be->pool, windows * be->c->n_kv_heads, attention_part, &j);
}

/* ---- opening --------------------------------------------------------------------------------- */

int simd_open(qemb_backend **be, const qemb_config *c, const qemb_options *opt,
              const cpu_kernels *kernels, size_t scratch_floats, size_t packed_floats,
              qemb_err *err) {
    const size_t attention = attention_floats(c, kernels);
    if (cpu_open(be, c, opt, scratch_floats > attention ? scratch_floats : attention, packed_floats,
                 err))
        return -1;
    (*be)->kernels = kernels;
    return 0;
}
