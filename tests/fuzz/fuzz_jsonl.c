/* fuzz_jsonl.c - libFuzzer target: any bytes as a JSON line. What is accepted has to be valid. */
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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static input_parser *parser; /* kept, to find state that leaks into the next line */
    if (!parser) parser = input_parser_new(VOCAB, HIDDEN);
    input_object o;
    qemb_err err = {NULL, ""};
    const int bad = input_parse(parser, (const char *)data, size, &o, &err);
    require(!o.id == !o.id_len);
    if (o.id) { /* is written to the output unchanged */
        require(!memchr(o.id, '\n', o.id_len));
        json_t *id = json_loadb(o.id, o.id_len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
        require(id != NULL);
        json_decref(id);
    }
    if (bad) {
        require(err.code && *err.msg);
        return 0;
    }
    require(!o.text != !o.ids);
    require(o.dim >= 0 && o.dim <= HIDDEN);
    require(!o.instruct_len || (o.instruct && !o.ids));
    for (size_t i = 0; i < o.n_ids; i++) require(o.ids[i] >= 0 && o.ids[i] < VOCAB);
    json_t *text = json_stringn(o.text ? o.text : "", o.text_len); /* NULL unless UTF-8 */
    require(text != NULL);
    json_decref(text);
    return 0;
}
