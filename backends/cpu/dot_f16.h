/* dot_f16.h - scores of many vectors for one query: dot products of rows of halves. */
#ifndef CPU_DOT_F16_H
#define CPU_DOT_F16_H

#include "cpu.h"

enum { DOT_F16_LANES = 32 };

/* Numbers from one row to the next, for vectors of dim numbers. */
static inline int dot_f16_stride(int dim) { return round_up(dim, DOT_F16_LANES); }

/* scores (n) = rows (n, stride) q (stride). rows are halves, aligned to 64 bytes; q to 32. stride
 * is a multiple of DOT_F16_LANES; what a vector lacks to it is zero in rows and in q. */
typedef void dot_f16(float *scores, const float *q, const uint16_t *rows, size_t n, int stride);

typedef struct {
    const char *name;
    unsigned needs; /* as in cpu_table */
    dot_f16 *run;
} dot_f16_version;
/* All give the same bits; the last one that a CPU can run is its fastest. */
extern const dot_f16_version dot_f16_versions[];
extern const int n_dot_f16_versions;
/* This machine's fastest. */
dot_f16 *dot_f16_choose(void);

#endif
