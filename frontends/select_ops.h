/* select_ops.h - --cpu and --math -> the table of ops that computes. */
#ifndef QEMB_SELECT_OPS_H
#define QEMB_SELECT_OPS_H

#include "qemb.h"

/* The table that --cpu and --math name. NULL stands for the program's default. Returns NULL with
 * code "usage" if this program or machine has no such table. */
const qemb_ops *select_ops(const char *cpu, const char *math, qemb_err *err);
const char *math_name(qemb_math math); /* as --math names it */

#endif
