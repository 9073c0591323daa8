/* http_header.c - what the header of a request says; see http_header.h. */
#include "http_header.h"

#include "frontends/console.h"

#include <string.h>
#include <strings.h>

/* ---- routes ---------------------------------------------------------------------------------- */

/* Other names of paths: without the version, for clients whose base URL lacks it; llama.cpp's of
 * reranking. */
static const struct {
    const char *path;
    route route;
} aliases[] = {{"/embeddings", ROUTE_EMBEDDINGS},
               {"/models", ROUTE_MODELS},
               {"/v1/reranking", ROUTE_RERANK_V1},
               {"/reranking", ROUTE_RERANK}};

const char route_list[] = "/v1/embeddings, /v1/rerank, /v1/reranking, /v2/rerank, /rerank, "
                          "/reranking, /embed, /api/embed, /api/embeddings, /tokenize, "
                          "/v1/models, /info, /api/tags, /api/show, /api/version, /health or "
                          "/metrics";

/* The longest path but for a model's id. */
#define PATH_ROOM 64

/* Copies url with single slashes and without one at the end. A longer path is cut. */
static void clean_path(char path[PATH_ROOM], const char *url) {
    size_t n = 0;
    for (; *url && n < PATH_ROOM - 1; url++)
        if (*url != '/' || url[1] != '/') path[n++] = *url;
    if (n > 1 && path[n - 1] == '/') n--;
    path[n] = 0;
}

/* Skips the parts of `path` in url, whose slashes may be doubled. NULL: url is another path, or
 * ends with this one. */
static const char *skip_path(const char *url, const char *path) {
    for (; *path; path++, url++) {
        if (*url != *path) return NULL;
        while (*url == '/' && url[1] == '/') url++;
    }
    return *url ? url : NULL;
}

route route_of(const char *method, const char *url, const char **model) {
    char path[PATH_ROOM];
    clean_path(path, url);
    /* Clients of text-embeddings-inference send texts to its base URL. */
    if (!strcmp(path, "/") && (!strcmp(method, "POST") || !strcmp(method, "OPTIONS")))
        return ROUTE_TEI;
    for (int i = 0; i < LENGTH(aliases); i++)
        if (!strcmp(path, aliases[i].path)) return aliases[i].route;
    for (int i = 0; i < ROUTE_OTHER; i++)
        if (i != ROUTE_MODEL && !strcmp(path, route_path((route)i))) return (route)i;
    *model = skip_path(url, "/v1/models/");
    if (!*model) *model = skip_path(url, "/models/");
    return *model ? ROUTE_MODEL : ROUTE_OTHER;
}

int route_takes_body(route r) { return r <= ROUTE_SHOW; }

const char *route_methods(route r) { return route_takes_body(r) ? "POST" : "GET, HEAD"; }

/* ---- types ----------------------------------------------------------------------------------- */

static int is_utf8(const char *charset, size_t n) {
    return (n == 5 && !strncasecmp(charset, "utf-8", n)) ||
           (n == 4 && !strncasecmp(charset, "utf8", n)) ||
           (n == 8 && !strncasecmp(charset, "us-ascii", n));
}

int is_json_type(const char *type) {
    static const char *const types[] = {"application/json", "text/json",
                                        "application/x-www-form-urlencoded"};
    if (!type) return 1;
    const size_t n = strcspn(type, " \t;");
    int known = !type[strspn(type, " \t")]; /* an empty header */
    for (int i = 0; i < LENGTH(types); i++)
        known |= n == strlen(types[i]) && !strncasecmp(type, types[i], n);
    const char *charset = strcasestr(type + n, "charset=");
    if (!known || !charset) return known;
    charset += strlen("charset=");
    const int quoted = *charset == '"';
    charset += quoted;
    return is_utf8(charset, strcspn(charset, quoted ? "\"" : " \t;"));
}

compression coding_of(const char *encoding) {
    if (!encoding || !strcasecmp(encoding, "identity")) return COMPRESSION_NONE;
    if (!strcasecmp(encoding, "gzip") || !strcasecmp(encoding, "x-gzip")) return COMPRESSION_GZIP;
    if (!strcasecmp(encoding, "deflate")) return COMPRESSION_DEFLATE;
    return strcasecmp(encoding, "zstd") ? COMPRESSION_UNKNOWN : COMPRESSION_ZSTD;
}

/* ---- traces ---------------------------------------------------------------------------------- */

/* Copies n digits in lower case, not all of them 0. Returns their end, or NULL. */
static const char *take_hex(const char *s, size_t n, char *out) {
    if (strspn(s, "0123456789abcdef") != n || strspn(s, "0") == n) return NULL;
    memcpy(out, s, n);
    out[n] = 0;
    return s + n;
}

/* VERSION-TRACE-SPAN-FLAGS; a version after 00 may have more behind it. */
int trace_parse(const char *s, char trace[TRACE_ROOM], char span[SPAN_ROOM]) {
    static const char hex[] = "0123456789abcdef";
    const char *p = s;
    int good = p && strspn(p, hex) == 2 && strncmp(p, "ff", 2) && p[2] == '-';
    if (good) p = take_hex(p + 3, TRACE_ROOM - 1, trace);
    if (good && p && *p == '-')
        p = take_hex(p + 1, SPAN_ROOM - 1, span);
    else
        p = NULL;
    good = p && *p == '-' && strspn(p + 1, hex) == 2;
    if (good) good = !p[3] || (p[3] == '-' && strncmp(s, "00", 2));
    if (!good) *trace = *span = 0;
    return good ? 0 : -1;
}

int is_header_list(const char *s) {
    const size_t n = strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                               "0123456789-_, ");
    return n && n < 1024 && !s[n];
}
