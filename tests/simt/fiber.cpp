#include "fiber.h"

#include <sys/mman.h>

#include <new>

#include "sanitizers.h"

namespace simt {

namespace {

// Enough for a kernel with large local arrays under ASan. Only the pages that are touched cost
// memory.
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes =
    64 * 1024;  // a multiple of every page size in use (aarch64: up to 64K)

}  // namespace

void switch_fiber(Fiber& from, Fiber& to) {
  sanitizer::before_switch(&from.fake_stack, to.stack, to.stack_bytes, to.identity);
  switch_context(from.context, to.context);
  sanitizer::after_switch(from.fake_stack, nullptr, nullptr);
}

FiberPool::FiberPool(void (*entry)()) : entry_(entry) {
  host.identity = sanitizer::identity_of_os_thread();
}

FiberPool::~FiberPool() {
  for (Fiber* fiber : idle_) destroy(fiber);
}

void FiberPool::on_new_stack() {
  // We come from the scheduler, so this is where its stack is learnt; switches back need it.
  sanitizer::after_switch(nullptr, &host.stack, &host.stack_bytes);
}

Fiber* FiberPool::create() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);  // a stack overflow faults instead of corrupting memory
  char* stack = static_cast<char*>(memory) + kGuardBytes;

  Fiber* fiber = new Fiber;
  fiber->stack = stack;
  fiber->stack_bytes = kStackBytes;
  fiber->identity = sanitizer::create_identity();
  prepare_context(fiber->context, stack, kStackBytes, entry_);
  return fiber;
}

void FiberPool::destroy(Fiber* fiber) {
  char* stack = static_cast<char*>(const_cast<void*>(fiber->stack));
  sanitizer::destroy_identity(fiber->identity);
  sanitizer::forget_stack(stack, fiber->stack_bytes);
  munmap(stack - kGuardBytes, kGuardBytes + kStackBytes);
  delete fiber;
}

// Last in, first out keeps one warm stack in use when threads never wait. TSan needs the opposite:
// the fiber that has been idle longest, and only when many are idle, so that CUDA threads of
// neighbouring blocks never share an identity.
Fiber* FiberPool::take() {
  if (idle_.size() <= sanitizer::kFibersInRotation) return create();
  const bool rotate = sanitizer::kFibersInRotation > 0;
  Fiber* fiber = rotate ? idle_.front() : idle_.back();
  rotate ? idle_.pop_front() : idle_.pop_back();
  return fiber;
}

void FiberPool::give_back(Fiber* fiber) { idle_.push_back(fiber); }

}  // namespace simt
