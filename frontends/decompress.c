/* decompress.c - gzip and deflate by zlib, zstd by libzstd; see decompress.h. */
#include "decompress.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define ZLIB_CONST /* next_in points to const */
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#define DEFAULT_WINDOW_LOG 27 /* the most that libzstd takes if it is told nothing */

struct decompressor {
    compression kind;
    int window_log;
    z_stream zlib;
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

static int open_zstd(decompressor *d) {
    d->zstd = ZSTD_createDStream();
    if (!d->zstd) return -1;
    const size_t set = ZSTD_DCtx_setParameter(d->zstd, ZSTD_d_windowLogMax, d->window_log);
    return ZSTD_isError(set) ? -1 : 0;
}

decompressor *decompressor_new(compression kind, int window_log) {
    decompressor *d = calloc(1, sizeof *d);
    if (!d) return NULL;
    d->kind = kind;
    d->window_log = window_log ? window_log : DEFAULT_WINDOW_LOG;
    /* 16: a gzip header; 32: what the data says */
    const int header = kind == COMPRESSION_GZIP ? 16 : 32;
    if (kind == COMPRESSION_ZSTD ? !open_zstd(d)
                                 : inflateInit2(&d->zlib, header + MAX_WBITS) == Z_OK)
        return d;
    decompressor_free(d);
    return NULL;
}

/* zlib: a window of 32 KiB and 10 KB of state. zstd: 0.5 MB of state and blocks beside it. */
size_t decompressor_room(compression kind, int window_log) {
    return kind == COMPRESSION_ZSTD ? ((size_t)1 << window_log) + ((size_t)1 << 20)
                                    : (size_t)64 << 10;
}

void decompressor_free(decompressor *d) {
    if (!d) return;
    if (d->kind != COMPRESSION_ZSTD) inflateEnd(&d->zlib);
    ZSTD_freeDStream(d->zstd);
    free(d);
}

static void fail(decompressor *d, const char *what, const char *why) {
    snprintf(d->error, sizeof d->error, "%s: %s%s", d->kind == COMPRESSION_ZSTD ? "zstd" : "gzip",
             what, why);
}

static void fail_zlib(decompressor *d, int status) {
    const char *why = d->zlib.msg;
    if (status == Z_MEM_ERROR)
        fail(d, "", "out of memory");
    else
        fail(d, "damaged: ", why ? why : "a dictionary");
}

static void fail_zstd(decompressor *d, size_t result) {
    const ZSTD_ErrorCode code = ZSTD_getErrorCode(result);
    if (code == ZSTD_error_frameParameter_windowTooLarge)
        snprintf(d->error, sizeof d->error, "zstd: its window is too large (want at most %d MiB)",
                 1 << (d->window_log - 20));
    else if (code == ZSTD_error_memory_allocation)
        fail(d, "", "out of memory");
    else
        fail(d, "damaged: ", ZSTD_getErrorName(result));
}

static size_t gunzip(decompressor *d, const char **in, size_t n, char *out, size_t cap) {
    z_stream *z = &d->zlib;
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
        fail_zlib(d, status);
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
    if (ZSTD_isError(left)) fail_zstd(d, left);
    return to.pos;
}

ptrdiff_t decompress(decompressor *d, const char **in, size_t n, char *out, size_t cap) {
    if (*d->error) return -1;
    if (!n && d->at_end) return 0;
    const size_t wrote =
        d->kind == COMPRESSION_ZSTD ? unzstd(d, in, n, out, cap) : gunzip(d, in, n, out, cap);
    return wrote || !*d->error ? (ptrdiff_t)wrote : -1;
}

int decompressor_at_end(const decompressor *d) { return d->at_end; }

const char *decompressor_error(const decompressor *d) { return d->error; }
