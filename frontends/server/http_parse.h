/* http_parse.h - the head of an HTTP/1.1 request and the framing of its body, from bytes.
 *
 * Strict where servers that read differently could be played off against each other (RFC 9112,
 * sections 2.2, 5 and 6.3): no bare LF, no folded line, no space before a colon, no control
 * character, one length. Nothing here reads, writes or allocates. */
#ifndef QEMB_HTTP_PARSE_H
#define QEMB_HTTP_PARSE_H

#include <stddef.h>
#include <stdint.h>

/* Limits in bytes and in fields. HTTP_HEAD holds any head that is accepted. */
enum { HTTP_HEAD = 32768, HTTP_TARGET = 8192, HTTP_FIELDS = 100 };
/* Bytes of a chunked body, beside data and sizes: extensions and the fields behind it. */
enum { HTTP_CHUNK_EXTRA = 8192 };

typedef struct {
    const char *method, *path; /* the path is decoded, without its query */
    struct {
        const char *name, *value;
    } fields[HTTP_FIELDS];
    int n;
    int is_11;      /* HTTP/1.1; otherwise 1.0 */
    int keep_alive; /* the client expects another response on this connection */
    int chunked;    /* otherwise length bytes follow */
    int has_length;
    int expects;     /* "100-continue" before the body is sent */
    uint64_t length; /* UINT64_MAX: that or more */
} http_head;

/* What is wrong with a head. */
typedef struct {
    int status; /* of the response */
    const char *code, *why;
} http_fault;

/* How many of the bytes (n) http_parse is to get: a head with its empty line, or what suffices to
 * refuse it. 0: more bytes are needed. *scanned has to be 0 for a new head; it is kept between
 * calls for the same one. */
size_t http_head_end(const char *bytes, size_t n, size_t *scanned);
/* Parses bytes (n, and room for a NUL behind them), which it changes and to which *h points. NULL,
 * or what is wrong; then *h has what stands before that, with "" for what is missing. */
const http_fault *http_parse(http_head *h, char *bytes, size_t n);
/* The value of the first field of that name, or NULL. */
const char *http_field(const http_head *h, const char *name);

/* Where a chunked body is. Begins with zeros. */
typedef struct {
    int state;
    int digits;    /* of the size */
    uint64_t left; /* bytes of the chunk */
    size_t extra;
} http_chunks;

/* Reads bytes (n) up to the end of a piece of data, which *data (*len) then has, or as far as they
 * go; *len is then 0. Returns how many it has used, or -1 if they are no chunked body. */
ptrdiff_t http_read_chunks(http_chunks *c, const char *bytes, size_t n, const char **data,
                           size_t *len);
int http_chunks_end(const http_chunks *c); /* the whole body has been read */

#endif
