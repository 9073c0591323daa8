/* qemb_cuda.h - the ops tables of the CUDA backend (qemb.cu).
 *
 * FP16: weights and activations are FP16; sums and the residual stream are FP32. SwiGLU's output is
 * stored times 2^-SWIGLU_SHIFT and clamped to the largest half, because massive activations exceed
 * the range of FP16. load_weights sets alpha of the down projection's GEMM to undo the factor.
 *
 * FP8: the layers' GEMMs multiply e4m3 codes with one scale per row of W and one per token
 * (quantize.cuh). An activation that a GEMM reads holds codes and scales. It needs compute
 * capability 8.9 and cuBLAS 12.9 or newer. Attention, norms and the residual stream are as above.
 *
 * GELU (QEMB_BERT): nothing is clamped or scaled. A product beyond the range of FP16 becomes Inf,
 * and the engine computes a vector that is not finite again.
 *
 * Supported: FP16 and INT8 layer matrices; heads of 64 or 128, QEMB_BERT also 32; H/K a power of
 * two up to 64; hidden and ffn multiples of 8, hidden up to 8192; compute capability 8.0 or newer.
 * For anything else open or load_weights fails with code "device" and one line that says what to
 * do.
 *
 * Ops return nothing, so an op cannot report a device that fails in the middle of a batch. collect
 * then fills the vectors with NaN, and health returns the reason. health also counts the SwiGLU
 * outputs that were clamped.
 */
#ifndef QEMB_CUDA_H
#define QEMB_CUDA_H

#include "qemb.h"

#ifdef __cplusplus
extern "C" {
#endif

extern const qemb_ops qemb_cuda_ops;     /* products in FP16 */
extern const qemb_ops qemb_cuda_fp8_ops; /* and in FP8 */
const qemb_ops *qemb_cuda_table(int i);  /* both, then NULL */

#ifdef __cplusplus
}
#endif
#endif
