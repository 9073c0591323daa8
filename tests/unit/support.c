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

#define BERT(L, D, H, F, max, first, pad, pool, eps)                                               \
    .architecture = QEMB_BERT, .n_layers = L, .hidden = D, .n_heads = H, .n_kv_heads = H,          \
    .head_dim = (D) / (H), .ffn = F, .vocab = 300, .max_positions = max, .norm_eps = eps,          \
    .bos_id = 0, .eos_id = 2, .pad_id = pad, .first_position = first, .pooling = pool,             \
    .attention = QEMB_BIDIRECTIONAL
const qemb_config bert_configs[] = {
    {BERT(2, 64, 4, 96, 700, 2, 1, QEMB_POOL_FIRST, 1e-5f)},
    {BERT(2, 96, 3, 80, 300, 0, QEMB_NO_TOKEN, QEMB_POOL_MEAN, 1e-12f)},
    {BERT(1, 64, 1, 40, 300, 2, 1, QEMB_POOL_MEAN, 1e-5f)},
    {BERT(3, 33, 3, 51, 300, 1, 7, QEMB_POOL_FIRST, 1e-5f)},
    {BERT(2, 128, 2, 72, 300, 2, 1, QEMB_POOL_FIRST, 1e-5f), .dense_rows = 5},
};
const int n_bert_configs = sizeof bert_configs / sizeof *bert_configs;

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

/* Numbers around 0: a bias, or rows of a table. */
static void floats(writer *w, const char *name, int rows, int cols) {
    const size_t n = (size_t)rows * (size_t)cols;
    rng_floats(&w->r, section(w, name, QEMB_F32, (uint64_t)rows, (uint64_t)cols), n, 1);
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

/* ---- the vocabulary of QEMB_BERT ------------------------------------------------------------- */

enum { MASK = 249, SINGLES = 4, PAIRS = 2 };

/* Writes piece i, and returns its bytes. 4: U+2581; 5 .. 98: "!" to "~"; 99 .. 124: U+2581 before a
 * letter; 125 .. 248: "aa", "ab" and so on. */
static int piece(char *p, int i) {
    static const char *const special[] = {"<s>", "<pad>", "</s>", "<unk>", "\u2581"};
    if (i < 5) return sprintf(p, "%s", special[i]);
    if (i < 99) return sprintf(p, "%c", '!' + i - 5);
    if (i < 125) return sprintf(p, "\u2581%c", 'a' + i - 99);
    if (i < MASK) return sprintf(p, "%c%c", 'a' + (i - 125) / 26, 'a' + (i - 125) % 26);
    return sprintf(p, "<mask>");
}

static void unigram(writer *w) {
    static const uint32_t singles[SINGLES][2] = {/* "" and " " are short parts of "A é" */
                                                 {0x01, 0},
                                                 {0x09, 1 | 1 << 24},
                                                 {0xa0, 1 | 1 << 24},
                                                 {0xff21, 0 | 1 << 24}};
    static const uint32_t pairs[PAIRS][3] = {{'e', 0x301, 2 | 2 << 24}, {'o', 0x301, 0 | 4 << 24}};
    static const char replacements[] = "A \u00e9";
    uint8_t lengths[UNIGRAM_PIECES], table[8192] = {0}, *p = table + 32;
    char text[2048], *end = text;
    for (int i = 0; i < UNIGRAM_PIECES; i++) {
        const double score = i < 4 || i == MASK ? 0 : -1 - i / 64.0;
        lengths[i] = (uint8_t)piece(end, i);
        end += lengths[i];
        memcpy(p, &score, 8), p += 8;
    }
    const size_t bytes = (size_t)(end - text), n = sizeof replacements - 1;
    const uint32_t header[] = {UNIGRAM_PIECES, 3, 0, SINGLES, PAIRS, (uint32_t)bytes, (uint32_t)n};
    for (int i = 0; i < 7; i++) put_le(table + 4 * i, header[i], 4);
    for (int i = 0; i < SINGLES * 2; i++, p += 4) put_le(p, singles[i / 2][i % 2], 4);
    for (int i = 0; i < PAIRS * 3; i++, p += 4) put_le(p, pairs[i / 3][i % 3], 4);
    memcpy(p, lengths, sizeof lengths), p += sizeof lengths;
    memcpy(p, text, bytes), p += bytes;
    memcpy(p, replacements, n), p += n;
    blob(w, "unigram", table, (size_t)(p - table));
}

static size_t put_added(uint8_t *p, uint32_t id, const char *s, int lstrip) {
    const size_t n = strlen(s);
    put_le(p, id, 4), put_le(p + 4, n | (uint64_t)lstrip << 31, 4);
    memcpy(p + 8, s, n);
    return 8 + (n + 3) / 4 * 4;
}

/* ---- the whole file -------------------------------------------------------------------------- */

static void header(uint8_t *h, const qemb_config *c, uint32_t n_sections) {
    memcpy(h, "qemb\r\n\x1a\n", 8);
    put_le(h + 8, 1, 4);
    put_le(h + 12, 0x01020304, 4);
    put_le(h + 32, n_sections, 4);
    const int32_t sizes[] = {c->n_layers, c->hidden, c->n_heads,       c->n_kv_heads, c->head_dim,
                             c->ffn,      c->vocab,  c->max_positions, c->eos_id};
    for (int i = 0; i < 9; i++) put_le(h + 72 + 4 * i, (uint32_t)sizes[i], 4);
    memcpy(h + 108, &c->rope_theta, 4);
    memcpy(h + 112, &c->norm_eps, 4);
    const int32_t kind[] = {(int)c->kind,  (int)c->pooling,    (int)c->attention,
                            c->dense_rows, (int)c->activation, c->window};
    for (int i = 0; i < 6; i++) put_le(h + 116 + 4 * i, (uint32_t)kind[i], 4);
    if (c->architecture != QEMB_BERT) return;
    const int32_t bert[] = {QEMB_BERT, c->bos_id, c->pad_id, c->first_position};
    for (int i = 0; i < 4; i++) put_le(h + 148 + 4 * i, (uint32_t)bert[i], 4);
}

static void tables(writer *w, const qemb_config *c) {
    const int32_t eos = c->eos_id == QEMB_NO_TOKEN ? c->vocab - 1 : c->eos_id;
    uint8_t added[128] = {0}, *p = added;
    if (c->architecture == QEMB_BERT) {
        char s[16];
        unigram(w);
        for (uint32_t i = 0; i < 4; i++) piece(s, (int)i), p += put_added(p, i, s, 0);
        p += put_added(p, MASK, "<mask>", 1);
    } else {
        put_le(section(w, "merges", QEMB_U32, 1, 2), 64 | (uint64_t)65 << 32, 8); /* "a" "b" */
        p += put_added(p, (uint32_t)eos, "<eos>", 0);
    }
    blob(w, "added_tokens", added, (size_t)(p - added));
    if (c->kind == QEMB_RERANKER)
        blob(w, "prompts", reranker_prompts, sizeof reranker_prompts - 1);
    else if (c->architecture == QEMB_BERT)
        blob(w, "prompts", "query\0query: \0passage\0passage: ", 32);
    else
        blob(w, "prompts", "query\0Instruct: find\nQuery:\0document\0", 38);
    blob(w, "provenance", "source: tests\n", 14);
}

#define NAME(s) (snprintf(name, sizeof name, "layers.%d." s, l), name)

static void qwen3_layer(writer *w, const qemb_config *c, qemb_dtype dtype, double gate_scale,
                        int l) {
    const int D = c->hidden, H = c->n_heads, K = c->n_kv_heads, hd = c->head_dim, F = c->ffn;
    char name[48];
    vector(w, NAME("attn_norm"), D);
    matrix(w, dtype, NAME("wqkv"), (H + 2 * K) * hd, D, 1);
    vector(w, NAME("q_norm"), hd);
    vector(w, NAME("k_norm"), hd);
    matrix(w, dtype, NAME("wo"), D, H * hd, 1);
    vector(w, NAME("mlp_norm"), D);
    matrix(w, dtype, NAME("wgu"), 2 * F, D, gate_scale);
    matrix(w, dtype, NAME("wdown"), D, F, 1);
}

static void bert_layer(writer *w, const qemb_config *c, qemb_dtype dtype, double gate_scale,
                       int l) {
    const int D = c->hidden, F = c->ffn;
    char name[48];
    matrix(w, dtype, NAME("wqkv"), 3 * D, D, 1);
    floats(w, NAME("bqkv"), 1, 3 * D);
    matrix(w, dtype, NAME("wo"), D, D, 1);
    floats(w, NAME("bo"), 1, D);
    vector(w, NAME("attn_norm"), D);
    floats(w, NAME("attn_norm_bias"), 1, D);
    matrix(w, dtype, NAME("wup"), F, D, gate_scale);
    floats(w, NAME("bup"), 1, F);
    matrix(w, dtype, NAME("wdown"), D, F, 1);
    floats(w, NAME("bdown"), 1, D);
    vector(w, NAME("mlp_norm"), D);
    floats(w, NAME("mlp_norm_bias"), 1, D);
}

#undef NAME

uint8_t *make_model(const qemb_config *c, uint64_t seed, double gate_scale, size_t *bytes) {
    return make_model_of(QEMB_F16, c, seed, gate_scale, bytes);
}

uint8_t *make_model_of(qemb_dtype dtype, const qemb_config *c, uint64_t seed, double gate_scale,
                       size_t *bytes) {
    const int D = c->hidden, is_bert = c->architecture == QEMB_BERT;
    const uint32_t layer = (is_bert ? 12 : 8) + (dtype == QEMB_I8 ? 4 : 0);
    const uint32_t n = (is_bert ? 8 : 6) + layer * (uint32_t)c->n_layers + (c->dense_rows ? 2 : 0);
    writer w = {calloc(1, 4096 + n * 96), 4096 + n * 96, 4096, {seed * 0x9e3779b97f4a7c15u + 1}};
    header(w.data, c, n);
    tables(&w, c);
    matrix(&w, QEMB_F16, "tok_emb", c->vocab, D, sqrt(D));
    if (is_bert) {
        floats(&w, "pos_emb", c->first_position + c->max_positions, D);
        vector(&w, "emb_norm", D);
        floats(&w, "emb_norm_bias", 1, D);
    }
    for (int l = 0; l < c->n_layers; l++)
        (is_bert ? bert_layer : qwen3_layer)(&w, c, dtype, gate_scale, l);
    if (!is_bert) vector(&w, "final_norm", D);
    if (c->dense_rows) {
        floats(&w, "dense", c->dense_rows, D);
        vector(&w, "dense_bias", c->dense_rows);
    }
    seal_model(w.data, w.bytes);
    *bytes = w.bytes;
    return w.data;
}

int counts_from_low(const qemb_ops *op) {
    return !strcmp(op->name, "avx2-int8") || !strcmp(op->name, "avxvnni-int8");
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

void multiply(const qemb_ops *op, float *y, const float *x, qemb_mat w, int T) {
    const qemb_config c = {
        .n_layers = 1, .hidden = w.cols, .n_heads = 1, .n_kv_heads = 1, .head_dim = 2};
    const qemb_options opt = {.batch_tokens = T, .max_tokens = T, .threads = 2};
    qemb_backend *be;
    if (op->open(&be, &c, &opt, NULL)) abort();
    load_matrices(op, be, &w, NULL);
    op->matmul(be, (qemb_act *)y, (const qemb_act *)x, &w, NULL, T);
    op->close(be);
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
