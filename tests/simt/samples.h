// Launchers of the sample kernels (samples.cu) and of the planted bugs (planted_bugs.cu).
#pragma once

#include <cstdint>

namespace fishfast::simt_tests {

// Which line of a correct kernel is left out.
enum class Omit : int64_t {
  kNothing = 0,
  kBarrier = 1,
  kFence = 2,
  kTileCounter = 3,
  kSyncWarp = 4
};

// Results of all warp collectives for the 32 values of one warp.
void launch_warp_table(const int* in,  // [32]
                       unsigned* out,  // [16][32], rows in the order of samples.cu
                       int64_t shuffle_delta);

// Every kind of atomic, by all threads of a grid, on 9 counters.
void launch_atomics(const unsigned* in,  // [n]
                    int64_t n,
                    unsigned* counters,  // [9]: add, sub, min, max, and, or, xor, locked, the lock
                    float* float_sum,    // [1]
                    unsigned long long* sum64);  // [1]

// out[i] = the sum of in[0 .. i) inside each tile of 256.
void launch_block_scan(const unsigned* in, unsigned* out, int64_t n, Omit omit);

// out = the indices of positive entries, ascending: one pass, decoupled look-back.
void launch_compact(const float* in, int64_t n,
                    int* out,                    // [number of positive entries]
                    unsigned long long* status,  // [number of tiles], zero
                    unsigned* tile_counter,      // [1], zero
                    Omit omit);

// total = the sum of in, by the last block to finish.
void launch_grid_sum(const unsigned* in, int64_t n,
                     unsigned* partial_sums,     // [number of tiles]
                     unsigned* blocks_finished,  // [1], zero
                     unsigned* total,            // [1]
                     Omit omit);

// out[i] = in[i ^ 1] through shared memory, one warp.
void launch_swap_neighbours(const unsigned* in, unsigned* out, Omit omit);

// Runs the planted bug of that name. Throws std::invalid_argument if there is none.
void launch_planted_bug(const char* name, int* data, int64_t n);

}  // namespace fishfast::simt_tests
