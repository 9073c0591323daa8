/* decompress.h - compressed streams: gzip, zlib and zstd. */
#ifndef QEMB_DECOMPRESS_H
#define QEMB_DECOMPRESS_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    COMPRESSION_UNKNOWN,
    COMPRESSION_NONE,
    COMPRESSION_GZIP,
    COMPRESSION_DEFLATE, /* HTTP's: with zlib's header, or gzip's */
    COMPRESSION_ZSTD
} compression;

/* The most bytes that compression_of needs for its answer. */
enum { COMPRESSION_MAGIC = 4 };

/* What a stream is that begins with these bytes (n). UNKNOWN: they are too few to tell. No text
 * begins like a compressed stream: 0x8b and 0xb5 are no second bytes of UTF-8. */
compression compression_of(const void *bytes, size_t n);

typedef struct decompressor decompressor;

/* kind: GZIP, DEFLATE or ZSTD. window_log: refuses zstd frames with a window of more than
 * 2^window_log bytes; 0: libzstd's limit. NULL: out of memory. */
decompressor *decompressor_new(compression kind, int window_log);
/* The most memory that a decompressor takes, in bytes; window_log is not 0. */
size_t decompressor_room(compression kind, int window_log);
void decompressor_free(decompressor *d); /* d may be NULL */
/* Decompresses from *in (n) to out (cap > 0). Moves *in to what it has not used, and returns the
 * number of bytes written; cap of them: there may be more without more input. Members or frames
 * that follow each other are one stream. Returns -1 if the stream is damaged, behind all that it
 * has written. */
ptrdiff_t decompress(decompressor *d, const char **in, size_t n, char *out, size_t cap);
/* Whether the stream may end here. If not, it is cut off. */
int decompressor_at_end(const decompressor *d);
/* What is wrong with the stream, or "". With an error, the next decompress returns -1. */
const char *decompressor_error(const decompressor *d);

#ifdef __cplusplus
}
#endif
#endif
