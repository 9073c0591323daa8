/* encoder.c - the forward of QEMB_BERT: BERT (Devlin et al. 2019) and XLM-RoBERTa.
 *
 * Against qemb.c's forward: LayerNorm stands behind each block, and its result is the residual
 * stream; every matrix has a bias; positions are rows of a table; a token sees its whole text; the
 * MLP has one matrix and GELU. The bias of a projection into the residual stream is added by the
 * LayerNorm that follows.
 */
#include "lib/model.h"

/* clang-format off */

/* Every op that writes xn or h for some rows is followed by one that reads the same rows: a table
 * may lay an activation out by the number of its rows. */
int encoder_forward(qemb_model *m, const qemb_packed_batch *b) {
    const qemb_config *c = &m->file->config;
    const int first = c->pooling == QEMB_POOL_FIRST, D = c->hidden, QKV = 3 * D;
    const qemb_ops *op = m->ops;
    qemb_backend *be = m->be;
    const activations *a = &m->now.a;
    const steps step = steps_of(m, b);
    float *x = a->x;

    op->embed(be, x, &m->w.tok_emb, m->w.pos_emb, b);                       /* x   (T, D)         */
    for (int r = 0; r < b->T; r += step.mlp)
        op->layernorm(be, act_row(op, a->xn, r, D), x + (size_t)r * D, NULL, m->w.emb_norm,
                      m->w.emb_norm_bias, min_int(step.mlp, b->T - r));     /* x, xn (n, D)       */
    for (int l = 0; l < c->n_layers; l++) {
        const qemb_layer *w = &m->w.layers[l];
        const int last = first && l == c->n_layers - 1; /* only the texts' first rows go on */
        const int rows = last ? b->B : b->T;

        for (int r = 0; r < b->T; r += step.mlp) {
            op->matmul(be, act_row(op, a->qkv, r, QKV), act_row(op, a->xn, r, D), &w->wqkv,
                       w->bqkv, min_int(step.mlp, b->T - r));               /* qkv (n, 3D)        */
            if (pause_after_step(m, &step)) return 1;
        }
        for (int r = 0; r < rows; r += last ? rows : step.queries) {
            const qemb_packed_batch some = last ? *b : queries_of(b, r, step.queries);
            op->attention(be, a->att, a->qkv, &some, last ? QEMB_FIRST_ROWS : QEMB_ALL_ROWS);
            if (pause_after_step(m, &step)) return 1;                       /* att (rows, D)      */
        }
        if (last) op->gather(be, a->x_last, x, b, QEMB_FIRST_ROWS), x = a->x_last;
        for (int r = 0; r < rows; r += step.rows) {
            op->matmul_add(be, x + (size_t)r * D, act_row(op, a->att, r, D), &w->wo,
                           min_int(step.rows, rows - r));                   /* x  += att Wo^T     */
            if (pause_after_step(m, &step)) return 1;
        }
        for (int r = 0; r < rows; r += step.mlp) {
            const int n = min_int(step.mlp, rows - r);
            float *xr = x + (size_t)r * D;                                  /* xr  (n, D)         */
            qemb_act *xn = act_row(op, a->xn, r, D);
            op->layernorm(be, xn, xr, w->bo, w->attn_norm, w->attn_norm_bias, n);
            op->matmul_gelu(be, a->h, xn, &w->wup, w->bup, n);              /* h   (n, F)         */
            op->matmul_add(be, xr, a->h, &w->wdown, n);                     /* xr += h Wdown^T    */
            op->layernorm(be, xn, xr, w->bdown, w->mlp_norm, w->mlp_norm_bias, n);
            if (pause_after_step(m, &step)) return 1;
        }
    }
    if (!first) op->gather_mean(be, a->x_last, x, NULL, b);                 /* x_last (B, D)      */
    return 0;
}

/* clang-format on */
