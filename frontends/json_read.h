/* json_read.h - reads JSON (RFC 8259) into jansson's values. */
#ifndef QEMB_JSON_READ_H
#define QEMB_JSON_READ_H

#include <jansson.h>

typedef enum {
    JSON_FAULT_SYNTAX, /* also a surrogate without its pair, NUL in a key, values nested too deep */
    JSON_FAULT_UTF8,
    JSON_FAULT_TWICE, /* an object has a key twice */
    JSON_FAULT_MEMORY
} json_fault;

typedef struct {
    json_fault fault;
    char text[200]; /* what is wrong; of the text it shows a byte, and keys that look like names */
} json_read_error;

/* A member of the outermost object, as it stands in the text. */
typedef struct {
    const char *name;  /* the key, unescaped; valid during the call */
    const char *key;   /* (key_len) with its quotes */
    const char *value; /* (value_len) */
    size_t key_len, value_len;
} json_member;

/* Reads the value in s (len), which a UTF-8 byte order mark may precede. Strings may hold NUL, keys
 * may not. A number without a fraction is an integer however it is written (64.0, 1e2), if it is
 * at most 2^53 or is written as an integer of 64 bits; any other is a real, at most DBL_MAX.
 * on_member, which may be NULL, is called for each member of the outermost object, in order. NULL:
 * *e says why. */
json_t *json_read(const char *s, size_t len, void (*on_member)(void *self, const json_member *m),
                  void *self, json_read_error *e);

#endif
