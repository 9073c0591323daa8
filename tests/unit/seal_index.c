/* seal_index.c - see seal_index.h. It follows the layout in line_index.h and nothing in
 * line_index.c. */
#include "seal_index.h"

#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

static uint64_t number(const uint8_t *p, size_t n) {
    uint64_t x = 0;
    memcpy(&x, p, n);
    return x;
}

void seal_index(uint8_t *index, size_t bytes) {
    enum { HEAD = 4096, BLOCK = 256 };
    const uint64_t dim = number(index + 120, 4), rows = number(index + 136, 8);
    const size_t row = ((size_t)dim + 31) / 32 * 64, rest = bytes - HEAD;
    const int fits = row && rows <= rest / (row + 24) &&
                     rows * (row + 24) + (rows + BLOCK - 1) / BLOCK * 8 <= rest;
    const size_t vectors = fits ? rows * row : 0;
    uint8_t *digests = index + HEAD + vectors + rows * 24;
    for (size_t at = 0; at < vectors; at += BLOCK * row, digests += 8) {
        const size_t left = vectors - at;
        const uint64_t digest =
            XXH3_64bits(index + HEAD + at, left < BLOCK * row ? left : BLOCK * row);
        memcpy(digests, &digest, 8);
    }
    uint8_t *covered = malloc(bytes - vectors); /* all but the vectors, with no digest */
    if (!covered) abort();
    memset(index + 24, 0, 8);
    memcpy(covered, index, HEAD);
    memcpy(covered + HEAD, index + HEAD + vectors, rest - vectors);
    const uint64_t digest = XXH3_64bits(covered, bytes - vectors);
    memcpy(index + 24, &digest, 8);
    free(covered);
}
