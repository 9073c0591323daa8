/* buffer.c - a string that grows; see buffer.h. */
#include "buffer.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static void out_of_memory(buffer *out) {
    free(out->data);
    *out = (buffer){.cap = SIZE_MAX}; /* marks it: later calls add nothing */
}

void buffer_printf(buffer *out, const char *fmt, ...) {
    va_list ap;
    for (int grown = 0; out->cap != SIZE_MAX; grown = 1) {
        const size_t room = out->cap - out->len;
        va_start(ap, fmt);
        const int n = vsnprintf(out->data ? out->data + out->len : NULL, room, fmt, ap);
        va_end(ap);
        if (n >= 0 && (size_t)n < room) {
            out->len += (size_t)n;
            return;
        }
        const size_t cap = 2 * out->cap + (size_t)(n < 0 ? 0 : n) + 256;
        char *data = n < 0 || grown ? NULL : realloc(out->data, cap);
        if (!data) {
            out_of_memory(out);
            return;
        }
        out->data = data;
        out->cap = cap;
    }
}
