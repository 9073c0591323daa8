/* api_rerank.c - reranking in the JSON of the public APIs; see api_rerank.h.
 *
 * Two forms of request:
 *   {"query": text, "documents": [text | {"text": text}...]} as Jina, Cohere and vLLM have it, with
 *     "return_documents", "max_tokens_per_doc", "truncation", "instruction", "use_activation";
 *     other keys of a document are not looked at
 *   {"query": text, "texts": [text...]} of text-embeddings-inference, with "return_text",
 *     "truncation_direction"
 * and in both "model" (many clients send none), "truncate", "top_n", "raw_scores" and the extension
 * "instruct".
 * null counts as not given. A key that could change the result and is not known is an error.
 */
#include "api_rerank.h"

#include "frontends/console.h"
#include "frontends/format.h"
#include "frontends/ranking.h"

#include <limits.h>
#include <stdlib.h>

/* ---- requests -------------------------------------------------------------------------------- */

/* The text of the i-th document v, or NULL with *e. */
static const json_t *text_of(const api_request *r, size_t i, const json_t *v, api_error *e) {
    if (json_is_string(v)) return v;
    if (r->is_tei || !json_is_object(v)) {
        api_fail(e, 400, "invalid_type", r->key, "%s[%zu]: wrong type (got %s, want a string%s)",
                 r->key, i, api_type_name(v), r->is_tei ? "" : " or an object with \"text\"");
        return NULL;
    }
    const json_t *text = json_object_get(v, "text");
    if (json_is_string(text)) return text;
    api_fail(e, 400, "invalid_type", r->key, "%s[%zu].text: wrong type (got %s, want a string)",
             r->key, i, text ? api_type_name(text) : "nothing");
    return NULL;
}

static int parse_documents(api_request *r, const json_t *list, int max_texts, api_error *e) {
    const size_t n = json_array_size(list);
    if (!json_is_array(list)) return api_wrong_type(e, r->key, list, "a list");
    if (!n) return api_fail(e, 400, "empty_input", r->key, "%s: an empty list", r->key);
    if (n > (size_t)max_texts)
        return api_fail(e, 400, "too_many_inputs", r->key,
                        "%s: too many texts (got %zu, want at most %d)", r->key, n, max_texts);
    if (api_make_room(r, n, 0, e)) return -1;
    for (size_t i = 0; i < n; i++) {
        const json_t *text = text_of(r, i, json_array_get(list, i), e);
        if (!text) return -1;
        api_add_text(r, text);
    }
    return 0;
}

/* *out = v, at least `least` and at most INT_MAX. */
static int parse_count(int *out, int least, const char *key, const json_t *v, api_error *e) {
    if (json_is_null(v)) return 0;
    if (!json_is_integer(v)) return api_wrong_type(e, key, v, "an integer");
    const json_int_t x = json_integer_value(v);
    if (x < least)
        return api_fail(e, 400, "invalid_number", key,
                        "%s: out of range (got %" JSON_INTEGER_FORMAT ", want %d or more)", key, x,
                        least);
    *out = x < INT_MAX ? (int)x : INT_MAX;
    return 0;
}

/* Texts are cut at their end alone. */
static int parse_direction(const char *key, const json_t *v, api_error *e) {
    const char *s = NULL;
    size_t len;
    if (api_string(&s, &len, key, v, e)) return -1;
    if (!s || !strcmp(s, "right") || !strcmp(s, "Right")) return 0;
    return api_fail(e, 400, "invalid_truncation_direction", key,
                    "%s: not served (got %.40s, want Right)", key, s);
}

/* Cohere ranks the fields of a document that this names; here that is its text. */
static int parse_rank_fields(const char *key, const json_t *v, api_error *e) {
    if (json_is_null(v)) return 0;
    if (!json_is_array(v)) return api_wrong_type(e, key, v, "a list");
    const char *field = json_string_value(json_array_get(v, 0));
    if (json_array_size(v) == 1 && field && !strcmp(field, "text")) return 0;
    char *got = json_dumps(v, JSON_COMPACT | JSON_ENSURE_ASCII);
    api_fail(e, 400, "invalid_rank_fields", key, "%s: not served (got %.80s, want [\"text\"])", key,
             got ? got : "others");
    free(got);
    return -1;
}

/* vLLM's limit of a pair. */
static int parse_prompt_tokens(const char *key, const json_t *v, api_error *e) {
    if (json_is_null(v)) return 0;
    return api_fail(e, 400, "unknown_parameter", key,
                    "%s: not served (got %s, want null, or max_tokens_per_doc)", key,
                    api_type_name(v));
}

/* The keys of parse_field, by r->is_tei. */
static const char *const known[] = {
    "query, documents, model, top_n, return_documents, max_tokens_per_doc, truncate or truncation, "
    "instruct or instruction, raw_scores or use_activation, rank_fields, max_chunks_per_doc, user, "
    "priority",
    "query, texts, model, top_n, return_text, raw_scores, truncate, truncation_direction, "
    "instruct, "
    "user, priority",
};

static int parse_field(api_request *r, const char *key, const json_t *v, int max_texts,
                       api_error *e) {
    size_t ignored;
    int unused, activation = -1;
    if (!strcmp(key, "query")) return api_string(&r->query, &r->query_len, key, v, e);
    if (json_is_null(v) && (!strcmp(key, "texts") || !strcmp(key, "documents"))) return 0;
    if (!strcmp(key, r->key)) return parse_documents(r, v, max_texts, e);
    if (!strcmp(key, "model")) return api_string(&r->model, &ignored, key, v, e);
    if (!strcmp(key, "instruct")) return api_string(&r->instruct, &r->instruct_len, key, v, e);
    if (!strcmp(key, "truncate")) return api_bool(&r->truncate, key, v, e);
    if (!strcmp(key, "top_n")) return parse_count(&r->top_n, 0, key, v, e);
    if (!strcmp(key, "raw_scores")) return api_bool(&r->raw_scores, key, v, e);
    if (!strcmp(key, "user") || !strcmp(key, "priority")) return 0; /* they change no score */
    if (r->is_tei) {
        if (!strcmp(key, "return_text")) return api_bool(&r->with_texts, key, v, e);
        if (!strcmp(key, "truncation_direction")) return parse_direction(key, v, e);
        return api_unknown(e, key, known[r->is_tei]);
    }
    if (!strcmp(key, "return_documents")) return api_bool(&r->with_texts, key, v, e);
    if (!strcmp(key, "max_tokens_per_doc")) return parse_count(&r->max_document, 1, key, v, e);
    if (!strcmp(key, "truncation")) return api_bool(&r->truncate, key, v, e);
    if (!strcmp(key, "instruction")) return api_string(&r->instruct, &r->instruct_len, key, v, e);
    if (!strcmp(key, "use_activation")) {
        if (api_bool(&activation, key, v, e)) return -1;
        if (activation >= 0) r->raw_scores = !activation;
        return 0;
    }
    if (!strcmp(key, "rank_fields")) return parse_rank_fields(key, v, e);
    if (!strcmp(key, "max_chunks_per_doc")) return parse_count(&unused, 1, key, v, e);
    if (!strcmp(key, "truncate_prompt_tokens")) return parse_prompt_tokens(key, v, e);
    return api_unknown(e, key, known[r->is_tei]);
}

/* Fails if a key is given by two of its names. */
static int check_names(const json_t *root, api_error *e) {
    static const char *const names[][2] = {
        {"truncate", "truncation"}, {"instruct", "instruction"}, {"raw_scores", "use_activation"}};
    for (int i = 0; i < LENGTH(names); i++) {
        const json_t *a = json_object_get(root, names[i][0]);
        const json_t *b = json_object_get(root, names[i][1]);
        if (a && b && !json_is_null(a) && !json_is_null(b))
            return api_fail(e, 400, "conflicting_parameters", names[i][1],
                            "%s: says the same as %s (got both, want one of them)", names[i][1],
                            names[i][0]);
    }
    return 0;
}

int api_rerank_parse(api_request *r, int with_tei, const char *body, size_t len, int max_texts,
                     api_error *e) {
    const char *key;
    json_t *v;
    if (api_load(r, body, len, e)) return -1;
    json_t *root = r->json;
    const json_t *texts = json_object_get(root, "texts");
    r->is_tei = with_tei && texts && !json_is_null(texts);
    r->key = r->is_tei ? "texts" : "documents";
    json_object_foreach(root, key, v) if (parse_field(r, key, v, max_texts, e)) return -1;
    if (check_names(root, e)) return -1;
    if (!r->query)
        return api_fail(e, 400, "missing_parameter", "query", "query: a required parameter");
    if (!r->inputs)
        return api_fail(e, 400, "missing_parameter", r->key, "%s: a required parameter", r->key);
    return 0;
}

/* ---- responses ------------------------------------------------------------------------------- */

/* Bytes around one result, and around all of them without the names. */
#define ITEM_ROOM  (128 + API_CUT_ROOM)
#define FRAME_ROOM 512
/* Documents of one of Cohere's search units. */
#define SEARCH_UNIT 100

/* A text takes its own bytes and six in JSON for each of them. */
size_t api_rerank_room(const api_request *r, size_t name_len) {
    size_t room = (size_t)r->n * (ITEM_ROOM + sizeof(ranked)) + 6 * name_len + FRAME_ROOM;
    for (int i = 0; r->with_texts && i < r->n; i++) room += 7 * r->inputs[i].len;
    return room;
}

/* Returns the documents by score, or NULL with *e. */
static ranked *rank(const api_request *r, const pending_text *texts, api_error *e) {
    ranked *ranking = malloc((size_t)r->n * sizeof *ranking);
    if (!ranking) {
        api_fail(e, 503, "out_of_memory", NULL, "response: out of memory");
        return NULL;
    }
    for (int i = 0; i < r->n; i++) {
        if (texts[i].failed) {
            api_fail(e, 422, "non_finite", r->key, "%s[%d]: the model has no finite score for it",
                     r->key, i);
            free(ranking);
            return NULL;
        }
        ranking[i] = (ranked){(size_t)i, texts[i].vector->v[0]};
    }
    ranking_sort(ranking, (size_t)r->n);
    return ranking;
}

/* The forms differ in names: {"index", "relevance_score", "document": {"text"}} and {"index",
 * "score", "text"}. The first also says what of a document was cut, as `qemb rerank` does. */
static char *put_results(char *p, const api_request *r, const pending_text *texts,
                         const ranked *ranking, int n) {
    p = put(p, "[");
    for (int i = 0; i < n; i++) {
        const float logit = ranking[i].logit;
        p = format_uint(put(p, i ? ",{\"index\":" : "{\"index\":"), ranking[i].index);
        p = put(p, r->is_tei ? ",\"score\":" : ",\"relevance_score\":");
        p = format_float(p, r->raw_scores ? logit : ranking_score(logit));
        if (!r->is_tei) p = api_put_cut(p, &texts[ranking[i].index]);
        if (r->with_texts) {
            const api_input *in = &r->inputs[ranking[i].index];
            p = put(p, r->is_tei ? ",\"text\":" : ",\"document\":{\"text\":");
            p = format_json_string(p, in->text, in->len);
            if (!r->is_tei) p = put(p, "}");
        }
        p = put(p, "}");
    }
    return put(p, "]");
}

int api_rerank(buffer *out, const api_request *r, const pending_text *texts,
               const api_rerank_frame *frame, api_error *e) {
    const int n = r->top_n && r->top_n < r->n ? r->top_n : r->n;
    ranked *ranking = rank(r, texts, e);
    if (!ranking) return -1;
    if (api_open_text(out, api_rerank_room(r, strlen(frame->model)), e)) {
        free(ranking);
        return -1;
    }
    char *p = out->data;
    if (r->is_tei) {
        p = put_results(p, r, texts, ranking, n);
    } else {
        p = put(put(put(p, "{\"id\":\""), frame->id), "\",\"object\":\"list\",\"model\":");
        p = format_json_string(p, frame->model, strlen(frame->model));
        p = put_results(put(p, ",\"results\":"), r, texts, ranking, n);
        p = format_uint(put(p, ",\"usage\":{\"prompt_tokens\":"), frame->tokens);
        p = format_uint(put(p, ",\"total_tokens\":"), frame->tokens);
        p = put(put(p, "},\"meta\":{\"api_version\":{\"version\":\""), frame->version);
        p = put(p, "\"},\"billed_units\":{\"search_units\":");
        p = format_uint(p, (uint64_t)((r->n - 1) / SEARCH_UNIT + 1));
        p = put(p, "}}}");
    }
    out->len = (size_t)(p - out->data);
    free(ranking);
    return 0;
}

/* Returns TEI's type of the error, and sets its status. */
static const char *tei_error(api_error *e) {
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

/* OpenAI's error, with the message again where clients of Cohere and Jina read it. */
void api_rerank_error(buffer *out, int is_tei, api_error *e) {
    char msg[6 * sizeof e->msg + 3];
    *format_json_string(msg, e->msg, strlen(e->msg)) = 0;
    if (is_tei) {
        const char *type = tei_error(e);
        buffer_printf(out, "{\"error\":%s,\"error_type\":\"%s\"}", msg, type);
        return;
    }
    api_error_json(out, e);
    if (!out->data) return; /* out of memory */
    out->len--;             /* the last brace */
    buffer_printf(out, ",\"message\":%s,\"detail\":%s}", msg, msg);
}
