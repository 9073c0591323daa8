/* open_model.c - a model file with its tokenizer; see open_model.h. */
#include "open_model.h"

#include "console.h"

void open_model_file(model_file *m, const char *path) {
    qemb_err err;
    if (qemb_file_open(&m->file, path, &err)) DIE(STATUS_MODEL, "%s", err.msg);
    if (qemb_file_tokenizer(&m->tokenizer, m->file, &err))
        DIE(STATUS_MODEL, "%.128s: %s", path, err.msg);
}

void close_model_file(model_file *m) {
    qemb_tokenizer_close(m->tokenizer);
    qemb_file_close(m->file);
}
