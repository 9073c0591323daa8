/* limits.h - the highest rates of this machine, measured. */
#ifndef BENCH_LIMITS_H
#define BENCH_LIMITS_H

#include "qemb.h"

typedef struct {
    const char *name;
    double rate; /* operations or bytes per second by all threads; 0: not on this CPU */
} limit;

/* Measures and prints all rates that this CPU has. `read` reads the weights of f. */
void limits_measure(const qemb_file *f);
const limit *limit_of(qemb_math math); /* multiply-adds, counted as two operations */
const limit *limit_read(void);

#endif
