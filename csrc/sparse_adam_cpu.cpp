// AdamW on the masked entries, on CPU threads. The arithmetic is sparse_adam.h's.
//
// Memory: per entry 16 bytes read (grad, value, two moments), 12 written, the offset (4) and the
// weight's sector: the scatter decides.
#include "cpu_step.h"
#include "sparse_adam.h"

namespace fishfast {

FF_CPU_CLONES static void update_block(const SparseAdamRow& row, int64_t begin, int64_t end) {
  const AdamScalars scalars = row.scalars;
  const float* __restrict__ grad = row.grad;
  float* __restrict__ values = row.values;
  float* __restrict__ exp_avg = row.exp_avg;
  float* __restrict__ exp_avg_sq = row.exp_avg_sq;
  for (int64_t i = begin; i < end; ++i) {
    adam_update(scalars, grad[i], values[i], exp_avg[i], exp_avg_sq[i]);
  }
}

void sparse_adam_cpu(const SparseAdamRow* rows, int64_t num_rows, int num_threads) {
  step_rows(rows, num_rows, num_threads, update_block);
}

}  // namespace fishfast
