// The runtime's own view of a running grid; kernels see simt.h only.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "sanitizers.h"
#include "simt.h"

namespace simt {

// How the threads of the next launches are interleaved. Every seed is a different, repeatable
// order.
struct Schedule {
  uint64_t seed = 0;            // 0: blocks, warps and lanes in order; else random
  int resident_blocks = 1;      // CUDA blocks interleaved on each OS thread
  int threads = 1;              // OS threads; with more than one a run is not repeatable
  bool reverse_blocks = false;  // start the last block of the grid first
};
extern Schedule schedule;

enum class State : uint8_t { kNew, kReady, kYielded, kAtBarrier, kInWarpOp, kDone };

struct Block;

struct Thread : ThreadView {
  Block* block = nullptr;
  int index = 0;  // threadIdx, flattened
  State state = State::kNew;
  Fiber* fiber = nullptr;
  SourceLine line{"?", 0};  // where it waits

  // The warp collective it takes part in.
  WarpOp op = WarpOp::kNone;
  uint32_t mask = 0, argument = 0, width = 32;
  uint64_t value = 0, result = 0;
};

struct Warp {
  uint32_t waiting = 0;  // lanes in a collective
  uint32_t exited = 0;   // lanes that have returned
  int nap = 0;           // rounds that the random schedule lets it sit out
  // Two, used in turn: a lane may enter the next __syncwarp before another has left the last one.
  sanitizer::Clock sync[2];
  int sync_phase = 0;
};

struct Block {
  bool live = false;
  int exited = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<std::pair<const void*, void*>> shared_arrays;  // identity, memory

  // The barrier in progress.
  int arrived = 0;
  int64_t true_predicates = 0;
  int64_t last_true_predicates = 0;  // of the barrier that has just opened
  SourceLine barrier_line{"?", 0};
  sanitizer::Clock barrier_clock[2];  // two for the same reason as Warp::sync
  int barrier_phase = 0;

  int size() const { return static_cast<int>(threads.size()); }
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {}
  uint64_t below(uint64_t bound) {  // xorshift64
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return (state_ >> 11) % bound;
  }
  bool one_in(uint64_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

// What the workers of one launch share.
struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;
  Schedule schedule;
  std::atomic<int64_t> next_block{0};
  std::atomic<uint64_t> events{0};  // of finished worker rounds; see Worker::watch_for_endless_spin
  // By worker: the events after which it has looked at flags in vain, long enough for a deadlock.
  static constexpr uint64_t kLooking = UINT64_MAX, kEnded = UINT64_MAX - 1;
  std::vector<std::atomic<uint64_t>> spun_in_vain;
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> trace{0};  // which thread was resumed when, hashed
  std::mutex error_mutex;
  std::string error;  // the first one

  explicit Launch(const Schedule& chosen) : schedule(chosen), spun_in_vain(chosen.threads) {
    for (std::atomic<uint64_t>& since : spun_in_vain) since = kLooking;
  }
  int64_t num_blocks() const { return int64_t(grid.x) * grid.y * grid.z; }
  int block_size() const { return static_cast<int>(block.x * block.y * block.z); }
};

// One OS thread's share of a launch: a few resident blocks, run fiber by fiber.
class Worker {
 public:
  Worker(Launch& launch, int number);
  void run();

  // Called on a fiber, by the primitives.
  void switch_to_host(Thread& thread);
  [[noreturn]] void fail(const std::string& message, SourceLine where);
  void run_fiber();
  void note_event() { events_++; }
  void note_spin() { spun_ = true; }
  bool seeded() const { return seeded_; }

 private:
  bool start_next_block(Block& block);
  void visit_block(Block& block);
  void visit_warp(Block& block, int warp_number);
  bool takes_nap(Warp& warp);
  void refill_atomics();
  void resume(Thread& thread);
  void retire(Thread& thread);
  void watch_for_endless_spin();
  void report_deadlock(const char* kind, State preferred);
  void report(const std::string& message);
  void clean_up();

  Launch& launch_;
  const int number_;
  Random random_;
  const bool seeded_;
  std::vector<Block> blocks_;
  std::vector<int> warp_order_;

  // Since the start of the round in progress: did any fiber run, look at a flag, or is a warp
  // napping?
  bool ran_ = false, spun_ = false, napping_ = false;
  uint64_t trace_ = 0;
  uint64_t events_ = 0;  // threads and blocks started or finished, flags released
  uint64_t events_published_ = 0, events_seen_ = 0;
  int spin_rounds_ = 0;  // without an event
};

extern thread_local Worker* worker;
inline Thread& current_thread() { return static_cast<Thread&>(*current.thread); }

void open_barrier(Block& block);
void free_shared_memory(Block& block);
uint64_t trace();  // a hash of which thread was resumed when, since the last simt_schedule()
void reset_trace();

}  // namespace simt
