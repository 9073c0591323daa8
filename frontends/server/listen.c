/* listen.c - the listening socket and the API keys; see listen.h. */
#include "listen.h"

#include "frontends/console.h"
#include "frontends/encoding.h"

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

/* ---- the socket ------------------------------------------------------------------------------ */

int listen_open(const char *host, int port, int *bound_port) {
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                                   .ai_flags = AI_PASSIVE | AI_NUMERICSERV};
    struct addrinfo *a;
    char service[16];
    snprintf(service, sizeof service, "%d", port);
    const int error = getaddrinfo(host, service, &hints, &a);
    if (error) DIE(STATUS_USAGE, "--host: %.128s: %s", host, gai_strerror(error));
    const int on = 1, fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) ||
        bind(fd, a->ai_addr, a->ai_addrlen) || listen(fd, 1024))
        DIE(STATUS_USAGE, "%.128s port %d: cannot listen (%s)", host, port, strerror(errno));
    freeaddrinfo(a);
    struct sockaddr_storage bound;
    socklen_t n = sizeof bound;
    if (getsockname(fd, (struct sockaddr *)&bound, &n))
        DIE(STATUS_USAGE, "socket: %s", strerror(errno));
    *bound_port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                                    : ((struct sockaddr_in *)&bound)->sin_port);
    return fd;
}

int listen_connections(int wanted) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) return wanted;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur == RLIM_INFINITY) return wanted;
    const rlim_t most = limit.rlim_cur > 128 ? limit.rlim_cur - 64 : 64;
    return (rlim_t)wanted > most ? (int)most : wanted;
}
