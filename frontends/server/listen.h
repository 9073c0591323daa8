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

/* Opens a non-blocking listening socket. *bound_port is port, or the system's choice if port is 0.
 * Ends the process on failure. */
int listen_open(const char *host, int port, int *bound_port);
/* Raises the limit on descriptors as far as the system allows. Returns how many connections fit, at
 * most `wanted`. */
int listen_connections(int wanted);

#endif
