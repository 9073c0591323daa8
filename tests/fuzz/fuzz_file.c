/* fuzz_file.c - libFuzzer target: for any header, directory and tables, the loader and the
 * tokenizer refuse the file, or everything that they bind lies within it.
 *
 * The input is a patch for a small valid model: { u16 offset, u8 byte } ..., applied to header,
 * directory and tables. Unless the first byte is odd, size and checksum are then corrected, so that
 * the later checks are reached. */
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
    sink = x ^ touch(f->weights.final_norm, D);
}

static void try_tokenizer(const qemb_file *f) {
    qemb_tokenizer *t;
    qemb_err err;
    if (qemb_tokenizer_open(&t, f->merges, f->n_merges, f->added, f->added_bytes, &err)) return;
    qemb_tokenizer_state *s = qemb_tokenizer_state_new(t);
    qemb_tokenizer_result r;
    if (!s || qemb_tokenizer_encode(s, "abba <eos> ab", 13, SIZE_MAX, &r, &err)) abort();
    qemb_tokenizer_state_free(s);
    qemb_tokenizer_close(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static uint8_t *model, *copy;
    static size_t bytes;
    const qemb_config c = {1, 8, 2, 1, 4, 8, 300, 64, 299, 1e6f, 1e-6f};
    if (!model) model = make_model(&c, 1, 1, &bytes), copy = malloc(bytes);
    if (!size) return 0;
    memcpy(copy, model, bytes);
    for (size_t i = 1; i + 3 <= size; i += 3) {
        size_t at = (size_t)data[i] | (size_t)data[i + 1] << 8;
        if (at >= 128) at += 3968; /* skip the header's reserved bytes: they are all alike */
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
