/* test_cpu_count.c - the CPUs that a process may use, by trees of files like those of /proc and of
 * control groups. */
#include "backends/cpu/cpu.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <limits.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[] = "/tmp/qemb_cpu_count_XXXXXX";

static void make_tree(void) { cr_assert_not_null(mkdtemp(root)); }

static void remove_tree(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", root);
    cr_assert_eq(system(command), 0);
}

/* Writes the file root/path, and the folders that it needs. */
static void put(const char *path, const char *text) {
    char full[1024];
    snprintf(full, sizeof full, "%s/%s", root, path);
    for (char *p = full + strlen(root) + 1; (p = strchr(p, '/')); *p++ = '/') {
        *p = 0;
        cr_assert(!mkdir(full, 0700) || errno == EEXIST, "%s", full);
    }
    FILE *f = fopen(full, "w");
    cr_assert(f && fputs(text, f) >= 0 && !fclose(f), "%s", full);
}

#define V2_MOUNT "41 31 0:38 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw\n"
#define V1_MOUNT                                                                                   \
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"                                   \
    "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"                            \
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"

Test(cpu_count, version_2_takes_the_least_quota_of_a_group_and_those_above, .init = make_tree,
     .fini = remove_tree) {
    cr_expect_eq(cpu_quota(root), INT_MAX, "no files");
    put("proc/self/cgroup", "0::/a/b/c\n");
    cr_expect_eq(cpu_quota(root), INT_MAX, "no mounts");
    put("proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" V2_MOUNT);
    cr_expect_eq(cpu_quota(root), INT_MAX, "no cpu.max");
    put("sys/fs/cgroup/a/b/c/cpu.max", "max 100000\n");
    cr_expect_eq(cpu_quota(root), INT_MAX);
    put("sys/fs/cgroup/a/b/c/cpu.max", "250000 100000\n");
    cr_expect_eq(cpu_quota(root), 3, "rounded up");
    put("sys/fs/cgroup/a/cpu.max", "100000 50000\n");
    cr_expect_eq(cpu_quota(root), 2, "a group above");
    put("sys/fs/cgroup/cpu.max", "1000 100000\n");
    cr_expect_eq(cpu_quota(root), 1, "the one that is mounted");
    put("sys/fs/cgroup/a/other/cpu.max", "1 100000\n");
    put("sys/fs/cgroup/cpu.max", "99999999999999999 1\n");
    cr_expect_eq(cpu_quota(root), 2, "not another group's");
}

Test(cpu_count, version_1_takes_the_hierarchy_of_cpu, .init = make_tree, .fini = remove_tree) {
    put("proc/self/cgroup", "12:cpuset:/pinned\n4:cpu,cpuacct:/jobs/one\n1:name=systemd:/\n0::/\n");
    put("proc/self/mountinfo", V1_MOUNT);
    put("sys/fs/cgroup/cpu,cpuacct/jobs/one/cpu.cfs_quota_us", "-1\n");
    put("sys/fs/cgroup/cpu,cpuacct/jobs/one/cpu.cfs_period_us", "100000\n");
    cr_expect_eq(cpu_quota(root), INT_MAX, "-1: none");
    put("sys/fs/cgroup/cpu,cpuacct/jobs/one/cpu.cfs_quota_us", "400000\n");
    cr_expect_eq(cpu_quota(root), 4);
    put("sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us", "150000\n");
    put("sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_period_us", "100000\n");
    cr_expect_eq(cpu_quota(root), 2);
    put("sys/fs/cgroup/cpuset/pinned/cpu.cfs_quota_us", "1000\n");
    put("sys/fs/cgroup/cpuset/pinned/cpu.cfs_period_us", "100000\n");
    cr_expect_eq(cpu_quota(root), 2, "another hierarchy");
}

/* A container sees its own group alone, at the place of the mount, under the host's path or "/". */
Test(cpu_count, a_container_has_its_own_group_mounted, .init = make_tree, .fini = remove_tree) {
    put("proc/self/cgroup", "0::/docker/12ab/below\n");
    put("proc/self/mountinfo",
        "41 31 0:38 /docker/12ab /sys/fs/my\\040groups rw - cgroup2 cgroup2 rw\n");
    put("sys/fs/my groups/cpu.max", "300000 100000\n");
    put("sys/fs/my groups/below/cpu.max", "200000 100000\n");
    cr_expect_eq(cpu_quota(root), 2);
    put("proc/self/cgroup", "0::/docker/12abc\n");
    cr_expect_eq(cpu_quota(root), 3, "not below what is mounted");
    put("proc/self/cgroup", "0::/../elsewhere\n");
    cr_expect_eq(cpu_quota(root), 3, "outside the namespace");
    put("proc/self/cgroup", "nonsense\n\n:\n0:\n0::\n0::/docker/12ab\n");
    cr_expect_eq(cpu_quota(root), 3);
    put("proc/self/mountinfo", "nonsense - \n - cgroup2\n1 2 3 - cgroup2 x y\n");
    cr_expect_eq(cpu_quota(root), INT_MAX);
}

Test(cpu_count, affinity_bounds_the_count) {
    cpu_set_t all, one;
    cr_assert_eq(sched_getaffinity(0, sizeof all, &all), 0);
    cr_expect_eq(qemb_cpu_count(), min_int(CPU_COUNT(&all), cpu_quota("")));
    int first = 0;
    while (!CPU_ISSET(first, &all)) first++;
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    cr_assert_eq(sched_setaffinity(0, sizeof one, &one), 0);
    cr_expect_eq(qemb_cpu_count(), 1);
}
