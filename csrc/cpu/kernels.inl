// The CPU kernels, written once over vectors of PIKV_WIDTH floats and compiled once per instruction set: the including file
// sets PIKV_WIDTH, PIKV_KERNELS (the name of the table's function) and PIKV_NAME, under a `#pragma GCC target` of its own.
//
// A block of one head is decoded into a tile of floats that stays in the first-level cache; one routine then takes tiles
// into a running softmax. Scales of values are folded into the weights, so their tile holds bare codes.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#if PIKV_WIDTH > 1
#include <immintrin.h>
#endif

#include "pikv/kernels.h"

namespace pikv {
namespace {

constexpr int W = PIKV_WIDTH;
#if PIKV_WIDTH == 1
using Vec = float;
using VecInt = int32_t;
#else
typedef float Vec __attribute__((vector_size(4 * PIKV_WIDTH)));
typedef int32_t VecInt __attribute__((vector_size(4 * PIKV_WIDTH)));
#endif

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec splat(float x) {
#if PIKV_WIDTH == 8
  return _mm256_set1_ps(x);
#elif PIKV_WIDTH == 16
  return _mm512_set1_ps(x);
#else
  return x;
#endif
}

template <class To, class From>
inline To bit_cast(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

#if PIKV_WIDTH > 1
// Adds the two halves of a vector.
inline auto halves(Vec v) {
  typedef float Half __attribute__((vector_size(2 * PIKV_WIDTH)));
  Half part[2];
  std::memcpy(part, &v, sizeof v);
  return part[0] + part[1];
}
#endif

inline float sum(Vec v) {
#if PIKV_WIDTH == 1
  return v;
#else
  const auto half = halves(v);
  float x[W / 2];
  std::memcpy(x, &half, sizeof half);
  float total = 0.0f;
  for (float value : x) total += value;
  return total;
#endif
}

// Sums of four vectors at once, in fewer steps than four sums.
inline void sum4(const Vec v[4], float out[4]) {
#if PIKV_WIDTH == 8
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#elif PIKV_WIDTH == 16
  __m256 half[4];
  for (int i = 0; i < 4; ++i) half[i] = halves(v[i]);
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
#endif
}

// e^x for x <= 0, relative error below 2e-7; 0 for what float32 cannot hold.
inline Vec exp_negative(Vec x) {
  const Vec low = splat(-87.3f);
  const Vec clamped = x > low ? x : low;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, held in the low bits
  const Vec shifted = clamped * 1.44269504f + magic;
  const Vec whole = shifted - magic;
  const Vec r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec value = bit_cast<Vec>(bit_cast<VecInt>(p) + (bit_cast<VecInt>(shifted) << 23));
  return x > low ? value : Vec{};
}

inline float from_half(uint16_t h) {  // exact for every finite value, subnormal ones included
  const float magnitude = bit_cast<float>(uint32_t{h & 0x7fffu} << 13) * 0x1p112f;
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | uint32_t{h & 0x8000u} << 16);
}
inline float from_bfloat16(uint16_t h) { return bit_cast<float>(uint32_t{h} << 16); }

// Nearest float16 that is not above x. |x| <= 65504.
inline uint16_t half_down(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const bool negative = bits >> 31;
  uint32_t half, rest;  // magnitude rounded towards zero, and whether anything was cut off
  if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u) >> 13;
    rest = magnitude & 0x1fffu;
  } else {  // subnormal: multiples of 2^-24
    const float scaled = bit_cast<float>(magnitude) * 0x1p24f;
    half = static_cast<uint32_t>(scaled);
    rest = scaled != static_cast<float>(half);
  }
  if (negative && rest) ++half;
  return static_cast<uint16_t>(half | (negative ? 0x8000u : 0u));
}
inline uint16_t half_up(float x) {
  const uint16_t down = half_down(-x);
  return static_cast<uint16_t>(down ^ 0x8000u);
}

inline float element(const void* x, Dtype dtype, int64_t i) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(x)[i];
  const uint16_t h = static_cast<const uint16_t*>(x)[i];
  return dtype == Dtype::kBFloat16 ? from_bfloat16(h) : from_half(h);
}

void to_float(const void* x, Dtype dtype, int64_t offset, int64_t count, float* y) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(y, static_cast<const float*>(x) + offset, count * sizeof(float));
    return;
  }
  const uint16_t* h = static_cast<const uint16_t*>(x) + offset;
  if (dtype == Dtype::kBFloat16)
    for (int64_t i = 0; i < count; ++i) y[i] = from_bfloat16(h[i]);
  else {
    int64_t i = 0;
#if PIKV_WIDTH >= 8
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(h + i))));
#endif
    for (; i < count; ++i) y[i] = from_half(h[i]);
  }
}

// ---- codes

// Planar codes of one row to floats: code = high << Lo | low.
template <int Hi, int Lo>
inline void unpack(const uint8_t* __restrict high, const uint8_t* __restrict low, int64_t cols, float* __restrict y) {
  constexpr int per_byte = 8 / Hi;
  static_assert(Lo == 0 || Lo == Hi, "planes are packed alike");
  const int64_t bytes = cols / per_byte;
  for (int part = 0; part < per_byte; ++part) {
    const int shift = part * Hi;
    float* __restrict out = y + part * bytes;
    for (int64_t j = 0; j < bytes; ++j) {
      int code = (high[j] >> shift) & ((1 << Hi) - 1);
      if constexpr (Lo != 0) code = code << Lo | ((low[j] >> shift) & ((1 << Lo) - 1));
      out[j] = static_cast<float>(code);
    }
  }
}

void unpack_row(const uint8_t* high, const uint8_t* low, int64_t cols, int hi_bits, int lo_bits, float* y) {
  if (hi_bits == 8) return unpack<8, 0>(high, nullptr, cols, y);
  if (hi_bits == 4) return lo_bits ? unpack<4, 4>(high, low, cols, y) : unpack<4, 0>(high, nullptr, cols, y);
  return lo_bits ? unpack<2, 2>(high, low, cols, y) : unpack<2, 0>(high, nullptr, cols, y);
}

void pack_row(const uint8_t* codes, int64_t cols, int bits, int shift, uint8_t* packed) {
  const int per_byte = 8 / bits, mask = (1 << bits) - 1;
  const int64_t bytes = cols / per_byte;
  for (int64_t j = 0; j < bytes; ++j) {
    int byte = 0;
    for (int part = 0; part < per_byte; ++part) byte |= ((codes[part * bytes + j] >> shift) & mask) << (part * bits);
    packed[j] = static_cast<uint8_t>(byte);
  }
}

void quantize(const void* x, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int hi_bits, int lo_bits,
              bool per_channel, uint8_t* high, uint8_t* low, uint16_t* scale, uint16_t* zero) {
  thread_local std::vector<float> values, least, most;
  thread_local std::vector<uint8_t> codes;
  const int64_t groups = per_channel ? cols : rows;
  values.resize(rows * cols);
  least.assign(groups, std::numeric_limits<float>::infinity());
  most.assign(groups, kMinusInf);
  codes.resize(cols);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = values.data() + r * cols;
    to_float(x, dtype, r * row_stride, cols, row);
    if (per_channel) {
      float *lo = least.data(), *hi = most.data();
      for (int64_t c = 0; c < cols; ++c) {
        lo[c] = row[c] < lo[c] ? row[c] : lo[c];
        hi[c] = row[c] > hi[c] ? row[c] : hi[c];
      }
    } else {
      float lo = row[0], hi = row[0];
      for (int64_t c = 1; c < cols; ++c) {
        lo = row[c] < lo ? row[c] : lo;
        hi = row[c] > hi ? row[c] : hi;
      }
      least[r] = lo;
      most[r] = hi;
    }
  }
  const float levels = static_cast<float>((1 << (hi_bits + lo_bits)) - 1);
  for (int64_t g = 0; g < groups; ++g) {  // least and most become zero and scale as they are stored
    zero[g] = half_down(least[g]);
    least[g] = from_half(zero[g]);
    const float ratio = (most[g] - least[g]) / levels;
    const uint16_t up = half_up(ratio);
    scale[g] = (up & 0x7fffu) ? up : 1;  // 1 is float16's smallest positive number
    most[g] = from_half(scale[g]);
  }
  const int64_t high_bytes = cols * hi_bits / 8, low_bytes = cols * lo_bits / 8;
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = values.data() + r * cols;
    const float *z = least.data(), *s = most.data();
    if (per_channel)
      for (int64_t c = 0; c < cols; ++c) codes[c] = static_cast<uint8_t>(std::nearbyint((row[c] - z[c]) / s[c]));
    else
      for (int64_t c = 0; c < cols; ++c) codes[c] = static_cast<uint8_t>(std::nearbyint((row[c] - z[r]) / s[r]));
    pack_row(codes.data(), cols, hi_bits, lo_bits, high + r * high_bytes);
    if (lo_bits) pack_row(codes.data(), cols, lo_bits, 0, low + r * low_bytes);
  }
}

void dequantize(const uint8_t* high, const uint8_t* low, const uint16_t* scale, const uint16_t* zero, int64_t rows,
                int64_t cols, int hi_bits, int lo_bits, bool per_channel, float* y) {
  thread_local std::vector<float> scales, zeros;
  const int64_t groups = per_channel ? cols : rows;
  scales.resize(groups);
  zeros.resize(groups);
  to_float(scale, Dtype::kFloat16, 0, groups, scales.data());
  to_float(zero, Dtype::kFloat16, 0, groups, zeros.data());
  const bool middle = low == nullptr && lo_bits;
  const float step = middle ? static_cast<float>(1 << lo_bits) : 1.0f;
  const float shift = middle ? static_cast<float>((1 << lo_bits) - 1) / 2 : 0.0f;
  for (int64_t r = 0; r < rows; ++r) {
    float* row = y + r * cols;
    unpack_row(high + r * (cols * hi_bits / 8), low ? low + r * (cols * lo_bits / 8) : nullptr, cols, hi_bits,
               low ? lo_bits : 0, row);
    if (per_channel)
      for (int64_t c = 0; c < cols; ++c) row[c] = (row[c] * step + shift) * scales[c] + zeros[c];
    else
      for (int64_t c = 0; c < cols; ++c) row[c] = (row[c] * step + shift) * scales[r] + zeros[r];
  }
}

// ---- tiles

// Scratch of one thread. k [tokens, padded(D)], v [tokens, padded(E)], both with zeros behind their channels; weights
// [4, tokens]; v_scale, v_zero [tokens]; k_scale, k_zero [padded(D)]. tokens is a multiple of kPad, zeros behind the block's.
struct Tile {
  std::vector<float> k, v, weights, v_scale, v_zero, k_scale, k_zero, scaled_q;

  void fit(int64_t tokens, int64_t dim, int64_t value_dim) {
    const size_t padded_tokens = padded(tokens);
    grow(k, padded_tokens * padded(dim));
    grow(v, padded_tokens * padded(value_dim));
    grow(weights, 4 * padded_tokens);
    grow(v_scale, padded_tokens);
    grow(v_zero, padded_tokens);
    grow(k_scale, padded(dim));
    grow(k_zero, padded(dim));
    grow(scaled_q, 4 * padded(dim));
    if (tokens_ != tokens || dim_ != dim || value_dim_ != value_dim) {  // what lies behind must be zero again
      for (auto* buffer : {&k, &v, &weights, &v_scale, &v_zero, &k_scale, &k_zero}) std::fill(buffer->begin(), buffer->end(), 0.0f);
      tokens_ = tokens, dim_ = dim, value_dim_ = value_dim;
    }
  }

 private:
  static void grow(std::vector<float>& buffer, size_t size) {
    if (buffer.size() < size) buffer.assign(size, 0.0f);
  }
  int64_t tokens_ = 0, dim_ = 0, value_dim_ = 0;
};

Tile& scratch(int64_t tokens, int64_t dim, int64_t value_dim) {
  thread_local Tile tile;
  tile.fit(tokens, dim, value_dim);
  return tile;
}

// Key row (block, head, token) decoded to y; scale and zero are the block's, as floats.
inline void key_row(const Keys& keys, int64_t row, const float* scale, const float* zero, float* y) {
  const int64_t dim = keys.dim;
  if (keys.raw) return to_float(keys.raw, keys.dtype, row * dim, dim, y);
  const int64_t high_bytes = dim * keys.hi_bits / 8, low_bytes = dim * keys.lo_bits / 8;
  unpack_row(keys.high + row * high_bytes, keys.low ? keys.low + row * low_bytes : nullptr, dim, keys.hi_bits,
             keys.low ? keys.lo_bits : 0, y);
  for (int64_t d = 0; d < dim; ++d) y[d] = y[d] * scale[d] + zero[d];
}

inline void key_scales(const Keys& keys, int64_t id, int64_t head, Tile& tile) {
  const int64_t at = (id * keys.groups + head) * keys.dim;
  to_float(keys.scale, Dtype::kFloat16, at, keys.dim, tile.k_scale.data());
  to_float(keys.zero, Dtype::kFloat16, at, keys.dim, tile.k_zero.data());
}

// Value row decoded to y, codes bare; what they stand for goes to scale and zero.
inline void value_row(const Values& values, int64_t row, float* y, float& scale, float& zero) {
  const int64_t dim = values.dim;
  if (values.raw) {
    to_float(values.raw, values.dtype, row * dim, dim, y);
    scale = 1.0f, zero = 0.0f;
    return;
  }
  unpack_row(values.codes + row * (dim * values.bits / 8), nullptr, dim, values.bits, 0, y);
  scale = from_half(values.scale[row]), zero = from_half(values.zero[row]);
}

// Memory that will be read next, fetched a few lines at a time between computations: all at once would stall them.
class Ahead {
 public:
  void clear() { spans_ = at_ = 0, lines_ = 0; }
  void add(const char* from, int64_t bytes) {
    span_[spans_++] = {from, (bytes + 63) / 64};
    lines_ += (bytes + 63) / 64;
  }
  // Divides the fetching over `tokens` tokens of computation.
  void spread_over(int64_t tokens) { per_token_ = (lines_ + tokens - 1) / tokens; }
  void fetch(int64_t tokens) {
    for (int64_t n = per_token_ * tokens; n > 0 && at_ < spans_; --n) {
      Span& span = span_[at_];
      __builtin_prefetch(span.from);
      span.from += 64;
      if (--span.lines == 0) ++at_;
    }
  }

 private:
  struct Span {
    const char* from;
    int64_t lines;
  };
  Span span_[4];
  int spans_ = 0, at_ = 0;
  int64_t lines_ = 0, per_token_ = 0;
};

// Dot products of NR rows of q with the tile's tokens: logits [NR, padded tokens].
template <int NR>
void dots(const float* q, int64_t q_stride, const float* k, int64_t tokens, int64_t dim, float* logits,
          int64_t logits_stride, Ahead* ahead) {
  constexpr int NT = NR >= 3 ? 2 : 4;  // enough sums in flight to hide the latency of a multiply-add
  for (int64_t t = 0; t < tokens; t += NT) {
    if (ahead) ahead->fetch(NT);
    Vec total[NR][NT];
    for (int r = 0; r < NR; ++r)
      for (int j = 0; j < NT; ++j) total[r][j] = Vec{};
    for (int64_t d = 0; d < dim; d += W) {
      Vec key[NT];
      for (int j = 0; j < NT; ++j) key[j] = load(k + (t + j) * dim + d);
      for (int r = 0; r < NR; ++r) {
        const Vec query = load(q + r * q_stride + d);
        for (int j = 0; j < NT; ++j) total[r][j] += query * key[j];
      }
    }
    if constexpr (NR * NT % 4 == 0) {
      float totals[NR * NT];
      for (int i = 0; i < NR * NT; i += 4) sum4(&total[0][0] + i, totals + i);
      for (int r = 0; r < NR; ++r)
        for (int j = 0; j < NT; ++j) logits[r * logits_stride + t + j] = totals[r * NT + j];
    } else {
      for (int r = 0; r < NR; ++r)
        for (int j = 0; j < NT; ++j) logits[r * logits_stride + t + j] = sum(total[r][j]);
    }
  }
}

// out [NR, dim] += weights [NR, tokens] v [tokens, padded dim]; out rows are dim apart, so the last piece may be cut.
template <int NR>
void accumulate(const float* weights, int64_t weights_stride, const float* v, int64_t tokens, int64_t dim, float* out) {
  constexpr int NV = static_cast<int>(kPad) / W;
  const int64_t padded_dim = padded(dim);
  for (int64_t d = 0; d < dim; d += kPad) {
    Vec total[NR][NV];
    for (int r = 0; r < NR; ++r)
      for (int i = 0; i < NV; ++i) total[r][i] = Vec{};
    for (int64_t t = 0; t < tokens; ++t) {
      Vec value[NV];
      for (int i = 0; i < NV; ++i) value[i] = load(v + t * padded_dim + d + i * W);
      for (int r = 0; r < NR; ++r) {
        const Vec weight = splat(weights[r * weights_stride + t]);
        for (int i = 0; i < NV; ++i) total[r][i] += weight * value[i];
      }
    }
    if (dim - d >= kPad) {
      for (int r = 0; r < NR; ++r)
        for (int i = 0; i < NV; ++i) {
          float* to = out + r * dim + d + i * W;
          store(to, load(to) + total[r][i]);
        }
    } else {
      for (int r = 0; r < NR; ++r) {
        float part[kPad];
        std::memcpy(part, total[r], sizeof part);
        for (int64_t i = 0; i < dim - d; ++i) out[r * dim + d + i] += part[i];
      }
    }
  }
}

#if PIKV_WIDTH > 1
#include "fused.inl"
#else
inline bool codes_in_place(const Keys&) { return false; }
inline bool codes_in_place(const Values&) { return false; }
#endif

// Where the tokens to take in are: tiles of floats, or, where they are null, the pool's codes from `row` on.
struct Tokens {
  const float* k;
  const float* v;
  const Keys& keys;
  const Values& values;
  int64_t row, count;
  const int64_t* positions;  // [count] or null
  Ahead* ahead;              // or null
};

template <int NR>
void logits_of(const float* q, int64_t q_stride, Tile& tile, const Tokens& tokens, float* logits, int64_t width) {
#if PIKV_WIDTH > 1
  if (!tokens.k) {  // the block's scale folds into q, its zero into a constant
    float offset[NR];
    for (int r = 0; r < NR; ++r) {
      Vec total{};
      for (int64_t d = 0; d < q_stride; d += W) {
        const Vec query = load(q + r * q_stride + d);
        total += query * load(tile.k_zero.data() + d);
        store(tile.scaled_q.data() + r * q_stride + d, query * load(tile.k_scale.data() + d));
      }
      offset[r] = sum(total);
    }
    dots_of_codes<NR>(tile.scaled_q.data(), q_stride, tokens.keys, tokens.row, logits, width, false, tokens.ahead);
    for (int r = 0; r < NR; ++r)
      for (int64_t t = 0; t < tokens.count; ++t) logits[r * width + t] += offset[r];
    return;
  }
#endif
  dots<NR>(q, q_stride, tokens.k, width, q_stride, logits, width, tokens.ahead);
}

template <int NR>
void weigh_values(const float* weights, int64_t width, const Tokens& tokens, float* out) {
#if PIKV_WIDTH > 1
  if (!tokens.v) {
    const Values& values = tokens.values;
    const uint8_t* codes = values.codes + tokens.row * (values.dim * values.bits / 8);
    values.bits == 8 ? accumulate_codes<NR, 8>(weights, width, codes, tokens.count, values.dim, out)
                     : accumulate_codes<NR, 4>(weights, width, codes, tokens.count, values.dim, out);
    return;
  }
#endif
  accumulate<NR>(weights, width, tokens.v, tokens.count, tokens.values.dim, out);
}

// Takes tokens into the partial of NR rows. The tile holds the scales of the values, where they are codes.
template <int NR>
void absorb(const float* q, int64_t q_stride, Tile& tile, const Tokens& tokens, const int64_t* query_positions,
            Partial partial) {
  const int64_t width = padded(tokens.count), value_dim = tokens.values.dim;
  float* weights = tile.weights.data();
  logits_of<NR>(q, q_stride, tile, tokens, weights, width);
  for (int r = 0; r < NR; ++r) {
    float* row = weights + r * width;
    for (int64_t t = tokens.count; t < width; ++t) row[t] = kMinusInf;
    if (tokens.positions)
      for (int64_t t = 0; t < tokens.count; ++t)
        if (tokens.positions[t] > query_positions[r]) row[t] = kMinusInf;
    Vec most = load(row);
    for (int64_t t = W; t < width; t += W) {
      const Vec x = load(row + t);
      most = x > most ? x : most;
    }
    float lanes[W], high = partial.high[r];
    store(lanes, most);
    for (float lane : lanes) high = lane > high ? lane : high;
    if (high == kMinusInf) {  // nothing seen yet, nothing to see here
      std::memset(row, 0, width * sizeof(float));
      continue;
    }
    const float fade = partial.high[r] == high ? 1.0f : std::exp(partial.high[r] - high);
    Vec total{};
    for (int64_t t = 0; t < width; t += W) {
      const Vec weight = exp_negative(load(row + t) - splat(high));
      total += weight;
      store(row + t, weight);
    }
    partial.high[r] = high;
    partial.total[r] = partial.total[r] * fade + sum(total);
    float* out = partial.out + r * value_dim;
    float zero = 0.0f;
    if (!tokens.values.raw) {
      Vec zeros{};
      for (int64_t t = 0; t < width; t += W) {
        const Vec weight = load(row + t);
        zeros += weight * load(tile.v_zero.data() + t);
        store(row + t, weight * load(tile.v_scale.data() + t));
      }
      zero = sum(zeros);
    }
    if (fade != 1.0f || zero != 0.0f)
      for (int64_t e = 0; e < value_dim; ++e) out[e] = out[e] * fade + zero;
  }
  weigh_values<NR>(weights, width, tokens, partial.out);
}

void absorb_rows(const float* q, int64_t rows, Tile& tile, const Tokens& tokens, const int64_t* query_positions,
                 Partial partial) {
  const int64_t q_stride = padded(tokens.keys.dim), value_dim = tokens.values.dim;
  for (int64_t r = 0; r < rows; r += 4) {
    const Partial here{partial.out + r * value_dim, partial.high + r, partial.total + r};
    const float* at = q + r * q_stride;
    const int64_t* positions = query_positions ? query_positions + r : nullptr;
    switch (rows - r) {
      case 1: absorb<1>(at, q_stride, tile, tokens, positions, here); break;
      case 2: absorb<2>(at, q_stride, tile, tokens, positions, here); break;
      case 3: absorb<3>(at, q_stride, tile, tokens, positions, here); break;
      default: absorb<4>(at, q_stride, tile, tokens, positions, here);
    }
  }
}

// ---- attention

// Names the memory of one head of a block as what to fetch next.
void fetch_ahead(const Keys& keys, const Values& values, int64_t id, int64_t head, Ahead& ahead) {
  const int64_t row = (id * keys.groups + head) * keys.block_size, tokens = keys.block_size;
  ahead.clear();
  auto plane = [&](const void* base, int64_t row_bytes) {
    if (base) ahead.add(static_cast<const char*>(base) + row * row_bytes, tokens * row_bytes);
  };
  if (keys.raw) {
    plane(keys.raw, keys.dim * (keys.dtype == Dtype::kFloat32 ? 4 : 2));
  } else {
    plane(keys.high, keys.dim * keys.hi_bits / 8);
    plane(keys.low, keys.dim * keys.lo_bits / 8);
  }
  plane(values.raw, values.dim * (values.dtype == Dtype::kFloat32 ? 4 : 2));
  plane(values.codes, values.dim * values.bits / 8);
  ahead.spread_over(tokens);
}

void attend_blocks(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* ids,
                   int64_t count, const int64_t* key_positions, const int64_t* query_positions, Partial partial) {
  const int64_t tokens = keys.block_size, dim = keys.dim, value_dim = values.dim, groups = keys.groups;
  Tile& tile = scratch(tokens, dim, value_dim);
  Ahead ahead;
  // Rows that are whole vectors of float32 already are read where they lie, and so are codes where the kernels can.
  const bool raw_keys_in_place = keys.raw && keys.dtype == Dtype::kFloat32 && padded(dim) == dim && padded(tokens) == tokens;
  const bool raw_values_in_place = values.raw && values.dtype == Dtype::kFloat32 && padded(value_dim) == value_dim;
  const bool key_codes_in_place = !keys.raw && codes_in_place(keys), value_codes_in_place = codes_in_place(values);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t head = 0; head < groups; ++head) {
      const bool last_head = head + 1 == groups;
      if (!last_head || i + 1 < count) fetch_ahead(keys, values, ids[i + last_head], last_head ? 0 : head + 1, ahead);
      const int64_t row = (ids[i] * groups + head) * tokens;
      if (!keys.raw) key_scales(keys, ids[i], head, tile);
      const float *k = tile.k.data(), *v = tile.v.data();
      if (raw_keys_in_place) {
        k = static_cast<const float*>(keys.raw) + row * dim;
      } else if (key_codes_in_place) {
        k = nullptr;
      } else {
        for (int64_t t = 0; t < tokens; ++t)
          key_row(keys, row + t, tile.k_scale.data(), tile.k_zero.data(), tile.k.data() + t * padded(dim));
      }
      if (raw_values_in_place) {
        v = static_cast<const float*>(values.raw) + row * value_dim;
      } else if (value_codes_in_place) {
        v = nullptr;
        to_float(values.scale, Dtype::kFloat16, row, tokens, tile.v_scale.data());
        to_float(values.zero, Dtype::kFloat16, row, tokens, tile.v_zero.data());
      } else {
        for (int64_t t = 0; t < tokens; ++t)
          value_row(values, row + t, tile.v.data() + t * padded(value_dim), tile.v_scale[t], tile.v_zero[t]);
      }
      const Partial here{partial.out + head * rows * value_dim, partial.high + head * rows, partial.total + head * rows};
      const Tokens block{k, v, keys, values, row, tokens, key_positions ? key_positions + i * tokens : nullptr, &ahead};
      absorb_rows(q + head * rows * padded(dim), rows, tile, block, query_positions, here);
    }
  }
}

void attend_tokens(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* ids,
                   const int64_t* offsets, const bool* read, int64_t count, int64_t head, Partial partial) {
  constexpr int64_t kTokens = 64;
  const int64_t dim = keys.dim, value_dim = values.dim;
  Tile& tile = scratch(kTokens, dim, value_dim);
  int64_t held = 0;
  auto flush = [&] {
    for (int64_t t = held; t < padded(held); ++t) {  // whatever an earlier round left there
      std::memset(tile.k.data() + t * padded(dim), 0, padded(dim) * sizeof(float));
      tile.v_scale[t] = tile.v_zero[t] = 0.0f;
    }
    absorb_rows(q, rows, tile, {tile.k.data(), tile.v.data(), keys, values, 0, held, nullptr, nullptr}, nullptr, partial);
    held = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (read && !read[i]) continue;
    const int64_t row = (ids[i] * keys.groups + head) * keys.block_size + offsets[i];
    if (!keys.raw) key_scales(keys, ids[i], head, tile);
    key_row(keys, row, tile.k_scale.data(), tile.k_zero.data(), tile.k.data() + held * padded(dim));
    value_row(values, row, tile.v.data() + held * padded(value_dim), tile.v_scale[held], tile.v_zero[held]);
    if (++held == kTokens) flush();
  }
  if (held) flush();
}

// ---- scores

inline Vec absolute(Vec x) { return x < Vec{} ? -x : x; }
inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }

// Relative rounding of a float32 dot product over dim channels, so that bounds on logits hold as computed.
inline float rounding_of(int64_t dim) {
  return 4.0f * static_cast<float>(dim) * std::numeric_limits<float>::epsilon();
}

// Dot products of NR rows of the tile's scaled_q with a block's high plane, read in place or from the tile.
template <int NR>
void coarse_dots(const Tile& tile, const Keys& keys, int64_t row, bool in_place, float* logits, int64_t width,
                 Ahead* ahead) {
  const int64_t stride = padded(keys.dim);
#if PIKV_WIDTH > 1
  if (in_place) return dots_of_codes<NR>(tile.scaled_q.data(), stride, keys, row, logits, width, true, ahead);
#else
  (void)in_place, (void)row;
#endif
  dots<NR>(tile.scaled_q.data(), stride, tile.k.data(), width, stride, logits, width, ahead);
}

void score_tokens(const float* q, int64_t rows, const Keys& keys, const int64_t* ids, int64_t count, int64_t head,
                  float* coarse, float* radius, float* spread, int64_t stride) {
  const int64_t tokens = keys.block_size, dim = keys.dim, q_stride = padded(dim), width = padded(tokens);
  Tile& tile = scratch(tokens, dim, 1);
  const int lo_bits = keys.raw ? 0 : keys.lo_bits;
  const float step = static_cast<float>(1 << lo_bits), middle = (step - 1) / 2;
  const float half_width = keys.raw ? 0.5f : middle;  // with raw keys the plane is a rounding of them
  const float variance = keys.raw ? 1.0f / 12 : (step * step - 1) / 12;
  const float levels = static_cast<float>((1 << (keys.hi_bits + keys.lo_bits)) - 1);
  const float rounding = rounding_of(dim);
  const int64_t high_bytes = dim * keys.hi_bits / 8;
  const bool in_place = codes_in_place(keys);
  Ahead ahead;
  for (int64_t i = 0; i < count; ++i) {
    key_scales(keys, ids[i], head, tile);
    const int64_t row = (ids[i] * keys.groups + head) * tokens;
    ahead.clear();
    if (i + 1 < count) {
      const int64_t next = (ids[i + 1] * keys.groups + head) * tokens * high_bytes;
      ahead.add(reinterpret_cast<const char*>(keys.high) + next, tokens * high_bytes);
      ahead.spread_over(tokens);
    }
    if (!in_place)
      for (int64_t t = 0; t < tokens; ++t)
        unpack_row(keys.high + (row + t) * high_bytes, nullptr, dim, keys.hi_bits, 0, tile.k.data() + t * q_stride);
    const float *scale = tile.k_scale.data(), *zero = tile.k_zero.data();
    for (int64_t first = 0; first < rows; first += 4) {
      const int64_t here = rows - first < 4 ? rows - first : 4;
      float offset[4];
      for (int64_t r = 0; r < here; ++r) {
        const float* query = q + (first + r) * q_stride;
        float* scaled = tile.scaled_q.data() + r * q_stride;
        Vec at{}, reach{}, square{};
        for (int64_t d = 0; d < q_stride; d += W) {  // behind dim, query and scales are zero
          const Vec x = load(query + d), s = load(scale + d), z = load(zero + d);
          at += x * (z + s * middle);
          reach += absolute(x) * (s * half_width + larger(absolute(z), absolute(z + s * levels)) * rounding);
          square += (x * s) * (x * s);
          store(scaled + d, x * s * step);
        }
        offset[r] = sum(at);
        const float farthest = sum(reach), half_variance = 0.5f * variance * sum(square);
        radius[(first + r) * stride + i] = farthest;
        spread[(first + r) * stride + i] = half_variance < farthest ? half_variance : farthest;  // no error exceeds it
      }
      float* logits = tile.weights.data();
      switch (here) {
        case 1: coarse_dots<1>(tile, keys, row, in_place, logits, width, &ahead); break;
        case 2: coarse_dots<2>(tile, keys, row, in_place, logits, width, &ahead); break;
        case 3: coarse_dots<3>(tile, keys, row, in_place, logits, width, &ahead); break;
        default: coarse_dots<4>(tile, keys, row, in_place, logits, width, &ahead);
      }
      for (int64_t r = 0; r < here; ++r) {
        float* out = coarse + ((first + r) * stride + i) * tokens;
        for (int64_t t = 0; t < tokens; ++t) out[t] = logits[r * width + t] + offset[r];
      }
    }
  }
}

void score_blocks(const float* q, int64_t rows, const Keys& keys, const int64_t* ids, int64_t count, int64_t head,
                  float* bound, float* centre, float* spread, int64_t stride) {
  const int64_t dim = keys.dim, q_stride = padded(dim);
  Tile& tile = scratch(1, dim, 1);
  // A hair above the levels: the scale comes from a division rounded in float32.
  const float half_levels = static_cast<float>((1 << (keys.hi_bits + keys.lo_bits)) - 1) * (1 + 0x1p-22f) / 2;
  const float rounding = rounding_of(dim);
  for (int64_t i = 0; i < count; ++i) {
    key_scales(keys, ids[i], head, tile);
    for (int64_t r = 0; r < rows; ++r) {
      const float* query = q + r * q_stride;
      Vec middle{}, reach{}, square{};
      for (int64_t d = 0; d < q_stride; d += W) {
        const Vec x = load(query + d), half = load(tile.k_scale.data() + d) * half_levels;
        const Vec lower = load(tile.k_zero.data() + d), upper = lower + half + half;
        middle += x * (lower + half);
        reach += absolute(x) * (half + larger(absolute(lower), absolute(upper)) * rounding);
        square += (x * half) * (x * half);
      }
      centre[r * stride + i] = sum(middle);
      bound[r * stride + i] = centre[r * stride + i] + sum(reach);
      spread[r * stride + i] = sum(square) / 6;
    }
  }
}

const CpuKernels kTable{PIKV_NAME,     quantize,     dequantize,  attend_blocks,
                        attend_tokens, score_tokens, score_blocks};

}  // namespace

const CpuKernels* PIKV_KERNELS() { return &kTable; }

}  // namespace pikv
