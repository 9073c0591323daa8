/* unigram_data.h - makes the section `unigram` of a .qemb out of parts, or of a Hugging Face
 * tokenizer.json. For tests; it shares no code with convert_weights.py. */
#ifndef UNIGRAM_DATA_H
#define UNIGRAM_DATA_H

#include "tokenizer_data.h"

#include <stdbool.h>

/* A growing array of bytes. */
typedef struct {
    uint8_t *p;
    size_t n, cap;
} bytes;

static inline void bytes_add(bytes *b, const void *p, size_t n) {
    if (b->n + n > b->cap) {
        b->cap = 2 * (b->n + n) + 64;
        b->p = realloc(b->p, b->cap);
        if (!b->p) abort();
    }
    if (n) memcpy(b->p + b->n, p, n);
    b->n += n;
}

static inline void bytes_u32(bytes *b, uint32_t v) { bytes_add(b, &v, sizeof v); }

/* The parts of a section, each as it will stand there, and the section. */
typedef struct {
    uint32_t n_pieces, unk, spaces, n_singles, n_pairs;
    bytes scores, singles, pairs, lengths, pieces, replacements;
    bytes section;
    tokenizer_data added; /* only the added tokens are used */
} unigram_data;

static inline void unigram_data_free(unigram_data *d) {
    bytes *all[] = {&d->scores, &d->singles,      &d->pairs,  &d->lengths,
                    &d->pieces, &d->replacements, &d->section};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]->p);
    tokenizer_data_free(&d->added);
    *d = (unigram_data){0};
}

static inline void unigram_data_piece(unigram_data *d, const char *text, size_t n, double score) {
    uint8_t len = (uint8_t)n;
    bytes_add(&d->scores, &score, 8);
    bytes_add(&d->lengths, &len, 1);
    bytes_add(&d->pieces, text, n);
    d->n_pieces++;
}

static inline uint32_t unigram_data_replacement(unigram_data *d, const char *text) {
    const size_t n = strlen(text), at = d->replacements.n;
    bytes_add(&d->replacements, text, n);
    return (uint32_t)(at | n << 24);
}

/* Keys are added in ascending order. */
static inline void unigram_data_single(unigram_data *d, uint32_t c, const char *text) {
    bytes_u32(&d->singles, c);
    bytes_u32(&d->singles, unigram_data_replacement(d, text));
    d->n_singles++;
}

static inline void unigram_data_pair(unigram_data *d, uint32_t a, uint32_t b, const char *text) {
    bytes_u32(&d->pairs, a);
    bytes_u32(&d->pairs, b);
    bytes_u32(&d->pairs, unigram_data_replacement(d, text));
    d->n_pairs++;
}

/* An added token; lstrip: it takes the white space before it. */
static inline void unigram_data_added(unigram_data *d, uint32_t id, const char *text, bool lstrip) {
    const size_t at = d->added.added_bytes;
    tokenizer_data_add(&d->added, id, text, strlen(text));
    if (lstrip) d->added.added[at + 7] |= 0x80;
}

/* Puts the section together. */
static inline void unigram_data_seal(unigram_data *d) {
    const uint32_t head[8] = {d->n_pieces,
                              d->unk,
                              d->spaces,
                              d->n_singles,
                              d->n_pairs,
                              (uint32_t)d->pieces.n,
                              (uint32_t)d->replacements.n,
                              0};
    const bytes *parts[] = {&d->scores,  &d->singles, &d->pairs,
                            &d->lengths, &d->pieces,  &d->replacements};
    d->section.n = 0;
    bytes_add(&d->section, head, sizeof head);
    for (size_t i = 0; i < 6; i++) bytes_add(&d->section, parts[i]->p, parts[i]->n);
}

/* ---- tokenizer.json -------------------------------------------------------------------------- */

/* A score as the reference's JSON parser rounds it: all its digits as one number, divided by a
 * power of 10. The file has the shortest digits that give d when they are rounded once. Zeros at
 * their end change nothing below 2^53, so the search begins with 15 digits. */
static inline double unigram_data_score(double d) {
    char text[32];
    int precision = 14;
    do snprintf(text, sizeof text, "%.*e", precision, d);
    while (strtod(text, NULL) != d && ++precision < 17);
    const char *exponent = strchr(text, 'e');
    uint64_t digits = 0;
    int decimals = precision - atoi(exponent + 1);
    double power = 1;
    for (const char *p = text; p < exponent; p++)
        if (*p >= '0' && *p <= '9') digits = digits * 10 + (uint64_t)(*p - '0');
    for (; decimals < 1; decimals++) digits *= 10;  /* at least "10.0" */
    for (int i = 0; i < decimals; i++) power *= 10; /* exact up to 10^22 */
    return (d < 0 ? -1 : 1) * ((double)digits / power);
}

static inline uint8_t *unigram_data_base64(const char *s, size_t *n) {
    uint8_t *out = malloc(strlen(s) + 4);
    uint32_t bits = 0, have = 0;
    if (!out) abort();
    *n = 0;
    for (; *s && *s != '='; s++) {
        static const char digits[] =
            "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        bits = bits << 6 | (uint32_t)(strchr(digits, *s) - digits);
        if ((have += 6) < 8) continue;
        have -= 8;
        out[(*n)++] = (uint8_t)(bits >> have);
    }
    return out;
}

typedef struct {
    unigram_data *d;
    const uint8_t *trie; /* Darts units */
    const char *text;    /* the replacements */
    uint8_t key[8];
} charsmap_walk;

static inline uint32_t charsmap_unit(const charsmap_walk *w, size_t i) {
    uint32_t u;
    memcpy(&u, w->trie + 4 * i, 4);
    return u;
}

/* The first character of s (n bytes), and its length; 0 if the character is not whole. */
static inline unsigned unigram_data_char(const uint8_t *s, size_t n, uint32_t *c) {
    const unsigned len = s[0] < 0x80 ? 1 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : 4;
    if (len > n) return 0;
    *c = len == 1 ? s[0] : s[0] & (0x7Fu >> len);
    for (unsigned i = 1; i < len; i++) *c = *c << 6 | (s[i] & 0x3Fu);
    return len;
}

/* Adds the keys below a node that can be the shortest one of a cluster: one character, or two of
 * fewer than 6 bytes. Bytes are tried in order, so keys come in the order of their code points. */
static inline void charsmap_keys(charsmap_walk *w, size_t node, size_t n) {
    for (unsigned c = 1; c < 256; c++) {
        size_t at = node ^ c;
        const uint32_t u = charsmap_unit(w, at);
        uint32_t a, b;
        if ((u & 0x800000FF) != c) continue;
        w->key[n] = (uint8_t)c;
        at ^= (u >> 10) << ((u & 0x200) >> 6);
        if (!(u >> 8 & 1)) {
            if (n < 4) charsmap_keys(w, at, n + 1);
            continue;
        }
        const char *text = w->text + (charsmap_unit(w, at) & 0x7FFFFFFF);
        const unsigned len = unigram_data_char(w->key, n + 1, &a);
        if (len == n + 1)
            unigram_data_single(w->d, a, text);
        else if (len && len + unigram_data_char(w->key + len, n + 1 - len, &b) == n + 1)
            unigram_data_pair(w->d, a, b, text);
    }
}

/* The charsmap of a normalizer, or of the first one in a sequence. */
static inline const char *unigram_data_charsmap(const json_t *normalizer) {
    const json_t *list = json_object_get(normalizer, "normalizers");
    if (list) normalizer = json_array_get(list, 0);
    return json_string_value(json_object_get(normalizer, "precompiled_charsmap"));
}

/* 0, or -1 with a message on stderr. e5: as multilingual-e5-base and -large have it: split at white
 * space, with scores that were read and written once more. The caller frees. */
static inline int unigram_data_read(unigram_data *d, const char *path, bool e5) {
    json_t *root = tokenizer_data_json(path);
    const json_t *model = json_object_get(root, "model"), *vocab = json_object_get(model, "vocab");
    const json_t *added = json_object_get(root, "added_tokens");
    const char *charsmap = unigram_data_charsmap(json_object_get(root, "normalizer"));
    size_t n;
    *d = (unigram_data){.spaces = e5};
    if (!charsmap || !vocab) return -1;
    uint8_t *binary = unigram_data_base64(charsmap, &n);
    uint32_t trie_bytes;
    memcpy(&trie_bytes, binary, 4);
    charsmap_walk w = {.d = d, .trie = binary + 4, .text = (const char *)binary + 4 + trie_bytes};
    const uint32_t u = charsmap_unit(&w, 0);
    charsmap_keys(&w, (u >> 10) << ((u & 0x200) >> 6), 0);
    free(binary);
    d->unk = (uint32_t)json_integer_value(json_object_get(model, "unk_id"));
    for (size_t i = 0; i < json_array_size(vocab); i++) {
        const json_t *piece = json_array_get(vocab, i), *text = json_array_get(piece, 0);
        double score = unigram_data_score(json_number_value(json_array_get(piece, 1)));
        if (e5) score = unigram_data_score(score);
        unigram_data_piece(d, json_string_value(text), json_string_length(text), score);
    }
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *a = json_array_get(added, i);
        unigram_data_added(d, (uint32_t)json_integer_value(json_object_get(a, "id")),
                           json_string_value(json_object_get(a, "content")),
                           json_is_true(json_object_get(a, "lstrip")));
    }
    json_decref(root);
    unigram_data_seal(d);
    return 0;
}

#endif
