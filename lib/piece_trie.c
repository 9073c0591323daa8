/* piece_trie.c - builds the double array of a vocabulary. */
#include "lib/piece_trie.h"
#include "lib/tokenizer.h"

enum {
    UNITS_MAX = 1 << 23, /* a base has 23 bits */
    BLOCK = 256,         /* units of a base: its children are in one block */
    TRIES = 64,          /* free units that a node looks at before it takes a new block */
    USED = 1,            /* in builder.flags: the unit is not free */
    BASE = 2,            /* some node has this base */
};

/* Pieces lo..hi-1 share their first `depth` bytes and are longer; they are children of a node. */
typedef struct {
    uint32_t node; /* its unit, or ROOT */
    uint32_t lo, hi, depth;
} group;

#define ROOT UINT32_MAX

typedef struct {
    const trie_piece *piece;
    trie_unit *unit; /* (n) */
    uint32_t n, cap, root;
    uint32_t *next, *prev; /* (n), the ring of free units */
    uint8_t *flags;        /* (n) */
    uint32_t head;         /* a free unit, where the search begins */
    uint32_t n_free;
    group *todo; /* (n_todo), a stack */
    size_t n_todo, todo_cap;
} builder;

static int by_text(const void *a_, const void *b_) {
    const trie_piece *a = a_, *b = b_;
    const int order = memcmp(a->p, b->p, a->n < b->n ? a->n : b->n);
    return order ? order : (a->n > b->n) - (a->n < b->n);
}

/* Appends a block of free units. */
static int add_block(builder *b, qemb_err *err) {
    size_t units = b->cap, nexts = b->cap, prevs = b->cap, flags = b->cap;
    const uint32_t first = b->n, end = first + BLOCK;
    if (end > UNITS_MAX)
        return qemb_fail(err, "model_file",
                         "unigram: too many pieces (got a trie over %d, want %d)", UNITS_MAX,
                         UNITS_MAX);
    if (reserve(&b->unit, &units, end, sizeof *b->unit) ||
        reserve(&b->next, &nexts, end, sizeof *b->next) ||
        reserve(&b->prev, &prevs, end, sizeof *b->prev) ||
        reserve(&b->flags, &flags, end, sizeof *b->flags))
        return tokenizer_no_memory(err, "the pieces");
    b->cap = (uint32_t)flags;
    b->n = end;
    memset(b->unit + first, 0, BLOCK * sizeof *b->unit);
    memset(b->flags + first, 0, BLOCK);
    for (uint32_t i = first; i < end; i++) {
        b->next[i] = i + 1;
        b->prev[i] = i - 1;
    }
    if (!b->n_free) b->head = first; /* a ring of its own */
    const uint32_t last = b->n_free ? b->prev[b->head] : end - 1;
    b->next[end - 1] = b->head;
    b->prev[b->head] = end - 1;
    b->prev[first] = last;
    b->next[last] = first;
    b->n_free += BLOCK;
    return 0;
}

static void take_unit(builder *b, uint32_t i) {
    b->flags[i] |= USED;
    b->next[b->prev[i]] = b->next[i];
    b->prev[b->next[i]] = b->prev[i];
    if (b->head == i) b->head = b->next[i];
    b->n_free--;
}

/* *base = one whose children for bytes (n) are all free. */
static int find_base(builder *b, const uint8_t *bytes, unsigned n, uint32_t *base, qemb_err *err) {
    uint32_t u = b->head;
    for (uint32_t tries = 0; tries < TRIES && tries < b->n_free; tries++, u = b->next[u]) {
        unsigned i = 1;
        *base = u ^ bytes[0];
        if (b->flags[*base] & BASE) continue;
        while (i < n && !(b->flags[*base ^ bytes[i]] & USED)) i++;
        if (i == n) return 0;
    }
    /* The units that were in the way come last from now on. */
    if (b->n_free) b->head = u;
    *base = b->n;
    return add_block(b, err);
}

/* Makes the children of a group's node, and puts their own groups on the stack. */
static int expand(builder *b, group g, qemb_err *err) {
    uint8_t bytes[256];
    uint32_t from[257], base;
    unsigned n = 0;
    for (uint32_t i = g.lo; i < g.hi; i++) {
        const uint8_t c = b->piece[i].p[g.depth];
        if (n && bytes[n - 1] == c) continue;
        from[n] = i;
        bytes[n++] = c;
    }
    from[n] = g.hi;
    if (find_base(b, bytes, n, &base, err)) return -1;
    b->flags[base] |= BASE;
    for (unsigned i = 0; i < n; i++) take_unit(b, base ^ bytes[i]);
    if (g.node == ROOT)
        b->root = base;
    else
        b->unit[g.node].link |= base << 9;
    if (reserve(&b->todo, &b->todo_cap, b->n_todo + n, sizeof *b->todo))
        return tokenizer_no_memory(err, "the pieces");
    for (unsigned i = n; i-- > 0;) {
        const uint32_t at = base ^ bytes[i];
        const trie_piece *first = &b->piece[from[i]];
        const int ends = first->n == g.depth + 1;
        b->unit[at] = (trie_unit){0x100u | bytes[i], ends ? first->id + 1 : 0};
        if (from[i] + (uint32_t)ends < from[i + 1])
            b->todo[b->n_todo++] = (group){at, from[i] + (uint32_t)ends, from[i + 1], g.depth + 1};
    }
    return 0;
}

static int build(builder *b, size_t n, qemb_err *err) {
    if (add_block(b, err)) return -1;
    b->flags[0] |= BASE; /* of the nodes without children */
    b->root = 0;
    if (!n) return 0;
    if (reserve(&b->todo, &b->todo_cap, 1, sizeof *b->todo))
        return tokenizer_no_memory(err, "the pieces");
    b->todo[b->n_todo++] = (group){ROOT, 0, (uint32_t)n, 0};
    while (b->n_todo)
        if (expand(b, b->todo[--b->n_todo], err)) return -1;
    return 0;
}

int piece_trie_build(piece_trie *t, trie_piece *piece, size_t n, qemb_err *err) {
    builder b = {.piece = piece};
    *t = (piece_trie){0};
    qsort(piece, n, sizeof *piece, by_text);
    for (size_t i = 1; i < n; i++)
        if (!by_text(&piece[i - 1], &piece[i]))
            return qemb_fail(err, "model_file",
                             "unigram: two pieces are the same (got ids %u and %u, want texts that "
                             "differ)",
                             piece[i - 1].id, piece[i].id);
    const int rc = build(&b, n, err);
    free(b.next);
    free(b.prev);
    free(b.flags);
    free(b.todo);
    if (rc)
        free(b.unit);
    else
        *t = (piece_trie){b.unit, b.root};
    return rc;
}
