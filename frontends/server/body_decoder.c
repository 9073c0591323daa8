/* body_decoder.c - the content codings of a request's body; see body_decoder.h. */
#include "body_decoder.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <zlib.h>
#include <zstd.h>

/* The largest window of a zstd frame, 8 MiB, is the most that RFC 9659 allows in HTTP. */
#define WINDOW_LOG 23
#define ZSTD_ROOM  ((size_t)9 << 20)  /* the window beside 0.5 MB of state and blocks */
#define ZLIB_ROOM  ((size_t)64 << 10) /* a window of 32 KiB, and zlib's 10 KB of state */

struct body_decoder {
    content_coding coding;
    z_stream z;
    ZSTD_DStream *zstd;
    ZSTD_inBuffer in; /* what is not yet decoded, of both codings */
    int is_done;      /* between two streams, or behind the last one */
};

content_coding coding_of(const char *header) {
    if (!header || !strcasecmp(header, "identity")) return CODING_NONE;
    if (!strcasecmp(header, "gzip") || !strcasecmp(header, "x-gzip") ||
        !strcasecmp(header, "deflate"))
        return CODING_ZLIB;
    return strcasecmp(header, "zstd") ? CODING_UNKNOWN : CODING_ZSTD;
}

body_decoder *body_decoder_new(content_coding c) {
    body_decoder *d = calloc(1, sizeof *d);
    if (!d) return NULL;
    d->coding = c;
    int bad;
    if (c == CODING_ZLIB) {
        bad = inflateInit2(&d->z, 32 + 15) != Z_OK; /* gzip's header or zlib's, as the data says */
    } else {
        d->zstd = ZSTD_createDStream();
        bad = !d->zstd ||
              ZSTD_isError(ZSTD_DCtx_setParameter(d->zstd, ZSTD_d_windowLogMax, WINDOW_LOG));
    }
    if (!bad) return d;
    body_decoder_free(d);
    return NULL;
}

size_t body_decoder_room(const body_decoder *d) {
    return d->coding == CODING_ZLIB ? ZLIB_ROOM : ZSTD_ROOM;
}

void body_decoder_free(body_decoder *d) {
    if (!d) return;
    if (d->coding == CODING_ZLIB) inflateEnd(&d->z);
    ZSTD_freeDStream(d->zstd);
    free(d);
}

void body_decoder_feed(body_decoder *d, const char *data, size_t n) {
    d->in = (ZSTD_inBuffer){data, n, 0};
}

static long read_zlib(body_decoder *d, char *out, size_t cap) {
    z_stream *z = &d->z;
    z->next_in = (Bytef *)(uintptr_t)((const char *)d->in.src + d->in.pos);
    z->avail_in = (uInt)(d->in.size - d->in.pos);
    z->next_out = (Bytef *)out;
    z->avail_out = (uInt)cap;
    int status = Z_OK;
    while (z->avail_out && status != Z_BUF_ERROR) {
        if (d->is_done && !z->avail_in) break;
        if (d->is_done && inflateReset(z) != Z_OK) return -1; /* another member */
        d->is_done = 0;
        status = inflate(z, Z_NO_FLUSH);
        if (status != Z_OK && status != Z_STREAM_END && status != Z_BUF_ERROR) return -1;
        d->is_done = status == Z_STREAM_END;
    }
    d->in.pos = d->in.size - z->avail_in;
    return (long)(cap - z->avail_out);
}

static long read_zstd(body_decoder *d, char *out, size_t cap) {
    ZSTD_outBuffer to = {out, cap, 0};
    while (to.pos < cap) {
        const size_t before = d->in.size - d->in.pos + cap - to.pos;
        if (d->is_done && d->in.pos == d->in.size) break;
        const size_t left = ZSTD_decompressStream(d->zstd, &to, &d->in);
        if (ZSTD_isError(left)) return -1;
        d->is_done = !left;
        if (before == d->in.size - d->in.pos + cap - to.pos) break; /* no progress */
    }
    return (long)to.pos;
}

long body_decoder_read(body_decoder *d, char *out, size_t cap) {
    return d->coding == CODING_ZLIB ? read_zlib(d, out, cap) : read_zstd(d, out, cap);
}

int body_decoder_is_done(const body_decoder *d) { return d->is_done; }
