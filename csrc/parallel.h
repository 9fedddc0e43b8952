// Threads for the CPU paths: work is cut into chunks, threads take the next free chunk.
//
// They are torch's own where its OpenMP pool is GNU's or LLVM's: after each of torch's operations
// its threads spin for milliseconds, in which threads of ours would have half a core. The pool is
// looked up in the process, so the extension needs neither torch nor OpenMP. Where there is none,
// and in a forked child, to which threads do not pass, threads live for one call: about 30 us each.
// Callers pass num_threads = 1 for short work, else torch's own number (fishfast/_backend.py): the
// pool would end the threads that a smaller team leaves out.
#pragma once
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace fishfast {

// Runs body(data) on num_threads threads of the pool and returns when all have ended.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned num_threads,
                                unsigned flags);

inline const pid_t kLoadedIn = getpid();

inline ParallelRegion thread_pool() {
  static const auto pool = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == kLoadedIn ? pool : nullptr;
}

// Calls body(chunk, thread) once for every chunk in [0, num_chunks). The first exception that a
// chunk throws is rethrown here, after all threads have ended.
template <class Body>
void parallel_chunks(int64_t num_chunks, int num_threads, const Body& body) {
  struct Work {
    const Body& body;
    const int64_t num_chunks;
    std::atomic<int64_t> next_chunk{0};
    std::atomic<int> next_thread{0};
    std::exception_ptr error;
    std::mutex error_lock;

    Work(const Body& chunk_body, int64_t chunks) : body(chunk_body), num_chunks(chunks) {}

    void run() noexcept {
      const int thread = next_thread.fetch_add(1);
      try {
        for (int64_t chunk; (chunk = next_chunk.fetch_add(1)) < num_chunks;) body(chunk, thread);
      } catch (...) {
        std::lock_guard<std::mutex> guard(error_lock);
        if (!error) error = std::current_exception();
        next_chunk = num_chunks;  // the others stop at their next chunk
      }
    }
  };
  Work work(body, num_chunks);
  if (num_threads <= 1 || num_chunks <= 1) {
    work.run();
  } else if (const ParallelRegion pool = thread_pool()) {
    pool([](void* shared) { static_cast<Work*>(shared)->run(); }, &work, unsigned(num_threads), 0);
  } else {
    std::vector<std::thread> threads;
    try {
      while (int(threads.size()) + 1 < num_threads) threads.emplace_back([&work] { work.run(); });
    } catch (const std::system_error&) {  // a limit of the machine: fewer threads take all chunks
    }
    work.run();
    for (auto& thread : threads) thread.join();
  }
  if (work.error) std::rethrow_exception(work.error);
}

}  // namespace fishfast
