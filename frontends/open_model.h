/* open_model.h - a model file with its tokenizer, opened for both programs. */
#ifndef QEMB_OPEN_MODEL_H
#define QEMB_OPEN_MODEL_H

#include "qemb.h"

typedef struct {
    qemb_file *file;
    qemb_tokenizer *tokenizer;
} model_file;

/* Opens and checks both. Ends the process with STATUS_MODEL and a message if that fails. Of what is
 * no .qemb file the message says what it is, and the command that makes one of it. */
void open_model_file(model_file *m, const char *path);
void close_model_file(model_file *m);
/* The same without the tokenizer. The caller closes the file. */
qemb_file *open_weights(const char *path);

#endif
