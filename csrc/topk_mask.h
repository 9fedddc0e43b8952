// Scores as ordered integers, shared by everything that selects: the fp32 bit patterns of
// non-negative floats order as the floats do.
#pragma once
#include "storage.h"

namespace fishfast {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kNegativeZeroBits = 0x80000000u;

// NaN or negative; -0.0 is neither.
FF_HOST_DEVICE bool is_bad_score(uint32_t bits) {
  return bits > kInfinityBits && bits != kNegativeZeroBits;
}

FF_HOST_DEVICE uint32_t magnitude(uint32_t bits) {  // -0.0 counts as 0.0
  return bits & 0x7fffffffu;
}

}  // namespace fishfast
