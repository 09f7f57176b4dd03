// quantize_block: one thread block per matrix of tokens and channels.

#include "quantize.cuh"

namespace pikv::cuda {

template <Dtype DTYPE, bool PER_CHANNEL>
__global__ void __launch_bounds__(kThreads, 8) quantize_block_kernel(const char* x, int rows, int cols, Codes pool) {
  PIKV_DYNAMIC_SHARED(shared);
  constexpr int kBytes = DTYPE == Dtype::kFloat32 ? 4 : 2;
  const int64_t matrix = blockIdx.x;
  const Codes to = codes_at(pool, matrix, rows, cols, PER_CHANNEL ? cols : rows);
  const char* from = x + matrix * rows * cols * kBytes;
  if constexpr (PER_CHANNEL)
    quantize_channels<DTYPE>(from, rows, cols, to, reinterpret_cast<float*>(shared));
  else
    quantize_tokens<DTYPE>(from, rows, cols, to);
}

extern "C" int pikv_cuda_quantize_block(const void* x, Dtype dtype, int64_t matrices, int64_t rows, int64_t cols,
                                        int hi_bits, int lo_bits, bool per_channel, uint8_t* high, uint8_t* low,
                                        uint16_t* scale, uint16_t* zero, void* stream) {
  if (!dim_fits(cols) || !planes_fit(hi_bits, lo_bits) || (lo_bits == 0) != (low == nullptr))
    return cudaErrorInvalidValue;
  if (matrices == 0 || rows == 0) return cudaSuccess;
  const Codes pool{high, low, scale, zero, hi_bits, lo_bits};
  const size_t shared_bytes = per_channel ? channels_shared(cols, hi_bits) * sizeof(float) : 0;
  return with_dtype(dtype, [&](auto constant) -> int {
    constexpr Dtype kDtype = decltype(constant)::value;
    return launch(per_channel ? quantize_block_kernel<kDtype, true> : quantize_block_kernel<kDtype, false>,
                  dim3(static_cast<unsigned>(matrices)), kThreads, shared_bytes, static_cast<cudaStream_t>(stream),
                  static_cast<const char*>(x), static_cast<int>(rows), static_cast<int>(cols), pool);
  });
}

}  // namespace pikv::cuda
