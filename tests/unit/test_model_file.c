/* test_model_file.c - the loader opens valid files and refuses others with one line. */
#include "support.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const qemb_config *const config = &small_configs[1];

static uint8_t *model;
static size_t model_bytes;

static void setup(void) { model = make_model(config, 7, 1, &model_bytes); }
static void teardown(void) { free(model); }

TestSuite(file, .init = setup, .fini = teardown);

/* Opens a file with these bytes. Returns 0, or -1 with *err filled. */
static int try_open(const uint8_t *data, size_t bytes, qemb_err *err) {
    char path[64];
    qemb_file *f = NULL;
    write_temporary(path, data, bytes);
    int bad = qemb_file_open(&f, path, err);
    unlink(path);
    if (!bad)
        qemb_file_close(f);
    else {
        cr_assert_null(f);
        cr_assert_str_eq(err->code, "model_file");
        cr_assert(strncmp(err->msg, path, strlen(path)) == 0, "names the file: %s", err->msg);
        cr_assert_null(strchr(err->msg, '\n'));
    }
    return bad;
}

static qemb_file *opened(void) {
    char path[64];
    qemb_file *f;
    qemb_err err;
    seal_model(model, model_bytes);
    write_temporary(path, model, model_bytes);
    cr_assert_eq(qemb_file_open(&f, path, &err), 0, "%s", err.msg);
    unlink(path);
    return f;
}

/* Checks that the current model is refused with a message that contains `what`. */
static void refuses(const char *what) {
    qemb_err err;
    seal_model(model, model_bytes);
    cr_assert_eq(try_open(model, model_bytes, &err), -1, "opened in spite of: %s", what);
    cr_assert(strstr(err.msg, what), "\"%s\" does not say \"%s\"", err.msg, what);
}

static void put(size_t at, uint64_t v, int n) {
    for (int i = 0; i < n; i++) model[at + (size_t)i] = (uint8_t)(v >> 8 * i);
}

static uint64_t get(size_t at, int n) {
    uint64_t v = 0;
    for (int i = 0; i < n; i++) v |= (uint64_t)model[at + (size_t)i] << 8 * i;
    return v;
}

static size_t entry(int i) { return 4096 + 96 * (size_t)i; }

Test(file, opens_and_binds_a_true_file) {
    char path[64];
    qemb_file *f;
    qemb_err err;
    write_temporary(path, model, model_bytes);
    cr_assert_eq(qemb_file_open(&f, path, &err), 0, "%s", err.msg);
    unlink(path);
    cr_assert_arr_eq(&f->config, config, sizeof *config);
    cr_assert_eq(f->n_merges, 1);
    cr_assert(f->merges[0] == 64 && f->merges[1] == 65);
    cr_assert_eq(f->added_bytes, 16);
    cr_assert_eq(f->n_prompts, 2);
    cr_assert_str_eq(qemb_file_prompt(f, "query"), "Instruct: find\nQuery:");
    cr_assert_str_eq(qemb_file_prompt(f, "document"), "");
    cr_assert_null(qemb_file_prompt(f, "other"));
    cr_assert_eq(f->provenance_bytes, 14);
    cr_assert_arr_eq(f->provenance, "source: tests\n", 14);
    /* Tensors point to the sections in the directory's order. */
    const qemb_weights *w = &f->weights;
    const qemb_layer *y = &w->layers[1];
    const void *const found[] = {w->tok_emb.data, w->layers[0].attn_norm,
                                 y->attn_norm,    y->wqkv.data,
                                 y->q_norm,       y->k_norm,
                                 y->wo.data,      y->mlp_norm,
                                 y->wgu.data,     y->wdown.data,
                                 w->final_norm};
    const int place[] = {4, 5, 13, 14, 15, 16, 17, 18, 19, 20, 21};
    for (int i = 0; i < 11; i++)
        cr_assert_eq((const uint8_t *)found[i] - f->map, (ptrdiff_t)get(entry(place[i]) + 72, 8),
                     "%d", i);
    cr_assert(y->wqkv.rows == 8 * 64 && y->wqkv.cols == 48 && y->wqkv.alpha == 1);
    cr_assert(y->wgu.rows == 160 && y->wdown.rows == 48 && y->wdown.cols == 80);
    qemb_file_close(f);
}

/* An INT8 file has four more sections per layer: the scales of its matrices. */
static void use_int8(void) {
    free(model);
    model = make_model_of(QEMB_I8, config, 7, 1, &model_bytes);
}

Test(file, opens_and_binds_an_int8_file) {
    char path[64];
    qemb_file *f;
    qemb_err err;
    use_int8();
    write_temporary(path, model, model_bytes);
    cr_assert_eq(qemb_file_open(&f, path, &err), 0, "%s", err.msg);
    unlink(path);
    const qemb_layer *y = &f->weights.layers[1];
    const qemb_mat *const m[] = {&y->wqkv, &y->wo, &y->wgu, &y->wdown};
    const int place[] = {18, 22, 25, 27};
    for (int i = 0; i < 4; i++) {
        cr_assert_eq(m[i]->dtype, QEMB_I8);
        cr_assert_eq((const uint8_t *)m[i]->data - f->map, (ptrdiff_t)get(entry(place[i]) + 72, 8));
        cr_assert_eq((const uint8_t *)m[i]->scale - f->map,
                     (ptrdiff_t)get(entry(place[i] + 1) + 72, 8));
    }
    cr_assert_eq(f->weights.tok_emb.dtype, QEMB_F16);
    cr_assert_null(f->weights.tok_emb.scale);
    cr_assert_eq((const uint8_t *)f->weights.final_norm - f->map,
                 (ptrdiff_t)get(entry(29) + 72, 8));
    qemb_file_close(f);
}

/* Older INT8 files have one scale per row. */
Test(file, refuses_an_older_int8_file) {
    use_int8();
    put(entry(7) + 56, 1, 8);
    put(entry(7) + 64, 512, 8);
    refuses("layers.0.wqkv.scale: shape (got 1 x 512, want 512 x 1); a file of an older "
            "convert_weights.py: convert the model again");
}

/* Damage: a flip of any byte of header and directory is found. */
static void try_every_flipped_byte(void) {
    qemb_err err;
    const size_t end = entry((int)get(32, 4));
    for (size_t i = 0; i < end; i++) {
        if (i >= 40 && i < 72) continue; /* the digest: the checksum covers it, tested once below */
        if (i > 200 && i < 4096 && i % 97) continue;
        model[i] ^= 0x41;
        cr_assert_eq(try_open(model, model_bytes, &err), -1, "byte %zu", i);
        model[i] ^= 0x41;
    }
    model[50] ^= 1;
    cr_assert_eq(try_open(model, model_bytes, &err), -1);
    cr_assert(strstr(err.msg, "checksum"));
    model[50] ^= 1;
}

Test(file, refuses_every_flipped_byte) { try_every_flipped_byte(); }

/* Sets the checksum of the tables and vectors, by the format in qemb.h. Returns their bytes. */
static size_t seal_tables(void) {
    uint64_t h = 0xcbf29ce484222325u;
    size_t bytes = 0;
    for (int i = 0; i < (int)get(32, 4); i++) {
        const uint8_t *p = model + get(entry(i) + 72, 8);
        if (get(entry(i) + 48, 4) != QEMB_U32 && get(entry(i) + 56, 8) != 1) continue;
        for (size_t k = 0; k < get(entry(i) + 80, 8); k++, bytes++) h = (h ^ p[k]) * 0x100000001b3u;
    }
    put(140, h, 8);
    seal_model(model, model_bytes);
    return bytes;
}

/* Damage: the tables and vectors have a checksum; those of older files have none. */
static void try_every_flipped_byte_of_tables_and_vectors(void) {
    qemb_err err;
    qemb_file *f = opened();
    cr_assert(!f->tables_proved);
    qemb_file_close(f);
    const size_t all = seal_tables();
    f = opened();
    cr_assert(f->tables_proved);
    qemb_file_close(f);
    size_t flipped = 0;
    for (int i = 0; i < (int)get(32, 4); i++) {
        const size_t at = get(entry(i) + 72, 8), rows = get(entry(i) + 56, 8);
        if (i && rows != 1) continue;
        for (size_t k = 0; k < get(entry(i) + 80, 8); k++, flipped++) {
            model[at + k] ^= 1 << k % 8;
            cr_assert_eq(try_open(model, model_bytes, &err), -1, "section %d, byte %zu", i, k);
            cr_assert(strstr(err.msg, "tables and vectors: damaged"), "%s", err.msg);
            model[at + k] ^= 1 << k % 8;
        }
    }
    cr_assert_eq(flipped, all);
    put(140, get(140, 8) + 1, 8);
    refuses("tables and vectors: damaged");
}

Test(file, refuses_every_flipped_byte_of_tables_and_vectors) {
    try_every_flipped_byte_of_tables_and_vectors();
}

/* The same of a trained model's file, every 29th byte: it has 138,309. */
Test(file, refuses_flipped_bytes_of_the_demo_models_tables) {
    char path[64];
    qemb_file *f;
    qemb_err err;
    FILE *in = fopen("examples/demo.qemb", "rb");
    cr_assert(in && !fseek(in, 0, SEEK_END));
    const size_t bytes = (size_t)ftell(in);
    free(model);
    model = malloc(bytes);
    rewind(in);
    cr_assert(model && fread(model, 1, bytes, in) == bytes && !fclose(in));
    write_temporary(path, model, bytes);
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    uint8_t *map = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    cr_assert(map != MAP_FAILED);
    cr_assert_eq(qemb_file_open(&f, path, &err), 0, "%s", err.msg);
    cr_assert(f->tables_proved);
    qemb_file_close(f);
    for (int i = 0; i < (int)get(32, 4); i++) {
        const size_t at = get(entry(i) + 72, 8), rows = get(entry(i) + 56, 8);
        for (size_t k = 0; (!i || rows == 1) && k < get(entry(i) + 80, 8); k += 29) {
            map[at + k] ^= 1 << k % 8;
            cr_assert_eq(qemb_file_open(&f, path, &err), -1, "section %d, byte %zu", i, k);
            map[at + k] ^= 1 << k % 8;
        }
    }
    munmap(map, bytes);
    close(fd);
    unlink(path);
}

/* Malice: one field is wrong and the checksum matches. Covers every byte of every directory field,
 * and small and overflowing values of every config field that determines a tensor's shape. */
static void try_every_changed_field(void) {
    static const struct {
        int at, bytes;
    } fields[] = {{0, 1},  {10, 1}, {47, 1}, {48, 4}, {52, 4},
                  {56, 8}, {64, 8}, {72, 8}, {80, 8}, {88, 8}};
    qemb_err err;
    const int n = (int)get(32, 4);
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 10; k++) {
            const size_t at = entry(i) + (size_t)fields[k].at;
            const uint64_t was = get(at, fields[k].bytes);
            const uint64_t values[] = {was + 1,    was - 1,     was ^ 256,
                                       was + 256,  UINT64_MAX,  1ull << 63,
                                       1ull << 32, was * 2 + 1, was | 1ull << 40};
            for (int v = 0; v < 9; v++) {
                put(at, values[v], fields[k].bytes);
                if (get(at, fields[k].bytes) == was) continue;
                if (fields[k].at == 52 && !get(at, 4)) continue; /* bits that are not recorded */
                seal_model(model, model_bytes);
                cr_assert_eq(try_open(model, model_bytes, &err), -1, "section %d, byte %d, %llx", i,
                             fields[k].at, (unsigned long long)values[v]);
            }
            put(at, was, fields[k].bytes);
        }
    for (int k = 0; k < 7; k++) { /* n_layers .. vocab */
        const size_t at = 72 + 4 * (size_t)k;
        const uint64_t was = get(at, 4);
        const uint64_t values[] = {0,       1,          was + 1,    was - 1,
                                   was * 2, 0x7fffffff, 0x80000000, 0xffffffff};
        for (int v = 0; v < 8; v++) {
            if (values[v] == was) continue;
            put(at, values[v], 4);
            seal_model(model, model_bytes);
            cr_assert_eq(try_open(model, model_bytes, &err), -1, "config %d = %llu", k,
                         (unsigned long long)values[v]);
        }
        put(at, was, 4);
    }
    seal_model(model, model_bytes);
    cr_assert_eq(try_open(model, model_bytes, &err), 0, "as it was: %s", err.msg);
}

Test(file, refuses_every_changed_field) { try_every_changed_field(); }

Test(file, refuses_every_changed_field_of_an_int8_file) {
    use_int8();
    try_every_changed_field();
}

/* F16 and INT8 sections in one file, in both combinations. */
Test(file, refuses_a_mixture_of_dtypes) {
    put(entry(6) + 48, QEMB_I8, 4);
    refuses("directory: sections (got 22, want 30)");
    use_int8();
    put(entry(6) + 48, QEMB_F16, 4);
    refuses("directory: sections (got 30, want 22)");
    put(entry(6) + 48, QEMB_I8, 4);
    put(entry(10) + 48, QEMB_F16, 4);
    refuses("layers.0.wo: dtype (got 3, want 4)");
}

Test(file, names_object_got_and_want) {
    put(entry(6) + 56, 511, 8);
    refuses("layers.0.wqkv: shape (got 511 x 48, want 512 x 48)");
    put(entry(6) + 56, 512, 8);
    put(entry(9) + 48, 2, 4);
    refuses("layers.0.wo: dtype (got 2, want 3)");
    put(entry(9) + 48, 3, 4);
    put(8, 2, 4);
    refuses("version: not known (got 2, want 1)");
    put(8, 1, 4);
    put(72 + 4 * 3, 3, 4);
    refuses("n_heads: not a multiple of n_kv_heads (got 4, want a multiple of 3)");
    put(72 + 4 * 3, 2, 4);
    put(72 + 4 * 8, 300, 4);
    refuses("eos_id: outside the vocabulary (got 300, want 0..299)");
    put(72 + 4 * 8, 299, 4);
    put(12, 0x04030201, 4);
    refuses("byte order");
    put(12, 0x01020304, 4);
    put(36, 1, 4);
    refuses("header: reserved");
    put(36, 0, 4);
    put(4095, 1, 1);
    refuses("header: reserved");
    put(4095, 0, 1);
    put(32, 0xffffffff, 4);
    refuses("directory");
}

Test(file, refuses_bad_numbers) {
    const float thetas[] = {0, -1, NAN, INFINITY, 0.5f}, eps[] = {0, -1e-6f, NAN, INFINITY, 1};
    for (int i = 0; i < 5; i++) {
        memcpy(model + 108, &thetas[i], 4);
        refuses("rope_theta");
    }
    memcpy(model + 108, &config->rope_theta, 4);
    for (int i = 0; i < 5; i++) {
        memcpy(model + 112, &eps[i], 4);
        refuses("norm_eps");
    }
    memcpy(model + 112, &config->norm_eps, 4);
    for (int i = 0; i < 8; i++) { /* n_layers .. max_positions */
        const uint64_t was = get(72 + 4 * (size_t)i, 4);
        put(72 + 4 * (size_t)i, 0xffffffff, 4);
        refuses("out of range (got 4294967295");
        put(72 + 4 * (size_t)i, was, 4);
    }
}

Test(file, refuses_bad_prompts) {
    const size_t at = get(entry(2) + 72, 8), n = get(entry(2) + 80, 8);
    model[at + n - 1] = 'x'; /* the last string is not terminated */
    refuses("prompts: malformed");
    model[at + n - 1] = 0;
    model[at + 3] = 0; /* an odd number of strings */
    refuses("prompts: malformed");
    memset(model + at, 0, n); /* 19 pairs of empty strings: unusual but valid */
    qemb_err err;
    seal_model(model, model_bytes);
    cr_assert_eq(try_open(model, model_bytes, &err), 0, "%s", err.msg);
}

Test(file, refuses_more_merges_than_rows) {
    qemb_config c = *config;
    size_t bytes;
    qemb_err err;
    c.vocab = 256, c.eos_id = 255;
    uint8_t *m = make_model(&c, 1, 1, &bytes);
    cr_assert_eq(try_open(m, bytes, &err), -1);
    cr_assert(strstr(err.msg, "merges: more tokens than rows"), "%s", err.msg);
    free(m);
}

Test(file, refuses_other_sizes) {
    qemb_err err;
    const size_t cuts[] = {0, 1, 8, 4095, 4096, 4097, entry(3), entry(22), model_bytes - 1};
    for (int i = 0; i < 9; i++) {
        cr_assert_eq(try_open(model, cuts[i], &err), -1, "%zu bytes", cuts[i]);
        if (cuts[i] <= 40) continue;
        uint8_t *cut = malloc(cuts[i] + 8); /* truncated, with a wrong size field */
        memcpy(cut, model, cuts[i]);
        if (cuts[i] >= 4096) seal_model(cut, cuts[i]);
        cr_assert_eq(try_open(cut, cuts[i], &err), -1, "%zu bytes, sealed", cuts[i]);
        free(cut);
    }
    uint8_t *more = calloc(1, model_bytes + 256);
    memcpy(more, model, model_bytes);
    cr_assert_eq(try_open(more, model_bytes + 256, &err), -1);
    seal_model(more, model_bytes + 256);
    cr_assert_eq(try_open(more, model_bytes + 256, &err), -1);
    cr_assert(strstr(err.msg, "bytes after the last section"), "%s", err.msg);
    free(more);
}

static void refuses_path(const char *path, const char *what) {
    qemb_file *f = NULL;
    qemb_err err;
    cr_assert_eq(qemb_file_open(&f, path, &err), -1, "%s", path);
    cr_assert(strstr(err.msg, what), "%s", err.msg);
    cr_assert_null(f);
}

Test(file, refuses_what_is_no_file) {
    char path[64];
    write_temporary(path, "x", 1);
    refuses_path(path, "too short");
    unlink(path);
    refuses_path(path, "No such file");
    cr_assert_eq(mkfifo(path, 0600), 0);
    refuses_path(path, "not a regular file"); /* without waiting for a writer */
    unlink(path);
    refuses_path("/", "not a regular file");
    refuses_path("/dev/zero", "not a regular file");
    refuses_path("", "No such file");
}

/* ---- kind, pooling, attention, dense layer --------------------------------------------------- */

enum { KIND_AT = 116, EOS_AT = 104 }; /* kind pooling attention dense_rows activation window */

static size_t kind_at(int i) { return KIND_AT + 4 * (size_t)i; }

/* An embedding model with all that an older file has not. */
static qemb_config with_everything(void) {
    qemb_config c = *config;
    c.pooling = QEMB_POOL_MEAN, c.attention = QEMB_BIDIRECTIONAL, c.dense_rows = 5;
    c.activation = QEMB_TANH, c.window = 120, c.eos_id = QEMB_NO_TOKEN;
    return c;
}

static qemb_config reranker(void) {
    qemb_config c = *config;
    c.kind = QEMB_RERANKER, c.dense_rows = 1, c.window = 200, c.eos_id = QEMB_NO_TOKEN;
    return c;
}

static void use(const qemb_config *c) {
    free(model);
    model = make_model(c, 7, 1, &model_bytes);
}

Test(file, an_older_file_is_an_embedding_model) {
    qemb_file *f = opened();
    const qemb_config *c = &f->config;
    cr_assert(c->kind == QEMB_EMBEDDING && c->pooling == QEMB_POOL_LAST);
    cr_assert(c->attention == QEMB_CAUSAL && c->dense_rows == 0 && c->activation == QEMB_IDENTITY);
    cr_assert(c->window == 0 && qemb_window(c) == 300 && qemb_dim(c) == 48);
    cr_assert(c->architecture == QEMB_QWEN3 && c->first_position == 0);
    cr_assert(c->bos_id == QEMB_NO_TOKEN && c->pad_id == QEMB_NO_TOKEN);
    cr_assert(!f->weights.dense && !f->weights.dense_bias);
    qemb_file_close(f);
}

Test(file, opens_and_binds_a_dense_layer) {
    const qemb_config c = with_everything();
    use(&c);
    qemb_file *f = opened();
    cr_assert_arr_eq(&f->config, &c, sizeof c);
    cr_assert(qemb_window(&c) == 120 && qemb_dim(&c) == 5);
    cr_assert_eq((const uint8_t *)f->weights.final_norm - f->map,
                 (ptrdiff_t)get(entry(21) + 72, 8));
    cr_assert_eq((const uint8_t *)f->weights.dense - f->map, (ptrdiff_t)get(entry(22) + 72, 8));
    cr_assert_eq((const uint8_t *)f->weights.dense_bias - f->map,
                 (ptrdiff_t)get(entry(23) + 72, 8));
    qemb_file_close(f);
}

Test(file, opens_a_reranker) {
    const qemb_config c = reranker();
    use(&c);
    qemb_file *f = opened();
    cr_assert_arr_eq(&f->config, &c, sizeof c);
    cr_assert_eq(qemb_dim(&c), 1);
    cr_assert_str_eq(qemb_file_prompt(f, "instruct"), "rank");
    qemb_file_close(f);
}

/* Sets field i of those behind norm_eps, and checks that the file is refused. */
static void refuses_kind(int i, uint32_t value, const char *what) {
    const uint64_t was = get(kind_at(i), 4);
    put(kind_at(i), value, 4);
    refuses(what);
    put(kind_at(i), was, 4);
}

Test(file, refuses_fields_out_of_range) {
    static const char *const names[] = {"kind", "pooling", "attention", "dense_rows", "activation"};
    const uint32_t most[] = {1, 2, 1, 65536, 1};
    char what[64];
    for (int i = 0; i < 5; i++)
        for (int k = 0; k < 3; k++) {
            const uint32_t value[] = {most[i] + 1, 0x80000000, 0xffffffff};
            snprintf(what, sizeof what, "%s: out of range (got %u, want 0..%u)", names[i], value[k],
                     most[i]);
            refuses_kind(i, value[k], what);
        }
    refuses_kind(5, 301, "window: out of range (got 301, want 0..300)");
    refuses_kind(5, 0xffffffff, "window: out of range (got 4294967295, want 0..300)");
    put(kind_at(5), 300, 4);
    qemb_file *f = opened();
    cr_assert_eq(qemb_window(&f->config), 300);
    qemb_file_close(f);
    put(164, 1, 4); /* the first reserved byte behind all fields */
    refuses("header: reserved");
}

Test(file, refuses_another_number_of_dense_rows) {
    refuses_kind(3, 1, "directory: sections (got 22, want 24)");
    const qemb_config c = with_everything();
    use(&c);
    refuses_kind(3, 0, "directory: sections (got 24, want 22)");
    refuses_kind(3, 4, "dense: shape (got 5 x 48, want 4 x 48)");
    refuses_kind(3, 65536, "dense: shape (got 5 x 48, want 65536 x 48)");
    put(entry(22) + 48, QEMB_F16, 4);
    refuses("dense: dtype (got 3, want 2)");
    put(entry(22) + 48, QEMB_F32, 4);
    put(entry(23) + 64, 4, 8);
    refuses("dense_bias: shape (got 1 x 4, want 1 x 5)");
    put(entry(23) + 64, 5, 8);
    model[entry(23)] = 'x';
    refuses("dense_bias");
}

Test(file, refuses_every_changed_field_of_a_dense_layer) {
    const qemb_config c = with_everything();
    use(&c);
    try_every_changed_field();
}

Test(file, end_of_text_is_a_token_or_none) {
    put(EOS_AT, 0xffffffff, 4);
    qemb_file *f = opened();
    cr_assert_eq(f->config.eos_id, QEMB_NO_TOKEN);
    qemb_file_close(f);
    put(EOS_AT, 0xfffffffe, 4);
    refuses("eos_id: outside the vocabulary (got 4294967294, want 0..299)");
    put(EOS_AT, 0x80000000, 4);
    refuses("eos_id: outside the vocabulary (got 2147483648, want 0..299)");
}

Test(file, refuses_a_reranker_of_another_form) {
    const qemb_config c = reranker();
    use(&c);
    refuses_kind(1, 1, "kind: a reranker of an unknown form (got pooling 1, attention 0,");
    refuses_kind(2, 1, "kind: a reranker of an unknown form (got pooling 0, attention 1,");
    refuses_kind(3, 2, "activation 0, dense_rows 2, want 0, 0, 0, 1)");
    refuses_kind(3, 0, "activation 0, dense_rows 0, want 0, 0, 0, 1)");
    refuses_kind(4, 1, "activation 1, dense_rows 1, want 0, 0, 0, 1)");
    put(EOS_AT, 299, 4);
    refuses("eos_id: a reranker's texts end with its suffix (got 299)");
    put(EOS_AT, 0xffffffff, 4);
    qemb_file_close(opened());
}

Test(file, refuses_a_reranker_without_its_prompts) {
    static const char *const names[] = {"prefix", "suffix", "instruct"};
    const qemb_config c = reranker();
    use(&c);
    const size_t at = get(entry(2) + 72, 8), n = get(entry(2) + 80, 8);
    for (int i = 0; i < 3; i++) {
        uint8_t *name = memmem(model + at, n, names[i], strlen(names[i]) + 1);
        char what[64];
        snprintf(what, sizeof what, "prompts: a reranker without \"%s\"", names[i]);
        cr_assert_not_null(name);
        name[0] ^= 32; /* a capital letter */
        refuses(what);
        name[0] ^= 32;
    }
    put(kind_at(0), 0, 4); /* as an embedding model it needs none */
    qemb_file_close(opened());
}

Test(file, refuses_every_flipped_byte_of_a_reranker) {
    const qemb_config c = reranker();
    qemb_err err;
    use(&c);
    for (size_t i = 72; i < 200; i++) {
        model[i] ^= 0x41;
        cr_assert_eq(try_open(model, model_bytes, &err), -1, "byte %zu", i);
        model[i] ^= 0x41;
    }
}

/* ---- files of QEMB_BERT ---------------------------------------------------------------------- */

/* A small one: header, directory and tables are most of it. */
static const qemb_config tiny = {.architecture = QEMB_BERT,
                                 .n_layers = 2,
                                 .hidden = 8,
                                 .n_heads = 2,
                                 .n_kv_heads = 2,
                                 .head_dim = 4,
                                 .ffn = 6,
                                 .vocab = 260,
                                 .max_positions = 20,
                                 .norm_eps = 1e-12f,
                                 .pooling = QEMB_POOL_FIRST,
                                 .attention = QEMB_BIDIRECTIONAL,
                                 .bos_id = 0,
                                 .eos_id = 2,
                                 .pad_id = 1,
                                 .first_position = 2};

enum { THETA_AT = 108, ARCHITECTURE_AT = 148, BOS_AT = 152, PAD_AT = 156, FIRST_AT = 160 };

static void use_tiny(qemb_dtype dtype) {
    free(model);
    model = make_model_of(dtype, &tiny, 7, 1, &model_bytes);
}

/* Whether p, which a file binds, is where the directory's next section *i begins. */
static void is_next(const qemb_file *f, const void *p, int *i) {
    cr_assert_eq((const uint8_t *)p - f->map, (ptrdiff_t)get(entry(*i) + 72, 8), "section %d", *i);
    ++*i;
}

static void is_next_matrix(const qemb_file *f, const qemb_mat *m, int rows, int cols, int *i) {
    cr_assert(m->rows == rows && m->cols == cols && m->alpha == 1, "section %d", *i);
    is_next(f, m->data, i);
    if (m->dtype == QEMB_I8)
        is_next(f, m->scale, i);
    else
        cr_assert_null(m->scale);
}

static void check_binding(qemb_dtype dtype, const qemb_config *c) {
    const int D = c->hidden, F = c->ffn;
    free(model);
    model = make_model_of(dtype, c, 7, 1, &model_bytes);
    qemb_file *f = opened();
    const qemb_weights *w = &f->weights;
    int i = 4;
    cr_assert_arr_eq(&f->config, c, sizeof *c);
    cr_assert_eq(f->unigram_bytes, get(entry(0) + 80, 8));
    cr_assert_arr_eq(f->unigram, model + get(entry(0) + 72, 8), f->unigram_bytes);
    cr_assert(!f->merges && !f->n_merges);
    cr_assert_eq(f->added_bytes, get(entry(1) + 80, 8));
    cr_assert_arr_eq(f->added, model + get(entry(1) + 72, 8), f->added_bytes);
    cr_assert_str_eq(qemb_file_prompt(f, "query"), "query: ");
    cr_assert_str_eq(qemb_file_prompt(f, "passage"), "passage: ");
    cr_assert_arr_eq(f->provenance, "source: tests\n", 14);
    is_next_matrix(f, &w->tok_emb, c->vocab, D, &i);
    is_next(f, w->pos_emb, &i);
    is_next(f, w->emb_norm, &i);
    is_next(f, w->emb_norm_bias, &i);
    for (int l = 0; l < c->n_layers; l++) {
        const qemb_layer *y = &w->layers[l];
        cr_assert_eq(y->wup.dtype, dtype);
        is_next_matrix(f, &y->wqkv, 3 * D, D, &i);
        is_next(f, y->bqkv, &i);
        is_next_matrix(f, &y->wo, D, D, &i);
        is_next(f, y->bo, &i);
        is_next(f, y->attn_norm, &i);
        is_next(f, y->attn_norm_bias, &i);
        is_next_matrix(f, &y->wup, F, D, &i);
        is_next(f, y->bup, &i);
        is_next_matrix(f, &y->wdown, D, F, &i);
        is_next(f, y->bdown, &i);
        is_next(f, y->mlp_norm, &i);
        is_next(f, y->mlp_norm_bias, &i);
        cr_assert(!y->wgu.data && !y->q_norm && !y->k_norm);
    }
    if (c->dense_rows) {
        is_next(f, w->dense, &i);
        is_next(f, w->dense_bias, &i);
    }
    cr_assert_eq(i, (int)get(32, 4));
    cr_assert_null(w->final_norm);
    qemb_file_close(f);
}

Test(file, opens_and_binds_an_encoder) {
    check_binding(QEMB_F16, &tiny);
    check_binding(QEMB_I8, &tiny);
    for (int i = 0; i < n_bert_configs; i++) check_binding(QEMB_F16, &bert_configs[i]);
    qemb_config c = tiny; /* no tokens but those of the text */
    c.bos_id = c.eos_id = c.pad_id = QEMB_NO_TOKEN, c.first_position = 0;
    check_binding(QEMB_F16, &c);
    c.max_positions = 1; /* pos_emb is one row: the checksum covers it */
    check_binding(QEMB_F16, &c);
    try_every_flipped_byte_of_tables_and_vectors();
}

Test(file, refuses_every_flipped_byte_of_an_encoder) {
    use_tiny(QEMB_F16);
    try_every_flipped_byte();
    try_every_flipped_byte_of_tables_and_vectors();
}

Test(file, refuses_every_changed_field_of_an_encoder) {
    use_tiny(QEMB_F16);
    try_every_changed_field();
    use_tiny(QEMB_I8);
    try_every_changed_field();
}

/* Writes value (4 bytes) at a place of the header, and checks that the file is refused. */
static void refuses_field(size_t at, uint32_t value, const char *what) {
    const uint64_t was = get(at, 4);
    put(at, value, 4);
    refuses(what);
    put(at, was, 4);
}

static uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

Test(file, an_encoders_fields) {
    use_tiny(QEMB_F16);
    refuses_field(ARCHITECTURE_AT, 2, "architecture: out of range (got 2, want 0..1)");
    refuses_field(ARCHITECTURE_AT, 0x80000001, "architecture: out of range (got 2147483649,");
    const char *const unknown[] = {"kind 0, attention 0, pooling 2, want 0, 1, and 1 or 2)",
                                   "kind 0, attention 1, pooling 0, want 0, 1, and 1 or 2)"};
    refuses_field(kind_at(2), 0, unknown[0]);
    refuses_field(kind_at(1), 0, unknown[1]);
    refuses_field(kind_at(0), 1, "kind: a reranker of an unknown form");
    refuses_field(72 + 4 * 3, 1, "n_kv_heads: not n_heads (got 1, want 2)");
    refuses_field(72 + 4 * 4, 3, "hidden: not n_heads times head_dim (got 8, want 6)");
    refuses_field(72 + 4 * 1, 9, "hidden: not n_heads times head_dim (got 9, want 8)");
    const float thetas[] = {1e4f, 1, -1, NAN, INFINITY, 1e-30f};
    for (int i = 0; i < 6; i++)
        refuses_field(THETA_AT, float_bits(thetas[i]), "rope_theta: of another architecture");
    const float eps[] = {0, -1e-6f, NAN, INFINITY, 1};
    for (int i = 0; i < 5; i++) refuses_field(112, float_bits(eps[i]), "norm_eps: out of range");
    const size_t ids[] = {BOS_AT, PAD_AT, EOS_AT};
    const char *const names[] = {"bos_id", "pad_id", "eos_id"};
    const uint32_t bad[] = {260, 0x7fffffff, 0x80000000, 0xfffffffe};
    for (int i = 0; i < 3; i++)
        for (int k = 0; k < 4; k++) {
            char what[80];
            snprintf(what, sizeof what, "%s: outside the vocabulary (got %u, want 0..259)",
                     names[i], bad[k]);
            refuses_field(ids[i], bad[k], what);
        }
    refuses_field(FIRST_AT, (1 << 20) + 1,
                  "first_position: out of range (got 1048577, want 0..1048576)");
    refuses_field(FIRST_AT, 0xffffffff, "first_position: out of range (got 4294967295,");
    refuses_field(FIRST_AT, 0, "first_position: no row before it for pad_id (got 0, want 1 or");
    refuses_field(FIRST_AT, 1, "pos_emb: shape (got 22 x 8, want 21 x 8)");
    refuses_field(FIRST_AT, 1 << 20, "pos_emb: shape (got 22 x 8, want 1048596 x 8)");
    refuses_field(72 + 4 * 7, 1 << 22, "pos_emb: shape (got 22 x 8, want 4194306 x 8)");
    refuses_field(72 + 4 * 7, 21, "pos_emb: shape (got 22 x 8, want 23 x 8)");
    refuses_field(kind_at(5), 21, "window: out of range (got 21, want 0..20)");
    refuses_field(kind_at(3), 3, "directory: sections (got 32, want 34)");
    put(PAD_AT, 0xffffffff, 4), put(BOS_AT, 259, 4); /* these are no faults */
    qemb_file *f = opened();
    cr_assert(f->config.pad_id == QEMB_NO_TOKEN && f->config.bos_id == 259);
    qemb_file_close(f);
}

/* A file whose header is of one architecture and whose sections are of the other. */
Test(file, refuses_fields_of_the_other_architecture) {
    const char *const other = "bos_id, pad_id, first_position: of another architecture (got ";
    refuses_field(BOS_AT, 1, other);
    refuses_field(PAD_AT, 0xffffffff, other);
    refuses_field(FIRST_AT, 2, other);
    refuses_field(kind_at(1), QEMB_POOL_FIRST, "pooling: of another architecture (got 2, want 0");
    refuses_field(ARCHITECTURE_AT, 1, "architecture 1: of an unknown form (got kind 0,");

    use_tiny(QEMB_F16);
    refuses_field(ARCHITECTURE_AT, 0, other);
    for (int i = 0; i < 4; i++) put(ARCHITECTURE_AT + 4 * (size_t)i, 0, 4);
    refuses("pooling: of another architecture");
    put(kind_at(1), QEMB_POOL_MEAN, 4);
    refuses("rope_theta: out of range (got 0, want 1..1e12)");
    put(THETA_AT, float_bits(1e6f), 4);
    refuses("directory: sections (got 32, want 22)");
    put(32, 22, 4);
    refuses("section 0: name (got \"unigram\", want \"merges\")");

    qemb_config c = *config; /* as many heads, n_heads times head_dim numbers */
    c.n_kv_heads = c.n_heads, c.hidden = c.n_heads * c.head_dim;
    c.attention = QEMB_BIDIRECTIONAL, c.pooling = QEMB_POOL_MEAN;
    use(&c);
    put(ARCHITECTURE_AT, 1, 4), put(THETA_AT, 0, 4), put(FIRST_AT, 2, 4);
    refuses("directory: sections (got 22, want 32)");
}

/* The dtype of all matrices is read where the first one should be: there may be no such entry. */
Test(file, refuses_another_number_of_an_encoders_sections) {
    use_tiny(QEMB_F16);
    for (uint32_t n = 1; n < 40; n++) {
        char what[64];
        snprintf(what, sizeof what, "directory: sections (got %u, want 32)", n);
        if (n != 32) refuses_field(32, n, what);
    }
    put(entry(8) + 48, QEMB_I8, 4);
    refuses("directory: sections (got 32, want 40)");
    use_tiny(QEMB_I8);
    put(entry(11) + 48, QEMB_F16, 4);
    refuses("layers.0.wo: dtype (got 3, want 4)");
}

/* Cut at every section's begin and end, with a true size and checksum of what is left. */
Test(file, refuses_an_encoder_that_is_cut) {
    qemb_err err;
    use_tiny(QEMB_F16);
    const int n = (int)get(32, 4);
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 3; k++) {
            const size_t at = get(entry(i) + 72, 8), bytes = get(entry(i) + 80, 8);
            const size_t left = k == 0 ? at : k == 1 ? at + 1 : at + bytes - 1;
            uint8_t *cut = malloc(left);
            memcpy(cut, model, left);
            seal_model(cut, left);
            cr_assert_eq(try_open(cut, left, &err), -1, "%zu of %zu bytes", left, model_bytes);
            cr_assert(strstr(err.msg, "ends after the file"), "%s", err.msg);
            free(cut);
        }
}

/* ---- significant bits ------------------------------------------------------------------------ */

/* Opens the model with `bits` in the directory entry of layers.0.wqkv. Checks what it binds. */
static void binds_bits(unsigned bits) {
    char path[64];
    qemb_file *f;
    qemb_err err;
    put(entry(6) + 52, bits, 4);
    seal_model(model, model_bytes);
    write_temporary(path, model, model_bytes);
    cr_assert_eq(qemb_file_open(&f, path, &err), 0, "%s", err.msg);
    unlink(path);
    const qemb_layer *y = f->weights.layers;
    cr_assert_eq(y[0].wqkv.bits, bits);
    /* What is recorded counts, whatever the numbers are. */
    cr_assert_eq(qemb_mat_bits(&y[0].wqkv), bits ? bits : QEMB_BITS_11);
    cr_assert_eq(f->weights.tok_emb.bits, QEMB_BITS_11); /* random halves */
    cr_assert_eq(y[0].wo.bits, QEMB_BITS_11);
    cr_assert_eq(y[1].wqkv.bits, QEMB_BITS_11);
    qemb_file_close(f);
}

Test(file, binds_the_recorded_bits) {
    binds_bits(QEMB_BITS_8);
    binds_bits(QEMB_BITS_11);
    binds_bits(QEMB_BITS_UNKNOWN);
}

Test(file, refuses_other_significant_bits) {
    put(entry(6) + 52, 9, 4);
    refuses("layers.0.wqkv: significant bits (got 9, want 0, 8 or 11)");
    put(entry(6) + 52, 11, 4);
    put(entry(5) + 52, 8, 4);
    refuses("layers.0.attn_norm: significant bits (got 8, want 0)");
    use_int8();
    put(entry(6) + 52, 8, 4);
    refuses("layers.0.wqkv: significant bits (got 8, want 0)");
}

/* Every half alone. */
Test(bits, of_every_half) {
    for (uint32_t i = 0; i < 1 << 16; i++) {
        const uint16_t h = (uint16_t)i;
        const qemb_mat m = {.data = &h, .rows = 1, .cols = 1, .dtype = QEMB_F16, .alpha = 1};
        cr_assert_eq(qemb_mat_bits(&m), significant_bits(h) > 8 ? QEMB_BITS_11 : QEMB_BITS_8,
                     "%04x", i);
    }
}

/* One number of 9 bits at any place of a matrix of all halves that have at most 8, larger than the
 * blocks in which it is read and of an odd size. */
Test(bits, finds_one_number_anywhere) {
    enum { N = 3 * 4567 };
    static uint16_t h[N];
    const qemb_mat m = {.data = h, .rows = 3, .cols = N / 3, .dtype = QEMB_F16, .alpha = 1};
    uint16_t next = 0;
    for (int i = 0; i < N; next++)
        if (significant_bits(next) <= 8) h[i++] = next;
    cr_assert_eq(qemb_mat_bits(&m), QEMB_BITS_8);
    for (int i = 0; i < N; i++) {
        const uint16_t was = h[i];
        h[i] = 0x3c04; /* 1 + 2^-8 */
        cr_assert_eq(qemb_mat_bits(&m), QEMB_BITS_11, "%d", i);
        h[i] = was;
    }
}

Test(bits, of_an_int8_matrix_are_unknown) {
    const int8_t q[] = {1, 127};
    const float scale = 1;
    const qemb_mat m = {q, 1, 2, QEMB_I8, 1, &scale, QEMB_BITS_UNKNOWN};
    cr_assert_eq(qemb_mat_bits(&m), QEMB_BITS_UNKNOWN);
}
