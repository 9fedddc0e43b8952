// SGD on the masked entries, on CPU threads. The arithmetic is sparse_sgd.h's.
//
// Memory: per entry 12 bytes read (grad, value, momentum), 8 written, the offset (4) and the
// weight's sector: the scatter decides.
#include "cpu_step.h"
#include "sparse_sgd.h"

namespace fishfast {

static void prefetch_streams(const SparseSgdRow& row, int64_t entry) {
  __builtin_prefetch(row.grad + entry);
  __builtin_prefetch(row.values + entry, 1);
  __builtin_prefetch(row.momentum_buffer + entry, 1);
}

FF_CPU_CLONES static void update_block(const SparseSgdRow& row, int64_t begin, int64_t end) {
  const SgdScalars scalars = row.scalars;
  const float* __restrict__ grads = row.grad;
  float* __restrict__ values = row.values;
  float* __restrict__ buffer = row.momentum_buffer;
  if (buffer != nullptr) {
    for (int64_t i = begin; i < end; ++i) {
      sgd_update(scalars, grads[i], true, values[i], buffer[i]);
    }
  } else {
    float none = 0.0f;
    for (int64_t i = begin; i < end; ++i) sgd_update(scalars, grads[i], false, values[i], none);
  }
}

void sparse_sgd_cpu(const SparseSgdRow* rows, int64_t num_rows, int num_threads) {
  step_rows(rows, num_rows, num_threads, update_block);
}

}  // namespace fishfast
