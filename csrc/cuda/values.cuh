// Values of a tile: weighted sums over its tokens. A lane owns units of four channels, so that neighbouring lanes read
// neighbouring bytes; where a row has fewer units than a warp has lanes, groups of lanes share out the tokens.
#pragma once

#include "tile.cuh"

namespace pikv::cuda {

// Which units of a row of `dim` channels a lane owns, and which tokens it takes.
struct Ownership {
  int units, groups, group, unit;

  __device__ __forceinline__ explicit Ownership(int dim)
      : units(dim / 4), groups(units < kLanes ? kLanes / units : 1), group(units < kLanes ? lane_id() / units : 0),
        unit(lane_id() - group * units) {}
};

// The channel of number j of a unit: planar codes have a unit's channels apart.
__device__ __forceinline__ int value_channel(Kind kind, int unit, int j, int dim) {
  if (kind == Kind::kCodes40) return 2 * unit + (j & 1) + (j >> 1) * (dim / 2);
  if (kind == Kind::kCodes20) return unit + j * (dim / 4);
  return 4 * unit + j;
}

// The four numbers of a unit, codes not yet scaled.
template <Kind KIND>
__device__ __forceinline__ float4 load_unit(const unsigned char* row, int unit) {
  if constexpr (KIND == Kind::kFloat32) {
    return load_four<Dtype::kFloat32>(row, 4 * unit);
  } else if constexpr (KIND == Kind::kBFloat16) {
    return load_four<Dtype::kBFloat16>(row, 4 * unit);
  } else if constexpr (KIND == Kind::kFloat16) {
    return load_four<Dtype::kFloat16>(row, 4 * unit);
  } else {
    unsigned codes;
    if constexpr (KIND == Kind::kCodes80) {
      codes = load<unsigned>(row + 4 * unit);
    } else if constexpr (KIND == Kind::kCodes40) {
      const unsigned two = load<uint16_t>(row + 2 * unit);
      codes = (two & 0x0f0fu) | (two & 0xf0f0u) << 12;
    } else {
      const unsigned one = row[unit];
      codes = (one | one << 6 | one << 12 | one << 18) & 0x03030303u;
    }
    return make_float4(byte_to_float(codes, 0), byte_to_float(codes, 1), byte_to_float(codes, 2),
                       byte_to_float(codes, 3));
  }
}

__device__ __forceinline__ void add_scaled(float4& sum, float weight, float4 v) {
  sum = make_float4(fmaf(weight, v.x, sum.x), fmaf(weight, v.y, sum.y), fmaf(weight, v.z, sum.z),
                    fmaf(weight, v.w, sum.w));
}

// Adds the tokens of `live` (a bit each), weighted: weights [tokens, ROWS], scales [tokens] of (scale, zero).
template <Kind KIND, int ROWS, int UNITS>
__device__ __forceinline__ void add_values(const unsigned char* values, int stride, const Ownership& own, unsigned live,
                                           const float* weights, const float2* scales, float4 (&sum)[ROWS][UNITS]) {
  if (own.group >= own.groups) return;
#pragma unroll 2
  for (int token = own.group; token < kLanes && live >> token; token += own.groups) {
    if (!(live >> token & 1)) continue;
    float weight[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) weight[r] = weights[token * ROWS + r];
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      const int unit = own.unit + u * kLanes;
      if (unit >= own.units) break;
      float4 v = load_unit<KIND>(values + token * stride, unit);
      if constexpr (KIND == Kind::kCodes80 || KIND == Kind::kCodes40 || KIND == Kind::kCodes20) {
        const float2 s = scales[token];
        v = make_float4(fmaf(v.x, s.x, s.y), fmaf(v.y, s.x, s.y), fmaf(v.z, s.x, s.y), fmaf(v.w, s.x, s.y));
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) add_scaled(sum[r][u], weight[r], v);
    }
  }
}

template <int ROWS, int UNITS>
__device__ __forceinline__ void add_values(Kind kind, const unsigned char* values, int stride, const Ownership& own,
                                           unsigned live, const float* weights, const float2* scales,
                                           float4 (&sum)[ROWS][UNITS]) {
  switch (kind) {
    case Kind::kFloat32: return add_values<Kind::kFloat32>(values, stride, own, live, weights, scales, sum);
    case Kind::kBFloat16: return add_values<Kind::kBFloat16>(values, stride, own, live, weights, scales, sum);
    case Kind::kFloat16: return add_values<Kind::kFloat16>(values, stride, own, live, weights, scales, sum);
    case Kind::kCodes80: return add_values<Kind::kCodes80>(values, stride, own, live, weights, scales, sum);
    case Kind::kCodes40: return add_values<Kind::kCodes40>(values, stride, own, live, weights, scales, sum);
    case Kind::kCodes20: return add_values<Kind::kCodes20>(values, stride, own, live, weights, scales, sum);
    default: return;
  }
}

}  // namespace pikv::cuda
