// Vectors of PIKV_WIDTH floats: arithmetic, sums, exponentials, and the narrow dtypes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

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
// Past the caches, for what is too large to be read from them again. p is aligned to the vector.
inline void stream(float* p, Vec v) {
#if PIKV_WIDTH == 8
  _mm256_stream_ps(p, v);
#elif PIKV_WIDTH == 16
  _mm512_stream_ps(p, v);
#else
  *p = v;
#endif
}
// By intrinsics, since GCC 12 makes a comparison and a choice of `x > y ? x : y`.
#if PIKV_WIDTH == 8
inline Vec larger(Vec x, Vec y) { return _mm256_max_ps(x, y); }
inline Vec smaller(Vec x, Vec y) { return _mm256_min_ps(x, y); }
inline Vec absolute(Vec x) { return _mm256_andnot_ps(splat(-0.0f), x); }
#elif PIKV_WIDTH == 16
inline Vec larger(Vec x, Vec y) { return _mm512_max_ps(x, y); }
inline Vec smaller(Vec x, Vec y) { return _mm512_min_ps(x, y); }
inline Vec absolute(Vec x) { return _mm512_abs_ps(x); }
#else
inline Vec larger(Vec x, Vec y) { return x > y ? x : y; }
inline Vec smaller(Vec x, Vec y) { return x < y ? x : y; }
inline Vec absolute(Vec x) { return x < 0.0f ? -x : x; }
#endif

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
#elif PIKV_WIDTH == 8
  const auto half = halves(v);
  const auto quarter = _mm_hadd_ps(half, half);
  return _mm_cvtss_f32(_mm_hadd_ps(quarter, quarter));
#else
  return _mm512_reduce_add_ps(v);
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

inline float largest(Vec v) {
#if PIKV_WIDTH == 16
  return _mm512_reduce_max_ps(v);
#else
  float lanes[W];
  store(lanes, v);
  return *std::max_element(lanes, lanes + W);
#endif
}
inline float smallest(Vec v) { return -largest(-v); }

// e^x for x <= 0, relative error below 2e-7; 0 for what float32 cannot hold.
inline Vec exp_negative(Vec x) {
  const Vec low = splat(-87.3f);
  const Vec clamped = larger(x, low);
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

// float16 numbers around those of x: not above, not below.
inline void halves_down(const float* x, int64_t count, uint16_t* y) {
  int64_t i = 0;
#if PIKV_WIDTH > 1
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEG_INF));
#endif
  for (; i < count; ++i) y[i] = half_down(x[i]);
}
inline void halves_up(const float* x, int64_t count, uint16_t* y) {
  int64_t i = 0;
#if PIKV_WIDTH > 1
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_POS_INF));
#endif
  for (; i < count; ++i) y[i] = half_up(x[i]);
}

#if PIKV_WIDTH > 1
// W narrow numbers as floats.
template <Dtype type>
inline Vec widened(const uint16_t* h) {
#if PIKV_WIDTH == 16
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(h));
  if constexpr (type == Dtype::kFloat16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#else
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(h));
  if constexpr (type == Dtype::kFloat16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#endif
}
#endif

template <Dtype type>
inline void to_float(const uint16_t* h, int64_t count, float* y) {
  int64_t i = 0;
#if PIKV_WIDTH > 1
  for (; i + W <= count; i += W) store(y + i, widened<type>(h + i));
#endif
  for (; i < count; ++i) y[i] = type == Dtype::kBFloat16 ? from_bfloat16(h[i]) : from_half(h[i]);
}

inline void to_float(const void* x, Dtype dtype, int64_t offset, int64_t count, float* y) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(y, static_cast<const float*>(x) + offset, count * sizeof(float));
    return;
  }
  const uint16_t* h = static_cast<const uint16_t*>(x) + offset;
  dtype == Dtype::kBFloat16 ? to_float<Dtype::kBFloat16>(h, count, y) : to_float<Dtype::kFloat16>(h, count, y);
}

}  // namespace
}  // namespace pikv
