// Scratch tiles: one head's block decoded to floats that stay in the first-level cache, what is fetched ahead, and the
// two inner loops over tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "codes.inl"

namespace pikv {
namespace {

// Scratch of one thread. k [tokens, padded(D)], v [tokens, padded(E)], both with zeros behind their channels; weights
// [4, tokens]; v_scale, v_zero [tokens]; k_scale, k_zero, and what scores derive from them, k_middle, k_reach
// [padded(D)]; scaled_q [4, padded(D)]; q_bytes, weight_bytes: scaled_q and weights cut into bytes, where that is done.
// tokens is a multiple of kPad, zeros behind the block's.
struct Tile {
  std::vector<float> k, v, weights, v_scale, v_zero, k_scale, k_zero, k_middle, k_reach, scaled_q;
  std::vector<int32_t> q_bytes, weight_bytes;
  // Of low-rank parts, in size as low_rank.inl needs them: factors [tokens, padded(rank)] and bases [tokens] of both
  // sides, scales of factors, what factors add to logits, and weights before the scales of values are folded in.
  std::vector<float> k_factors, v_factors, factor_scale, factor_logits, shares;
  std::vector<int32_t> factor_bytes;
  std::vector<int64_t> k_basis, v_basis;

  void fit(int64_t tokens, int64_t dim, int64_t value_dim) {
    const size_t padded_tokens = padded(tokens);
    grow(k, padded_tokens * padded(dim));
    grow(v, padded_tokens * padded(value_dim));
    grow(weights, 4 * padded_tokens);
    grow(v_scale, padded_tokens);
    grow(v_zero, padded_tokens);
    grow(k_scale, padded(dim));
    grow(k_zero, padded(dim));
    grow(k_middle, padded(dim));
    grow(k_reach, padded(dim));
    grow(scaled_q, 4 * padded(dim));
    grow(q_bytes, 4 * padded(dim));
    grow(weight_bytes, 4 * padded_tokens);
    if (tokens_ != tokens || dim_ != dim || value_dim_ != value_dim) {  // what lies behind must be zero again
      for (auto* buffer : {&k, &v, &weights, &v_scale, &v_zero, &k_scale, &k_zero})
        std::fill(buffer->begin(), buffer->end(), 0.0f);
      tokens_ = tokens, dim_ = dim, value_dim_ = value_dim;
    }
  }

 private:
  template <class T>
  static void grow(std::vector<T>& buffer, size_t size) {
    if (buffer.size() < size) buffer.assign(size, T{});
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

// What a tile of tokens does to four rows' sums: these fade, since a higher logit came, and get what the zeros of the
// values weigh; no weight of a row is above `most`.
struct Update {
  float fade[4], zero[4], most[4];
};

// A block's scales and zeros folded into four rows of q, which lie in a tile's scaled_q: the constant that the zeros
// give, and scaled_q's largest magnitude.
struct Folded {
  float offset[4], most[4];
};

// Memory that will be read next, fetched a few lines at a time between computations: all at once would stall them. Into
// the second-level cache: in the first, it would push out what is being computed with.
class Ahead {
 public:
  void clear() { spans_ = at_ = 0; }
  void add(const char* from, int64_t bytes) {
    span_[spans_++] = {from, from + bytes};
  }
  // That the same is to be fetched between values, too: keys leave half of it to them.
  void values_follow() { phases_ = 2; }
  // Divides what is left to fetch, or the keys' half of it, over so many calls of `fetch`.
  void spread_over(int64_t calls) {
    calls *= phases_;
    phases_ = 1;
    int64_t left = 0;
    for (int i = at_; i < spans_; ++i) left += span_[i].to - span_[i].from;
    lines_ = (left / 64 + calls - 1) / calls;
  }
  void fetch() {  // up to some lines past a span's end, which harms nobody
    if (at_ == spans_) return;
    Span& span = span_[at_];
    for (int64_t i = 0; i < lines_; ++i) __builtin_prefetch(span.from + 64 * i, 0, 2);
    span.from += 64 * lines_;
    at_ += span.from >= span.to;
  }

 private:
  struct Span {
    const char *from, *to;
  };
  Span span_[8];
  int spans_ = 0, at_ = 0, phases_ = 1;
  int64_t lines_ = 0;
};

// Dot products of NR rows of q with the tile's tokens: logits [NR, padded tokens].
template <int NR>
void dots(const float* q, int64_t q_stride, const float* k, int64_t tokens, int64_t dim, float* logits,
          int64_t logits_stride, Ahead* ahead) {
  constexpr int NT = NR >= 3 ? 2 : 4;  // enough sums in flight to hide the latency of a multiply-add
  if (ahead) ahead->spread_over((tokens + NT - 1) / NT);
  for (int64_t t = 0; t < tokens; t += NT) {
    if (ahead) ahead->fetch();
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
void accumulate(const float* weights, int64_t weights_stride, const float* v, int64_t tokens, int64_t dim, float* out,
                Ahead* ahead) {
  constexpr int NV = static_cast<int>(kPad) / W;
  const int64_t padded_dim = padded(dim);
  if (ahead) ahead->spread_over(padded_dim / kPad * ((tokens + 3) / 4));
  for (int64_t d = 0; d < dim; d += kPad) {
    Vec total[NR][NV];
    for (int r = 0; r < NR; ++r)
      for (int i = 0; i < NV; ++i) total[r][i] = Vec{};
    for (int64_t t = 0; t < tokens; ++t) {
      if (ahead && t % 4 == 0) ahead->fetch();
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

}  // namespace
}  // namespace pikv
