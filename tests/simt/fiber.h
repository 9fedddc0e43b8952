// Fibers: stacks that can be left and continued. One runs one CUDA thread at a time.
#pragma once

#include <cstddef>
#include <deque>

#include "context_switch.h"

namespace simt {

struct Thread;

struct Fiber {
  Context context;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // ASan's bookkeeping while the fiber is not running
  void* identity = nullptr;    // TSan's thread
};

// Leaves `from` and continues `to`; returns when something switches back to `from`.
void switch_fiber(Fiber& from, Fiber& to);

// The fibers of one OS thread, kept from launch to launch.
class FiberPool {
 public:
  // `entry` runs on each new fiber, calls `on_new_stack` first, and never returns.
  explicit FiberPool(void (*entry)());
  ~FiberPool();
  FiberPool(const FiberPool&) = delete;

  Fiber* take();
  void give_back(Fiber* fiber);
  void destroy(Fiber* fiber);  // one that was abandoned in the middle of a kernel
  void on_new_stack();

  Fiber host;  // the OS thread's own stack, where the scheduler runs

 private:
  Fiber* create();

  void (*entry_)();
  std::deque<Fiber*> idle_;
};

}  // namespace simt
