/* fuzz_line_index.c - libFuzzer target: an index of lines is refused, or everything in it lies
 * within it.
 *
 * The input is a patch for a small valid index: { u16 offset, u8 byte } ... Unless the first byte
 * is odd, the digests are then made true, so that the later checks are reached. */
#include "frontends/cli/line_index.h"
#include "tests/unit/seal_index.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* An index of three rows in two files; it is not freed. */
static uint8_t *make_index(size_t *bytes) {
    const line_index_key key = {.dim = 8, .max_tokens = 7, .table = "plain"};
    line_index_file files[2] = {{.text = {100, 1}}, {.text = {200, 2}}};
    line_index x;
    const uint16_t v[8] = {0x3c00, 0x3800};
    char path[64];
    line_index_writer *w;
    qemb_err err;
    snprintf(path, sizeof path, "/tmp/qemb-fuzz-%ld.qidx", (long)getpid());
    if (line_index_create(&w, path, &key, files, 2, &err)) abort();
    for (uint64_t i = 0; i < 3; i++) {
        const line_index_row row = {10 * i, 9, i + 1};
        if (line_index_add(w, i == 2, &row, v, &err)) abort();
    }
    line_index_failed(&files[1], 4, "why", 3);
    if (line_index_finish(w, &x, &err)) abort();
    line_index_close(&x);
    uint8_t *index = malloc(1 << 16);
    FILE *f = fopen(path, "rb");
    if (!f || !index) abort();
    *bytes = fread(index, 1, 1 << 16, f);
    fclose(f);
    unlink(path);
    return index;
}

/* Reads all that a search reads. */
static void walk(const line_index *x) {
    uint64_t rows = 0;
    for (int i = 0; i < x->n_files; i++) {
        if (strlen(x->files[i].message) >= sizeof x->files[i].message) abort();
        for (const uint64_t stop = rows + x->files[i].rows; rows < stop; rows++) {
            const line_index_row *r = &x->rows[rows];
            if (r->bytes + r->offset < r->bytes || r->bytes + r->offset > x->files[i].text.bytes)
                abort();
        }
    }
    if (rows != x->n_rows) abort();
    qemb_err err;
    float *scores = malloc((x->n_rows + 1) * sizeof *scores);
    float *q = aligned_alloc(64, (size_t)x->stride * sizeof *q);
    if (!scores || !q) abort();
    memset(q, 0, (size_t)x->stride * sizeof *q);
    q[0] = 1;
    if (line_index_scan(x, "index", q, scores, 1, &err) && !err.msg[0]) abort();
    free(scores);
    free(q);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static uint8_t *good;
    static size_t bytes;
    if (!good) good = make_index(&bytes);
    if (!size) return 0;
    /* behind the last byte the address sanitizer has to see a read; and rows are aligned */
    uint8_t *copy;
    if (posix_memalign((void **)&copy, 64, bytes)) abort();
    memcpy(copy, good, bytes);
    for (size_t i = 1; i + 3 <= size; i += 3) {
        size_t at = (size_t)data[i] | (size_t)data[i + 1] << 8;
        if (at >= 160) at += 4096 - 160; /* skip the header's zeros: they are all alike */
        copy[at % bytes] = data[i + 2];
    }
    if (!(data[0] & 1)) seal_index(copy, bytes);
    line_index x;
    qemb_err err = {0};
    if (line_index_bind(&x, "index", copy, bytes, &err)) {
        const int known = !strcmp(err.code, "index_file") || !strcmp(err.code, "other_version");
        if (!known || !err.msg[0]) abort();
    } else {
        walk(&x);
    }
    free(copy);
    return 0;
}
