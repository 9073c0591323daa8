/* input.h - input records: splits a file descriptor into records, parses JSON objects. What is
 * compressed is decompressed. */
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
    uint64_t line;   /* 1 for the first record */
    uint64_t offset; /* of its first byte */
    int too_large;   /* it did not fit in memory: text is empty */
} input_record;

typedef enum {
    INPUT_END,     /* no more records */
    INPUT_RECORD,  /* *r is filled */
    INPUT_WAIT,    /* no complete record has arrived yet */
    INPUT_STOPPED, /* wake_fd became readable */
    INPUT_FAILED   /* input_error says why */
} input_status;

/* Reads records from fd, whose bytes may be those of a .gz or .zst file. A byte order mark at their
 * beginning is dropped; UTF-16 fails. Each record ends with `separator`; the last one may lack it.
 * If separator is '\n', one CR before it is dropped. A wait ends when wake_fd becomes readable (-1:
 * none). input_free closes neither descriptor. Returns NULL if out of memory. */
input *input_new(int fd, int wake_fd, char separator);
void input_free(input *in);
/* Has all bytes of the descriptor given to watch as they are read. Call it before input_next. */
void input_watch(input *in, void (*watch)(void *self, const void *bytes, size_t n), void *self);
/* Gets the next record. With wait = 0 it returns INPUT_WAIT instead of blocking. Complete records
 * that were read before a failure or a wake are returned first; an incomplete one is dropped. */
input_status input_next(input *in, int wait, input_record *r);
/* The bytes of the descriptor that all records so far were, separators and a byte order mark
 * included; of compressed ones, those that are decompressed. */
uint64_t input_consumed(const input *in);
/* Why no more can be read, or "". */
const char *input_error(const input *in);

/* ---- the object in a JSON line --------------------------------------------------------------- */

typedef struct {
    const char *id; /* (id_len) "id" as it came, a newline between its tokens as a space; or NULL */
    size_t id_len;
    const char *text; /* (text_len), UTF-8, or NULL if the record has ids */
    size_t text_len;
    const int32_t *ids; /* (n_ids), each in 0..vocab-1 */
    size_t n_ids;
    const char *instruct; /* (instruct_len), "" to embed as a document; NULL: not given */
    size_t instruct_len;
    int dim; /* 1..the parser's dim, or 0: not given */
    /* (kept_len) the other keys, if they are kept: ,"key":value for each, in order, as they came; a
     * newline between tokens is a space. No key of the output is among them. */
    const char *kept;
    size_t kept_len;
} input_object;

typedef struct input_parser input_parser; /* owns what input_object points to */

/* dim: numbers of a whole vector. NULL: out of memory. */
input_parser *input_parser_new(int vocab, int dim);
void input_parser_free(input_parser *p);
/* From here on, input_parse keeps other keys. Those that the output has are errors still. */
void input_parser_keep(input_parser *p);
/* Parses the JSON object in line (len). It has exactly one of "text" and "ids"; "id", "instruct"
 * and "dim" are optional; other keys, unless they are kept, and repeated keys are errors. null
 * counts as not given, except for "id"; "instruct": null is "". *o is valid until the next call. On
 * failure returns -1 and still sets o->id, to "null" if line is no JSON object, and o->kept;
 * err->code is "invalid_json", "invalid_utf8", "bad_record", "bad_ids", "bad_dim" or
 * "out_of_memory". */
int input_parse(input_parser *p, const char *line, size_t len, input_object *o, qemb_err *err);

/* A query and documents, for a reranker. */
typedef struct {
    const char *id; /* (id_len) as in input_object */
    size_t id_len;
    const char *query; /* (query_len), UTF-8 */
    size_t query_len;
    const char *instruct; /* (instruct_len), NULL: not given */
    size_t instruct_len;
    size_t n_documents;
    size_t top_n; /* results wanted, 0: all */
} input_ranking;

/* Parses the JSON object in line (len). It has "query" and "documents", a list of strings or of
 * objects with a string "text", whose other keys are ignored; "id", "instruct" and "top_n" are
 * optional; other keys and repeated keys are errors. Valid and failing as input_parse. */
int input_parse_ranking(input_parser *p, const char *line, size_t len, input_ranking *o,
                        qemb_err *err);
/* Document i (len) of what was parsed last. */
const char *input_document(const input_parser *p, size_t i, size_t *len);

#ifdef __cplusplus
}
#endif
#endif
