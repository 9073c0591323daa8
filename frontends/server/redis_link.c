/* redis_link.c - a connection to a Redis; see redis_link.h.
 *
 * The socket does not block, and one function waits for it (`wait_socket`), so one deadline bounds
 * whatever the other side does. getaddrinfo is the exception: a silent name server holds it for as
 * long as the resolver's own time-outs last.
 */
#include "redis_link.h"

#include "frontends/console.h"
#include "frontends/encoding.h"
#include "log.h"

#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PASSWORD_MOST 1024

/* ---- the server ------------------------------------------------------------------------------ */

/* Returns the first line of the file, without a byte-order mark and without the blanks at its
 * end. */
static char *read_password(const char *path) {
    char line[PASSWORD_MOST + 5];
    FILE *f = fopen(path, "re");
    if (!f) DIE(STATUS_USAGE, "%.128s: cannot open (%s)", path, strerror(errno));
    log_if_readable("redis-password-file", fileno(f));
    const size_t got = fread(line, 1, sizeof line - 1, f);
    const int failed = ferror(f);
    fclose(f);
    if (failed) DIE(STATUS_USAGE, "%.128s: cannot read", path);
    if (utf16_mark(line, got) || looks_like_utf16(line, got))
        DIE(STATUS_USAGE, "%.128s: cannot read (%s)", path, UTF16_TEXT);
    line[got] = 0;
    const char *start = line + utf8_mark(line, got);
    size_t n = strcspn(start, "\r\n");
    if (start + n < line + got && !start[n]) DIE(STATUS_USAGE, "%.128s: NUL in a password", path);
    if (n > PASSWORD_MOST)
        DIE(STATUS_USAGE, "%.128s: a password too long (want at most %d bytes)", path,
            PASSWORD_MOST);
    while (n && (start[n - 1] == ' ' || start[n - 1] == '\t')) n--;
    if (!n) DIE(STATUS_USAGE, "%.128s: no password in its first line", path);
    char *password = need(strndup(start, n));
    OPENSSL_cleanse(line, sizeof line);
    return password;
}

static const char *ssl_error(void) {
    const char *s = ERR_reason_error_string(ERR_peek_last_error());
    return s ? s : "unknown error";
}

static SSL_CTX *open_tls(const char *ca) {
    SSL_CTX *c = SSL_CTX_new(TLS_client_method());
    if (!c || !SSL_CTX_set_min_proto_version(c, TLS1_2_VERSION))
        DIE(STATUS_MODEL, "TLS: %s", ssl_error());
    SSL_CTX_set_verify(c, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_mode(c, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    if (ca && !SSL_CTX_load_verify_locations(c, ca, NULL))
        DIE(STATUS_USAGE, "%.128s: no certificates in PEM (%s)", ca, ssl_error());
    if (!ca) SSL_CTX_set_default_verify_paths(c); /* if there are none, no certificate is good */
    return c;
}

void redis_server_open(redis_server *s, const char *address, const char *password_file,
                       const char *ca) {
    *s = (redis_server){0};
    const char *wrong = redis_address_read(&s->address, address);
    if (wrong) usage("--redis: %s (got %.80s)", wrong, strchr(address, '@') ? "USER@..." : address);
    if (ca && !s->address.tls) usage("--redis-ca: without TLS (want --redis rediss://HOST)");
    if (*s->address.user && !password_file)
        usage("--redis: a user without a password (want --redis-password-file)");
    if (password_file) s->password = read_password(password_file);
    if (s->address.tls) s->tls = open_tls(ca);
}

void redis_server_close(redis_server *s) {
    if (s->password) OPENSSL_cleanse(s->password, strlen(s->password));
    free(s->password);
    SSL_CTX_free(s->tls);
}

/* ---- waiting --------------------------------------------------------------------------------- */

__attribute__((format(printf, 2, 3))) static int fail(redis_link *k, const char *fmt, ...) {
    char text[REDIS_TEXT_ROOM];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    *put_printable(k->reason, text, strlen(text)) = 0;
    return -1;
}

static int out_of_time(redis_link *k) {
    return fail(k, "%s: not done in time", atomic_load(&k->step));
}

/* Waits for events of the socket until a time. */
static int wait_socket(redis_link *k, short events, double until) {
    struct pollfd p[2] = {{.fd = k->fd, .events = events}, {.fd = k->stop_fd, .events = POLLIN}};
    for (;;) {
        const double left = until - seconds_now();
        if (left <= 0) return out_of_time(k);
        const int n = poll(p, 2, left > 1000 ? 1000000 : (int)ceil(1e3 * left));
        if (n < 0 && errno != EINTR) return fail(k, "poll: %s", strerror(errno));
        if (n > 0 && p[1].revents) return fail(k, "the server is being stopped");
        if (n > 0) return 0;
    }
}

/* Waits for what an operation of TLS that returned `result` needs before it is called again. */
static int wait_tls(redis_link *k, int result) {
    const int error = SSL_get_error(k->ssl, result);
    const long verified = SSL_get_verify_result(k->ssl);
    const char *step = atomic_load(&k->step);
    if (error == SSL_ERROR_WANT_READ) return wait_socket(k, POLLIN, k->deadline);
    if (error == SSL_ERROR_WANT_WRITE) return wait_socket(k, POLLOUT, k->deadline);
    if (error == SSL_ERROR_ZERO_RETURN) return fail(k, "%s: the connection was closed", step);
    if (verified != X509_V_OK)
        return fail(k, "%s: %s", step, X509_verify_cert_error_string(verified));
    if (error == SSL_ERROR_SSL) return fail(k, "%s: %s", step, ssl_error());
    return fail(k, "%s: %s", step, errno ? strerror(errno) : "the connection was closed");
}

/* Sends or reads up to n bytes. Returns their number, or -1. */
static long transfer(redis_link *k, char *p, size_t n, int sending) {
    for (;;) {
        long got;
        if (seconds_now() > k->deadline) return out_of_time(k); /* also if bytes never end */
        errno = 0;
        if (k->ssl) {
            ERR_clear_error();
            const int most = n < 1 << 20 ? (int)n : 1 << 20;
            got = sending ? SSL_write(k->ssl, p, most) : SSL_read(k->ssl, p, most);
            if (got > 0) return got;
            if (wait_tls(k, (int)got)) return -1;
            continue;
        }
        got = sending ? send(k->fd, p, n, MSG_NOSIGNAL) : recv(k->fd, p, n, 0);
        if (got > 0) return got;
        if (!got) return fail(k, "%s: the connection was closed", atomic_load(&k->step));
        if (errno == EINTR) continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK)
            return fail(k, "%s: %s", atomic_load(&k->step), strerror(errno));
        if (wait_socket(k, sending ? POLLOUT : POLLIN, k->deadline)) return -1;
    }
}

/* ---- connecting ------------------------------------------------------------------------------ */

static int connect_to(redis_link *k, const struct addrinfo *a, double until) {
    const int on = 1;
    int error = 0;
    socklen_t n = sizeof error;
    k->fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (k->fd < 0) return fail(k, "socket: %s", strerror(errno));
    setsockopt(k->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (!connect(k->fd, a->ai_addr, a->ai_addrlen)) return 0;
    if (errno != EINPROGRESS) return fail(k, "connection: %s", strerror(errno));
    if (wait_socket(k, POLLOUT, until)) return -1;
    if (getsockopt(k->fd, SOL_SOCKET, SO_ERROR, &error, &n)) error = errno;
    return error ? fail(k, "connection: %s", strerror(error)) : 0;
}

/* Tries the host's addresses in turn, each for its share of the time that is left. */
static int connect_socket(redis_link *k) {
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
    struct addrinfo *list;
    char service[16];
    int n = 0, bad = -1;
    snprintf(service, sizeof service, "%d", k->server->address.port);
    atomic_store(&k->step, "look-up of the host's name");
    const int error = getaddrinfo(k->server->address.host, service, &hints, &list);
    if (error) return fail(k, "host: %s", gai_strerror(error));
    atomic_store(&k->step, "connection");
    for (const struct addrinfo *a = list; a; a = a->ai_next) n++;
    for (const struct addrinfo *a = list; a && bad; a = a->ai_next, n--) {
        const double now = seconds_now();
        if (k->fd >= 0) close(k->fd);
        bad = connect_to(k, a, now + (k->deadline - now) / n);
    }
    freeaddrinfo(list);
    return bad;
}

static int start_tls(redis_link *k) {
    const char *host = k->server->address.host;
    unsigned char ip[sizeof(struct in6_addr)];
    atomic_store(&k->step, "TLS handshake");
    ERR_clear_error();
    k->ssl = SSL_new(k->server->tls);
    if (!k->ssl || !SSL_set_fd(k->ssl, k->fd)) return fail(k, "TLS: %s", ssl_error());
    const int is_ip = inet_pton(AF_INET, host, ip) == 1 || inet_pton(AF_INET6, host, ip) == 1;
    if (is_ip ? !X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(k->ssl), host)
              : !SSL_set1_host(k->ssl, host) || !SSL_set_tlsext_host_name(k->ssl, host))
        return fail(k, "TLS: %s", ssl_error());
    for (int result; (result = SSL_connect(k->ssl)) != 1;) {
        if (wait_tls(k, result)) return -1;
        ERR_clear_error();
    }
    return 0;
}

/* ---- exchanging ------------------------------------------------------------------------------ */

static int exchange(redis_link *k, const char *commands, size_t n, redis_reply *replies,
                    int n_replies) {
    char piece[16384];
    for (size_t sent = 0; sent < n;) {
        const long got = transfer(k, (char *)(uintptr_t)(commands + sent), n - sent, 1);
        if (got < 0) return -1;
        sent += (size_t)got;
    }
    for (int i = 0; i < n_replies;) {
        const long got = transfer(k, piece, sizeof piece, 0);
        if (got < 0) return -1;
        for (size_t used = 0; used < (size_t)got;) {
            if (i == n_replies) return fail(k, "reply: more than was asked for");
            used += redis_reply_read(&replies[i], (uint8_t *)piece + used, (size_t)got - used);
            if (replies[i].progress == REDIS_BAD) return fail(k, "%s", replies[i].text);
            i += replies[i].progress != REDIS_MORE;
        }
    }
    return 0;
}

char *redis_put_part(char *p, const void *s, size_t n) {
    p += sprintf(p, "$%zu\r\n", n);
    memcpy(p, s, n);
    memcpy(p + n, "\r\n", 2);
    return p + n + 2;
}

/* Says who this is and chooses the database. */
static int introduce(redis_link *k) {
    const redis_server *s = k->server;
    const char *user = s->address.user;
    char commands[PASSWORD_MOST + sizeof s->address.user + 256], db[16], *p = commands;
    const char *names[2];
    redis_reply replies[2];
    int n = 0;
    if (s->password) {
        p += sprintf(p, "*%d\r\n", *user ? 3 : 2);
        p = redis_put_part(p, "AUTH", 4);
        if (*user) p = redis_put_part(p, user, strlen(user));
        p = redis_put_part(p, s->password, strlen(s->password));
        names[n++] = "AUTH";
    }
    if (s->address.db) {
        p += sprintf(p, "*2\r\n");
        p = redis_put_part(p, "SELECT", 6);
        p = redis_put_part(p, db, (size_t)snprintf(db, sizeof db, "%d", s->address.db));
        names[n++] = "SELECT";
    }
    if (!n) return 0;
    atomic_store(&k->step, names[0]);
    for (int i = 0; i < n; i++) redis_reply_start(&replies[i], 0, 0, NULL, NULL);
    const int bad = exchange(k, commands, (size_t)(p - commands), replies, n);
    OPENSSL_cleanse(commands, sizeof commands);
    if (bad) return -1;
    for (int i = 0; i < n; i++)
        if (replies[i].progress == REDIS_ERROR) return fail(k, "%s: %s", names[i], replies[i].text);
    return 0;
}

/* Whether the connection is as the last exchange left it: open, with nothing to read. */
static int is_idle(redis_link *k) {
    char c;
    if (k->fd < 0) return 0;
    if (!k->ssl) return recv(k->fd, &c, 1, MSG_DONTWAIT) < 0 && (errno == EAGAIN || errno == EINTR);
    ERR_clear_error();
    const int got = SSL_read(k->ssl, &c, 1); /* takes in what belongs to TLS alone */
    return got <= 0 && SSL_get_error(k->ssl, got) == SSL_ERROR_WANT_READ;
}

static int open_link(redis_link *k) {
    if (is_idle(k)) return 0;
    redis_link_close(k);
    return connect_socket(k) || (k->server->tls && start_tls(k)) || introduce(k) ? -1 : 0;
}

void redis_link_init(redis_link *k, const redis_server *s, int stop_fd) {
    *k = (redis_link){.server = s, .stop_fd = stop_fd, .fd = -1};
    atomic_init(&k->step, "start");
}

int redis_link_exchange(redis_link *k, double deadline, const char *commands, size_t n,
                        redis_reply *replies, int n_replies) {
    k->deadline = deadline;
    int bad = open_link(k);
    if (!bad) {
        atomic_store(&k->step, "reply");
        bad = exchange(k, commands, n, replies, n_replies);
    }
    if (bad) redis_link_close(k);
    return bad;
}

void redis_link_close(redis_link *k) {
    SSL_free(k->ssl);
    if (k->fd >= 0) close(k->fd);
    k->ssl = NULL;
    k->fd = -1;
}
