/* piece_trie.h - a vocabulary as a trie over bytes, in a double array (Aoe 1989).
 *
 * A node has a base, and its child for byte b is the unit base ^ b, if that unit says that it was
 * reached by b. No two nodes have the same base, so a unit that says so is the node's own child.
 * Nodes without children have base 0, which no other node has. */
#ifndef PIECE_TRIE_H
#define PIECE_TRIE_H

#include "qemb.h"

/* 0 if the unit is free. Else value is the id of the piece that ends here plus 1, or 0. */
typedef struct {
    uint32_t link; /* base << 9 | 0x100 | the byte that leads here */
    uint32_t value;
} trie_unit;

typedef struct {
    trie_unit *unit;
    uint32_t root; /* base of the root */
} piece_trie;

typedef struct {
    const uint8_t *p; /* (n), 0 < n < 256 */
    uint32_t n, id;
} trie_piece;

/* Builds the trie of the pieces (n), which it sorts. The caller frees t->unit. Codes: "model_file"
 * (two pieces are the same, or too many), "out_of_memory". */
int piece_trie_build(piece_trie *t, trie_piece *piece, size_t n, qemb_err *err);

/* The child for byte b of the node with *base, or NULL. *base becomes that of the child. */
static inline const trie_unit *piece_trie_step(const trie_unit *unit, uint32_t *base, uint8_t b) {
    const trie_unit *u = unit + (*base ^ b);
    if ((u->link & 0x1FF) != (b | 0x100u)) return NULL;
    *base = u->link >> 9;
    return u;
}

#endif
