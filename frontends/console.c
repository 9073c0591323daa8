/* console.c - messages, exits, the clock; see console.h. A process has one standard error, so the
 * program's name and the progress line are static. */
#include "console.h"

#include "lib/unicode.h"

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

char *put_printable(char *p, const char *s, size_t n) {
    const uint8_t *t = (const uint8_t *)s, *end = t + n;
    while (t < end) {
        const unsigned len = utf8_valid(t, (size_t)(end - t));
        const int control =
            !len || (t[0] < 0x20 && t[0] != '\t') || t[0] == 0x7f || (t[0] == 0xc2 && t[1] < 0xa0);
        if (control) *p++ = '?';
        for (unsigned i = 0; i < len && !control; i++) *p++ = (char)t[i];
        t += len ? len : 1;
    }
    return p;
}

static void say_args(const char *fmt, va_list ap) {
    char line[1024];
    const size_t wipe = strlen(WIPE);
    const size_t skip = atomic_exchange(&progress_shown, 0) ? 0 : wipe;
    const int start = snprintf(line, sizeof line, WIPE "%s: ", program);
    vsnprintf(line + start, sizeof line - (size_t)start - 1, fmt, ap);
    /* a file's name may hold anything */
    char *end = put_printable(line + start, line + start, strlen(line + start));
    *end++ = '\n';
    write_stderr(line + skip, (size_t)(end - line) - skip);
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
    const int start = snprintf(line, sizeof line, WIPE);
    snprintf(line + start, sizeof line - (size_t)start, "%s", text);
    const char *end = put_printable(line + start, line + start, strlen(line + start));
    write_stderr(line, (size_t)(end - line));
}

void console_error_status(int status) { error_status = status; }

void leave(int status) { _exit(status && error_status ? error_status : status); }

void leave_saying(int status, const char *line) {
    if (atomic_exchange(&progress_shown, 0)) write_stderr(WIPE, strlen(WIPE));
    write_stderr(line, strlen(line));
    leave(status);
}

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

int join_within(pthread_t thread, double seconds) {
    struct timespec t; /* the wall clock's, as pthread_timedjoin_np wants it */
    clock_gettime(CLOCK_REALTIME, &t);
    const double until = (double)t.tv_sec + 1e-9 * (double)t.tv_nsec + seconds;
    t.tv_sec = (time_t)until;
    t.tv_nsec = (long)(1e9 * (until - (double)t.tv_sec));
    return !pthread_timedjoin_np(thread, NULL, &t);
}
