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
 * null counts as not given; api_keys.c says what becomes of other keys.
 */
#include "api_rerank.h"

#include "api_tei.h"
#include "frontends/console.h"
#include "frontends/ranking.h"

#include <stdlib.h>

/* ---- requests -------------------------------------------------------------------------------- */

/* The text of the i-th document v, or NULL with *e. */
static const json_t *text_of(const api_request *r, size_t i, const json_t *v, api_error *e) {
    if (json_is_string(v)) return v;
    if (r->is_tei || !json_is_object(v)) {
        api_fail(e, 400, "invalid_type", r->key, "%s[%zu]: wrong type (got %s, want a string%s)",
                 r->key, i, json_type_name(v), r->is_tei ? "" : " or an object with \"text\"");
        return NULL;
    }
    const json_t *text = json_object_get(v, "text");
    if (json_is_string(text)) return text;
    api_fail(e, 400, "invalid_type", r->key, "%s[%zu].text: wrong type (got %s, want a string)",
             r->key, i, text ? json_type_name(text) : "nothing");
    return NULL;
}

static int take_documents(api_request *r, const char *key, const json_t *list, api_error *e) {
    const size_t n = json_array_size(list);
    if (!json_is_array(list)) return api_wrong_type(e, key, list, "a list");
    if (!n) return api_fail(e, 400, "empty_input", key, "%s: an empty list", key);
    if (n > (size_t)r->max_texts)
        return api_fail(e, 400, "too_many_inputs", key,
                        "%s: too many texts (got %zu, want at most %d)", key, n, r->max_texts);
    if (api_make_room(r, n, 0, e)) return -1;
    for (size_t i = 0; i < n; i++) {
        const json_t *text = text_of(r, i, json_array_get(list, i), e);
        if (!text) return -1;
        api_add_text(r, text);
    }
    return 0;
}

static int take_query(api_request *r, const char *key, const json_t *v, api_error *e) {
    return api_string(&r->query, &r->query_len, key, v, e);
}

static int take_top_n(api_request *r, const char *key, const json_t *v, api_error *e) {
    return api_count(&r->top_n, 0, key, v, e);
}

static int take_raw_scores(api_request *r, const char *key, const json_t *v, api_error *e) {
    return api_bool(&r->raw_scores, key, v, e);
}

static int take_activation(api_request *r, const char *key, const json_t *v, api_error *e) {
    if (api_bool(&r->raw_scores, key, v, e)) return -1;
    r->raw_scores = !r->raw_scores;
    return 0;
}

static int take_with_texts(api_request *r, const char *key, const json_t *v, api_error *e) {
    return api_bool(&r->with_texts, key, v, e);
}

static int take_max_document(api_request *r, const char *key, const json_t *v, api_error *e) {
    return api_count(&r->max_document, 1, key, v, e);
}

static int take_max_chunks(api_request *r, const char *key, const json_t *v, api_error *e) {
    int unused;
    (void)r;
    return api_count(&unused, 1, key, v, e);
}

/* Cohere ranks the fields of a document that this names; here that is its text. */
static int take_rank_fields(api_request *r, const char *key, const json_t *v, api_error *e) {
    (void)r;
    if (!json_is_array(v)) return api_wrong_type(e, key, v, "a list");
    const json_t *field = json_array_get(v, 0);
    const char *name = NULL;
    if (json_is_string(field) && api_name(&name, key, field, e)) return -1;
    if (json_array_size(v) == 1 && name && !strcmp(name, "text")) return 0;
    char *got = json_dumps(v, JSON_COMPACT | JSON_ENSURE_ASCII);
    api_fail(e, 400, "invalid_rank_fields", key, "%s: not served (got %.80s, want [\"text\"])", key,
             got ? got : "others");
    free(got);
    return -1;
}

/* vLLM's limit of a pair. */
static int take_prompt_tokens(api_request *r, const char *key, const json_t *v, api_error *e) {
    (void)r;
    return api_fail(e, 400, "unknown_parameter", key,
                    "%s: not served (got %s, want null, or max_tokens_per_doc)", key,
                    json_type_name(v));
}

/* The texts of the other form. */
static int take_other_form(api_request *r, const char *key, const json_t *v, api_error *e) {
    (void)v;
    return api_fail(e, 400, "unknown_parameter", key, "%s: not in this request (want %s%s)", key,
                    r->key, r->is_tei ? "" : "; texts alone at /rerank");
}

static const api_key keys[] = {{"query", take_query},
                               {"model", api_take_model},
                               {"top_n", take_top_n},
                               {"raw_scores", take_raw_scores},
                               {"truncate", api_take_truncate},
                               {"instruct", api_take_instruct},
                               {"documents", take_documents},
                               {"texts", take_other_form},
                               {"return_documents", take_with_texts},
                               {"max_tokens_per_doc", take_max_document},
                               {"truncation", api_take_truncate},
                               {"instruction", api_take_instruct},
                               {"use_activation", take_activation},
                               {"rank_fields", take_rank_fields},
                               {"max_chunks_per_doc", take_max_chunks},
                               {"truncate_prompt_tokens", take_prompt_tokens},
                               {NULL, NULL}};

static const api_key tei_keys[] = {{"query", take_query},
                                   {"model", api_take_model},
                                   {"top_n", take_top_n},
                                   {"raw_scores", take_raw_scores},
                                   {"truncate", api_take_truncate},
                                   {"instruct", api_take_instruct},
                                   {"texts", take_documents},
                                   {"documents", take_other_form},
                                   {"return_text", take_with_texts},
                                   {"truncation_direction", api_take_direction},
                                   {NULL, NULL}};

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
    if (api_load(r, body, len, max_texts, e)) return -1;
    const json_t *root = r->json;
    const json_t *texts = json_object_get(root, "texts");
    r->is_tei = with_tei && texts && !json_is_null(texts);
    r->key = r->is_tei ? "texts" : "documents";
    if (check_names(root, e) || api_parse_keys(r, r->is_tei ? tei_keys : keys, e)) return -1;
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
        const text_failure why = texts[i].failed;
        if (why == TEXT_NO_MEMORY)
            api_fail(e, 503, "out_of_memory", NULL, "response: out of memory");
        else if (why)
            api_fail(e, 422, "non_finite", r->key, "%s[%d]: the model has no finite score for it",
                     r->key, i);
        if (why) {
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

/* OpenAI's error, with the message again where clients of Cohere and Jina read it. */
void api_rerank_error(buffer *out, int is_tei, api_error *e) {
    if (is_tei) {
        api_tei_error(out, e);
        return;
    }
    char msg[6 * sizeof e->msg + 3];
    *format_json_string(msg, e->msg, strlen(e->msg)) = 0;
    api_error_json(out, e);
    if (!out->data) return; /* out of memory */
    out->len--;             /* the last brace */
    buffer_printf(out, ",\"message\":%s,\"detail\":%s}", msg, msg);
}
