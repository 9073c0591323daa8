/* http_options.h - what the HTTP server is started with. */
#ifndef QEMB_HTTP_OPTIONS_H
#define QEMB_HTTP_OPTIONS_H

#include "models.h"

#define MAX_NAMES 16

typedef struct {
    const char *host, *key_file;
    const char *cors_origin; /* whose pages may read responses, or "*"; NULL: none */
    int port;
    const char *names[MAX_NAMES]; /* of the model; responses use the first */
    int n_names;
    const char *fallback_name, *reranker_name; /* of these models, or NULL */
    int http_threads, max_connections, max_texts;
    size_t max_body, max_memory; /* bytes */
    double deadline, receive_timeout, keep_alive, drain;
    metrics *metrics; /* has to outlive the server */
} http_options;

typedef struct http http;

#endif
