/* fuzz_jsonl.c - libFuzzer target: any bytes as a JSON line, of a text and of a query with
 * documents. What is accepted has to be valid. The JSON reader has to agree with jansson's. */
#include "frontends/input.h"
#include "frontends/json_read.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#define VOCAB  1000
#define HIDDEN 64

static void require(int holds) {
    if (!holds) abort();
}

/* Every other mutation inserts a piece of JSON, since few objects arise by chance. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    static const char *const pieces[] = {"{\"text\":\"a\"}",
                                         "{\"ids\":[1,2]}",
                                         ",\"id\":{\"a\":[1.5e3]}",
                                         ",\"instruct\":\"x\"",
                                         ",\"dim\":64",
                                         ",\"\\u0069d\":[\"}\", {\"b\":-1e2}]\n",
                                         ",\"tokens\":false",
                                         "{\"query\":\"a\",\"documents\":[\"b\"]}",
                                         ",\"documents\":[]",
                                         ",{\"text\":\"c\"}",
                                         ",\"top_n\":2",
                                         "\"\\ud83d\\ude00\"",
                                         "null",
                                         "true",
                                         "{",
                                         "}",
                                         "[",
                                         "]",
                                         ",",
                                         ":",
                                         "\"",
                                         "\\u0000",
                                         "999",
                                         "1000",
                                         "-1",
                                         "4294967296",
                                         "9223372036854775808",
                                         "64.0",
                                         "-1.5e-400",
                                         "1E999",
                                         "\\/\\b\\n\\\"",
                                         "\\ud83d",
                                         "\xc3\xa9",
                                         "\xff"};
    const char *piece = pieces[(seed >> 1) % (sizeof pieces / sizeof *pieces)];
    const size_t n = strlen(piece), at = size ? (seed >> 8) % (size + 1) : 0;
    if (seed & 1 || size + n > max_size) return LLVMFuzzerMutate(data, size, max_size);
    memmove(data + at + n, data + at, size - at);
    memcpy(data + at, piece, n);
    return size + n;
}

/* Whether a and b are the same value; numbers: of the same size, as an integer or a real. */
static int same(const json_t *a, const json_t *b) {
    const char *key;
    json_t *v;
    if (json_is_number(a) && json_is_number(b)) return json_number_value(a) == json_number_value(b);
    if (json_typeof(a) != json_typeof(b)) return 0;
    if (json_is_object(a)) {
        json_object_foreach((json_t *)a, key, v) if (!json_object_get(b, key) ||
                                                     !same(v, json_object_get(b, key))) return 0;
        return json_object_size(a) == json_object_size(b);
    }
    if (!json_is_array(a)) return json_equal(a, b);
    for (size_t i = 0; i < json_array_size(a); i++)
        if (i >= json_array_size(b) || !same(json_array_get(a, i), json_array_get(b, i))) return 0;
    return json_array_size(a) == json_array_size(b);
}

/* The members of an object come one after the other, and each value stands where it is said to. */
typedef struct {
    const char *at;
    size_t n;
    const json_t *whole; /* of jansson */
} members;

static void check_member(void *self, const json_member *m) {
    members *all = self;
    require(m->key >= all->at && m->value > m->key + m->key_len);
    all->at = m->value + m->value_len;
    all->n++;
    json_t *v = json_loadb(m->value, m->value_len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
    require(!all->whole || (v && same(v, json_object_get(all->whole, m->name))));
    json_decref(v);
}

/* jansson overlooks some NUL bytes, knows no mark, and refuses numbers that are too big. */
static void try_reader(const char *s, size_t n) {
    const int flags = JSON_DECODE_ANY | JSON_ALLOW_NUL | JSON_REJECT_DUPLICATES;
    json_error_t why;
    json_read_error e = {.text = ""};
    json_t *want = json_loadb(s, n, flags, &why);
    members all = {.at = s, .whole = want};
    json_t *got = json_read(s, n, check_member, &all, &e);
    const int has_mark = n >= 3 && !memcmp(s, "\xef\xbb\xbf", 3);
    require(!got == !!*e.text);
    require(!got || want || has_mark || json_error_code(&why) == json_error_numeric_overflow);
    require(!want || got || memchr(s, 0, n));
    require(!want || !got || same(want, got));
    require(!got || !json_is_object(got) || all.n == json_object_size(got));
    json_decref(want);
    json_decref(got);
}

/* An id is written to the output unchanged. */
static void require_id(const char *id, size_t len) {
    require(!id == !len);
    if (!id) return;
    require(!memchr(id, '\n', len));
    json_error_t why;
    json_t *v = json_loadb(id, len, JSON_DECODE_ANY | JSON_ALLOW_NUL, &why);
    require(v != NULL || json_error_code(&why) == json_error_numeric_overflow);
    json_decref(v);
}

static void require_utf8(const char *s, size_t len) {
    json_t *v = json_stringn(s, len); /* NULL unless UTF-8 */
    require(v != NULL);
    json_decref(v);
}

/* What is kept is a line's part, and the object's keys that neither input nor output has. */
static void require_kept(const input_object *o, const char *line, size_t size) {
    static const char *const others[] = {"id",
                                         "text",
                                         "ids",
                                         "instruct",
                                         "dim",
                                         "embedding",
                                         "tokens",
                                         "truncated_bytes",
                                         "truncated_tokens",
                                         "line",
                                         "error"};
    json_read_error e;
    json_t *all = json_read(line, size, NULL, NULL, &e);
    if (!json_is_object(all)) {
        require(!o->kept_len);
        json_decref(all);
        return;
    }
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) json_object_del(all, others[i]);
    require(o->kept_len <= size && (!o->kept_len || !memchr(o->kept, '\n', o->kept_len)));
    const size_t n = o->kept_len ? o->kept_len - 1 : 0; /* without its comma */
    char *object = malloc(n + 2);
    object[0] = '{', object[n + 1] = '}';
    if (n) memcpy(object + 1, o->kept + 1, n);
    json_t *kept = json_read(object, n + 2, NULL, NULL, &e);
    require(kept && json_equal(kept, all));
    free(object);
    json_decref(kept);
    json_decref(all);
}

static void try_text(input_parser *parser, int keeps, const char *line, size_t size) {
    input_object o;
    qemb_err err = {NULL, ""};
    const int bad = input_parse(parser, line, size, &o, &err);
    require_id(o.id, o.id_len);
    if (keeps) require_kept(&o, line, size);
    require(keeps || !o.kept_len);
    if (bad) {
        require(err.code && *err.msg);
        return;
    }
    require(!o.text != !o.ids);
    require(o.dim >= 0 && o.dim <= HIDDEN);
    require(!o.instruct_len || (o.instruct && !o.ids));
    for (size_t i = 0; i < o.n_ids; i++) require(o.ids[i] >= 0 && o.ids[i] < VOCAB);
    require_utf8(o.text ? o.text : "", o.text_len);
}

static void try_ranking(input_parser *parser, const char *line, size_t size) {
    input_ranking o;
    qemb_err err = {NULL, ""};
    const int bad = input_parse_ranking(parser, line, size, &o, &err);
    require_id(o.id, o.id_len);
    if (bad) {
        require(err.code && *err.msg);
        return;
    }
    require(o.query != NULL);
    require_utf8(o.query, o.query_len);
    require_utf8(o.instruct ? o.instruct : "", o.instruct_len);
    for (size_t i = 0; i < o.n_documents; i++) {
        size_t len;
        const char *document = input_document(parser, i, &len);
        require(document != NULL);
        require_utf8(document, len);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static input_parser *parser, *keeping; /* kept, to find state that leaks into the next line */
    if (!parser) {
        parser = input_parser_new(VOCAB, HIDDEN);
        keeping = input_parser_new(VOCAB, HIDDEN);
        input_parser_keep(keeping);
    }
    try_reader((const char *)data, size);
    try_text(parser, 0, (const char *)data, size);
    try_text(keeping, 1, (const char *)data, size);
    try_ranking(parser, (const char *)data, size);
    return 0;
}
