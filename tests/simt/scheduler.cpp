#include "scheduler.h"

#include <algorithm>
#include <chrono>
#include <thread>

namespace simt {

namespace {

// Rounds in which threads looked at flags and nothing else happened, before this is called a
// deadlock. In order a round is one look per waiting thread: 100000 take 0.1 s for one thread and 3
// s for 1024.
constexpr int kMaxSpinRounds = 100000;
// With several OS threads the rounds are slowed down (see below), 10000 take about 2 s, and every
// thread must have looked as often: one that gets no CPU has not.
constexpr int kMaxSpinRoundsThreaded = 10000;

// Atomics in a row before another thread gets the CPU. In order: rarely, only so that an atomic
// spin lock is not endless. Seeded: often, since that is where threads meet.
constexpr int kAtomicsInOrder = 256;
constexpr int kAtomicsSeeded = 16;

sanitizer::Clock grid_start, grid_end;

void fiber_main();

FiberPool& fiber_pool() {
  static thread_local FiberPool pool(fiber_main);
  return pool;
}

void fiber_main() {
  fiber_pool().on_new_stack();
  for (;;) worker->run_fiber();  // `worker` changes from launch to launch
}

}  // namespace

thread_local Current current;
thread_local Worker* worker = nullptr;

Worker::Worker(Launch& launch, int number)
    : launch_(launch),
      number_(number),
      random_(launch.schedule.seed + number),
      seeded_(launch.schedule.seed != 0),
      blocks_(launch.schedule.resident_blocks) {
  const int num_warps = (launch.block_size() + 31) / 32;
  for (Block& block : blocks_) {
    block.threads.resize(launch.block_size());
    block.warps.resize(num_warps);
  }
  for (int warp = 0; warp < num_warps; warp++) warp_order_.push_back(warp);
}

// A round visits each resident block once, and in it each warp once.
void Worker::run() {
  worker = this;
  current.block_dim = launch_.block;
  current.grid_dim = launch_.grid;
  current.dynamic_shared_bytes = launch_.shared_bytes;
  fiber_pool();  // created here, on the OS thread's stack
  grid_start.release();

  while (!launch_.stop) {
    bool any_live = false;
    ran_ = spun_ = napping_ = false;
    for (Block& block : blocks_) {
      if (!block.live && !start_next_block(block)) continue;
      any_live = true;
      visit_block(block);
      if (launch_.stop) break;
    }
    if (!any_live) break;
    if (launch_.stop) break;
    if (!ran_ && !napping_) report_deadlock("nobody can run", State::kInWarpOp);
    watch_for_endless_spin();
  }

  launch_.spun_in_vain[number_] = Launch::kEnded;
  grid_end.acquire();
  launch_.trace += trace_;
  clean_up();
}

bool Worker::start_next_block(Block& block) {
  int64_t number = launch_.next_block.fetch_add(1);
  if (number >= launch_.num_blocks()) return false;
  if (launch_.schedule.reverse_blocks) number = launch_.num_blocks() - 1 - number;

  const dim3 grid = launch_.grid, shape = launch_.block;
  const uint3 block_index{unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                          unsigned(number / grid.x / grid.y)};
  block.live = true;
  block.exited = block.arrived = 0;
  block.true_predicates = 0;
  for (auto& clock : block.barrier_clock) clock.forget();
  for (Warp& warp : block.warps) {
    warp.waiting = warp.exited = 0;
    for (auto& clock : warp.sync) clock.forget();
  }
  for (int i = 0; i < block.size(); i++) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.index = i;
    thread.state = State::kNew;
    thread.block_index = block_index;
    thread.thread_index = uint3{i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
  }
  note_event();
  return true;
}

void Worker::visit_block(Block& block) {
  if (seeded_) {
    for (size_t i = warp_order_.size() - 1; i > 0; i--) {
      std::swap(warp_order_[i], warp_order_[random_.below(i + 1)]);
    }
  }
  for (int warp_number : warp_order_) {
    if (seeded_ && takes_nap(block.warps[warp_number])) {
      napping_ = true;
      continue;
    }
    visit_warp(block, warp_number);
    if (!block.live || launch_.stop) return;
  }
}

// Lets some warps fall far behind the others, which uniform randomness practically never does.
bool Worker::takes_nap(Warp& warp) {
  if (warp.nap > 0) {
    warp.nap--;
    return true;
  }
  if (random_.one_in(8)) {
    const bool long_nap = random_.one_in(8);
    warp.nap = static_cast<int>(random_.below(long_nap ? 1024 : 32));
  }
  return false;
}

// Runs the lanes of a warp until all of them wait (in order), or until chance says so (seeded).
void Worker::visit_warp(Block& block, int warp_number) {
  const int first_thread = warp_number * 32;
  const int num_lanes = std::min(32, block.size() - first_thread);
  bool first_pass = true, ran = false;
  do {
    ran = false;
    const int rotation = seeded_ ? static_cast<int>(random_.below(32)) : 0;
    const int mirror = seeded_ && random_.one_in(2) ? 31 : 0;
    for (int i = 0; i < 32; i++) {
      const int lane = ((i ^ mirror) + rotation) % 32;
      if (lane >= num_lanes) continue;
      Thread& thread = block.threads[first_thread + lane];
      // One that yielded runs once per visit, or a spinning warp would never be left.
      const bool runnable = thread.state == State::kNew || thread.state == State::kReady ||
                            (thread.state == State::kYielded && first_pass);
      if (!runnable) continue;
      resume(thread);
      ran = true;
      if (!block.live || launch_.stop) return;
    }
    first_pass = false;
    if (seeded_ && random_.one_in(4)) return;
  } while (ran);
}

void Worker::refill_atomics() {
  current.atomics_left =
      seeded_ ? static_cast<int>(random_.below(kAtomicsSeeded)) : kAtomicsInOrder;
}

void Worker::resume(Thread& thread) {
  if (thread.state == State::kNew) thread.fiber = fiber_pool().take();
  thread.state = State::kReady;
  current.thread = &thread;
  refill_atomics();
  trace_ =
      trace_ * 0x9E3779B97F4A7C15ull + uint64_t(thread.block_index.x) * 1024 + thread.index + 1;
  ran_ = true;
  switch_fiber(fiber_pool().host, *thread.fiber);
  current.thread = nullptr;
  if (thread.state == State::kDone) retire(thread);
}

// On the fiber: runs the CUDA thread it was resumed for, from beginning to end.
void Worker::run_fiber() {
  grid_start.acquire();
  (*launch_.body)();
  grid_end.release();
  Thread& thread = current_thread();
  thread.state = State::kDone;
  switch_to_host(thread);
}

void Worker::switch_to_host(Thread& thread) { switch_fiber(*thread.fiber, fiber_pool().host); }

void Worker::retire(Thread& thread) {
  Block& block = *thread.block;
  fiber_pool().give_back(thread.fiber);
  thread.fiber = nullptr;
  block.warps[thread.index / 32].exited |= 1u << (thread.index % 32);
  note_event();
  if (++block.exited == block.size()) {
    free_shared_memory(block);
    block.live = false;
  } else if (block.arrived > 0) {
    // On some cards the others would pass, on others they hang: CUDA promises nothing here.
    report("simt: barrier divergence: thread " + std::to_string(thread.index) + " of block " +
           std::to_string(thread.block_index.x) + " returned while others wait at " +
           block.barrier_line.file + ":" + std::to_string(block.barrier_line.line));
  }
}

// Spinning threads always look busy. It is a deadlock when for a very long time no flag was
// released and no thread began or ended, here and in the other workers.
void Worker::watch_for_endless_spin() {
  if (events_ != events_published_) {
    launch_.events.fetch_add(events_ - events_published_, std::memory_order_relaxed);
    events_published_ = events_;
    spin_rounds_ = 0;
  } else if (spun_) {
    spin_rounds_++;
  }
  if (spin_rounds_ == 0) return;
  const bool threaded = launch_.schedule.threads > 1;
  if (threaded && spin_rounds_ > 1000) {
    // What this worker waits for is on another OS thread, which may be slow to get a CPU.
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  if (spin_rounds_ < (threaded ? kMaxSpinRoundsThreaded : kMaxSpinRounds)) return;
  const uint64_t events = launch_.events.load(std::memory_order_relaxed);
  if (events != events_seen_ && threaded) {
    events_seen_ = events;
    spin_rounds_ = 1;
    return;
  }
  launch_.spun_in_vain[number_] = events;
  for (const std::atomic<uint64_t>& since : launch_.spun_in_vain) {
    if (threaded && since != events && since != Launch::kEnded) return;
  }
  report_deadlock("endless spin", State::kYielded);
}

void Worker::report_deadlock(const char* kind, State preferred) {
  const Thread* waiting = nullptr;
  for (const Block& block : blocks_) {
    if (!block.live) continue;
    for (const Thread& thread : block.threads) {
      if (thread.state == State::kDone || thread.state == State::kNew) continue;
      if (!waiting || (waiting->state != preferred && thread.state == preferred)) waiting = &thread;
    }
  }
  std::string message = std::string("simt: deadlock (") + kind + ")";
  if (waiting) {
    const char* doing = waiting->state == State::kAtBarrier  ? "waits at the barrier"
                        : waiting->state == State::kInWarpOp ? "waits in the warp collective"
                                                             : "spins";
    message += ": thread " + std::to_string(waiting->index) + " of block " +
               std::to_string(waiting->block_index.x) + " " + doing + " at " + waiting->line.file +
               ":" + std::to_string(waiting->line.line);
  }
  report(message);
}

void Worker::report(const std::string& message) {
  std::lock_guard<std::mutex> lock(launch_.error_mutex);
  if (launch_.error.empty()) launch_.error = message;
  launch_.stop = true;
}

void Worker::fail(const std::string& message, SourceLine where) {
  Thread& thread = current_thread();
  report("simt: " + message + " at " + where.file + ":" + std::to_string(where.line) + " (block " +
         std::to_string(thread.block_index.x) + ", thread " + std::to_string(thread.index) + ")");
  for (;;) switch_to_host(thread);  // never resumed: the launch stops
}

// After an error some fibers are in the middle of the kernel; they are abandoned with their stacks.
void Worker::clean_up() {
  for (Block& block : blocks_) {
    if (!block.live) continue;
    free_shared_memory(block);
    for (Thread& thread : block.threads) {
      if (thread.state != State::kNew && thread.fiber) fiber_pool().destroy(thread.fiber);
    }
  }
  worker = nullptr;
}

void spin(SourceLine where) {
  Thread& thread = current_thread();
  worker->note_spin();
  thread.line = where;
  thread.state = State::kYielded;
  worker->switch_to_host(thread);
}

void released(SourceLine where) {
  Thread& thread = current_thread();
  worker->note_event();
  thread.line = where;
  thread.state = State::kYielded;
  worker->switch_to_host(thread);
}

}  // namespace simt
