// What a kernel source sees when it is compiled for the CPU: CUDA's names for the running thread,
// barriers, warp collectives, atomics, fences, shared memory and the launch. The runtime behind
// them is scheduler.cpp (fibers, blocks, schedule) and collectives.cpp (barriers, warps, shared
// memory).
//
// `__activemask` is missing on purpose: it promises nothing about which lanes are together, so code
// that needs it is not portable between schedules. Using it is a compile error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <tuple>

#include "cuda_types.h"
#include "intrinsics.h"

namespace simt {

// A defect found by the run (divergent barrier, deadlock, bad lane mask) or an invalid launch.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct SourceLine {
  const char* file;
  int line;
  SourceLine(const char* file_, int line_) : file(file_), line(line_) {}
};

// As a last parameter: the line of the caller, so that an error names the line of the kernel. With
// braces instead of a constructor call g++ would take the line of the declaration.
#define SIMT_HERE simt::SourceLine where = simt::SourceLine(__builtin_FILE(), __builtin_LINE())

// What a kernel may know about the running thread.
struct ThreadView {
  uint3 thread_index;
  uint3 block_index;
};

// One per OS thread; a fiber never moves to another OS thread.
struct Current {
  ThreadView* thread = nullptr;
  dim3 block_dim;
  dim3 grid_dim;
  size_t dynamic_shared_bytes = 0;
  int atomics_left = 0;  // until the scheduler takes the CPU away, see preemption_point
};
extern thread_local Current current;

enum class WarpOp : uint8_t {
  kNone,
  kSync,
  kShuffleIndex,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAll,
  kAny,
  kAdd,
  kMin,
  kMax,
  kAnd,
  kOr,
  kXor,
  kMatch
};

// --- implemented in collectives.cpp ---
int64_t barrier(bool predicate, SourceLine where);  // returns how many threads had a true predicate
uint64_t warp_op(WarpOp op, uint32_t mask, uint64_t value, uint32_t argument, uint32_t width,
                 SourceLine where);
void* shared_memory(const void* identity, size_t bytes);
void fence();

// --- implemented in scheduler.cpp ---
void spin(SourceLine where);      // lets the others run: called before each look at a flag
void released(SourceLine where);  // called after a flag was set: this is progress
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// Without this an atomic spin lock would never let its owner run, and threads would only ever be
// interrupted at barriers and collectives. The counter belongs to the scheduler: no race to report.
__attribute__((no_sanitize("thread"))) inline void preemption_point(SourceLine where) {
  if (--current.atomics_left < 0) spin(where);
}

template <class Array>
inline Array& shared_array(const void* identity) {
  return *static_cast<Array*>(shared_memory(identity, sizeof(Array)));
}

template <class T>
inline T* dynamic_shared() {
  return static_cast<T*>(shared_memory(&current, current.dynamic_shared_bytes));
}

// Arguments are converted to the parameter types and copied once, as a CUDA launch does.
template <class... Parameters, class... Arguments>
inline void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, Arguments... arguments) {
  const std::tuple<Parameters...> copied(arguments...);
  run_grid(grid, block, shared_bytes, [&] { std::apply(kernel, copied); });
}

// Values travel through a warp as 64 bits.
template <class T>
inline uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "a warp collective moves at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
inline T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

#define threadIdx (simt::current.thread->thread_index)
#define blockIdx (simt::current.thread->block_index)
#define blockDim (simt::current.block_dim)
#define gridDim (simt::current.grid_dim)
constexpr int warpSize = 32;

// --- block barriers and fences ---

inline void __syncthreads(SIMT_HERE) { simt::barrier(false, where); }
inline int __syncthreads_count(int predicate, SIMT_HERE) {
  return static_cast<int>(simt::barrier(predicate != 0, where));
}
inline int __syncthreads_or(int predicate, SIMT_HERE) {
  return simt::barrier(predicate != 0, where) > 0;
}
inline int __syncthreads_and(int predicate, SIMT_HERE) {
  return simt::barrier(predicate == 0, where) == 0;
}
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() { simt::fence(); }
inline void __nanosleep(unsigned, SIMT_HERE) { simt::spin(where); }

// --- warp collectives ---

inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_HERE) {
  simt::warp_op(simt::WarpOp::kSync, mask, 0, 0, 32, where);
}

#define SIMT_SHUFFLE(NAME, OP, ARGUMENT)                                                     \
  template <class T>                                                                         \
  inline T NAME(unsigned mask, T value, ARGUMENT argument, int width = 32, SIMT_HERE) {      \
    return simt::from_bits<T>(simt::warp_op(simt::WarpOp::OP, mask, simt::to_bits(value),    \
                                            static_cast<uint32_t>(argument), width, where)); \
  }
SIMT_SHUFFLE(__shfl_sync, kShuffleIndex, int)
SIMT_SHUFFLE(__shfl_up_sync, kShuffleUp, unsigned)
SIMT_SHUFFLE(__shfl_down_sync, kShuffleDown, unsigned)
SIMT_SHUFFLE(__shfl_xor_sync, kShuffleXor, int)
#undef SIMT_SHUFFLE

#define SIMT_VOTE(RESULT, NAME, OP)                                                   \
  inline RESULT NAME(unsigned mask, int predicate, SIMT_HERE) {                       \
    return static_cast<RESULT>(                                                       \
        simt::warp_op(simt::WarpOp::OP, mask, predicate != 0 ? 1 : 0, 0, 32, where)); \
  }
SIMT_VOTE(unsigned, __ballot_sync, kBallot)
SIMT_VOTE(int, __all_sync, kAll)
SIMT_VOTE(int, __any_sync, kAny)
#undef SIMT_VOTE

#define SIMT_REDUCE(TYPE, NAME, OP, FLIP)                                              \
  inline TYPE NAME(unsigned mask, TYPE value, SIMT_HERE) {                             \
    const uint32_t bits = static_cast<uint32_t>(value) ^ (FLIP);                       \
    const uint64_t result = simt::warp_op(simt::WarpOp::OP, mask, bits, 0, 32, where); \
    return static_cast<TYPE>(static_cast<uint32_t>(result) ^ (FLIP));                  \
  }
// Flipping the sign bit turns the order of int into that of unsigned.
SIMT_REDUCE(unsigned, __reduce_add_sync, kAdd, 0u)
SIMT_REDUCE(unsigned, __reduce_min_sync, kMin, 0u)
SIMT_REDUCE(unsigned, __reduce_max_sync, kMax, 0u)
SIMT_REDUCE(int, __reduce_add_sync, kAdd, 0u)
SIMT_REDUCE(int, __reduce_min_sync, kMin, 0x80000000u)
SIMT_REDUCE(int, __reduce_max_sync, kMax, 0x80000000u)
SIMT_REDUCE(unsigned, __reduce_and_sync, kAnd, 0u)
SIMT_REDUCE(unsigned, __reduce_or_sync, kOr, 0u)
SIMT_REDUCE(unsigned, __reduce_xor_sync, kXor, 0u)
#undef SIMT_REDUCE

template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, SIMT_HERE) {
  return static_cast<unsigned>(
      simt::warp_op(simt::WarpOp::kMatch, mask, simt::to_bits(value), 0, 32, where));
}

#include "atomics.h"
