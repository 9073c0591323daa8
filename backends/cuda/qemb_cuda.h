/* qemb_cuda.h - the CUDA backend's table (qemb.cu), and what it can and cannot do.
 *
 * Numerics: FP16 weights and activations, FP32 sums, FP32 residual stream. SwiGLU's output is kept
 * times 2^-6 and clamped to the largest half; place() gives wdown the alpha that undoes it.
 *
 * FP8: layers' products of e4m3 with a scale per row of W and per token (quantize.cuh), on sm_90 with cuBLAS
 * 12.9 or newer; attention, norms and the residual as above.
 *
 * Takes FP16 and INT8 layer matrices; heads of 64 or 128; H/K a power of two up to 64; hidden and ffn multiples
 * of 8, hidden up to 8192; a GPU of compute capability 8.0 or newer. open and place refuse the rest
 * with code "device" and one line that says what to do.
 *
 * A device that fails in the middle of a batch cannot be reported by an op: pool then fills its vectors
 * with NaN, and health says what happened, as it says how many SwiGLU outputs were clamped.
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
