/* fuzz_request.c - libFuzzer target: any bytes as the body of a request to qemb-serve. It is
 * parsed, or refused with an error that is valid JSON. The first byte chooses the kind of request.
 * A body that is a string is also tried as the input of a request. */
#include "frontends/server/api.h"

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

static void parse(api_kind kind, const char *body, size_t n) {
    api_request r;
    api_error e;
    if (api_parse(&r, kind, body, n, MAX_TEXTS, &e))
        check_error(&e);
    else
        check_request(&r, kind);
    api_request_free(&r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char start[] = "{\"model\":\"m\",\"input\":", end[] = "}";
    if (!size) return 0;
    const api_kind kind = *data & 1 ? API_TOKENIZE : API_EMBEDDINGS;
    parse(kind, (const char *)data + 1, size - 1);
    const size_t n = sizeof start - 1 + size - 1 + sizeof end - 1;
    char *body = malloc(n);
    CHECK(body);
    memcpy(body, start, sizeof start - 1);
    memcpy(body + sizeof start - 1, data + 1, size - 1);
    memcpy(body + n - 1, end, 1);
    parse(kind, body, n);
    free(body);
    return 0;
}
