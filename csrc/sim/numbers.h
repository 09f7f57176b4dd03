// CUDA's functions on numbers, with CUDA's results: conversions are whole-number arithmetic, so that no instruction set
// is assumed.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "types.h"

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// Four bytes of the eight in (y, x), chosen by four digits of s; a digit's top bit spreads the byte's sign.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned digit = s >> (4 * i) & 15u;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (digit & 7u))) & 0xffu;
    if (digit & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}

// c plus the sum of the products of four signed bytes.
inline int __dp4a(int a, int b, int c) {
  unsigned sum = static_cast<unsigned>(c);
  for (int i = 0; i < 4; ++i)
    sum += static_cast<unsigned>(static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i)));
  return static_cast<int>(sum);
}

namespace pikv {

inline float half_to_float(uint16_t bits) {
  const unsigned sign = static_cast<unsigned>(bits & 0x8000u) << 16, exponent = bits >> 10 & 31u,
                 fraction = bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: a multiple of 2**-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
  return __uint_as_float(sign | (exponent + 112u) << 23 | fraction << 13);
}

inline float bfloat16_to_float(uint16_t bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

// How a number between two float16 becomes one of them.
enum class Rounding { kNearest, kDown, kUp };

inline uint16_t float_to_half(float x, Rounding rounding) {
  const unsigned bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude == 0x7f800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  // kept: float16's bits of the magnitude rounded towards zero; rest: what was cut off, in units of half of what was
  // kept's last bit.
  unsigned kept, cut, half;
  if (magnitude >= 0x47800000u) {  // 2**16 and above
    kept = 0x7bffu, cut = 2, half = 1;
  } else if (magnitude >= 0x38800000u) {  // 2**-14 and above: normal
    kept = (magnitude - 0x38000000u) >> 13, cut = magnitude & 0x1fffu, half = 0x1000u;
  } else if (magnitude >= 0x33000000u) {  // 2**-25 and above
    const unsigned shift = 126u - (magnitude >> 23), fraction = (magnitude & 0x7fffffu) | 0x800000u;
    kept = fraction >> shift, cut = fraction & ((1u << shift) - 1), half = 1u << (shift - 1);
  } else {
    kept = 0, cut = magnitude != 0, half = 2;
  }
  bool up;
  if (rounding == Rounding::kNearest)
    up = cut > half || (cut == half && (kept & 1u));
  else
    up = cut && (rounding == Rounding::kUp) == (sign == 0);
  return static_cast<uint16_t>(sign | (kept + (up ? 1u : 0u)));
}

inline uint16_t float_to_half_rd(float x) { return float_to_half(x, Rounding::kDown); }
inline uint16_t float_to_half_ru(float x) { return float_to_half(x, Rounding::kUp); }

}  // namespace pikv
