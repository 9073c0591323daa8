/* open_model.h - a model file with its tokenizer, opened for both programs. */
#ifndef QEMB_OPEN_MODEL_H
#define QEMB_OPEN_MODEL_H

#include "qemb.h"

typedef struct {
    qemb_file *file;
    qemb_tokenizer *tokenizer;
} model_file;

/* Opens and checks both. Ends the process with STATUS_MODEL and a message if that fails. */
void open_model_file(model_file *m, const char *path);
void close_model_file(model_file *m);

#endif
