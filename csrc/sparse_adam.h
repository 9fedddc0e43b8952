// The AdamW update of one masked entry, shared by the CPU step and the CUDA kernel.
//
//   m <- m + (1 - beta1) (g - m)          v <- beta2 v + (1 - beta2) g^2
//   x <- (1 - lr wd) x - lr / (1 - beta1^t)  m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Loshchilov and Hutter, "Decoupled weight decay regularization" (ICLR 2019), rounded operation by
// operation as torch.optim.AdamW(foreach=False) does on the CPU (lerp_ and addcmul_ are fused
// multiply-adds there, addcdiv_ is not), which makes it the bit-exact oracle.
#pragma once
#include "launch.h"
#include "rounding.h"

namespace fishfast {

FF_HOST_DEVICE void adam_update(const AdamScalars& s, float grad, float& value, float& exp_avg,
                                float& exp_avg_sq) {
  grad = mul_rn(div_rn(grad, s.grad_scale), s.grad_sign);
  // torch's lerp keeps the end point exact: from the far end when the weight is at least one half.
  const bool near_start = s.one_minus_beta1 < 0.5f;
  const float difference = add_rn(grad, -exp_avg);
  exp_avg = fma_rn(near_start ? s.one_minus_beta1 : s.one_minus_beta1 - 1.0f, difference,
                   near_start ? exp_avg : grad);
  exp_avg_sq = fma_rn(mul_rn(s.one_minus_beta2, grad), grad, mul_rn(exp_avg_sq, s.beta2));
  const float denominator = add_rn(div_rn(sqrt_rn(exp_avg_sq), s.bias_correction2_sqrt), s.eps);
  value =
      add_rn(mul_rn(value, s.decay), div_rn(mul_rn(s.negative_step_size, exp_avg), denominator));
}

}  // namespace fishfast
