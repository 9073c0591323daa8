/* measure.h - timing calls, and the rows of the CSV that every benchmark prints. */
#ifndef BENCH_MEASURE_H
#define BENCH_MEASURE_H

#include <stddef.h>

/* To be called first. threads: of everything that is measured. cpu_time: 1 measures the CPU time of
 * a thread instead of the time that passes. */
void measure_open(int threads, int cpu_time);
int measure_threads(void);
double measure_now(void); /* seconds */

void die(const char *what); /* says what is wrong and ends the program */
/* bytes of zeros aligned to 256, in memory already; ends the program if there are none. */
void *zeroed(size_t bytes);

typedef struct {
    double median, p10, p90;
} quantiles;

typedef struct {
    void (*run)(void *arg, int i); /* i = 0 to warm up, then 1, 2, ... */
    void *arg;
} timed_call;

/* Seconds of one call. */
quantiles measure(void (*run)(void *arg, int i), void *arg);
/* Seconds of two calls that take turns. *ratio: b's time by a's in the same round. */
void measure_turns(timed_call a, timed_call b, quantiles *ta, quantiles *tb, quantiles *ratio);

/* Prints a row: `work` per call as a rate in units of unit_size, and its share of the limit.
 * limit_rate 0: there is no limit. */
void row(const char *group, const char *name, int n, quantiles seconds, double work,
         double unit_size, const char *unit, const char *limit, double limit_rate);

#endif
