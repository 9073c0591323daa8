/* log.h - the log: a line of JSON per event, on standard error. */
#ifndef QEMB_LOG_H
#define QEMB_LOG_H

#include <stdint.h>

/* {"time":...,"level":level,"event":event, and the fields}: one line on stderr. Each field is a
 * JSON member without braces, as "\"port\":8080"; "" for none. A reader that does not read costs
 * lines, never time. */
void log_line(const char *level, const char *event, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/* Lines that standard error did not take. */
uint64_t log_lines_lost(void);

#endif
