// What tests/test_simt.py calls of samples.cu and planted_bugs.cu.
#include "api.h"
#include "samples.h"

namespace samples = fishfast::simt_tests;

extern "C" {

int ff_warp_table(const int* in, unsigned* out, int64_t shuffle_delta) {
  return simt::call([&] { samples::launch_warp_table(in, out, shuffle_delta); });
}

int ff_swap_neighbours(const unsigned* in, unsigned* out, int64_t omit) {
  return simt::call([&] { samples::launch_swap_neighbours(in, out, samples::Omit(omit)); });
}

int ff_atomics(const unsigned* in, int64_t n, unsigned* counters, float* float_sum,
               unsigned long long* sum64) {
  return simt::call([&] { samples::launch_atomics(in, n, counters, float_sum, sum64); });
}

int ff_block_scan(const unsigned* in, unsigned* out, int64_t n, int64_t omit) {
  return simt::call([&] { samples::launch_block_scan(in, out, n, samples::Omit(omit)); });
}

int ff_compact(const float* in, int64_t n, int* out, unsigned long long* status,
               unsigned* tile_counter, int64_t omit) {
  return simt::call(
      [&] { samples::launch_compact(in, n, out, status, tile_counter, samples::Omit(omit)); });
}

int ff_grid_sum(const unsigned* in, int64_t n, unsigned* partial_sums, unsigned* blocks_finished,
                unsigned* total, int64_t omit) {
  return simt::call([&] {
    samples::launch_grid_sum(in, n, partial_sums, blocks_finished, total, samples::Omit(omit));
  });
}

int ff_planted_bug(const char* name, int* data, int64_t n) {
  return simt::call([&] { samples::launch_planted_bug(name, data, n); });
}
}
