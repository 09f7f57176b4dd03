// Translated kernels and how a launcher finds them: by the linker's name of g++'s version of the same kernel.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>

#include "simulator.h"

namespace pikv::sim {

struct PtxKernel {
  const char* symbol;
  void (*body)(const void* parameters);
  size_t parameter_bytes;
};

// A kernel that can be found from now on; its translation makes one of these before main.
struct PtxRegistration {
  explicit PtxRegistration(const PtxKernel& kernel);
};

// A kernel's arguments as PTX lays them out: one after another, each at its own alignment.
class PtxParameters {
 public:
  template <class... Parameters>
  explicit PtxParameters(const Parameters&... parameters) {
    static_assert((sizeof(Parameters) + ... + 0) < kMost / 2);
    (add(parameters), ...);
  }
  const void* bytes() const { return bytes_; }
  size_t size() const { return size_; }

 private:
  template <class T>
  void add(const T& parameter) {
    size_ = (size_ + alignof(T) - 1) / alignof(T) * alignof(T);
    std::memcpy(bytes_ + size_, &parameter, sizeof(T));
    size_ += sizeof(T);
  }

  static constexpr size_t kMost = 4096;  // CUDA's limit
  alignas(16) unsigned char bytes_[kMost];
  size_t size_ = 0;
};

// As `run`, with the translation of launch.kernel in place of its body.
cudaError_t run_ptx(Launch launch, const PtxParameters& parameters);

}  // namespace pikv::sim
