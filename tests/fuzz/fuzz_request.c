/* fuzz_request.c - libFuzzer target: any bytes as the body of a request to qemb-serve. It is
 * parsed, or refused with an error that is valid JSON. The first byte chooses the kind of request.
 * A body that is a string is also tried as the input of a request, or as a document. A request
 * to rerank is answered with made-up logits, in JSON with every wanted result. */
#include "frontends/server/api_rerank.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MAX_TEXTS 16
#define CHECK(x)  ((x) ? (void)0 : abort())

static void check_request(const api_request *r, api_kind kind) {
    CHECK(r->n >= 1 && r->n <= MAX_TEXTS && (r->model || kind == API_TOKENIZE));
    CHECK(r->truncate >= -1 && r->truncate <= 1 && r->dimensions >= 0);
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

static void parse(api_kind kind, const char *body, size_t n) {
    api_request r;
    api_error e;
    if (api_parse(&r, kind, body, n, MAX_TEXTS, &e))
        check_error(&e);
    else
        check_request(&r, kind);
    api_request_free(&r);
}

/* The bytes of kind: 1 tokenize, 2 rerank, 4 with the form of text-embeddings-inference. */
static void parse_any(int kind, const char *body, size_t n) {
    if (kind & 2)
        parse_ranking(!!(kind & 4), body, n);
    else
        parse(kind & 1 ? API_TOKENIZE : API_EMBEDDINGS, body, n);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char *const around[][2] = {
        {"{\"model\":\"m\",\"input\":", "}"},
        {"{\"return_documents\":true,\"query\":\"q\",\"documents\":[\"\",", "]}"},
        {"{\"return_text\":true,\"query\":\"q\",\"texts\":[\"\",", "]}"},
    };
    if (!size) return 0;
    const int kind = *data;
    const char *const *ends = around[!(kind & 2) ? 0 : kind & 4 ? 2 : 1];
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
