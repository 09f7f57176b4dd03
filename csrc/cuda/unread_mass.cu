// unread_mass: two log-sums-exp a row over the tokens that are not read, one thread block a row.

#include "log_sum.cuh"

namespace pikv::cuda {

// Grid: rows of all KV heads.
__global__ void __launch_bounds__(kThreads)
    unread_mass_kernel(const float* coarse, float slope, const float* spread, const float* radius, const bool* read,
                       int64_t rows, int64_t blocks, int64_t block_size, float* by_spread, float* by_radius) {
  PIKV_DYNAMIC_SHARED(shared);
  const int64_t row = blockIdx.x, count = blocks * block_size;
  const bool* is_read = read + row / rows * count;
  LogSum expected, largest;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    if (is_read[i]) continue;
    const float logit = coarse[row * count + i];
    expected.add(slope * logit + spread[row * blocks + i / block_size]);
    largest.add(logit + radius[row * blocks + i / block_size]);
  }
  expected = sum_of_block(expected, reinterpret_cast<LogSum*>(shared));
  largest = sum_of_block(largest, reinterpret_cast<LogSum*>(shared));
  if (threadIdx.x == 0) by_spread[row] = expected.log(), by_radius[row] = largest.log();
}

extern "C" int pikv_cuda_unread_mass(const float* coarse, float slope, const float* spread, const float* radius,
                                     const bool* read, int64_t groups, int64_t rows, int64_t blocks, int64_t block_size,
                                     float* by_spread, float* by_radius, void* stream) {
  if (groups == 0 || rows == 0) return cudaSuccess;
  return launch(unread_mass_kernel, dim3(static_cast<unsigned>(groups * rows)), kThreads, kWarps * sizeof(LogSum),
                static_cast<cudaStream_t>(stream), coarse, slope, spread, radius, read, rows, blocks, block_size,
                by_spread, by_radius);
}

}  // namespace pikv::cuda
