/* test_tokenizer.c - the tokenizer, compared with its definition and, where the shared data is
 * available, with the reference's test vectors. Merging is compared with a slow implementation. */
#include "reference.h"
#include "support.h"
#include "tokenizer_data.h"

/* ---- small tokenizers ------------------------------------------------------------------------ */

/* A tokenizer under construction: merges and added tokens, by their text. */
typedef struct {
    tokenizer_data d;
    qemb_tokenizer *t;
    qemb_tokenizer_state *s;
} small;

/* The index of a byte in GPT-2's alphabet: first the printable bytes of Latin-1, then the rest. */
static uint32_t byte_id(unsigned b) {
    unsigned id = 0;
    bool prints[256];
    for (unsigned i = 0; i < 256; i++) prints[i] = (i > 32 && i < 127) || (i > 160 && i != 173);
    for (unsigned i = 0; i < 256; i++) id += prints[i] == prints[b] ? i < b : prints[i];
    return id;
}

/* Adds the merge of two ids; returns the new id. */
static uint32_t add_merge(small *k, uint32_t l, uint32_t r) {
    tokenizer_data *d = &k->d;
    d->merges = realloc(d->merges, (d->n_merges + 1) * 2 * sizeof *d->merges);
    cr_assert_not_null(d->merges);
    d->merges[2 * d->n_merges] = l;
    d->merges[2 * d->n_merges + 1] = r;
    return 256 + d->n_merges++;
}

static uint32_t find_merge(const small *k, uint32_t l, uint32_t r) {
    for (uint32_t i = 0; i < k->d.n_merges; i++)
        if (k->d.merges[2 * i] == l && k->d.merges[2 * i + 1] == r) return 256 + i;
    return UINT32_MAX;
}

/* The definition of BPE: apply merge 0 everywhere, left to right, then merge 1, and so on. */
static size_t slow_bpe(const small *k, const char *text, size_t n, uint32_t *ids) {
    for (size_t i = 0; i < n; i++) ids[i] = byte_id((uint8_t)text[i]);
    for (uint32_t m = 0; m < k->d.n_merges; m++) {
        size_t out = 0;
        for (size_t i = 0; i < n; i++, out++) {
            bool fits =
                i + 1 < n && ids[i] == k->d.merges[2 * m] && ids[i + 1] == k->d.merges[2 * m + 1];
            ids[out] = fits ? 256 + m : ids[i];
            i += fits;
        }
        n = out;
    }
    return n;
}

/* Adds the merges that make text one token; returns its id. Earlier words stay single tokens. */
static uint32_t add_word(small *k, const char *text, size_t n) {
    uint32_t ids[64];
    cr_assert_leq(n, sizeof ids / sizeof *ids);
    while (slow_bpe(k, text, n, ids) > 1) add_merge(k, ids[0], ids[1]);
    return ids[0];
}

static void open_small(small *k) {
    qemb_err err;
    int rc =
        qemb_tokenizer_open(&k->t, k->d.merges, k->d.n_merges, k->d.added, k->d.added_bytes, &err);
    cr_assert_eq(rc, 0, "%s", rc ? err.msg : "");
    k->s = qemb_tokenizer_state_new(k->t);
    cr_assert_not_null(k->s);
}

static void close_small(small *k) {
    qemb_tokenizer_state_free(k->s);
    qemb_tokenizer_close(k->t);
    tokenizer_data_free(&k->d);
    *k = (small){0};
}

static qemb_tokenizer_result encode_n(const small *k, const char *text, size_t n, size_t limit) {
    qemb_tokenizer_result r = {0};
    qemb_err err;
    int rc = qemb_tokenizer_encode(k->s, text, n, limit, &r, &err);
    cr_assert_eq(rc, 0, "%s", rc ? err.msg : "");
    return r;
}

/* The bytes of ids, NUL-terminated, malloc'ed. */
static char *bytes_of(const small *k, qemb_tokenizer_result r, size_t *n) {
    size_t cap = 1;
    char *text;
    for (size_t i = 0; i < r.n; i++)
        cap += qemb_tokenizer_token_bytes(k->t, (uint32_t)r.ids[i], NULL, 0);
    text = malloc(cap);
    cr_assert_not_null(text);
    *n = 0;
    for (size_t i = 0; i < r.n; i++)
        *n += qemb_tokenizer_token_bytes(k->t, (uint32_t)r.ids[i], (uint8_t *)text + *n, cap - *n);
    text[*n] = 0;
    return text;
}

/* ---- step 3: pre-tokens ---------------------------------------------------------------------- */

/* want is the text with | between its pre-tokens. The merges make every pre-token one token. Then
 * merges of lower priority would join each two neighbours if they were not split. */
static void check_split(const char *want) {
    small k = {0};
    uint32_t ids[64], n = 0;
    char text[256];
    size_t len = 0;
    qemb_tokenizer_result r;
    for (const char *p = want, *end; *p; p = end + (*end == '|')) {
        end = strchr(p, '|') ? strchr(p, '|') : p + strlen(p);
        ids[n++] = add_word(&k, p, (size_t)(end - p));
        memcpy(text + len, p, (size_t)(end - p));
        len += (size_t)(end - p);
    }
    for (uint32_t i = 0; i + 1 < n; i++)
        if (find_merge(&k, ids[i], ids[i + 1]) == UINT32_MAX) add_merge(&k, ids[i], ids[i + 1]);
    open_small(&k);
    r = encode_n(&k, text, len, SIZE_MAX);
    cr_expect_eq(r.n, n, "%s: got %zu pre-tokens, want %u", want, r.n, n);
    for (size_t i = 0; i < r.n && i < n; i++)
        cr_expect_eq((uint32_t)r.ids[i], ids[i], "%s: pre-token %zu", want, i);
    close_small(&k);
}

Test(tokenizer, splits_as_defined) {
    static const char *const cases[] = {
        "Hello| world",
        /* contractions: any case, the long s too, anywhere */
        "don|'t",
        "DON|'T",
        "I|'ll",
        "we|'Re",
        "I|'ve",
        "I|'m",
        "he|'d",
        "it|'s",
        "x|'\xC5\xBF|t",
        "a|'t|op",
        "a|'ll",
        "a|'lx",
        "a|'r",
        "a| '|s",
        "a|'x",
        "a|''|s",
        "'\xE2\x80\x99|s",
        "a|\xE2\x80\x99s",
        /* one leading character joins letters: anything but CR, LF, letter, number */
        "a|-b",
        "a|\tb",
        "a|\xC2\xA0  |\xC2\xA0z",
        "a|\xE3\x80\x82\xE4\xBD\xA0\xE5\xA5\xBD",
        "a|\xCC\x96z",
        "\r|b",
        "\n|b",
        "((|b",
        /* numbers one by one, of any script and kind */
        "1|2|3",
        "a|1|b",
        " |1",
        "\xD9\xA1|\xC2\xBD|\xE2\x85\xA7",
        /* punctuation: takes one space before it, and CR and LF after it */
        "a| !!",
        "a|!!\r\n\n|b",
        "a| !\n| \n",
        "a|\xC2\xA0|!",
        "a|\t|!",
        /* white space up to its last line end; else its last character belongs to the next piece */
        "a|  | b",
        "a|  | |1",
        "a|  \n \r\n|  | b",
        "a|\t\t|\tb",
        "a|  ",
        "a|\xE3\x80\x80|\xE3\x80\x80z",
        "\xC2\x85|\xC2\x85z",
        "\xE2\x80\xA8\n",
        /* these are not white space */
        "a|\xEF\xBB\xBF\xE2\x80\x8B",
        "\x1C\x1D\x1E\x1F",
        "\xE1\xA0\x8E\n",
        /* marks are not letters; letters outside the BMP are */
        "\xE0\xA4\x95|\xE0\xA4\xBE\xE0\xA4\x95",
        "\xF0\x90\x90\x80\xF0\x90\x90\xA8|\xF0\x9F\x98\x80",
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check_split(cases[i]);
}

/* ---- step 2: NFC ----------------------------------------------------------------------------- */

/* With no merges the ids are the bytes of the normalized text. */
static void check_nfc(const small *k, const char *text, size_t n, const char *want, size_t n_want) {
    size_t n_got;
    char *got = bytes_of(k, encode_n(k, text, n, SIZE_MAX), &n_got);
    cr_expect(n_got == n_want && !memcmp(got, want, n_want), "NFC of %s: got %s, want %s", text,
              got, want);
    free(got);
}

static const char *const nfc_cases[][2] = {
    {"e\xCC\x81", "\xC3\xA9"},
    {"a\xCC\x96\xCC\x81z", "\xC3\xA1\xCC\x96z"}, /* joins across a lower class */
    {"a\xCC\x81\xCC\x96", "\xC3\xA1\xCC\x96"},   /* ordered first */
    {"e\xCC\xA3\xCC\x82", "\xE1\xBB\x87"},       /* twice */
    {"\xC3\xAA\xCC\xA3", "\xE1\xBB\x87"},        /* the mark goes below what was joined */
    {"q\xCC\x87\xCC\xA3", "q\xCC\xA3\xCC\x87"},  /* ordered, nothing to join */
    {"a\xCC\x82\xCC\x81\xCC\x80", "\xE1\xBA\xA5\xCC\x80"},
    {"\xE2\x84\xAB", "\xC3\x85"},                 /* singleton: angstrom sign */
    {"\xE0\xA5\x98", "\xE0\xA4\x95\xE0\xA4\xBC"}, /* excluded from composition */
    {"\xEF\xAC\x81", "\xEF\xAC\x81"},             /* compatibility only: stays */
    {"\xE1\x84\x80\xE1\x85\xA1", "\xEA\xB0\x80"}, /* Hangul L V */
    {"\xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8", "\xEA\xB0\x81"},
    {"\xEA\xB0\x80\xE1\x86\xA8", "\xEA\xB0\x81"}, /* LV + T */
    {"\xEA\xB0\x81\xE1\x86\xA8", "\xEA\xB0\x81\xE1\x86\xA8"},
    {"\xEA\xB0\x80\xE1\x86\xA7", "\xEA\xB0\x80\xE1\x86\xA7"}, /* 11A7 is no tail */
    {"\xE0\xA7\x87\xE0\xA6\xBE", "\xE0\xA7\x8B"},             /* a starter that joins */
    {"\xE0\xA6\x95\xE0\xA6\xBE", "\xE0\xA6\x95\xE0\xA6\xBE"},
    {"\xE0\xA7\x87\xCC\x81\xE0\xA6\xBE", "\xE0\xA7\x87\xCC\x81\xE0\xA6\xBE"}, /* blocked */
    {"a\xCC\x8D\xCC\x81", "a\xCC\x8D\xCC\x81"}, /* blocked by its own class */
    {"\xCC\x81\xCC\xA3", "\xCC\xA3\xCC\x81"},   /* no starter at all */
    {">\xCC\xB8", "\xE2\x89\xAF"},
    {"\xF0\x9D\x85\x9E", "\xF0\x9D\x85\x97\xF0\x9D\x85\xA5"},
    {"\xF0\x9D\x85\xA0", "\xF0\x9D\x85\x98\xF0\x9D\x85\xA5\xF0\x9D\x85\xAE"}, /* 4 to 12 bytes */
    {"\xE0\xBD\xB3", "\xE0\xBD\xB1\xE0\xBD\xB2"},
    /* younger than Unicode 9: U+1ABF has no class, U+11938 does not compose */
    {"a\xCC\x81\xE1\xAA\xBF", "\xC3\xA1\xE1\xAA\xBF"},
    {"a\xE1\xAA\xBF\xCC\x81", "a\xE1\xAA\xBF\xCC\x81"},
    {"\xF0\x91\xA4\xB5\xF0\x91\xA4\xB0", "\xF0\x91\xA4\xB5\xF0\x91\xA4\xB0"},
};

Test(tokenizer, normalizes_as_unicode_9) {
    small k = {0};
    open_small(&k);
    for (size_t i = 0; i < sizeof nfc_cases / sizeof *nfc_cases; i++) {
        const char *text = nfc_cases[i][0], *want = nfc_cases[i][1];
        size_t n = strlen(text), m = strlen(want), at = 0, want_at = 0;
        char many[4096], many_want[4096];
        check_nfc(&k, text, n, want, m);
        check_nfc(&k, want, m, want, m);
        while (at + n + 3 < sizeof many / 3) { /* again within other text, repeated */
            at += (size_t)sprintf(many + at, "x\xC3\xA9 %s\n", text);
            want_at += (size_t)sprintf(many_want + want_at, "x\xC3\xA9 %s\n", want);
        }
        check_nfc(&k, many, at, many_want, want_at);
    }
    close_small(&k);
}

/* A base and 5,000 marks of classes 230, 220, 230, ...: all 220s come first, the first 230
 * joins. */
Test(tokenizer, orders_long_runs_of_marks) {
    enum { N = 2500 };
    static char text[1 + 4 * N], want[2 + 4 * N];
    small k = {0};
    text[0] = 'e';
    memcpy(want, "\xC3\xA9", 2);
    for (size_t i = 0; i < N; i++) {
        memcpy(text + 1 + 4 * i, "\xCC\x81\xCC\x96", 4);
        memcpy(want + 2 + 2 * i, "\xCC\x96", 2);
        if (i) memcpy(want + 2 * N + 2 * i, "\xCC\x81", 2);
    }
    open_small(&k);
    check_nfc(&k, text, sizeof text, want, sizeof want - 2);
    close_small(&k);
}

/* ---- step 1: added tokens -------------------------------------------------------------------- */

static void check_ids(const small *k, const char *text, const int32_t *want, size_t n) {
    qemb_tokenizer_result r = encode_n(k, text, strlen(text), SIZE_MAX);
    cr_expect_eq(r.n, n, "%s: got %zu ids, want %zu", text, r.n, n);
    for (size_t i = 0; i < r.n && i < n; i++)
        cr_expect_eq(r.ids[i], want[i], "%s: id %zu: got %d, want %d", text, i, r.ids[i], want[i]);
    cr_expect_eq(r.bytes_left, 0);
}

#define CHECK_IDS(k, text, ...)                                                                    \
    check_ids(k, text, (const int32_t[]){__VA_ARGS__},                                             \
              sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t))
#define B(c) (int32_t) byte_id(c)

static void add_token(small *k, uint32_t id, const char *text) {
    tokenizer_data_add(&k->d, id, text, strlen(text));
}

Test(tokenizer, finds_added_tokens_leftmost_longest) {
    small k = {0};
    int32_t ab = (int32_t)add_word(&k, "ab", 2), spaces = (int32_t)add_word(&k, "  ", 2);
    add_token(&k, 300, "<a>");
    add_token(&k, 301, "<a><b>");
    add_token(&k, 302, "<a");
    add_token(&k, 310, "\xC3\xA9");
    add_token(&k, 305, "bc");
    open_small(&k);
    cr_expect_eq(qemb_tokenizer_n_ids(k.t), 311);
    CHECK_IDS(&k, "<a>", 300);
    CHECK_IDS(&k, "<a><b>", 301);
    CHECK_IDS(&k, "<a><b", 300, B('<'), B('b'));
    CHECK_IDS(&k, "<<a<a>", B('<'), 302, 300);
    CHECK_IDS(&k, "ab", ab);
    CHECK_IDS(&k, "abc", B('a'), 305);                              /* before any merge */
    CHECK_IDS(&k, "a<a>b", B('a'), 300, B('b'));                    /* no merge across */
    CHECK_IDS(&k, "  <a>  x", spaces, 300, B(' '), B(' '), B('x')); /* as at a text's end */
    CHECK_IDS(&k, "e<a>\xCC\x81", B('e'), 300, B(0xCC), B(0x81));
    CHECK_IDS(&k, "\xC3\xA9", 310);               /* matched in the raw text, */
    CHECK_IDS(&k, "e\xCC\x81", B(0xC3), B(0xA9)); /* not in its NFC */
    cr_expect_eq(qemb_tokenizer_token_bytes(k.t, 300, NULL, 0), 0);
    close_small(&k);

    add_token(&k, 256, "<"); /* one first byte, one byte long */
    add_token(&k, 257, "<|");
    open_small(&k);
    CHECK_IDS(&k, "a<", B('a'), 256);
    CHECK_IDS(&k, "<<||", 256, 257, B('|'));
    close_small(&k);
}

/* Added tokens and changes by NFC, at every distance from the chunk boundaries. */
Test(tokenizer, does_not_depend_on_chunks) {
    enum { WORDS = 40000 };
    static const char *const words[] = {" word",
                                        "\xC3\xA9t",
                                        "<a>",
                                        " e\xCC\x81",
                                        "\n\n  ",
                                        "12",
                                        "\xE4\xBD\xA0\xE5\xA5\xBD",
                                        "\xE3\x80\x82",
                                        " \xD0\xB0"};
    static char text[WORDS * 8];
    static int32_t whole[WORDS * 8];
    rng random = {7};
    small k = {0};
    size_t n = 0, at = 0;
    qemb_tokenizer_result r;
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (i != 2 && i != 3 && i != 5) add_word(&k, words[i], strlen(words[i]));
    add_token(&k, 1000, "<a>");
    open_small(&k);
    for (int i = 0; i < WORDS; i++) {
        const char *w = words[rng_u64(&random) % (sizeof words / sizeof *words)];
        memcpy(text + n, w, strlen(w));
        n += strlen(w);
    }
    r = encode_n(&k, text, n, SIZE_MAX);
    memcpy(whole, r.ids, r.n * sizeof *whole);
    cr_assert_gt(n, 5 << 14);
    /* The limit bounds the length of a chunk: with small limits there are many boundaries. */
    for (size_t limit = 1; limit < r.n; limit += 1 + limit / 3) {
        qemb_tokenizer_result part = encode_n(&k, text, n, limit);
        cr_assert_eq(part.n, limit);
        cr_assert_arr_eq(part.ids, whole, limit * sizeof *whole, "limit %zu", limit);
    }
    /* The text between two added tokens is tokenized like a separate text. */
    while (at < n) {
        const char *a = memmem(text + at, n - at, "<a>", 3);
        size_t end = a ? (size_t)(a - text) : n, done = 0;
        static size_t place;
        if (at == 0) place = 0;
        r = encode_n(&k, text + at, end - at, SIZE_MAX);
        for (done = 0; done < r.n; done++) cr_assert_eq(r.ids[done], whole[place + done]);
        place += r.n;
        if (a) cr_assert_eq(whole[place++], 1000);
        at = end + 3;
    }
    close_small(&k);
}

/* A chunk has about 16,384 bytes. The filling before a text moves each of its bytes to that border
 * once. The same text behind less filling gives the expected ids. */
Test(tokenizer, cuts_only_where_nothing_shows) {
    static const char *const rests[] = {
        "e\xCC\x81x e\xCC\x81 ",
        "\xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8 ",
        "\xC3\xAA\xCC\xA3 x",
        "\xE0\xA5\x98!! ",
        "x\xE0\xA5\x98 ",
        "don't we'll ",
        "12 34  5",
        "a   b \t c\n\n d",
        "!!\n\n!! !\n x",
        "\xE4\xBD\xA0\xE5\xA5\xBD\xE3\x80\x82\xE4\xBD\xA0 ",
        "q\xCC\x87\xCC\xA3z ",
        "1\xCC\xB8",
        "=\xCC\xB8 =\xCC\xB8",
        "\xE0\xA7\x87\xE0\xA6\xBE ",
    };
    static char text[20000];
    small k = {0};
    add_word(&k, "ab", 2);
    add_word(&k, " ab", 3);
    add_word(&k, "\xE0\xA4\xBC!!", 5); /* U+0958 becomes a letter and this mark */
    for (size_t i = 0; i < sizeof rests / sizeof *rests; i++)
        if (strlen(rests[i]) < 12) add_word(&k, rests[i], strlen(rests[i]));
    open_small(&k);
    for (size_t i = 0; i < sizeof rests / sizeof *rests; i++) {
        size_t len = strlen(rests[i]);
        for (size_t fill = 16384 / 3 - 20; fill < 16384 / 3 + 2; fill++) {
            for (size_t shift = 0; shift < 3; shift++) { /* " ab" fill times, then LFs */
                int32_t want[64];
                size_t n, n_fill = 0;
                qemb_tokenizer_result r;
                for (size_t j = 0; j < fill; j++) memcpy(text + 3 * j, " ab", 3);
                memset(text + 3 * fill, '\n', 1 + shift);
                memcpy(text + 3 * fill + 1 + shift, rests[i], len);
                r = encode_n(&k, text + 3 * (fill - 1), 4 + shift + len, SIZE_MAX);
                n = r.n;
                cr_assert_lt(n, 64);
                memcpy(want, r.ids, n * sizeof *want);
                r = encode_n(&k, text, 3 * fill + 1 + shift + len, SIZE_MAX);
                n_fill = fill - 1;
                cr_assert_eq(r.n, n_fill + n, "%s at %zu: got %zu ids, want %zu", rests[i],
                             3 * fill + 1 + shift, r.n, n_fill + n);
                cr_assert_arr_eq(r.ids + n_fill, want, n * sizeof *want, "%s at %zu", rests[i],
                                 3 * fill + 1 + shift);
            }
        }
    }
    close_small(&k);
}

/* ---- step 4: merges -------------------------------------------------------------------------- */

/* Letters that share bytes, so that merges of their parts compete: two letters of one byte, two of
 * two, six of three, two of four. A run of them is one pre-token. */
static const char *const letters[] = {
    "a",
    "b",
    "\xC3\xA9",
    "\xC3\xAA",
    "\xE4\xB8\x80",
    "\xE4\xB8\x81",
    "\xE4\xB9\x80",
    "\xE4\xB9\x81",
    "\xE5\xB8\x80",
    "\xE5\xB9\x81",
    "\xF0\x90\x90\x80",
    "\xF0\x90\x90\x81",
};
enum { N_LETTERS = sizeof letters / sizeof *letters };

/* Merges that do occur: each joins two neighbours in a random word after the merges so far. */
static void add_random_merges(small *k, rng *random, int n_merges) {
    for (int tries = 0; (int)k->d.n_merges < n_merges && tries < 100 * n_merges; tries++) {
        char word[64];
        uint32_t ids[64];
        size_t n = 0, at;
        for (int i = 0; i < 6; i++)
            n += (size_t)sprintf(word + n, "%s", letters[rng_u64(random) % N_LETTERS]);
        n = slow_bpe(k, word, n, ids);
        if (n < 2) continue;
        at = rng_u64(random) % (n - 1);
        if (find_merge(k, ids[at], ids[at + 1]) == UINT32_MAX) add_merge(k, ids[at], ids[at + 1]);
    }
}

Test(tokenizer, merges_by_rank_then_leftmost) {
    rng random = {42};
    size_t lengths[] = {1, 2, 3, 5, 8, 12, 20, 60, 400};
    for (int round = 0; round < 60; round++) {
        small k = {0};
        add_random_merges(&k, &random, 1 + (int)(rng_u64(&random) % 80));
        open_small(&k);
        for (size_t c = 0; c < 200; c++) {
            char text[2048];
            uint32_t want[2048];
            size_t n = 0, n_want, n_letters = lengths[c % (sizeof lengths / sizeof *lengths)];
            size_t few = 1 + rng_u64(&random) % N_LETTERS; /* long runs of the same, too */
            qemb_tokenizer_result r;
            for (size_t i = 0; i < n_letters; i++)
                n += (size_t)sprintf(text + n, "%s", letters[rng_u64(&random) % few]);
            n_want = slow_bpe(&k, text, n, want);
            for (int again = 0; again < 2; again++) { /* the second time from the cache */
                r = encode_n(&k, text, n, SIZE_MAX);
                cr_assert_eq(r.n, n_want, "round %d, %s: got %zu ids, want %zu", round, text, r.n,
                             n_want);
                cr_assert_arr_eq(r.ids, want, n_want * sizeof *want, "round %d, %s", round, text);
            }
        }
        close_small(&k);
    }
}

/* Pre-tokens that differ only in length, in trailing NULs or after the bytes the cache compares. */
Test(tokenizer, cache_tells_words_apart) {
    small k = {0};
    char text[64] = {0};
    open_small(&k);
    for (size_t n = 0; n <= sizeof text; n++) { /* NULs: one pre-token, one id per byte */
        qemb_tokenizer_result r = encode_n(&k, text, n, SIZE_MAX);
        cr_assert_eq(r.n, n);
        for (size_t i = 0; i < n; i++) cr_assert_eq(r.ids[i], B(0));
    }
    memset(text, 'a', sizeof text);
    for (size_t n = 1; n <= sizeof text; n++) {
        for (size_t at = 0; at < n; at++) {
            qemb_tokenizer_result r;
            text[at] = 'b';
            r = encode_n(&k, text, n, SIZE_MAX);
            cr_assert_eq(r.n, n);
            for (size_t i = 0; i < n; i++) cr_assert_eq(r.ids[i], B((uint8_t)text[i]));
            text[at] = 'a';
        }
    }
    close_small(&k);
}

/* ---- limit, empty and invalid text ----------------------------------------------------------- */

Test(tokenizer, limit_gives_the_first_ids) {
    static const char text[] = "ab ab\xC3\xA9 12  e\xCC\x81!! <a>ab \xE4\xBD\xA0 abab";
    small k = {0};
    int32_t whole[64];
    qemb_tokenizer_result r;
    size_t n;
    add_word(&k, " ab", 3);
    add_word(&k, "ab", 2);
    add_token(&k, 1000, "<a>");
    open_small(&k);
    r = encode_n(&k, text, sizeof text - 1, SIZE_MAX);
    n = r.n;
    cr_assert_eq(r.bytes_left, 0);
    memcpy(whole, r.ids, n * sizeof *whole);
    for (size_t limit = 0; limit < n + 3; limit++) {
        size_t covered = 0;
        r = encode_n(&k, text, sizeof text - 1, limit);
        cr_assert_eq(r.n, limit < n ? limit : n);
        cr_assert_arr_eq(r.ids, whole, r.n * sizeof *whole);
        cr_assert_eq(r.bytes_left > 0, limit < n, "limit %zu: %zu bytes left", limit, r.bytes_left);
        for (size_t i = 0; i < r.n; i++)
            covered +=
                r.ids[i] == 1000 ? 3 : qemb_tokenizer_token_bytes(k.t, (uint32_t)r.ids[i], NULL, 0);
        if (limit) covered++; /* NFC shortens the text by a byte as soon as it is read */
        cr_assert_eq(r.bytes_left, sizeof text - 1 - covered, "limit %zu", limit);
    }
    close_small(&k);
}

/* Text far behind the limit is not read. */
Test(tokenizer, limit_stops_early) {
    small k = {0};
    enum { N = 1 << 20 };
    char *text = malloc(N);
    qemb_tokenizer_result r;
    cr_assert_not_null(text);
    for (size_t i = 0; i < N; i++) text[i] = "ab "[i % 3];
    text[4096] = '\xFF';
    open_small(&k);
    r = encode_n(&k, text, N, 16);
    cr_expect_eq(r.n, 16);
    cr_expect_eq(r.bytes_left, N - 16);
    free(text);
    close_small(&k);
}

Test(tokenizer, takes_empty_text_and_nul) {
    small k = {0};
    int32_t ab = (int32_t)add_word(&k, "ab", 2);
    qemb_tokenizer_result r;
    open_small(&k);
    r = encode_n(&k, NULL, 0, SIZE_MAX);
    cr_expect_eq(r.n, 0);
    cr_expect_eq(r.bytes_left, 0);
    r = encode_n(&k, "ab\0ab\0", 6, SIZE_MAX);
    cr_assert_eq(r.n, 4); /* "ab", NUL before letters, NUL */
    cr_expect_eq(r.ids[0], ab);
    cr_expect_eq(r.ids[1], B(0));
    cr_expect_eq(r.ids[2], ab);
    cr_expect_eq(r.ids[3], B(0));
    close_small(&k);
}

Test(tokenizer, refuses_invalid_utf8) {
    static const struct {
        const char *bytes;
    } bad[] = {
        {"\x80"}, /* a continuation byte alone */
        {"\xBF"},
        {"\xC0\x80"}, /* overlong */
        {"\xC1\xBF"},
        {"\xE0\x80\x80"},
        {"\xE0\x9F\xBF"},
        {"\xF0\x80\x80\x80"},
        {"\xF0\x8F\xBF\xBF"},
        {"\xED\xA0\x80"}, /* surrogates */
        {"\xED\xBF\xBF"},
        {"\xF4\x90\x80\x80"}, /* beyond U+10FFFF */
        {"\xF5\x80\x80\x80"},
        {"\xFF"},
        {"\xC3"}, /* truncated */
        {"\xE4\xBD"},
        {"\xE4"},
        {"\xF0\x9F\x98"},
        {"\xC3\x28"}, /* a continuation byte is missing */
        {"\xE4\xBD\x28"},
        {"\xE4\x28\xA0"},
        {"\xF0\x28\x98\x80"},
        {"\xF0\x9F\x28\x80"},
        {"\xF0\x9F\x98\x28"},
    };
    static const size_t offsets[] = {0, 1, 7, 8, 9, 100, 16383, 16384, 16385, 70000};
    static char text[70100];
    small k = {0};
    open_small(&k);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        for (size_t j = 0; j < sizeof offsets / sizeof *offsets; j++) {
            for (int more = 0; more < 2; more++) {
                size_t at = offsets[j], n = strlen(bad[i].bytes);
                char where[32];
                qemb_tokenizer_result r;
                qemb_err err = {0};
                for (size_t c = 0; c < sizeof text; c++) text[c] = "word "[c % 5];
                memcpy(text + at, bad[i].bytes, n);
                n += at + (size_t)more * 50;
                sprintf(where, "byte %zu ", at);
                cr_assert_eq(qemb_tokenizer_encode(k.s, text, n, SIZE_MAX, &r, &err), -1, "%zu", i);
                cr_expect_str_eq(err.code, "invalid_utf8");
                cr_expect(strstr(err.msg, where), "%s, want %s", err.msg, where);
                cr_assert_eq(qemb_tokenizer_encode(k.s, text, at, SIZE_MAX, &r, &err), 0);
            }
        }
    }
    /* the first and last code points of each length */
    check_nfc(&k, "\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80\xED\x9F\xBF\xEE\x80\x80\xF0\x90\x80\x80", 18,
              "\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80\xED\x9F\xBF\xEE\x80\x80\xF0\x90\x80\x80", 18);
    check_nfc(&k, "\xEF\xBF\xBF\xF4\x8F\xBF\xBF", 7, "\xEF\xBF\xBF\xF4\x8F\xBF\xBF", 7);
    close_small(&k);
}

/* ---- hostile text: under the timeout, and nothing lost --------------------------------------- */

/* Encodes pattern, repeated to about n bytes. The ids must cover want bytes per repetition. */
static void check_flood(const small *k, const char *pattern, size_t n, size_t want) {
    size_t len = strlen(pattern), times = n / len, covered = 0;
    char *text = malloc(times * len);
    qemb_tokenizer_result r;
    cr_assert_not_null(text);
    for (size_t i = 0; i < times; i++) memcpy(text + i * len, pattern, len);
    r = encode_n(k, text, times * len, SIZE_MAX);
    for (size_t i = 0; i < r.n; i++)
        covered +=
            r.ids[i] == 60000 ? 13 : qemb_tokenizer_token_bytes(k->t, (uint32_t)r.ids[i], NULL, 0);
    cr_expect_eq(covered, times * want, "%s: got %zu bytes, want %zu", pattern, covered,
                 times * want);
    free(text);
}

Test(tokenizer, is_linear_on_hostile_text, .timeout = 300) {
    static const struct {
        const char *pattern;
        size_t bytes; /* of its NFC, per repetition */
    } floods[] = {
        {"a", 1},
        {" ", 1},
        {"\n", 1},
        {"\t ", 2},
        {"1", 1},
        {"!", 1},
        {"'", 1},
        {"<", 1},
        {"<|", 2},
        {"<|endoftext", 11},
        {"<|endoftext|>", 13},
        {"a<|endoftext|>\xCC\x81", 16},
        {"\xCC\x81\xCC\x96", 4}, /* the classes alternate */
        {"\xCC\x96", 2},
        {"\xEA\xB0\x81\xCC\x96", 5},
        {"\xE2\x84\xAB", 2},
        {"\xF0\x9D\x85\xA0", 12},
        {"\xE4\xBD\xA0", 3},
        {"\xE3\x80\x80", 3},
        {"\xD0\xB0 ", 3},
    };
    small k = {0};
    uint32_t id = byte_id('a'), space = byte_id(' ');
    for (int i = 0; i < 10; i++) id = add_merge(&k, id, id);
    for (int i = 0; i < 7; i++) space = add_merge(&k, space, space);
    add_word(&k, "\xE4\xBD\xA0", 3);
    add_word(&k, "\xCC\x96\xCC\x96", 4);
    tokenizer_data_add(&k.d, 60000, "<|endoftext|>", 13);
    open_small(&k);
    for (size_t i = 0; i < sizeof floods / sizeof *floods; i++) {
        check_flood(&k, floods[i].pattern, 1 << 20, floods[i].bytes);
        check_flood(&k, floods[i].pattern, 5 << 19, floods[i].bytes); /* 7.5 MiB, if it triples */
    }
    close_small(&k);
}

/* A word has at most 8 MiB; a longer one is refused before it takes memory for its merges. Words
 * behind the limit of ids are not looked at. */
Test(tokenizer, refuses_words_over_8_MiB, .timeout = 300) {
    enum { MOST = 8 << 20, N = MOST + 64 };
    small k = {0};
    uint32_t id = byte_id('a');
    for (int i = 0; i < 10; i++) id = add_merge(&k, id, id);
    open_small(&k);
    char *text = malloc(N);
    memset(text, 'a', N);
    qemb_tokenizer_result r;
    qemb_err err = {0};
    cr_expect_eq(encode_n(&k, text, MOST, SIZE_MAX).n, MOST >> 10);
    memcpy(text, "b c ", 4); /* the last space belongs to the long word */
    cr_expect(qemb_tokenizer_encode(k.s, text, MOST + 4, SIZE_MAX, &r, &err) == -1);
    cr_expect_str_eq(err.code, "too_long");
    cr_expect(strstr(err.msg, "a word too long (got 8388609 bytes, want at most 8388608)"));
    cr_expect_eq(encode_n(&k, text, MOST + 3, SIZE_MAX).n, 3 + 1 + (MOST - 1) / 1024 + 10);
    /* the word is in the same chunk as the words before it: they fill the limit */
    for (size_t limit = 1; limit <= 3; limit++) {
        r = encode_n(&k, text, N, limit);
        cr_expect(r.n == limit && r.ids[0] == (int32_t)byte_id('b'));
        cr_expect_eq(r.bytes_left, N - limit, "%zu left", r.bytes_left);
    }
    cr_expect(qemb_tokenizer_encode(k.s, text, N, 4, &r, &err) == -1);
    /* marks, which are put in order all at once */
    for (size_t i = 0; i < N; i += 2) memcpy(text + i, i % 4 ? "\xCC\x96" : "\xCC\x81", 2);
    cr_expect(qemb_tokenizer_encode(k.s, text, N, SIZE_MAX, &r, &err) == -1);
    cr_expect_str_eq(err.code, "too_long");
    cr_expect_eq(encode_n(&k, "b", 1, SIZE_MAX).n, 1);
    free(text);
    close_small(&k);
}

/* At every limit, the ids and what is left are those of the whole text, in one chunk or in many. */
Test(tokenizer, every_limit_in_one_chunk) {
    static const char text[] = "! ! !! \xC3\xA9\xCC\x81 ?! a\xCC\x81!! ! . !<>\xE2\x82\xAC !! !";
    small k = {0};
    add_word(&k, "\xE2\x82\xAC", 3);
    open_small(&k);
    const size_t n = sizeof text - 1;
    qemb_tokenizer_result r = encode_n(&k, text, n, SIZE_MAX);
    int32_t ids[sizeof text];
    const size_t all = r.n;
    memcpy(ids, r.ids, all * sizeof *ids);
    size_t left = 0;
    for (size_t limit = all; limit > 0; limit--) {
        r = encode_n(&k, text, n, limit);
        cr_expect(r.n == limit && !memcmp(r.ids, ids, limit * sizeof *ids));
        cr_expect_eq(r.bytes_left, left, "%zu: %zu, want %zu", limit, r.bytes_left, left);
        left += qemb_tokenizer_token_bytes(k.t, (uint32_t)ids[limit - 1], NULL, 0);
    }
    close_small(&k);
}

/* ---- opening --------------------------------------------------------------------------------- */

static void check_refused(const small *k, const char *why) {
    qemb_tokenizer *t = NULL;
    qemb_err err = {0};
    int rc =
        qemb_tokenizer_open(&t, k->d.merges, k->d.n_merges, k->d.added, k->d.added_bytes, &err);
    cr_assert_eq(rc, -1, "not refused: %s", why);
    cr_expect_null(t);
    cr_expect_str_eq(err.code, "model_file");
    cr_expect(strstr(err.msg, why), "%s, want: %s", err.msg, why);
}

Test(tokenizer, refuses_bad_merges) {
    small k = {0};
    uint32_t id = 0;
    rng random = {3};
    add_merge(&k, 256, 0);
    check_refused(&k, "merge 0 names an id not made yet (got 256, want less than 256)");
    close_small(&k);
    add_merge(&k, 1, 2);
    add_merge(&k, 3, UINT32_MAX);
    check_refused(&k, "merge 1 names an id not made yet (got 4294967295, want less than 257)");
    close_small(&k);
    add_merge(&k, 1, 2);
    add_merge(&k, 2, 1);
    add_merge(&k, 1, 2);
    check_refused(&k, "merge 2 repeats a pair (got 1 2 again");
    close_small(&k);
    for (int i = 0; i < 150000; i++) id = i < 40 ? add_merge(&k, id, id) : id;
    check_refused(&k, "merge 10 makes a token too long (got 2048 bytes, want at most 1024)");
    k.d.n_merges = 10;
    open_small(&k);
    cr_expect_eq(qemb_tokenizer_token_bytes(k.t, 265, NULL, 0), 1024);
    close_small(&k);
    k.d.n_merges = (1 << 20) + 1;
    check_refused(&k, "merges: too many (got 1048577, want at most 1048576)");
    close_small(&k);
    /* Pairs that all hash to one slot: (key * 2^64/phi) >> 55, as 256 merges have 512 slots. */
    while (k.d.n_merges < 256) {
        uint64_t l = rng_u64(&random) % 256, r = rng_u64(&random) % (256 + k.d.n_merges);
        if ((l << 21 | r) * UINT64_C(0x9E3779B97F4A7C15) >> 55 == 77 &&
            find_merge(&k, (uint32_t)l, (uint32_t)r) == UINT32_MAX)
            add_merge(&k, (uint32_t)l, (uint32_t)r);
    }
    check_refused(&k, "the pairs are chosen to collide");
    close_small(&k);
}

Test(tokenizer, refuses_bad_added_tokens) {
    static const struct {
        const char *why, *blob;
        size_t bytes;
    } bad[] = {
        {"at byte 0 is cut off", "\x00\x01\0\0\x01\0\0", 7},
        {"at byte 0 is cut off", "\x00\x01\0\0\x01\0\0\0", 8},
        {"at byte 12 is cut off", "\x00\x01\0\0\x01\0\0\0<\0\0\0\x01\x01", 14},
        {"a wrong length (got 0", "\x00\x01\0\0\0\0\0\0\0\0\0\0", 12},
        {"a wrong length (got 5", "\x00\x01\0\0\x05\0\0\0abcd", 12},
        {"a wrong length (got 4294967295",
         "\x00\x01\0\0\xFF\xFF\xFF\xFF"
         "abcd",
         12},
        {"a wrong length (got 4294967293",
         "\x00\x01\0\0\xFD\xFF\xFF\xFF"
         "abcd",
         12},
        {"padded wrongly", "\x00\x01\0\0\x01\0\0\0<\0\0\x01", 12},
        {"padded wrongly", "\x00\x01\0\0\x01\0\0\0<\x01\0\0", 12},
        {"a wrong id (got 255, want 256", "\xFF\0\0\0\x01\0\0\0<\0\0\0", 12},
        {"a wrong id (got 2147483647", "\xFF\xFF\xFF\x7F\x01\0\0\0<\0\0\0", 12},
        {"a wrong id (got 4294967295", "\xFF\xFF\xFF\xFF\x01\0\0\0<\0\0\0", 12},
        {"not UTF-8 (got 0xC0", "\x00\x01\0\0\x03\0\0\0a\xC0\x80\0", 12},
        {"an id comes twice (got 256", "\x00\x01\0\0\x01\0\0\0<\0\0\0\x00\x01\0\0\x01\0\0\0>\0\0\0",
         24},
        {"two have the same text (got ids 256 and 257",
         "\x00\x01\0\0\x01\0\0\0<\0\0\0\x01\x01\0\0\x01\0\0\0<\0\0\0", 24},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        small k = {0};
        k.d.added =
            malloc(bad[i].bytes); /* of exact size, so that a sanitizer finds reads past the end */
        cr_assert_not_null(k.d.added);
        memcpy(k.d.added, bad[i].blob, bad[i].bytes);
        k.d.added_bytes = bad[i].bytes;
        check_refused(&k, bad[i].why);
        close_small(&k);
    }
    small k = {0};
    char long_token[1025];
    memset(long_token, 'a', sizeof long_token);
    tokenizer_data_add(&k.d, 256, long_token, sizeof long_token);
    check_refused(&k, "a wrong length (got 1025");
    close_small(&k);
}

/* ---- the reference's vectors ----------------------------------------------------------------- */

static small open_real(const char *path) {
    small k = {0};
    cr_assert_eq(tokenizer_data_read(&k.d, path), 0);
    open_small(&k);
    return k;
}

/* Compares every case of a file of JSON lines. An eos >= 0 is appended to our ids first. */
static void check_vectors(const small *k, const char *path, const char *key, int32_t eos,
                          size_t want_cases) {
    FILE *f = fopen(path, "r");
    char *line = NULL;
    size_t cap = 0, cases = 0;
    cr_assert_not_null(f);
    while (getline(&line, &cap, f) > 0) {
        json_t *j = json_loads(line, JSON_ALLOW_NUL, NULL);
        const json_t *pair = json_object_get(j, "pair"), *text = json_object_get(j, "text");
        const json_t *ids = json_object_get(j, key);
        qemb_tokenizer_result r;
        bool same = false;
        cr_assert(text && ids, "%s: case %zu has no text or ids", path, cases);
        if (!pair) {
            r = encode_n(k, json_string_value(text), json_string_length(text), SIZE_MAX);
            same = json_array_size(ids) == r.n + (eos >= 0);
            for (size_t i = 0; i < r.n && same; i++)
                same = json_integer_value(json_array_get(ids, i)) == r.ids[i];
            if (eos >= 0) same &= json_integer_value(json_array_get(ids, r.n)) == eos;
            cr_expect(same, "%s: got other ids for %s", path, line);
        }
        cases += !pair;
        json_decref(j);
    }
    cr_expect_eq(cases, want_cases, "%s: got %zu cases", path, cases);
    free(line);
    fclose(f);
}

Test(tokenizer, agrees_with_reference_vectors, .timeout = 300) {
    const char *path;
    small k;
    NEED(path, "tokenizer/qwen3-embedding-0.6b.tokenizer.json.xz");
    k = open_real(path);
    cr_expect_eq(qemb_tokenizer_n_ids(k.t), 151669);
    NEED(path, "tokenizer/vectors_public.jsonl");
    check_vectors(&k, path, "ids", -1, 1276);
    check_vectors(&k, path, "ids", -1, 1276); /* from a warm cache */
    NEED(path, "tokenizer/vectors_eos.jsonl");
    check_vectors(&k, path, "ids_with_eos", 151643, 11);
    close_small(&k);
    NEED(path, "tokenizer/qwen3-embedding-4b-8b.tokenizer.json.xz");
    k = open_real(path);
    NEED(path, "tokenizer/vectors_4b8b.jsonl");
    check_vectors(&k, path, "ids", -1, 17);
    close_small(&k);
}

/* ---- the reference's sweeps: one digest for each 4,096 cases --------------------------------- */

/* Whether s (n) is valid UTF-8 according to jansson. */
static bool valid_utf8(const char *s, size_t n) {
    json_t *j = json_stringn(s, n);
    json_decref(j);
    return j != NULL;
}

static void sweep_vocabulary(const small *k, const json_t *digests) {
    sweep w = sweep_of(k->s, digests, "vocab");
    uint32_t n_tokens = 256 + k->d.n_merges, id;
    size_t valid = 0, same = 0;
    for (id = 0; id < n_tokens; id++) {
        char text[1024];
        size_t n = qemb_tokenizer_token_bytes(k->t, id, (uint8_t *)text, sizeof text);
        sweep_block(&w, id, false);
        if (!valid_utf8(text, n)) continue;
        qemb_tokenizer_result r = sweep_case(&w, text, n);
        valid++;
        same += r.n == 1 && r.ids[0] == (int32_t)id;
    }
    sweep_block(&w, id, true);
    cr_expect_eq(valid, 150195);
    cr_expect_eq(same, 148286);
}

Test(tokenizer, agrees_with_reference_sweeps, .timeout = 600) {
    const char *path;
    small k;
    json_t *digests;
    NEED(path, "tokenizer/qwen3-embedding-0.6b.tokenizer.json.xz");
    k = open_real(path);
    NEED(path, "tokenizer/sweep_digests.json");
    digests = json_load_file(path, 0, NULL);
    sweep_code_points(k.s, digests, "class", "x%y %%1%\n");
    sweep_code_points(k.s, digests, "nfc", "e%\xCC\xA3\xCC\x81%");
    sweep_vocabulary(&k, digests);
    json_decref(digests);
    close_small(&k);
}
