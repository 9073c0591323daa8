/* support.c - see support.h. The .qemb writer follows the layout in qemb.h and nothing in
 * model_file.c. */
#include "support.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CONFIG(L, D, H, K, hd, F, max, theta, eps)                                                 \
    {                                                                                              \
        .n_layers = L, .hidden = D, .n_heads = H, .n_kv_heads = K, .head_dim = hd, .ffn = F,       \
        .vocab = 300, .eos_id = 299, .max_positions = max, .rope_theta = theta, .norm_eps = eps,   \
        .bos_id = QEMB_NO_TOKEN, .pad_id = QEMB_NO_TOKEN                                           \
    }
const qemb_config small_configs[] = {
    CONFIG(2, 64, 4, 4, 16, 96, 700, 1e6f, 1e-6f),
    CONFIG(2, 48, 4, 2, 64, 80, 300, 1e6f, 1e-6f),
    CONFIG(1, 72, 8, 2, 128, 40, 300, 1e4f, 1e-5f),
    CONFIG(3, 33, 3, 1, 18, 51, 300, 1e6f, 1e-6f),
};
const int n_small_configs = sizeof small_configs / sizeof *small_configs;

uint64_t rng_u64(rng *r) {
    r->s ^= r->s >> 12, r->s ^= r->s << 25, r->s ^= r->s >> 27;
    return r->s * 0x2545f4914f6cdd1du;
}

double rng_uniform(rng *r) { return (double)(rng_u64(r) >> 11) * 0x1p-52 - 1; }

void rng_floats(rng *r, float *x, size_t n, double scale) {
    for (size_t i = 0; i < n; i++) x[i] = (float)(scale * rng_uniform(r));
}

/* double to half, rounded toward zero, since any half serves */
static uint16_t half_of(double v) {
    int e;
    double m = frexp(fabs(v), &e); /* m in [.5, 1) */
    uint16_t bits = e < -13 ? (uint16_t)(fabs(v) * 0x1p24)
                            : (uint16_t)((e + 14) << 10 | ((int)(m * 2048) & 1023));
    return (uint16_t)(bits | (v < 0) << 15);
}

void rng_halves(rng *r, uint16_t *x, size_t n, double scale) {
    for (size_t i = 0; i < n; i++) x[i] = half_of(scale * rng_uniform(r));
}

int significant_bits(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    double m = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    int e, n = 0;
    for (m = frexp(m, &e); m > 0; n++) m = 2 * m - floor(2 * m); /* drops the first bit */
    return n;
}

/* ---- a model file ---------------------------------------------------------------------------- */

typedef struct {
    uint8_t *data;
    size_t bytes, entry; /* bytes written so far; the next directory entry */
    rng r;
} writer;

static void put_le(uint8_t *p, uint64_t v, int n) {
    for (int i = 0; i < n; i++) p[i] = (uint8_t)(v >> 8 * i);
}

/* Appends a section and its directory entry; returns the address of the section's bytes. */
static void *section(writer *w, const char *name, int dtype, uint64_t rows, uint64_t cols) {
    const int size[] = {1, 4, 4, 2, 1};
    uint64_t bytes = rows * cols * (uint64_t)size[dtype], at = (w->bytes + 255) & ~(uint64_t)255;
    w->data = realloc(w->data, at + bytes);
    memset(w->data + w->bytes, 0, at + bytes - w->bytes);
    uint8_t *e = w->data + w->entry;
    snprintf((char *)e, 48, "%s", name);
    put_le(e + 48, (uint64_t)dtype, 4);
    put_le(e + 56, rows, 8), put_le(e + 64, cols, 8), put_le(e + 72, at, 8),
        put_le(e + 80, bytes, 8);
    w->entry += 96;
    w->bytes = at + bytes;
    return w->data + at;
}

static void blob(writer *w, const char *name, const void *data, size_t n) {
    void *p = section(w, name, QEMB_U8, 1, n);
    if (n) memcpy(p, data, n);
}

static void vector(writer *w, const char *name, int n) {
    float *p = section(w, name, QEMB_F32, 1, (uint64_t)n);
    for (int i = 0; i < n; i++) p[i] = (float)(1 + 0.5 * rng_uniform(&w->r));
}

/* Uniform in +-scale*sqrt(3/cols): if the numbers of x have RMS 1, those of y have RMS `scale`. */
static void matrix(writer *w, qemb_dtype dtype, const char *name, int rows, int cols,
                   double scale) {
    const double most = scale * sqrt(3.0 / cols);
    void *p = section(w, name, dtype, (uint64_t)rows, (uint64_t)cols);
    if (dtype == QEMB_F16) {
        const uint16_t *h = p;
        int bits = 8;
        rng_halves(&w->r, p, (size_t)rows * (size_t)cols, most);
        for (int i = 0; i < rows * cols; i++)
            if (significant_bits(h[i]) > 8) bits = 11;
        put_le(w->data + w->entry - 96 + 52, (uint64_t)bits, 4);
        return;
    }
    int8_t *q = p;
    for (int i = 0; i < rows * cols; i++) q[i] = (int8_t)(127.99 * rng_uniform(&w->r));
    char scales[48];
    snprintf(scales, sizeof scales, "%.40s.scale", name);
    const int groups = (cols + 63) / 64;
    float *s = section(w, scales, QEMB_F32, (uint64_t)rows, (uint64_t)groups);
    for (int i = 0; i < rows * groups; i++)
        s[i] = (float)(most / 127 * (1 + 0.5 * rng_uniform(&w->r)));
}

void seal_model(uint8_t *m, size_t bytes) {
    put_le(m + 16, bytes, 8);
    uint32_t n =
        (uint32_t)m[32] | (uint32_t)m[33] << 8 | (uint32_t)m[34] << 16 | (uint32_t)m[35] << 24;
    uint64_t end = 4096 + (uint64_t)n * 96, h = 0xcbf29ce484222325u;
    if (end > bytes) end = bytes;
    for (uint64_t i = 0; i < end; i++) {
        uint8_t byte = i >= 24 && i < 32 ? 0 : m[i];
        h = (h ^ byte) * 0x100000001b3u;
    }
    put_le(m + 24, h, 8);
}

static const char reranker_prompts[] = /* of the tokens <eos>, "J:" and so on */
    "prefix\0<eos>J: \0suffix\0 <eos>ab\0instruct\0rank\0";

uint8_t *make_model(const qemb_config *c, uint64_t seed, double gate_scale, size_t *bytes) {
    return make_model_of(QEMB_F16, c, seed, gate_scale, bytes);
}

uint8_t *make_model_of(qemb_dtype dtype, const qemb_config *c, uint64_t seed, double gate_scale,
                       size_t *bytes) {
    const int D = c->hidden, H = c->n_heads, K = c->n_kv_heads, hd = c->head_dim, F = c->ffn;
    const uint32_t n =
        6 + (dtype == QEMB_I8 ? 12 : 8) * (uint32_t)c->n_layers + (c->dense_rows ? 2 : 0);
    writer w = {calloc(1, 4096 + n * 96), 4096 + n * 96, 4096, {seed * 0x9e3779b97f4a7c15u + 1}};
    memcpy(w.data, "qemb\r\n\x1a\n", 8);
    put_le(w.data + 8, 1, 4);
    put_le(w.data + 12, 0x01020304, 4);
    put_le(w.data + 32, n, 4);
    const int32_t fields[] = {c->n_layers, D, H, K, hd, F, c->vocab, c->max_positions, c->eos_id};
    for (int i = 0; i < 9; i++) put_le(w.data + 72 + 4 * i, (uint32_t)fields[i], 4);
    memcpy(w.data + 108, &c->rope_theta, 4);
    memcpy(w.data + 112, &c->norm_eps, 4);
    const int32_t kind[] = {(int)c->kind,  (int)c->pooling,    (int)c->attention,
                            c->dense_rows, (int)c->activation, c->window};
    for (int i = 0; i < 6; i++) put_le(w.data + 116 + 4 * i, (uint32_t)kind[i], 4);

    put_le(section(&w, "merges", QEMB_U32, 1, 2), 64 | (uint64_t)65 << 32, 8); /* "a" "b" */
    uint8_t added[16] = {0};
    const int32_t eos = c->eos_id == QEMB_NO_TOKEN ? c->vocab - 1 : c->eos_id;
    put_le(added, (uint64_t)eos | (uint64_t)5 << 32, 8);
    memcpy(added + 8, "<eos>", 5);
    blob(&w, "added_tokens", added, sizeof added);
    if (c->kind == QEMB_RERANKER)
        blob(&w, "prompts", reranker_prompts, sizeof reranker_prompts - 1);
    else
        blob(&w, "prompts", "query\0Instruct: find\nQuery:\0document\0", 38);
    blob(&w, "provenance", "source: tests\n", 14);
    matrix(&w, QEMB_F16, "tok_emb", c->vocab, D, sqrt(D));
    for (int l = 0; l < c->n_layers; l++) {
        char name[48];
#define NAME(s) (snprintf(name, sizeof name, "layers.%d." s, l), name)
        vector(&w, NAME("attn_norm"), D);
        matrix(&w, dtype, NAME("wqkv"), (H + 2 * K) * hd, D, 1);
        vector(&w, NAME("q_norm"), hd);
        vector(&w, NAME("k_norm"), hd);
        matrix(&w, dtype, NAME("wo"), D, H * hd, 1);
        vector(&w, NAME("mlp_norm"), D);
        matrix(&w, dtype, NAME("wgu"), 2 * F, D, gate_scale);
        matrix(&w, dtype, NAME("wdown"), D, F, 1);
#undef NAME
    }
    vector(&w, "final_norm", D);
    if (c->dense_rows) {
        const size_t numbers = (size_t)c->dense_rows * (size_t)D;
        rng_floats(&w.r, section(&w, "dense", QEMB_F32, (uint64_t)c->dense_rows, (uint64_t)D),
                   numbers, 1);
        vector(&w, "dense_bias", c->dense_rows);
    }
    seal_model(w.data, w.bytes);
    *bytes = w.bytes;
    return w.data;
}

void load_matrices(const qemb_ops *op, qemb_backend *be, qemb_mat *w, qemb_mat *gate_up) {
    qemb_layer layer = {.wo = *w};
    qemb_weights weights = {.layers = &layer};
    qemb_err err;
    if (gate_up) layer.wgu = *gate_up;
    if (op->load_weights(be, &weights, &err)) {
        fprintf(stderr, "%s\n", err.msg);
        abort();
    }
    *w = layer.wo;
    if (gate_up) *gate_up = layer.wgu;
}

void write_temporary(char *path, const void *data, size_t bytes) {
    strcpy(path, "/tmp/qemb-test-XXXXXX");
    int fd = mkstemp(path);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes || fclose(f)) {
        perror(path);
        abort();
    }
}

qemb_file *open_model(const qemb_config *c, uint64_t seed, double gate_scale) {
    return open_model_of(QEMB_F16, c, seed, gate_scale);
}

qemb_file *open_model_of(qemb_dtype dtype, const qemb_config *c, uint64_t seed, double gate_scale) {
    char path[64];
    size_t bytes;
    uint8_t *model = make_model_of(dtype, c, seed, gate_scale, &bytes);
    write_temporary(path, model, bytes);
    free(model);
    qemb_file *f;
    qemb_err err;
    if (qemb_file_open(&f, path, &err)) {
        fprintf(stderr, "%s\n", err.msg);
        abort();
    }
    unlink(path);
    return f;
}

void embed_alone(qemb_model *m, const int32_t *ids, int n, float *out) {
    qemb_batch *b = qemb_batch_new(m);
    if (!b || qemb_pack_add(b, ids, n)) abort();
    qemb_embed(m, b, out);
    qemb_batch_free(b);
}
