/* fuzz_input.c - libFuzzer target: compressed input. A stream that is whole has the records of its
 * text; one that is changed or cut off may have any, and ends. The first three bytes say what is
 * done. */
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

static input *open_bytes(int fd, const uint8_t *bytes, size_t n) {
    require(!ftruncate(fd, 0) && pwrite(fd, bytes, n, 0) == (ssize_t)n && !lseek(fd, 0, SEEK_SET));
    input *in = input_new(fd, -1, '\n');
    require(in != NULL);
    return in;
}

static void same_records(int fd[2], const buffer *b, const uint8_t *text, size_t n) {
    input *plain = open_bytes(fd[0], text, n), *packed = open_bytes(fd[1], b->bytes, b->n);
    for (input_status s = INPUT_RECORD; s == INPUT_RECORD;) {
        input_record a, c;
        s = input_next(plain, 1, &a);
        require(input_next(packed, 1, &c) == s && (s == INPUT_RECORD || s == INPUT_END));
        if (s == INPUT_END) break;
        require(a.len == c.len && a.line == c.line && !memcmp(a.text, c.text, a.len));
    }
    require(input_bytes(plain) == n && input_bytes(packed) == n);
    require(input_consumed(packed) == b->n);
    input_free(plain);
    input_free(packed);
}

static void any_records(int fd, const buffer *b) {
    input *in = open_bytes(fd, b->bytes, b->n);
    input_record r;
    input_status s;
    while ((s = input_next(in, 1, &r)) == INPUT_RECORD) {}
    require(s == (*input_error(in) ? INPUT_FAILED : INPUT_END));
    require(input_next(in, 1, &r) == s && input_consumed(in) <= b->n);
    input_free(in);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int fd[2] = {-1, -1};
    for (int i = 0; i < 2 && fd[i] < 0; i++) require((fd[i] = memfd_create("input", 0)) >= 0);
    if (size < 3) return 0;
    const uint8_t *text = data + 3;
    const size_t n = size - 3, cut = n ? data[1] % (n + 1) : 0;
    const compression kind = n ? compression_of(text, n) : COMPRESSION_NONE;
    buffer b = {.cap = 3 * compressBound((uLong)size) + 256};
    require((b.bytes = malloc(b.cap)) != NULL);
    add_member(&b, data[0] & 1, text, cut);
    add_member(&b, data[0] & 1, text + cut, n - cut);
    /* a text that is compressed itself would be decompressed as plain input */
    if (kind != COMPRESSION_GZIP && kind != COMPRESSION_ZSTD) same_records(fd, &b, text, n);
    b.bytes[data[2] % b.n] ^= (uint8_t)(1u << (data[0] >> 1 & 7));
    if (data[0] & 16) b.n -= data[1] % b.n;
    any_records(fd[1], &b);
    if (n) {
        memcpy(b.bytes, text, n);
        b.n = n;
        any_records(fd[1], &b);
    }
    free(b.bytes);
    return 0;
}
