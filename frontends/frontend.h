/* frontend.h - what the files of the command line agree on.
 *
 *   main.c      options, commands, messages; the only file that ends the process
 *   select_ops.c    --cpu and --math -> the ops table
 *   record_tokenizer.c    a record of input -> token ids
 *   pipeline.c  the window of batches: read, compute, write, all at once
 *   output.c    records -> standard output
 * Below them, knowing nothing of each other: input.c, format.c and the engine (qemb.h).
 */
#ifndef QEMB_CLI_H
#define QEMB_CLI_H

#include "format.h"
#include "input.h"
#include "qemb.h"

#include <stdint.h>
#include <sys/types.h>

#define LENGTH(a) ((int)(sizeof(a) / sizeof *(a)))

/* ---- main.c ---------------------------------------------------------------------------------- */

enum { STATUS_GOOD, STATUS_USAGE, STATUS_MODEL, STATUS_RECORDS, STATUS_OUTPUT };

/* "qemb: ...\n" on stderr in one write; wipes the progress line. From any thread. */
void say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* A line that the next message or progress line replaces; "" wipes it. */
void say_progress(const char *line);
/* Ends the process at once, from any thread: other threads may be in the middle of anything. */
_Noreturn void leave(int status);
#define DIE(status, ...) (say(__VA_ARGS__), leave(status))
/* p, which is not NULL: else the process ends. */
void *need(void *p);

typedef enum { COMMAND_EMBED, COMMAND_INFO, COMMAND_TOKENIZE, COMMAND_PLAN, COMMAND_CHECK } command;

typedef enum {
    ON_ERROR_DEFAULT,
    ON_ERROR_RECORD,
    ON_ERROR_ZERO,
    ON_ERROR_SKIP,
    ON_ERROR_STOP
} on_error;

typedef struct {
    command command;
    const char *model;
    const char *instruct; /* NULL: none */
    int query, truncate, jsonl, stats, verify;
    char separator;
    format_kind output;
    on_error on_error;      /* not ON_ERROR_DEFAULT after parse_options */
    int progress;           /* 1 always, -1 never, 0 when it makes sense */
    int dim;                /* 0: hidden */
    qemb_options engine;    /* 0: the engine's default */
    const char *cpu, *math; /* as given; NULL: not */
    const qemb_ops *ops;    /* what they choose */
} options;

/* The model file with its tokenizer. */
typedef struct {
    qemb_file *file;
    qemb_tokenizer *tokenizer;
} source;

/* ---- select_ops.c -------------------------------------------------------------------------------- */

/* The table that --cpu and --math name; of what is NULL, the program's own default. NULL, with code
 * "usage", where this program or machine has no such table. */
const qemb_ops *choose_ops(const char *cpu, const char *math, qemb_err *err);
const char *math_name(qemb_math math); /* as --math has it */

/* ---- record_tokenizer.c -------------------------------------------------------------------------------- */

typedef struct {
    qemb_tokenizer_state *state;
    input_parser *parser; /* NULL: records are bare texts */
    const char *prompt;   /* (prompt_len) before every text that does not say otherwise */
    size_t prompt_len;
    char *own_prompt; /* its memory, if it is not the file's */
    int max_tokens, eos, truncate;
    int dim, one_dim; /* the vectors' dim; 1: every record's */
    char *joined;     /* (joined_cap) prompt and text side by side */
    size_t joined_cap;
} record_tokenizer;

typedef struct {
    const char *id; /* as in input_object */
    size_t id_len;
    const int32_t *ids; /* (n), without the end-of-text, which is always to be appended */
    int n, dim;
    size_t cut_bytes, cut_tokens; /* not 0: truncated by so much */
} record_ids;

/* An record_tokenizer as the options say, over s, which outlives it. 0, or -1 with err->code "usage" or
 * "model_file". The caller closes. */
int record_tokenizer_open(record_tokenizer *e, const source *s, const options *o, qemb_err *err);
void record_tokenizer_close(record_tokenizer *e);
/* The token ids of a record. What *out points to lives until the next call. -1: out->id and id_len
 * are set all the same; err->code is what the error record says. */
int tokenize_record(record_tokenizer *e, const input_record *r, record_ids *out, qemb_err *err);
/* The same for a text (len) after the prompt of task instruct (instruct_len), or after the run's
 * if instruct is NULL. */
int tokenize_text(record_tokenizer *e, const char *text, size_t len, const char *instruct,
                  size_t instruct_len, record_ids *out, qemb_err *err);
/* The same for token ids (n), which lie in 0..vocab-1 and may end in the end-of-text. */
int tokenize_ids(const record_tokenizer *e, const int32_t *ids, size_t n, record_ids *out,
                 qemb_err *err);

/* ---- output.c -------------------------------------------------------------------------------- */

/* Where records go: a buffer before a descriptor. Whatever fails ends the process with
 * STATUS_OUTPUT, silently if the reader of a pipe has left. */
typedef struct {
    int fd, to_spool;
    char *data; /* (cap), len in use */
    size_t len, cap;
    off_t header_at; /* FORMAT_NPY: where the header lies */
} output;

void output_open(output *o, format_kind kind, int dim);
/* Room for n bytes; output_wrote tells the end of what was written there. */
char *output_room(output *o, size_t n);
void output_wrote(output *o, const char *end);
/* {"id":...,"line":...,"error":{"code":...,"message":...}} and a newline. */
void output_error(output *o, const char *id, size_t id_len, uint64_t line, const char *code,
                  const char *message, size_t message_len);
/* Writes {"id":... at p and returns its end. Room: id_len + 32. id_len 0: id is line. */
char *output_id(char *p, const char *id, size_t id_len, uint64_t line);
void output_flush(output *o);
/* After the last record, also after the last one before an error that stops the run. */
void output_finish(output *o, format_kind kind, uint64_t rows, int dim);
void output_close(output *o); /* and standard output with it */

/* ---- pipeline.c ------------------------------------------------------------------------------ */

/* The run itself: standard input to standard output through m, to the end of input, an error or a
 * signal. Returns the exit status; does not return if a signal ended the run. */
int embed_stream(const options *o, qemb_model *m, int hidden, record_tokenizer *e);

#endif
