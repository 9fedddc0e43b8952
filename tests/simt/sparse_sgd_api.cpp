// csrc/sparse_sgd.cu for tests/test_sparse_sgd_simt.py.
#include "api.h"
#include "launch.h"

extern "C" int ff_sparse_sgd(const void* rows, const void* chunks, int64_t num_chunks) {
  return simt::call([&] {
    fishfast::sparse_sgd_cuda(static_cast<const fishfast::SparseSgdRow*>(rows),
                              static_cast<const fishfast::StepChunk*>(chunks), num_chunks, nullptr);
  });
}
