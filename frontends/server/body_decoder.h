/* body_decoder.h - the content codings of a request's body: gzip, deflate, zstd. */
#ifndef QEMB_BODY_DECODER_H
#define QEMB_BODY_DECODER_H

#include <stddef.h>

typedef enum { CODING_NONE, CODING_ZLIB, CODING_ZSTD, CODING_UNKNOWN } content_coding;

/* The coding that a Content-Encoding header names; NULL: none. */
content_coding coding_of(const char *header);

typedef struct body_decoder body_decoder;

/* A decoder of CODING_ZLIB or CODING_ZSTD. NULL: out of memory. */
body_decoder *body_decoder_new(content_coding c);
/* The most memory that it may come to take, in bytes. */
size_t body_decoder_room(const body_decoder *d);
void body_decoder_free(body_decoder *d); /* d may be NULL */
/* Gives the decoder data (n); the data must stay valid until it is used up. */
void body_decoder_feed(body_decoder *d, const char *data, size_t n);
/* Writes up to cap bytes to out. Returns their number; less than cap: the data is used up, and 0
 * after all output. -1: the data is damaged. */
long body_decoder_read(body_decoder *d, char *out, size_t cap);
/* Whether the body ends where a compressed stream ends. */
int body_decoder_is_done(const body_decoder *d);

#endif
