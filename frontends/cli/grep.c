/* grep.c - the grep command: lines of files by meaning.
 *
 *   without --index:  files -> pipeline -> a vector a line, rounded to halves -> its score
 *                     -> printed at once (--min-score), or kept if it is among the best (-k)
 *   with --index:     files -> pipeline -> line_index.c, unless the index has their vectors
 *                     already; then one pass over the index has all scores
 *
 * Both compute a score by dot_f16.c from the same halves, so their output is the same.
 */
#include "hits.h"
#include "line_index.h"

#include "backends/cpu/dot_f16.h"
#include "frontends/console.h"
#include "frontends/decompress.h"
#include "frontends/map_fault.h"
#include "lib/unicode.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* A run over the files. next and bytes are called by the reader thread, the others by the writer
 * thread. */
typedef struct {
    const options *opt;
    int wake_fd;
    /* of the reader */
    input *in; /* of the open file, or NULL */
    int fd, file, unreadable;
    uint64_t bytes; /* of the files before */
    /* of the writer */
    int dim, stride;
    float *query;     /* (stride) */
    uint16_t *halves; /* (stride) */
    dot_f16 *dot;
    uint64_t order, tokens;
    line_index_file *files; /* (n_files) */
    best_hits best;
    hit_printer printer;
    progress progress;
    line_index_writer *index; /* NULL: scores, else an index is made */
} search;

_Noreturn static void die(const qemb_err *err) { DIE(GREP_ERROR, "%s", err->msg); }

/* ---- the files ------------------------------------------------------------------------------- */

static const char *shown(const char *name) { return is_stdin(name) ? "standard input" : name; }

static void cannot_read(search *s, const char *name, const char *why) {
    s->unreadable = 1;
    say("%.200s: cannot read (%s)", shown(name), why);
}

static int is_same(const struct stat *a, const struct stat *b) {
    return a->st_ino == b->st_ino && a->st_dev == b->st_dev;
}

/* Why an open file is not searched, or NULL. */
static const char *unfit(const options *o, int fd, const struct stat *st) {
    struct stat other;
    char first[COMPRESSION_MAGIC];
    if (!S_ISREG(st->st_mode)) return o->index ? "not a regular file, which --index needs" : NULL;
    /* would never end */
    if (!fstat(STDOUT_FILENO, &other) && is_same(st, &other)) return "is also the output";
    if (!o->index) return NULL;
    if (!stat(o->index, &other) && is_same(st, &other)) return "is the index";
    /* an index has the places of lines */
    const ssize_t n = pread(fd, first, sizeof first, 0);
    const compression c = n > 0 ? compression_of(first, (size_t)n) : COMPRESSION_NONE;
    return c == COMPRESSION_GZIP || c == COMPRESSION_ZSTD
               ? "compressed, which --index cannot take (decompress it)"
               : NULL;
}

/* Opens a file. Returns -1 after a message if it cannot be searched. Does not wait for the writer
 * of a FIFO: the reader's poll does, which a signal ends. */
static int open_file(search *s, const char *name) {
    struct stat st;
    const int fd = is_stdin(name) ? STDIN_FILENO : open(name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    const int error = fd < 0 || fstat(fd, &st) ? errno : S_ISDIR(st.st_mode) ? EISDIR : 0;
    const char *why = error ? NULL : unfit(s->opt, fd, &st);
    if (!error && !why) return fd;
    if (error) {
        cannot_read(s, name, strerror(error));
    } else {
        s->unreadable = 1;
        say("%.200s: %s", shown(name), why);
    }
    if (fd > STDIN_FILENO) close(fd);
    return -1;
}

static void close_file(search *s) {
    s->bytes += input_consumed(s->in);
    input_free(s->in);
    if (s->fd != STDIN_FILENO) close(s->fd);
    s->in = NULL;
    s->file++;
}

static int is_blank(const input_record *r) {
    const uint8_t *s = (const uint8_t *)r->text, *end = s + r->len;
    for (unsigned len; s < end; s += len) {
        len = utf8_valid(s, (size_t)(end - s));
        if (!len || UNICODE_CLASS(word_at(s, &len)) != CLASS_SPACE) return 0;
    }
    return !r->too_large;
}

/* The next line that is not blank, of this file or the next ones. */
static input_status next_line(void *self, int wait, input_record *r, origin *from) {
    search *s = self;
    while (s->file < s->opt->n_files) {
        const char *name = s->opt->files[s->file];
        if (!s->in) {
            s->fd = open_file(s, name);
            if (s->fd < 0) {
                s->file++;
                continue;
            }
            s->in = need(input_new(s->fd, s->wake_fd, '\n'));
        }
        const input_status status = input_next(s->in, wait, r);
        if (status == INPUT_FAILED) cannot_read(s, name, input_error(s->in));
        if (status == INPUT_FAILED || status == INPUT_END) {
            close_file(s);
        } else if (status != INPUT_RECORD || !is_blank(r)) {
            *from = (origin){s->file, r->offset};
            return status;
        }
    }
    return INPUT_END;
}

static uint64_t bytes_read(void *self) {
    const search *s = self;
    return s->bytes + (s->in ? input_consumed(s->in) : 0);
}

/* Bytes of all files; 0: not known. */
static uint64_t bytes_of(const options *o) {
    uint64_t sum = 0;
    for (int i = 0; i < o->n_files; i++) {
        struct stat st;
        if (is_stdin(o->files[i]) || stat(o->files[i], &st) || !S_ISREG(st.st_mode)) return 0;
        sum += (uint64_t)st.st_size;
    }
    return sum;
}

/* ---- their lines ----------------------------------------------------------------------------- */

/* Prints what is good enough, or keeps it if it may be among the best. */
static void take_hit(search *s, const hit *h) {
    if (!s->opt->has_min_score)
        best_offer(&s->best, h);
    else if (h->score >= s->opt->min_score)
        print_hit(&s->printer, h);
}

static void take_line(void *self, const result *r) {
    search *s = self;
    qemb_err err;
    if (!r->unit) {
        line_index_failed(&s->files[r->from.file], r->head.line, r->message, r->message_len);
        return;
    }
    s->tokens += (uint64_t)r->tokens;
    for (int i = 0; i < s->dim; i++) s->halves[i] = format_half(r->unit[i]);
    hit h = {.order = s->order++, .file = r->from.file, .line = r->head.line};
    if (s->index) {
        const line_index_row row = {r->from.offset, r->text_len, r->head.line};
        if (line_index_add(s->index, r->from.file, &row, s->halves, &err)) {
            line_index_drop(s->index);
            die(&err);
        }
        return;
    }
    s->dot(&h.score, s->query, s->halves, 1, s->stride);
    h.text = r->text, h.len = r->text_len;
    take_hit(s, &h);
}

static void end_batch(void *self, const batch_totals *b) {
    search *s = self;
    output_flush(&s->printer.out);
    progress_show(&s->progress, s->order, s->tokens, b->bytes);
}

/* Runs all lines through the pipeline. */
static void read_lines(search *s, qemb_model *const *m, int whole, record_tokenizer *t) {
    const stream lines = {.self = s,
                          .keep_texts = !s->index, /* an index has their places */
                          .next = next_line,
                          .bytes = bytes_read,
                          .record = take_line,
                          .batch_end = end_batch};
    pipeline *p = pipeline_new(s->opt, m, whole, t);
    if (pipeline_run(p, &lines)) {
        if (s->index) line_index_drop(s->index);
        pipeline_die(p);
    }
    pipeline_free(p);
    say_progress("");
}

/* ---- the index ------------------------------------------------------------------------------- */

/* Sets what the files that can be indexed hold. The others leave o->files after a message. */
static void read_texts(search *s, options *o) {
    int n = 0;
    for (int i = 0; i < o->n_files; i++) {
        const char *name = o->files[i];
        const int fd = open_file(s, name);
        if (fd < 0) continue;
        if (line_index_text_of(fd, &s->files[n].text))
            cannot_read(s, name, strerror(errno));
        else
            o->files[n++] = name;
        close(fd);
    }
    o->n_files = n;
}

static line_index_key key_of(const options *o, const qemb_file *f, const record_tokenizer *t) {
    const qemb_options *e = &o->model.engine;
    line_index_key k = {.dim = (uint32_t)t->dim,
                        .max_tokens = (uint32_t)t->text.max_tokens,
                        .flags = (uint32_t)(o->model.truncate | e->deterministic << 1 |
                                            e->hopper << 2 | (t->prompt_len > 0) << 3 |
                                            1 << 4)}; /* a byte order mark is in no line */
    memcpy(k.model, f->sha256, sizeof k.model);
    memcpy(k.header, f->checksum, sizeof k.header);
    snprintf(k.table, sizeof k.table, "%s", o->model.ops->name);
    snprintf(k.qemb, sizeof k.qemb, "%s", QEMB_VERSION);
    return k;
}

static int is_fresh(const search *s, const line_index *x, const line_index_key *key) {
    if (memcmp(&x->key, key, sizeof *key) || x->n_files != s->opt->n_files) return 0;
    for (int i = 0; i < x->n_files; i++)
        if (memcmp(&x->files[i].text, &s->files[i].text, sizeof x->files[i].text)) return 0;
    return 1;
}

/* Whether an index that cannot be opened may be made, or made again. */
static int may_be_made(const qemb_err *err) {
    return !strcmp(err->code, "missing") || !strcmp(err->code, "other_version");
}

/* 0 if x is the index of these files, 1 if it has to be made. Ends the process if something is
 * there that must not be overwritten. */
static int open_index(const search *s, line_index *x, const line_index_key *key) {
    qemb_err err;
    if (line_index_open(x, s->opt->index, &err)) {
        if (!may_be_made(&err)) die(&err);
        return 1;
    }
    if (is_fresh(s, x, key)) return 0;
    line_index_close(x);
    return 1;
}

/* Returns 1, after a message, if a file's contents are no longer those that were indexed. */
static int have_changed(const search *s) {
    const options *o = s->opt;
    for (int i = 0; i < o->n_files; i++) {
        line_index_text now = {0};
        const int fd = open(o->files[i], O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        const int error = fd < 0 || line_index_text_of(fd, &now) ? errno : 0;
        if (fd >= 0) close(fd);
        if (!error && !memcmp(&now, &s->files[i].text, sizeof now)) continue;
        if (error)
            say("%.200s: cannot read (%s); no index is made", o->files[i], strerror(error));
        else
            say("%.200s: changed while it was read; no index is made", o->files[i]);
        return 1;
    }
    return 0;
}

/* Makes the index of all files and opens it as x. All must be read to the end: later queries
 * would not see the lines that are missing. */
static void make_index(search *s, line_index *x, const line_index_key *key, qemb_model *const *m,
                       int whole, record_tokenizer *t) {
    const options *o = s->opt;
    qemb_err err;
    if (line_index_create(&s->index, o->index, key, s->files, o->n_files, &err)) die(&err);
    read_lines(s, m, whole, t);
    if (signal_caught() || s->unreadable || have_changed(s)) {
        line_index_drop(s->index);
        end_by_signal();
        leave(GREP_ERROR);
    }
    /* What another program has put there in the meantime is not overwritten either. */
    if (!line_index_open(x, o->index, &err)) {
        line_index_close(x);
    } else if (!may_be_made(&err)) {
        line_index_drop(s->index);
        die(&err);
    }
    if (line_index_finish(s->index, x, &err)) die(&err);
    s->index = NULL;
}

/* The file that a hit was read from last. */
typedef struct {
    int fd, file; /* -1: none */
    char *text;
    size_t cap;
} hit_reader;

/* Sets h->text to the line at row. */
static void read_hit(const search *s, hit_reader *r, const line_index_row *row, hit *h) {
    const char *name = s->opt->files[h->file];
    if (r->file != h->file) {
        if (r->fd >= 0) close(r->fd);
        r->fd = open(name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (r->fd < 0) DIE(GREP_ERROR, "%.200s: cannot read (%s)", name, strerror(errno));
        r->file = h->file;
    }
    if (row->bytes >= r->cap) {
        r->cap = row->bytes + 4096;
        r->text = need(realloc(r->text, r->cap));
    }
    size_t len = 0;
    while (len < row->bytes) {
        const ssize_t n = pread(r->fd, r->text + len, row->bytes - len, (off_t)(row->offset + len));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) DIE(GREP_ERROR, "%.200s: cannot read (%s)", name, strerror(errno));
        if (!n) DIE(GREP_ERROR, "%.200s: changed while it was searched", name);
        len += (size_t)n;
    }
    h->text = r->text, h->len = len;
}

/* Prints the index's hits. */
static void search_index(search *s, const line_index *x, const char *path, int threads) {
    qemb_err err;
    float *scores = need(malloc((x->n_rows + 1) * sizeof *scores));
    hit_reader r = {.fd = -1, .file = -1};
    if (line_index_scan(x, path, s->query, scores, threads, &err)) die(&err);
    uint64_t row = 0;
    for (int i = 0; i < x->n_files; i++) {
        const line_index_file *f = &x->files[i];
        s->files[i] = *f;
        for (const uint64_t stop = row + f->rows; row < stop; row++) {
            hit h = {.score = scores[row], .order = row, .file = i, .line = x->rows[row].line};
            if (s->opt->has_min_score && h.score >= s->opt->min_score)
                read_hit(s, &r, &x->rows[row], &h);
            take_hit(s, &h);
        }
    }
    best_sort(&s->best);
    for (size_t i = 0; i < s->best.n; i++) {
        hit h = s->best.heap[i];
        read_hit(s, &r, &x->rows[h.order], &h);
        print_hit(&s->printer, &h);
    }
    if (r.fd >= 0) close(r.fd);
    free(r.text);
    free(scores);
}

/* Returns 1 if that cannot be done: some files cannot be read, and there is no index of the others,
 * in o->files. None is made then, so that a misspelt name cannot replace the index of
 * all files. */
static int search_by_index(search *s, options *o, const qemb_file *f, qemb_model *const *m,
                           record_tokenizer *t) {
    const line_index_key key = key_of(o, f, t);
    line_index x;
    read_texts(s, o);
    map_fault_opening(o->index);
    const int is_missing = open_index(s, &x, &key);
    map_fault_opening(NULL);
    if (is_missing) {
        if (s->unreadable) return 1;
        make_index(s, &x, &key, m, qemb_dim(&f->config), t);
    }
    map_fault_watch(x.map, x.map_bytes, o->index);
    search_index(s, &x, o->index, qemb_options_of(m[0])->threads);
    map_fault_forget(x.map);
    line_index_close(&x);
    return 0;
}

/* ---- the command ----------------------------------------------------------------------------- */

static void print_best(search *s) {
    best_sort(&s->best);
    for (size_t i = 0; i < s->best.n; i++) print_hit(&s->printer, &s->best.heap[i]);
}

/* Says which lines have no vector, in a message a file. Returns whether there are any. */
static int say_failures(const search *s) {
    int any = 0;
    for (int i = 0; i < s->opt->n_files; i++) {
        const line_index_file *f = &s->files[i];
        if (!f->failed) continue;
        any = 1;
        say("%.200s: %" PRIu64 " line%s failed, first line %" PRIu64 ": %s",
            shown(s->opt->files[i]), f->failed, f->failed == 1 ? "" : "s", f->line, f->message);
    }
    return any;
}

/* s->query = the query's vector, scaled to length 1. */
static void embed_query(search *s, qemb_model *m, int whole, record_tokenizer *t) {
    const char *query = s->opt->query;
    record_ids ids = {0};
    qemb_err err;
    if (tokenize_text(t, query, strlen(query), NULL, 0, &ids, &err))
        DIE(GREP_ERROR, "query: %s", err.msg);
    if (embed_ids(m, whole, &ids, s->query, s->dim)) DIE(GREP_ERROR, "query: no finite vector");
}

int grep_files(options *o, const qemb_file *f, qemb_model *const *m, record_tokenizer *query,
               record_tokenizer *lines) {
    const int whole = qemb_dim(&f->config);
    search s = {.opt = o,
                .dim = lines->dim,
                .stride = dot_f16_stride(lines->dim),
                .dot = dot_f16_choose(),
                .best.most = o->best ? (size_t)o->best : 10};
    s.query = need(aligned_alloc(64, (size_t)s.stride * sizeof *s.query));
    s.halves = need(aligned_alloc(64, (size_t)s.stride * sizeof *s.halves));
    memset(s.query, 0, (size_t)s.stride * sizeof *s.query);
    memset(s.halves, 0, (size_t)s.stride * sizeof *s.halves);
    s.files = need(calloc((size_t)o->n_files, sizeof *s.files));
    const int waits = !o->has_min_score || o->index;
    progress_open(&s.progress, o->progress > 0 || (!o->progress && waits && isatty(STDERR_FILENO)),
                  bytes_of(o));
    printer_open(&s.printer, o);
    s.wake_fd = catch_signals();
    embed_query(&s, m[0], whole, query);
    if (!o->index || search_by_index(&s, o, f, m, lines)) {
        read_lines(&s, m, whole, lines);
        print_best(&s);
    }
    output_flush(&s.printer.out);
    const int failed = say_failures(&s) || s.unreadable;
    const uint64_t printed = s.printer.printed;
    output_close(&s.printer.out);
    best_free(&s.best);
    free(s.query), free(s.halves), free(s.files);
    end_by_signal();
    return failed ? GREP_ERROR : printed ? STATUS_GOOD : GREP_NONE;
}
