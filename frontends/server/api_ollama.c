/* api_ollama.c - the JSON of Ollama; see api_ollama.h.
 *
 * Requests: {"model", "input": text | [text...], "truncate", "dimensions", "options",
 * "keep_alive"} to /api/embed, {"model", "prompt": text, ...} to /api/embeddings, and "instruct"
 * beside. As in Ollama's API, long texts are cut unless truncate is false. The vectors of both have
 * length 1, and the fields of a response do not say what was cut.
 */
#include "api_ollama.h"

#include "frontends/parameters.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* ---- requests -------------------------------------------------------------------------------- */

/* Of the options of a run, num_ctx is the longest text; the others are about other models. */
static int take_options(api_request *r, const char *key, const json_t *v, api_error *e) {
    const json_t *longest = json_object_get(v, "num_ctx");
    if (!json_is_object(v)) return api_wrong_type(e, key, v, "an object");
    if (!longest || json_is_null(longest)) return 0;
    r->max_tokens_key = "options.num_ctx";
    return api_count(&r->max_tokens, 1, r->max_tokens_key, longest, e);
}

static int take_text(api_request *r, const char *key, const json_t *v, api_error *e) {
    return json_is_string(v) ? api_take_input(r, key, v, e) : api_wrong_type(e, key, v, "a string");
}

static const api_key embed_keys[] = {{"input", api_take_input},
                                     {"model", api_take_model},
                                     {"dimensions", api_take_dimensions},
                                     {"truncate", api_take_truncate},
                                     {"options", take_options},
                                     {"instruct", api_take_instruct},
                                     {NULL, NULL}};
static const api_key old_keys[] = {{"prompt", take_text},
                                   {"model", api_take_model},
                                   {"dimensions", api_take_dimensions},
                                   {"truncate", api_take_truncate},
                                   {"options", take_options},
                                   {"instruct", api_take_instruct},
                                   {NULL, NULL}};
static const api_key show_keys[] = {
    {"model", api_take_model}, {"name", api_take_model}, {NULL, NULL}};

int api_ollama_parse(api_request *r, int is_old, const char *body, size_t len, int max_texts,
                     api_error *e) {
    const int bad = api_load(r, body, len, max_texts, e);
    r->key = is_old ? "prompt" : "input";
    if (bad || api_parse_keys(r, is_old ? old_keys : embed_keys, e)) return -1;
    if (r->truncate < 0) r->truncate = 1;
    return api_check_request(r, e);
}

int api_ollama_parse_show(api_request *r, const char *body, size_t len, api_error *e) {
    return api_load(r, body, len, 0, e) || api_parse_keys(r, show_keys, e) ? -1 : 0;
}

/* ---- responses ------------------------------------------------------------------------------- */

int api_ollama(buffer *out, const api_answer *a, int is_old, api_error *e) {
    float *scratch;
    char *p = api_open_vectors(out, a, &scratch, is_old ? "{\"embedding\":" : "{\"model\":", e);
    if (!p) return -1;
    if (!is_old) p = put(format_json_string(p, a->model, strlen(a->model)), ",\"embeddings\":[");
    for (int i = 0; i < a->n && p; i++) {
        if (i) *p++ = ',';
        p = api_put_vector(p, a, i, scratch, e);
    }
    if (p && !is_old) {
        p = format_uint(put(p, "],\"total_duration\":"), (uint64_t)(1e9 * a->seconds));
        p = format_uint(put(p, ",\"load_duration\":0,\"prompt_eval_count\":"), a->tokens);
    }
    return api_close_vectors(out, scratch, p ? put(p, "}") : NULL);
}

void api_ollama_error(buffer *out, const api_error *e) {
    char msg[6 * sizeof e->msg + 3];
    *format_json_string(msg, e->msg, strlen(e->msg)) = 0;
    buffer_printf(out, "{\"error\":%s}", msg);
}

static size_t parameters_of(const qemb_config *c) {
    const model_parameters n = count_parameters(c);
    return n.layers + n.tokens + n.positions;
}

/* Ollama's name for an architecture. */
static const char *family_of(const qemb_config *c) {
    return c->architecture == QEMB_BERT ? "bert" : "qwen3";
}

/* Writes "modified_at" and "details". */
static void put_details(buffer *out, const api_ollama_card *c) {
    char at[32];
    struct tm tm;
    const time_t loaded = c->loaded;
    const char *family = family_of(&c->file->config);
    strftime(at, sizeof at, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&loaded, &tm));
    buffer_printf(out,
                  "\"modified_at\":\"%s\",\"details\":{\"parent_model\":\"\",\"format\":\"qemb\","
                  "\"family\":\"%s\",\"families\":[\"%s\"],\"parameter_size\":\"%.1fM\","
                  "\"quantization_level\":\"%s\"}",
                  at, family, family, 1e-6 * (double)parameters_of(&c->file->config),
                  c->file->weights.layers[0].wqkv.dtype == QEMB_I8 ? "int8" : "F16");
}

void api_ollama_tags(buffer *out, const api_ollama_card *cards, int n) {
    buffer_printf(out, "{\"models\":[");
    for (int i = 0; i < n; i++) {
        char name[6 * 256 + 2], digest[65];
        const size_t len = strlen(cards[i].name);
        *format_json_string(name, cards[i].name, len < 255 ? len : 255) = 0;
        *format_hex(digest, cards[i].file->sha256, 32) = 0;
        buffer_printf(out, "%s{\"name\":%s,\"model\":%s,\"size\":%zu,\"digest\":\"%s\",",
                      i ? "," : "", name, name, cards[i].file->map_bytes, digest);
        put_details(out, &cards[i]);
        buffer_printf(out, "}");
    }
    buffer_printf(out, "]}");
}

void api_ollama_show(buffer *out, const api_ollama_card *c) {
    const qemb_config *o = &c->file->config;
    const char *family = family_of(o);
    buffer_printf(out, "{\"template\":\"{{ .Prompt }}\",");
    put_details(out, c);
    buffer_printf(out,
                  ",\"model_info\":{\"general.architecture\":\"%s\","
                  "\"general.parameter_count\":%zu,\"%s.context_length\":%d,"
                  "\"%s.embedding_length\":%d},\"capabilities\":[%s]}",
                  family, parameters_of(o), family, c->max_tokens, family, qemb_dim(o),
                  o->kind == QEMB_RERANKER ? "" : "\"embedding\"");
}
