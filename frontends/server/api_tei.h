/* api_tei.h - the JSON of text-embeddings-inference. */
#ifndef QEMB_API_TEI_H
#define QEMB_API_TEI_H

#include "api.h"

/* Parses a request to /embed in body (len). Free *r in any case. */
int api_tei_parse(api_request *r, const char *body, size_t len, int max_texts, api_error *e);
/* Writes the response, a list of vectors, as api_embeddings does. */
int api_tei(buffer *out, const api_answer *a, api_error *e);
/* Writes the error and sets its status in *e, which may be another one than OpenAI's. */
void api_tei_error(buffer *out, api_error *e);

/* What /info says. */
typedef struct {
    const char *model, *dtype;
    const char *pooling; /* its name for qemb_pooling; NULL: of a reranker */
    int max_requests, max_tokens, batch_tokens, max_texts, threads;
    int truncates; /* 1: long texts are cut unless a request says otherwise */
} api_tei_card;

void api_tei_info(buffer *out, const api_tei_card *c);

#endif
