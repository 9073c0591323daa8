/* test_json_read.c - JSON texts to values: those of jansson's own reader, where that is right. */
#include "frontends/json_read.h"

#include <criterion/criterion.h>
#include <float.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Reads s (n) from memory of exactly that size. */
static json_t *read_exact(const char *s, size_t n, json_read_error *e) {
    char *copy = malloc(n ? n : 1);
    memcpy(copy, s, n);
    json_t *v = json_read(copy, n, NULL, NULL, e);
    free(copy);
    return v;
}

Test(json_read, as_jansson) {
    static const char *const texts[] = {
        "null",
        " true ",
        "\r\n\tfalse",
        "0",
        "-0",
        "9223372036854775807",
        "-9223372036854775808",
        "0.5",
        "-1.25e-3",
        "1E+30",
        "2.2250738585072014e-308",
        "\"\"",
        "\"a long string that has no escapes, of more than eight bytes\"",
        "\"1234567\\n\"",
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0000\\u00e9\\u20AC\\ud83d\\uDE00\x7f\"",
        "\"h\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80\"",
        "[]",
        "{}",
        "[ 1 , [ ] , { } ]",
        "{\"a\":{\"b\":[1,2,{\"c\":null}]},\"\":\"\",\"\\u0061b\":0}",
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        json_read_error e = {.text = ""};
        json_t *got = read_exact(texts[i], strlen(texts[i]), &e);
        json_t *want = json_loads(texts[i], JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
        cr_assert(want != NULL, "%s", texts[i]);
        cr_expect(got && json_equal(got, want), "%s: %s", texts[i], e.text);
        json_decref(got);
        json_decref(want);
    }
}

Test(json_read, numbers) {
    static const struct {
        const char *text;
        int is_integer;
        double value;
    } cases[] = {
        {"64.0", 1, 64},
        {"6.4e1", 1, 64},
        {"640E-1", 1, 64},
        {"-0.0", 1, 0},
        {"1e-400", 1, 0},
        {"9007199254740992.0", 1, 9007199254740992},
        {"9007199254740994.0", 0, 9007199254740994},
        {"64.5", 0, 64.5},
        {"18446744073709551616", 0, 18446744073709551616.0},
        {"1e400", 0, DBL_MAX},
        {"-1e400", 0, -DBL_MAX},
        {"0.1000000000000000000000000000000000000000000000000000000000000000000000000001", 0, 0.1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_read_error e = {.text = ""};
        json_t *v = read_exact(cases[i].text, strlen(cases[i].text), &e);
        cr_assert(v != NULL, "%s: %s", cases[i].text, e.text);
        cr_expect(json_is_integer(v) == cases[i].is_integer, "%s", cases[i].text);
        cr_expect(json_number_value(v) == cases[i].value, "%s", cases[i].text);
        json_decref(v);
    }
}

Test(json_read, refusals) {
    static const struct {
        const char *text;
        json_fault fault;
        const char *says;
    } cases[] = {
        {"", JSON_FAULT_SYNTAX, "invalid JSON at byte 0 (got the end, want a value)"},
        {" ", JSON_FAULT_SYNTAX, "at byte 1 (got the end, want a value)"},
        {"{", JSON_FAULT_SYNTAX, "at byte 1 (got the end, want \")"},
        {"{\"a\"", JSON_FAULT_SYNTAX, "at byte 4 (got the end, want :)"},
        {"{\"a\":1", JSON_FAULT_SYNTAX, "at byte 6 (got the end, want , or })"},
        {"{\"a\":1,}", JSON_FAULT_SYNTAX, "at byte 7 (got }, want \")"},
        {"{a:1}", JSON_FAULT_SYNTAX, "at byte 1 (got a, want \")"},
        {"{'a':1}", JSON_FAULT_SYNTAX, "at byte 1 (got ', want \")"},
        {"[1 2]", JSON_FAULT_SYNTAX, "at byte 3 (got 2, want , or ])"},
        {"[1,]", JSON_FAULT_SYNTAX, "at byte 3 (got ], want a value)"},
        {"{} {}", JSON_FAULT_SYNTAX, "at byte 3 (got {, want the end)"},
        {"nul", JSON_FAULT_SYNTAX, "at byte 3 (got the end, want true, false or null)"},
        {"nulll", JSON_FAULT_SYNTAX, "at byte 4 (got l, want the end)"},
        {"NaN", JSON_FAULT_SYNTAX, "at byte 0 (got N, want a value)"},
        {"+1", JSON_FAULT_SYNTAX, "got +, want a value"},
        {"01", JSON_FAULT_SYNTAX, "at byte 1 (got 1, want the end)"},
        {"-", JSON_FAULT_SYNTAX, "at byte 1 (got the end, want a digit)"},
        {"1.", JSON_FAULT_SYNTAX, "at byte 2 (got the end, want a digit)"},
        {"[.5]", JSON_FAULT_SYNTAX, "at byte 1 (got ., want a value)"},
        {"1e+]", JSON_FAULT_SYNTAX, "at byte 3 (got ], want a digit)"},
        {"\"a", JSON_FAULT_SYNTAX, "at byte 2 (got the end, want \")"},
        {"\"a\\", JSON_FAULT_SYNTAX, "at byte 3 (got the end, want \")"},
        {"\"a\nb\"", JSON_FAULT_SYNTAX, "at byte 2 (got 0x0A, want an escape of this character)"},
        {"\"12345678\n12345678\"", JSON_FAULT_SYNTAX, "at byte 9 (got 0x0A"},
        {"\"\\x\"", JSON_FAULT_SYNTAX, "at byte 2 (got x, want an escape of JSON)"},
        {"\"\\u12\"", JSON_FAULT_SYNTAX, "at byte 3 (got 1, want four hexadecimal digits)"},
        {"\"\\u12G4\"", JSON_FAULT_SYNTAX, "want four hexadecimal digits"},
        {"\"\\ud800\"", JSON_FAULT_SYNTAX, "a lone surrogate at byte 1 (got \\ud800, want a pair)"},
        {"\"\\udc00\\ud800\"", JSON_FAULT_SYNTAX, "a lone surrogate at byte 1 (got \\udc00"},
        {"\"\\ud800\\u0041\"", JSON_FAULT_SYNTAX, "a lone surrogate at byte 1"},
        {"{\"input\":[\"a\",\"b\",\"c\\ud83d\"]}", JSON_FAULT_SYNTAX,
         "input[2]: a lone surrogate at byte 20 (got \\ud83d"},
        {"{\"a\":[1],\"input\":\"\\ud83d\"}", JSON_FAULT_SYNTAX, "input: a lone surrogate at"},
        {"{\"documents\":[{\"text\":\"a\"},{\"text\":\"\xff\"}]}", JSON_FAULT_UTF8,
         "documents[1]: invalid UTF-8 at byte 36 (got 0xFF, want a character)"},
        {"{\"a\":[1],\"\xff\":1}", JSON_FAULT_UTF8, "invalid UTF-8 at byte 10"},
        {"{\"\\u001b[2J\":\"\xff\"}", JSON_FAULT_UTF8, "invalid UTF-8 at byte 14"},
        {"\"\xed\xa0\x80\"", JSON_FAULT_UTF8, "got 0xED"},
        {"\"\xe2\x82\"", JSON_FAULT_UTF8, "got 0xE2"},
        {"{\"a\\u0000b\":1}", JSON_FAULT_SYNTAX, "a key with NUL at byte 1"},
        {"{\"a\":1,\"\\u0061\":2}", JSON_FAULT_TWICE, "a key occurs twice (byte 7)"},
        {"{\"a\":1,\"b\":{\"c\":1,\"c\":2}}", JSON_FAULT_TWICE, "c: a key occurs twice (byte 18)"},
        {"\xff\xfe{\"", JSON_FAULT_SYNTAX, "UTF-16, want UTF-8"},
        {"\xfe\xff", JSON_FAULT_SYNTAX, "UTF-16, want UTF-8"},
        {"\xef\xbb\xbf\xef\xbb\xbf{}", JSON_FAULT_SYNTAX, "at byte 3 (got 0xEF, want a value)"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_read_error e = {.text = ""};
        json_t *v = read_exact(cases[i].text, strlen(cases[i].text), &e);
        cr_expect(!v && e.fault == cases[i].fault && strstr(e.text, cases[i].says), "%s: %s",
                  cases[i].text, e.text);
        json_decref(v);
    }
}

/* NUL is no white space, and what begins with every second byte NUL is UTF-16. */
Test(json_read, nul) {
    static const char *const texts[] = {
        "{\"a\":1,\"b\":1_}", "{\"a\":1.5_,\"b\":1}", "_{}", "{}_", "[1,_2]", "\"a_\"", "[_"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        const size_t n = strlen(texts[i]);
        char s[32];
        json_read_error e = {.text = ""};
        for (size_t k = 0; k < n; k++) s[k] = texts[i][k] == '_' ? 0 : texts[i][k];
        cr_expect(!read_exact(s, n, &e) && strstr(e.text, "got 0x00"), "%s: %s", texts[i], e.text);
    }
    json_read_error e = {.text = ""};
    cr_expect(!read_exact("{\0}\0", 4, &e) && strstr(e.text, "UTF-16"), "%s", e.text);
    cr_expect(!read_exact("\0{\0}", 4, &e) && strstr(e.text, "UTF-16"), "%s", e.text);
}

typedef struct {
    char seen[200];
} members;

static void see(void *self, const json_member *m) {
    members *all = self;
    const size_t n = strlen(all->seen);
    snprintf(all->seen + n, sizeof all->seen - n, "(%s|%.*s|%.*s)", m->name, (int)m->key_len,
             m->key, (int)m->value_len, m->value);
}

Test(json_read, members) {
    static const char text[] = "\xef\xbb\xbf { \"\\u0061\" :\t1.10 , \"b\": [ 1, {\"c\":2} ] ,\n"
                               "\"d\":\"\\\"}\" , \"e\":{} }";
    members all = {""};
    json_read_error e = {.text = ""};
    json_t *v = json_read(text, sizeof text - 1, see, &all, &e);
    cr_assert(v != NULL, "%s", e.text);
    cr_expect_str_eq(all.seen, "(a|\"\\u0061\"|1.10)(b|\"b\"|[ 1, {\"c\":2} ])"
                               "(d|\"d\"|\"\\\"}\")(e|\"e\"|{})");
    json_decref(v);
}

Test(json_read, depth) {
    enum { MOST = 2048 };
    char s[2 * MOST + 2];
    json_read_error e = {.text = ""};
    memset(s, '[', MOST + 1);
    memset(s + MOST + 1, ']', MOST + 1);
    json_t *v = json_read(s + 1, 2 * MOST, NULL, NULL, &e);
    cr_expect(v != NULL, "%s", e.text);
    json_decref(v);
    cr_expect(!json_read(s, 2 * MOST + 2, NULL, NULL, &e) && strstr(e.text, "2048 levels"));
}

/* Allocations until one fails. */
static int left;

static void *limited_malloc(size_t n) { return left-- > 0 ? malloc(n) : NULL; }

/* Each allocation of a value may fail: that is said, and nothing is lost or kept. */
Test(json_read, every_allocation_may_fail) {
    static const char text[] = "{\"a\":[1,2.5,\"x\",[[]],{},1,2,3,4,5,6,7,8,9],\"b\":\"\\n\","
                               "\"c\":1,\"d\":2,\"e\":3,\"f\":4,\"g\":5,\"h\":6,\"i\":7,\"j\":8}";
    json_set_alloc_funcs(limited_malloc, free);
    int n = 0;
    for (json_t *v = NULL; !v; n++) {
        json_read_error e = {.text = ""};
        left = n;
        v = json_read(text, sizeof text - 1, NULL, NULL, &e);
        cr_expect(v || e.fault == JSON_FAULT_MEMORY, "%d: %s", n, e.text);
        json_decref(v);
        if (v) break;
    }
    cr_expect(n > 40); /* 26 values, 11 keys and their tables */
}
