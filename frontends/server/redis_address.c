/* redis_address.c - where a Redis is; see redis_address.h. */
#include "redis_address.h"

#include <string.h>

#define WANT "want HOST:PORT, redis://[USER@]HOST[:PORT][/DB] or rediss:// for TLS"

/* The number min..max that is s (n), or -1. */
static int read_number(const char *s, size_t n, int min, int max) {
    int x = 0;
    if (!n || n > 5) return -1;
    for (size_t i = 0; i < n; i++) {
        if (s[i] < '0' || s[i] > '9') return -1;
        x = 10 * x + (s[i] - '0');
    }
    return x >= min && x <= max ? x : -1;
}

/* Reads s (n), a host with a port; port 0: the port may not be left out. */
static const char *read_host(redis_address *a, const char *s, size_t n, int port) {
    const char *end = s + n, *colon = NULL, *bracket = n && *s == '[' ? memchr(s, ']', n) : NULL;
    for (const char *p = bracket ? bracket : s; p < end; p++)
        if (*p == ':') colon = p;
    const char *stop = colon ? colon : end;
    a->port = colon ? read_number(colon + 1, (size_t)(end - colon) - 1, 1, 65535) : port;
    if (a->port < 1) return "no port of 1..65535 (" WANT ")";
    if (bracket && bracket + 1 != stop) return "no host (" WANT ")";
    if (bracket) s++, stop = bracket;
    if (s == stop) return "no host (" WANT ")";
    if ((size_t)(stop - s) >= sizeof a->host) return "a host name too long (want at most 255)";
    for (const char *p = s; p < stop; p++)
        if ((unsigned char)*p <= ' ' || *p == 0x7f) return "no host (" WANT ")";
    memcpy(a->host, s, (size_t)(stop - s));
    return NULL;
}

const char *redis_address_read(redis_address *a, const char *s) {
    *a = (redis_address){0};
    const char *scheme = strstr(s, "://");
    if (!scheme) return read_host(a, s, strlen(s), 0);
    a->tls = scheme - s == 6 && !strncmp(s, "rediss", 6);
    if (!a->tls && (scheme - s != 5 || strncmp(s, "redis", 5)))
        return "no scheme of Redis (" WANT ")";
    s = scheme + 3;
    const size_t n = strcspn(s, "/");
    const char *at = memchr(s, '@', n), *host = at ? at + 1 : s;
    if (at && memchr(s, ':', (size_t)(at - s)))
        return "a password in it, which everybody on the machine can read (want it in a file: "
               "--redis-password-file)";
    if (at && (size_t)(at - s) >= sizeof a->user) return "a user too long (want at most 127 bytes)";
    if (at) memcpy(a->user, s, (size_t)(at - s));
    if (s[n] && s[n + 1]) a->db = read_number(s + n + 1, strlen(s + n + 1), 0, 99999);
    if (a->db < 0) return "no database (want a number)";
    return read_host(a, host, (size_t)(s + n - host), 6379);
}
