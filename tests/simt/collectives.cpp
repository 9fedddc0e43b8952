// What CUDA threads do together: block barriers, warp collectives, shared memory, fences.
#include <cstdlib>
#include <cstring>
#include <string>

#include "scheduler.h"

namespace simt {

namespace {

bool same_line(SourceLine a, SourceLine b) {
  return a.line == b.line && strcmp(a.file, b.file) == 0;
}

// Calls `visit(lane)` for each set bit of the mask, in ascending order.
template <class Visit>
void for_each_lane(uint32_t mask, Visit visit) {
  for (; mask != 0; mask &= mask - 1) visit(__builtin_ctz(mask));
}

void check_mask(const Thread& thread, const Warp& warp, int lane, int num_lanes) {
  const uint32_t existing = num_lanes == 32 ? 0xffffffffu : (1u << num_lanes) - 1;
  const char* problem = nullptr;
  if ((thread.mask >> lane & 1) == 0) problem = "it is called by a lane outside its mask";
  if (thread.mask & ~existing) problem = "its mask names a lane that does not exist";
  if (thread.mask & warp.exited) problem = "its mask names a lane that has returned";
  if (problem)
    worker->fail(std::string("bad lane mask in a warp collective: ") + problem, thread.line);
}

void check_all_agree(const Thread& thread, const Thread* lanes) {
  for_each_lane(thread.mask, [&](int lane) {
    const Thread& other = lanes[lane];
    if (other.op == thread.op && other.mask == thread.mask && same_line(other.line, thread.line)) {
      return;
    }
    worker->fail("warp collective mismatch: lane " + std::to_string(lane) +
                     " is in another collective or has another mask, at line " +
                     std::to_string(other.line.line),
                 thread.line);
  });
}

// The lane whose value a shuffle gives to `lane`. Beyond its group of `width` lanes it keeps its
// own.
int shuffle_source(WarpOp op, int lane, int argument, int width) {
  const int group_begin = lane & ~(width - 1);
  const int group_end = group_begin + width;
  switch (op) {
    case WarpOp::kShuffleIndex:
      return group_begin + (argument & (width - 1));
    case WarpOp::kShuffleUp:
      return lane - argument < group_begin ? lane : lane - argument;
    case WarpOp::kShuffleDown:
      return lane + argument >= group_end ? lane : lane + argument;
    default:  // kShuffleXor: earlier groups may be read, later ones not
      return (lane ^ argument) >= group_end ? lane : lane ^ argument;
  }
}

bool is_shuffle(WarpOp op) { return op >= WarpOp::kShuffleIndex && op <= WarpOp::kShuffleXor; }

// Votes and reductions: one result for all lanes of the mask.
uint64_t reduce(const Thread& thread, const Thread* lanes) {
  const WarpOp op = thread.op;
  const bool starts_full = op == WarpOp::kMin || op == WarpOp::kAnd || op == WarpOp::kAll;
  uint64_t total = starts_full ? ~uint64_t(0) : 0;
  for_each_lane(thread.mask, [&](int lane) {
    const uint64_t value = lanes[lane].value;
    switch (op) {
      case WarpOp::kBallot:
        total |= value << lane;
        break;
      case WarpOp::kAny:
      case WarpOp::kOr:
        total |= value;
        break;
      case WarpOp::kAll:
      case WarpOp::kAnd:
        total &= value;
        break;
      case WarpOp::kXor:
        total ^= value;
        break;
      case WarpOp::kAdd:
        total += value;
        break;
      case WarpOp::kMin:
        if (value < total) total = value;
        break;
      case WarpOp::kMax:
        if (value > total) total = value;
        break;
      default:
        break;
    }
  });
  return total;
}

// The last lane to arrive computes the result of every lane and lets the others run.
void complete(Thread& last, Thread* lanes) {
  const uint64_t total = reduce(last, lanes);
  for_each_lane(last.mask, [&](int lane) {
    Thread& thread = lanes[lane];
    thread.result = total;
    if (is_shuffle(last.op)) {
      const int source = shuffle_source(last.op, lane, int(thread.argument), int(thread.width));
      if (source < 0 || source > 31 || (last.mask >> source & 1) == 0) {
        worker->fail("bad lane mask in a warp collective: a shuffle reads lane " +
                         std::to_string(source) + ", which is not in the mask",
                     last.line);
      }
      thread.result = lanes[source].value;
    } else if (last.op == WarpOp::kMatch) {
      thread.result = 0;
      for_each_lane(last.mask, [&](int other) {
        if (lanes[other].value == thread.value) thread.result |= uint64_t(1) << other;
      });
    }
    if (&thread != &last) thread.state = State::kReady;
  });
}

}  // namespace

void open_barrier(Block& block) {
  block.arrived = 0;
  block.barrier_phase ^= 1;
  block.last_true_predicates = block.true_predicates;
  block.true_predicates = 0;
  for (Thread& thread : block.threads) {
    if (thread.state == State::kAtBarrier) thread.state = State::kReady;
  }
}

int64_t barrier(bool predicate, SourceLine where) {
  Thread& thread = current_thread();
  Block& block = *thread.block;
  if (block.exited > 0) {
    worker->fail("barrier divergence: another thread of the block has returned", where);
  }
  if (block.arrived > 0 && !same_line(block.barrier_line, where)) {
    worker->fail("barrier divergence: another thread waits at line " +
                     std::to_string(block.barrier_line.line),
                 where);
  }
  block.barrier_line = thread.line = where;
  block.true_predicates += predicate;

  sanitizer::Clock& clock = block.barrier_clock[block.barrier_phase];
  clock.release();
  if (++block.arrived < block.size()) {
    thread.state = State::kAtBarrier;
    worker->switch_to_host(thread);
  } else {
    open_barrier(block);
    if (worker->seeded()) worker->switch_to_host(thread);  // or the last one would always run ahead
  }
  clock.acquire();
  return block.last_true_predicates;
}

uint64_t warp_op(WarpOp op, uint32_t mask, uint64_t value, uint32_t argument, uint32_t width,
                 SourceLine where) {
  Thread& thread = current_thread();
  Block& block = *thread.block;
  const int lane = thread.index % 32;
  const int first_thread = thread.index - lane;
  Warp& warp = block.warps[thread.index / 32];
  Thread* lanes = &block.threads[first_thread];

  thread.op = op;
  thread.mask = mask;
  thread.value = value;
  thread.argument = argument;
  thread.width = width;
  thread.line = where;
  check_mask(thread, warp, lane, std::min(32, block.size() - first_thread));

  // Only __syncwarp orders memory; a shuffle or a vote does not.
  sanitizer::Clock& clock = warp.sync[warp.sync_phase];
  if (op == WarpOp::kSync) clock.release();
  warp.waiting |= 1u << lane;
  if ((warp.waiting & mask) != mask) {
    thread.state = State::kInWarpOp;
    worker->switch_to_host(thread);
  } else {
    check_all_agree(thread, lanes);
    warp.waiting &= ~mask;
    complete(thread, lanes);
    if (op == WarpOp::kSync) warp.sync_phase ^= 1;
    if (worker->seeded()) worker->switch_to_host(thread);
  }
  if (op == WarpOp::kSync) clock.acquire();
  return thread.result;
}

// A heap array per declaration and block, so that ASan surrounds it with red zones. Its contents
// start as 0xA5: shared memory is not zeroed on the card either, and 0 would hide a missing
// initialisation.
void* shared_memory(const void* identity, size_t bytes) {
  Block& block = *current_thread().block;
  for (const auto& [known, memory] : block.shared_arrays) {
    if (known == identity) return memory;
  }
  sanitizer::IgnoreWrites ignore;
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes > 0 ? bytes : 1) != 0) abort();
  memset(memory, 0xA5, bytes);
  block.shared_arrays.emplace_back(identity, memory);
  return memory;
}

void free_shared_memory(Block& block) {
  sanitizer::IgnoreWrites ignore;
  for (const auto& [identity, memory] : block.shared_arrays) free(memory);
  block.shared_arrays.clear();
}

// TSan does not model fences: one is taken as receiving from all earlier fences and publishing to
// all later ones. That is more order than the card gives, so a fence in the wrong place may pass; a
// missing one does not.
void fence() {
#ifdef SIMT_TSAN
  static sanitizer::Clock all_fences;
  all_fences.acquire();
  all_fences.release();
#else
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

}  // namespace simt
