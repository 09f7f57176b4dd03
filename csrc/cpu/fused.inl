// The inner loops that read codes straight from the pool as floats, without a tile in between, where a row of codes is
// whole vectors: AVX2, and for values AVX-512 where integer.inl cannot. The same results as through a tile, up to
// rounding.
#pragma once

#include <cstdint>

#include "tile.inl"

namespace pikv {
namespace {

#if PIKV_WIDTH > 1

#if PIKV_WIDTH == 8
// Dot products of NR rows of scaled q with the bare codes of `tokens` rows: as `dots`.
template <int NR, int Hi, int Lo>
void dots_of_codes(const float* q, int64_t q_stride, const uint8_t* high, const uint8_t* low, int64_t tokens,
                   int64_t dim, float* logits, int64_t logits_stride, Ahead* ahead) {
  constexpr int parts = 8 / Hi, NT = W / 4;  // tokens at a time: sums fill half the registers
  const int64_t bytes = dim / parts;
  if (ahead) ahead->spread_over((tokens + NT - 1) / NT);
  for (int64_t t = 0; t < tokens; t += NT) {
    if (ahead) ahead->fetch();
    const uint8_t *high_row[NT], *low_row[NT];
    for (int j = 0; j < NT; ++j) {  // behind the last token it is read again
      const int64_t token = t + j < tokens ? t + j : tokens - 1;
      high_row[j] = high + token * bytes;
      low_row[j] = Lo ? low + token * bytes : nullptr;
    }
    Vec total[NR][NT];
    for (int r = 0; r < NR; ++r)
      for (int j = 0; j < NT; ++j) total[r][j] = Vec{};
    for (int64_t b = 0; b < bytes; b += 16) {
      __m128i high_bytes[NT], low_bytes[NT];
      for (int j = 0; j < NT; ++j) {
        high_bytes[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high_row[j] + b));
        if constexpr (Lo != 0) low_bytes[j] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low_row[j] + b));
      }
#pragma GCC unroll 4
      for (int part = 0; part < parts; ++part) {
        __m128i codes[NT];
        for (int j = 0; j < NT; ++j) {
          codes[j] = part_of<Hi>(high_bytes[j], part);
          if constexpr (Lo != 0)  // codes of a plane are below 16, so shifting pairs of bytes spills nothing
            codes[j] = _mm_or_si128(_mm_slli_epi16(codes[j], Lo), part_of<Lo>(low_bytes[j], part));
        }
#pragma GCC unroll 2
        for (int i = 0; i < 16 / W; ++i) {
          Vec key[NT];
          for (int j = 0; j < NT; ++j) {
            key[j] = floats(codes[j]);
            codes[j] = _mm_srli_si128(codes[j], 8);
          }
          for (int r = 0; r < NR; ++r) {
            const Vec query = load(q + r * q_stride + part * bytes + b + i * W);
            for (int j = 0; j < NT; ++j) total[r][j] += query * key[j];
          }
        }
      }
    }
    float totals[NR * NT];
    if constexpr (NR * NT % 4 == 0)
      for (int i = 0; i < NR * NT; i += 4) sum4(&total[0][0] + i, totals + i);
    else
      for (int i = 0; i < NR * NT; ++i) totals[i] = sum((&total[0][0])[i]);
    for (int r = 0; r < NR; ++r)
      for (int j = 0; j < NT && t + j < tokens; ++j) logits[r * logits_stride + t + j] = totals[r * NT + j];
  }
}

// Dot products of NR rows of the tile's scaled_q with the bare codes of a block's head, plus an offset per row: logits
// [NR, width].
template <int NR>
void code_logits(Tile& tile, const Keys& keys, int64_t row, bool high_only, const Folded& folded, float* logits,
                 int64_t width, Ahead* ahead) {
  const int64_t bytes = keys.dim * keys.hi_bits / 8;
  const uint8_t* high = keys.high + row * bytes;
  const uint8_t* low = high_only || !keys.low ? nullptr : keys.low + row * bytes;
  with_planes(keys.hi_bits, low ? keys.lo_bits : 0, [&]<int Hi, int Lo>() {
    if constexpr (Hi < 8)
      dots_of_codes<NR, Hi, Lo>(tile.scaled_q.data(), padded(keys.dim), high, low, keys.block_size, keys.dim, logits,
                                width, ahead);
  });
  for (int r = 0; r < NR; ++r)
    for (int64_t t = 0; t < keys.block_size; ++t) logits[r * width + t] += folded.offset[r];
}
#endif

// Whether a plane's rows are whole runs of sixteen bytes, and with AVX-512 the tokens runs of sixteen.
inline bool codes_in_place(const Keys& keys) {
  return keys.high && keys.dim * keys.hi_bits / 8 % 16 == 0 && (W == 8 || keys.block_size % 16 == 0);
}

// out [NR, dim] += weights [NR, tokens] times the bare codes of `tokens` rows: as `accumulate`.
template <int NR, int Bits>
void accumulate_codes(const float* weights, int64_t weights_stride, const uint8_t* codes, int64_t tokens, int64_t dim,
                      float* out, Ahead* ahead) {
  static_assert(Bits == 8 || Bits == 4);
  const int64_t bytes = dim * Bits / 8;
  constexpr int64_t step = W * Bits / 4;  // bytes at a time: two vectors of channels
  if (ahead) ahead->spread_over(bytes / step * ((tokens + 3) / 4));
  for (int64_t b = 0; b < bytes; b += step) {
    Vec total[NR][2];
    for (int r = 0; r < NR; ++r) total[r][0] = total[r][1] = Vec{};
    for (int64_t t = 0; t < tokens; ++t) {
      if (ahead && t % 4 == 0) ahead->fetch();
      const uint8_t* at = codes + t * bytes + b;
      const __m128i first = bytes_at(at);
      const Vec v0 = floats(part_of<Bits>(first, 0));
      const Vec v1 = Bits == 8 ? floats(bytes_at(at + W)) : floats(part_of<Bits>(first, 1));
      for (int r = 0; r < NR; ++r) {
        const Vec weight = splat(weights[r * weights_stride + t]);
        total[r][0] += weight * v0;
        total[r][1] += weight * v1;
      }
    }
    for (int r = 0; r < NR; ++r) {
      float *first = out + r * dim + b, *second = Bits == 8 ? first + W : first + bytes;
      store(first, load(first) + total[r][0]);
      store(second, load(second) + total[r][1]);
    }
  }
}

inline bool codes_in_place(const Values& values) {
  return values.codes && values.bits >= 4 && values.dim % (2 * W) == 0;
}

#else

inline bool codes_in_place(const Keys&) { return false; }
inline bool codes_in_place(const Values&) { return false; }

#endif

}  // namespace
}  // namespace pikv
