/* http_conn.c - connections; see request.h.
 *
 * One thread, the event thread, does all that is done with sockets, so no connection has a lock. It
 * waits by epoll, never for a client, and computes nothing: it answers /health while the pool
 * parses. A connection is in one of these states:
 *
 *   HEAD --> BODY --> WORK --> SEND --> HEAD        the next request, perhaps already received
 *     |                          `----> LINGER      after an early one, until the client closes
 *     `--> PARKED --> BODY                          beyond the limit, until there is room
 *
 * A client that is slower than FLOOR, or makes no progress for the time-out, is cut off. If clients
 * wait for a connection or for memory, the grace is EVICT_AFTER. No connection in WORK is cut off.
 *
 * A client that has sent all it wants may shut down its sending half, which looks like a closed
 * socket. Then the first byte of the response, which is always an H, is sent before the rest is
 * known: a closed socket answers it by a reset, and epoll reports that.
 */
#include "request.h"

#include "frontends/console.h"

#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

/* Connections beyond the limit: their requests for /health and /metrics are answered, others wait
 * for a connection to end. */
#define RESERVE 64
/* Bytes a second that a client has to send or read, on average. */
#define FLOOR 1024
/* Seconds without progress after which a connection may have to make room. */
#define EVICT_AFTER 1.0
/* What is read behind a response that was sent before the whole request had arrived, so that
 * closing does not reset the connection and lose the response: at most for so many seconds, and
 * bytes. */
#define LINGER_SECONDS 2.0
#define LINGER_BYTES   (1 << 20)
/* Seconds that an idle connection is kept beyond what was announced, for requests on their way. */
#define KEEP_ALIVE_MORE 1.0
/* Seconds between looks at all connections. */
#define TICK 0.05
/* Seconds that a drain waits for a further request on an idle connection, and for the first request
 * on a new one. */
#define QUIET         0.25
#define FIRST_REQUEST 5.0
/* Bytes that the system keeps for a client that does not read. The rest stays here, where its
 * memory counts and its time is watched. */
#define UNSENT 131072
/* A head is read in small pieces, so that a thousand requests in one packet are not answered in one
 * turn. */
#define HEAD_PIECE 4096

typedef enum { HEAD, BODY, PARKED, WORK, SEND, LINGER, CLOSED } conn_state;

struct conn {
    conn *prev, *next;
    connections *cs;
    int fd;
    conn_state state;
    uint32_t events;  /* that epoll waits for */
    request *request; /* NULL: none whose head has arrived */
    char *in;         /* (n_in) received and not used */
    size_t n_in;
    size_t scanned; /* of `in`, for the end of the head */
    int skipped;    /* an empty line before the head */
    http_chunks chunks;
    uint64_t left; /* bytes of the body to come, if it is not chunked */
    buffer head;   /* of the response */
    size_t sent;   /* bytes of the response that the system took */
    size_t acked;  /* that the client has */
    int early; /* the response was given before the request had arrived */
    int first_sent, half_closed, reserved, requests;
    double start, since; /* the state or the period began; the last progress was made */
    uint64_t moved;      /* bytes since start */
};

struct connections {
    http *h;
    listener listener;
    int epoll, wake, accepting;
    conn *open, *closed; /* closed ones are freed when no event can name them any more */
    int n, n_reserved;
    double now, next_tick;
    atomic_int stopping, idle;
    pthread_t thread;
    pthread_mutex_t lock;   /* guards the members below */
    pthread_cond_t drained; /* listener.n is 0 */
    request *first, *last;  /* to be sent */
    char scratch[65536];    /* of the event thread */
};

static void listen_for(connections *cs, int accepting);

/* ---- states ---------------------------------------------------------------------------------- */

static void enter(conn *c, conn_state state) {
    c->state = state;
    c->start = c->since = c->cs->now;
    c->moved = 0;
}

static void progress(conn *c, size_t n) {
    c->moved += n;
    c->since = c->cs->now;
}

static int is_slow(const conn *c, double grace) {
    const double now = c->cs->now;
    return now - c->since > grace ||
           (now - c->start > grace && (double)c->moved < FLOOR * (now - c->start));
}

static void drop_input(conn *c) {
    free(c->in);
    c->in = NULL;
    c->n_in = 0;
}

static void close_conn(conn *c) {
    connections *cs = c->cs;
    if (c->state == CLOSED) return;
    if (c->request && c->state == WORK) { /* it belongs to another thread */
        c->request->conn = NULL;
        atomic_store(&c->request->gone, 1);
    } else if (c->request) {
        request_end(c->request, 0);
    }
    close(c->fd);
    free(c->head.data);
    drop_input(c);
    *(c->prev ? &c->prev->next : &cs->open) = c->next;
    if (c->next) c->next->prev = c->prev;
    c->next = cs->closed;
    cs->closed = c;
    cs->n--;
    cs->n_reserved -= c->reserved;
    cs->h->last_change = cs->now;
    c->state = CLOSED;
}

/* What a new connection waits for. */
#define INPUT (EPOLLIN | EPOLLRDHUP)

static void set_events(conn *c, uint32_t events) {
    struct epoll_event e = {.events = c->events = events, .data.ptr = c};
    if (epoll_ctl(c->cs->epoll, EPOLL_CTL_MOD, c->fd, &e)) close_conn(c);
}

/* Tells epoll what the state waits for. Errors and resets are always reported. In PARKED and WORK
 * input is waited for until some comes, which is rare, so that most requests need no call. */
static void wait_for(conn *c) {
    const uint32_t events = c->state == SEND ? EPOLLOUT : c->half_closed ? EPOLLIN : INPUT;
    const int leave = c->state == CLOSED || ((c->state == PARKED || c->state == WORK) &&
                                             c->events != EPOLLOUT);
    if (!leave && events != c->events) set_events(c, events);
}

/* ---- sending --------------------------------------------------------------------------------- */

/* Each of the steps below returns 1 if another may follow at once. */

/* Begins to send the response. */
static int answer(conn *c) {
    request *r = c->request;
    c->early = c->state != WORK;
    enter(c, SEND);
    r->closes |= c->reserved;
    if (r->answer.data) request_write_head(r, &c->head);
    if (!c->head.data) { /* no response, or out of memory */
        close_conn(c);
        return 0;
    }
    c->sent = c->first_sent ? 1 : 0;
    c->acked = 0;
    return 1;
}

/* The response has been sent. */
static int end_answer(conn *c) {
    const int closes = c->request->closes;
    request_end(c->request, 1);
    c->request = NULL;
    if (closes && !c->early && !c->n_in) {
        close_conn(c);
        return 0;
    }
    free(c->head.data);
    c->head = (buffer){0};
    c->scanned = 0;
    c->first_sent = c->skipped = 0;
    enter(c, closes ? LINGER : HEAD);
    if (closes) {
        drop_input(c);
        shutdown(c->fd, SHUT_WR);
        if (c->cs->n_reserved) c->cs->next_tick = 0; /* it may make room now */
    }
    return 1;
}

static int send_more(conn *c) {
    const buffer *body = &c->request->answer;
    const size_t head = c->head.len, all = head + body->len;
    while (c->sent < all) {
        const size_t at = c->sent < head ? 0 : c->sent - head;
        struct iovec parts[2] = {{body->data + at, body->len - at}};
        struct msghdr m = {.msg_iov = parts, .msg_iovlen = 1};
        if (c->sent < head) {
            parts[1] = parts[0];
            parts[0] = (struct iovec){c->head.data + c->sent, head - c->sent};
            m.msg_iovlen = 2;
        }
        const ssize_t n = sendmsg(c->fd, &m, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno != EAGAIN) close_conn(c);
        if (n < 0) return 0;
        c->sent += (size_t)n;
    }
    return end_answer(c);
}

/* What the client has received counts, not what the system has taken to send. */
static void note_acked(conn *c) {
    int queued = 0;
    if (ioctl(c->fd, SIOCOUTQ, &queued) || c->sent < c->acked + (size_t)queued) return;
    const size_t n = c->sent - (size_t)queued - c->acked;
    c->acked += n;
    if (n) progress(c, n);
}

/* ---- receiving ------------------------------------------------------------------------------- */

static void consume(conn *c, size_t n) {
    c->n_in -= n;
    if (c->n_in)
        memmove(c->in, c->in + n, c->n_in);
    else
        drop_input(c);
}

static int start_body(conn *c) {
    static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";
    request *r = c->request;
    if (request_check(r)) return answer(c);
    enter(c, BODY);
    c->chunks = (http_chunks){0};
    c->left = r->head.length;
    if (r->head.expects && !c->n_in && !c->first_sent && (c->left || r->head.chunked))
        if (send(c->fd, go_on, sizeof go_on - 1, MSG_NOSIGNAL) != sizeof go_on - 1) close_conn(c);
    return c->state == BODY;
}

static int take_head(conn *c) {
    if (!c->skipped && c->n_in >= 2 && !memcmp(c->in, "\r\n", 2)) {
        c->skipped = 1; /* RFC 9112, section 2.2 */
        c->scanned = 0; /* its CR may have come alone */
        consume(c, 2);
    }
    const size_t n = http_head_end(c->in, c->n_in, &c->scanned);
    if (!n) return 0;
    request *r = c->request = request_new(c->cs->h, c, c->in, n);
    if (!r) {
        close_conn(c);
        return 0;
    }
    consume(c, n);
    c->requests++;
    if (c->reserved && !r->malformed && r->route != ROUTE_HEALTH && r->route != ROUTE_METRICS) {
        enter(c, PARKED);
        if (!c->cs->accepting) listen_for(c->cs, 1); /* it may have to make room */
        return 0;
    }
    return start_body(c);
}

static int take_body(conn *c) {
    request *r = c->request;
    size_t at = 0; /* of `in`; a move for each chunk would take quadratic time */
    int ends;
    while (!(ends = r->head.chunked ? http_chunks_end(&c->chunks) : !c->left) && at < c->n_in) {
        const size_t rest = c->n_in - at;
        const char *data = c->in + at;
        size_t n = c->left < rest ? (size_t)c->left : rest;
        ptrdiff_t used = (ptrdiff_t)n;
        if (r->head.chunked) used = http_read_chunks(&c->chunks, c->in + at, rest, &data, &n);
        if (used < 0) {
            request_malformed(r, 400, "invalid_request",
                              "body: not in chunks as RFC 9112 has them");
            request_answer_error(r);
            return answer(c);
        }
        if (!r->head.chunked) c->left -= n;
        if (n && request_add_body(r, data, n)) return answer(c);
        at += (size_t)used;
    }
    consume(c, at);
    if (!ends) return 0;
    enter(c, WORK);
    return request_complete(r) ? answer(c) : 0;
}

/* Goes on as far as it can without waiting. */
static void advance(conn *c) {
    for (int more = 1; more;) {
        switch (c->state) {
        case HEAD:
            more = take_head(c);
            break;
        case BODY:
            more = take_body(c);
            break;
        case SEND:
            more = send_more(c);
            break;
        default:
            more = 0;
        }
    }
    wait_for(c);
}

static size_t piece_of(const conn *c) {
    const size_t most = sizeof c->cs->scratch;
    if (c->state == HEAD) return HEAD_PIECE;
    if (c->state == BODY && c->request->head.chunked) return most / 4;
    return c->state == BODY && c->left < most ? (size_t)c->left : most;
}

static void receive(conn *c) {
    const ssize_t n = recv(c->fd, c->cs->scratch, piece_of(c), 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n > 0 && c->state == LINGER) {
        c->moved += (uint64_t)n;
        if (c->moved > LINGER_BYTES) close_conn(c);
        return;
    }
    char *in = n > 0 ? realloc(c->in, c->n_in + (size_t)n) : NULL;
    if (!in) { /* it has ended, before a request has; or out of memory */
        close_conn(c);
        return;
    }
    if (c->state == HEAD && !c->n_in) enter(c, HEAD); /* no longer idle */
    memcpy(in + c->n_in, c->cs->scratch, (size_t)n);
    c->in = in;
    c->n_in += (size_t)n;
    progress(c, (size_t)n);
    advance(c);
}

/* The client sends more while it waits for its response: that is left where it is. Or it sends no
 * more, or has left. */
static void on_input_meanwhile(conn *c, int ends) {
    if (!ends) {
        set_events(c, EPOLLRDHUP);
        return;
    }
    c->half_closed = 1;
    if (!c->first_sent) {
        const ssize_t n = send(c->fd, "H", 1, MSG_NOSIGNAL);
        c->first_sent = n == 1;
        if (n < 0 && errno != EAGAIN && errno != EINTR) close_conn(c);
    }
    if (c->state != CLOSED) set_events(c, 0);
}

static void on_event(conn *c, uint32_t events) {
    if (c->state == CLOSED) return;
    if (events & EPOLLERR || (events & EPOLLHUP && c->state != LINGER))
        close_conn(c);
    else if (c->state == SEND)
        advance(c);
    else if (c->state == PARKED || c->state == WORK)
        on_input_meanwhile(c, !!(events & EPOLLRDHUP));
    else
        receive(c);
}

/* ---- too many connections -------------------------------------------------------------------- */

static int is_room(const connections *cs) {
    return cs->n - cs->n_reserved < cs->h->opt.max_connections || atomic_load(&cs->h->draining);
}

/* Whether another connection may take the place of c. */
static int may_go(const conn *c) {
    if (c->state == WORK || c->state == LINGER) return c->state == LINGER;
    return c->reserved ? c->cs->now - c->start > EVICT_AFTER
                       : c->state != PARKED && is_slow(c, EVICT_AFTER);
}

static int is_parked(const conn *c) { return c->state == PARKED; }

static int is_reserved(const conn *c) { return c->reserved; }

/* Whether the place of c may go to a parked request. */
static int is_replaceable(const conn *c) { return !c->reserved && may_go(c); }

/* Of the connections for which which() is 1, the one longest in its state. */
static conn *oldest(const connections *cs, int (*which)(const conn *c)) {
    conn *found = NULL;
    for (conn *c = cs->open; c; c = c->next)
        if (which(c) && (!found || c->start < found->start)) found = c;
    return found;
}

/* Whether the client of a connection within the limit has to act, or else loses it soon. */
static int has_turn(const conn *c) { return !c->reserved && c->state != WORK; }

static int number_of(const connections *cs, int (*which)(const conn *c)) {
    int n = 0;
    for (const conn *c = cs->open; c; c = c->next) n += which(c);
    return n;
}

static void reap(conn *c) {
    metrics_add(c->cs->h->opt.metrics, COUNT_REAPED, 1);
    close_conn(c);
}

static void take_reserve(conn *c) {
    c->cs->n_reserved--;
    c->reserved = 0;
}

/* Answers a parked request: there is no room for it. */
static void refuse(conn *c) {
    request *r = c->request;
    take_reserve(c);
    api_fail(&r->error, 429, "server_overloaded", NULL, "server: all connections are in use");
    r->error.retry_after = 1;
    r->closes = 1;
    request_answer_error(r);
    answer(c);
    advance(c);
}

/* Makes room for a new connection, which may ask for /health. If more requests are parked than can
 * hope for room soon, since the others are computed, the oldest does not keep it waiting. Returns 0
 * if there is no room to be had. */
static int make_room(connections *cs) {
    conn *c = oldest(cs, may_go);
    if (!c && number_of(cs, is_parked) > number_of(cs, has_turn)) c = oldest(cs, is_parked);
    if (c && c->state == PARKED)
        refuse(c);
    else if (c)
        reap(c);
    return c != NULL;
}

/* Goes on with parked requests while there is room, or some can be made. */
static void unpark(connections *cs) {
    while (cs->n_reserved) {
        conn *parked = oldest(cs, is_parked), *slow = NULL;
        if (!is_room(cs)) {
            if (parked) slow = oldest(cs, is_replaceable);
            if (!slow) return;
            reap(slow);
        }
        conn *c = parked ? parked : oldest(cs, is_reserved);
        take_reserve(c);
        if (!parked) continue;
        start_body(c);
        advance(c);
    }
}

/* ---- accepting ------------------------------------------------------------------------------- */

static void listen_for(connections *cs, int accepting) {
    cs->accepting = accepting;
    for (int i = 0; i < cs->listener.n; i++) {
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = cs};
        epoll_ctl(cs->epoll, accepting ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, cs->listener.fds[i], &e);
    }
}

static void open_conn(connections *cs, int fd) {
    const int on = 1, unsent = UNSENT;
    conn *c = calloc(1, sizeof *c);
    struct epoll_event e = {.events = INPUT, .data.ptr = c};
    if (!c || epoll_ctl(cs->epoll, EPOLL_CTL_ADD, fd, &e)) {
        free(c);
        close(fd);
        return;
    }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent);
    c->cs = cs;
    c->fd = fd;
    c->events = INPUT;
    c->reserved = !is_room(cs);
    c->next = cs->open;
    if (c->next) c->next->prev = c;
    cs->open = c;
    cs->n++;
    cs->n_reserved += c->reserved;
    cs->h->last_change = cs->now;
    enter(c, HEAD);
}

static void accept_some(connections *cs) {
    for (int i = 0; i < cs->listener.n; i++)
        for (int k = 0; k < LISTEN_BACKLOG; k++) {
            if (!is_room(cs) && cs->n_reserved >= RESERVE && !make_room(cs)) {
                listen_for(cs, 0); /* until the next tick */
                return;
            }
            const int fd =
                accept4(cs->listener.fds[i], NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
            if (fd < 0 && errno == EAGAIN) break;
            if (fd >= 0) {
                open_conn(cs, fd);
            } else if (errno != EINTR && errno != ECONNABORTED) { /* no descriptor is left */
                listen_for(cs, 0);
                return;
            }
        }
}

/* ---- the event thread ------------------------------------------------------------------------ */

static void tick_conn(conn *c) {
    const http *h = c->cs->h;
    const double now = c->cs->now, timeout = h->opt.receive_timeout;
    double grace = timeout;
    switch (c->state) {
    case HEAD:
        if (c->requests && !c->n_in) {
            if (now - c->start > h->opt.keep_alive + KEEP_ALIVE_MORE) close_conn(c);
            return;
        }
        break;
    case SEND:
        note_acked(c);
        break;
    case BODY:
        break;
    case LINGER:
        if (now - c->start > LINGER_SECONDS) close_conn(c);
        return;
    case PARKED:
        if (now - c->start > h->opt.deadline) refuse(c);
        return;
    default:
        return;
    }
    if (c->request && c->request->held && atomic_load(&h->held) > h->opt.max_memory / 2)
        grace = EVICT_AFTER < timeout ? EVICT_AFTER : timeout;
    if (is_slow(c, grace)) {
        reap(c);
    } else if (now - c->start > timeout) { /* the next period */
        c->start = now;
        c->moved = 0;
    }
}

static void tick(connections *cs) {
    const http *h = cs->h;
    int idle = !h->active && cs->now - h->last_change >= QUIET;
    for (conn *c = cs->open, *next; c; c = next) {
        next = c->next;
        tick_conn(c);
        /* a new connection gets time for a request */
        if (c->state == HEAD && !c->requests && cs->now - c->start < FIRST_REQUEST) idle = 0;
    }
    if (!cs->accepting) listen_for(cs, 1);
    unpark(cs);
    atomic_store(&cs->idle, idle && atomic_load(&h->draining));
}

static request *take_answered(connections *cs) {
    pthread_mutex_lock(&cs->lock);
    request *first = cs->first;
    cs->first = cs->last = NULL;
    pthread_mutex_unlock(&cs->lock);
    return first;
}

static void send_answers(connections *cs) {
    for (request *r = take_answered(cs), *next; r; r = next) {
        next = r->next;
        conn *c = r->conn;
        if (!c) {
            request_end(r, 0);
            continue;
        }
        answer(c);
        advance(c);
    }
}

static void drain(connections *cs) {
    accept_some(cs);
    for (int i = 0; i < cs->listener.n; i++) close(cs->listener.fds[i]); /* others are refused */
    cs->h->last_change = cs->now;
    pthread_mutex_lock(&cs->lock);
    cs->listener.n = 0;
    pthread_cond_signal(&cs->drained);
    pthread_mutex_unlock(&cs->lock);
}

static void free_closed(connections *cs) {
    for (conn *c; (c = cs->closed);) {
        cs->closed = c->next;
        free(c);
    }
}

static void *events_main(void *arg) {
    connections *cs = arg;
    struct epoll_event events[64];
    while (!atomic_load(&cs->stopping)) {
        const int n = epoll_wait(cs->epoll, events, LENGTH(events), (int)(TICK * 1e3));
        cs->now = seconds_now();
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr == cs)
                accept_some(cs);
            else if (events[i].data.ptr == &cs->wake)
                send_answers(cs);
            else
                on_event(events[i].data.ptr, events[i].events);
        }
        if (cs->listener.n && atomic_load(&cs->h->draining)) drain(cs);
        if (cs->n_reserved && is_room(cs)) unpark(cs);
        if (cs->now >= cs->next_tick) {
            tick(cs);
            cs->next_tick = cs->now + TICK;
        }
        free_closed(cs);
    }
    return NULL;
}

/* ---- for other threads ----------------------------------------------------------------------- */

/* epoll reports each write: the descriptor is never read. */
static void wake(connections *cs) {
    const uint64_t one = 1;
    while (write(cs->wake, &one, sizeof one) < 0 && errno == EINTR) {}
}

void connections_answer(connections *cs, request *r) {
    r->next = NULL;
    pthread_mutex_lock(&cs->lock);
    const int was_empty = !cs->first;
    *(cs->last ? &cs->last->next : &cs->first) = r;
    cs->last = r;
    pthread_mutex_unlock(&cs->lock);
    if (was_empty) wake(cs);
}

connections *connections_open(http *h, int *port) {
    connections *cs = need(calloc(1, sizeof *cs));
    cs->h = h;
    pthread_mutex_init(&cs->lock, NULL);
    pthread_cond_init(&cs->drained, NULL);
    cs->epoll = epoll_create1(EPOLL_CLOEXEC);
    cs->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN | EPOLLET, .data.ptr = &cs->wake};
    if (cs->epoll < 0 || cs->wake < 0 || epoll_ctl(cs->epoll, EPOLL_CTL_ADD, cs->wake, &e))
        DIE(STATUS_MODEL, "epoll: cannot open (%s)", strerror(errno));
    listen_open(&cs->listener, h->opt.host, h->opt.port);
    *port = cs->listener.port;
    listen_for(cs, 1);
    return cs;
}

void connections_start(connections *cs) {
    cs->now = seconds_now();
    const int error = pthread_create(&cs->thread, NULL, events_main, cs);
    if (error) DIE(STATUS_MODEL, "thread: cannot start it (%s)", strerror(error));
}

void connections_drain(connections *cs) {
    wake(cs);
    pthread_mutex_lock(&cs->lock);
    while (cs->listener.n) pthread_cond_wait(&cs->drained, &cs->lock);
    pthread_mutex_unlock(&cs->lock);
}

int connections_idle(connections *cs) { return atomic_load(&cs->idle); }

int connections_count(const connections *cs) { return cs->n; }

void connections_stop(connections *cs) {
    atomic_store(&cs->stopping, 1);
    wake(cs);
    pthread_join(cs->thread, NULL);
    while (cs->open) close_conn(cs->open);
    free_closed(cs);
}

void connections_free(connections *cs) {
    for (request *r = take_answered(cs), *next; r; r = next) {
        next = r->next;
        request_end(r, 0);
    }
    close(cs->wake);
    close(cs->epoll);
    pthread_mutex_destroy(&cs->lock);
    pthread_cond_destroy(&cs->drained);
    free(cs);
}
