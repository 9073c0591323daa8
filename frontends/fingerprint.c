/* fingerprint.c - digests of a model and of a recipe; see fingerprint.h. */
#include "fingerprint.h"

#include "format.h"

#include <openssl/evp.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#define HEADER_BYTES 4096

static int digest(uint8_t out[FINGERPRINT_BYTES], const void *a, size_t a_len, const void *b,
                  size_t b_len) {
    EVP_MD_CTX *c = EVP_MD_CTX_new();
    const int good = c && EVP_DigestInit_ex(c, EVP_sha256(), NULL) &&
                     EVP_DigestUpdate(c, a, a_len) && EVP_DigestUpdate(c, b, b_len) &&
                     EVP_DigestFinal_ex(c, out, NULL);
    EVP_MD_CTX_free(c);
    return good ? 0 : -1;
}

int model_fingerprint(uint8_t out[FINGERPRINT_BYTES], const qemb_file *f, const qemb_ops *ops) {
    return digest(out, ops->name, strlen(ops->name) + 1, f->map, HEADER_BYTES);
}

void weights_checksum(uint8_t out[WEIGHTS_BYTES], const qemb_file *f) {
    const XXH64_hash_t seed = XXH3_64bits(QEMB_VERSION, strlen(QEMB_VERSION));
    XXH128_canonical_t digest;
    XXH128_canonicalFromHash(&digest, XXH3_128bits_withSeed(f->map, f->map_bytes, seed));
    memcpy(out, digest.digest, WEIGHTS_BYTES);
}

int recipe_fingerprint(char out[RECIPE_ROOM], const uint8_t model[FINGERPRINT_BYTES],
                       const char *prompt, size_t len) {
    uint8_t d[FINGERPRINT_BYTES];
    if (digest(d, model, FINGERPRINT_BYTES, prompt, len)) return -1;
    *format_hex(out, d, (RECIPE_ROOM - 1) / 2) = 0;
    return 0;
}
