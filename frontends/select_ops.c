/* select_ops.c - selects the ops table by --cpu and --math. The tables are those of the backend
 * that the program is linked with; --cpu selects among the CPU's in every program. */
#include "select_ops.h"

#include "backends/backend.h"
#include "console.h"

#include <stdio.h>
#include <string.h>

enum { N_MATHS = 6 };
const char *const math_names[N_MATHS + 1] = {"f32",  "bf16", "int16",
                                             "int8", "fp8",  "f16"}; /* by qemb_math */

const char *math_name(qemb_math math) { return math_names[math]; }

static const qemb_ops *choose(const char *cpu, qemb_math math) {
    return cpu ? qemb_cpu_choose(cpu, math) : qemb_backend_choose(math);
}

/* What --cpu stands for without --math: a table's name for its arithmetic, instructions for f32. */
static qemb_math math_of_cpu(const char *cpu) {
    for (int i = 0; qemb_cpu_table(i); i++)
        if (!strcmp(cpu, qemb_cpu_table(i)->name)) return qemb_cpu_table(i)->math;
    return QEMB_MATH_F32;
}

static void list(char *s, size_t size, const char *name) {
    const size_t n = strlen(s);
    snprintf(s + n, size - n, "%s%s", n ? ", " : "", name);
}

static const qemb_ops *no_such_cpu(const char *cpu, qemb_err *err) {
    char want[300] = "";
    for (int i = 0; qemb_cpu_table(i); i++) list(want, sizeof want, qemb_cpu_table(i)->name);
    qemb_fail(err, "usage", "--cpu: not on this machine (got %.40s, want %s)", cpu, want);
    return NULL;
}

/* what: what is wrong with it */
static const qemb_ops *no_such_math(const char *what, const char *cpu, const char *math,
                                    qemb_err *err) {
    char want[80] = "";
    for (int m = 0; m < N_MATHS; m++)
        if (choose(cpu, (qemb_math)m)) list(want, sizeof want, math_names[m]);
    qemb_fail(err, "usage", "--math: %s %s%.40s (got %.40s, want %s)", what,
              cpu ? "--cpu " : "this program on this machine", cpu ? cpu : "", math, want);
    return NULL;
}

const qemb_ops *select_ops(const char *cpu, const char *math, qemb_err *err) {
    int m = 0;
    /* int8 has the largest error: every table of that name would do */
    if (cpu && !qemb_cpu_choose(cpu, QEMB_MATH_INT8)) return no_such_cpu(cpu, err);
    if (!math) math = math_names[cpu ? math_of_cpu(cpu) : qemb_backend_math];
    while (m < N_MATHS && strcmp(math, math_names[m])) m++;
    const qemb_ops *found = m < N_MATHS ? choose(cpu, (qemb_math)m) : NULL;
    if (found) return found;
    const int of_cpu = cpu && m <= QEMB_MATH_INT8;
    return no_such_math(of_cpu ? "a smaller error than that of" : "not with", cpu, math, err);
}
