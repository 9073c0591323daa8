/* fuzz_redis.c - libFuzzer target: any bytes as replies of a Redis. The first two bytes say what is
 * wanted and in which pieces the others arrive. The values lie alone in memory of their size. A
 * reply that is taken is one as this file writes it again; what is said of any other is printable
 * and has an end. The bytes are also read as an address. */
#include "frontends/server/redis_address.h"
#include "frontends/server/redis_reply.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHECK(x) ((x) ? (void)0 : abort())

static void check_text(const char *text) {
    CHECK(memchr(text, 0, REDIS_TEXT_ROOM));
    for (; *text; text++) CHECK((unsigned char)*text >= ' ' || *text == '\t');
}

/* Whether p (n) begins as a reply with these values does. */
static void check_array(const redis_reply *r, const uint8_t *p, size_t n) {
    char head[32];
    const size_t h = (size_t)snprintf(head, sizeof head, "*%d\r\n", r->n);
    CHECK(n >= h && (!memcmp(p, head, h) || p[1] == '0'));
    for (int i = 0; i < r->n; i++) CHECK(r->found[i] <= REDIS_OTHER);
}

static void read_reply(const uint8_t *data, size_t size, int n, size_t bytes, size_t piece) {
    uint8_t *values = malloc((size_t)n * bytes + 1), *found = malloc((size_t)n + 1);
    redis_reply r;
    size_t used = 0;
    redis_reply_start(&r, n, bytes, n ? values : NULL, n ? found : NULL);
    while (used < size && r.progress == REDIS_MORE) {
        const size_t want = size - used < piece ? size - used : piece;
        uint8_t *p = malloc(want);
        memcpy(p, data + used, want);
        const size_t got = redis_reply_read(&r, p, want);
        free(p);
        CHECK(got <= want && (got == want || r.progress != REDIS_MORE));
        used += got;
    }
    if (r.progress == REDIS_DONE && n) check_array(&r, data, used);
    if (r.progress == REDIS_BAD) CHECK(*r.text);
    check_text(r.text);
    free(values);
    free(found);
}

static void read_address(const uint8_t *data, size_t size) {
    char *s = malloc(size + 1);
    redis_address a;
    memcpy(s, data, size);
    s[size] = 0;
    const char *wrong = redis_address_read(&a, s);
    if (!wrong) {
        CHECK(*a.host && memchr(a.host, 0, sizeof a.host) && memchr(a.user, 0, sizeof a.user));
        CHECK(a.port >= 1 && a.port <= 65535 && a.db >= 0);
    }
    free(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 2) return 0;
    read_reply(data + 2, size - 2, data[0] & 7, (size_t)data[0] >> 3, (size_t)data[1] % 17 + 1);
    read_address(data + 2, size - 2);
    return 0;
}
