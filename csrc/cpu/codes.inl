// Codes: packed planes to floats and back, quantise and dequantise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vec.inl"

namespace pikv {
namespace {

// ---- planes

#if PIKV_WIDTH > 1
// What part `part` of sixteen packed bytes stands for, one code per byte.
template <int Bits>
inline __m128i part_of(__m128i bytes, int part) {
  if constexpr (Bits == 8) return bytes;
  return _mm_and_si128(_mm_srli_epi16(bytes, part * Bits), _mm_set1_epi8(static_cast<char>((1 << Bits) - 1)));
}

// W codes, one per byte, as floats.
inline Vec floats(__m128i codes) {
#if PIKV_WIDTH == 16
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
#else
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes));
#endif
}

inline __m128i bytes_at(const uint8_t* p) {  // W of them
  const auto* from = reinterpret_cast<const __m128i*>(p);
  return W == 16 ? _mm_loadu_si128(from) : _mm_loadl_epi64(from);
}
#endif

// Calls take(channel, codes) for the codes of one row, code = high << Lo | low: whole vectors, then single floats.
template <int Hi, int Lo, class Take>
inline void each_code(const uint8_t* __restrict high, const uint8_t* __restrict low, int64_t cols, Take take) {
  static_assert(Lo == 0 || Lo == Hi, "planes are packed alike");
  constexpr int parts = 8 / Hi;
  const int64_t bytes = cols / parts;
  int64_t j = 0;
#if PIKV_WIDTH > 1
  for (; j + W <= bytes; j += W) {
    const __m128i high_bytes = bytes_at(high + j);
    const __m128i low_bytes = Lo ? bytes_at(low + j) : _mm_setzero_si128();
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) {
      __m128i codes = part_of<Hi>(high_bytes, part);
      if constexpr (Lo != 0)  // codes of a plane are below 16, so shifting pairs of bytes spills nothing
        codes = _mm_or_si128(_mm_slli_epi16(codes, Lo), part_of<Lo>(low_bytes, part));
      take(part * bytes + j, floats(codes));
    }
  }
#endif
  for (; j < bytes; ++j)
    for (int part = 0; part < parts; ++part) {
      int code = (high[j] >> (part * Hi)) & ((1 << Hi) - 1);
      if constexpr (Lo != 0) code = code << Lo | ((low[j] >> (part * Lo)) & ((1 << Lo) - 1));
      take(part * bytes + j, static_cast<float>(code));
    }
}

// Calls f with the planes' bits as template arguments.
template <class F>
inline void with_planes(int hi_bits, int lo_bits, F f) {
  if (hi_bits == 8) return f.template operator()<8, 0>();
  if (hi_bits == 4) return lo_bits ? f.template operator()<4, 4>() : f.template operator()<4, 0>();
  return lo_bits ? f.template operator()<2, 2>() : f.template operator()<2, 0>();
}

inline void put(float* p, float x) { *p = x; }
#if PIKV_WIDTH > 1
inline void put(float* p, Vec x) { store(p, x); }
#endif

// Planar codes of one row to floats; low may be null where lo_bits is 0.
void unpack_row(const uint8_t* high, const uint8_t* low, int64_t cols, int hi_bits, int lo_bits, float* y) {
  with_planes(hi_bits, lo_bits, [=]<int Hi, int Lo>() {
    each_code<Hi, Lo>(high, low, cols, [y](int64_t c, auto codes) { put(y + c, codes); });
  });
}

// Bits [Shift, Shift + Bits) of one row's codes to planar bytes.
template <int Bits, int Shift>
inline void pack_row(const uint8_t* codes, int64_t cols, uint8_t* packed) {
  constexpr int parts = 8 / Bits;
  constexpr uint8_t mask = (1 << Bits) - 1;
  const int64_t bytes = cols / parts;
  int64_t j = 0;
#if PIKV_WIDTH > 1
  for (; j + 32 <= bytes; j += 32) {
    __m256i packed_bytes = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) {  // shifts of pairs of bytes: what comes in from the other byte is masked
      const int up = part * Bits - Shift;
      __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + part * bytes + j));
      here = up > 0 ? _mm256_slli_epi16(here, up) : _mm256_srli_epi16(here, -up);
      here = _mm256_and_si256(here, _mm256_set1_epi8(static_cast<char>(mask << (part * Bits))));
      packed_bytes = _mm256_or_si256(packed_bytes, here);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + j), packed_bytes);
  }
#endif
  for (; j < bytes; ++j) {
    int byte = 0;
    for (int part = 0; part < parts; ++part) byte |= ((codes[part * bytes + j] >> Shift) & mask) << (part * Bits);
    packed[j] = static_cast<uint8_t>(byte);
  }
}

// ---- quantise

inline void take(const float* p, float& x) { x = *p; }
#if PIKV_WIDTH > 1
inline void take(const float* p, Vec& x) { x = load(p); }
inline float larger(float x, float y) { return x > y ? x : y; }
inline float smaller(float x, float y) { return x < y ? x : y; }
#endif

// Least and largest of N vectors of columns.
template <class V, int N>
inline void range_of_columns(const float* x, int64_t rows, int64_t stride, float* least, float* most) {
  V low[N], high[N];
  for (int i = 0; i < N; ++i) {
    take(x + i * sizeof(V) / 4, low[i]);
    high[i] = low[i];
  }
  for (int64_t r = 1; r < rows; ++r)
    for (int i = 0; i < N; ++i) {
      V here;
      take(x + r * stride + i * sizeof(V) / 4, here);
      low[i] = smaller(here, low[i]);
      high[i] = larger(here, high[i]);
    }
  for (int i = 0; i < N; ++i) {
    put(least + i * sizeof(V) / 4, low[i]);
    put(most + i * sizeof(V) / 4, high[i]);
  }
}

void range_per_column(const float* x, int64_t rows, int64_t cols, int64_t stride, float* least, float* most) {
  int64_t c = 0;
  for (; c + 8 * W <= cols; c += 8 * W) range_of_columns<Vec, 8>(x + c, rows, stride, least + c, most + c);
  for (; c + W <= cols; c += W) range_of_columns<Vec, 1>(x + c, rows, stride, least + c, most + c);
  for (; c < cols; ++c) range_of_columns<float, 1>(x + c, rows, stride, least + c, most + c);
}

void range_per_row(const float* x, int64_t rows, int64_t cols, int64_t stride, float* least, float* most) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * stride;
    float low = row[0], high = row[0];
    int64_t c = 0;
    if (cols >= W) {
      Vec lows = load(row), highs = lows;
      for (c = W; c + W <= cols; c += W) {
        const Vec here = load(row + c);
        lows = smaller(here, lows), highs = larger(here, highs);
      }
      low = smallest(lows), high = largest(highs);
    }
    for (; c < cols; ++c) low = std::min(low, row[c]), high = std::max(high, row[c]);
    least[r] = low, most[r] = high;
  }
}

inline void put_codes(uint8_t* to, float x, float zero, float scale, float) {
  *to = static_cast<uint8_t>(std::nearbyint((x - zero) / scale));
}
#if PIKV_WIDTH > 1
// Codes are (x - zero) / scale to the nearest whole number, halves to even. A product with the inverse is within 2^-22
// of the quotient's value, relatively, so it rounds alike unless it is that near to a half: then the division is done.
inline void put_codes(uint8_t* to, Vec x, Vec zero, Vec scale, Vec inverse) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number, held in the low bits
  const Vec above = x - zero, near = above * inverse;
  Vec shifted = near + magic;
  const Vec rest = near - (shifted - magic);
  constexpr float kSure = 0.5f - 256 * 0x1p-21f;
#if PIKV_WIDTH == 16
  if (_mm512_cmp_ps_mask(rest * rest, splat(kSure * kSure), _CMP_GT_OQ)) [[unlikely]] shifted = above / scale + magic;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_castps_si512(shifted)));
#else
  if (_mm256_movemask_ps(_mm256_cmp_ps(rest * rest, splat(kSure * kSure), _CMP_GT_OQ))) [[unlikely]]
    shifted = above / scale + magic;
  const __m256i low_bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                             0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i codes = _mm256_shuffle_epi8(_mm256_castps_si256(shifted), low_bytes);
  const __m128i joined = _mm_unpacklo_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), joined);
#endif
}
#endif

// Turns ranges into what is stored, and into the floats that it stands for: least to zero, most to scale.
void round_outwards(int64_t count, int levels, float* least, float* most, float* inverse, uint16_t* zero,
                    uint16_t* scale) {
  halves_down(least, count, zero);
  to_float(zero, Dtype::kFloat16, 0, count, least);
  for (int64_t g = 0; g < count; ++g) most[g] = (most[g] - least[g]) / static_cast<float>(levels);
  halves_up(most, count, scale);
  for (int64_t g = 0; g < count; ++g) scale[g] = (scale[g] & 0x7fffu) ? scale[g] : 1;  // float16's smallest above 0
  to_float(scale, Dtype::kFloat16, 0, count, most);
  for (int64_t g = 0; g < count; ++g) inverse[g] = 1.0f / most[g];
}

template <int Hi, int Lo>
void quantize(const float* x, int64_t rows, int64_t cols, int64_t stride, bool per_channel, uint8_t* high, uint8_t* low,
              uint16_t* scale, uint16_t* zero) {
  thread_local std::vector<float> numbers;
  thread_local std::vector<uint8_t> row_codes;
  const int64_t groups = per_channel ? cols : rows;
  if (static_cast<int64_t>(numbers.size()) < 3 * groups) numbers.resize(3 * groups);
  if (static_cast<int64_t>(row_codes.size()) < cols) row_codes.resize(cols);
  float *least = numbers.data(), *most = least + groups, *inverse = most + groups;
  per_channel ? range_per_column(x, rows, cols, stride, least, most)
              : range_per_row(x, rows, cols, stride, least, most);
  round_outwards(groups, (1 << (Hi + Lo)) - 1, least, most, inverse, zero, scale);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * stride;
    for (int64_t c = 0; c < cols; c += 16) __builtin_prefetch(row + rows * stride + c);  // what is likely to come next
    uint8_t* codes = Hi == 8 ? high + r * cols : row_codes.data();
    int64_t c = 0;
    if (per_channel) {
      for (; c + W <= cols; c += W)
        put_codes(codes + c, load(row + c), load(least + c), load(most + c), load(inverse + c));
      for (; c < cols; ++c) put_codes(codes + c, row[c], least[c], most[c], inverse[c]);
    } else {
      const Vec z = splat(least[r]), s = splat(most[r]), i = splat(inverse[r]);
      for (; c + W <= cols; c += W) put_codes(codes + c, load(row + c), z, s, i);
      for (; c < cols; ++c) put_codes(codes + c, row[c], least[r], most[r], inverse[r]);
    }
    if constexpr (Hi != 8) pack_row<Hi, Lo>(codes, cols, high + r * (cols * Hi / 8));
    if constexpr (Lo != 0) pack_row<Lo, 0>(codes, cols, low + r * (cols * Lo / 8));
  }
}

void quantize(const void* x, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int hi_bits, int lo_bits,
              bool per_channel, uint8_t* high, uint8_t* low, uint16_t* scale, uint16_t* zero) {
  thread_local std::vector<float> values;
  const float* from = static_cast<const float*>(x);
  if (dtype != Dtype::kFloat32) {
    if (static_cast<int64_t>(values.size()) < rows * cols) values.resize(rows * cols);
    for (int64_t r = 0; r < rows; ++r) to_float(x, dtype, r * row_stride, cols, values.data() + r * cols);
    from = values.data();
    row_stride = cols;
  }
  with_planes(hi_bits, lo_bits, [=]<int Hi, int Lo>() {
    quantize<Hi, Lo>(from, rows, cols, row_stride, per_channel, high, low, scale, zero);
  });
}

// ---- dequantise

inline void put_streamed(float* p, float x) { *p = x; }
#if PIKV_WIDTH > 1
inline void put_streamed(float* p, Vec x) { stream(p, x); }
inline Vec at(const float* p, Vec) { return load(p); }
#endif
inline float at(const float* p, float) { return *p; }

template <int Hi, int Lo, bool Streamed>
void dequantize(const uint8_t* high, const uint8_t* low, const float* scale, const float* zero, int64_t rows,
                int64_t cols, bool per_channel, float* y) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = y + r * cols;
    auto write = [row](int64_t c, auto x) { Streamed ? put_streamed(row + c, x) : put(row + c, x); };
    const uint8_t *high_row = high + r * (cols * Hi / 8), *low_row = low + r * (cols * Lo / 8);
    if (per_channel) {
      each_code<Hi, Lo>(high_row, low_row, cols,
                        [=](int64_t c, auto codes) { write(c, codes * at(scale + c, codes) + at(zero + c, codes)); });
    } else {
      const float s = scale[r], z = zero[r];
      each_code<Hi, Lo>(high_row, low_row, cols, [=](int64_t c, auto codes) { write(c, codes * s + z); });
    }
  }
}

void dequantize(const uint8_t* high, const uint8_t* low, const uint16_t* scale, const uint16_t* zero, int64_t rows,
                int64_t cols, int hi_bits, int lo_bits, bool per_channel, bool streamed, float* y) {
  thread_local std::vector<float> numbers;
  const int64_t groups = per_channel ? cols : rows;
  if (static_cast<int64_t>(numbers.size()) < 2 * groups) numbers.resize(2 * groups);
  float *scales = numbers.data(), *zeros = scales + groups;
  to_float(scale, Dtype::kFloat16, 0, groups, scales);
  to_float(zero, Dtype::kFloat16, 0, groups, zeros);
  if (!low && lo_bits) {  // the middle of the high plane's interval
    const float step = static_cast<float>(1 << lo_bits), middle = (step - 1) / 2;
    for (int64_t g = 0; g < groups; ++g) zeros[g] += scales[g] * middle, scales[g] *= step;
  }
  streamed = streamed && W > 1 && cols % (2 * W * 8 / hi_bits) == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
  with_planes(hi_bits, low ? lo_bits : 0, [=]<int Hi, int Lo>() {
    streamed ? dequantize<Hi, Lo, true>(high, low, scales, zeros, rows, cols, per_channel, y)
             : dequantize<Hi, Lo, false>(high, low, scales, zeros, rows, cols, per_channel, y);
  });
}

}  // namespace
}  // namespace pikv
