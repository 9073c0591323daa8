/* fail_nth.c - preloaded into a program, makes one of its calls fail: memory, maps, threads, files.
 *
 * FAIL_NTH names a file of three u64, which the test maps, too: calls so far, the number of the
 * first call to fail (from 1 on; 0: none), and how many fail from there on. FAIL_KINDS is the sum
 * of the kinds that count. Calls of libcrypto and the loader do not count, nor those of
 * libstdc++, by which the emulated GPU has its memory.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

extern void __asan_init(void) __attribute__((weak)); /* NULL: no sanitizer */

enum { MEMORY = 1, MAP = 2, THREAD = 4, FILES = 8 };

static struct {
    _Atomic uint64_t calls, first, n;
} *control;
static unsigned long kinds;
static struct {
    uintptr_t start, end;
} skipped[16];
static int n_skipped;

/* What is allocated before this library has been started, and by dlsym while it looks for malloc: a
 * sanitizer's own start calls malloc before its malloc can be called. */
static char early[1 << 20] __attribute__((aligned(64)));
static size_t early_used;
static int started;

static void *early_alloc(size_t n) {
    const size_t at = early_used;
    early_used += (n + 63) / 64 * 64;
    if (early_used > sizeof early) abort();
    return early + at;
}

#define IS_EARLY(p) ((char *)(p) >= early && (char *)(p) < early + sizeof early)

static void *next(const char *name) {
    static int inside;
    if (inside) return NULL;
    inside = 1;
    void *p = dlsym(RTLD_NEXT, name);
    inside = 0;
    return p;
}

/* real = the next function of that name, or NULL */
#define REAL(name)                                                                                 \
    static __typeof__(name) *real;                                                                 \
    if (!real) real = (__typeof__(name) *)(uintptr_t)next(#name)
#define REAL_MEMORY(name)                                                                          \
    static __typeof__(name) *real;                                                                 \
    if (!real && started) real = (__typeof__(name) *)(uintptr_t)next(#name)

static int skip_object(struct dl_phdr_info *info, size_t size, void *arg) {
    (void)size, (void)arg;
    static const char *const names[] = {"libcrypto", "ld-linux", "libstdc++"};
    /* A sanitizer cannot go on where libc's pthread_getattr_np has no memory. */
    int skip = __asan_init && strstr(info->dlpi_name, "libc.so");
    for (int i = 0; i < 3; i++) skip |= strstr(info->dlpi_name, names[i]) != NULL;
    if (!skip) return 0;
    for (int i = 0; i < info->dlpi_phnum && n_skipped < 16; i++) {
        const ElfW(Phdr) *h = &info->dlpi_phdr[i];
        if (h->p_type != PT_LOAD || !(h->p_flags & PF_X)) continue;
        skipped[n_skipped].start = info->dlpi_addr + h->p_vaddr;
        skipped[n_skipped++].end = info->dlpi_addr + h->p_vaddr + h->p_memsz;
    }
    return 0;
}

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("FAIL_NTH"), *k = getenv("FAIL_KINDS");
    kinds = k ? strtoul(k, NULL, 10) : MEMORY | MAP | THREAD | FILES;
    started = 1;
    dl_iterate_phdr(skip_object, NULL);
    const int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *p = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (p != MAP_FAILED) control = p;
}

static int fails(unsigned kind, const void *caller) {
    if (!control || !(kinds & kind)) return 0;
    for (int i = 0; i < n_skipped; i++)
        if ((uintptr_t)caller >= skipped[i].start && (uintptr_t)caller < skipped[i].end) return 0;
    const uint64_t call = atomic_fetch_add(&control->calls, 1) + 1, first = control->first;
    return first && call >= first && call - first < control->n;
}

#define FAIL(kind, error, result)                                                                  \
    if (fails(kind, __builtin_return_address(0))) {                                                \
        errno = error;                                                                             \
        return result;                                                                             \
    }

void *malloc(size_t n) {
    FAIL(MEMORY, ENOMEM, NULL)
    REAL_MEMORY(malloc);
    return real ? real(n) : early_alloc(n);
}

void *calloc(size_t a, size_t b) {
    FAIL(MEMORY, ENOMEM, NULL)
    REAL_MEMORY(calloc);
    return real ? real(a, b) : early_alloc(a * b);
}

void *realloc(void *p, size_t n) {
    FAIL(MEMORY, ENOMEM, NULL)
    REAL_MEMORY(realloc);
    if (real && !IS_EARLY(p)) return real(p, n);
    void *to = malloc(n);
    if (p && to) memcpy(to, p, n); /* what is behind an early block is early, too, or zero */
    return to;
}

void *aligned_alloc(size_t alignment, size_t n) {
    FAIL(MEMORY, ENOMEM, NULL)
    REAL_MEMORY(aligned_alloc);
    return real(alignment, n);
}

int posix_memalign(void **p, size_t alignment, size_t n) {
    FAIL(MEMORY, ENOMEM, ENOMEM)
    REAL_MEMORY(posix_memalign);
    return real(p, alignment, n);
}

void free(void *p) {
    if (IS_EARLY(p)) return; /* also what dlsym frees, while it looks for free */
    REAL_MEMORY(free);
    if (real) real(p);
}

void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t offset) {
    FAIL(MAP, ENOMEM, MAP_FAILED)
    REAL(mmap);
    return real(at, n, prot, flags, fd, offset);
}

int pthread_create(pthread_t *id, const pthread_attr_t *a, void *(*f)(void *), void *arg) {
    FAIL(THREAD, EAGAIN, EAGAIN)
    REAL(pthread_create);
    return real(id, a, f, arg);
}

int open(const char *path, int flags, ...) {
    va_list ap;
    va_start(ap, flags);
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(ap, mode_t) : 0;
    va_end(ap);
    FAIL(FILES, EMFILE, -1)
    REAL(open);
    return real(path, flags, mode);
}

FILE *fopen(const char *path, const char *mode) {
    FAIL(FILES, EMFILE, NULL)
    REAL(fopen);
    return real(path, mode);
}

ssize_t read(int fd, void *p, size_t n) {
    FAIL(FILES, EIO, -1)
    REAL(read);
    return real(fd, p, n);
}
