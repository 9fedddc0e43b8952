// Arithmetic with the rounding written down, so that CPU, simulated and real CUDA agree bit for
// bit: nvcc would fuse a * b + c where it likes, g++ is told not to (-ffp-contract=off).
#pragma once
#include <cmath>

#include "storage.h"

namespace fishfast {

#if defined(__CUDA_ARCH__)
FF_HOST_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
FF_HOST_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
FF_HOST_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
FF_HOST_DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }
FF_HOST_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FF_HOST_DEVICE double add_rn(double a, double b) { return __dadd_rn(a, b); }
FF_HOST_DEVICE double mul_rn(double a, double b) { return __dmul_rn(a, b); }
FF_HOST_DEVICE double div_rn(double a, double b) { return __ddiv_rn(a, b); }
FF_HOST_DEVICE double sqrt_rn(double a) { return __dsqrt_rn(a); }
FF_HOST_DEVICE double fma_rn(double a, double b, double c) { return __fma_rn(a, b, c); }
#else
FF_HOST_DEVICE float add_rn(float a, float b) { return a + b; }
FF_HOST_DEVICE float mul_rn(float a, float b) { return a * b; }
FF_HOST_DEVICE float div_rn(float a, float b) { return a / b; }
FF_HOST_DEVICE float sqrt_rn(float a) { return __builtin_sqrtf(a); }
FF_HOST_DEVICE float fma_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FF_HOST_DEVICE double add_rn(double a, double b) { return a + b; }
FF_HOST_DEVICE double mul_rn(double a, double b) { return a * b; }
FF_HOST_DEVICE double div_rn(double a, double b) { return a / b; }
FF_HOST_DEVICE double sqrt_rn(double a) { return __builtin_sqrt(a); }
FF_HOST_DEVICE double fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

}  // namespace fishfast
