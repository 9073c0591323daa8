/* test_line_index.c - the index of `qemb grep` gives back what was put in, and refuses all else. */
#include "seal_index.h"
#include "support.h"

#include "backends/cpu/dot_f16.h"
#include "frontends/cli/line_index.h"
#include "frontends/format.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DIM = 40, STRIDE = 64, FILES = 3 };
static const int rows_of[FILES] = {LINE_INDEX_BLOCK + 3, 0, 2};
enum { ROWS = LINE_INDEX_BLOCK + 5 };

static char dir[] = "/tmp/qemb-index-XXXXXX";
static char path[64];
static uint8_t *bytes; /* (n_bytes) of a good index */
static size_t n_bytes;
static uint16_t vectors[ROWS][DIM];
static _Alignas(64) float query[STRIDE];

static line_index_key key(void) {
    line_index_key k = {.dim = DIM, .max_tokens = 7, .flags = 1, .table = "plain", .qemb = "1"};
    for (int i = 0; i < 32; i++) k.model[i] = (uint8_t)i;
    return k;
}

static line_index_text text_of(int file) { return (line_index_text){1000, 77 + (uint64_t)file}; }
static line_index_row row_at(int i) { return (line_index_row){(uint64_t)i, 3, (uint64_t)i + 5}; }

static line_index_file files[FILES];

static line_index_writer *half_written(void) {
    line_index_writer *w;
    qemb_err err;
    const line_index_key k = key();
    for (int f = 0; f < FILES; f++) files[f] = (line_index_file){.text = text_of(f)};
    cr_assert_eq(line_index_create(&w, path, &k, files, FILES, &err), 0, "%s", err.msg);
    for (int f = 0, i = 0; f < FILES; f++)
        for (int n = 0; n < rows_of[f]; n++, i++) {
            const line_index_row row = row_at(i);
            cr_assert_eq(line_index_add(w, f, &row, vectors[i], &err), 0, "%s", err.msg);
        }
    char reason[500];
    memset(reason, 'x', sizeof reason);
    line_index_failed(&files[1], 9, reason, sizeof reason);
    line_index_failed(&files[1], 11, "another", 7);
    return w;
}

static void write_index(void) {
    line_index x;
    qemb_err err;
    cr_assert_eq(line_index_finish(half_written(), &x, &err), 0, "%s", err.msg);
    line_index_close(&x);
}

static int files_in_dir(void) {
    int n = 0;
    DIR *d = opendir(dir);
    while (readdir(d)) n++;
    closedir(d);
    return n - 2;
}

static void setup(void) {
    rng r = {3};
    cr_assert_not_null(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/a.qidx", dir);
    rng_floats(&r, query, DIM, 1);
    for (int i = 0; i < ROWS; i++) rng_halves(&r, vectors[i], DIM, 1);
    write_index();
    FILE *f = fopen(path, "rb");
    bytes = malloc(1 << 20);
    n_bytes = fread(bytes, 1, 1 << 20, f);
    fclose(f);
}

static void teardown(void) {
    unlink(path);
    rmdir(dir);
    free(bytes);
}

TestSuite(line_index, .init = setup, .fini = teardown);

/* Binds and scans. Returns 0, or -1 with *err filled. */
static int use(const uint8_t *data, size_t n, qemb_err *err) {
    line_index x;
    float *scores;
    int bad = line_index_bind(&x, "some.qidx", data, n, err);
    if (!bad) {
        scores = malloc((x.n_rows + 1) * sizeof *scores);
        bad = x.stride == STRIDE ? line_index_scan(&x, "some.qidx", query, scores, 1, err) : 0;
        free(scores);
    }
    return bad;
}

static void check_refused(const uint8_t *data, size_t n, const char *what) {
    /* a copy of the exact size, so that the address sanitizer sees a read behind it */
    uint8_t *copy = aligned_alloc(64, (n + 64) / 64 * 64);
    qemb_err err;
    memcpy(copy, data, n);
    cr_assert_eq(use(copy, n, &err), -1, "%zu bytes: taken", n);
    cr_assert_str_eq(err.code, "index_file");
    cr_assert(!strncmp(err.msg, "some.qidx: ", 11) && strstr(err.msg, what), "%s (want %s)",
              err.msg, what);
    free(copy);
}

Test(line_index, gives_back_what_was_put_in) {
    line_index x;
    qemb_err err;
    const line_index_key k = key();
    cr_assert_eq(line_index_open(&x, path, &err), 0, "%s", err.msg);
    cr_assert_eq(memcmp(&x.key, &k, sizeof k), 0);
    cr_assert(x.n_rows == ROWS && x.n_files == FILES && x.stride == STRIDE);
    for (int i = 0; i < ROWS; i++) {
        const line_index_row row = row_at(i);
        cr_assert_eq(memcmp(&x.rows[i], &row, sizeof row), 0);
        cr_assert_eq(memcmp(x.vectors + (size_t)i * STRIDE, vectors[i], sizeof vectors[i]), 0);
    }
    for (int f = 0; f < FILES; f++) {
        const line_index_text text = text_of(f);
        cr_assert_eq(x.files[f].rows, (uint64_t)rows_of[f]);
        cr_assert_eq(memcmp(&x.files[f].text, &text, sizeof text), 0);
        cr_assert_eq(x.files[f].failed, f == 1 ? 2u : 0);
    }
    cr_assert_eq(x.files[1].line, 9u);
    cr_assert_eq(strlen(x.files[1].message), sizeof x.files[1].message - 1);
    line_index_close(&x);
    cr_assert_eq(files_in_dir(), 1);
}

/* The scores are dot_f16's, however many threads there are. */
Test(line_index, scan) {
    line_index x;
    qemb_err err;
    float want[ROWS], got[ROWS];
    cr_assert_eq(line_index_open(&x, path, &err), 0);
    dot_f16_versions[0].run(want, query, x.vectors, ROWS, STRIDE);
    for (int threads = 1; threads < 4; threads++) {
        memset(got, 0, sizeof got);
        cr_assert_eq(line_index_scan(&x, path, query, got, threads, &err), 0, "%s", err.msg);
        cr_assert_arr_eq(got, want, sizeof want);
    }
    line_index_close(&x);
}

Test(line_index, every_flipped_byte_is_refused) {
    static const uint8_t flips[] = {0x01, 0x80, 0xff};
    qemb_err err;
    uint8_t *copy = aligned_alloc(64, (n_bytes + 63) / 64 * 64);
    memcpy(copy, bytes, n_bytes);
    cr_assert_eq(use(copy, n_bytes, &err), 0, "%s", err.msg);
    for (size_t i = 0; i < n_bytes; i++)
        for (size_t k = 0; k < sizeof flips; k++) {
            copy[i] ^= flips[k];
            cr_assert_eq(use(copy, n_bytes, &err), -1, "byte %zu ^ %02x", i, flips[k]);
            cr_assert_str_eq(err.code, i / 4 == 2 ? "other_version" : "index_file");
            copy[i] ^= flips[k];
        }
    free(copy);
}

Test(line_index, every_other_length_is_refused) {
    for (size_t n = 0; n < n_bytes; n += n < 4200 ? 1 : 7)
        check_refused(bytes, n, n < 8 ? "not an index" : "damaged");
    check_refused(bytes, n_bytes - 1, "damaged");
    bytes[n_bytes] = 0;
    check_refused(bytes, n_bytes + 1, "damaged");
}

Test(line_index, says_what_is_wrong) {
    qemb_err err;
    bytes[8] = 2;
    cr_assert_eq(use(bytes, n_bytes, &err), -1);
    cr_assert_str_eq(err.code, "other_version");
    cr_assert_str_eq(err.msg, "some.qidx: version of the index (got 2, want 1)");
    bytes[8] = 1;
    bytes[0] = 'Q';
    check_refused(bytes, n_bytes, "not an index of qemb grep");
    bytes[0] = 'q';
    bytes[4096] ^= 1;
    check_refused(bytes, n_bytes, "damaged (its vectors)");
}

static void put64(size_t at, uint64_t v) { memcpy(bytes + at, &v, 8); }

/* Under a true digest, counts and places that lead out of the file are refused all the same. */
Test(line_index, hostile_counts_and_places) {
    const size_t rows = 4096 + ROWS * STRIDE * 2, files = n_bytes - FILES * 256;
    const struct {
        size_t at;
        uint64_t v;
        const char *what;
    } cases[] = {
        {136, ROWS + 1, "counts"},
        {136, UINT64_MAX, "counts"},
        {136, UINT64_MAX / (2 * STRIDE) + 1, "counts"},
        {rows, 998, "rows"},                  /* offset + 3 > 1000 */
        {rows, UINT64_MAX, "rows"},           /* and a sum that wraps */
        {rows + 8, UINT64_MAX, "rows"},       /* bytes */
        {files + 16, rows_of[0] + 1, "rows"}, /* rows of a file: more than there are in all */
        {files + 16, rows_of[0] - 1, "rows"}, /* less */
        {files + 16, UINT64_MAX, "rows"},
        {files, 2, "rows"}, /* bytes of the text */
    };
    uint8_t *good = malloc(n_bytes);
    memcpy(good, bytes, n_bytes);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        put64(cases[i].at, cases[i].v);
        seal_index(bytes, n_bytes);
        check_refused(bytes, n_bytes, cases[i].what);
        memcpy(bytes, good, n_bytes);
    }
    bytes[files + 2 * 256 - 1] = 'x'; /* a message without its end */
    seal_index(bytes, n_bytes);
    check_refused(bytes, n_bytes, "rows");
    free(good);
}

/* A score that is not finite is damage too: it has no place in an order. */
Test(line_index, vectors_that_are_not_finite) {
    const uint16_t infinity = 0x7c00;
    memcpy(bytes + 4096, &infinity, 2);
    seal_index(bytes, n_bytes);
    check_refused(bytes, n_bytes, "its vectors");
}

Test(line_index, only_a_finished_one_takes_the_name) {
    line_index x, own;
    qemb_err err;
    cr_assert_eq(line_index_open(&x, path, &err), 0);
    line_index_drop(half_written());
    cr_assert_eq(files_in_dir(), 1);
    line_index_writer *b = half_written();
    cr_assert_eq(files_in_dir(), 2);
    cr_assert_eq(use(x.map, x.map_bytes, &err), 0);
    for (int f = 0; f < FILES; f++) files[f].text.bytes = 2000;
    cr_assert_eq(line_index_finish(b, &own, &err), 0);
    cr_assert_eq(use(x.map, x.map_bytes, &err), 0, "the old one is in use still");
    line_index_close(&x);
    write_index(); /* as another process does; own stays what was written */
    cr_assert(own.n_rows == ROWS && own.files[2].text.bytes == 2000);
    cr_assert_eq(use(own.map, own.map_bytes, &err), 0);
    line_index_close(&own);
    cr_assert_eq(line_index_open(&x, path, &err), 0);
    cr_assert_eq(x.files[0].text.bytes, 1000u);
    line_index_close(&x);
    cr_assert_eq(files_in_dir(), 1);
}

Test(line_index, missing_or_no_file) {
    line_index x;
    line_index_writer *w;
    qemb_err err;
    const line_index_key k = key();
    cr_assert_eq(line_index_open(&x, "/nonexistent/a.qidx", &err), -1);
    cr_assert_str_eq(err.code, "missing");
    cr_assert_eq(line_index_open(&x, dir, &err), -1);
    cr_assert_str_eq(err.code, "index_file");
    cr_assert_eq(line_index_open(&x, "/dev/null", &err), -1);
    cr_assert_str_eq(err.code, "index_file");
    cr_assert_eq(line_index_create(&w, "/nonexistent/a.qidx", &k, files, 1, &err), -1);
    cr_assert(strstr(err.msg, "cannot write it"), "%s", err.msg);
}
