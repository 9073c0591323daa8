/* listen.c - the listening socket and the API keys; see listen.h. */
#include "listen.h"

#include "frontends/console.h"
#include "frontends/encoding.h"
#include "log.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---- API keys -------------------------------------------------------------------------------- */

#define MAX_KEYS     64
#define KEY_MOST     1022 /* bytes */
#define DIGEST_BYTES 32   /* of SHA-256 */

struct keys {
    uint8_t digest[MAX_KEYS][DIGEST_BYTES]; /* SHA-256 */
    int n;
};

static int digest(uint8_t *out, const char *s, size_t n) {
    return EVP_Digest(s, n, out, NULL, EVP_sha256(), NULL) ? 0 : -1;
}

/* Reads a line without its newline: up to KEY_MOST + 1 bytes, so that a longer one shows. Returns
 * how many; -1: there is none. */
static int read_line(FILE *f, char line[KEY_MOST + 1]) {
    int n = 0, c = 0;
    while (n <= KEY_MOST && (c = getc(f)) != EOF && c != '\n') line[n++] = (char)c;
    return c == EOF && !n ? -1 : n;
}

keys *keys_read(const char *path) {
    keys *k = need(calloc(1, sizeof *k));
    char line[KEY_MOST + 1];
    FILE *f = fopen(path, "re");
    if (!f) DIE(STATUS_USAGE, "%.128s: cannot open (%s)", path, strerror(errno));
    log_if_readable("api-key-file", fileno(f));
    for (int got, first = 1; (got = read_line(f, line)) >= 0; first = 0) {
        const char *key = line;
        size_t n = (size_t)got;
        if (first && (utf16_mark(line, n) || looks_like_utf16(line, n)))
            DIE(STATUS_USAGE, "%.128s: cannot read (%s)", path, UTF16_TEXT);
        if (first) key += utf8_mark(line, n), n -= utf8_mark(line, n);
        if (got > KEY_MOST)
            DIE(STATUS_USAGE, "%.128s: a key too long (want at most %d bytes)", path, KEY_MOST);
        while (n && memchr(" \t\r", key[n - 1], 3)) n--;
        if (!n || *key == '#') continue;
        if (memchr(key, 0, n)) DIE(STATUS_USAGE, "%.128s: NUL in a key", path);
        if (k->n == MAX_KEYS)
            DIE(STATUS_USAGE, "%.128s: too many keys (want at most %d)", path, MAX_KEYS);
        if (digest(k->digest[k->n++], key, n)) DIE(STATUS_MODEL, "SHA-256: not available");
    }
    OPENSSL_cleanse(line, sizeof line);
    const int failed = ferror(f);
    fclose(f);
    if (failed) DIE(STATUS_USAGE, "%.128s: cannot read", path);
    if (!k->n) DIE(STATUS_USAGE, "%.128s: no key in it", path);
    return k;
}

void keys_free(keys *k) { free(k); }

/* Compares all digests to their last byte, so the time says nothing about the keys. */
int keys_match(const keys *k, const char *given) {
    uint8_t d[DIGEST_BYTES];
    int good = 0;
    if (digest(d, given, strlen(given))) return 0;
    for (int i = 0; i < k->n; i++) good |= !CRYPTO_memcmp(d, k->digest[i], sizeof d);
    return good;
}

/* ---- sockets --------------------------------------------------------------------------------- */

static int port_of(int fd) {
    struct sockaddr_storage bound;
    socklen_t n = sizeof bound;
    if (getsockname(fd, (struct sockaddr *)&bound, &n))
        DIE(STATUS_USAGE, "socket: %s", strerror(errno));
    return ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                             : ((struct sockaddr_in *)&bound)->sin_port);
}

/* Returns a socket that listens at the address, or -1 with errno set. */
static int listen_at(const struct addrinfo *a, int port, int is_one_of_many) {
    const int on = 1, fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    struct sockaddr_storage to = {0};
    if (fd < 0) return -1;
    memcpy(&to, a->ai_addr, a->ai_addrlen);
    if (a->ai_family == AF_INET6)
        ((struct sockaddr_in6 *)&to)->sin6_port = htons((uint16_t)port);
    else
        ((struct sockaddr_in *)&to)->sin_port = htons((uint16_t)port);
    /* otherwise :: would take the port of 0.0.0.0 too */
    const int alone = a->ai_family != AF_INET6 || !is_one_of_many ||
                      !setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    if (alone && !setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) &&
        !bind(fd, (struct sockaddr *)&to, a->ai_addrlen) && !listen(fd, LISTEN_BACKLOG))
        return fd;
    const int error = errno;
    close(fd);
    errno = error;
    return -1;
}

/* Listens at all addresses of the list that this machine has: "localhost" also names ::1 where IPv6
 * is turned off. Returns -1 with errno set and nothing opened if that fails. */
static int listen_at_all(listener *l, const struct addrinfo *all, int port) {
    int error = 0;
    *l = (listener){.port = port};
    for (const struct addrinfo *a = all; a && l->n < LISTEN_ADDRESSES; a = a->ai_next) {
        const int fd = listen_at(a, l->port, all->ai_next != NULL);
        if (fd >= 0) {
            l->fds[l->n++] = fd;
            l->port = port_of(fd);
        } else if (!error || (errno != EADDRNOTAVAIL && errno != EAFNOSUPPORT)) {
            error = errno;
        }
    }
    if (!error || (l->n && (error == EADDRNOTAVAIL || error == EAFNOSUPPORT))) return 0;
    while (l->n) close(l->fds[--l->n]);
    errno = error;
    return -1;
}

void listen_open(listener *l, const char *host, int port) {
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                                   .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *all;
    const int error = getaddrinfo(host, "0", &hints, &all);
    if (error) DIE(STATUS_USAGE, "--host: %.128s: %s", host, gai_strerror(error));
    int failed;
    /* the port that the system chose for the first address may be taken at another one */
    for (int tries = 0; (failed = listen_at_all(l, all, port)); tries++)
        if (port || errno != EADDRINUSE || tries == 16) break;
    if (failed)
        DIE(STATUS_USAGE, "%.128s port %d: cannot listen (%s)", host, port, strerror(errno));
    freeaddrinfo(all);
}

/* Descriptors for all else, with the connections beyond the limit (http_conn.c). */
#define LISTEN_OTHERS 256

int listen_connections(int wanted) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) return wanted;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur == RLIM_INFINITY) return wanted;
    const rlim_t most = limit.rlim_cur > 2 * LISTEN_OTHERS ? limit.rlim_cur - LISTEN_OTHERS : 64;
    return (rlim_t)wanted > most ? (int)most : wanted;
}
