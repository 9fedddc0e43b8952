// Leaving one stack and continuing on another: 15 lines of assembly on x86-64, ucontext elsewhere.
// ucontext works on every Linux CPU but makes two system calls per switch, which costs about 20
// times the assembly's few nanoseconds. -DSIMT_USE_UCONTEXT selects it on x86-64 too (build.py does
// so in a test, to keep it working).
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#define SIMT_USE_UCONTEXT
#endif

#ifdef SIMT_USE_UCONTEXT

#include <ucontext.h>

namespace simt {

using Context = ucontext_t;

// Makes the first switch to `context` call `entry` on the given stack. `entry` must not return.
inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

}  // namespace simt

#else

namespace simt {

struct Context {
  void* stack_pointer = nullptr;
};

// Saves the registers that a function must preserve (System V ABI) on the old stack, changes
// stacks, and restores them from the new one. The floating-point control words are not saved:
// kernels do not change them. Naked: the compiler must not touch the stack around this.
__attribute__((naked, noinline)) static void switch_stacks(
    [[maybe_unused]] void** save_old,   // rdi
    [[maybe_unused]] void* load_new) {  // rsi
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}

// Builds the stack that switch_stacks expects: six registers, then the address to return to.
inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // the return address of `entry`: ends a backtrace, and aligns as a call does
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; saved_register++) *--top = nullptr;
  context.stack_pointer = top;
}

inline void switch_context(Context& from, Context& to) {
  switch_stacks(&from.stack_pointer, to.stack_pointer);
}

}  // namespace simt

#endif
