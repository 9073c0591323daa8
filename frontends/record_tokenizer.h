/* record_tokenizer.h - a record of input -> the token ids that the model computes. */
#ifndef QEMB_RECORD_TOKENIZER_H
#define QEMB_RECORD_TOKENIZER_H

#include "input.h"
#include "lib/text_ids.h"
#include "model_options.h"
#include "open_model.h"

/* For one thread. A caller may change truncate, and text.max_tokens to a smaller number from 1; no
 * other member. */
typedef struct {
    text_ids text;
    input_parser *parser; /* NULL: records are bare texts */
    const char *prompt;   /* (prompt_len) for records without "instruct"; a reranker's task */
    size_t prompt_len;
    char *own_prompt;     /* owns prompt, or NULL if the file does */
    const char *task_end; /* what follows a task in a prompt; NULL: the model's prompts have none */
    int truncate;
    int dim, one_dim; /* length of a vector; 1: the same for all records */
} record_tokenizer;

/* The form of records and vectors. All zeros: bare texts, whole vectors. */
typedef struct {
    int jsonl;   /* records are JSON objects */
    int dim;     /* length of a vector; 0: the model's */
    int one_dim; /* a record may not ask for another dim */
    int keep;    /* of jsonl: records may have other keys, which come back */
} record_options;

typedef struct {
    const char *id; /* (id_len) as in input_object */
    size_t id_len;
    const char *kept; /* (kept_len) as in input_object */
    size_t kept_len;
    const int32_t *ids; /* (n) with end-of-text, valid until the next call */
    int n, dim;
    size_t cut_bytes, cut_tokens; /* what truncation removed, or 0 */
} record_ids;

/* Opens a tokenizer over m, which must outlive it. Error codes: "usage", "model_file". */
int record_tokenizer_open(record_tokenizer *t, const model_file *m, const model_options *o,
                          const record_options *records, qemb_err *err);
void record_tokenizer_close(record_tokenizer *t);

/* Tokenizes a record. On failure out->id and id_len are set too, and err->code is the code of the
 * error record. */
int tokenize_record(record_tokenizer *t, const input_record *r, record_ids *out, qemb_err *err);
/* Tokenizes a text (len) behind the prompt of task instruct (instruct_len), in the form of the
 * model's own prompts; NULL: behind the default prompt. Code "no_task": theirs has no task. */
int tokenize_text(record_tokenizer *t, const char *text, size_t len, const char *instruct,
                  size_t instruct_len, record_ids *out, qemb_err *err);
/* Tokenizes a text behind a whole prompt (prompt_len). */
int tokenize_behind(record_tokenizer *t, const char *prompt, size_t prompt_len, const char *text,
                    size_t len, record_ids *out, qemb_err *err);
/* The prompt of f of that name. NULL: code "unknown_prompt", and the message lists the prompts. */
const char *prompt_named(const qemb_file *f, const char *name, qemb_err *err);
/* The prompt of f for texts of a purpose, by the names that public APIs have for it ("query",
 * "search_query", "retrieval.query"; "document", "passage", "search_document",
 * "retrieval.passage"), or by its own name. "" for documents if the model has no prompt for them.
 * NULL as from prompt_named. */
const char *prompt_for(const qemb_file *f, const char *purpose, qemb_err *err);
/* Tokenizes a pair for a reranker; text_ids_pair says how. A pair without a task (NULL) has the
 * default one. */
int tokenize_pair(record_tokenizer *t, const text_pair *pair, int max_document, record_ids *out,
                  qemb_err *err);
/* Takes token ids (n), each in 0..vocab-1, with or without end-of-text. */
int tokenize_ids(record_tokenizer *t, const int32_t *ids, size_t n, record_ids *out, qemb_err *err);

#endif
