/* progress.c - the progress line of a run; see cli.h. */
#include "cli.h"

#include "frontends/console.h"

#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

double per_second(uint64_t n, double seconds) { return seconds > 0 ? (double)n / seconds : 0; }

void progress_open(progress *p, int shown, uint64_t bytes) {
    *p = (progress){.shown = shown, .bytes = bytes, .start = seconds_now()};
}

int progress_wanted(const options *o) {
    return o->progress > 0 || (!o->progress && isatty(STDERR_FILENO) && !isatty(STDOUT_FILENO));
}

void progress_add(progress *p, uint64_t texts, uint64_t tokens, uint64_t bytes) {
    p->texts_before += texts, p->tokens_before += tokens, p->bytes_before += bytes;
}

void progress_show(progress *p, uint64_t texts, uint64_t tokens, uint64_t bytes) {
    const double t = seconds_now(), seconds = t - p->start;
    if (!p->shown || t - p->last < 0.1) return;
    p->last = t;
    char line[160];
    const int n = snprintf(line, sizeof line, "%s%" PRIu64 " texts, %.0f tokens/s", p->label,
                           texts + p->texts_before, per_second(tokens + p->tokens_before, seconds));
    bytes += p->bytes_before;
    if (p->bytes && bytes && bytes <= p->bytes) {
        const double left_bytes = (double)(p->bytes - bytes);
        const long left = (long)(seconds * left_bytes / (double)bytes + 0.5);
        snprintf(line + n, sizeof line - (size_t)n, ", %.0f %%, ETA %ld:%02ld:%02ld",
                 100 * (double)bytes / (double)p->bytes, left / 3600, left / 60 % 60, left % 60);
    }
    say_progress(line);
}
