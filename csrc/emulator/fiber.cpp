#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#include "emulator/tsan.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef FK_EMULATOR_UCONTEXT
// Pushes the registers that the System V x86-64 ABI makes a callee keep, and swaps stacks.
extern "C" void freezekit_switch_stack(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.globl freezekit_switch_stack
.hidden freezekit_switch_stack
.type freezekit_switch_stack, @function
freezekit_switch_stack:
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
.size freezekit_switch_stack, .-freezekit_switch_stack
)");
#endif

namespace freezekit::emulator {
namespace {

// Kernels keep little on the stack. ASan pads what they keep; TSan fills four bytes of its own for each byte of a new stack.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

Fiber* left_last = nullptr;     // the fiber that the running one was entered from
Fiber* entered_last = nullptr;  // the running one

}  // namespace

Fiber::Fiber(void (*entry)()) {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  mprotect(memory_, guard, PROT_NONE);
  stack_bottom_ = memory_ + guard;
  stack_size_ = kStackBytes;
#ifdef FK_EMULATOR_TSAN
  tsan_thread_ = tsan_create_thread();
#endif
#ifdef FK_EMULATOR_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = memory_ + guard;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  // Stacks that all begin at the same place in a page would fight for the same lines of the cache.
  static unsigned made = 0;
  const size_t colour = made++ % 16 * 256;
  // As freezekit_switch_stack leaves a stack: six registers, then where to return to; a null return address above it
  // ends backtraces and makes the stack pointer 8 modulo 16, as at any function's entry.
  void** top = reinterpret_cast<void**>(memory_ + guard + kStackBytes - colour);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  stack_pointer_ = top;
#endif
}

Fiber::~Fiber() {
  if (!memory_) return;
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(stack_bottom_, stack_size_);  // frames that a failed launch left behind
#endif
#ifdef FK_EMULATOR_TSAN
  tsan_destroy_thread(tsan_thread_);
#endif
  munmap(memory_, static_cast<size_t>(sysconf(_SC_PAGESIZE)) + kStackBytes);
}

void Fiber::before_switch([[maybe_unused]] Fiber& from, [[maybe_unused]] bool from_ends) {
  left_last = &from;
  entered_last = this;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack_, stack_bottom_, stack_size_);
#endif
#ifdef FK_EMULATOR_TSAN
  if (!from.memory_) from.tsan_thread_ = tsan_current_thread();
  tsan_switch_thread(tsan_thread_);
#endif
}

void Fiber::after_switch() {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
  if (!left_last->memory_) {  // learns where the operating system's stack is
    left_last->stack_bottom_ = bottom;
    left_last->stack_size_ = size;
  }
#endif
}

void Fiber::enter(Fiber& from, bool from_ends) {
  before_switch(from, from_ends);
#ifdef FK_EMULATOR_UCONTEXT
  swapcontext(&from.context_, &context_);
#else
  freezekit_switch_stack(&from.stack_pointer_, stack_pointer_);
#endif
  from.after_switch();
}

void fiber_started() { entered_last->after_switch(); }

}  // namespace freezekit::emulator
