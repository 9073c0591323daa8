/* format.c - see format.h. */
#include "format.h"

#include <assert.h>
#include <math.h>
#include <string.h>

const char *const format_names[] = {"json", "jsonl", "tsv",  "base64", "f32",
                                    "f16",  "npy",   "int8", "binary", NULL};

int format_is_text(format_kind kind) { return kind <= FORMAT_BASE64; }

/* ---- numbers --------------------------------------------------------------------------------- */

/* 10^k for k = -30 .. 53: scales every float, denormals included, to nine digits. */
#define P10_MIN (-30)
static const double p10[] = {
    1e-30, 1e-29, 1e-28, 1e-27, 1e-26, 1e-25, 1e-24, 1e-23, 1e-22, 1e-21, 1e-20, 1e-19,
    1e-18, 1e-17, 1e-16, 1e-15, 1e-14, 1e-13, 1e-12, 1e-11, 1e-10, 1e-9,  1e-8,  1e-7,
    1e-6,  1e-5,  1e-4,  1e-3,  1e-2,  1e-1,  1e0,   1e1,   1e2,   1e3,   1e4,   1e5,
    1e6,   1e7,   1e8,   1e9,   1e10,  1e11,  1e12,  1e13,  1e14,  1e15,  1e16,  1e17,
    1e18,  1e19,  1e20,  1e21,  1e22,  1e23,  1e24,  1e25,  1e26,  1e27,  1e28,  1e29,
    1e30,  1e31,  1e32,  1e33,  1e34,  1e35,  1e36,  1e37,  1e38,  1e39,  1e40,  1e41,
    1e42,  1e43,  1e44,  1e45,  1e46,  1e47,  1e48,  1e49,  1e50,  1e51,  1e52,  1e53};

/* The eight decimal digits of n < 10^8 as bytes 0..9, the first digit in the lowest byte. n is
 * split into halves, quarters and eighths, all lanes at once. The multiplications divide by 100 and
 * 10; they are exact for the ranges of the lanes. */
static inline uint64_t eight_digits(uint32_t n) {
    uint64_t v = n / 10000 | (uint64_t)(n % 10000) << 32;
    uint64_t q = (v * 10486) >> 20 & 0x0000007f0000007f;
    v = q | (v - q * 100) << 16;
    q = (v * 103) >> 10 & 0x000f000f000f000f;
    return q | (v - q * 10) << 8;
}

#define ASCII_ZEROS 0x3030303030303030u

static inline char *store8(char *p, uint64_t v) {
    memcpy(p, &v, 8);
    return p;
}

/* Writes the number first.rest x 10^exp10 as 0.000ddd, ddd.ddd or d.ddde-dd: the digit `first`,
 * then the first n_rest digits of `rest` (as from eight_digits). */
static inline char *place_point(char *p, uint32_t first, uint64_t rest, int n_rest, int exp10) {
    rest |= ASCII_ZEROS;
    if (exp10 < 0 && exp10 >= -5) {
        memcpy(p, "0.000000", 8);
        p += 1 - exp10;
        *p++ = (char)('0' + first);
        return store8(p, rest) + n_rest;
    }
    *p = (char)('0' + first);
    if (exp10 < 0 || exp10 > 8) {
        if (n_rest) {
            p[1] = '.';
            store8(p + 2, rest);
            p += 1 + n_rest;
        }
        p[1] = 'e';
        p[2] = '-';
        p += exp10 < 0 ? 3 : 2;
        unsigned e = (unsigned)(exp10 < 0 ? -exp10 : exp10);
        if (e >= 10) *p++ = (char)('0' + e / 10);
        *p++ = (char)('0' + e % 10);
        return p;
    }
    store8(p + 1, rest); /* exp10 more digits before the point; zeros if rest has fewer */
    p += 1 + exp10;
    int n_fraction = n_rest > exp10 ? n_rest - exp10 : 1;
    *p = '.';
    store8(p + 1, (exp10 < 8 ? rest >> (8 * exp10) : 0) | ASCII_ZEROS);
    return p + 1 + n_fraction;
}

/* y = |x| 10^k has nine digits before its point; n is the nearest whole number. Read back it is x:
 * the nearest other float, at x (1 - 2^-24), is 5.9 away or more (2^-24 10^8), so anything within
 * 2.9 of y rounds to x, and n is off by 0.5 and the rounding of y (two steps of 2^-53: 2.3e-7). */
static inline char *finite_float(char *p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    assert((bits & 0x7f800000) != 0x7f800000);
    *p = '-';
    p += bits >> 31;
    const double a = fabsf(x);
    if (a == 0) {
        memcpy(p, "0.0", 3);
        return p + 3;
    }
    uint64_t dbits;
    memcpy(&dbits, &a, 8);
    const int e = (int)(dbits >> 52) - 1023; /* 2^e <= a < 2^(e+1) */
    int k = 8 - ((e * 78913) >> 18);         /* 8 - floor(e log10(2)), right for |e| < 1650 */
    double scale = p10[k - P10_MIN];
    if (a * scale >= 999999999.5) scale = p10[--k - P10_MIN];
    const uint32_t n = (uint32_t)(int32_t)(a * scale + 0.5);

    const uint64_t rest = eight_digits(n % 100000000);
    const int n_rest = rest ? 8 - (__builtin_clzll(rest) >> 3) : 0; /* without trailing zeros */
    return place_point(p, n / 100000000, rest, n_rest, 8 - k);
}

char *format_float(char *p, float x) { return finite_float(p, x); }

char *format_uint(char *p, uint64_t x) {
    char digits[20];
    int n = 0;
    do digits[n++] = (char)('0' + x % 10);
    while (x /= 10);
    while (n) *p++ = digits[--n];
    return p;
}

uint16_t format_half(float x) {
    uint32_t f;
    memcpy(&f, &x, 4);
    const uint16_t sign = (uint16_t)(f >> 16 & 0x8000);
    f &= 0x7fffffff;
    if (f > 0x7f800000) return sign | 0x7e00;
    if (f >= 0x47800000) return sign | 0x7c00; /* 65536 and more; 65520 and more round up to it */
    if (f >= 0x38800000) { /* 2^-14: normal. A carry from rounding increments the exponent. */
        f -= 112u << 23;
        return sign | (uint16_t)((f + 0xfff + (f >> 13 & 1)) >> 13);
    }
    if (f < 0x33000000) return sign;        /* below 2^-25: rounds to zero */
    const int shift = 126 - (int)(f >> 23); /* 14..24: mantissa bits to drop */
    const uint32_t m = (f & 0x7fffff) | 0x800000;
    return sign | (uint16_t)((m + (1u << (shift - 1)) - 1 + (m >> shift & 1)) >> shift);
}

/* ---- strings --------------------------------------------------------------------------------- */

char *format_hex(char *p, const void *src, size_t n) {
    static const char digits[] = "0123456789abcdef";
    for (const uint8_t *b = src, *end = b + n; b < end; b++) {
        *p++ = digits[*b >> 4];
        *p++ = digits[*b & 15];
    }
    return p;
}

char *format_base64(char *p, const void *src, size_t n) {
    static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const uint8_t *s = src;
    for (; n >= 3; n -= 3, s += 3, p += 4) {
        const uint32_t v = (uint32_t)s[0] << 16 | (uint32_t)s[1] << 8 | s[2];
        p[0] = digit[v >> 18];
        p[1] = digit[v >> 12 & 63];
        p[2] = digit[v >> 6 & 63];
        p[3] = digit[v & 63];
    }
    if (n) {
        const uint32_t v = (uint32_t)s[0] << 16 | (n == 2 ? (uint32_t)s[1] << 8 : 0);
        p[0] = digit[v >> 18];
        p[1] = digit[v >> 12 & 63];
        p[2] = n == 2 ? digit[v >> 6 & 63] : '=';
        p[3] = '=';
        p += 4;
    }
    return p;
}

/* Bytes of the UTF-8 character at s, or 0 if there is none. */
static size_t utf8_length(const uint8_t *s, size_t n) {
    const size_t len = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : 4;
    if (!len || len > n || s[0] > 0xf4) return 0;
    for (size_t i = 1; i < len; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    if ((s[0] == 0xe0 && s[1] < 0xa0) || (s[0] == 0xed && s[1] > 0x9f)) return 0;
    if ((s[0] == 0xf0 && s[1] < 0x90) || (s[0] == 0xf4 && s[1] > 0x8f)) return 0;
    return len;
}

char *format_json_string(char *p, const char *text, size_t n) {
    static const char hex[] = "0123456789abcdef";
    const uint8_t *s = (const uint8_t *)text, *end = s + n;
    *p++ = '"';
    while (s < end) {
        const size_t len = utf8_length(s, (size_t)(end - s));
        if (!len) {
            memcpy(p, "\\ufffd", 6);
            p += 6;
            s++;
        } else if (*s == 0xc2 && s[1] < 0xa0) { /* a control character, to some terminals */
            memcpy(p, "\\u00", 4);
            p[4] = hex[s[1] >> 4];
            p[5] = hex[s[1] & 15];
            p += 6;
            s += 2;
        } else if (len > 1) {
            memcpy(p, s, len);
            p += len;
            s += len;
        } else if (*s == '\n' || *s == '\t') {
            *p++ = '\\';
            *p++ = *s++ == '\n' ? 'n' : 't';
        } else if (*s < 0x20 || *s == 0x7f) {
            memcpy(p, "\\u00", 4);
            p[4] = hex[*s >> 4];
            p[5] = hex[*s & 15];
            p += 6;
            s++;
        } else {
            if (*s == '"' || *s == '\\') *p++ = '\\';
            *p++ = (char)*s++;
        }
    }
    *p++ = '"';
    return p;
}

/* ---- vectors --------------------------------------------------------------------------------- */

size_t format_vector_room(format_kind kind, int dim) {
    const size_t n = (size_t)dim;
    switch (kind) {
    case FORMAT_JSON:
    case FORMAT_JSONL:
    case FORMAT_TSV:
        return n * 17 + 2 + FORMAT_FLOAT_ROOM; /* "-0.0000" + 9 digits + a comma */
    case FORMAT_BASE64:
        return (n * 4 + 2) / 3 * 4;
    case FORMAT_F16:
        return n * 2;
    case FORMAT_INT8:
        return n;
    case FORMAT_BINARY:
        return (n + 7) / 8;
    case FORMAT_F32:
    case FORMAT_NPY:
        break;
    }
    return n * 4;
}

/* 127 x is exact in double. A quotient of at least 1/2 that is no half differs from the nearest
 * half by 2^-33 or more, so its rounding in double does not move it to one. */
void format_int8(int8_t *out, const float *v, int dim) {
    double most = 0;
    for (int i = 0; i < dim; i++)
        if (fabsf(v[i]) > most) most = fabsf(v[i]);
    for (int i = 0; i < dim; i++) out[i] = most > 0 ? (int8_t)rint(127.0 * v[i] / most) : 0;
}

void format_binary(uint8_t *out, const float *v, int dim) {
    memset(out, 0, ((size_t)dim + 7) / 8);
    for (int i = 0; i < dim; i++)
        if (v[i] > 0) out[i / 8] |= (uint8_t)(0x80 >> i % 8);
}

static char *float_list(char *p, const float *v, int dim, char separator) {
    for (int i = 0; i < dim; i++) {
        p = finite_float(p, v[i]);
        *p++ = separator;
    }
    return dim ? p - 1 : p;
}

char *format_vector(char *p, format_kind kind, const float *v, int dim) {
    const size_t n = (size_t)dim;
    switch (kind) {
    case FORMAT_JSON:
    case FORMAT_JSONL:
        *p++ = '[';
        p = float_list(p, v, dim, ',');
        *p++ = ']';
        return p;
    case FORMAT_TSV:
        return float_list(p, v, dim, '\t');
    case FORMAT_BASE64:
        return format_base64(p, v, n * 4);
    case FORMAT_F16:
        for (size_t i = 0; i < n; i++) {
            const uint16_t h = format_half(v[i]);
            memcpy(p + 2 * i, &h, 2);
        }
        return p + n * 2;
    case FORMAT_INT8:
        format_int8((int8_t *)p, v, dim);
        return p + n;
    case FORMAT_BINARY:
        format_binary((uint8_t *)p, v, dim);
        return p + (n + 7) / 8;
    case FORMAT_F32:
    case FORMAT_NPY:
        break;
    }
    memcpy(p, v, n * 4);
    return p + n * 4;
}

char *format_npy_header(char *p, uint64_t rows, int dim) {
    static const char start[] = "\x93NUMPY\x01\x00\x76\x00" /* 118 = FORMAT_NPY_HEADER - 10 */
                                "{'descr': '<f4', 'fortran_order': False, 'shape': (";
    char *const end = p + FORMAT_NPY_HEADER;
    memcpy(p, start, sizeof start - 1);
    p = format_uint(p + sizeof start - 1, rows);
    memcpy(p, ", ", 2);
    p = format_uint(p + 2, (uint64_t)dim);
    memcpy(p, "), }", 4);
    p += 4;
    memset(p, ' ', (size_t)(end - p));
    end[-1] = '\n';
    return end;
}
