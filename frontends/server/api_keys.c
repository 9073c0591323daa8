/* api_keys.c - the keys of a request: served, refused or ignored; see api.h.
 *
 * Clients send keys of many APIs. Ignoring one that would change the vector is worse than an error,
 * and so is ignoring a misspelt key; refusing all others would keep clients away. So a key that an
 * API's table does not have is looked up here.
 */
#include "api.h"

#include "frontends/console.h"
#include "frontends/json_read.h"

#include <ctype.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <strings.h>

/* ---- values ---------------------------------------------------------------------------------- */

int api_wrong_type(api_error *e, const char *key, const json_t *v, const char *want) {
    return api_fail(e, 400, "invalid_type", key, "%s: wrong type (got %s, want %s)", key,
                    json_type_name(v), want);
}

int api_conflict(api_error *e, const char *key, const char *other) {
    return api_fail(e, 400, "conflicting_parameters", key,
                    "%s: contradicts %s (got both, want one of them)", key, other);
}

int api_bool(int *out, const char *key, const json_t *v, api_error *e) {
    if (!json_is_boolean(v)) return api_wrong_type(e, key, v, "true or false");
    *out = json_is_true(v);
    return 0;
}

int api_string(const char **out, size_t *len, const char *key, const json_t *v, api_error *e) {
    if (!json_is_string(v)) return api_wrong_type(e, key, v, "a string");
    *out = json_string_value(v);
    *len = json_string_length(v);
    return 0;
}

int api_name(const char **out, const char *key, const json_t *v, api_error *e) {
    size_t len = 0;
    if (api_string(out, &len, key, v, e)) return -1;
    return strlen(*out) == len ? 0 : api_fail(e, 400, "invalid_name", key, "%s: NUL in it", key);
}

int api_count(int *out, int least, const char *key, const json_t *v, api_error *e) {
    if (!json_is_integer(v)) return api_wrong_type(e, key, v, "an integer");
    const json_int_t x = json_integer_value(v);
    if (x < least)
        return api_fail(e, 400, "invalid_number", key,
                        "%s: out of range (got %" JSON_INTEGER_FORMAT ", want %d or more)", key, x,
                        least);
    *out = x < INT_MAX ? (int)x : INT_MAX;
    return 0;
}

/* *out = value, unless another key has set it to something else (-1: none has). */
static int set_flag(int *out, int value, const char *key, const char *others, api_error *e) {
    if (*out >= 0 && *out != value) return api_conflict(e, key, others);
    *out = value;
    return 0;
}

/* ---- keys that several APIs have ------------------------------------------------------------- */

/* "" is what some clients send for no model. */
int api_take_model(api_request *r, const char *key, const json_t *v, api_error *e) {
    if (api_name(&r->model, key, v, e))
        return !json_is_string(v) ? -1
                                  : api_fail(e, 404, "model_not_found", key,
                                             "%s: not served here (got a name with NUL)", key);
    if (!*r->model) r->model = NULL;
    return 0;
}

int api_take_instruct(api_request *r, const char *key, const json_t *v, api_error *e) {
    if (r->instruct) return api_conflict(e, key, "instruct");
    return api_string(&r->instruct, &r->instruct_len, key, v, e);
}

int api_take_prompt(api_request *r, const char *key, const json_t *v, api_error *e) {
    if (r->prompt_name) return api_conflict(e, key, r->prompt_key);
    r->prompt_key = key;
    return api_name(&r->prompt_name, key, v, e);
}

int api_take_dimensions(api_request *r, const char *key, const json_t *v, api_error *e) {
    if (!json_is_integer(v)) return api_wrong_type(e, key, v, "an integer");
    const json_int_t x = json_integer_value(v);
    if (x < 1 || x > INT_MAX)
        return api_fail(e, 400, "invalid_dimensions", key,
                        "%s: out of range (got %" JSON_INTEGER_FORMAT ", want 1 up to the model's)",
                        key, x);
    if (r->dimensions && r->dimensions != x) return api_conflict(e, key, "another dimension");
    r->dimensions = (int)x;
    return 0;
}

int api_take_normalize(api_request *r, const char *key, const json_t *v, api_error *e) {
    int wanted = 0;
    return api_bool(&wanted, key, v, e) ? -1 : set_flag(&r->normalize, wanted, key, "normalize", e);
}

int api_take_fallback(api_request *r, const char *key, const json_t *v, api_error *e) {
    return api_bool(&r->fallback, key, v, e);
}

static int left_is_not_served(const char *key, const char *got, api_error *e) {
    return api_fail(e, 400, "invalid_truncation_direction", key,
                    "%s: not served, since the end of a long text is cut (got %.40s)", key, got);
}

int api_take_truncate(api_request *r, const char *key, const json_t *v, api_error *e) {
    int wanted = -1;
    const char *s = NULL;
    if (json_is_string(v) && api_name(&s, key, v, e)) return -1;
    if (s && !strcasecmp(s, "START")) return left_is_not_served(key, s, e);
    if (s && !strcasecmp(s, "NONE")) wanted = 0;
    if (s && !strcasecmp(s, "END")) wanted = 1;
    if (json_is_boolean(v)) wanted = json_is_true(v);
    if (wanted < 0)
        return s ? api_fail(e, 400, "invalid_truncation", key,
                            "%s: unknown (got %.40s, want true, false, \"NONE\" or \"END\")", key,
                            s)
                 : api_wrong_type(e, key, v, "true, false, \"NONE\" or \"END\"");
    return set_flag(&r->truncate, wanted, key, "another key about truncation", e);
}

int api_take_direction(api_request *r, const char *key, const json_t *v, api_error *e) {
    const char *s = NULL;
    if (api_name(&s, key, v, e)) return -1;
    if (!strcasecmp(s, "left")) return left_is_not_served(key, s, e);
    if (strcasecmp(s, "right"))
        return api_fail(e, 400, "invalid_truncation_direction", key,
                        "%s: unknown (got %.40s, want right)", key, s);
    r->says_right = 1;
    return 0;
}

/* ---- other keys ------------------------------------------------------------------------------ */

/* Keys that never change a vector or a score. */
static const char *const harmless[] = {
    "user",          "metadata",    "drop_params",       "timeout",     "keep_alive",
    "service_tier",  "priority",    "request_id",        "cache_salt",  "padding",
    "extra_headers", "num_retries", "safety_identifier", "max_retries", "custom_llm_provider"};

/* Of keys that /v1/embeddings serves and the path that is asked does not. */
#define NOT_HERE "a key of /v1/embeddings, not of this path"

/* Keys that change vectors in a way that is not served, except for the JSON value `idle` (and empty
 * lists and objects), which changes nothing. A path's own keys are not looked up here. */
static const struct {
    const char *name, *idle, *why;
} refused[] = {
    {"add_special_tokens", "true", "the model's file says which tokens are added"},
    {"late_chunking", "false", "each text is embedded by itself"},
    {"return_multivector", "false", "a text has one vector"},
    {"messages", NULL, "no chat templates, want input"},
    {"chat_template", NULL, "no chat templates"},
    {"chat_template_kwargs", NULL, "no chat templates"},
    {"add_generation_prompt", "false", "no chat templates"},
    {"continue_final_message", "false", "no chat templates"},
    {"mm_processor_kwargs", NULL, "texts alone are embedded"},
    {"modality", "\"text\"", "texts alone are embedded"},
    {"images", NULL, "texts alone are embedded"},
    {"image", NULL, "texts alone are embedded"},
    {"prompt", NULL, "want instruct, or the name of a prompt in prompt_name"},
    {"pooling", NULL, "the model's file says how to pool"},
    {"pooling_type", NULL, "the model's file says how to pool"},
    {"embd_normalize", "2", "want normalize"},
    {"embedding_types", NULL, "want embed_dtype"},
    {"precision", "\"float32\"", "want embed_dtype"},
    {"max_tokens", NULL, "want truncate_prompt_tokens with truncation_side \"right\""},
    {"parameters", NULL, "want its keys beside the inputs"},
    {"task_type", NULL, "want input_type"},
    {"text_type", NULL, "want input_type"},
    {"prompt_template", NULL, "want instruct, or the name of a prompt in prompt_name"},
    {"dim", NULL, "want dimensions"},
    {"dims", NULL, "want dimensions"},
    {"query", "false", "want input_type \"query\""},
    {"truncate_dim", NULL, "want dimensions"},
    {"dimensionality", NULL, "want dimensions"},
    {"output_dimensionality", NULL, "want dimensions"},
    {"normalize_embeddings", "true", "want normalize"},
    {"activation", "true", "want use_activation"},
    {"softmax", "true", "want use_activation"},
    {"max_length", NULL, "want truncate_prompt_tokens with truncation_side \"right\""},
    {"truncation_strategy", "\"end\"", "want truncate"},
    {"overflow_strategy", "\"drop_end\"", "want truncate"},
    {"long_text_mode", "\"truncate\"", "want truncate"},
    {"adapter_id", NULL, "want model, one of /v1/models"},
    {"dimensions", NULL, NOT_HERE},
    {"output_dimension", NULL, NOT_HERE},
    {"encoding_format", "\"float\"", NOT_HERE},
    {"embed_dtype", "\"float32\"", NOT_HERE},
    {"output_dtype", "\"float\"", NOT_HERE},
    {"embedding_type", "\"float\"", NOT_HERE},
    {"normalize", "true", NOT_HERE},
    {"normalized", "true", NOT_HERE},
    {"use_activation", "true", NOT_HERE},
    {"instruction", "\"\"", NOT_HERE},
    {"input_type", NULL, NOT_HERE},
    {"prompt_name", NULL, NOT_HERE},
    {"task", NULL, NOT_HERE},
    {"truncation", NULL, NOT_HERE},
    {"truncate_prompt_tokens", NULL, NOT_HERE},
    {"truncation_side", "\"right\"", NOT_HERE},
    {"truncation_direction", "\"right\"", NOT_HERE},
    {"fallback", "false", NOT_HERE},
    {"ids", NULL, "want the key of inputs in this API"},
    {"text", NULL, "want the key of texts in this API"},
    {"texts", NULL, "want the key of texts in this API"},
};

static int changes_nothing(const char *idle, const json_t *v) {
    int same =
        !json_array_size(v) && !json_object_size(v) && (json_is_array(v) || json_is_object(v));
    if (!idle || same) return same;
    json_read_error unused;
    json_t *want = json_read(idle, strlen(idle), NULL, NULL, &unused);
    size_t like = 0;
    for (size_t i = 0; i < json_array_size(v); i++) like += json_equal(json_array_get(v, i), want);
    same = json_equal(v, want) || (json_is_array(v) && like == json_array_size(v));
    json_decref(want);
    return same;
}

/* To look for the key that was meant costs a microsecond a name, and a body has room for many. */
enum { OTHERS_MOST = 100 };

static int lower(char c) { return tolower((unsigned char)c); }

/* The number of letters to add, remove, replace or swap with the next one to make a out of b, up to
 * the case of letters. Names of more than NAME_MOST bytes count as far apart. */
enum { NAME_MOST = 40 };

static int edits(const char *a, const char *b) {
    const int n = (int)strlen(a), m = (int)strlen(b);
    int row[3][NAME_MOST + 1] = {{0}}; /* of the last three prefixes of a; by prefix of b */
    if (n > NAME_MOST || m > NAME_MOST) return NAME_MOST;
    for (int j = 0; j <= m; j++) row[0][j] = j;
    for (int i = 1; i <= n; i++) {
        const int *last = row[(i - 1) % 3], *before = row[(i + 1) % 3];
        int *now = row[i % 3];
        now[0] = i;
        for (int j = 1; j <= m; j++) {
            int d = last[j - 1] + (lower(a[i - 1]) != lower(b[j - 1]));
            if (last[j] + 1 < d) d = last[j] + 1;
            if (now[j - 1] + 1 < d) d = now[j - 1] + 1;
            const int swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
            if (swapped && before[j - 2] + 1 < d) d = before[j - 2] + 1;
            now[j] = d;
        }
    }
    return row[n % 3][m];
}

/* Longer names leave room for two mistakes before they look like another one. */
static int is_misspelt(const char *key, const char *name) {
    const size_t n = strlen(key), m = strlen(name), most = m >= 8 ? 2 : 1;
    return n <= m + most && m <= n + most && edits(key, name) <= (int)most;
}

/* Only what looks like a name is shown in the log: a key may hold anything. */
static void note_ignored(api_request *r, const char *key) {
    const size_t n = strlen(key);
    const size_t letters = strspn(key, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                       "0123456789_.-");
    const int i = r->n_ignored++;
    if (i < API_IGNORED && n < API_IGNORED_NAME && letters == n) strcpy(r->ignored[i], key);
}

static int take_other(api_request *r, const api_key *keys, const char *key, const json_t *v,
                      api_error *e) {
    char name[65]; /* the first 64 bytes */
    snprintf(name, sizeof name, "%s", key);
    for (int i = 0; i < LENGTH(harmless); i++)
        if (!strcmp(key, harmless[i])) return 0;
    for (int i = 0; i < LENGTH(refused); i++)
        if (!strcmp(key, refused[i].name))
            return changes_nothing(refused[i].idle, v)
                       ? 0
                       : api_fail(e, 400, "unsupported_parameter", key, "%s: not served (%s)", key,
                                  refused[i].why);
    if (r->n_ignored == OTHERS_MOST)
        return api_fail(e, 400, "too_many_keys", name, "%s: unknown, as %d keys before it", name,
                        OTHERS_MOST);
    for (const api_key *k = keys; k->name; k++)
        if (is_misspelt(key, k->name))
            return api_fail(e, 400, "unknown_parameter", name, "%s: unknown (want %s?)", name,
                            k->name);
    note_ignored(r, key);
    return 0;
}

int api_parse_keys(api_request *r, const api_key *keys, api_error *e) {
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)r->json, key, v) {
        const api_key *k = keys;
        while (k->name && strcmp(k->name, key)) k++;
        if (json_is_null(v)) continue;
        if (k->name ? k->parse(r, k->name, v, e) : take_other(r, keys, key, v, e)) return -1;
    }
    return 0;
}
