/* naive_unigram.h - the definition of the Unigram tokenizer, restated slowly, for test_unigram and
 * fuzz_unigram: no trie, no windows, no caches; every rule looks at the whole text. Classes of
 * graphemes are written down by hand for the characters of `naive_alphabet` alone. */
#ifndef NAIVE_UNIGRAM_H
#define NAIVE_UNIGRAM_H

#include "unigram_data.h"

#include <math.h>

/* What random texts are made of: every class of graphemes, every kind of key, added tokens and
 * their parts, white space that the charsmap changes, keeps and removes. */
static const char *const naive_alphabet[] = {
    "a",
    "b",
    "c",
    "ab",
    "abc",
    "d",
    " ",
    "  ",
    "\t",
    "\r\n",
    "\r",
    "\n",
    "x y",
    ".",
    "\xC2\x85" /* U+0085, white space that is kept */,
    "\xC2\xA0",
    "\xE3\x80\x80",
    "\xE2\x96\x81",
    "\xC3\xA9",
    "e\xCC\x81",
    "a\xCC\xA3\xCC\x81",
    "\xCC\x81",
    " \xCC\x81",
    "\xD8\x80" /* Prepend */,
    "\xD8\x80\x65\xCC\x81",
    "\xEF\xAC\x81",
    "\xEF\xAC\x81\xCC\x81",
    "\xF0\x9F\x87\xA6",
    "\xE2\x80\x8D",
    "\xE2\x80\x8C",
    "\xF0\x9F\x98\x80",
    "\xE0\xA4\x95",
    "\xE0\xA5\x8D",
    "\xE0\xA4\x83",
    "\xE4\xB8\x80",
    "\xE4\xB8\x81\xE4\xB8\x80",
    "<s>",
    "<mask>",
    " <mask>",
    "<",
    "s>",
    "</s>",
    "<pad>",
    "\xEF\xBC\x9C",
    "\xEF\xBC\x9Es\xEF\xBC\x9E",
    "\xEF\xBC\x9C\x75nk\xEF\xBC\x9E",
    "\x01",
    "\xE1\x84\x80",
    "\xE1\x85\xA1",
    "\xE1\x86\xA8",
    "\xEA\xB0\x80",
    "\xEA\xB0\x81",
    "\xC2\xA9" /* a picture of two bytes */,
    "\xC2\xA9\xE2\x80\x8D\xC2\xA9",
    "\xE2\x80\xA8",
    "aaaaaaaa",
    "zzz",
    "\xC2\xAD",
};
enum { NAIVE_ALPHABET = sizeof naive_alphabet / sizeof *naive_alphabet };

enum { NAIVE_SPLIT = 1, NAIVE_ODD = 2, NAIVE_VARIANTS = 4 };

/* A small tokenizer. NAIVE_SPLIT: E5's step 3. NAIVE_ODD: a charsmap unlike any real one. */
static inline void naive_make(unigram_data *d, int variant) {
    static const struct {
        const char *text;
        double score;
    } pieces[] = {
        {"<s>", 0},
        {"<pad>", 0},
        {"</s>", 0},
        {"<unk>", 0},
        {"\xE2\x96\x81", -3.9},
        {"a", -3.25},
        {"b", -3.5},
        {"ab", -6.75},
        {"abc", -9.3},
        {"c", -4.1},
        {"bc", -5.3},
        {"\xE2\x96\x81"
         "a",
         -5.1},
        {"\xE2\x96\x81"
         "ab",
         -6.0},
        {"e", -4.7},
        {"aa", -6.5},
        {"aaa", -9.4},
        {"aaaa", -13.0},
        {"aaaaaaaa", -25.9},
        {".", -2.0},
        {"x", -7.471577644348145},
        {"\xE2\x96\x81y", -7.1},
        {"\xE4\xB8\x80", -8.0},
        {"\xE4\xB8\x81\xE4\xB8\x80", -10.25},
        {"\xC3\xA9", -6.1},
        {"i", -5.0},
        {"fi", -7.0},
        {"s", -4.0},
        {"<", -9.0},
        {">", -9.0},
        {"\xCC\x81", -11.0},
        {"\xE1\xBA\xA1", -9.5},
        {"\xC2\xA9", -12.0},
        {"a b", -1.0},
        {"\xE2\x96\x81\xE2\x96\x81", -1.5},
        {"a\xE2\x96\x81", -1.0},
        {"\xEA\xB0\x80", -9.0},
        {"\xC2\x85", -10.0},
        {"<mask>", 0},
    };
    const bool odd = variant & NAIVE_ODD;
    *d = (unigram_data){.unk = 3, .spaces = variant & NAIVE_SPLIT};
    for (uint32_t i = 0; i < sizeof pieces / sizeof *pieces; i++)
        unigram_data_piece(d, pieces[i].text, strlen(pieces[i].text), pieces[i].score);
    unigram_data_single(d, 0x01, "");
    unigram_data_single(d, 0x09, " ");
    unigram_data_single(d, 0x0A, " ");
    unigram_data_single(d, 0x0D, " ");
    if (odd)
        unigram_data_single(d, 'd',
                            "a  \xE2\x96\x81"
                            "b");
    unigram_data_single(d, 0xA0, " ");
    if (odd) unigram_data_single(d, 0x600, "");
    unigram_data_single(d, 0x200C, " ");
    unigram_data_single(d, 0x200D, " ");
    unigram_data_single(d, 0x2028, " ");
    if (!odd) unigram_data_single(d, 0x2581, " ");
    unigram_data_single(d, 0x3000, " ");
    unigram_data_single(d, 0xFB01, "fi");
    unigram_data_single(d, 0xFF1C, "<");
    unigram_data_single(d, 0xFF1E, ">");
    if (odd) unigram_data_pair(d, ' ', 0x301, "a");
    unigram_data_pair(d, 'a', 0x323, "\xE1\xBA\xA1");
    unigram_data_pair(d, 'e', 0x301, "\xC3\xA9");
    if (odd) unigram_data_pair(d, 0xE9, 0x301, "c c");
    unigram_data_added(d, 0, "<s>", false);
    unigram_data_added(d, 1, "<pad>", false);
    unigram_data_added(d, 2, "</s>", false);
    unigram_data_added(d, 3, "<unk>", false);
    unigram_data_added(d, d->n_pieces - 1, "<mask>", true);
    unigram_data_seal(d);
}

/* ---- step 2: clusters ------------------------------------------------------------------------ */

typedef struct {
    uint32_t *c; /* (n) */
    size_t n;
} naive_chars;

/* One letter for a class: C control, r CR, n LF, E Extend, k a linker, J U+200D, N U+200C, P, S,
 * the Hangul L V T, 2 LV, 3 LVT, R, X a picture, K a consonant, or - for the rest. */
static inline char naive_class(uint32_t c) {
    switch (c) {
    case 0x0D:
        return 'r';
    case 0x0A:
        return 'n';
    case 0x301:
    case 0x323:
        return 'E';
    case 0x94D:
        return 'k';
    case 0x200D:
        return 'J';
    case 0x200C:
        return 'N';
    case 0x600:
        return 'P';
    case 0x903:
        return 'S';
    case 0x1100:
        return 'L';
    case 0x1161:
        return 'V';
    case 0x11A8:
        return 'T';
    case 0xAC00:
        return '2';
    case 0xAC01:
        return '3';
    case 0x1F1E6:
        return 'R';
    case 0xA9:
    case 0x1F600:
        return 'X';
    case 0x915:
        return 'K';
    case 0xAD:
    case 0x2028:
        return 'C';
    default:
        return c < 32 || (c >= 127 && c < 160) ? 'C' : '-';
    }
}

/* Whether class is one of set's letters. */
static inline bool naive_is(char class, const char *set) { return strchr(set, class) != NULL; }

/* Whether a cluster ends before character i of s, the classes of a text: the rules of UAX 29, each
 * of which looks back as far as it likes. */
static inline bool naive_breaks(const char *s, size_t i) {
    if (s[i - 1] == 'r' && s[i] == 'n') return false;
    if (naive_is(s[i - 1], "Crn") || naive_is(s[i], "Crn")) return true;
    if (s[i - 1] == 'L' && naive_is(s[i], "LV23")) return false;
    if (naive_is(s[i - 1], "2V") && naive_is(s[i], "VT")) return false;
    if (naive_is(s[i - 1], "3T") && s[i] == 'T') return false;
    if (naive_is(s[i], "EkJNS")) return false;
    if (s[i - 1] == 'P') return false;
    if (s[i] == 'K') {
        bool linker = false;
        size_t j = i;
        while (j && naive_is(s[j - 1], "EkJ")) linker |= s[--j] == 'k';
        if (linker && j && s[j - 1] == 'K') return false;
    }
    if (s[i] == 'X' && s[i - 1] == 'J') {
        size_t j = i - 1;
        while (j && naive_is(s[j - 1], "EkN")) j--;
        if (j && s[j - 1] == 'X') return false;
    }
    if (s[i] == 'R') {
        size_t j = i;
        while (j && s[j - 1] == 'R') j--;
        if ((i - j) % 2) return false;
    }
    return true;
}

static inline size_t naive_bytes(uint32_t c) {
    return c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
}

static inline naive_chars naive_decode(const char *text, size_t n) {
    naive_chars s = {malloc((n + 1) * sizeof *s.c), 0};
    if (!s.c) abort();
    for (size_t i = 0; i < n; s.n++)
        i += unigram_data_char((const uint8_t *)text + i, n - i, &s.c[s.n]);
    return s;
}

/* Appends the replacement of the key a or (two) a b to out. Returns whether there is one. */
static inline bool naive_replace(const unigram_data *d, uint32_t a, uint32_t b, bool two,
                                 bytes *out) {
    const size_t width = two ? 3 : 2, n = two ? d->n_pairs : d->n_singles;
    const uint8_t *keys = two ? d->pairs.p : d->singles.p;
    for (size_t i = 0; i < n; i++) {
        uint32_t key[3];
        memcpy(key, keys + 4 * width * i, 4 * width);
        if (key[0] != a || (two && key[1] != b)) continue;
        const uint32_t r = key[width - 1];
        const char *text = (const char *)d->replacements.p + (r & 0xFFFFFF);
        const naive_chars s = naive_decode(text, r >> 24);
        for (size_t j = 0; j < s.n; j++) bytes_u32(out, s.c[j]);
        free(s.c);
        return true;
    }
    return false;
}

/* The code points of a stretch after step 2, as an array of u32 in `bytes`. */
static inline bytes naive_normalize(const unigram_data *d, naive_chars s) {
    bytes out = {0};
    char *classes = malloc(s.n + 1);
    if (!classes) abort();
    for (size_t i = 0; i < s.n; i++) classes[i] = naive_class(s.c[i]);
    for (size_t a = 0, b; a < s.n; a = b) {
        size_t n = naive_bytes(s.c[a]);
        for (b = a + 1; b < s.n && !naive_breaks(classes, b); b++) n += naive_bytes(s.c[b]);
        if (n < 6 && naive_replace(d, s.c[a], 0, false, &out)) continue;
        if (n < 6 && b - a > 1 && naive_replace(d, s.c[a], s.c[a + 1], true, &out)) continue;
        for (size_t i = a; i < b; i++)
            if (!naive_replace(d, s.c[i], 0, false, &out)) bytes_u32(&out, s.c[i]);
    }
    free(classes);
    return out;
}

/* ---- step 5 ---------------------------------------------------------------------------------- */

/* The piece whose text is p (n), or -1. */
static inline long naive_piece(const unigram_data *d, const uint8_t *p, size_t n) {
    size_t at = 0;
    for (uint32_t i = 0; i < d->n_pieces; at += d->lengths.p[i++])
        if (d->lengths.p[i] == n && !memcmp(d->pieces.p + at, p, n)) return i;
    return -1;
}

static inline double naive_score(const unigram_data *d, size_t i) {
    double score;
    memcpy(&score, d->scores.p + 8 * i, 8);
    return score;
}

/* Appends the ids (u32) of a word p (n). */
static inline void naive_word(const unigram_data *d, const uint8_t *p, size_t n, bytes *ids) {
    double *best = malloc((n + 1) * sizeof *best), least = 0;
    size_t *from = malloc((n + 1) * sizeof *from), k = 0;
    uint32_t *id = malloc((n + 1) * sizeof *id), *way = malloc((n + 1) * sizeof *way);
    if (!best || !from || !id || !way) abort();
    for (uint32_t i = 0; i < d->n_pieces; i++) least = fmin(least, naive_score(d, i));
    size_t longest = 0;
    for (uint32_t i = 0; i < d->n_pieces; i++)
        longest = d->lengths.p[i] > longest ? d->lengths.p[i] : longest;
    for (size_t i = 0; i <= n; i++) best[i] = NAN; /* not reached */
    best[0] = 0;
    for (size_t i = 0; i < n; i++) {
        bool known = false;
        uint32_t c;
        if ((p[i] & 0xC0) == 0x80) continue;
        const size_t len = unigram_data_char(p + i, n - i, &c);
        for (size_t e = i + 1; e <= n && e <= i + longest; e++) {
            const long piece = naive_piece(d, p + i, e - i);
            if (piece < 0) continue;
            const double sum = naive_score(d, (size_t)piece) + best[i];
            known |= e - i == len;
            if (isnan(best[e]) || sum > best[e])
                best[e] = sum, from[e] = i, id[e] = (uint32_t)piece;
        }
        const size_t e = i + len;
        const double sum = least - 10 + best[i];
        if (!known && (isnan(best[e]) || sum > best[e])) best[e] = sum, from[e] = i, id[e] = d->unk;
    }
    for (size_t e = n; e; e = from[e]) way[k++] = id[e];
    while (k) {
        bytes_u32(ids, way[--k]);
        while (way[k] == d->unk && k && way[k - 1] == d->unk) k--;
    }
    free(best), free(from), free(id), free(way);
}

/* ---- the whole ------------------------------------------------------------------------------- */

static inline bool naive_is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == 32 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
           c == 0x205F || c == 0x3000;
}

static inline void naive_put(bytes *word, uint32_t c) {
    uint8_t out[4];
    const size_t n = naive_bytes(c);
    static const uint8_t lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    for (size_t i = n - 1; i; i--, c >>= 6) out[i] = (uint8_t)(0x80 | (c & 63));
    out[0] = (uint8_t)(lead[n] | c);
    bytes_add(word, out, n);
}

/* Step 4 for characters c (n): U+2581 before the first, and a word from each. */
static inline void naive_words(const unigram_data *d, uint32_t *c, size_t n, bytes *ids) {
    bytes word = {0};
    if (n && c[0] != ' ' && c[0] != 0x2581) naive_put(&word, 0x2581);
    for (size_t i = 0; i < n; i++) {
        if (c[i] == ' ') c[i] = 0x2581;
        if (c[i] == 0x2581 && word.n) {
            naive_word(d, word.p, word.n, ids);
            word.n = 0;
        }
        naive_put(&word, c[i]);
    }
    if (word.n) naive_word(d, word.p, word.n, ids);
    free(word.p);
}

/* Steps 2 to 5 for a stretch. */
static inline void naive_stretch(const unigram_data *d, const char *text, size_t n, bytes *ids) {
    const naive_chars s = naive_decode(text, n);
    bytes normal = naive_normalize(d, s);
    uint32_t *c = (uint32_t *)(void *)normal.p;
    size_t k = 0, all = normal.n / 4;
    if (d->spaces) {
        for (size_t a = 0, b; a < all; a = b + 1) {
            for (b = a; b < all && !naive_is_space(c[b]);) b++;
            naive_words(d, c + a, b - a, ids);
        }
    } else {
        for (size_t i = 0; i < all; i++)
            if (!(i && c[i] == ' ' && c[i - 1] == ' ')) k++;
        uint32_t *merged = malloc((k + 1) * sizeof *merged);
        if (!merged) abort();
        k = 0;
        for (size_t i = 0; i < all; i++)
            if (!(i && c[i] == ' ' && c[i - 1] == ' ')) merged[k++] = c[i];
        naive_words(d, merged, k, ids);
        free(merged);
    }
    free(normal.p);
    free(s.c);
}

/* The longest added token at p (n), or NULL: its entry in the section. */
static inline const uint8_t *naive_added(const unigram_data *d, const char *p, size_t n) {
    const uint8_t *found = NULL;
    uint32_t best = 0;
    for (size_t at = 0; at < d->added.added_bytes;) {
        const uint8_t *entry = d->added.added + at;
        uint32_t len;
        memcpy(&len, entry + 4, 4);
        len &= 0x7FFFFFFF;
        if (len <= n && len > best && !memcmp(entry + 8, p, len)) found = entry, best = len;
        at += 8 + (len + 3) / 4 * 4;
    }
    return found;
}

/* The ids (u32) of a text of valid UTF-8. The caller frees them. */
static inline bytes naive_encode(const unigram_data *d, const char *text, size_t n) {
    bytes ids = {0};
    for (size_t pos = 0, end; pos <= n;) {
        const uint8_t *added = NULL;
        for (end = pos; end < n && !(added = naive_added(d, text + end, n - end));) end++;
        size_t last = end, at = pos, keep = pos;
        if (added && added[7] & 0x80) { /* without the white space at its end */
            while (at < end) {
                uint32_t c = 0;
                at += unigram_data_char((const uint8_t *)text + at, end - at, &c);
                if (!naive_is_space(c)) keep = at;
            }
            last = keep;
        }
        naive_stretch(d, text + pos, last - pos, &ids);
        if (!added) break;
        uint32_t id, len;
        memcpy(&id, added, 4);
        memcpy(&len, added + 4, 4);
        bytes_u32(&ids, id);
        pos = end + (len & 0x7FFFFFFF);
    }
    return ids;
}

#endif
