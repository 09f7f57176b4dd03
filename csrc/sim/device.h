// What csrc/cuda/device.h offers, for the simulator: tensors of the CPU, no streams, and room for some thread blocks.
#pragma once

#include <torch/csrc/stable/tensor.h>

#define PIKV_DISPATCH_KEY CPU

extern "C" const char* pikv_sim_last_error();

namespace pikv::cuda {

using torch::stable::Tensor;

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

constexpr int kInvalidValue = 1;

inline bool on_one_device(const Tensor& x, const Tensor& y) { return x.is_cpu() && y.is_cpu(); }
inline void* current_stream(const Tensor&) { return nullptr; }
inline const char* error_text(int) { return pikv_sim_last_error(); }
inline int processors(const Tensor&) { return 4; }

}  // namespace pikv::cuda
