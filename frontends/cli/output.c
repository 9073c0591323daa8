/* output.c - writes records to standard output or a file; see cli.h. */
#include "cli.h"

#include "frontends/console.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define OUTPUT_BYTES ((size_t)256 << 10)

/* An .npy header holds the number of rows, which is known at the end. If the output is a regular
 * file, zeros stand in the header's place until then, so that NumPy refuses what a killed run
 * leaves. Otherwise the vectors go to an unlinked temporary file first and are copied out at the
 * end: of a copy that is cut off, NumPy finds fewer bytes than its header says. */

static void output_failed(output *o) {
    if (o->target != STDOUT_FILENO) {
        if (!o->error) o->error = errno;
        return;
    }
    if (errno == EPIPE && !o->to_spool)
        leave(STATUS_OUTPUT); /* the reader has closed the pipe: no message */
    if (o->to_spool) DIE(STATUS_OUTPUT, "temporary file: cannot write (%s)", strerror(errno));
    DIE(STATUS_OUTPUT,
        "standard output: cannot write (%s); %" PRIu64 " rows are whole, the first %" PRIu64
        " bytes",
        strerror(errno), o->rows, o->whole);
}

/* Counts the rows that the bytes data (n) end, which were written. */
static void count_rows(output *o, const char *data, size_t n) {
    const char *p = data, *end = data + n;
    while (!o->row_bytes && (p = memchr(p, o->nul_ended ? 0 : '\n', (size_t)(end - p)))) {
        o->rows++;
        o->whole = o->written + (uint64_t)(++p - data);
    }
    o->written += n;
    if (!o->row_bytes || o->written < o->header_bytes) return;
    o->rows = (o->written - o->header_bytes) / o->row_bytes;
    o->whole = o->header_bytes + o->rows * o->row_bytes;
}

static void write_all(output *o, const char *data, size_t len) {
    while (len && !o->error) {
        const ssize_t n = write(o->fd, data, len);
        if (n >= 0) {
            if (!o->to_spool) count_rows(o, data, (size_t)n);
            data += n;
            len -= (size_t)n;
        } else if (errno == EAGAIN) {
            struct pollfd p = {.fd = o->fd, .events = POLLOUT};
            poll(&p, 1, -1);
        } else if (errno != EINTR) {
            output_failed(o);
        }
    }
}

void output_flush(output *o) {
    write_all(o, o->data, o->len);
    o->len = 0;
}

char *output_room(output *o, size_t n) {
    if (o->len + n > o->cap || o->len >= OUTPUT_BYTES) {
        output_flush(o);
        if (o->cap > 16 * OUTPUT_BYTES || n > o->cap) { /* free what a rare long record needed */
            free(o->data);
            o->cap = n > OUTPUT_BYTES * 2 ? n : OUTPUT_BYTES * 2;
            o->data = need(malloc(o->cap));
        }
    }
    return o->data + o->len;
}

void output_wrote(output *o, const char *end) { o->len = (size_t)(end - o->data); }

static int open_spool(void) {
    static const char *const names[] = {"/var/tmp/qemb-XXXXXX", "/tmp/qemb-XXXXXX"};
    for (int i = 0; i < LENGTH(names); i++) {
        char name[32];
        strcpy(name, names[i]);
        const int fd = mkstemp(name);
        if (fd < 0) continue;
        unlink(name);
        return fd;
    }
    DIE(STATUS_OUTPUT, "temporary file: cannot create it in /var/tmp or /tmp (%s)",
        strerror(errno));
}

void output_open(output *o, int fd, format_kind kind, int dim) {
    *o = (output){.fd = fd, .target = fd};
    if (!format_is_text(kind)) o->row_bytes = format_vector_room(kind, dim);
    if (kind != FORMAT_NPY) return;
    o->header_bytes = FORMAT_NPY_HEADER;
    struct stat st;
    o->header_at = lseek(fd, 0, SEEK_CUR);
    if (o->header_at < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode) ||
        (fcntl(fd, F_GETFL) & O_APPEND)) {
        o->to_spool = 1;
        o->fd = open_spool();
    } else {
        char *header = output_room(o, FORMAT_NPY_HEADER);
        memset(header, 0, FORMAT_NPY_HEADER);
        output_wrote(o, header + FORMAT_NPY_HEADER);
    }
}

static void write_npy_header(output *o, uint64_t rows, int dim) {
    char header[FORMAT_NPY_HEADER];
    format_npy_header(header, rows, dim);
    if (o->to_spool) {
        const int spool = o->fd;
        o->fd = o->target, o->to_spool = 0;
        write_all(o, header, sizeof header);
        if (lseek(spool, 0, SEEK_SET) < 0) output_failed(o);
        char *data = output_room(o, OUTPUT_BYTES);
        for (ssize_t n; (n = read(spool, data, OUTPUT_BYTES));) {
            if (n < 0) DIE(STATUS_OUTPUT, "temporary file: cannot read (%s)", strerror(errno));
            write_all(o, data, (size_t)n);
        }
        close(spool);
    } else {
        errno = EIO; /* of a write that is too short, which sets none */
        if (pwrite(o->fd, header, sizeof header, o->header_at) != (ssize_t)sizeof header)
            output_failed(o);
    }
}

void output_finish(output *o, format_kind kind, uint64_t rows, int dim) {
    output_flush(o);
    if (kind == FORMAT_NPY) write_npy_header(o, rows, dim);
}

void output_close(output *o) {
    free(o->data);
    if (o->target != STDOUT_FILENO && !o->error && fsync(o->target)) output_failed(o);
    if (close(o->target) && errno != EINTR) output_failed(o);
}

size_t output_head_room(const output_head *h) {
    return h->id_len + h->kept_len + FORMAT_UINT_ROOM + 8;
}

char *output_put_head(char *p, const output_head *h) {
    p = put(p, "{\"id\":");
    p = h->id_len ? put_bytes(p, h->id, h->id_len) : format_uint(p, h->line);
    return h->kept_len ? put_bytes(p, h->kept, h->kept_len) : p;
}

void output_error(output *o, const output_head *h, const char *code, const char *message,
                  size_t message_len) {
    char *p = output_room(o, output_head_room(h) + 6 * message_len + 200);
    p = put(output_put_head(p, h), ",\"line\":");
    p = put(format_uint(p, h->line), ",\"error\":{\"code\":\"");
    p = put(put(p, code), "\",\"message\":");
    p = put(format_json_string(p, message, message_len), "}}\n");
    output_wrote(o, p);
}
