/* open_model.c - a model file with its tokenizer; see open_model.h. */
#include "open_model.h"

#include "console.h"

#include <inttypes.h>

void open_model_file(model_file *m, const char *path) {
    qemb_err err;
    if (qemb_file_open(&m->file, path, &err)) DIE(STATUS_MODEL, "%s", err.msg);
    const qemb_file *f = m->file;
    if (qemb_tokenizer_open(&m->tokenizer, f->merges, f->n_merges, f->added, f->added_bytes, &err))
        DIE(STATUS_MODEL, "%.128s: %s", path, err.msg);
    const uint32_t n = qemb_tokenizer_n_ids(m->tokenizer);
    if (n > (uint32_t)f->config.vocab)
        DIE(STATUS_MODEL,
            "%.128s: tokenizer: more ids than rows of the embedding table "
            "(got %" PRIu32 ", want at most %d)",
            path, n, f->config.vocab);
}

void close_model_file(model_file *m) {
    qemb_tokenizer_close(m->tokenizer);
    qemb_file_close(m->file);
}
