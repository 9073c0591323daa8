/* fuzz_tokenizer.c - libFuzzer target: any tables, and any text.
 *
 * The first byte of an input chooses the rest: tables for qemb_tokenizer_open, or a text for one of
 * two fixed tokenizers and a limit. Every text is checked:
 *   - a new state and one used for all earlier texts give the same ids;
 *   - a limit gives the first ids and reports whether some are missing;
 *   - without added tokens, the bytes of the ids are the text in NFC. They encode to the same ids,
 *     and equal the text if all of it is below U+0300.
 */
#include "qemb.h"
#include "tests/fuzz/check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MERGES_MAX = 512 };

/* Merges that make each of these words one token, byte by byte from its first. */
static uint32_t make_merges(uint32_t (*merges)[2]) {
    static const char *const words[] = {
        " the",
        "ing",
        "er",
        "'s",
        "  ",
        "    ",
        "\n\n",
        " \xD0\xBF",
        "\xD0\xBE\xD0\xB2",
        "aaaa",
        "\xC3\xA9",
        "\xCC\x81\xCC\x81",
        "\xE4\xB8\x80",
        "\xE4\xB8\x81\xE4\xB8\x80",
        "\x81\xE4\xB9",
        " \xE4",
        "\xEA\xB0\x80",
        "\xF0\x9F\x98",
        "<|",
        "!!",
        "==",
        "\xE3\x80\x82\n",
        "\xC2\xA0",
    };
    uint32_t n = 0, id_of[256];
    qemb_tokenizer *bytes;
    CHECK(!qemb_tokenizer_open(&bytes, NULL, 0, NULL, 0, NULL));
    for (uint32_t id = 0; id < 256; id++) {
        uint8_t b;
        CHECK(qemb_tokenizer_token_bytes(bytes, id, &b, 1) == 1);
        id_of[b] = id;
    }
    qemb_tokenizer_close(bytes);
    for (size_t w = 0; w < sizeof words / sizeof *words; w++) {
        const uint8_t *p = (const uint8_t *)words[w];
        uint32_t id = id_of[*p];
        while (*++p) {
            uint32_t i = 0;
            while (i < n && (merges[i][0] != id || merges[i][1] != id_of[*p])) i++;
            merges[i][0] = id;
            merges[i][1] = id_of[*p];
            id = 256 + i;
            n += i == n;
        }
    }
    return n;
}

/* One of two tokenizers, without and with added tokens. They live until the program ends. */
static const qemb_tokenizer *fixed_tokenizer(int with_added) {
    static const uint8_t added[] = "\x00\x04\0\0\x05\0\0\0<|a|>\0\0\0"
                                   "\x01\x04\0\0\x02\0\0\0<|\0\0"
                                   "\x07\x04\0\0\x02\0\0\0\xC3\xA9\0\0"
                                   "\x05\x04\0\0\x01\0\0\0~\0\0";
    static uint32_t merges[MERGES_MAX][2];
    static qemb_tokenizer *t[2];
    if (!t[0]) {
        uint32_t n = make_merges(merges);
        CHECK(!qemb_tokenizer_open(&t[0], merges[0], n, NULL, 0, NULL));
        CHECK(!qemb_tokenizer_open(&t[1], merges[0], n, added, sizeof added, NULL));
    }
    return t[with_added];
}

/* The bytes of ids; the caller frees them. */
static char *bytes_of(const qemb_tokenizer *t, const int32_t *ids, size_t n_ids, size_t *n) {
    size_t cap = 1;
    char *text;
    for (size_t i = 0; i < n_ids; i++)
        cap += qemb_tokenizer_token_bytes(t, (uint32_t)ids[i], NULL, 0);
    text = malloc(cap);
    CHECK(text);
    *n = 0;
    for (size_t i = 0; i < n_ids; i++)
        *n += qemb_tokenizer_token_bytes(t, (uint32_t)ids[i], (uint8_t *)text + *n, cap - *n);
    return text;
}

/* Encodes with s. Returns a copy of the ids, which the caller frees; NULL if text is invalid. */
static int32_t *encode(qemb_tokenizer_state *s, const char *text, size_t len, size_t limit,
                       qemb_tokenizer_result *r) {
    qemb_err err;
    int32_t *ids;
    if (qemb_tokenizer_encode(s, text, len, limit, r, &err)) {
        CHECK(!strcmp(err.code, "invalid_utf8"));
        return NULL;
    }
    ids = malloc((r->n + 1) * sizeof *ids);
    CHECK(ids);
    memcpy(ids, r->ids, r->n * sizeof *ids);
    return ids;
}

static void fuzz_text(int with_added, size_t limit, const char *text, size_t len) {
    static qemb_tokenizer_state *both[2][2]; /* [with added tokens][used before] */
    static unsigned long calls;
    const qemb_tokenizer *t = fixed_tokenizer(with_added);
    qemb_tokenizer_state *fresh = both[with_added][0], *warm = both[with_added][1];
    qemb_tokenizer_result whole, r;
    int32_t *ids, *other;
    if (calls++ % 64 < 2 || !fresh) { /* a new state costs megabytes, so not every time */
        qemb_tokenizer_state_free(fresh);
        fresh = both[with_added][0] = qemb_tokenizer_state_new(t);
    }
    if (!warm) warm = both[with_added][1] = qemb_tokenizer_state_new(t);
    CHECK(fresh && warm);
    ids = encode(fresh, text, len, SIZE_MAX, &whole);
    other = encode(warm, text, len, SIZE_MAX, &r);
    CHECK(!ids == !other);
    if (ids) {
        CHECK(whole.n == r.n && !memcmp(ids, other, r.n * sizeof *ids));
        CHECK(whole.bytes_left == 0);
        free(other);
        other = encode(fresh, text, len, limit, &r);
        CHECK(other && r.n == (limit < whole.n ? limit : whole.n));
        CHECK(!memcmp(ids, other, r.n * sizeof *ids));
        CHECK((r.bytes_left > 0) == (r.n < whole.n) && r.bytes_left <= 3 * len);
    }
    if (ids && !with_added) {
        size_t n, below = 0;
        char *nfc = bytes_of(t, ids, whole.n, &n);
        for (size_t i = 0; i < len; i++) below += (uint8_t)text[i] < 0xCC;
        if (below == len) CHECK(n == len && (!n || !memcmp(nfc, text, n)));
        free(other);
        other = encode(fresh, nfc, n, SIZE_MAX, &r);
        CHECK(other && r.n == whole.n && !memcmp(ids, other, r.n * sizeof *ids));
        free(nfc);
    }
    free(ids);
    free(other);
}

/* data: the number of merges, the merges as pairs of 16-bit ids, the section of added tokens. */
static void fuzz_tables(const uint8_t *data, size_t size) {
    static const char text[] = "a <|endoftext|> the e\xCC\x81 \xE4\xB8\x80\xE4\xB8\x81 aaaaaaaa";
    uint32_t merges[256][2], n = size ? data[0] : 0;
    qemb_tokenizer *t;
    qemb_tokenizer_state *s;
    qemb_tokenizer_result r;
    qemb_err err;
    uint8_t *added;
    if (!size || size < 1 + 4 * (size_t)n) return;
    for (uint32_t i = 0; i < 2 * n; i++)
        merges[i / 2][i % 2] = (uint32_t)data[1 + 2 * i] | (uint32_t)data[2 + 2 * i] << 8;
    data += 1 + 4 * (size_t)n;
    size -= 1 + 4 * (size_t)n;
    added = malloc(size + !size); /* of exact size, so that ASan sees a read past its end */
    CHECK(added);
    memcpy(added, data, size);
    if (qemb_tokenizer_open(&t, merges[0], n, added, size, &err)) {
        CHECK(!strcmp(err.code, "model_file") && !t);
        free(added);
        return;
    }
    s = qemb_tokenizer_state_new(t);
    CHECK(s && !qemb_tokenizer_encode(s, text, sizeof text, SIZE_MAX, &r, &err));
    for (size_t i = 0; i < r.n; i++)
        CHECK(r.ids[i] >= 0 && (uint32_t)r.ids[i] < qemb_tokenizer_n_ids(t));
    qemb_tokenizer_state_free(s);
    qemb_tokenizer_close(t);
    free(added);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) return 0;
    if (data[0] % 4 == 3)
        fuzz_tables(data + 1, size - 1);
    else
        fuzz_text(data[0] & 1, data[1], (const char *)data + 2, size - 2);
    return 0;
}
