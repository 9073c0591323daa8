/* json_read.c - reads JSON into jansson's values; see json_read.h.
 *
 * jansson's own reader is not used. Up to 2.14 it goes on after a refused allocation and then reads
 * past the end of a token; it overlooks a NUL behind a number; and it does not tell where in the
 * text a value stands. No check before it can prevent the first. jansson's values have none of
 * these faults.
 */
#include "json_read.h"

#include "encoding.h"
#include "lib/unicode.h"

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

/* Each level takes a stack frame of the functions that read a value, under 1 KiB in all. */
enum { DEPTH_MOST = 2048 };

typedef struct {
    const char *start, *p, *end; /* the text, and the place in it */
    int depth;                   /* objects and lists around p */
    void (*on_member)(void *self, const json_member *m);
    void *self;
    char *scratch; /* (scratch_cap) of a string with escapes */
    size_t scratch_cap;
    /* Where p is: the key of the outermost object (with its quotes; NULL: none), and in its list */
    const char *key;
    size_t key_len, index;
    int in_list;
    json_read_error *e;
} reader;

static json_t *read_value(reader *r);

/* ---- faults ---------------------------------------------------------------------------------- */

static json_t *fail(reader *r, json_fault fault, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

static json_t *fail(reader *r, json_fault fault, const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    r->e->fault = fault;
    vsnprintf(r->e->text, sizeof r->e->text, fmt, ap);
    va_end(ap);
    return NULL;
}

static json_t *no_memory(reader *r) { return fail(r, JSON_FAULT_MEMORY, "out of memory"); }

/* The text at p is not what is wanted. */
static json_t *unexpected(reader *r, const char *p, const char *want) {
    char got[16] = "the end";
    if (p < r->end)
        snprintf(got, sizeof got, *p > ' ' && *p < 0x7f ? "%c" : "0x%02X", (unsigned char)*p);
    return fail(r, JSON_FAULT_SYNTAX, "invalid JSON at byte %td (got %s, want %s)", p - r->start,
                got, want);
}

/* Writes to `to` (room) the key s (n) without its quotes, if it looks like a name; else "". */
static void show_name(char *to, size_t room, const char *s, size_t n) {
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
                                  "_.-";
    *to = 0;
    if (n < 3 || n - 2 >= room) return;
    memcpy(to, s + 1, n - 2);
    to[n - 2] = 0;
    if (strspn(to, letters) != n - 2) *to = 0;
}

/* A string has what no text can be made of. */
static json_t *bad_string(reader *r, json_fault fault, const char *what, const char *p,
                          const char *got, const char *want) {
    char name[40] = "", index[32] = "";
    if (r->key) show_name(name, sizeof name, r->key, r->key_len);
    if (*name && r->in_list) snprintf(index, sizeof index, "[%zu]", r->index);
    return fail(r, fault, "%s%s%s%s at byte %td (got %s, want %s)", name, index, *name ? ": " : "",
                what, p - r->start, got, want);
}

/* ---- strings --------------------------------------------------------------------------------- */

#define EACH_BYTE(x) (UINT64_C(0x0101010101010101) * (x))

/* Whether none of the 8 bytes at p ends a string, begins an escape, is outside ASCII or is a
 * control character; it may also say no for others. */
static int are_plain(const char *p) {
    uint64_t w;
    memcpy(&w, p, sizeof w);
    const uint64_t quotes = w ^ EACH_BYTE('"'), escapes = w ^ EACH_BYTE('\\');
    const uint64_t stop =
        w | (w - EACH_BYTE(0x20)) | (quotes - EACH_BYTE(1)) | (escapes - EACH_BYTE(1));
    return !(stop & EACH_BYTE(0x80));
}

/* The end of the string whose first byte is at p, or NULL. */
static const char *string_end(reader *r, const char *p, int *has_escapes) {
    *has_escapes = 0;
    while (p < r->end) {
        if (r->end - p >= 8 && are_plain(p)) {
            p += 8;
            continue;
        }
        if (*p == '"') return p;
        if (*p == '\\') {
            *has_escapes = 1;
            p += r->end - p > 1 ? 2 : 1;
            continue;
        }
        if ((unsigned char)*p < 0x20) {
            unexpected(r, p, "an escape of this character");
            return NULL;
        }
        const unsigned n = utf8_valid((const uint8_t *)p, (size_t)(r->end - p));
        if (!n) {
            char got[8];
            snprintf(got, sizeof got, "0x%02X", (unsigned char)*p);
            bad_string(r, JSON_FAULT_UTF8, "invalid UTF-8", p, got, "a character");
            return NULL;
        }
        p += n;
    }
    unexpected(r, p, "\"");
    return NULL;
}

/* The number that the n hexadecimal digits at p are; -1: they are not, or reach beyond end. */
static int hex(const char *p, const char *end, int n) {
    int x = 0;
    if (end - p < n) return -1;
    for (; n; n--, p++) {
        const int digit = hex_digit(*p);
        if (digit < 0) return -1;
        x = x * 16 + digit;
    }
    return x;
}

/* Reads the escape \u of one character, or of two that are a surrogate pair, at *p. -1: failed. */
static int32_t unicode_escape(reader *r, const char **p, const char *end) {
    const char *at = *p;
    const int first = hex(at + 2, end, 4);
    if (first < 0) {
        unexpected(r, at + 2, "four hexadecimal digits");
        return -1;
    }
    *p += 6;
    if (first < 0xD800 || first > 0xDFFF) return first;
    const int second =
        end - *p >= 6 && (*p)[0] == '\\' && (*p)[1] == 'u' ? hex(*p + 2, end, 4) : -1;
    if (first >= 0xDC00 || second < 0xDC00 || second > 0xDFFF) {
        char got[8];
        snprintf(got, sizeof got, "%.6s", at);
        bad_string(r, JSON_FAULT_SYNTAX, "a lone surrogate", at, got, "a pair");
        return -1;
    }
    *p += 6;
    return 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
}

/* Writes the string p .. end to `to`, which has room for as many bytes. Returns its end; NULL:
 * failed. */
static char *unescape(reader *r, const char *p, const char *end, char *to) {
    static const char escapes[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    while (p < end) {
        const char *escape = memchr(p, '\\', (size_t)(end - p));
        const size_t plain = (size_t)((escape ? escape : end) - p);
        memcpy(to, p, plain);
        to += plain, p += plain;
        if (!escape) break;
        const char *found = p[1] ? strchr(escapes, p[1]) : NULL;
        if (found) {
            *to++ = meant[found - escapes];
            p += 2;
            continue;
        }
        if (p[1] != 'u') {
            unexpected(r, p + 1, "an escape of JSON");
            return NULL;
        }
        const int32_t c = unicode_escape(r, &p, end);
        if (c < 0) return NULL;
        to += utf8_encode((uint8_t *)to, (uint32_t)c);
    }
    return to;
}

/* Sets *s (*n) to the string at r->p, its opening quote: bytes of the text or of r->scratch. */
static int read_string(reader *r, const char **s, size_t *n) {
    int has_escapes;
    const char *from = r->p + 1, *end = string_end(r, from, &has_escapes);
    if (!end) return -1;
    *s = from, *n = (size_t)(end - from);
    if (has_escapes) {
        if (*n > r->scratch_cap) {
            free(r->scratch);
            r->scratch = malloc(*n);
            r->scratch_cap = r->scratch ? *n : 0;
            if (!r->scratch) return no_memory(r), -1;
        }
        const char *to = unescape(r, from, end, r->scratch);
        if (!to) return -1;
        *s = r->scratch, *n = (size_t)(to - r->scratch);
    }
    r->p = end + 1;
    return 0;
}

/* ---- numbers and words ----------------------------------------------------------------------- */

static const char *digits_end(const reader *r, const char *p) {
    while (p < r->end && *p >= '0' && *p <= '9') p++;
    return p;
}

/* The end of the number at r->p, or NULL. */
static const char *number_end(reader *r, int *is_integer) {
    const char *p = r->p + (*r->p == '-'), *end = digits_end(r, p);
    if (end > p && *p == '0') end = p + 1; /* no digit follows a leading zero */
    int good = end > p;
    *is_integer = 1;
    if (good && end < r->end && *end == '.') {
        *is_integer = 0;
        p = end + 1;
        end = digits_end(r, p);
        good = end > p;
    }
    if (good && end < r->end && (*end == 'e' || *end == 'E')) {
        *is_integer = 0;
        p = end + 1;
        if (p < r->end && (*p == '+' || *p == '-')) p++;
        end = digits_end(r, p);
        good = end > p;
    }
    if (!good) unexpected(r, end, "a digit");
    return good ? end : NULL;
}

static json_t *number(const char *s, int is_integer) {
    if (is_integer) {
        errno = 0;
        const long long x = strtoll(s, NULL, 10);
        if (!errno) return json_integer(x);
    }
    double x = strtod(s, NULL);
    if (!isfinite(x)) x = copysign(DBL_MAX, x);
    const int whole = x == trunc(x) && fabs(x) <= 9007199254740992.0;
    return whole ? json_integer((json_int_t)x) : json_real(x);
}

static json_t *read_number(reader *r) {
    int is_integer;
    char small[64], *copy = small;
    const char *end = number_end(r, &is_integer);
    if (!end) return NULL;
    const size_t n = (size_t)(end - r->p);
    if (n >= sizeof small && !(copy = malloc(n + 1))) return no_memory(r);
    memcpy(copy, r->p, n);
    copy[n] = 0;
    json_t *v = number(copy, is_integer);
    if (copy != small) free(copy);
    r->p = end;
    return v ? v : no_memory(r);
}

/* v, if the text goes on with `name`. */
static json_t *read_word(reader *r, const char *name, json_t *v) {
    for (; *name; name++, r->p++)
        if (r->p == r->end || *r->p != *name) return unexpected(r, r->p, "true, false or null");
    return v;
}

/* ---- values ---------------------------------------------------------------------------------- */

static void skip_space(reader *r) {
    while (r->p < r->end && (*r->p == ' ' || *r->p == '\t' || *r->p == '\n' || *r->p == '\r'))
        r->p++;
}

/* Takes c, behind white space. 0: something else is there. */
static int take(reader *r, char c) {
    skip_space(r);
    if (r->p == r->end || *r->p != c) return 0;
    r->p++;
    return 1;
}

/* Reads what is between the brackets of a list. */
static int read_elements(reader *r, json_t *list) {
    const int outermost = r->key && r->depth == 2;
    if (take(r, ']')) return 0;
    do {
        if (outermost) r->in_list = 1, r->index = json_array_size(list);
        json_t *v = read_value(r);
        if (!v) return -1;
        if (json_array_append_new(list, v)) return no_memory(r), -1;
    } while (take(r, ','));
    if (outermost) r->in_list = 0;
    if (!take(r, ']')) return unexpected(r, r->p, ", or ]"), -1;
    return 0;
}

/* Reads the key at r->p. The caller frees it. */
static char *read_key(reader *r, const json_t *object) {
    const char *s, *at = r->p;
    char shown[40];
    size_t n;
    if (r->p == r->end || *r->p != '"') return unexpected(r, r->p, "\""), NULL;
    if (r->depth == 1) r->key = NULL;
    if (read_string(r, &s, &n)) return NULL;
    if (memchr(s, 0, n)) {
        fail(r, JSON_FAULT_SYNTAX, "a key with NUL at byte %td", at - r->start);
        return NULL;
    }
    char *name = malloc(n + 1);
    if (!name) return no_memory(r), NULL;
    memcpy(name, s, n);
    name[n] = 0;
    if (!json_object_get(object, name)) return name;
    free(name);
    show_name(shown, sizeof shown, at, (size_t)(r->p - at));
    fail(r, JSON_FAULT_TWICE, "%s%sa key occurs twice (byte %td)", shown, *shown ? ": " : "",
         at - r->start);
    return NULL;
}

/* Reads the value behind the key `name`, which stands at key, and adds it to the object. */
static int read_member(reader *r, json_t *object, const char *name, const char *key) {
    const size_t key_len = (size_t)(r->p - key);
    if (!take(r, ':')) return unexpected(r, r->p, ":"), -1;
    skip_space(r);
    const char *from = r->p;
    if (r->depth == 1) r->key = key, r->key_len = key_len;
    json_t *v = read_value(r);
    if (!v) return -1;
    if (json_object_set_new_nocheck(object, name, v)) return no_memory(r), -1;
    if (r->depth > 1 || !r->on_member) return 0;
    const json_member m = {.name = name,
                           .key = key,
                           .key_len = key_len,
                           .value = from,
                           .value_len = (size_t)(r->p - from)};
    r->on_member(r->self, &m);
    return 0;
}

/* Reads what is between the braces of an object. */
static int read_members(reader *r, json_t *object) {
    if (take(r, '}')) return 0;
    do {
        skip_space(r);
        const char *at = r->p;
        char *name = read_key(r, object);
        if (!name) return -1;
        const int failed = read_member(r, object, name, at);
        free(name);
        if (failed) return -1;
    } while (take(r, ','));
    if (!take(r, '}')) return unexpected(r, r->p, ", or }"), -1;
    return 0;
}

static json_t *read_container(reader *r, int is_list) {
    if (r->depth == DEPTH_MOST)
        return fail(r, JSON_FAULT_SYNTAX, "nested too deep at byte %td (want at most %d levels)",
                    r->p - r->start, DEPTH_MOST);
    json_t *v = is_list ? json_array() : json_object();
    if (!v) return no_memory(r);
    r->p++;
    r->depth++;
    const int failed = is_list ? read_elements(r, v) : read_members(r, v);
    r->depth--;
    if (!failed) return v;
    json_decref(v);
    return NULL;
}

/* Reads the value at r->p, behind white space. */
static json_t *read_value(reader *r) {
    const char *s;
    size_t n;
    skip_space(r);
    switch (r->p < r->end ? *r->p : 0) {
    case '{':
        return read_container(r, 0);
    case '[':
        return read_container(r, 1);
    case '"':
        if (read_string(r, &s, &n)) return NULL;
        json_t *v = json_stringn_nocheck(s, n);
        return v ? v : no_memory(r);
    case 't':
        return read_word(r, "true", json_true());
    case 'f':
        return read_word(r, "false", json_false());
    case 'n':
        return read_word(r, "null", json_null());
    default:
        break;
    }
    if (r->p < r->end && (*r->p == '-' || (*r->p >= '0' && *r->p <= '9'))) return read_number(r);
    return unexpected(r, r->p, "a value");
}

json_t *json_read(const char *s, size_t len, void (*on_member)(void *self, const json_member *m),
                  void *self, json_read_error *e) {
    reader r = {.start = s, .end = s + len, .on_member = on_member, .self = self, .e = e};
    if (utf16_mark(s, len) || looks_like_utf16(s, len))
        return fail(&r, JSON_FAULT_SYNTAX, UTF16_TEXT);
    r.p = s + utf8_mark(s, len);
    json_t *v = read_value(&r);
    skip_space(&r);
    if (v && r.p < r.end) {
        unexpected(&r, r.p, "the end");
        json_decref(v);
        v = NULL;
    }
    free(r.scratch);
    return v;
}
