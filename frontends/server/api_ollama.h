/* api_ollama.h - the JSON of Ollama. */
#ifndef QEMB_API_OLLAMA_H
#define QEMB_API_OLLAMA_H

#include "api.h"

/* Parses a request to /api/embed, or if is_old to /api/embeddings, in body (len). Free *r in any
 * case. */
int api_ollama_parse(api_request *r, int is_old, const char *body, size_t len, int max_texts,
                     api_error *e);
/* Parses a request to /api/show: the model. Free *r in any case. */
int api_ollama_parse_show(api_request *r, const char *body, size_t len, api_error *e);
/* Writes the response, as api_embeddings does. */
int api_ollama(buffer *out, const api_answer *a, int is_old, api_error *e);
void api_ollama_error(buffer *out, const api_error *e);

/* What /api/tags and /api/show say of a model. */
typedef struct {
    const char *name;
    const qemb_file *file;
    long loaded; /* when its server started, in seconds since 1970 */
    int max_tokens;
} api_ollama_card;

void api_ollama_tags(buffer *out, const api_ollama_card *cards, int n);
void api_ollama_show(buffer *out, const api_ollama_card *c);

#endif
