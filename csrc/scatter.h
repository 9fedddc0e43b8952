// The last step of every optimizer kernel: the rounded value goes to its place in the weight.
#pragma once
#include "launch.h"

namespace fishfast {

FF_HOST_DEVICE void scatter_value(const ScatterTarget& target, int64_t entry, float value) {
  if (target.weight == nullptr) return;
  const int64_t offset = target.wide_offsets
                             ? static_cast<const int64_t*>(target.offsets)[entry]
                             : int64_t(static_cast<const int32_t*>(target.offsets)[entry]);
  store_rounded(target.weight, offset, target.storage, value);
}

}  // namespace fishfast
