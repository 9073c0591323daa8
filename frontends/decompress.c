/* decompress.c - .gz by zlib, .zst by libzstd; see decompress.h. */
#include "decompress.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define ZLIB_CONST /* next_in points to const */
#include <zlib.h>
#include <zstd.h>

struct decompressor {
    compression kind;
    z_stream gzip;
    ZSTD_DStream *zstd;
    int at_end;     /* behind a whole member or frame */
    char error[96]; /* "": none */
};

compression compression_of(const void *bytes, size_t n) {
    static const unsigned char gzip[] = {0x1f, 0x8b, 8}, zstd[] = {0x28, 0xb5, 0x2f, 0xfd};
    const size_t of_gzip = n < sizeof gzip ? n : sizeof gzip;
    const size_t of_zstd = n < sizeof zstd ? n : sizeof zstd;
    if (!memcmp(bytes, gzip, of_gzip))
        return n < sizeof gzip ? COMPRESSION_UNKNOWN : COMPRESSION_GZIP;
    if (!memcmp(bytes, zstd, of_zstd))
        return n < sizeof zstd ? COMPRESSION_UNKNOWN : COMPRESSION_ZSTD;
    return COMPRESSION_NONE;
}

decompressor *decompressor_new(compression kind) {
    decompressor *d = calloc(1, sizeof *d);
    if (!d) return NULL;
    d->kind = kind;
    /* 16: a gzip header, no other */
    if (kind == COMPRESSION_GZIP ? inflateInit2(&d->gzip, 16 + MAX_WBITS) == Z_OK
                                 : (d->zstd = ZSTD_createDStream()) != NULL)
        return d;
    free(d);
    return NULL;
}

void decompressor_free(decompressor *d) {
    if (!d) return;
    if (d->kind == COMPRESSION_GZIP) inflateEnd(&d->gzip);
    ZSTD_freeDStream(d->zstd);
    free(d);
}

static void damaged(decompressor *d, const char *why) {
    snprintf(d->error, sizeof d->error, "%s: damaged: %s",
             d->kind == COMPRESSION_GZIP ? "gzip" : "zstd", why);
}

static size_t gunzip(decompressor *d, const char **in, size_t n, char *out, size_t cap) {
    z_stream *z = &d->gzip;
    z->next_in = (const Bytef *)*in;
    z->avail_in = n < UINT_MAX ? (uInt)n : UINT_MAX;
    z->next_out = (Bytef *)out;
    z->avail_out = cap < UINT_MAX ? (uInt)cap : UINT_MAX;
    const uInt room = z->avail_out;
    int status = Z_OK;
    do {
        if (d->at_end) { /* the next member; zeros pad a file to the size of a block */
            while (z->avail_in && !*z->next_in) z->next_in++, z->avail_in--;
            if (!z->avail_in) break;
            inflateReset(z);
            d->at_end = 0;
        }
        status = inflate(z, Z_NO_FLUSH);
        if (status == Z_STREAM_END) d->at_end = 1, status = Z_OK;
    } while (z->avail_in && z->avail_out && status == Z_OK);
    *in = (const char *)z->next_in;
    if (status != Z_OK && status != Z_BUF_ERROR) /* BUF_ERROR: nothing to do without more input */
        damaged(d, z->msg ? z->msg : status == Z_MEM_ERROR ? "out of memory" : "a dictionary");
    return room - z->avail_out;
}

static size_t unzstd(decompressor *d, const char **in, size_t n, char *out, size_t cap) {
    ZSTD_inBuffer from = {*in, n, 0};
    ZSTD_outBuffer to = {out, cap, 0};
    size_t left;
    do {
        left = ZSTD_decompressStream(d->zstd, &to, &from);
        d->at_end = !left; /* all of the frame is read, and written too */
    } while (from.pos < n && to.pos < cap && !ZSTD_isError(left));
    *in += from.pos;
    if (ZSTD_isError(left)) damaged(d, ZSTD_getErrorName(left));
    return to.pos;
}

ptrdiff_t decompress(decompressor *d, const char **in, size_t n, char *out, size_t cap) {
    if (*d->error) return -1;
    if (!n && d->at_end) return 0;
    const size_t wrote =
        d->kind == COMPRESSION_GZIP ? gunzip(d, in, n, out, cap) : unzstd(d, in, n, out, cap);
    return wrote || !*d->error ? (ptrdiff_t)wrote : -1;
}

int decompressor_at_end(const decompressor *d) { return d->at_end; }

const char *decompressor_error(const decompressor *d) { return d->error; }
