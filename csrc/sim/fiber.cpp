// Fibers by hand: callee-saved registers go onto the stack, the stack pointer is exchanged. x86-64 System V only.

#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#include "sanitizers.h"

#if !defined(__x86_64__)
#error "the simulator switches stacks in x86-64 assembly; another machine needs its own pikv_sim_switch"
#endif

extern "C" void pikv_sim_switch(void** from, void* to);
asm(R"(
.text
.globl pikv_sim_switch
.hidden pikv_sim_switch
.type pikv_sim_switch, @function
pikv_sim_switch:
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
.size pikv_sim_switch, .-pikv_sim_switch
)");

namespace pikv::sim {
namespace {

struct Scheduler {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  void* tsan_fiber = nullptr;
};
thread_local Scheduler scheduler;

constexpr int kSavedRegisters = 6;
[[maybe_unused]] constexpr unsigned kNoOrder = 1;  // a switch makes no happens-before

}  // namespace

Fiber::Fiber(char* stack) : stack_(stack) {
#if defined(PIKV_SIM_TSAN)
  tsan_fiber_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
#if defined(PIKV_SIM_TSAN)
  if (idle_) __tsan_destroy_fiber(tsan_fiber_);  // TSan complains of one that was given up midway
#endif
}

void Fiber::start(void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes);  // aligned to 16, since stacks are whole pages
  *--top = nullptr;                                             // entry's return address: it never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
  fake_stack_ = nullptr;
  idle_ = false;
}

void Fiber::resume() {
#if defined(PIKV_SIM_ASAN)
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, stack_, kStackBytes);
#endif
#if defined(PIKV_SIM_TSAN)
  scheduler.tsan_fiber = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_fiber_, kNoOrder);
#endif
  pikv_sim_switch(&scheduler.stack_pointer, stack_pointer_);
#if defined(PIKV_SIM_ASAN)
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

void Fiber::suspend(bool last) {
  idle_ = last;
#if defined(PIKV_SIM_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, scheduler.bottom, scheduler.size);
#endif
#if defined(PIKV_SIM_TSAN)
  __tsan_switch_to_fiber(scheduler.tsan_fiber, kNoOrder);
#endif
  pikv_sim_switch(&stack_pointer_, scheduler.stack_pointer);
#if defined(PIKV_SIM_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::entered() {
#if defined(PIKV_SIM_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.size);
#endif
}

Fibers::Fibers(int count) {
  const size_t bytes = static_cast<size_t>(count) * Fiber::kStackBytes;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  memory_ = static_cast<char*>(memory);
  for (int i = 0; i < count; ++i)
    fibers_.push_back(std::make_unique<Fiber>(memory_ + static_cast<size_t>(i) * Fiber::kStackBytes));
}

Fibers::~Fibers() {
  allow(memory_, bytes());  // a fiber that was given up leaves redzones behind
  munmap(memory_, bytes());
}

}  // namespace pikv::sim
