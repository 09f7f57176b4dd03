// What translated PTX (tools/ptx2cpp.py) is made of, beside C++'s operators: registers are variables of their declared
// width. Whole-number arithmetic wraps, a division by zero gives all ones, conversions saturate, as on a GPU.
// ex2.approx and lg2.approx are exact to float here; a GPU's are off by up to two units in the last place.
#pragma once

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "numbers.h"
#include "ptx_kernels.h"
#include "simulator.h"

namespace pikv::sim::ptx {

// ---- Memory: `COUNT` neighbours of type T, for a load or a store of a vector.

template <class T, int COUNT>
T* global(uint64_t address, const char* what) {
  return reinterpret_cast<T*>(global_access(address, COUNT * static_cast<int>(sizeof(T)), what));
}
template <class T, int COUNT>
T* shared(uint64_t offset, const char* what) {
  return reinterpret_cast<T*>(shared_access(offset, COUNT * static_cast<int>(sizeof(T)), what));
}
template <class T>
const T* parameter(const void* parameters, uint64_t offset) {
  return reinterpret_cast<const T*>(static_cast<const unsigned char*>(parameters) + offset);
}
template <class T>
T atomic_add(T* address, T value) {
  return std::atomic_ref<T>(*address).fetch_add(value, std::memory_order_relaxed);
}

// ---- Whole numbers

template <class T>
T divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return static_cast<T>(-static_cast<std::make_unsigned_t<T>>(a));
  return static_cast<T>(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return static_cast<T>(a % b);
}
template <class T>
T shift_left(T a, uint32_t by) {
  return by >= sizeof(T) * 8 ? T{0} : static_cast<T>(a << by);
}
template <class T>
T shift_right(T a, uint32_t by) {
  constexpr uint32_t kBits = sizeof(T) * 8;
  if (by >= kBits) return std::is_signed_v<T> && a < 0 ? static_cast<T>(-1) : T{0};
  return static_cast<T>(a >> by);
}
template <class T>
T multiply_high(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>((static_cast<Wide>(a) * b) >> (sizeof(T) * 8));
}
inline uint32_t reverse_bits(uint32_t x) {
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= (x >> i & 1u) << (31 - i);
  return result;
}
// How far left x must be shifted for its highest set bit to be the top one; all ones for 0.
inline uint32_t find_highest_shift(uint32_t x) { return x == 0 ? ~0u : static_cast<uint32_t>(std::countl_zero(x)); }
inline uint32_t field_mask(uint32_t length) { return length >= 32 ? ~0u : (1u << length) - 1; }
inline uint32_t insert_field(uint32_t a, uint32_t b, uint32_t position, uint32_t length) {
  position &= 0xffu, length &= 0xffu;
  const uint32_t mask = shift_left(field_mask(length), position);
  return (b & ~mask) | (shift_left(a, position) & mask);
}
inline uint32_t extract_field(uint32_t a, uint32_t position, uint32_t length) {
  return shift_right(a, position & 0xffu) & field_mask(length & 0xffu);
}

// ---- Floating point

// a * b + c rounded down: the product is exact in double, and the sum's error is known exactly.
inline float fma_down(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c;
  const double back = sum - product, error = (product - (sum - back)) + (c - back);
  const float nearest = static_cast<float>(sum);
  const bool above = nearest > sum || (nearest == sum && error < 0);
  return above ? std::nextafter(nearest, -std::numeric_limits<float>::infinity()) : nearest;
}
// Subnormal numbers as zeros.
inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float saturate(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
// To a whole number, out of range to the nearest there is, NaN to 0.
template <class T>
T to_integer(float x) {
  if (std::isnan(x)) return 0;
  if (x >= -static_cast<float>(std::numeric_limits<T>::min()) && std::is_signed_v<T>)
    return std::numeric_limits<T>::max();
  if (x >= static_cast<float>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  if (x <= static_cast<float>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  return static_cast<T>(x);
}

// ---- Between lanes

struct Shuffled {
  uint32_t value;
  bool in_range;
};
// `clamp`: the segment's mask in bits 8 to 12, the lane that ends it in bits 0 to 4.
inline Shuffled shuffle_from(int source, bool in_range, uint32_t value, uint32_t mask, Site site) {
  return {static_cast<uint32_t>(shuffle(mask, value, in_range ? source : lane(), site)), in_range};
}
inline int segment_first(uint32_t clamp) { return lane() & static_cast<int>(clamp >> 8 & 31u); }
inline int segment_last(uint32_t clamp) { return segment_first(clamp) | static_cast<int>(clamp & 31u & ~(clamp >> 8)); }
inline Shuffled shuffle_up(uint32_t value, uint32_t by, uint32_t clamp, uint32_t mask, Site site) {
  const int source = lane() - static_cast<int>(by & 31u);
  return shuffle_from(source, source >= segment_last(clamp), value, mask, site);
}
inline Shuffled shuffle_down(uint32_t value, uint32_t by, uint32_t clamp, uint32_t mask, Site site) {
  const int source = lane() + static_cast<int>(by & 31u);
  return shuffle_from(source, source <= segment_last(clamp), value, mask, site);
}
inline Shuffled shuffle_bfly(uint32_t value, uint32_t by, uint32_t clamp, uint32_t mask, Site site) {
  const int source = lane() ^ static_cast<int>(by & 31u);
  return shuffle_from(source, source <= segment_last(clamp), value, mask, site);
}
inline Shuffled shuffle_idx(uint32_t value, uint32_t from, uint32_t clamp, uint32_t mask, Site site) {
  const int source = segment_first(clamp) | static_cast<int>(from & 31u & ~(clamp >> 8));
  return shuffle_from(source, source <= segment_last(clamp), value, mask, site);
}

}  // namespace pikv::sim::ptx
