/* line_index.c - the index of `qemb grep`; see line_index.h. */
#include "line_index.h"

#include "backends/cpu/dot_f16.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#define MAGIC           "qidx\r\n\x1a\n"
#define VERSION         1
#define BYTE_ORDER_MARK 0x01020304

typedef struct {
    char magic[8];
    uint32_t version, byte_order;
    uint64_t bytes, digest;
    line_index_key key;
    uint32_t n_files;
    uint64_t n_rows;
    uint8_t zeros[4096 - 144];
} header;

static_assert(sizeof(line_index_key) == 100 && sizeof(header) == 4096, "as in line_index.h");
static_assert(sizeof(line_index_row) == 24 && sizeof(line_index_file) == 256, "no padding");

static size_t blocks_of(size_t rows) {
    return rows / LINE_INDEX_BLOCK + (rows % LINE_INDEX_BLOCK != 0);
}

/* XXH3 of header, whose digest counts as zero, and of what follows the vectors. */
static uint64_t digest_of(const header *h, const void *tail, size_t tail_bytes) {
    header zeroed = *h;
    zeroed.digest = 0;
    XXH3_state_t s;
    XXH3_64bits_reset(&s);
    XXH3_64bits_update(&s, &zeroed, sizeof zeroed);
    XXH3_64bits_update(&s, tail, tail_bytes);
    return XXH3_64bits_digest(&s);
}

int line_index_text_of(int fd, line_index_text *t) {
    enum { CHUNK = 256 << 10 };
    char *chunk = malloc(CHUNK);
    if (!chunk) return -1;
    XXH3_state_t s;
    XXH3_64bits_reset(&s);
    *t = (line_index_text){0};
    ssize_t n;
    while ((n = pread(fd, chunk, CHUNK, (off_t)t->bytes)) != 0) {
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) break;
        XXH3_64bits_update(&s, chunk, (size_t)n);
        t->bytes += (uint64_t)n;
    }
    t->digest = XXH3_64bits_digest(&s);
    free(chunk);
    return n < 0 ? -1 : 0;
}

/* ---- reading --------------------------------------------------------------------------------- */

static int damaged(const char *path, const char *what, qemb_err *err) {
    return qemb_fail(err, "index_file", "%.128s: damaged (%s); remove it to have it made again",
                     path, what);
}

/* Sets the pointers. Returns -1 if the counts do not add up to the file's bytes. */
static int lay_out(line_index *x, const header *h) {
    const size_t rest = x->map_bytes - sizeof *h;
    const uint64_t n = h->n_rows;
    if (h->key.dim < 1 || h->key.dim > 1 << 24) return -1;
    x->stride = dot_f16_stride((int)h->key.dim);
    const uint64_t row_bytes = 2 * (uint64_t)x->stride;
    /* first bounds that keep the sums from overflowing */
    if (n > rest / row_bytes || h->n_files > rest / sizeof *x->files) return -1;
    const uint64_t blocks = blocks_of(n);
    if (n * (row_bytes + sizeof *x->rows) + 8 * blocks + h->n_files * sizeof *x->files != rest)
        return -1;
    x->n_rows = n;
    x->n_files = (int)h->n_files;
    x->vectors = (const uint16_t *)(x->map + sizeof *h);
    x->rows = (const line_index_row *)(x->vectors + n * (size_t)x->stride);
    x->digests = (const uint64_t *)(x->rows + n);
    x->files = (const line_index_file *)(x->digests + blocks);
    return 0;
}

/* Whether rows and files belong together. */
static int is_consistent(const line_index *x) {
    const line_index_row *r = x->rows, *end = x->rows + x->n_rows;
    for (int i = 0; i < x->n_files; i++) {
        const line_index_file *f = &x->files[i];
        if (f->rows > (uint64_t)(end - r) || !memchr(f->message, 0, sizeof f->message)) return 0;
        for (const line_index_row *stop = r + f->rows; r < stop; r++)
            if (r->bytes > f->text.bytes || r->offset > f->text.bytes - r->bytes) return 0;
    }
    return r == end;
}

int line_index_bind(line_index *x, const char *path, const uint8_t *map, size_t bytes,
                    qemb_err *err) {
    const header *h = (const header *)map;
    *x = (line_index){.map = map, .map_bytes = bytes};
    if (bytes < sizeof h->magic || memcmp(h->magic, MAGIC, sizeof h->magic))
        return qemb_fail(err, "index_file", "%.128s: not an index of qemb grep; it is left alone",
                         path);
    if (bytes < offsetof(header, bytes)) return damaged(path, "cut off", err);
    if (h->version != VERSION)
        return qemb_fail(err, "other_version", "%.128s: version of the index (got %u, want %d)",
                         path, h->version, VERSION);
    if (bytes < sizeof *h) return damaged(path, "cut off", err);
    if (h->byte_order != BYTE_ORDER_MARK) return damaged(path, "byte order", err);
    if (h->bytes != bytes) return damaged(path, "its size is not what it records", err);
    if (lay_out(x, h)) return damaged(path, "its counts", err);
    const uint8_t *tail = (const uint8_t *)x->rows;
    if (digest_of(h, tail, (size_t)(map + bytes - tail)) != h->digest)
        return damaged(path, "the digest of its header", err);
    if (!is_consistent(x)) return damaged(path, "its rows", err);
    x->key = h->key;
    return 0;
}

/* Maps and checks what fd is open on. */
static int open_map(line_index *x, const char *path, int fd, qemb_err *err) {
    struct stat st;
    const int regular = !fstat(fd, &st) && S_ISREG(st.st_mode);
    const size_t bytes = regular ? (size_t)st.st_size : 0;
    void *map = bytes ? mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0) : NULL;
    if (map == MAP_FAILED)
        return qemb_fail(err, "index_file", "%.128s: cannot map it (%s)", path, strerror(errno));
    if (!line_index_bind(x, path, map, bytes, err)) return 0;
    line_index_close(x);
    return -1;
}

int line_index_open(line_index *x, const char *path, qemb_err *err) {
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return qemb_fail(err, errno == ENOENT ? "missing" : "index_file",
                         "%.128s: cannot open it (%s)", path, strerror(errno));
    const int failed = open_map(x, path, fd, err);
    close(fd);
    return failed;
}

void line_index_close(line_index *x) {
    if (x->map) munmap((void *)(uintptr_t)x->map, x->map_bytes);
    *x = (line_index){0};
}

typedef struct {
    const line_index *x;
    const float *q;
    float *scores;
    dot_f16 *dot;
    atomic_int *damaged;
} scan;

static void scan_block(const void *job, work_item item) {
    const scan *s = job;
    const size_t first = (size_t)item.i * LINE_INDEX_BLOCK, left = s->x->n_rows - first;
    const size_t n = left < LINE_INDEX_BLOCK ? left : LINE_INDEX_BLOCK;
    const size_t stride = (size_t)s->x->stride;
    const uint16_t *v = s->x->vectors + first * stride;
    int good = XXH3_64bits(v, n * stride * sizeof *v) == s->x->digests[item.i];
    s->dot(s->scores + first, s->q, v, n, s->x->stride);
    for (size_t i = 0; i < n; i++) good &= isfinite(s->scores[first + i]) != 0;
    if (!good) atomic_store(s->damaged, 1);
}

int line_index_scan(const line_index *x, const char *path, const float *q, float *scores,
                    int threads, qemb_err *err) {
    struct cpu_pool *pool = NULL;
    atomic_int found = 0;
    const scan s = {x, q, scores, dot_f16_choose(), &found};
    const size_t blocks = blocks_of(x->n_rows);
    if (blocks > INT_MAX) return damaged(path, "more rows than can be", err);
    if (threads > 1 && blocks > 1 && cpu_pool_open(&pool, threads, err)) return -1;
    cpu_parallel(pool, (int)blocks, scan_block, &s);
    cpu_pool_close(pool);
    return atomic_load(&found) ? damaged(path, "its vectors", err) : 0;
}

/* ---- writing --------------------------------------------------------------------------------- */

struct line_index_writer {
    char *path, *temporary;
    int fd, stride;
    header h;
    uint16_t *block; /* (LINE_INDEX_BLOCK, stride), in_block rows in use */
    size_t in_block;
    line_index_row *rows; /* (rows_cap), h.n_rows in use */
    uint64_t *digests;    /* (digests_cap), n_digests in use */
    size_t rows_cap, digests_cap, n_digests;
    line_index_file *files; /* (h.n_files) the caller's */
};

static void writer_free(line_index_writer *w) {
    if (w->fd >= 0) close(w->fd);
    free(w->path), free(w->temporary), free(w->block);
    free(w->rows), free(w->digests);
    free(w);
}

void line_index_drop(line_index_writer *w) {
    if (w->fd >= 0) unlink(w->temporary);
    writer_free(w);
}

static int no_memory(qemb_err *err) {
    return qemb_fail(err, "out_of_memory", "index: out of memory");
}

static int cannot_write(const line_index_writer *w, qemb_err *err) {
    return qemb_fail(err, "index_file", "%.128s: cannot write it (%s)", w->path, strerror(errno));
}

static int write_at(const line_index_writer *w, const void *data, size_t bytes, uint64_t at,
                    qemb_err *err) {
    for (const char *p = data; bytes;) {
        const ssize_t n = pwrite(w->fd, p, bytes, (off_t)at);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return cannot_write(w, err);
        p += n, bytes -= (size_t)n, at += (uint64_t)n;
    }
    return 0;
}

/* Another run may write an index of the same name at the same time: each has a file of its own. */
static int open_temporary(line_index_writer *w) {
    struct stat old;
    const mode_t mode = stat(w->path, &old) ? 0600 : old.st_mode & 0777;
    const size_t room = strlen(w->path) + 32;
    w->temporary = malloc(room);
    if (!w->temporary) return -1;
    for (int i = 0; i < 100; i++) {
        snprintf(w->temporary, room, "%s.%ld-%d", w->path, (long)getpid(), i);
        w->fd = open(w->temporary, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (w->fd >= 0 || errno != EEXIST) break;
    }
    return w->fd < 0 || fchmod(w->fd, mode) ? -1 : 0;
}

int line_index_create(line_index_writer **out, const char *path, const line_index_key *key,
                      line_index_file *files, int n_files, qemb_err *err) {
    line_index_writer *w = calloc(1, sizeof *w);
    if (!w) return no_memory(err);
    w->fd = -1;
    w->stride = dot_f16_stride((int)key->dim);
    w->h = (header){.magic = MAGIC,
                    .version = VERSION,
                    .byte_order = BYTE_ORDER_MARK,
                    .key = *key,
                    .n_files = (uint32_t)n_files};
    char *target = realpath(path, NULL); /* NULL: nothing is there */
    w->path = target ? target : strdup(path);
    w->files = files;
    w->block = calloc((size_t)LINE_INDEX_BLOCK * (size_t)w->stride, sizeof *w->block);
    int failed = !w->path || !w->block;
    if (failed)
        no_memory(err);
    else if ((failed = open_temporary(w) != 0))
        cannot_write(w, err);
    if (failed) {
        line_index_drop(w);
        return -1;
    }
    *out = w;
    return 0;
}

/* Room for one more of size bytes in *p, of which n are in use. */
static int grow(void *p, size_t *cap, size_t n, size_t size) {
    void *old, *grown;
    if (n < *cap) return 0;
    memcpy(&old, p, sizeof old);
    grown = realloc(old, (2 * n + 1024) * size);
    if (!grown) return -1;
    memcpy(p, &grown, sizeof grown);
    *cap = 2 * n + 1024;
    return 0;
}

static int write_block(line_index_writer *w, qemb_err *err) {
    const size_t bytes = w->in_block * (size_t)w->stride * sizeof *w->block;
    const uint64_t first = w->h.n_rows - w->in_block;
    if (grow(&w->digests, &w->digests_cap, w->n_digests, sizeof *w->digests)) return no_memory(err);
    w->digests[w->n_digests++] = XXH3_64bits(w->block, bytes);
    w->in_block = 0;
    return write_at(w, w->block, bytes,
                    sizeof w->h + first * (uint64_t)w->stride * sizeof *w->block, err);
}

int line_index_add(line_index_writer *w, int file, const line_index_row *row, const uint16_t *v,
                   qemb_err *err) {
    if (grow(&w->rows, &w->rows_cap, w->h.n_rows, sizeof *w->rows)) return no_memory(err);
    w->rows[w->h.n_rows++] = *row;
    w->files[file].rows++;
    memcpy(w->block + w->in_block++ * (size_t)w->stride, v, w->h.key.dim * sizeof *v);
    return w->in_block == LINE_INDEX_BLOCK ? write_block(w, err) : 0;
}

void line_index_failed(line_index_file *f, uint64_t line, const char *message, size_t len) {
    if (f->failed++) return;
    f->line = line;
    memcpy(f->message, message, len < sizeof f->message ? len : sizeof f->message - 1);
}

/* What follows the vectors, as one piece. NULL: out of memory. */
static uint8_t *make_tail(const line_index_writer *w, size_t *bytes) {
    const size_t rows = w->h.n_rows * sizeof *w->rows, digests = w->n_digests * sizeof *w->digests;
    const size_t files = w->h.n_files * sizeof *w->files;
    uint8_t *tail = malloc(rows + digests + files + 1);
    *bytes = rows + digests + files;
    if (!tail) return NULL;
    if (rows) memcpy(tail, w->rows, rows);
    if (digests) memcpy(tail + rows, w->digests, digests);
    if (files) memcpy(tail + rows + digests, w->files, files);
    return tail;
}

/* Makes a rename last: the directory has to reach the disk as well. Not all file systems can. */
static void sync_directory(const char *path) {
    char *directory = strdup(path);
    if (!directory) return;
    char *slash = strrchr(directory, '/');
    if (slash) slash[slash == directory] = 0;
    const int fd = open(slash ? directory : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    free(directory);
}

static int write_rest(line_index_writer *w, qemb_err *err) {
    if (w->in_block && write_block(w, err)) return -1;
    size_t tail_bytes;
    uint8_t *tail = make_tail(w, &tail_bytes);
    if (!tail) return no_memory(err);
    const uint64_t at = sizeof w->h + w->h.n_rows * (uint64_t)w->stride * sizeof *w->block;
    w->h.bytes = at + tail_bytes;
    w->h.digest = digest_of(&w->h, tail, tail_bytes);
    const int failed =
        write_at(w, tail, tail_bytes, at, err) || write_at(w, &w->h, sizeof w->h, 0, err);
    free(tail);
    if (failed) return -1;
    return fsync(w->fd) ? cannot_write(w, err) : 0;
}

int line_index_finish(line_index_writer *w, line_index *x, qemb_err *err) {
    int failed = write_rest(w, err) || open_map(x, w->path, w->fd, err);
    if (!failed && rename(w->temporary, w->path)) {
        failed = cannot_write(w, err);
        line_index_close(x);
    }
    if (failed) {
        line_index_drop(w);
        return -1;
    }
    sync_directory(w->path);
    writer_free(w);
    return 0;
}
