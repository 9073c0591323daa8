/* test_redis_reply.c - which replies of Redis are taken, in whatever pieces they come, and what is
 * said of the others. */
#include "frontends/server/redis_reply.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 4, BYTES = 3 };

typedef struct {
    redis_reply r;
    uint8_t values[MOST * BYTES], found[MOST];
    size_t used;
} reading;

/* Reads s (len) in pieces of so many bytes, each of which lies alone in memory of its size, where
 * the address sanitizer sees a read past its end. */
static reading read_pieces(int n, const char *s, size_t len, size_t piece) {
    reading a;
    memset(a.values, '.', sizeof a.values);
    memset(a.found, 7, sizeof a.found);
    redis_reply_start(&a.r, n, BYTES, a.values, a.found);
    a.used = 0;
    while (a.used < len && a.r.progress == REDIS_MORE) {
        const size_t want = len - a.used < piece ? len - a.used : piece;
        uint8_t *p = malloc(want);
        memcpy(p, s + a.used, want);
        const size_t got = redis_reply_read(&a.r, p, want);
        cr_assert(got == want || (got < want && a.r.progress != REDIS_MORE));
        free(p);
        a.used += got;
    }
    return a;
}

/* The same for every size of pieces: all have to come out alike. */
static reading read_all(int n, const char *s, size_t len) {
    const reading a = read_pieces(n, s, len, len);
    for (size_t piece = 1; piece < len; piece++) {
        const reading b = read_pieces(n, s, len, piece);
        cr_assert_eq(a.r.progress, b.r.progress, "%s in pieces of %zu", s, piece);
        cr_assert_str_eq(a.r.text, b.r.text);
        cr_assert(a.r.progress == REDIS_BAD || a.used == b.used);
        cr_assert(
            a.r.progress != REDIS_DONE || !n ||
            (!memcmp(a.found, b.found, MOST) && !memcmp(a.values, b.values, sizeof a.values)));
    }
    return a;
}

static void takes(int n, const char *s, const char *values, const char *found) {
    const reading a = read_all(n, s, strlen(s));
    cr_assert_eq(a.r.progress, REDIS_DONE, "%s: %s", s, a.r.text);
    cr_assert_eq(a.used, strlen(s));
    for (int i = 0; i < n; i++) {
        cr_assert_eq(a.found[i], found[i] - '0', "%s", s);
        if (a.found[i] == REDIS_FOUND)
            cr_assert_arr_eq(a.values + i * BYTES, values + i * BYTES, BYTES, "%s", s);
    }
}

Test(redis_reply, values_of_the_wanted_length_are_found) {
    takes(1, "*1\r\n$3\r\nabc\r\n", "abc", "1");
    takes(2, "*2\r\n$-1\r\n$3\r\n\r\n\r\r\n", "...\r\n\r", "01"); /* a value has any bytes */
    takes(4, "*4\r\n$3\r\nabc\r\n$2\r\nab\r\n$0\r\n\r\n$3\r\nxyz\r\n", "abc......xyz", "1221");
    takes(2, "*2\r\n$7\r\n$3\r\nabc\r\n$3\r\nuvw\r\n", "...uvw", "21");
}

Test(redis_reply, what_follows_is_left) {
    const char *s = "*1\r\n$-1\r\n+OK\r\n";
    const reading a = read_all(1, s, strlen(s));
    cr_expect(a.r.progress == REDIS_DONE && a.used == strlen("*1\r\n$-1\r\n"));
}

Test(redis_reply, a_status) {
    takes(0, "+OK\r\n", "", "");
    takes(0, "+\r\n", "", "");
    const reading a = read_all(0, "+QUEUED\r\n", 9);
    cr_expect_str_eq(a.r.text, "QUEUED");
}

static void fails(int n, const char *s, const char *text) {
    const reading a = read_all(n, s, strlen(s));
    cr_expect_eq(a.r.progress, REDIS_ERROR, "%s", s);
    cr_expect_str_eq(a.r.text, text);
}

Test(redis_reply, an_error_is_said) {
    fails(0, "-OOM command not allowed\r\n", "OOM command not allowed");
    fails(2, "-NOAUTH Authentication required.\r\n", "NOAUTH Authentication required.");
    fails(1, "-a\x1b[2Jb\x07\r\n", "a?[2Jb?"); /* nothing reaches a terminal raw */
}

/* MISCONF has more than 300 bytes. What is kept of it is its beginning. */
Test(redis_reply, a_long_error) {
    char s[REDIS_LINE_MOST + 1];
    memset(s, 'E', sizeof s);
    s[0] = '-';
    memcpy(s + sizeof s - 2, "\r\n", 2);
    const reading a = read_all(1, s, sizeof s);
    cr_expect_eq(a.r.progress, REDIS_ERROR);
    cr_expect_eq(strlen(a.r.text), sizeof a.r.text - 1);
    cr_expect_eq(strspn(a.r.text, "E"), strlen(a.r.text));
}

static void refuses(int n, const char *s, const char *why) {
    const reading a = read_all(n, s, strlen(s));
    cr_expect_eq(a.r.progress, REDIS_BAD, "%s", s);
    cr_expect_not_null(strstr(a.r.text, why), "%s: %s", s, a.r.text);
}

Test(redis_reply, anything_else_is_refused) {
    refuses(1, "*2000000000\r\n", "not what was asked for (got \"*2000000000\", want 1 values)");
    refuses(1, "*4611686018427387905\r\n", "not what was asked for");
    refuses(1, "*18446744073709551617\r\n", "not what was asked for"); /* 1 modulo 2^64 */
    refuses(1, "*-1\r\n", "not what was asked for");
    refuses(2, "*1\r\n", "not what was asked for");
    refuses(1, "*\r\n", "not what was asked for");
    refuses(1, "*1 \r\n", "not what was asked for");
    refuses(1, "*+1\r\n", "not what was asked for");
    refuses(1, "+OK\r\n", "not what was asked for");
    refuses(1, "\r\n", "not what was asked for");
    refuses(1, "HTTP/1.1 200 OK\r\n", "not what was asked for");
    refuses(0, "*0\r\n", "want a status");
    refuses(0, ":1\r\n", "want a status");
    refuses(0, "$-1\r\n", "want a status");
    refuses(1, "*1\r\n*1\r\n", "not a value (got \"*1\", want 3 bytes or none)");
    refuses(1, "*1\r\n:5\r\n", "not a value");
    refuses(1, "*1\r\n-ERR\r\n", "not a value");
    refuses(1, "*1\r\n$-2\r\n", "not a value");
    refuses(1, "*1\r\n$9223372036854775807\r\n", "not a value");
    refuses(1, "*1\r\n$2000000000\r\n", "a value too long (got \"$2000000000\"");
    refuses(1, "*1\r\n$3\r\nabcd\r\n", "a value without an end");
    refuses(1, "*1\r\n$3\r\nabc\n", "a value without an end");
    refuses(1, "*1\n", "a line without an end");
    refuses(1, "*1\rx", "a line without an end");
    refuses(1, "\x1b[2J\r\n", "(got \"?[2J\"");
}

Test(redis_reply, a_line_has_an_end) {
    char s[REDIS_LINE_MOST + 16];
    memset(s, 'O', sizeof s);
    s[0] = '+';
    const reading a = read_all(0, s, sizeof s);
    cr_expect_eq(a.r.progress, REDIS_BAD);
    cr_expect_eq(a.used, REDIS_LINE_MOST + 1);
}

/* A value of another length costs the time to read it, and no memory. */
Test(redis_reply, a_long_value_is_dropped) {
    const size_t len = REDIS_VALUE_MOST;
    char *s = malloc(len + 64);
    size_t n = (size_t)sprintf(s, "*2\r\n$%zu\r\n", len);
    memset(s + n, 'x', len);
    n += len;
    n += (size_t)sprintf(s + n, "\r\n$3\r\nabc\r\n");
    const reading a = read_pieces(2, s, n, 1000);
    cr_expect(a.r.progress == REDIS_DONE && a.found[0] == REDIS_OTHER && a.found[1] == REDIS_FOUND);
    cr_expect_arr_eq(a.values, "...abc", 6);
    free(s);
}

Test(redis_reply, half_a_reply_is_none) {
    const char *s = "*2\r\n$3\r\nabc\r\n$-1\r\n";
    for (size_t n = 0; n < strlen(s); n++)
        cr_expect_eq(read_pieces(2, s, n, 1).r.progress, REDIS_MORE);
}
