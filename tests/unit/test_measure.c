/* test_measure.c - which calls bench/measure.c counts. A fake unit stands for the tile unit: it
 * spins for a fixed time, or four times as long in a slow moment. No test looks at a time. */
#include "bench/measure.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <time.h>

static int slow;   /* so many units from now on are slow; a probe has two, one to warm up */
static int units;  /* run so far */
static int period; /* the last of so many calls is followed by a slow probe; 0: none is */
static int early;  /* calls before this one are among slow probes only */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void spin(double seconds) {
    const double end = now() + seconds;
    while (now() < end) continue;
}

static void fake_unit(void) {
    const double seconds = slow > 0 ? 400e-6 : 100e-6;
    slow -= slow > 0;
    units++;
    spin(seconds);
}

static void call(void *arg, int i) {
    int *calls = arg;
    (*calls)++;
    if (i < early)
        slow = 1 << 30;
    else
        slow = period && i % period == period - 1 ? 2 : 0;
}

/* Of three pairs two have a slow probe at their call of b, and there this one takes longer. */
static void other_call(void *arg, int i) {
    (void)arg;
    spin(i % 3 == 1 ? 0 : 500e-6);
}

static void open_gate(int with_period) {
    measure_open(1, 0);
    period = with_period;
    measure_gate(fake_unit);
}

Test(measure, all_calls_count_without_a_gate) {
    int calls = 0;
    measure_open(1, 0);
    period = 1;
    const quantiles q = measure(call, &calls);
    cr_assert(q.counted == q.made && q.made == calls - 1 && q.made >= 3); /* one to warm up */
    cr_assert(isfinite(q.median) && units == 0);
    cr_assert_str_eq(counted(q), "");
}

Test(measure, a_call_before_a_slow_probe_does_not_count) {
    int calls = 0;
    char text[40];
    open_gate(2);
    const quantiles q = measure(call, &calls);
    /* Other programs may make more calls slow, never fewer. */
    cr_assert(2 * q.counted <= q.made + 1, "%d of %d", q.counted, q.made);
    cr_assert_eq(isfinite(q.median), q.counted >= 3);
    cr_assert(!isfinite(q.median) || q.i % 2 == 0, "call %d", q.i);
    snprintf(text, sizeof text, "%d/%d", q.counted, q.made);
    cr_assert_str_eq(counted(q), text);
}

Test(measure, no_figure_without_quiet_calls) {
    int calls = 0;
    open_gate(1);
    const quantiles q = measure(call, &calls);
    cr_assert(q.counted == 0 && q.made == MEASURE_ROUNDS, "%d of %d", q.counted, q.made);
    cr_assert(isnan(q.median) && isnan(q.p10) && isnan(q.p90));
}

/* A best probe that comes late judges the calls before it, too. */
Test(measure, a_later_best_drops_earlier_calls) {
    int calls = 0;
    early = 50, slow = 1 << 30;
    open_gate(0);
    const quantiles q = measure(call, &calls);
    if (q.made < early) cr_skip_test("too busy a machine: the time was over before");
    cr_assert(q.counted <= q.made - (early - 1), "%d of %d", q.counted, q.made);
    cr_assert(!isfinite(q.median) || q.i >= early, "call %d", q.i);
}

/* Turn k calls b as number k to settle and as number k + 1 to be timed. */
Test(measure, a_pair_counts_if_both_calls_do) {
    int b = 0;
    quantiles ta, tb, ratio;
    open_gate(3);
    measure_turns((timed_call){other_call, NULL}, (timed_call){call, &b}, &ta, &tb, &ratio);
    cr_assert(ta.counted == tb.counted && tb.counted == ratio.counted);
    cr_assert(ta.made == ratio.made && 3 * ratio.counted <= ratio.made + 2);
    cr_assert(!isfinite(ratio.median) || ratio.i % 3 == 0, "pair %d", ratio.i);
    cr_assert(!isfinite(ta.median) || ta.i % 3 == 1, "call %d of a", ta.i);
}
