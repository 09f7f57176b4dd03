// append: encodes new blocks and writes them to their places in the paged pool, keys and values in one launch. One
// thread block per matrix of a KV head, the second half of the grid for the values.

#include "quantize.cuh"

namespace pikv::cuda {

// What append does with keys or with values: copies rows to `raw` where it is given, codes where `codes.high` is.
struct Target {
  const char* x;
  int64_t block_bytes, head_bytes;  // of x, from one block or KV head to the next
  char* raw;
  Codes codes;
  int cols;
};

template <Dtype DTYPE, bool IS_KEY>
__device__ __forceinline__ void append_matrix(const Target& target, int rows, int64_t block, int64_t head,
                                              int64_t place, float* shared) {
  constexpr int kBytes = DTYPE == Dtype::kFloat32 ? 4 : 2;
  const int64_t bytes = static_cast<int64_t>(rows) * target.cols * kBytes;
  const char* from = target.x + block * target.block_bytes + head * target.head_bytes;
  if (target.raw)
    for (int64_t i = threadIdx.x * 16; i < bytes; i += kThreads * 16)
      *reinterpret_cast<uint4*>(target.raw + place * bytes + i) = load<uint4>(from + i);
  if (target.codes.high) {
    const Codes to = codes_at(target.codes, place, rows, target.cols, IS_KEY ? target.cols : rows);
    if constexpr (IS_KEY)
      quantize_channels<DTYPE>(from, rows, target.cols, to, shared);
    else
      quantize_tokens<DTYPE>(from, rows, target.cols, to);
  }
}

template <Dtype DTYPE>
__global__ void __launch_bounds__(kThreads, 7)
    append_kernel(Target keys, Target values, int rows, int64_t groups, const int64_t* ids) {
  PIKV_DYNAMIC_SHARED(shared);
  const int64_t block = blockIdx.x / groups, head = blockIdx.x - block * groups, place = ids[block] * groups + head;
  if (blockIdx.y == 0)
    append_matrix<DTYPE, true>(keys, rows, block, head, place, reinterpret_cast<float*>(shared));
  else
    append_matrix<DTYPE, false>(values, rows, block, head, place, nullptr);
}

template <class T>
T* writable(const T* pointer) {
  return const_cast<T*>(pointer);
}

extern "C" int pikv_cuda_append(const Blocks* k, const Blocks* v, Dtype dtype, const Keys* keys, const Values* values,
                                const int64_t* ids, int64_t count, void* stream) {
  if (!dim_fits(keys->dim) || !dim_fits(values->dim)) return cudaErrorInvalidValue;
  if (keys->high && !planes_fit(keys->hi_bits, keys->lo_bits)) return cudaErrorInvalidValue;
  if (values->codes && !planes_fit(values->bits, 0)) return cudaErrorInvalidValue;
  if ((keys->raw && keys->dtype != dtype) || (values->raw && values->dtype != dtype)) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  const Target key_target{static_cast<const char*>(k->x),
                          k->block_bytes,
                          k->head_bytes,
                          static_cast<char*>(const_cast<void*>(keys->raw)),
                          Codes{writable(keys->high), writable(keys->low), writable(keys->scale), writable(keys->zero),
                                keys->hi_bits, keys->low ? keys->lo_bits : 0},
                          static_cast<int>(keys->dim)};
  const Target value_target{
      static_cast<const char*>(v->x),
      v->block_bytes,
      v->head_bytes,
      static_cast<char*>(const_cast<void*>(values->raw)),
      Codes{writable(values->codes), nullptr, writable(values->scale), writable(values->zero), values->bits, 0},
      static_cast<int>(values->dim)};
  const size_t shared_bytes = keys->high ? channels_shared(keys->dim, keys->hi_bits) * sizeof(float) : 0;
  return with_dtype(dtype, [&](auto constant) -> int {
    return launch(append_kernel<decltype(constant)::value>, dim3(static_cast<unsigned>(count * keys->groups), 2),
                  kThreads, shared_bytes, static_cast<cudaStream_t>(stream), key_target, value_target,
                  static_cast<int>(keys->block_size), keys->groups, ids);
  });
}

}  // namespace pikv::cuda
