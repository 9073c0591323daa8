/* fuzz_request.c - libFuzzer target: any bytes as the body of a request to qemb-serve. It is
 * parsed, or refused with an error that is valid JSON. The first byte chooses the API. A body that
 * is a string is also tried as the input of a request, or as a document. What is accepted is
 * answered with made-up vectors or logits, in JSON with every wanted result. The bytes are also
 * decoded as gzip and zstd, in pieces, and read as a header. */
#include "frontends/decompress.h"
#include "frontends/server/api_ollama.h"
#include "frontends/server/api_rerank.h"
#include "frontends/server/api_tei.h"
#include "frontends/server/http_header.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MAX_TEXTS 16
#define CHECK(x)  ((x) ? (void)0 : abort())

static void check_request(const api_request *r) {
    CHECK(r->n >= 1 && r->n <= MAX_TEXTS);
    CHECK(r->truncate >= -1 && r->truncate <= 1 && r->dimensions >= 0 && r->max_tokens >= 0);
    CHECK(r->fallback == 0 || r->fallback == 1);
    size_t n_ids = 0, bytes = 0;
    for (int i = 0; i < r->n; i++) {
        const api_input *in = &r->inputs[i];
        for (size_t k = 0; in->text && k < in->len; k++) bytes += in->text[k] != 0;
        if (in->text) continue;
        CHECK((size_t)in->first_id == n_ids && in->len >= 1);
        n_ids += in->len;
    }
    CHECK(n_ids == (size_t)r->n_ids && bytes + 1);
    for (size_t k = 0; k < n_ids; k++) CHECK(r->ids[k] >= 0);
}

static void check_error(const api_error *e) {
    buffer out = {0};
    CHECK(e->status >= 400 && e->status < 600 && *e->code && *e->msg);
    api_error_json(&out, e);
    json_t *v = json_loadb(out.data, out.len, 0, NULL);
    CHECK(json_is_string(json_object_get(json_object_get(v, "error"), "message")));
    json_decref(v);
    free(out.data);
}

static void check_ranking_error(api_error *e, int is_tei) {
    buffer out = {0};
    CHECK(e->status >= 400 && e->status < 600 && *e->code && *e->msg);
    api_rerank_error(&out, is_tei, e);
    json_t *v = json_loadb(out.data, out.len, 0, NULL);
    CHECK(json_is_string(json_object_get(v, is_tei ? "error" : "detail")));
    json_decref(v);
    free(out.data);
}

/* The APIs of embeddings. */
typedef enum { OPENAI, TOKENIZE, TEI, OLLAMA, OLLAMA_OLD } dialect;

static int parse_as(api_request *r, dialect d, const char *body, size_t n, api_error *e) {
    if (d == TEI) return api_tei_parse(r, body, n, MAX_TEXTS, e);
    if (d >= OLLAMA) return api_ollama_parse(r, d == OLLAMA_OLD, body, n, MAX_TEXTS, e);
    return api_parse(r, d == TOKENIZE ? API_TOKENIZE : API_EMBEDDINGS, body, n, MAX_TEXTS, e);
}

/* The vectors of a response, as many as texts, each of them with `each` numbers, or a string. */
static void check_vectors(const api_request *r, dialect d, const json_t *v, size_t each) {
    const json_t *list = d == TEI      ? v
                         : d == OLLAMA ? json_object_get(v, "embeddings")
                                       : json_object_get(v, "data");
    CHECK(d == OLLAMA_OLD || json_array_size(list) == (size_t)r->n);
    for (int i = 0; i < r->n; i++) {
        const json_t *x =
            d == OLLAMA_OLD ? json_object_get(v, "embedding") : json_array_get(list, (size_t)i);
        if (d == OPENAI) x = json_object_get(x, "embedding");
        CHECK(r->output.base64 ? json_is_string(x) : json_array_size(x) == each);
    }
}

static void check_embeddings(const api_request *r, dialect d) {
    static const float v[] = {-3e38f, 1e-38f, 0.5f, -0.25f, 7, 1, 1, 1, -1};
    enum { DIM = sizeof v / sizeof *v };
    const size_t each = r->output.kind == FORMAT_BINARY ? 2 : DIM;
    pending_text texts[MAX_TEXTS] = {{0}};
    buffer out = {0};
    api_error e;
    for (int i = 0; i < r->n; i++) texts[i].vector = vector_new(v, DIM);
    const api_answer a = {.texts = texts,
                          .n = r->n,
                          .dim = DIM,
                          .output = r->output,
                          .key = r->key,
                          .model = "\"",
                          .recipe = "0123456789abcdef0123456789abcdef"};
    CHECK(!(d == TEI      ? api_tei(&out, &a, &e)
            : d >= OLLAMA ? api_ollama(&out, &a, d == OLLAMA_OLD, &e)
                          : api_embeddings(&out, &a, &e)));
    CHECK(out.len <= api_vectors_room(r->n, DIM, &r->output, 1));
    json_t *parsed = json_loadb(out.data, out.len, 0, NULL);
    CHECK(parsed);
    check_vectors(r, d, parsed, each);
    json_decref(parsed);
    free(out.data);
    for (int i = 0; i < r->n; i++) vector_drop(texts[i].vector);
}

static void check_answer(const api_request *r) {
    pending_text texts[MAX_TEXTS] = {{0}};
    buffer out = {0};
    api_error e;
    for (int i = 0; i < r->n; i++) texts[i].vector = vector_new(&(float){(float)(i * 7 % 5)}, 1);
    for (int i = 0; i < r->n; i += 2) texts[i].cut_bytes = INT64_MAX;
    const api_rerank_frame frame = {.id = "id", .model = "\"", .version = "1", .tokens = 5};
    CHECK(!api_rerank(&out, r, texts, &frame, &e));
    CHECK(out.len <= api_rerank_room(r, 1));
    json_t *v = json_loadb(out.data, out.len, JSON_ALLOW_NUL, NULL);
    const json_t *results = r->is_tei ? v : json_object_get(v, "results");
    CHECK(json_array_size(results) == (size_t)(r->top_n && r->top_n < r->n ? r->top_n : r->n));
    json_decref(v);
    free(out.data);
    for (int i = 0; i < r->n; i++) vector_drop(texts[i].vector);
}

static void parse_ranking(int with_tei, const char *body, size_t n) {
    api_request r;
    api_error e;
    if (api_rerank_parse(&r, with_tei, body, n, MAX_TEXTS, &e)) {
        check_ranking_error(&e, r.is_tei);
    } else {
        CHECK(r.n >= 1 && r.n <= MAX_TEXTS && r.query && r.top_n >= 0 && r.max_document >= 0);
        CHECK(r.truncate >= -1 && r.truncate <= 1 && (with_tei || !r.is_tei));
        for (int i = 0; i < r.n; i++) CHECK(r.inputs[i].text);
        check_answer(&r);
    }
    api_request_free(&r);
}

static void parse(dialect d, const char *body, size_t n) {
    api_request r;
    api_error e;
    if (parse_as(&r, d, body, n, &e)) {
        d == TEI ? check_ranking_error(&e, 1) : check_error(&e);
    } else {
        check_request(&r);
        if (d != TOKENIZE) check_embeddings(&r, d);
    }
    api_request_free(&r);
}

/* The bytes of kind: 2 rerank, 4 with the form of text-embeddings-inference; else a dialect. */
static dialect dialect_of(int kind) {
    return kind & 8   ? (kind & 4   ? OLLAMA_OLD
                         : kind & 1 ? OLLAMA
                                    : TEI)
           : kind & 1 ? TOKENIZE
                      : OPENAI;
}

static void parse_any(int kind, const char *body, size_t n) {
    if (kind & 2)
        parse_ranking(!!(kind & 4), body, n);
    else
        parse(dialect_of(kind), body, n);
}

/* All bytes are used up or refused, in pieces of any size, into a buffer of its exact size. */
static void decode(compression c, const char *data, size_t n) {
    decompressor *d = decompressor_new(c, 23);
    CHECK(d);
    size_t total = 0;
    ptrdiff_t got = 0;
    for (size_t at = 0; at < n && got >= 0 && total < 1 << 16; at += 7) {
        const char *in = data + at, *end = data + (n - at < 7 ? n : at + 7);
        do {
            char *out = malloc(64);
            CHECK(out);
            got = decompress(d, &in, (size_t)(end - in), out, 64);
            CHECK(got <= 64);
            total += got > 0 ? (size_t)got : 0;
            free(out);
        } while (got == 64 && total < 1 << 16);
    }
    decompressor_free(d);
}

static void read_header(const char *data, size_t n) {
    char trace[TRACE_ROOM], span[SPAN_ROOM];
    const char *model = NULL;
    char *s = malloc(n + 1);
    CHECK(s);
    memcpy(s, data, n);
    s[n] = 0;
    const route r = route_of("POST", s, &model);
    CHECK((r == ROUTE_MODEL) == !!model && (!model || (model > s && model < s + strlen(s))));
    is_json_type(s);
    is_header_list(s);
    coding_of(s);
    if (trace_parse(s, trace, span))
        CHECK(!*trace && !*span);
    else
        CHECK(strlen(trace) == TRACE_ROOM - 1 && strlen(span) == SPAN_ROOM - 1);
    free(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const around[][2] = {
        {"{\"model\":\"m\",\"input\":", "}"},
        {"{\"return_documents\":true,\"query\":\"q\",\"documents\":[\"\",", "]}"},
        {"{\"return_text\":true,\"query\":\"q\",\"texts\":[\"\",", "]}"},
        {"{\"normalize\":false,\"inputs\":", "}"},
        {"{\"prompt\":", "}"},
    };
    if (!size) return 0;
    const int kind = *data;
    const dialect d = dialect_of(kind);
    const char *const *ends = around[kind & 2          ? (kind & 4 ? 2 : 1)
                                     : d == TEI        ? 3
                                     : d == OLLAMA_OLD ? 4
                                                       : 0];
    decode(kind & 1 ? COMPRESSION_DEFLATE : COMPRESSION_ZSTD, (const char *)data + 1, size - 1);
    read_header((const char *)data + 1, size - 1);
    parse_any(kind, (const char *)data + 1, size - 1);
    const size_t before = strlen(ends[0]), after = strlen(ends[1]);
    const size_t n = before + size - 1 + after;
    char *body = malloc(n);
    CHECK(body);
    memcpy(body, ends[0], before);
    memcpy(body + before, data + 1, size - 1);
    memcpy(body + n - after, ends[1], after);
    parse_any(kind, body, n);
    free(body);
    return 0;
}
