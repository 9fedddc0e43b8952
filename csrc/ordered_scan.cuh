// Sums over what comes before: within a block, and between blocks by decoupled look-back
// (Merrill and Garland, "Single-pass parallel prefix scan with decoupled look-back", 2016).
#pragma once
#include "platform.cuh"

namespace fishfast {

using Count = unsigned long long;  // the 64-bit type that CUDA's atomics know

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return int(threadIdx.x % 32); }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x / 32); }

template <class T>
struct BlockSum {
  T before;  // of the threads with a lower index
  T total;
};

// Every thread of the block calls it. Two calls need a barrier in between.
template <int kThreads, class T>
__device__ __forceinline__ BlockSum<T> block_sum(T value) {
  FF_SHARED(T, warp_totals, [kThreads / 32]);
  T inclusive = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane_id() >= distance) inclusive += other;
  }
  if (lane_id() == 31) warp_totals[warp_id()] = inclusive;
  __syncthreads();
  BlockSum<T> sum{T(inclusive - value), 0};
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    if (warp < warp_id()) sum.before += warp_totals[warp];
    sum.total += warp_totals[warp];
  }
  return sum;
}

// One word per tile: two bits say what the other 62 are.
constexpr Count kOwnSum = Count(1) << 62;     // the tile's own sum
constexpr Count kPrefixSum = Count(2) << 62;  // the sum of the tile and all before it
constexpr Count kSumBits = kOwnSum - 1;

// Publishes a tile's sum and returns that of all tiles before it, which other blocks may still be
// working on. Called by a whole warp. Tiles must be handed out in order by a counter: then whoever
// is waited for is running already.
__device__ __forceinline__ Count sum_before_tile(Count* words, int64_t tile, Count own) {
  if (lane_id() == 0 && tile > 0) st_release(&words[tile], kOwnSum | own);
  Count before = 0;
  bool complete = tile == 0;
  // 32 tiles at a time: one after the other would take a trip to L2 each.
  for (int64_t end = tile; !complete; end -= 32) {
    const int64_t other = end - 1 - lane_id();
    Count word = kPrefixSum;  // nothing comes before the first tile
    do {
      if (other >= 0) word = ld_acquire(&words[other]);
    } while (__any_sync(kAllLanes, word < kOwnSum));
    const unsigned prefixes = __ballot_sync(kAllLanes, word >= kPrefixSum);
    complete = prefixes != 0;
    const int nearest = complete ? __ffs(int(prefixes)) - 1 : 31;
    Count sum = lane_id() <= nearest ? word & kSumBits : 0;
    for (int distance = 16; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    }
    before += sum;
  }
  if (lane_id() == 0) st_release(&words[tile], kPrefixSum | (before + own));
  return before;
}

}  // namespace fishfast
