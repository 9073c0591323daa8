/* test_http_parse.c - heads of requests and chunked bodies: what is taken, and what is refused for
 * which reason, in one piece and byte by byte. */
#include "frontends/server/http_parse.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Parses the head at the begin of text (n). Returns the status of the fault, 0 if there is none, or
 * -1 if the head does not end. The head is given in pieces of `step` bytes. */
static int parse(http_head *h, const char *text, size_t n, size_t step) {
    static char copy[2 * HTTP_HEAD];
    size_t scanned = 0, end = 0, given = 0;
    while (!end && given < n) {
        given = given + step < n ? given + step : n;
        end = http_head_end(text, given, &scanned);
    }
    if (!end) return -1;
    cr_assert(end <= given);
    memcpy(copy, text, end);
    const http_fault *fault = http_parse(h, copy, end);
    cr_assert(h->method && h->path);
    if (fault) cr_assert(fault->code && *fault->why);
    return fault ? fault->status : 0;
}

static int status_of(const char *text, size_t n) {
    http_head h;
    const int whole = parse(&h, text, n, n), bytes = parse(&h, text, n, 1);
    cr_assert_eq(whole, bytes, "%d in one piece, %d byte by byte: %s", whole, bytes, text);
    return whole;
}

#define LINE "POST /v1/embeddings HTTP/1.1\r\n"
#define HOST "Host: x\r\n"

Test(http_parse, what_a_head_says) {
    static const char text[] = "POST /v1%2fx%20y/?q=1 HTTP/1.1\r\nHost:\r\n"
                               "Content-Length:  012 \r\n"
                               "X-Two: a\tb \t\r\nx-two: c\r\nExpect: 100-Continue\r\n\r\nBODY";
    http_head h;
    cr_assert_eq(parse(&h, text, sizeof text - 1, sizeof text - 1), 0);
    cr_assert_str_eq(h.method, "POST");
    cr_assert_str_eq(h.path, "/v1/x y/");
    cr_assert_str_eq(http_field(&h, "HOST"), "");
    cr_assert_str_eq(http_field(&h, "x-two"), "a\tb");
    cr_assert_null(http_field(&h, "X"));
    cr_assert(h.n == 5 && h.is_11 && h.keep_alive && h.expects && !h.chunked);
    cr_assert(h.has_length && h.length == 12);
    size_t scanned = 0;
    cr_assert_eq(http_head_end(text, sizeof text - 1, &scanned), sizeof text - 1 - strlen("BODY"));
}

Test(http_parse, targets) {
    static const struct {
        const char *target, *path; /* NULL: refused */
    } cases[] = {{"/", "/"},
                 {"/%41%c3%A9", "/A\xc3\xa9"},
                 {"/\xc3\xa9", "/\xc3\xa9"},
                 {"http://a.example/health?x", "/health"},
                 {"http://a.example", "/"},
                 {"http://a.example?x", "/"},
                 {"HTTPS://a.example/health", "/health"},
                 {"*", "*"},
                 {"health/http://a.example/x", NULL},
                 {"ftp://a.example/health", NULL},
                 {"/?a%20b%", NULL},
                 {"/?%00", NULL},
                 {"/health%00", NULL},
                 {"/health%0a", NULL},
                 {"/health%7F", NULL},
                 {"/%4", NULL},
                 {"/%", NULL},
                 {"/%g1", NULL},
                 {"health", NULL},
                 {"a.example:80", NULL}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[256];
        http_head h;
        const int n =
            snprintf(text, sizeof text, "GET %s HTTP/1.1\r\n" HOST "\r\n", cases[i].target);
        const int status = parse(&h, text, (size_t)n, (size_t)n);
        cr_assert_eq(status, cases[i].path ? 0 : 400, "%s: %d", cases[i].target, status);
        if (cases[i].path) cr_assert_str_eq(h.path, cases[i].path);
    }
}

Test(http_parse, connections) {
    static const struct {
        const char *text;
        int keeps;
    } cases[] = {{"GET / HTTP/1.1\r\n" HOST "\r\n", 1},
                 {"GET / HTTP/1.1\r\n" HOST "Connection: close\r\n\r\n", 0},
                 {"GET / HTTP/1.1\r\n" HOST "Connection: TE , CLOSE\r\n\r\n", 0},
                 {"GET / HTTP/1.1\r\n" HOST "Connection: a\r\nConnection: close\r\n\r\n", 0},
                 {"GET / HTTP/1.1\r\n" HOST "Connection: closed, x-close\r\n\r\n", 1},
                 {"GET / HTTP/1.0\r\n\r\n", 0},
                 {"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", 1},
                 {"GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n", 0}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        http_head h;
        cr_assert_eq(parse(&h, cases[i].text, strlen(cases[i].text), 7), 0, "%s", cases[i].text);
        cr_assert_eq(h.keep_alive, cases[i].keeps, "%s", cases[i].text);
    }
}

/* Text and what it gets; -1: it does not end. */
#define CASE(text, status) {text, sizeof text - 1, status}
static const struct {
    const char *text;
    size_t n;
    int status;
} heads[] = {
    CASE(LINE HOST "\r\n", 0),
    CASE(LINE HOST "Content-Length: 0\r\n\r\n", 0),
    CASE(LINE HOST "Transfer-Encoding: Chunked\r\n\r\n", 0),
    CASE(LINE HOST "Content-Length: 99999999999999999999999\r\n\r\n", 0),
    CASE("!#$%&'*+-.^_`|~09azAZ / HTTP/1.1\r\n" HOST "\r\n", 0),
    CASE(LINE HOST "x:\xff\xfe\r\n\r\n", 0),
    CASE(LINE HOST, -1),
    CASE(LINE HOST "\r", -1),
    CASE("G", -1),
    /* two lengths */
    CASE(LINE HOST "Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
    CASE(LINE HOST "Content-Length: 5\r\ncontent-length: 5\r\n\r\n", 400),
    CASE(LINE HOST "Content-Length: 5, 5\r\n\r\n", 400),
    CASE(LINE HOST "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    CASE(LINE HOST "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400),
    CASE(LINE HOST "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    /* no length */
    CASE(LINE HOST "Content-Length: +5\r\n\r\n", 400),
    CASE(LINE HOST "Content-Length: -1\r\n\r\n", 400),
    CASE(LINE HOST "Content-Length: 0x5\r\n\r\n", 400),
    CASE(LINE HOST "Content-Length: 5 5\r\n\r\n", 400),
    CASE(LINE HOST "Content-Length:\r\n\r\n", 400),
    CASE(LINE HOST "Content-Length: 5\v\r\n\r\n", 400),
    /* no chunks */
    CASE(LINE HOST "Transfer-Encoding : chunked\r\n\r\n", 400),
    CASE(LINE HOST "Transfer-Encoding: chunked, gzip\r\n\r\n", 400),
    CASE(LINE HOST "Transfer-Encoding: identity\r\n\r\n", 400),
    CASE(LINE HOST "Transfer-Encoding: xchunked\r\n\r\n", 400),
    CASE(LINE HOST "Transfer-Encoding:\r\n\r\n", 400),
    CASE(LINE HOST "Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    CASE("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    /* lines */
    CASE("GET / HTTP/1.1\n", 400),
    CASE(LINE "Host: x\n", 400),
    CASE(LINE HOST "\n", 400),
    CASE(LINE "Host: x\r\r\n", 400),
    CASE(LINE "Host: x\ry\r\n\r\n", 400),
    CASE(LINE HOST "X: a\r\n b\r\n\r\n", 400),
    CASE(LINE " " HOST "\r\n", 400),
    CASE(LINE HOST "X: a\0b\r\n\r\n", 400),
    CASE(LINE HOST "X\0: a\r\n\r\n", 400),
    CASE(LINE HOST "X: \x1b[2J\r\n\r\n", 400),
    CASE(LINE HOST "X: \x7f\r\n\r\n", 400),
    CASE("\0\0\0\0", 400),
    CASE("\x16\x03\x01\x02", 400), /* a TLS client */
    CASE("\r\n", 400), /* the server drops one such line before it asks */
    /* names */
    CASE(LINE HOST "X\t: a\r\n\r\n", 400),
    CASE(LINE HOST "X\r\n\r\n", 400),
    CASE(LINE HOST ": a\r\n\r\n", 400),
    CASE(LINE HOST "X(: a\r\n\r\n", 400),
    CASE(LINE HOST "X\xe9: a\r\n\r\n", 400),
    CASE(LINE "\r\n", 400), /* no Host */
    CASE(LINE HOST HOST "\r\n", 400),
    CASE(LINE HOST "Authorization: a\r\nauthorization: b\r\n\r\n", 400),
    CASE(LINE HOST "Content-Encoding: gzip\r\nContent-Encoding: gzip\r\n\r\n", 400),
    CASE(LINE HOST "Expect: 200-ok\r\n\r\n", 417),
    /* request lines */
    CASE("GET /\r\n\r\n", 400),
    CASE("GET  / HTTP/1.1\r\n" HOST "\r\n", 400),
    CASE("GET /  HTTP/1.1\r\n" HOST "\r\n", 400),
    CASE("GET /\tHTTP/1.1\r\n" HOST "\r\n", 400),
    CASE("GET / x HTTP/1.1\r\n" HOST "\r\n", 400),
    CASE("GET / HTTP/1.1 \r\n" HOST "\r\n", 400),
    CASE(" GET / HTTP/1.1\r\n" HOST "\r\n", 400),
    CASE("G(T / HTTP/1.1\r\n" HOST "\r\n", 400),
    CASE("/ HTTP/1.1\r\n" HOST "\r\n", 400),
    CASE("GET / http/1.1\r\n" HOST "\r\n", 400),
    CASE("GET / HTTP/1.x\r\n" HOST "\r\n", 400),
    CASE("GET / HTTP/1.10\r\n" HOST "\r\n", 400),
    CASE("GET / HTTP/9.9\r\n\r\n", 505),
    CASE("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    CASE("GET / HTTP/0.9\r\n\r\n", 505),
};

Test(http_parse, heads) {
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        const int status = status_of(heads[i].text, heads[i].n);
        cr_assert_eq(status, heads[i].status, "%zu: %d, want %d: %s", i, status, heads[i].status,
                     heads[i].text);
    }
}

Test(http_parse, what_stands_before_a_fault_is_known) {
    static const char text[] = "HEAD /health HTTP/1.1\r\nx-request-id: me\r\nX : a\r\nY: b\r\n\r\n";
    http_head h;
    cr_assert_eq(parse(&h, text, sizeof text - 1, 3), 400);
    cr_assert_str_eq(h.method, "HEAD");
    cr_assert_str_eq(h.path, "/health");
    cr_assert_str_eq(http_field(&h, "X-Request-ID"), "me");
    cr_assert_null(http_field(&h, "Y"));
}

Test(http_parse, the_message_names_the_field_that_comes_twice) {
    static const char *const names[] = {"Host",         "Content-Length",   "Transfer-Encoding",
                                        "Content-Type", "Content-Encoding", "Authorization",
                                        "Expect"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char text[200], want[80];
        http_head h;
        const int n = sprintf(text, LINE "%s: 1\r\n%s: 1\r\n\r\n", names[i], names[i]);
        const http_fault *fault = http_parse(&h, text, (size_t)n);
        sprintf(want, "%s: twice (want it once)", names[i]);
        cr_assert(fault);
        cr_assert_str_eq(fault->why, want);
    }
}

/* A head of n bytes: "GET /aa... HTTP/1.1", fields "X: bb...", and an end. */
static size_t make(char *text, size_t target, int fields, size_t value) {
    char *p = text + sprintf(text, "GET /");
    memset(p, 'a', target - 1);
    p += target - 1;
    p += sprintf(p, " HTTP/1.1\r\n" HOST);
    for (int i = 0; i < fields; i++) {
        p += sprintf(p, "X: ");
        memset(p, 'b', value);
        p += value;
        p += sprintf(p, "\r\n");
    }
    return (size_t)(p + sprintf(p, "\r\n") - text);
}

Test(http_parse, limits) {
    char *text = malloc(4 * HTTP_HEAD);
    cr_assert_eq(status_of(text, make(text, HTTP_TARGET, 0, 0)), 0);
    cr_assert_eq(status_of(text, make(text, HTTP_TARGET + 1, 0, 0)), 414);
    cr_assert_eq(status_of(text, make(text, 2 * HTTP_TARGET, 0, 0)), 414);
    cr_assert_eq(status_of(text, make(text, 1, HTTP_FIELDS - 1, 1)), 0);
    cr_assert_eq(status_of(text, make(text, 1, HTTP_FIELDS, 1)), 431);
    const size_t others = make(text, 1, 1, 0);
    cr_assert_eq(status_of(text, make(text, 1, 1, HTTP_HEAD - others)), 0);
    cr_assert_eq(status_of(text, make(text, 1, 1, HTTP_HEAD - others + 1)), 431);
    memset(text, 'x', 4 * HTTP_HEAD); /* without an end, it is refused no later than at the limit */
    size_t scanned = 0;
    cr_assert(http_head_end(text, HTTP_TARGET, &scanned) == 0);
    cr_assert(http_head_end(text, 4 * HTTP_HEAD, &scanned) < HTTP_TARGET + 100);
    free(text);
}

/* ---- chunks ---------------------------------------------------------------------------------- */

/* Reads text (n) in pieces of `step` bytes; out (*len) is the data. Returns how many bytes the body
 * takes, 0 if it does not end, or -1. */
static ptrdiff_t read_chunks(const char *text, size_t n, size_t step, char *out, size_t *len) {
    http_chunks c = {0};
    size_t at = 0, given = 0;
    *len = 0;
    while (!http_chunks_end(&c)) {
        const char *data = NULL;
        size_t got;
        if (at == given && given == n) return 0;
        if (at == given) given = given + step < n ? given + step : n;
        const ptrdiff_t used = http_read_chunks(&c, text + at, given - at, &data, &got);
        if (used < 0) return -1;
        cr_assert(used > 0 && at + (size_t)used <= given);
        if (got) memcpy(out + *len, data, got);
        *len += got;
        at += (size_t)used;
    }
    return (ptrdiff_t)at;
}

static const struct {
    const char *text;
    size_t n;
    ptrdiff_t used; /* 0: it does not end; -1: refused */
    const char *data;
} bodies[] = {
#define BODY(text, used, data) {text, sizeof text - 1, used, data}
    BODY("0\r\n\r\nGET", 5, ""),
    BODY("3\r\nabc\r\n0\r\n\r\n", 13, "abc"),
    BODY("3;a=b\r\nabc\r\n00a;\"x\"\r\n0123456789\r\n000\r\nX: y\r\nZ:\r\n\r\nrest", 50,
         "abc0123456789"),
    BODY("9\r\n0\r\n\r\n1\r\n0\r\n0\r\n\r\n", 19, "0\r\n\r\n1\r\n0"),
    BODY("3\r\nab", 0, NULL),
    BODY("0\r\n", 0, NULL),
    BODY("\r\n", -1, NULL),
    BODY("zz\r\n", -1, NULL),
    BODY("+3\r\n", -1, NULL),
    BODY("-3\r\n", -1, NULL),
    BODY(" 3\r\n", -1, NULL),
    BODY("3 \r\n", -1, NULL),
    BODY("0x3\r\n", -1, NULL),
    BODY("3\nabc", -1, NULL),
    BODY("3\r\nabc\n", -1, NULL),
    BODY("3\r\nabcd", -1, NULL),
    BODY("3\r\nabc\r\r", -1, NULL),
    BODY("3;a\nb\r\n", -1, NULL),
    BODY("3;\0\r\n", -1, NULL),
    BODY("3\rabc", -1, NULL),
    BODY("ffffffffffffffffff\r\n", -1, NULL),
    BODY("0000000000000000\r\n", -1, NULL),
    BODY("0\r\n x\r\n\r\n", -1, NULL),
    BODY("0\r\nX : y\r\n\r\n", -1, NULL),
    BODY("0\r\nX: y\n\n", -1, NULL),
    BODY("0\r\nX: \0\r\n\r\n", -1, NULL),
    BODY("0\r\nX\r\n\r\n", -1, NULL),
};

Test(http_parse, chunks) {
    char out[256];
    for (size_t i = 0; i < sizeof bodies / sizeof *bodies; i++)
        for (size_t step = 1; step <= bodies[i].n; step++) {
            size_t len;
            const ptrdiff_t used = read_chunks(bodies[i].text, bodies[i].n, step, out, &len);
            cr_assert_eq(used, bodies[i].used, "%zu in steps of %zu: %td, want %td", i, step, used,
                         bodies[i].used);
            if (!bodies[i].data) continue;
            cr_assert(len == strlen(bodies[i].data) && !memcmp(out, bodies[i].data, len));
        }
}

Test(http_parse, chunks_with_much_beside_the_data) {
    char text[64];
    http_chunks c = {0};
    size_t len, extra = 0;
    const char *data;
    const int n = snprintf(text, sizeof text, "1;%030d\r\nx\r\n", 0);
    for (int used = 0; used >= 0; extra += 31) {
        cr_assert(extra < HTTP_CHUNK_EXTRA + 31, "extensions without end are read");
        for (int at = 0; used >= 0 && at < n; at += used)
            used = (int)http_read_chunks(&c, text + at, (size_t)(n - at), &data, &len);
    }
    cr_assert(extra > HTTP_CHUNK_EXTRA / 2);
}
