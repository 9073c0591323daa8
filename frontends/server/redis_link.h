/* redis_link.h - a connection to a Redis, whose every wait ends at a deadline. For one thread. */
#ifndef QEMB_REDIS_LINK_H
#define QEMB_REDIS_LINK_H

#include "redis_address.h"
#include "redis_reply.h"

#include <openssl/ssl.h>
#include <stdatomic.h>

typedef struct {
    redis_address address;
    char *password; /* NULL: none */
    SSL_CTX *tls;   /* NULL: no TLS */
} redis_server;

/* Reads the address, the first line of the file with the password, and the certificates of the file
 * ca; both may be NULL. Ends the process with a message on failure. */
void redis_server_open(redis_server *s, const char *address, const char *password_file,
                       const char *ca);
void redis_server_close(redis_server *s);

typedef struct {
    const redis_server *server;
    int stop_fd;                /* readable: every wait ends */
    int fd;                     /* -1: not connected */
    SSL *ssl;                   /* or NULL */
    double deadline;            /* of the exchange, as seconds_now */
    _Atomic(const char *) step; /* where it is; other threads may read it */
    char reason[REDIS_TEXT_ROOM];
} redis_link;

void redis_link_init(redis_link *k, const redis_server *s, int stop_fd);
/* Connects if it is not connected, sends the commands (n) and reads their replies (n_replies),
 * until the deadline. Returns 0, or -1 with the reason, printable, and the connection closed. The
 * look-up of the host's name alone may take longer than the deadline; then nothing follows it. */
int redis_link_exchange(redis_link *k, double deadline, const char *commands, size_t n,
                        redis_reply *replies, int n_replies);
void redis_link_close(redis_link *k);

/* Writes s (n) as a part of a command at p; returns the end. Room n + REDIS_PART_ROOM. */
char *redis_put_part(char *p, const void *s, size_t n);
#define REDIS_PART_ROOM 32

#endif
