// Everything AddressSanitizer and ThreadSanitizer have to be told, in one place. In a plain build
// all of it is empty.
//
// ASan must know which stack is in use. TSan must see every CUDA thread as a thread of its own,
// ordered with the others only by what orders them on the card: __syncthreads, __syncwarp, fences,
// acquire/release, and the start and end of the grid. So the runtime is compiled WITHOUT
// -fsanitize=thread (build.py defines SIMT_TSAN instead) and tells TSan about each order
// explicitly.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef SIMT_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_atomic8_store(volatile char*, char, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif

namespace simt::sanitizer {

// With TSan, a fiber that runs a second CUDA thread keeps the identity of the first, and races
// between the two are not seen. So a fiber is used again only when more than this many are idle.
#ifdef SIMT_TSAN
constexpr size_t kFibersInRotation = 1024;
#else
constexpr size_t kFibersInRotation = 0;
#endif

// A point through which one group of threads publishes its writes to another.
class Clock {
 public:
#ifdef SIMT_TSAN
  void release() { __tsan_release(&address_); }
  void acquire() { __tsan_acquire(&address_); }
  // A release store replaces what was published before, where __tsan_release adds to it. Needed
  // when a block slot is reused: the next CUDA block is not ordered after the last one.
  void forget() { __tsan_atomic8_store(&address_, 0, __ATOMIC_RELEASE); }
#else
  void release() {}
  void acquire() {}
  void forget() {}
#endif

 private:
  [[maybe_unused]] alignas(8) char address_ = 0;  // its address is what TSan knows it by
};

// Allocating and freeing shared memory is the scheduler's doing, not an access by a CUDA thread.
class IgnoreWrites {
 public:
#ifdef SIMT_TSAN
  IgnoreWrites() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~IgnoreWrites() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
#else
  IgnoreWrites() {}
  ~IgnoreWrites() {}
#endif
  IgnoreWrites(const IgnoreWrites&) = delete;
};

// --- identities of fibers (TSan) ---

inline void* identity_of_os_thread() {
#ifdef SIMT_TSAN
  return __tsan_get_current_fiber();
#else
  return nullptr;
#endif
}

inline void* create_identity() {
#ifdef SIMT_TSAN
  return __tsan_create_fiber(0);
#else
  return nullptr;
#endif
}

inline void destroy_identity([[maybe_unused]] void* identity) {
#ifdef SIMT_TSAN
  __tsan_destroy_fiber(identity);
#endif
}

// --- switches between stacks ---

// Called on the old stack. `fake_stack` keeps what ASan needs on the way back.
inline void before_switch([[maybe_unused]] void** fake_stack,
                          [[maybe_unused]] const void* new_stack,
                          [[maybe_unused]] size_t new_stack_bytes,
                          [[maybe_unused]] void* new_identity) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, new_stack, new_stack_bytes);
#endif
#ifdef SIMT_TSAN
  // "No sync": a switch orders nothing, or no race between fibers would ever be seen.
  __tsan_switch_to_fiber(new_identity, __tsan_switch_to_fiber_no_sync);
#endif
}

// Called first on the new stack. Reports the bounds of the stack that was left.
inline void after_switch([[maybe_unused]] void* fake_stack,
                         [[maybe_unused]] const void** left_stack,
                         [[maybe_unused]] size_t* left_stack_bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, left_stack, left_stack_bytes);
#endif
}

// A stack abandoned in the middle of a function is still poisoned; its address will be used again.
inline void forget_stack([[maybe_unused]] void* stack, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, bytes);
#endif
}

}  // namespace simt::sanitizer
