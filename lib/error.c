/* error.c - qemb_err: a code for programs and one line for people. */
#include "qemb.h"

#include <stdarg.h>
#include <stdio.h>

int qemb_fail(qemb_err *err, const char *code, const char *fmt, ...) {
    if (err) {
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(err->msg, sizeof err->msg, fmt, ap);
        va_end(ap);
        err->code = code;
    }
    return -1;
}
