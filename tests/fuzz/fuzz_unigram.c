/* fuzz_unigram.c - libFuzzer target: any section `unigram`, and any text.
 *
 * The first byte of an input chooses the rest: a section that is changed at some places, or a text
 * for one of four fixed tokenizers and a limit. Every valid text is checked:
 *   - a new state and one used for all earlier texts give the same ids;
 *   - a limit gives the first ids and reports whether some are missing;
 *   - if the restatement of the definition knows the classes of all characters, it gives the same
 *     ids.
 */
#include "tests/fuzz/check.h"
#include "tests/unit/naive_unigram.h"

#include "qemb.h"

enum { NAIVE_BYTES = 64 }; /* longest text for the restatement, which is slow */

typedef struct {
    unigram_data d;
    qemb_tokenizer *t;
    qemb_tokenizer_state *fresh, *warm;
    unsigned long calls;
} fixed;

/* Tokenizer number `variant`. They live until the program ends. */
static fixed *fixed_tokenizer(int variant) {
    static fixed all[NAIVE_VARIANTS];
    fixed *f = &all[variant];
    if (!f->t) {
        naive_make(&f->d, variant);
        CHECK(!qemb_unigram_open(&f->t, f->d.section.p, f->d.section.n, f->d.added.added,
                                 f->d.added.added_bytes, NULL));
        f->warm = qemb_tokenizer_state_new(f->t);
    }
    if (f->calls++ % 64 == 0) { /* a new state costs megabytes, so not every time */
        qemb_tokenizer_state_free(f->fresh);
        f->fresh = qemb_tokenizer_state_new(f->t);
    }
    CHECK(f->fresh && f->warm);
    return f;
}

/* Whether the restatement knows the classes of all characters: those of its alphabet, and letters,
 * ideographs and ASCII, which have none. */
static int naive_knows(const char *text, size_t n) {
    const naive_chars s = naive_decode(text, n);
    int known = 1;
    for (size_t i = 0; i < s.n; i++) {
        const uint32_t c = s.c[i];
        known &= c < 0xA9 || naive_class(c) != '-' || (c >= 0x4E00 && c < 0xA000) || c == 0xE9 ||
                 c == 0x3000 || c == 0x2581 || c == 0xFB01 || c == 0xFF1C || c == 0xFF1E;
    }
    free(s.c);
    return known;
}

static void fuzz_text(int variant, size_t limit, const char *text, size_t len) {
    fixed *f = fixed_tokenizer(variant);
    qemb_tokenizer_result whole, r;
    qemb_err err;
    if (qemb_tokenizer_encode(f->fresh, text, len, SIZE_MAX, &whole, &err)) {
        CHECK(!strcmp(err.code, "invalid_utf8"));
        CHECK(qemb_tokenizer_encode(f->warm, text, len, SIZE_MAX, &r, &err));
        return;
    }
    CHECK(whole.bytes_left == 0);
    CHECK(!qemb_tokenizer_encode(f->warm, text, len, SIZE_MAX, &r, &err));
    CHECK(whole.n == r.n && (!r.n || !memcmp(whole.ids, r.ids, r.n * sizeof *r.ids)));
    CHECK(!qemb_tokenizer_encode(f->warm, text, len, limit, &r, &err));
    CHECK(r.n == (limit < whole.n ? limit : whole.n));
    CHECK(!r.n || !memcmp(whole.ids, r.ids, r.n * sizeof *r.ids));
    CHECK((r.bytes_left > 0) == (r.n < whole.n));
    if (len > NAIVE_BYTES || !naive_knows(text, len)) return;
    const bytes want = naive_encode(&f->d, text, len);
    CHECK(want.n == 4 * whole.n && (!want.n || !memcmp(want.p, whole.ids, want.n)));
    free(want.p);
}

/* data: three bytes for each change of the section, its place and what it is XORed with; behind the
 * first 0, the section of added tokens, if there is more. */
static void fuzz_section(const uint8_t *data, size_t size) {
    static const char text[] = "a <mask>\xEF\xAC\x81\xCC\x81 abcab \xE4\xB8\x80<s>  zz\n";
    unigram_data d;
    qemb_tokenizer *t;
    qemb_tokenizer_result r;
    qemb_err err;
    naive_make(&d, 0);
    for (; size >= 3 && data[2]; data += 3, size -= 3)
        d.section.p[(data[0] | (size_t)data[1] << 8) % d.section.n] ^= data[2];
    const size_t skip = size < 3 ? size : 3, n = size - skip;
    uint8_t *added = malloc(n + 1), *section = malloc(d.section.n);
    CHECK(added && section); /* of exact size, so that ASan sees a read past their ends */
    memcpy(added, n ? data + skip : d.added.added, n);
    memcpy(section, d.section.p, d.section.n);
    if (qemb_unigram_open(&t, section, d.section.n, added, n, &err)) {
        CHECK(!strcmp(err.code, "model_file") && !t);
    } else {
        qemb_tokenizer_state *s = qemb_tokenizer_state_new(t);
        CHECK(s && !qemb_tokenizer_encode(s, text, sizeof text, SIZE_MAX, &r, &err));
        for (size_t i = 0; i < r.n; i++)
            CHECK(r.ids[i] >= 0 && (uint32_t)r.ids[i] < qemb_tokenizer_n_ids(t));
        qemb_tokenizer_state_free(s);
        qemb_tokenizer_close(t);
    }
    free(added);
    free(section);
    unigram_data_free(&d);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) return 0;
    if (data[0] % 64 == 63) /* opening takes a millisecond, and ten with sanitizers */
        fuzz_section(data + 1, size - 1);
    else
        fuzz_text(data[0] % NAIVE_VARIANTS, data[1], (const char *)data + 2, size - 2);
    return 0;
}
