/* probe.c - asks a server whether it is healthy; see probe.h. */
#include "probe.h"

#include "frontends/console.h"

#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Seconds in which the server must take the connection and answer. */
#define PROBE_TIMEOUT 5

/* Returns a connected socket, or -1 with errno set. */
static int connect_to(const struct addrinfo *a) {
    const struct timeval timeout = {.tv_sec = PROBE_TIMEOUT};
    const int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) ||
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof timeout) ||
        connect(fd, a->ai_addr, a->ai_addrlen)) {
        const int error = errno;
        if (fd >= 0) close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

/* Sends the request and reads the status line. Returns the status, or -1 with errno set. */
static int status_of(int fd) {
    static const char request[] = "GET /health HTTP/1.0\r\n\r\n";
    char line[16] = ""; /* "HTTP/1.1 200 OK" */
    size_t n = 0;
    if (send(fd, request, sizeof request - 1, MSG_NOSIGNAL) < 0) return -1;
    while (n < sizeof line - 1) {
        const ssize_t got = recv(fd, line + n, sizeof line - 1 - n, 0);
        if (got < 0) return -1;
        if (!got) break;
        n += (size_t)got;
    }
    int status = -1;
    errno = EPROTO;
    return sscanf(line, "HTTP/1.%*1[01] %3d", &status) == 1 ? status : -1;
}

int probe(const char *host, int port) {
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV};
    struct addrinfo *a;
    char service[16];
    snprintf(service, sizeof service, "%d", port);
    const int error = getaddrinfo(host, service, &hints, &a);
    if (error) {
        say("--host: %.128s: %s", host, gai_strerror(error));
        return STATUS_USAGE;
    }
    int fd = -1;
    for (const struct addrinfo *at = a; at && fd < 0; at = at->ai_next) fd = connect_to(at);
    const int status = fd < 0 ? -1 : status_of(fd);
    if (status < 0)
        say("%.128s port %d: no answer (%s)", host, port, strerror(errno));
    else if (status != 200)
        say("%.128s port %d: not healthy (got %d, want 200)", host, port, status);
    if (fd >= 0) close(fd);
    freeaddrinfo(a);
    return status == 200 ? STATUS_GOOD : STATUS_USAGE;
}
