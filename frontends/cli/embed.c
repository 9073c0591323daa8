/* embed.c - the embed command: standard input to vectors on standard output; see cli.h. */
#include "cli.h"

#include "frontends/console.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

/* next and bytes are called by the reader thread, the others by the writer thread. */
typedef struct {
    const options *opt;
    pipeline *p;
    input *in;
    int read_errno; /* of standard input; 0: no failure */
    int dim;        /* of a vector that asks for no other */

    output out;
    float *zeros;  /* (dim) */
    uint64_t rows; /* vectors */
    /* for --stats */
    uint64_t texts, tokens, batches, distinct, saved, truncated, errors;
    progress progress;
} embedding;

/* ---- messages -------------------------------------------------------------------------------- */

/* Peak resident memory in MiB. getrusage counts memory of the parent before exec too, so it is used
 * only where /proc is missing. */
static double peak_mib(void) {
    char line[128];
    long kib = -1;
    FILE *f = fopen("/proc/self/status", "re");
    while (f && kib < 0 && fgets(line, sizeof line, f)) sscanf(line, "VmHWM: %ld", &kib);
    if (f) fclose(f);
    if (kib < 0) {
        struct rusage use;
        getrusage(RUSAGE_SELF, &use);
        kib = use.ru_maxrss;
    }
    return (double)kib / 1024;
}

static void print_summary(const embedding *w) {
    if (w->errors)
        say("%" PRIu64 " of %" PRIu64 " records failed", w->errors, w->texts + w->errors);
    if (!w->opt->stats) return;
    const double seconds = seconds_now() - w->progress.start;
    say("%" PRIu64 " texts, %" PRIu64 " tokens in %.3f s (%.1f texts/s, %.1f tokens/s)", w->texts,
        w->tokens, seconds, per_second(w->texts, seconds), per_second(w->tokens, seconds));
    say("%" PRIu64 " batches, %" PRIu64 " distinct texts, %" PRIu64 " prefix tokens saved, %" PRIu64
        " truncated, %" PRIu64 " errors, peak memory %.1f MiB, table %s",
        w->batches, w->distinct, w->saved, w->truncated, w->errors, peak_mib(),
        w->opt->model.ops->name);
    pipeline_say_devices(w->p);
}

/* ---- records --------------------------------------------------------------------------------- */

/* --on-error stop: writes everything before the error, nothing after it. */
static void stop_run(embedding *w) {
    output_finish(&w->out, w->opt->output, w->rows, w->dim);
    print_summary(w);
    leave(STATUS_RECORDS);
}

/* Handles a record without a vector. Returns 1 if zeros are to be written in its place. */
static int handle_error(embedding *w, const result *r) {
    const on_error policy = w->opt->on_error;
    w->errors++;
    if (policy == ON_ERROR_RECORD) {
        output_error(&w->out, r->id, r->id_len, r->line, r->code, r->message, r->message_len);
        return 0;
    }
    if (w->errors <= ERRORS_SHOWN)
        say("record %" PRIu64 ": %s: %.*s", r->line, r->code,
            (int)(r->message_len < 500 ? r->message_len : 500), r->message);
    if (policy == ON_ERROR_STOP) stop_run(w);
    return policy == ON_ERROR_ZERO;
}

static void write_vector(embedding *w, const result *r, const float *v) {
    const format_kind kind = w->opt->output;
    char *p = output_room(&w->out, format_vector_room(kind, r->dim) + r->id_len + 200);
    if (kind == FORMAT_JSONL) p = put(output_id(p, r->id, r->id_len, r->line), ",\"embedding\":");
    p = format_vector(p, kind, v, r->dim);
    if (kind == FORMAT_JSONL) {
        p = format_uint(put(p, ",\"tokens\":"), (uint64_t)r->tokens);
        if (r->cut_bytes) p = format_uint(put(p, ",\"truncated_bytes\":"), r->cut_bytes);
        if (r->cut_tokens) p = format_uint(put(p, ",\"truncated_tokens\":"), r->cut_tokens);
        *p++ = '}';
    }
    if (format_is_text(kind)) *p++ = '\n';
    output_wrote(&w->out, p);
    w->rows++;
}

static void write_record(void *self, const result *r) {
    embedding *w = self;
    if (!r->unit) {
        if (handle_error(w, r)) write_vector(w, r, w->zeros);
        return;
    }
    w->texts++;
    w->tokens += (uint64_t)r->tokens;
    w->truncated += r->cut_bytes || r->cut_tokens;
    write_vector(w, r, r->unit);
}

/* Counts before the records, since one of them may stop the run. */
static void begin_batch(void *self, const batch_totals *b) {
    embedding *w = self;
    w->batches += b->rows > 0;
    w->distinct += (uint64_t)b->rows;
    w->saved += b->tokens_saved;
}

static void end_batch(void *self, const batch_totals *b) {
    embedding *w = self;
    output_flush(&w->out);
    progress_show(&w->progress, w->texts, w->tokens, b->bytes);
}

static input_status next_record(void *self, int wait, input_record *r, origin *from) {
    embedding *w = self;
    (void)from;
    const input_status status = input_next(w->in, wait, r);
    if (status == INPUT_FAILED) w->read_errno = errno;
    return status;
}

static uint64_t bytes_read(void *self) {
    const embedding *w = self;
    return input_bytes(w->in);
}

/* ---- one text -------------------------------------------------------------------------------- */

int embed_ids(qemb_model *m, int whole, const record_ids *ids, float *unit, int dim) {
    qemb_batch *b = need(qemb_batch_new(m));
    float *out = need(malloc((size_t)whole * sizeof *out));
    qemb_pack_add(b, ids->ids, ids->n);
    qemb_embed(m, b, out);
    const int failed = qemb_l2_normalize(unit, out, dim);
    free(out);
    qemb_batch_free(b);
    return failed;
}

/* ---- the command ----------------------------------------------------------------------------- */

/* Bytes of standard input from here on; 0: unknown. */
static uint64_t bytes_to_read(void) {
    struct stat st;
    const off_t start = lseek(STDIN_FILENO, 0, SEEK_CUR);
    if (start < 0 || fstat(STDIN_FILENO, &st) || !S_ISREG(st.st_mode) || st.st_size < start)
        return 0;
    return (uint64_t)(st.st_size - start);
}

int embed_stream(const options *o, qemb_model *const *m, int dim, record_tokenizer *t) {
    embedding w = {.opt = o, .p = pipeline_new(o, m, dim, t), .dim = t->dim};
    const stream s = {.self = &w,
                      .next = next_record,
                      .bytes = bytes_read,
                      .batch_begin = begin_batch,
                      .record = write_record,
                      .batch_end = end_batch};
    w.in = need(input_new(STDIN_FILENO, catch_signals(), o->null_separated ? '\0' : '\n'));
    w.zeros = need(calloc((size_t)dim, sizeof *w.zeros));
    progress_open(&w.progress, progress_wanted(o), bytes_to_read());
    output_open(&w.out, o->output, w.dim);
    const int failed = pipeline_run(w.p, &s);
    output_finish(&w.out, o->output, w.rows, w.dim);
    if (failed) {
        print_summary(&w);
        pipeline_die(w.p);
    }
    output_close(&w.out);
    say_progress("");
    print_summary(&w);
    if (w.read_errno) say("standard input: cannot read (%s)", strerror(w.read_errno));
    free(w.zeros);
    pipeline_free(w.p);
    input_free(w.in);
    end_by_signal(); /* so that the parent sees the signal as the cause */
    if (w.read_errno) return STATUS_USAGE;
    return w.errors && !o->errors_ok ? STATUS_RECORDS : STATUS_GOOD;
}
