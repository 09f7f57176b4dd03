// Choosing tokens by their scores: ranks, the best of them, and what the others may have. One KV head at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "scores.inl"

namespace pikv {
namespace {

// Log-sum-exp of a row; x has no NaN.
inline float log_sum_exp(const float* x, int64_t count) {
  float high = kMinusInf;
  int64_t i = 0;
  if (count >= W) {
    Vec most = load(x);
    for (i = W; i + W <= count; i += W) most = larger(load(x + i), most);
    high = largest(most);
  }
  for (; i < count; ++i) high = std::max(high, x[i]);
  if (std::isinf(high)) return high;
  Vec total{};
  float rest = 0.0f;
  for (i = 0; i + W <= count; i += W) total += exp_negative(load(x + i) - splat(high));
  for (; i < count; ++i) rest += std::exp(x[i] - high);
  return high + std::log(sum(total) + rest);
}

inline double log_add_exp(double x, double y) {
  const double high = std::max(x, y);
  return std::isinf(high) ? high : high + std::log(std::exp(x - high) + std::exp(y - high));
}

// coarse: rows of `tokens` logits, `stride` apart.
void rank_tokens(const float* coarse, int64_t rows, int64_t tokens, int64_t stride, const float* raw_lse, float* rank) {
  std::fill(rank, rank + tokens, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = coarse + r * stride;
    add_weights(row, static_cast<float>(log_add_exp(log_sum_exp(row, tokens), raw_lse[r])), tokens, rank);
  }
}

// ---- the best

// Whole numbers in the order of the floats; -0 is 0.
inline uint32_t ordered(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

void select_topk(const float* scores, int64_t count, int64_t best, int64_t* indices) {
  thread_local std::vector<uint32_t> numbers;
  if (static_cast<int64_t>(numbers.size()) < count) numbers.resize(count);
  uint32_t* number = numbers.data();
  for (int64_t i = 0; i < count; ++i) number[i] = ordered(scores[i]);
  // The best-th largest number, by 11, 11 and 10 bits: among those that agree in the bits before.
  uint32_t threshold = 0, known = 0;
  int64_t left = best;  // how many of those that agree are chosen
  for (const int shift : {21, 10, 0}) {
    const uint32_t mask = shift ? 0x7ff : 0x3ff;
    int32_t held[2][2048] = {};  // two, since neighbours often fall together
    if (shift == 21)
      for (int64_t i = 0; i < count; ++i) ++held[i % 2][number[i] >> 21];
    else
      for (int64_t i = 0; i < count; ++i)
        if ((number[i] & known) == threshold) ++held[0][(number[i] >> shift) & mask];
    uint32_t bucket = mask;
    while (bucket > 0 && held[0][bucket] + held[1][bucket] < left) left -= held[0][bucket] + held[1][bucket], --bucket;
    threshold |= bucket << shift;
    known |= mask << shift;
  }
  int64_t taken = 0;
  for (int64_t i = 0; i < count && taken < best; ++i) {
    if (number[i] < threshold) continue;
    if (number[i] == threshold && left-- <= 0) continue;
    indices[taken++] = i;
  }
}

// ---- what is missed

// A sum of exponentials that only its logarithm may hold.
struct LogSum {
  float high = kMinusInf, total = 0.0f;
  void add(float exponent, float times) {
    if (times == 0.0f) return;
    if (exponent > high) {
      total *= std::exp(high - exponent);
      high = exponent;
    }
    total += times * std::exp(exponent - high);
  }
  float log() const { return total > 0.0f ? high + std::log(total) : kMinusInf; }
};

// x, or -inf where it is hidden.
inline Vec hide(Vec x, const bool* hidden) {
#if PIKV_WIDTH == 16
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(hidden));
  return _mm512_mask_mov_ps(x, _mm_test_epi8_mask(bytes, bytes), splat(kMinusInf));
#elif PIKV_WIDTH == 8
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(hidden)));
  return _mm256_blendv_ps(x, splat(kMinusInf), _mm256_castsi256_ps(_mm256_slli_epi32(wide, 31)));
#else
  return *hidden ? kMinusInf : x;
#endif
}

// Log-sum-exp of what unread tokens are expected to have, slope * coarse + spread [blocks], and of what they have at
// most, coarse + radius [blocks].
void unread_mass(const float* coarse, float slope, const float* spread, const float* radius, const bool* read,
                 int64_t blocks, int64_t tokens, float* by_spread, float* by_radius) {
  LogSum expected, most;
  for (int64_t b = 0; b < blocks; ++b) {
    const float* row = coarse + b * tokens;
    const bool* seen = read + b * tokens;
    float high = kMinusInf, total = 0.0f, sloped = 0.0f;  // of e^(coarse - high), and of e^(slope * (coarse - high))
    Vec highest = splat(kMinusInf), totals{}, slopeds{};
    int64_t t = 0;
    for (; t + W <= tokens; t += W) highest = larger(hide(load(row + t), seen + t), highest);
    for (; t < tokens; ++t) high = std::max(high, seen[t] ? kMinusInf : row[t]);
    high = std::max(high, largest(highest));
    if (high == kMinusInf) continue;
    for (t = 0; t + W <= tokens; t += W) {
      const Vec below = hide(load(row + t), seen + t) - splat(high);
      totals += exp_negative(below);
      slopeds += exp_negative(below * slope);
    }
    for (; t < tokens; ++t) {
      if (seen[t]) continue;
      total += std::exp(row[t] - high);
      sloped += std::exp(slope * (row[t] - high));
    }
    expected.add(slope * high + spread[b], sloped + sum(slopeds));
    most.add(high + radius[b], total + sum(totals));
  }
  *by_spread = expected.log();
  *by_radius = most.log();
}

}  // namespace
}  // namespace pikv
