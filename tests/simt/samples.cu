// Correct kernels that use every part of the runtime, and that can leave out the one line which
// makes them correct (`Omit`): tests/test_simt.py shows that they are right as they are under any
// schedule, and that the runtime notices when the line is missing.
#include "platform.cuh"
#include "samples.h"

namespace fishfast::simt_tests {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

unsigned num_tiles(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

// --- warp collectives ---

__global__ void warp_table(const int* in, unsigned* out, int delta) {
  const int lane = threadIdx.x;
  const int value = in[lane];
  const unsigned bits = static_cast<unsigned>(value);
  const bool odd = value & 1;
  unsigned results[16] = {
      __shfl_sync(kAllLanes, bits, lane * 7 + delta),
      __shfl_up_sync(kAllLanes, bits, delta),
      __shfl_down_sync(kAllLanes, bits, delta),
      __shfl_xor_sync(kAllLanes, bits, delta),
      __shfl_up_sync(kAllLanes, bits, delta, 8),
      __shfl_down_sync(kAllLanes, bits, delta, 8),
      __ballot_sync(kAllLanes, odd),
      static_cast<unsigned>(__all_sync(kAllLanes, value >= 0)),
      static_cast<unsigned>(__any_sync(kAllLanes, value < 0)),
      __reduce_add_sync(kAllLanes, bits),
      static_cast<unsigned>(__reduce_min_sync(kAllLanes, value)),
      static_cast<unsigned>(__reduce_max_sync(kAllLanes, value)),
      __reduce_and_sync(kAllLanes, bits),
      __reduce_or_sync(kAllLanes, bits),
      __match_any_sync(kAllLanes, bits),
      0,
  };
  // The two halves of the warp take different branches, each with its own mask.
  if (lane < 16) {
    results[15] = __reduce_add_sync(0x0000ffffu, bits);
  } else {
    results[15] = __reduce_max_sync(0xffff0000u, bits);
  }
  for (int row = 0; row < 16; row++) out[row * 32 + lane] = results[row];
}

__global__ void swap_neighbours(const unsigned* in, unsigned* out, Omit omit) {
  FF_SHARED(unsigned, exchange, [32]);
  const int lane = threadIdx.x;
  exchange[lane] = in[lane];
  if (omit != Omit::kSyncWarp) __syncwarp();
  out[lane] = exchange[lane ^ 1];
}

// --- atomics ---

__global__ void atomics(const unsigned* in, int64_t n, unsigned* counters, float* float_sum,
                        unsigned long long* sum64) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  atomicAdd(&counters[0], in[i]);
  atomicSub(&counters[1], 1u);
  atomicMin(&counters[2], in[i]);
  atomicMax(&counters[3], in[i]);
  atomicAnd(&counters[4], in[i]);
  atomicOr(&counters[5], in[i]);
  atomicXor(&counters[6], in[i]);
  atomicAdd(float_sum, 0.5f);
  atomicAdd(sum64, static_cast<unsigned long long>(in[i]) << 32);

  // A lock: thread after thread, each adds to a plain counter.
  while (atomicCAS(&counters[8], 0u, 1u) != 0u) {
  }
  __threadfence();
  counters[7] += 1;
  __threadfence();
  atomicExch(&counters[8], 0u);
}

// --- scan of a block ---

// Returns the sum over lower threads. `warp_sums` is shared memory that this call may overwrite.
__device__ unsigned exclusive_scan(unsigned value, unsigned* warp_sums, unsigned* total,
                                   bool with_barrier) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  unsigned inclusive = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned below = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += below;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  if (with_barrier) __syncthreads();
  if (warp == 0) {
    unsigned sum = lane < kWarps ? warp_sums[lane] : 0;
    for (int distance = 1; distance < kWarps; distance *= 2) {
      const unsigned below = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += below;
    }
    if (lane < kWarps) warp_sums[lane] = sum;
  }
  __syncthreads();
  *total = warp_sums[kWarps - 1];
  return inclusive - value + (warp > 0 ? warp_sums[warp - 1] : 0);
}

__global__ void __launch_bounds__(kThreads)
    block_scan(const unsigned* in, unsigned* out, int64_t n, Omit omit) {
  FF_SHARED(unsigned, warp_sums, [kWarps]);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  unsigned total;
  const unsigned sum = exclusive_scan(i < n ? in[i] : 0, warp_sums, &total, omit != Omit::kBarrier);
  if (i < n) out[i] = sum;
}

// --- stable compaction in one pass: decoupled look-back (Merrill and Garland, 2016) ---

// A tile's status: 2 bits of state above a count.
constexpr unsigned long long kOwnCount = 1ull << 62;    // of this tile alone
constexpr unsigned long long kTotalCount = 2ull << 62;  // of this tile and all before it
constexpr unsigned long long kCountBits = kOwnCount - 1;

// The number of selected entries in all tiles before `tile`.
__device__ unsigned long long look_back(const unsigned long long* status, unsigned tile) {
  unsigned long long before = 0;
  for (int64_t other = static_cast<int64_t>(tile) - 1; other >= 0;) {
    const unsigned long long word = ld_acquire(&status[other]);
    if (word == 0) continue;
    before += word & kCountBits;
    if (word & kTotalCount) break;
    other--;
  }
  return before;
}

__global__ void __launch_bounds__(kThreads)
    compact(const float* in, int64_t n, int* out, unsigned long long* status,
            unsigned* tile_counter, Omit omit) {
  FF_SHARED(unsigned, warp_sums, [kWarps]);
  FF_SHARED(unsigned, shared_tile);
  FF_SHARED(unsigned long long, shared_before);

  // Tiles are numbered in the order in which blocks start, whatever that is, so that a block only
  // ever waits for blocks that are already running.
  if (threadIdx.x == 0) {
    shared_tile = omit == Omit::kTileCounter ? blockIdx.x : atomicAdd(tile_counter, 1u);
  }
  __syncthreads();
  const unsigned tile = shared_tile;

  const int64_t i = static_cast<int64_t>(tile) * kThreads + threadIdx.x;
  const bool selected = i < n && in[i] > 0;
  unsigned count;
  const unsigned rank = exclusive_scan(selected, warp_sums, &count, true);

  if (threadIdx.x == 0) {
    st_release(&status[tile], kOwnCount | count);
    const unsigned long long before = look_back(status, tile);
    st_release(&status[tile], kTotalCount | (before + count));
    shared_before = before;
  }
  __syncthreads();
  if (selected) out[shared_before + rank] = static_cast<int>(i);
}

// --- sum of a grid: the last block to finish adds the partial sums ---

__global__ void __launch_bounds__(kThreads)
    grid_sum(const unsigned* in, int64_t n, unsigned* partial_sums, unsigned* blocks_finished,
             unsigned* total, Omit omit) {
  FF_DYN_SHARED(unsigned, warp_sums);
  FF_SHARED(bool, is_last);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  unsigned sum;
  exclusive_scan(i < n ? in[i] : 0, warp_sums, &sum, true);

  if (threadIdx.x == 0) {
    partial_sums[blockIdx.x] = sum;
    if (omit != Omit::kFence) __threadfence();  // the partial sum before the count
    is_last = atomicAdd(blocks_finished, 1u) == gridDim.x - 1;
    if (is_last) __threadfence();  // the count before the partial sums of others
  }
  __syncthreads();
  if (!is_last) return;

  unsigned mine = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads) {
    mine += partial_sums[block];
  }
  unsigned grid_total;
  exclusive_scan(mine, warp_sums, &grid_total, true);
  if (threadIdx.x == 0) *total = grid_total;
}

}  // namespace

void launch_warp_table(const int* in, unsigned* out, int64_t shuffle_delta) {
  FF_LAUNCH(warp_table, 1, 32, 0, nullptr, in, out, static_cast<int>(shuffle_delta));
}

void launch_swap_neighbours(const unsigned* in, unsigned* out, Omit omit) {
  FF_LAUNCH(swap_neighbours, 1, 32, 0, nullptr, in, out, omit);
}

void launch_atomics(const unsigned* in, int64_t n, unsigned* counters, float* float_sum,
                    unsigned long long* sum64) {
  FF_LAUNCH(atomics, num_tiles(n), kThreads, 0, nullptr, in, n, counters, float_sum, sum64);
}

void launch_block_scan(const unsigned* in, unsigned* out, int64_t n, Omit omit) {
  FF_LAUNCH(block_scan, num_tiles(n), kThreads, 0, nullptr, in, out, n, omit);
}

void launch_compact(const float* in, int64_t n, int* out, unsigned long long* status,
                    unsigned* tile_counter, Omit omit) {
  FF_LAUNCH(compact, num_tiles(n), kThreads, 0, nullptr, in, n, out, status, tile_counter, omit);
}

void launch_grid_sum(const unsigned* in, int64_t n, unsigned* partial_sums,
                     unsigned* blocks_finished, unsigned* total, Omit omit) {
  FF_LAUNCH(grid_sum, num_tiles(n), kThreads, kWarps * sizeof(unsigned), nullptr, in, n,
            partial_sums, blocks_finished, total, omit);
}

}  // namespace fishfast::simt_tests
