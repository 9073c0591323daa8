/* model.h - an open model, as the two forwards see it: qemb_forward in qemb.c, encoder_forward in
 * lib/encoder.c. */
#ifndef QEMB_MODEL_H
#define QEMB_MODEL_H

#include "backends/cpu/cpu.h"

enum { MAX_IN_FLIGHT = 2 }; /* of any table */

typedef struct {   /* for at most R rows, C of them at a time in the MLP */
    float *x;      /* (R, D)          the residual stream */
    float *x_last; /* (B, D)          its rows that go on after the last attention, or means */
    qemb_act *xn;  /* (R, D)          normed rows */
    qemb_act *qkv; /* (R, (H+2K)*hd) */
    qemb_act *att; /* (R, H*hd) */
    qemb_act *gu;  /* (C, 2F)         QEMB_QWEN3 alone */
    qemb_act *h;   /* (C, F) */
} activations;

typedef struct { /* what a forward writes */
    activations a;
    int32_t *tokens, *pos, *cu; /* of its batch, in one allocation that begins at tokens */
} workspace;

struct qemb_model {
    const qemb_file *file;
    const qemb_ops *ops;
    qemb_backend *be;
    qemb_options opt;
    qemb_weights w;       /* as load_weights left them; w.layers is owned */
    workspace now;        /* of the batch being computed */
    workspace between;    /* of qemb_embed_between */
    int in_step;          /* between_steps is being called */
    qemb_model *fallback; /* the same model over ops->fallback, or NULL */
    uint64_t recomputed;
    qemb_err changed; /* the file was written to; code NULL: it was not */
    struct {          /* batches that are submitted and not collected, oldest first */
        const qemb_batch *b;
        float *out;
        float *rows; /* (B, D) what the dense layer reads, one of `pooled`; or out */
        int given_up;
    } running[MAX_IN_FLIGHT];
    int n_running;
    float *pooled;               /* (qemb_in_flight, batch_tokens, D), NULL without a dense layer */
    struct cpu_pool *dense_pool; /* computes the dense layer beside a GPU, or NULL */
    int next_pooled;
};

/* How many rows a step of the forward computes. */
typedef struct {
    int rows;    /* of all that is not named here */
    int queries; /* of attention */
    int mlp;     /* of the MLP, at most mlp_rows of the options */
    int pauses;  /* between_steps is called after each step */
} steps;

/* In qemb.c. */
steps steps_of(const qemb_model *m, const qemb_packed_batch *b);

/* The end of a step. Returns 1 if the batch is given up. */
static inline int pause_after_step(qemb_model *m, const steps *s) {
    if (!s->pauses) return 0;
    m->in_step = 1;
    const int given_up = m->opt.between_steps(m->opt.between_arg);
    m->in_step = 0;
    return given_up;
}

/* b, of whose rows attention computes r .. r+n-1, or as many as there are. */
static inline qemb_packed_batch queries_of(const qemb_packed_batch *b, int r, int n) {
    qemb_packed_batch some = *b;
    if (n < b->T) some.first = r, some.rows = min_int(n, b->T - r);
    return some;
}

/* Row t of a (rows, n). */
static inline qemb_act *act_row(const qemb_ops *op, qemb_act *a, int t, int n) {
    return (qemb_act *)((char *)a + (size_t)t * (size_t)n * op->act_size);
}

/* x_last (B, D) of b, computed by m, a QEMB_BERT. Returns 0, or 1 if the batch was given up between
 * two steps. */
int encoder_forward(qemb_model *m, const qemb_packed_batch *b);

#endif
