/* measure.h - timing calls, and the rows of the CSV that every benchmark prints. */
#ifndef BENCH_MEASURE_H
#define BENCH_MEASURE_H

#include <stddef.h>

/* To be called first. threads: of everything that is measured. cpu_time: 1 measures the CPU time of
 * a thread instead of the time that passes. */
void measure_open(int threads, int cpu_time);
/* From here on only those calls count that a probe precedes and follows at nearly the highest speed
 * that probes of this run had. A probe: all threads run `unit`, some microseconds, at once. A
 * virtual machine may drop to a quarter of its speed for milliseconds to minutes; nothing but speed
 * itself shows it. A call of seconds may still have slow moments between its two probes. */
void measure_gate(void (*unit)(void));
int measure_threads(void);
double measure_now(void); /* seconds */

void die(const char *what); /* says what is wrong and ends the program */
/* bytes of zeros aligned to 256, in memory already; ends the program if there are none. */
void *zeroed(size_t bytes);

typedef struct {
    double median, p10, p90; /* NAN: too few calls counted */
    int counted, made;       /* calls, in turns pairs of calls */
    int i;                   /* of the call that took the median */
} quantiles;

typedef struct {
    const char *name, *unit;
    double rate; /* operations or bytes per second by all threads; 0: not on this CPU */
} limit;

typedef struct {
    void (*run)(void *arg, int i); /* i = 0 to warm up, then 1, 2, ... */
    void *arg;
} timed_call;

enum { MEASURE_ROUNDS = 500 }; /* the most calls that are timed, numbered from 1 */

/* Seconds of one call. */
quantiles measure(void (*run)(void *arg, int i), void *arg);
/* Seconds of two calls that take turns. *ratio: b's time by a's in the same round. */
void measure_turns(timed_call a, timed_call b, quantiles *ta, quantiles *tb, quantiles *ratio);

/* The last column of a row: how many calls counted of those made, "7/9". Empty without a gate. */
const char *counted(quantiles s);
/* Prints a row: `work` per call as a rate in units of unit_size, and its share of the limit (NULL:
 * there is none). */
void row(const char *group, const char *name, int n, quantiles seconds, double work,
         double unit_size, const char *unit, const limit *l);
/* Prints a row of per cent. */
void row_ratio(const char *group, const char *name, int n, quantiles ratio);

#endif
