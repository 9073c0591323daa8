/* console.c - messages, exits, the clock; see console.h. A process has one standard error, so the
 * program's name and the progress line are static. */
#include "console.h"

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define WIPE "\r\033[K"

static const char *program = "qemb";
static int error_status;          /* 0: statuses are as they are */
static atomic_int progress_shown; /* the terminal shows a progress line */

void console_open(const char *name) { program = name; }

const char *console_name(void) { return program; }

static void write_stderr(const char *line, size_t len) {
    const ssize_t n = write(STDERR_FILENO, line, len);
    (void)n; /* no channel is left to report a failure of standard error */
}

static void say_args(const char *fmt, va_list ap) {
    char line[1024];
    const size_t wipe = strlen(WIPE);
    const size_t skip = atomic_exchange(&progress_shown, 0) ? 0 : wipe;
    const int start = snprintf(line, sizeof line, WIPE "%s: ", program);
    vsnprintf(line + start, sizeof line - (size_t)start - 1, fmt, ap);
    const size_t len = strlen(line);
    for (size_t i = (size_t)start; i < len; i++) /* of a file's name: one line, nothing executed */
        if ((unsigned char)line[i] < 0x20 || line[i] == 0x7f) line[i] = '?';
    line[len] = '\n';
    write_stderr(line + skip, len + 1 - skip);
}

void say(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    say_args(fmt, ap);
    va_end(ap);
}

void say_progress(const char *text) {
    char line[256];
    if (!atomic_exchange(&progress_shown, *text != 0) && !*text) return;
    snprintf(line, sizeof line, WIPE "%s", text);
    write_stderr(line, strlen(line));
}

void console_error_status(int status) { error_status = status; }

void leave(int status) { _exit(status && error_status ? error_status : status); }

void usage(const char *fmt, ...) {
    va_list ap;
    va_start(ap, fmt);
    say_args(fmt, ap);
    va_end(ap);
    DIE(STATUS_USAGE, "hint: %s --help", program);
}

void print_and_leave(const char *text) {
    fputs(text, stdout);
    if (!fflush(stdout)) leave(STATUS_GOOD);
    if (errno != EPIPE) say("standard output: cannot write (%s)", strerror(errno));
    leave(STATUS_OUTPUT);
}

void *need(void *p) {
    if (!p) DIE(STATUS_MODEL, "out of memory");
    return p;
}

double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
