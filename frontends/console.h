/* console.h - messages on standard error, exits and the clock, for both programs. */
#ifndef QEMB_CONSOLE_H
#define QEMB_CONSOLE_H

#include <pthread.h>
#include <stddef.h>

#define LENGTH(a) ((int)(sizeof(a) / sizeof *(a)))

enum { STATUS_GOOD, STATUS_USAGE, STATUS_MODEL, STATUS_RECORDS, STATUS_OUTPUT };
/* The only statuses of `qemb grep`, beside STATUS_GOOD. */
enum { GREP_NONE = 1, GREP_ERROR = 2 };

/* Sets the program's name, the prefix of every message. Call it first. Keeps the pointer. */
void console_open(const char *name);
const char *console_name(void);

/* Copies s (n bytes) to p, which has room for n bytes and may be s; returns the end. Writes '?' for
 * each character that a terminal might execute (U+0000 to U+001F but TAB, U+007F to U+009F) and
 * for each invalid byte of UTF-8. */
char *put_printable(char *p, const char *s, size_t n);
/* Writes "NAME: ...\n" to standard error in one write, over the progress line; what put_printable
 * makes of it. Thread-safe. */
void say(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Shows a line that the next message or progress line overwrites; "" removes it. */
void say_progress(const char *line);

/* Ends the process at once. Callable from any thread, whatever the others are doing. */
_Noreturn void leave(int status);
/* The same with a line, which ends with a newline. For handlers of signals too. */
_Noreturn void leave_saying(int status, const char *line);
/* From here on leave replaces every status but STATUS_GOOD by this one. */
void console_error_status(int status);
#define DIE(status, ...) (say(__VA_ARGS__), leave(status))
/* Prints what is wrong with the command line and a hint at --help; ends with STATUS_USAGE. */
_Noreturn void usage(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Prints text on standard output and ends the process. */
_Noreturn void print_and_leave(const char *text);

/* Returns p, or ends the process with "out of memory" if p is NULL. */
void *need(void *p);

double seconds_now(void); /* monotonic */
/* Joins a thread if it ends within that time, in seconds; returns whether it has. */
int join_within(pthread_t thread, double seconds);

#endif
