/* fuzz_http.c - libFuzzer target: any bytes as what a client sends to qemb-serve. Heads and chunked
 * bodies are parsed one after the other, as far as they go. Whatever the cuts between the pieces in
 * which they arrive, the result is the same; and what is accepted is what a strict reader accepts,
 * who looks at the whole head again. The first byte chooses the pieces, the second what stands
 * before the others: nothing, a request line, or a head that a chunked body follows. */
#include "frontends/server/http_parse.h"

#include <stdlib.h>
#include <string.h>
#include <strings.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHECK(x) ((x) ? (void)0 : abort())

/* The end of the head at the begin of text (n), which arrives in pieces; 0: it does not end. */
static size_t head_end(const char *text, size_t n, size_t step) {
    size_t scanned = 0, end = 0;
    for (size_t given = 0; !end && given < n;) {
        given = given + step < n ? given + step : n;
        end = http_head_end(text, given, &scanned);
        CHECK(end <= given);
    }
    return end;
}

/* A head that is taken has lines that end in CR LF, no other control character, and one framing. */
static void check_head(const http_head *h, const char *text, size_t n) {
    int lengths = 0, codings = 0;
    CHECK(n >= 4 && n <= HTTP_HEAD && !memcmp(text + n - 4, "\r\n\r\n", 4));
    for (size_t i = 0; i < n; i++) {
        const unsigned char c = (unsigned char)text[i];
        CHECK(c == '\t' || c == '\r' || c == '\n' || (c >= ' ' && c != 0x7f));
        CHECK((c == '\n') == (i && text[i - 1] == '\r'));
        CHECK(c != '\n' || i + 1 == n || (text[i + 1] != ' ' && text[i + 1] != '\t'));
    }
    CHECK(*h->method && (*h->path == '/' || !strcmp(h->path, "*")));
    for (const char *p = h->path; *p; p++) CHECK((unsigned char)*p >= ' ' && *p != 0x7f);
    CHECK(h->n <= HTTP_FIELDS);
    for (int i = 0; i < h->n; i++) {
        const char *name = h->fields[i].name;
        CHECK(*name && !strpbrk(name, " \t:"));
        lengths += !strcasecmp(name, "Content-Length");
        codings += !strcasecmp(name, "Transfer-Encoding");
    }
    CHECK(lengths + codings <= 1 && h->has_length == lengths && h->chunked == codings);
}

/* Reads the chunked body at the begin of text (n) in pieces. Returns what http_read_chunks used in
 * all, and a sum that stands for the data. */
static size_t read_body(const char *text, size_t n, size_t step, uint64_t *sum, int *bad) {
    http_chunks c = {0};
    size_t at = 0, given = 0;
    *sum = 0;
    *bad = 0;
    while (!http_chunks_end(&c) && (at < given || given < n)) {
        const char *data = NULL;
        size_t len;
        if (at == given) given = given + step < n ? given + step : n;
        const ptrdiff_t used = http_read_chunks(&c, text + at, given - at, &data, &len);
        if (used < 0) {
            *bad = 1;
            return 0;
        }
        CHECK(used > 0 && at + (size_t)used <= given);
        CHECK(!len || (data >= text + at && data + len == text + at + used));
        for (size_t i = 0; i < len; i++) *sum = 31 * *sum + (unsigned char)data[i] + 1;
        at += (size_t)used;
    }
    return at;
}

static void read_all(const char *text, size_t n, size_t step) {
    while (n) {
        http_head h;
        const size_t end = head_end(text, n, n);
        CHECK(end == head_end(text, n, step));
        if (!end) break;
        char *copy = malloc(end + 1);
        memcpy(copy, text, end);
        const http_fault *fault = http_parse(&h, copy, end);
        CHECK(!fault || (fault->status >= 400 && *fault->code && *fault->why));
        if (!fault) check_head(&h, text, end);
        const int chunked = h.chunked;
        const uint64_t length = h.length;
        free(copy);
        if (fault) break;
        text += end;
        n -= end;
        uint64_t sum, same;
        int bad = 0, also = 0;
        size_t used = length < n ? (size_t)length : n;
        if (chunked) {
            used = read_body(text, n, n, &sum, &bad);
            CHECK(used == read_body(text, n, step, &same, &also) && bad == also);
            CHECK(bad || sum == same);
        }
        if (bad) break;
        text += used;
        n -= used;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
#define HEAD "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\n"
    static const char *const begins[] = {"", HEAD, HEAD "Transfer-Encoding: chunked\r\n\r\n"};
    if (size < 2) return 0;
    const char *begin = begins[data[1] % 3];
    const size_t n = strlen(begin) + size - 2;
    char *text = malloc(n ? n : 1);
    memcpy(text, begin, strlen(begin));
    memcpy(text + strlen(begin), data + 2, size - 2);
    read_all(text, n, 1 + data[0] % 64);
    free(text);
    return 0;
}
