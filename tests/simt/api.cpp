#include "api.h"

#include <algorithm>
#include <string>

#include "scheduler.h"

static std::string& last_error() {
  static thread_local std::string message;
  return message;
}

extern "C" {

const char* simt_last_error() { return last_error().c_str(); }

void simt_set_last_error(const char* message) { last_error() = message; }

void simt_schedule(uint64_t seed, int64_t resident_blocks, int64_t threads,
                   int64_t reverse_blocks) {
  simt::schedule.seed = seed;
  simt::schedule.resident_blocks = static_cast<int>(std::max<int64_t>(1, resident_blocks));
  simt::schedule.threads = static_cast<int>(std::max<int64_t>(1, threads));
  simt::schedule.reverse_blocks = reverse_blocks != 0;
  simt::reset_trace();
}

uint64_t simt_trace() { return simt::trace(); }
}
