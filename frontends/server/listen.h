/* listen.h - the listening socket and the API keys. */
#ifndef QEMB_LISTEN_H
#define QEMB_LISTEN_H

#include <stddef.h>

typedef struct keys keys;

/* Reads API keys from a file, one per line, without empty lines and lines that begin with #. Ends
 * the process if there is none. */
keys *keys_read(const char *path);
void keys_free(keys *k); /* k may be NULL */
int keys_match(const keys *k, const char *given);

/* The length of the listen queue. */
enum { LISTEN_BACKLOG = 1024, LISTEN_ADDRESSES = 16 };

/* Listening sockets, one an address. */
typedef struct {
    int fds[LISTEN_ADDRESSES], n, port;
} listener;

/* Opens non-blocking listening sockets on all addresses of host. port 0: the system chooses, the
 * same for all. Ends the process on failure. */
void listen_open(listener *l, const char *host, int port);
/* Raises the limit on descriptors as far as the system allows. Returns how many connections fit, at
 * most `wanted`. */
int listen_connections(int wanted);

#endif
