/* fuzz_input.c - libFuzzer target: compressed input. A stream that is whole has the records of its
 * text; one that is changed or cut off may have any, and ends. What arrives in pieces has the
 * records of what is read at once. The first three bytes say what is done. */
#include "frontends/decompress.h"
#include "frontends/input.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

static void require(int holds) {
    if (!holds) abort();
}

typedef struct {
    uint8_t *bytes;
    size_t n, cap;
} buffer;

typedef struct {
    const uint8_t *bytes;
    size_t n;
} span;

static void add_member(buffer *b, int zstd, const uint8_t *text, size_t n) {
    if (zstd) {
        const size_t wrote = ZSTD_compress(b->bytes + b->n, b->cap - b->n, text, n, 1);
        require(!ZSTD_isError(wrote));
        b->n += wrote;
        return;
    }
    z_stream z = {.next_in = (Bytef *)(uintptr_t)text,
                  .avail_in = (uInt)n,
                  .next_out = b->bytes + b->n,
                  .avail_out = (uInt)(b->cap - b->n)};
    require(deflateInit2(&z, 1, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY) == Z_OK);
    require(deflate(&z, Z_FINISH) == Z_STREAM_END);
    b->n += z.total_out;
    deflateEnd(&z);
}

static input *open_whole(int fd, span b) {
    require(!ftruncate(fd, 0) && pwrite(fd, b.bytes, b.n, 0) == (ssize_t)b.n);
    require(!lseek(fd, 0, SEEK_SET));
    input *in = input_new(fd, -1, '\n');
    require(in != NULL);
    return in;
}

/* Input by a pipe. Piece i has 2^(lengths[i % n] % 8) bytes. */
typedef struct {
    input *in;
    int fd[2]; /* fd[1]: -1 when all is written */
    span rest, lengths;
    size_t pieces; /* written so far */
} slow_input;

static void open_slow(slow_input *s, span b, span lengths) {
    *s = (slow_input){.rest = b, .lengths = lengths};
    require(!pipe(s->fd));
    s->in = input_new(s->fd[0], -1, '\n');
    require(s->in != NULL);
}

static void close_slow(slow_input *s) {
    input_free(s->in);
    close(s->fd[0]);
    if (s->fd[1] >= 0) close(s->fd[1]);
}

/* Writes a piece whenever all that is written has been read. */
static input_status next_slow(slow_input *s, input_record *r) {
    input_status status;
    while ((status = input_next(s->in, 0, r)) == INPUT_WAIT) {
        require(s->fd[1] >= 0);
        if (s->rest.n) {
            size_t n = (size_t)1 << (s->lengths.bytes[s->pieces++ % s->lengths.n] & 7);
            if (n > s->rest.n) n = s->rest.n;
            require(write(s->fd[1], s->rest.bytes, n) == (ssize_t)n);
            s->rest.bytes += n, s->rest.n -= n;
        } else {
            close(s->fd[1]);
            s->fd[1] = -1;
        }
    }
    return status;
}

static input_status end_of(const input *in) { return *input_error(in) ? INPUT_FAILED : INPUT_END; }

/* Both have the same records, up to the failure of one. */
static void same_records(input *whole, slow_input *slow) {
    input_status a = INPUT_RECORD, b = INPUT_RECORD;
    for (;;) {
        input_record of_whole, of_slow;
        if (a == INPUT_RECORD) a = input_next(whole, 1, &of_whole);
        if (b == INPUT_RECORD) b = next_slow(slow, &of_slow);
        if (a != INPUT_RECORD && b != INPUT_RECORD) break;
        if (a == b)
            require(of_whole.len == of_slow.len && of_whole.line == of_slow.line &&
                    of_whole.offset == of_slow.offset &&
                    !memcmp(of_whole.text, of_slow.text, of_slow.len));
        else
            require(a == INPUT_FAILED || b == INPUT_FAILED);
    }
    require(a == end_of(whole) && b == end_of(slow->in));
}

/* packed has the records of the text that it was made from. */
static void text_records(int fd, span text, span packed, span lengths) {
    slow_input slow;
    input *whole = open_whole(fd, text);
    open_slow(&slow, packed, lengths);
    same_records(whole, &slow);
    require(end_of(whole) == end_of(slow.in));
    if (end_of(whole) == INPUT_FAILED) {
        require(!strncmp(input_error(whole), "UTF-16", 6));
    } else {
        require(input_consumed(whole) == text.n);
        require(input_consumed(slow.in) == packed.n);
    }
    close_slow(&slow);
    input_free(whole);
}

/* A frame that libzstd has whole gives all or nothing, and fails if its size is not the header's;
 * one in pieces gives what comes before the damage, and may have another size. */
static void any_records(int fd, span b, span lengths) {
    slow_input slow;
    input_record r;
    input *whole = open_whole(fd, b);
    open_slow(&slow, b, lengths);
    same_records(whole, &slow);
    require(end_of(whole) == end_of(slow.in) || compression_of(b.bytes, b.n) == COMPRESSION_ZSTD);
    require(input_next(whole, 1, &r) == end_of(whole));
    require(input_next(slow.in, 0, &r) == end_of(slow.in));
    require(input_consumed(whole) <= b.n && input_consumed(slow.in) <= b.n);
    close_slow(&slow);
    input_free(whole);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int fd = -1;
    if (fd < 0) require((fd = memfd_create("input", 0)) >= 0);
    if (size < 3) return 0;
    const span text = {data + 3, size - 3}, lengths = {data + 2, size - 2};
    const size_t cut = data[1] % (text.n + 1);
    const compression kind = compression_of(text.bytes, text.n);
    buffer b = {.cap = 3 * compressBound((uLong)size) + 256};
    require((b.bytes = malloc(b.cap)) != NULL);
    add_member(&b, data[0] & 1, text.bytes, cut);
    add_member(&b, data[0] & 1, text.bytes + cut, text.n - cut);
    /* a text that is compressed itself would be decompressed as plain input */
    if (kind != COMPRESSION_GZIP && kind != COMPRESSION_ZSTD)
        text_records(fd, text, (span){b.bytes, b.n}, lengths);
    b.bytes[data[2] % b.n] ^= (uint8_t)(1u << (data[0] >> 1 & 7));
    if (data[0] & 16) b.n -= data[1] % b.n;
    any_records(fd, (span){b.bytes, b.n}, lengths);
    any_records(fd, text, lengths);
    free(b.bytes);
    return 0;
}
