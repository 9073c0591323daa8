/* http_parse.c - the head of a request and the framing of its body; see http_parse.h. */
#include "http_parse.h"

#include "frontends/encoding.h"

#include <string.h>
#include <strings.h>

/* ---- characters ------------------------------------------------------------------------------ */

static int is_token(unsigned char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           (c && strchr("!#$%&'*+-.^_`|~", c));
}

static int is_control(unsigned char c) { return (c < ' ' && c != '\t') || c == 0x7f; }

static int is_blank(char c) { return c == ' ' || c == '\t'; }

/* ---- where a head ends ----------------------------------------------------------------------- */

/* The longest request line: a method, the target, the version. */
#define LINE (HTTP_TARGET + 64)

size_t http_head_end(const char *bytes, size_t n, size_t *scanned) {
    size_t i = *scanned;
    for (; i < n; i++) {
        const unsigned char c = (unsigned char)bytes[i];
        const int ends_line = i > 0 && bytes[i - 1] == '\r';
        if ((c == '\n') != ends_line || (c != '\r' && c != '\n' && is_control(c))) return i + 1;
        if (c == '\n' && (i == 1 || (i >= 3 && bytes[i - 2] == '\n'))) return i + 1;
        if (i + 1 >= HTTP_HEAD || (i + 1 == LINE && !memchr(bytes, '\n', LINE))) return i + 1;
    }
    *scanned = i;
    return 0;
}

/* ---- the request line ------------------------------------------------------------------------ */

#define FAULT(name, status, code, why) static const http_fault name = {status, code, why}

FAULT(no_line, 400, "invalid_request", "request line: malformed (want METHOD TARGET HTTP/1.1)");
FAULT(no_target, 400, "invalid_request", "target: not a path (want one that begins with /)");
FAULT(bad_escape, 400, "invalid_request", "target: a damaged or forbidden character (want %XX)");
FAULT(long_target, 414, "uri_too_long", "target: too long (want at most 8192 bytes)");
FAULT(bad_version, 505, "unsupported_version", "version: not served (want HTTP/1.1 or HTTP/1.0)");
FAULT(bad_character, 400, "invalid_request", "header: a control character in it");
FAULT(bad_line, 400, "invalid_request", "header: a line that does not end in CR LF");
FAULT(long_head, 431, "header_too_large", "header: too long (want at most 32768 bytes)");
FAULT(many_fields, 431, "header_too_large", "header: too many fields (want at most 100)");
FAULT(folded, 400, "invalid_request", "header: a folded line (want each field on one line)");
FAULT(bad_name, 400, "invalid_request", "header: a field without a name and a colon behind it");
FAULT(no_host, 400, "invalid_request", "Host: missing");
FAULT(bad_length, 400, "invalid_request", "Content-Length: not a number (want digits alone)");
FAULT(two_framings, 400, "invalid_request", "body: framed by length and by chunks (want one)");
FAULT(chunks_in_10, 400, "invalid_request", "Transfer-Encoding: not in HTTP/1.0");
FAULT(bad_coding, 400, "invalid_request", "Transfer-Encoding: it does not end in chunked");
FAULT(other_coding, 501, "unsupported_coding", "Transfer-Encoding: not served (want chunked)");
FAULT(bad_expect, 417, "unsupported_expectation", "Expect: not met (want 100-continue)");

/* Decodes %XX in path, in place. Returns -1 at a damaged escape or one of a control character. */
static int unescape(char *path) {
    char *to = path;
    for (const char *p = path; *p; p++) {
        if (*p != '%') {
            *to++ = *p;
            continue;
        }
        const int high = hex_digit(p[1]), low = high < 0 ? -1 : hex_digit(p[2]);
        const char c = (char)(16 * high + low);
        if (low < 0 || is_control((unsigned char)c) || c == '\t') return -1;
        *to++ = c;
        p += 2;
    }
    *to = 0;
    return 0;
}

/* Of an absolute target, as a proxy gets, the path is left. */
static const http_fault *parse_target(http_head *h, char *target) {
    char *query = strchr(target, '?');
    if (query) *query++ = 0;
    const int absolute = !strncasecmp(target, "http://", 7) || !strncasecmp(target, "https://", 8);
    char *host = absolute ? strstr(target, "://") : NULL;
    char *path = host ? strchr(host + 3, '/') : target;
    if (host && !path) *(path = target) = '/', path[1] = 0;
    if (*path != '/' && strcmp(path, "*")) return &no_target;
    if (unescape(path) || (query && unescape(query))) return &bad_escape;
    h->path = path;
    return NULL;
}

static const http_fault *parse_version(http_head *h, const char *version) {
    if (strncmp(version, "HTTP/", 5) || strlen(version) != 8 || version[6] != '.') return &no_line;
    if (version[5] < '0' || version[5] > '9' || version[7] < '0' || version[7] > '9')
        return &no_line;
    if (version[5] != '1') return &bad_version;
    h->is_11 = h->keep_alive = version[7] != '0';
    return NULL;
}

static const http_fault *parse_line(http_head *h, char *line) {
    size_t n = 0;
    while (is_token((unsigned char)line[n])) n++;
    char *target = line + n, *version = n ? strchr(target + 1, ' ') : NULL;
    if (!n || *target != ' ' || !version || strchr(line, '\t')) return &no_line;
    *target++ = *version++ = 0;
    h->method = line;
    if (!*target) return &no_line;
    if (strlen(target) > HTTP_TARGET) return &long_target;
    const http_fault *fault = parse_version(h, version);
    return fault ? fault : parse_target(h, target);
}

/* ---- fields ---------------------------------------------------------------------------------- */

#define TWICE(name) {name, {400, "invalid_request", name ": twice (want it once)"}}

/* Fields that decide what a request is: twice, two readers could take another one each. */
static const struct {
    const char *name;
    http_fault fault;
} single[] = {TWICE("Host"),         TWICE("Content-Length"),   TWICE("Transfer-Encoding"),
              TWICE("Content-Type"), TWICE("Content-Encoding"), TWICE("Authorization"),
              TWICE("Expect")};

const char *http_field(const http_head *h, const char *name) {
    for (int i = 0; i < h->n; i++)
        if (!strcasecmp(h->fields[i].name, name)) return h->fields[i].value;
    return NULL;
}

static const http_fault *parse_field(http_head *h, char *line) {
    size_t n = 0;
    if (is_blank(*line)) return &folded;
    while (is_token((unsigned char)line[n])) n++;
    if (!n || line[n] != ':') return &bad_name;
    if (h->n == HTTP_FIELDS) return &many_fields;
    line[n] = 0;
    char *value = line + n + 1, *end = value + strlen(value);
    while (is_blank(*value)) value++;
    while (end > value && is_blank(end[-1])) end--;
    *end = 0;
    for (size_t i = 0; i < sizeof single / sizeof *single; i++)
        if (!strcasecmp(line, single[i].name) && http_field(h, line)) return &single[i].fault;
    h->fields[h->n].name = line;
    h->fields[h->n++].value = value;
    return NULL;
}

/* Whether the list, parted by commas, has this element; *last: whether it is the last one. */
static int has_element(const char *list, const char *element, int *last) {
    const size_t n = strlen(element);
    int found = 0;
    for (const char *p = list; *p;) {
        p += strspn(p, ", \t");
        const char *end = p + strcspn(p, ",");
        while (end > p && is_blank(end[-1])) end--;
        if (end > p) *last = (size_t)(end - p) == n && !strncasecmp(p, element, n);
        if (end > p) found |= *last;
        p = end + strcspn(end, ",");
    }
    return found;
}

static const http_fault *parse_length(http_head *h, const char *length) {
    h->has_length = 1;
    if (!*length || strspn(length, "0123456789") != strlen(length)) return &bad_length;
    for (; *length; length++) {
        const unsigned digit = (unsigned)(*length - '0');
        if (h->length > (UINT64_MAX - digit) / 10) {
            h->length = UINT64_MAX;
            break;
        }
        h->length = 10 * h->length + digit;
    }
    return NULL;
}

/* What the fields say of the body and of the connection. */
static const http_fault *parse_framing(http_head *h) {
    const char *length = http_field(h, "Content-Length");
    const char *coding = http_field(h, "Transfer-Encoding"), *expect = http_field(h, "Expect");
    int last = 0;
    if (h->is_11 && !http_field(h, "Host")) return &no_host;
    if (coding && !h->is_11) return &chunks_in_10;
    if (coding && length) return &two_framings;
    if (coding && !strcasecmp(coding, "chunked"))
        h->chunked = 1;
    else if (coding)
        return has_element(coding, "chunked", &last) && last ? &other_coding : &bad_coding;
    const http_fault *fault = length ? parse_length(h, length) : NULL;
    if (fault) return fault;
    for (int i = 0; i < h->n; i++) {
        if (strcasecmp(h->fields[i].name, "Connection")) continue;
        if (!h->is_11) h->keep_alive |= has_element(h->fields[i].value, "keep-alive", &last);
        if (has_element(h->fields[i].value, "close", &last)) {
            h->keep_alive = 0;
            break;
        }
    }
    if (expect && h->is_11 && strcasecmp(expect, "100-continue")) return &bad_expect;
    h->expects = expect && h->is_11;
    return NULL;
}

/* ---- the head -------------------------------------------------------------------------------- */

/* Returns the CR of the line's CR LF. NULL: it has none before `end`; *fault says why. */
static char *line_end(char *line, const char *end, int is_first, const http_fault **fault) {
    char *p = line;
    while (p < end && !is_control((unsigned char)*p)) p++;
    if (p + 1 < end && *p == '\r' && p[1] == '\n') return p;
    if (p + 1 < end || (p < end && *p != '\r'))
        *fault = *p == '\r' || *p == '\n' ? &bad_line : &bad_character;
    else
        *fault = is_first ? &long_target : &long_head;
    return NULL;
}

const http_fault *http_parse(http_head *h, char *bytes, size_t n) {
    const http_fault *fault = NULL;
    char *line = bytes, *cr;
    *h = (http_head){.method = "", .path = ""};
    bytes[n] = 0;
    for (; !fault && (cr = line_end(line, bytes + n, line == bytes, &fault)); line = cr + 2) {
        if (cr == line && line != bytes) return parse_framing(h);
        *cr = 0;
        fault = line == bytes ? parse_line(h, line) : parse_field(h, line);
    }
    return fault;
}

/* ---- chunks ---------------------------------------------------------------------------------- */

enum {
    SIZE,      /* hexadecimal digits */
    EXTENSION, /* up to the line's end */
    SIZE_LF,
    DATA,
    DATA_CR,
    DATA_LF,
    TRAILER, /* the begin of a line behind the last chunk */
    TRAILER_NAME,
    TRAILER_VALUE,
    TRAILER_LF,
    END_LF,
    END
};

static int size_byte(http_chunks *c, char byte) {
    const int digit = hex_digit(byte);
    if (digit >= 0) {
        if (++c->digits > 15) return -1;
        c->left = 16 * c->left + (unsigned)digit;
        return SIZE;
    }
    if (!c->digits) return -1;
    return byte == '\r' ? SIZE_LF : byte == ';' ? EXTENSION : -1;
}

/* The state behind this byte, which is none of data, or -1. */
static int next_state(http_chunks *c, char byte) {
    const unsigned char u = (unsigned char)byte;
    if ((c->state == EXTENSION || c->state >= TRAILER) && ++c->extra > HTTP_CHUNK_EXTRA) return -1;
    switch (c->state) {
    case SIZE:
        return size_byte(c, byte);
    case EXTENSION:
        return byte == '\r' ? SIZE_LF : is_control(u) ? -1 : EXTENSION;
    case SIZE_LF:
        return byte != '\n' ? -1 : c->left ? DATA : TRAILER;
    case DATA_CR:
        return byte == '\r' ? DATA_LF : -1;
    case DATA_LF:
        c->digits = 0;
        return byte == '\n' ? SIZE : -1;
    case TRAILER:
        return byte == '\r' ? END_LF : is_token(u) ? TRAILER_NAME : -1;
    case TRAILER_NAME:
        return byte == ':' ? TRAILER_VALUE : is_token(u) ? TRAILER_NAME : -1;
    case TRAILER_VALUE:
        return byte == '\r' ? TRAILER_LF : is_control(u) ? -1 : TRAILER_VALUE;
    case TRAILER_LF:
        return byte == '\n' ? TRAILER : -1;
    default: /* END_LF */
        return byte == '\n' ? END : -1;
    }
}

ptrdiff_t http_read_chunks(http_chunks *c, const char *bytes, size_t n, const char **data,
                           size_t *len) {
    size_t i = 0;
    *len = 0;
    while (i < n && c->state != END && c->state != DATA) {
        const int next = next_state(c, bytes[i++]);
        if (next < 0) return -1;
        c->state = next;
    }
    if (c->state == DATA && i < n) {
        *data = bytes + i;
        *len = n - i < c->left ? n - i : (size_t)c->left;
        c->left -= *len;
        if (!c->left) c->state = DATA_CR;
    }
    return (ptrdiff_t)(i + *len);
}

int http_chunks_end(const http_chunks *c) { return c->state == END; }
