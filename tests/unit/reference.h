/* reference.h - the shared data of a reference tokenizer, for test_tokenizer.c and test_unigram.c:
 * where its files are, and its sweeps, one digest for each 4,096 cases. */
#ifndef REFERENCE_H
#define REFERENCE_H

#include "qemb.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The path of a file ("encoder/vectors_e5.jsonl") of the shared data, in static memory, or NULL. */
static inline const char *shared_file(const char *name) {
    static char path[4096];
    const char *root = getenv("QEMB_SHARED");
    snprintf(path, sizeof path, "%s/%s", root && *root ? root : "../shared", name);
    FILE *f = fopen(path, "r");
    if (f) fclose(f);
    return f ? path : NULL;
}

/* Sets the path; without the file the test is skipped and names it. */
#define NEED(path, name)                                                                           \
    if (!((path) = shared_file(name)))                                                             \
    cr_skip_test("%s is not there: set QEMB_SHARED to the directory that has it", name)

typedef struct {
    qemb_tokenizer_state *state;
    const json_t *digests; /* a list of all blocks; or an object, without those that have no case */
    const char *name;
    uint64_t h;
    size_t done, bad;
} sweep;

static inline void sweep_digest(sweep *w, uint32_t id) {
    w->h = (w->h ^ id) * UINT64_C(0x100000001b3);
}

/* The ids of a case, digested. */
static inline qemb_tokenizer_result sweep_case(sweep *w, const char *text, size_t n) {
    qemb_tokenizer_result r;
    qemb_err err;
    cr_assert_eq(qemb_tokenizer_encode(w->state, text, n, SIZE_MAX, &r, &err), 0, "%s", err.msg);
    for (size_t i = 0; i < r.n; i++) sweep_digest(w, (uint32_t)r.ids[i]);
    sweep_digest(w, 0xFFFFFFFF);
    return r;
}

/* Call it before case number `at` of the sweep, and with last = true at the sweep's end. */
static inline void sweep_block(sweep *w, size_t at, bool last) {
    if (at % 4096 && !last) return;
    const bool is_list = json_is_array(w->digests);
    if (at) {
        char hex[20], first[16];
        snprintf(first, sizeof first, "%06zx", (at - 1) / 4096 * 4096);
        snprintf(hex, sizeof hex, "%016llx", (unsigned long long)w->h);
        const json_t *digest =
            is_list ? json_array_get(w->digests, w->done) : json_object_get(w->digests, first);
        const char *want = json_string_value(digest);
        if (want || is_list) {
            w->bad += !want || strcmp(hex, want);
            w->done++;
        }
    }
    w->h = UINT64_C(0xcbf29ce484222325);
    if (!last) return;
    const size_t all = is_list ? json_array_size(w->digests) : json_object_size(w->digests);
    cr_expect_eq(w->done, all, "%s: %zu blocks", w->name, w->done);
    cr_expect_gt(w->done, 0);
    cr_expect_eq(w->bad, 0, "%s: %zu of %zu blocks differ", w->name, w->bad, w->done);
}

static inline size_t sweep_utf8(char *out, uint32_t c) {
    static const uint8_t lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i; i--, c >>= 6) out[i] = (char)(0x80 | (c & 63));
    out[0] = (char)(lead[n] | c);
    return n;
}

static inline sweep sweep_of(qemb_tokenizer_state *state, const json_t *digests, const char *name) {
    return (sweep){.state = state, .digests = json_object_get(digests, name), .name = name};
}

/* Sweeps all code points in a context, in which % stands for the code point. */
static inline void sweep_code_points(qemb_tokenizer_state *state, const json_t *digests,
                                     const char *name, const char *context) {
    sweep w = sweep_of(state, digests, name);
    for (uint32_t c = 0; c < 0x110000; c++) {
        char text[64];
        size_t n = 0;
        sweep_block(&w, c, false);
        if (c >= 0xD800 && c < 0xE000) continue;
        for (const char *p = context; *p; p++) {
            if (*p == '%')
                n += sweep_utf8(text + n, c);
            else
                text[n++] = *p;
        }
        sweep_case(&w, text, n);
    }
    sweep_block(&w, 0x110000, true);
}

#endif
