/* fuzz_file.c - libFuzzer target: for any header, directory and tables, the loader and the
 * tokenizer refuse the file, or everything that they bind lies within it.
 *
 * The input is a patch for a small valid model: { u16 offset, u8 byte } ..., applied to header,
 * directory and tables. Unless the first byte is odd, size and checksum are then corrected, so that
 * the later checks are reached. Its next bits choose the model: an older one, one with a dense
 * layer, or a reranker. */
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

/* Reads the first and last byte of everything bound. */
static volatile uint8_t sink;
static void walk(const qemb_file *f) {
    const qemb_config *c = &f->config;
    const size_t D = (size_t)c->hidden * sizeof(float);
    uint8_t x = touch(f->merges, f->n_merges * 8u) ^ touch(f->added, f->added_bytes) ^
                touch(f->provenance, f->provenance_bytes);
    for (int i = 0; i < f->n_prompts; i++)
        x ^= (uint8_t)(strlen(f->prompts[i].name) ^ strlen(f->prompts[i].text));
    for (int l = 0; l < c->n_layers; l++) {
        const qemb_layer *y = &f->weights.layers[l];
        const qemb_mat *m[] = {&f->weights.tok_emb, &y->wqkv, &y->wo, &y->wgu, &y->wdown};
        for (int i = 0; i < 5; i++)
            x ^= touch(m[i]->data, (size_t)m[i]->rows * (size_t)m[i]->cols * 2);
        x ^= touch(y->attn_norm, D) ^ touch(y->mlp_norm, D);
        x ^= touch(y->q_norm, (size_t)c->head_dim * 4) ^ touch(y->k_norm, (size_t)c->head_dim * 4);
    }
    if (c->dense_rows) {
        const size_t rows = (size_t)c->dense_rows;
        x ^= touch(f->weights.dense, rows * D) ^ touch(f->weights.dense_bias, rows * 4);
    }
    sink = x ^ touch(f->weights.final_norm, D);
}

/* The ids of a text, or of a pair: each has a row in the table. */
static void try_ids(const qemb_file *f, const qemb_tokenizer *t) {
    static const char *const part[] = {"abba <eos> ab"};
    static const size_t len[] = {13};
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
    if (!s || qemb_tokenizer_encode(s, "abba <eos> ab", 13, SIZE_MAX, &r, &err)) abort();
    qemb_tokenizer_state_free(s);
    try_ids(f, t);
    qemb_tokenizer_close(t);
}

enum { MODELS = 3 };

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
    copy = malloc(models[0].bytes + models[1].bytes + models[2].bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (!copy) make_models();
    if (!size) return 0;
    const size_t bytes = models[data[0] / 2 % MODELS].bytes;
    memcpy(copy, models[data[0] / 2 % MODELS].data, bytes);
    for (size_t i = 1; i + 3 <= size; i += 3) {
        size_t at = (size_t)data[i] | (size_t)data[i + 1] << 8;
        if (at >= 148) at += 3948; /* skip the header's reserved bytes: they are all alike */
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
