/* embed.c - records to vectors, for the commands embed and shards; see cli.h. */
#include "cli.h"

#include "frontends/console.h"

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

/* A run. next and bytes are called by the reader thread, the others by the writer thread. */
typedef struct {
    embedder *e;
    embed_run *run;
    input *in;
    output out;
    float *zeros;       /* (dim) */
    atomic_int stopped; /* by an error: the reader reads no further */
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

void embed_counts_add(embed_counts *sum, const embed_counts *c) {
    sum->texts += c->texts, sum->errors += c->errors, sum->rows += c->rows;
    sum->tokens += c->tokens, sum->batches += c->batches, sum->distinct += c->distinct;
    sum->saved += c->saved, sum->truncated += c->truncated;
}

void embed_say_stats(const embedder *e, const embed_counts *c) {
    const double seconds = seconds_now() - e->progress.start;
    say("%" PRIu64 " texts, %" PRIu64 " tokens in %.3f s (%.1f texts/s, %.1f tokens/s)", c->texts,
        c->tokens, seconds, per_second(c->texts, seconds), per_second(c->tokens, seconds));
    say("%" PRIu64 " batches, %" PRIu64 " distinct texts, %" PRIu64 " prefix tokens saved, %" PRIu64
        " truncated, %" PRIu64 " errors, %" PRIu64 " rows, peak memory %.1f MiB, table %s",
        c->batches, c->distinct, c->saved, c->truncated, c->errors, c->rows, peak_mib(),
        e->opt->model.ops->name);
    pipeline_say_devices(e->p);
}

static void print_summary(const embedder *e, const embed_counts *c) {
    if (c->errors)
        say("%" PRIu64 " of %" PRIu64 " records failed", c->errors, c->texts + c->errors);
    if (e->opt->stats) embed_say_stats(e, c);
}

/* ---- records --------------------------------------------------------------------------------- */

/* --on-error stop: writes everything before the error, nothing after it. */
static void stop_run(embedding *w) {
    embed_run *r = w->run;
    r->stopped = 1;
    atomic_store(&w->stopped, 1);
    if (r->name) return; /* a file ends: the reader thread sees that it is to stop */
    output_finish(&w->out, w->e->opt->output, r->counts.rows, w->e->dim);
    print_summary(w->e, &r->counts);
    leave(STATUS_RECORDS);
}

/* Handles a record without a vector. Returns 1 if zeros are to be written in its place. */
static int handle_error(embedding *w, const result *r) {
    const on_error policy = w->e->opt->on_error;
    const char *name = w->run->name;
    w->run->counts.errors++;
    if (policy == ON_ERROR_RECORD) {
        output_error(&w->out, &r->head, r->code, r->message, r->message_len);
        w->run->counts.rows++;
        return 0;
    }
    if (w->run->counts.errors <= ERRORS_SHOWN)
        say("%.200s%srecord %" PRIu64 ": %s: %.*s%s", name ? name : "", name ? ": " : "",
            r->head.line, r->code, (int)(r->message_len < 500 ? r->message_len : 500), r->message,
            policy == ON_ERROR_STOP ? "; stops here (--on-error zero or skip goes on)" : "");
    if (policy == ON_ERROR_STOP) stop_run(w);
    return policy == ON_ERROR_ZERO;
}

static void write_vector(embedding *w, const result *r, const float *v) {
    const format_kind kind = w->e->opt->output;
    char *p =
        output_room(&w->out, format_vector_room(kind, r->dim) + output_head_room(&r->head) + 200);
    if (kind == FORMAT_JSONL) p = put(output_put_head(p, &r->head), ",\"embedding\":");
    p = format_vector(p, kind, v, r->dim);
    if (kind == FORMAT_JSONL) {
        p = format_uint(put(p, ",\"tokens\":"), (uint64_t)r->tokens);
        if (r->cut_bytes) p = format_uint(put(p, ",\"truncated_bytes\":"), r->cut_bytes);
        if (r->cut_tokens) p = format_uint(put(p, ",\"truncated_tokens\":"), r->cut_tokens);
        *p++ = '}';
    }
    if (format_is_text(kind)) *p++ = '\n';
    output_wrote(&w->out, p);
    w->run->counts.rows++;
}

static void write_record(void *self, const result *r) {
    embedding *w = self;
    embed_counts *c = &w->run->counts;
    if (w->run->stopped) return; /* records that were read before the reader stopped */
    if (!r->unit) {
        if (handle_error(w, r)) write_vector(w, r, w->zeros);
        return;
    }
    c->texts++;
    c->tokens += (uint64_t)r->tokens;
    c->truncated += r->cut_bytes || r->cut_tokens;
    write_vector(w, r, r->unit);
}

/* Counts before the records, since one of them may stop the run. */
static void begin_batch(void *self, const batch_totals *b) {
    embed_counts *c = &((embedding *)self)->run->counts;
    c->batches += b->rows > 0;
    c->distinct += (uint64_t)b->rows;
    c->saved += b->tokens_saved;
}

static void end_batch(void *self, const batch_totals *b) {
    embedding *w = self;
    const embed_counts *c = &w->run->counts;
    output_flush(&w->out);
    if (w->out.error) atomic_store(&w->stopped, 1);
    progress_show(&w->e->progress, c->texts, c->tokens, b->bytes);
}

static input_status next_record(void *self, int wait, input_record *r, origin *from) {
    embedding *w = self;
    (void)from;
    return atomic_load(&w->stopped) ? INPUT_END : input_next(w->in, wait, r);
}

static uint64_t bytes_read(void *self) {
    const embedding *w = self;
    return input_consumed(w->in);
}

int embed_records(embedder *e, embed_run *r) {
    const options *o = e->opt;
    embedding w = {.e = e, .run = r};
    const stream s = {.self = &w,
                      .next = next_record,
                      .bytes = bytes_read,
                      .batch_begin = begin_batch,
                      .record = write_record,
                      .batch_end = end_batch};
    w.in = need(input_new(r->in, e->wake_fd, o->null_separated ? '\0' : '\n'));
    if (r->watch) input_watch(w.in, r->watch, r->self);
    w.zeros = need(calloc((size_t)e->dim, sizeof *w.zeros));
    output_open(&w.out, r->out, o->output, e->dim);
    const int failed = pipeline_run(e->p, &s);
    output_finish(&w.out, o->output, r->counts.rows, e->dim);
    if (failed) return -1; /* the reader thread may wait for input still */
    output_close(&w.out);
    r->write_error = w.out.error;
    snprintf(r->read_error, sizeof r->read_error, "%s", input_error(w.in));
    progress_add(&e->progress, r->counts.texts, r->counts.tokens, input_consumed(w.in));
    free(w.zeros);
    input_free(w.in);
    return 0;
}

/* ---- one text -------------------------------------------------------------------------------- */

int embed_ids(qemb_model *m, int whole, const record_ids *ids, float *unit, int dim) {
    qemb_batch *b = need(qemb_batch_new(m));
    float *out = need(malloc((size_t)whole * sizeof *out));
    qemb_pack_add(b, ids->ids, ids->n);
    qemb_embed(m, b, out);
    if (qemb_health_of(m).failure) DIE(STATUS_MODEL, "%s", qemb_health_of(m).failure);
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
    embedder e = {.opt = o, .p = pipeline_new(o, m, dim, t), .dim = t->dim};
    embed_run r = {.in = STDIN_FILENO, .out = STDOUT_FILENO};
    e.wake_fd = catch_signals();
    progress_open(&e.progress, progress_wanted(o), bytes_to_read());
    if (embed_records(&e, &r)) {
        print_summary(&e, &r.counts);
        pipeline_die(e.p);
    }
    say_progress("");
    print_summary(&e, &r.counts);
    if (*r.read_error) say("standard input: cannot read (%s)", r.read_error);
    pipeline_free(e.p);
    end_by_signal(); /* so that the parent sees the signal as the cause */
    if (*r.read_error) return STATUS_USAGE;
    return r.counts.errors && !o->errors_ok ? STATUS_RECORDS : STATUS_GOOD;
}
