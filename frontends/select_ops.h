/* select_ops.h - selects the ops table by --cpu and --math. */
#ifndef QEMB_SELECT_OPS_H
#define QEMB_SELECT_OPS_H

#include "qemb.h"

/* Returns the table for the values of --cpu and --math; NULL: not given. Returns NULL with code
 * "usage" if this program or this machine has no such table. */
const qemb_ops *select_ops(const char *cpu, const char *math, qemb_err *err);
const char *math_name(qemb_math math); /* as --math names it */
extern const char *const math_names[]; /* by qemb_math, then NULL */

#endif
