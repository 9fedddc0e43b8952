// The Adam and AdamW updates of one masked entry, shared by the CPU step and the CUDA kernel.
//
//   g <- g + wd x                         (Adam: the L2 penalty)
//   m <- m + (1 - beta1) (g - m)          v <- beta2 v + (1 - beta2) g^2
//   n <- max(n, v)                        (amsgrad; else n = v)
//   x <- (1 - lr wd) x - lr / (1 - beta1^t)  m / (sqrt(n) / sqrt(1 - beta2^t) + eps)
//                                         (AdamW: the factor of x; Adam: 1)
//
// Kingma and Ba, "Adam" (ICLR 2015); Loshchilov and Hutter, "Decoupled weight decay regularization"
// (ICLR 2019); Reddi et al., "On the convergence of Adam and beyond" (ICLR 2018). Rounded operation
// by operation as torch.optim does with foreach=False on the CPU (lerp_, addcmul_ and add with a
// factor are fused multiply-adds there, addcdiv_ is not), which makes it the bit-exact oracle.
#pragma once
#include "integer_power.h"
#include "launch.h"
#include "learning_rate.h"

namespace fishfast {

// The gradient that the moments see.
FF_HOST_DEVICE float adam_gradient(const AdamScalars& s, float grad, float value) {
  grad = mul_rn(div_rn(grad, s.grad_scale), s.grad_sign);
  return s.l2_penalty != 0.0f ? fma_rn(value, s.l2_penalty, grad) : grad;
}

FF_HOST_DEVICE void adam_moments(const AdamScalars& s, float grad, float& exp_avg,
                                 float& exp_avg_sq) {
  // torch's lerp keeps the end point exact: from the far end when the weight is at least one half.
  const bool near_start = s.one_minus_beta1 < 0.5f;
  const float difference = add_rn(grad, -exp_avg);
  exp_avg = fma_rn(near_start ? s.one_minus_beta1 : s.one_minus_beta1 - 1.0f, difference,
                   near_start ? exp_avg : grad);
  exp_avg_sq = fma_rn(mul_rn(s.one_minus_beta2, grad), grad, mul_rn(exp_avg_sq, s.beta2));
}

// The larger one; NaN if one is NaN, as torch.maximum.
FF_HOST_DEVICE float adam_maximum(float a, float b) { return a >= b || a != a ? a : b; }

// second: exp_avg_sq, with amsgrad its maximum over the steps.
FF_HOST_DEVICE float adam_value(const AdamScalars& s, float value, float exp_avg, float second) {
  const float denominator = add_rn(div_rn(sqrt_rn(second), s.bias_correction2_sqrt), s.eps);
  return add_rn(mul_rn(value, s.decay), div_rn(mul_rn(s.negative_step_size, exp_avg), denominator));
}

// Counts a step and gives the scalars that depend on its number or on the learning rate, with the
// host's bits (fishfast/optim/sparse_adam.py, _scalars).
FF_HOST_DEVICE void complete_scalars(const AdamPlan& plan, AdamScalars& s) {
  const float step = add_rn(*plan.step, 1.0f);
  *plan.step = step;
  const double correction1 = 1.0 - integer_power(plan.beta1, uint64_t(step));
  const double correction2 = 1.0 - integer_power(plan.beta2, uint64_t(step));
  s.bias_correction2_sqrt = float(sqrt_rn(correction2));
  const double lr = learning_rate(plan.lr);
  if (plan.lr.in_float) {  // as torch computes with an fp32 tensor
    s.decay = add_rn(1.0f, -mul_rn(float(lr), float(plan.weight_decay)));
    s.negative_step_size = -div_rn(float(lr), float(correction1));
  } else {
    s.decay = float(add_rn(1.0, -mul_rn(lr, plan.weight_decay)));
    s.negative_step_size = float(-div_rn(lr, correction1));
  }
}

}  // namespace fishfast
