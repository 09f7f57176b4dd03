// What a simulated kernel may ask of the simulator; runtime.h gives it CUDA's names and ptx.h PTX's.
//
// The threads of a block are fibers on one OS thread. They change places at barriers, warp operations and, where the
// kernel is translated PTX, between memory accesses, in an order that the seed chooses. The blocks of a grid run one
// after another, in an order that the seed chooses too; TSan is told that nothing orders them. A kernel that breaks a
// rule ends at once: the launch returns cudaErrorLaunchFailure and pikv_sim_last_error says which thread did what.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "types.h"

namespace pikv::sim {

// Where a kernel is: a source line, or for PTX an instruction's number.
struct Site {
  const char* file;
  unsigned line;
  bool operator==(const Site&) const = default;
};

struct Launch {
  const void* kernel;  // its address, which gives its name
  void (*body)(const void* parameters);
  const void* parameters;
  dim3 grid, block;
  size_t shared_bytes;
};
cudaError_t run(const Launch& launch);
// A launch that cannot begin: remembers why.
cudaError_t refuse(const std::string& why);

// A fiber's own place; constant as long as a kernel's function can see.
[[gnu::const]] const uint3& thread_index();
[[gnu::const]] const uint3& block_index();
[[gnu::const]] const dim3& block_size();
[[gnu::const]] const dim3& grid_size();
[[gnu::const]] unsigned char* shared_memory();
int lane();  // of the thread in its warp

void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);
// Warp operations order no memory.
uint64_t shuffle(unsigned mask, uint64_t value, int source_lane, Site site);
unsigned ballot(unsigned mask, bool predicate, Site site);

// A copy to shared memory that arrives at once or not before its group is waited for, as the seed has it. Until then
// there is poison.
void copy_async(void* shared, const void* global, int bytes);
void copy_async_commit();
void copy_async_wait(unsigned pending);

// Translated PTX alone: a memory access, at which another thread may have its turn. Fails if misaligned, or in shared
// memory (by offset) out of bounds or not yet filled by a copy.
unsigned char* global_access(uint64_t address, int bytes, const char* what);
unsigned char* shared_access(uint64_t offset, int bytes, const char* what);

// Ends the kernel with an error.
[[noreturn]] void fail(const std::string& what);
// The linker's name of a function of this library, "" where it has none.
std::string symbol_of(const void* function);

}  // namespace pikv::sim

extern "C" {
// Seed 0: threads and blocks in order, copies as late as they may be. Any other: a random order of everything,
// repeatable.
void pikv_sim_set_seed(uint64_t seed);
// What ended the last kernel that failed; "" before.
const char* pikv_sim_last_error();
}
