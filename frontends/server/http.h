/* http.h - libmicrohttpd: connections, routes, limits, answers. */
#ifndef QEMB_HTTP_H
#define QEMB_HTTP_H

#include "model_worker.h"

#define MAX_NAMES 16

typedef struct {
    const char *host, *key_file;
    int port;
    const char *names[MAX_NAMES]; /* of the model; the first is what responses say */
    int n_names;
    const char *fallback_name; /* of the other model; NULL: there is none */
    int http_threads, max_connections, max_texts;
    size_t max_body, max_memory; /* bytes */
    double deadline, receive_timeout, drain;
    metrics *metrics; /* outlives the server */
} http_options;

typedef struct http http;

/* Listens and answers: 503 until the model_worker is ready. fallback may be NULL: see http.c for
 * when it computes. Ends the process if that cannot be. */
http *http_start(const http_options *o, model_worker *l, model_worker *fallback);
int http_port(const http *h);
/* Closes connections that have taken too long to send a request or to read an answer. */
void http_tick(http *h, double now);
/* No new connections from now on; those that the system has completed already are still served,
 * once. */
void http_drain(http *h);
/* 1 when a draining server has nothing left to answer. */
int http_idle(http *h, double now);
void http_stop(http *h); /* after http_drain; no connection is suspended */

#endif
