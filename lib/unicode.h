/* unicode.h - UTF-8, character properties and the parts of NFC, for tokenizer.c.
 *
 * In the lists of code points below ("cps"), bits 24 and up of an element are its combining
 * class. */
#ifndef UNICODE_H
#define UNICODE_H

#include "unicode_tables.h"

#include <stddef.h>
#include <string.h>

/* ---- UTF-8 and properties -------------------------------------------------------------------- */

static inline int is_continuation(uint8_t b) { return (b & 0xC0) == 0x80; }

/* Length of the character whose first byte is b. */
static inline unsigned utf8_len(uint8_t b) {
    return b < 0x80 ? 1 : b < 0xE0 ? 2 : b < 0xF0 ? 3 : 4;
}

/* Length of the well-formed character at s (n bytes); 0 if there is none. The range of the second
 * byte excludes overlong forms, surrogates and code points above U+10FFFF. */
static inline unsigned utf8_valid(const uint8_t *s, size_t n) {
    unsigned b = s[0], lo = 0x80, hi = 0xBF;
    if (b < 0x80) return 1;
    if (b < 0xE0) return b >= 0xC2 && n >= 2 && is_continuation(s[1]) ? 2 : 0;
    if (b < 0xF0) {
        if (b == 0xE0) lo = 0xA0;
        if (b == 0xED) hi = 0x9F;
        return n >= 3 && s[1] >= lo && s[1] <= hi && is_continuation(s[2]) ? 3 : 0;
    }
    if (b == 0xF0) lo = 0x90;
    if (b == 0xF4) hi = 0x8F;
    return b <= 0xF4 && n >= 4 && s[1] >= lo && s[1] <= hi && is_continuation(s[2]) &&
                   is_continuation(s[3])
               ? 4
               : 0;
}

static inline uint32_t utf8_decode(const uint8_t *s, unsigned *len) {
    switch (*len = utf8_len(s[0])) {
    case 1:
        return s[0];
    case 2:
        return (s[0] & 0x1Fu) << 6 | (s[1] & 0x3Fu);
    case 3:
        return (s[0] & 0x0Fu) << 12 | (s[1] & 0x3Fu) << 6 | (s[2] & 0x3Fu);
    default:
        return (s[0] & 0x07u) << 18 | (s[1] & 0x3Fu) << 12 | (s[2] & 0x3Fu) << 6 | (s[3] & 0x3Fu);
    }
}

static inline size_t utf8_encode(uint8_t *out, uint32_t c) {
    if (c < 0x80) {
        out[0] = (uint8_t)c;
        return 1;
    }
    if (c < 0x800) {
        out[0] = (uint8_t)(0xC0 | c >> 6);
        out[1] = (uint8_t)(0x80 | (c & 0x3F));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (uint8_t)(0xE0 | c >> 12);
        out[1] = (uint8_t)(0x80 | (c >> 6 & 0x3F));
        out[2] = (uint8_t)(0x80 | (c & 0x3F));
        return 3;
    }
    out[0] = (uint8_t)(0xF0 | c >> 18);
    out[1] = (uint8_t)(0x80 | (c >> 12 & 0x3F));
    out[2] = (uint8_t)(0x80 | (c >> 6 & 0x3F));
    out[3] = (uint8_t)(0x80 | (c & 0x3F));
    return 4;
}

static inline unsigned word_of(uint32_t c) { return unicode_words[unicode_block[c >> 6]][c & 63]; }

/* Returns the property word of the character at s and sets *len to its bytes. */
static inline unsigned word_at(const uint8_t *s, unsigned *len) {
    return word_of(utf8_decode(s, len));
}

/* Whether the character is a starter that NFC keeps and that does not combine with anything before
 * it. NFC can then process the text before it and after it separately. */
static inline int is_stable(unsigned word) { return !(word & (0xFF | NFC_NO | NFC_MAYBE)); }

/* ---- NFC ------------------------------------------------------------------------------------- */

/* The NFC quick check (Unicode Standard Annex #15, section 9), one character at a time. */
typedef struct {
    unsigned ccc;   /* combining class of the previous character */
    unsigned joins; /* whether a later character may combine with the last starter */
} nfc_check;

/* Whether NFC may change the character with this property word here. One that can combine with a
 * character before it does not change after a starter that combines with nothing. */
static inline int nfc_breaks(nfc_check *q, unsigned word) {
    unsigned ccc = UNICODE_CCC(word);
    int breaks = (word & NFC_NO) || (ccc && q->ccc > ccc) || ((word & NFC_MAYBE) && q->joins);
    q->ccc = ccc;
    if (!ccc) q->joins = word & NFC_FIRST;
    return breaks;
}

/* Hangul syllables are numbered by their lead, vowel and tail jamo (Unicode Standard, 3.12). */
enum {
    HANGUL_S = 0xAC00,
    HANGUL_L = 0x1100,
    HANGUL_V = 0x1161,
    HANGUL_T = 0x11A7, /* no tail */
    HANGUL_NL = 19,
    HANGUL_NV = 21,
    HANGUL_NT = 28,
};

/* Writes c's full canonical decomposition, at most 4 code points; returns their number. */
static inline size_t decompose(uint32_t c, uint32_t *out) {
    size_t lo = 0, hi = N_DECOMPOSITIONS, i;
    if (!(word_of(c) & NFC_DECOMPOSES)) {
        out[0] = c;
        return 1;
    }
    if (c >= HANGUL_S && c < HANGUL_S + HANGUL_NL * HANGUL_NV * HANGUL_NT) {
        uint32_t s = c - HANGUL_S;
        out[0] = HANGUL_L + s / (HANGUL_NV * HANGUL_NT);
        out[1] = HANGUL_V + s / HANGUL_NT % HANGUL_NV;
        out[2] = HANGUL_T + s % HANGUL_NT;
        return s % HANGUL_NT ? 3 : 2;
    }
    while (unicode_decomposition[i = lo + (hi - lo) / 2].cp != c) {
        if (unicode_decomposition[i].cp < c)
            lo = i + 1;
        else
            hi = i;
    }
    for (lo = 0; lo < unicode_decomposition[i].n; lo++)
        out[lo] = unicode_pool[unicode_decomposition[i].at + lo];
    return lo;
}

/* The primary composite of a and b, or 0. */
static inline uint32_t compose(uint32_t a, uint32_t b) {
    size_t lo = 0, hi = N_COMPOSITIONS;
    if (a - HANGUL_L < HANGUL_NL && b - HANGUL_V < HANGUL_NV)
        return HANGUL_S + ((a - HANGUL_L) * HANGUL_NV + (b - HANGUL_V)) * HANGUL_NT;
    if (a - HANGUL_S < HANGUL_NL * HANGUL_NV * HANGUL_NT && (a - HANGUL_S) % HANGUL_NT == 0 &&
        b - HANGUL_T - 1 < HANGUL_NT - 1)
        return a + (b - HANGUL_T);
    while (lo < hi) {
        size_t i = lo + (hi - lo) / 2;
        uint32_t x = unicode_composition[i].first, y = unicode_composition[i].second;
        if (x == a && y == b) return unicode_composition[i].composed;
        if (x < a || (x == a && y < b))
            lo = i + 1;
        else
            hi = i;
    }
    return 0;
}

/* Canonical ordering: sorts each run of marks by combining class, stably. A counting sort, because
 * a run may have a million marks. spare (n) is scratch. */
static inline void order_marks(uint32_t *cps, size_t n, uint32_t *spare) {
    for (size_t i = 0, j; i < n; i = j) {
        size_t at[257] = {0};
        int sorted = 1;
        for (j = i + 1; j < n && cps[j] >> 24; j++)
            if (cps[j - 1] >> 24 > cps[j] >> 24) sorted = 0;
        if (sorted) continue;
        for (size_t k = i; k < j; k++) at[(cps[k] >> 24) + 1]++;
        for (size_t k = 1; k < 257; k++) at[k] += at[k - 1];
        for (size_t k = i; k < j; k++) spare[at[cps[k] >> 24]++] = cps[k];
        memcpy(cps + i, spare, (j - i) * sizeof *cps);
    }
}

/* Canonical composition in place: every character joins the last starter before it if nothing
 * between them has its class or a higher one. Returns the new length. */
static inline size_t compose_all(uint32_t *cps, size_t n) {
    size_t starter = SIZE_MAX, out = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t c = cps[i], joined;
        int open = starter != SIZE_MAX && (out == starter + 1 || cps[out - 1] >> 24 < c >> 24);
        if (open && (joined = compose(cps[starter], c & 0xFFFFFF))) {
            cps[starter] = joined; /* a starter again: class 0 */
            continue;
        }
        if (!(c >> 24)) starter = out;
        cps[out++] = c;
    }
    return out;
}

#endif
