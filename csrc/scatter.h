// The last step of every optimizer kernel: the rounded value goes to its place in the weight.
#pragma once
#include "launch.h"

namespace fishfast {

FF_HOST_DEVICE int64_t scatter_offset(const ScatterTarget& target, int64_t entry) {
  return target.wide_offsets ? static_cast<const int64_t*>(target.offsets)[entry]
                             : int64_t(static_cast<const int32_t*>(target.offsets)[entry]);
}

FF_HOST_DEVICE void scatter_value(const ScatterTarget& target, int64_t entry, float value) {
  if (target.weight == nullptr) return;
  store_rounded(target.weight, scatter_offset(target, entry), target.storage, value);
}

}  // namespace fishfast
