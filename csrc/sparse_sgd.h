// The SGD update of one masked entry, shared by the CPU step and the CUDA kernel:
//
//   g <- g + wd x
//   b <- momentum b + (1 - dampening) g      (the first step: b <- g)
//   x <- x - lr (g + momentum b with nesterov, b with momentum, else g)
//
// Sutskever et al., "On the importance of initialization and momentum in deep learning" (ICML
// 2013), in the form and with the rounding of torch.optim.SGD(foreach=False): every add with a
// factor is a fused multiply-add there.
#pragma once
#include "launch.h"
#include "learning_rate.h"
#include "rounding.h"

namespace fishfast {

// buffer: written when there is momentum; read when there is and this is not the first step.
FF_HOST_DEVICE void sgd_update(const SgdScalars& s, float grad, bool with_momentum, float& value,
                               float& buffer) {
  grad = mul_rn(div_rn(grad, s.grad_scale), s.grad_sign);
  if (s.weight_decay != 0.0f) grad = fma_rn(value, s.weight_decay, grad);
  if (with_momentum) {
    buffer = s.first_step ? grad : fma_rn(grad, s.one_minus_dampening, mul_rn(buffer, s.momentum));
    grad = s.nesterov ? fma_rn(buffer, s.momentum, grad) : buffer;
  }
  value = fma_rn(grad, s.negative_lr, value);
}

// Counts a step, which matters to the momentum only, and takes the learning rate over.
FF_HOST_DEVICE void complete_scalars(const SgdPlan& plan, SgdScalars& s) {
  s.negative_lr = float(-learning_rate(plan.lr));
  if (plan.step == nullptr) return;
  s.first_step = *plan.step == 0.0f;
  *plan.step = add_rn(*plan.step, 1.0f);
}

}  // namespace fishfast
