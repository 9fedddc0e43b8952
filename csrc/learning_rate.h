// The learning rate of a capturable step, which may be a tensor on the device.
#pragma once
#include "launch.h"

namespace fishfast {

FF_HOST_DEVICE double learning_rate(const LearningRate& lr) {
  if (lr.tensor == nullptr) return lr.value;
  return lr.in_float ? double(*static_cast<const float*>(lr.tensor))
                     : *static_cast<const double*>(lr.tensor);
}

}  // namespace fishfast
