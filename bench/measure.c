/* measure.c - timing calls; see measure.h. A run of bench has one number of threads and one
 * clock. */
#include "measure.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MIN_SECONDS 0.3
#define MAX_SECONDS 20.0
enum { FEW_ROUNDS = 3, MIN_ROUNDS = 7, MAX_ROUNDS = 500 };

static int n_threads = 1, with_cpu_time;

void measure_open(int threads, int cpu_time) { n_threads = threads, with_cpu_time = cpu_time; }

int measure_threads(void) { return n_threads; }

double measure_now(void) {
    struct timespec t;
    clock_gettime(with_cpu_time ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return ((double)t.tv_sec + 1e-9 * (double)t.tv_nsec) / (with_cpu_time ? n_threads : 1);
}

void die(const char *what) {
    fprintf(stderr, "bench: %s\n", what);
    exit(1);
}

void *zeroed(size_t bytes) {
    void *p = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!p) die("out of memory");
    return memset(p, 0, bytes); /* touches every page */
}

static int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static quantiles quantiles_of(double *t, int n) {
    qsort(t, (size_t)n, sizeof *t, by_value);
    return (quantiles){t[n / 2], t[n / 10], t[n - 1 - n / 10]};
}

static double seconds_of(timed_call c, int i) {
    const double start = measure_now();
    c.run(c.arg, i);
    return measure_now() - start;
}

/* Whether another round follows after n rounds. */
static int more(int n, double seconds) {
    if (n < FEW_ROUNDS || seconds < MIN_SECONDS) return n < MAX_ROUNDS;
    return n < MIN_ROUNDS && seconds < MAX_SECONDS;
}

quantiles measure(void (*run)(void *arg, int i), void *arg) {
    const timed_call c = {run, arg};
    double t[MAX_ROUNDS];
    int n = 0;
    run(arg, 0);
    for (double begin = measure_now(); more(n, measure_now() - begin);)
        t[n] = seconds_of(c, n + 1), n++;
    return quantiles_of(t, n);
}

/* The first SETTLE_SECONDS of a turn are not timed: idle threads of the other call spin for some
 * milliseconds (OpenMP's do), and threads that were asleep wake up on one core. */
#define SETTLE_SECONDS 0.02
static double turn(timed_call c, int i) {
    nanosleep(&(struct timespec){0, 10000000}, NULL);
    const double begin = measure_now();
    do c.run(c.arg, i);
    while (measure_now() - begin < SETTLE_SECONDS);
    return seconds_of(c, i + 1);
}

void measure_turns(timed_call a, timed_call b, quantiles *ta, quantiles *tb, quantiles *ratio) {
    double t[3][MAX_ROUNDS];
    int n = 0;
    a.run(a.arg, 0), b.run(b.arg, 0);
    for (double begin = measure_now(); more(n, measure_now() - begin); n++) {
        t[0][n] = turn(a, n + 1), t[1][n] = turn(b, n + 1);
        t[2][n] = t[1][n] / t[0][n];
    }
    *ta = quantiles_of(t[0], n), *tb = quantiles_of(t[1], n), *ratio = quantiles_of(t[2], n);
}

void row(const char *group, const char *name, int n, quantiles s, double work, double unit_size,
         const char *unit, const char *limit, double limit_rate) {
    printf("%s,%s,%d,%.4g,%.4g,%.4g,%s,", group, name, n, work / s.median / unit_size,
           work / s.p90 / unit_size, work / s.p10 / unit_size, unit);
    if (limit_rate > 0)
        printf("%.1f,%s\n", 100 * work / s.median / limit_rate, limit);
    else
        printf(",\n");
    fflush(stdout);
}
