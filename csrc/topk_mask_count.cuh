// The histogram of one digit of the scores, for topk_mask.cu.
#pragma once
#include "topk_mask_source.cuh"

namespace fishfast::topk {

// A block of the histogram has most of a multiprocessor's shared memory, so it needs its threads.
constexpr int kCountThreads = 1024;

// Counters of 16 bits, so that 2^16 of them fit into shared memory. Whoever makes one reach half of
// its range moves that half to the 64-bit counter behind it; between two barriers a block counts at
// most the other half.
struct BlockHistogram {
  static constexpr uint32_t kHalf = 1u << 15;
  uint32_t* pairs;  // shared, two counters each
  Count* bins;      // global

  __device__ void add(uint32_t bin, uint32_t count) const {
    const uint32_t shift = 16 * (bin & 1);
    const uint32_t before = atomicAdd(&pairs[bin >> 1], count << shift) >> shift & 0xffffu;
    if (before < kHalf && before + count >= kHalf) {
      atomicSub(&pairs[bin >> 1], kHalf << shift);
      atomicAdd(&bins[bin], Count(kHalf));
    }
  }
};
constexpr int kTilesPerTurn = BlockHistogram::kHalf / kTileScores;

// Adds a thread's part of one tile; first_bad is raised to ~position of a score to refuse.
template <class Source>
__device__ void count_tile(const Source& source, int64_t t, Digit digit, uint32_t prefix,
                           const BlockHistogram& histogram, Count& first_bad) {
  const Tile tile = source.open(t);
  uint32_t bits[kTileScores / kCountThreads];
  source.template load<kCountThreads>(tile, int(threadIdx.x), bits);

  // Zeros and runs of one digit are counted in registers: of a tensor of equal scores every thread
  // would otherwise wait for the same counter at every score.
  uint32_t zeros = 0, run_bin = 0, run_length = 0;
#pragma unroll
  for (int j = 0; j < kTileScores / kCountThreads; ++j) {
    const int offset = int(threadIdx.x) + j * kCountThreads;
    if (offset >= tile.length) break;
    const uint32_t key = magnitude(bits[j]);
    if (is_bad_score(bits[j])) {
      first_bad = max(first_bad, ~position_of(t, offset));
    } else if (key >> (digit.shift + digit.bits) == prefix) {
      const uint32_t bin = key >> digit.shift & ((1u << digit.bits) - 1);
      if (key == 0) {
        ++zeros;
      } else if (bin == run_bin) {
        ++run_length;
      } else {
        if (run_length > 0) histogram.add(run_bin, run_length);
        run_bin = bin;
        run_length = 1;
      }
    }
  }
  if (run_length > 0) histogram.add(run_bin, run_length);
  if (zeros > 0) histogram.add(0, zeros);
}

// One block per multiprocessor is enough for the stream; the scores want two, in 32 registers,
// which is what the compiler chooses by itself.
template <class Source>
__global__ void __launch_bounds__(kCountThreads, Source::kWhen == kStream ? 1 : 0)
    count(Work work, int digit_number, Digit digit) {
  if (digit_number > 0 && work.state->remaining != Source::kWhen) return;  // the whole grid
  FF_DYN_SHARED(uint32_t, pairs);                                          // [2^(bits - 1)]
  FF_SHARED(Count, next);
  const int num_pairs = 1 << (digit.bits - 1);
  for (int i = int(threadIdx.x); i < num_pairs; i += kCountThreads) pairs[i] = 0;

  const Source source(work);
  const int64_t num_tiles = source.num_tiles();
  const uint32_t prefix = work.state->threshold >> (digit.shift + digit.bits);
  Count* bins = work.bins + digit_number * kMaxBins;
  Count* queue = &work.state->next_count[digit_number][Source::kWhen == kStream];
  Count first_bad = 0;
  for (;;) {
    if (threadIdx.x == 0) next = atomicAdd(queue, Count(1));
    __syncthreads();
    const int64_t first = int64_t(next) * kTilesPerTurn;
    if (first >= num_tiles) break;
    for (int64_t t = first; t < min(first + kTilesPerTurn, num_tiles); ++t) {
      count_tile(source, t, digit, prefix, {pairs, bins}, first_bad);
    }
    __syncthreads();
  }
  if (first_bad != 0) atomicMax(&work.state->first_bad, first_bad);
  for (int i = int(threadIdx.x); i < num_pairs; i += kCountThreads) {
    const uint32_t pair = pairs[i];
    if (pair & 0xffffu) atomicAdd(&bins[2 * i], Count(pair & 0xffffu));
    if (pair >> 16) atomicAdd(&bins[2 * i + 1], Count(pair >> 16));
  }
}

}  // namespace fishfast::topk
