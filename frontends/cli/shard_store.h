/* shard_store.h - the directory of `qemb shards`: files that appear whole, and locks.
 *
 * A file is written under a name of its own, synced and renamed, so it is whole or not there,
 * whoever writes at the same time and whenever a process is killed. Locks only keep processes from
 * doing the same work twice. A lock ends with its process.
 */
#ifndef QEMB_SHARD_STORE_H
#define QEMB_SHARD_STORE_H

#include <stdint.h>
#include <sys/types.h>

/* Characters of a SHA-256 in hexadecimal, with the NUL. */
enum { SHA256_ROOM = 65 };

typedef struct {
    int fd; /* of the directory */
    const char *path;
    char host[65];
    char tag[16]; /* of this process, beside host and process id: those may repeat in containers */
    int no_locks; /* the file system has none */
    int found;    /* the lock that was taken last was there before: its holder may have died */
} shard_store;

/* Opens a directory, and makes it if there is none. Ends the process if that cannot be done, or if
 * nothing can be written to it. */
void shard_store_open(shard_store *s, const char *path);

typedef enum { SHARD_LOCKED, SHARD_BUSY, SHARD_LOCK_FAILED } shard_lock_status;
/* Locks a name. BUSY: another process has it. LOCK_FAILED: errno says why. */
shard_lock_status shard_lock(shard_store *s, const char *name, int *lock);
/* Removes a lock. */
void shard_unlock(const shard_store *s, const char *name, int lock);
/* Removes what dead processes of this machine have left of name, unless it is locked. */
void shard_tidy(shard_store *s, const char *name);

/* Opens a new file for name, which is locked. Returns -1 and sets errno if that fails. First
 * removes what dead processes of this machine have left. */
int shard_part_open(const shard_store *s, const char *name);
void shard_part_remove(const shard_store *s, const char *name);
/* Renames name's file, which is on the disk, to final. -1: errno says why. */
int shard_part_publish(const shard_store *s, const char *name, const char *final);
/* Opens name's file for reading. */
int shard_part_read(const shard_store *s, const char *name);
/* Removes a file for good, if it is there. */
void shard_remove(const shard_store *s, const char *file);

void sha256_hex(char out[SHA256_ROOM], const uint8_t digest[32]);
/* SHA-256 of a descriptor's contents from its beginning, and their size. -1: errno says why; EINTR:
 * a signal was caught. */
int sha256_of(int fd, char out[SHA256_ROOM], uint64_t *bytes);

#endif
