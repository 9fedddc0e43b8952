// What runs before the update of a capturable step: one thread per row counts the step, gives the
// row its gradient and the numbers that depend on step count, learning rate and loss scale. Under
// overflow every row loses its gradient, which makes the update skip it, and no step is counted.
//
// The gradients' addresses are known only when the launch is captured, and a copy from the host
// would need host memory that outlives the graph: they travel as arguments, which a graph keeps.
#pragma once
#include <algorithm>

#include "launch.h"
#include "platform.cuh"

namespace fishfast {

constexpr int kRowsPerPrepare = 480;  // 4 KB of arguments are what every driver takes
constexpr int kPrepareThreads = 96;
static_assert(kRowsPerPrepare % kPrepareThreads == 0, "the blocks have a thread for every row");

struct GradientAddresses {
  const float* of_row[kRowsPerPrepare];
};

// rows, plans  [num_rows]  this launch's part of the tables
template <class Row, class Plan>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_rows(Row* rows, const Plan* plans, int64_t num_rows, const float* found_inf,
                 const float* grad_scale, FF_GRID_CONSTANT const GradientAddresses grads) {
  const int64_t r = int64_t(blockIdx.x) * kPrepareThreads + threadIdx.x;
  if (r >= num_rows) return;
  if (found_inf != nullptr && *found_inf != 0.0f) {  // NaN, too
    rows[r].grad = nullptr;
    return;
  }
  rows[r].grad = grads.of_row[r];
  rows[r].scalars.grad_scale = grad_scale == nullptr ? 1.0f : *grad_scale;
  complete_scalars(plans[r], rows[r].scalars);
}

template <class Row, class Plan>
void launch_prepare_rows(const CapturableStep<Row, Plan>& step, const StepInputs& inputs,
                         cudaStream_t stream) {
  for (int64_t first = 0; first < step.num_rows; first += kRowsPerPrepare) {
    const int64_t count = std::min<int64_t>(kRowsPerPrepare, step.num_rows - first);
    GradientAddresses grads = {};
    std::copy_n(inputs.grads + first, count, grads.of_row);
    FF_LAUNCH((prepare_rows<Row, Plan>), dim3(kRowsPerPrepare / kPrepareThreads),
              dim3(kPrepareThreads), 0, stream, step.rows + first, step.plans + first, count,
              inputs.found_inf, inputs.grad_scale, grads);
  }
}

}  // namespace fishfast
