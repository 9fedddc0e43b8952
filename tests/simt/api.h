// For the extern "C" functions that Python calls: turns what a launcher throws into an error code,
// and keeps the message for simt_last_error(). library.py is the other side.
//
//   extern "C" int ff_scale(float* x, int64_t n, double factor) {
//     return simt::call([&] { fishfast::launch_scale(x, n, factor, nullptr); });
//   }
#pragma once

#include <cstdint>
#include <exception>

extern "C" {
const char* simt_last_error();
void simt_set_last_error(const char* message);
void simt_schedule(uint64_t seed, int64_t resident_blocks, int64_t threads, int64_t reverse_blocks);
uint64_t simt_trace();
}

namespace simt {

template <class Function>
inline int call(Function&& function) noexcept {
  try {
    function();
    return 0;
  } catch (const std::exception& error) {
    simt_set_last_error(error.what());
    return 1;
  }
}

}  // namespace simt
