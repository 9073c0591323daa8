/* select_ops.c - selects the ops table by --cpu and --math. The tables are those of the backend
 * that the program is linked with; --cpu selects among the CPU's in every program. */
#include "select_ops.h"

#include "backends/backend.h"
#include "console.h"

#include <stdio.h>
#include <string.h>

static const char *const math_names[] = {"f32",  "bf16", "int16",
                                         "int8", "fp8",  "f16"}; /* qemb_math */

const char *math_name(qemb_math math) { return math_names[math]; }

/* Appends name to the list s, unless s already ends in it. */
static void list(char *s, size_t size, const char *name) {
    const size_t n = strlen(s), m = strlen(name);
    if (n >= m && !strcmp(s + n - m, name)) return;
    snprintf(s + n, size - n, "%s%s", n ? ", " : "", name);
}

static const qemb_ops *no_such_cpu(const char *cpu, qemb_err *err) {
    char want[80] = "";
    for (int i = 0; qemb_cpu_table(i); i++)
        if (qemb_cpu_table(i)->math == QEMB_MATH_F32)
            list(want, sizeof want, qemb_cpu_table(i)->name);
    qemb_fail(err, "usage", "--cpu: not on this machine (got %.40s, want %s)", cpu, want);
    return NULL;
}

static const qemb_ops *no_such_math(const char *cpu, const char *math, qemb_err *err) {
    char want[80] = "";
    for (int m = 0; m < LENGTH(math_names); m++)
        for (int i = 0; qemb_backend_table(i); i++)
            if (cpu ? qemb_cpu_choose(cpu, (qemb_math)m) != NULL
                    : qemb_backend_table(i)->math == (qemb_math)m)
                list(want, sizeof want, math_names[m]);
    qemb_fail(err, "usage", "--math: not with this %s (got %.40s, want %s)",
              cpu ? "--cpu" : "program on this machine", math, want);
    return NULL;
}

const qemb_ops *select_ops(const char *cpu, const char *math, qemb_err *err) {
    const qemb_ops *found = NULL;
    int m = cpu ? QEMB_MATH_F32 : qemb_backend_math;
    if (cpu && !qemb_cpu_choose(cpu, QEMB_MATH_F32)) return no_such_cpu(cpu, err);
    if (math)
        for (m = 0; m < LENGTH(math_names) && strcmp(math, math_names[m]);) m++;
    if (m == LENGTH(math_names)) return no_such_math(cpu, math, err);
    if (cpu) found = qemb_cpu_choose(cpu, (qemb_math)m);
    for (int i = 0; !cpu && qemb_backend_table(i); i++) /* the last one is the fastest */
        if (qemb_backend_table(i)->math == (qemb_math)m) found = qemb_backend_table(i);
    return found ? found : no_such_math(cpu, math, err);
}
