// CUDA's names over the simulator, for portable.cuh under g++: just what its list promises to the kernels. No CUDA
// header is needed.
//
// With PIKV_SIM_PTX the launcher runs what nvcc made of the kernel, as tools/ptx2cpp.py translated it, in place of
// g++'s version.
#pragma once

#include <atomic>
#include <bit>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>

#include "numbers.h"
#include "simulator.h"
#include "types.h"
#if defined(PIKV_SIM_PTX)
#include "ptx_kernels.h"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (pikv::sim::thread_index())
#define blockIdx (pikv::sim::block_index())
#define blockDim (pikv::sim::block_size())
#define gridDim (pikv::sim::grid_size())
#define PIKV_DYNAMIC_SHARED(name) unsigned char* const name = pikv::sim::shared_memory()

namespace pikv::sim {

using Source = std::source_location;
inline Site site(const Source& source) { return {source.file_name(), source.line()}; }

template <class T>
T shuffle_any(unsigned mask, T value, int source_lane, const Source& source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source_lane, site(source));
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace pikv::sim

inline void __syncthreads(pikv::sim::Source source = pikv::sim::Source::current()) {
  pikv::sim::block_barrier(pikv::sim::site(source));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, pikv::sim::Source source = pikv::sim::Source::current()) {
  pikv::sim::warp_barrier(mask, pikv::sim::site(source));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, pikv::sim::Source source = pikv::sim::Source::current()) {
  return pikv::sim::shuffle_any(mask, value, lane & 31, source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, pikv::sim::Source source = pikv::sim::Source::current()) {
  const int from = pikv::sim::lane() - static_cast<int>(by);
  return pikv::sim::shuffle_any(mask, value, from < 0 ? pikv::sim::lane() : from, source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, pikv::sim::Source source = pikv::sim::Source::current()) {
  const int from = pikv::sim::lane() + static_cast<int>(by);
  return pikv::sim::shuffle_any(mask, value, from > 31 ? pikv::sim::lane() : from, source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, pikv::sim::Source source = pikv::sim::Source::current()) {
  return pikv::sim::shuffle_any(mask, value, (pikv::sim::lane() ^ with) & 31, source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, pikv::sim::Source source = pikv::sim::Source::current()) {
  return pikv::sim::ballot(mask, predicate != 0, pikv::sim::site(source));
}
inline int __any_sync(unsigned mask, int predicate, pikv::sim::Source source = pikv::sim::Source::current()) {
  return pikv::sim::ballot(mask, predicate != 0, pikv::sim::site(source)) != 0;
}
inline int __all_sync(unsigned mask, int predicate, pikv::sim::Source source = pikv::sim::Source::current()) {
  return pikv::sim::ballot(mask, predicate != 0, pikv::sim::site(source)) == mask;
}

// Relaxed, as CUDA's are: they order nothing but themselves.
template <class T>
T atomicAdd(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}
template <class T>
T __ldg(const T* address) {
  return *address;
}

namespace pikv {

template <int BYTES>
void copy_async(void* shared, const void* global) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  sim::copy_async(shared, global, BYTES);
}
inline void copy_async_commit() { sim::copy_async_commit(); }
template <int PENDING>
void copy_async_wait() {
  sim::copy_async_wait(PENDING);
}
inline void prefetch_l2(const void*) {}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
#if defined(PIKV_SIM_PTX)
  const sim::PtxParameters parameters(static_cast<Parameters>(arguments)...);
  return sim::run_ptx({reinterpret_cast<const void*>(kernel), nullptr, nullptr, grid, dim3(threads), shared_bytes},
                      parameters);
#else
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, {static_cast<Parameters>(arguments)...}};
  const auto body = [](const void* bound) {
    const Call& self = *static_cast<const Call*>(bound);
    std::apply(self.kernel, self.parameters);
  };
  return sim::run({reinterpret_cast<const void*>(kernel), body, &call, grid, dim3(threads), shared_bytes});
#endif
}

}  // namespace pikv
