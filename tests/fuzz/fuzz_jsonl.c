/* fuzz_jsonl.c - libFuzzer target: any bytes as a JSON line, of a text and of a query with
 * documents. What is accepted has to be valid. */
#include "frontends/input.h"

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
                                         "\xc3\xa9",
                                         "\xff"};
    const char *piece = pieces[(seed >> 1) % (sizeof pieces / sizeof *pieces)];
    const size_t n = strlen(piece), at = size ? (seed >> 8) % (size + 1) : 0;
    if (seed & 1 || size + n > max_size) return LLVMFuzzerMutate(data, size, max_size);
    memmove(data + at + n, data + at, size - at);
    memcpy(data + at, piece, n);
    return size + n;
}

/* An id is written to the output unchanged. */
static void require_id(const char *id, size_t len) {
    require(!id == !len);
    if (!id) return;
    require(!memchr(id, '\n', len));
    json_t *v = json_loadb(id, len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
    require(v != NULL);
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
    const int flags = JSON_DECODE_ANY | JSON_ALLOW_NUL | JSON_REJECT_DUPLICATES;
    json_t *all = json_loadb(line, size, flags, NULL);
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
    json_t *kept = json_loadb(object, n + 2, flags, NULL);
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
    try_text(parser, 0, (const char *)data, size);
    try_text(keeping, 1, (const char *)data, size);
    try_ranking(parser, (const char *)data, size);
    return 0;
}
