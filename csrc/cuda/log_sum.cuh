// Log-sum-exp of many numbers by one thread block.
#pragma once

#include "warp.cuh"

namespace pikv::cuda {

// A sum of exponentials: total * exp(high).
struct LogSum {
  float high = -INFINITY, total = 0.0f;

  __device__ __forceinline__ void add(float logit) { add(LogSum{logit, 1.0f}); }
  __device__ __forceinline__ void add(LogSum other) {
    if (other.high == -INFINITY) return;
    const float highest = fmaxf(high, other.high);
    total = fmaf(total, expf(high - highest), other.total * expf(other.high - highest));
    high = highest;
  }
  __device__ __forceinline__ float log() const { return high == -INFINITY ? -INFINITY : high + logf(total); }
};

// The sum over the thread block's parts, in every thread. shared: kWarps of them, free for use; all threads take part.
__device__ __forceinline__ LogSum sum_of_block(LogSum mine, LogSum* shared) {
  for (int step = 1; step < kLanes; step *= 2) {
    LogSum other;
    other.high = __shfl_xor_sync(kAllLanes, mine.high, step);
    other.total = __shfl_xor_sync(kAllLanes, mine.total, step);
    mine.add(other);
  }
  __syncthreads();  // who used `shared` before has read it
  if (lane_id() == 0) shared[warp_id()] = mine;
  __syncthreads();
  LogSum all;
  for (int w = 0; w < kWarps; ++w) all.add(shared[w]);
  return all;
}

}  // namespace pikv::cuda
