// A tile: up to 32 stored tokens of one KV head, as a warp brings them to shared memory and takes their logits. Used by
// every kernel that reads keys. In shared memory each row is padded to an odd number of 16-byte (or 4-byte) pieces, so
// that lanes that read the same piece of different rows meet different banks.
#pragma once

#include "warp.cuh"

namespace pikv::cuda {

// How rows are stored: raw, or codes of high + low bits.
enum class Kind : int { kFloat32, kBFloat16, kFloat16, kCodes44, kCodes22, kCodes20, kCodes80, kCodes40, kUnknown };

inline Kind kind_of(bool raw, Dtype dtype, int hi_bits, int lo_bits) {
  if (raw) return static_cast<Kind>(static_cast<int>(dtype));
  if (hi_bits == 4) return lo_bits == 4 ? Kind::kCodes44 : lo_bits == 0 ? Kind::kCodes40 : Kind::kUnknown;
  if (hi_bits == 2) return lo_bits == 2 ? Kind::kCodes22 : lo_bits == 0 ? Kind::kCodes20 : Kind::kUnknown;
  return hi_bits == 8 && lo_bits == 0 ? Kind::kCodes80 : Kind::kUnknown;
}

// One plane of a tile. base: its pool; bytes: of a row in the pool; stride: of a row in shared memory; at: where the
// plane begins in a stage. No bytes: the tile has no such plane.
struct Plane {
  const uint8_t* base;
  int bytes, stride, at;
};

struct Tile {
  Plane high, low, scale, zero, values;
  int tokens;  // 8, 16 or 32
  int bytes;   // of one stage
};

constexpr int kStageBytes = 16 * 1024;  // a stage is made no larger, down to 8 tokens

inline Plane place_plane(const void* base, int64_t bytes, int rows, int& at) {
  Plane plane{static_cast<const uint8_t*>(base), base ? static_cast<int>(bytes) : 0, 0, at};
  if (!base) return plane;
  const int piece = bytes % 16 == 0 ? 16 : 4;
  plane.stride = (plane.bytes / piece | 1) * piece;
  at += (plane.stride * rows + 15) / 16 * 16;
  return plane;
}

// keys: what is read of them, codes without `raw`; values may be null. scale_rows: of scale and zero, one for all
// tokens of a block or one a token.
inline Tile make_tile(const Keys& keys, const Values* values, int tokens, bool scale_per_token) {
  Tile tile{};
  tile.tokens = tokens;
  const int scale_rows = scale_per_token ? tokens : 1;
  const int64_t raw_bytes = keys.dim * (keys.dtype == Dtype::kFloat32 ? 4 : 2);
  const bool coded = !keys.raw;
  tile.high =
      place_plane(coded ? keys.high : keys.raw, coded ? keys.dim * keys.hi_bits / 8 : raw_bytes, tokens, tile.bytes);
  tile.low = place_plane(coded ? keys.low : nullptr, keys.dim * keys.lo_bits / 8, tokens, tile.bytes);
  tile.scale = place_plane(coded ? keys.scale : nullptr, 2 * keys.dim, scale_rows, tile.bytes);
  tile.zero = place_plane(coded ? keys.zero : nullptr, 2 * keys.dim, scale_rows, tile.bytes);
  if (values) {
    const bool raw = values->raw != nullptr;
    const int64_t bytes =
        raw ? values->dim * (values->dtype == Dtype::kFloat32 ? 4 : 2) : values->dim * values->bits / 8;
    tile.values = place_plane(raw ? values->raw : values->codes, bytes, tokens, tile.bytes);
  }
  return tile;
}

// The largest tile that holds no more than `most` tokens and whose stage is not too large.
inline Tile fit_tile(const Keys& keys, const Values* values, int64_t most, bool scale_per_token) {
  int tokens = kLanes;
  while (tokens > 8 && tokens / 2 >= most) tokens /= 2;
  Tile tile = make_tile(keys, values, tokens, scale_per_token);
  while (tile.bytes > kStageBytes && tokens > 8) tile = make_tile(keys, values, tokens /= 2, scale_per_token);
  return tile;
}

// Starts the copies of `rows` rows of a plane; row_at(row): which row of the pool. All lanes of a warp take part.
template <class RowAt>
__device__ __forceinline__ void copy_rows(unsigned char* stage, const Plane& plane, int rows, RowAt row_at) {
  if (plane.bytes % 16 == 0) {
    const int pieces = plane.bytes / 16;
    for (int i = lane_id(); i < rows * pieces; i += kLanes) {
      const int row = i / pieces, piece = i - row * pieces;
      copy_async<16>(stage + plane.at + row * plane.stride + piece * 16,
                     plane.base + row_at(row) * plane.bytes + piece * 16);
    }
  } else {
    const int pieces = plane.bytes / 4;
    for (int i = lane_id(); i < rows * pieces; i += kLanes) {
      const int row = i / pieces, piece = i - row * pieces;
      copy_async<4>(stage + plane.at + row * plane.stride + piece * 4,
                    plane.base + row_at(row) * plane.bytes + piece * 4);
    }
  }
}

// Four words, or one where rows are not made of 16-byte pieces.
template <int WORDS>
__device__ __forceinline__ void load_words(unsigned (&to)[WORDS], const unsigned char* from) {
  if constexpr (WORDS == 4) {
    const uint4 x = load<uint4>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else {
    to[0] = load<unsigned>(from);
  }
}

// Adds four channels' products with every row of q (rows `stride` floats apart) to the rows' sums.
template <int ROWS>
__device__ __forceinline__ void add_products(float4 k, const float* q, int stride, float (&sum)[ROWS]) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float4 x = load<float4>(q + r * stride);
    sum[r] = fmaf(x.x, k.x, fmaf(x.y, k.y, fmaf(x.z, k.z, fmaf(x.w, k.w, sum[r]))));
  }
}

template <Dtype DTYPE, int ROWS>
__device__ __forceinline__ void dot_raw(const unsigned char* key, const float* q, int dim, int part, int parts,
                                        float (&sum)[ROWS]) {
#pragma unroll 2
  for (int i = part; i < dim / 4; i += parts) add_products(load_four<DTYPE>(key, 4 * i), q + 4 * i, dim, sum);
}

// Products with codes; where SCALED, with the keys that they stand for: scale, zero [dim].
template <int HI, int LO, int WORDS, bool SCALED, int ROWS>
__device__ __forceinline__ void dot_codes(const unsigned char* high, const unsigned char* low,
                                          const unsigned char* scale, const unsigned char* zero, const float* q,
                                          int dim, int part, int parts, float (&sum)[ROWS]) {
  constexpr int kParts = 8 / HI;
  const int span = dim / kParts;
#pragma unroll 1
  for (int i = part; i < span / (4 * WORDS); i += parts) {
    unsigned high_words[WORDS], low_words[WORDS];
    load_words(high_words, high + i * 4 * WORDS);
    if constexpr (LO > 0) load_words(low_words, low + i * 4 * WORDS);
#pragma unroll 1
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int w = 0; w < WORDS; ++w) {
        unsigned codes = codes_of<HI>(high_words[w], p);
        if constexpr (LO > 0) codes = codes << LO | codes_of<LO>(low_words[w], p);
        const int channel = p * span + (i * WORDS + w) * 4;
        float4 k = make_float4(byte_to_float(codes, 0), byte_to_float(codes, 1), byte_to_float(codes, 2),
                               byte_to_float(codes, 3));
        if constexpr (SCALED) {
          const float4 s = load_four<Dtype::kFloat16>(scale, channel), z = load_four<Dtype::kFloat16>(zero, channel);
          k = make_float4(fmaf(k.x, s.x, z.x), fmaf(k.y, s.y, z.y), fmaf(k.z, s.z, z.z), fmaf(k.w, s.w, z.w));
        }
        add_products(k, q + channel, dim, sum);
      }
    }
  }
}

// This lane's share (part of parts) of one token's products with every row of q [ROWS, dim]. The token's planes are in
// shared or global memory; wide: their codes can be loaded 16 bytes at a time.
template <bool SCALED, int ROWS>
__device__ __forceinline__ void dot_planes(Kind kind, bool wide, const unsigned char* high, const unsigned char* low,
                                           const unsigned char* scale, const unsigned char* zero, const float* q,
                                           int dim, int part, int parts, float (&sum)[ROWS]) {
#define PIKV_CODES(HI, LO)                                                                               \
  if (wide)                                                                                              \
    dot_codes<HI, LO, 4, SCALED, ROWS>(high, low, scale, zero, q, dim, part, parts, sum);                \
  else                                                                                                   \
    dot_codes<HI, LO, 1, SCALED, ROWS>(high, low, scale, zero, q, dim, part, parts, sum);                \
  break
  switch (kind) {
    case Kind::kFloat32: dot_raw<Dtype::kFloat32>(high, q, dim, part, parts, sum); break;
    case Kind::kBFloat16: dot_raw<Dtype::kBFloat16>(high, q, dim, part, parts, sum); break;
    case Kind::kFloat16: dot_raw<Dtype::kFloat16>(high, q, dim, part, parts, sum); break;
    case Kind::kCodes44: PIKV_CODES(4, 4);
    case Kind::kCodes22: PIKV_CODES(2, 2);
    case Kind::kCodes40: PIKV_CODES(4, 0);
    case Kind::kCodes20: PIKV_CODES(2, 0);
    default: break;
  }
#undef PIKV_CODES
}

// The same of a token of a tile.
template <bool SCALED, int ROWS>
__device__ __forceinline__ void dot_token(Kind kind, const Tile& tile, const unsigned char* stage, int token,
                                          const float* q, int dim, int part, int parts, float (&sum)[ROWS]) {
  const unsigned char* high = stage + tile.high.at + token * tile.high.stride;
  const unsigned char* low = stage + tile.low.at + token * tile.low.stride;
  const unsigned char* scale = stage + tile.scale.at + token * tile.scale.stride;
  const unsigned char* zero = stage + tile.zero.at + token * tile.zero.stride;
  const bool wide = tile.high.bytes % 16 == 0;
  dot_planes<SCALED, ROWS>(kind, wide, high, low, scale, zero, q, dim, part, parts, sum);
}

// Sums over the lanes that share a token: lanes `tokens` apart.
template <int ROWS>
__device__ __forceinline__ void add_parts(float (&sum)[ROWS], int tokens) {
  for (int step = tokens; step < kLanes; step *= 2)
#pragma unroll
    for (int r = 0; r < ROWS; ++r) sum[r] += __shfl_xor_sync(kAllLanes, sum[r], step);
}

// The block's scale folds into q: folded [ROWS, dim] = q * scale; offset[r] = q . zero. All lanes of a warp take part
// and must meet (__syncwarp) before they read `folded`.
template <int ROWS>
__device__ __forceinline__ void fold_scale(const Tile& tile, const unsigned char* stage, const float* q, int dim,
                                           float* folded, float (&offset)[ROWS]) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) offset[r] = 0.0f;
  for (int channel = 4 * lane_id(); channel < dim; channel += 4 * kLanes) {
    const float4 s = load_four<Dtype::kFloat16>(stage + tile.scale.at, channel);
    const float4 z = load_four<Dtype::kFloat16>(stage + tile.zero.at, channel);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float4 x = load<float4>(q + r * dim + channel);
      *reinterpret_cast<float4*>(folded + r * dim + channel) = make_float4(x.x * s.x, x.y * s.y, x.z * s.z, x.w * s.w);
      offset[r] = fmaf(x.x, z.x, fmaf(x.y, z.y, fmaf(x.z, z.z, fmaf(x.w, z.w, offset[r]))));
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) offset[r] = lanes_sum(offset[r]);
}

// q [rows, dim] of one KV head, rows [first, first + ROWS), times softmax_scale to shared memory; rows that are not
// there as zeros. The whole thread block takes part and must meet before it reads.
template <int ROWS>
__device__ __forceinline__ void load_queries(const float* q, int64_t rows, int64_t first, int dim, float softmax_scale,
                                             float* to) {
  for (int i = static_cast<int>(threadIdx.x); i < ROWS * dim; i += kThreads) {
    const int64_t row = first + i / dim;
    to[i] = row < rows ? q[row * dim + i % dim] * softmax_scale : 0.0f;
  }
}

// The share of worker `index` of `workers` in `count` pieces of work.
__device__ __forceinline__ int64_t share_begin(int64_t count, int64_t index, int64_t workers) {
  return count * index / workers;
}

}  // namespace pikv::cuda
