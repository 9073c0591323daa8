/* json_type.h - the type of a JSON value, for messages. */
#ifndef QEMB_JSON_TYPE_H
#define QEMB_JSON_TYPE_H

#include <jansson.h>

/* With its article: "a list". */
static inline const char *json_type_name(const json_t *v) {
    static const char *const names[] = {"an object", "a list", "a string", "an integer",
                                        "a real",    "true",   "false",    "null"};
    return names[json_typeof(v)];
}

#endif
