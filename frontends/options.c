/* options.c - command-line options from a table; see options.h. */
#include "options.h"

#include "console.h"
#include "qemb.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* getopt_long returns HELP for --help and FIRST_LONG + i for row i: above all letters */
enum { HELP = 256, FIRST_LONG };

/* Row i, counted over all sections, and the struct that it sets; NULL past the end. */
static const option_row *row_at(const option_table *t, int i, void **options) {
    for (int s = 0; s < OPTION_SECTIONS; s++) {
        const option_section *o = &t->sections[s];
        if (i < o->n) {
            if (options) *options = o->options;
            return &o->rows[i];
        }
        i -= o->n;
    }
    return NULL;
}

/* ---- --help ---------------------------------------------------------------------------------- */

static void print_row(FILE *out, const option_row *r) {
    char left[64];
    snprintf(left, sizeof left, "%s%.1s%s--%s%s%s", r->letter ? "-" : "", &r->letter,
             r->letter ? ", " : "", r->name, r->argument ? " " : "",
             r->argument ? r->argument : "");
    fprintf(out, "  %-22s  %s", left, r->help);
    const char *standard = r->standard ? r->standard : r->unset;
    if (standard) fprintf(out, "  [%s]", standard);
    fputc('\n', out);
}

_Noreturn static void print_help(const option_table *t) {
    char *text = NULL;
    size_t size;
    FILE *out = need(open_memstream(&text, &size));
    fputs(t->synopsis, out);
    for (int i = 0; row_at(t, i, NULL); i++) print_row(out, row_at(t, i, NULL));
    fputs("  -h, --help; -V, --version\n", out);
    fputs(t->ending, out);
    fclose(out);
    print_and_leave(need(text));
}

_Noreturn static void print_version(void) {
    char text[64];
    snprintf(text, sizeof text, "%s " QEMB_VERSION "\n", console_name());
    print_and_leave(text);
}

/* ---- shell completion ------------------------------------------------------------------------ */

/* What the row's value is: "-" for none, "words A B", "files SUFFIX", "folders" or "any". */
static void print_values(FILE *out, const option_row *r) {
    if (!r->argument)
        fputc('-', out);
    else if (r->choices) {
        fputs("words", out);
        for (int i = 0; r->choices[i]; i++) fprintf(out, " %s", r->choices[i]);
    } else if (!strcmp(r->argument, "FILE"))
        fprintf(out, "files %s", r->suffix ? r->suffix : "");
    else
        fputs(strcmp(r->argument, "DIR") ? "any" : "folders", out);
}

/* The names of the row's commands with commas between them; "-": all. */
static void print_commands(FILE *out, const option_table *t, const option_row *r) {
    unsigned bit;
    const char *name;
    if (!r->commands || !t->command_name) {
        fputc('-', out);
        return;
    }
    for (int i = 0, n = 0; (name = t->command_name(i, &bit)); i++)
        if (r->commands & bit) fprintf(out, "%s%s", n++ ? "," : "", name);
}

/* Prints a line for each command and each option. Its fields end with tabs, as
 * packaging/completion/ reads them: "command NAME" or "option NAME LETTER VALUES COMMANDS HELP". */
_Noreturn static void print_table(const option_table *t) {
    char *text = NULL;
    size_t size;
    unsigned bit;
    const option_row *r;
    FILE *out = need(open_memstream(&text, &size));
    for (int i = 1; t->command_name && t->command_name(i, &bit); i++)
        fprintf(out, "command\t%s\n", t->command_name(i, &bit));
    for (int i = 0; (r = row_at(t, i, NULL)); i++) {
        fprintf(out, "option\t%s\t%c\t", r->name, r->letter ? r->letter : '-');
        print_values(out, r);
        fputc('\t', out);
        print_commands(out, t, r);
        fprintf(out, "\t%s\n", r->help);
    }
    fputs("option\thelp\t-\t-\t-\ta list of the options\n"
          "option\tversion\tV\t-\t-\tthe version\n",
          out);
    fclose(out);
    print_and_leave(need(text));
}

/* ---- values ---------------------------------------------------------------------------------- */

static int parse_int(const option_row *r, const char *s) {
    long long x = 0;
    const char *p = s;
    for (; *p >= '0' && *p <= '9' && x <= r->max; p++) x = x * 10 + (*p - '0');
    if (p == s || *p || x < r->min || x > r->max)
        usage("--%s: not a whole number in range (got %.40s, want %d..%d)", r->name, s, r->min,
              r->max);
    return (int)x;
}

static int parse_choice(const option_row *r, const char *s) {
    char want[128] = "";
    for (int i = 0; r->choices[i]; i++) {
        if (!strcmp(s, r->choices[i])) return i;
        const size_t n = strlen(want);
        snprintf(want + n, sizeof want - n, "%s%s", i ? ", " : "", r->choices[i]);
    }
    usage("--%s: unknown (got %.40s, want %s)", r->name, s, want);
}

static void set_option(const option_row *r, void *options, const char *value) {
    void *member = (char *)options + r->at;
    switch (r->kind) {
    case OPTION_FLAG:
        *(int *)member = r->value;
        break;
    case OPTION_INT:
        *(int *)member = parse_int(r, value);
        break;
    case OPTION_DOUBLE:
        *(double *)member = parse_int(r, value);
        break;
    case OPTION_SIZE:
        *(size_t *)member = (size_t)parse_int(r, value) << r->shift;
        break;
    case OPTION_STRING:
        *(const char **)member = value;
        break;
    case OPTION_CHOICE:
        *(int *)member = parse_choice(r, value);
        break;
    case OPTION_CALL:
        r->call(options, r->name, value);
        break;
    case OPTION_TABLE: /* options_parse has the table */
        break;
    }
}

/* ---- parsing --------------------------------------------------------------------------------- */

static void see(option_table *t, const option_row *r) {
    for (int i = 0; i < t->n_seen; i++)
        if (t->seen[i] == r) return;
    t->seen[t->n_seen++] = r;
}

static int is_for(const option_row *r, unsigned command) {
    return !r->commands || (r->commands & command);
}

/* Whether another row of r's name is the one for the command. */
static int is_hidden(const option_table *t, const option_row *r) {
    const unsigned command = t->command ? *t->command : 0;
    const option_row *other;
    for (int i = 0; (other = row_at(t, i, NULL)); i++)
        if (other != r && !strcmp(other->name, r->name) && is_for(other, command)) return 1;
    return 0;
}

/* Converts the table for getopt_long. */
static void make_getopt(const option_table *t, struct option *longs, char *letters) {
    const option_row *r;
    int n = 0;
    letters += sprintf(letters, "-:hV"); /* "-": operands in order; ":": no messages of its own */
    for (int i = 0; (r = row_at(t, i, NULL)); i++) {
        if (i == OPTION_ROWS) abort();
        if (is_hidden(t, r)) continue;
        longs[n++] = (struct option){r->name, r->argument ? required_argument : no_argument, NULL,
                                     FIRST_LONG + i};
        if (r->letter && r->letter != 'h')
            letters += sprintf(letters, "%c%s", r->letter, r->argument ? ":" : "");
    }
    longs[n] = (struct option){"help", no_argument, NULL, HELP};
    longs[n + 1] = (struct option){"version", no_argument, NULL, 'V'};
    longs[n + 2] = (struct option){0};
}

static int row_of(const option_table *t, int opt) {
    if (opt >= FIRST_LONG) return opt - FIRST_LONG;
    for (int i = 0; row_at(t, i, NULL); i++)
        if (row_at(t, i, NULL)->letter == opt) return i;
    return -1;
}

static int has_own_h(const option_table *t) {
    const int i = row_of(t, 'h');
    return i >= 0 && t->command && (row_at(t, i, NULL)->commands & *t->command);
}

_Noreturn static void refuse(const option_table *t, const char *argument) {
    if (optopt && optopt < HELP) usage("-%c: unknown option", optopt);
    if (optopt == HELP) usage("--help: takes no value");
    if (optopt) usage("--%s: takes no value", row_at(t, row_of(t, optopt), NULL)->name);
    usage("%.80s: unknown or ambiguous option", argument);
}

static void operand(const option_table *t, const char *value, int n) {
    if (!t->operand) usage("%.80s: an operand that means nothing (a model is given by -m)", value);
    t->operand(t->operand_options, value, n);
}

static void set_defaults(const option_table *t) {
    const option_row *r;
    void *options = NULL;
    for (int i = 0; (r = row_at(t, i, &options)); i++)
        if (r->standard) set_option(r, options, r->standard);
}

const char *options_first_operand(const option_table *t, int argc, char **argv) {
    struct option longs[OPTION_ROWS + 3];
    char letters[8 + 2 * OPTION_ROWS];
    int opt;
    make_getopt(t, longs, letters);
    opterr = 0;
    while ((opt = getopt_long(argc, argv, letters, longs, NULL)) > 1) continue;
    const char *first = opt == 1 ? optarg : optind < argc ? argv[optind] : NULL;
    optind = 0; /* begins anew */
    return first;
}

void options_parse(option_table *t, int argc, char **argv) {
    struct option longs[OPTION_ROWS + 3];
    char letters[8 + 2 * OPTION_ROWS];
    int opt, n_operands = 0;
    make_getopt(t, longs, letters);
    set_defaults(t);
    opterr = 0;
    while ((opt = getopt_long(argc, argv, letters, longs, NULL)) != -1) {
        void *options = NULL;
        if (opt == HELP || (opt == 'h' && !has_own_h(t))) print_help(t);
        if (opt == 'V') print_version();
        if (opt == 1) {
            operand(t, optarg, n_operands++);
            continue;
        }
        if (opt == ':') usage("%.80s: needs a value", argv[optind - 1]);
        if (opt == '?') refuse(t, argv[optind - 1]);
        const option_row *r = row_at(t, row_of(t, opt), &options);
        if (r->kind == OPTION_TABLE) print_table(t);
        set_option(r, options, optarg);
        see(t, r);
    }
    for (; optind < argc; optind++) operand(t, argv[optind], n_operands++);
}

void options_check(const option_table *t, unsigned command, const char *name, int has_gpu) {
    for (int i = 0; i < t->n_seen; i++) {
        const option_row *r = t->seen[i];
        if (!is_for(r, command))
            usage("--%s: means nothing to %s %s", r->name, console_name(), name);
        if (r->gpu && !has_gpu) usage("--%s: only with a GPU (%s-cuda)", r->name, console_name());
    }
}
