/* buffer.h - text under construction. */
#ifndef QEMB_BUFFER_H
#define QEMB_BUFFER_H

#include <stddef.h>

/* Text under construction: malloc'ed bytes, NULL once memory has run out. */
typedef struct {
    char *data;
    size_t len, cap;
} buffer;

/* printf to the end of *b. Does nothing once memory has run out. */
void buffer_printf(buffer *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
