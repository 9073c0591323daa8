/* listen.h - the socket that the server listens on, and the keys that it accepts. */
#ifndef QEMB_LISTEN_H
#define QEMB_LISTEN_H

#include <stddef.h>

typedef struct keys keys;

/* The keys of the file, one a line; empty lines and those with # in front do not count. Ends the
 * process if there is none. */
keys *keys_read(const char *path);
void keys_free(keys *k); /* k may be NULL */
int keys_match(const keys *k, const char *given);

/* A listening socket, not blocking; *bound_port is port, or what the system chose for 0. Ends the
 * process if that cannot be. */
int listen_open(const char *host, int port, int *bound_port);
/* Raises the limit on descriptors to what the system allows; the connections that leaves, at most
 * `wanted`. */
int listen_connections(int wanted);

#endif
