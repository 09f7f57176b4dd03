// A fiber: a function with a stack of its own that gives up the OS thread only where it says so. One OS thread has one scheduler
// (whoever calls resume) and any number of fibers; between two fibers TSan sees no order that the kernel has not made.
#pragma once

#include <cstddef>

namespace pikv::sim {

// Stacks for `count` fibers, in one mapping; pages that are never touched cost nothing.
class Stacks {
 public:
  static constexpr size_t kBytes = 256 * 1024;  // of one stack; sanitizers make frames large
  explicit Stacks(int count);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  char* at(int index) const { return memory_ + static_cast<size_t>(index) * kBytes; }

 private:
  char* memory_;
  size_t bytes_;
};

class Fiber {
 public:
  // entry must not return; it ends by suspend(true).
  Fiber(char* stack, void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Scheduler's side: runs the fiber until it suspends.
  void resume();
  // Fiber's side: back to the scheduler; `last`: it will not be resumed again.
  void suspend(bool last);
  // Fiber's side, first thing in entry.
  static void entered();

 private:
  char* stack_;
  void* stack_pointer_;
  void* fake_stack_ = nullptr;   // ASan's
  void* tsan_fiber_ = nullptr;
};

}  // namespace pikv::sim
