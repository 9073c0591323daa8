/* oracle.c - the model in plain loops and double precision; see oracle.h. Begin at oracle_embed. */
#include "oracle.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static double half_value(int h) {
    const int sign = h >> 15, exponent = h >> 10 & 31, mantissa = h & 1023;
    double v = exponent == 31 ? (mantissa ? NAN : INFINITY)
               : exponent     ? ldexp(1024 + mantissa, exponent - 25)
                              : ldexp(mantissa, -24);
    return sign ? -v : v;
}

double oracle_half(uint16_t h) {
    static double table[65536]; /* ldexp is slow */
    if (table[1] == 0)
        for (int i = 0; i < 65536; i++) table[i] = half_value(i);
    return table[h];
}

void oracle_rmsnorm(double *y, const double *x, const float *w, int n, double eps) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    for (int i = 0; i < n; i++) y[i] = x[i] / sqrt(sum / n + eps) * w[i];
}

double oracle_weight(const qemb_mat *w, int row, int col) {
    const size_t i = (size_t)row * w->cols + col, groups = ((size_t)w->cols + 63) / 64;
    if (w->dtype == QEMB_F16) return oracle_half(((const uint16_t *)w->data)[i]);
    return (double)w->scale[row * groups + col / 64] * ((const int8_t *)w->data)[i];
}

void oracle_matvec(double *y, double *magnitude, const double *x, const qemb_mat *w) {
    for (int n = 0; n < w->rows; n++) {
        double sum = 0, size = 0;
        for (int k = 0; k < w->cols; k++) {
            double term = x[k] * oracle_weight(w, n, k);
            sum += term;
            size += fabs(term);
        }
        y[n] = sum;
        if (magnitude) magnitude[n] = size;
    }
}

void oracle_rope(double *head, int hd, int pos, double theta) {
    for (int i = 0; i < hd / 2; i++) {
        /* transformers computes frequency and angle in float32: that is the definition */
        float freq = (float)pow(theta, -2.0 * i / hd);
        float angle = freq * (float)pos;
        double a = head[i], b = head[i + hd / 2], c = cos(angle), s = sin(angle);
        head[i] = a * c - b * s;
        head[i + hd / 2] = a * s + b * c;
    }
}

void oracle_attention(double *att, double *weighted, double *reach, const double *qkv, int n, int H,
                      int K, int hd, int bidirectional) {
    const int ld = (H + 2 * K) * hd;
    double *p = malloc((size_t)n * sizeof *p);
    for (int t = 0; t < n; t++)
        for (int h = 0; h < H; h++) {
            const double *q = qkv + (size_t)t * ld + h * hd;
            const int k_col = (H + h / (H / K)) * hd, v_col = k_col + K * hd;
            const int seen = bidirectional ? n : t + 1;
            double max = -INFINITY, sum = 0, far = 0;
            for (int j = 0; j < seen; j++) {
                const double *k = qkv + (size_t)j * ld + k_col;
                double dot = 0, size = 0;
                for (int d = 0; d < hd; d++) dot += q[d] * k[d], size += fabs(q[d] * k[d]);
                p[j] = dot / sqrt(hd);
                max = fmax(max, p[j]);
                far = fmax(far, size / sqrt(hd));
            }
            for (int j = 0; j < seen; j++) sum += p[j] = exp(p[j] - max);
            for (int d = 0; d < hd; d++) {
                double o = 0, size = 0;
                for (int j = 0; j < seen; j++) {
                    double v = qkv[(size_t)j * ld + v_col + d];
                    o += p[j] / sum * v;
                    size += p[j] / sum * fabs(v);
                }
                att[(size_t)t * H * hd + h * hd + d] = o;
                if (weighted) weighted[(size_t)t * H * hd + h * hd + d] = size;
            }
            if (reach) reach[(size_t)t * H + h] = far;
        }
    free(p);
}

double oracle_swiglu(double gate, double up) { return gate / (1 + exp(-gate)) * up; }

void oracle_embed(double *out, double *swiglu_max, const qemb_config *c, const qemb_weights *w,
                  const int32_t *ids, int n) {
    const int D = c->hidden, H = c->n_heads, K = c->n_kv_heads, hd = c->head_dim, F = c->ffn;
    const int QKV = (H + 2 * K) * hd;
    double *x = calloc((size_t)n * D, sizeof *x), *xn = calloc((size_t)D, sizeof *xn);
    double *qkv = calloc((size_t)n * QKV, sizeof *qkv);
    double *att = calloc((size_t)n * H * hd, sizeof *att), *o = calloc((size_t)D, sizeof *o);
    double *gu = calloc((size_t)2 * F, sizeof *gu);
    double biggest = 0;
    /* embedding: x (n, D), the residual stream */
    for (int t = 0; t < n; t++)
        for (int i = 0; i < D; i++)
            x[(size_t)t * D + i] =
                oracle_half(((const uint16_t *)w->tok_emb.data)[(size_t)ids[t] * D + i]);
    for (int l = 0; l < c->n_layers; l++) {
        const qemb_layer *y = &w->layers[l];
        /* qkv (n, QKV): normed rows times wqkv; query and key heads are normed and rotated */
        for (int t = 0; t < n; t++) {
            double *row = qkv + (size_t)t * QKV;
            oracle_rmsnorm(xn, x + (size_t)t * D, y->attn_norm, D, c->norm_eps);
            oracle_matvec(row, NULL, xn, &y->wqkv);
            for (int h = 0; h < H + K; h++) {
                oracle_rmsnorm(row + h * hd, row + h * hd, h < H ? y->q_norm : y->k_norm, hd,
                               c->norm_eps);
                oracle_rope(row + h * hd, hd, t, c->rope_theta);
            }
        }
        oracle_attention(att, NULL, NULL, qkv, n, H, K, hd, c->attention == QEMB_BIDIRECTIONAL);
        /* x += att Wo^T, then x += (silu(gate) * up) Wdown^T of the normed rows */
        for (int t = 0; t < n; t++) {
            double *xt = x + (size_t)t * D;
            oracle_matvec(o, NULL, att + (size_t)t * H * hd, &y->wo);
            for (int i = 0; i < D; i++) xt[i] += o[i];
            oracle_rmsnorm(xn, xt, y->mlp_norm, D, c->norm_eps);
            oracle_matvec(gu, NULL, xn, &y->wgu);
            for (int i = 0; i < F; i++) {
                gu[i] = oracle_swiglu(gu[i], gu[F + i]);
                biggest = fmax(biggest, fabs(gu[i]));
            }
            oracle_matvec(o, NULL, gu, &y->wdown);
            for (int i = 0; i < D; i++) xt[i] += o[i];
        }
    }
    /* pooling: the last row, or the mean of all */
    const int first = c->pooling == QEMB_POOL_MEAN ? 0 : n - 1;
    for (int i = 0; i < D; i++) out[i] = 0;
    for (int t = first; t < n; t++) {
        oracle_rmsnorm(xn, x + (size_t)t * D, w->final_norm, D, c->norm_eps);
        for (int i = 0; i < D; i++) out[i] += xn[i] / (n - first);
    }
    if (swiglu_max) *swiglu_max = biggest;
    free(x), free(xn), free(qkv), free(att), free(o), free(gu);
}
