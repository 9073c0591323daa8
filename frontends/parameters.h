/* parameters.h - how many numbers a model has. */
#ifndef QEMB_PARAMETERS_H
#define QEMB_PARAMETERS_H

#include "qemb.h"

/* The numbers of a model: in its layers with all norms, in the table of tokens and in that of
 * positions. A dense layer is not among them. */
typedef struct {
    size_t layers, tokens, positions;
} model_parameters;
model_parameters count_parameters(const qemb_config *c);

#endif
