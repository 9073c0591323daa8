/* shards.c - the shards command: one output in a directory for each input file; see cli.h.
 *
 * Beside an output NAME.npy stands NAME.json with what it was made of. It is written last and
 * removed before the output is replaced, so an output with a JSON that fits is whole and of these
 * inputs and options. Such shards are left as they are.
 */
#include "cli.h"
#include "shard_store.h"

#include "frontends/console.h"
#include "frontends/fingerprint.h"
#include "frontends/json_read.h"
#include "frontends/replicas.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <openssl/evp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* What becomes of a shard. */
typedef enum {
    SHARD_PENDING, /* another process makes it */
    SHARD_MADE,
    SHARD_THERE,   /* it was there before */
    SHARD_FAILED,  /* after a message */
    SHARD_STOPPED, /* by a signal */
    SHARD_STATES
} shard_state;

typedef struct {
    char *path;       /* of the input */
    const char *name; /* behind the last slash */
    uint64_t bytes;
    shard_state state;
} shard;

typedef struct {
    const options *opt;
    const model_file *model;
    record_tokenizer *tokenizer;
    void (*on_layer_loaded)(int, int);
    shard_store store;
    json_t *recipe; /* what decides on an output, beside its input; as in its JSON */
    shard *shards;  /* (n) */
    size_t n, seen; /* seen: made or not */
    int lock;       /* of the shard in work */
    int waiting;    /* for shards that other processes had */
    int open;       /* the members up to the empty line are */
    qemb_model *replicas[MAX_DEVICES];
    embedder embedder;

    embed_counts made;                      /* of what this process has made */
    uint64_t rows, errors;                  /* of all shards that are there */
    int cannot_read, cannot_write, stopped; /* some shard failed by that */
} sharding;

/* ---- the list of inputs ---------------------------------------------------------------------- */

static void add_input(sharding *w, const char *path) {
    struct stat st;
    const char *slash = strrchr(path, '/');
    if (!(w->n & (w->n - 1))) /* doubled whenever n is a power of two */
        w->shards = need(realloc(w->shards, (w->n ? 2 * w->n : 1) * sizeof *w->shards));
    shard *s = &w->shards[w->n++];
    *s = (shard){.path = need(strdup(path))};
    s->name = s->path + (slash ? slash + 1 - path : 0);
    if (!stat(path, &st) && S_ISREG(st.st_mode)) s->bytes = (uint64_t)st.st_size;
}

/* Standard input has a path a line. */
static void add_listed(sharding *w) {
    char *line = NULL;
    size_t cap = 0;
    ssize_t n;
    while ((n = getline(&line, &cap, stdin)) > 0) {
        if (line[n - 1] == '\n') line[--n] = 0;
        if (strlen(line) != (size_t)n) DIE(STATUS_USAGE, "standard input: NUL in a file's name");
        if (n) add_input(w, line);
    }
    if (ferror(stdin)) DIE(STATUS_USAGE, "standard input: cannot read (%s)", strerror(errno));
    free(line);
}

static int by_name(const void *a, const void *b) {
    return strcmp((*(const shard *const *)a)->name, (*(const shard *const *)b)->name);
}

/* Two inputs of one name would have one output. */
static void refuse_equal_names(const sharding *w) {
    const shard **sorted = need(malloc((w->n + 1) * sizeof *sorted));
    for (size_t i = 0; i < w->n; i++) sorted[i] = &w->shards[i];
    qsort(sorted, w->n, sizeof *sorted, by_name);
    for (size_t i = 1; i < w->n; i++)
        if (!strcmp(sorted[i - 1]->name, sorted[i]->name))
            usage("%.200s, %.200s: two inputs of one name, and so of one output",
                  sorted[i - 1]->path, sorted[i]->path);
    free(sorted);
}

/* An input in the directory of the outputs could be replaced by one. */
static void refuse_inputs_in_directory(const sharding *w) {
    struct stat out, in;
    if (fstat(w->store.fd, &out)) return;
    for (size_t i = 0; i < w->n; i++) {
        char *folder = need(strdup(w->shards[i].path));
        folder[w->shards[i].name - w->shards[i].path] = 0;
        if (!stat(*folder ? folder : ".", &in) && in.st_ino == out.st_ino &&
            in.st_dev == out.st_dev)
            usage("%.200s: an input in the directory of --out (want another directory)",
                  w->shards[i].path);
        free(folder);
    }
}

/* ---- the JSON beside an output --------------------------------------------------------------- */

static const char *extension(format_kind kind) {
    return kind == FORMAT_JSON ? "jsonl" : format_names[kind];
}

static void file_name(char out[PATH_MAX], const shard *s, const char *ending) {
    snprintf(out, PATH_MAX, "%s.%s", s->name, ending);
}

/* The options that change an output's bytes, and the fingerprint of model, table and prompt. */
static json_t *recipe_of(const options *o, const qemb_file *f, const record_tokenizer *t) {
    uint8_t model[FINGERPRINT_BYTES];
    char fingerprint[RECIPE_ROOM];
    const char *const on_error[] = {"record", "zero", "skip", "stop"};
    if (model_fingerprint(model, f, o->model.ops) ||
        recipe_fingerprint(fingerprint, model, t->prompt, t->prompt_len))
        DIE(STATUS_MODEL, "libcrypto: no SHA-256");
    return need(json_pack("{s:s, s:s, s:s, s:i, s:{s:s, s:b, s:b, s:s, s:i, s:b, s:b, s:b}}",
                          "qemb", QEMB_VERSION, "output", format_names[o->output], "fingerprint",
                          fingerprint, "dim", t->dim, "options", "input",
                          o->jsonl ? "jsonl" : "text", "keep", o->keep, "null", o->null_separated,
                          "on-error", on_error[o->on_error], "max-tokens", t->text.max_tokens,
                          "truncate", t->truncate, "deterministic", o->model.engine.deterministic,
                          "hopper", o->model.engine.hopper));
}

/* The whole number at key, or -1. */
static json_int_t number(const json_t *of, const char *key) {
    const json_t *v = json_object_get(of, key);
    return json_is_integer(v) ? json_integer_value(v) : -1;
}

/* More than the JSON of any shard, in bytes: the longest string in it is a file's name. */
#define JSON_MOST ((size_t)64 << 10)

static json_t *read_json(const sharding *w, const shard *s) {
    char name[PATH_MAX];
    file_name(name, s, "json");
    const int fd = openat(w->store.fd, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return NULL;
    char *text = need(malloc(JSON_MOST));
    size_t len = 0;
    ssize_t n;
    while ((n = read(fd, text + len, JSON_MOST - len)) > 0) len += (size_t)n;
    json_read_error unused;
    json_t *json = json_read(text, len, NULL, NULL, &unused);
    free(text);
    close(fd);
    return json;
}

/* Whether an output is there that is of this input, which is open. -1: the input cannot be read;
 * errno says why. */
static int is_there(sharding *w, const shard *s, int in, const json_t *json) {
    const char *key;
    json_t *v;
    struct stat st;
    char name[PATH_MAX], digest[SHA256_ROOM];
    uint64_t bytes;
    const json_t *input = json_object_get(json, "input");
    json_object_foreach(w->recipe, key, v) if (!json_equal(v, json_object_get(json, key))) return 0;
    if (number(json, "rows") < 0 || number(json, "errors") < 0) return 0;
    file_name(name, s, extension(w->opt->output));
    if (fstatat(w->store.fd, name, &st, 0) || st.st_size != number(json, "bytes")) return 0;
    if (fstat(in, &st) || st.st_size != number(input, "bytes")) return 0;
    if (sha256_of(in, digest, &bytes)) return -1;
    const char *was = json_string_value(json_object_get(input, "sha256"));
    return was && !strcmp(was, digest);
}

/* ---- making one ------------------------------------------------------------------------------ */

static shard_state cannot_read(sharding *w, const shard *s, const char *why) {
    w->cannot_read = 1;
    say("%.200s: cannot read (%s)", s->path, why);
    return SHARD_FAILED;
}

static shard_state cannot_write(sharding *w, const shard *s, int error) {
    w->cannot_write = 1;
    say("%.200s: cannot write the output of %.200s (%s)", w->store.path, s->path, strerror(error));
    return SHARD_FAILED;
}

/* Of an input, as it is read. */
typedef struct {
    EVP_MD_CTX *sha256;
    uint64_t bytes;
} input_digest;

static void update_digest(void *self, const void *bytes, size_t n) {
    input_digest *d = self;
    EVP_DigestUpdate(d->sha256, bytes, n);
    d->bytes += n;
}

/* Opens model and pipeline when the first shard has to be made. */
static void open_embedder(sharding *w) {
    const options *o = w->opt;
    if (w->open) return;
    replicas_open(w->replicas, w->model->file, &o->model, w->on_layer_loaded);
    w->embedder.opt = o;
    w->embedder.dim = w->tokenizer->dim;
    w->embedder.p = pipeline_new(o, w->replicas, qemb_dim(&w->model->file->config), w->tokenizer);
    w->open = 1;
}

/* Writes the JSON of a shard whose output is in its place. r is what made it; the digests and sizes
 * are those of the input and the output. Returns an errno or 0. */
static int write_json(sharding *w, const shard *s, const embed_run *r, const char *const sha256[2],
                      const uint64_t bytes[2]) {
    const embed_counts *c = &r->counts;
    char name[PATH_MAX], output_name[PATH_MAX];
    file_name(name, s, "json");
    file_name(output_name, s, extension(w->opt->output));
    const char *const end = put_printable(output_name, output_name, strlen(output_name));
    json_t *json = need(json_pack("{s:s%, s:I, s:I, s:I, s:I, s:s, s:I, s:{s:I, s:s}}", "file",
                                  output_name, (size_t)(end - output_name), "rows",
                                  (json_int_t)c->rows, "errors", (json_int_t)c->errors, "tokens",
                                  (json_int_t)c->tokens, "bytes", (json_int_t)bytes[1], "sha256",
                                  sha256[1], "records", (json_int_t)(c->texts + c->errors), "input",
                                  "bytes", (json_int_t)bytes[0], "sha256", sha256[0]));
    json_object_update(json, w->recipe);
    char *text = need(json_dumps(json, JSON_INDENT(1)));
    json_decref(json);
    int error = 0;
    const int fd = shard_part_open(&w->store, s->name);
    if (fd < 0) error = errno;
    FILE *f = fd < 0 ? NULL : need(fdopen(fd, "w"));
    if (f && (fprintf(f, "%s\n", text) < 0 || fflush(f) || fsync(fd))) error = errno;
    if (f && fclose(f) && !error) error = errno;
    free(text);
    if (!error && shard_part_publish(&w->store, s->name, name)) error = errno;
    return error;
}

/* Puts the finished output and its JSON in their places. Returns an errno or 0. */
static int publish(sharding *w, const shard *s, const embed_run *r, const input_digest *d) {
    char name[PATH_MAX], json[PATH_MAX], in[SHA256_ROOM], out[SHA256_ROOM];
    uint8_t sum[EVP_MAX_MD_SIZE];
    uint64_t bytes[2] = {d->bytes, 0};
    EVP_DigestFinal_ex(d->sha256, sum, NULL);
    sha256_hex(in, sum);
    const int fd = shard_part_read(&w->store, s->name);
    if (fd < 0) return errno;
    int error = sha256_of(fd, out, &bytes[1]) ? errno : 0;
    close(fd);
    if (error) return error;
    file_name(name, s, extension(w->opt->output));
    file_name(json, s, "json");
    shard_remove(&w->store, json); /* it is of the output that goes now */
    if (shard_part_publish(&w->store, s->name, name)) return errno;
    error = write_json(w, s, r, (const char *const[]){in, out}, bytes);
    if (error) shard_remove(&w->store, name);
    return error;
}

/* Whether an input is another one than it was, or than the bytes that were read. */
static int has_changed(int in, const struct stat *was, uint64_t bytes) {
    struct stat now;
    return fstat(in, &now) || (uint64_t)now.st_size != bytes ||
           now.st_mtim.tv_sec != was->st_mtim.tv_sec || now.st_mtim.tv_nsec != was->st_mtim.tv_nsec;
}

/* Makes the shard of an input that is open; it is locked. */
static shard_state make(sharding *w, const shard *s, int in) {
    shard_state state = SHARD_MADE;
    struct stat was;
    open_embedder(w);
    snprintf(w->embedder.progress.label, sizeof w->embedder.progress.label,
             "shard %zu of %zu: ", w->seen, w->n);
    if (fstat(in, &was)) return cannot_read(w, s, strerror(errno));
    const int out = shard_part_open(&w->store, s->name);
    if (out < 0) return cannot_write(w, s, errno);
    input_digest digest = {.sha256 = need(EVP_MD_CTX_new())};
    embed_run r = {.in = in, .out = out, .name = s->path, .watch = update_digest, .self = &digest};
    EVP_DigestInit_ex(digest.sha256, EVP_sha256(), NULL);
    if (embed_records(&w->embedder, &r)) {
        shard_part_remove(&w->store, s->name);
        shard_unlock(&w->store, s->name, w->lock);
        pipeline_die(w->embedder.p);
    }
    say_progress("");
    if (signal_caught())
        state = SHARD_STOPPED;
    else if (*r.read_error)
        state = cannot_read(w, s, r.read_error);
    else if (r.write_error)
        state = cannot_write(w, s, r.write_error);
    else if (r.stopped)
        state = SHARD_FAILED, w->stopped = 1;
    else if (has_changed(in, &was, digest.bytes))
        state = cannot_read(w, s, "it was changed meanwhile");
    if (state == SHARD_MADE) {
        const int error = publish(w, s, &r, &digest);
        if (error) state = signal_caught() ? SHARD_STOPPED : cannot_write(w, s, error);
    }
    EVP_MD_CTX_free(digest.sha256);
    if (state != SHARD_MADE) {
        shard_part_remove(&w->store, s->name);
        return state;
    }
    embed_counts_add(&w->made, &r.counts);
    w->rows += r.counts.rows, w->errors += r.counts.errors;
    return state;
}

/* SHARD_THERE if it is; SHARD_MADE if it has to be made; or a failure. */
static shard_state look(sharding *w, const shard *s, int in) {
    json_t *json = read_json(w, s);
    const int there = is_there(w, s, in, json), error = errno;
    if (there > 0) {
        w->rows += (uint64_t)number(json, "rows");
        w->errors += (uint64_t)number(json, "errors");
        w->embedder.progress.bytes -= s->bytes;
    }
    json_decref(json);
    if (there < 0) return signal_caught() ? SHARD_STOPPED : cannot_read(w, s, strerror(error));
    return there ? SHARD_THERE : SHARD_MADE;
}

/* Looks for the output before the lock, since most shards of a second run are there, and under it,
 * since the process that had it may have made the output. */
static shard_state make_if_needed(sharding *w, const shard *s, int in) {
    shard_state state = w->waiting ? SHARD_MADE : look(w, s, in);
    if (state == SHARD_THERE) shard_tidy(&w->store, s->name);
    if (state != SHARD_MADE) return state;
    switch (shard_lock(&w->store, s->name, &w->lock)) {
    case SHARD_BUSY:
        return SHARD_PENDING;
    case SHARD_LOCK_FAILED:
        return cannot_write(w, s, errno);
    case SHARD_LOCKED:
        break;
    }
    state = look(w, s, in);
    if (state == SHARD_MADE) state = make(w, s, in);
    shard_unlock(&w->store, s->name, w->lock);
    return state;
}

static shard_state do_shard(sharding *w, const shard *s) {
    struct stat st;
    const int in = open(s->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (in < 0 || fstat(in, &st)) {
        const int error = errno;
        if (in >= 0) close(in);
        return cannot_read(w, s, strerror(error));
    }
    const shard_state state = S_ISREG(st.st_mode) ? make_if_needed(w, s, in)
                              : S_ISDIR(st.st_mode)
                                  ? cannot_read(w, s, "a directory; want the files in it")
                                  : cannot_read(w, s, "not a regular file");
    close(in);
    return state;
}

/* ---- the command ----------------------------------------------------------------------------- */

/* Does all shards, first those that no other process has. Returns early after a signal. */
static void do_shards(sharding *w) {
    size_t pending = w->n;
    for (; pending && !signal_caught(); w->waiting = 1) {
        const size_t before = pending;
        for (size_t i = 0; i < w->n && !signal_caught(); i++) {
            shard *s = &w->shards[i];
            if (s->state != SHARD_PENDING) continue;
            w->seen = w->n - pending + 1;
            s->state = do_shard(w, s);
            pending -= s->state != SHARD_PENDING;
        }
        if (pending == before &&
            w->waiting) { /* looks again in a moment, or ends with the signal */
            struct pollfd signal = {.fd = w->embedder.wake_fd, .events = POLLIN};
            poll(&signal, 1, 200);
        }
    }
}

static void print_summary(const sharding *w) {
    size_t n[SHARD_STATES] = {0};
    for (size_t i = 0; i < w->n; i++) n[w->shards[i].state]++;
    say("%zu shards: %zu made, %zu were there, %zu failed%s; %" PRIu64 " rows, %" PRIu64 " errors",
        w->n, n[SHARD_MADE], n[SHARD_THERE], n[SHARD_FAILED],
        signal_caught() ? ", stopped by a signal" : "", w->rows, w->errors);
    if (w->opt->stats && w->open) embed_say_stats(&w->embedder, &w->made);
}

int make_shards(const options *o, const model_file *f, record_tokenizer *t,
                void (*on_layer_loaded)(int, int)) {
    sharding w = {.opt = o, .model = f, .tokenizer = t, .on_layer_loaded = on_layer_loaded};
    uint64_t bytes = 0;
    for (int i = 0; i < o->n_files; i++) {
        if (is_stdin(o->files[i]))
            add_listed(&w);
        else
            add_input(&w, o->files[i]);
    }
    refuse_equal_names(&w);
    shard_store_open(&w.store, o->out);
    refuse_inputs_in_directory(&w);
    w.recipe = recipe_of(o, f->file, t);
    for (size_t i = 0; i < w.n; i++) bytes += w.shards[i].bytes;
    progress_open(&w.embedder.progress, o->progress > 0 || (!o->progress && isatty(STDERR_FILENO)),
                  bytes);
    w.embedder.wake_fd = catch_signals();
    do_shards(&w);
    print_summary(&w);
    if (w.open) {
        pipeline_free(w.embedder.p);
        for (int i = 0; i < o->model.n_devices; i++) qemb_close(w.replicas[i]);
    }
    for (size_t i = 0; i < w.n; i++) free(w.shards[i].path);
    free(w.shards);
    json_decref(w.recipe);
    close(w.store.fd);
    end_by_signal(); /* so that the parent sees the signal as the cause */
    if (w.cannot_write) return STATUS_OUTPUT;
    if (w.cannot_read) return STATUS_USAGE;
    return w.stopped || (w.errors && !o->errors_ok) ? STATUS_RECORDS : STATUS_GOOD;
}
