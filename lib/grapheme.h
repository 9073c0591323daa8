/* grapheme.h - where extended grapheme clusters end (Unicode Standard Annex #29). */
#ifndef GRAPHEME_H
#define GRAPHEME_H

#include <stdint.h>

/* Classes of characters. No two neighbours of the first row belong to one cluster. */
enum {
    GRAPHEME_OTHER,
    GRAPHEME_CONTROL,
    GRAPHEME_PICTURE,
    GRAPHEME_CONSONANT,
    GRAPHEME_LV,
    GRAPHEME_LVT,   /* Hangul syllables without and with a tail */
    GRAPHEME_JOINS, /* from here on they may */
    GRAPHEME_CR = GRAPHEME_JOINS,
    GRAPHEME_LF,
    GRAPHEME_PREPEND,
    GRAPHEME_SPACING,
    GRAPHEME_EXTEND,
    GRAPHEME_LINKER,
    GRAPHEME_JOINER,
    GRAPHEME_NONJOINER, /* all four: Extend */
    GRAPHEME_L,
    GRAPHEME_V,
    GRAPHEME_T, /* Hangul letters */
    GRAPHEME_REGIONAL,
};

/* What the rules ask about the characters before a place. */
typedef struct {
    uint8_t last;    /* class of the last one */
    uint8_t linked;  /* 1: they end with a consonant and extending ones, 2: a linker among these */
    uint8_t picture; /* 1: they end with a picture and extending ones, 2: then a joiner */
    uint8_t odd;     /* they end with an odd number of regional indicators */
} grapheme;

static inline int grapheme_is_control(unsigned c) {
    return c == GRAPHEME_CONTROL || c == GRAPHEME_CR || c == GRAPHEME_LF;
}

/* The state behind a first character of class c. */
static inline grapheme grapheme_begin(unsigned c) {
    return (grapheme){(uint8_t)c, c == GRAPHEME_CONSONANT, c == GRAPHEME_PICTURE,
                      c == GRAPHEME_REGIONAL};
}

/* Whether a character of class c continues the cluster that ends before it. */
static inline int grapheme_continues(const grapheme *g, unsigned c) {
    const unsigned last = g->last;
    if (last == GRAPHEME_CR && c == GRAPHEME_LF) return 1;             /* GB3 */
    if (grapheme_is_control(last) || grapheme_is_control(c)) return 0; /* GB4, GB5 */
    switch (c) {
    case GRAPHEME_EXTEND:
    case GRAPHEME_LINKER:
    case GRAPHEME_JOINER:
    case GRAPHEME_NONJOINER:
    case GRAPHEME_SPACING:
        return 1; /* GB9, GB9a */
    default:
        break;
    }
    if (last == GRAPHEME_PREPEND) return 1; /* GB9b */
    switch (c) {
    case GRAPHEME_L:
    case GRAPHEME_LV:
    case GRAPHEME_LVT:
        return last == GRAPHEME_L; /* GB6 */
    case GRAPHEME_V:
        return last == GRAPHEME_L || last == GRAPHEME_V || last == GRAPHEME_LV; /* GB6, GB7 */
    case GRAPHEME_T:
        return last == GRAPHEME_V || last == GRAPHEME_LV || last == GRAPHEME_LVT ||
               last == GRAPHEME_T; /* GB7, GB8 */
    case GRAPHEME_CONSONANT:
        return g->linked == 2; /* GB9c */
    case GRAPHEME_PICTURE:
        return g->picture == 2; /* GB11 */
    case GRAPHEME_REGIONAL:
        return g->odd; /* GB12, GB13 */
    default:
        return 0; /* GB999 */
    }
}

/* The state behind one more character of class c. */
static inline grapheme grapheme_after(grapheme g, unsigned c) {
    grapheme next = grapheme_begin(c);
    if (c == GRAPHEME_LINKER && g.linked) next.linked = 2;
    if (c == GRAPHEME_EXTEND || c == GRAPHEME_JOINER) next.linked = g.linked;
    if (c == GRAPHEME_EXTEND || c == GRAPHEME_LINKER || c == GRAPHEME_NONJOINER)
        next.picture = g.picture == 1;
    if (c == GRAPHEME_JOINER && g.picture == 1) next.picture = 2;
    if (c == GRAPHEME_REGIONAL) next.odd = !g.odd;
    return next;
}

#endif
