/* tokenizer.c - text to token ids, exactly as Hugging Face `tokenizers` does for Qwen3-Embedding.
 *
 * The definition has five steps. This file does the first four, each under its heading:
 *   1. Added tokens ("<|im_start|>") are found in the raw text: leftmost, then longest. Each
 *      piece between two of them goes through 2 to 4 on its own.
 *   2. NFC, with the data of Unicode 9.0.
 *   3. The text is split into pre-tokens (words with their leading space, runs of punctuation,
 *      single digits, white space).
 *   4. Byte-level BPE inside each pre-token: bytes become ids 0..255, then merge 0 is applied
 *      wherever it fits, then merge 1, and so on; merge i makes id 256 + i.
 *   5. The caller appends end-of-text.
 *
 * What makes it fast and changes no id:
 *   - Text is processed in chunks that fit the first caches. A chunk ends at a place across which
 *     neither NFC nor the split looks, so chunks are independent (find_chunk).
 *   - Validation and the NFC quick check are one pass; only text that needs it is normalized.
 *   - A pre-token of up to 31 bytes is looked up in a cache of earlier results.
 *   - Inside a pre-token, most characters outside ASCII start as one symbol instead of two or
 *     three bytes, where the merges provably allow it (find_whole_chars).
 *   - Short pre-tokens merge in a small array. Long ones merge in one sweep over the ranks, with a
 *     list of places for each rank, so that a pre-token of any length takes linear time.
 * Nothing depends on the locale. An open tokenizer is immutable; all scratch is in the state.
 */
#include "lib/added_tokens.h"
#include "lib/unicode.h"
#include "lib/word_cache.h"

enum {
    TOKEN_MAX = 1024,     /* longest token in bytes; real vocabularies stay under 256 */
    MERGES_MAX = 1 << 20, /* two ids and a rank must fit a 64-bit slot of the pair table */
    ID_BITS = 21,         /* bits of an id or a rank in such a slot */
    PROBE_MAX = 128,      /* longest search in the pair table; the real merges take 12 */
    CHUNK = 1 << 14,      /* bytes of a chunk, if the text can be cut there */
    PAD = 32,             /* zero bytes after s->text: 8 bytes may be read at any place of it */
    SHORT_SYMBOLS = 64,   /* longest pre-token, in symbols, that merges in an array */
    AHEAD = 32,           /* pre-tokens found before the first of them is looked up */
};

#define NO_RANK   UINT32_MAX
#define NO_SLOT   UINT64_MAX
#define RANK_MASK (((uint64_t)1 << ID_BITS) - 1)
#define HIGH_BITS UINT64_C(0x8080808080808080)

typedef struct {
    uint32_t head,
        tail; /* its first and last bytes, up to four: the first is lowest, the last highest */
    uint16_t len;
} token_info;

typedef struct {
    qemb_tokenizer base;
    const uint32_t *merges; /* (n_merges, 2), the caller's */
    uint32_t n_merges;
    token_info *token;    /* (256 + n_merges) */
    uint8_t byte_of[256]; /* id -> byte, for ids 0..255 */
    uint32_t id_of[256];  /* byte -> id */
    uint64_t *pair;       /* hash table: left << 42 | right << 21 | rank, or NO_SLOT */
    unsigned pair_shift;  /* 64 - log2(slots) */
    uint64_t *filter;     /* two bits for each slot: whether a pair with such a hash exists */
    uint32_t *char_token; /* (65536) code point -> the token that is this character, or 0 */
    uint64_t seam[1024];  /* bit seam_hash(...): see find_whole_chars */
    added_tokens added;
} bpe_tokenizer;

typedef struct {
    uint32_t symbol;     /* at a symbol's first and last byte: its id */
    uint32_t rank;       /* at its first byte: of the merge with its right neighbour, or NO_RANK */
    uint32_t prev, next; /* in the list of places with that rank, or NO_RANK */
} merge_node;

typedef struct {
    uint32_t first, last; /* places, or NO_RANK */
} merge_list;

/* 3 MiB of caches, and arrays that grow with the longest chunk: half a MiB for 16 KiB of ordinary
 * text. A single pre-token of n bytes, at most TOKENIZER_WORD_MAX, takes about 30 n bytes. */
typedef struct {
    qemb_tokenizer_state base;
    const bpe_tokenizer *t;
    uint32_t *ids; /* the ids found so far */
    size_t ids_cap;
    uint8_t *text; /* the piece being tokenized, in NFC, then PAD zeros */
    size_t text_cap;
    uint32_t *cps; /* characters that NFC changes: combining class << 24 | code point */
    size_t cps_cap;
    merge_node *node; /* one for each byte of a long pre-token */
    size_t node_cap;
    merge_list *list;          /* (n_merges), empty between calls */
    uint64_t *ranks, *ranks64; /* bit r: list[r] is not empty; bit w: ranks[w] is not zero */
    word_cache cache;
} bpe_state;

/* ---- chunks ---------------------------------------------------------------------------------- */

typedef struct {
    size_t end;
    int is_nfc;
} chunk;

/* Validates text from pos to the first place at or after pos + want where it can be cut: between a
 * letter or number and a character that cannot continue a run of letters, both unchanged by NFC.
 * There step 3 always ends a pre-token, and no earlier pre-token looks further (only white space
 * does). A chunk without such a place goes on to the end of the text. */
static int find_chunk(const uint8_t *text, size_t pos, size_t len, size_t want, chunk *c,
                      qemb_err *err) {
    size_t goal = len - pos > want ? pos + want : len, i = pos;
    unsigned before = 0; /* property word of the character before i, if it matters */
    nfc_check q = {0, 0};
    c->is_nfc = 1;
    while (i < len) {
        unsigned word, n;
        if (goal >= 8 && i <= goal - 8 && !(load64(text + i) & HIGH_BITS)) {
            q = (nfc_check){0, 1};
            before = 0;
            i += 8;
            continue;
        }
        n = utf8_valid(text + i, len - i);
        if (!n) return tokenizer_invalid_utf8(err, i, text[i]);
        word = word_at(text + i, &n);
        if (i >= goal && is_stable(before) && is_stable(word) &&
            UNICODE_CLASS(word) != CLASS_LETTER &&
            (UNICODE_CLASS(before) == CLASS_LETTER || UNICODE_CLASS(before) == CLASS_NUMBER))
            break;
        if (nfc_breaks(&q, word)) c->is_nfc = 0;
        before = word;
        i += n;
    }
    c->end = i;
    return 0;
}

/* ---- step 2: NFC ----------------------------------------------------------------------------- */

/* NFC of src (n), which interacts with no character before or after it. Writes at most 3n bytes to
 * out and returns how many; SIZE_MAX: failed. */
static size_t nfc_stretch(bpe_state *s, const uint8_t *src, size_t n, uint8_t *out, qemb_err *err) {
    size_t n_cps = 0, n_out = 0;
    unsigned len;
    if (n > TOKENIZER_WORD_MAX) return tokenizer_word_too_long(err, n), SIZE_MAX;
    /* A character of k bytes decomposes to at most 2k code points; sorting needs as many again. */
    if (reserve(&s->cps, &s->cps_cap, 4 * n, sizeof *s->cps))
        return tokenizer_no_memory(err, "the text"), SIZE_MAX;
    for (size_t i = 0; i < n; i += len) {
        size_t k = decompose(utf8_decode(src + i, &len), s->cps + n_cps);
        for (; k; k--, n_cps++) s->cps[n_cps] |= UNICODE_CCC(word_of(s->cps[n_cps])) << 24;
    }
    order_marks(s->cps, n_cps, s->cps + 2 * n);
    n_cps = compose_all(s->cps, n_cps);
    for (size_t i = 0; i < n_cps; i++) n_out += utf8_encode(out + n_out, s->cps[i] & 0xFFFFFF);
    return n_out;
}

/* NFC of src (n) into s->text, which holds 3n bytes. Text that is NFC already is copied. Around a
 * character that may not be, the text from the last stable character to the next one is normalized.
 * Returns the bytes written; SIZE_MAX: failed. */
static size_t nfc_copy(bpe_state *s, const uint8_t *src, size_t n, qemb_err *err) {
    size_t copied = 0, safe = 0, out = 0, i = 0, k;
    nfc_check q = {0, 0};
    unsigned len;
    while (i < n) {
        unsigned word = word_at(src + i, &len);
        if (!nfc_breaks(&q, word)) {
            if (is_stable(word)) safe = i;
            i += len;
            continue;
        }
        for (i += len; i < n && !is_stable(word_at(src + i, &len));) i += len;
        memcpy(s->text + out, src + copied, safe - copied);
        out += safe - copied;
        k = nfc_stretch(s, src + safe, i - safe, s->text + out, err);
        if (k == SIZE_MAX) return k;
        out += k;
        copied = safe = i;
    }
    memcpy(s->text + out, src + copied, n - copied);
    return out + (n - copied);
}

/* ---- step 3: pre-tokens ---------------------------------------------------------------------- */

/* The functions below get a text s of n bytes, followed by PAD zeros, and a place i in it. The
 * zeros are NUL characters, which are neither letters, numbers nor spaces: a search for the end of
 * a run of those needs no comparison with n. */

static inline unsigned class_at(const uint8_t *s, unsigned *len) {
    return UNICODE_CLASS(word_at(s, len));
}

/* High bit of each byte of w that is not an ASCII letter. No carry crosses a byte. */
static inline uint64_t not_ascii_letters(uint64_t w) {
    const uint64_t each = UINT64_C(0x0101010101010101);
    uint64_t low = (w | 0x20 * each) & ~HIGH_BITS;
    uint64_t from_a = low + (0x80 - 'a') * each, past_z = low + (0x7F - 'z') * each;
    return (~from_a | past_z | w) & HIGH_BITS;
}

/* The end of the run of letters (maybe empty) at i. */
static inline size_t letters_end(const uint8_t *s, size_t i) {
    unsigned len;
    for (;;) {
        uint64_t stop = not_ascii_letters(load64(s + i));
        if (!stop) {
            i += 8;
            continue;
        }
        i += (size_t)__builtin_ctzll(stop) >> 3;
        if (s[i] < 0x80) return i;
        do {
            if (class_at(s + i, &len) != CLASS_LETTER) return i;
            i += len;
        } while (s[i] >= 0x80);
    }
}

/* The end of the run of characters that are neither space, letter nor number, and of the run of CR
 * and LF after it. */
static inline size_t others_end(const uint8_t *s, size_t i, size_t n) {
    unsigned len;
    while (i < n && class_at(s + i, &len) == CLASS_OTHER) i += len;
    while (s[i] == '\r' || s[i] == '\n') i++;
    return i;
}

/* The end of the pre-token of white space at i. It ends after the last CR or LF of the run, if
 * there is one; else before the last character of the run, if more text follows and that leaves
 * something; else at the end of the run. */
static inline size_t spaces_end(const uint8_t *s, size_t i, size_t n) {
    size_t from = i, last = i, line = 0;
    unsigned len;
    while (i < n && class_at(s + i, &len) == CLASS_SPACE) {
        last = i;
        if (s[i] == '\r' || s[i] == '\n') line = i + 1;
        i += len;
    }
    if (line) return line;
    return i < n && last > from ? last : i;
}

/* Bytes of 's 't m d re ve ll in any case at s, where an apostrophe stands; 0 if none. The long s
 * (U+017F) is an s in lower case. */
static inline size_t contraction(const uint8_t *s) {
    uint8_t a = s[1] | 0x20, b = s[2] | 0x20;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
    return s[1] == 0xC5 && s[2] == 0xBF ? 3 : 0;
}

/* The end of the pre-token that begins at i < n: the first of these that matches.
 *   a contraction | one character that is not CR, LF, letter or number, or none, then letters
 *   | one number | a U+0020 or none, then others, then CRs and LFs | white space */
static inline size_t pretoken_end(const uint8_t *s, size_t i, size_t n) {
    unsigned len, next_len, kind = class_at(s + i, &len), next;
    size_t after = i + len;
    if (kind == CLASS_LETTER) return letters_end(s, after);
    if (kind == CLASS_NUMBER) return after;
    if (s[i] == '\'' && contraction(s + i)) return i + contraction(s + i);
    next = after < n ? class_at(s + after, &next_len) : CLASS_SPACE;
    if (next == CLASS_LETTER && s[i] != '\r' && s[i] != '\n')
        return letters_end(s, after + next_len);
    if (kind == CLASS_OTHER || (s[i] == ' ' && next == CLASS_OTHER)) return others_end(s, after, n);
    return spaces_end(s, i, n);
}

/* ---- step 4: BPE ----------------------------------------------------------------------------- */

/* The rank of the merge that joins l and r, or NO_RANK. Most pairs have none; the filter, an eighth
 * of the table's size, answers for most of those. */
static inline uint32_t pair_rank(const bpe_tokenizer *t, uint32_t l, uint32_t r) {
    uint64_t key = (uint64_t)l << ID_BITS | r, hash = key * GOLDEN;
    const uint64_t *slot = t->pair + (hash >> t->pair_shift);
    if (!get_bit(t->filter, hash >> (t->pair_shift - 1))) return NO_RANK;
    while (*slot >> ID_BITS != key) /* the table ends with PROBE_MAX empty slots */
        if (*slot++ == NO_SLOT) return NO_RANK;
    return (uint32_t)(*slot & RANK_MASK);
}

/* The bit of t->seam that says whether a boundary between character c and byte b is unsafe. kind 0:
 * c is left of the boundary, b right of it; 1: b left, c right; 2: c is a byte, left, and b
 * right. */
static inline size_t seam_hash(unsigned kind, uint32_t c, uint8_t b) {
    return (((uint64_t)c << 8 | b) << 2 | kind) * GOLDEN >> 48;
}

/* Whether a merge may join part of a character across the boundary at p, between l and r. */
static inline int unsafe_seam(const bpe_tokenizer *t, const uint8_t *p, uint32_t l, uint32_t r) {
    return get_bit(t->seam, seam_hash(0, l, p[0])) | get_bit(t->seam, seam_hash(1, r, p[-1])) |
           get_bit(t->seam, seam_hash(2, p[-1], p[0]));
}

/* The symbols that merging starts from: bytes, or whole characters where the result is the same
 * (see find_whole_chars). Writes at most n ids to out and returns how many. */
static inline size_t first_symbols(const bpe_tokenizer *t, const uint8_t *p, size_t n,
                                   uint32_t *out) {
    size_t i = 0, k = 0;
    int unsafe = 0; /* the boundary at i */
    while (i < n) {
        unsigned len, next_len;
        uint32_t c, id;
        int unsafe_next = 0;
        if (p[i] < 0x80 && (i + 1 == n || p[i + 1] < 0x80)) {
            out[k++] = t->id_of[p[i++]];
            unsafe = 0;
            continue;
        }
        c = utf8_decode(p + i, &len);
        if (i + len < n)
            unsafe_next = unsafe_seam(t, p + i + len, c, utf8_decode(p + i + len, &next_len));
        id = c < 0x10000 && !unsafe && !unsafe_next ? t->char_token[c] : 0;
        if (id) {
            out[k++] = id;
            i += len;
        } else {
            for (; len; len--) out[k++] = t->id_of[p[i++]];
        }
        unsafe = unsafe_next;
    }
    return k;
}

/* Merges ids (0 < n <= SHORT_SYMBOLS) in place: the lowest rank, leftmost, until none is left. */
static size_t merge_short(const bpe_tokenizer *t, uint32_t *ids, size_t n) {
    /* Each word: the rank of the merge with the right neighbour, then the id. Equal ranks have
     * equal ids, so the first of the smallest words is the leftmost of the lowest rank. */
    uint64_t v[SHORT_SYMBOLS];
    for (size_t i = 0; i + 1 < n; i++)
        v[i] = (uint64_t)pair_rank(t, ids[i], ids[i + 1]) << 32 | ids[i];
    v[n - 1] = (uint64_t)NO_RANK << 32 | ids[n - 1];
    for (;;) {
        uint64_t best = v[0], made;
        size_t at = 0;
        for (size_t i = 1; i < n; i++) {
            at = v[i] < best ? i : at;
            best = v[i] < best ? v[i] : best;
        }
        if (best >> 32 == NO_RANK) break;
        made = 256 + (best >> 32);
        n--;
        for (size_t i = at + 1; i < n; i++) v[i] = v[i + 1];
        v[at] = (uint64_t)NO_RANK << 32 | made;
        if (at + 1 < n)
            v[at] = (uint64_t)pair_rank(t, (uint32_t)made, (uint32_t)v[at + 1]) << 32 | made;
        if (at) {
            uint32_t left = (uint32_t)v[at - 1];
            v[at - 1] = (uint64_t)pair_rank(t, left, (uint32_t)made) << 32 | left;
        }
    }
    for (size_t i = 0; i < n; i++) ids[i] = (uint32_t)v[i];
    return n;
}

/* Adds the pair of the symbol at place p and the next one, at q, to the end of its rank's list. */
static void list_add(bpe_state *s, uint32_t p, uint32_t q) {
    merge_node *v = &s->node[p];
    merge_list *list;
    v->rank = pair_rank(s->t, v->symbol, s->node[q].symbol);
    if (v->rank == NO_RANK) return;
    list = &s->list[v->rank];
    v->prev = list->last;
    v->next = NO_RANK;
    if (list->last != NO_RANK)
        s->node[list->last].next = p;
    else
        list->first = p;
    list->last = p;
    set_bit(s->ranks, v->rank);
    set_bit(s->ranks64, v->rank >> 6);
}

/* Removes the pair at place p from its list, if a merge joins that pair. */
static void list_drop(bpe_state *s, uint32_t p) {
    const merge_node *v = &s->node[p];
    if (v->rank == NO_RANK) return;
    if (v->prev != NO_RANK)
        s->node[v->prev].next = v->next;
    else
        s->list[v->rank].first = v->next;
    if (v->next != NO_RANK)
        s->node[v->next].prev = v->prev;
    else
        s->list[v->rank].last = v->prev;
}

/* Applies merge `rank` to all its places in a pre-token of n bytes, left to right. */
static void merge_all(bpe_state *s, uint32_t rank, size_t n) {
    const token_info *token = s->t->token;
    const uint32_t *pair = s->t->merges + 2 * (size_t)rank;
    uint32_t p;
    while ((p = s->list[rank].first) != NO_RANK) {
        uint32_t q = p + token[pair[0]].len, end = q + token[pair[1]].len;
        uint32_t left = p ? p - token[s->node[p - 1].symbol].len : p;
        list_drop(s, p);
        list_drop(s, q);
        s->node[p].symbol = s->node[end - 1].symbol = 256 + rank;
        s->node[p].rank = NO_RANK;
        if (p) {
            list_drop(s, left);
            list_add(s, left, p);
        }
        if (end < n) list_add(s, p, end);
    }
}

/* The ids of a pre-token p (n) into out, by one sweep over the ranks. A merge makes an id above the
 * two that it joins, so the merges that it makes possible have higher ranks: the sweep never goes
 * back. Since merging starts from bytes, all places of a pair appear while one rank is applied,
 * from left to right: every list is in order. Steps: n, plus n_merges / 4096 for the summary of
 * ranks. */
static size_t merge_long(bpe_state *s, const uint8_t *p, size_t n, uint32_t *out) {
    size_t words64 = ((s->t->n_merges + 63) / 64 + 63) / 64, k = 0;
    for (size_t i = 0; i < n; i++) s->node[i].symbol = s->t->id_of[p[i]];
    for (size_t i = 0; i + 1 < n; i++) list_add(s, (uint32_t)i, (uint32_t)i + 1);
    s->node[n - 1].rank = NO_RANK;
    for (size_t i = 0; i < words64; i++) {
        for (; s->ranks64[i]; s->ranks64[i] &= s->ranks64[i] - 1) {
            size_t w = i * 64 + (size_t)__builtin_ctzll(s->ranks64[i]);
            while (s->ranks[w]) {
                uint32_t bit = (uint32_t)__builtin_ctzll(s->ranks[w]);
                merge_all(s, (uint32_t)w * 64 + bit, n);
                s->ranks[w] &= ~(UINT64_C(1) << bit);
            }
        }
    }
    for (size_t i = 0; i < n; i += s->t->token[s->node[i].symbol].len) out[k++] = s->node[i].symbol;
    return k;
}

/* Memory for merge_long on a pre-token of n bytes. */
static int reserve_long(bpe_state *s, size_t n, qemb_err *err) {
    size_t n_merges = s->t->n_merges, words = (n_merges + 63) / 64;
    if (n >= NO_RANK || reserve(&s->node, &s->node_cap, n, sizeof *s->node))
        return tokenizer_no_memory(err, "a long word");
    if (s->list) return 0;
    s->list = malloc((n_merges + 1) * sizeof *s->list);
    s->ranks = calloc(words + words / 64 + 2, sizeof *s->ranks);
    if (!s->list || !s->ranks) {
        free(s->list);
        free(s->ranks);
        s->list = NULL;
        s->ranks = NULL;
        return tokenizer_no_memory(err, "a long word");
    }
    s->ranks64 = s->ranks + words;
    memset(s->list, 0xFF, (n_merges + 1) * sizeof *s->list); /* all places NO_RANK */
    return 0;
}

/* The ids of a pre-token p (n > 0) into out, which has room for n. Returns how many; 0: failed. */
static size_t bpe(bpe_state *s, const uint8_t *p, size_t n, uint32_t *out, qemb_err *err) {
    if (n > TOKENIZER_WORD_MAX) return tokenizer_word_too_long(err, n), 0;
    const size_t k = first_symbols(s->t, p, n, out);
    if (k <= SHORT_SYMBOLS) return merge_short(s->t, out, k);
    if (reserve_long(s, n, err)) return 0;
    return merge_long(s, p, n, out);
}

/* The ids of w, whose bucket was found, into out, which has room for max(n, WORD_CACHE_IDS).
 * Returns how many; 0: failed. */
static inline size_t bpe_cached(bpe_state *s, const cached_word *w, uint32_t *out, qemb_err *err) {
    size_t k = word_cache_get(w, out);
    if (k) return k;
    k = bpe(s, w->p, w->n, out, err);
    if (k) word_cache_put(w, out, k);
    return k;
}

/* Steps 3 and 4 for s->text (n bytes), up to the pre-token with id number `most`; ids go to out,
 * which has room for n + 8. Up to AHEAD pre-tokens are found before the first is looked up, so that
 * the caches' entries have arrived. Returns the end of the ids, or NULL. */
static uint32_t *encode_words(bpe_state *s, size_t n, size_t most, uint32_t *out, qemb_err *err) {
    const uint8_t *text = s->text;
    const uint32_t *const start = out;
    cached_word words[AHEAD];
    for (size_t i = 0; i < n && (size_t)(out - start) < most;) {
        unsigned n_words = 0;
        for (; n_words < AHEAD && i < n; n_words++) {
            cached_word *w = &words[n_words];
            w->p = text + i;
            i = pretoken_end(text, i, n);
            w->n = (size_t)(text + i - w->p);
            if (w->n == 1) continue;
            if (w->n <= WORD_CACHE_MAX) word_cache_find(&s->cache, w);
        }
        for (unsigned j = 0; j < n_words && (size_t)(out - start) < most; j++) {
            const cached_word *w = &words[j];
            size_t k = 1;
            if (w->n == 1)
                *out = s->t->id_of[*w->p];
            else if (w->n <= WORD_CACHE_MAX)
                k = bpe_cached(s, w, out, err);
            else
                k = bpe(s, w->p, w->n, out, err);
            if (!k) return NULL;
            out += k;
        }
    }
    return out;
}

/* ---- one text -------------------------------------------------------------------------------- */

/* Steps 2 to 4 for a valid piece of text, up to the word that brings the ids to `limit`. Appends to
 * the *n_ids ids in s->ids; *bytes is the piece's length in NFC. */
static int encode_piece(bpe_state *s, const uint8_t *piece, size_t n, int is_nfc, size_t limit,
                        size_t *n_ids, size_t *bytes, qemb_err *err) {
    size_t grow = is_nfc ? 1 : 3;
    uint32_t *out;
    if (n > SIZE_MAX / 8 || reserve(&s->text, &s->text_cap, grow * n + PAD, 1))
        return tokenizer_no_memory(err, "the text");
    if (is_nfc)
        memcpy(s->text, piece, n);
    else
        n = nfc_copy(s, piece, n, err);
    if (n == SIZE_MAX) return -1;
    memset(s->text + n, 0, PAD);
    /* An id covers a byte or more; a cache hit writes up to 8. */
    if (n > SIZE_MAX - *n_ids - 8 || reserve(&s->ids, &s->ids_cap, *n_ids + n + 8, sizeof *s->ids))
        return tokenizer_no_memory(err, "the ids");

    out = encode_words(s, n, limit - *n_ids, s->ids + *n_ids, err);
    if (!out) return -1;
    *n_ids = (size_t)(out - s->ids);
    *bytes = n;
    return 0;
}

static int bpe_encode(qemb_tokenizer_state *state, const char *text_, size_t len, size_t limit,
                      qemb_tokenizer_result *r, qemb_err *err) {
    bpe_state *s = (bpe_state *)state;
    const uint8_t *text = (const uint8_t *)text_;
    size_t n = 0, pos = 0, cut = 0;
    trim(&s->ids, &s->ids_cap, sizeof *s->ids);
    trim(&s->text, &s->text_cap, 1);
    trim(&s->cps, &s->cps_cap, sizeof *s->cps);
    trim(&s->node, &s->node_cap, sizeof *s->node);
    if (reserve(&s->ids, &s->ids_cap, 64, sizeof *s->ids))
        return tokenizer_no_memory(err, "the ids");
    while (pos < len && n < limit) {
        /* Near the limit chunks shrink, so that little is tokenized past it. */
        size_t want = limit - n < CHUNK / 8 ? (limit - n) * 8 + 64 : CHUNK;
        chunk c = {pos, 1};
        if (find_chunk(text, pos, len, want, &c, err)) return -1;
        while (pos < c.end && n < limit) {
            const added_token *added;
            size_t end = added_tokens_find(&s->t->added, text, pos, c.end, len, &added), from = n,
                   bytes = 0;
            if (end > pos) {
                if (encode_piece(s, text + pos, end - pos, c.is_nfc, limit, &n, &bytes, err))
                    return -1;
                pos = end;
                if (n >= limit) {
                    for (cut = bytes; from < limit; from++) cut -= s->t->token[s->ids[from]].len;
                    n = limit;
                }
            }
            if (added && n < limit) {
                if (reserve(&s->ids, &s->ids_cap, n + 1, sizeof *s->ids))
                    return tokenizer_no_memory(err, "the ids");
                s->ids[n++] = added->id;
                pos += added->len;
            }
        }
    }
    r->ids = (const int32_t *)s->ids;
    r->n = n;
    r->bytes_left = len - pos + cut;
    return 0;
}

static size_t bpe_token_bytes(const qemb_tokenizer *tokenizer, uint32_t id, uint8_t *buf,
                              size_t cap) {
    const bpe_tokenizer *t = (const bpe_tokenizer *)tokenizer;
    uint32_t todo[TOKEN_MAX]; /* each stands for a byte or more */
    size_t n_todo = 0, n = 0;
    if (id >= 256 + t->n_merges) return 0;
    todo[n_todo++] = id;
    while (n_todo) {
        id = todo[--n_todo];
        if (id >= 256) {
            todo[n_todo++] = t->merges[2 * (size_t)(id - 256) + 1];
            todo[n_todo++] = t->merges[2 * (size_t)(id - 256)];
            continue;
        }
        if (n < cap) buf[n] = t->byte_of[id];
        n++;
    }
    return n;
}

static void bpe_state_free(qemb_tokenizer_state *state) {
    bpe_state *s = (bpe_state *)state;
    free(s->ids);
    free(s->text);
    free(s->cps);
    free(s->node);
    free(s->list);
    free(s->ranks);
    word_cache_free(&s->cache);
    free(s);
}

static qemb_tokenizer_state *bpe_state_new(const qemb_tokenizer *t) {
    bpe_state *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->base.kind = t->kind;
    s->t = (const bpe_tokenizer *)t;
    if (word_cache_new(&s->cache)) {
        bpe_state_free(&s->base);
        return NULL;
    }
    return &s->base;
}

/* ---- opening --------------------------------------------------------------------------------- */

/* The byte alphabet of GPT-2: the printable bytes of Latin-1 first, then the others. */
static void number_bytes(bpe_tokenizer *t) {
    uint32_t id = 0;
    for (int printable = 1; printable >= 0; printable--) {
        for (unsigned b = 0; b < 256; b++) {
            int p = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
            if (p != printable) continue;
            t->byte_of[id] = (uint8_t)b;
            t->id_of[b] = id++;
        }
    }
}

/* The token that two neighbours make. */
static token_info join(token_info l, token_info r) {
    token_info both = {l.head, r.tail, (uint16_t)(l.len + r.len)};
    if (l.len < 4) both.head |= r.head << 8 * l.len;
    if (r.len < 4) both.tail |= l.tail >> 8 * r.len;
    return both;
}

/* Checks the merges; fills t->token and the pair table. */
static int read_merges(bpe_tokenizer *t, qemb_err *err) {
    for (uint32_t id = 0; id < 256; id++)
        t->token[id] = (token_info){t->byte_of[id], (uint32_t)t->byte_of[id] << 24, 1};
    for (uint32_t i = 0; i < t->n_merges; i++) {
        uint32_t l = t->merges[2 * (size_t)i], r = t->merges[2 * (size_t)i + 1], len;
        uint64_t key = (uint64_t)l << ID_BITS | r, *slot;
        unsigned probes = 0;
        if (l >= 256 + i || r >= 256 + i)
            return qemb_fail(
                err, "model_file",
                "merges: merge %u names an id not made yet (got %u, want less than %u)", i,
                l >= 256 + i ? l : r, 256 + i);
        len = (uint32_t)t->token[l].len + t->token[r].len;
        if (len > TOKEN_MAX)
            return qemb_fail(err, "model_file",
                             "merges: merge %u makes a token too long (got %u bytes, want at most "
                             "%d)",
                             i, len, TOKEN_MAX);
        t->token[256 + i] = join(t->token[l], t->token[r]);
        for (slot = t->pair + (key * GOLDEN >> t->pair_shift); *slot != NO_SLOT; slot++) {
            if (*slot >> ID_BITS == key)
                return qemb_fail(
                    err, "model_file",
                    "merges: merge %u repeats a pair (got %u %u again, want pairs that "
                    "differ)",
                    i, l, r);
            if (++probes == PROBE_MAX)
                return qemb_fail(err, "model_file",
                                 "merges: the pairs are chosen to collide (got %d in one place, "
                                 "want fewer)",
                                 PROBE_MAX);
        }
        *slot = key << ID_BITS | i;
        set_bit(t->filter, key * GOLDEN >> (t->pair_shift - 1));
    }
    return 0;
}

/* The token that a character's two or three bytes merge to on their own, or NO_RANK. */
static uint32_t merge_char(const bpe_tokenizer *t, token_info c) {
    uint32_t x = t->id_of[c.head & 0xFF], y = t->id_of[c.head >> 8 & 0xFF], z, yz;
    uint32_t xy = pair_rank(t, x, y), rank;
    if (c.len == 2) return xy == NO_RANK ? NO_RANK : 256 + xy;
    z = t->id_of[c.head >> 16 & 0xFF];
    yz = pair_rank(t, y, z);
    if (xy == NO_RANK && yz == NO_RANK) return NO_RANK;
    rank = xy <= yz ? pair_rank(t, 256 + xy, z) : pair_rank(t, x, 256 + yz);
    return rank == NO_RANK ? NO_RANK : 256 + rank;
}

/* In place of a code point: the token has only a part of the character; no text can contain it. */
enum { PART = 0x110000, NEVER };

/* The character that token r begins with. */
static uint32_t first_char(token_info r) {
    uint8_t b[4];
    unsigned len;
    memcpy(b, &r.head, sizeof b);
    if (is_continuation(b[0])) return NEVER; /* no character boundary on its left */
    if (r.len < utf8_len(b[0])) return PART;
    return utf8_valid(b, sizeof b) ? utf8_decode(b, &len) : (uint32_t)NEVER;
}

/* The character that token l ends with. */
static uint32_t last_char(token_info l) {
    uint8_t b[4];
    unsigned len, n = l.len < 4 ? l.len : 4;
    memcpy(b, &l.tail, sizeof b);
    for (unsigned i = 1; i <= n; i++)
        if (!is_continuation(b[4 - i]))
            return utf8_valid(b + 4 - i, i) == i ? utf8_decode(b + 4 - i, &len) : (uint32_t)NEVER;
    return n < 4 ? PART : NEVER;
}

/* Finds the characters that may be one symbol when merging starts. BPE applies merge 0 everywhere,
 * then merge 1, and so on. Suppose that a character's bytes merge to one token on their own, and
 * that no merge joins a proper part of the character with a neighbour. Then its own merges happen
 * whatever its neighbours are, and before any merge of the whole character, which has a higher
 * rank. So starting from the whole character gives the same ids.
 *   Few merges join a part: those whose left token begins inside its last character, or whose right
 * token ends inside its first one. t->seam records each by what it needs at the boundary: the whole
 * character on one side, if the token has it, and the nearest byte on the other. A character beside
 * a boundary that t->seam knows starts as bytes. */
static void find_whole_chars(bpe_tokenizer *t) {
    for (uint32_t i = 0; i < t->n_merges; i++) {
        token_info l = t->token[t->merges[2 * (size_t)i]];
        token_info r = t->token[t->merges[2 * (size_t)i + 1]], whole = t->token[256 + i];
        uint32_t x = last_char(l), y = first_char(r), c;
        uint8_t last = (uint8_t)(l.tail >> 24), first = (uint8_t)r.head;
        if (x != NEVER && y != NEVER) {
            if (x == PART && y == PART)
                set_bit(t->seam, seam_hash(2, last, first));
            else if (x == PART)
                set_bit(t->seam, seam_hash(1, y, last));
            else if (y == PART)
                set_bit(t->seam, seam_hash(0, x, first));
        }
        c = whole.len == 2 || whole.len == 3 ? first_char(whole) : (uint32_t)NEVER;
        if (c < 0x10000 && c >= 0x80 && whole.len == utf8_len((uint8_t)whole.head) &&
            merge_char(t, whole) == 256 + i)
            t->char_token[c] = 256 + i;
    }
}

static void bpe_close(qemb_tokenizer *tokenizer) {
    bpe_tokenizer *t = (bpe_tokenizer *)tokenizer;
    free(t->token);
    free(t->pair);
    free(t->filter);
    free(t->char_token);
    added_tokens_free(&t->added);
    free(t);
}

int qemb_tokenizer_open(qemb_tokenizer **t_, const uint32_t *merges, uint32_t n_merges,
                        const uint8_t *added, size_t added_bytes, qemb_err *err) {
    static const tokenizer_kind kind = {bpe_close, bpe_state_new, bpe_state_free, bpe_encode,
                                        bpe_token_bytes};
    bpe_tokenizer *t;
    unsigned bits = 8;
    size_t slots;
    *t_ = NULL;
    if (n_merges > MERGES_MAX)
        return qemb_fail(err, "model_file", "merges: too many (got %u, want at most %d)", n_merges,
                         MERGES_MAX);
    while ((size_t)1 << bits < 2 * (size_t)n_merges) bits++;
    slots = ((size_t)1 << bits) + PROBE_MAX + 1;
    t = calloc(1, sizeof *t);
    if (!t) return tokenizer_no_memory(err, "the tokenizer");
    t->base.kind = &kind;
    t->merges = merges;
    t->n_merges = n_merges;
    t->pair_shift = 64 - bits;
    t->token = malloc((256 + (size_t)n_merges) * sizeof *t->token);
    t->pair = malloc(slots * sizeof *t->pair);
    t->filter = calloc((size_t)2 << bits >> 6, sizeof *t->filter);
    t->char_token = calloc(0x10000, sizeof *t->char_token);
    if (!t->token || !t->pair || !t->filter || !t->char_token) {
        bpe_close(&t->base);
        return tokenizer_no_memory(err, "the tokenizer");
    }
    memset(t->pair, 0xFF, slots * sizeof *t->pair); /* all NO_SLOT */
    number_bytes(t);
    if (read_merges(t, err) ||
        added_tokens_read(&t->added, added, added_bytes, 256 + n_merges, 0, err)) {
        bpe_close(&t->base);
        return -1;
    }
    t->base.n_ids = t->added.n ? t->added.n_ids : 256 + n_merges;
    find_whole_chars(t);
    *t_ = &t->base;
    return 0;
}
