// A thread block's shared memory: filled with poison, with a page on either side that may not be touched. It lies
// against one of the two pages, so that one step too far on that side ends the kernel with an error; bytes between it
// and the other page are canaries that are looked at when the block has ended. Under ASan both sides are exact.
#pragma once

#include <cstddef>
#include <string>

namespace pikv::sim {

constexpr unsigned char kPoison = 0xff;  // NaN as float, float16 and bfloat16

class SharedMemory {
 public:
  SharedMemory(size_t bytes, bool against_end);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  unsigned char* begin() const { return begin_; }
  size_t bytes() const { return bytes_; }
  bool contains(const void* address, size_t bytes) const;
  bool in_guard(const void* address) const;
  // What was written outside, in words; empty: nothing.
  std::string damage() const;

 private:
  unsigned char *mapping_, *inner_, *begin_;
  size_t bytes_, inner_bytes_, mapping_bytes_;
};

}  // namespace pikv::sim
