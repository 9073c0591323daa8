/* redis_reply.h - replies of Redis, read as they arrive.
 *
 * The caller says what a reply has to be. What it says it will send is checked before anything is
 * kept of it, so a reply takes no memory beside the caller's. */
#ifndef QEMB_REDIS_REPLY_H
#define QEMB_REDIS_REPLY_H

#include <stddef.h>
#include <stdint.h>

/* A value of another length than the wanted one is read and dropped up to this length. A longer one
 * ends the reading. */
#define REDIS_VALUE_MOST ((size_t)1 << 20)
/* Bytes of a line: a status, an error, or what comes before a value. */
#define REDIS_LINE_MOST 1024
/* Of such a line and of what was wrong, with the NUL. */
#define REDIS_TEXT_ROOM 200

/* REDIS_OTHER: a value of another length. */
typedef enum { REDIS_ABSENT, REDIS_FOUND, REDIS_OTHER } redis_found;

typedef enum { REDIS_MORE, REDIS_DONE, REDIS_ERROR, REDIS_BAD } redis_progress;

typedef struct {
    int n;           /* values of the array that is wanted; 0: a status is */
    size_t bytes;    /* of each value */
    uint8_t *values; /* (n, bytes) */
    uint8_t *found;  /* (n) redis_found */
    redis_progress progress;
    /* REDIS_DONE: the status. REDIS_ERROR: the error with which Redis replied. REDIS_BAD: why this
     * is no such reply. Printable. */
    char text[REDIS_TEXT_ROOM];
    /* private to the reader */
    char line[REDIS_TEXT_ROOM];
    size_t line_len; /* of the whole line; `line` has its beginning */
    uint8_t last;    /* its last byte */
    int in_array, i; /* the value whose line or bytes come next */
    size_t value_len, at;
    int in_value;
} redis_reply;

/* Makes *r a reply with n values of so many bytes, or with a status if n is 0. */
void redis_reply_start(redis_reply *r, int n, size_t bytes, uint8_t *values, uint8_t *found);
/* Reads of p (len) what belongs to the reply. Returns the number of bytes, fewer than len only if
 * the reply has ended: then progress is not REDIS_MORE. */
size_t redis_reply_read(redis_reply *r, const uint8_t *p, size_t len);

#endif
