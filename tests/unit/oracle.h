/* oracle.h - the model again, in double precision, as directly as the formulas can be written.
 *
 * Shares no code with qemb.c and knows no tiles, prefixes, chunks or threads. Rows are contiguous.
 */
#ifndef ORACLE_H
#define ORACLE_H

#include "qemb.h"

double oracle_half(uint16_t h);
/* y (n) */
void oracle_rmsnorm(double *y, const double *x, const float *w, int n, double eps);
/* W[row][col], without alpha */
double oracle_weight(const qemb_mat *w, int row, int col);
/* y (N) = W x, W (N, K) without alpha; magnitude (N), may be NULL: sum of |W||x|, for error bounds */
void oracle_matvec(double *y, double *magnitude, const double *x, const qemb_mat *w);
/* head (hd) in place, rotated for position pos */
void oracle_rope(double *head, int hd, int pos, double theta);
/* att (n, H*hd) of one text with qkv (n, (H+2K)*hd), causal; may be NULL: weighted (n, H*hd) =
 * sum of p|v|, reach (n, H) = max over keys of sum |q||k| / sqrt(hd), both for error bounds */
void oracle_attention(double *att, double *weighted, double *reach, const double *qkv, int n, int H,
                      int K, int hd);
double oracle_swiglu(double gate, double up);
/* out (D): the final-normed last row of the text ids (n); out_gu_max: largest |silu(g)*u| met */
void oracle_embed(double *out, double *swiglu_max, const qemb_config *c, const qemb_weights *w,
                  const int32_t *ids, int n);

#endif
