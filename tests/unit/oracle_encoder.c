/* oracle_encoder.c - BERT's forward in plain loops and double precision. Begin at oracle_encode. */
#include "oracle_encoder.h"

#include "oracle.h"

#include <math.h>
#include <stdlib.h>

void oracle_layernorm(double *y, const double *x, const float *w, const float *b, int n,
                      double eps) {
    double mean = 0, variance = 0;
    for (int i = 0; i < n; i++) mean += x[i] / n;
    for (int i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean) / n;
    for (int i = 0; i < n; i++) y[i] = (x[i] - mean) / sqrt(variance + eps) * w[i] + b[i];
}

/* Phi(t) = (1 + erf(t / sqrt 2)) / 2. For t < 0 that sum cancels; erfc has what remains of it. */
double oracle_gelu(double t) {
    const double root = 0.70710678118654752440;
    return t < 0 ? t * (erfc(-t * root) / 2) : t * ((1 + erf(t * root)) / 2);
}

/* y (N) = W x + b */
static void affine(double *y, const double *x, const qemb_mat *w, const float *b) {
    oracle_matvec(y, NULL, x, w);
    for (int i = 0; i < w->rows; i++) y[i] += b[i];
}

/* x (n, D): a token's row and its position's. The position of a token is first_position, plus one
 * for each token before it that is not pad_id. That of pad_id is first_position - 1. */
static void embed(double *x, const qemb_config *c, const qemb_weights *w, const int32_t *ids,
                  int n) {
    const int D = c->hidden;
    const uint16_t *table = w->tok_emb.data;
    int before = 0;
    for (int t = 0; t < n; t++) {
        const int is_pad = c->pad_id >= 0 && ids[t] == c->pad_id;
        const int row = c->first_position + (is_pad ? -1 : before);
        for (int i = 0; i < D; i++)
            x[t * D + i] = oracle_half(table[ids[t] * D + i]) + w->pos_emb[row * D + i];
        before += !is_pad;
    }
}

void oracle_encode(double *out, const qemb_config *c, const qemb_weights *w, const int32_t *ids,
                   int n) {
    const int D = c->hidden, F = c->ffn;
    double *x = calloc((size_t)n * D, sizeof *x), *qkv = calloc((size_t)n * 3 * D, sizeof *qkv);
    double *att = calloc((size_t)n * D, sizeof *att), *y = calloc((size_t)D, sizeof *y);
    double *h = calloc((size_t)F, sizeof *h);
    embed(x, c, w, ids, n);
    for (int t = 0; t < n; t++)
        oracle_layernorm(x + t * D, x + t * D, w->emb_norm, w->emb_norm_bias, D, c->norm_eps);
    for (int l = 0; l < c->n_layers; l++) {
        const qemb_layer *m = &w->layers[l];
        for (int t = 0; t < n; t++) affine(qkv + t * 3 * D, x + t * D, &m->wqkv, m->bqkv);
        oracle_attention(att, NULL, NULL, qkv, n, c->n_heads, c->n_heads, c->head_dim, 1);
        for (int t = 0; t < n; t++) {
            double *xt = x + t * D;
            affine(y, att + t * D, &m->wo, m->bo);
            for (int i = 0; i < D; i++) xt[i] += y[i];
            oracle_layernorm(xt, xt, m->attn_norm, m->attn_norm_bias, D, c->norm_eps);
            affine(h, xt, &m->wup, m->bup);
            for (int i = 0; i < F; i++) h[i] = oracle_gelu(h[i]);
            affine(y, h, &m->wdown, m->bdown);
            for (int i = 0; i < D; i++) xt[i] += y[i];
            oracle_layernorm(xt, xt, m->mlp_norm, m->mlp_norm_bias, D, c->norm_eps);
        }
    }
    /* pooling: the first row, or the mean of all */
    const int rows = c->pooling == QEMB_POOL_MEAN ? n : 1;
    for (int i = 0; i < D; i++) out[i] = 0;
    for (int t = 0; t < rows; t++)
        for (int i = 0; i < D; i++) out[i] += x[t * D + i] / rows;
    free(x), free(qkv), free(att), free(y), free(h);
}
