/* backend.c - linked into a program, makes the CPU its backend. */
#include "backends/backend.h"

const qemb_math qemb_backend_math = QEMB_MATH_F32;

const qemb_ops *qemb_backend_choose(qemb_math math) { return qemb_cpu_choose(NULL, math); }
