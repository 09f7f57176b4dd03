#include "block.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

#include "sanitizers.h"

namespace pikv::sim {

thread_local Block* block = nullptr;

namespace {

std::string triple(uint3 x) {
  return "(" + std::to_string(x.x) + ", " + std::to_string(x.y) + ", " + std::to_string(x.z) + ")";
}

std::string name(const Thread& thread) { return "thread " + triple(thread.index); }

std::string text(Operation operation, Site site) {
  static const char* const kNames[] = {"__syncthreads", "__syncwarp", "a shuffle", "a vote"};
  return std::string(kNames[static_cast<int>(operation)]) + " (" + site.file + ":" + std::to_string(site.line) + ")";
}

std::string hex(unsigned mask) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "0x%08x", mask);
  return digits;
}

void enter() {
  Fiber::entered();
  acquire(&grid_begin);
  block->launch.body(block->launch.parameters);
  block->exit();
}

}  // namespace

Block::Block(const Launch& launch, uint3 index, Fibers& fibers, Chance& chance)
    : launch(launch), index(index), shared(launch.shared_bytes, chance.below(2) == 0), chance_(chance) {
  const int count = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  for (int i = 0; i < count; ++i) {
    const unsigned x = static_cast<unsigned>(i) % launch.block.x, rest = static_cast<unsigned>(i) / launch.block.x;
    fibers.at(i).start(enter);
    threads_.push_back(
        std::make_unique<Thread>(fibers.at(i), i, uint3{x, rest % launch.block.y, rest / launch.block.y}));
  }
  open_.resize((threads_.size() + kLanes - 1) / kLanes);
  in_flight_.resize(launch.shared_bytes / kWord + 1);
  barrier_ = std::make_shared<Meeting>(Operation::kBarrier, 0u, Site{"", 0});
}

std::string Block::run() {
  block = this;
  const int warps = static_cast<int>(open_.size());
  std::vector<int> ready;
  while (error_.empty()) {
    ready.clear();
    for (int warp = 0; warp < warps; ++warp)
      if (has_ready(warp)) ready.push_back(warp);
    if (!ready.empty())
      run_warp(ready[chance_.below(static_cast<unsigned>(ready.size()))]);
    else if (std::all_of(threads_.begin(), threads_.end(),
                         [](auto& thread) { return thread->state == State::kExited; }))
      break;
    else
      release_barrier();
  }
  if (error_.empty()) error_ = shared.damage();
  block = nullptr;
  return error_.empty() ? "" : "block " + triple(index) + ", " + error_;
}

bool Block::has_ready(int warp) const {
  const size_t end = std::min(threads_.size(), static_cast<size_t>(warp + 1) * kLanes);
  for (size_t i = static_cast<size_t>(warp) * kLanes; i < end; ++i)
    if (threads_[i]->state == State::kReady) return true;
  return false;
}

// Runs a warp until all of it waits or, now and then, not quite so far: warps that run ahead of each other show missing
// barriers.
void Block::run_warp(int warp) {
  int order[kLanes];
  std::iota(order, order + kLanes, warp * kLanes);
  do {
    for (int i = 0; i < kLanes; ++i) {
      if (chance_.on())
        std::swap(order[i], order[i + static_cast<int>(chance_.below(static_cast<unsigned>(kLanes - i)))]);
      if (order[i] >= static_cast<int>(threads_.size()) ||
          threads_[static_cast<size_t>(order[i])]->state != State::kReady)
        continue;
      current_ = threads_[static_cast<size_t>(order[i])].get();
      current_->fiber.resume();
      if (!error_.empty()) return;
    }
  } while (has_ready(warp) && !chance_.once_in(8));
}

// No thread can go on: a barrier that all have reached, or an error.
void Block::release_barrier() {
  const Thread* first = threads_[0].get();
  for (const auto& thread : threads_) {
    if (thread->state != State::kAtBarrier ||
        (first->state == State::kAtBarrier && first->meeting->site != thread->meeting->site)) {
      error_ = stuck();
      return;
    }
  }
  barrier_ = std::make_shared<Meeting>(Operation::kBarrier, 0u, Site{"", 0});
  for (const auto& thread : threads_) thread->state = State::kReady;
}

std::string Block::where(const Thread& thread) const {
  if (thread.state == State::kExited) return name(thread) + " has exited";
  return name(thread) + " waits at " + text(thread.meeting->operation, thread.meeting->site);
}

// Why no thread can go on.
std::string Block::stuck() const {
  for (const auto& thread : threads_) {
    if (thread->state != State::kInWarp) continue;
    const Meeting& meeting = *thread->meeting;
    const int lane = std::countr_zero(meeting.mask & ~meeting.arrived);
    const size_t missing = static_cast<size_t>(thread->linear / kLanes * kLanes + lane);
    const std::string begin = where(*thread) + " with mask " + hex(meeting.mask) + " for lane " + std::to_string(lane);
    if (missing >= threads_.size()) return "lanes missing from a warp operation: " + begin + ", which does not exist";
    return "lanes missing from a warp operation: " + begin + ", but " + where(*threads_[missing]);
  }
  const Thread* waiting = nullptr;
  for (const auto& thread : threads_)
    if (thread->state == State::kAtBarrier) waiting = thread.get();
  for (const auto& thread : threads_) {
    if (thread->state == State::kExited) return "divergent barrier: " + where(*waiting) + " after " + where(*thread);
    if (thread->meeting->site != waiting->meeting->site)
      return "divergent barrier: " + where(*waiting) + ", but " + where(*thread);
  }
  return "deadlock: " + where(*waiting);
}

void Block::suspend(State state) {
  current_->state = state;
  current_->fiber.suspend(false);
}

void Block::exit() {
  current_->state = State::kExited;
  release(&grid_end);
  current_->fiber.suspend(true);
  __builtin_unreachable();
}

void Block::fail(const std::string& what) {
  unwatch();  // for good: the fiber is given up here
  error_ = name(*current_) + ": " + what;
  current_->fiber.suspend(false);
  __builtin_unreachable();
}

void Block::barrier(Site site) {
  const Unwatched books;
  // The site is the thread's own, the order that TSan sees is the barrier's.
  const std::shared_ptr<Meeting> barrier = barrier_;
  current_->meeting = std::make_shared<Meeting>(Operation::kBarrier, 0u, site);
  release(barrier.get());
  suspend(State::kAtBarrier);
  acquire(barrier.get());
}

std::shared_ptr<Meeting> Block::meet(Operation operation, unsigned mask, uint64_t value, Site site) {
  const Unwatched books;
  const int lane = current_->linear % kLanes;
  if (!(mask >> lane & 1))
    fail("lane " + std::to_string(lane) + " is not in its own mask " + hex(mask) + " of " + text(operation, site));
  auto& open = open_[static_cast<size_t>(current_->linear / kLanes)];
  auto found = std::find_if(open.begin(), open.end(), [&](const auto& other) {
    return other->operation == operation && other->mask == mask && other->site == site && !(other->arrived >> lane & 1);
  });
  if (found == open.end()) found = open.insert(open.end(), std::make_shared<Meeting>(operation, mask, site));
  const std::shared_ptr<Meeting> meeting = *found;
  meeting->arrived |= 1u << lane;
  meeting->values[lane] = value;
  if (operation == Operation::kWarpBarrier) release(meeting.get());
  if (meeting->arrived == mask) {
    open.erase(found);
    const size_t first = static_cast<size_t>(current_->linear / kLanes * kLanes);
    for (int i = 0; i < kLanes; ++i)
      if (mask >> i & 1) threads_[first + static_cast<size_t>(i)]->state = State::kReady;
  } else {
    current_->meeting = meeting;
    suspend(State::kInWarp);
  }
  if (operation == Operation::kWarpBarrier) acquire(meeting.get());
  return meeting;
}

void Block::copy_async(void* to, const void* from, int bytes) {
  if (!shared.contains(to, static_cast<size_t>(bytes)))
    fail("cp.async writes " + std::to_string(bytes) + " bytes outside shared memory");
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % static_cast<unsigned>(bytes))
    fail("cp.async of " + std::to_string(bytes) + " bytes is misaligned");
  const Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, current_->group};
  std::memset(to, kPoison, static_cast<size_t>(bytes));
  if (chance_.once_in(2)) {
    arrive(copy);
    return;
  }
  const Unwatched books;
  current_->copies.push_back(copy);
  mark(copy, true);
  forbid(to, static_cast<size_t>(bytes));
}

void Block::copy_async_wait(unsigned pending) {
  auto& copies = current_->copies;
  const auto due = [&](const Copy& copy) { return copy.group + pending < current_->group; };
  for (const Copy& copy : copies)
    if (due(copy)) arrive(copy);
  std::erase_if(copies, due);
}

void Block::arrive(const Copy& copy) {
  allow(copy.to, static_cast<size_t>(copy.bytes));
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  mark(copy, false);
}

void Block::mark(const Copy& copy, bool in_flight) {
  const size_t first = static_cast<size_t>(copy.to - shared.begin()) / kWord,
               count = static_cast<size_t>(copy.bytes) / kWord;
  for (size_t i = first; i < first + count; ++i) in_flight_[i] = in_flight;
}

void Block::memory_access(uint64_t address, int bytes, const char* what) {
  if (address & static_cast<unsigned>(bytes - 1))
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes is misaligned");
  if (!chance_.on()) return;
  if (current_->until_yield == 0) {
    current_->until_yield = 1 + chance_.below(64);
    suspend(State::kReady);
  }
  --current_->until_yield;
}

unsigned char* Block::global_access(uint64_t address, int bytes, const char* what) {
  memory_access(address, bytes, what);
  return reinterpret_cast<unsigned char*>(address);
}

unsigned char* Block::shared_access(uint64_t offset, int bytes, const char* what) {
  memory_access(offset, bytes, what);
  const auto place = [&] {
    return std::string(what) + " of " + std::to_string(bytes) + " bytes at byte " + std::to_string(offset);
  };
  if (offset > shared.bytes() || static_cast<size_t>(bytes) > shared.bytes() - offset)
    fail(place() + " is outside shared memory, which has " + std::to_string(shared.bytes()) + " bytes");
  for (size_t i = offset / kWord; i * kWord < offset + static_cast<size_t>(bytes); ++i)
    if (in_flight_[i]) fail(place() + " of shared memory, which cp.async has not filled yet");
  return shared.begin() + offset;
}

// ---- What simulator.h promises, for the thread that runs.

const uint3& thread_index() { return block->current().index; }
const uint3& block_index() { return block->index; }
const dim3& block_size() { return block->launch.block; }
const dim3& grid_size() { return block->launch.grid; }
unsigned char* shared_memory() { return block->shared.begin(); }
int lane() { return block->current().linear % kLanes; }

void block_barrier(Site site) { block->barrier(site); }
void warp_barrier(unsigned mask, Site site) { block->meet(Operation::kWarpBarrier, mask, 0, site); }

uint64_t shuffle(unsigned mask, uint64_t value, int source_lane, Site site) {
  const Unwatched books;
  const auto meeting = block->meet(Operation::kShuffle, mask, value, site);
  if (!(mask >> source_lane & 1))
    block->fail("a shuffle with mask " + hex(mask) + " reads lane " + std::to_string(source_lane) +
                ", which is not in it");
  return meeting->values[source_lane];
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
  const Unwatched books;
  const auto meeting = block->meet(Operation::kBallot, mask, predicate, site);
  unsigned votes = 0;
  for (int i = 0; i < kLanes; ++i) votes |= static_cast<unsigned>(meeting->values[i]) << i;
  return votes;
}

void copy_async(void* shared, const void* global, int bytes) { block->copy_async(shared, global, bytes); }
void copy_async_commit() { ++block->current().group; }
void copy_async_wait(unsigned pending) { block->copy_async_wait(pending); }
unsigned char* global_access(uint64_t address, int bytes, const char* what) {
  return block->global_access(address, bytes, what);
}
unsigned char* shared_access(uint64_t offset, int bytes, const char* what) {
  return block->shared_access(offset, bytes, what);
}
void fail(const std::string& what) { block->fail(what); }

}  // namespace pikv::sim
