/* added_tokens.c - finds added tokens in the raw text, leftmost, then longest. */
#include "lib/added_tokens.h"
#include "lib/tokenizer.h"
#include "lib/unicode.h"

static inline size_t two_bytes(uint8_t a, uint8_t b) { return (size_t)a << 8 | b; }

/* ---- finding --------------------------------------------------------------------------------- */

/* token[lo..hi) are longer than n bytes and have the same first n. Returns the first whose byte n
 * is at least b, or hi. */
static size_t added_bound(const added_tokens *a, size_t lo, size_t hi, size_t n, unsigned b) {
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (a->token[mid].bytes[n] < b)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* The longest added token at text[pos], or NULL. */
static const added_token *added_at(const added_tokens *a, const uint8_t *text, size_t pos,
                                   size_t len) {
    const added_token *found = NULL;
    size_t lo = a->from[text[pos]], hi = a->from[text[pos] + 1];
    for (size_t n = 1; lo < hi; n++) { /* token[lo..hi) begin with the n bytes at pos */
        if (a->token[lo].len == n) found = &a->token[lo++];
        if (pos + n == len) break;
        lo = added_bound(a, lo, hi, n, text[pos + n]);
        hi = added_bound(a, lo, hi, n, text[pos + n] + 1u);
    }
    return found;
}

size_t added_tokens_find(const added_tokens *a, const uint8_t *text, size_t pos, size_t end,
                         size_t len, const added_token **found) {
    *found = NULL;
    if (!a->n) return end;
    for (; pos < end; pos++) {
        if (a->first_byte >= 0) {
            const uint8_t *p = memchr(text + pos, a->first_byte, end - pos);
            if (!p) return end;
            pos = (size_t)(p - text);
        }
        if (!get_bit(a->pair, two_bytes(text[pos], pos + 1 < len ? text[pos + 1] : 0))) continue;
        *found = added_at(a, text, pos, len);
        if (*found) return pos;
    }
    return end;
}

/* ---- reading the section --------------------------------------------------------------------- */

static int by_bytes(const void *a_, const void *b_) {
    const added_token *a = a_, *b = b_;
    int order = memcmp(a->bytes, b->bytes, a->len < b->len ? a->len : b->len);
    return order ? order : (a->len > b->len) - (a->len < b->len);
}

static int by_id(const void *a_, const void *b_) {
    const added_token *a = a_, *b = b_;
    return (a->id > b->id) - (a->id < b->id);
}

/* Reads one entry of the section at *at. */
static int read_token(const uint8_t *section, size_t bytes, uint32_t first_id, int spaces,
                      size_t *at, added_token *a, qemb_err *err) {
    const uint8_t *p = section + *at;
    size_t left = bytes - *at, padded;
    if (left < 8)
        return qemb_fail(err, "model_file",
                         "added_tokens: entry at byte %zu is cut off (got %zu bytes, want 8)", *at,
                         left);
    *a = (added_token){p + 8, load32(p + 4), load32(p), 0};
    if (spaces) {
        a->takes_spaces = a->len >> 31;
        a->len &= INT32_MAX;
    }
    padded = 8 + ((size_t)a->len + 3) / 4 * 4;
    if (!a->len || a->len > ADDED_TOKEN_MAX || padded > left)
        return qemb_fail(err, "model_file",
                         "added_tokens: entry at byte %zu has a wrong length (got %u, want 1 to %d "
                         "within %zu bytes)",
                         *at, a->len, ADDED_TOKEN_MAX, left - 8);
    if (a->id < first_id || a->id >= INT32_MAX)
        return qemb_fail(err, "model_file",
                         "added_tokens: entry at byte %zu has a wrong id (got %u, want %u or more)",
                         *at, a->id, first_id);
    for (size_t i = 0, n; i < a->len; i += n) {
        n = utf8_valid(a->bytes + i, a->len - i);
        if (!n)
            return qemb_fail(err, "model_file",
                             "added_tokens: entry at byte %zu is not UTF-8 (got 0x%02X, want a "
                             "character)",
                             *at, a->bytes[i]);
    }
    for (size_t i = 8 + a->len; i < padded; i++)
        if (p[i])
            return qemb_fail(err, "model_file",
                             "added_tokens: entry at byte %zu is padded wrongly (got 0x%02X, want "
                             "0)",
                             *at, p[i]);
    *at += padded;
    return 0;
}

/* Indexes the first bytes of the tokens, which are in order. */
static int index_tokens(added_tokens *a, qemb_err *err) {
    for (size_t i = 0; i < a->n; i++) {
        const added_token *k = &a->token[i];
        if (i && !by_bytes(k - 1, k))
            return qemb_fail(err, "model_file",
                             "added_tokens: two have the same text (got ids %u and %u, want texts "
                             "that differ)",
                             (k - 1)->id, k->id);
        a->from[k->bytes[0] + 1] = i + 1;
        if (k->len > 1)
            set_bit(a->pair, two_bytes(k->bytes[0], k->bytes[1]));
        else
            memset(&a->pair[k->bytes[0] * 4], 0xFF, 4 * sizeof *a->pair);
    }
    for (size_t i = 1; i <= 256; i++)
        if (a->from[i] < a->from[i - 1]) a->from[i] = a->from[i - 1];
    a->first_byte = -1;
    if (a->n && a->token[0].bytes[0] == a->token[a->n - 1].bytes[0])
        a->first_byte = a->token[0].bytes[0];
    return 0;
}

int added_tokens_read(added_tokens *a, const uint8_t *section, size_t bytes, uint32_t first_id,
                      int spaces, qemb_err *err) {
    const size_t cap = bytes / 12; /* the shortest entry has 12 bytes */
    *a = (added_tokens){0};
    a->token = malloc((cap + 1) * sizeof *a->token);
    if (!a->token) return tokenizer_no_memory(err, "the added tokens");
    for (size_t i = 0; i < bytes; a->n++) {
        if (a->n == cap)
            return qemb_fail(err, "model_file",
                             "added_tokens: entry at byte %zu is cut off (got %zu bytes, want 12)",
                             i, bytes - i);
        if (read_token(section, bytes, first_id, spaces, &i, &a->token[a->n], err)) return -1;
    }
    qsort(a->token, a->n, sizeof *a->token, by_id);
    for (size_t i = 1; i < a->n; i++)
        if (a->token[i].id == a->token[i - 1].id)
            return qemb_fail(err, "model_file",
                             "added_tokens: an id comes twice (got %u again, want ids that differ)",
                             a->token[i].id);
    if (a->n) a->n_ids = a->token[a->n - 1].id + 1;
    qsort(a->token, a->n, sizeof *a->token, by_bytes);
    return index_tokens(a, err);
}

void added_tokens_free(added_tokens *a) { free(a->token); }
