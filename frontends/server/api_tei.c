/* api_tei.c - the JSON of text-embeddings-inference; see api_tei.h.
 *
 * Request: {"inputs": as OpenAI's input, "truncate", "truncation_direction", "prompt_name",
 * "normalize", "dimensions"}, and "model", "instruct" and "encoding_format": "float" beside.
 */
#include "api_tei.h"

/* Of InferenceClient of huggingface_hub, which sends what its caller says. */
static int take_encoding(api_request *r, const char *key, const json_t *v, api_error *e) {
    const char *s = NULL;
    (void)r;
    if (json_is_string(v) && api_name(&s, key, v, e)) return -1;
    if (s && !strcmp(s, "float")) return 0;
    return api_fail(e, 400, "invalid_encoding_format", key, "%s: not served (got %.40s, want %s)",
                    key, s ? s : json_type_name(v), "float, or base64 at /v1/embeddings");
}

static const api_key keys[] = {{"inputs", api_take_input},
                               {"model", api_take_model},
                               {"dimensions", api_take_dimensions},
                               {"encoding_format", take_encoding},
                               {"normalize", api_take_normalize},
                               {"instruct", api_take_instruct},
                               {"prompt_name", api_take_prompt},
                               {"truncate", api_take_truncate},
                               {"truncation_direction", api_take_direction},
                               {NULL, NULL}};

int api_tei_parse(api_request *r, const char *body, size_t len, int max_texts, api_error *e) {
    const int bad = api_load(r, body, len, max_texts, e);
    r->is_tei = 1;
    r->key = "inputs";
    return bad || api_parse_keys(r, keys, e) || api_check_request(r, e) ? -1 : 0;
}

int api_tei(buffer *out, const api_answer *a, api_error *e) {
    float *scratch;
    char *p = api_open_vectors(out, a, &scratch, "[", e);
    if (!p) return -1;
    for (int i = 0; i < a->n && p; i++) {
        if (i) *p++ = ',';
        p = api_put_vector(p, a, i, scratch, e);
    }
    return api_close_vectors(out, scratch, p ? put(p, "]") : NULL);
}

/* Returns the type of the error, and sets its status. */
static const char *type_of(api_error *e) {
    if (e->status == 429) return "Overloaded";
    if (e->status == 503) return "Unhealthy";
    if (!strcmp(e->code, "empty_input")) return "Empty";
    if (!strcmp(e->code, "non_finite")) {
        e->status = 424;
        return "Backend";
    }
    if (e->status == 400) e->status = 422;
    return "Validation";
}

void api_tei_error(buffer *out, api_error *e) {
    char msg[6 * sizeof e->msg + 3];
    const char *type = type_of(e);
    *format_json_string(msg, e->msg, strlen(e->msg)) = 0;
    buffer_printf(out, "{\"error\":%s,\"error_type\":\"%s\"}", msg, type);
}

void api_tei_info(buffer *out, const api_tei_card *c) {
    char name[6 * 256 + 2];
    const size_t len = strlen(c->model);
    *format_json_string(name, c->model, len < 255 ? len : 255) = 0;
    buffer_printf(out, "{\"model_id\":%s,\"model_sha\":null,\"model_dtype\":\"%s\",\"model_type\":",
                  name, c->dtype);
    if (c->pooling)
        buffer_printf(out, "{\"embedding\":{\"pooling\":\"%s\"}}", c->pooling);
    else
        buffer_printf(out, "{\"reranker\":{\"id2label\":{\"0\":\"LABEL_0\"},"
                           "\"label2id\":{\"LABEL_0\":0}}}");
    buffer_printf(out,
                  ",\"max_concurrent_requests\":%d,\"max_input_length\":%d,"
                  "\"max_batch_tokens\":%d,\"max_batch_requests\":null,"
                  "\"max_client_batch_size\":%d,\"auto_truncate\":%s,"
                  "\"tokenization_workers\":%d,\"version\":\"" QEMB_VERSION "\",\"sha\":null,"
                  "\"docker_label\":null}",
                  c->max_requests, c->max_tokens, c->batch_tokens, c->max_texts,
                  c->truncates ? "true" : "false", c->threads);
}
