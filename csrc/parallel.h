// Threads for the CPU paths: work is cut into chunks, threads take the next free chunk.
//
// Threads live for one call (about 30 us each), so that the extension never fights torch's OpenMP
// pool and survives fork(); callers pass num_threads = 1 for work that is shorter than that.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace fishfast {

// Calls body(chunk, thread) once for every chunk in [0, num_chunks). The first exception that a
// chunk throws is rethrown here, after all threads have ended.
template <class Body>
void parallel_chunks(int64_t num_chunks, int num_threads, const Body& body) {
  num_threads = int(std::min<int64_t>(std::max(1, num_threads), num_chunks));
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_lock;
  auto work = [&](int thread) {
    try {
      for (int64_t chunk; (chunk = next.fetch_add(1)) < num_chunks;) body(chunk, thread);
    } catch (...) {
      std::lock_guard<std::mutex> guard(error_lock);
      if (!error) error = std::current_exception();
      next = num_chunks;  // the others stop at their next chunk
    }
  };
  std::vector<std::thread> threads;
  try {
    for (int thread = 1; thread < num_threads; ++thread) threads.emplace_back(work, thread);
  } catch (const std::system_error&) {  // a limit of the machine: fewer threads take all chunks
  }
  if (num_chunks > 0) work(0);
  for (auto& thread : threads) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace fishfast
