// prefetch: asks for the lines of listed rows to be brought into L2; nothing is read or written.

#include "warp.cuh"

namespace pikv::cuda {

constexpr int kLineBytes = 128;

__global__ void __launch_bounds__(kThreads)
    prefetch_kernel(const unsigned char* base, int64_t row_bytes, const int64_t* ids) {
  const unsigned char* row = base + ids[blockIdx.x] * row_bytes;
  for (int64_t at = static_cast<int64_t>(threadIdx.x) * kLineBytes; at < row_bytes; at += kThreads * kLineBytes)
    prefetch_l2(row + at);
}

extern "C" int pikv_cuda_prefetch(const void* base, int64_t row_bytes, const int64_t* ids, int64_t count,
                                  void* stream) {
  if (count == 0 || row_bytes == 0) return cudaSuccess;
  return launch(prefetch_kernel, dim3(static_cast<unsigned>(count)), kThreads, 0, static_cast<cudaStream_t>(stream),
                static_cast<const unsigned char*>(base), row_bytes, ids);
}

}  // namespace pikv::cuda
