/* text_ids.h - the token ids that the model computes: of a text behind a prompt, or given ids, with
 * the end-of-text token. */
#ifndef QEMB_TEXT_IDS_H
#define QEMB_TEXT_IDS_H

#include "qemb.h"

/* For one thread. The opener sets the first three members; text_ids_close frees state too. */
typedef struct {
    qemb_tokenizer_state *state;
    int max_tokens; /* with end-of-text */
    int32_t eos;
    int32_t *ids; /* (ids_cap) of the last text */
    size_t ids_cap;
    char *joined; /* (joined_cap) prompt and text as one string */
    size_t joined_cap;
} text_ids;

void text_ids_close(text_ids *t);

/* t->ids = the ids of the n parts as one string; the last part is the text, those before it are the
 * prompt. cut gets the bytes of the text beyond max_tokens; NULL: a longer text is an error.
 * Returns the number of ids, or -1. Codes: "invalid_utf8" (the offset counts from the text),
 * "too_long", "out_of_memory". */
int text_ids_encode(text_ids *t, const char *const part[], const size_t len[], int n, size_t *cut,
                    qemb_err *err);
/* t->ids = ids (n), which may end in end-of-text. cut gets the number of ids beyond max_tokens.
 * Returns and fails as above. */
int text_ids_take(text_ids *t, const int32_t *ids, size_t n, size_t *cut, qemb_err *err);

#endif
