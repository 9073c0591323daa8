/* console.h - what both programs say to whoever started them, how they end, and the clock. */
#ifndef QEMB_CONSOLE_H
#define QEMB_CONSOLE_H

#define LENGTH(a) ((int)(sizeof(a) / sizeof *(a)))

enum { STATUS_GOOD, STATUS_USAGE, STATUS_MODEL, STATUS_RECORDS, STATUS_OUTPUT };

/* The program's name, which stands before every message. To be called first; name is kept. */
void console_open(const char *name);
const char *console_name(void);

/* "NAME: ...\n" on standard error, in one write. Wipes the progress line. From any thread. */
void say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Shows a line that the next message or progress line replaces; "" wipes it. */
void say_progress(const char *line);

/* Ends the process at once, from any thread: other threads may be in the middle of anything. */
_Noreturn void leave(int status);
#define DIE(status, ...) (say(__VA_ARGS__), leave(status))
/* Says what is wrong with the command line and where to read about it; ends with STATUS_USAGE. */
_Noreturn void usage(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Prints text on standard output and ends the process. */
_Noreturn void print_and_leave(const char *text);

/* Returns p, or ends the process with "out of memory" if p is NULL. */
void *need(void *p);

double seconds_now(void); /* by a clock that never goes back */

#endif
