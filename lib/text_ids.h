/* text_ids.h - the token ids that the model computes: of a text behind a prompt, of a pair of query
 * and document, or given ids, with the tokens that the model's file adds to every text.
 *
 * An embedding model adds the tokens that its config names, one before the text and one behind it
 * (end-of-text), or one of them, or none. A reranker adds the tokens of its prompts "prefix" and
 * "suffix", each tokenized by itself. */
#ifndef QEMB_TEXT_IDS_H
#define QEMB_TEXT_IDS_H

#include "qemb.h"

/* For one thread. */
typedef struct {
    qemb_tokenizer_state *state;
    int max_tokens; /* with the added ones */
    int32_t *added; /* (n_head + n_tail) the tokens before and behind a text */
    int n_head, n_tail;
    const char *with; /* what messages call the added tokens; static string */
    int32_t *ids;     /* (ids_cap) of the last text */
    size_t ids_cap;
    char *joined; /* (joined_cap) prompt and text as one string */
    size_t joined_cap;
} text_ids;

/* Opens t for the model of f; tokenizer: its own. max_tokens: the longest text, 0 for the model's
 * window. Codes: "out_of_memory", "usage" (no room for a text beside the added tokens). */
int text_ids_open(text_ids *t, const qemb_file *f, const qemb_tokenizer *tokenizer, int max_tokens,
                  qemb_err *err);
void text_ids_close(text_ids *t);

/* A prompt for a task: TASK_START, the task, and the end that the model's own prompts have. */
#define TASK_START "Instruct: "
/* What follows the task in the prompts of f: Qwen3-Embedding's "\nQuery:", with spaces behind it if
 * the model was trained with some. It lives as long as f. NULL: f's prompts have another form. A
 * file of QEMB_QWEN3 without prompts gets Qwen3-Embedding's. */
const char *text_ids_task_end(const qemb_file *f);
/* TASK_START, task (len) and end as one string, which ends with a NUL and which the caller frees;
 * *prompt_len, unless NULL, is its length. NULL: out of memory. */
char *text_ids_task_prompt(const char *task, size_t len, const char *end, size_t *prompt_len);

/* UTF-8 with lengths in bytes. */
typedef struct {
    const char *task, *query, *document;
    size_t task_len, query_len, document_len;
} text_pair;

/* t->ids = the ids of the n parts as one string; the last part is the text, those before it are the
 * prompt. cut gets the bytes of the text beyond max_tokens; NULL: a longer text is an error.
 * Returns the number of ids, or -1. Codes: "invalid_utf8" (the offset counts from the text),
 * "too_long", "empty_text" (no tokens, and the model adds none), "out_of_memory". */
int text_ids_encode(text_ids *t, const char *const part[], const size_t len[], int n, size_t *cut,
                    qemb_err *err);
/* The same for a reranker: the parts are "<Instruct>: ", task, "\n<Query>: ", query,
 * "\n<Document>: ", document. At most max_document tokens of the document are used, however many
 * max_tokens leaves; 0: no such limit. Cutting it there is no error. Code "query_too_long": there
 * is no room for any document. Of invalid UTF-8, the offset counts from the document; if that is
 * valid, from the beginning of the pair. */
int text_ids_pair(text_ids *t, const text_pair *p, int max_document, size_t *cut, qemb_err *err);
/* t->ids = ids (n) of an embedding model, which may have the added tokens already. cut gets the
 * number of ids beyond max_tokens. Returns and fails as above. */
int text_ids_take(text_ids *t, const int32_t *ids, size_t n, size_t *cut, qemb_err *err);

#endif
