/* cpu_count.c - how many CPUs this process may use at a time.
 *
 * Its affinity says on which CPUs its threads may run, and the quotas of its control groups how
 * much of their time it gets. With more threads than that, all of them stand still for the rest of
 * each period.
 */
#include "cpu.h"

#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The CPUs of this process's affinity; 1 if there is no memory to ask for them. */
static int affinity(void) {
    int n = 0;
    for (int cpus = CPU_SETSIZE; !n && cpus <= 1 << 20; cpus *= 2) { /* too few of them: an error */
        const size_t bytes = CPU_ALLOC_SIZE(cpus);
        cpu_set_t *set = CPU_ALLOC(cpus);
        if (set && !sched_getaffinity(0, bytes, set)) n = CPU_COUNT_S(bytes, set);
        CPU_FREE(set);
    }
    return max_int(n, 1);
}

/* ---- control groups -------------------------------------------------------------------------- */

enum { LINE = 8192 }; /* longer lines are cut: a group with such a path has no quota for us */

/* The numbers in folder/name, up to 2. Returns how many there are; 0 if there is no such file. */
static int read_numbers(long long *x, const char *folder, const char *name) {
    char path[2 * LINE + 64];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "re");
    if (!f) return 0;
    const int n = fscanf(f, "%lld %lld", &x[0], &x[1]);
    fclose(f);
    return max_int(n, 0);
}

/* A group's quota in CPUs, rounded up; INT_MAX: none, which the files write as "max" or -1. */
static int quota_of_group(const char *folder) {
    long long x[2] = {0, 0}; /* time, and the period in which the group may use it */
    if (read_numbers(x, folder, "cpu.max") < 2 &&
        (!read_numbers(&x[0], folder, "cpu.cfs_quota_us") ||
         !read_numbers(&x[1], folder, "cpu.cfs_period_us")))
        return INT_MAX;
    if (x[0] <= 0 || x[1] <= 0 || x[0] / x[1] >= INT_MAX) return INT_MAX;
    return (int)((x[0] - 1) / x[1] + 1);
}

/* Whether the list, separated by commas, has the word "cpu". */
static int has_cpu(const char *list) {
    for (size_t n; *list; list += n + (list[n] == ',')) {
        n = strcspn(list, ",");
        if (n == 3 && !strncmp(list, "cpu", n)) return 1;
    }
    return 0;
}

/* mountinfo writes a space of a path as \040, and others likewise. */
static void unescape(char *s) {
    char *to = s;
    for (unsigned c; *s; to++)
        if (*s == '\\' && sscanf(s + 1, "%3o", &c) == 1)
            *to = (char)c, s += 4;
        else
            *to = *s++;
    *to = 0;
}

/* The least quota of group `path` and of all above it, in a hierarchy whose group `top` is mounted
 * at `mount`. A group that is not below `top` is that of another namespace: then `top` alone. */
static int quota_of_path(const char *root, const char *mount, const char *top, const char *path) {
    char folder[2 * LINE];
    const size_t n = strcmp(top, "/") ? strlen(top) : 0;
    const int below = !strncmp(path, top, n) && path[n] == '/' && !strstr(path, "/..");
    const size_t first = (size_t)snprintf(folder, sizeof folder, "%s%s", root, mount);
    if (first >= sizeof folder) return INT_MAX;
    if (below) snprintf(folder + first, sizeof folder - first, "%s", path + n);
    for (int least = INT_MAX;;) {
        least = min_int(least, quota_of_group(folder));
        char *slash = strrchr(folder + first, '/');
        if (!slash) return least;
        *slash = 0;
    }
}

/* The same for one line of /proc/self/cgroup, "number:controllers:path", of the version that `type`
 * names: the second has a line without controllers. */
static int quota_of_line(const char *root, const char *type, const char *path) {
    char line[LINE], top[LINE], mount[LINE], kind[LINE], options[LINE];
    int least = INT_MAX;
    snprintf(line, sizeof line, "%s/proc/self/mountinfo", root);
    FILE *f = fopen(line, "re");
    while (f && fgets(line, sizeof line, f)) {
        const char *rest = strstr(line, " - ");
        if (!rest || sscanf(line, "%*s %*s %*s %s %s", top, mount) != 2 ||
            sscanf(rest, " - %s %*s %s", kind, options) != 2 || strcmp(kind, type) ||
            (!strcmp(type, "cgroup") && !has_cpu(options)))
            continue;
        unescape(top), unescape(mount);
        least = min_int(least, quota_of_path(root, mount, top, path));
    }
    if (f) fclose(f);
    return least;
}

int cpu_quota(const char *root) {
    char line[LINE];
    int least = INT_MAX;
    snprintf(line, sizeof line, "%s/proc/self/cgroup", root);
    FILE *f = fopen(line, "re");
    while (f && fgets(line, sizeof line, f)) {
        char *list = strchr(line, ':'), *path = list ? strchr(++list, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        path[strcspn(path, "\n")] = 0;
        if (!*list || has_cpu(list))
            least = min_int(least, quota_of_line(root, *list ? "cgroup" : "cgroup2", path));
    }
    if (f) fclose(f);
    return least;
}

int qemb_cpu_count(void) { return min_int(affinity(), cpu_quota("")); }
