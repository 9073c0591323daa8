/* cli.h - the interfaces between main.c, output.c and pipeline.c. */
#ifndef QEMB_CLI_H
#define QEMB_CLI_H

#include "frontends/format.h"
#include "frontends/model_options.h"
#include "frontends/record_tokenizer.h"

#include <stdint.h>
#include <sys/types.h>

/* ---- main.c ---------------------------------------------------------------------------------- */

typedef enum {
    ON_ERROR_DEFAULT = -1, /* parse_options replaces it by the output kind's default */
    ON_ERROR_RECORD,
    ON_ERROR_ZERO,
    ON_ERROR_SKIP,
    ON_ERROR_STOP
} on_error;

typedef struct {
    int command; /* index into the table of commands */
    model_options model;
    int jsonl, stats, verify;
    int null_separated; /* records end with NUL */
    format_kind output;
    on_error on_error;
    int progress; /* 1: always, -1: never, 0: if standard error is a terminal */
    int dim;      /* 0: hidden */
} options;

/* ---- output.c -------------------------------------------------------------------------------- */

/* A buffer of standard output. A failed write ends the process with STATUS_OUTPUT; without a
 * message if the reader of the pipe has closed it. */
typedef struct {
    int fd, to_spool;
    char *data; /* (cap), len in use */
    size_t len, cap;
    off_t header_at; /* FORMAT_NPY: offset of the header */
} output;

void output_open(output *o, format_kind kind, int dim);
/* Returns room for n bytes. output_wrote then takes the end of what was written. */
char *output_room(output *o, size_t n);
void output_wrote(output *o, const char *end);
/* Writes {"id":...,"line":...,"error":{"code":...,"message":...}} and a newline. */
void output_error(output *o, const char *id, size_t id_len, uint64_t line, const char *code,
                  const char *message, size_t message_len);
/* Writes {"id":... at p, which has room for id_len + 32 bytes; id_len 0: the id is line. Returns
 * the end. */
char *output_id(char *p, const char *id, size_t id_len, uint64_t line);
void output_flush(output *o);
/* Call it after the last record, also if an error stops the run. */
void output_finish(output *o, format_kind kind, uint64_t rows, int dim);
void output_close(output *o); /* closes standard output too */

/* ---- pipeline.c ------------------------------------------------------------------------------ */

/* Embeds standard input to standard output until the input ends, an error stops the run or a signal
 * arrives. m: the replicas on the devices of o->model. hidden: D. Returns the exit status; does not
 * return after a signal. */
int embed_stream(const options *o, qemb_model *const *m, int hidden, record_tokenizer *t);

#endif
