/* model_file.c - maps a .qemb file, checks its header and directory, binds its tensors.
 *
 * qemb.h describes the layout. A config and the sizes of the tables determine it completely. So the
 * loader computes the layout itself and compares the directory with it; no offset of the file is
 * used before that. Opening reads the tables and vectors, which have a checksum, and no matrix;
 * --verify checks the SHA-256 of all.
 *
 * The weights stay in the file: whoever writes over it changes them under a running model. The file
 * stays open, and qemb_file_check compares its size and time of modification with those at opening.
 * What the tokenizer reads is copied, since its proofs hold for what it read when it was opened.
 */
#include "qemb.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    HEADER_BYTES = 4096,
    ENTRY_BYTES = 96,
    NAME_BYTES = 48,
    ALIGNMENT = 256,
    CONFIG_AT = 72,        /* of the config's u32 fields, */
    KIND_AT = 116,         /* of those that say what is different from an embedding model, */
    TABLES_AT = 140,       /* of the checksum of the tables and vectors */
    ARCHITECTURE_AT = 148, /* of the architecture and what only QEMB_BERT has */
    RESERVED_AT = 164,
    BLOBS = 4,        /* merges or unigram, added_tokens, prompts, provenance */
    LAYER_SCALES = 4, /* further sections in a layer of an INT8 file */
    DENSE_TENSORS = 2,
    MAX_LAYERS = 1024,
    MOST_SECTIONS = BLOBS + 4 + (12 + LAYER_SCALES) * MAX_LAYERS + DENSE_TENSORS,
    MAX_PROMPTS = 64,
    CHECKSUM_AT = 24,
};

#define LENGTH(a) ((int)(sizeof(a) / sizeof *(a)))

static const uint8_t MAGIC[8] = {'q', 'e', 'm', 'b', '\r', '\n', 0x1a, '\n'};

/* Sets err to "PATH: ..." and returns -1. */
__attribute__((format(printf, 3, 4))) static int refuse(const char *path, qemb_err *err,
                                                        const char *fmt, ...) {
    char what[256];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(what, sizeof what, fmt, ap);
    va_end(ap);
    return qemb_fail(err, "model_file", "%.128s: %s", path, what);
}

/* What the file was at opening. Its inode cannot change, since the descriptor holds it. */
struct qemb_watch {
    int fd;
    off_t bytes;
    struct timespec modified;
    char path[]; /* NUL-terminated */
};

/* ---- little-endian fields, read byte by byte on every machine -------------------------------- */

static uint32_t get_u32(const uint8_t *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t get_u64(const uint8_t *p) { return get_u32(p) | (uint64_t)get_u32(p + 4) << 32; }

static float get_f32(const uint8_t *p) {
    uint32_t bits = get_u32(p);
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static const uint64_t FNV_START = 0xcbf29ce484222325u;

static uint64_t fnv1a(uint64_t h, const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}

/* FNV-1a of header and directory, with the checksum's own field as zero. */
static uint64_t header_checksum(const uint8_t *map, uint32_t n_sections) {
    static const uint8_t zero[8];
    uint64_t h = fnv1a(FNV_START, map, CHECKSUM_AT);
    h = fnv1a(h, zero, sizeof zero);
    h = fnv1a(h, map + CHECKSUM_AT + 8, HEADER_BYTES - CHECKSUM_AT - 8);
    return fnv1a(h, map + HEADER_BYTES, (size_t)n_sections * ENTRY_BYTES);
}

/* ---- the config ------------------------------------------------------------------------------ */

/* Tensors of an architecture: beside the layers, in a layer, and before layers.0.wqkv, whose dtype
 * is that of all layer matrices. */
static const struct {
    uint32_t others, layer, first;
} tensors_of[] = {[QEMB_QWEN3] = {2, 8, 2}, [QEMB_BERT] = {4, 12, 4}};

typedef struct {
    const char *name;
    int32_t *value;
    uint32_t min, max;
} field;

/* Sets the values of n fields from the numbers at p. */
static int read_fields(const field *fields, int n, const uint8_t *p, const char *path,
                       qemb_err *err) {
    for (int i = 0; i < n; i++) {
        const uint32_t v = get_u32(p + 4 * i);
        if (v < fields[i].min || v > fields[i].max)
            return refuse(path, err,
                          "%s: out of range (got %" PRIu32 ", want %" PRIu32 "..%" PRIu32 ")",
                          fields[i].name, v, fields[i].min, fields[i].max);
        *fields[i].value = (int32_t)v;
    }
    return 0;
}

/* Reads the kind of model. What a reranker's score is computed from is fixed. */
static int read_kind(qemb_config *c, const uint8_t *p, const char *path, qemb_err *err) {
    int32_t kind, pooling, attention, activation;
    const field fields[] = {
        {"kind", &kind, 0, QEMB_RERANKER},
        {"pooling", &pooling, 0, QEMB_POOL_FIRST},
        {"attention", &attention, 0, QEMB_BIDIRECTIONAL},
        {"dense_rows", &c->dense_rows, 0, 1 << 16},
        {"activation", &activation, 0, QEMB_TANH},
        {"window", &c->window, 0, (uint32_t)c->max_positions},
    };
    if (read_fields(fields, LENGTH(fields), p, path, err)) return -1;
    c->kind = (qemb_kind)kind, c->pooling = (qemb_pooling)pooling;
    c->attention = (qemb_attention)attention, c->activation = (qemb_activation)activation;
    if (c->kind == QEMB_RERANKER &&
        (c->pooling || c->attention || c->activation || c->dense_rows != 1))
        return refuse(path, err,
                      "kind: a reranker of an unknown form (got pooling %d, attention %d, "
                      "activation %d, dense_rows %d, want 0, 0, 0, 1)",
                      pooling, attention, activation, c->dense_rows);
    return 0;
}

/* Reads the architecture and its own fields. */
static int read_architecture(qemb_config *c, const uint8_t *p, const char *path, qemb_err *err) {
    int32_t architecture;
    const field fields[] = {
        {"architecture", &architecture, 0, QEMB_BERT},
        {"bos_id", &c->bos_id, 0, UINT32_MAX},
        {"pad_id", &c->pad_id, 0, UINT32_MAX},
        {"first_position", &c->first_position, 0, 1 << 20},
    };
    if (read_fields(fields, LENGTH(fields), p, path, err)) return -1;
    c->architecture = (qemb_architecture)architecture;
    return 0;
}

static int check_token(const qemb_config *c, int32_t id, const char *name, const char *path,
                       qemb_err *err) {
    if (id == QEMB_NO_TOKEN || (id >= 0 && id < c->vocab)) return 0;
    return refuse(path, err, "%s: outside the vocabulary (got %u, want 0..%d)", name, (unsigned)id,
                  c->vocab - 1);
}

static int check_qwen3(qemb_config *c, const char *path, qemb_err *err) {
    if (c->bos_id || c->pad_id || c->first_position)
        return refuse(path, err,
                      "bos_id, pad_id, first_position: of another architecture (got %u, %u, %d, "
                      "want 0, 0, 0)",
                      (unsigned)c->bos_id, (unsigned)c->pad_id, c->first_position);
    c->bos_id = c->pad_id = QEMB_NO_TOKEN;
    if (c->pooling == QEMB_POOL_FIRST)
        return refuse(path, err, "pooling: of another architecture (got %d, want 0 or 1)",
                      (int)c->pooling);
    if (c->head_dim % 2) return refuse(path, err, "head_dim: odd (got %d, want even)", c->head_dim);
    if (!(c->rope_theta >= 1 && c->rope_theta <= 1e12f))
        return refuse(path, err, "rope_theta: out of range (got %g, want 1..1e12)",
                      (double)c->rope_theta);
    return 0;
}

static int check_bert(const qemb_config *c, const char *path, qemb_err *err) {
    if (c->kind != QEMB_EMBEDDING || c->attention != QEMB_BIDIRECTIONAL ||
        c->pooling == QEMB_POOL_LAST)
        return refuse(path, err,
                      "architecture 1: of an unknown form (got kind %d, attention %d, pooling %d, "
                      "want 0, 1, and 1 or 2)",
                      (int)c->kind, (int)c->attention, (int)c->pooling);
    if (c->n_kv_heads != c->n_heads)
        return refuse(path, err, "n_kv_heads: not n_heads (got %d, want %d)", c->n_kv_heads,
                      c->n_heads);
    if (c->n_heads * c->head_dim != c->hidden)
        return refuse(path, err, "hidden: not n_heads times head_dim (got %d, want %d)", c->hidden,
                      c->n_heads * c->head_dim);
    if (c->rope_theta != 0)
        return refuse(path, err, "rope_theta: of another architecture (got %g, want 0)",
                      (double)c->rope_theta);
    if (check_token(c, c->bos_id, "bos_id", path, err) ||
        check_token(c, c->pad_id, "pad_id", path, err))
        return -1;
    if (c->pad_id != QEMB_NO_TOKEN && !c->first_position)
        return refuse(path, err,
                      "first_position: no row before it for pad_id (got 0, want 1 or "
                      "more)");
    return 0;
}

/* Reads and bounds the config. The bounds are far above any model, and low enough that no product
 * of sizes overflows 64 bits. */
static int read_config(qemb_config *c, const uint8_t *map, const char *path, qemb_err *err) {
    const field sizes[] = {
        {"n_layers", &c->n_layers, 1, MAX_LAYERS}, {"hidden", &c->hidden, 1, 1 << 16},
        {"n_heads", &c->n_heads, 1, 1 << 10},      {"n_kv_heads", &c->n_kv_heads, 1, 1 << 10},
        {"head_dim", &c->head_dim, 2, 1 << 10},    {"ffn", &c->ffn, 1, 1 << 20},
        {"vocab", &c->vocab, 256, 1 << 24},        {"max_positions", &c->max_positions, 1, 1 << 22},
        {"eos_id", &c->eos_id, 0, UINT32_MAX},
    };
    if (read_fields(sizes, LENGTH(sizes), map + CONFIG_AT, path, err) ||
        read_kind(c, map + KIND_AT, path, err) ||
        read_architecture(c, map + ARCHITECTURE_AT, path, err))
        return -1;
    c->rope_theta = get_f32(map + 108);
    c->norm_eps = get_f32(map + 112);
    if (c->n_heads % c->n_kv_heads)
        return refuse(path, err,
                      "n_heads: not a multiple of n_kv_heads (got %d, want a multiple of %d)",
                      c->n_heads, c->n_kv_heads);
    if (check_token(c, c->eos_id, "eos_id", path, err)) return -1;
    if (c->kind == QEMB_RERANKER && c->eos_id != QEMB_NO_TOKEN)
        return refuse(path, err, "eos_id: a reranker's texts end with its suffix (got %d)",
                      c->eos_id);
    if (!(c->norm_eps > 0 && c->norm_eps < 1))
        return refuse(path, err, "norm_eps: out of range (got %g, want 0..1)", (double)c->norm_eps);
    return c->architecture == QEMB_BERT ? check_bert(c, path, err) : check_qwen3(c, path, err);
}

/* ---- the sections that a config implies ------------------------------------------------------ */

/* The expected directory entry of a section, and the pointer that is bound to the section. */
typedef struct {
    char name[NAME_BYTES];
    qemb_dtype dtype;
    uint64_t rows, cols;
    qemb_bits bits;       /* as the file records them */
    qemb_mat *matrix;     /* bound to the section, or NULL */
    const float **vector; /* bound to the section, or NULL */
} section;

static uint64_t dtype_bytes(qemb_dtype d) {
    return d == QEMB_U8 || d == QEMB_I8 ? 1 : d == QEMB_F16 ? 2 : 4;
}

__attribute__((format(printf, 5, 6))) static section *
put(section *s, qemb_dtype dtype, uint64_t rows, uint64_t cols, const char *fmt, ...) {
    memset(s, 0, sizeof *s);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(s->name, sizeof s->name, fmt, ap);
    va_end(ap);
    s->dtype = dtype, s->rows = rows, s->cols = cols;
    return s + 1;
}

static section *put_vector(section *s, const float **vector, uint64_t n, int layer,
                           const char *name) {
    section *next = put(s, QEMB_F32, 1, n, "layers.%d.%s", layer, name);
    s->vector = vector;
    return next;
}

/* Adds a layer's matrix. An INT8 matrix is followed by a section with its scales. */
static section *put_matrix(section *s, qemb_mat *matrix, qemb_dtype dtype, uint64_t rows,
                           uint64_t cols, int layer, const char *name) {
    section *next = put(s, dtype, rows, cols, "layers.%d.%s", layer, name);
    s->matrix = matrix;
    if (dtype != QEMB_I8) return next;
    s = next;
    next = put(s, QEMB_F32, rows, QEMB_GROUPS(cols), "layers.%d.%s.scale", layer, name);
    s->vector = &matrix->scale;
    return next;
}

static section *put_bert_layer(section *s, qemb_layer *y, const qemb_config *c, qemb_dtype dtype,
                               int l) {
    const uint64_t D = c->hidden, F = c->ffn;
    s = put_matrix(s, &y->wqkv, dtype, 3 * D, D, l, "wqkv");
    s = put_vector(s, &y->bqkv, 3 * D, l, "bqkv");
    s = put_matrix(s, &y->wo, dtype, D, D, l, "wo");
    s = put_vector(s, &y->bo, D, l, "bo");
    s = put_vector(s, &y->attn_norm, D, l, "attn_norm");
    s = put_vector(s, &y->attn_norm_bias, D, l, "attn_norm_bias");
    s = put_matrix(s, &y->wup, dtype, F, D, l, "wup");
    s = put_vector(s, &y->bup, F, l, "bup");
    s = put_matrix(s, &y->wdown, dtype, D, F, l, "wdown");
    s = put_vector(s, &y->bdown, D, l, "bdown");
    s = put_vector(s, &y->mlp_norm, D, l, "mlp_norm");
    return put_vector(s, &y->mlp_norm_bias, D, l, "mlp_norm_bias");
}

static section *put_qwen3_layer(section *s, qemb_layer *y, const qemb_config *c, qemb_dtype dtype,
                                int l) {
    const uint64_t D = c->hidden, F = c->ffn, hd = c->head_dim;
    const uint64_t Q = c->n_heads * hd, KV = c->n_kv_heads * hd;
    s = put_vector(s, &y->attn_norm, D, l, "attn_norm");
    s = put_matrix(s, &y->wqkv, dtype, Q + 2 * KV, D, l, "wqkv");
    s = put_vector(s, &y->q_norm, hd, l, "q_norm");
    s = put_vector(s, &y->k_norm, hd, l, "k_norm");
    s = put_matrix(s, &y->wo, dtype, D, Q, l, "wo");
    s = put_vector(s, &y->mlp_norm, D, l, "mlp_norm");
    s = put_matrix(s, &y->wgu, dtype, 2 * F, D, l, "wgu");
    return put_matrix(s, &y->wdown, dtype, D, F, l, "wdown");
}

/* A tensor of floats that belongs to no layer. */
static section *put_floats(section *s, const float **vector, uint64_t rows, uint64_t cols,
                           const char *name) {
    section *next = put(s, QEMB_F32, rows, cols, "%s", name);
    s->vector = vector;
    return next;
}

/* The list of sections, in the order of the file, for this config and dtype of the layer matrices.
 * Only the file knows the sizes of the four tables: here they have 0 rows (merges) or 0 cols (the
 * others). */
static void expected_sections(section *s, const qemb_config *c, qemb_dtype dtype, qemb_weights *w) {
    const uint64_t D = c->hidden, positions = (uint64_t)qemb_position_rows(c);
    const int is_bert = c->architecture == QEMB_BERT;
    s = is_bert ? put(s, QEMB_U8, 1, 0, "unigram") : put(s, QEMB_U32, 0, 2, "merges");
    s = put(s, QEMB_U8, 1, 0, "added_tokens");
    s = put(s, QEMB_U8, 1, 0, "prompts");
    s = put(s, QEMB_U8, 1, 0, "provenance");
    put(s, QEMB_F16, c->vocab, D, "tok_emb");
    s++->matrix = &w->tok_emb;
    if (is_bert) {
        s = put_floats(s, &w->pos_emb, positions, D, "pos_emb");
        s = put_floats(s, &w->emb_norm, 1, D, "emb_norm");
        s = put_floats(s, &w->emb_norm_bias, 1, D, "emb_norm_bias");
    }
    for (int l = 0; l < c->n_layers; l++)
        s = is_bert ? put_bert_layer(s, &w->layers[l], c, dtype, l)
                    : put_qwen3_layer(s, &w->layers[l], c, dtype, l);
    if (!is_bert) s = put_floats(s, &w->final_norm, 1, D, "final_norm");
    if (!c->dense_rows) return;
    s = put_floats(s, &w->dense, (uint64_t)c->dense_rows, D, "dense");
    put_floats(s, &w->dense_bias, 1, (uint64_t)c->dense_rows, "dense_bias");
}

/* Sets w->bits from its directory entry e. */
static int read_bits(section *w, const uint8_t *e, const char *path, qemb_err *err) {
    const uint32_t bits = get_u32(e + 52);
    if (w->dtype != QEMB_F16 && bits)
        return refuse(path, err, "%s: significant bits (got %" PRIu32 ", want 0)", w->name, bits);
    if (bits != QEMB_BITS_UNKNOWN && bits != QEMB_BITS_8 && bits != QEMB_BITS_11)
        return refuse(path, err, "%s: significant bits (got %" PRIu32 ", want 0, 8 or 11)", w->name,
                      bits);
    w->bits = (qemb_bits)bits;
    return 0;
}

/* Compares the directory with the sections in want, whose table sizes and bits it takes from the
 * file. On success offset[i] is the offset of section i. */
static int check_directory(const qemb_file *f, section *want, uint64_t *offset, uint32_t n,
                           const char *path, qemb_err *err) {
    uint64_t end = HEADER_BYTES + (uint64_t)n * ENTRY_BYTES;
    for (uint32_t i = 0; i < n; i++) {
        const uint8_t *e = f->map + HEADER_BYTES + (size_t)i * ENTRY_BYTES;
        section *w = &want[i];
        if (memcmp(e, w->name, NAME_BYTES)) {
            char got[NAME_BYTES + 1] = {0};
            for (int k = 0; k < NAME_BYTES && e[k]; k++)
                got[k] = e[k] < 32 || e[k] > 126 ? '?' : e[k];
            return refuse(path, err, "section %" PRIu32 ": name (got \"%s\", want \"%s\")", i, got,
                          w->name);
        }
        uint32_t dtype = get_u32(e + 48);
        uint64_t rows = get_u64(e + 56), cols = get_u64(e + 64);
        uint64_t at = get_u64(e + 72), bytes = get_u64(e + 80);
        if (dtype != w->dtype)
            return refuse(path, err, "%s: dtype (got %" PRIu32 ", want %d)", w->name, dtype,
                          w->dtype);
        if (read_bits(w, e, path, err)) return -1;
        if (get_u64(e + 88))
            return refuse(path, err, "%s: reserved field (got %" PRIu64 ", want 0)", w->name,
                          get_u64(e + 88));
        if (i < BLOBS) { /* a table: any size within the file */
            if (rows > f->map_bytes || cols > f->map_bytes)
                return refuse(path, err, "%s: larger than the file (got %" PRIu64 " x %" PRIu64 ")",
                              w->name, rows, cols);
            if (w->rows == 0) w->rows = rows;
            if (w->cols == 0) w->cols = cols;
        }
        if (rows != w->rows || cols != w->cols) /* older INT8 files had one scale per row */
            return refuse(path, err,
                          "%s: shape (got %" PRIu64 " x %" PRIu64 ", want %" PRIu64 " x %" PRIu64
                          ")%s",
                          w->name, rows, cols, w->rows, w->cols,
                          rows == 1 && cols == w->rows
                              ? "; a file of an older convert_weights.py: convert the model again"
                              : "");
        uint64_t want_bytes = rows * cols * dtype_bytes(w->dtype);
        if (bytes != want_bytes)
            return refuse(path, err, "%s: bytes (got %" PRIu64 ", want %" PRIu64 ")", w->name,
                          bytes, want_bytes);
        uint64_t want_at = (end + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
        if (at != want_at)
            return refuse(path, err, "%s: offset (got %" PRIu64 ", want %" PRIu64 ")", w->name, at,
                          want_at);
        end = at + bytes;
        if (end > f->map_bytes)
            return refuse(path, err,
                          "%s: ends after the file (got byte %" PRIu64 ", want at most %zu)",
                          w->name, end, f->map_bytes);
        offset[i] = at;
    }
    if (end != f->map_bytes)
        return refuse(path, err, "size: bytes after the last section (got %zu, want %" PRIu64 ")",
                      f->map_bytes, end);
    return 0;
}

/* Compares the tables and vectors with their checksum. A flipped bit in one of them would give
 * other ids, other prompts or other vectors. They are small: about 2 MB of the 0.6B and 6 MB of
 * bge-m3, which takes a few milliseconds. */
static int check_tables(qemb_file *f, const section *s, const uint64_t *offset, uint32_t n,
                        const char *path, qemb_err *err) {
    const uint64_t want = get_u64(f->map + TABLES_AT);
    uint64_t h = FNV_START;
    if (!want) return 0;
    for (uint32_t i = 0; i < n; i++)
        if (s[i].rows == 1 || s[i].dtype == QEMB_U32)
            h = fnv1a(h, f->map + offset[i], s[i].rows * s[i].cols * dtype_bytes(s[i].dtype));
    if (h != want)
        return refuse(path, err,
                      "tables and vectors: damaged (got checksum %016" PRIx64 ", want %016" PRIx64
                      "); copy or convert the file again",
                      h, want);
    f->tables_proved = 1;
    return 0;
}

/* ---- binding --------------------------------------------------------------------------------- */

static void bind_weights(qemb_file *f, const section *s, const uint64_t *offset, uint32_t n) {
    for (uint32_t i = 0; i < n; i++) {
        const void *data = f->map + offset[i];
        if (s[i].matrix)
            *s[i].matrix = (qemb_mat){.data = data,
                                      .rows = (int32_t)s[i].rows,
                                      .cols = (int32_t)s[i].cols,
                                      .dtype = s[i].dtype,
                                      .alpha = 1,
                                      .bits = s[i].bits};
        if (s[i].vector) *s[i].vector = data;
    }
    f->weights.mapped = 1;
}

static int bind_prompts(qemb_file *f, const char *p, size_t n, const char *path, qemb_err *err) {
    size_t ends = 0;
    for (size_t i = 0; i < n; i++) ends += p[i] == 0;
    if ((n && p[n - 1]) || ends % 2 || ends / 2 > MAX_PROMPTS)
        return refuse(path, err,
                      "prompts: malformed (got %zu strings in %zu bytes, want up to %d pairs)",
                      ends, n, MAX_PROMPTS);
    qemb_prompt *prompts = calloc(MAX_PROMPTS, sizeof *prompts);
    if (!prompts) return qemb_fail(err, "out_of_memory", "prompts: out of memory");
    for (const char *end = p + n; p < end; f->n_prompts++) {
        qemb_prompt *q = &prompts[f->n_prompts];
        q->name = p, p += strlen(p) + 1;
        q->text = p, p += strlen(p) + 1;
    }
    f->prompts = prompts;
    static const char *const wanted[] = {"prefix", "suffix", "instruct"};
    for (int i = 0; f->config.kind == QEMB_RERANKER && i < LENGTH(wanted); i++)
        if (!qemb_file_prompt(f, wanted[i]))
            return refuse(path, err, "prompts: a reranker without \"%s\"", wanted[i]);
    return 0;
}

static int bind(qemb_file *f, const section *s, const uint64_t *offset, uint32_t n,
                const char *path, qemb_err *err) {
    const int is_bert = f->config.architecture == QEMB_BERT;
    if (!is_bert && s[0].rows + 256 > (uint64_t)f->config.vocab)
        return refuse(path, err,
                      "merges: more tokens than rows of tok_emb (got %" PRIu64 ", want at most %d)",
                      s[0].rows + 256, f->config.vocab);
    const size_t bytes = offset[2] + s[2].cols - offset[0]; /* with added_tokens, prompts */
    uint8_t *tables = f->tables = malloc(bytes + 1);        /* never of 0 bytes */
    if (!tables) return qemb_fail(err, "out_of_memory", "%.128s: out of memory", path);
    memcpy(tables, f->map + offset[0], bytes);
    if (is_bert) {
        f->unigram = tables;
        f->unigram_bytes = s[0].cols;
    } else {
        f->merges = (const uint32_t *)(const void *)tables;
        f->n_merges = (uint32_t)s[0].rows;
    }
    f->added = tables + (offset[1] - offset[0]);
    f->added_bytes = s[1].cols;
    f->provenance = (const char *)(f->map + offset[3]);
    f->provenance_bytes = s[3].cols;
    bind_weights(f, s, offset, n);
    return bind_prompts(f, (const char *)tables + (offset[2] - offset[0]), s[2].cols, path, err);
}

const char *qemb_file_prompt(const qemb_file *f, const char *name) {
    for (int i = 0; i < f->n_prompts; i++)
        if (!strcmp(f->prompts[i].name, name)) return f->prompts[i].text;
    return NULL;
}

/* ---- significant bits ------------------------------------------------------------------------ */

/* Whether each of n halves has at most 8 significant bits. h without its sign has the mantissa in
 * its low 10 bits. Below 1024 the half is subnormal, h * 2^-24: numbers from 256 on have 9 bits,
 * from 512 on 10. From 1024 on there is an implicit 1 before the mantissa, so 11 bits. All that
 * follow the first 8 must be 0: the last 1, 2 or 3. Infinity passes, as does a NaN that is also a
 * bfloat16 NaN. */
static int have_8_bits(const uint16_t *h, size_t n) {
    uint16_t below = 0; /* of any number */
    for (size_t i = 0; i < n; i++) {
        const int16_t a = (int16_t)(h[i] & 0x7fff); /* signed, which every vector unit compares */
        below |= h[i] & ((a > 255) | (a > 511) << 1 | (a > 1023) << 2);
    }
    return !below;
}

qemb_bits qemb_mat_bits(const qemb_mat *m) {
    enum { BLOCK = 4096 }; /* halves between two looks at the result */
    if (m->bits || m->dtype != QEMB_F16) return m->bits;
    const size_t n = (size_t)m->rows * (size_t)m->cols;
    for (size_t i = 0; i < n; i += BLOCK)
        if (!have_8_bits((const uint16_t *)m->data + i, n - i < BLOCK ? n - i : BLOCK))
            return QEMB_BITS_11;
    return QEMB_BITS_8;
}

/* ---- opening --------------------------------------------------------------------------------- */

/* Keeps fd, whose state is st. */
static int watch(qemb_file *f, int fd, const struct stat *st, const char *path, qemb_err *err) {
    const size_t n = strlen(path) + 1;
    struct qemb_watch *w = malloc(sizeof *w + n);
    if (!w) return qemb_fail(err, "out_of_memory", "%.128s: out of memory", path);
    *w = (struct qemb_watch){.fd = fd, .bytes = st->st_size, .modified = st->st_mtim};
    memcpy(w->path, path, n);
    f->watch = w;
    return 0;
}

static int map_file(qemb_file *f, const char *path, qemb_err *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* so that a FIFO does not block */
    if (fd < 0) return refuse(path, err, "%s", strerror(errno));
    struct stat st;
    int bad = fstat(fd, &st) ? refuse(path, err, "%s", strerror(errno)) : 0;
    if (!bad && !S_ISREG(st.st_mode)) bad = refuse(path, err, "not a regular file");
    if (!bad && st.st_size < HEADER_BYTES)
        bad = refuse(path, err, "size: too short for a model (got %lld bytes, want at least %d)",
                     (long long)st.st_size, HEADER_BYTES);
    if (!bad) {
        void *map = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (map == MAP_FAILED)
            bad = refuse(path, err, "cannot be mapped: %s", strerror(errno));
        else
            f->map = map, f->map_bytes = (size_t)st.st_size;
    }
    bad = bad || watch(f, fd, &st, path, err);
    if (bad) close(fd);
    return bad;
}

int qemb_file_check(const qemb_file *f, qemb_err *err) {
    const struct qemb_watch *w = f->watch;
    struct stat st;
    if (!w) return 0;
    if (fstat(w->fd, &st)) return refuse(w->path, err, "%s", strerror(errno));
    if (st.st_size == w->bytes && st.st_mtim.tv_sec == w->modified.tv_sec &&
        st.st_mtim.tv_nsec == w->modified.tv_nsec)
        return 0;
    return refuse(w->path, err,
                  "written to while it is in use (got %lld bytes of %lld.%09ld, want %lld of "
                  "%lld.%09ld; mv puts another file in its place)",
                  (long long)st.st_size, (long long)st.st_mtim.tv_sec, st.st_mtim.tv_nsec,
                  (long long)w->bytes, (long long)w->modified.tv_sec, w->modified.tv_nsec);
}

/* Checks the header before anything that depends on it is read. */
static int check_header(const qemb_file *f, uint32_t *n_sections, const char *path, qemb_err *err) {
    const uint8_t *h = f->map;
    if (memcmp(h, MAGIC, sizeof MAGIC)) return refuse(path, err, "magic: not a .qemb file");
    if (get_u32(h + 8) != 1)
        return refuse(path, err, "version: not known (got %" PRIu32 ", want 1)", get_u32(h + 8));
    uint32_t order;
    memcpy(&order, h + 12, sizeof order);
    if (order != 0x01020304)
        return refuse(path, err,
                      "byte order: not this machine's (got %08" PRIx32 ", want 01020304)", order);
    if (get_u64(h + 16) != f->map_bytes)
        return refuse(path, err,
                      "size: not what the header says, truncated? (got %zu bytes, want %" PRIu64
                      ")",
                      f->map_bytes, get_u64(h + 16));
    uint32_t n = *n_sections = get_u32(h + 32);
    if (!n || n > MOST_SECTIONS || HEADER_BYTES + (uint64_t)n * ENTRY_BYTES > f->map_bytes)
        return refuse(path, err, "directory: does not fit the file (got %" PRIu32 " sections)", n);
    if (get_u64(h + CHECKSUM_AT) != header_checksum(h, n))
        return refuse(path, err,
                      "header checksum: damaged (got %016" PRIx64 ", want %016" PRIx64 ")",
                      header_checksum(h, n), get_u64(h + CHECKSUM_AT));
    int used = get_u32(h + 36) != 0;
    for (int i = RESERVED_AT; i < HEADER_BYTES; i++) used |= h[i] != 0;
    if (used) return refuse(path, err, "header: reserved fields (got a number, want 0)");
    return 0;
}

static int prove_and_bind(qemb_file *f, const char *path, qemb_err *err) {
    uint32_t n = 0;
    if (map_file(f, path, err) || check_header(f, &n, path, err) ||
        read_config(&f->config, f->map, path, err))
        return -1;
    const uint32_t first = BLOBS + tensors_of[f->config.architecture].first;
    const uint32_t dtype =
        first < n ? get_u32(f->map + HEADER_BYTES + first * ENTRY_BYTES + 48) : QEMB_F16;
    const qemb_dtype matrix = dtype == QEMB_I8 ? QEMB_I8 : QEMB_F16;
    const uint32_t tensors = tensors_of[f->config.architecture].layer;
    const uint32_t want_n =
        BLOBS + tensors_of[f->config.architecture].others +
        (tensors + (matrix == QEMB_I8 ? LAYER_SCALES : 0)) * (uint32_t)f->config.n_layers +
        (f->config.dense_rows ? DENSE_TENSORS : 0);
    if (n != want_n)
        return refuse(path, err, "directory: sections (got %" PRIu32 ", want %" PRIu32 ")", n,
                      want_n);
    memcpy(f->sha256, f->map + 40, sizeof f->sha256);
    memcpy(f->checksum, f->map + CHECKSUM_AT, sizeof f->checksum);
    section *want = calloc(n, sizeof *want);
    uint64_t *offset = calloc(n, sizeof *offset);
    f->weights.layers = calloc((size_t)f->config.n_layers, sizeof *f->weights.layers);
    int bad = -1;
    if (!want || !offset || !f->weights.layers)
        qemb_fail(err, "out_of_memory", "directory: out of memory");
    else {
        expected_sections(want, &f->config, matrix, &f->weights);
        bad = check_directory(f, want, offset, n, path, err) ||
              check_tables(f, want, offset, n, path, err) || bind(f, want, offset, n, path, err);
    }
    free(want);
    free(offset);
    return bad ? -1 : 0;
}

int qemb_file_open(qemb_file **out, const char *path, qemb_err *err) {
    qemb_file *f = calloc(1, sizeof *f);
    if (!f) return qemb_fail(err, "out_of_memory", "%.128s: out of memory", path);
    if (prove_and_bind(f, path, err)) {
        qemb_file_close(f);
        return -1;
    }
    *out = f;
    return 0;
}

int qemb_file_tokenizer(qemb_tokenizer **out, const qemb_file *f, qemb_err *err) {
    qemb_tokenizer *t;
    const int bad =
        f->config.architecture == QEMB_BERT
            ? qemb_unigram_open(&t, f->unigram, f->unigram_bytes, f->added, f->added_bytes, err)
            : qemb_tokenizer_open(&t, f->merges, f->n_merges, f->added, f->added_bytes, err);
    if (bad) return -1;
    const uint32_t n = qemb_tokenizer_n_ids(t);
    if (n > (uint32_t)f->config.vocab) {
        qemb_tokenizer_close(t);
        return qemb_fail(err, "model_file",
                         "tokenizer: more ids than rows of the embedding table "
                         "(got %" PRIu32 ", want at most %d)",
                         n, f->config.vocab);
    }
    *out = t;
    return 0;
}

void qemb_file_close(qemb_file *f) {
    if (!f) return;
    if (f->map) munmap((void *)(uintptr_t)f->map, f->map_bytes);
    if (f->watch) close(f->watch->fd);
    free(f->watch);
    free(f->tables);
    free(f->weights.layers);
    free((void *)(uintptr_t)f->prompts);
    free(f);
}
