/* options.h - command-line options from a table.
 *
 * An option is one row, and the member that the row sets. Parsing, the default, --help and the
 * tests of the manuals read the row. A test demands the option's paragraph in the manual.
 */
#ifndef QEMB_OPTIONS_H
#define QEMB_OPTIONS_H

#include <stddef.h>

typedef enum {
    OPTION_FLAG,   /* takes no value; sets an int to `value` */
    OPTION_INT,    /* min..max, into an int */
    OPTION_DOUBLE, /* a whole number min..max, into a double */
    OPTION_SIZE,   /* min..max, shifted left by `shift` bits, into a size_t */
    OPTION_STRING, /* the pointer, into a const char * */
    OPTION_CHOICE, /* one of `choices`; its index into an int or an enum */
    OPTION_CALL,   /* passed to `call` */
    OPTION_TABLE   /* takes no value; prints the rows for shell completion and ends the process */
} option_kind;

typedef struct {
    const char *name;     /* without the dashes */
    const char *argument; /* the value's name in --help; NULL: no value */
    const char *help;     /* one line */
    const char *standard; /* the default, as on a command line; NULL: the member starts as 0 */
    option_kind kind;
    size_t at;                  /* offset of the member that is set */
    const char *unset;          /* without `standard`: --help's words for the default, or NULL */
    char letter;                /* the short form, or 0 */
    int value;                  /* of OPTION_FLAG */
    int min, max;               /* of OPTION_INT, OPTION_DOUBLE, OPTION_SIZE */
    int shift;                  /* of OPTION_SIZE */
    unsigned commands;          /* the commands that the option applies to, as bits; 0: all */
    int gpu;                    /* 1: only for a program that computes on a GPU */
    const char *const *choices; /* ends with NULL; of OPTION_STRING: what completion offers */
    const char *suffix;         /* of an argument FILE: what the files' names end with; NULL: any */
    void (*call)(void *options, const char *name, const char *value);
} option_row;

/* The rows that set members of one struct. Two rows may have one name, for different commands. */
typedef struct {
    const option_row *rows;
    int n;
    void *options;
} option_section;

enum { OPTION_SECTIONS = 2, OPTION_ROWS = 64 };

typedef struct {
    const char *synopsis; /* the first lines of --help */
    const char *ending;   /* its last lines */
    option_section sections[OPTION_SECTIONS];
    /* Called for each argument that is no option, with n = 0 for the first; NULL: there may be
     * none. */
    void (*operand)(void *options, const char *value, int n);
    void *operand_options;
    /* The bit of the command that the operands so far have named; NULL: there are none. A row whose
     * letter is 'h' has it only for its commands; otherwise -h is --help. */
    const unsigned *command;
    /* The name of command i and its bit, for completion; NULL past the last one. Command 0 is what
     * a program does without a command's name. The pointer itself may be NULL: there are none. */
    const char *(*command_name)(int i, unsigned *bit);
    const option_row *seen[OPTION_ROWS]; /* (n_seen) the rows that were given, each once */
    int n_seen;
} option_table;

/* The first argument that is no option and no option's value, or NULL. Reports no errors. */
const char *options_first_operand(const option_table *t, int argc, char **argv);
/* Sets the members to the rows' defaults, then for the options in argv. Fills seen. --help and
 * --version print and end the process. Ends it with STATUS_USAGE if argv is wrong. */
void options_parse(option_table *t, int argc, char **argv);
/* Ends with STATUS_USAGE if an option was given that does not apply: to the command of bit
 * `command`, called `name`, or to a program without a GPU. */
void options_check(const option_table *t, unsigned command, const char *name, int has_gpu);

#endif
