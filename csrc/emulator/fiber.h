// A fiber: a stack of its own and the place where it was left. Knows what ASan and TSan must be told about a switch.
//
// FK_EMULATOR_TSAN: this build is linked with TSan. The emulator itself is compiled without -fsanitize=thread, so that
// TSan sees the kernels' accesses alone; hence a macro of our own.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(FK_EMULATOR_UCONTEXT)
#define FK_EMULATOR_UCONTEXT  // no hand-written switch for this CPU
#endif

#ifdef FK_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

#ifdef FK_EMULATOR_TSAN
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

namespace freezekit::emulator {

class Fiber {
 public:
  Fiber() = default;                // the fiber that the operating system's thread is, once it switches away
  explicit Fiber(void (*entry)());  // entry never returns
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves `from` (the running fiber) and goes on where this one was left. `from_ends`: it is never entered again.
  void enter(Fiber& from, bool from_ends = false);

 private:
  friend void fiber_started();
  void before_switch(Fiber& from, bool from_ends);
  void after_switch();

  char* memory_ = nullptr;  // stack with a guard page below it; null for the operating system's own
#ifdef FK_EMULATOR_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  void* fake_stack_ = nullptr;          // ASan's
  const void* stack_bottom_ = nullptr;  // ASan's idea of this stack
  size_t stack_size_ = 0;
  void* tsan_thread_ = nullptr;  // TSan's logical thread
};

// The first thing that an entry function calls.
void fiber_started();

}  // namespace freezekit::emulator
