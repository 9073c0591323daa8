/* cli.h - the interfaces between the files of the program qemb. */
#ifndef QEMB_CLI_H
#define QEMB_CLI_H

#include "frontends/format.h"
#include "frontends/model_options.h"
#include "frontends/record_tokenizer.h"

#include <stdint.h>
#include <string.h>
#include <sys/types.h>

/* ---- main.c ---------------------------------------------------------------------------------- */

typedef enum {
    ON_ERROR_DEFAULT = -1, /* parse_options replaces it by the output kind's default */
    ON_ERROR_RECORD,
    ON_ERROR_ZERO,
    ON_ERROR_SKIP,
    ON_ERROR_STOP
} on_error;

typedef enum { COLOR_AUTO, COLOR_ALWAYS, COLOR_NEVER } color_choice;

typedef struct {
    int command;  /* index into the table of commands, */
    unsigned bit; /* its bit */
    model_options model;
    int jsonl, stats;
    int keep;           /* 1: JSON records may have other keys, which come back */
    int null_separated; /* records end with NUL */
    format_kind output;
    on_error on_error;
    int errors_ok;      /* 1: records that failed do not change the exit status */
    int progress;       /* 1: always, -1: never, 0: if standard error is a terminal */
    int dim;            /* 0: the model's */
    const char *query;  /* of grep and rerank */
    int raw_scores;     /* of rerank: logits */
    const char **files; /* (n_files) of grep and shards; "-": standard input */
    int n_files;
    const char *out; /* of shards: the directory */
    /* of grep */
    int best; /* how many; 0: not given */
    int has_min_score;
    float min_score;
    int with_line, json;
    int with_file; /* 1: always, -1: never, 0: of more than one file */
    color_choice color;
    const char *index; /* NULL: none */
} options;

/* This many errors are told on standard error where the output has no place for them; further ones
 * are counted. */
enum { ERRORS_SHOWN = 10 };

/* Whether a FILE is standard input. */
static inline int is_stdin(const char *name) { return !strcmp(name, "-"); }

/* Copy s to p, which has room for it, and return the end. */
static inline char *put_bytes(char *p, const char *s, size_t n) {
    memcpy(p, s, n);
    return p + n;
}
static inline char *put(char *p, const char *s) { return put_bytes(p, s, strlen(s)); }

/* ---- output.c -------------------------------------------------------------------------------- */

/* A buffer of standard output or of a file. A failed write to standard output ends the process with
 * STATUS_OUTPUT, and a message that says how many of its rows are whole; without a message if the
 * reader of the pipe has closed it. A failed write to a file sets error, and what follows is
 * dropped. */
typedef struct {
    int fd, to_spool;
    int target; /* gets all in the end */
    int error;  /* errno; 0: no failure */
    char *data; /* (cap), len in use */
    size_t len, cap;
    off_t header_at;      /* FORMAT_NPY: offset of the header */
    int nul_ended;        /* rows of text end with NUL instead of a newline */
    size_t row_bytes;     /* of a row that is no text; 0: text */
    size_t header_bytes;  /* before the rows */
    uint64_t written;     /* bytes that were written, */
    uint64_t whole, rows; /* those of whole rows, and how many that are */
} output;

/* dim: numbers of each vector, if the kind is no text. */
void output_open(output *o, int fd, format_kind kind, int dim);
/* Returns room for n bytes. output_wrote then takes the end of what was written. */
char *output_room(output *o, size_t n);
void output_wrote(output *o, const char *end);
/* What a JSON object of the output begins with. */
typedef struct {
    const char *id; /* (id_len) as in record_ids; id_len 0: the id is line */
    size_t id_len;
    const char *kept; /* (kept_len) as in record_ids */
    size_t kept_len;
    uint64_t line;
} output_head;

/* The room that output_put_head needs. */
size_t output_head_room(const output_head *h);
/* Writes {"id":... and the keys that are kept at p. Returns the end. */
char *output_put_head(char *p, const output_head *h);
/* Writes {"id":...,"line":...,"error":{"code":...,"message":...}} and a newline. */
void output_error(output *o, const output_head *h, const char *code, const char *message,
                  size_t message_len);
void output_flush(output *o);
/* Call it after the last record, also if an error stops the run. */
void output_finish(output *o, format_kind kind, uint64_t rows, int dim);
void output_close(output *o); /* closes the descriptor too; a file is on the disk then */

/* ---- progress.c ------------------------------------------------------------------------------ */

typedef struct {
    int shown;
    uint64_t bytes; /* of the whole input; 0: unknown */
    double start, last;
    char label[40];                                     /* begins the line */
    uint64_t texts_before, tokens_before, bytes_before; /* of earlier runs */
} progress;

void progress_open(progress *p, int shown, uint64_t bytes);
/* Whether the options show the line in a run whose records go to standard output as they come. */
int progress_wanted(const options *o);
/* Shows the line, at most ten times a second. Counts are of this run; bytes: of input, so far. */
void progress_show(progress *p, uint64_t texts, uint64_t tokens, uint64_t bytes);
/* Counts a run that has ended among the earlier ones. */
void progress_add(progress *p, uint64_t texts, uint64_t tokens, uint64_t bytes);
double per_second(uint64_t n, double seconds); /* 0 for no time */

/* ---- pipeline.c ------------------------------------------------------------------------------ */

/* Where a record comes from, if the stream has several files. */
typedef struct {
    int file;
    uint64_t offset; /* of the record's first byte */
} origin;

/* A record with its vector, or with an error. Valid during the call that gets it. */
typedef struct {
    output_head head;
    origin from;
    const float *unit; /* (dim) scaled to length 1, or one logit; NULL: an error */
    int dim, tokens;
    const char *text; /* (text_len), of a record with a vector; NULL: the stream keeps no texts */
    size_t text_len;
    size_t cut_bytes, cut_tokens; /* what truncation removed, or 0 */
    const char *code;             /* of an error */
    const char *message;          /* (message_len) */
    size_t message_len;
} result;

typedef struct {
    int rows;            /* distinct texts */
    size_t tokens_saved; /* by a shared prefix */
    size_t tokens_computed;
    uint64_t bytes; /* of input, so far */
} batch_totals;

/* Where the records of a run come from, and what becomes of their vectors. The reader thread calls
 * next and bytes, the writer thread the others, in the order of the input. */
typedef struct {
    void *self;
    int keep_texts;
    int logits; /* the model is a reranker: its numbers are given as they are */
    /* As tokenize_record, which it replaces; NULL: it does not. Called by the reader thread, after
     * next. */
    int (*tokenize)(void *self, record_tokenizer *t, const input_record *r, record_ids *out,
                    qemb_err *err);
    /* As input_next; also sets *from. Any status but INPUT_RECORD and INPUT_WAIT ends the run. */
    input_status (*next)(void *self, int wait, input_record *r, origin *from);
    uint64_t (*bytes)(void *self); /* of input, so far */
    /* A batch, before its records. May be NULL. */
    void (*batch_begin)(void *self, const batch_totals *b);
    void (*record)(void *self, const result *r);
    void (*batch_end)(void *self, const batch_totals *b);
} stream;

typedef struct pipeline pipeline;

/* m: the replicas on the devices of o->model. dim: qemb_dim. What is given has to outlive it. */
pipeline *pipeline_new(const options *o, qemb_model *const *m, int dim, record_tokenizer *t);
void pipeline_free(pipeline *p);
/* Computes until the input ends or a signal arrives: 0, and it may run again. -1: no device is
 * left; what could be computed has been given to the stream, and the process has to be ended by
 * pipeline_die. */
int pipeline_run(pipeline *p, const stream *s);
_Noreturn void pipeline_die(const pipeline *p);
void pipeline_say_devices(pipeline *p); /* the devices' part of --stats */

/* From here on the first SIGINT, SIGTERM, SIGHUP or SIGQUIT ends the input of a run. Returns the
 * descriptor that becomes readable then. To be called once. */
int catch_signals(void);
int signal_caught(void); /* the signal, or 0 */
/* Ends the process by the signal that was caught; returns if there is none. */
void end_by_signal(void);

/* ---- embed.c --------------------------------------------------------------------------------- */

typedef struct {
    uint64_t texts, errors; /* records with a vector, and without; together the input's records */
    uint64_t rows;          /* of the output: vectors, zeros and error records */
    uint64_t tokens;
    uint64_t batches, distinct, saved, truncated; /* for --stats */
} embed_counts;

/* What several runs share. */
typedef struct {
    const options *opt;
    pipeline *p;
    int dim;     /* of a vector that asks for no other */
    int wake_fd; /* of catch_signals */
    progress progress;
} embedder;

/* From the records of a descriptor to the vectors on another. */
typedef struct {
    int in, out;      /* out is closed */
    const char *name; /* of an input file, for messages; NULL: standard input */
    /* Gets the bytes of the input as they are read, from the reader thread. NULL: none. */
    void (*watch)(void *self, const void *bytes, size_t n);
    void *self;
    /* The results. */
    embed_counts counts;
    char read_error[128]; /* why the input could not be read to its end; "": it was */
    int write_error;      /* errno; 0: none. A failure of standard output ends the process */
    int stopped;          /* by --on-error stop */
} embed_run;

/* Runs until the input ends, an error stops it or a signal arrives. If --on-error stop stops a run
 * from standard input, which may not end, it ends the process. Returns -1 if no device is left;
 * then the process has to be ended by pipeline_die. */
int embed_records(embedder *e, embed_run *r);
void embed_counts_add(embed_counts *sum, const embed_counts *c);
/* The texts, tokens and batches of --stats. */
void embed_say_stats(const embedder *e, const embed_counts *c);

/* Embeds standard input to standard output. m: the replicas on the devices of o->model. dim:
 * qemb_dim. Returns the exit status; does not return after a signal. */
int embed_stream(const options *o, qemb_model *const *m, int dim, record_tokenizer *t);
/* unit (dim) = the vector of one text, of `whole` numbers, cut and scaled to length 1. -1: it has
 * no finite length. */
int embed_ids(qemb_model *m, int whole, const record_ids *ids, float *unit, int dim);

/* ---- shards.c -------------------------------------------------------------------------------- */

/* Makes an output in directory o->out for each of o->files, unless it is there. Opens the model of
 * f when it is needed; on_layer_loaded may be NULL. Returns the exit status; does not return after
 * a signal. */
int make_shards(const options *o, const model_file *f, record_tokenizer *t,
                void (*on_layer_loaded)(int, int));

/* ---- check.c --------------------------------------------------------------------------------- */

/* Prints the scores of published examples, beside the expected ones of a known model; with_texts:
 * the examples too. Returns whether the scores are within its tolerance, or 1 if none are known. */
int check_model(const qemb_file *f, qemb_model *m, record_tokenizer *t, int with_texts);

/* ---- rerank.c -------------------------------------------------------------------------------- */

/* Ranks documents of standard input by a reranker: the lines, if o->query is set, else those of
 * the JSON records. Returns the exit status; does not return after a signal. */
int rerank_stream(const options *o, qemb_model *const *m, record_tokenizer *t);

/* ---- grep.c ---------------------------------------------------------------------------------- */

/* Prints the lines of o->files that are near o->query. query and lines tokenize with their prompts;
 * f: the model's file. Returns the exit status: 0 some printed, 1 none, 2 an error, also if lines
 * were printed. Takes files that cannot be indexed out of o->files. */
int grep_files(options *o, const qemb_file *f, qemb_model *const *m, record_tokenizer *query,
               record_tokenizer *lines);

#endif
