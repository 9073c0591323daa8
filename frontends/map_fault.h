/* map_fault.h - mapped files that are truncated under a running program. */
#ifndef QEMB_MAP_FAULT_H
#define QEMB_MAP_FAULT_H

#include <stddef.h>

/* From here on, a read of these bytes that fails (SIGBUS: the file was truncated, or its disk
 * fails) ends the process with STATUS_MODEL and a line that names path. Other faults end it as they
 * did. At most 32 maps at a time are known; further ones are not. Thread-safe. */
void map_fault_watch(const void *map, size_t bytes, const char *path);
/* The same of every read of this thread until map_fault_opening(NULL), for a function that maps a
 * file and reads it before it returns the map. */
void map_fault_opening(const char *path);
void map_fault_forget(const void *map); /* before munmap; map may be NULL */

#endif
