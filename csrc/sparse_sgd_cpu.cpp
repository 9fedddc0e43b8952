// SGD on the masked entries, on CPU threads:
//
//   g <- g + wd x
//   b <- momentum b + (1 - dampening) g
//   x <- x - lr (g + momentum b with nesterov, else b)
//
// Sutskever et al., "On the importance of initialization and momentum in deep learning" (ICML
// 2013), in the form and with the rounding of torch.optim.SGD(foreach=False): every add with a
// factor is a fused multiply-add there.
#include "cpu_step.h"
#include "rounding.h"

namespace fishfast {

FF_CPU_CLONES static void update_block(const SparseSgdRow& row, int64_t begin, int64_t end) {
  const SgdScalars s = row.scalars;
  float* __restrict__ values = row.values;
  float* __restrict__ buffer = row.momentum_buffer;
  for (int64_t i = begin; i < end; ++i) {
    float grad = mul_rn(div_rn(row.grad[i], s.grad_scale), s.grad_sign);
    if (s.weight_decay != 0.0f) grad = fma_rn(values[i], s.weight_decay, grad);
    if (buffer != nullptr) {
      buffer[i] =
          s.first_step ? grad : fma_rn(grad, s.one_minus_dampening, mul_rn(buffer[i], s.momentum));
      grad = s.nesterov ? fma_rn(buffer[i], s.momentum, grad) : buffer[i];
    }
    values[i] = fma_rn(grad, s.negative_lr, values[i]);
  }
}

void sparse_sgd_cpu(const SparseSgdRow* rows, int64_t num_rows, int num_threads) {
  step_rows(rows, num_rows, num_threads, update_block);
}

}  // namespace fishfast
