/* fingerprint.h - digests that tell whether two vectors may be compared bit for bit. */
#ifndef QEMB_FINGERPRINT_H
#define QEMB_FINGERPRINT_H

#include "qemb.h"

#define FINGERPRINT_BYTES 32
#define WEIGHTS_BYTES     16
/* Characters of a recipe's fingerprint, with the NUL. */
#define RECIPE_ROOM 33

/* The fingerprint of a model: SHA-256 of the table's name and the file's header, which holds the
 * model's shape and the SHA-256 of the rest. Tables round differently, and --cpu and --math do not
 * tell the table: machines differ in what serves them. Returns -1 if SHA-256 is not available. */
int model_fingerprint(uint8_t out[FINGERPRINT_BYTES], const qemb_file *f, const qemb_ops *ops);

/* The checksum of what is computed with: XXH3 of the file as it is mapped, and of qemb's version,
 * whose code may round differently. Reads the whole file. It tells damage, not malice. */
void weights_checksum(uint8_t out[WEIGHTS_BYTES], const qemb_file *f);

/* The fingerprint of a recipe: the model, the table and the prompt (len) that stands before each
 * text. out is 128 bits in hexadecimal. Returns -1 if SHA-256 is not available. */
int recipe_fingerprint(char out[RECIPE_ROOM], const uint8_t model[FINGERPRINT_BYTES],
                       const char *prompt, size_t len);

#endif
