// Kernels with and without a race, for TSan: what must count as order between threads, and what must not.

#include "pikv/portable.cuh"

namespace pikv::trial {

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffffu;

enum class Order { kNone, kRight };

// Blocks add to the same number: no barrier reaches from one to the other.
template <Order ORDER>
__global__ void between_blocks_kernel(int* y) {
  if (threadIdx.x != 0) return;
  if (ORDER == Order::kRight)
    atomicAdd(y, 1);
  else
    *y += 1;
}

// A lane reads what its neighbour has written; a shuffle in between lets lanes meet, but orders no memory.
template <Order ORDER>
__global__ void after_shuffle_kernel(int* y) {
  PIKV_DYNAMIC_SHARED(shared);
  int* mine = reinterpret_cast<int*>(shared) + threadIdx.x / 32 * 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  mine[lane] = lane;
  const int sum = __shfl_xor_sync(kAll, lane, 1);
  if (ORDER == Order::kRight) __syncwarp();
  y[threadIdx.x] = mine[lane ^ 1] + sum;
}

// A thread has waited for its own copy, which says nothing of another thread's.
template <Order ORDER>
__global__ void after_wait_kernel(const int* x, int* y) {
  PIKV_DYNAMIC_SHARED(shared);
  int* mine = reinterpret_cast<int*>(shared);
  copy_async<4>(&mine[threadIdx.x], &x[threadIdx.x]);
  copy_async_commit();
  copy_async_wait<0>();
  if (ORDER == Order::kRight) __syncthreads();
  y[threadIdx.x] = mine[(threadIdx.x + 1) % kThreads];
}

// A barrier of one warp does not order the other.
template <Order ORDER>
__global__ void between_warps_kernel(int* y) {
  PIKV_DYNAMIC_SHARED(shared);
  int* mine = reinterpret_cast<int*>(shared);
  mine[threadIdx.x] = 1;
  if (ORDER == Order::kRight)
    __syncthreads();
  else
    __syncwarp();
  y[threadIdx.x] = mine[(threadIdx.x + 32) % kThreads];
}

// Half of a warp is ordered by a barrier with its mask, the other half has no part in it.
template <Order ORDER>
__global__ void part_of_warp_kernel(int* y) {
  PIKV_DYNAMIC_SHARED(shared);
  int* mine = reinterpret_cast<int*>(shared) + threadIdx.x / 32 * 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  mine[lane] = 1;
  if (lane < 16)
    __syncwarp(0x0000ffffu);
  else
    __syncwarp(0xffff0000u);
  y[threadIdx.x] = mine[lane ^ (ORDER == Order::kRight ? 8 : 16)];
}

template <Order ORDER>
int run(int which, const int* x, int* y) {
  constexpr size_t kShared = kThreads * sizeof(int);
  switch (which) {
    case 0:
      return launch(between_blocks_kernel<ORDER>, dim3(4), kThreads, 0, nullptr, y);
    case 1:
      return launch(after_shuffle_kernel<ORDER>, dim3(1), kThreads, kShared, nullptr, y);
    case 2:
      return launch(after_wait_kernel<ORDER>, dim3(1), kThreads, kShared, nullptr, x, y);
    case 3:
      return launch(between_warps_kernel<ORDER>, dim3(1), kThreads, kShared, nullptr, y);
    default:
      return launch(part_of_warp_kernel<ORDER>, dim3(1), kThreads, kShared, nullptr, y);
  }
}

extern "C" int trial_race(int which, bool racy, const int* x, int* y) {
  return racy ? run<Order::kNone>(which, x, y) : run<Order::kRight>(which, x, y);
}

}  // namespace pikv::trial
