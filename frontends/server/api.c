/* api.c - OpenAI's JSON, and what it shares with the other APIs; see api.h.
 *
 * Request: {"input": text | [text...] | [id...] | [[id...]...] | [{"text": text}...]} with the keys
 * of the tables below: OpenAI's, those by which the APIs of vLLM, NIM, Jina and Voyage say the
 * same, and the extensions "instruct" and "fallback".
 */
#include "api.h"

#include "frontends/console.h"
#include "frontends/json_read.h"

#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

int api_fail(api_error *e, int status, const char *code, const char *param, const char *fmt, ...) {
    va_list ap;
    e->status = status;
    e->code = code;
    e->retry_after = 0;
    snprintf(e->param, sizeof e->param, "%s", param ? param : "");
    va_start(ap, fmt);
    vsnprintf(e->msg, sizeof e->msg, fmt, ap);
    va_end(ap);
    return -1;
}

/* ---- requests -------------------------------------------------------------------------------- */

static int add_ids(api_request *r, const json_t *list, api_error *e) {
    api_input *in = &r->inputs[r->n++];
    *in = (api_input){.len = json_array_size(list), .first_id = r->n_ids};
    if (!in->len)
        return api_fail(e, 400, "empty_input", r->key, "%s: an empty list of token ids", r->key);
    for (size_t i = 0; i < in->len; i++) {
        const json_t *v = json_array_get(list, i);
        if (!json_is_integer(v))
            return api_fail(e, 400, "invalid_type", r->key,
                            "%s: wrong type in a list of token ids (got %s, want an integer)",
                            r->key, json_type_name(v));
        const json_int_t id = json_integer_value(v);
        if (id < 0 || id > INT32_MAX)
            return api_fail(e, 400, "invalid_token", r->key,
                            "%s: no such token (got %" JSON_INTEGER_FORMAT ")", r->key, id);
        r->ids[r->n_ids++] = (int32_t)id;
    }
    return 0;
}

void api_add_text(api_request *r, const json_t *v) {
    r->inputs[r->n++] = (api_input){.text = json_string_value(v), .len = json_string_length(v)};
}

/* Jina's form of a text, an object with "text" alone. */
static int add_object(api_request *r, size_t i, const json_t *v, api_error *e) {
    const json_t *text = json_object_get(v, "text");
    if (!json_is_string(text) || json_object_size(v) != 1)
        return api_fail(e, 400, "invalid_type", r->key,
                        "%s[%zu]: not a text (want an object with the string \"text\" alone)",
                        r->key, i);
    api_add_text(r, text);
    return 0;
}

int api_make_room(api_request *r, size_t n, size_t n_ids, api_error *e) {
    r->inputs = malloc((n + 1) * sizeof *r->inputs);
    r->ids = n_ids <= INT32_MAX ? malloc((n_ids + 1) * sizeof *r->ids) : NULL;
    if (r->inputs && r->ids) return 0;
    return api_fail(e, 503, "out_of_memory", NULL, "request: out of memory");
}

static int take_list(api_request *r, const json_t *list, api_error *e) {
    const size_t n = json_array_size(list);
    const json_t *first = json_array_get(list, 0);
    size_t n_ids = 0;
    if (!n) return api_fail(e, 400, "empty_input", r->key, "%s: an empty list", r->key);
    if (json_is_integer(first)) return api_make_room(r, 1, n, e) || add_ids(r, list, e) ? -1 : 0;
    if (!json_is_string(first) && !json_is_array(first) && !json_is_object(first))
        return api_fail(e, 400, "invalid_type", r->key,
                        "%s: wrong type in the list (got %s, want strings, token ids or lists of "
                        "token ids)",
                        r->key, json_type_name(first));
    if (n > (size_t)r->max_texts)
        return api_fail(e, 400, "too_many_inputs", r->key,
                        "%s: too many texts (got %zu, want at most %d)", r->key, n, r->max_texts);
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(list, i);
        if (json_typeof(v) != json_typeof(first))
            return api_fail(e, 400, "invalid_type", r->key,
                            "%s[%zu]: not of the first one's type (got %s, want %s)", r->key, i,
                            json_type_name(v), json_type_name(first));
        n_ids += json_array_size(v);
    }
    if (api_make_room(r, n, n_ids, e)) return -1;
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(list, i);
        if (json_is_string(v))
            api_add_text(r, v);
        else if (json_is_object(v) ? add_object(r, i, v, e) : add_ids(r, v, e))
            return -1;
    }
    return 0;
}

int api_take_input(api_request *r, const char *key, const json_t *v, api_error *e) {
    if (json_is_array(v)) return take_list(r, v, e);
    if (!json_is_string(v)) return api_wrong_type(e, key, v, "a string or a list");
    if (api_make_room(r, 1, 0, e)) return -1;
    api_add_text(r, v);
    return 0;
}

/* The names by which the APIs ask for a form of vectors. */
static const struct {
    const char *name;
    format_kind kind;
    int is_signed;
} kinds[] = {{"float32", FORMAT_F32, 0},   {"float", FORMAT_F32, 0},
             {"float16", FORMAT_F16, 0},   {"int8", FORMAT_INT8, 0},
             {"binary", FORMAT_BINARY, 1}, {"ubinary", FORMAT_BINARY, 0}};

/* embed_dtype (vLLM), output_dtype (Voyage, Mistral), embedding_type (Jina), encoding_format: the
 * first says how, the last whether as numbers or base64. Some servers take both by one key. */
static int take_output(api_request *r, const char *key, const json_t *v, api_error *e) {
    const char *s = NULL;
    if (api_name(&s, key, v, e)) return -1;
    const int is_encoding = !strcmp(key, "encoding_format");
    const int is_float = is_encoding && !strcmp(s, "float");
    if (is_float || (!strcmp(s, "base64") && strcmp(key, "embed_dtype"))) {
        if (r->base64 >= 0 && r->base64 != !is_float) return api_conflict(e, key, "another key");
        r->base64 = !is_float;
        return 0;
    }
    for (int i = 0; i < LENGTH(kinds); i++) {
        if (strcmp(s, kinds[i].name)) continue;
        const api_output *o = &r->output;
        if (r->has_kind && (o->kind != kinds[i].kind || o->is_signed != kinds[i].is_signed))
            return api_conflict(e, key, "another key");
        r->output.kind = kinds[i].kind;
        r->output.is_signed = kinds[i].is_signed;
        r->has_kind = 1;
        return 0;
    }
    return api_fail(e, 400, "invalid_encoding_format", key,
                    "%s: not served (got %.40s, want %sfloat16, int8, binary or ubinary)", key, s,
                    is_encoding ? "float, base64, " : "float32, ");
}

static int take_endianness(api_request *r, const char *key, const json_t *v, api_error *e) {
    const char *s = NULL;
    (void)r;
    if (api_name(&s, key, v, e)) return -1;
    if (!strcmp(s, "native") || !strcmp(s, "little")) return 0;
    return api_fail(e, 400, "invalid_encoding_format", key, "%s: not served (got %.40s, want %s)",
                    key, s, "little");
}

/* vLLM: -1 is the model's limit. Of N tokens it keeps the last ones, unless truncation_side says
 * otherwise, which api_parse looks at. */
static int take_prompt_tokens(api_request *r, const char *key, const json_t *v, api_error *e) {
    if (!json_is_integer(v)) return api_wrong_type(e, key, v, "an integer");
    if (json_integer_value(v) != -1 && api_count(&r->max_tokens, 1, key, v, e)) return -1;
    r->max_tokens_key = "truncate_prompt_tokens";
    return api_take_truncate(r, key, json_true(), e);
}

static const api_key embeddings_keys[] = {{"input", api_take_input},
                                          {"model", api_take_model},
                                          {"dimensions", api_take_dimensions},
                                          {"output_dimension", api_take_dimensions},
                                          {"encoding_format", take_output},
                                          {"embed_dtype", take_output},
                                          {"output_dtype", take_output},
                                          {"embedding_type", take_output},
                                          {"endianness", take_endianness},
                                          {"normalize", api_take_normalize},
                                          {"normalized", api_take_normalize},
                                          {"use_activation", api_take_normalize},
                                          {"instruct", api_take_instruct},
                                          {"instruction", api_take_instruct},
                                          {"input_type", api_take_prompt},
                                          {"prompt_name", api_take_prompt},
                                          {"task", api_take_prompt},
                                          {"truncate", api_take_truncate},
                                          {"truncation", api_take_truncate},
                                          {"truncate_prompt_tokens", take_prompt_tokens},
                                          {"truncation_side", api_take_direction},
                                          {"truncation_direction", api_take_direction},
                                          {"fallback", api_take_fallback},
                                          {NULL, NULL}};

int api_load(api_request *r, const char *body, size_t len, int max_texts, api_error *e) {
    json_read_error je;
    *r = (api_request){.key = "input",
                       .max_texts = max_texts,
                       .output = {.kind = FORMAT_F32},
                       .truncate = -1,
                       .normalize = -1,
                       .base64 = -1};
    json_t *root = json_read(body, len, NULL, NULL, &je);
    if (!root && je.fault == JSON_FAULT_MEMORY)
        return api_fail(e, 503, "out_of_memory", NULL, "request: out of memory");
    if (!root) return api_fail(e, 400, "invalid_json", NULL, "body: %s", je.text);
    r->json = root;
    if (!json_is_object(root))
        return api_fail(e, 400, "invalid_json", NULL, "body: wrong type (got %s, want an object)",
                        json_type_name(root));
    return 0;
}

int api_check_request(api_request *r, api_error *e) {
    const char *prompt = r->prompt_name ? r->prompt_key : "instruct";
    if (!r->inputs)
        return api_fail(e, 400, "missing_parameter", r->key, "%s: a required parameter", r->key);
    if (r->instruct && r->prompt_name) return api_conflict(e, r->prompt_key, "instruct");
    if ((r->instruct_len || r->prompt_name) && !r->inputs->text)
        return api_fail(e, 400, "invalid_instruct", prompt,
                        "%s: a prompt for token ids, which are complete", prompt);
    r->output.base64 = r->base64 == 1;
    r->output.unscaled = !r->normalize;
    return 0;
}

int api_parse(api_request *r, api_kind kind, const char *body, size_t len, int max_texts,
              api_error *e) {
    const int tokenize = kind == API_TOKENIZE;
    if (api_load(r, body, len, max_texts, e)) return -1;
    r->any_ids = tokenize; /* only to look at */
    if (api_parse_keys(r, embeddings_keys, e)) return -1;
    if (r->max_tokens && !r->says_right)
        return api_fail(e, 400, "invalid_truncation", "truncate_prompt_tokens",
                        "truncate_prompt_tokens: not served without truncation_side \"right\" "
                        "(got a number, of which vLLM keeps the last tokens)");
    return api_check_request(r, e);
}

void api_request_free(api_request *r) {
    json_decref(r->json);
    free(r->inputs);
    free(r->ids);
    r->json = NULL;
    r->inputs = NULL;
    r->ids = NULL;
    r->model = r->instruct = r->query = r->prompt_name = NULL;
}

/* ---- responses ------------------------------------------------------------------------------- */

/* Bytes around one vector or list of ids, and around all of them without the model's name. */
#define ITEM_ROOM  (96 + API_CUT_ROOM)
#define FRAME_ROOM 256

/* Writes ],"model":...,"usage":{...}, all that follows the data but the last brace. */
static char *put_tail(char *p, const char *model, uint64_t tokens) {
    p = put(p, "],\"model\":");
    p = format_json_string(p, model, strlen(model));
    p = format_uint(put(p, ",\"usage\":{\"prompt_tokens\":"), tokens);
    return put(format_uint(put(p, ",\"total_tokens\":"), tokens), "}");
}

char *api_put_cut(char *p, const pending_text *t) {
    if (t->cut_bytes) p = format_uint(put(p, ",\"truncated_bytes\":"), t->cut_bytes);
    if (t->cut_tokens) p = format_uint(put(p, ",\"truncated_tokens\":"), t->cut_tokens);
    return p;
}

int api_open_text(buffer *out, size_t room, api_error *e) {
    *out = (buffer){.data = malloc(room), .cap = room};
    return out->data ? 0 : api_fail(e, 503, "out_of_memory", NULL, "response: out of memory");
}

static int has_floats(const api_output *o) {
    return o->kind == FORMAT_F32 || o->kind == FORMAT_F16;
}

size_t api_vectors_room(int n, int dim, const api_output *o, size_t name_len) {
    const size_t bytes = format_vector_room(o->kind, dim);
    const size_t each = o->base64       ? (bytes + 2) / 3 * 4 + 2
                        : has_floats(o) ? format_vector_room(FORMAT_JSON, dim)
                                        : 5 * bytes + 2; /* "-128," */
    return (size_t)n * (each + ITEM_ROOM) + 6 * name_len + FRAME_ROOM;
}

/* Bytes (n) as numbers. */
static char *put_integers(char *p, const uint8_t *bytes, size_t n, int is_signed) {
    *p++ = '[';
    for (size_t i = 0; i < n; i++) {
        const int x = is_signed ? (int8_t)bytes[i] : bytes[i];
        if (i) *p++ = ',';
        if (x < 0) *p++ = '-';
        p = format_uint(p, (uint64_t)abs(x));
    }
    *p++ = ']';
    return p;
}

char *api_put_vector(char *p, const api_answer *a, int i, float *scratch, api_error *e) {
    const pending_text *t = &a->texts[i];
    const api_output *o = &a->output;
    const float *v = scratch;
    if (t->failed == TEXT_NO_MEMORY) {
        api_fail(e, 503, "out_of_memory", NULL, "response: out of memory");
        return NULL;
    }
    if (!t->failed && o->unscaled) v = t->vector->v;
    if (t->failed || (!o->unscaled && qemb_l2_normalize(scratch, t->vector->v, a->dim))) {
        api_fail(e, 422, "non_finite", a->key,
                 "%s[%d]: the model has no vector of finite length for it", a->key, i);
        return NULL;
    }
    if (!o->base64 && has_floats(o)) return format_vector(p, FORMAT_JSON, v, a->dim);
    uint8_t *bytes = (uint8_t *)(scratch + a->dim);
    const size_t n = format_vector_room(o->kind, a->dim);
    format_vector((char *)bytes, o->kind, v, a->dim);
    for (size_t k = 0; k < n && o->kind == FORMAT_BINARY && o->is_signed; k++) bytes[k] ^= 0x80;
    if (!o->base64) return put_integers(p, bytes, n, o->kind == FORMAT_INT8 || o->is_signed);
    *p++ = '"';
    return put(format_base64(p, bytes, n), "\"");
}

char *api_open_vectors(buffer *out, const api_answer *a, float **scratch, const char *start,
                       api_error *e) {
    *scratch = malloc(2 * (size_t)a->dim * sizeof **scratch); /* a vector, and its bytes */
    if (!*scratch) {
        api_fail(e, 503, "out_of_memory", NULL, "response: out of memory");
        return NULL;
    }
    const size_t room = api_vectors_room(a->n, a->dim, &a->output, strlen(a->model));
    if (!api_open_text(out, room, e)) return put(out->data, start);
    free(*scratch);
    return NULL;
}

int api_close_vectors(buffer *out, float *scratch, char *p) {
    free(scratch);
    if (p) {
        out->len = (size_t)(p - out->data);
        return 0;
    }
    free(out->data);
    *out = (buffer){0};
    return -1;
}

int api_embeddings(buffer *out, const api_answer *a, api_error *e) {
    float *scratch;
    char *p = api_open_vectors(out, a, &scratch, "{\"object\":\"list\",\"data\":[", e);
    if (!p) return -1;
    for (int i = 0; i < a->n && p; i++) {
        p = put(p, i ? ",{\"object\":\"embedding\",\"index\":"
                     : "{\"object\":\"embedding\",\"index\":");
        p = put(format_uint(p, (uint64_t)i), ",\"embedding\":");
        p = api_put_vector(p, a, i, scratch, e);
        if (p) p = put(api_put_cut(p, &a->texts[i]), "}");
    }
    if (p) {
        p = put_tail(p, a->model, a->tokens);
        p = put(put(put(p, ",\"system_fingerprint\":\""), a->recipe), "\"}");
    }
    return api_close_vectors(out, scratch, p);
}

int api_tokens(buffer *out, const pending_text *texts, int n, int max_tokens, const char *model,
               uint64_t tokens, api_error *e) {
    if (api_open_text(out, (size_t)n * ITEM_ROOM + tokens * 11 + 6 * strlen(model) + FRAME_ROOM, e))
        return -1;
    char *p = put(out->data, "{\"object\":\"list\",\"data\":[");
    for (int i = 0; i < n; i++) {
        const text *t = texts[i].text;
        p = put(p, i ? ",{\"object\":\"tokens\",\"index\":" : "{\"object\":\"tokens\",\"index\":");
        p = put(format_uint(p, (uint64_t)i), ",\"tokens\":[");
        for (int k = 0; k < t->n; k++) {
            if (k) *p++ = ',';
            p = format_uint(p, (uint64_t)t->ids[k]);
        }
        p = put(api_put_cut(put(p, "]"), &texts[i]), "}");
    }
    p = format_uint(put(put_tail(p, model, tokens), ",\"max_tokens\":"), (uint64_t)max_tokens);
    out->len = (size_t)(put(p, "}") - out->data);
    return 0;
}

/* "kind" is not in OpenAI's API, whose clients ignore it. */
void api_model_json(buffer *out, const api_model *model, long created) {
    char name[6 * 256 + 2];
    const size_t len = strlen(model->name);
    *format_json_string(name, model->name, len < 255 ? len : 255) = 0;
    buffer_printf(out,
                  "{\"id\":%s,\"object\":\"model\",\"created\":%ld,\"owned_by\":\"qemb\","
                  "\"kind\":\"%s\"}",
                  name, created, model->is_reranker ? "reranker" : "embedding");
}

void api_models(buffer *out, const api_model *models, int n, long created) {
    buffer_printf(out, "{\"object\":\"list\",\"data\":[");
    for (int i = 0; i < n; i++) {
        buffer_printf(out, i ? "," : "");
        api_model_json(out, &models[i], created);
    }
    buffer_printf(out, "]}");
}

void api_error_json(buffer *out, const api_error *e) {
    const char *type = e->status == 429   ? "rate_limit_error"
                       : e->status >= 500 ? "server_error"
                                          : "invalid_request_error";
    char msg[6 * sizeof e->msg + 3], param[6 * sizeof e->param + 3];
    *format_json_string(msg, e->msg, strlen(e->msg)) = 0;
    *format_json_string(param, e->param, strlen(e->param)) = 0;
    buffer_printf(out, "{\"error\":{\"message\":%s,\"type\":\"%s\",\"param\":%s,\"code\":\"%s\"}}",
                  msg, type, *e->param ? param : "null", e->code);
}
