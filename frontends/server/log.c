/* log.c - the log; see log.h. A process has one standard error, so the lock and the count of lost
 * lines are static. */
#include "log.h"

#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static atomic_ullong lost;

void log_if_readable(const char *option, int fd) {
    struct stat st;
    if (!fstat(fd, &st) && S_ISREG(st.st_mode) && st.st_mode & S_IROTH)
        log_line("warning", "readable_secret",
                 "\"option\":\"--%s\",\"reason\":\"every user of this machine can read the file "
                 "(want chmod o-r)\"",
                 option);
}

uint64_t log_lines_lost(void) { return atomic_load(&lost); }

void log_line(const char *level, const char *event, const char *fmt, ...) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    char line[2048]; /* below PIPE_BUF: a write to a pipe is atomic */
    struct timespec t;
    struct tm tm;
    clock_gettime(CLOCK_REALTIME, &t);
    gmtime_r(&t.tv_sec, &tm);
    size_t n = strftime(line, sizeof line, "{\"time\":\"%Y-%m-%dT%H:%M:%S", &tm);
    n += (size_t)snprintf(line + n, sizeof line - n, ".%03ldZ\",\"level\":\"%s\",\"event\":\"%s\"",
                          t.tv_nsec / 1000000, level, event);
    if (*fmt) {
        line[n++] = ',';
        va_list ap;
        va_start(ap, fmt);
        const int m = vsnprintf(line + n, sizeof line - n, fmt, ap);
        va_end(ap);
        if (m < 0 || n + (size_t)m + 2 >= sizeof line) { /* a cut line is not JSON */
            atomic_fetch_add(&lost, 1);
            return;
        }
        n += (size_t)m;
    }
    line[n++] = '}';
    line[n++] = '\n';
    pthread_mutex_lock(&lock);
    struct pollfd p = {.fd = STDERR_FILENO, .events = POLLOUT};
    if (poll(&p, 1, 0) != 1 || !(p.revents & POLLOUT) ||
        write(STDERR_FILENO, line, n) != (ssize_t)n)
        atomic_fetch_add(&lost, 1);
    pthread_mutex_unlock(&lock);
}
