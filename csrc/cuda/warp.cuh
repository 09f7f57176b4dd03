// What all kernels share: a warp's place, reductions over it, and codes to numbers.
#pragma once

#include "pikv/cuda.h"
#include "pikv/portable.cuh"

namespace pikv::cuda {

constexpr int kLanes = 32;
constexpr int kThreads = kWarps * kLanes;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & (kLanes - 1); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kLanes; }

// Over groups of `width` (a power of two) neighbouring lanes; every lane gets the result.
__device__ __forceinline__ float lanes_max(float x, int width = kLanes) {
  for (int step = 1; step < width; step *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}
__device__ __forceinline__ float lanes_min(float x, int width = kLanes) {
  for (int step = 1; step < width; step *= 2) x = fminf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}
__device__ __forceinline__ float lanes_sum(float x, int width = kLanes) {
  for (int step = 1; step < width; step *= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Byte `at` of a word as a number: laid under the exponent of 2**23, which is faster than a conversion.
__device__ __forceinline__ float byte_to_float(unsigned bytes, int at) {
  return __uint_as_float(__byte_perm(bytes, 0x4B000000u, 0x7440u + static_cast<unsigned>(at))) - 8388608.0f;
}

// A byte's code number `part` of BITS bits, of four bytes at once: a word of four codes.
template <int BITS>
__device__ __forceinline__ unsigned codes_of(unsigned bytes, int part) {
  constexpr unsigned kMask = BITS == 8 ? 0xffffffffu : BITS == 4 ? 0x0f0f0f0fu : 0x03030303u;
  return (bytes >> (BITS * part)) & kMask;
}

template <class T>
__device__ __forceinline__ T load(const void* from) {
  return *static_cast<const T*>(from);
}

// Four neighbouring numbers of a raw row, from global or shared memory.
template <Dtype DTYPE>
__device__ __forceinline__ float4 load_four(const void* row, int64_t at) {
  if constexpr (DTYPE == Dtype::kFloat32) {
    return load<float4>(static_cast<const float*>(row) + at);
  } else {
    const uint2 x = load<uint2>(static_cast<const uint16_t*>(row) + at);
    const uint16_t bits[4] = {static_cast<uint16_t>(x.x), static_cast<uint16_t>(x.x >> 16), static_cast<uint16_t>(x.y),
                              static_cast<uint16_t>(x.y >> 16)};
    if constexpr (DTYPE == Dtype::kFloat16)
      return make_float4(half_to_float(bits[0]), half_to_float(bits[1]), half_to_float(bits[2]),
                         half_to_float(bits[3]));
    else
      return make_float4(bfloat16_to_float(bits[0]), bfloat16_to_float(bits[1]), bfloat16_to_float(bits[2]),
                         bfloat16_to_float(bits[3]));
  }
}

// Calls f(std::integral_constant<Dtype, ...>) with the dtype as a constant.
template <class F>
int with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(std::integral_constant<Dtype, Dtype::kFloat32>());
    case Dtype::kBFloat16: return f(std::integral_constant<Dtype, Dtype::kBFloat16>());
    case Dtype::kFloat16: return f(std::integral_constant<Dtype, Dtype::kFloat16>());
  }
  return cudaErrorInvalidValue;
}

inline bool dim_fits(int64_t dim) { return dim > 0 && dim % 16 == 0 && dim <= kMaxDim; }
// Planes that the kernels know: of keys (2, 0), (2, 2), (4, 4), of values (2, 0), (4, 0), (8, 0).
inline bool planes_fit(int hi_bits, int lo_bits) {
  return (hi_bits == 2 || hi_bits == 4 || hi_bits == 8) && (lo_bits == 0 || (lo_bits == hi_bits && hi_bits != 8));
}

}  // namespace pikv::cuda
