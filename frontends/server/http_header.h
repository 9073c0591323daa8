/* http_header.h - what the header of a request says: its route, type, coding, trace. */
#ifndef QEMB_HTTP_HEADER_H
#define QEMB_HTTP_HEADER_H

#include "frontends/decompress.h"
#include "metrics.h"

/* The route of a request for the path url. Slashes may be doubled, and one may end the path. Of
 * ROUTE_MODEL, *model is the id in url, up to its end. */
route route_of(const char *method, const char *url, const char **model);
/* Whether a body comes with a request to the route. */
int route_takes_body(route r);
/* The methods that the route takes, for the header Allow. */
const char *route_methods(route r);
/* The paths that a message about an unknown one names. */
extern const char route_list[];

/* Whether a body of that Content-Type may be JSON in UTF-8. NULL: none is given. Accepted are
 * JSON's types, and the one that curl sends unless told otherwise. */
int is_json_type(const char *type);
/* What a Content-Encoding header says; NULL: none is given. UNKNOWN: a coding that is not
 * understood. */
compression coding_of(const char *encoding);

/* Characters of the ids in a traceparent header (W3C Trace Context), with the NUL. */
enum { TRACE_ROOM = 33, SPAN_ROOM = 17 };
/* Copies the ids of a traceparent header. Returns -1 with both empty if it is not valid. */
int trace_parse(const char *header, char trace[TRACE_ROOM], char span[SPAN_ROOM]);

/* Whether s is a list of names of headers, which may be sent back. */
int is_header_list(const char *s);

#endif
