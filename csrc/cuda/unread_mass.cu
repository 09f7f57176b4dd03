// unread_mass: two log-sums-exp a row over its request's tokens that are not read, one thread block each.

#include "log_sum.cuh"

namespace pikv::cuda {

// Grid: rows of all KV heads, requests.
__global__ void __launch_bounds__(kThreads)
    unread_mass_kernel(const float* coarse, float slope, const float* spread, const float* radius, const bool* read,
                       int64_t rows, Runs blocks, int64_t block_size, float* by_spread, float* by_radius) {
  PIKV_DYNAMIC_SHARED(shared);
  const int64_t row = blockIdx.x, count = blocks.count * block_size, end = blocks.first[blockIdx.y + 1] * block_size;
  const bool* is_read = read + row / rows * count;
  LogSum expected, largest;
  for (int64_t i = blocks.first[blockIdx.y] * block_size + threadIdx.x; i < end; i += kThreads) {
    if (is_read[i]) continue;
    const float logit = coarse[row * count + i];
    expected.add(slope * logit + spread[row * blocks.count + i / block_size]);
    largest.add(logit + radius[row * blocks.count + i / block_size]);
  }
  expected = sum_of_block(expected, reinterpret_cast<LogSum*>(shared));
  largest = sum_of_block(largest, reinterpret_cast<LogSum*>(shared));
  const int64_t place = blockIdx.y * gridDim.x + row;
  if (threadIdx.x == 0) by_spread[place] = expected.log(), by_radius[place] = largest.log();
}

extern "C" int pikv_cuda_unread_mass(const float* coarse, float slope, const float* spread, const float* radius,
                                     const bool* read, int64_t groups, int64_t rows, const Runs* blocks,
                                     int64_t block_size, float* by_spread, float* by_radius, void* stream) {
  if (groups == 0 || rows == 0 || blocks->requests == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(groups * rows), static_cast<unsigned>(blocks->requests));
  return launch(unread_mass_kernel, grid, kThreads, kWarps * sizeof(LogSum), static_cast<cudaStream_t>(stream), coarse,
                slope, spread, radius, read, rows, *blocks, block_size, by_spread, by_radius);
}

}  // namespace pikv::cuda
