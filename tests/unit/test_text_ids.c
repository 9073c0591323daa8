/* test_text_ids.c - the ids of texts and of pairs, against the tokenizer called by hand. */
#include "lib/text_ids.h"
#include "support.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define PREFIX "<|im_start|>system\nJudge the \"Document\".<|im_end|>\n<|im_start|>user\n"
#define SUFFIX "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"

/* A file whose tokenizer has merges, as a reranker and as it is. */
static qemb_file *file;
static qemb_file as_reranker;
static qemb_tokenizer *tokenizer;
static qemb_tokenizer_state *by_hand;

static void setup(void) {
    static const qemb_prompt prompts[] = {
        {"prefix", PREFIX}, {"suffix", SUFFIX}, {"instruct", "find"}};
    qemb_err err;
    cr_assert_eq(qemb_file_open(&file, "tests/fixtures/small.qemb", &err), 0, "%s", err.msg);
    cr_assert_eq(qemb_file_tokenizer(&tokenizer, file, &err), 0, "%s", err.msg);
    by_hand = qemb_tokenizer_state_new(tokenizer);
    as_reranker = *file;
    as_reranker.config.kind = QEMB_RERANKER, as_reranker.config.eos_id = QEMB_NO_TOKEN;
    as_reranker.config.window = 500;
    as_reranker.prompts = prompts, as_reranker.n_prompts = 3;
}

static void teardown(void) {
    qemb_tokenizer_state_free(by_hand);
    qemb_tokenizer_close(tokenizer);
    qemb_file_close(file);
}

TestSuite(text_ids, .init = setup, .fini = teardown);

static text_ids opened(const qemb_file *f, int max_tokens) {
    text_ids t;
    qemb_err err;
    cr_assert_eq(text_ids_open(&t, f, tokenizer, max_tokens, &err), 0, "%s", err.msg);
    return t;
}

/* ---- pairs ----------------------------------------------------------------------------------- */

typedef struct {
    int32_t ids[4096];
    int n;
} list;

/* Appends the ids of a string, at most `most`. */
static void append(list *l, const char *s, size_t len, size_t most) {
    qemb_tokenizer_result r;
    qemb_err err;
    cr_assert_eq(qemb_tokenizer_encode(by_hand, s, len, SIZE_MAX, &r, &err), 0, "%s", err.msg);
    if (r.n > most) r.n = most;
    cr_assert(l->n + (int)r.n <= 4096);
    memcpy(l->ids + l->n, r.ids, r.n * sizeof *r.ids);
    l->n += (int)r.n;
}

/* The string between the prompts; returns its length. before: up to its document's space. */
static size_t middle(char *s, const text_pair *p, size_t *before) {
    size_t n = 0;
    const char *const part[] = {"<Instruct>: ",  p->task, "\n<Query>: ", p->query,
                                "\n<Document>:", " ",     p->document};
    const size_t len[] = {12, p->task_len, 10, p->query_len, 12, 1, p->document_len};
    for (int i = 0; i < 7; i++) {
        if (i == 5) *before = n;
        memcpy(s + n, part[i], len[i]);
        n += len[i];
    }
    return n;
}

/* The ids of p with at most `most` of its middle. */
static list expected(const text_pair *p, size_t most) {
    static char s[1 << 16];
    size_t before = 0;
    list l = {.n = 0};
    append(&l, PREFIX, strlen(PREFIX), SIZE_MAX);
    append(&l, s, middle(s, p, &before), most);
    append(&l, SUFFIX, strlen(SUFFIX), SIZE_MAX);
    return l;
}

static void is(const text_ids *t, int n, const list *want, const char *what) {
    cr_assert_eq(n, want->n, "%s: %d ids, want %d", what, n, want->n);
    cr_assert_arr_eq(t->ids, want->ids, (size_t)n * sizeof *t->ids, "%s", what);
}

static text_pair pair_of(const char *task, const char *query, const char *document) {
    return (text_pair){task, query, document, strlen(task), strlen(query), strlen(document)};
}

static const char *const documents[] = {
    "The capital of China is Beijing.",
    "",
    " ",
    "  two spaces",
    "\n\nlines",
    "!mark",
    "7",
    "\xcc\x81 after a mark",
    "e\xcc\x81",
    "\xe4\xb8\xad\xe6\x96\x87",
    "<|im_end|>\n<|endoftext|>",
    "a<Document>: b",
    "ends in a space ",
};
enum { N_DOCUMENTS = sizeof documents / sizeof *documents };

Test(text_ids, a_pair_is_one_string_between_two) {
    text_ids t = opened(&as_reranker, 0);
    qemb_err err;
    cr_assert_eq(t.max_tokens, 500);
    for (int i = 0; i < N_DOCUMENTS; i++)
        for (int k = 0; k < 3; k++) {
            static const char *const tasks[] = {"", "Find", "Gr\xc3\xbc\xc3\x9f"};
            static const char *const queries[] = {"what?", "", " \n"};
            const text_pair p = pair_of(tasks[k], queries[(i + k) % 3], documents[i]);
            const list want = expected(&p, SIZE_MAX);
            size_t cut = 7;
            is(&t, text_ids_pair(&t, &p, 0, NULL, &err), &want, documents[i]);
            is(&t, text_ids_pair(&t, &p, 0, &cut, &err), &want, documents[i]);
            cr_assert_eq(cut, 0);
        }
    const text_pair nul = {"a\0b", "c\0", "\0", 3, 2, 1}; /* NUL is a character */
    const list want = expected(&nul, SIZE_MAX);
    is(&t, text_ids_pair(&t, &nul, 0, NULL, &err), &want, "NUL");
    text_ids_close(&t);
}

/* With every limit from one token of the middle on: the middle alone is cut. */
Test(text_ids, the_prompts_of_a_pair_stay_whole) {
    const text_pair p = pair_of("find", "what is it?", "A text of several words, 2 lines.\nEnd.");
    const list whole = expected(&p, SIZE_MAX);
    qemb_err err;
    text_ids t = opened(&as_reranker, 0);
    static char s[1 << 12];
    size_t before = 0;
    list first = {.n = 0};
    middle(s, &p, &before);
    append(&first, s, before, SIZE_MAX);
    const int added = t.n_head + t.n_tail;
    text_ids_close(&t);
    for (int most = added + 1; most <= whole.n + 1; most++) {
        size_t cut = 7;
        t = opened(&as_reranker, most);
        const list want = expected(&p, (size_t)(most - added));
        is(&t, text_ids_pair(&t, &p, 0, &cut, &err), &want, "cut");
        cr_assert(most < whole.n ? cut > 0 && cut <= p.document_len : cut == 0, "%d: %zu", most,
                  cut);
        cr_assert(want.n == (most < whole.n ? most : whole.n));
        const int n = text_ids_pair(&t, &p, 0, NULL, &err);
        if (most >= whole.n) {
            is(&t, n, &whole, "whole");
        } else {
            char says[128];
            const int fits = most - added > first.n; /* the query, and a token of the document */
            snprintf(says, sizeof says,
                     "got more than %d tokens %sbeside the prompt's %d, want at most %d in all",
                     most - added, fits ? "" : "with the task, ", added, most);
            cr_assert_eq(n, -1);
            cr_assert_str_eq(err.code, fits ? "too_long" : "query_too_long");
            cr_assert(strstr(err.msg, says), "%s", err.msg);
        }
        text_ids_close(&t);
    }
}

/* Where the limit lies in the query, no byte of the document is left. */
Test(text_ids, a_long_query_leaves_no_document) {
    const text_pair p = pair_of("find", "one two three four five six seven eight", "document");
    qemb_err err;
    size_t cut;
    text_ids t = opened(&as_reranker, 0);
    const int added = t.n_head + t.n_tail;
    text_ids_close(&t);
    t = opened(&as_reranker, added + 10);
    const list want = expected(&p, 10);
    is(&t, text_ids_pair(&t, &p, 0, &cut, &err), &want, "query");
    cr_assert_eq(cut, p.document_len);
    text_ids_close(&t);
}

Test(text_ids, at_most_so_many_tokens_of_a_document) {
    text_ids t = opened(&as_reranker, 0);
    qemb_err err;
    for (int i = 0; i < N_DOCUMENTS; i++) {
        static char s[1 << 12];
        const text_pair p = pair_of("find", "what?", documents[i]);
        const list whole = expected(&p, SIZE_MAX);
        size_t before = 0;
        list first = {.n = 0};
        middle(s, &p, &before);
        append(&first, s, before, SIZE_MAX);
        const int of_document = whole.n - t.n_head - t.n_tail - first.n;
        cr_assert_arr_eq(whole.ids + t.n_head, first.ids, (size_t)first.n * sizeof *first.ids,
                         "the tokens before \"%s\" do not depend on it", documents[i]);
        for (int most = 1; most <= of_document + 1; most++) {
            const list want = expected(&p, (size_t)(first.n + most));
            size_t cut = 7;
            is(&t, text_ids_pair(&t, &p, most, NULL, &err), &want, documents[i]);
            is(&t, text_ids_pair(&t, &p, most, &cut, &err), &want, documents[i]);
            cr_assert_eq(cut, 0, "that limit is no truncation");
        }
    }
    text_ids_close(&t);
}

/* The smaller limit counts. That of the model is an error, or a truncation. */
Test(text_ids, both_limits) {
    const text_pair p = pair_of("find", "what?", "one two three four five six seven eight");
    qemb_err err;
    text_ids t = opened(&as_reranker, 0);
    const list whole = expected(&p, SIZE_MAX);
    static char s[1 << 12];
    size_t before = 0, cut;
    list first = {.n = 0};
    middle(s, &p, &before);
    append(&first, s, before, SIZE_MAX);
    const int added = t.n_head + t.n_tail, of_document = whole.n - added - first.n;
    text_ids_close(&t);
    t = opened(&as_reranker, added + first.n + 4); /* 4 tokens of the document */
    cr_assert_gt(of_document, 6);
    for (int most = 1; most <= of_document + 1; most++) {
        const list want = expected(&p, (size_t)(first.n + (most < 4 ? most : 4)));
        is(&t, text_ids_pair(&t, &p, most, &cut, &err), &want, "cut");
        cr_assert(most <= 4 ? cut == 0 : cut > 0, "%d", most);
        if (most <= 4)
            is(&t, text_ids_pair(&t, &p, most, NULL, &err), &want, "limited");
        else
            cr_assert_eq(text_ids_pair(&t, &p, most, NULL, &err), -1, "%d", most);
    }
    text_ids_close(&t);
    t = opened(&as_reranker, added + first.n - 1); /* the query does not fit */
    cr_assert_eq(text_ids_pair(&t, &p, 3, NULL, &err), -1);
    cr_assert_str_eq(err.code, "query_too_long");
    const list want = expected(&p, (size_t)first.n - 1);
    is(&t, text_ids_pair(&t, &p, 3, &cut, &err), &want, "no document");
    cr_assert_eq(cut, p.document_len);
    text_ids_close(&t);
}

Test(text_ids, invalid_utf8_in_a_pair) {
    static const char *const bad[][3] = {
        {"\xff", "q", "d"}, {"t", "q\xff", "d"}, {"t", "q", "do\xff"}};
    text_ids t = opened(&as_reranker, 0);
    qemb_err err;
    for (int i = 0; i < 3; i++)
        for (int most = 0; most < 200; most += 100) {
            const text_pair p = pair_of(bad[i][0], bad[i][1], bad[i][2]);
            cr_assert_eq(text_ids_pair(&t, &p, most, NULL, &err), -1);
            cr_assert_str_eq(err.code, "invalid_utf8");
            if (i == 2) cr_assert(strstr(err.msg, "byte 2"), "of the document: %s", err.msg);
        }
    text_ids_close(&t);
}

Test(text_ids, a_limit_without_room_for_a_pair) {
    qemb_err err;
    text_ids t = opened(&as_reranker, 0);
    const int added = t.n_head + t.n_tail;
    text_ids_close(&t);
    for (int most = 1; most <= added; most++) {
        cr_assert_eq(text_ids_open(&t, &as_reranker, tokenizer, most, &err), -1, "%d", most);
        cr_assert_str_eq(err.code, "usage");
        cr_assert(strstr(err.msg, "no room beside"), "%s", err.msg);
        cr_assert(!t.state && !t.added, "nothing is left open");
        text_ids_close(&t);
    }
    t = opened(&as_reranker, added + 1);
    text_ids_close(&t);
}

/* ---- texts of embedding models --------------------------------------------------------------- */

static int encode(text_ids *t, const char *prompt, const char *s, size_t *cut, qemb_err *err) {
    const char *const part[] = {prompt, s};
    const size_t len[] = {strlen(prompt), strlen(s)};
    return text_ids_encode(t, part, len, 2, cut, err);
}

/* The tokens that f adds before and behind a text. */
static int n_head(const qemb_file *f) { return f->config.bos_id != QEMB_NO_TOKEN; }
static int n_tail(const qemb_file *f) { return f->config.eos_id != QEMB_NO_TOKEN; }

/* The first n ids of a text, between the tokens that f adds. */
static list between(const qemb_file *f, const list *text, int n) {
    list l = {.n = 0};
    if (n_head(f)) l.ids[l.n++] = f->config.bos_id;
    memcpy(l.ids + l.n, text->ids, (size_t)n * sizeof *l.ids);
    l.n += n;
    if (n_tail(f)) l.ids[l.n++] = f->config.eos_id;
    return l;
}

/* The ids of a text with every limit. with: what messages call the added tokens. */
static void check_limits(const qemb_file *f, const char *with) {
    const char *prompt = "Query:", *s = "What is the answer to all of these?";
    const int added = n_head(f) + n_tail(f);
    char joined[128];
    snprintf(joined, sizeof joined, "%s%s", prompt, s);
    list whole = {.n = 0};
    append(&whole, joined, strlen(joined), SIZE_MAX);
    qemb_err err;
    for (int most = added ? added : 1; most <= whole.n + added + 1; most++) {
        text_ids t = opened(f, most);
        const int room = most - added, n = room < whole.n ? room : whole.n;
        const list want = between(f, &whole, n);
        size_t cut = 7;
        is(&t, encode(&t, prompt, s, &cut, &err), &want, s);
        cr_assert((cut > 0) == (room < whole.n), "%d: %zu", most, cut);
        if (room < whole.n) {
            char says[128];
            snprintf(says, sizeof says, "too long (got more than %d tokens, want at most %d%s)",
                     room, most, with);
            cr_assert_eq(encode(&t, prompt, s, NULL, &err), -1);
            cr_assert_str_eq(err.code, "too_long");
            cr_assert(strstr(err.msg, says), "%s, want %s", err.msg, says);
        } else {
            is(&t, encode(&t, prompt, s, NULL, &err), &want, s);
        }
        const list given = between(f, &whole, whole.n);
        for (int k = 0; k < 2; k++) { /* without the added tokens, and with them */
            const list *l = k ? &given : &whole;
            cut = 7;
            is(&t, text_ids_take(&t, l->ids, (size_t)l->n, &cut, &err), &want, "given ids");
            cr_assert_eq(cut, (size_t)(whole.n - n));
        }
        text_ids_close(&t);
    }
}

Test(text_ids, limits_with_end_of_text) { check_limits(file, " with the end-of-text"); }

Test(text_ids, limits_without_end_of_text) {
    qemb_file f = *file;
    f.config.eos_id = QEMB_NO_TOKEN;
    check_limits(&f, "");
}

/* Without an end-of-text, an empty text has no token and thus no vector. */
Test(text_ids, empty_texts) {
    qemb_file f = *file;
    const int32_t eos = file->config.eos_id, ids[] = {5, eos};
    qemb_err err;
    size_t cut;
    text_ids t = opened(&f, 0);
    cr_assert_eq(t.max_tokens, f.config.max_positions);
    cr_assert(encode(&t, "", "", NULL, &err) == 1 && t.ids[0] == eos);
    cr_assert(text_ids_take(&t, NULL, 0, NULL, &err) == 1 && t.ids[0] == eos);
    cr_assert(text_ids_take(&t, ids, 2, NULL, &err) == 2 && t.ids[1] == eos);
    text_ids_close(&t);
    f.config.eos_id = QEMB_NO_TOKEN;
    t = opened(&f, 0);
    for (int i = 0; i < 3; i++) {
        memset(&err, 0, sizeof err);
        cr_assert_eq(i == 0   ? encode(&t, "", "", NULL, &err)
                     : i == 1 ? encode(&t, "", "", &cut, &err)
                              : text_ids_take(&t, NULL, 0, NULL, &err),
                     -1);
        cr_assert_str_eq(err.code, "empty_text");
    }
    cr_assert_eq(encode(&t, "x", "", NULL, &err), 1, "a prompt is enough");
    /* The token that ends the texts of other models is one like any other. */
    cr_assert(text_ids_take(&t, ids, 2, NULL, &err) == 2 && t.ids[0] == 5 && t.ids[1] == eos);
    text_ids_close(&t);
}

/* ---- texts of encoders ----------------------------------------------------------------------- */

static void setup_encoder(void) {
    qemb_err err;
    file = open_model(&bert_configs[0], 1, 1);
    cr_assert_eq(qemb_file_tokenizer(&tokenizer, file, &err), 0, "%s", err.msg);
    by_hand = qemb_tokenizer_state_new(tokenizer);
}

TestSuite(encoder_ids, .init = setup_encoder, .fini = teardown);

/* Takes ids (n) and compares with want (n_want). */
static void takes(text_ids *t, const int32_t *ids, int n, const int32_t *want, int n_want) {
    qemb_err err;
    cr_assert_eq(text_ids_take(t, ids, (size_t)n, NULL, &err), n_want);
    cr_assert_arr_eq(t->ids, want, (size_t)n_want * sizeof *want);
}
#define IDS(...) (const int32_t[]){__VA_ARGS__}, (int)(sizeof(const int32_t[]){__VA_ARGS__} / 4)

/* In the made vocabulary "ab" after a space is cheaper as U+2581 and "ab" than as U+2581 "a" and
 * "b", and "c" as one piece with it. */
Test(encoder_ids, stand_between_two_tokens) {
    text_ids t = opened(file, 0);
    qemb_err err;
    cr_assert_eq(t.max_tokens, 700);
    const list want = {{0, 4, 126, 101, 2}, 5}, empty = {{0, 2}, 2};
    is(&t, encode(&t, "", "ab c", NULL, &err), &want, "ab c");
    is(&t, encode(&t, "a", "b c", NULL, &err), &want, "a token spans prompt and text");
    is(&t, encode(&t, "", "", NULL, &err), &empty, "an empty text");
    is(&t, encode(&t, "", "\x01", NULL, &err), &empty, "a text of which nothing is left");
    const list literal = {{0, 0, 1, 2, 2}, 5};
    is(&t, encode(&t, "", "<s><pad></s>", NULL, &err), &literal, "literal tokens");
    text_ids_close(&t);
}

/* Given ids may have both tokens, one or none; only the first and the last id are looked at. */
Test(encoder_ids, given_with_or_without_the_added_tokens) {
    text_ids t = opened(file, 0);
    takes(&t, NULL, 0, IDS(0, 2));
    takes(&t, IDS(0), IDS(0, 2));
    takes(&t, IDS(2), IDS(0, 2));
    takes(&t, IDS(0, 2), IDS(0, 2));
    takes(&t, IDS(5, 6), IDS(0, 5, 6, 2));
    takes(&t, IDS(0, 5, 6), IDS(0, 5, 6, 2));
    takes(&t, IDS(5, 6, 2), IDS(0, 5, 6, 2));
    takes(&t, IDS(0, 5, 6, 2), IDS(0, 5, 6, 2));
    takes(&t, IDS(0, 5, 0, 2, 6, 2), IDS(0, 5, 0, 2, 6, 2));
    takes(&t, IDS(0, 0, 2, 2), IDS(0, 0, 2, 2));
    takes(&t, IDS(2, 0), IDS(0, 2, 0, 2));
    text_ids_close(&t);
}

Test(encoder_ids, limits) { check_limits(file, " with the tokens around the text"); }

Test(encoder_ids, limits_with_one_added_token) {
    qemb_file f = *file;
    f.config.bos_id = QEMB_NO_TOKEN;
    check_limits(&f, " with the end-of-text");
    f.config.eos_id = QEMB_NO_TOKEN;
    check_limits(&f, "");
    f.config.bos_id = 0;
    check_limits(&f, " with the tokens around the text");
}

/* Two tokens are room for an empty text alone. */
Test(encoder_ids, small_limits) {
    text_ids t;
    qemb_err err;
    size_t cut = 7;
    cr_assert_eq(text_ids_open(&t, file, tokenizer, 1, &err), -1);
    cr_assert_str_eq(err.code, "usage");
    cr_assert(strstr(err.msg, "no room beside the 2 tokens of every text (got 1, want 2 or more)"),
              "%s", err.msg);
    t = opened(file, 2);
    const list empty = {{0, 2}, 2};
    is(&t, encode(&t, "", "", NULL, &err), &empty, "an empty text");
    is(&t, encode(&t, "", "\x01", &cut, &err), &empty, "a text of which nothing is left");
    cr_assert_eq(cut, 0);
    is(&t, encode(&t, "", "a", &cut, &err), &empty, "a text that is cut");
    cr_assert_eq(cut, 1);
    cr_assert_eq(encode(&t, "", "a", NULL, &err), -1);
    cr_assert_str_eq(err.code, "too_long");
    text_ids_close(&t);
}

Test(encoder_ids, invalid_utf8_counts_from_the_text) {
    text_ids t = opened(file, 0);
    qemb_err err;
    cr_assert_eq(encode(&t, "query: ", "ab\xff", NULL, &err), -1);
    cr_assert_str_eq(err.code, "invalid_utf8");
    cr_assert(strstr(err.msg, "byte 2"), "%s", err.msg);
    text_ids_close(&t);
}

/* Only prompts of that form say that an encoder was trained with tasks. */
Test(encoder_ids, an_encoder_has_no_task_by_default) {
    static const qemb_prompt instruct = {"query", "Instruct: find\nQuery: "};
    qemb_file f = *file;
    cr_assert_null(text_ids_task_end(&f));
    f.n_prompts = 0;
    cr_assert_null(text_ids_task_end(&f));
    f.prompts = &instruct, f.n_prompts = 1;
    cr_assert_str_eq(text_ids_task_end(&f), "\nQuery: ");
}
