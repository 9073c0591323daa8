/* spied_tables.h - the table of ops under test, loops over tables, and what a model gives to the
 * ops. For Criterion tests of whole models; each file has its own. */
#ifndef SPIED_TABLES_H
#define SPIED_TABLES_H

#include "emulated_amx.h"
#include "support.h"

#include <criterion/criterion.h>

/* The table under test, and loops over all tables that this CPU can run, and over these and the
 * emulated ones. With sanitizers test_amx and test_ops run the emulated ones: whole models would
 * take minutes. */
static const qemb_ops *ops = &qemb_cpu_ops;
#define FOR_CPU_TABLES for (int o = 0; (ops = qemb_cpu_table(o)); o++)
#ifdef __SANITIZE_ADDRESS__
#define FOR_TABLES FOR_CPU_TABLES
#else
#define FOR_TABLES for (int o = 0; (ops = test_table(o)); o++)
#endif

static inline qemb_model *open_with(const qemb_file *f, const qemb_ops *table, qemb_options opt) {
    qemb_model *m;
    qemb_err err;
    cr_assert_eq(qemb_open(&m, f, table, &opt, &err), 0, "%s", err.msg);
    return m;
}

/* The batch that `ops` was given last, and the memory that it was asked for. */
static qemb_packed_batch seen;
static size_t arena_asked;

static inline int spy_begin(qemb_backend *be, const qemb_packed_batch *b) {
    seen = *b;
    return ops->begin(be, b);
}

static inline void *spy_arena(qemb_backend *be, size_t bytes, qemb_err *err) {
    arena_asked = bytes;
    return ops->arena(be, bytes, err);
}

/* A model over `ops` that sets them. */
static inline qemb_model *open_spied(const qemb_file *f, qemb_options opt) {
    static qemb_ops spy;
    spy = *ops;
    spy.begin = spy_begin, spy.arena = spy_arena;
    return open_with(f, &spy, opt);
}

#endif
