// A grid's blocks one after another, what went wrong, and the seed.

#include <cxxabi.h>
#include <dlfcn.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>

#include "block.h"
#include "sanitizers.h"

namespace pikv::sim {
namespace {

thread_local uint64_t seed = 0, launches = 0;  // launches: since the seed was set
thread_local std::string last_error;
// An access that faulted: the byte of shared memory, and whether it was a write.
thread_local ptrdiff_t fault_offset;
thread_local bool fault_writes;
// Blocks take turns on two sets of fibers: TSan sees no order between neighbours, and fibers cost much under TSan.
thread_local std::unique_ptr<Fibers> fibers[2];

struct sigaction previous_action;

[[noreturn]] void end_faulty() {
  block->fail(std::string(fault_writes ? "writes" : "reads") + " byte " + std::to_string(fault_offset) +
              ", outside shared memory, which has " + std::to_string(block->shared.bytes()) + " bytes");
}

// An access to the pages around shared memory ends the kernel; any other fault is not ours.
void on_fault(int, siginfo_t* info, void* context) {
  if (!block || !block->shared.in_guard(info->si_addr)) {
    sigaction(SIGSEGV, &previous_action, nullptr);
    return;  // and the access faults again
  }
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  fault_offset = static_cast<unsigned char*>(info->si_addr) - block->shared.begin();
  fault_writes = registers[REG_ERR] & 2;
  constexpr greg_t kRedZone = 128;
  registers[REG_RSP] = ((registers[REG_RSP] - kRedZone) & ~greg_t{15}) - 8;  // as if end_faulty had been called
  registers[REG_RIP] = reinterpret_cast<greg_t>(&end_faulty);
}

// The fault handler, as long as a grid runs.
class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_action);
  }
  ~FaultHandler() { sigaction(SIGSEGV, &previous_action, nullptr); }
};

std::string kernel_name(const void* kernel) {
  const std::string symbol = symbol_of(kernel);
  int status = 0;
  char* demangled = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status);
  const std::string name = status == 0 ? demangled : symbol;
  std::free(demangled);
  return name.empty() ? "a kernel" : "kernel " + name;
}

bool fits(const Launch& launch) {
  constexpr unsigned kMostBlocks = 65535;  // in y and z
  constexpr uint64_t kMostThreads = 1024;
  constexpr size_t kMostShared = 227 * 1024;
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  return threads > 0 && threads <= kMostThreads && launch.shared_bytes <= kMostShared && launch.grid.x > 0 &&
         launch.grid.x <= 0x7fffffffu && launch.grid.y > 0 && launch.grid.y <= kMostBlocks && launch.grid.z > 0 &&
         launch.grid.z <= kMostBlocks;
}

}  // namespace

std::string symbol_of(const void* function) {
  Dl_info info;
  return dladdr(function, &info) && info.dli_sname && info.dli_saddr == function ? info.dli_sname : "";
}

cudaError_t refuse(const std::string& why) {
  last_error = why;
  return cudaErrorLaunchFailure;
}

cudaError_t run(const Launch& launch) {
  if (!fits(launch)) return cudaErrorInvalidConfiguration;
  const Unwatched books;
  const FaultHandler handler;
  Chance chance(seed ? seed + 0x9e3779b97f4a7c15u * launches++ : 0);
  std::vector<uint64_t> order(uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = 0; i + 1 < order.size() && chance.on(); ++i)
    std::swap(order[i], order[i + chance.below(static_cast<unsigned>(order.size() - i))]);
  const int threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
  for (auto& set : fibers)
    if (!set || set->count() < threads) set = std::make_unique<Fibers>(threads);
  release(&grid_begin);
  std::string error;
  for (size_t i = 0; i < order.size() && error.empty(); ++i) {
    const uint64_t x = order[i] % launch.grid.x, rest = order[i] / launch.grid.x;
    const uint3 index{static_cast<unsigned>(x), static_cast<unsigned>(rest % launch.grid.y),
                      static_cast<unsigned>(rest / launch.grid.y)};
    error = Block(launch, index, *fibers[i % 2], chance).run();
  }
  acquire(&grid_end);
  if (error.empty()) return cudaSuccess;
  for (auto& set : fibers) set.reset();  // some stopped midway
  return refuse(kernel_name(launch.kernel) + ": " + error);
}

}  // namespace pikv::sim

void pikv_sim_set_seed(uint64_t value) {
  pikv::sim::seed = value;
  pikv::sim::launches = 0;
}

const char* pikv_sim_last_error() { return pikv::sim::last_error.c_str(); }
