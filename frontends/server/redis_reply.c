/* redis_reply.c - replies of Redis, read as they arrive; see redis_reply.h.
 *
 * The protocol is RESP2: a line that begins with its type and ends with CR LF. "+status", "-error",
 * "*n" before n values; "$n" before the n bytes of a value and another CR LF, "$-1" for none.
 */
#include "redis_reply.h"

#include "frontends/console.h"

#include <stdio.h>
#include <string.h>

void redis_reply_start(redis_reply *r, int n, size_t bytes, uint8_t *values, uint8_t *found) {
    *r = (redis_reply){.n = n, .bytes = bytes, .values = values, .found = found};
    if (n) memset(found, REDIS_ABSENT, (size_t)n);
}

/* Ends the reading: the line (n) is not what was wanted. */
static void bad(redis_reply *r, const char *what, size_t n) {
    char line[81];
    *put_printable(line, r->line, n < sizeof line - 1 ? n : sizeof line - 1) = 0;
    if (r->in_array)
        snprintf(r->text, sizeof r->text, "reply: %s (got \"%s\", want %zu bytes or none)", what,
                 line, r->bytes);
    else if (r->n)
        snprintf(r->text, sizeof r->text, "reply: %s (got \"%s\", want %d values)", what, line,
                 r->n);
    else
        snprintf(r->text, sizeof r->text, "reply: %s (got \"%s\", want a status)", what, line);
    r->progress = REDIS_BAD;
}

/* The number that is s (n), or -2 if it is none or too large for any reply. -1 is one. */
static long read_number(const char *s, size_t n) {
    long x = 0;
    if (n == 2 && !memcmp(s, "-1", 2)) return -1;
    if (!n || n > 10) return -2;
    for (size_t i = 0; i < n; i++) {
        if (s[i] < '0' || s[i] > '9') return -2;
        x = 10 * x + (s[i] - '0');
    }
    return x;
}

static void next_value(redis_reply *r) {
    r->in_value = 0;
    if (++r->i == r->n) r->progress = REDIS_DONE;
}

/* Takes a whole line (n, without CR LF). */
static void take_line(redis_reply *r, size_t n) {
    const char type = n ? *r->line : 0;
    const long number = n && n <= 16 ? read_number(r->line + 1, n - 1) : -2;
    if (!r->in_array && (type == '-' || (type == '+' && !r->n))) {
        const size_t most = sizeof r->line < n ? sizeof r->line : n;
        *put_printable(r->text, r->line + 1, most - 1) = 0;
        r->progress = type == '-' ? REDIS_ERROR : REDIS_DONE;
    } else if (!r->in_array) {
        if (type != '*' || !r->n || number != r->n)
            bad(r, "not what was asked for", n);
        else
            r->in_array = 1;
    } else if (type != '$' || number < -1) {
        bad(r, "not a value", n);
    } else if (number > (long)REDIS_VALUE_MOST) {
        bad(r, "a value too long", n);
    } else if (number < 0) {
        next_value(r);
    } else {
        r->in_value = 1;
        r->value_len = (size_t)number;
        r->at = 0;
    }
}

static void read_line(redis_reply *r, uint8_t c) {
    const size_t n = r->line_len++;
    const int after_cr = r->last == '\r';
    if (n < sizeof r->line) r->line[n] = (char)c;
    r->last = c;
    if (c == '\n') {
        r->line_len = 0;
        if (after_cr)
            take_line(r, n - 1);
        else
            bad(r, "a line without an end", n);
    } else if (after_cr || n == REDIS_LINE_MOST) {
        bad(r, "a line without an end", n);
    }
}

/* Reads bytes of a value and of the CR LF behind it. */
static size_t read_value(redis_reply *r, const uint8_t *p, size_t len) {
    size_t n = r->value_len - (r->at < r->value_len ? r->at : r->value_len);
    if (n > len) n = len;
    if (n && r->value_len == r->bytes) memcpy(r->values + (size_t)r->i * r->bytes + r->at, p, n);
    r->at += n;
    for (; n < len && r->at < r->value_len + 2; n++, r->at++)
        if (p[n] != (r->at == r->value_len ? '\r' : '\n')) {
            snprintf(r->text, sizeof r->text, "reply: a value without an end");
            r->progress = REDIS_BAD;
            return n;
        }
    if (r->at < r->value_len + 2) return n;
    r->found[r->i] = r->value_len == r->bytes ? REDIS_FOUND : REDIS_OTHER;
    next_value(r);
    return n;
}

size_t redis_reply_read(redis_reply *r, const uint8_t *p, size_t len) {
    size_t n = 0;
    while (n < len && r->progress == REDIS_MORE)
        if (r->in_value)
            n += read_value(r, p + n, len - n);
        else
            read_line(r, p[n++]);
    return n;
}
