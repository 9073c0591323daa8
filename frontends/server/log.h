/* log.h - the log: one JSON line per event on standard error. */
#ifndef QEMB_LOG_H
#define QEMB_LOG_H

#include <stdint.h>

/* Writes {"time":...,"level":level,"event":event,FIELDS}. fmt formats FIELDS: JSON members without
 * braces, as "\"port\":8080", or "". If standard error does not take the line, drops it: logging
 * never blocks. */
void log_line(const char *level, const char *event, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Warns if everybody may read the file of a secret that `option` names. */
void log_if_readable(const char *option, int fd);
/* The number of dropped lines. */
uint64_t log_lines_lost(void);

#endif
