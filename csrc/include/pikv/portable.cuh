// The one header that csrc/cuda/*.cu include for the platform. Under nvcc it is CUDA's own headers and a few lines of
// PTX; under g++ it is the simulator's runtime (csrc/sim/runtime.h), which needs no CUDA headers and offers the same
// names.
//
// Kernels use no more of CUDA than this:
//   __global__ __device__ __forceinline__ __launch_bounds__ dim3 cudaStream_t cudaError_t cudaSuccess
//   cudaErrorInvalidValue threadIdx blockIdx blockDim gridDim __syncthreads __syncwarp
//   __shfl_sync __shfl_up_sync __shfl_down_sync __shfl_xor_sync __ballot_sync __any_sync __all_sync (32 lanes wide)
//   atomicAdd on int, unsigned and float
//   __fdiv_rn __byte_perm __dp4a __ldg __popc __clz __ffs __float_as_uint __uint_as_float min max (int)
//   float2 float4 int2 int4 uint2 uint4 and their make_ functions, math.h's float functions
//   pikv::half_to_float bfloat16_to_float float_to_half_rd float_to_half_ru copy_async copy_async_commit
//   copy_async_wait prefetch_l2 launch, PIKV_DYNAMIC_SHARED
// Shared memory is dynamic only, so that the simulator can poison it and check its bounds. Kernels have external
// linkage and live in named namespaces: the simulator finds their translated PTX by the mangled name.
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// `name`: the block's dynamic shared memory, 16-byte aligned.
#define PIKV_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace pikv {

// float16 and bfloat16 travel as their bits.
__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ float bfloat16_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}
// To the nearest float16 that is not above (rd) or not below (ru) the number.
__device__ __forceinline__ uint16_t float_to_half_rd(float x) { return __half_as_ushort(__float2half_rd(x)); }
__device__ __forceinline__ uint16_t float_to_half_ru(float x) { return __half_as_ushort(__float2half_ru(x)); }

// Copies BYTES (4, 8 or 16, both sides aligned to as much) from global to shared memory, asynchronously: the data is
// there once this thread has waited for the copy's group, for other threads after a barrier behind that.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES) : "memory");
}
// Ends the group of this thread's copies since the last commit.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `PENDING` of this thread's newest groups are still on their way.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Asks for a line of global memory to be brought into L2.
__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Starts a kernel on a stream; the error is the launch's own.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, dim3(threads), shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace pikv

#else

#include "../../sim/runtime.h"

#endif
