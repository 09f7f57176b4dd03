// One thread block at work: its threads, its shared memory, who waits for what. Internal to the simulator.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"
#include "simulator.h"

namespace pikv::sim {

constexpr int kLanes = 32;
constexpr size_t kWord = 4;  // bytes: no copy is smaller

// Chance as the seed has it; seed 0 has none.
class Chance {
 public:
  explicit Chance(uint64_t seed) : on_(seed != 0), generator_(seed) {}
  bool on() const { return on_; }
  // One time in `times`; never with seed 0.
  bool once_in(unsigned times) { return on_ && generator_() % times == 0; }
  unsigned below(unsigned limit) { return on_ ? static_cast<unsigned>(generator_() % limit) : 0; }

 private:
  bool on_;
  std::mt19937_64 generator_;
};

enum class State : char { kReady, kAtBarrier, kInWarp, kExited };
enum class Operation : char { kBarrier, kWarpBarrier, kShuffle, kBallot };

// Threads that wait for each other.
struct Meeting {
  Operation operation;
  unsigned mask;  // of lanes, for warp operations
  Site site;
  unsigned arrived = 0;
  uint64_t values[kLanes] = {};
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
  unsigned group;
};

struct Thread {
  Thread(Fiber& fiber, int linear, uint3 index) : fiber(fiber), linear(linear), index(index) {}
  Fiber& fiber;
  int linear;
  uint3 index;
  State state = State::kReady;
  std::shared_ptr<Meeting> meeting;  // of the thread that waits
  std::vector<Copy> copies;
  unsigned group = 0;        // of the next copy
  unsigned until_yield = 0;  // memory accesses
};

class Block {
 public:
  Block(const Launch& launch, uint3 index, Fibers& fibers, Chance& chance);
  // Runs every thread to its end, or one to an error: what was wrong, or "".
  std::string run();

  // For the thread that runs.
  Thread& current() { return *current_; }
  void barrier(Site site);
  std::shared_ptr<Meeting> meet(Operation operation, unsigned mask, uint64_t value, Site site);
  void copy_async(void* shared, const void* global, int bytes);
  void copy_async_wait(unsigned pending);
  unsigned char* global_access(uint64_t address, int bytes, const char* what);
  unsigned char* shared_access(uint64_t offset, int bytes, const char* what);
  [[noreturn]] void fail(const std::string& what);
  [[noreturn]] void exit();

  const Launch launch;
  const uint3 index;
  SharedMemory shared;

 private:
  void run_warp(int warp);
  bool has_ready(int warp) const;
  void release_barrier();
  void suspend(State state);
  void memory_access(uint64_t address, int bytes, const char* what);
  void arrive(const Copy& copy);
  void mark(const Copy& copy, bool in_flight);
  std::string stuck() const;
  std::string where(const Thread& thread) const;

  Chance& chance_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<std::vector<std::shared_ptr<Meeting>>> open_;  // warp operations that wait for lanes, by warp
  std::shared_ptr<Meeting> barrier_;                         // that the next thread to come waits at
  std::vector<char> in_flight_;                              // words of shared memory that a copy has yet to fill
  Thread* current_ = nullptr;
  std::string error_;
};

// The block that this OS thread runs.
extern thread_local Block* block;
// TSan's: what the launch's caller did happens before what blocks do, and that before what the caller does next.
inline char grid_begin, grid_end;

}  // namespace pikv::sim
