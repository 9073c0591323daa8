/* table_support.h - for Criterion tests of single ops: backends, random numbers, memory that ends
 * where a page ends. */
#ifndef TABLE_SUPPORT_H
#define TABLE_SUPPORT_H

#include "support.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SLACK 1.01 /* of bounds to first order in U */

/* A backend for config c and batches of up to `rows` rows. */
static inline qemb_backend *backend(const qemb_ops *op, const qemb_config *c, int rows,
                                    int threads) {
    const qemb_options opt = {.batch_tokens = rows, .max_tokens = rows, .threads = threads};
    qemb_backend *be;
    qemb_err err;
    cr_assert_eq(op->open(&be, c, &opt, &err), 0, "%s: %s", op->name, err.msg);
    return be;
}

/* n random floats in +-scale. The caller frees. */
static inline void *numbers(rng *r, size_t n, double scale) {
    float *p = malloc(n * sizeof *p);
    rng_floats(r, p, n, scale);
    return p;
}

/* A copy that ends where a page ends, before one that cannot be touched; lives as long as the
 * test. */
static inline void *at_page_end(const void *from, size_t bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), n = (bytes + page - 1) / page * page;
    char *p = mmap(NULL, n + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert(p != MAP_FAILED && !mprotect(p + n, page, PROT_NONE));
    return memcpy(p + n - bytes, from, bytes);
}

#endif
