/* fuzz_file.c - libFuzzer target: for any header, directory and tables, the loader and the
 * tokenizer refuse the file, or everything that they bind lies within it.
 *
 * The input is a patch for a small valid model: { u16 offset, u8 byte } ..., applied to header,
 * directory and tables. Unless the first byte is odd, size and checksum are then corrected, so that
 * the later checks are reached. Its next bits choose the model: an older one, one with a dense
 * layer, a reranker, an encoder, or one in INT8 with a dense layer. */
#include "lib/text_ids.h"
#include "tests/unit/support.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint8_t touch(const void *p, size_t n) {
    return n ? ((const uint8_t *)p)[0] ^ ((const uint8_t *)p)[n - 1] : 0;
}

/* Of a matrix, and of its scales. */
static uint8_t touch_matrix(const qemb_mat *m) {
    const size_t rows = (size_t)m->rows, n = rows * (size_t)m->cols;
    if (m->dtype != QEMB_I8) return touch(m->data, n * 2);
    return touch(m->data, n) ^ touch(m->scale, rows * QEMB_GROUPS((size_t)m->cols) * 4);
}

static uint8_t touch_floats(const float *p, size_t n) { return touch(p, n * sizeof *p); }

static uint8_t touch_qwen3(const qemb_file *f) {
    const qemb_config *c = &f->config;
    const size_t hd = (size_t)c->head_dim;
    uint8_t x = touch(f->merges, f->n_merges * 8u);
    for (int l = 0; l < c->n_layers; l++) {
        const qemb_layer *y = &f->weights.layers[l];
        x ^= touch_floats(y->q_norm, hd) ^ touch_floats(y->k_norm, hd);
    }
    return x ^ touch_floats(f->weights.final_norm, (size_t)c->hidden);
}

static uint8_t touch_bert(const qemb_file *f) {
    const qemb_config *c = &f->config;
    const qemb_weights *w = &f->weights;
    const size_t D = (size_t)c->hidden, F = (size_t)c->ffn;
    uint8_t x = touch(f->unigram, f->unigram_bytes);
    x ^= touch_floats(w->pos_emb, (size_t)qemb_position_rows(c) * D);
    x ^= touch_floats(w->emb_norm, D) ^ touch_floats(w->emb_norm_bias, D);
    for (int l = 0; l < c->n_layers; l++) {
        const qemb_layer *y = &w->layers[l];
        x ^= touch_floats(y->bqkv, 3 * D) ^ touch_floats(y->bup, F);
        x ^= touch_floats(y->bo, D) ^ touch_floats(y->bdown, D);
        x ^= touch_floats(y->attn_norm_bias, D) ^ touch_floats(y->mlp_norm_bias, D);
    }
    return x;
}

/* Reads the first and last byte of everything bound. */
static volatile uint8_t sink;
static void walk(const qemb_file *f) {
    const qemb_config *c = &f->config;
    const size_t D = (size_t)c->hidden, rows = (size_t)c->dense_rows;
    uint8_t x = touch(f->added, f->added_bytes) ^ touch(f->provenance, f->provenance_bytes);
    x ^= c->architecture == QEMB_BERT ? touch_bert(f) : touch_qwen3(f);
    for (int i = 0; i < f->n_prompts; i++)
        x ^= (uint8_t)(strlen(f->prompts[i].name) ^ strlen(f->prompts[i].text));
    for (int l = 0; l < c->n_layers; l++) {
        qemb_layer *y = &f->weights.layers[l];
        qemb_mat *m[QEMB_LAYER_MATRICES];
        qemb_layer_matrices(y, m);
        for (int i = 0; i < QEMB_LAYER_MATRICES; i++) x ^= touch_matrix(m[i]);
        x ^= touch_floats(y->attn_norm, D) ^ touch_floats(y->mlp_norm, D);
    }
    if (rows)
        x ^= touch_floats(f->weights.dense, rows * D) ^ touch_floats(f->weights.dense_bias, rows);
    sink = x ^ touch_matrix(&f->weights.tok_emb);
}

/* Added tokens, pieces, and characters that the charsmap replaces. */
static const char sample[] = "abba <eos> ab\t\xc2\xa0 <mask></s>e\xcc\x81!";

/* The ids of a text, or of a pair: each has a row in the table. */
static void try_ids(const qemb_file *f, const qemb_tokenizer *t) {
    static const char *const part[] = {sample};
    static const size_t len[] = {sizeof sample - 1};
    const text_pair pair = {"t", "ab", "abba <eos> ab", 1, 2, 13};
    text_ids ids;
    qemb_err err;
    if (text_ids_open(&ids, f, t, 0, &err)) return;
    size_t cut;
    const int n = f->config.kind == QEMB_RERANKER ? text_ids_pair(&ids, &pair, 0, &cut, &err)
                                                  : text_ids_encode(&ids, part, len, 1, &cut, &err);
    if (n > ids.max_tokens) abort();
    for (int i = 0; i < n; i++)
        if (ids.ids[i] < 0 || ids.ids[i] >= f->config.vocab) abort();
    text_ids_close(&ids);
}

static void try_tokenizer(const qemb_file *f) {
    qemb_tokenizer *t;
    qemb_err err;
    if (qemb_file_tokenizer(&t, f, &err)) return;
    qemb_tokenizer_state *s = qemb_tokenizer_state_new(t);
    qemb_tokenizer_result r;
    if (!s || qemb_tokenizer_encode(s, sample, sizeof sample - 1, SIZE_MAX, &r, &err)) abort();
    qemb_tokenizer_state_free(s);
    try_ids(f, t);
    qemb_tokenizer_close(t);
}

enum { MODELS = 5 };

/* Small valid models, made once; copy has room for each. */
static struct {
    uint8_t *data;
    size_t bytes;
} models[MODELS];
static uint8_t *copy;

static void make_models(void) {
    qemb_config c = {.n_layers = 1,
                     .hidden = 8,
                     .n_heads = 2,
                     .n_kv_heads = 1,
                     .head_dim = 4,
                     .ffn = 8,
                     .vocab = 300,
                     .max_positions = 64,
                     .eos_id = 299,
                     .rope_theta = 1e6f,
                     .norm_eps = 1e-6f};
    models[0].data = make_model(&c, 1, 1, &models[0].bytes);
    c.dense_rows = 3, c.activation = QEMB_TANH, c.pooling = QEMB_POOL_MEAN;
    c.attention = QEMB_BIDIRECTIONAL, c.window = 32;
    models[1].data = make_model(&c, 1, 1, &models[1].bytes);
    c.dense_rows = 1, c.activation = QEMB_IDENTITY, c.pooling = QEMB_POOL_LAST;
    c.attention = QEMB_CAUSAL, c.kind = QEMB_RERANKER, c.eos_id = QEMB_NO_TOKEN;
    models[2].data = make_model(&c, 1, 1, &models[2].bytes);
    qemb_config bert = bert_configs[0];
    bert.n_layers = 1, bert.hidden = 8, bert.n_heads = bert.n_kv_heads = 2, bert.head_dim = 4;
    bert.ffn = 8, bert.max_positions = 64;
    models[3].data = make_model(&bert, 1, 1, &models[3].bytes);
    bert.dense_rows = 3, bert.pooling = QEMB_POOL_MEAN, bert.pad_id = QEMB_NO_TOKEN;
    models[4].data = make_model_of(QEMB_I8, &bert, 1, 1, &models[4].bytes);
    size_t most = 0;
    for (int i = 0; i < MODELS; i++)
        if (models[i].bytes > most) most = models[i].bytes;
    copy = malloc(most);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!copy) make_models();
    if (!size) return 0;
    const size_t bytes = models[data[0] / 2 % MODELS].bytes;
    memcpy(copy, models[data[0] / 2 % MODELS].data, bytes);
    for (size_t i = 1; i + 3 <= size; i += 3) {
        size_t at = (size_t)data[i] | (size_t)data[i + 1] << 8;
        if (at >= 168) at += 3928; /* skip the header's reserved bytes: they are all alike */
        copy[at % bytes] = data[i + 2];
    }
    if (!(data[0] & 1)) seal_model(copy, bytes);
    char path[64];
    int fd = memfd_create("model", 0);
    if (fd < 0 || write(fd, copy, bytes) != (ssize_t)bytes) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    qemb_file *f;
    qemb_err err = {0};
    if (qemb_file_open(&f, path, &err)) {
        if (!err.code || !err.msg[0]) abort();
    } else {
        walk(f);
        try_tokenizer(f);
        qemb_file_close(f);
    }
    close(fd);
    return 0;
}
