/* encoding.h - what is read of texts from outside: byte order marks, hexadecimal digits. */
#ifndef QEMB_ENCODING_H
#define QEMB_ENCODING_H

#include <stddef.h>
#include <string.h>

/* Why a text is refused. */
#define UTF16_TEXT "UTF-16, want UTF-8: iconv -f UTF-16 converts it"

/* Bytes of the UTF-8 byte order mark that s (n) begins with: 3 or 0. */
static inline size_t utf8_mark(const char *s, size_t n) {
    return n >= 3 && !memcmp(s, "\xef\xbb\xbf", 3) ? 3 : 0;
}

/* Whether s (n) begins with a byte order mark of UTF-16. No UTF-8 has its bytes. */
static inline int utf16_mark(const char *s, size_t n) {
    return n >= 2 && (!memcmp(s, "\xff\xfe", 2) || !memcmp(s, "\xfe\xff", 2));
}

/* Whether s (n), where a text begins, looks like UTF-16 without a mark: of its first bytes, up to
 * 16 and at least 4, every second one is NUL and no other is. */
static inline int looks_like_utf16(const char *s, size_t n) {
    const size_t end = n < 16 ? n / 2 * 2 : 16;
    const size_t nul = n && !s[0] ? 0 : 1;
    size_t i = 0;
    while (i < end && !s[i + nul] && s[i + 1 - nul]) i += 2;
    return i == end && end >= 4;
}

/* The value of a hexadecimal digit; -1: it is none. */
static inline int hex_digit(char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

#endif
