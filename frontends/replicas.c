/* replicas.c - the same model on several devices; see replicas.h. */
#include "replicas.h"

#include "console.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* ---- opening --------------------------------------------------------------------------------- */

/* The CPU threads of one replica. Several share the threads out. */
static int share_of_threads(const model_options *o) {
    int n = o->engine.threads;
    if (o->n_devices == 1) return n;
    if (!n) n = qemb_cpu_count();
    return n > o->n_devices ? n / o->n_devices : 1;
}

int replica_try_open(qemb_model **m, const qemb_file *f, const model_options *o, int i,
                     layer_loaded *on_layer_loaded, qemb_err *err) {
    qemb_err why;
    qemb_options opt = o->engine;
    opt.device = o->devices[i];
    opt.threads = share_of_threads(o);
    opt.on_layer_loaded = on_layer_loaded;
    if (!qemb_open(m, f, o->ops, &opt, &why)) return 0;
    if (o->n_devices == 1) return qemb_fail(err, why.code, "%s", why.msg);
    return qemb_fail(err, why.code, "device %d: %s", o->devices[i], why.msg);
}

qemb_model *replica_open(const qemb_file *f, const model_options *o, int i,
                         layer_loaded *on_layer_loaded) {
    qemb_err err;
    qemb_model *m;
    if (replica_try_open(&m, f, o, i, on_layer_loaded, &err)) DIE(STATUS_MODEL, "%s", err.msg);
    return m;
}

typedef struct {
    qemb_model *model;
    const qemb_file *file;
    const model_options *options;
    int i;
    pthread_t thread;
} opening;

static void *open_main(void *arg) {
    opening *o = arg;
    o->model = replica_open(o->file, o->options, o->i, NULL);
    return NULL;
}

void replicas_open(qemb_model **m, const qemb_file *f, const model_options *o,
                   layer_loaded *on_layer_loaded) {
    opening others[MAX_DEVICES];
    for (int i = 1; i < o->n_devices; i++) {
        others[i] = (opening){.file = f, .options = o, .i = i};
        const int error = pthread_create(&others[i].thread, NULL, open_main, &others[i]);
        if (error) DIE(STATUS_MODEL, "thread: cannot start it (%s)", strerror(error));
    }
    m[0] = replica_open(f, o, 0, on_layer_loaded);
    for (int i = 1; i < o->n_devices; i++) {
        pthread_join(others[i].thread, NULL);
        m[i] = others[i].model;
    }
}

/* ---- warm-up --------------------------------------------------------------------------------- */

enum {
    WARM_UP_ROWS = 1024, /* the largest batch that the CUDA tables run as a graph */
    WARM_UP_TIMES = 3    /* launched op by op, recorded, replayed */
};

/* Computes a text of n tokens. Returns 1. */
static int embed_alone(qemb_model *m, qemb_batch *b, const int32_t *ids, int n, float *out) {
    qemb_batch_clear(b);
    qemb_pack_add(b, ids, n);
    qemb_embed(m, b, out);
    return 1;
}

int replica_warm_up(qemb_model *m, const qemb_file *f, const qemb_ops *ops) {
    const qemb_options *o = qemb_options_of(m);
    const int largest = o->batch_tokens < o->max_tokens ? o->batch_tokens : o->max_tokens;
    const int small = largest < WARM_UP_ROWS ? largest : WARM_UP_ROWS;
    const int times = o->no_graphs ? 1 : WARM_UP_TIMES;
    int32_t *ids = calloc((size_t)largest, sizeof *ids);
    float *out = malloc((size_t)qemb_dim(&f->config) * sizeof *out);
    qemb_batch *b = qemb_batch_new(m);
    const int has_memory = ids && out && b;
    int batches = 0;
    /* n is the smallest text of its size: it is padded by a second one, as nearly all texts are. */
    for (int n = 1; has_memory && n <= small; n = (ops->pad_rows ? ops->pad_rows(n) : n) + 1)
        for (int k = 0; k < times; k++) batches += embed_alone(m, b, ids, n, out);
    if (has_memory) batches += embed_alone(m, b, ids, largest, out);
    qemb_batch_free(b);
    free(out);
    free(ids);
    return batches;
}
