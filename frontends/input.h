/* input.h - how texts come in: records off a file descriptor, and the JSON object in one of
 * them. */
#ifndef QEMB_INPUT_H
#define QEMB_INPUT_H

#include "qemb.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- records --------------------------------------------------------------------------------- */

typedef struct input input;

typedef struct {
    const char *text; /* (len), valid until the next call; may hold NUL bytes */
    size_t len;
    uint64_t line; /* 1 for the first record */
    int too_large; /* there was no memory for it: text is empty, the rest of it was skipped */
} input_record;

typedef enum {
    INPUT_END,     /* no more records */
    INPUT_RECORD,  /* *r is filled */
    INPUT_WAIT,    /* nothing complete has arrived yet */
    INPUT_STOPPED, /* wake_fd became readable */
    INPUT_FAILED   /* errno says why */
} input_status;

/* Records of fd, each ended by `separator`; the last one needs none. With '\n' one CR at a record's
 * end is dropped too. wake_fd (or -1) ends a wait for fd when it becomes readable. Neither
 * descriptor is closed by input_free. NULL: out of memory. */
input *input_new(int fd, int wake_fd, char separator);
void input_free(input *in);
/* The next record. wait = 0: INPUT_WAIT instead of blocking. Records that were read before fd
 * failed or wake_fd became readable come first; half a record then does not come at all. */
input_status input_next(input *in, int wait, input_record *r);
/* Bytes taken from fd in records so far, separators included. */
uint64_t input_bytes(const input *in);

/* ---- the object in a JSON line --------------------------------------------------------------- */

typedef struct {
    const char *id; /* (id_len) "id" as JSON text without a newline, or NULL: there is none */
    size_t id_len;
    const char *text; /* (text_len), UTF-8; NULL: the record has ids instead */
    size_t text_len;
    const int32_t *ids; /* (n_ids), each in 0..vocab-1 */
    size_t n_ids;
    const char *instruct; /* (instruct_len), "" to embed as a document; NULL: not given */
    size_t instruct_len;
    int dim; /* 1..hidden, or 0: not given */
} input_object;

typedef struct input_parser input_parser; /* owns what the last parsed object points to */

input_parser *input_parser_new(int vocab, int hidden); /* NULL: out of memory */
void input_parser_free(input_parser *p);
/* The object in line (len): exactly one of "text" and "ids", optional "id", "instruct", "dim"
 * (null counts as not given, but for "id"; "instruct": null is ""), no other key, none twice.
 * *o is valid until the next call. -1: o->id is set all the same, to "null" if line is no JSON
 * object; err->code is "invalid_json", "invalid_utf8", "bad_record", "bad_ids", "bad_dim" or
 * "out_of_memory". */
int input_parse(input_parser *p, const char *line, size_t len, input_object *o, qemb_err *err);

#ifdef __cplusplus
}
#endif
#endif
