// Values into their weights, in one launch: what an optimizer's step ends with, alone.
//
// A table of rows (one per masked weight, any mix of dtypes) and a table of chunks live on the
// device; one block writes one chunk of one row.
//
// Bytes per entry: read value and offset (8), plus the weight's 32-byte sector: 40 to 72.
// Deterministic: offsets are unique, so no two threads write one address.
#include "platform.cuh"
#include "scatter.h"

namespace fishfast {

constexpr int kThreads = 256;
static_assert(kEntriesPerStepChunk % kThreads == 0, "a chunk is a whole number of block widths");

// rows   [num_rows]    table of compact parameters
// chunks [gridDim.x]   row and first entry of each block
__global__ void __launch_bounds__(kThreads)
    write_values_kernel(const WriteRow* rows, const StepChunk* chunks) {
  const StepChunk chunk = chunks[blockIdx.x];
  const WriteRow row = rows[chunk.row];
  const int64_t end = min(chunk.start + kEntriesPerStepChunk, row.k);
  for (int64_t i = chunk.start + threadIdx.x; i < end; i += kThreads) {
    scatter_value(row.target, i, row.values[i]);
  }
}

void write_values_cuda(const WriteRow* rows, const StepChunk* chunks, int64_t num_chunks,
                       void* stream) {
  if (num_chunks == 0) return;
  FF_LAUNCH(write_values_kernel, dim3(unsigned(num_chunks)), dim3(kThreads), 0,
            static_cast<cudaStream_t>(stream), rows, chunks);
}

}  // namespace fishfast
