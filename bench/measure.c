/* measure.c - timing calls; see measure.h. A run of bench has one number of threads and one
 * clock. */
#include "measure.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MIN_SECONDS   0.3
#define MAX_SECONDS   20.0
#define GATED_SECONDS 60.0 /* of a measurement that finds too few quiet calls */
enum { FEW_ROUNDS = 3, MIN_ROUNDS = 7, MAX_ROUNDS = MEASURE_ROUNDS };

static int n_threads = 1, with_cpu_time;

void measure_open(int threads, int cpu_time) { n_threads = threads, with_cpu_time = cpu_time; }

int measure_threads(void) { return n_threads; }

static double seconds_on(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double measure_now(void) {
    return with_cpu_time ? seconds_on(CLOCK_PROCESS_CPUTIME_ID) / n_threads
                         : seconds_on(CLOCK_MONOTONIC);
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

/* Calls that cannot be judged yet by the best probe of the run, which a later one may beat: each
 * with the slower of the probes around it. */
typedef struct {
    double seconds, probe;
    int i;
} timing;

/* ---- the gate -------------------------------------------------------------------------------- */

/* Quiet: a probe took at most this much longer than the shortest. In a slow moment it takes twice
 * to four times as long; quiet ones differ by some per cent. */
#define QUIET         1.15
#define FIRST_SECONDS 0.2 /* of probes that look for the highest speed */

static struct {
    void (*unit)(void);
    atomic_int started;
    pthread_t *threads; /* (threads - 1) */
    double *seconds;    /* (threads) of the last probe */
    double best;
} gate;

/* All run at once: each waits until all have started. The first run of the unit is not timed: the
 * kernel makes room for a thread's tiles when it first uses one. */
static void *probe_thread(void *seconds) {
    gate.unit();
    atomic_fetch_add(&gate.started, 1);
    while (atomic_load(&gate.started) < n_threads) continue;
    const double start = seconds_on(CLOCK_MONOTONIC);
    gate.unit();
    *(double *)seconds = seconds_on(CLOCK_MONOTONIC) - start;
    return NULL;
}

/* Seconds of the slowest thread; 0 without a gate. */
static double probe(void) {
    double slowest = 0;
    if (!gate.unit) return 0;
    atomic_store(&gate.started, 0);
    /* New threads, since those of a pool would spin into the call that is timed. */
    for (int i = 1; i < n_threads; i++)
        if (pthread_create(&gate.threads[i - 1], NULL, probe_thread, &gate.seconds[i]))
            die("a probe: no thread");
    probe_thread(&gate.seconds[0]);
    for (int i = 1; i < n_threads; i++) pthread_join(gate.threads[i - 1], NULL);
    for (int i = 0; i < n_threads; i++) slowest = fmax(slowest, gate.seconds[i]);
    gate.best = fmin(gate.best, slowest);
    return slowest;
}

static int is_quiet(double probe_seconds) { return probe_seconds <= QUIET * gate.best; }

/* Until it is quiet, or `end` on the clock has come */
static void wait_for_quiet(double end) {
    while (!is_quiet(probe()) && seconds_on(CLOCK_MONOTONIC) < end)
        nanosleep(&(struct timespec){0, 300000}, NULL);
}

void measure_gate(void (*unit)(void)) {
    gate.unit = unit;
    gate.best = INFINITY;
    gate.seconds = zeroed(sizeof *gate.seconds * (size_t)n_threads);
    gate.threads = zeroed(sizeof *gate.threads * (size_t)n_threads);
    for (double end = seconds_on(CLOCK_MONOTONIC) + FIRST_SECONDS;
         seconds_on(CLOCK_MONOTONIC) < end;)
        probe();
}

/* ---- calls ----------------------------------------------------------------------------------- */

static int by_seconds(const void *a, const void *b) {
    return by_value(&((const timing *)a)->seconds, &((const timing *)b)->seconds);
}

/* Drops the calls that were not quiet, by the best probe known now. */
static int drop_loud(timing *t, int n) {
    int kept = 0;
    for (int i = 0; i < n; i++)
        if (is_quiet(t[i].probe)) t[kept++] = t[i];
    return kept;
}

static quantiles quantiles_of(timing *t, int n, int made) {
    if (n < FEW_ROUNDS) return (quantiles){NAN, NAN, NAN, n, made, 0};
    qsort(t, (size_t)n, sizeof *t, by_seconds);
    return (quantiles){t[n / 2].seconds, t[n / 10].seconds, t[n - 1 - n / 10].seconds, n, made,
                       t[n / 2].i};
}

/* Call i, between two probes */
static timing timed(timed_call c, int i) {
    const double before = probe(), start = measure_now();
    c.run(c.arg, i);
    const double seconds = measure_now() - start;
    return (timing){seconds, fmax(before, probe()), i};
}

/* Whether another round follows after n that count. end: when a gated measurement gives up. */
static int more(int n, double seconds, double end) {
    if (gate.unit && seconds_on(CLOCK_MONOTONIC) >= end) return 0;
    if (n < FEW_ROUNDS || seconds < MIN_SECONDS) return n < MAX_ROUNDS;
    return n < MIN_ROUNDS && seconds < MAX_SECONDS;
}

quantiles measure(void (*run)(void *arg, int i), void *arg) {
    timing t[MAX_ROUNDS + 1];
    int n = 0, made = 0;
    run(arg, 0);
    const double begin = measure_now(), end = seconds_on(CLOCK_MONOTONIC) + GATED_SECONDS;
    while (made < MAX_ROUNDS && more(n, measure_now() - begin, end)) {
        wait_for_quiet(end);
        made++;
        t[n++] = timed((timed_call){run, arg}, made);
        n = drop_loud(t, n);
    }
    return quantiles_of(t, n, made);
}

/* The first SETTLE_SECONDS of a turn are not timed: idle threads of the other call spin for some
 * milliseconds (OpenMP's do), and threads that were asleep wake up on one core. */
#define SETTLE_SECONDS 0.02
static timing turn(timed_call c, int i) {
    nanosleep(&(struct timespec){0, 10000000}, NULL);
    const double begin = measure_now();
    do c.run(c.arg, i);
    while (measure_now() - begin < SETTLE_SECONDS);
    return timed(c, i + 1);
}

void measure_turns(timed_call a, timed_call b, quantiles *ta, quantiles *tb, quantiles *ratio) {
    timing t[3][MAX_ROUNDS + 1];
    int n = 0, made = 0;
    a.run(a.arg, 0), b.run(b.arg, 0);
    const double begin = measure_now(), end = seconds_on(CLOCK_MONOTONIC) + GATED_SECONDS;
    while (made < MAX_ROUNDS && more(n, measure_now() - begin, end)) {
        made++;
        wait_for_quiet(end);
        t[0][n] = turn(a, made);
        wait_for_quiet(end);
        t[1][n] = turn(b, made);
        /* a pair counts if both calls do */
        const double pair = fmax(t[0][n].probe, t[1][n].probe);
        t[2][n] = (timing){t[1][n].seconds / t[0][n].seconds, pair, made};
        t[0][n].probe = t[1][n].probe = pair;
        const int all = n + 1;
        for (int k = 0; k < 3; k++) n = drop_loud(t[k], all);
    }
    *ta = quantiles_of(t[0], n, made), *tb = quantiles_of(t[1], n, made);
    *ratio = quantiles_of(t[2], n, made);
}

/* ---- rows ------------------------------------------------------------------------------------ */

const char *counted(quantiles s) {
    static char text[40];
    if (!gate.unit) return "";
    snprintf(text, sizeof text, "%d/%d", s.counted, s.made);
    return text;
}

/* Numbers that are not known are left out. */
static void print_number(double v, const char *format) {
    if (isfinite(v)) printf(format, v);
    putchar(',');
}

void row(const char *group, const char *name, int n, quantiles s, double work, double unit_size,
         const char *unit, const limit *l) {
    printf("%s,%s,%d,", group, name, n);
    print_number(work / s.median / unit_size, "%.4g");
    print_number(work / s.p90 / unit_size, "%.4g");
    print_number(work / s.p10 / unit_size, "%.4g");
    printf("%s,", unit);
    print_number(l && l->rate > 0 ? 100 * work / s.median / l->rate : NAN, "%.1f");
    printf("%s,%s\n", l && l->rate > 0 ? l->name : "", counted(s));
    fflush(stdout);
}

void row_ratio(const char *group, const char *name, int n, quantiles ratio) {
    printf("%s,%s,%d,", group, name, n);
    print_number(100 * ratio.median, "%.1f");
    print_number(100 * ratio.p10, "%.1f");
    print_number(100 * ratio.p90, "%.1f");
    printf("%%,,,%s\n", counted(ratio));
    fflush(stdout);
}
