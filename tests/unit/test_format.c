/* test_format.c - the output formats: each number reads back to the same bits. */
#include "frontends/format.h"
#include "support.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <math.h>
#include <openssl/evp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static float of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* ---- numbers --------------------------------------------------------------------------------- */

/* Prints x, NUL-terminated, into s (FORMAT_FLOAT_ROOM + 1). Fails if it wrote beyond the room. */
static size_t print(char *s, float x) {
    char room[FORMAT_FLOAT_ROOM + 8];
    memset(room, '#', sizeof room);
    const size_t len = (size_t)(format_float(room, x) - room);
    cr_assert(len < FORMAT_FLOAT_ROOM);
    for (size_t i = FORMAT_FLOAT_ROOM; i < sizeof room; i++)
        cr_assert(room[i] == '#', "%a wrote past its room", (double)x);
    memcpy(s, room, len);
    s[len] = '\0';
    return len;
}

/* Whether s is -?(0|[1-9][0-9]*)(.[0-9]+)?(e-?[0-9]+)? with a point or an exponent. Without either,
 * a JSON reader would take it for an integer and lose the sign of -0. */
static int is_json_real(const char *s) {
    int point = 0;
    if (*s == '-') s++;
    if (*s == '0')
        s++;
    else
        for (const char *start = s; *s >= '0' && *s <= '9'; s++)
            if (*start == '0') return 0;
    if (*s == '.') {
        point = 1;
        if (!(*++s >= '0' && *s <= '9')) return 0;
        while (*s >= '0' && *s <= '9') s++;
    }
    if (*s == 'e') {
        point = 1;
        if (*++s == '-') s++;
        if (!(*s >= '0' && *s <= '9')) return 0;
        while (*s >= '0' && *s <= '9') s++;
    }
    return point && !*s;
}

static void check_bits(uint32_t bits) {
    char s[FORMAT_FLOAT_ROOM + 1];
    const float x = of_bits(bits);
    const size_t len = print(s, x);
    char *end;
    const float back = strtof(s, &end);
    if (end == s + len && to_bits(back) == bits && is_json_real(s)) return;
    cr_assert_fail("%08x (%a) printed as %s, which reads as %a", bits, (double)x, s, (double)back);
}

Test(format_float, every_exponent_and_its_borders) {
    for (uint32_t sign = 0; sign < 2; sign++)
        for (uint32_t e = 0; e < 255; e++)
            for (uint32_t m = 0; m < 64; m++) {
                check_bits(sign << 31 | e << 23 | m);
                check_bits(sign << 31 | e << 23 | (0x7fffff - m));
                check_bits(sign << 31 | e << 23 | (m * 0x1ffff & 0x7fffff));
            }
}

Test(format_float, stride_over_all_bits) {
    for (uint32_t bits = 0; bits < 0x7f800000; bits += 1009) check_bits(bits);
}

Test(format_float, random_bits) {
    rng r = {20};
    for (int i = 0; i < 2000000;) {
        const uint32_t bits = (uint32_t)(rng_u64(&r) >> 32);
        if ((bits & 0x7f800000) == 0x7f800000) continue;
        check_bits(bits);
        i++;
    }
}

/* At powers of ten the number of digits before the point changes. */
Test(format_float, around_powers_of_ten) {
    for (int p = -45; p <= 38; p++) {
        char s[16];
        snprintf(s, sizeof s, "1e%d", p);
        const uint32_t bits = to_bits(strtof(s, NULL));
        for (uint32_t d = 0; d < 200; d++) {
            check_bits(bits + d < 0x7f800000 ? bits + d : bits);
            check_bits(bits > d ? bits - d : bits);
        }
    }
}

Test(format_float, looks) {
    static const struct {
        float x;
        const char *s;
    } cases[] = {{0.0f, "0.0"},
                 {-0.0f, "-0.0"},
                 {1.0f, "1.0"},
                 {-1.0f, "-1.0"},
                 {0.25f, "0.25"},
                 {-0.03125f, "-0.03125"},
                 {0.1f, "0.100000001"},
                 {0.5f, "0.5"},
                 {10.0f, "10.0"},
                 {12.5f, "12.5"},
                 {123456792.0f, "123456792.0"},
                 {100000000.0f, "100000000.0"},
                 {999999936.0f, "999999936.0"},
                 {1e9f, "1e9"},
                 {1.5e9f, "1.5e9"},
                 {0.00001f, "9.99999975e-6"},
                 {0.0000152587890625f, "0.0000152587891"},
                 {1.17549435e-38f, "1.17549435e-38"},
                 {1.40129846e-45f, "1.40129846e-45"},
                 {3.40282347e38f, "3.40282347e38"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char s[FORMAT_FLOAT_ROOM + 1];
        print(s, cases[i].x);
        cr_expect_str_eq(s, cases[i].s);
    }
}

Test(format_uint, borders) {
    static const uint64_t cases[] = {0, 1, 9, 10, 99, 100, 4294967295u, 18446744073709551615u};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char s[FORMAT_UINT_ROOM], want[32];
        const int len = snprintf(want, sizeof want, "%llu", (unsigned long long)cases[i]);
        cr_expect(format_uint(s, cases[i]) - s == len && !memcmp(s, want, (size_t)len));
    }
}

/* ---- halves ---------------------------------------------------------------------------------- */

static double half_value(uint16_t h) {
    const int e = h >> 10 & 31, m = h & 1023;
    const double v = e ? ldexp(1024 + m, e - 25) : ldexp(m, -24);
    return h & 0x8000 ? -v : v;
}

Test(format_half, every_half_is_exact) {
    for (uint32_t h = 0; h < 0x10000; h++)
        if ((h & 0x7c00) != 0x7c00)
            cr_assert(format_half((float)half_value((uint16_t)h)) == h, "%04x", h);
}

/* Between two neighbours: the middle rounds to the even one, everything else to the nearer. */
Test(format_half, rounds_to_nearest_even) {
    for (uint32_t h = 0; h < 0x7bff; h++) {
        const float middle = (float)((half_value((uint16_t)h) + half_value((uint16_t)(h + 1))) / 2);
        cr_assert(format_half(middle) == (h & 1 ? h + 1 : h), "middle above %04x", h);
        cr_assert(format_half(nextafterf(middle, 0)) == h, "below the middle above %04x", h);
        cr_assert(format_half(nextafterf(middle, 1e9f)) == h + 1, "above the middle above %04x", h);
        cr_assert(format_half(-middle) == (0x8000 | (h & 1 ? h + 1 : h)));
    }
}

Test(format_half, ends) {
    cr_expect(format_half(65504.0f) == 0x7bff);
    cr_expect(format_half(65519.996f) == 0x7bff);
    cr_expect(format_half(65520.0f) == 0x7c00);
    cr_expect(format_half(3e38f) == 0x7c00);
    cr_expect(format_half(-3e38f) == 0xfc00);
    cr_expect(format_half(INFINITY) == 0x7c00);
    cr_expect((format_half(NAN) & 0x7fff) > 0x7c00);
    cr_expect(format_half(0.0f) == 0 && format_half(-0.0f) == 0x8000);
    cr_expect(format_half(1e-45f) == 0);
    cr_expect(format_half(0x1p-25f) == 0 && format_half(nextafterf(0x1p-25f, 1)) == 1);
}

/* ---- strings --------------------------------------------------------------------------------- */

Test(format_base64, against_libcrypto) {
    uint8_t src[512];
    char got[700], want[700];
    rng r = {7};
    for (size_t i = 0; i < sizeof src; i++) src[i] = (uint8_t)(rng_u64(&r) >> 40);
    for (size_t n = 0; n <= sizeof src; n++) {
        const size_t len = (size_t)(format_base64(got, src, n) - got);
        cr_assert(len == (n + 2) / 3 * 4);
        cr_assert((size_t)EVP_EncodeBlock((uint8_t *)want, src, (int)n) == len);
        cr_assert(!memcmp(got, want, len), "%zu bytes", n);
    }
}

/* Formats s (n) as a JSON string and parses it with jansson. NULL: not valid JSON. */
static json_t *read_back(const char *s, size_t n, char *out) {
    const size_t len = (size_t)(format_json_string(out, s, n) - out);
    cr_assert(len <= 6 * n + 2);
    return json_loadb(out, len, JSON_DECODE_ANY | JSON_ALLOW_NUL, NULL);
}

Test(format_hex, every_byte) {
    uint8_t all[256];
    char got[513] = "", want[513];
    for (int i = 0; i < 256; i++) all[i] = (uint8_t)i, sprintf(want + 2 * i, "%02x", i);
    cr_expect_eq(format_hex(got, all, sizeof all), got + 512);
    cr_expect_str_eq(got, want);
}

Test(format_json_string, all_ascii_reads_back) {
    char s[128], out[6 * sizeof s + 2];
    for (size_t i = 0; i < sizeof s; i++) s[i] = (char)i;
    json_t *v = read_back(s, sizeof s, out);
    cr_assert(v && json_string_length(v) == sizeof s && !memcmp(json_string_value(v), s, sizeof s));
    json_decref(v);
}

Test(format_json_string, utf8_stays_and_anything_else_is_replaced) {
    static const struct {
        const char *in, *out;
    } cases[] = {
        {"h\xc3\xa9 \xe4\xb8\xad \xf0\x9f\x98\x80", "\"h\xc3\xa9 \xe4\xb8\xad \xf0\x9f\x98\x80\""},
        {"\"\\\n\t\x01\x7f", "\"\\\"\\\\\\n\\t\\u0001\\u007f\""},
        {"\xc2\x80\xc2\x9b[2J\xc2\x9f\xc2\xa0", "\"\\u0080\\u009b[2J\\u009f\xc2\xa0\""},
        {"a\xff"
         "b",
         "\"a\\ufffdb\""},
        {"\xc0\x80", "\"\\ufffd\\ufffd\""},            /* overlong */
        {"\xe0\x80\x80", "\"\\ufffd\\ufffd\\ufffd\""}, /* overlong */
        {"\xed\xa0\x80", "\"\\ufffd\\ufffd\\ufffd\""}, /* a surrogate */
        {"\xf0\x80\x80\x80", "\"\\ufffd\\ufffd\\ufffd\\ufffd\""},
        {"\xf4\x90\x80\x80", "\"\\ufffd\\ufffd\\ufffd\\ufffd\""}, /* beyond U+10FFFF */
        {"\xe4\xb8", "\"\\ufffd\\ufffd\""},                       /* truncated */
        {"", "\"\""}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char out[64];
        const size_t len =
            (size_t)(format_json_string(out, cases[i].in, strlen(cases[i].in)) - out);
        cr_expect(len == strlen(cases[i].out) && !memcmp(out, cases[i].out, len), "case %zu: %.*s",
                  i, (int)len, out);
    }
}

Test(format_json_string, random_bytes_are_always_json) {
    rng r = {9};
    for (int i = 0; i < 20000; i++) {
        char s[24], out[6 * sizeof s + 2];
        for (size_t k = 0; k < sizeof s; k += 8) {
            const uint64_t x = rng_u64(&r);
            memcpy(s + k, &x, 8);
        }
        json_t *v = read_back(s, sizeof s, out);
        cr_assert(v, "no JSON: %.*s", (int)sizeof out, out);
        json_decref(v);
    }
}

/* ---- vectors --------------------------------------------------------------------------------- */

static const float sample[] = {0.25f, -0.0f, 1.0f, -0.031415927f};

static void expect_vector(format_kind kind, const void *want, size_t len) {
    const size_t room = format_vector_room(kind, 4);
    char *p = malloc(room); /* so that a sanitizer finds overruns */
    const size_t got = (size_t)(format_vector(p, kind, sample, 4) - p);
    cr_expect(got == len && !memcmp(p, want, len), "kind %d: %.*s", (int)kind, (int)got, p);
    free(p);
}

Test(format_vector, kinds) {
    const char json[] = "[0.25,-0.0,1.0,-0.0314159282]", tsv[] = "0.25\t-0.0\t1.0\t-0.0314159282";
    const char base64[] = "AACAPgAAAIAAAIA//a0AvQ==";
    const uint16_t halves[] = {0x3400, 0x8000, 0x3c00, 0xa805};
    expect_vector(FORMAT_JSON, json, strlen(json));
    expect_vector(FORMAT_JSONL, json, strlen(json));
    expect_vector(FORMAT_TSV, tsv, strlen(tsv));
    expect_vector(FORMAT_F32, sample, sizeof sample);
    expect_vector(FORMAT_NPY, sample, sizeof sample);
    expect_vector(FORMAT_F16, halves, sizeof halves);
    expect_vector(FORMAT_BASE64, base64, strlen(base64));
    expect_vector(FORMAT_INT8, (const int8_t[]){32, 0, 127, -4}, 4); /* 31.75, -0, 127, -3.99 */
    expect_vector(FORMAT_BINARY, (const uint8_t[]){0xa0}, 1);
}

/* Of whole numbers x (dim) scaled by a power of two: q is the nearest integer to 127 x / m, half to
 * even. All of these products are exact in integers. */
static void check_int8(const int32_t *x, int dim, float scale) {
    float v[64] = {0};
    int8_t q[64];
    int64_t m = 0;
    for (int i = 0; i < dim; i++) {
        v[i] = (float)x[i] * scale;
        if (llabs(x[i]) > m) m = llabs(x[i]);
    }
    format_int8(q, v, dim);
    for (int i = 0; i < dim; i++) {
        const int64_t off = 254 * (int64_t)x[i] - 2 * q[i] * m;
        cr_assert(off >= -m && off <= m, "%d of %lld is %d", x[i], (long long)m, q[i]);
        cr_assert(!m || llabs(off) != m || q[i] % 2 == 0, "%d of %lld is %d", x[i], (long long)m,
                  q[i]);
    }
}

Test(format_int8, is_the_nearest_even) {
    rng r = {31};
    int32_t x[64];
    for (int round = 0; round < 20000; round++) {
        const int bits = 1 + round % 24; /* floats hold these exactly; few bits make halves often */
        for (int i = 0; i < 64; i++) x[i] = (int32_t)(rng_u64(&r) >> (64 - bits)) - (1 << bits) / 2;
        check_int8(x, 1 + round % 64, round % 3 ? 0x1p-24f : 0x1p90f);
    }
    for (int i = 0; i < 64; i++) x[i] = i % 2 ? 2 * i - 63 : 254; /* 127 x / 254: halves */
    check_int8(x, 64, 0x1p-100f);
    for (int i = 0; i < 64; i++) x[i] = 0;
    check_int8(x, 64, 1);
    for (int i = 0; i < 64; i++) x[i] = i % 3 - 1; /* the smallest float */
    check_int8(x, 64, 0x1p-149f);
}

Test(format_binary, is_a_bit_per_number) {
    rng r = {32};
    float v[70];
    for (int dim = 1; dim <= 70; dim++) {
        uint8_t got[9] = {0}, want[9] = {0};
        rng_floats(&r, v, 70, 1);
        v[dim / 2] = dim % 2 ? 0.0f : -0.0f; /* not above zero */
        for (int i = 0; i < dim; i++) want[i / 8] += (uint8_t)((v[i] > 0) << (7 - i % 8));
        memset(got, 0xff, ((size_t)dim + 7) / 8);
        format_binary(got, v, dim);
        cr_assert(!memcmp(got, want, sizeof want), "%d numbers", dim);
    }
}

/* The longest numbers fit into the size that the functions promise. */
Test(format_vector, room_is_enough) {
    static const float longest[] = {-1.23456794e-38f, -123456792.0f, -0.0000123456788f,
                                    -0.0123456791f, -3.40282347e38f};
    for (int kind = FORMAT_JSON; kind <= FORMAT_BINARY; kind++)
        for (size_t i = 0; i < sizeof longest / sizeof *longest; i++)
            for (int dim = 0; dim < 40; dim++) {
                float v[40];
                for (int k = 0; k < 40; k++) v[k] = longest[i];
                char *p = malloc(format_vector_room((format_kind)kind, dim) + 1);
                const char *end = format_vector(p, (format_kind)kind, v, dim);
                cr_assert((size_t)(end - p) <= format_vector_room((format_kind)kind, dim));
                free(p);
            }
}

Test(format_names, are_in_the_order_of_the_kinds) {
    static const char *const names[] = {"json", "jsonl", "tsv",  "base64", "f32",
                                        "f16",  "npy",   "int8", "binary"};
    for (int k = 0; k < 9; k++) {
        cr_expect_str_eq(format_names[k], names[k]);
        cr_expect(format_is_text((format_kind)k) == (k < 4));
    }
    cr_expect_null(format_names[9]);
}

Test(format_npy_header, is_what_numpy_reads) {
    static const struct {
        uint64_t rows;
        int dim;
        const char *text;
    } cases[] = {{0, 1, "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1), }"},
                 {18446744073709551615u, 2147483647,
                  "{'descr': '<f4', 'fortran_order': False, 'shape': (18446744073709551615, "
                  "2147483647), }"}};
    for (size_t i = 0; i < 2; i++) {
        char h[FORMAT_NPY_HEADER];
        const size_t n = strlen(cases[i].text);
        cr_expect(format_npy_header(h, cases[i].rows, cases[i].dim) - h == FORMAT_NPY_HEADER);
        cr_expect(!memcmp(h, "\x93NUMPY\x01\x00", 8));
        cr_expect((uint8_t)h[8] + 256 * (uint8_t)h[9] == FORMAT_NPY_HEADER - 10);
        cr_expect(!memcmp(h + 10, cases[i].text, n));
        for (size_t k = 10 + n; k < FORMAT_NPY_HEADER - 1; k++) cr_expect(h[k] == ' ');
        cr_expect(h[FORMAT_NPY_HEADER - 1] == '\n');
        cr_expect(FORMAT_NPY_HEADER % 64 == 0);
    }
}
