// The device that tensors are on, as the bindings ask for it. With PIKV_SIMULATED it is the simulator's: the CPU.
#pragma once

#if defined(PIKV_SIMULATED)

#include "../sim/device.h"

#else

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#define PIKV_DISPATCH_KEY CUDA

namespace pikv::cuda {

using torch::stable::Tensor;
using DeviceGuard = torch::stable::accelerator::DeviceGuard;

constexpr int kInvalidValue = cudaErrorInvalidValue;

inline bool on_one_device(const Tensor& x, const Tensor& y) {
  return x.is_cuda() && y.is_cuda() && x.get_device_index() == y.get_device_index();
}

inline void* current_stream(const Tensor& x) {
  StreamHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(x.get_device_index(), &handle));
  void* stream = nullptr;
  const auto status = torch_stream_native_handle(handle, &stream);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_delete_stream(handle));
  STABLE_TORCH_ERROR_CODE_CHECK(status);
  return stream;
}

inline const char* error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

// How many processors x's device has; 1 where CUDA does not say.
inline int processors(const Tensor& x) {
  int count = 1;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, x.get_device_index());
  return error == cudaSuccess ? count : 1;
}

}  // namespace pikv::cuda

#endif
