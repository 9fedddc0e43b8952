// csrc/sparse_sgd.cu for tests/test_sparse_optimizer_simt.py.
#include "api.h"
#include "launch.h"

extern "C" int ff_sparse_sgd(const void* rows, const void* chunks, int64_t num_chunks) {
  return simt::call([&] {
    fishfast::sparse_sgd_cuda(static_cast<const fishfast::SparseSgdRow*>(rows),
                              static_cast<const fishfast::StepChunk*>(chunks), num_chunks, nullptr);
  });
}

extern "C" int ff_sparse_sgd_capturable(void* rows, const void* plans, int64_t num_rows,
                                        const void* grads, const void* found_inf,
                                        const void* grad_scale, const void* chunks,
                                        int64_t num_chunks) {
  return simt::call([&] {
    fishfast::sparse_sgd_capturable_cuda(
        {static_cast<fishfast::SparseSgdRow*>(rows), static_cast<const fishfast::SgdPlan*>(plans),
         static_cast<const fishfast::StepChunk*>(chunks), num_rows, num_chunks},
        {static_cast<const float* const*>(grads), static_cast<const float*>(found_inf),
         static_cast<const float*>(grad_scale)},
        nullptr);
  });
}
