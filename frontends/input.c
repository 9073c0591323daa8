/* input.c - see input.h. */
#include "input.h"

#include "decompress.h"
#include "encoding.h"
#include "json_read.h"
#include "json_type.h"

#include <errno.h>
#include <jansson.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- records --------------------------------------------------------------------------------- */

#define BUFFER_BYTES ((size_t)256 << 10)
/* A larger buffer, grown for a long record, is freed after that record. */
#define BUFFER_KEPT ((size_t)4 << 20)

struct input {
    int fd, wake_fd;
    char separator;
    int ended;        /* read() returned 0 */
    char failed[128]; /* why no more can be read, or "" */
    int skipping;     /* inside a record that did not fit in memory */
    int started;      /* its first bytes have been looked at */
    uint64_t line, bytes;
    char *data;        /* (cap) */
    size_t cap;        /* of data */
    size_t begin, end; /* data[begin .. end) is unread */
    size_t scanned;    /* data[begin .. scanned) has no separator */

    int decided;                /* whether the bytes are compressed */
    decompressor *decompressor; /* NULL: they are not */
    char *raw;                  /* (BUFFER_BYTES) */
    size_t raw_begin, raw_end;  /* raw[raw_begin .. raw_end) is not decompressed */
    int raw_more;               /* the decompressor may have more without them */
    uint64_t raw_bytes;         /* decompressed */

    void (*watch)(void *self, const void *bytes, size_t n); /* or NULL */
    void *watch_self;
};

input *input_new(int fd, int wake_fd, char separator) {
    input *in = calloc(1, sizeof *in);
    if (!in) return NULL;
    in->fd = fd, in->wake_fd = wake_fd, in->separator = separator;
    in->cap = BUFFER_BYTES;
    in->data = malloc(in->cap);
    if (in->data) return in;
    free(in);
    return NULL;
}

void input_free(input *in) {
    if (!in) return;
    decompressor_free(in->decompressor);
    free(in->raw);
    free(in->data);
    free(in);
}

void input_watch(input *in, void (*watch)(void *, const void *, size_t), void *self) {
    in->watch = watch, in->watch_self = self;
}

uint64_t input_consumed(const input *in) { return in->decompressor ? in->raw_bytes : in->bytes; }
const char *input_error(const input *in) { return in->failed; }

static input_status fail(input *in, const char *why) {
    snprintf(in->failed, sizeof in->failed, "%s", why);
    return INPUT_FAILED;
}

/* Makes room after data + end, and shrinks a buffer that is larger than needed. If memory runs out
 * inside a record, drops what was read of it and skips the rest. */
static void make_room(input *in) {
    const size_t unread = in->end - in->begin;
    if (in->begin) {
        memmove(in->data, in->data + in->begin, unread);
        in->scanned -= in->begin;
        in->begin = 0, in->end = unread;
    }
    size_t want = in->cap;
    if (unread == in->cap)
        want = in->cap * 2;
    else if (in->cap > BUFFER_KEPT && unread < BUFFER_BYTES / 2)
        want = BUFFER_BYTES;
    if (want == in->cap) return;
    char *data = realloc(in->data, want);
    if (data) {
        in->data = data, in->cap = want;
    } else if (want > in->cap) {
        in->skipping = 1;
        in->bytes += unread;
        in->end = in->scanned = 0;
    }
}

/* Moves bytes from raw to data. INPUT_RECORD: that may have brought some. */
static input_status expand(input *in) {
    const char *from = in->raw + in->raw_begin;
    make_room(in);
    const size_t room = in->cap - in->end;
    const ptrdiff_t n =
        decompress(in->decompressor, &from, in->raw_end - in->raw_begin, in->data + in->end, room);
    if (n < 0) return fail(in, decompressor_error(in->decompressor));
    in->raw_bytes += (uint64_t)(from - in->raw) - in->raw_begin;
    in->raw_begin = (size_t)(from - in->raw);
    in->raw_more = (size_t)n == room || *decompressor_error(in->decompressor);
    in->end += (size_t)n;
    return INPUT_RECORD;
}

/* Looks at the first bytes, all in data. A record ends with none that a compressed stream begins
 * with, so none has been taken while that is open. */
static input_status find_compression(input *in) {
    const compression c = compression_of(in->data, in->end);
    in->decided = c != COMPRESSION_UNKNOWN;
    if (c == COMPRESSION_UNKNOWN || c == COMPRESSION_NONE) return INPUT_RECORD;
    in->raw = malloc(BUFFER_BYTES);
    in->decompressor = in->raw ? decompressor_new(c, 0) : NULL;
    if (!in->decompressor) return fail(in, "out of memory");
    memcpy(in->raw, in->data, in->end);
    in->raw_end = in->end;
    in->end = in->scanned = 0;
    return expand(in);
}

/* Takes n bytes that were read, 0 at the end of input; `to` is where they are. */
static input_status take_bytes(input *in, char *to, size_t n) {
    in->ended = !n;
    if (in->watch && n) in->watch(in->watch_self, to, n);
    if (in->decompressor) {
        in->raw_begin = 0, in->raw_end = n;
        if (n) return expand(in);
        return decompressor_at_end(in->decompressor) ? INPUT_RECORD
                                                     : fail(in, "compressed data: cut off");
    }
    in->end += n;
    return in->decided || !n ? INPUT_RECORD : find_compression(in);
}

/* One read. INPUT_RECORD: bytes arrived, or the end of input. */
static input_status fill(input *in, int wait) {
    struct pollfd fds[2] = {{.fd = in->fd, .events = POLLIN},
                            {.fd = in->wake_fd, .events = POLLIN}};
    if (in->raw_begin < in->raw_end || in->raw_more) return expand(in);
    for (;;) {
        if (poll(fds, 2, wait ? -1 : 0) < 0) {
            if (errno == EINTR) continue;
            break;
        }
        if (fds[1].revents) return INPUT_STOPPED;
        if (!fds[0].revents) return INPUT_WAIT;
        if (!in->decompressor) make_room(in);
        char *to = in->decompressor ? in->raw : in->data + in->end;
        const ssize_t n = read(in->fd, to, in->decompressor ? BUFFER_BYTES : in->cap - in->end);
        if (n >= 0) return take_bytes(in, to, (size_t)n);
        if (errno == EINTR || errno == EAGAIN) continue; /* EAGAIN: another process read it first */
        break;
    }
    return fail(in, strerror(errno));
}

/* Returns data[begin .. stop) as a record. The next record begins at `next`. */
static input_status take(input *in, size_t stop, size_t next, input_record *r) {
    size_t len = stop - in->begin;
    const char *text = in->data + in->begin;
    if (in->separator == '\n' && len && text[len - 1] == '\r') len--;
    *r = (input_record){text, in->skipping ? 0 : len, ++in->line, in->bytes, in->skipping};
    in->skipping = 0;
    in->bytes += next - in->begin;
    in->begin = in->scanned = next;
    return INPUT_RECORD;
}

/* Looks at the n bytes of the first record with its separator, or at the first ones of a long
 * record: what has arrived behind it does not count. Drops a byte order mark, and refuses UTF-16.
 * Of records that end with NUL, a mark alone tells that. */
static void start_text(input *in, size_t n) {
    const char *s = in->data + in->begin;
    const size_t mark = utf8_mark(s, n);
    in->started = 1;
    if (utf16_mark(s, n) || (in->separator && looks_like_utf16(s, n))) {
        fail(in, UTF16_TEXT);
        in->begin = in->scanned = in->end;
        return;
    }
    in->begin += mark;
    in->bytes += mark;
    if (in->scanned < in->begin) in->scanned = in->begin;
}

input_status input_next(input *in, int wait, input_record *r) {
    for (;;) {
        const char *from = in->data + in->scanned;
        const char *found = memchr(from, in->separator, in->end - in->scanned);
        if (!in->started && (found || in->ended || in->end - in->begin >= BUFFER_BYTES)) {
            start_text(in,
                       found ? (size_t)(found + 1 - in->data) - in->begin : in->end - in->begin);
            continue;
        }
        if (found) {
            const size_t stop = (size_t)(found - in->data);
            return take(in, stop, stop + 1, r);
        }
        in->scanned = in->end;
        if (in->skipping) { /* drop its bytes */
            in->bytes += in->end - in->begin;
            in->begin = in->end = in->scanned = 0;
        }
        if (*in->failed) return INPUT_FAILED;
        if (in->ended) {
            if (in->begin == in->end && !in->skipping) return INPUT_END;
            return take(in, in->end, in->end, r);
        }
        const input_status s = fill(in, wait);
        if (s != INPUT_RECORD && s != INPUT_FAILED) return s;
    }
}

/* ---- the object in a JSON line --------------------------------------------------------------- */

struct input_parser {
    int vocab, dim;
    json_t *root;
    int32_t *ids;
    size_t ids_cap;
    int keep;
    /* What comes back of a line: at its front the keys that are kept, at its end the id. */
    char *copies; /* (copies_cap) */
    size_t copies_cap, kept_len, id_len;
};

input_parser *input_parser_new(int vocab, int dim) {
    input_parser *p = calloc(1, sizeof *p);
    if (p) p->vocab = vocab, p->dim = dim;
    return p;
}

void input_parser_free(input_parser *p) {
    if (!p) return;
    json_decref(p->root);
    free(p->ids);
    free(p->copies);
    free(p);
}

void input_parser_keep(input_parser *p) { p->keep = 1; }

static int syntax_error(const json_read_error *e, size_t len, qemb_err *err) {
    static const char *const codes[] = {[JSON_FAULT_SYNTAX] = "invalid_json",
                                        [JSON_FAULT_UTF8] = "invalid_utf8",
                                        [JSON_FAULT_TWICE] = "bad_record",
                                        [JSON_FAULT_MEMORY] = "out_of_memory"};
    if (!len) return qemb_fail(err, "invalid_json", "record: empty line (want a JSON object)");
    return qemb_fail(err, codes[e->fault], "record: %s", e->text);
}

static int want_string(const char *key, const json_t *v, const char **s, size_t *len,
                       qemb_err *err) {
    if (!json_is_string(v))
        return qemb_fail(err, "bad_record", "\"%s\": wrong type (got %s, want a string)", key,
                         json_type_name(v));
    *s = json_string_value(v);
    *len = json_string_length(v);
    return 0;
}

static int want_ids(input_parser *p, const json_t *v, input_object *o, qemb_err *err) {
    if (!json_is_array(v))
        return qemb_fail(err, "bad_ids", "\"ids\": wrong type (got %s, want a list of integers)",
                         json_type_name(v));
    const size_t n = json_array_size(v);
    if (n > p->ids_cap || !p->ids) {
        int32_t *ids = realloc(p->ids, (n + 1) * sizeof *ids);
        if (!ids) return qemb_fail(err, "out_of_memory", "\"ids\": out of memory");
        p->ids = ids, p->ids_cap = n + 1;
    }
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_array_get(v, i);
        if (!json_is_integer(id))
            return qemb_fail(err, "bad_ids", "\"ids\"[%zu]: wrong type (got %s, want an integer)",
                             i, json_type_name(id));
        const json_int_t x = json_integer_value(id);
        if (x < 0 || x >= p->vocab)
            return qemb_fail(err, "bad_ids", "\"ids\"[%zu]: no such token (got %lld, want 0..%d)",
                             i, (long long)x, p->vocab - 1);
        p->ids[i] = (int32_t)x;
    }
    o->ids = p->ids;
    o->n_ids = n;
    return 0;
}

static int want_dim(const input_parser *p, const json_t *v, input_object *o, qemb_err *err) {
    if (!json_is_integer(v))
        return qemb_fail(err, "bad_dim", "\"dim\": wrong type (got %s, want an integer)",
                         json_type_name(v));
    const json_int_t x = json_integer_value(v);
    if (x < 1 || x > p->dim)
        return qemb_fail(err, "bad_dim", "\"dim\": out of range (got %lld, want 1..%d)",
                         (long long)x, p->dim);
    o->dim = (int)x;
    return 0;
}

static int is_one_of(const char *key, const char *const *names) {
    while (*names && strcmp(key, *names)) names++;
    return *names != NULL;
}

/* The keys of field, and those that a record of the output has beside "id". */
static const char *const of_input[] = {"id", "text", "ids", "instruct", "dim", NULL};
static const char *const of_output[] = {
    "embedding", "tokens", "truncated_bytes", "truncated_tokens", "line", "error", NULL};

static int field(input_parser *p, const char *key, const json_t *v, input_object *o,
                 qemb_err *err) {
    const int is_null = json_is_null(v);
    if (!strcmp(key, "id")) return 0; /* already read */
    if (!strcmp(key, "text")) return is_null ? 0 : want_string(key, v, &o->text, &o->text_len, err);
    if (!strcmp(key, "ids")) return is_null ? 0 : want_ids(p, v, o, err);
    if (!strcmp(key, "dim")) return is_null ? 0 : want_dim(p, v, o, err);
    if (!strcmp(key, "instruct")) {
        o->instruct = "";
        return is_null ? 0 : want_string(key, v, &o->instruct, &o->instruct_len, err);
    }
    if (p->keep && !is_one_of(key, of_output)) return 0;
    if (p->keep)
        return qemb_fail(err, "bad_record", "\"%.64s\": a key of the output (want another name)",
                         key);
    return qemb_fail(err, "bad_record",
                     "\"%.64s\": unknown key (want id, text, ids, instruct, dim; --keep takes "
                     "others)",
                     key);
}

/* ---- members that come back as they came ----------------------------------------------------- */

/* A newline can only stand between tokens. */
static char *copy_tokens(char *to, const char *s, size_t n) {
    for (size_t i = 0; i < n; i++) *to++ = s[i] == '\n' || s[i] == '\r' ? ' ' : s[i];
    return to;
}

/* There is room: the copies are parts of the line, and each comma and colon stands for one in it,
 * or for its brace. */
static void copy_member(void *self, const json_member *m) {
    input_parser *p = self;
    if (!strcmp(m->name, "id")) {
        p->id_len = m->value_len;
        copy_tokens(p->copies + p->copies_cap - p->id_len, m->value, m->value_len);
    } else if (p->keep && !is_one_of(m->name, of_input) && !is_one_of(m->name, of_output)) {
        char *to = p->copies + p->kept_len;
        *to++ = ',';
        to = copy_tokens(to, m->key, m->key_len);
        *to++ = ':';
        to = copy_tokens(to, m->value, m->value_len);
        p->kept_len = (size_t)(to - p->copies);
    }
}

/* Makes room for the copies of a line (len). A buffer that grew for a long line is freed. */
static int reserve_copies(input_parser *p, size_t len) {
    p->kept_len = p->id_len = 0;
    if (len <= p->copies_cap && p->copies_cap <= BUFFER_KEPT) return 0;
    free(p->copies);
    p->copies = malloc(len + 1);
    p->copies_cap = p->copies ? len + 1 : 0;
    return p->copies ? 0 : -1;
}

static int fields(input_parser *p, input_object *o, qemb_err *err) {
    const char *key;
    json_t *v;
    json_object_foreach(p->root, key, v) if (field(p, key, v, o, err)) return -1;
    if (!o->text && !o->ids)
        return qemb_fail(err, "bad_record", "record: neither \"text\" nor \"ids\" (want one)");
    if (o->text && o->ids)
        return qemb_fail(err, "bad_record", "record: both \"text\" and \"ids\" (want one)");
    if (o->ids && o->instruct_len)
        return qemb_fail(err, "bad_record",
                         "\"instruct\": a prompt for \"ids\", which are complete");
    return 0;
}

/* p->root = the object in line (len). *id (id_len) is set as input_object says. */
static int parse_object(input_parser *p, const char *line, size_t len, const char **id,
                        size_t *id_len, qemb_err *err) {
    json_read_error e;
    *id = "null", *id_len = 4;
    json_decref(p->root);
    p->root = NULL;
    if (reserve_copies(p, len)) return qemb_fail(err, "out_of_memory", "record: out of memory");
    p->root = json_read(line, len, copy_member, p, &e);
    if (!p->root) p->kept_len = 0;
    if (!p->root) return syntax_error(&e, len, err);
    if (!json_is_object(p->root))
        return qemb_fail(err, "bad_record", "record: wrong type (got %s, want an object)",
                         json_type_name(p->root));
    *id = p->id_len ? p->copies + p->copies_cap - p->id_len : NULL;
    *id_len = p->id_len;
    return 0;
}

int input_parse(input_parser *p, const char *line, size_t len, input_object *o, qemb_err *err) {
    *o = (input_object){0};
    if (parse_object(p, line, len, &o->id, &o->id_len, err)) return -1;
    o->kept = p->copies, o->kept_len = p->kept_len;
    return fields(p, o, err);
}

/* ---- the object in a JSON line for a reranker ------------------------------------------------ */

/* The text of a document, a string or an object with a string "text"; NULL if it is neither. */
static const json_t *document_text(const json_t *v) {
    if (json_is_object(v)) v = json_object_get(v, "text");
    return json_is_string(v) ? v : NULL;
}

static int want_documents(const json_t *v, input_ranking *o, qemb_err *err) {
    if (!json_is_array(v))
        return qemb_fail(err, "bad_record", "\"documents\": wrong type (got %s, want a list)",
                         json_type_name(v));
    o->n_documents = json_array_size(v);
    for (size_t i = 0; i < o->n_documents; i++)
        if (!document_text(json_array_get(v, i)))
            return qemb_fail(err, "bad_record",
                             "\"documents\"[%zu]: wrong type (got %s, want a string or "
                             "{\"text\": a string})",
                             i, json_type_name(json_array_get(v, i)));
    return 0;
}

static int want_top(const json_t *v, input_ranking *o, qemb_err *err) {
    if (!json_is_integer(v))
        return qemb_fail(err, "bad_record", "\"top_n\": wrong type (got %s, want an integer)",
                         json_type_name(v));
    if (json_integer_value(v) < 0)
        return qemb_fail(err, "bad_record", "\"top_n\": out of range (got %lld, want 0 or more)",
                         (long long)json_integer_value(v));
    o->top_n = (size_t)json_integer_value(v);
    return 0;
}

static int ranking_field(const char *key, const json_t *v, input_ranking *o, qemb_err *err) {
    if (!strcmp(key, "id")) return 0; /* already read */
    if (!strcmp(key, "query")) return want_string(key, v, &o->query, &o->query_len, err);
    if (!strcmp(key, "documents")) return want_documents(v, o, err);
    const int is_null = json_is_null(v);
    if (!strcmp(key, "instruct"))
        return is_null ? 0 : want_string(key, v, &o->instruct, &o->instruct_len, err);
    if (!strcmp(key, "top_n")) return is_null ? 0 : want_top(v, o, err);
    return qemb_fail(err, "bad_record",
                     "\"%.64s\": unknown key (want id, query, documents, instruct, top_n)", key);
}

int input_parse_ranking(input_parser *p, const char *line, size_t len, input_ranking *o,
                        qemb_err *err) {
    const char *key;
    json_t *v;
    *o = (input_ranking){0};
    if (parse_object(p, line, len, &o->id, &o->id_len, err)) return -1;
    json_object_foreach(p->root, key, v) if (ranking_field(key, v, o, err)) return -1;
    if (!o->query) return qemb_fail(err, "bad_record", "record: no \"query\"");
    if (!json_object_get(p->root, "documents"))
        return qemb_fail(err, "bad_record", "record: no \"documents\"");
    return 0;
}

const char *input_document(const input_parser *p, size_t i, size_t *len) {
    const json_t *text = document_text(json_array_get(json_object_get(p->root, "documents"), i));
    *len = json_string_length(text);
    return json_string_value(text);
}
