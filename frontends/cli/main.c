/* main.c - the command line program qemb: options and commands. */
#include "cli.h"

#include "frontends/console.h"
#include "frontends/options.h"
#include "frontends/parameters.h"
#include "frontends/replicas.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <openssl/evp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- options --------------------------------------------------------------------------------- */

static int embed(const options *), info(const options *), tokenize(const options *),
    plan(const options *), check(const options *), grep(const options *), rerank(const options *),
    shards(const options *);

static const struct {
    const char *name;
    unsigned bit; /* as option_row.commands has it */
    int reads_input;
    int (*run)(const options *o);
} commands[] = {
    {"embed", FOR_EMBED, 1, embed}, /* also without its name */
    {"info", FOR_INFO, 0, info},       {"tokenize", FOR_TOKENIZE, 1, tokenize},
    {"plan", FOR_PLAN, 0, plan},       {"check", FOR_CHECK, 0, check},
    {"grep", FOR_GREP, 0, grep}, /* reads it only as one of its files */
    {"rerank", FOR_RERANK, 1, rerank}, {"shards", FOR_SHARDS, 0, shards},
};

static const char *const input_kinds[] = {"text", "jsonl", NULL};
static const char *const color_choices[] = {"auto", "always", "never", NULL};
static const char *const on_error_kinds[] = {"record", "zero", "skip", "stop", NULL};

#define VECTORS (FOR_EMBED | FOR_SHARDS)
#define TEXTS   (VECTORS | FOR_TOKENIZE)
#define RUNS    (VECTORS | FOR_GREP | FOR_RERANK)
#define AT(m)   .at = offsetof(options, m)

static void take_min_score(void *to, const char *name, const char *value) {
    options *o = to;
    char *end;
    o->min_score = strtof(value, &end); /* what --json prints reads back to the same bits */
    const int number = *value && strspn(value, "+-.0123456789eE") == strlen(value) && !*end;
    if (!number || !(o->min_score >= -1 && o->min_score <= 1))
        usage("--%s: not a score (got %.40s, want -1..1)", name, value);
    o->has_min_score = 1;
}

/* clang-format off */
static const option_row rows[] = {
    {"input", "KIND", "text or jsonl: a text or {\"text\":...} per line", "text",
     OPTION_CHOICE, AT(jsonl), .choices = input_kinds, .commands = TEXTS},
    {"keep", NULL, "jsonl to jsonl: other keys of a record come back", NULL,
     OPTION_FLAG, AT(keep), .value = 1, .commands = VECTORS},
    {"null", NULL, "records end with NUL instead of a newline", NULL,
     OPTION_FLAG, AT(null_separated), .value = 1, .letter = '0', .commands = TEXTS | FOR_RERANK},
    {"output", "KIND", "jsonl tsv base64 f32 f16 npy int8 or binary", "json",
     OPTION_CHOICE, AT(output), .choices = format_names, .commands = VECTORS},
    {"out", "DIR", "shards: the directory of the outputs", NULL,
     OPTION_STRING, AT(out), .commands = FOR_SHARDS},
    {"dim", "N", "numbers in a vector, at most the model's", NULL,
     OPTION_INT, AT(dim), .unset = "all", .min = 1, .max = INT_MAX,
     .commands = VECTORS | FOR_GREP},
    {"on-error", "WHAT", "record, zero, skip or stop", NULL,
     OPTION_CHOICE, AT(on_error), .unset = "record; not text: stop", .choices = on_error_kinds,
     .commands = VECTORS},
    {"errors-ok", NULL, "records that fail do not change the exit status", NULL,
     OPTION_FLAG, AT(errors_ok), .value = 1, .commands = VECTORS | FOR_RERANK},
    {"stats", NULL, "a summary on standard error at the end", NULL,
     OPTION_FLAG, AT(stats), .value = 1, .commands = VECTORS | FOR_RERANK},
    {"progress", NULL, "a progress line on standard error: always", NULL,
     OPTION_FLAG, AT(progress), .value = 1, .commands = RUNS},
    {"quiet", NULL, "a progress line: never", NULL,
     OPTION_FLAG, AT(progress), .value = -1, .commands = RUNS},
    {"cache", "DIR", "GPU: time cuBLASLt's algorithms, keep the best here", NULL,
     OPTION_STRING, AT(model.engine.cache_dir), .gpu = 1,
     .commands = RUNS | FOR_PLAN | FOR_CHECK},
    {"query", "TEXT", "rerank: lines are documents for TEXT", NULL,
     OPTION_STRING, AT(query), .unset = "JSON records", .commands = FOR_RERANK},
    {"raw-scores", NULL, "rerank: logits instead of probabilities", NULL,
     OPTION_FLAG, AT(raw_scores), .value = 1, .commands = FOR_RERANK},
    {"best", "N", "grep, rerank: so many, best first", NULL,
     OPTION_INT, AT(best), .unset = "10; rerank: all", .min = 1, .max = INT_MAX, .letter = 'k',
     .commands = FOR_GREP | FOR_RERANK},
    {"min-score", "S", "grep: print all lines from this score on", NULL,
     OPTION_CALL, .call = take_min_score, .commands = FOR_GREP},
    {"line-number", NULL, "grep: with line numbers", NULL,
     OPTION_FLAG, AT(with_line), .value = 1, .letter = 'n', .commands = FOR_GREP},
    {"with-filename", NULL, "grep: with file names", NULL,
     OPTION_FLAG, AT(with_file), .unset = "of several", .value = 1, .letter = 'H',
     .commands = FOR_GREP},
    {"no-filename", NULL, "grep: without file names", NULL,
     OPTION_FLAG, AT(with_file), .value = -1, .letter = 'h', .commands = FOR_GREP},
    {"json", NULL, "grep: an object per line", NULL,
     OPTION_FLAG, AT(json), .value = 1, .commands = FOR_GREP},
    {"color", "WHEN", "grep: auto, always or never", "auto",
     OPTION_CHOICE, AT(color), .choices = color_choices, .commands = FOR_GREP},
    {"index", "FILE", "grep: keep the lines' vectors here", NULL,
     OPTION_STRING, AT(index), .commands = FOR_GREP},
};
/* clang-format on */

static const char synopsis[] =
    "qemb " QEMB_VERSION ": lines of text in, vectors out\n"
    "  qemb -m MODEL.qemb [OPTION]... < TEXTS > VECTORS\n"
    "  qemb info|tokenize|plan|check -m MODEL.qemb [OPTION]...\n"
    "  qemb shards -m MODEL.qemb --out DIR [OPTION]... FILE...\n"
    "  qemb grep [-m MODEL.qemb] [OPTION]... QUERY [FILE]...\n"
    "  qemb rerank -m RERANKER.qemb [OPTION]... < RECORDS > RANKINGS\n"
    "  qemb rerank -m RERANKER.qemb --query TEXT [OPTION]... < LINES > RANKING\n";
static const char ending[] =
    "Status: 0 good, 1 usage or input, 2 model, 3 some records failed, 4 output.\n"
    "Of grep: 0 some lines printed, 1 none, 2 an error.\n"
    "Records, errors and commands in full: man qemb\n";

/* A command, as the first operand, or info's file. */
static void take_operand(void *to, const char *value, int n) {
    options *o = to;
    for (int c = 1; c < LENGTH(commands) && !n; c++)
        if (!strcmp(value, commands[c].name)) {
            o->command = c;
            o->bit = commands[c].bit;
            return;
        }
    if (o->bit == FOR_GREP) {
        if (o->query)
            o->files[o->n_files++] = value;
        else
            o->query = value;
        return;
    }
    if (o->bit == FOR_SHARDS) {
        o->files[o->n_files++] = value;
        return;
    }
    if (o->bit != FOR_INFO || o->model.model)
        usage(
            "%.80s: an operand that means nothing (texts come from standard input, a model by -m)",
            value);
    o->model.model = value;
}

/* The demo model that belongs to the program: where `make install` puts it, or in the source. */
static const char *demo_model(void) {
    static const char *const places[] = {"../share/qemb/demo.qemb", "examples/demo.qemb"};
    static char path[PATH_MAX + 32];
    const ssize_t n = readlink("/proc/self/exe", path, PATH_MAX);
    char *slash = n > 0 ? memrchr(path, '/', (size_t)n) : NULL;
    for (int i = 0; slash && i < LENGTH(places); i++) {
        strcpy(slash + 1, places[i]);
        if (!access(path, F_OK)) return path;
    }
    usage("no model, and no demo model beside the program (want -m MODEL.qemb)");
}

static void check_grep(options *o) {
    if (!o->query) usage("grep: no query");
    if (!*o->query) usage("grep: an empty query");
    if (o->best && o->has_min_score) usage("-k and --min-score: only one of them");
    if (o->index && !*o->index) usage("--index: an empty name");
    if (!o->n_files) o->files[o->n_files++] = "-";
    for (int i = 0; i < o->n_files && o->index; i++)
        if (is_stdin(o->files[i])) usage("--index: not for standard input (want FILEs)");
    if (!o->model.model) o->model.model = demo_model();
}

static void check_shards(const options *o) {
    int listed = 0;
    if (!o->out || !*o->out) usage("shards: no directory (want --out DIR)");
    if (!o->n_files) usage("shards: no input (want FILEs, or - for a list of them)");
    for (int i = 0; i < o->n_files; i++) listed += is_stdin(o->files[i]);
    if (listed > 1) usage("-: given twice (standard input has one list)");
}

static const char *command_name(int i, unsigned *bit) {
    if (i >= LENGTH(commands)) return NULL;
    *bit = commands[i].bit;
    return commands[i].name;
}

static option_table table_for(options *o) {
    return (option_table){
        .synopsis = synopsis,
        .ending = ending,
        .sections = {{model_option_rows, n_model_option_rows, &o->model}, {rows, LENGTH(rows), o}},
        .operand = take_operand,
        .operand_options = o,
        .command = &o->bit,
        .command_name = command_name};
}

/* bit: of the command, if an option's form depends on it; else FOR_EMBED until its word is met. */
static void parse_options(options *o, option_table *t, unsigned bit, int argc, char **argv) {
    *o = (options){.bit = bit, .on_error = ON_ERROR_DEFAULT};
    o->files = need(calloc((size_t)argc + 1, sizeof *o->files)); /* main frees it */
    options_parse(t, argc, argv);
    if (o->bit != commands[o->command].bit)
        usage("--query: its value is the word rerank (want qemb rerank --query TEXT)");
    if (o->bit == FOR_GREP) check_grep(o);
    if (o->bit == FOR_SHARDS) check_shards(o);
    model_options_check(&o->model);
    options_check(t, o->bit, commands[o->command].name, !!o->model.ops->plan);
    const int text = format_is_text(o->output);
    if (o->on_error == ON_ERROR_RECORD && !text)
        usage("--on-error record: no place for error records in %s (want zero, skip, stop)",
              format_names[o->output]);
    if (o->on_error == ON_ERROR_DEFAULT) o->on_error = text ? ON_ERROR_RECORD : ON_ERROR_STOP;
    if (o->keep && (!o->jsonl || o->output != FORMAT_JSONL))
        usage("--keep: other keys come from JSON and go to JSON (want --input jsonl --output "
              "jsonl)");
    if (o->errors_ok && o->on_error == ON_ERROR_STOP)
        usage("--errors-ok: the first error stops this run (want --on-error %szero or skip)",
              text ? "record, " : "");
}

/* ---- embed ----------------------------------------------------------------------------------- */

static void show_loaded(int layers, int of) {
    char line[64] = "";
    if (layers < of) snprintf(line, sizeof line, "weights: layer %d of %d", layers + 1, of);
    say_progress(line);
}

/* What is told about a model that is being opened, or NULL. */
static layer_loaded *loading(const options *o) {
    return o->progress > 0 || (!o->progress && isatty(STDERR_FILENO)) ? show_loaded : NULL;
}

static void open_record_tokenizer(record_tokenizer *t, const model_file *f, const options *o) {
    const record_options records = {o->jsonl, o->dim, !format_is_text(o->output), o->keep};
    qemb_err err;
    if (!record_tokenizer_open(t, f, &o->model, &records, &err)) return;
    if (strcmp(err.code, "usage")) DIE(STATUS_MODEL, "%s", err.msg);
    usage("%s", err.msg);
}

/* Opens the model file for a command that needs a model of this kind. */
static void open_kind(model_file *f, const options *o, qemb_kind kind) {
    open_model_file(f, &o->model);
    if (f->file->config.kind == kind) return;
    DIE(STATUS_MODEL, "%.128s: %s", o->model.model,
        kind == QEMB_RERANKER ? "an embedding model, which has no scores (want a reranker)"
                              : "a reranker: its texts are pairs (want qemb rerank)");
}

static int embed(const options *o) {
    model_file f;
    record_tokenizer t;
    qemb_model *m[MAX_DEVICES];
    open_kind(&f, o, QEMB_EMBEDDING);
    open_record_tokenizer(&t, &f, o);
    replicas_open(m, f.file, &o->model, loading(o));
    const int status = embed_stream(o, m, qemb_dim(&f.file->config), &t);
    for (int i = 0; i < o->model.n_devices; i++) qemb_close(m[i]);
    record_tokenizer_close(&t);
    close_model_file(&f);
    return status;
}

/* ---- shards ---------------------------------------------------------------------------------- */

static int shards(const options *o) {
    model_file f;
    record_tokenizer t;
    open_kind(&f, o, QEMB_EMBEDDING);
    open_record_tokenizer(&t, &f, o);
    const int status = make_shards(o, &f, &t, loading(o));
    record_tokenizer_close(&t);
    close_model_file(&f);
    return status;
}

/* ---- grep ------------------------------------------------------------------------------------ */

static int grep(const options *o) {
    model_file f;
    record_tokenizer query, lines;
    qemb_model *m[MAX_DEVICES];
    options of_query = *o, of_lines = *o;
    of_query.model.query = !o->model.instruct && !o->model.prompt;
    of_lines.model.instruct = of_lines.model.prompt = NULL;
    of_lines.model.document = 1;
    open_kind(&f, o, QEMB_EMBEDDING);
    open_record_tokenizer(&query, &f, &of_query);
    open_record_tokenizer(&lines, &f, &of_lines);
    replicas_open(m, f.file, &o->model, loading(o));
    const int status = grep_files(&of_lines, f.file, m, &query, &lines);
    for (int i = 0; i < o->model.n_devices; i++) qemb_close(m[i]);
    record_tokenizer_close(&query);
    record_tokenizer_close(&lines);
    close_model_file(&f);
    return status;
}

/* ---- rerank ---------------------------------------------------------------------------------- */

/* Refuses a query that would make every line an error. */
static void check_query(record_tokenizer *t, const char *query) {
    const text_pair pair = {.query = query, .query_len = strlen(query), .document = ""};
    record_ids ids = {0};
    qemb_tokenizer_result r;
    qemb_err err;
    const int truncate = t->truncate;
    t->truncate = 0;
    const int bad =
        qemb_tokenizer_encode(t->text.state, query, pair.query_len, SIZE_MAX, &r, &err) ||
        tokenize_pair(t, &pair, 0, &ids, &err);
    t->truncate = truncate;
    if (bad && truncate && !strcmp(err.code, "query_too_long"))
        say("--query: %s: it is cut, and no document is read", err.msg);
    else if (bad && !strcmp(err.code, "out_of_memory"))
        DIE(STATUS_MODEL, "--query: %s", err.msg);
    else if (bad)
        usage("--query: %s", err.msg);
}

static int rerank(const options *o) {
    model_file f;
    record_tokenizer t;
    qemb_model *m[MAX_DEVICES];
    open_kind(&f, o, QEMB_RERANKER);
    open_record_tokenizer(&t, &f, o);
    if (o->query) check_query(&t, o->query);
    replicas_open(m, f.file, &o->model, loading(o));
    const int status = rerank_stream(o, m, &t);
    for (int i = 0; i < o->model.n_devices; i++) qemb_close(m[i]);
    record_tokenizer_close(&t);
    close_model_file(&f);
    return status;
}

/* ---- tokenize -------------------------------------------------------------------------------- */

static void write_ids(output *out, const record_ids *ids) {
    char *p = output_room(out, (size_t)ids->n * 11 + 2 + FORMAT_UINT_ROOM);
    for (int i = 0; i < ids->n; i++) {
        *p++ = i ? ',' : '[';
        p = format_uint(p, (uint64_t)ids->ids[i]);
    }
    *p++ = ']';
    *p++ = '\n';
    output_wrote(out, p);
}

static int tokenize(const options *o) {
    model_file f;
    record_tokenizer t;
    output out;
    int status = STATUS_GOOD;
    open_kind(&f, o, QEMB_EMBEDDING);
    open_record_tokenizer(&t, &f, o);
    output_open(&out, STDOUT_FILENO, FORMAT_JSON, 1);
    input *in = need(input_new(STDIN_FILENO, catch_signals(), o->null_separated ? '\0' : '\n'));
    for (;;) {
        input_record r;
        record_ids ids;
        qemb_err err;
        input_status got = input_next(in, 0, &r);
        if (got == INPUT_WAIT) {
            output_flush(&out);
            got = input_next(in, 1, &r);
        }
        if (got == INPUT_FAILED) {
            output_flush(&out);
            DIE(STATUS_USAGE, "standard input: cannot read (%s)", input_error(in));
        }
        if (got != INPUT_RECORD) break;
        if (tokenize_record(&t, &r, &ids, &err)) {
            const output_head head = {.id = ids.id, .id_len = ids.id_len, .line = r.line};
            output_error(&out, &head, err.code, err.msg, strlen(err.msg));
            status = STATUS_RECORDS;
        } else {
            write_ids(&out, &ids);
        }
    }
    output_flush(&out);
    output_close(&out);
    input_free(in);
    record_tokenizer_close(&t);
    close_model_file(&f);
    end_by_signal(); /* so that the parent sees the signal as the cause */
    return status;
}

/* ---- info, plan ------------------------------------------------------------------------------ */

static const char *dtype_name(qemb_dtype d) {
    static const char *const names[] = {"u8", "u32", "f32", "f16", "int8, a scale per 64 weights"};
    return names[d];
}

static double mib(size_t bytes) { return (double)bytes / (1 << 20); }

static void print_quoted(const char *s) {
    const size_t n = strlen(s);
    char *quoted = need(malloc(6 * n + 2));
    fwrite(quoted, 1, (size_t)(format_json_string(quoted, s, n) - quoted), stdout);
    free(quoted);
}

static void print_sha256(const uint8_t digest[SHA256_BYTES]) {
    char hex[2 * SHA256_BYTES];
    printf("%.*s\n", (int)(format_hex(hex, digest, SHA256_BYTES) - hex), hex);
}

/* Prints s (n) as put_printable makes it. */
static void print_printable(const char *s, size_t n) {
    char *line = need(malloc(n + 1));
    fwrite(line, 1, (size_t)(put_printable(line, s, n) - line), stdout);
    free(line);
}

/* Prints the provenance lines, indented. */
static void print_provenance(const qemb_file *f) {
    const char *s = f->provenance, *end = s + f->provenance_bytes;
    for (const char *stop; s < end; s = stop + 1) {
        stop = memchr(s, '\n', (size_t)(end - s));
        if (!stop) stop = end;
        fputs("  ", stdout);
        print_printable(s, (size_t)(stop - s));
        putchar('\n');
    }
}

/* How many of the layers' matrices of halves are also matrices of bfloat16 numbers. */
static void print_exact_in_bfloat16(const qemb_file *f) {
    int exact = 0, known = 0, n = 0;
    for (int l = 0; l < f->config.n_layers; l++) {
        qemb_mat *m[QEMB_LAYER_MATRICES];
        qemb_layer_matrices(&f->weights.layers[l], m);
        for (int i = 0; i < QEMB_LAYER_MATRICES; i++, n++) {
            if (m[i]->dtype != QEMB_F16) return;
            exact += m[i]->bits == QEMB_BITS_8;
            known += m[i]->bits != QEMB_BITS_UNKNOWN;
        }
    }
    if (known < n)
        printf("exact in bf16    not recorded (an older file)\n");
    else if (exact < n)
        printf("exact in bf16    %d of %d matrices of the layers\n", exact, n);
    else
        printf("exact in bf16    all %d matrices of the layers\n", n);
}

/* The vocabulary, and the tokens that every text gets. */
static void print_vocabulary(const qemb_file *f) {
    const qemb_config *c = &f->config;
    uint32_t pieces = 0; /* the first number of the section; the tokenizer proves it */
    if (f->unigram_bytes >= sizeof pieces) memcpy(&pieces, f->unigram, sizeof pieces);
    printf("vocabulary       %d rows, %" PRIu32 " %s, ", c->vocab,
           f->unigram ? pieces : f->n_merges, f->unigram ? "pieces" : "merges");
    if (c->bos_id != QEMB_NO_TOKEN) printf("start-of-text %d, ", c->bos_id);
    if (c->eos_id == QEMB_NO_TOKEN)
        printf("no end-of-text\n");
    else
        printf("end-of-text %d\n", c->eos_id);
}

static void print_config(const qemb_file *f) {
    static const char *const poolings[] = {"last token", "mean", "first token"};
    const qemb_config *c = &f->config;
    const model_parameters n = count_parameters(c);
    const int is_bert = c->architecture == QEMB_BERT;
    printf("kind             %s\n", c->kind == QEMB_RERANKER ? "reranker" : "embedding");
    printf("architecture     %s\n", is_bert ? "bert" : "qwen3");
    printf("attention        %s\n",
           c->attention == QEMB_BIDIRECTIONAL ? "bidirectional" : "causal");
    printf("pooling          %s\n", poolings[c->pooling]);
    if (c->kind == QEMB_EMBEDDING && c->dense_rows)
        printf("dense layer      %d rows%s\n", c->dense_rows,
               c->activation == QEMB_TANH ? ", tanh" : "");
    if (c->kind == QEMB_EMBEDDING)
        printf("vector           %d numbers, fewer by --dim\n", qemb_dim(c));
    printf("dtype            %s\n", dtype_name(f->weights.layers[0].wqkv.dtype));
    print_exact_in_bfloat16(f);
    printf("parameters       %zu in the layers, %zu in the embedding table", n.layers, n.tokens);
    if (n.positions) printf(", %zu in the table of positions", n.positions);
    putchar('\n');
    printf("layers           %d\n", c->n_layers);
    printf("hidden           %d\n", c->hidden);
    printf("heads            %d of queries, %d of keys and values, %d wide\n", c->n_heads,
           c->n_kv_heads, c->head_dim);
    printf("feed-forward     %d\n", c->ffn);
    print_vocabulary(f);
    printf("longest text     %d tokens", qemb_window(c));
    if (qemb_window(c) < c->max_positions) printf(", up to %d by --max-tokens", c->max_positions);
    putchar('\n');
    if (!is_bert) printf("rope theta       %g\n", (double)c->rope_theta);
    printf("norm eps         %g\n", (double)c->norm_eps);
}

/* Prints whether the file is as it was written. */
static int verify(const qemb_file *f, const char *path) {
    uint8_t digest[SHA256_BYTES] = {0};
    qemb_err err;
    if (!verify_weights(digest, f, path, &err)) {
        printf("verified         yes\n");
        return STATUS_GOOD;
    }
    say("%s", err.msg);
    printf("verified         no: it is ");
    print_sha256(digest);
    return STATUS_MODEL;
}

static int info(const options *o) {
    qemb_file *f = open_weights(o->model.model);
    printf("file             ");
    print_printable(o->model.model, strlen(o->model.model));
    printf(" (%.1f MiB)\n", mib(f->map_bytes));
    print_config(f);
    printf("table            %s, on this machine\n", o->model.ops->name);
    for (int i = 0; i < f->n_prompts; i++) {
        printf("prompt           ");
        print_quoted(f->prompts[i].name);
        printf(": ");
        print_quoted(f->prompts[i].text);
        putchar('\n');
    }
    printf("provenance\n");
    print_provenance(f);
    printf("sha256           ");
    print_sha256(f->sha256);
    printf("tables           %s\n",
           f->tables_proved ? "proved by their checksum" : "no checksum (an older file)");
    const int status = o->model.verify ? verify(f, o->model.model) : STATUS_GOOD;
    close_weights(f);
    return status;
}

static int plan(const options *o) {
    static const int usual[] = {512, 1024, 2048, 4096, 8192, 16384, 32768};
    qemb_memory mem;
    qemb_options opt = o->model.engine;
    opt.device = o->model.devices[0];
    qemb_file *f = open_weights(o->model.model);
    if (opt.max_tokens > f->config.max_positions)
        usage("--max-tokens: more than the model can (got %d, want 1..%d)", opt.max_tokens,
              f->config.max_positions);
    if (!opt.max_tokens) opt.max_tokens = qemb_window(&f->config);
    qemb_plan(f, o->model.ops, &opt, &mem);
    const int standard = mem.batch_tokens, on_gpu = mem.n_parts > 0;
    printf("%10.1f MiB  layers, mapped: %s\n", mib(mem.weights),
           on_gpu || mem.repacked_bytes ? "read once, not kept in memory"
                                        : "every batch reads them");
    if (mem.repacked_bytes)
        printf("%10.1f MiB  layers, copied for this CPU and --math: every batch reads them\n",
               mib(mem.repacked_bytes));
    printf("%10.1f MiB  %s, mapped: %s\n", mib(mem.table),
           f->weights.pos_emb ? "tables of tokens and positions" : "embedding table",
           on_gpu ? "read once" : "rows in use are read");
    printf("%10.1f MiB  activations: one text of --max-tokens %d\n", mib(mem.arena_text),
           opt.max_tokens);
    for (int i = 0; i < (o->model.engine.batch_tokens ? 1 : LENGTH(usual)); i++) {
        if (!o->model.engine.batch_tokens) opt.batch_tokens = usual[i];
        qemb_plan(f, o->model.ops, &opt, &mem);
        printf("%10.1f MiB  activations: a batch of --batch-tokens %d%s\n", mib(mem.arena_batch),
               opt.batch_tokens, opt.batch_tokens == standard ? " (default)" : "");
    }
    printf("A run takes the layers that every batch reads, rows of the table%s, and the larger one "
           "of its\n"
           "two activations.\n",
           f->weights.pos_emb ? "s" : "");
    opt.batch_tokens = o->model.engine.batch_tokens;
    qemb_plan(f, o->model.ops, &opt, &mem);
    size_t sum = 0;
    for (int i = 0; i < mem.n_parts; i++) {
        if (!i) printf("On the GPU:\n");
        printf("%10.1f MiB  %s\n", mib(mem.parts[i].bytes), mem.parts[i].what);
        sum += mem.parts[i].bytes;
    }
    if (mem.n_parts) printf("%10.1f MiB  in all, beside what the driver takes\n", mib(sum));
    if (o->model.n_devices > 1)
        printf("That is GPU %d. The others of --devices may choose other batch sizes.\n",
               o->model.devices[0]);
    if (mem.n_parts && opt.vram && sum > opt.vram)
        DIE(STATUS_MODEL, "GPU memory: more than --vram (got %.0f MiB, want at most %.0f MiB)",
            mib(sum), mib(opt.vram));
    close_weights(f);
    return STATUS_GOOD;
}

/* ---- check ----------------------------------------------------------------------------------- */

static int check(const options *o) {
    model_file f;
    record_tokenizer t;
    int within = 1;
    open_model_file(&f, &o->model);
    open_record_tokenizer(&t, &f, o);
    for (int i = 0; i < o->model.n_devices; i++) {
        qemb_model *m = replica_open(f.file, &o->model, i, loading(o));
        if (o->model.n_devices > 1) printf("device %d\n", o->model.devices[i]);
        within &= check_model(f.file, m, &t, !i);
        qemb_close(m);
    }
    record_tokenizer_close(&t);
    close_model_file(&f);
    return within ? STATUS_GOOD : STATUS_RECORDS;
}

/* ---- main ------------------------------------------------------------------------------------ */

/* If descriptor 0, 1 or 2 is closed, the next open() gets its number: text would then be read from
 * the model file, or vectors written to it. Returns 1 if standard input was closed. */
static int check_descriptors(void) {
    const int closed = fcntl(STDIN_FILENO, F_GETFD) < 0;
    if (closed && open("/dev/null", O_RDONLY) != STDIN_FILENO) leave(STATUS_USAGE);
    if (fcntl(STDOUT_FILENO, F_GETFD) < 0) DIE(STATUS_OUTPUT, "standard output: closed");
    if (fcntl(STDERR_FILENO, F_GETFD) < 0 && open("/dev/null", O_WRONLY) < 0) leave(STATUS_OUTPUT);
    return closed;
}

static int greps_stdin(const options *o) {
    for (int i = 0; i < o->n_files; i++)
        if (is_stdin(o->files[i])) return 1;
    return 0;
}

int main(int argc, char **argv) {
    options o = {.bit = FOR_EMBED};
    option_table t = table_for(&o);
    console_open("qemb");
    /* also errors of options before the word, and of closed descriptors, end with grep's status */
    const char *command = options_first_operand(&t, argc, argv);
    if (command && !strcmp(command, "grep")) console_error_status(GREP_ERROR);
    const int ranks = command && !strcmp(command, "rerank");
    const int no_input = check_descriptors();
    signal(SIGPIPE, SIG_IGN); /* writing fails with EPIPE instead, */
    signal(SIGXFSZ, SIG_IGN); /* or with EFBIG */
    parse_options(&o, &t, ranks ? FOR_RERANK : FOR_EMBED, argc, argv);
    if (no_input && (commands[o.command].reads_input || greps_stdin(&o)))
        DIE(STATUS_USAGE, "standard input: closed");
    const int status = commands[o.command].run(&o);
    free(o.files);
    if (fflush(stdout) || ferror(stdout)) {
        if (errno != EPIPE) say("standard output: cannot write (%s)", strerror(errno));
        leave(STATUS_OUTPUT);
    }
    return status;
}
