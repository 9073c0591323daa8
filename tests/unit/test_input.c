/* test_input.c - records from descriptors, however the bytes arrive; objects in JSON lines. */
#include "frontends/input.h"
#include "support.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>
#define ZLIB_CONST
#include <zlib.h>
#include <zstd.h>

/* ---- records --------------------------------------------------------------------------------- */

/* A pipe; the test writes to `out`. */
typedef struct {
    int in, out;
    input *input;
} fixture;

static fixture open_input(char separator) {
    int fd[2];
    cr_assert(!pipe(fd));
    return (fixture){fd[0], fd[1], input_new(fd[0], -1, separator)};
}

static void feed(fixture *f, const char *s, size_t n) {
    cr_assert(write(f->out, s, n) == (ssize_t)n);
}

static void close_input(fixture *f) {
    input_free(f->input);
    close(f->in);
    if (f->out >= 0) close(f->out);
}

static void end(fixture *f) {
    close(f->out);
    f->out = -1;
}

static void expect_record(fixture *f, const char *text, size_t len, uint64_t line) {
    input_record r;
    cr_assert(input_next(f->input, 1, &r) == INPUT_RECORD);
    cr_assert(!r.too_large && r.line == line && r.len == len && !memcmp(r.text, text, len),
              "line %d is %.*s", (int)r.line, (int)r.len, r.text);
}

static void expect_end(fixture *f) {
    input_record r;
    cr_assert(input_next(f->input, 1, &r) == INPUT_END);
    cr_assert(input_next(f->input, 0, &r) == INPUT_END, "the end stays");
}

Test(records, lines) {
    fixture f = open_input('\n');
    const char text[] = "one\n\ntwo\r\n\r\nth\rree\r\r\nnul\0l\nlast";
    feed(&f, text, sizeof text - 1);
    end(&f);
    expect_record(&f, "one", 3, 1);
    expect_record(&f, "", 0, 2);
    expect_record(&f, "two", 3, 3);
    expect_record(&f, "", 0, 4);
    expect_record(&f, "th\rree\r", 7, 5);
    expect_record(&f, "nul\0l", 5, 6);
    expect_record(&f, "last", 4, 7);
    expect_end(&f);
    cr_expect(input_consumed(f.input) == sizeof text - 1);
    close_input(&f);
}

Test(records, nul_separated) {
    fixture f = open_input('\0');
    feed(&f, "a\nb\r\0\0c\r", 8);
    end(&f);
    expect_record(&f, "a\nb\r", 4, 1);
    expect_record(&f, "", 0, 2);
    expect_record(&f, "c\r", 2, 3);
    expect_end(&f);
    close_input(&f);
}

Test(records, nothing_and_one_newline) {
    fixture f = open_input('\n');
    end(&f);
    expect_end(&f);
    close_input(&f);
    f = open_input('\n');
    feed(&f, "\n", 1);
    end(&f);
    expect_record(&f, "", 0, 1);
    expect_end(&f);
    close_input(&f);
}

Test(records, wait_is_told_apart_from_the_end) {
    fixture f = open_input('\n');
    input_record r;
    cr_assert(input_next(f.input, 0, &r) == INPUT_WAIT);
    feed(&f, "half", 4);
    cr_assert(input_next(f.input, 0, &r) == INPUT_WAIT);
    feed(&f, " a line\nmore", 12);
    cr_assert(input_next(f.input, 0, &r) == INPUT_RECORD);
    cr_assert(r.len == 11 && !memcmp(r.text, "half a line", 11));
    cr_assert(input_next(f.input, 0, &r) == INPUT_WAIT);
    end(&f);
    expect_record(&f, "more", 4, 2);
    expect_end(&f);
    close_input(&f);
}

/* The records do not depend on where the writes are split. */
Test(records, any_cut) {
    const char text[] = "a\nbc\r\n\n\0d\ne";
    const size_t n = sizeof text - 1;
    for (unsigned cuts = 0; cuts < 1u << (n - 1); cuts++) {
        fixture f = open_input('\n');
        input_record r;
        char got[64];
        size_t len = 0;
        for (size_t i = 0, start = 0; i < n; i++) {
            if (i + 1 < n && !(cuts >> i & 1)) continue;
            feed(&f, text + start, i + 1 - start);
            start = i + 1;
            if (i + 1 == n) end(&f);
            input_status s;
            while ((s = input_next(f.input, 0, &r)) == INPUT_RECORD) {
                memcpy(got + len, r.text, r.len);
                len += r.len;
                got[len++] = '|';
            }
            cr_assert(s == (i + 1 == n ? INPUT_END : INPUT_WAIT));
        }
        cr_assert(len == 11 && !memcmp(got, "a|bc||\0d|e|", 11), "cuts %x: %.*s", cuts, (int)len,
                  got);
        close_input(&f);
    }
}

/* A file with lines that are about as long as the buffer, twice as long, and far longer. */
Test(records, long_lines) {
    static const size_t lengths[] = {0,      1,      262142, 262143, 262144,  262145, 3,
                                     524287, 524288, 524289, 5,      9000000, 0,      262144};
    const int n = (int)(sizeof lengths / sizeof *lengths);
    FILE *file = tmpfile();
    for (int i = 0; i < n; i++) {
        for (size_t k = 0; k < lengths[i]; k++)
            putc("abcdefg"[(k * 7 + (size_t)i + k / 3) % 7], file);
        putc('\n', file);
    }
    cr_assert(!fflush(file) && !fseek(file, 0, SEEK_SET));
    input *in = input_new(fileno(file), -1, '\n');
    input_record r;
    for (int i = 0; i < n; i++) {
        cr_assert(input_next(in, 1, &r) == INPUT_RECORD && r.len == lengths[i] && !r.too_large);
        for (size_t k = 0; k < r.len; k++)
            cr_assert(r.text[k] == "abcdefg"[(k * 7 + (size_t)i + k / 3) % 7]);
    }
    cr_assert(input_next(in, 1, &r) == INPUT_END);
    input_free(in);
    fclose(file);
}

Test(records, a_wake_ends_the_wait) {
    int wake[2];
    cr_assert(!pipe(wake));
    fixture f = open_input('\n');
    input_free(f.input);
    f.input = input_new(f.in, wake[0], '\n');
    feed(&f, "a\nb\nha", 6);
    expect_record(&f, "a", 1, 1);
    cr_assert(write(wake[1], "", 1) == 1);
    expect_record(&f, "b", 1, 2); /* already in the buffer */
    input_record r;
    cr_assert(input_next(f.input, 1, &r) == INPUT_STOPPED);
    close_input(&f);
}

Test(records, errors_say_why) {
    input_record r;
    const int dir = open("/", O_RDONLY);
    input *in = input_new(dir, -1, '\n');
    cr_assert(input_next(in, 1, &r) == INPUT_FAILED && !strcmp(input_error(in), "Is a directory"));
    cr_assert(input_next(in, 0, &r) == INPUT_FAILED && !strcmp(input_error(in), "Is a directory"),
              "it stays");
    input_free(in);
    close(dir);
}

/* input_next waits for a descriptor that another process made non-blocking. */
Test(records, non_blocking_descriptor) {
    fixture f = open_input('\n');
    cr_assert(!fcntl(f.in, F_SETFL, O_NONBLOCK));
    input_record r;
    cr_assert(input_next(f.input, 0, &r) == INPUT_WAIT);
    feed(&f, "x\n", 2);
    expect_record(&f, "x", 1, 1);
    end(&f);
    expect_end(&f);
    close_input(&f);
}

/* A line that does not fit in memory is too_large, and the next ones are read. Not with ASan, which
 * does not obey the limit on memory. */
#if !defined(__SANITIZE_ADDRESS__)
Test(records, a_line_without_memory_is_skipped) {
    FILE *file = tmpfile();
    char *chunk = malloc(1 << 20);
    memset(chunk, 'x', 1 << 20);
    fputs("first\n", file);
    for (int i = 0; i < 300; i++) cr_assert(fwrite(chunk, 1, 1 << 20, file) == 1 << 20);
    fputs("\nlast", file);
    free(chunk);
    cr_assert(!fflush(file) && !fseek(file, 0, SEEK_SET));
    input *in = input_new(fileno(file), -1, '\n');
    struct rlimit limit = {(rlim_t)200 << 20, RLIM_INFINITY};
    cr_assert(!setrlimit(RLIMIT_AS, &limit));
    input_record r;
    cr_assert(input_next(in, 1, &r) == INPUT_RECORD && r.len == 5 && !r.too_large);
    cr_assert(input_next(in, 1, &r) == INPUT_RECORD && r.too_large && r.len == 0 && r.line == 2);
    cr_assert(input_next(in, 1, &r) == INPUT_RECORD && !r.too_large && r.len == 4 && r.line == 3);
    cr_assert(!memcmp(r.text, "last", 4) && input_next(in, 1, &r) == INPUT_END);
    cr_assert(input_consumed(in) == 6 + (300u << 20) + 5);
    input_free(in);
    fclose(file);
}
#endif

/* ---- compressed records ---------------------------------------------------------------------- */

typedef struct {
    char bytes[4096];
    size_t n;
} packed;

static void add_gzip(packed *p, const char *s, size_t len) {
    z_stream z = {.next_in = (const Bytef *)s,
                  .avail_in = (uInt)len,
                  .next_out = (Bytef *)p->bytes + p->n,
                  .avail_out = (uInt)(sizeof p->bytes - p->n)};
    cr_assert(deflateInit2(&z, 9, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY) == Z_OK);
    cr_assert(deflate(&z, Z_FINISH) == Z_STREAM_END);
    p->n = (size_t)((char *)z.next_out - p->bytes);
    deflateEnd(&z);
}

static void add_zstd(packed *p, const char *s, size_t len) {
    ZSTD_CCtx *c = ZSTD_createCCtx();
    ZSTD_CCtx_setParameter(c, ZSTD_c_checksumFlag, 1);
    const size_t n = ZSTD_compress2(c, p->bytes + p->n, sizeof p->bytes - p->n, s, len);
    cr_assert(!ZSTD_isError(n));
    p->n += n;
    ZSTD_freeCCtx(c);
}

/* Two members or frames that meet within the second line. */
static packed pack(int zstd) {
    packed p = {.n = 0};
    void (*add)(packed *, const char *, size_t) = zstd ? add_zstd : add_gzip;
    add(&p, "one\nt", 5);
    add(&p, "", 0);
    add(&p, "wo\r\n\nlast", 9);
    return p;
}

Test(compressed, in_any_two_pieces) {
    for (int zstd = 0; zstd < 2; zstd++) {
        const packed p = pack(zstd);
        for (size_t cut = 0; cut <= p.n; cut++) {
            fixture f = open_input('\n');
            input_record r;
            feed(&f, p.bytes, cut);
            while (input_next(f.input, 0, &r) == INPUT_RECORD) {}
            feed(&f, p.bytes + cut, p.n - cut);
            end(&f);
            while (input_next(f.input, 1, &r) == INPUT_RECORD) {}
            cr_expect(!*input_error(f.input), "cut at %zu: %s", cut, input_error(f.input));
            cr_expect(input_consumed(f.input) == p.n && r.offset + r.len == 14);
            close_input(&f);
        }
        fixture f = open_input('\n');
        feed(&f, p.bytes, p.n);
        end(&f);
        expect_record(&f, "one", 3, 1);
        expect_record(&f, "two", 3, 2);
        expect_record(&f, "", 0, 3);
        expect_record(&f, "last", 4, 4);
        expect_end(&f);
        close_input(&f);
    }
}

/* Each byte is read before the next one arrives, so the beginning of a stream may be that of a text
 * at first. */
Test(compressed, byte_by_byte) {
    for (int zstd = 0; zstd < 2; zstd++) {
        packed p = {.n = 0};
        (zstd ? add_zstd : add_gzip)(&p, "\n\none\n", 6);
        const char *const want[] = {"", "", "one"};
        fixture f = open_input('\n');
        input_record r;
        uint64_t records = 0;
        for (size_t i = 0; i <= p.n; i++) {
            if (i < p.n)
                feed(&f, p.bytes + i, 1);
            else
                end(&f);
            while (input_next(f.input, 0, &r) == INPUT_RECORD) {
                cr_assert(++records == r.line && r.line <= 3);
                cr_expect(r.len == strlen(want[r.line - 1]), "record %d", (int)r.line);
            }
        }
        cr_expect(records == 3 && !*input_error(f.input));
        close_input(&f);
    }
}

/* Every proper prefix but the ends of members is cut off, after its whole records. Fewer bytes than
 * the magic are text. */
Test(compressed, cut_off_anywhere) {
    for (int zstd = 0; zstd < 2; zstd++) {
        const packed p = pack(zstd);
        const size_t magic = zstd ? 4 : 3;
        packed ends[2] = {{.n = 0}, {.n = 0}};
        for (int i = 0; i < 2; i++) {
            (zstd ? add_zstd : add_gzip)(&ends[i], "one\nt", 5);
            if (i) (zstd ? add_zstd : add_gzip)(&ends[i], "", 0);
        }
        for (size_t n = magic; n < p.n; n++) {
            fixture f = open_input('\n');
            input_record r;
            input_status s;
            uint64_t records = 0;
            feed(&f, p.bytes, n);
            end(&f);
            while ((s = input_next(f.input, 1, &r)) == INPUT_RECORD) records = r.line;
            const int whole = n == ends[0].n || n == ends[1].n;
            cr_expect(s == (whole ? INPUT_END : INPUT_FAILED), "%zu bytes", n);
            cr_expect(!strcmp(input_error(f.input), whole ? "" : "compressed data: cut off"));
            if (n >= ends[0].n) cr_expect(records >= 1 + (uint64_t)whole);
            cr_expect(input_next(f.input, 1, &r) == s, "it stays");
            close_input(&f);
        }
    }
}

Test(compressed, damaged_after_whole_records) {
    for (int zstd = 0; zstd < 2; zstd++) {
        packed p = {.n = 0};
        (zstd ? add_zstd : add_gzip)(&p, "one\n", 4);
        (zstd ? add_zstd : add_gzip)(&p, "two\nthree", 9);
        p.bytes[p.n - 1] ^= 1; /* of its checksum, or of its length */
        for (int more = 0; more < 2; more++) {
            fixture f = open_input('\n');
            input_record r;
            feed(&f, p.bytes, p.n);
            if (more) feed(&f, "text", 4);
            end(&f);
            expect_record(&f, "one", 3, 1);
            if (!zstd)
                expect_record(&f, "two", 3, 2); /* libzstd gives no small frame that is bad */
            cr_assert(input_next(f.input, 1, &r) == INPUT_FAILED);
            cr_expect(strstr(input_error(f.input), zstd ? "zstd: damaged: " : "gzip: damaged: "));
            close_input(&f);
        }
    }
}

/* gzip and tar pad with zeros. */
Test(compressed, what_follows_the_last_member) {
    const struct {
        const char *bytes;
        size_t n;
        int gzip_is_good;
    } tails[] = {{"\0\0\0", 3, 1}, {"\0x", 2, 0}, {"plain\n", 6, 0}, {"\x1f", 1, 0}};
    for (int zstd = 0; zstd < 2; zstd++)
        for (size_t i = 0; i < sizeof tails / sizeof *tails; i++) {
            packed p = {.n = 0};
            (zstd ? add_zstd : add_gzip)(&p, "one\n", 4);
            fixture f = open_input('\n');
            input_record r;
            feed(&f, p.bytes, p.n);
            feed(&f, tails[i].bytes, tails[i].n);
            end(&f);
            expect_record(&f, "one", 3, 1);
            const int good = !zstd && tails[i].gzip_is_good;
            cr_expect(input_next(f.input, 1, &r) == (good ? INPUT_END : INPUT_FAILED), "%zu", i);
            close_input(&f);
        }
}

/* A record of 8 MiB in a few bytes: far more output than room for it, also after the last byte. */
Test(compressed, much_out_of_little) {
    enum { MANY = 8 << 20 };
    char *zeros = calloc(1, MANY + 1);
    for (int zstd = 0; zstd < 2; zstd++) {
        packed p[5] = {{.n = 0}};
        size_t n = 0;
        if (zstd) {
            n = ZSTD_compress(p, sizeof p, zeros, MANY, 9);
        } else {
            z_stream z = {.next_in = (const Bytef *)zeros,
                          .avail_in = MANY,
                          .next_out = (Bytef *)p,
                          .avail_out = sizeof p};
            deflateInit2(&z, 9, Z_DEFLATED, 16 + MAX_WBITS, 9, Z_DEFAULT_STRATEGY);
            cr_assert(deflate(&z, Z_FINISH) == Z_STREAM_END);
            n = z.total_out;
            deflateEnd(&z);
        }
        fixture f = open_input('\n');
        feed(&f, (const char *)p, n);
        end(&f);
        expect_record(&f, zeros, MANY, 1);
        expect_end(&f);
        close_input(&f);
    }
    free(zeros);
}

/* Bytes that are a part of a magic, and then are not: text. */
Test(compressed, text_that_begins_alike) {
    const struct {
        const char *text;
        size_t n;
    } texts[] = {{"\x1f", 1}, {"\x1f\x8b", 2},  {"\x1f\x8b\x07z", 4},
                 {"(", 1},    {"(\xb5\x2f", 3}, {"(\xb5/\xfc", 4}};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        fixture f = open_input('\n');
        input_record r;
        for (size_t k = 0; k < texts[i].n; k++) {
            cr_assert(input_next(f.input, 0, &r) == INPUT_WAIT);
            feed(&f, texts[i].text + k, 1);
        }
        feed(&f, "\n", 1);
        cr_assert(input_next(f.input, 0, &r) == INPUT_RECORD, "text %zu waits for nothing", i);
        cr_expect(r.len == texts[i].n && !memcmp(r.text, texts[i].text, r.len));
        end(&f);
        expect_end(&f);
        close_input(&f);
    }
}

static void count_bytes(void *self, const void *bytes, size_t n) {
    packed *p = self;
    memcpy(p->bytes + p->n, bytes, n);
    p->n += n;
}

Test(compressed, a_watch_sees_the_bytes_of_the_file) {
    for (int zstd = 0; zstd < 2; zstd++) {
        const packed p = pack(zstd);
        packed seen = {.n = 0};
        fixture f = open_input('\n');
        input_record r;
        input_watch(f.input, count_bytes, &seen);
        feed(&f, p.bytes, p.n);
        end(&f);
        while (input_next(f.input, 1, &r) == INPUT_RECORD) {}
        cr_expect(seen.n == p.n && !memcmp(seen.bytes, p.bytes, p.n));
        close_input(&f);
    }
}

/* ---- how a text begins ----------------------------------------------------------------------- */

/* A mark is dropped and UTF-16 is refused, in whatever two pieces the bytes arrive. */
Test(records, marks_in_any_two_pieces) {
    static const struct {
        const char *bytes;
        size_t n;
        const char *first; /* record; NULL: refused */
        char separator;
        uint64_t offset;
    } cases[] = {
        {"\xef\xbb\xbfone\ntwo", 10, "one", '\n', 3},
        {"\xef\xbb\xbf\ntwo", 7, "", '\n', 3},
        {"\xef\xbb\xbfone\0two", 10, "one", 0, 3},
        {"\xef\xbb\xbf\xef\xbb\xbf\ntwo", 10, "\xef\xbb\xbf", '\n', 3},
        {"\xef\xbbone\ntwo", 9, "\xef\xbbone", '\n', 0},
        {"\xff\xfeo\0n\0\n\0", 8, NULL, '\n', 0},
        {"\xfe\xff\0o\0n\0\n", 8, NULL, 0, 0},
        {"o\0n\0e\0\n\0", 8, NULL, '\n', 0},
        {"\0o\0n\0e\0\n", 8, NULL, '\n', 0},
        {"o\0n\0e\0\n\0", 8, "o", 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        for (size_t cut = 0; cut <= cases[i].n; cut++) {
            fixture f = open_input(cases[i].separator);
            input_record r;
            feed(&f, cases[i].bytes, cut);
            input_status s = cut ? input_next(f.input, 0, &r) : INPUT_WAIT;
            if (s == INPUT_WAIT) {
                feed(&f, cases[i].bytes + cut, cases[i].n - cut);
                end(&f);
                s = input_next(f.input, 1, &r);
            }
            const char *first = cases[i].first;
            cr_expect(s == (first ? INPUT_RECORD : INPUT_FAILED), "%zu at %zu: %d", i, cut, s);
            if (first && s == INPUT_RECORD)
                cr_expect(r.len == strlen(first) && !memcmp(r.text, first, r.len) &&
                              r.offset == cases[i].offset,
                          "%zu at %zu: %.*s", i, cut, (int)r.len, r.text);
            if (!first) cr_expect(!strncmp(input_error(f.input), "UTF-16", 6));
            close_input(&f);
        }
}

/* ---- objects --------------------------------------------------------------------------------- */

#define VOCAB  100
#define HIDDEN 8

static int parse(input_parser *p, const char *line, input_object *o, qemb_err *err) {
    return input_parse(p, line, strlen(line), o, err);
}

Test(objects, everything) {
    input_parser *p = input_parser_new(VOCAB, HIDDEN);
    input_object o;
    qemb_err e;
    cr_assert(!parse(p,
                     " {\"id\": {\"a\": [1, \"\\n\"]}, \"text\":\"h\\u00e9\\u0000\", \"dim\":8,"
                     " \"instruct\":\"find\"}\r",
                     &o, &e),
              "%s", e.msg);
    const char id[] = "{\"a\": [1, \"\\n\"]}";
    cr_expect(o.id_len == strlen(id) && !memcmp(o.id, id, o.id_len));
    cr_expect(o.text_len == 4 && !memcmp(o.text, "h\xc3\xa9\0", 4) && !o.ids);
    cr_expect(o.dim == 8 && o.instruct_len == 4 && !memcmp(o.instruct, "find", 4));
    cr_assert(!parse(p, "{\"text\":\"\"}", &o, &e));
    cr_expect(!o.id && !o.id_len && o.text && !o.text_len && !o.dim && !o.instruct);
    cr_assert(!parse(p, "{\"ids\":[0,99,5],\"id\":null,\"instruct\":null,\"text\":null}", &o, &e));
    cr_expect(o.n_ids == 3 && o.ids[0] == 0 && o.ids[1] == 99 && o.ids[2] == 5 && !o.text);
    cr_expect(o.id_len == 4 && !memcmp(o.id, "null", 4) && o.instruct && !o.instruct_len);
    cr_assert(!parse(p, "{\"ids\":[]}", &o, &e));
    cr_expect(o.ids && !o.n_ids);
    cr_assert(!parse(p, "{\"ids\":[1.0,2e0],\"dim\":80e-1}", &o, &e)); /* integers all the same */
    cr_expect(o.n_ids == 2 && o.ids[0] == 1 && o.ids[1] == 2 && o.dim == 8);
    input_parser_free(p);
}

/* An id comes back as the bytes that came. Only a newline, which can stand between its tokens if
 * records end with NUL, becomes a space. */
Test(objects, ids_as_they_came) {
    static const char *const ids[] = {"0.1",
                                      "1.10",
                                      "-0",
                                      "1E+2",
                                      "1e400",
                                      "18446744073709551616",
                                      "\"\\u0041\\/\x7f\"",
                                      "null",
                                      "[ 1 ,\t{ \"a\" : 2 } ]",
                                      "\"\xc3\xa9\\\"\"",
                                      "true",
                                      "{\"id\":{\"text\":0.10}}"};
    static const char *const lines[] = {"{\"id\":%s,\"text\":\"a\"}",
                                        "{ \"text\" : \"\" , \"id\" : %s }",
                                        "{\"\\u0069d\":\t%s\t,\"text\":7,\"id2\":1}"};
    input_parser *p = input_parser_new(VOCAB, HIDDEN);
    input_object o;
    qemb_err e;
    char line[200];
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++)
        for (size_t k = 0; k < sizeof lines / sizeof *lines; k++) {
            snprintf(line, sizeof line, lines[k], ids[i]);
            cr_expect(parse(p, line, &o, &e) == (k < 2 ? 0 : -1), "%s", line);
            cr_expect(o.id_len == strlen(ids[i]) && !memcmp(o.id, ids[i], o.id_len), "%s", line);
        }
    cr_assert(!parse(p, "{\"id\":[1,\r\n2],\"text\":\"a\"}", &o, &e));
    cr_expect(o.id_len == 7 && !memcmp(o.id, "[1,  2]", 7));
    input_parser_free(p);
}

Test(objects, kept_keys) {
    static const struct {
        const char *line, *kept, *code;
    } cases[] = {
        {"{\"text\":\"a\"}", "", NULL},
        {"{\"text\":\"a\",\"b\":1}", ",\"b\":1", NULL},
        {" { \"b\" : 1.50e+3 , \"text\":\"a\" , \"c\":null } ", ",\"b\":1.50e+3,\"c\":null", NULL},
        {"{\"c\":{\"d\":[1, \"}]\\\"\", {}]},\"b\":[],\"text\":\"a\",\"id\":{\"x\":1}}",
         ",\"c\":{\"d\":[1, \"}]\\\"\", {}]},\"b\":[]", NULL},
        {"{\"b\":[1,\n\r2],\n\"text\":\"a\"}", ",\"b\":[1,  2]", NULL},
        {"{\"\\u0074ext\":\"a\",\"\\u00e9\":\"\\u00e9\",\"\":0}", ",\"\\u00e9\":\"\\u00e9\",\"\":0",
         NULL},
        {"{\"text\":\"a\",\"b\":1,\"tokens\":2}", ",\"b\":1", "bad_record"},
        {"{\"text\":\"a\",\"b\":1,\"\\u0065rror\":2}", ",\"b\":1", "bad_record"},
        {"{\"text\":7,\"b\":1}", ",\"b\":1", "bad_record"},
        {"{\"text\":\"a\",\"b\":1", "", "invalid_json"},
        {"[{\"b\":1}]", "", "bad_record"},
    };
    input_parser *p = input_parser_new(VOCAB, HIDDEN);
    input_parser_keep(p);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const size_t n = strlen(cases[i].line), kept = strlen(cases[i].kept);
        input_object o;
        qemb_err e;
        char *line = malloc(n); /* of this size: it ends with no NUL */
        memcpy(line, cases[i].line, n);
        const int bad = input_parse(p, line, n, &o, &e);
        cr_expect(bad == (cases[i].code ? -1 : 0), "%s", cases[i].line);
        cr_expect(!bad || !strcmp(e.code, cases[i].code), "%s", cases[i].line);
        cr_expect(o.kept_len == kept && (!kept || !memcmp(o.kept, cases[i].kept, kept)), "%.*s",
                  (int)o.kept_len, o.kept);
        free(line);
    }
    input_parser_free(p);
}

Test(objects, refusals) {
    static const struct {
        const char *line, *code, *id, *says;
    } cases[] = {
        {"", "invalid_json", "null", "empty line"},
        {"  ", "invalid_json", "null", ""},
        {"{", "invalid_json", "null", ""},
        {"{\"id\":1,\"text\":\"a\"} x", "invalid_json", "null", ""},
        {"{\"text\":\"\\ud800\"}", "invalid_json", "null", ""},
        {"{\"id\":1,\"text\":\"a\xff\"}", "invalid_utf8", "null", "byte"},
        {"{\"id\":1,\"id\":2,\"text\":\"a\"}", "bad_record", "null", "twice"},
        {"[1]", "bad_record", "null", "got a list, want an object"},
        {"\"text\"", "bad_record", "null", "got a string"},
        {"7", "bad_record", "null", "got an integer"},
        {"{}", "bad_record", NULL, "neither"},
        {"{\"id\":7}", "bad_record", "7", "neither"},
        {"{\"id\":\"x\",\"text\":null,\"ids\":null}", "bad_record", "\"x\"", "neither"},
        {"{\"id\":7,\"text\":\"a\",\"ids\":[1]}", "bad_record", "7", "both"},
        {"{\"id\":7,\"text\":1}", "bad_record", "7", "\"text\": wrong type (got an integer"},
        {"{\"id\":7,\"text\":\"a\",\"instruction\":\"x\"}", "bad_record", "7", "unknown key"},
        {"{\"id\":7,\"text\":\"a\",\"instruct\":[]}", "bad_record", "7", "\"instruct\""},
        {"{\"id\":7,\"ids\":[1],\"instruct\":\"x\"}", "bad_record", "7", "\"instruct\""},
        {"{\"id\":7,\"ids\":{}}", "bad_ids", "7", "got an object"},
        {"{\"id\":7,\"ids\":[1,\"a\"]}", "bad_ids", "7", "\"ids\"[1]"},
        {"{\"id\":7,\"ids\":[1.5]}", "bad_ids", "7", "got a real"},
        {"{\"id\":7,\"ids\":[-1]}", "bad_ids", "7", "got -1, want 0..99"},
        {"{\"id\":7,\"ids\":[100]}", "bad_ids", "7", "got 100, want 0..99"},
        {"{\"id\":7,\"ids\":[4294967296]}", "bad_ids", "7", "4294967296"},
        {"{\"id\":7,\"text\":\"a\",\"dim\":0}", "bad_dim", "7", "got 0, want 1..8"},
        {"{\"id\":7,\"text\":\"a\",\"dim\":9}", "bad_dim", "7", "got 9, want 1..8"},
        {"{\"id\":7,\"text\":\"a\",\"dim\":4.5}", "bad_dim", "7", "got a real"},
        {"{\"id\":7,\"text\":\"a\",\"dim\":true}", "bad_dim", "7", "got true"},
    };
    input_parser *p = input_parser_new(VOCAB, HIDDEN);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        input_object o;
        qemb_err e = {0};
        cr_assert(parse(p, cases[i].line, &o, &e) == -1, "%s", cases[i].line);
        cr_expect_str_eq(e.code, cases[i].code, "%s: %s %s", cases[i].line, e.code, e.msg);
        cr_expect(strstr(e.msg, cases[i].says), "%s: %s", cases[i].line, e.msg);
        const char *id = cases[i].id ? cases[i].id : "";
        cr_expect(o.id_len == strlen(id) && !memcmp(o.id ? o.id : "", id, o.id_len), "%s",
                  cases[i].line);
    }
    input_parser_free(p);
}

/* Deep nesting is refused before it can overflow the stack. */
Test(objects, deep_nesting) {
    const size_t n = 1000000;
    char *s = malloc(n);
    memset(s, '[', n);
    input_parser *p = input_parser_new(VOCAB, HIDDEN);
    input_object o;
    qemb_err e;
    cr_assert(input_parse(p, s, n, &o, &e) == -1);
    cr_expect_str_eq(e.code, "invalid_json");
    memcpy(s, "{\"id\":", 6);
    cr_assert(input_parse(p, s, n, &o, &e) == -1);
    input_parser_free(p);
    free(s);
}

/* ---- a query with documents ------------------------------------------------------------------ */

static int parse_ranking(input_parser *p, const char *line, input_ranking *o, qemb_err *err) {
    return input_parse_ranking(p, line, strlen(line), o, err);
}

static void expect_document(const input_parser *p, size_t i, const char *text, size_t want) {
    size_t len;
    const char *s = input_document(p, i, &len);
    cr_expect(len == want && !memcmp(s, text, len), "%zu is %.*s", i, (int)len, s);
}

Test(rankings, everything) {
    input_parser *p = input_parser_new(0, 1);
    input_ranking o;
    qemb_err e;
    cr_assert(
        !parse_ranking(p,
                       "{\"documents\": [\"a\\u0000b\", {\"text\":\"\u00e9\"}, \"\"], \"top_n\": 2,"
                       " \"query\":\"q\\u0000\", \"instruct\":\"find\", \"id\": [1, {}]}\r",
                       &o, &e),
        "%s", e.msg);
    cr_expect(o.id_len == 7 && !memcmp(o.id, "[1, {}]", 7));
    cr_expect(o.query_len == 2 && !memcmp(o.query, "q\0", 2) && o.top_n == 2);
    cr_expect(o.instruct_len == 4 && !memcmp(o.instruct, "find", 4) && o.n_documents == 3);
    expect_document(p, 0, "a\0b", 3);
    expect_document(p, 1, "\xc3\xa9", 2);
    expect_document(p, 2, "", 0);
    cr_assert(!parse_ranking(p, "{\"query\":\"\",\"documents\":[]}", &o, &e));
    cr_expect(!o.id && !o.id_len && o.query && !o.query_len && !o.n_documents);
    cr_expect(!o.top_n && !o.instruct);
    /* Not given, or the empty task. */
    cr_assert(!parse_ranking(
        p, "{\"query\":\"q\",\"documents\":[],\"instruct\":null,\"top_n\":null,\"id\":null}", &o,
        &e));
    cr_expect(!o.instruct && !o.top_n && o.id_len == 4 && !memcmp(o.id, "null", 4));
    cr_assert(!parse_ranking(p, "{\"query\":\"q\",\"documents\":[],\"instruct\":\"\"}", &o, &e));
    cr_expect(o.instruct && !o.instruct_len);
    cr_assert(!parse_ranking(
        p, "{\"query\":\"q\",\"documents\":[\"d\"],\"top_n\":9223372036854775807}", &o, &e));
    cr_expect(o.top_n == INT64_MAX && o.n_documents == 1);
    input_parser_free(p);
}

Test(rankings, refusals) {
    static const struct {
        const char *line, *code, *id, *says;
    } cases[] = {
        {"", "invalid_json", "null", "empty line"},
        {"{", "invalid_json", "null", ""},
        {"{\"query\":\"a\",\"documents\":[\"b\"]} x", "invalid_json", "null", ""},
        {"{\"query\":\"a\xff\",\"documents\":[]}", "invalid_utf8", "null", "byte"},
        {"{\"query\":\"a\",\"documents\":[\"b\xff\"]}", "invalid_utf8", "null", "byte"},
        {"{\"query\":\"a\",\"query\":\"b\",\"documents\":[]}", "bad_record", "null", "twice"},
        {"{\"query\":\"a\",\"documents\":[{\"text\":\"a\",\"text\":\"b\"}]}", "bad_record", "null",
         "twice"},
        {"[1]", "bad_record", "null", "got a list, want an object"},
        {"{}", "bad_record", NULL, "no \"query\""},
        {"{\"id\":7,\"documents\":[]}", "bad_record", "7", "no \"query\""},
        {"{\"id\":7,\"query\":\"a\"}", "bad_record", "7", "no \"documents\""},
        {"{\"id\":7,\"query\":null,\"documents\":[]}", "bad_record", "7", "\"query\": wrong type"},
        {"{\"id\":7,\"query\":[],\"documents\":[]}", "bad_record", "7", "got a list, want a str"},
        {"{\"id\":7,\"query\":\"a\",\"documents\":null}", "bad_record", "7", "got null, want a li"},
        {"{\"id\":7,\"query\":\"a\",\"documents\":\"b\"}", "bad_record", "7", "got a string"},
        {"{\"id\":7,\"query\":\"a\",\"documents\":[\"b\",7]}", "bad_record", "7",
         "\"documents\"[1]: wrong type (got an integer"},
        {"{\"id\":7,\"query\":\"a\",\"documents\":[null]}", "bad_record", "7", "[0]"},
        {"{\"id\":7,\"query\":\"a\",\"documents\":[[]]}", "bad_record", "7", "got a list"},
        {"{\"id\":7,\"query\":\"a\",\"documents\":[{}]}", "bad_record", "7", "got an object"},
        {"{\"id\":7,\"query\":\"a\",\"documents\":[{\"text\":1}]}", "bad_record", "7", "[0]"},
        {"{\"id\":7,\"query\":\"a\",\"documents\":[{\"title\":\"b\"}]}", "bad_record", "7", "[0]"},
        {"{\"id\":7,\"query\":\"a\",\"documents\":[],\"top_n\":-1}", "bad_record", "7", "got -1"},
        {"{\"id\":7,\"query\":\"a\",\"documents\":[],\"top_n\":1.5}", "bad_record", "7",
         "got a real"},
        {"{\"id\":7,\"query\":\"a\",\"documents\":[],\"top_n\":true}", "bad_record", "7",
         "got true"},
        {"{\"id\":7,\"query\":\"a\",\"documents\":[],\"top_n\":99999999999999999999}", "bad_record",
         "7", "got a real"},
        {"{\"id\":7,\"query\":\"a\",\"documents\":[],\"instruct\":1}", "bad_record", "7",
         "\"instruct\""},
        {"{\"id\":7,\"query\":\"a\",\"documents\":[],\"text\":\"b\"}", "bad_record", "7",
         "\"text\": unknown key (want id, query, documents, instruct, top_n)"},
    };
    input_parser *p = input_parser_new(0, 1);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        input_ranking o;
        qemb_err e = {0};
        cr_assert(parse_ranking(p, cases[i].line, &o, &e) == -1, "%s", cases[i].line);
        cr_expect_str_eq(e.code, cases[i].code, "%s: %s %s", cases[i].line, e.code, e.msg);
        cr_expect(strstr(e.msg, cases[i].says), "%s: %s", cases[i].line, e.msg);
        const char *id = cases[i].id ? cases[i].id : "";
        cr_expect(o.id_len == strlen(id) && !memcmp(o.id ? o.id : "", id, o.id_len), "%s",
                  cases[i].line);
    }
    input_parser_free(p);
}
