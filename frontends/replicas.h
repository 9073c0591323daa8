/* replicas.h - the same model on several devices, for both programs. */
#ifndef QEMB_REPLICAS_H
#define QEMB_REPLICAS_H

#include "model_options.h"

typedef void layer_loaded(int layers, int of); /* as qemb_options.on_layer_loaded */

/* Opens the model on o->devices[i]. f has to outlive it. on_layer_loaded may be NULL. Returns -1
 * with *err if that fails. */
int replica_try_open(qemb_model **m, const qemb_file *f, const model_options *o, int i,
                     layer_loaded *on_layer_loaded, qemb_err *err);
/* The same, but ends the process with STATUS_MODEL and a message. */
qemb_model *replica_open(const qemb_file *f, const model_options *o, int i,
                         layer_loaded *on_layer_loaded);
/* Opens m (o->n_devices) on all of them at the same time, since uploads take seconds.
 * on_layer_loaded is called for the first one alone. */
void replicas_open(qemb_model **m, const qemb_file *f, const model_options *o,
                   layer_loaded *on_layer_loaded);

/* Computes a text of every size to which the table pads small batches, and a text as large as a
 * batch may be. A GPU loads a kernel when it is first launched, and the CUDA tables record a graph
 * for each size (backends/cuda/graphs.cuh); afterwards no request has to wait for that. Returns the
 * number of batches, 0 if out of memory. A device that fails says so in qemb_health_of, as
 * usual. */
int replica_warm_up(qemb_model *m, const qemb_file *f, const qemb_ops *ops);

#endif
