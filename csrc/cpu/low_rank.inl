// The low-rank part of keys and values, never made dense: logits get (q B^T) A^T, and what the values' factors sum up
// to meets their basis once, at the end.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "integer.inl"

namespace pikv {
namespace {

// Factors of tokens as floats: a [tokens, padded(rank)]; basis [tokens] of each; same: all have the first one's. With a
// null, the codes of block `matrix` (of a head) are read in place.
struct Factors {
  const float* a;
  const int64_t* basis;
  bool same;
  int64_t head, matrix;
};

// Factors of `count` tokens of a block's head, from `first` on, decoded to a.
void factor_rows(const LowRank& part, int64_t groups, int64_t size, int64_t id, int64_t head, int64_t first,
                 int64_t count, Tile& tile, float* a) {
  const int64_t rank = part.rank, stride = padded(rank), at = id * groups + head;
  if (static_cast<int64_t>(tile.factor_scale.size()) < 2 * stride) tile.factor_scale.resize(2 * stride);
  float *scale = tile.factor_scale.data(), *zero = scale + stride;
  to_float(part.scale, Dtype::kFloat16, at * rank, rank, scale);
  to_float(part.zero, Dtype::kFloat16, at * rank, rank, zero);
  for (int64_t t = 0; t < count; ++t) {
    const uint8_t* codes = part.codes + (at * size + first + t) * rank;
    for (int64_t j = 0; j < rank; ++j) a[t * stride + j] = codes[j] * scale[j] + zero[j];
    for (int64_t j = rank; j < stride; ++j) a[t * stride + j] = 0.0f;
  }
}

// Whether whole blocks' codes are read in place, by the bytes' products.
inline bool factors_in_place(const LowRank& part, int64_t tokens) {
  return W == 16 && part.rank % 16 == 0 && tokens % 16 == 0;
}

// Factors of a whole block's head, decoded to a where they are not read in place.
Factors block_factors(const LowRank& part, int64_t groups, int64_t tokens, int64_t id, int64_t head, Tile& tile,
                      float* a) {
  if (factors_in_place(part, tokens)) a = nullptr;
  if (a) factor_rows(part, groups, tokens, id, head, 0, tokens, tile, a);
  return {a, part.basis_of + id, true, head, id * groups + head};
}

#if PIKV_WIDTH == 16
// Logits that a block's factors add, [NR, width]: the scales of its factors fold into the projected queries p [NR,
// rank], their zeros into a constant.
template <int NR>
void code_factor_logits(const LowRank& part, int64_t matrix, const float* p, Tile& tile, int64_t tokens, float* added,
                        int64_t width) {
  const int64_t rank = part.rank;
  if (static_cast<int64_t>(tile.factor_scale.size()) < 4 * rank) tile.factor_scale.resize(4 * rank);
  if (static_cast<int64_t>(tile.factor_bytes.size()) < 4 * rank) tile.factor_bytes.resize(4 * rank);
  float *folded = tile.factor_scale.data(), offset[4], most[NR];
  Vec zeros[4] = {}, largest_of[NR] = {};
  for (int64_t j = 0; j < rank; j += W) {
    const Vec scale = widened<Dtype::kFloat16>(part.scale + matrix * rank + j);
    const Vec zero = widened<Dtype::kFloat16>(part.zero + matrix * rank + j);
    for (int r = 0; r < NR; ++r) {
      const Vec query = load(p + r * rank + j), scaled = query * scale;
      zeros[r] += query * zero;
      largest_of[r] = larger(absolute(scaled), largest_of[r]);
      store(folded + r * rank + j, scaled);
    }
  }
  sum4(zeros, offset);
  for (int r = 0; r < NR; ++r) most[r] = largest(largest_of[r]);
  IntegerRows rows{tile.factor_bytes.data(), {}};
  rows.cut<NR>(folded, rank, rank, most);
  integer_dots<NR, 8, 0>(rows, part.codes + matrix * tokens * rank, nullptr, tokens, rank, offset, added, width,
                         nullptr);
}

// sums [NR] += what shares [NR, width] weigh of a block's factors.
template <int NR>
void accumulate_factors(const LowRank& part, int64_t matrix, const float* shares, int64_t width, int64_t tokens,
                        float* const sums[NR]) {
  const int64_t rank = part.rank;
  const uint8_t* codes = part.codes + matrix * tokens * rank;
  float all[4];
  Vec totals[4] = {};
  for (int r = 0; r < NR; ++r)
    for (int64_t t = 0; t < width; t += W) totals[r] += load(shares + r * width + t);
  sum4(totals, all);
  for (int64_t j = 0; j < rank; j += W) {
    Vec weighed[NR] = {};
    for (int64_t t = 0; t < tokens; ++t) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + t * rank + j));
      const Vec code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
      for (int r = 0; r < NR; ++r) weighed[r] += splat(shares[r * width + t]) * code;
    }
    const Vec scale = widened<Dtype::kFloat16>(part.scale + matrix * rank + j);
    const Vec zero = widened<Dtype::kFloat16>(part.zero + matrix * rank + j);
    for (int r = 0; r < NR; ++r)
      if (sums[r]) store(sums[r] + j, load(sums[r] + j) + weighed[r] * scale + zero * all[r]);
  }
}
#endif

// Room for the factors and bases of so many tokens.
void fit_factors(const LowRank* part, int64_t tokens, std::vector<float>& a, std::vector<int64_t>& basis) {
  if (!part) return;
  const size_t floats = padded(tokens) * padded(part->rank);
  if (a.size() < floats) a.resize(floats);
  if (static_cast<int64_t>(basis.size()) < tokens) basis.resize(tokens);
}

// logits [NR, width] of rows first .. of `rows` of a head += (q B^T) A^T.
template <int NR>
void add_factor_logits(const LowRank& part, const Factors& factors, int64_t groups, int64_t rows, int64_t first,
                       Tile& tile, int64_t count, float* logits, int64_t width) {
  const int64_t stride = padded(part.rank);
  auto projected = [&](int64_t t) {
    return part.projected + ((factors.basis[t] * groups + factors.head) * rows + first) * stride;
  };
  if (factors.same) {
    if (static_cast<int64_t>(tile.factor_logits.size()) < 4 * width) tile.factor_logits.resize(4 * width);
    float* added = tile.factor_logits.data();
#if PIKV_WIDTH == 16
    if (!factors.a)
      code_factor_logits<NR>(part, factors.matrix, projected(0), tile, count, added, width);
    else
#endif
      dots<NR>(projected(0), stride, factors.a, width, stride, added, width, nullptr);
    for (int64_t i = 0; i < NR * width; ++i) logits[i] += added[i];
    return;
  }
  for (int64_t t = 0; t < count; ++t) {
    const float *q = projected(t), *a = factors.a + t * stride;
    for (int r = 0; r < NR; ++r) {
      Vec total{};
      for (int64_t j = 0; j < stride; j += W) total += load(q + r * stride + j) * load(a + j);
      logits[r * width + t] += sum(total);
    }
  }
}

// Weighted sums of the values' factors, per basis and row of a partial. When it goes, they are added to the partial's
// output. Sums of a basis stand beside the highest logit of when they were last touched.
class FactorSums {
 public:
  // rows of one head; the partial's first row is of first_head.
  FactorSums(const Values& values, int64_t rows, int64_t heads, int64_t first_head, Partial partial)
      : values_(values), partial_(partial), rows_(rows), all_(rows * heads), first_head_(first_head) {
    if (!values.low_rank) return;
    stride_ = padded(values.low_rank->rank);
    sums_.assign(values.low_rank->bases * all_ * stride_, 0.0f);
    highs_.assign(values.low_rank->bases * all_, kMinusInf);
  }
  FactorSums(const FactorSums&) = delete;
  FactorSums& operator=(const FactorSums&) = delete;
  ~FactorSums() {
    for (size_t i = 0; i < highs_.size(); ++i) {
      if (highs_[i] == kMinusInf) continue;
      const LowRank& part = *values_.low_rank;
      const int64_t basis = static_cast<int64_t>(i) / all_, r = static_cast<int64_t>(i) % all_, dim = values_.dim;
      const float* rows = part.basis + (basis * values_.groups + first_head_ + r / rows_) * part.rank * dim;
      const float share = std::exp(highs_[i] - partial_.high[r]);
      for (int64_t j = 0; j < part.rank; ++j) {
        const float factor = share * sums_[i * stride_ + j];
        for (int64_t e = 0; e < dim; ++e) partial_.out[r * dim + e] += factor * rows[j * dim + e];
      }
    }
  }

  // Adds tokens with shares [NR, width] of the softmax beside high [NR], which is where the rows' highs are.
  template <int NR>
  void add(const Factors& factors, const float* shares, int64_t width, int64_t count, const float* high) {
    const int64_t first = high - partial_.high;
    auto ready = [&](int64_t basis, int r) {  // the sums of a row, beside its high of now
      const int64_t at = basis * all_ + first + r;
      float *sums = sums_.data() + at * stride_, &then = highs_[at];
      if (then != high[r]) {
        const float fade = std::exp(then - high[r]);
        for (int64_t j = 0; j < stride_; ++j) sums[j] *= fade;
        then = high[r];
      }
      return sums;
    };
    if (factors.same) {
      float* sums[NR];
      for (int r = 0; r < NR; ++r) sums[r] = high[r] != kMinusInf ? ready(factors.basis[0], r) : nullptr;
#if PIKV_WIDTH == 16
      if (!factors.a) {
        accumulate_factors<NR>(*values_.low_rank, factors.matrix, shares, width, count, sums);
        return;
      }
#endif
      accumulate<NR>(shares, width, factors.a, count, stride_,
                     sums_.data() + (factors.basis[0] * all_ + first) * stride_, nullptr);
      return;
    }
    for (int64_t t = 0; t < count; ++t)
      for (int r = 0; r < NR; ++r) {
        if (high[r] == kMinusInf) continue;
        float* sums = ready(factors.basis[t], r);
        const Vec share = splat(shares[r * width + t]);
        for (int64_t j = 0; j < stride_; j += W)
          store(sums + j, load(sums + j) + share * load(factors.a + t * stride_ + j));
      }
  }

 private:
  const Values& values_;
  Partial partial_;
  int64_t rows_, all_, first_head_, stride_ = 0;
  std::vector<float> sums_, highs_;
};

}  // namespace
}  // namespace pikv
