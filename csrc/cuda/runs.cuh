// Packed lists of several requests: whose an entry is.
#pragma once

#include "warp.cuh"

namespace pikv::cuda {

// The request that entry `index` of the list belongs to.
__device__ __forceinline__ int64_t request_of(const Runs& runs, int64_t index) {
  int64_t low = 0, high = runs.requests;  // the last of those that begin at or before it
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (runs.first[middle] <= index)
      low = middle;
    else
      high = middle;
  }
  return low;
}

}  // namespace pikv::cuda
