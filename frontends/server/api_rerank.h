/* api_rerank.h - requests, responses and errors of reranking, as the public APIs have them. */
#ifndef QEMB_API_RERANK_H
#define QEMB_API_RERANK_H

#include "api.h"

/* Parses the request in body (len); its inputs are the documents. with_tei: "texts" in place of
 * "documents" is allowed and makes it a request of text-embeddings-inference. Free *r in any
 * case. */
int api_rerank_parse(api_request *r, int with_tei, const char *body, size_t len, int max_texts,
                     api_error *e);

/* An upper bound of the memory that r's response takes, with the texts that are kept for it. */
size_t api_rerank_room(const api_request *r, size_t name_len);

/* What a response says beside the results. */
typedef struct {
    const char *id, *model;
    const char *version; /* of Cohere's API */
    uint64_t tokens;
} api_rerank_frame;

/* Writes the response to r from the logits of texts (r->n). Returns -1 with *e if a document has no
 * finite logit (422) or memory runs out. */
int api_rerank(buffer *out, const api_request *r, const pending_text *texts,
               const api_rerank_frame *frame, api_error *e);
/* Writes the error. That of text-embeddings-inference (is_tei) may have another status: it is set
 * in *e. */
void api_rerank_error(buffer *out, int is_tei, api_error *e);

#endif
