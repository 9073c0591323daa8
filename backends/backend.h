/* backend.h - the backend that a program is linked with: backends/cpu/backend.c or
 * backends/cuda/backend.c defines both names. */
#ifndef BACKEND_H
#define BACKEND_H

#include "qemb.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Its table for --math, or NULL. */
const qemb_ops *qemb_backend_choose(qemb_math math);
extern const qemb_math qemb_backend_math; /* its default arithmetic */

#ifdef __cplusplus
}
#endif
#endif
