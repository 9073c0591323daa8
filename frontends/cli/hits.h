/* hits.h - lines that `qemb grep` found: the best of them, and how they are printed. */
#ifndef QEMB_HITS_H
#define QEMB_HITS_H

#include "cli.h"

typedef struct {
    float score;
    uint64_t order;   /* place in the input: decides between equal scores */
    int file;         /* index into the names */
    uint64_t line;    /* from 1 on */
    const char *text; /* (len) without the end of the line; may be NULL while hits are collected */
    size_t len;
} hit;

/* ---- the best -------------------------------------------------------------------------------- */

/* A heap with the worst hit on top. A hit's text is copied. */
typedef struct {
    size_t most, n, cap;
    hit *heap; /* (cap) */
} best_hits;

void best_offer(best_hits *b, const hit *h);
/* Puts the best first. No more offers after it. */
void best_sort(best_hits *b);
void best_free(best_hits *b);

/* ---- printing -------------------------------------------------------------------------------- */

typedef struct {
    output out;
    const char *const *names; /* of the files */
    int json, with_file, with_line, color;
    int terminal; /* control characters are replaced */
    uint64_t printed;
} hit_printer;

/* Sets up standard output. */
void printer_open(hit_printer *p, const options *o);
void print_hit(hit_printer *p, const hit *h);

#endif
