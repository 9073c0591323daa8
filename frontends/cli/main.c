/* main.c - options, commands, messages; see frontend.h. This is the only file that ends the process. */
#include "frontends/frontend.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <limits.h>
#include <openssl/evp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- messages ------------------------------------------------------------------------------ */

/* Set while a progress line stands on the terminal. */
static atomic_int progress_shown;

static void write_stderr(const char *line, size_t len) {
    const ssize_t n = write(STDERR_FILENO, line, len); /* one write: one line */
    (void)n;                                           /* nobody is left to tell */
}

#define WIPE "\r\033[K"

void say(const char *fmt, ...) {
    char line[1024] = WIPE "qemb: ";
    const size_t start = strlen(line);
    const size_t skip = atomic_exchange(&progress_shown, 0) ? 0 : strlen(WIPE);
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line + start, sizeof line - start - 1, fmt, ap);
    va_end(ap);
    const size_t len = strlen(line);
    line[len] = '\n';
    write_stderr(line + skip, len + 1 - skip);
}

void say_progress(const char *text) {
    char line[256];
    if (!atomic_exchange(&progress_shown, *text != 0) && !*text) return;
    snprintf(line, sizeof line, WIPE "%s", text);
    write_stderr(line, strlen(line));
}

void leave(int status) { _exit(status); }

void *need(void *p) {
    if (!p) DIE(STATUS_MODEL, "out of memory");
    return p;
}

/* ---- options ------------------------------------------------------------------------------- */

static const char *const command_names[] = {"embed", "info", "tokenize", "plan", "check"};

static const char *const on_error_names[] = {"", "record", "zero", "skip", "stop"};

enum {
    OPT_INPUT = 256,
    OPT_OUTPUT,
    OPT_QUERY,
    OPT_INSTRUCT,
    OPT_DIM,
    OPT_TRUNCATE,
    OPT_MAX_TOKENS,
    OPT_BATCH_TOKENS,
    OPT_THREADS,
    OPT_CPU,
    OPT_MATH,
    OPT_VRAM,
    OPT_DETERMINISTIC,
    OPT_NO_GRAPHS,
    OPT_HOPPER,
    OPT_CACHE,
    OPT_ON_ERROR,
    OPT_STATS,
    OPT_PROGRESS,
    OPT_QUIET,
    OPT_VERIFY
};

static const struct option long_options[] = {
    {"model", required_argument, NULL, 'm'},
    {"input", required_argument, NULL, OPT_INPUT},
    {"null", no_argument, NULL, '0'},
    {"output", required_argument, NULL, OPT_OUTPUT},
    {"query", no_argument, NULL, OPT_QUERY},
    {"instruct", required_argument, NULL, OPT_INSTRUCT},
    {"dim", required_argument, NULL, OPT_DIM},
    {"truncate", no_argument, NULL, OPT_TRUNCATE},
    {"max-tokens", required_argument, NULL, OPT_MAX_TOKENS},
    {"batch-tokens", required_argument, NULL, OPT_BATCH_TOKENS},
    {"threads", required_argument, NULL, OPT_THREADS},
    {"cpu", required_argument, NULL, OPT_CPU},
    {"math", required_argument, NULL, OPT_MATH},
    {"vram", required_argument, NULL, OPT_VRAM},
    {"deterministic", no_argument, NULL, OPT_DETERMINISTIC},
    {"no-graphs", no_argument, NULL, OPT_NO_GRAPHS},
    {"hopper", no_argument, NULL, OPT_HOPPER},
    {"cache", required_argument, NULL, OPT_CACHE},
    {"on-error", required_argument, NULL, OPT_ON_ERROR},
    {"stats", no_argument, NULL, OPT_STATS},
    {"progress", no_argument, NULL, OPT_PROGRESS},
    {"quiet", no_argument, NULL, OPT_QUIET},
    {"verify", no_argument, NULL, OPT_VERIFY},
    {"help", no_argument, NULL, 'h'},
    {"version", no_argument, NULL, 'V'},
    {NULL, 0, NULL, 0},
};

#define FOR(c) (1u << COMMAND_##c)

/* The commands that an option means something to. */
static unsigned commands_of(int opt) {
    switch (opt) {
    case OPT_INPUT:
    case '0':
    case OPT_QUERY:
    case OPT_INSTRUCT:
    case OPT_TRUNCATE:
        return FOR(EMBED) | FOR(TOKENIZE);
    case OPT_MAX_TOKENS:
        return FOR(EMBED) | FOR(TOKENIZE) | FOR(PLAN);
    case OPT_BATCH_TOKENS:
        return FOR(EMBED) | FOR(PLAN);
    case OPT_THREADS:
    case OPT_CPU:
    case OPT_MATH:
    case OPT_VRAM:
    case OPT_DETERMINISTIC:
    case OPT_NO_GRAPHS:
    case OPT_HOPPER:
    case OPT_CACHE:
        return FOR(EMBED) | FOR(PLAN) | FOR(CHECK);
    case OPT_OUTPUT:
    case OPT_DIM:
    case OPT_ON_ERROR:
    case OPT_STATS:
    case OPT_PROGRESS:
    case OPT_QUIET:
        return FOR(EMBED);
    case OPT_VERIFY:
        return FOR(INFO);
    default:
        return ~0u;
    }
}

static const char help[] =
    "qemb " QEMB_VERSION ": lines of text in, Qwen3-Embedding vectors out\n"
    "  qemb -m MODEL.qemb [OPTION]... < TEXTS > VECTORS\n"
    "  qemb info|tokenize|plan|check -m MODEL.qemb [OPTION]...\n"
    "  -m, --model FILE     the model, made by convert_weights.py\n"
    "  --input text|jsonl   a text per line, or {\"text\":...} per line       [text]\n"
    "  -0, --null           records end with NUL instead of a newline\n"
    "  --output KIND        json, jsonl, tsv, base64, f32, f16 or npy       [json]\n"
    "  --query              the texts are queries: the model's own prompt\n"
    "  --instruct TASK      the texts are queries for TASK\n"
    "  --dim N              numbers in a vector, at most the model's        [all]\n"
    "  --max-tokens N       longest text, end-of-text included      [the model's]\n"
    "  --truncate           cut longer texts; else they are errors\n"
    "  --batch-tokens N     tokens that are computed together [1024; on a GPU 8192]\n"
    "  --threads N          CPU threads                                     [all]\n"
    "  --cpu NAME           plain, avx2 or avx512: the instructions    [the fastest]\n"
    "  --math NAME          f32, bf16, int16, int8; on a GPU f16, fp8   [f32; f16]\n"
    "  --vram MIB, --deterministic, --no-graphs, --hopper, --cache DIR  GPU: man qemb\n"
    "  --on-error WHAT      record, zero, skip, stop      [record; binary: stop]\n"
    "  --stats              a summary on stderr at the end\n"
    "  --progress, --quiet  a progress line on stderr: always, never\n"
    "  --verify             with info: compare the weights with their SHA-256\n"
    "  -h, --help; -V, --version\n"
    "Status: 0 good, 1 usage or input, 2 model, 3 some records failed, 4 output.\n"
    "Records, errors and commands in full: man qemb\n";

#define USAGE(...) (say(__VA_ARGS__), DIE(STATUS_USAGE, "hint: qemb --help"))

static int parse_int(const char *name, const char *s, int max) {
    long long x = 0;
    const char *p = s;
    for (; *p >= '0' && *p <= '9' && x <= max; p++) x = x * 10 + (*p - '0');
    if (p == s || *p || x < 1 || x > max)
        USAGE("--%s: not a number in range (got %.40s, want 1..%d)", name, s, max);
    return (int)x;
}

static int parse_name(const char *name, const char *s, const char *const *names, int n) {
    for (int i = 0; i < n; i++)
        if (*names[i] && !strcmp(s, names[i])) return i;
    char want[80] = "";
    for (int i = 0; i < n; i++) {
        if (*want) strcat(want, ", ");
        strcat(want, names[i]);
    }
    USAGE("--%s: unknown (got %.40s, want %s)", name, s, want);
}

static int parse_output(const char *s) {
    const int kind = format_by_name(s);
    if (kind < 0)
        USAGE("--output: unknown (got %.40s, want json, jsonl, tsv, base64, f32, f16, npy)", s);
    return kind;
}

static void set_option(options *o, int opt, const char *arg) {
    static const char *const inputs[] = {"text", "jsonl"};
    switch (opt) {
    case 'm':
        o->model = arg;
        break;
    case OPT_INPUT:
        o->jsonl = parse_name("input", arg, inputs, 2);
        break;
    case '0':
        o->separator = '\0';
        break;
    case OPT_OUTPUT:
        o->output = (format_kind)parse_output(arg);
        break;
    case OPT_QUERY:
        o->query = 1;
        break;
    case OPT_INSTRUCT:
        o->instruct = arg;
        break;
    case OPT_DIM:
        o->dim = parse_int("dim", arg, INT_MAX);
        break;
    case OPT_TRUNCATE:
        o->truncate = 1;
        break;
    case OPT_MAX_TOKENS:
        o->engine.max_tokens = parse_int("max-tokens", arg, INT_MAX);
        break;
    case OPT_BATCH_TOKENS:
        o->engine.batch_tokens = parse_int("batch-tokens", arg, 1 << 24);
        break;
    case OPT_THREADS:
        o->engine.threads = parse_int("threads", arg, 4096);
        break;
    case OPT_CPU:
        o->cpu = arg;
        break;
    case OPT_MATH:
        o->math = arg;
        break;
    case OPT_VRAM:
        o->engine.vram = (size_t)parse_int("vram", arg, 1 << 30) << 20;
        break;
    case OPT_DETERMINISTIC:
        o->engine.deterministic = 1;
        break;
    case OPT_NO_GRAPHS:
        o->engine.no_graphs = 1;
        break;
    case OPT_HOPPER:
        o->engine.hopper = 1;
        break;
    case OPT_CACHE:
        o->engine.cache_dir = arg;
        break;
    case OPT_ON_ERROR:
        o->on_error = (on_error)parse_name("on-error", arg, on_error_names, LENGTH(on_error_names));
        break;
    case OPT_STATS:
        o->stats = 1;
        break;
    case OPT_PROGRESS:
        o->progress = 1;
        break;
    case OPT_QUIET:
        o->progress = -1;
        break;
    case OPT_VERIFY:
        o->verify = 1;
        break;
    }
}

static void operand(options *o, const char *arg, int *n_operands) {
    if ((*n_operands)++ == 0)
        for (int c = COMMAND_INFO; c < LENGTH(command_names); c++)
            if (!strcmp(arg, command_names[c])) {
                o->command = (command)c;
                return;
            }
    if (o->command == COMMAND_INFO && !o->model)
        o->model = arg;
    else
        USAGE("%.80s: an operand that means nothing (texts come from standard input)", arg);
}

static const char *option_name(int opt) {
    for (const struct option *l = long_options; l->name; l++)
        if (l->val == opt) return l->name;
    return "?";
}

static void finish_stdout(void) {
    if (!fflush(stdout) && !ferror(stdout)) return;
    if (errno != EPIPE) say("standard output: cannot write (%s)", strerror(errno));
    leave(STATUS_OUTPUT);
}

static void print_and_leave(const char *text) {
    fputs(text, stdout);
    finish_stdout();
    leave(STATUS_GOOD);
}

static void parse_options(options *o, int argc, char **argv) {
    int opt, n_operands = 0, seen[LENGTH(long_options)], n_seen = 0;
    qemb_err err;
    *o = (options){.separator = '\n'};
    opterr = 0;
    while ((opt = getopt_long(argc, argv, "-:m:0hV", long_options, NULL)) != -1) {
        if (opt == 'h') print_and_leave(help);
        if (opt == 'V') print_and_leave("qemb " QEMB_VERSION "\n");
        if (opt == 1)
            operand(o, optarg, &n_operands);
        else if (opt == ':')
            USAGE("%.80s: needs a value", argv[optind - 1]);
        else if (opt == '?' && optopt && optopt < 256)
            USAGE("-%c: unknown option", optopt);
        else if (opt == '?' && optopt)
            USAGE("--%s: takes no value", option_name(optopt));
        else if (opt == '?')
            USAGE("%.80s: unknown or ambiguous option", argv[optind - 1]);
        else {
            set_option(o, opt, optarg);
            if (n_seen < LENGTH(seen)) seen[n_seen++] = opt;
        }
    }
    for (; optind < argc; optind++) operand(o, argv[optind], &n_operands);
    for (int i = 0; i < n_seen; i++)
        if (!(commands_of(seen[i]) & 1u << o->command))
            USAGE("--%s: means nothing to qemb %s", option_name(seen[i]),
                  command_names[o->command]);
    o->ops = choose_ops(o->cpu, o->math, &err);
    if (!o->ops) USAGE("%s", err.msg);
    for (int i = 0; i < n_seen; i++)
        if (seen[i] >= OPT_VRAM && seen[i] <= OPT_CACHE && !o->ops->plan)
            USAGE("--%s: only with a GPU (qemb-cuda)", option_name(seen[i]));
    if (!o->model) USAGE("no model (want -m MODEL.qemb)");
    if (o->query && o->instruct) USAGE("--query and --instruct: only one of them");
    if (o->instruct && !*o->instruct)
        USAGE("--instruct: an empty task (leave it out for documents)");
    const int text = format_is_text(o->output);
    if (o->on_error == ON_ERROR_RECORD && !text)
        USAGE("--on-error record: no place for error records in binary output (want zero, skip, "
              "stop)");
    if (o->on_error == ON_ERROR_DEFAULT) o->on_error = text ? ON_ERROR_RECORD : ON_ERROR_STOP;
}

/* ---- embed ----------------------------------------------------------------------------------- */

static void source_open(source *s, const char *path) {
    qemb_err err;
    if (qemb_file_open(&s->file, path, &err)) DIE(STATUS_MODEL, "%s", err.msg);
    const qemb_file *f = s->file;
    if (qemb_tokenizer_open(&s->tokenizer, f->merges, f->n_merges, f->added, f->added_bytes, &err))
        DIE(STATUS_MODEL, "%.128s: %s", path, err.msg);
    const uint32_t n = qemb_tokenizer_n_ids(s->tokenizer);
    if (n > (uint32_t)f->config.vocab)
        DIE(STATUS_MODEL,
            "%.128s: tokenizer: more ids than rows of the embedding table "
            "(got %" PRIu32 ", want at most %d)",
            path, n, f->config.vocab);
}

static void source_close(source *s) {
    qemb_tokenizer_close(s->tokenizer);
    qemb_file_close(s->file);
}

static void show_loaded(int layers, int of) {
    char line[64] = "";
    if (layers < of) snprintf(line, sizeof line, "weights: layer %d of %d", layers + 1, of);
    say_progress(line);
}

static void open_model(qemb_model **m, const source *s, const options *o) {
    qemb_err err;
    qemb_options opt = o->engine;
    if (o->progress > 0 || (!o->progress && isatty(STDERR_FILENO)))
        opt.on_layer_loaded = show_loaded;
    if (qemb_open(m, s->file, o->ops, &opt, &err)) DIE(STATUS_MODEL, "%s", err.msg);
}

static void open_record_tokenizer(record_tokenizer *e, const source *s, const options *o) {
    qemb_err err;
    if (!record_tokenizer_open(e, s, o, &err)) return;
    if (strcmp(err.code, "usage")) DIE(STATUS_MODEL, "%s", err.msg);
    USAGE("%s", err.msg);
}

static int embed(const options *o) {
    source s;
    record_tokenizer e;
    qemb_model *m;
    source_open(&s, o->model);
    open_record_tokenizer(&e, &s, o);
    open_model(&m, &s, o);
    const int status = embed_stream(o, m, s.file->config.hidden, &e);
    qemb_close(m);
    record_tokenizer_close(&e);
    source_close(&s);
    return status;
}

/* ---- tokenize -------------------------------------------------------------------------------- */

static void write_ids(output *out, const record_ids *t, int eos) {
    char *p = output_room(out, ((size_t)t->n + 1) * 11 + 2 + FORMAT_UINT_ROOM);
    *p++ = '[';
    for (int i = 0; i < t->n; i++) {
        p = format_uint(p, (uint64_t)t->ids[i]);
        *p++ = ',';
    }
    p = format_uint(p, (uint64_t)eos);
    *p++ = ']';
    *p++ = '\n';
    output_wrote(out, p);
}

static int tokenize(const options *o) {
    source s;
    record_tokenizer e;
    output out;
    int status = STATUS_GOOD;
    source_open(&s, o->model);
    open_record_tokenizer(&e, &s, o);
    output_open(&out, FORMAT_JSON, 0);
    input *in = need(input_new(STDIN_FILENO, -1, o->separator));
    for (;;) {
        input_record r;
        record_ids t;
        qemb_err err;
        input_status got = input_next(in, 0, &r);
        if (got == INPUT_WAIT) {
            output_flush(&out);
            got = input_next(in, 1, &r);
        }
        if (got == INPUT_FAILED) {
            const int error = errno;
            output_flush(&out);
            DIE(STATUS_USAGE, "standard input: cannot read (%s)", strerror(error));
        }
        if (got != INPUT_RECORD) break;
        if (tokenize_record(&e, &r, &t, &err)) {
            output_error(&out, t.id, t.id_len, r.line, err.code, err.msg, strlen(err.msg));
            status = STATUS_RECORDS;
        } else {
            write_ids(&out, &t, e.eos);
        }
    }
    output_flush(&out);
    output_close(&out);
    input_free(in);
    record_tokenizer_close(&e);
    source_close(&s);
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

static void print_hex(const uint8_t *b, int n) {
    for (int i = 0; i < n; i++) printf("%02x", b[i]);
}

/* The provenance's lines, indented. The file is not trusted to hold printable text. */
static void print_provenance(const qemb_file *f) {
    const char *s = f->provenance, *end = s + f->provenance_bytes;
    for (const char *stop; s < end; s = stop + 1) {
        stop = memchr(s, '\n', (size_t)(end - s));
        if (!stop) stop = end;
        fputs("  ", stdout);
        for (; s < stop; s++) putchar((unsigned char)*s < 0x20 || *s == 0x7f ? '?' : *s);
        putchar('\n');
    }
}

static void print_config(const qemb_file *f) {
    const qemb_config *c = &f->config;
    const size_t D = (size_t)c->hidden, Q = (size_t)c->n_heads * (size_t)c->head_dim;
    const size_t KV = (size_t)c->n_kv_heads * (size_t)c->head_dim, F = (size_t)c->ffn;
    const size_t norms = 2 * D + 2 * (size_t)c->head_dim;
    const size_t layer = (Q + 2 * KV) * D + D * Q + 3 * F * D + norms;
    printf("dtype            %s\n", dtype_name(f->weights.layers[0].wqkv.dtype));
    printf("parameters       %zu in the layers, %zu in the embedding table\n",
           (size_t)c->n_layers * layer + D, (size_t)c->vocab * D);
    printf("layers           %d\n", c->n_layers);
    printf("hidden           %d\n", c->hidden);
    printf("heads            %d of queries, %d of keys and values, %d wide\n", c->n_heads,
           c->n_kv_heads, c->head_dim);
    printf("feed-forward     %d\n", c->ffn);
    printf("vocabulary       %d rows, %" PRIu32 " merges, end-of-text %d\n", c->vocab, f->n_merges,
           c->eos_id);
    printf("longest text     %d tokens\n", c->max_positions);
    printf("rope theta       %g\n", (double)c->rope_theta);
    printf("rms eps          %g\n", (double)c->rms_eps);
}

/* Compares what lies in the file with the SHA-256 that its writer recorded. */
static int verify(const qemb_file *f, const char *path) {
    const size_t start = 4096; /* the header records it and is not part of it */
    uint8_t digest[EVP_MAX_MD_SIZE];
    unsigned len;
    if (!EVP_Digest(f->map + start, f->map_bytes - start, digest, &len, EVP_sha256(), NULL))
        DIE(STATUS_MODEL, "libcrypto: no SHA-256");
    if (!memcmp(digest, f->sha256, sizeof f->sha256)) {
        printf("verified         yes\n");
        return STATUS_GOOD;
    }
    printf("verified         no: it is ");
    print_hex(digest, (int)len);
    putchar('\n');
    say("%.128s: SHA-256: not what its writer recorded", path);
    return STATUS_MODEL;
}

static int info(const options *o) {
    qemb_err err;
    qemb_file *f;
    if (qemb_file_open(&f, o->model, &err)) DIE(STATUS_MODEL, "%s", err.msg);
    printf("file             %s (%.1f MiB)\n", o->model, mib(f->map_bytes));
    print_config(f);
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
    print_hex(f->sha256, sizeof f->sha256);
    putchar('\n');
    const int status = o->verify ? verify(f, o->model) : STATUS_GOOD;
    qemb_file_close(f);
    return status;
}

static int plan(const options *o) {
    static const int usual[] = {512, 1024, 2048, 4096, 8192, 16384, 32768};
    qemb_err err;
    qemb_file *f;
    qemb_memory mem;
    qemb_options opt = o->engine;
    if (qemb_file_open(&f, o->model, &err)) DIE(STATUS_MODEL, "%s", err.msg);
    if (opt.max_tokens > f->config.max_positions)
        USAGE("--max-tokens: more than the model can (got %d, want 1..%d)", opt.max_tokens,
              f->config.max_positions);
    if (!opt.max_tokens) opt.max_tokens = f->config.max_positions;
    qemb_plan(f, o->ops, &opt, &mem);
    printf("%10.1f MiB  layers, mapped: %s\n", mib(mem.weights),
           mem.repacked_bytes ? "read once, not kept in memory" : "every batch reads them");
    if (mem.repacked_bytes)
        printf("%10.1f MiB  layers, copied for this CPU and --math: every batch reads them\n",
               mib(mem.repacked_bytes));
    printf("%10.1f MiB  embedding table, mapped: rows in use are read\n", mib(mem.table));
    printf("%10.1f MiB  activations: one text of --max-tokens %d\n", mib(mem.arena_text),
           opt.max_tokens);
    for (int i = 0; i < (o->engine.batch_tokens ? 1 : LENGTH(usual)); i++) {
        if (!o->engine.batch_tokens) opt.batch_tokens = usual[i];
        qemb_plan(f, o->ops, &opt, &mem);
        printf("%10.1f MiB  activations: a batch of --batch-tokens %d%s\n", mib(mem.arena_batch),
               opt.batch_tokens, opt.batch_tokens == qemb_batch_tokens(o->ops) ? " (default)" : "");
    }
    printf("A run takes the layers that every batch reads, rows of the table, and the larger one "
           "of its\n"
           "two activations.\n");
    opt.batch_tokens = o->engine.batch_tokens;
    qemb_plan(f, o->ops, &opt, &mem);
    size_t sum = 0;
    for (int i = 0; i < mem.n_parts; i++) {
        if (!i) printf("On the GPU:\n");
        printf("%10.1f MiB  %s\n", mib(mem.parts[i].bytes), mem.parts[i].what);
        sum += mem.parts[i].bytes;
    }
    if (mem.n_parts) printf("%10.1f MiB  in all, beside what the driver takes\n", mib(sum));
    if (mem.n_parts && opt.vram && sum > opt.vram)
        DIE(STATUS_MODEL, "GPU memory: more than --vram (got %.0f MiB, want at most %.0f MiB)",
            mib(sum), mib(opt.vram));
    qemb_file_close(f);
    return STATUS_GOOD;
}

/* ---- check ----------------------------------------------------------------------------------- */

/* The model card's example, and the scores that the real models are known to give for it. */
static const char check_task[] =
    "Given a web search query, retrieve relevant passages that answer the query";
static const char *const check_texts[] = {
    "What is the capital of China?", "Explain gravity", "The capital of China is Beijing.",
    ("Gravity is a force that attracts two bodies towards each other. It gives weight to physical "
     "objects and is responsible for the movement of planets around the sun.")};

typedef struct {
    const char *name;
    int layers, hidden, heads, ffn;
    double score[4]; /* q0.d0, q0.d1, q1.d0, q1.d1 */
    double gate;
} known_model;

static const known_model known_models[] = {
    /* from transformers in FP32: FP32 arithmetic has to agree closely */
    {"Qwen3-Embedding-0.6B",
     28,
     1024,
     16,
     3072,
     {0.7645568251609802, 0.14142508804798126, 0.13549736142158508, 0.5999549627304077},
     1e-5},
    /* published figures, of 16 bit runs or of four digits */
    {"Qwen3-Embedding-4B", 36, 2560, 32, 9728, {0.7534, 0.1147, 0.0320, 0.6258}, 3e-3},
    {"Qwen3-Embedding-8B",
     36,
     4096,
     32,
     12288,
     {0.7493016123771667, 0.0750647559762001, 0.08795969933271408, 0.6318399906158447},
     3e-3},
};

static const known_model *find_known(const qemb_config *c) {
    for (int i = 0; i < LENGTH(known_models); i++) {
        const known_model *k = &known_models[i];
        if (k->layers == c->n_layers && k->hidden == c->hidden && k->heads == c->n_heads &&
            k->ffn == c->ffn)
            return k;
    }
    return NULL;
}

/* score[2 q + d] of the four texts, queries first. */
static void check_scores(const source *s, const options *o, double score[4]) {
    const size_t D = (size_t)s->file->config.hidden;
    record_tokenizer e;
    qemb_model *m;
    open_record_tokenizer(&e, s, o);
    open_model(&m, s, o);
    qemb_batch *b = need(qemb_batch_new(m));
    float *out = need(malloc(D * sizeof *out)), *unit = need(malloc(4 * D * sizeof *unit));
    for (int i = 0; i < 4; i++) {
        const int query = i < 2;
        record_ids t;
        qemb_err err;
        if (tokenize_text(&e, check_texts[i], strlen(check_texts[i]), query ? check_task : "",
                          query ? sizeof check_task - 1 : 0, &t, &err))
            DIE(STATUS_MODEL, "%s", err.msg);
        int32_t *ids = need(malloc(((size_t)t.n + 1) * sizeof *ids));
        memcpy(ids, t.ids, (size_t)t.n * sizeof *ids);
        ids[t.n] = e.eos;
        qemb_pack_add(b, ids, t.n + 1);
        qemb_embed(m, b, out);
        if (qemb_l2_normalize(unit + (size_t)i * D, out, (int)D))
            DIE(STATUS_MODEL, "%.128s: a vector without a finite length", o->model);
        qemb_batch_clear(b);
        free(ids);
    }
    for (int i = 0; i < 4; i++) {
        const float *q = unit + (size_t)(i / 2) * D, *d = unit + (size_t)(2 + i % 2) * D;
        score[i] = 0;
        for (size_t k = 0; k < D; k++) score[i] += (double)q[k] * (double)d[k];
    }
    free(unit);
    free(out);
    qemb_batch_free(b);
    qemb_close(m);
    record_tokenizer_close(&e);
}

static int check(const options *o) {
    source s;
    double score[4];
    int within = 1;
    source_open(&s, o->model);
    check_scores(&s, o, score);
    const known_model *known = find_known(&s.file->config);
    for (int i = 0; i < 4; i++) printf("%c%d  %s\n", i < 2 ? 'q' : 'd', i % 2, check_texts[i]);
    printf("%18s%s\n", "score", known ? "    expected  difference" : "");
    for (int i = 0; i < 4; i++) {
        printf("q%d.d%d %12.7f", i / 2, i % 2, score[i]);
        if (known) {
            const double d = score[i] - known->score[i];
            if (!(d <= known->gate && d >= -known->gate)) within = 0;
            printf("%12.7f%12.1e", known->score[i], d);
        }
        putchar('\n');
    }
    source_close(&s);
    if (!known) {
        printf("No expected scores are known for a model of this shape.\n");
        return STATUS_GOOD;
    }
    printf("%s of the scores of %s (gate %g)\n", within ? "Within" : "OUT", known->name,
           known->gate);
    return within ? STATUS_GOOD : STATUS_RECORDS;
}

/* ---- main ------------------------------------------------------------------------------------ */

/* A descriptor that is not open would be given to the model file: then text would be read from
 * weights, or vectors be written over them. Returns 1 if standard input was closed. */
static int check_descriptors(void) {
    const int closed = fcntl(STDIN_FILENO, F_GETFD) < 0;
    if (closed && open("/dev/null", O_RDONLY) != STDIN_FILENO) leave(STATUS_USAGE);
    if (fcntl(STDOUT_FILENO, F_GETFD) < 0) DIE(STATUS_OUTPUT, "standard output: closed");
    if (fcntl(STDERR_FILENO, F_GETFD) < 0 && open("/dev/null", O_WRONLY) < 0) leave(STATUS_OUTPUT);
    return closed;
}

static int (*const commands[])(const options *) = {embed, info, tokenize, plan, check};

int main(int argc, char **argv) {
    options o;
    const int no_input = check_descriptors();
    signal(SIGPIPE, SIG_IGN); /* writing says EPIPE instead */
    parse_options(&o, argc, argv);
    if (no_input && (o.command == COMMAND_EMBED || o.command == COMMAND_TOKENIZE))
        DIE(STATUS_USAGE, "standard input: closed");
    const int status = commands[o.command](&o);
    finish_stdout();
    return status;
}
