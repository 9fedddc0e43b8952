// Adam and AdamW, with or without amsgrad, on the masked entries of all weights in one launch.
//
// Formula and rounding: sparse_adam.h. A table of rows (one per masked weight, any mix of dtypes
// and options) and a table of chunks live on the device; one block updates one chunk of one row.
//
// Bytes per entry: read grad, value, exp_avg, exp_avg_sq (16) and the offset (4), write value and
// both moments (12), plus the weight's 32-byte sector: 63-94 for bf16 weights, about 87 for fp32;
// 8 more with amsgrad.
// Deterministic: entries are independent and offsets unique, so no two threads write one address.
#include "capturable.cuh"
#include "platform.cuh"
#include "scatter.h"
#include "sparse_adam.h"

namespace fishfast {

constexpr int kThreads = 256;  // 4 entries a thread: 16 loads in flight hide the latency of HBM
static_assert(kEntriesPerStepChunk % kThreads == 0, "a chunk is a whole number of block widths");

// rows   [num_rows]    table of compact parameters
// chunks [gridDim.x]   row and first entry of each block
__global__ void __launch_bounds__(kThreads)
    sparse_adam_kernel(const SparseAdamRow* rows, const StepChunk* chunks) {
  const StepChunk chunk = chunks[blockIdx.x];
  const SparseAdamRow row = rows[chunk.row];
  if (row.grad == nullptr) return;  // the whole block: overflow

  const int64_t end = min(chunk.start + kEntriesPerStepChunk, row.k);
  for (int64_t i = chunk.start + threadIdx.x; i < end; i += kThreads) {
    float value = row.values[i];
    float exp_avg = row.exp_avg[i];
    float exp_avg_sq = row.exp_avg_sq[i];
    const float grad = adam_gradient(row.scalars, row.grad[i], value);
    adam_moments(row.scalars, grad, exp_avg, exp_avg_sq);

    float second = exp_avg_sq;
    if (row.max_exp_avg_sq != nullptr) {  // the same for the whole block
      second = adam_maximum(row.max_exp_avg_sq[i], exp_avg_sq);
      row.max_exp_avg_sq[i] = second;
    }
    value = adam_value(row.scalars, value, exp_avg, second);

    row.values[i] = value;
    row.exp_avg[i] = exp_avg;
    row.exp_avg_sq[i] = exp_avg_sq;
    scatter_value(row.target, i, value);
  }
}

void sparse_adam_cuda(const SparseAdamRow* rows, const StepChunk* chunks, int64_t num_chunks,
                      void* stream) {
  if (num_chunks == 0) return;
  FF_LAUNCH(sparse_adam_kernel, dim3(unsigned(num_chunks)), dim3(kThreads), 0,
            static_cast<cudaStream_t>(stream), rows, chunks);
}

void sparse_adam_capturable_cuda(const CapturableStep<SparseAdamRow, AdamPlan>& step,
                                 const StepInputs& inputs, void* stream) {
  launch_prepare_rows(step, inputs, static_cast<cudaStream_t>(stream));
  sparse_adam_cuda(step.rows, step.chunks, step.num_chunks, stream);
}

}  // namespace fishfast
