// Kernels that each break one rule of CUDA on purpose: what the simulators must notice while they run.

#include "pikv/portable.cuh"

namespace pikv::trial {

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffffu;

// Half of the threads meet elsewhere.
__global__ void divergent_barrier_kernel(int* y) {
  if (threadIdx.x < 32) {
    y[threadIdx.x] = 1;
    __syncthreads();
  } else {
    y[threadIdx.x] = 2;
    __syncthreads();
  }
}

// Half of the threads are gone before the others meet.
__global__ void early_exit_kernel(int* y) {
  if (threadIdx.x >= 32) return;
  y[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x + 32] = 1;
}

// A warp waits for lanes that wait at a barrier.
__global__ void deadlock_kernel(int* y) {
  if (threadIdx.x < 16)
    __syncwarp();
  else
    __syncthreads();
  y[threadIdx.x] = 1;
}

// The mask names lanes that have gone.
__global__ void missing_lanes_kernel(int* y) {
  if (threadIdx.x % 32 >= 20) return;
  y[threadIdx.x] = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 1);
}

// A lane that is not in the mask takes part.
__global__ void outside_mask_kernel(int* y) {
  y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 1);
}

// A lane reads from one that is not in the mask.
__global__ void read_outside_mask_kernel(int* y) {
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 16);
}

// `first` and `step` choose how far outside of 64 ints it writes, and on which side.
__global__ void shared_write_kernel(int* y, int first, int step) {
  PIKV_DYNAMIC_SHARED(shared);
  int* mine = reinterpret_cast<int*>(shared);
  mine[first + static_cast<int>(threadIdx.x) * step] = 1;
  __syncthreads();
  y[threadIdx.x] = mine[threadIdx.x];
}

__global__ void shared_read_kernel(int* y, int first) {
  PIKV_DYNAMIC_SHARED(shared);
  const int* mine = reinterpret_cast<const int*>(shared);
  y[threadIdx.x] = mine[first + static_cast<int>(threadIdx.x)];
}

// Reads what it has asked for without waiting: `pending` of 2 groups.
template <int PENDING>
__global__ void early_read_kernel(const int* x, int* y) {
  PIKV_DYNAMIC_SHARED(shared);
  int* mine = reinterpret_cast<int*>(shared);
  copy_async<4>(&mine[threadIdx.x], &x[threadIdx.x]);
  copy_async_commit();
  copy_async_wait<PENDING>();
  y[threadIdx.x] = mine[threadIdx.x];
}

__global__ void misaligned_copy_kernel(const int* x, int* y) {
  PIKV_DYNAMIC_SHARED(shared);
  int* mine = reinterpret_cast<int*>(shared);
  copy_async<16>(&mine[threadIdx.x], &x[threadIdx.x]);
  copy_async_commit();
  copy_async_wait<0>();
  y[threadIdx.x] = mine[threadIdx.x];
}

__global__ void copy_outside_kernel(const int* x, int* y) {
  PIKV_DYNAMIC_SHARED(shared);
  int* mine = reinterpret_cast<int*>(shared);
  copy_async<4>(&mine[threadIdx.x + 1], &x[threadIdx.x]);
  copy_async_commit();
  copy_async_wait<0>();
  y[threadIdx.x] = mine[threadIdx.x + 1];
}

extern "C" {

constexpr size_t kShared = kThreads * sizeof(int);

int broken_divergent_barrier(int* y) { return launch(divergent_barrier_kernel, dim3(2), kThreads, 0, nullptr, y); }
int broken_early_exit(int* y) { return launch(early_exit_kernel, dim3(2), kThreads, 0, nullptr, y); }
int broken_deadlock(int* y) { return launch(deadlock_kernel, dim3(2), kThreads, 0, nullptr, y); }
int broken_missing_lanes(int* y) { return launch(missing_lanes_kernel, dim3(2), kThreads, 0, nullptr, y); }
int broken_outside_mask(int* y) { return launch(outside_mask_kernel, dim3(2), kThreads, 0, nullptr, y); }
int broken_read_outside_mask(int* y) { return launch(read_outside_mask_kernel, dim3(2), kThreads, 0, nullptr, y); }
int broken_shared_write(int* y, int first, int step) {
  return launch(shared_write_kernel, dim3(2), kThreads, kShared, nullptr, y, first, step);
}
int broken_shared_read(int* y, int first) {
  return launch(shared_read_kernel, dim3(2), kThreads, kShared, nullptr, y, first);
}
int broken_early_read(const int* x, int* y) {
  return launch(early_read_kernel<1>, dim3(2), kThreads, kShared, nullptr, x, y);
}
int broken_timely_read(const int* x, int* y) {
  return launch(early_read_kernel<0>, dim3(2), kThreads, kShared, nullptr, x, y);
}
int broken_misaligned_copy(const int* x, int* y) {
  return launch(misaligned_copy_kernel, dim3(2), kThreads, kShared, nullptr, x, y);
}
int broken_copy_outside(const int* x, int* y) {
  return launch(copy_outside_kernel, dim3(2), kThreads, kShared, nullptr, x, y);
}
int broken_configuration(int* y) { return launch(deadlock_kernel, dim3(2), 1025, 0, nullptr, y); }

}  // extern "C"

}  // namespace pikv::trial
