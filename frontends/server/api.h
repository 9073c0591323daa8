/* api.h - requests, responses and errors in the JSON of the public APIs.
 *
 * api.c has OpenAI's API and what all of them share; api_tei.c, api_ollama.c and api_rerank.c have
 * the others; api_keys.c says what becomes of a request's keys. */
#ifndef QEMB_API_H
#define QEMB_API_H

#include "buffer.h"
#include "frontends/json_type.h"
#include "frontends/format.h"
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

/* How vectors are written. */
typedef struct {
    format_kind kind; /* FORMAT_F32, FORMAT_F16, FORMAT_INT8 or FORMAT_BINARY */
    int base64;       /* a string, not a list of numbers */
    int is_signed;    /* of FORMAT_BINARY: the bytes minus 128 */
    int unscaled;     /* not of length 1 */
} api_output;

/* Names of keys that were ignored, as many as a request keeps, and their longest form. */
enum { API_IGNORED = 4, API_IGNORED_NAME = 48 };

typedef struct {
    void *json; /* owns the strings */
    const char *model;
    const char *key;   /* of the inputs: "input", "inputs", "prompt", "documents" or "texts" */
    api_input *inputs; /* (n) */
    int n, max_texts;
    int32_t *ids; /* of all inputs that are ids */
    int n_ids;
    int any_ids;    /* 1: ids may be those of any tokenizer */
    int dimensions; /* 0: not given */
    api_output output;
    int has_kind;         /* output.kind was given */
    int base64;           /* as given; -1: not given */
    int normalize;        /* as given; -1: not given */
    const char *instruct; /* (instruct_len) or NULL: the server's default */
    size_t instruct_len;
    const char *prompt_name;    /* or NULL: the server's default */
    const char *prompt_key;     /* that gave it; "prompt_name": a prompt of exactly that name */
    int truncate;               /* -1: the server's default */
    int max_tokens;             /* longest text of this request; 0: the model's */
    const char *max_tokens_key; /* that gave it */
    int says_right;             /* 1: the request says that the end of a long text is cut */
    int fallback;               /* 1: another model may answer */
    int n_ignored;              /* keys that are no API's that is served here */
    char ignored[API_IGNORED][API_IGNORED_NAME]; /* the names of the first ones; "": not shown */
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

/* What a response with vectors is made of. */
typedef struct {
    const pending_text *texts; /* (n) */
    int n, dim;                /* dim: numbers of a vector */
    api_output output;
    const char *key;    /* of the inputs, for errors */
    const char *model;  /* the name */
    const char *recipe; /* the fingerprint of model, table and prompt */
    uint64_t tokens;
    double seconds; /* since the request came */
} api_answer;

/* An upper bound of the size of any response with n vectors, in bytes. */
size_t api_vectors_room(int n, int dim, const api_output *o, size_t name_len);
/* Writes the response. Returns -1 with *e if a vector, cut to dim, has no finite length (422) or
 * memory runs out. */
int api_embeddings(buffer *out, const api_answer *a, api_error *e);
int api_tokens(buffer *out, const pending_text *texts, int n, int max_tokens, const char *model,
               uint64_t tokens, api_error *e);
/* A name of a model that is served. */
typedef struct {
    const char *name;
    int is_reranker;
} api_model;

void api_models(buffer *out, const api_model *models, int n, long created);
void api_model_json(buffer *out, const api_model *model, long created);
void api_error_json(buffer *out, const api_error *e);

/* ---- keys (api_keys.c) ----------------------------------------------------------------------- */

/* A key of an API. parse gets the key's value, which is not null. */
typedef struct {
    const char *name;
    int (*parse)(api_request *r, const char *key, const json_t *v, api_error *e);
} api_key;

/* Parses r->json by the table keys, which ends with a NULL name. null counts as not given. A key
 * that is not in the table is refused if it is a misspelt one of the table, or is known to change
 * the result in a way that is not served; otherwise it is ignored and counted. */
int api_parse_keys(api_request *r, const api_key *keys, api_error *e);

/* Values of keys that several APIs have. */
int api_take_model(api_request *r, const char *key, const json_t *v, api_error *e);
int api_take_instruct(api_request *r, const char *key, const json_t *v, api_error *e);
int api_take_prompt(api_request *r, const char *key, const json_t *v, api_error *e);
int api_take_dimensions(api_request *r, const char *key, const json_t *v, api_error *e);
int api_take_normalize(api_request *r, const char *key, const json_t *v, api_error *e);
int api_take_fallback(api_request *r, const char *key, const json_t *v, api_error *e);
/* A boolean, or "NONE" or "END". */
int api_take_truncate(api_request *r, const char *key, const json_t *v, api_error *e);
/* The end of a long text that is cut. */
int api_take_direction(api_request *r, const char *key, const json_t *v, api_error *e);

int api_bool(int *out, const char *key, const json_t *v, api_error *e);
int api_string(const char **out, size_t *len, const char *key, const json_t *v, api_error *e);
/* *out = v, a string without NUL: then it can be compared as a string of C. */
int api_name(const char **out, const char *key, const json_t *v, api_error *e);
/* *out = v, at least `least` and at most INT_MAX. */
int api_count(int *out, int least, const char *key, const json_t *v, api_error *e);
/* Errors of the request's key. */
int api_wrong_type(api_error *e, const char *key, const json_t *v, const char *want);
int api_conflict(api_error *e, const char *key, const char *other);

/* ---- shared by the APIs (api.c) -------------------------------------------------------------- */

/* Parses body (len) as a JSON object into r->json. Free *r in any case. */
int api_load(api_request *r, const char *body, size_t len, int max_texts, api_error *e);
/* Takes the inputs of an embedding request: a text, a list of texts or of objects with a text, a
 * list of token ids or a list of such lists. */
int api_take_input(api_request *r, const char *key, const json_t *v, api_error *e);
/* Fails if r has no inputs, or keys that contradict each other. Completes r->output. */
int api_check_request(api_request *r, api_error *e);

/* Makes room for n inputs with n_ids ids in all. */
int api_make_room(api_request *r, size_t n, size_t n_ids, api_error *e);
/* Adds the string v. */
void api_add_text(api_request *r, const json_t *v);

#define API_CUT_ROOM 48
/* Writes the key that says what truncation removed, as qemb does; nothing if that is nothing. */
char *api_put_cut(char *p, const pending_text *t);
/* Opens the response of a and *scratch, which its vectors need, and writes `start`. Returns where
 * to go on, or NULL with *e. */
char *api_open_vectors(buffer *out, const api_answer *a, float **scratch, const char *start,
                       api_error *e);
/* Writes the i-th vector of a. Returns NULL with *e if the vector, cut to dim, has no finite
 * length. */
char *api_put_vector(char *p, const api_answer *a, int i, float *scratch, api_error *e);
/* Ends the response: p is the end of the text, or NULL if a vector failed, which returns -1. */
int api_close_vectors(buffer *out, float *scratch, char *p);

/* Allocates a response of at most `room` bytes. */
int api_open_text(buffer *out, size_t room, api_error *e);

static inline char *put(char *p, const char *s) {
    const size_t n = strlen(s);
    memcpy(p, s, n);
    return p + n;
}

#endif
