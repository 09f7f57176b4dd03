// Encoding of one matrix of tokens and channels by one thread block, as quantize_block and append do it. Two passes
// over the matrix: the second reads what the first has left in L1. Codes are bit-equal to the reference's.
#pragma once

#include "warp.cuh"

namespace pikv::cuda {

// Where the codes of one matrix go. scale, zero: [cols] or [rows].
struct Codes {
  uint8_t* high;
  uint8_t* low;
  uint16_t* scale;
  uint16_t* zero;
  int hi_bits, lo_bits;
};

// The codes of matrix `index` in planes of whole pools, whose matrices have `scales` scales each.
__device__ __forceinline__ Codes codes_at(const Codes& pool, int64_t index, int rows, int cols, int scales) {
  Codes at = pool;
  at.high += index * rows * (cols * pool.hi_bits / 8);
  if (pool.low) at.low += index * rows * (cols * pool.lo_bits / 8);
  at.scale += index * scales;
  at.zero += index * scales;
  return at;
}

// A grid of codes: code c stands for zero + scale * c.
struct Grid {
  uint16_t zero_bits, scale_bits;
  float zero, scale;
};

// zero is the float16 not above `least` (never -0), scale the one not below the wanted step, float16's smallest at
// least.
__device__ __forceinline__ Grid grid_of(float least, float most, int levels) {
  Grid grid;
  grid.zero_bits = float_to_half_rd(least);
  if (grid.zero_bits == 0x8000) grid.zero_bits = 0;
  grid.zero = half_to_float(grid.zero_bits);
  grid.scale_bits = float_to_half_ru(__fdiv_rn(most - grid.zero, static_cast<float>(levels)));
  if ((grid.scale_bits & 0x7fff) == 0) grid.scale_bits = 1;
  grid.scale = half_to_float(grid.scale_bits);
  return grid;
}

// Codes of four numbers, one a byte.
__device__ __forceinline__ unsigned encode_four(float4 x, float4 zero, float4 scale) {
  const unsigned a = static_cast<unsigned>(rintf(__fdiv_rn(x.x - zero.x, scale.x)));
  const unsigned b = static_cast<unsigned>(rintf(__fdiv_rn(x.y - zero.y, scale.y)));
  const unsigned c = static_cast<unsigned>(rintf(__fdiv_rn(x.z - zero.z, scale.z)));
  const unsigned d = static_cast<unsigned>(rintf(__fdiv_rn(x.w - zero.w, scale.w)));
  return a | b << 8 | c << 16 | d << 24;
}

// What a thread writes at a time is a unit: four bytes of a row's high plane, which hold four codes of each of `parts`
// parts of the row's channels, and the same of the low plane.
struct Units {
  int parts, span, count, hi_bits, lo_bits;

  __device__ __forceinline__ Units(int cols, const Codes& to)
      : parts(8 / to.hi_bits), span(cols / parts), count(span / 4), hi_bits(to.hi_bits), lo_bits(to.lo_bits) {}

  // The first of the four channels of a unit's part.
  __device__ __forceinline__ int channel(int unit, int part) const { return part * span + 4 * unit; }

  __device__ __forceinline__ static unsigned low_bits_of_bytes(int bits) { return ((1u << bits) - 1) * 0x01010101u; }

  // Adds four codes, one a byte, to a unit's words.
  __device__ __forceinline__ void put(unsigned codes, int part, unsigned& high, unsigned& low) const {
    high |= ((codes >> lo_bits) & low_bits_of_bytes(hi_bits)) << (hi_bits * part);
    low |= (codes & low_bits_of_bytes(lo_bits)) << (lo_bits * part);
  }

  __device__ __forceinline__ void write(const Codes& to, int row, int unit, unsigned high, unsigned low) const {
    const int64_t at = static_cast<int64_t>(row) * count + unit;
    reinterpret_cast<unsigned*>(to.high)[at] = high;
    if (to.low) reinterpret_cast<unsigned*>(to.low)[at] = low;
  }
};

constexpr int kMostParts = 4;

// Floats of shared memory for quantize_channels.
inline int64_t channels_shared(int64_t cols, int hi_bits) {
  const int64_t units = cols * hi_bits / 32;
  return 2 * (kThreads / units) * cols;
}

// One scale per channel. x [rows, cols]; shared: channels_shared floats.
template <Dtype DTYPE>
__device__ void quantize_channels(const void* x, int rows, int cols, const Codes& to, float* shared) {
  const Units units(cols, to);
  const int groups = kThreads / units.count;  // of threads, each with rows of its own
  const int unit = static_cast<int>(threadIdx.x) % units.count, group = static_cast<int>(threadIdx.x) / units.count;
  float *least = shared, *most = shared + groups * cols;
  if (group < groups) {
#pragma unroll
    for (int part = 0; part < kMostParts; ++part) {
      if (part >= units.parts) break;
      const int channel = units.channel(unit, part);
      float4 low = make_float4(INFINITY, INFINITY, INFINITY, INFINITY);
      float4 high = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
      for (int row = group; row < rows; row += groups) {
        const float4 v = load_four<DTYPE>(x, static_cast<int64_t>(row) * cols + channel);
        low = make_float4(fminf(low.x, v.x), fminf(low.y, v.y), fminf(low.z, v.z), fminf(low.w, v.w));
        high = make_float4(fmaxf(high.x, v.x), fmaxf(high.y, v.y), fmaxf(high.z, v.z), fmaxf(high.w, v.w));
      }
      *reinterpret_cast<float4*>(least + group * cols + channel) = low;
      *reinterpret_cast<float4*>(most + group * cols + channel) = high;
    }
  }
  __syncthreads();
  const int levels = (1 << (to.hi_bits + to.lo_bits)) - 1;
  for (int channel = static_cast<int>(threadIdx.x); channel < cols; channel += kThreads) {
    float low = least[channel], high = most[channel];
    for (int i = 1; i < groups; ++i) {
      low = fminf(low, least[i * cols + channel]);
      high = fmaxf(high, most[i * cols + channel]);
    }
    const Grid grid = grid_of(low, high, levels);
    to.zero[channel] = grid.zero_bits, to.scale[channel] = grid.scale_bits;
    least[channel] = grid.zero, most[channel] = grid.scale;  // no other thread reads this column
  }
  __syncthreads();
  if (group < groups) {
    for (int row = group; row < rows; row += groups) {
      unsigned high = 0, low = 0;
#pragma unroll
      for (int part = 0; part < kMostParts; ++part) {
        if (part >= units.parts) break;
        const int channel = units.channel(unit, part);
        const float4 v = load_four<DTYPE>(x, static_cast<int64_t>(row) * cols + channel);
        units.put(encode_four(v, load<float4>(least + channel), load<float4>(most + channel)), part, high, low);
      }
      units.write(to, row, unit, high, low);
    }
  }
}

// One scale per token. x [rows, cols]. A row is the work of `width` neighbouring lanes.
template <Dtype DTYPE>
__device__ void quantize_tokens(const void* x, int rows, int cols, const Codes& to) {
  const Units units(cols, to);
  int width = 1;
  while (width < units.count && width < kLanes) width *= 2;
  const int levels = (1 << (to.hi_bits + to.lo_bits)) - 1;
  const int at = static_cast<int>(threadIdx.x) % width, together = kThreads / width;
  for (int first = 0; first < rows; first += together) {
    const int row = first + static_cast<int>(threadIdx.x) / width;
    const int64_t start = static_cast<int64_t>(row) * cols;
    const int count = row < rows ? units.count : 0;
    float least = INFINITY, most = -INFINITY;
    for (int unit = at; unit < count; unit += width) {
      for (int part = 0; part < units.parts; ++part) {
        const float4 v = load_four<DTYPE>(x, start + units.channel(unit, part));
        least = fminf(least, fminf(fminf(v.x, v.y), fminf(v.z, v.w)));
        most = fmaxf(most, fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)));
      }
    }
    const Grid grid = grid_of(lanes_min(least, width), lanes_max(most, width), levels);
    if (at == 0 && row < rows) to.zero[row] = grid.zero_bits, to.scale[row] = grid.scale_bits;
    const float4 zero = make_float4(grid.zero, grid.zero, grid.zero, grid.zero);
    const float4 scale = make_float4(grid.scale, grid.scale, grid.scale, grid.scale);
    for (int unit = at; unit < count; unit += width) {
      unsigned high = 0, low = 0;
      for (int part = 0; part < units.parts; ++part)
        units.put(encode_four(load_four<DTYPE>(x, start + units.channel(unit, part)), zero, scale), part, high, low);
      units.write(to, row, unit, high, low);
    }
  }
}

}  // namespace pikv::cuda
