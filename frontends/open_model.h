/* open_model.h - a model file with its tokenizer, opened for both programs. */
#ifndef QEMB_OPEN_MODEL_H
#define QEMB_OPEN_MODEL_H

#include "model_options.h"

typedef struct {
    qemb_file *file;
    qemb_tokenizer *tokenizer;
} model_file;

/* Opens and checks o->model, with o->verify all of it. Ends the process with STATUS_MODEL and a
 * message if that fails. Of what is no .qemb file the message says what it is, and the command that
 * makes one of it. */
void open_model_file(model_file *m, const model_options *o);
/* The same for a program that goes on without: returns -1 with *err, and m holds nothing. */
int try_model_file(model_file *m, const model_options *o, qemb_err *err);
/* Ends the process as open_model_file does. */
_Noreturn void refuse_model_file(const char *path, const qemb_err *err);
void close_model_file(model_file *m); /* m may hold nothing */
/* The same without the tokenizer. */
qemb_file *open_weights(const char *path);
void close_weights(qemb_file *f);

enum { SHA256_BYTES = 32 };
/* Compares the SHA-256 of a file's contents with the one in its header, which takes a second for
 * one or two GB. Returns 0, or -1 with *err; digest is what the contents have. */
int verify_weights(uint8_t digest[SHA256_BYTES], const qemb_file *f, const char *path,
                   qemb_err *err);

#endif
