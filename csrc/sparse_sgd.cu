// SGD on the masked entries of all weights in one launch.
//
// Formula and rounding: sparse_sgd.h. A table of rows (one per masked weight, any mix of dtypes and
// options) and a table of chunks live on the device; one block updates one chunk of one row.
//
// Bytes per entry: read grad, value, momentum (12) and the offset (4), write value and momentum
// (8), plus the weight's 32-byte sector: 55-86 for bf16 weights, about 79 for fp32; 8 less without
// momentum.
// Deterministic: entries are independent and offsets unique, so no two threads write one address.
#include "capturable.cuh"
#include "platform.cuh"
#include "scatter.h"
#include "sparse_sgd.h"

namespace fishfast {

constexpr int kThreads = 256;  // 4 entries a thread: 12 loads in flight hide the latency of HBM
static_assert(kEntriesPerStepChunk % kThreads == 0, "a chunk is a whole number of block widths");

// rows   [num_rows]    table of compact parameters
// chunks [gridDim.x]   row and first entry of each block
__global__ void __launch_bounds__(kThreads)
    sparse_sgd_kernel(const SparseSgdRow* rows, const StepChunk* chunks) {
  const StepChunk chunk = chunks[blockIdx.x];
  const SparseSgdRow row = rows[chunk.row];
  if (row.grad == nullptr) return;                            // the whole block: overflow
  const bool with_momentum = row.momentum_buffer != nullptr;  // the same for the whole block

  const int64_t end = min(chunk.start + kEntriesPerStepChunk, row.k);
  for (int64_t i = chunk.start + threadIdx.x; i < end; i += kThreads) {
    float value = row.values[i];
    float buffer = with_momentum ? row.momentum_buffer[i] : 0.0f;
    sgd_update(row.scalars, row.grad[i], with_momentum, value, buffer);
    row.values[i] = value;
    if (with_momentum) row.momentum_buffer[i] = buffer;
    scatter_value(row.target, i, value);
  }
}

void sparse_sgd_cuda(const SparseSgdRow* rows, const StepChunk* chunks, int64_t num_chunks,
                     void* stream) {
  if (num_chunks == 0) return;
  FF_LAUNCH(sparse_sgd_kernel, dim3(unsigned(num_chunks)), dim3(kThreads), 0,
            static_cast<cudaStream_t>(stream), rows, chunks);
}

void sparse_sgd_capturable_cuda(const CapturableStep<SparseSgdRow, SgdPlan>& step,
                                const StepInputs& inputs, void* stream) {
  launch_prepare_rows(step, inputs, static_cast<cudaStream_t>(stream));
  sparse_sgd_cuda(step.rows, step.chunks, step.num_chunks, stream);
}

}  // namespace fishfast
