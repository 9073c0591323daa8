/* hits.c - what `qemb grep` found; see hits.h. */
#include "hits.h"

#include "frontends/console.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- the best -------------------------------------------------------------------------------- */

static int is_better(const hit *a, const hit *b) {
    return a->score > b->score || (a->score == b->score && a->order < b->order);
}

/* Moves the hit at i down to its place among the first n. */
static void sink(hit *heap, size_t n, size_t i) {
    const hit moved = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && is_better(&heap[child], &heap[child + 1])) child++;
        if (!is_better(&moved, &heap[child])) break;
        heap[i] = heap[child];
    }
    heap[i] = moved;
}

static void rise(hit *heap, size_t i) {
    const hit moved = heap[i];
    for (size_t parent; i && (parent = (i - 1) / 2, is_better(&heap[parent], &moved)); i = parent)
        heap[i] = heap[parent];
    heap[i] = moved;
}

static hit copy_of(const hit *h) {
    hit copy = *h;
    if (!h->text) return copy;
    char *text = need(malloc(h->len + 1));
    memcpy(text, h->text, h->len);
    copy.text = text;
    return copy;
}

static void free_text(hit *h) { free((void *)(uintptr_t)h->text); }

void best_offer(best_hits *b, const hit *h) {
    if (b->n == b->most) {
        if (!is_better(h, &b->heap[0])) return;
        free_text(&b->heap[0]);
        b->heap[0] = copy_of(h);
        sink(b->heap, b->n, 0);
        return;
    }
    if (b->n == b->cap) {
        b->cap = 2 * b->cap + 16;
        b->heap = need(realloc(b->heap, b->cap * sizeof *b->heap));
    }
    b->heap[b->n++] = copy_of(h);
    rise(b->heap, b->n - 1);
}

void best_sort(best_hits *b) {
    for (size_t n = b->n; n > 1; n--) { /* the worst of n to the end */
        const hit worst = b->heap[0];
        b->heap[0] = b->heap[n - 1];
        b->heap[n - 1] = worst;
        sink(b->heap, n - 1, 0);
    }
}

void best_free(best_hits *b) {
    for (size_t i = 0; i < b->n; i++) free_text(&b->heap[i]);
    free(b->heap);
}

/* ---- printing -------------------------------------------------------------------------------- */

/* grep's colours for names, numbers and separators; yellow for the score. */
#define SCORE_COLOR     "\033[33m"
#define FILE_COLOR      "\033[35m"
#define LINE_COLOR      "\033[32m"
#define SEPARATOR_COLOR "\033[36m"
#define NO_COLOR        "\033[m"
enum {
    COLORS_ROOM = 64, /* of all escape sequences of a line */
    LINE_ROOM = 160   /* of all but the strings: two numbers, punctuation, the name of stdin */
};

void printer_open(hit_printer *p, const options *o) {
    *p = (hit_printer){.names = o->files,
                       .json = o->json,
                       .with_line = o->with_line,
                       .with_file = o->with_file ? o->with_file > 0 : o->n_files > 1,
                       .terminal = isatty(STDOUT_FILENO)};
    p->color = !o->json && (o->color == COLOR_ALWAYS || (o->color == COLOR_AUTO && p->terminal));
    output_open(&p->out, STDOUT_FILENO, FORMAT_JSON, 1);
}

static char *put_text(const hit_printer *h, char *p, const char *s, size_t n) {
    return h->terminal ? put_printable(p, s, n) : put_bytes(p, s, n);
}

static char *put_colored(const hit_printer *h, char *p, const char *color, const char *s,
                         size_t n) {
    if (!h->color) return put_text(h, p, s, n);
    return put(put_text(h, put(p, color), s, n), NO_COLOR);
}

static char *put_string(const hit_printer *h, char *p, const char *s, size_t n) {
    if (!h->terminal) return format_json_string(p, s, n);
    char *cleaned = need(malloc(n + 1));
    p = format_json_string(p, cleaned, (size_t)(put_printable(cleaned, s, n) - cleaned));
    free(cleaned);
    return p;
}

static char *put_json(const hit_printer *h, char *p, const hit *x) {
    const char *name = h->names[x->file];
    p = format_float(put(p, "{\"score\":"), x->score);
    p = put_string(h, put(p, ",\"file\":"), name, strlen(name));
    p = format_uint(put(p, ",\"line\":"), x->line);
    p = put_string(h, put(p, ",\"text\":"), x->text, x->len);
    return put(p, "}");
}

static char *put_line(const hit_printer *h, char *p, const hit *x) {
    const char *name = is_stdin(h->names[x->file]) ? "(standard input)" : h->names[x->file];
    char number[FORMAT_UINT_ROOM], score[32];
    const double shown = (double)x->score;
    const int n = snprintf(score, sizeof score, "%.4f", shown < 0 && shown > -5e-5 ? 0 : shown);
    p = put_colored(h, p, SCORE_COLOR, score, (size_t)n);
    *p++ = '\t';
    if (h->with_file) {
        p = put_colored(h, p, FILE_COLOR, name, strlen(name));
        p = put_colored(h, p, SEPARATOR_COLOR, ":", 1);
    }
    if (h->with_line) {
        const size_t digits = (size_t)(format_uint(number, x->line) - number);
        p = put_colored(h, p, LINE_COLOR, number, digits);
        p = put_colored(h, p, SEPARATOR_COLOR, ":", 1);
    }
    return put_text(h, p, x->text, x->len);
}

void print_hit(hit_printer *h, const hit *x) {
    const size_t strings = x->len + strlen(h->names[x->file]); /* in JSON up to 6 bytes for one */
    char *p = output_room(&h->out, (h->json ? 6 : 1) * strings + COLORS_ROOM + LINE_ROOM);
    p = h->json ? put_json(h, p, x) : put_line(h, p, x);
    *p++ = '\n';
    output_wrote(&h->out, p);
    h->printed++;
}
