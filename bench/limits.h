/* limits.h - the highest rates of this machine, measured. */
#ifndef BENCH_LIMITS_H
#define BENCH_LIMITS_H

#include "measure.h"

#include "qemb.h"

/* Measures and prints all rates that this CPU has. `read` reads the weights of f. */
void limits_measure(const qemb_file *f);
/* Multiply-adds, counted as two operations. A table's: of the instruction that it multiplies with,
 * and on the tile unit by the number of instructions that a product takes. A library's: of the
 * fastest instruction that this CPU has for the arithmetic. */
const limit *limit_of(const qemb_ops *table);
const limit *limit_of_library(qemb_math math);
const limit *limit_read(void);
/* Measures and prints `read` of other memory, p (bytes), aligned to 8; limit_read is that from here
 * on. */
void limits_measure_read(const void *p, size_t bytes);
/* Some microseconds of the tile unit, for measure_gate. NULL: there is none, or it may not be
 * used. */
void (*limits_probe(void))(void);

#endif
