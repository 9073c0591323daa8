/* api.c - parses requests and writes responses in OpenAI's JSON; see api.h.
 *
 * Request: {"input": text | [text...] | [id...] | [[id...]...], "model": name, and optionally
 * "dimensions", "encoding_format", "user" (ignored), and the extensions "instruct", "truncate" and
 * "fallback"}. null counts as not given. Other keys are errors, as in OpenAI's API, so that a
 * misspelt key is not ignored silently.
 */
#include "api.h"

#include "frontends/format.h"

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

const char *api_type_name(const json_t *v) {
    static const char *const names[] = {"an object", "a list", "a string", "an integer",
                                        "a real",    "true",   "false",    "null"};
    return names[json_typeof(v)];
}

int api_wrong_type(api_error *e, const char *key, const json_t *v, const char *want) {
    return api_fail(e, 400, "invalid_type", key, "%s: wrong type (got %s, want %s)", key,
                    api_type_name(v), want);
}

int api_unknown(api_error *e, const char *key, const char *known) {
    char name[65]; /* the first 64 bytes */
    snprintf(name, sizeof name, "%s", key);
    return api_fail(e, 400, "unknown_parameter", name, "%s: unknown parameter (want %s)", name,
                    known);
}

static int add_ids(api_request *r, const json_t *list, api_error *e) {
    api_input *in = &r->inputs[r->n++];
    *in = (api_input){.len = json_array_size(list), .first_id = r->n_ids};
    if (!in->len)
        return api_fail(e, 400, "empty_input", "input", "input: an empty list of token ids");
    for (size_t i = 0; i < in->len; i++) {
        const json_t *v = json_array_get(list, i);
        if (!json_is_integer(v))
            return api_fail(e, 400, "invalid_type", "input",
                            "input: wrong type in a list of token ids (got %s, want an integer)",
                            api_type_name(v));
        const json_int_t id = json_integer_value(v);
        if (id < 0 || id > INT32_MAX)
            return api_fail(e, 400, "invalid_token", "input",
                            "input: no such token (got %" JSON_INTEGER_FORMAT ")", id);
        r->ids[r->n_ids++] = (int32_t)id;
    }
    return 0;
}

void api_add_text(api_request *r, const json_t *v) {
    r->inputs[r->n++] = (api_input){.text = json_string_value(v), .len = json_string_length(v)};
}

int api_make_room(api_request *r, size_t n, size_t n_ids, api_error *e) {
    r->inputs = malloc((n + 1) * sizeof *r->inputs);
    r->ids = n_ids <= INT32_MAX ? malloc((n_ids + 1) * sizeof *r->ids) : NULL;
    if (r->inputs && r->ids) return 0;
    return api_fail(e, 503, "out_of_memory", NULL, "request: out of memory");
}

static int parse_list(api_request *r, const json_t *list, int max_texts, api_error *e) {
    const size_t n = json_array_size(list);
    const json_t *first = json_array_get(list, 0);
    size_t n_ids = 0;
    if (!n) return api_fail(e, 400, "empty_input", "input", "input: an empty list");
    if (json_is_integer(first)) return api_make_room(r, 1, n, e) || add_ids(r, list, e) ? -1 : 0;
    if (!json_is_string(first) && !json_is_array(first))
        return api_fail(e, 400, "invalid_type", "input",
                        "input: wrong type in the list (got %s, want strings, token ids or lists "
                        "of token ids)",
                        api_type_name(first));
    if (n > (size_t)max_texts)
        return api_fail(e, 400, "too_many_inputs", "input",
                        "input: too many texts (got %zu, want at most %d)", n, max_texts);
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(list, i);
        if (json_typeof(v) != json_typeof(first))
            return api_fail(e, 400, "invalid_type", "input",
                            "input[%zu]: not of the first one's type (got %s, want %s)", i,
                            api_type_name(v), api_type_name(first));
        n_ids += json_array_size(v);
    }
    if (api_make_room(r, n, n_ids, e)) return -1;
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(list, i);
        if (json_is_string(v))
            api_add_text(r, v);
        else if (add_ids(r, v, e))
            return -1;
    }
    return 0;
}

static int parse_input(api_request *r, const json_t *v, int max_texts, api_error *e) {
    if (json_is_array(v)) return parse_list(r, v, max_texts, e);
    if (!json_is_string(v)) return api_wrong_type(e, "input", v, "a string or a list");
    if (api_make_room(r, 1, 0, e)) return -1;
    api_add_text(r, v);
    return 0;
}

int api_bool(int *out, const char *key, const json_t *v, api_error *e) {
    if (json_is_null(v)) return 0;
    if (!json_is_boolean(v)) return api_wrong_type(e, key, v, "true or false");
    *out = json_is_true(v);
    return 0;
}

int api_string(const char **out, size_t *len, const char *key, const json_t *v, api_error *e) {
    if (json_is_null(v)) return 0;
    if (!json_is_string(v)) return api_wrong_type(e, key, v, "a string");
    *out = json_string_value(v);
    *len = json_string_length(v);
    return 0;
}

static int parse_dimensions(api_request *r, const json_t *v, api_error *e) {
    if (!json_is_integer(v)) return api_wrong_type(e, "dimensions", v, "an integer");
    const json_int_t x = json_integer_value(v);
    if (x < 1 || x > INT32_MAX)
        return api_fail(
            e, 400, "invalid_dimensions", "dimensions",
            "dimensions: out of range (got %" JSON_INTEGER_FORMAT ", want 1 up to the model's)", x);
    r->dimensions = (int)x;
    return 0;
}

static int parse_encoding(api_request *r, const json_t *v, api_error *e) {
    if (!json_is_string(v)) return api_wrong_type(e, "encoding_format", v, "a string");
    const char *s = json_string_value(v);
    r->base64 = !strcmp(s, "base64");
    if (r->base64 || !strcmp(s, "float")) return 0;
    return api_fail(e, 400, "invalid_encoding_format", "encoding_format",
                    "encoding_format: unknown (got %.40s, want float or base64)", s);
}

/* The keys of parse_field. */
static const char *const known[] = {
    [API_EMBEDDINGS] =
        "input, model, dimensions, encoding_format, user, instruct, truncate, fallback",
    [API_TOKENIZE] = "input, model, instruct, truncate",
};

static int parse_field(api_request *r, api_kind kind, const char *key, const json_t *v,
                       int max_texts, api_error *e) {
    const int embeddings = kind == API_EMBEDDINGS;
    if (!strcmp(key, "input")) return parse_input(r, v, max_texts, e);
    if (!strcmp(key, "user") && embeddings) return 0;
    const int is_null = json_is_null(v);
    size_t ignored;
    if (!strcmp(key, "model")) return api_string(&r->model, &ignored, key, v, e);
    if (!strcmp(key, "instruct")) return api_string(&r->instruct, &r->instruct_len, key, v, e);
    if (!strcmp(key, "truncate")) return api_bool(&r->truncate, key, v, e);
    if (embeddings && !strcmp(key, "fallback")) return api_bool(&r->fallback, key, v, e);
    if (embeddings && !strcmp(key, "dimensions")) return is_null ? 0 : parse_dimensions(r, v, e);
    if (embeddings && !strcmp(key, "encoding_format")) return is_null ? 0 : parse_encoding(r, v, e);
    return api_unknown(e, key, known[kind]);
}

int api_load(api_request *r, const char *body, size_t len, api_error *e) {
    json_error_t je;
    *r = (api_request){.truncate = -1, .key = "input"};
    json_t *root =
        json_loadb(body, len, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL, &je);
    if (!root && json_error_code(&je) == json_error_out_of_memory)
        return api_fail(e, 503, "out_of_memory", NULL, "request: out of memory");
    if (!root) /* not jansson's text: it quotes the body */
        return api_fail(e, 400, "invalid_json", NULL, "body: %s (byte %d)",
                        json_error_code(&je) == json_error_invalid_utf8    ? "invalid UTF-8"
                        : json_error_code(&je) == json_error_duplicate_key ? "a key occurs twice"
                                                                           : "not valid JSON",
                        je.position);
    r->json = root;
    if (!json_is_object(root))
        return api_fail(e, 400, "invalid_json", NULL, "body: wrong type (got %s, want an object)",
                        api_type_name(root));
    return 0;
}

int api_parse(api_request *r, api_kind kind, const char *body, size_t len, int max_texts,
              api_error *e) {
    const char *key;
    json_t *v;
    if (api_load(r, body, len, e)) return -1;
    json_t *root = r->json;
    json_object_foreach(root, key, v) if (parse_field(r, kind, key, v, max_texts, e)) return -1;
    if (!r->inputs)
        return api_fail(e, 400, "missing_parameter", "input", "input: a required parameter");
    if (!r->model && kind == API_EMBEDDINGS)
        return api_fail(e, 400, "missing_parameter", "model", "model: a required parameter");
    if (r->instruct_len && !r->inputs->text)
        return api_fail(e, 400, "invalid_instruct", "instruct",
                        "instruct: a prompt for token ids, which are complete");
    return 0;
}

void api_request_free(api_request *r) {
    json_decref(r->json);
    free(r->inputs);
    free(r->ids);
    r->json = NULL;
    r->inputs = NULL;
    r->ids = NULL;
    r->model = r->instruct = r->query = NULL;
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

size_t api_embeddings_room(int n, int dim, int base64, size_t name_len) {
    return (size_t)n * (format_vector_room(base64 ? FORMAT_BASE64 : FORMAT_JSON, dim) + ITEM_ROOM) +
           6 * name_len + FRAME_ROOM;
}

int api_embeddings(buffer *out, const pending_text *texts, int n, int dim, int base64,
                   const char *model, uint64_t tokens, api_error *e) {
    float *unit = malloc((size_t)dim * sizeof *unit);
    if (api_open_text(out, api_embeddings_room(n, dim, base64, strlen(model)), e)) {
        free(unit);
        return -1;
    }
    char *p = put(out->data, "{\"object\":\"list\",\"data\":[");
    int bad = unit ? 0 : api_fail(e, 503, "out_of_memory", NULL, "response: out of memory");
    for (int i = 0; i < n && !bad; i++) {
        p = put(p, i ? ",{\"object\":\"embedding\",\"index\":"
                     : "{\"object\":\"embedding\",\"index\":");
        p = put(format_uint(p, (uint64_t)i), ",\"embedding\":");
        if (texts[i].failed || qemb_l2_normalize(unit, texts[i].vector->v, dim)) {
            bad = api_fail(e, 422, "non_finite", "input",
                           "input[%d]: the model has no vector of finite length for it", i);
        } else if (base64) {
            *p++ = '"';
            p = put(format_vector(p, FORMAT_BASE64, unit, dim), "\"");
        } else {
            p = format_vector(p, FORMAT_JSON, unit, dim);
        }
        if (!bad) p = put(api_put_cut(p, &texts[i]), "}");
    }
    free(unit);
    if (bad) {
        free(out->data);
        *out = (buffer){0};
        return -1;
    }
    out->len = (size_t)(put(put_tail(p, model, tokens), "}") - out->data);
    return 0;
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
void api_models(buffer *out, const api_model *models, int n, long created) {
    buffer_printf(out, "{\"object\":\"list\",\"data\":[");
    for (int i = 0; i < n; i++) {
        char name[6 * 256 + 2];
        const size_t len = strlen(models[i].name);
        *format_json_string(name, models[i].name, len < 255 ? len : 255) = 0;
        buffer_printf(out,
                      "%s{\"id\":%s,\"object\":\"model\",\"created\":%ld,\"owned_by\":\"qemb\","
                      "\"kind\":\"%s\"}",
                      i ? "," : "", name, created,
                      models[i].is_reranker ? "reranker" : "embedding");
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
