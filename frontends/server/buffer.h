/* buffer.h - a string that grows. */
#ifndef QEMB_BUFFER_H
#define QEMB_BUFFER_H

#include <stddef.h>

/* A malloc'ed string; data is NULL after memory has run out. */
typedef struct {
    char *data;
    size_t len, cap;
} buffer;

/* Appends to *b like printf. Does nothing after memory has run out. */
void buffer_printf(buffer *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
