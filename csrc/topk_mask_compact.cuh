// What is above a threshold, and the first ties, in order: for topk_mask.cu.
#pragma once
#include "topk_mask_source.cuh"

namespace fishfast::topk {

constexpr int kCompactThreads = 256;
constexpr int kScoresPerThread = kTileScores / kCompactThreads;
static_assert(kScoresPerThread == 32, "a thread's scores are the bits of one word");

// Calls write(tile, t, offsets, kept, place): `offsets`, in shared memory, are the scores of tile t
// that were selected, and go to `place` and after.
template <class Source, class Write>
__device__ void compact(const Source& source, uint32_t threshold, Count num_ties, Count* queue,
                        Count* sums, const Write& write) {
  // The keys of a tile, and then the offsets of those selected. A gap every 32 words lets the
  // threads of a warp read each its own 32 from different banks.
  FF_SHARED(int32_t, words, [kTileScores + kTileScores / 32]);
  FF_SHARED(Count, before, [2]);  // greater and equal in all tiles before
  FF_SHARED(Count, next);
  const int64_t num_tiles = source.num_tiles();
  for (;;) {
    if (threadIdx.x == 0) next = atomicAdd(queue, Count(1));
    __syncthreads();
    const int64_t t = int64_t(next);
    if (t >= num_tiles) break;

    const Tile tile = source.open(t);
    constexpr int kLoads = 16;
    for (int first = int(threadIdx.x); first < kTileScores; first += kLoads * kCompactThreads) {
      uint32_t bits[kLoads];
      source.template load<kCompactThreads>(tile, first, bits);
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int i = first + j * kCompactThreads;
        words[i + i / 32] = i < tile.length ? int32_t(magnitude(bits[j])) : -1;
      }
    }
    __syncthreads();

    // Each thread: 32 neighbours, one bit each.
    uint32_t greater = 0, equal = 0;
    const int32_t limit = int32_t(threshold);
    for (int j = 0; j < kScoresPerThread; ++j) {
      const int32_t key = words[int(threadIdx.x) * (kScoresPerThread + 1) + j];
      greater |= uint32_t(key > limit) << j;
      equal |= uint32_t(key == limit) << j;
    }
    // Both counts in one word: neither is more than 8192.
    const auto counts = block_sum<kCompactThreads>(uint32_t(__popc(greater) | __popc(equal) << 16));
    const uint32_t num_greater = counts.total & 0xffffu, num_equal = counts.total >> 16;
    if (warp_id() < 2) {
      const Count own = warp_id() == 0 ? num_greater : num_equal;
      const Count sum = sum_before_tile(sums + warp_id() * source.work.num_tiles, t, own);
      if (lane_id() == 0) before[warp_id()] = sum;
    }
    __syncthreads();

    const Count ties_left = num_ties - min(num_ties, before[1]);
    const uint32_t ties = uint32_t(min(Count(num_equal), ties_left));
    uint32_t tie = counts.before >> 16;
    uint32_t place = (counts.before & 0xffffu) + min(tie, ties);
    for (uint32_t left = greater | equal; left != 0; left &= left - 1) {
      const int j = __ffs(int(left)) - 1;
      if ((equal >> j & 1) && tie++ >= ties) continue;
      words[place++] = int32_t(threadIdx.x) * kScoresPerThread + j;
    }
    const int64_t first_place = int64_t(before[0] + min(before[1], num_ties));
    __syncthreads();
    write(tile, t, words, int(num_greater + ties), first_place);
  }
}

}  // namespace fishfast::topk
