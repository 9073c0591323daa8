/* support.h - shared by the tests: random numbers, comparisons, a writer of .qemb files. */
#ifndef SUPPORT_H
#define SUPPORT_H

#include "qemb.h"

#include <math.h>
#include <stdio.h>

/* Half an ulp of 1 in float: the relative error of one rounding. */
#define U 0x1p-24

/* 1 unless got is within tol of want. NaN is never within. */
static inline int far_off(double got, double want, double tol) {
    return !(fabs(got - want) <= tol);
}

/* xorshift64*: equal seeds give equal numbers on every machine */
typedef struct {
    uint64_t s;
} rng;
uint64_t rng_u64(rng *r);
double rng_uniform(rng *r); /* -1 .. 1 */
void rng_floats(rng *r, float *x, size_t n, double scale);
void rng_halves(rng *r, uint16_t *x, size_t n, double scale); /* in +-scale; scale <= 1 */

/* The significant bits of the half h, from the first 1 to the last 1 of its mantissa. Infinity and
 * NaN count as numbers of the exponent 16. */
int significant_bits(uint16_t h);

/* Whether a table for int8 counts the steps of a group of x from its least number, 0 to 128, and
 * not from zero, -127 to 127 (backends/cpu/avx2_integers.c). */
int counts_from_low(const qemb_ops *op);

/* Loads *w for op's matmul and *gate_up (or NULL) for its gate_up, as the weights of a model of one
 * layer. Call it once per backend, which has to be opened for a config of one layer. */
void load_matrices(const qemb_ops *op, qemb_backend *be, qemb_mat *w, qemb_mat *gate_up);

/* y (T, N) = alpha x W^T by a table's matmul, with two threads. */
void multiply(const qemb_ops *op, float *y, const float *x, qemb_mat w, int T);

/* Returns a valid .qemb file of this config with random weights: *bytes bytes, to be freed. The
 * tokenizer has the 256 bytes, one merge ("a" "b" -> 256) and one added token, "<eos>" = eos_id,
 * or the last id if there is no end-of-text. A reranker has the prompts "<eos>J: ", " <eos>ab" and
 * "rank". A QEMB_BERT has a Unigram tokenizer of UNIGRAM_PIECES ids, "<s>" 0, "<pad>" 1, "</s>" 2,
 * "<unk>" 3 and "<mask>", the last one, and the prompts "query: " and "passage: ". gate_scale
 * multiplies the matrices before the MLP's activation; large values give massive activations. */
uint8_t *make_model(const qemb_config *c, uint64_t seed, double gate_scale, size_t *bytes);
/* The same, with layer matrices of this dtype: QEMB_F16 or QEMB_I8. */
uint8_t *make_model_of(qemb_dtype dtype, const qemb_config *c, uint64_t seed, double gate_scale,
                       size_t *bytes);
/* Updates the size field and the checksum after a change of header or directory. */
void seal_model(uint8_t *model, size_t bytes);
/* Writes a temporary file and its name into path (>= 64 bytes). The caller unlinks it. */
void write_temporary(char *path, const void *data, size_t bytes);
/* make_model, written to a temporary file and opened; aborts on failure. */
qemb_file *open_model(const qemb_config *c, uint64_t seed, double gate_scale);
qemb_file *open_model_of(qemb_dtype dtype, const qemb_config *c, uint64_t seed, double gate_scale);

/* out (D) = the vector of one text, alone in its batch: not cut, not scaled to length 1 */
void embed_alone(qemb_model *m, const int32_t *ids, int n, float *out);

/* Small shapes: GQA groups 1, 2, 4; hidden unequal to heads x head_dim; odd sizes off every
 * tile. */
extern const qemb_config small_configs[];
extern const int n_small_configs;
/* The same of QEMB_BERT: heads of 16, 32, 64 and 11 numbers, positions from row 0, 1 and 2 on, the
 * first row or the mean. The last one has a dense layer. */
extern const qemb_config bert_configs[];
extern const int n_bert_configs;
enum { UNIGRAM_PIECES = 250 };

#endif
