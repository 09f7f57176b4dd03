// dequantize_block: one thread per four bytes of the high plane; each writes four numbers of every part of the row.

#include "warp.cuh"

namespace pikv::cuda {

struct Decoding {
  const uint8_t* high;
  const uint8_t* low;
  const uint16_t* scale;
  const uint16_t* zero;
  int64_t rows, cols;
  int hi_bits, lo_bits;
  bool per_channel;
  float missing;  // added to every code: the middle of what an absent low plane may hold
};

__global__ void __launch_bounds__(kThreads) dequantize_block_kernel(Decoding from, int64_t words, float* y) {
  const int parts = 8 / from.hi_bits;
  const int span = static_cast<int>(from.cols) / parts, row_words = span / 4;
  const unsigned high_mask = ((1u << from.hi_bits) - 1) * 0x01010101u,
                 low_mask = ((1u << from.lo_bits) - 1) * 0x01010101u;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < words; i += step) {
    const int64_t row = i / row_words;  // of all matrices
    const int64_t matrix = row / from.rows;
    const unsigned high = load<unsigned>(from.high + 4 * i);
    const unsigned low = from.low ? load<unsigned>(from.low + 4 * i) : 0;
    for (int part = 0; part < parts; ++part) {
      const int channel = part * span + static_cast<int>(i - row * row_words) * 4;
      unsigned codes = ((high >> (from.hi_bits * part)) & high_mask) << from.lo_bits;
      if (from.low) codes |= (low >> (from.lo_bits * part)) & low_mask;
      float out[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t at = from.per_channel ? matrix * from.cols + channel + j : row;
        out[j] =
            fmaf(byte_to_float(codes, j) + from.missing, half_to_float(from.scale[at]), half_to_float(from.zero[at]));
      }
      *reinterpret_cast<float4*>(y + row * from.cols + channel) = make_float4(out[0], out[1], out[2], out[3]);
    }
  }
}

extern "C" int pikv_cuda_dequantize_block(const uint8_t* high, const uint8_t* low, const uint16_t* scale,
                                          const uint16_t* zero, int64_t matrices, int64_t rows, int64_t cols,
                                          int hi_bits, int lo_bits, bool per_channel, float* y, void* stream) {
  if (!dim_fits(cols) || !planes_fit(hi_bits, lo_bits)) return cudaErrorInvalidValue;
  const int64_t words = matrices * rows * (cols * hi_bits / 32);
  if (words == 0) return cudaSuccess;
  const float missing = low ? 0.0f : static_cast<float>((1 << lo_bits) - 1) / 2;
  const Decoding from{high, low, scale, zero, rows, cols, hi_bits, lo_bits, per_channel, missing};
  const int64_t grid = (words + kThreads - 1) / kThreads;
  return launch(dequantize_block_kernel, dim3(static_cast<unsigned>(grid < 65536 ? grid : 65536)), kThreads, 0,
                static_cast<cudaStream_t>(stream), from, words, y);
}

}  // namespace pikv::cuda
