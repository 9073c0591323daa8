/* unigram.c - text to token ids, exactly as Hugging Face `tokenizers` does for XLM-RoBERTa.
 *
 * The definition has six steps. This file does the first five, each under its heading:
 *   1. Added tokens ("<mask>") are found in the raw text, leftmost. Each stretch of text between
 *      two of them goes through 2 to 5 on its own. Some take the white space before them with them.
 *   2. The charsmap replaces grapheme clusters of fewer than 6 bytes, or single characters.
 *   3. Runs of spaces become one space, or the stretch is split at white space.
 *   4. Each space becomes U+2581 and begins a word; the stretch begins with one, too.
 *   5. In each word, the pieces with the largest sum of scores are its tokens (Viterbi).
 *   6. The caller puts <s> and </s> around the ids.
 *
 * What makes it fast and changes no id:
 *   - Steps 1 to 4 are one pass, in windows that fit the first caches, into a buffer in which a
 *     byte 0x20 stands for U+2581. The pieces have it too; one with a space in it can't occur.
 *   - Characters that no neighbour joins and that the charsmap keeps are copied; ASCII in runs.
 *   - A word of up to 31 bytes is looked up in a cache of earlier results.
 *   - The pieces are a double array, so a step costs one load.
 * Long words are taken part by part. At a place that no piece crosses, whatever comes later, the
 * tokens before it are certain: they come out there, and memory grows only with what is left. So
 * a limit of ids ends even a text without spaces early. Sums go on from there, since a sum from
 * zero would be rounded differently.
 * Nothing depends on the locale. An open tokenizer is immutable; all scratch is in the state.
 */
#include "lib/added_tokens.h"
#include "lib/grapheme_tables.h"
#include "lib/piece_trie.h"
#include "lib/unicode.h"
#include "lib/word_cache.h"

#include <math.h>

enum {
    PIECES_MAX = 1 << 20, /* an id fits beside the count of a cache entry */
    PAIRS_MAX = 1 << 20,  /* many may share a replacement, which is checked for each */
    SCORE_MOST = 1000000, /* sums over any text are finite */
    CLUSTER = 6,          /* bytes from which on a cluster is replaced character by character */
    LOOK = 16,            /* bytes behind a character that normalizing it may look at, at most */
    WINDOW = 1 << 14,     /* bytes of raw text that are looked at in one go, if possible */
    FULL = 1 << 14,       /* bytes in s->text from which on the words in it are tokenized */
    ROOM = 2048,          /* bytes that one cluster may add: 5 characters, each 1 + 255 bytes */
    PAD = 32,             /* bytes behind the text that may be read */
    SHORT_WORD = 256,     /* bytes of a word that is tokenized in one go */
    AHEAD = 32,           /* words found before the first of them is looked up */
    HEADER = 32,          /* bytes of the section before the scores */
    MARK = 0x2581,        /* stands for a space in pieces */
};

/* A code point's entry in unigram.info: its grapheme class, and */
enum {
    CLASS_BITS = 0x1F,
    JOINS = 0x20,   /* it may belong to one cluster with a neighbour */
    KEY = 0x40,     /* the charsmap replaces it */
    SPECIAL = 0x80, /* it is U+2581, or a space for step 3 */
};

#define CODE_POINTS 0x110000
#define UNREACHED   (-INFINITY)
#define EACH_BYTE   UINT64_C(0x0101010101010101)
#define HIGH_BITS   (0x80 * EACH_BYTE)

typedef struct {
    qemb_tokenizer base;
    added_tokens added;
    int lstrip; /* some added token takes the white space before it */
    int split;  /* step 3 splits at White_Space; else it merges runs of U+0020 */
    int ascii;  /* no printable character of ASCII is a key */
    uint32_t n_pieces, unk, n_pairs;
    double unk_score;
    double *score;         /* (n_pieces) */
    const uint8_t *single; /* (n_singles, 2) u32 of the section: { code point, replacement } */
    const uint8_t *pair;   /* (n_pairs, 3) u32: { first, second, replacement } */
    const uint8_t *len;    /* (n_pieces) bytes of each piece */
    const uint8_t *text;   /* the text of replacements */
    const uint8_t **piece; /* (n_pieces) the text of each piece */
    uint32_t longest;      /* bytes of the longest piece, as the trie has it */
    piece_trie trie;
    uint8_t *info;                               /* (CODE_POINTS) */
    uint32_t single_from[CODE_POINTS / 256 + 1]; /* first single of each 256 code points */
} unigram;

/* Viterbi's table has a node for each byte of a word and one behind it. */
typedef struct {
    double score; /* largest sum of a way to this place, or UNREACHED */
    uint32_t id;  /* the last token of that way */
    uint32_t len; /* its bytes */
} node;

/* A word that is tokenized part by part. All places count from text's beginning. */
typedef struct {
    uint8_t *text; /* (n) */
    size_t text_cap;
    node *way; /* (n + 1) */
    size_t way_cap;
    size_t n;
    size_t from;  /* tokens before it have come out */
    size_t done;  /* pieces that begin before it have been tried */
    size_t reach; /* the farthest end of these pieces */
    int is_open;  /* there is such a word: s->text goes on with it */
} long_word;

/* 3 MiB of caches, about 150 KiB of buffers, and 4 bytes an id. A single word of n bytes, at most
 * TOKENIZER_WORD_MAX, takes about 26 n bytes if pieces cross all its places. */
typedef struct {
    qemb_tokenizer_state base;
    const unigram *t;
    uint32_t *ids; /* (n_ids) the ids found so far */
    size_t ids_cap, n_ids;
    size_t most;       /* ids that are wanted */
    int after_unknown; /* the last id is an unknown of the same word */
    uint8_t *text;     /* (n) normalized text that is not tokenized yet, in words */
    size_t n;
    node *way; /* (SHORT_WORD + 1) */
    long_word word;
    word_cache cache;
    /* where normalization stands in its stretch */
    grapheme cluster;
    int in_cluster;  /* inside a cluster of CLUSTER bytes or more */
    int at_start;    /* the next character begins a word */
    int after_space; /* the last character was U+0020 */
} unigram_state;

/* ---- steps 1 and 2: stretches and clusters --------------------------------------------------- */

static void begin_stretch(unigram_state *s) {
    s->in_cluster = 0;
    s->at_start = 1;
    s->after_space = 0;
    s->after_unknown = 0;
}

/* Steps 3 and 4 for one character at p: appends it to s->text. */
static inline void put_char(unigram_state *s, const uint8_t *p, unsigned len, unsigned info) {
    if (info & SPECIAL) {
        const int is_mark = p[0] == 0xE2 && p[1] == 0x96; /* no other of them has these bytes */
        if (s->t->split && !is_mark) {
            s->at_start = 1;
            return;
        }
        if (!s->after_space || is_mark) s->text[s->n++] = ' ';
        s->after_space = !is_mark;
        s->at_start = 0;
        return;
    }
    if (s->at_start) s->text[s->n++] = ' ';
    for (unsigned i = 0; i < len; i++) s->text[s->n++] = p[i];
    s->at_start = s->after_space = 0;
}

/* Appends a replacement: offset in t->text, and in the upper 8 bits its length. */
static void put_text(unigram_state *s, uint32_t replacement) {
    const uint8_t *p = s->t->text + (replacement & 0xFFFFFF), *end = p + (replacement >> 24);
    for (unsigned len; p < end; p += len) {
        const uint32_t c = utf8_decode(p, &len);
        put_char(s, p, len, s->t->info[c]);
    }
}

/* The replacement of code point c, which is a key. */
static uint32_t single_of(const unigram *t, uint32_t c) {
    uint32_t lo = t->single_from[c >> 8], hi = t->single_from[(c >> 8) + 1];
    while (hi - lo > 1) {
        const uint32_t mid = lo + (hi - lo) / 2;
        if (load32(t->single + 8 * (size_t)mid) <= c)
            lo = mid;
        else
            hi = mid;
    }
    return load32(t->single + 8 * (size_t)lo + 4);
}

/* Whether code points a, b are a key, and its replacement. */
static int pair_of(const unigram *t, uint32_t a, uint32_t b, uint32_t *replacement) {
    size_t lo = 0, hi = t->n_pairs;
    while (lo < hi) {
        const size_t mid = lo + (hi - lo) / 2;
        const uint8_t *at = t->pair + 12 * mid;
        const uint32_t x = load32(at), y = load32(at + 4);
        if (x == a && y == b) {
            *replacement = load32(at + 8);
            return 1;
        }
        if (x < a || (x == a && y < b))
            lo = mid + 1;
        else
            hi = mid;
    }
    return 0;
}

/* Appends the character at p by itself. */
static inline unsigned put_alone(unigram_state *s, const uint8_t *p) {
    unsigned len;
    const uint32_t c = utf8_decode(p, &len);
    const unsigned info = s->t->info[c];
    if (info & KEY)
        put_text(s, single_of(s->t, c));
    else
        put_char(s, p, len, info);
    return len;
}

/* Bytes of the cluster at p, which n bytes are known of, if it has fewer than CLUSTER; else 0. */
static size_t short_cluster(const unigram *t, const uint8_t *p, size_t n) {
    unsigned len;
    grapheme g = grapheme_begin(t->info[utf8_decode(p, &len)] & CLASS_BITS);
    size_t at = len;
    while (at < n) {
        const unsigned class = t->info[utf8_decode(p + at, &len)] & CLASS_BITS;
        if (!grapheme_continues(&g, class)) return at;
        g = grapheme_after(g, class);
        at += len;
        if (at >= CLUSTER) return 0;
    }
    return at;
}

/* Appends a cluster of n < CLUSTER bytes. The shortest key that it begins with replaces all of
 * it. */
static void put_cluster(unigram_state *s, const uint8_t *p, size_t n) {
    unsigned len, second;
    uint32_t a = utf8_decode(p, &len), replacement;
    if (s->t->info[a] & KEY) {
        put_text(s, single_of(s->t, a));
    } else if (len < n && pair_of(s->t, a, utf8_decode(p + len, &second), &replacement)) {
        put_text(s, replacement);
    } else {
        for (size_t i = 0; i < n;) i += put_alone(s, p + i);
    }
}

/* Copies printable ASCII other than spaces from p (n), up to the last one that cannot begin a
 * cluster of several characters. Returns its bytes. */
static inline size_t put_ascii(unigram_state *s, const uint8_t *p, size_t n) {
    size_t i = 0;
    uint8_t *out = s->text + s->n + s->at_start; /* FULL + ROOM bytes: there is room for 8 */
    while (i + 9 <= n && s->n + i < FULL) {
        const uint64_t w = load64(p + i);
        /* high bit: a byte from 0x7F on, or up to 0x20. No carry crosses a byte without one. */
        const uint64_t low = w & ~HIGH_BITS;
        const uint64_t stop =
            (w | (low + EACH_BYTE) | ~(low + (0x80 - 0x21) * EACH_BYTE)) & HIGH_BITS;
        memcpy(out + i, &w, sizeof w);
        if (!stop) {
            i += 8;
            continue;
        }
        i += (size_t)__builtin_ctzll(stop) >> 3;
        break;
    }
    if (i && p[i] >= 0x80) i--; /* which may join the character before it */
    if (!i) return 0;
    if (s->at_start) s->text[s->n] = ' ';
    s->n += i + (size_t)s->at_start;
    s->at_start = s->after_space = 0;
    return i;
}

/* Steps 2 to 4 for the characters that begin in text[i, stop), until s->text is full. What is known
 * of the stretch ends at `end`: there it ends, or end is LOOK bytes or more behind stop. Returns
 * the place behind the last one. */
static size_t normalize(unigram_state *s, const uint8_t *text, size_t i, size_t stop, size_t end) {
    const unigram *t = s->t;
    while (i < stop && s->n < FULL) {
        unsigned len, next_len, info, next = 0;
        size_t n;
        if (!s->in_cluster && t->ascii && text[i] < 0x80 && (n = put_ascii(s, text + i, end - i))) {
            i += n;
            continue;
        }
        info = t->info[utf8_decode(text + i, &len)];
        if (s->in_cluster) {
            s->in_cluster = grapheme_continues(&s->cluster, info & CLASS_BITS);
            s->cluster = grapheme_after(s->cluster, info & CLASS_BITS);
        }
        if (!s->in_cluster) {
            if (i + len < end) next = t->info[utf8_decode(text + i + len, &next_len)];
            if ((info | next) & JOINS) {
                n = short_cluster(t, text + i, end - i);
                if (n) {
                    put_cluster(s, text + i, n);
                    i += n;
                    continue;
                }
                s->in_cluster = 1;
                s->cluster = grapheme_begin(info & CLASS_BITS);
            }
        }
        if (info & KEY)
            put_alone(s, text + i);
        else
            put_char(s, text + i, len, info);
        i += len;
    }
    return i;
}

/* ---- step 5: Viterbi ------------------------------------------------------------------------- */

static int reserve_ids(unigram_state *s, size_t more, qemb_err *err) {
    if (more > SIZE_MAX / 8 - s->n_ids ||
        reserve(&s->ids, &s->ids_cap, s->n_ids + more, sizeof *s->ids))
        return tokenizer_no_memory(err, "the ids");
    return 0;
}

/* A way to place `to` by the token id, of len bytes. Of equal sums the first one stays. */
static inline void go(node *to, double score, uint32_t id, size_t len) {
    if (!(score > to->score)) return;
    *to = (node){score, id, (uint32_t)len};
}

/* Tries the pieces that begin at the character at place i of a word p (n). Returns the farthest end
 * of one. */
static inline size_t try_pieces(const unigram *t, const uint8_t *p, size_t n, size_t i, node *way) {
    const trie_unit *unit = t->trie.unit;
    const double here = way[i].score;
    const size_t next = i + utf8_len(p[i]);
    uint32_t base = t->trie.root;
    size_t reach = next;
    int known = 0;
    for (size_t e = i; e < n;) {
        const trie_unit *u = piece_trie_step(unit, &base, p[e++]);
        if (!u) break;
        if (!u->value) continue;
        go(&way[e], t->score[u->value - 1] + here, u->value - 1, e - i);
        known |= e == next;
        reach = e > next ? e : reach;
    }
    if (!known) go(&way[next], t->unk_score + here, t->unk, next - i);
    return reach;
}

/* Appends the ids of the way from one place to another. Neighbouring unknowns become one. */
static void put_ids(unigram_state *s, const node *way, size_t from, size_t to) {
    uint32_t *out = s->ids + s->n_ids;
    size_t k = 0, at = 0;
    for (size_t e = to; e > from; e -= way[e].len) k++;
    for (size_t e = to, i = k; e > from; e -= way[e].len) out[--i] = way[e].id;
    for (size_t i = 0; i < k; i++) {
        const int unknown = out[i] == s->t->unk;
        if (unknown && s->after_unknown) continue;
        s->after_unknown = unknown;
        out[at++] = out[i];
    }
    s->n_ids += at;
}

static inline void forget(node *way, size_t n) {
    for (size_t i = 0; i < n; i++) way[i].score = UNREACHED;
}

/* The ids of a whole word p (n <= SHORT_WORD), appended. */
static void encode_short(unigram_state *s, const uint8_t *p, size_t n) {
    forget(s->way + 1, n);
    s->way[0].score = 0;
    for (size_t i = 0; i < n; i += utf8_len(p[i])) try_pieces(s->t, p, n, i, s->way);
    s->after_unknown = 0;
    put_ids(s, s->way, 0, n);
}

static int begin_word(unigram_state *s, qemb_err *err) {
    long_word *w = &s->word;
    if (reserve(&w->way, &w->way_cap, 1, sizeof *w->way))
        return tokenizer_no_memory(err, "a long word");
    w->n = w->from = w->done = w->reach = 0;
    w->way[0].score = 0;
    w->is_open = 1;
    s->after_unknown = 0;
    return 0;
}

/* Goes on with the open word by p (n), which ends it if `last`. Stops early when there are enough
 * ids. */
static int go_on_word(unigram_state *s, const uint8_t *p, size_t n, int last, qemb_err *err) {
    long_word *w = &s->word;
    if (w->from && w->from >= w->n / 2) { /* so that all such moves together are linear */
        memmove(w->text, w->text + w->from, w->n - w->from);
        memmove(w->way, w->way + w->from, (w->n - w->from + 1) * sizeof *w->way);
        w->n -= w->from, w->done -= w->from, w->reach -= w->from;
        w->from = 0;
    }
    if (w->n - w->from + n > TOKENIZER_WORD_MAX)
        return tokenizer_word_too_long(err, w->n - w->from + n);
    if (reserve(&w->text, &w->text_cap, w->n + n, 1) ||
        reserve(&w->way, &w->way_cap, w->n + n + 1, sizeof *w->way))
        return tokenizer_no_memory(err, "a long word");
    if (reserve_ids(s, w->n + n - w->from, err)) return -1;
    if (n) memcpy(w->text + w->n, p, n);
    forget(w->way + w->n + 1, n);
    w->n += n;
    /* A piece is tried when all of it is there, or all of the word. */
    const size_t longest = s->t->longest, to = last ? w->n : w->n > longest ? w->n - longest : 0;
    while (w->done < to) {
        size_t reach;
        if (w->done == w->reach && w->done > w->from) { /* no piece crosses this place */
            put_ids(s, w->way, w->from, w->done);
            w->from = w->done;
            if (s->n_ids >= s->most) return 0;
        }
        reach = try_pieces(s->t, w->text, w->n, w->done, w->way);
        if (reach > w->reach) w->reach = reach;
        w->done += utf8_len(w->text[w->done]);
    }
    if (last) {
        put_ids(s, w->way, w->from, w->n);
        w->is_open = 0;
    }
    return 0;
}

/* The next byte ' ' in p[i, n), or n. PAD bytes behind n can be read. */
static inline size_t find_space(const uint8_t *p, size_t i, size_t n) {
    for (; i < n; i += 8) {
        const uint64_t x = load64(p + i) ^ ' ' * EACH_BYTE;
        const uint64_t zero = (x - EACH_BYTE) & ~x & HIGH_BITS; /* the lowest one is right */
        if (!zero) continue;
        i += (size_t)__builtin_ctzll(zero) >> 3;
        return i < n ? i : n;
    }
    return n;
}

/* The ids of one whole word, appended. */
static int encode_word(unigram_state *s, const cached_word *w, qemb_err *err) {
    if (w->n <= WORD_CACHE_MAX) {
        uint32_t *out = s->ids + s->n_ids;
        const size_t before = s->n_ids, k = word_cache_get(w, out);
        s->n_ids += k;
        if (k) return 0;
        encode_short(s, w->p, w->n);
        word_cache_put(w, out, s->n_ids - before);
        return 0;
    }
    if (w->n <= SHORT_WORD) return encode_short(s, w->p, w->n), 0;
    if (begin_word(s, err)) return -1;
    return go_on_word(s, w->p, w->n, 1, err);
}

/* Tokenizes the words in s->text, each of which begins with ' '; but for the last one, which may go
 * on, if the stretch does. What is left of it stays. */
static int encode_words(unigram_state *s, int stretch_ends, qemb_err *err) {
    const size_t n = s->n;
    const uint8_t *text = s->text;
    cached_word words[AHEAD];
    size_t i = 0;
    if (s->word.is_open) {
        i = find_space(text, 0, n);
        if (go_on_word(s, text, i, i < n || stretch_ends, err)) return -1;
    }
    if (reserve_ids(s, n + WORD_CACHE_IDS, err)) return -1;
    while (i < n && s->n_ids < s->most) {
        unsigned n_words = 0;
        for (; n_words < AHEAD && i < n; n_words++) {
            const size_t end = find_space(text, i + 1, n);
            cached_word *w = &words[n_words];
            if (end == n && !stretch_ends) break;
            w->p = text + i;
            w->n = end - i;
            if (w->n <= WORD_CACHE_MAX) word_cache_find(&s->cache, w);
            i = end;
        }
        for (unsigned j = 0; j < n_words; j++) {
            if (s->n_ids >= s->most) {
                i = (size_t)(words[j].p - text);
                break;
            }
            if (encode_word(s, &words[j], err)) return -1;
        }
        if (n_words < AHEAD) break;
    }
    if (n - i > SHORT_WORD && s->n_ids < s->most) {
        if (begin_word(s, err) || go_on_word(s, text + i, n - i, 0, err)) return -1;
        i = n;
    }
    s->n = n - i;
    memmove(s->text, s->text + i, s->n);
    return 0;
}

/* ---- one text -------------------------------------------------------------------------------- */

/* What was looked at of a text. */
typedef struct {
    size_t stop;              /* characters that begin before it can be normalized */
    size_t end;               /* text that is part of the stretch */
    int is_last;              /* the stretch ends there */
    const added_token *token; /* the added token behind it, or NULL */
    size_t token_at;
} window;

/* The place from which on text[pos, end) is White_Space. */
static size_t spaces_begin(const uint8_t *text, size_t pos, size_t end) {
    while (end > pos) {
        size_t i = end - 1;
        unsigned len;
        while (is_continuation(text[i])) i--;
        if (UNICODE_CLASS(word_at(text + i, &len)) != CLASS_SPACE) break;
        end = i;
    }
    return end;
}

/* Looks at `want` bytes of text from pos on, or a few more: validates what lies behind *valid, and
 * finds the next added token. What comes behind them may take white space at their end. */
static int look(const unigram *t, const uint8_t *text, size_t pos, size_t len, size_t want,
                size_t *valid, window *w, qemb_err *err) {
    for (;; want *= 2) {
        const size_t goal = len - pos > want ? pos + want : len;
        while (*valid < goal) {
            if (goal - *valid >= 8 && !(load64(text + *valid) & HIGH_BITS)) {
                *valid += 8;
                continue;
            }
            const unsigned n = utf8_valid(text + *valid, len - *valid);
            if (!n) return tokenizer_invalid_utf8(err, *valid, text[*valid]);
            *valid += n;
        }
        w->token_at = added_tokens_find(&t->added, text, pos, *valid, len, &w->token);
        w->is_last = w->token || *valid == len;
        w->stop = w->end = w->token_at;
        if (w->token ? w->token->takes_spaces : t->lstrip && !w->is_last)
            w->stop = w->end = spaces_begin(text, pos, w->end);
        if (w->is_last) return 0;
        if (w->end - pos <= LOOK) continue;
        w->stop = w->end - LOOK;
        while (is_continuation(text[w->stop])) w->stop--;
        if (w->stop > pos) return 0;
    }
}

/* The bytes of ids first..last-1, in normalized text. */
static size_t bytes_of(const unigram *t, const uint32_t *ids, size_t first, size_t last) {
    size_t n = 0;
    for (size_t i = first; i < last; i++) n += ids[i] < t->n_pieces ? t->len[ids[i]] : 1;
    return n;
}

/* Tokenizes text (len) until there are s->most ids. *pos is the end of what was normalized. */
static int encode_text(unigram_state *s, const uint8_t *text, size_t len, size_t *pos,
                       qemb_err *err) {
    size_t valid = 0;
    begin_stretch(s);
    while (s->n_ids < s->most) {
        /* Near the limit windows shrink, so that little is tokenized past it. */
        const size_t left = s->most - s->n_ids;
        window w;
        const size_t want = left < WINDOW / 8 ? left * 8 + 64 : WINDOW;
        if (look(s->t, text, *pos, len, want, &valid, &w, err)) return -1;
        do {
            *pos = normalize(s, text, *pos, w.stop, w.end);
            if (encode_words(s, w.is_last && *pos == w.end, err)) return -1;
        } while (*pos < w.stop && s->n_ids < s->most);
        if (!w.is_last || s->n_ids >= s->most) continue;
        if (!w.token) break;
        if (reserve_ids(s, 1, err)) return -1;
        s->ids[s->n_ids++] = w.token->id;
        *pos = w.token_at + w.token->len;
        begin_stretch(s);
    }
    return 0;
}

static int unigram_encode(qemb_tokenizer_state *state, const char *text, size_t len, size_t limit,
                          qemb_tokenizer_result *r, qemb_err *err) {
    unigram_state *s = (unigram_state *)state;
    size_t pos = 0;
    trim(&s->ids, &s->ids_cap, sizeof *s->ids);
    trim(&s->word.text, &s->word.text_cap, 1);
    trim(&s->word.way, &s->word.way_cap, sizeof *s->word.way);
    s->n_ids = s->n = 0;
    s->word.is_open = 0;
    /* One id more than the limit says whether ids are cut off. */
    s->most = limit < SIZE_MAX ? limit + 1 : limit;
    if (reserve_ids(s, 64, err) || encode_text(s, (const uint8_t *)text, len, &pos, err)) return -1;
    r->ids = (const int32_t *)s->ids;
    r->n = s->n_ids < limit ? s->n_ids : limit;
    r->bytes_left = 0;
    if (s->n_ids > limit) {
        const size_t word = s->word.is_open ? s->word.n - s->word.from : 0;
        r->bytes_left = bytes_of(s->t, s->ids, limit, s->n_ids) + word + s->n + (len - pos);
    }
    return 0;
}

static size_t unigram_token_bytes(const qemb_tokenizer *tokenizer, uint32_t id, uint8_t *buf,
                                  size_t cap) {
    const unigram *t = (const unigram *)tokenizer;
    if (id >= t->n_pieces) return 0;
    if (buf) memcpy(buf, t->piece[id], t->len[id] < cap ? t->len[id] : cap);
    return t->len[id];
}

static void unigram_state_free(qemb_tokenizer_state *state) {
    unigram_state *s = (unigram_state *)state;
    free(s->ids);
    free(s->text);
    free(s->way);
    free(s->word.text);
    free(s->word.way);
    word_cache_free(&s->cache);
    free(s);
}

static qemb_tokenizer_state *unigram_state_new(const qemb_tokenizer *t) {
    unigram_state *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->base.kind = t->kind;
    s->t = (const unigram *)t;
    s->text = calloc(1, FULL + ROOM + PAD);
    s->way = malloc((SHORT_WORD + 1) * sizeof *s->way);
    if (!s->text || !s->way || word_cache_new(&s->cache)) {
        unigram_state_free(&s->base);
        return NULL;
    }
    return &s->base;
}

/* ---- opening --------------------------------------------------------------------------------- */

/* The section, little-endian, without padding:
 *   0   u32[8] the header below
 *   32  f64[n_pieces] scores of the pieces, whose ids are 0, 1, ...
 *   then u32[n_singles][2] { code point, replacement }, ascending by code point
 *   then u32[n_pairs][3] { code point, code point, replacement }, ascending by both
 *   then u8[n_pieces] bytes of each piece, then the text of the pieces, then that of replacements
 * A replacement is offset | bytes << 24 in that text. The charsmap's keys of one character and of
 * two are all that step 2 can reach. spaces: 1 if step 3 splits at white space, 0 if it merges
 * spaces. */
typedef struct {
    uint32_t n_pieces, unk, spaces, n_singles, n_pairs, piece_bytes, text_bytes, zero;
} unigram_header;

/* Reads the header; the sizes in it add up to the section's. */
static int read_header(unigram_header *h, const uint8_t *section, size_t bytes, qemb_err *err) {
    uint64_t all;
    if (bytes < HEADER)
        return qemb_fail(err, "model_file", "unigram: cut off (got %zu bytes, want %d or more)",
                         bytes, HEADER);
    memcpy(h, section, HEADER);
    all = HEADER + 9 * (uint64_t)h->n_pieces + 8 * (uint64_t)h->n_singles +
          12 * (uint64_t)h->n_pairs + h->piece_bytes + h->text_bytes;
    if (all != bytes)
        return qemb_fail(err, "model_file",
                         "unigram: the sizes don't add up (got %llu bytes, want %zu)",
                         (unsigned long long)all, bytes);
    if (!h->n_pieces || h->n_pieces > PIECES_MAX)
        return qemb_fail(err, "model_file",
                         "unigram: wrong number of pieces (got %u, want 1 to %d)", h->n_pieces,
                         PIECES_MAX);
    if (h->n_pairs > PAIRS_MAX)
        return qemb_fail(err, "model_file",
                         "unigram: too many pairs of characters (got %u, want at most %d)",
                         h->n_pairs, PAIRS_MAX);
    if (h->unk >= h->n_pieces)
        return qemb_fail(err, "model_file",
                         "unigram: the unknown token is no piece (got %u, want less than %u)",
                         h->unk, h->n_pieces);
    if (h->spaces > 1 || h->zero)
        return qemb_fail(
            err, "model_file",
            "unigram: unknown header (got spaces %u and a reserved %u, want 0 or 1 and "
            "0)",
            h->spaces, h->zero);
    return 0;
}

/* Copies the scores, and takes that of an unknown from the smallest. */
static int read_scores(unigram *t, const uint8_t *scores, qemb_err *err) {
    double least = 0;
    for (uint32_t i = 0; i < t->n_pieces; i++) {
        memcpy(&t->score[i], scores + 8 * (size_t)i, 8);
        if (!(t->score[i] >= -SCORE_MOST && t->score[i] <= 0))
            return qemb_fail(err, "model_file",
                             "unigram: piece %u has a wrong score (got %g, want %d to 0)", i,
                             t->score[i], -SCORE_MOST);
        if (t->score[i] < least) least = t->score[i];
    }
    t->unk_score = least - 10.0;
    return 0;
}

/* Whether p (n) is UTF-8. */
static int all_valid(const uint8_t *p, size_t n) {
    for (size_t i = 0, len; i < n; i += len) {
        len = utf8_valid(p + i, n - i);
        if (!len) return 0;
    }
    return 1;
}

/* Copies a piece p (n) to out with a byte ' ' in the place of U+2581. Returns its bytes; 0: it has
 * a space, which no word has. */
static uint32_t trie_text(uint8_t *out, const uint8_t *p, uint32_t n) {
    uint32_t k = 0;
    for (uint32_t i = 0; i < n;) {
        if (p[i] == ' ') return 0;
        const int is_mark = n - i >= 3 && !memcmp(p + i, "\xE2\x96\x81", 3);
        out[k++] = is_mark ? ' ' : p[i];
        i += is_mark ? 3 : 1;
    }
    return k;
}

/* Finds the pieces in their text (bytes), and lists them for the trie: their texts in out. */
static int read_pieces(unigram *t, const uint8_t *text, size_t bytes, uint8_t *out,
                       trie_piece *list, size_t *n, qemb_err *err) {
    size_t at = 0;
    *n = 0;
    for (uint32_t i = 0; i < t->n_pieces; at += t->len[i++]) {
        const uint32_t len = t->len[i];
        if (!len || len > bytes - at || !all_valid(text + at, len))
            return qemb_fail(err, "model_file",
                             "unigram: piece %u is wrong (got %u bytes of %zu, want UTF-8)", i, len,
                             bytes - at);
        t->piece[i] = text + at;
        const uint32_t k = trie_text(out, text + at, len);
        if (!k) continue;
        list[(*n)++] = (trie_piece){out, k, i};
        out += k;
        if (k > t->longest) t->longest = k;
    }
    if (at != bytes)
        return qemb_fail(err, "model_file",
                         "unigram: the lengths of the pieces don't add up (got %zu, want %zu)", at,
                         bytes);
    return 0;
}

static int make_trie(unigram *t, const uint8_t *text, size_t bytes, qemb_err *err) {
    trie_piece *list = malloc(t->n_pieces * sizeof *list);
    uint8_t *texts = malloc(bytes + 1);
    size_t n;
    int rc = list && texts ? 0 : tokenizer_no_memory(err, "the pieces");
    if (!rc) rc = read_pieces(t, text, bytes, texts, list, &n, err);
    if (!rc) rc = piece_trie_build(&t->trie, list, n, err);
    free(list);
    free(texts);
    return rc;
}

static void set_classes(unigram *t) {
    const size_t n = sizeof grapheme_ranges / sizeof *grapheme_ranges;
    for (size_t i = 0; i < n; i++) {
        const unsigned class = grapheme_ranges[i].class;
        memset(t->info + grapheme_ranges[i].first,
               (int)(class | (class >= GRAPHEME_JOINS ? JOINS : 0)),
               grapheme_ranges[i].last - grapheme_ranges[i].first + 1);
    }
    for (uint32_t i = 0; i < HANGUL_NL * HANGUL_NV * HANGUL_NT; i++)
        t->info[HANGUL_S + i] = i % HANGUL_NT ? GRAPHEME_LVT : GRAPHEME_LV;
    for (uint32_t c = 0; c <= 0x3000; c++) /* the last White_Space */
        if (c == MARK || (t->split ? UNICODE_CLASS(word_of(c)) == CLASS_SPACE : c == ' '))
            t->info[c] |= SPECIAL;
}

static int is_code_point(uint32_t c) { return c < CODE_POINTS && (c < 0xD800 || c > 0xDFFF); }

static int bad_key(const char *what, size_t i, qemb_err *err) {
    return qemb_fail(
        err, "model_file",
        "unigram: %s %zu is wrong (got other keys or replacements, want ascending code "
        "points and UTF-8)",
        what, i);
}

/* Whether a replacement lies in the text of `bytes` bytes, and is UTF-8. */
static int is_replacement(const unigram *t, uint32_t replacement, size_t bytes) {
    const size_t at = replacement & 0xFFFFFF, n = replacement >> 24;
    return at <= bytes && n <= bytes - at && all_valid(t->text + at, n);
}

/* Checks the charsmap; marks and indexes its keys. */
static int read_charsmap(unigram *t, const unigram_header *h, qemb_err *err) {
    uint64_t before = 0;
    for (uint32_t i = 0; i < h->n_singles; i++) {
        const uint8_t *at = t->single + 8 * (size_t)i;
        const uint32_t c = load32(at);
        if (!is_code_point(c) || (i && c <= before) ||
            !is_replacement(t, load32(at + 4), h->text_bytes))
            return bad_key("character", i, err);
        t->info[c] |= KEY;
        t->single_from[(c >> 8) + 1] = i + 1;
        before = c;
    }
    for (size_t i = 1; i < sizeof t->single_from / sizeof *t->single_from; i++)
        if (t->single_from[i] < t->single_from[i - 1]) t->single_from[i] = t->single_from[i - 1];
    for (uint32_t i = 0; i < h->n_pairs; i++) {
        const uint8_t *at = t->pair + 12 * (size_t)i;
        const uint64_t pair = (uint64_t)load32(at) << 32 | load32(at + 4);
        if (!is_code_point(load32(at)) || !is_code_point(load32(at + 4)) || (i && pair <= before) ||
            !is_replacement(t, load32(at + 8), h->text_bytes))
            return bad_key("pair", i, err);
        before = pair;
    }
    t->ascii = 1;
    for (unsigned c = 0x21; c < 0x7F; c++) t->ascii &= !(t->info[c] & KEY);
    return 0;
}

static void unigram_close(qemb_tokenizer *tokenizer) {
    unigram *t = (unigram *)tokenizer;
    added_tokens_free(&t->added);
    free(t->score);
    free(t->piece);
    free(t->trie.unit);
    free(t->info);
    free(t);
}

/* Fills t from the section, whose header is h. */
static int read_section(unigram *t, const unigram_header *h, const uint8_t *section,
                        qemb_err *err) {
    const uint8_t *scores = section + HEADER, *texts;
    t->single = scores + 8 * (size_t)h->n_pieces;
    t->pair = t->single + 8 * (size_t)h->n_singles;
    t->len = t->pair + 12 * (size_t)h->n_pairs;
    texts = t->len + h->n_pieces;
    t->text = texts + h->piece_bytes;
    t->n_pieces = h->n_pieces;
    t->n_pairs = h->n_pairs;
    t->unk = h->unk;
    t->split = (int)h->spaces;
    t->score = malloc(h->n_pieces * sizeof *t->score);
    t->piece = malloc(h->n_pieces * sizeof *t->piece);
    t->info = calloc(CODE_POINTS, 1);
    if (!t->score || !t->piece || !t->info) return tokenizer_no_memory(err, "the tokenizer");
    set_classes(t);
    if (read_scores(t, scores, err) || read_charsmap(t, h, err)) return -1;
    return make_trie(t, texts, h->piece_bytes, err);
}

int qemb_unigram_open(qemb_tokenizer **t_, const uint8_t *section, size_t bytes,
                      const uint8_t *added, size_t added_bytes, qemb_err *err) {
    static const tokenizer_kind kind = {unigram_close, unigram_state_new, unigram_state_free,
                                        unigram_encode, unigram_token_bytes};
    unigram_header h;
    unigram *t;
    *t_ = NULL;
    if (read_header(&h, section, bytes, err)) return -1;
    t = calloc(1, sizeof *t);
    if (!t) return tokenizer_no_memory(err, "the tokenizer");
    t->base.kind = &kind;
    if (read_section(t, &h, section, err) ||
        added_tokens_read(&t->added, added, added_bytes, 0, 1, err)) {
        unigram_close(&t->base);
        return -1;
    }
    for (size_t i = 0; i < t->added.n; i++) t->lstrip |= t->added.token[i].takes_spaces;
    t->base.n_ids = t->added.n_ids > t->n_pieces ? t->added.n_ids : t->n_pieces;
    *t_ = &t->base;
    return 0;
}
