// csrc/sparse_adam.cu for tests/test_sparse_adam_simt.py.
#include "api.h"
#include "launch.h"

extern "C" int ff_sparse_adam(const void* rows, const void* chunks, int64_t num_chunks) {
  return simt::call([&] {
    fishfast::sparse_adam_cuda(static_cast<const fishfast::SparseAdamRow*>(rows),
                               static_cast<const fishfast::StepChunk*>(chunks), num_chunks,
                               nullptr);
  });
}
