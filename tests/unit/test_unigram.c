/* test_unigram.c - the Unigram tokenizer, compared with a slow restatement of its definition and,
 * where the shared data is available, with the reference's vectors and sweeps. */
#include "support.h"
#include "unigram_data.h"

#include <criterion/criterion.h>

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

/* ---- the reference's vectors ----------------------------------------------------------------- */

/* The path of a file of the shared data, in static memory, or NULL. */
static const char *shared_file(const char *name) {
    static char path[4096];
    const char *root = getenv("QEMB_SHARED");
    snprintf(path, sizeof path, "%s/encoder/%s", root && *root ? root : "../shared", name);
    FILE *f = fopen(path, "r");
    if (f) fclose(f);
    return f ? path : NULL;
}

/* Sets the path; without the file the test is skipped and names it. */
#define NEED(path, name)                                                                           \
    if (!((path) = shared_file(name)))                                                             \
    cr_skip_test("%s is not there: set QEMB_SHARED to the directory above encoder/", name)

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

typedef struct {
    const small *k;
    const json_t *digests;
    const char *name;
    uint64_t h;
    size_t done, bad;
} sweep;

static void digest(sweep *w, uint32_t id) { w->h = (w->h ^ id) * UINT64_C(0x100000001b3); }

static void sweep_case(sweep *w, const char *text, size_t n) {
    const qemb_tokenizer_result r = encode_n(w->k, text, n, SIZE_MAX);
    for (size_t i = 0; i < r.n; i++) digest(w, (uint32_t)r.ids[i]);
    digest(w, 0xFFFFFFFF);
}

/* Call it before case number `at` of the sweep, and with last = true at the sweep's end. */
static void sweep_block(sweep *w, size_t at, bool last) {
    char hex[20], first[16];
    if (at % 4096 && !last) return;
    if (at) {
        snprintf(first, sizeof first, "%06zx", (at - 1) / 4096 * 4096);
        snprintf(hex, sizeof hex, "%016llx", (unsigned long long)w->h);
        const char *want = json_string_value(json_object_get(w->digests, first));
        if (want) { /* a block of surrogates alone has none */
            w->bad += strcmp(hex, want) != 0;
            w->done++;
        }
    }
    w->h = UINT64_C(0xcbf29ce484222325);
    if (last) {
        cr_expect_eq(w->done, json_object_size(w->digests), "%s: %zu blocks", w->name, w->done);
        cr_expect_gt(w->done, 0);
        cr_expect_eq(w->bad, 0, "%s: %zu of %zu blocks differ", w->name, w->bad, w->done);
    }
}

static size_t utf8(char *out, uint32_t c) {
    static const uint8_t lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i; i--, c >>= 6) out[i] = (char)(0x80 | (c & 63));
    out[0] = (char)(lead[n] | c);
    return n;
}

/* Sweeps all code points in a context, in which % stands for the code point. */
static void sweep_code_points(const small *k, const json_t *digests, const char *name,
                              const char *context) {
    sweep w = {.k = k, .digests = json_object_get(digests, name), .name = name};
    for (uint32_t c = 0; c < 0x110000; c++) {
        char text[64];
        size_t n = 0;
        sweep_block(&w, c, false);
        if (c >= 0xD800 && c < 0xE000) continue;
        for (const char *p = context; *p; p++) {
            if (*p == '%')
                n += utf8(text + n, c);
            else
                text[n++] = *p;
        }
        sweep_case(&w, text, n);
    }
    sweep_block(&w, 0x110000, true);
}

static void sweep_vocabulary(const small *k, const json_t *digests) {
    sweep w = {.k = k, .digests = json_object_get(digests, "vocab"), .name = "vocab"};
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
        sweep_case(&w, text, n);
        const qemb_tokenizer_result r = encode_n(k, text, n, SIZE_MAX);
        same += r.n == 1 && r.ids[0] == (int32_t)id;
    }
    sweep_block(&w, id, true);
    cr_expect_eq(same, 154622 + 5, "got %zu", same); /* the added tokens, too */
}

Test(unigram, agrees_with_the_reference, .timeout = 600) {
    const char *path;
    NEED(path, "bge-m3.tokenizer.json.xz");
    small k = open_real(path, false);
    cr_expect_eq(k.d.n_singles, 4837);
    cr_expect_eq(k.d.n_pairs, 675);
    cr_expect_eq(qemb_tokenizer_n_ids(k.t), 250002);
    NEED(path, "vectors_public.jsonl");
    check_vectors(&k, path, 1019);
    check_vectors(&k, path, 1019); /* from a warm cache */
    NEED(path, "sweep_digests.json");
    json_t *digests = json_load_file(path, 0, NULL);
    sweep_code_points(&k, digests, "class", "x%y %%1%\n");
    sweep_code_points(&k, digests, "cluster", "e%\xCC\xA3\xCC\x81%");
    sweep_code_points(&k, digests, "graph", "\xC2\xAA\xCC\x81%\xCD\x84\xCC\x81%\xC2\xAA\xCC\x81%");
    sweep_vocabulary(&k, digests);
    json_decref(digests);
    close_small(&k);
}

Test(unigram, agrees_with_the_reference_of_e5, .timeout = 600) {
    const char *path;
    NEED(path, "bge-m3.tokenizer.json.xz");
    small k = open_real(path, true);
    NEED(path, "vectors_e5.jsonl");
    check_vectors(&k, path, 178);
    close_small(&k);
}
