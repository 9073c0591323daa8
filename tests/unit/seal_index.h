/* seal_index.h - makes the digests of a changed index of lines true again. */
#ifndef SEAL_INDEX_H
#define SEAL_INDEX_H

#include <stddef.h>
#include <stdint.h>

/* Sets the digests of index (bytes, at least 4096) as its layout (frontends/cli/line_index.h) wants
 * them, as far as its counts lie within it. */
void seal_index(uint8_t *index, size_t bytes);

#endif
