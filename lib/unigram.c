/* unigram.c */
#include "qemb.h"
int qemb_unigram_open(qemb_tokenizer **t, const uint8_t *unigram, size_t bytes,
                      const uint8_t *added, size_t added_bytes, qemb_err *err) {
    (void)t, (void)unigram, (void)bytes, (void)added, (void)added_bytes;
    return qemb_fail(err, "model_file", "unigram: not there");
}
