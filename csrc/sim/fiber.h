// A fiber: a function with a stack of its own that gives up the OS thread only where it says so. One OS thread has one
// scheduler (whoever calls resume) and any number of fibers; between two fibers TSan sees no order that the kernel has
// not made.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace pikv::sim {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 * 1024;  // sanitizers make frames large
  explicit Fiber(char* stack);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Scheduler's side: makes the next resume begin entry, which must not return; it ends by suspend(true).
  void start(void (*entry)());
  // Scheduler's side: runs the fiber until it suspends.
  void resume();
  // Fiber's side: back to the scheduler; `last`: it will not be resumed before it is started anew.
  void suspend(bool last);
  // Fiber's side, first thing in entry.
  static void entered();

 private:
  char* stack_;
  void* stack_pointer_ = nullptr;
  void* fake_stack_ = nullptr;  // ASan's
  void* tsan_fiber_ = nullptr;
  bool idle_ = true;
};

// Fibers with their stacks, in one mapping; pages that are never touched cost nothing.
class Fibers {
 public:
  explicit Fibers(int count);
  ~Fibers();
  Fibers(const Fibers&) = delete;
  Fibers& operator=(const Fibers&) = delete;
  Fiber& at(int index) { return *fibers_[static_cast<size_t>(index)]; }
  int count() const { return static_cast<int>(fibers_.size()); }

 private:
  size_t bytes() const { return fibers_.size() * Fiber::kStackBytes; }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  char* memory_;
};

}  // namespace pikv::sim
