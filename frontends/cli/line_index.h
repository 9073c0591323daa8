/* line_index.h - the vectors of files' lines, kept in a file for `qemb grep --index`.
 *
 * All little-endian. Version 1:
 *   0     u8[8]  magic "qidx\r\n\x1a\n"
 *   8     u32    version, 1
 *   12    u32    0x01020304
 *   16    u64    bytes of the whole file
 *   24    u64    XXH3 of all but the vectors, with this field as zero
 *   32    line_index_key
 *   132   u32    files
 *   136   u64    rows
 *   144   zeros up to 4096
 *   4096  f16 (rows, stride), a unit vector a row and zeros up to the stride (dot_f16.h)
 *   then  line_index_row (rows)
 *         u64 (blocks) XXH3 of each block of LINE_INDEX_BLOCK vectors
 *         line_index_file (files); their rows follow one another
 *
 * Every byte is under one of the digests. That of a block is compared when the block is scanned, so
 * that a query reads the vectors once.
 */
#ifndef QEMB_LINE_INDEX_H
#define QEMB_LINE_INDEX_H

#include "qemb.h"

#include <sys/types.h>

/* Rows of a block: 128 KiB of vectors with 256 numbers, which stay in an L2 cache between their
 * digest and their products. */
enum { LINE_INDEX_BLOCK = 256 };

/* All that a line's vector depends on, beside the line. Equal keys: equal bytes. */
typedef struct {
    uint8_t model[32]; /* SHA-256 of the model's tensors, as its file records it */
    uint8_t header[8]; /* the model file's checksum of header and directory */
    char table[32];    /* of ops */
    char qemb[16];     /* the program's version */
    uint32_t dim, max_tokens;
    uint32_t flags; /* 1: --truncate, 2: --deterministic, 4: --hopper, 8: lines have a prompt */
} line_index_key;

/* Contents of a file: those whose size and XXH3 are equal are taken for equal. */
typedef struct {
    uint64_t bytes, digest;
} line_index_text;

typedef struct {
    line_index_text text;
    uint64_t rows;         /* lines with a vector */
    uint64_t failed, line; /* lines without one, other than blank ones; the first one's number, */
    char message[216];     /* and why */
} line_index_file;

/* Where a vector's line is. */
typedef struct {
    uint64_t offset, bytes; /* without the end of the line */
    uint64_t line;          /* from 1 on */
} line_index_row;

/* ---- reading --------------------------------------------------------------------------------- */

typedef struct {
    line_index_key key;
    int n_files, stride;
    size_t n_rows;
    /* in the map */
    const uint16_t *vectors; /* (n_rows, stride) */
    const line_index_row *rows;
    const uint64_t *digests;
    const line_index_file *files; /* (n_files) */
    const uint8_t *map;
    size_t map_bytes;
} line_index;

/* Maps and checks all but the vectors. Codes: "missing" (there is no such file), "index_file" (it
 * cannot be read, is no index or is damaged), "other_version" (of the format). The caller closes.
 */
int line_index_open(line_index *x, const char *path, qemb_err *err);
void line_index_close(line_index *x);
/* The same for bytes in memory, aligned to 64 bytes, which must outlive x; path is for messages.
 * There is nothing to close. */
int line_index_bind(line_index *x, const char *path, const uint8_t *map, size_t bytes,
                    qemb_err *err);
/* scores (n_rows) = the products with q (stride, zeros behind dim, aligned to 64 bytes). Fails if
 * the vectors are damaged. Codes: "index_file", and those of the threads. */
int line_index_scan(const line_index *x, const char *path, const float *q, float *scores,
                    int threads, qemb_err *err);

/* The contents of fd from its beginning. Returns -1 and sets errno if it cannot be read. */
int line_index_text_of(int fd, line_index_text *t);

/* ---- writing --------------------------------------------------------------------------------- */

typedef struct line_index_writer line_index_writer;

/* Begins a file beside path, which replaces path when it is finished; a symbolic link stays one.
 * The file has the permissions of the one that it replaces, else the owner's alone, since vectors
 * tell much of their texts. The writer counts the rows of files (n_files) and keeps the pointer;
 * the caller sets all else before it is finished. Codes: "index_file", "out_of_memory"; the same
 * for line_index_add and line_index_finish. */
int line_index_create(line_index_writer **w, const char *path, const line_index_key *key,
                      line_index_file *files, int n_files, qemb_err *err);
/* Adds a row (dim), of the file that was added to before or a later one. */
int line_index_add(line_index_writer *w, int file, const line_index_row *row, const uint16_t *v,
                   qemb_err *err);
/* Counts a line without a vector. */
void line_index_failed(line_index_file *f, uint64_t line, const char *message, size_t len);
/* Completes the file, renames it to path and opens it as x, even if another process replaces it at
 * once. Frees w; if it fails, path is as it was. */
int line_index_finish(line_index_writer *w, line_index *x, qemb_err *err);
void line_index_drop(line_index_writer *w); /* frees w, removes what was written */

#endif
