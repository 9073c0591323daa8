/* model_options.h - the options of both programs for a model: file, prompt, engine. */
#ifndef QEMB_MODEL_OPTIONS_H
#define QEMB_MODEL_OPTIONS_H

#include "options.h"
#include "qemb.h"

enum { MAX_DEVICES = 64 };

typedef struct {
    const char *model;
    const char *instruct; /* NULL: none */
    const char *prompt;   /* the name of a prompt of the model, NULL: none */
    int query, document;  /* 1: the prompt of that name; document: if there is one */
    int truncate;
    int verify; /* 1: the file's SHA-256 is checked before it is used */
    const char *cpu, *math; /* NULL: not given */
    const char *device_list;
    qemb_options engine; /* 0: the engine's default */
    /* After model_options_check: */
    const qemb_ops *ops;      /* the table that cpu and math name */
    int devices[MAX_DEVICES]; /* (n_devices) the GPUs that compute; a CPU's table has 0 alone */
    int n_devices;
} model_options;

/* The commands of qemb, as the rows' `commands` name them. qemb-serve has no commands. */
enum {
    FOR_EMBED = 1,
    FOR_INFO = 2,
    FOR_TOKENIZE = 4,
    FOR_PLAN = 8,
    FOR_CHECK = 16,
    FOR_GREP = 32,
    FOR_RERANK = 64,
    FOR_SHARDS = 128
};

extern const option_row model_option_rows[];
extern const int n_model_option_rows;

/* Finds ops and devices. Ends with STATUS_USAGE if the options contradict each other or the
 * machine. */
void model_options_check(model_options *o);

#endif
