/* parameters.c - how many numbers a model has; see parameters.h. */
#include "parameters.h"

model_parameters count_parameters(const qemb_config *c) {
    const size_t D = (size_t)c->hidden, F = (size_t)c->ffn, hd = (size_t)c->head_dim;
    const size_t Q = (size_t)c->n_heads * hd, KV = (size_t)c->n_kv_heads * hd;
    const size_t attention = (Q + 2 * KV) * D + D * Q;
    const int is_bert = c->architecture == QEMB_BERT;
    /* QEMB_BERT: a bias for each row of a matrix, two norms with a bias. */
    const size_t layer = is_bert ? attention + 2 * F * D + (Q + 2 * KV + D + F + D) + 4 * D
                                 : attention + 3 * F * D + 2 * D + 2 * hd;
    const size_t outer_norm = is_bert ? 2 * D : D; /* of the embeddings, or the final one */
    return (model_parameters){.layers = (size_t)c->n_layers * layer + outer_norm,
                              .tokens = (size_t)c->vocab * D,
                              .positions = is_bert ? (size_t)qemb_position_rows(c) * D : 0};
}
