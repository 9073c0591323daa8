/* api.h - requests, responses and errors in OpenAI's JSON. */
#ifndef QEMB_API_H
#define QEMB_API_H

#include "buffer.h"
#include "queue.h"

#include <jansson.h>
#include <string.h>

typedef struct {
    int status;       /* of HTTP */
    const char *code; /* static string */
    char param[72];   /* "": null */
    char msg[480];
    int retry_after; /* seconds; 0: no such header */
} api_error;

/* Fills *e and returns -1. param may be NULL. */
int api_fail(api_error *e, int status, const char *code, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));

/* A text, or token ids if text is NULL. */
typedef struct {
    const char *text; /* (len) */
    size_t len;
    int first_id; /* ids[first_id .. first_id + len) of the request */
} api_input;

typedef struct {
    void *json; /* owns the strings */
    const char *model;
    const char *key;   /* of the inputs: "input", "documents" or "texts" */
    api_input *inputs; /* (n) */
    int n;
    int32_t *ids; /* of all inputs that are ids */
    int n_ids;
    int dimensions; /* 0: not given */
    int base64;
    const char *instruct; /* (instruct_len) or NULL: the server's default */
    size_t instruct_len;
    int truncate; /* -1: the server's default */
    int fallback; /* 1: another model may answer */
    /* Of a reranker's request, whose inputs are documents: */
    const char *query; /* (query_len) */
    size_t query_len;
    int is_tei;       /* 1: the form of text-embeddings-inference */
    int max_document; /* tokens of a document; 0: no limit of its own */
    int top_n;        /* results wanted; 0: all */
    int with_texts;   /* results have their documents' texts */
    int raw_scores;   /* the logits, not the probabilities */
} api_request;

typedef enum { API_EMBEDDINGS, API_TOKENIZE } api_kind;

/* Parses the request in body (len). Free *r in any case. Does not check what depends on the model:
 * ids are only checked to be 0..2^31-1, dimensions 1..2^31-1. */
int api_parse(api_request *r, api_kind kind, const char *body, size_t len, int max_texts,
              api_error *e);
/* Frees the strings and inputs. The numbers stay: the response needs them. */
void api_request_free(api_request *r);

/* An upper bound of the size of an embeddings response, in bytes. */
size_t api_embeddings_room(int n, int dim, int base64, size_t name_len);
/* Writes the response. Returns -1 with *e if a vector, cut to dim, has no finite length (422) or
 * memory runs out. */
int api_embeddings(buffer *out, const pending_text *texts, int n, int dim, int base64,
                   const char *model, uint64_t tokens, api_error *e);
int api_tokens(buffer *out, const pending_text *texts, int n, int max_tokens, const char *model,
               uint64_t tokens, api_error *e);
/* A name of a model that is served. */
typedef struct {
    const char *name;
    int is_reranker;
} api_model;

void api_models(buffer *out, const api_model *models, int n, long created);
void api_error_json(buffer *out, const api_error *e);

/* ---- shared with api_rerank.c ---------------------------------------------------------------- */

/* Parses body (len) as a JSON object into r->json. Free *r in any case. */
int api_load(api_request *r, const char *body, size_t len, api_error *e);

/* The value v of the request's key; null leaves *out alone. */
int api_bool(int *out, const char *key, const json_t *v, api_error *e);
int api_string(const char **out, size_t *len, const char *key, const json_t *v, api_error *e);
const char *api_type_name(const json_t *v); /* with its article */
/* Errors of the request's key. */
int api_wrong_type(api_error *e, const char *key, const json_t *v, const char *want);
int api_unknown(api_error *e, const char *key, const char *known);

/* Makes room for n inputs with n_ids ids in all. */
int api_make_room(api_request *r, size_t n, size_t n_ids, api_error *e);
/* Adds the string v. */
void api_add_text(api_request *r, const json_t *v);

#define API_CUT_ROOM 48
/* Writes the key that says what truncation removed, as qemb does; nothing if that is nothing. */
char *api_put_cut(char *p, const pending_text *t);

/* Allocates a response of at most `room` bytes. */
int api_open_text(buffer *out, size_t room, api_error *e);

static inline char *put(char *p, const char *s) {
    const size_t n = strlen(s);
    memcpy(p, s, n);
    return p + n;
}

#endif
