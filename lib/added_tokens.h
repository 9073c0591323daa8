/* added_tokens.h - the section added_tokens: tokens that are found in the raw text. */
#ifndef ADDED_TOKENS_H
#define ADDED_TOKENS_H

#include "qemb.h"

enum { ADDED_TOKEN_MAX = 1024 }; /* longest added token in bytes */

typedef struct {
    const uint8_t *bytes;
    uint32_t len, id;
    int takes_spaces; /* the White_Space before it belongs to it (Hugging Face's lstrip) */
} added_token;

typedef struct {
    added_token *token; /* (n), ascending by bytes */
    size_t n;
    size_t from[257];    /* first index in token of each first byte */
    uint64_t pair[1024]; /* bit (a, b): a token may begin with bytes a, b */
    int first_byte;      /* the first byte of all, or -1 if they differ */
    uint32_t n_ids;      /* the largest id plus 1, or 0 */
} added_tokens;

/* Reads the section, which must outlive a. Ids are first_id or more. Unless spaces, no token may
 * take the white space before it. The caller frees, also after -1. Codes: "model_file",
 * "out_of_memory". */
int added_tokens_read(added_tokens *a, const uint8_t *section, size_t bytes, uint32_t first_id,
                      int spaces, qemb_err *err);
void added_tokens_free(added_tokens *a);

/* The place of the first token that begins in text[pos, end), of len bytes, and which token it is:
 * the longest one there; or end and NULL. */
size_t added_tokens_find(const added_tokens *a, const uint8_t *text, size_t pos, size_t end,
                         size_t len, const added_token **found);

#endif
