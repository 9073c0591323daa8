/* gelu.h - the polynomial of GELU, for the tables with vectors.
 *
 * gelu(t) = t Phi(t), and Phi(-a) = erfc(a / sqrt 2) / 2 = 1 - Phi(a). With a = |t|, r = 1 / (a +
 * 3) and v = 1 - 6 r, between -1 and 0.65:
 *
 *   Phi(-a) = exp(-a^2 / 2) r R(v),  R the polynomial of degree 8 with the least relative error,
 *
 * 0.7 units of 2^-24, found by Remez's algorithm in 40 digits for a <= 13.5; 1.1 with coefficients
 * in float. (The form is Cody's of 1969, with Schonfelder's map of 1978.) Rounding of a^2 would
 * cost up to a^2 / 2 units, so its remainder, known from a fused multiplication, is put right after
 * exp.
 * Errors of Phi(-a), in the same units: R 1.1 and Horner's last steps 1.5; r 2; v 4 + 1 where it is
 * largest, at a = 0, times R'/R = 0.7; exp 2; three products 3: 13 at most. Of gelu(t): one more of
 * the product with t, and for t > 0 one of 1 - Phi(-a), which is at least Phi(-a): 15.
 * From a = 12.8 on Phi(-a) is subnormal and loses bits; from 13.2 on exp gives 0, and gelu(t) errs
 * by less than 2^-127. +Inf gives Inf; -Inf (times 0) and NaN give NaN, as in the plain table. */
#ifndef CPU_GELU_H
#define CPU_GELU_H

enum { GELU_DEGREE = 8 };
/* R's coefficients, of the highest power first */
static const float gelu_tail[GELU_DEGREE + 1] = {
    -0x1.1bc8c2p-12f, -0x1.dc987ep-11f, 0x1.1a5ca6p-10f, 0x1.c606eap-8f, -0x1.5765cap-7f,
    -0x1.8320eap-5f,  0x1.d7145ap-3f,   -0x1.04c732p-1f, 0x1.754a74p-1f};

#endif
