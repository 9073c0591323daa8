/* http.h - the HTTP server: connections, routes, limits, responses. */
#ifndef QEMB_HTTP_H
#define QEMB_HTTP_H

#include "http_options.h"

/* Starts the server for these models, which have to outlive it. It answers 503 until they are
 * ready; http_work.c says when the fallback computes. Ends the process with a message on
 * failure. */
http *http_start(const http_options *o, models *m);
int http_port(const http *h);
/* Stops accepting connections. Those already in the listen queue get one response each. */
void http_drain(http *h);
/* Returns 1 if a draining server has no response left to send. */
int http_idle(http *h);
void http_stop(http *h); /* after http_drain; no request is in a queue */

#endif
