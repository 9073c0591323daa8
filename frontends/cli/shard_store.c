/* shard_store.c - see shard_store.h. */
#include "shard_store.h"

#include "cli.h"

#include "frontends/console.h"
#include "frontends/format.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

/* A name in the directory. One that is too long for a file system is refused by that. */
typedef char file_name[NAME_MAX + 160];

void shard_store_open(shard_store *s, const char *path) {
    uint32_t random = 0;
    *s = (shard_store){.path = path};
    if (mkdir(path, 0777) && errno != EEXIST)
        DIE(STATUS_OUTPUT, "%.200s: cannot make it (%s)", path, strerror(errno));
    s->fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (s->fd < 0) DIE(STATUS_OUTPUT, "%.200s: cannot open it (%s)", path, strerror(errno));
    if (faccessat(s->fd, ".", W_OK | X_OK, AT_EACCESS))
        DIE(STATUS_OUTPUT, "%.200s: cannot write to it (%s)", path, strerror(errno));
    if (gethostname(s->host, sizeof s->host - 1) || !*s->host) strcpy(s->host, "localhost");
    if (getrandom(&random, sizeof random, 0) < 0) random = (uint32_t)(seconds_now() * 1e9);
    snprintf(s->tag, sizeof s->tag, "%08x", random);
}

/* ---- locks ----------------------------------------------------------------------------------- */

static void lock_name(file_name out, const char *name) {
    snprintf(out, sizeof(file_name), ".%s.lock", name);
}

/* Whether the file is still the one of that name: its holder may have removed it meanwhile. */
static int is_still(const shard_store *s, int fd, const char *file) {
    struct stat own, named;
    return !fstat(fd, &own) && !fstatat(s->fd, file, &named, AT_SYMLINK_NOFOLLOW) &&
           own.st_ino == named.st_ino && own.st_dev == named.st_dev;
}

/* A file system may also say of every file that it is another one. */
enum { LOCK_TRIES = 100 };

shard_lock_status shard_lock(shard_store *s, const char *name, int *lock) {
    file_name file;
    lock_name(file, name);
    *lock = -1;
    for (int tries = 1; !s->no_locks; tries++) {
        struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
        const int flags = O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW;
        int fd = openat(s->fd, file, flags | O_EXCL, 0666);
        s->found = fd < 0 && errno == EEXIST;
        if (s->found) fd = openat(s->fd, file, flags, 0666);
        if (fd < 0) return SHARD_LOCK_FAILED;
        const int error = fcntl(fd, F_OFD_SETLK, &whole) ? errno : 0;
        if (!error && (is_still(s, fd, file) || tries == LOCK_TRIES)) {
            *lock = fd;
            return SHARD_LOCKED;
        }
        if (error && error != EAGAIN && error != EACCES && error != EINTR) {
            s->no_locks = 1;
            say("%.200s: no locks here (%s): processes may do the same shard", s->path,
                strerror(error));
            unlinkat(s->fd, file, 0);
        }
        close(fd);
        if (error == EAGAIN || error == EACCES) return SHARD_BUSY;
    }
    return SHARD_LOCKED;
}

void shard_unlock(const shard_store *s, const char *name, int lock) {
    file_name file;
    if (lock < 0) return;
    lock_name(file, name);
    unlinkat(s->fd, file, 0); /* before the lock ends, so that it is not another's */
    close(lock);
}

/* ---- files ----------------------------------------------------------------------------------- */

static void part_name(const shard_store *s, file_name out, const char *name) {
    snprintf(out, sizeof(file_name), ".%s.%s.%ld-%s.part", name, s->host, (long)getpid(), s->tag);
}

/* Whether a file is one that a process of this machine has begun for name. */
static int is_part(const shard_store *s, const char *file, const char *name) {
    file_name start;
    const size_t n = (size_t)snprintf(start, sizeof start, ".%s.%s.", name, s->host);
    if (strncmp(file, start, n)) return 0;
    const size_t digits = strspn(file + n, "0123456789");
    const char *tag = file + n + digits;
    return digits && *tag == '-' && strspn(tag + 1, "0123456789abcdef") == 8 &&
           !strcmp(tag + 9, ".part");
}

/* Who holds the lock of name knows that no other process of this machine is at it, so what is there
 * is of dead ones. A process id would not tell: it may be that of a zombie, or be used again. */
static void remove_stale(const shard_store *s, const char *name) {
    const int fd = openat(s->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    if (!dir) {
        if (fd >= 0) close(fd);
        return;
    }
    for (struct dirent *d; (d = readdir(dir));)
        if (is_part(s, d->d_name, name)) unlinkat(s->fd, d->d_name, 0);
    closedir(dir);
}

void shard_tidy(shard_store *s, const char *name) {
    file_name file;
    int lock;
    lock_name(file, name);
    if (faccessat(s->fd, file, F_OK, 0) || shard_lock(s, name, &lock) != SHARD_LOCKED) return;
    if (lock >= 0) remove_stale(s, name);
    shard_unlock(s, name, lock);
}

int shard_part_open(const shard_store *s, const char *name) {
    file_name part;
    if (s->found && !s->no_locks) remove_stale(s, name);
    part_name(s, part, name);
    return openat(s->fd, part, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
}

void shard_part_remove(const shard_store *s, const char *name) {
    file_name part;
    part_name(s, part, name);
    unlinkat(s->fd, part, 0);
}

int shard_part_publish(const shard_store *s, const char *name, const char *final) {
    file_name part;
    part_name(s, part, name);
    if (renameat(s->fd, part, s->fd, final)) return -1;
    fsync(s->fd); /* not all file systems can; then it is their matter */
    return 0;
}

int shard_part_read(const shard_store *s, const char *name) {
    file_name part;
    part_name(s, part, name);
    return openat(s->fd, part, O_RDONLY | O_CLOEXEC);
}

void shard_remove(const shard_store *s, const char *file) {
    if (!unlinkat(s->fd, file, 0)) fsync(s->fd);
}

/* ---- digests --------------------------------------------------------------------------------- */

void sha256_hex(char out[SHA256_ROOM], const uint8_t digest[32]) {
    *format_hex(out, digest, 32) = 0;
}

int sha256_of(int fd, char out[SHA256_ROOM], uint64_t *bytes) {
    enum { CHUNK = 256 << 10 };
    uint8_t digest[EVP_MAX_MD_SIZE];
    EVP_MD_CTX *c = need(EVP_MD_CTX_new());
    char *chunk = need(malloc(CHUNK));
    ssize_t n;
    if (!EVP_DigestInit_ex(c, EVP_sha256(), NULL)) DIE(STATUS_MODEL, "libcrypto: no SHA-256");
    *bytes = 0;
    while ((n = pread(fd, chunk, CHUNK, (off_t)*bytes)) != 0) {
        if (n < 0 && errno == EINTR && !signal_caught()) continue;
        if (n > 0 && signal_caught()) n = -1, errno = EINTR;
        if (n < 0) break;
        EVP_DigestUpdate(c, chunk, (size_t)n);
        *bytes += (uint64_t)n;
    }
    const int error = n < 0 ? errno : 0;
    EVP_DigestFinal_ex(c, digest, NULL);
    sha256_hex(out, digest);
    EVP_MD_CTX_free(c);
    free(chunk);
    errno = error;
    return error ? -1 : 0;
}
