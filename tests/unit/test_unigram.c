/* test_unigram.c - the Unigram tokenizer, compared with a slow restatement of its definition and,
 * where the shared data is available, with the reference's vectors and sweeps. */
#include "lib/grapheme_tables.h"
#include "naive_unigram.h"
#include "reference.h"
#include "support.h"

typedef struct {
    unigram_data d;
    qemb_tokenizer *t;
    qemb_tokenizer_state *s;
} small;

static void open_small(small *k) {
    qemb_err err = {0};
    unigram_data_seal(&k->d);
    cr_assert_eq(qemb_unigram_open(&k->t, k->d.section.p, k->d.section.n, k->d.added.added,
                                   k->d.added.added_bytes, &err),
                 0, "%s", err.msg);
    k->s = qemb_tokenizer_state_new(k->t);
    cr_assert_not_null(k->s);
}

static void close_small(small *k) {
    qemb_tokenizer_state_free(k->s);
    qemb_tokenizer_close(k->t);
    unigram_data_free(&k->d);
    *k = (small){0};
}

static qemb_tokenizer_result encode_n(const small *k, const char *text, size_t n, size_t limit) {
    qemb_tokenizer_result r = {0};
    qemb_err err = {0};
    cr_assert_eq(qemb_tokenizer_encode(k->s, text, n, limit, &r, &err), 0, "%s", err.msg);
    return r;
}

/* ---- small tokenizers, beside the slow restatement ------------------------------------------- */

static small open_naive(int variant) {
    small k = {0};
    naive_make(&k.d, variant);
    open_small(&k);
    return k;
}

/* Compares all ids of a text with the restatement's. Returns these; the caller frees. */
static bytes check_text(const small *k, const char *text, size_t n) {
    const bytes want = naive_encode(&k->d, text, n);
    const qemb_tokenizer_result r = encode_n(k, text, n, SIZE_MAX);
    cr_assert_eq(r.bytes_left, 0);
    cr_assert_eq(r.n, want.n / 4, "%.300s: got %zu ids, want %zu", text, r.n, want.n / 4);
    for (size_t i = 0; i < r.n; i++) {
        uint32_t id;
        memcpy(&id, want.p + 4 * i, 4);
        cr_assert_eq(r.ids[i], (int32_t)id, "%.300s: id %zu: got %d, want %u", text, i, r.ids[i],
                     id);
    }
    return want;
}

/* A random text of n_units units of the alphabet, the first `few` of a random order. */
static size_t random_text(rng *random, char *text, size_t n_units) {
    const size_t few = 2 + rng_u64(random) % NAIVE_ALPHABET;
    const size_t first = rng_u64(random) % NAIVE_ALPHABET;
    size_t n = 0;
    for (size_t i = 0; i < n_units; i++) {
        const char *unit = naive_alphabet[(first + rng_u64(random) % few) % NAIVE_ALPHABET];
        memcpy(text + n, unit, strlen(unit));
        n += strlen(unit);
    }
    text[n] = 0;
    return n;
}

Test(unigram, agrees_with_its_definition, .timeout = 300) {
    static char text[64 * 12 + 1];
    for (int variant = 0; variant < NAIVE_VARIANTS; variant++) {
        small k = open_naive(variant);
        rng random = {5 + (uint64_t)variant};
        for (int round = 0; round < 6000; round++) {
            const size_t n = random_text(&random, text, 1 + rng_u64(&random) % 24);
            free(check_text(&k, text, n).p);
        }
        close_small(&k);
    }
}

/* Every limit gives the first ids, and says whether some are missing. Small limits make the windows
 * small, so their ends fall on every kind of place. */
Test(unigram, every_limit_gives_the_first_ids, .timeout = 300) {
    static char text[400 * 12 + 1];
    for (int variant = 0; variant < NAIVE_VARIANTS; variant++) {
        small k = open_naive(variant);
        rng random = {50 + (uint64_t)variant};
        for (int round = 0; round < 60; round++) {
            const size_t n = random_text(&random, text, 1 + rng_u64(&random) % 400);
            const bytes want = check_text(&k, text, n);
            for (size_t limit = 0; limit < want.n / 4 + 2; limit++) {
                const qemb_tokenizer_result r = encode_n(&k, text, n, limit);
                cr_assert_eq(r.n, limit < want.n / 4 ? limit : want.n / 4);
                cr_assert_arr_eq((const uint8_t *)r.ids, want.p, 4 * r.n, "limit %zu: %s", limit,
                                 text);
                cr_assert_eq(r.bytes_left > 0, limit < want.n / 4, "limit %zu of %zu: %zu left",
                             limit, want.n / 4, r.bytes_left);
            }
            free(want.p);
        }
        close_small(&k);
    }
}

/* A window has 16,384 bytes of text, and the buffer as many. The filling moves each byte of a text
 * to these borders. What is made of it by itself is not asked: the restatement knows. */
Test(unigram, cuts_only_where_nothing_shows, .timeout = 300) {
    static const char *const fillings[] = {"ab ",          "a",        " ",   "\xE4\xB8\x80",
                                           "\xEF\xAC\x81", "\xC2\xA0", "a\t", "\xCC\x81"};
    static char text[1 << 15];
    for (int variant = 0; variant < NAIVE_VARIANTS; variant++) {
        small k = open_naive(variant);
        rng random = {500 + (uint64_t)variant};
        for (size_t f = 0; f < sizeof fillings / sizeof *fillings; f++) {
            const size_t len = strlen(fillings[f]);
            for (int round = 0; round < 4; round++) {
                size_t n = 0, goal = 16384 - 32 + rng_u64(&random) % 40;
                if (f == 4) goal = goal * 3 / 2; /* 3 bytes become 2 */
                for (size_t j = 0; j < goal / len; j++) memcpy(text + j * len, fillings[f], len);
                n = goal / len * len;
                n += random_text(&random, text + n, 20);
                free(check_text(&k, text, n).p);
            }
        }
        close_small(&k);
    }
}

/* ---- one rule at a time ---------------------------------------------------------------------- */

/* A tokenizer whose pieces are single characters, so that the ids spell the normalized text. */
static small open_spelling(uint32_t spaces) {
    static const char *const pieces[] = {"<unk>",
                                         "\xE2\x96\x81",
                                         "a",
                                         "b",
                                         "f",
                                         "i",
                                         "<",
                                         ">",
                                         "s",
                                         "\xCC\x81",
                                         "\xCC\xA3",
                                         "\xE1\xBA\xA1",
                                         "e",
                                         "\xE3\x82\xAB",
                                         "\xE3\x82\x99",
                                         "\xD8\x80",
                                         "\xC2\x85",
                                         "<mask>",
                                         "\xE4\xB8\x80"};
    small k = {.d.spaces = spaces};
    for (uint32_t i = 0; i < sizeof pieces / sizeof *pieces; i++)
        unigram_data_piece(&k.d, pieces[i], strlen(pieces[i]), i ? -1.0 - i : 0);
    unigram_data_single(&k.d, 0x0A, " ");
    unigram_data_single(&k.d, 0x0D, " ");
    unigram_data_single(&k.d, 0xA0, " ");
    unigram_data_single(&k.d, 0x2581, " ");
    unigram_data_single(&k.d, 0xFB01, "fi");
    unigram_data_single(&k.d, 0xFF1C, "<");
    unigram_data_pair(&k.d, 'a', 0x323, "\xE1\xBA\xA1");
    unigram_data_pair(&k.d, 0x30AB, 0x3099, "b");
    unigram_data_added(&k.d, 17, "<mask>", true);
    open_small(&k);
    return k;
}

/* The text that the ids spell, with _ for U+2581; in static memory. */
static const char *spelled(const small *k, const char *text, size_t n) {
    static char out[4096];
    const qemb_tokenizer_result r = encode_n(k, text, n, SIZE_MAX);
    size_t at = 0;
    for (size_t i = 0; i < r.n; i++) {
        uint8_t piece[16];
        const size_t len = qemb_tokenizer_token_bytes(k->t, (uint32_t)r.ids[i], piece, 16);
        if (r.ids[i] == 1)
            out[at++] = '_';
        else
            memcpy(out + at, piece, len), at += len;
    }
    out[at] = 0;
    return out;
}

Test(unigram, follows_each_rule) {
    static const struct {
        const char *text, *merged, *split; /* with step 3 of bge-m3, and of E5 */
    } cases[] = {
        {"", "", ""},
        {"a", "_a", "_a"},
        {" a", "_a", "_a"},
        {"  a", "_a", "_a"},
        {"a ", "_a_", "_a"},
        {"a  b", "_a_b", "_a_b"},
        {" ", "_", ""},
        {" \n\xC2\xA0", "_", ""},
        {"a\n\nb", "_a_b", "_a_b"},
        {"a\r\nb", "_a_b", "_a_b"}, /* one cluster, one space */
        {"a\xC2\x85\x62",
         "_a\xC2\x85"
         "b",
         "_a_b"}, /* U+0085 is White_Space, and no key */
        {"\xE2\x96\x81\x61", "_a", "_a"},
        /* a cluster of fewer than 6 bytes is replaced as a whole, by its shortest key */
        {"\xEF\xAC\x81", "_fi", "_fi"},
        {"\xEF\xAC\x81\xCC\x81", "_fi", "_fi"},
        {"\xEF\xAC\x81\xCC\x81\xCC\x81", "_fi\xCC\x81\xCC\x81", "_fi\xCC\x81\xCC\x81"},
        {"a\xCC\xA3\xCC\x81", "_\xE1\xBA\xA1", "_\xE1\xBA\xA1"},
        {"a\xCC\xA3\xCC\x81\xCC\x81", "_a\xCC\xA3\xCC\x81\xCC\x81", "_a\xCC\xA3\xCC\x81\xCC\x81"},
        {"\xE3\x82\xAB\xE3\x82\x99", "_\xE3\x82\xAB\xE3\x82\x99", "_\xE3\x82\xAB\xE3\x82\x99"},
        {"\xD8\x80\x61\xCC\xA3", "_\xD8\x80\x61\xCC\xA3", "_\xD8\x80\x61\xCC\xA3"}, /* Prepend */
        {" \xCC\x81", "_\xCC\x81", "_\xCC\x81"},
        /* added tokens, in the raw text alone */
        {"a<mask>b", "_a<mask>_b", "_a<mask>_b"},
        {"a \n<mask> b", "_a<mask>_b", "_a<mask>_b"},
        {" \xC2\x85<mask>", "<mask>", "<mask>"},
        {"a<mask><mask>", "_a<mask><mask>", "_a<mask><mask>"},
        {"<mask> <mask>", "<mask><mask>", "<mask><mask>"},
        {"<mask", "_<<unk>as<unk>", "_<<unk>as<unk>"},
        {"\xEF\xAC\x81<mask>\xCC\x81", "_fi<mask>_\xCC\x81", "_fi<mask>_\xCC\x81"},
        /* unknowns */
        {"zz", "_<unk>", "_<unk>"},
        {"zzazz zz", "_<unk>a<unk>_<unk>", "_<unk>a<unk>_<unk>"},
    };
    for (uint32_t spaces = 0; spaces < 2; spaces++) {
        small k = open_spelling(spaces);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            const char *text = cases[i].text, *want = spaces ? cases[i].split : cases[i].merged;
            const char *got = spelled(&k, text, strlen(text));
            cr_expect_str_eq(got, want, "%s: got %s, want %s", text, got, want);
        }
        cr_expect_str_eq(spelled(&k, "a\0b", 3), "_a<unk>b"); /* NUL is a character */
        close_small(&k);
    }
}

/* The rules that look back, of which few can change an id: on random classes, written as letters,
 * beside the rules restated. */
Test(unigram, ends_clusters_by_the_rules) {
    static const struct {
        char letter;
        uint8_t class;
    } classes[] = {
        {'-', GRAPHEME_OTHER},     {'C', GRAPHEME_CONTROL},   {'X', GRAPHEME_PICTURE},
        {'K', GRAPHEME_CONSONANT}, {'2', GRAPHEME_LV},        {'3', GRAPHEME_LVT},
        {'r', GRAPHEME_CR},        {'n', GRAPHEME_LF},        {'P', GRAPHEME_PREPEND},
        {'S', GRAPHEME_SPACING},   {'E', GRAPHEME_EXTEND},    {'k', GRAPHEME_LINKER},
        {'J', GRAPHEME_JOINER},    {'N', GRAPHEME_NONJOINER}, {'L', GRAPHEME_L},
        {'V', GRAPHEME_V},         {'T', GRAPHEME_T},         {'R', GRAPHEME_REGIONAL},
    };
    enum { N = sizeof classes / sizeof *classes, LENGTH = 12 };
    rng random = {3};
    for (int round = 0; round < 300000; round++) {
        char text[LENGTH + 1] = "";
        uint8_t class[LENGTH];
        const size_t first = rng_u64(&random) % N, few = 1 + rng_u64(&random) % N;
        for (size_t i = 0; i < LENGTH; i++) {
            const size_t c = (first + rng_u64(&random) % few) % N;
            text[i] = classes[c].letter;
            class[i] = classes[c].class;
        }
        grapheme g = grapheme_begin(class[0]);
        for (size_t i = 1; i < LENGTH; i++) {
            cr_assert_eq(!grapheme_continues(&g, class[i]), naive_breaks(text, i), "%s at %zu",
                         text, i);
            g = grapheme_after(g, class[i]);
        }
    }
}

/* Pieces with a score each; the ids of one word, of which the first is U+2581. */
Test(unigram, takes_the_largest_sum_and_the_first_of_equal_ones) {
    small k = {0};
    unigram_data_piece(&k.d, "?", 1, -9);
    unigram_data_piece(&k.d, "\xE2\x96\x81", 3, -1);
    unigram_data_piece(&k.d, "a", 1, -1);
    unigram_data_piece(&k.d, "aa", 2, -2);
    unigram_data_piece(&k.d, "aaa", 3, -2.5);
    unigram_data_piece(&k.d, "b", 1, -1);
    unigram_data_piece(&k.d, "ab", 2, -2);
    unigram_data_piece(&k.d, "<s>", 3, 0); /* found in the text like any other piece */
    open_small(&k);
    static const struct {
        const char *text;
        int32_t ids[5];
        size_t n;
    } cases[] = {
        {"aa", {1, 3}, 2},      /* aa came before a + a */
        {"ab", {1, 6}, 2},      /* ab before a + b */
        {"aaa", {1, 4}, 2},     /* the best sum */
        {"aaaa", {1, 2, 4}, 3}, /* the way by a came to 1 before that by aaa to 3 */
        {"aab", {1, 2, 6}, 3},  /* a + ab: the end is reached from 1 before it is from 2 */
        {"a<s>b", {1, 2, 7, 5}, 4},
        {"zaz", {1, 0, 2, 0}, 4}, /* unknowns, not fused across a piece */
        {"z?", {1, 0}, 2},        /* a piece with the unknown's id is fused, too */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const qemb_tokenizer_result r =
            encode_n(&k, cases[i].text, strlen(cases[i].text), SIZE_MAX);
        cr_expect_eq(r.n, cases[i].n, "%s: got %zu ids", cases[i].text, r.n);
        for (size_t j = 0; j < r.n && j < cases[i].n; j++)
            cr_expect_eq(r.ids[j], cases[i].ids[j], "%s: id %zu: got %d", cases[i].text, j,
                         r.ids[j]);
    }
    close_small(&k);
}

/* Scores like real ones, all of them near each other: whether sums are double, and go on over the
 * whole word, shows in repetitive words of 10,000 characters. */
Test(unigram, sums_a_whole_word_in_double, .timeout = 300) {
    static const char *const units[] = {"a", "ab", "aab", "abcb", "ba\xC3\xA9"};
    static char text[10008];
    rng random = {77};
    small k = {0};
    unigram_data_piece(&k.d, "<unk>", 5, 0);
    unigram_data_piece(&k.d, "\xE2\x96\x81", 3, -3.9355);
    for (uint32_t i = 0; i < 3 + 9 + 27; i++) { /* every word of a, b, c up to three letters */
        char piece[3];
        size_t n = i < 3 ? 1 : i < 12 ? 2 : 3;
        uint32_t j = i < 3 ? i : i < 12 ? i - 3 : i - 12;
        for (size_t c = 0; c < n; c++, j /= 3) piece[c] = "abc"[j % 3];
        /* n times 3.3 with noise of the last bits: sums of different splits nearly agree */
        unigram_data_piece(&k.d, piece, n,
                           -3.3 * (double)n * (1 + (double)(rng_u64(&random) % 8) * 0x1p-52));
    }
    open_small(&k);
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        size_t n = 0;
        while (n < 10000) memcpy(text + n, units[i], strlen(units[i])), n += strlen(units[i]);
        free(check_text(&k, text, n).p);
    }
    close_small(&k);
}
/* ---- limits, errors, hostile text ------------------------------------------------------------ */

Test(unigram, takes_empty_text) {
    small k = open_naive(0);
    cr_expect_eq(encode_n(&k, NULL, 0, SIZE_MAX).n, 0);
    cr_expect_eq(encode_n(&k, NULL, 0, 0).bytes_left, 0);
    cr_expect_eq(encode_n(&k, "\x01\x01", 2, 0).bytes_left, 0); /* no ids, so none are cut off */
    cr_expect_gt(encode_n(&k, "a", 1, 0).bytes_left, 0);
    close_small(&k);
}

/* Text far behind the limit is not read, nor is the rest of a word without spaces. */
Test(unigram, limit_stops_early) {
    enum { N = 1 << 20 };
    small k = open_naive(0);
    char *text = malloc(N);
    cr_assert_not_null(text);
    for (int spaces = 0; spaces < 2; spaces++) {
        for (size_t i = 0; i < N; i++) text[i] = spaces ? "ae "[i % 3] : "ei"[i % 2];
        text[4096] = '\xFF';
        const qemb_tokenizer_result r = encode_n(&k, text, N, 16);
        cr_expect_eq(r.n, 16);
        cr_expect(r.bytes_left > N - 64 && r.bytes_left < N, "got %zu left", r.bytes_left);
        text[4096] = 'e';
    }
    free(text);
    close_small(&k);
}

Test(unigram, refuses_invalid_utf8) {
    static const char *const bad[] = {
        "\x80", "\xC0\x80", "\xE0\x80\x80", "\xED\xA0\x80", "\xF4\x90",        "\xFF",
        "\xC3", "\xE4\xBD", "\xC3\x28",     "\xF0\x9F\x98", "\xF5\x80\x80\x80"};
    static const size_t offsets[] = {0, 1, 7, 8, 9, 100, 16383, 16384, 16385, 70000};
    static char text[70100];
    small k = open_naive(0);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        for (size_t j = 0; j < sizeof offsets / sizeof *offsets; j++) {
            const size_t at = offsets[j], len = strlen(bad[i]);
            char where[32];
            qemb_tokenizer_result r;
            qemb_err err = {0};
            for (size_t c = 0; c < sizeof text; c++) text[c] = "word "[c % 5];
            memcpy(text + at, bad[i], len);
            sprintf(where, "at byte %zu ", at);
            for (size_t more = 0; more <= 50; more += 50) {
                cr_assert_eq(qemb_tokenizer_encode(k.s, text, at + len + more, SIZE_MAX, &r, &err),
                             -1);
                cr_expect_str_eq(err.code, "invalid_utf8");
                cr_expect(strstr(err.msg, where), "%s, want %s", err.msg, where);
            }
            cr_assert_eq(qemb_tokenizer_encode(k.s, text, at, SIZE_MAX, &r, &err), 0);
        }
    }
    close_small(&k);
}

/* Patterns, repeated to 2 MB, under the timeout. Anything quadratic takes hours. */
Test(unigram, is_linear_on_hostile_text, .timeout = 300) {
    static const char *const floods[] = {"b",
                                         "b ",
                                         "ei",
                                         " ",
                                         "\t",
                                         "\xC2\xA0",
                                         "z",
                                         "\xCC\x81",
                                         "a\xCC\xA3\xCC\x81",
                                         "<mask>",
                                         " <mask>",
                                         "<mas",
                                         "\xF0\x9F\x87\xA6",
                                         "\x01",
                                         "\xEF\xAC\x81"};
    small k = open_naive(0);
    for (size_t i = 0; i < sizeof floods / sizeof *floods; i++) {
        const size_t len = strlen(floods[i]), times = (2 << 20) / len;
        char *text = malloc(times * len), *few = malloc(600 * len);
        cr_assert(text && few);
        for (size_t j = 0; j < times; j++) memcpy(text + j * len, floods[i], len);
        memcpy(few, text, 600 * len);
        /* The restatement says what 200 and 600 repetitions make; the rest goes on like that. */
        const bytes a = check_text(&k, few, 200 * len), b = check_text(&k, few, 600 * len);
        const size_t each = (b.n - a.n) / 4, want = a.n / 4 + (times - 200) * each / 400;
        cr_expect_eq(encode_n(&k, text, times * len, SIZE_MAX).n, want, "%s", floods[i]);
        free(a.p), free(b.p), free(text), free(few);
    }
    close_small(&k);
}

/* Before an added token that takes it, and at the end of a text, white space of many windows. */
Test(unigram, strips_megabytes_of_spaces) {
    enum { N = 3 << 20 };
    small k = open_naive(0);
    char *text = malloc(N + 16);
    cr_assert_not_null(text);
    memset(text, ' ', N);
    text[0] = 'x';
    text[1] = '\n';
    memcpy(text + N, "<mask>b", 7);
    qemb_tokenizer_result r = encode_n(&k, text, N + 7, SIZE_MAX);
    cr_assert_eq(r.n, 5); /* U+2581 x <mask> U+2581 b */
    cr_expect_eq(r.ids[2], (int32_t)k.d.n_pieces - 1);
    memcpy(text + N, "</s>b", 5);
    r = encode_n(&k, text, N + 5, SIZE_MAX);
    cr_assert_eq(r.n, 6); /* U+2581 x U+2581 </s> U+2581 b */
    cr_expect_eq(r.ids[2], 4);
    cr_expect_eq(r.ids[3], 2);
    free(text);
    close_small(&k);
}

/* A word whose tokens are certain only at its end has at most 8 MiB. Other words may be longer, and
 * words behind the limit are not looked at. */
Test(unigram, refuses_uncertain_words_over_8_MiB, .timeout = 300) {
    enum { MOST = 8 << 20, N = MOST + 64 };
    small k = open_naive(0);
    char *text = malloc(N);
    qemb_tokenizer_result r;
    qemb_err err = {0};
    cr_assert_not_null(text);
    memset(text, 'b', N);
    cr_expect_eq(encode_n(&k, text, N, SIZE_MAX).n, N + 1);
    memset(text, 'a', N); /* pieces of a's cross every place */
    cr_expect_gt(encode_n(&k, text, MOST - 1, SIZE_MAX).n, MOST / 8);
    cr_expect_eq(qemb_tokenizer_encode(k.s, text, N, SIZE_MAX, &r, &err), -1);
    cr_expect_str_eq(err.code, "too_long");
    cr_expect(strstr(err.msg, "a word too long (got 83"), "%s", err.msg);
    memcpy(text, "b. ", 3);
    r = encode_n(&k, text, N, 2);
    cr_expect_eq(r.n, 2);
    cr_expect_gt(r.bytes_left, MOST);
    cr_expect_eq(qemb_tokenizer_encode(k.s, text, N, 1000, &r, &err), -1);
    cr_expect_eq(encode_n(&k, "b", 1, SIZE_MAX).n, 2);
    free(text);
    close_small(&k);
}

/* ---- hostile sections ------------------------------------------------------------------------ */

/* The section is copied to memory of its exact size: a sanitizer then sees a read past its end. */
static int try_section(const unigram_data *d, size_t n, qemb_err *err) {
    uint8_t *exact = malloc(n ? n : 1);
    qemb_tokenizer *t = NULL;
    cr_assert_not_null(exact);
    if (n) memcpy(exact, d->section.p, n);
    const int rc = qemb_unigram_open(&t, exact, n, d->added.added, d->added.added_bytes, err);
    cr_assert_eq(!rc, t != NULL);
    if (rc) cr_expect_str_eq(err->code, "model_file");
    qemb_tokenizer_close(t);
    free(exact);
    return rc;
}

static void check_refused(unigram_data *d, const char *why) {
    qemb_err err = {0};
    unigram_data_seal(d);
    cr_expect_eq(try_section(d, d->section.n, &err), -1, "not refused: %s", why);
    cr_expect(strstr(err.msg, why), "%s, want: %s", err.msg, why);
    unigram_data_free(d);
}

static unigram_data good(void) {
    unigram_data d;
    naive_make(&d, 0);
    return d;
}

Test(unigram, refuses_bad_sections) {
    unigram_data d = good();
    qemb_err err = {0};
    cr_assert_eq(try_section(&d, d.section.n, &err), 0);
    for (size_t n = 0; n < d.section.n; n++) cr_expect_eq(try_section(&d, n, &err), -1, "%zu", n);
    bytes_add(&d.section, "", 1);
    cr_expect_eq(try_section(&d, d.section.n, &err), -1);
    unigram_data_free(&d);

    d = good(), d.unk = d.n_pieces, check_refused(&d, "the unknown token is no piece (got 38");
    d = good(), d.spaces = 2, check_refused(&d, "unknown header (got spaces 2");
    d = good(), d.n_pairs += UINT32_MAX / 2, check_refused(&d, "the sizes don't add up");
    d = (unigram_data){0}, check_refused(&d, "wrong number of pieces (got 0");
    d = good();
    for (const uint32_t none[3] = {0}; d.n_pairs <= 1 << 20; d.n_pairs++)
        bytes_add(&d.pairs, none, sizeof none);
    check_refused(&d, "too many pairs of characters (got 1048577, want at most 1048576)");
    const double bad[] = {NAN, INFINITY, -INFINITY, 0x1p-60, -1000001};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        d = good();
        memcpy(d.scores.p + 8 * 7, &bad[i], 8);
        check_refused(&d, "piece 7 has a wrong score");
    }
    d = good(), unigram_data_piece(&d, "ab", 2, -1);
    check_refused(&d, "two pieces are the same (got ids 7 and 38");
    d = good(), unigram_data_piece(&d, "\xC3", 1, -1), check_refused(&d, "piece 38 is wrong");
    d = good(), unigram_data_piece(&d, "", 0, -1), check_refused(&d, "piece 38 is wrong");
    d = good(), d.lengths.p[5] = 2, check_refused(&d, "is wrong");
    d = good(), bytes_add(&d.pieces, "a", 1), check_refused(&d, "don't add up (got");
    d = good(), d.lengths.p[37] = 255, check_refused(&d, "piece 37 is wrong");
    d = good(), unigram_data_single(&d, 0xFF1E, ""), check_refused(&d, "character 13 is wrong");
    d = good(), unigram_data_single(&d, 0x110000, ""), check_refused(&d, "character 13 is wrong");
    d = good(), unigram_data_single(&d, 0xD800, ""), check_refused(&d, "character 13 is wrong");
    d = good(), unigram_data_pair(&d, 'e', 0x301, ""), check_refused(&d, "pair 2 is wrong");
    d = good(), unigram_data_pair(&d, 'e', 0xDC00, ""), check_refused(&d, "pair 2 is wrong");
    d = good(), unigram_data_single(&d, 0x10FFFF, "\xC3"), check_refused(&d, "character 13 is");
    d = good(), unigram_data_single(&d, 0x10FFFF, "x"), d.replacements.n--;
    check_refused(&d, "character 13 is wrong");
    d = good(), unigram_data_added(&d, 4, "", false), check_refused(&d, "a wrong length (got 0");
    d = good(), unigram_data_added(&d, 2, "<t>", true), check_refused(&d, "an id comes twice");
}

/* Any byte changed: refused with one error, or opened, and then texts give ids that exist. */
Test(unigram, survives_changed_bytes, .timeout = 300) {
    static const char text[] = "a <mask>\xEF\xAC\x81\xCC\x81 abcab \xE4\xB8\x80<s>  zz\n";
    unigram_data d = good();
    rng random = {9};
    for (size_t i = 0; i < d.section.n; i++) {
        const uint8_t was = d.section.p[i];
        qemb_tokenizer *t;
        qemb_err err = {0};
        d.section.p[i] ^= (uint8_t)(1 + rng_u64(&random) % 255);
        if (!qemb_unigram_open(&t, d.section.p, d.section.n, d.added.added, d.added.added_bytes,
                               &err)) {
            qemb_tokenizer_state *s = qemb_tokenizer_state_new(t);
            qemb_tokenizer_result r;
            cr_assert_eq(qemb_tokenizer_encode(s, text, sizeof text, SIZE_MAX, &r, &err), 0);
            for (size_t j = 0; j < r.n; j++)
                cr_assert(r.ids[j] >= 0 && (uint32_t)r.ids[j] < qemb_tokenizer_n_ids(t));
            qemb_tokenizer_state_free(s);
            qemb_tokenizer_close(t);
        } else {
            cr_expect_str_eq(err.code, "model_file");
        }
        d.section.p[i] = was;
    }
    unigram_data_free(&d);
}

/* Added tokens with ids of their own: the largest id counts. */
Test(unigram, counts_ids_of_added_tokens) {
    small k = {0};
    naive_make(&k.d, 0);
    unigram_data_added(&k.d, 1000, "<x>", false);
    open_small(&k);
    cr_expect_eq(qemb_tokenizer_n_ids(k.t), 1001);
    const qemb_tokenizer_result r = encode_n(&k, "<x>", 3, SIZE_MAX);
    cr_expect(r.n == 1 && r.ids[0] == 1000);
    cr_expect_eq(qemb_tokenizer_token_bytes(k.t, 1000, NULL, 0), 0);
    close_small(&k);
}

/* ---- the reference's vectors ----------------------------------------------------------------- */

static small open_real(const char *path, bool e5) {
    small k = {0};
    cr_assert_eq(unigram_data_read(&k.d, path, e5), 0);
    open_small(&k);
    return k;
}

/* Whether ids are those of our result, between <s> and </s> if the case is of the template. */
static bool same_ids(const json_t *ids, qemb_tokenizer_result r, bool template) {
    size_t n = json_array_size(ids), at = 0;
    if (template) {
        if (n < 2 || json_integer_value(json_array_get(ids, 0)) != 0 ||
            json_integer_value(json_array_get(ids, n - 1)) != 2)
            return false;
        at = 1, n -= 2;
    }
    if (n != r.n) return false;
    for (size_t i = 0; i < n; i++)
        if (json_integer_value(json_array_get(ids, at + i)) != r.ids[i]) return false;
    return true;
}

/* Compares every case of a file of JSON lines. */
static void check_vectors(const small *k, const char *path, size_t want_cases) {
    FILE *f = fopen(path, "r");
    char *line = NULL;
    size_t cap = 0, cases = 0;
    cr_assert_not_null(f);
    while (getline(&line, &cap, f) > 0) {
        json_t *j = json_loads(line, JSON_ALLOW_NUL, NULL);
        const json_t *text = json_object_get(j, "text"), *ids = json_object_get(j, "ids");
        const char *category = json_string_value(json_object_get(j, "cat"));
        cr_assert(text && ids && category, "%s: case %zu has no text or ids", path, cases);
        const size_t n = json_string_length(text);
        const qemb_tokenizer_result r = encode_n(k, json_string_value(text), n, SIZE_MAX);
        cr_expect(same_ids(ids, r, !strcmp(category, "template")), "%s: got other ids for %.200s",
                  path, line);
        cr_expect_eq(r.bytes_left, 0);
        cases++;
        json_decref(j);
    }
    cr_expect_eq(cases, want_cases, "%s: got %zu cases", path, cases);
    free(line);
    fclose(f);
}

/* ---- the reference's sweeps: one digest for each 4,096 cases --------------------------------- */

static void sweep_vocabulary(const small *k, const json_t *digests) {
    sweep w = sweep_of(k->s, digests, "vocab");
    size_t same = 0;
    uint32_t id;
    for (id = 0; id < k->d.n_pieces; id++) {
        char piece[256], text[256];
        const size_t bytes = qemb_tokenizer_token_bytes(k->t, id, (uint8_t *)piece, sizeof piece);
        size_t n = 0;
        sweep_block(&w, id, false);
        for (size_t i = 0; i < bytes; i++) {
            const bool mark = bytes - i >= 3 && !memcmp(piece + i, "\xE2\x96\x81", 3);
            text[n++] = mark ? ' ' : piece[i];
            if (mark) i += 2;
        }
        const qemb_tokenizer_result r = sweep_case(&w, text, n);
        same += r.n == 1 && r.ids[0] == (int32_t)id;
    }
    sweep_block(&w, id, true);
    cr_expect_eq(same, 154622 + 5, "got %zu", same); /* the added tokens, too */
}

/* The table has the classes of the reference, range by range. The two that split Extend are left to
 * the sweeps. */
Test(unigram, has_the_classes_of_the_reference) {
    static const struct {
        const char *name;
        uint8_t class;
    } names[] = {{"control", GRAPHEME_CONTROL},
                 {"prepend", GRAPHEME_PREPEND},
                 {"spacing_mark", GRAPHEME_SPACING},
                 {"extended_pictographic", GRAPHEME_PICTURE},
                 {"incb_consonant", GRAPHEME_CONSONANT},
                 {"incb_linker", GRAPHEME_LINKER},
                 {"extend", GRAPHEME_EXTEND}};
    static uint8_t class[0x110000];
    const char *path;
    size_t seen = 0;
    NEED(path, "encoder/grapheme_tables.json");
    for (size_t i = 0; i < sizeof grapheme_ranges / sizeof *grapheme_ranges; i++)
        for (uint32_t c = grapheme_ranges[i].first; c <= grapheme_ranges[i].last; c++)
            class[c] = grapheme_ranges[i].class;
    json_t *tables = json_load_file(path, 0, NULL);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const json_t *ranges = json_object_get(tables, names[i].name);
        for (size_t j = 0; j < json_array_size(ranges); j++) {
            const json_t *range = json_array_get(ranges, j);
            const json_int_t first = json_integer_value(json_array_get(range, 0));
            const json_int_t last = json_integer_value(json_array_get(range, 1));
            for (json_int_t c = first; c <= last; c++, seen++) {
                const bool split = c == 0x0A || c == 0x0D || c == 0x200C || c == 0x200D ||
                                   class[c] == GRAPHEME_LINKER;
                cr_expect(split || class[c] == names[i].class, "U+%04llX is %d", (long long)c,
                          class[c]);
            }
        }
    }
    cr_expect_eq(seen, 3895 + 27 + 381 + 3537 + 240 + 6 + 2238, "got %zu", seen);
    cr_expect_eq(class[0x94D], GRAPHEME_LINKER);
    json_decref(tables);
}

Test(unigram, agrees_with_the_reference, .timeout = 600) {
    const char *path;
    NEED(path, "encoder/bge-m3.tokenizer.json.xz");
    small k = open_real(path, false);
    cr_expect_eq(k.d.n_singles, 4837);
    cr_expect_eq(k.d.n_pairs, 675);
    cr_expect_eq(qemb_tokenizer_n_ids(k.t), 250002);
    NEED(path, "encoder/vectors_public.jsonl");
    check_vectors(&k, path, 1019);
    check_vectors(&k, path, 1019); /* from a warm cache */
    NEED(path, "encoder/sweep_digests.json");
    json_t *digests = json_load_file(path, 0, NULL);
    sweep_code_points(k.s, digests, "class", "x%y %%1%\n");
    sweep_code_points(k.s, digests, "cluster", "e%\xCC\xA3\xCC\x81%");
    sweep_code_points(k.s, digests, "graph", "\xC2\xAA\xCC\x81%\xCD\x84\xCC\x81%\xC2\xAA\xCC\x81%");
    sweep_vocabulary(&k, digests);
    json_decref(digests);
    close_small(&k);
}

Test(unigram, agrees_with_the_reference_of_e5, .timeout = 600) {
    const char *path;
    NEED(path, "encoder/bge-m3.tokenizer.json.xz");
    small k = open_real(path, true);
    NEED(path, "encoder/vectors_e5.jsonl");
    check_vectors(&k, path, 178);
    close_small(&k);
}
