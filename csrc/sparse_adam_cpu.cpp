// Adam and AdamW on the masked entries, on CPU threads. The arithmetic is sparse_adam.h's.
//
// Memory: per entry 16 bytes read (grad, value, two moments), 12 written, the offset (4) and the
// weight's sector: the scatter decides. Amsgrad reads and writes 4 more.
#include "cpu_step.h"
#include "sparse_adam.h"

namespace fishfast {

static void prefetch_streams(const SparseAdamRow& row, int64_t entry) {
  __builtin_prefetch(row.grad + entry);
  __builtin_prefetch(row.values + entry, 1);
  __builtin_prefetch(row.exp_avg + entry, 1);
  __builtin_prefetch(row.exp_avg_sq + entry, 1);
}

// Inlined into both clones of update_block; the loops vectorise only when each is of one kind.
template <bool kAmsgrad>
FF_HOST_DEVICE void update_entries(const SparseAdamRow& row, int64_t begin, int64_t end) {
  const AdamScalars scalars = row.scalars;
  const float* __restrict__ grads = row.grad;
  float* __restrict__ values = row.values;
  float* __restrict__ exp_avg = row.exp_avg;
  float* __restrict__ exp_avg_sq = row.exp_avg_sq;
  float* __restrict__ max_exp_avg_sq = row.max_exp_avg_sq;
  for (int64_t i = begin; i < end; ++i) {
    const float grad = adam_gradient(scalars, grads[i], values[i]);
    adam_moments(scalars, grad, exp_avg[i], exp_avg_sq[i]);
    float second = exp_avg_sq[i];
    if (kAmsgrad) second = max_exp_avg_sq[i] = adam_maximum(max_exp_avg_sq[i], second);
    values[i] = adam_value(scalars, values[i], exp_avg[i], second);
  }
}

FF_CPU_CLONES static void update_block(const SparseAdamRow& row, int64_t begin, int64_t end) {
  if (row.max_exp_avg_sq != nullptr) {
    update_entries<true>(row, begin, end);
  } else {
    update_entries<false>(row, begin, end);
  }
}

void sparse_adam_cpu(const SparseAdamRow* rows, int64_t num_rows, int num_threads) {
  step_rows(rows, num_rows, num_threads, update_block);
}

}  // namespace fishfast
