#include "shared_memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#include "sanitizers.h"

namespace pikv::sim {
namespace {

constexpr size_t kPage = 4096, kGuard = 16 * kPage;  // a guard wide enough for an index that is off by a row
constexpr size_t kAlignment = 16;
constexpr unsigned char kCanary = 0xa5;

}  // namespace

SharedMemory::SharedMemory(size_t bytes, bool against_end) : bytes_(bytes) {
  const size_t aligned = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  inner_bytes_ = (aligned + kPage - 1) / kPage * kPage;
  mapping_bytes_ = inner_bytes_ + 2 * kGuard;
  void* mapping = mmap(nullptr, mapping_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) std::abort();
  mapping_ = static_cast<unsigned char*>(mapping);
  inner_ = mapping_ + kGuard;
  begin_ = against_end ? inner_ + inner_bytes_ - aligned : inner_;
  if (inner_bytes_ == 0) return;
  if (mprotect(inner_, inner_bytes_, PROT_READ | PROT_WRITE) != 0) std::abort();
  for (unsigned char* p = inner_; p != inner_ + inner_bytes_; ++p)
    *p = p >= begin_ && p < begin_ + bytes_ ? kPoison : kCanary;
  forbid(inner_, static_cast<size_t>(begin_ - inner_));
  forbid(begin_ + bytes_, static_cast<size_t>(inner_ + inner_bytes_ - begin_ - bytes_));
}

SharedMemory::~SharedMemory() {
  allow(mapping_, mapping_bytes_);
  munmap(mapping_, mapping_bytes_);
}

bool SharedMemory::contains(const void* address, size_t bytes) const {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address), first = reinterpret_cast<uintptr_t>(begin_);
  return at >= first && at - first <= bytes_ && bytes <= bytes_ - (at - first);
}

bool SharedMemory::in_guard(const void* address) const {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address), first = reinterpret_cast<uintptr_t>(mapping_);
  const uintptr_t inner = reinterpret_cast<uintptr_t>(inner_);
  return at >= first && at < first + mapping_bytes_ && (at < inner || at >= inner + inner_bytes_);
}

std::string SharedMemory::damage() const {
  for (const unsigned char* p = inner_; p != inner_ + inner_bytes_; ++p) {
    const ptrdiff_t offset = p - begin_;
    if ((offset < 0 || offset >= static_cast<ptrdiff_t>(bytes_)) && *p != kCanary)
      return "byte " + std::to_string(offset) + " of shared memory was written, which has " + std::to_string(bytes_) +
             " bytes";
  }
  return "";
}

}  // namespace pikv::sim
