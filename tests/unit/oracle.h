/* oracle.h - the model again, in double precision, as directly as the formulas can be written.
 *
 * The tests compare every backend with it. It shares the structs of qemb.h with qemb.c and no code,
 * and knows no tiles, prefixes, chunks or threads. Sizes are named as in qemb.h; rows are
 * contiguous.
 */
#ifndef ORACLE_H
#define ORACLE_H

#include "qemb.h"

double oracle_half(uint16_t h); /* the value of an IEEE half */
/* y (n) = x / sqrt(mean(x^2) + eps) * w; y may be x */
void oracle_rmsnorm(double *y, const double *x, const float *w, int n, double eps);
/* W[row][col] in double: of halves, or of INT8 with its scale */
double oracle_weight(const qemb_mat *w, int row, int col);
/* y (N) = W x,  W (N, K). magnitude (N) = sums of |W| |x|, for error bounds; may be NULL. */
void oracle_matvec(double *y, double *magnitude, const double *x, const qemb_mat *w);
/* Rotates head (hd) in place by the angles of position pos. */
void oracle_rope(double *head, int hd, int pos, double theta);
/* att (n, H*hd) = attention of one text with qkv (n, (H+2K)*hd); a token sees itself and what is
 * before it or, bidirectional, all. For error bounds, and may be NULL: weighted (n, H*hd) = sums of
 * p |v|, reach (n, H) = the largest sum of |q| |k| / sqrt(hd) over the keys. */
void oracle_attention(double *att, double *weighted, double *reach, const double *qkv, int n, int H,
                      int K, int hd, int bidirectional);
double oracle_swiglu(double gate, double up); /* silu(gate) * up */
/* out (D) = the text's last row after the final norm, or the mean of all its rows after it, neither
 * cut nor scaled; ids (n) with end-of-text. *swiglu_max = the largest |silu(gate) * up| of all
 * layers; may be NULL. */
void oracle_embed(double *out, double *swiglu_max, const qemb_config *c, const qemb_weights *w,
                  const int32_t *ids, int n);

#endif
