/* map_fault.c - mapped files that are truncated under a running program; see map_fault.h. A process
 * has one handler of SIGBUS, so the list of maps is static. */
#include "map_fault.h"

#include "console.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { MAPS = 32 };

typedef char message[512]; /* made before the fault: a handler may not format */

static struct {
    atomic_uintptr_t start; /* 0: unused. Set last and cleared first, for the handler */
    size_t bytes;
    message line;
} maps[MAPS];
static _Thread_local message opening; /* of the file that this thread opens; "": none */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* among those who write to maps */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void on_bus_error(int sig, siginfo_t *info, void *context) {
    (void)context;
    const uintptr_t at = (uintptr_t)info->si_addr;
    const int is_fault = info->si_code > 0; /* not a kill() */
    for (int i = 0; i < MAPS && is_fault; i++) {
        const uintptr_t start = atomic_load(&maps[i].start);
        if (start && at >= start && at - start < maps[i].bytes)
            leave_saying(STATUS_MODEL, maps[i].line);
    }
    if (is_fault && *opening) leave_saying(STATUS_MODEL, opening);
    signal(sig, SIG_DFL);
    raise(sig); /* when the handler has returned */
}

static void catch_bus_errors(void) {
    struct sigaction act = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO};
    sigaction(SIGBUS, &act, NULL);
}

static void describe(message line, const char *path) {
    const int n = snprintf(line, sizeof(message),
                           "%s: %.256s: cannot be read: truncated while it was in use, or its "
                           "disk fails",
                           console_name(), path);
    memcpy(put_printable(line, line, (size_t)n), "\n", 2);
}

void map_fault_opening(const char *path) {
    pthread_once(&once, catch_bus_errors);
    if (path)
        describe(opening, path);
    else
        *opening = 0;
}

void map_fault_watch(const void *map, size_t bytes, const char *path) {
    pthread_once(&once, catch_bus_errors);
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < MAPS && atomic_load(&maps[i].start)) i++;
    if (i < MAPS) {
        describe(maps[i].line, path);
        maps[i].bytes = bytes;
        atomic_store(&maps[i].start, (uintptr_t)map);
    }
    pthread_mutex_unlock(&lock);
}

void map_fault_forget(const void *map) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAPS && map; i++)
        if (atomic_load(&maps[i].start) == (uintptr_t)map) atomic_store(&maps[i].start, 0);
    pthread_mutex_unlock(&lock);
}
