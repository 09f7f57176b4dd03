// The inner loops over codes with integer dot products (AVX-512 VNNI), 64 products an instruction.
//
// What multiplies the codes (a query times the block's scales; a softmax weight times the token's scale) is cut into
// three signed bytes of 23 bits together, so that the sums of products are exact and the result is as near as float32
// gets. Sums over channels run with 16 tokens in a vector's lanes, sums over tokens with 16 channels: nothing is summed
// across.
#pragma once

#include <cstdint>

#include "fused.inl"

namespace pikv {
namespace {

#if PIKV_WIDTH == 16

constexpr int kParts = 3;

// Up to four float rows cut into bytes: four numbers' part p of row r lie together at dwords[(quad * 4 + r) * 4 + p].
struct IntegerRows {
  int32_t* dwords;
  float step[4];  // of a row: number = step * (part 0 + 256 * part 1 + 65536 * part 2)

  // x [NR, count], whose largest magnitudes are `most` [NR], rows `stride` apart.
  template <int NR>
  void cut(const float* x, int64_t stride, int64_t count, const float* most) {
    const __m512i bias = _mm512_set1_epi32(0x808080);
    const __m512i by_part = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    Vec inverse[NR];
    for (int r = 0; r < NR; ++r) {
      constexpr float kLargest = 8350000.0f;  // below 127 * (65536 + 256 + 1)
      const bool nothing = most[r] < 1e-30f;  // the inverse of less might not be a number
      inverse[r] = splat(nothing ? 0.0f : kLargest / most[r]);
      step[r] = nothing ? 0.0f : most[r] / kLargest;
    }
    for (int64_t i = 0; i < count; i += W) {
      __m512i row[4];
      for (int r = 0; r < 4; ++r) {  // behind the last row the first is there again, read by nobody
        const int at = r < NR ? r : 0;
        const __m512i whole = _mm512_cvtps_epi32(load(x + at * stride + i) * inverse[at]);
        row[r] = _mm512_shuffle_epi8(_mm512_xor_si512(_mm512_add_epi32(whole, bias), bias), by_part);
      }
      const __m512i a = _mm512_shuffle_i32x4(row[0], row[1], 0x44), b = _mm512_shuffle_i32x4(row[2], row[3], 0x44);
      const __m512i c = _mm512_shuffle_i32x4(row[0], row[1], 0xee), d = _mm512_shuffle_i32x4(row[2], row[3], 0xee);
      int32_t* to = dwords + 4 * i;
      _mm512_storeu_si512(to, _mm512_shuffle_i32x4(a, b, 0x88));
      _mm512_storeu_si512(to + 16, _mm512_shuffle_i32x4(a, b, 0xdd));
      _mm512_storeu_si512(to + 32, _mm512_shuffle_i32x4(c, d, 0x88));
      _mm512_storeu_si512(to + 48, _mm512_shuffle_i32x4(c, d, 0xdd));
    }
  }
};

// To each lane of sums: the products of its four codes with the four bytes at `four`. In assembly, since GCC 12 does
// not fold the broadcast into the instruction and copies the sums.
inline void multiply_add(__m512i& sums, __m512i codes, const int32_t* four) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(codes), "m"(*four));
}

// The number that three sums of products stand for, times nothing but the row's step.
inline Vec joined(const __m512i sums[kParts], float step) {
  const Vec low = _mm512_cvtepi32_ps(sums[0]), middle = _mm512_cvtepi32_ps(sums[1]), high = _mm512_cvtepi32_ps(sums[2]);
  return high * (65536.0f * step) + (middle * (256.0f * step) + low * step);
}

// Sixteen bytes of each of 16 rows as four vectors: the rows' first four bytes, their second four, ...
struct Columns {
  __m512i quad[4];

  Columns(const uint8_t* rows, int64_t stride) {
    asm("" : "+r"(rows));  // else GCC keeps a pointer per row, in memory
    __m512i x[4];
    for (int i = 0; i < 4; ++i) {  // rows i, i + 4, i + 8, i + 12
      auto row = [&](int j) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + (i + 4 * j) * stride)); };
      x[i] = _mm512_castsi128_si512(row(0));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x00f0, row(1));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x0f00, row(2));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0xf000, row(3));
    }
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    quad[0] = _mm512_unpacklo_epi64(a, c);
    quad[1] = _mm512_unpackhi_epi64(a, c);
    quad[2] = _mm512_unpacklo_epi64(b, d);
    quad[3] = _mm512_unpackhi_epi64(b, d);
  }
};

// Part `part` of packed bytes as codes, high << Lo | low.
template <int Hi, int Lo>
inline __m512i codes_of(__m512i high, __m512i low, int part) {
  if constexpr (Hi == 8) return high;
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << Hi) - 1) << Lo));
  const int up = Lo - part * Hi;
  const __m512i upper = up > 0 ? _mm512_slli_epi16(high, up) : _mm512_srli_epi16(high, -up);
  if constexpr (Lo == 0) return _mm512_and_si512(upper, mask);
  const __m512i lower = _mm512_srli_epi16(low, part * Lo);  // above its bits lie those of other parts
  const __m512i both = _mm512_ternarylogic_epi32(mask, upper, lower, 0xca);  // where mask: upper, else lower
  return Hi + Lo == 8 ? both : _mm512_and_si512(both, _mm512_set1_epi8((1 << (Hi + Lo)) - 1));
}

// Dot products of NR rows with the bare codes of `tokens` rows, a multiple of 16, plus an offset per row: logits [NR,
// stride]. Inlined into its caller, GCC 12 would keep the sums in memory.
template <int NR, int Hi, int Lo>
[[gnu::noinline]] void integer_dots(const IntegerRows& q, const uint8_t* high, const uint8_t* low, int64_t tokens,
                                    int64_t dim, const float* offset, float* logits, int64_t stride, Ahead* ahead) {
  constexpr int parts = 8 / Hi;
  const int64_t bytes = dim / parts;
  if (ahead) ahead->spread_over(tokens / 16 * (bytes / 16) * 4);
  for (int64_t t = 0; t < tokens; t += 16) {
    __m512i sums[NR][kParts];
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r)
#pragma GCC unroll 3
      for (int p = 0; p < kParts; ++p) sums[r][p] = _mm512_setzero_si512();
    for (int64_t b = 0; b < bytes; b += 16) {
      const Columns upper(high + t * bytes + b, bytes), lower((Lo ? low : high) + t * bytes + b, bytes);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (ahead) ahead->fetch();
#pragma GCC unroll 4
        for (int part = 0; part < parts; ++part) {
          const __m512i codes = codes_of<Hi, Lo>(upper.quad[i], lower.quad[i], part);
          const int32_t* quad = q.dwords + (part * bytes + b + 4 * i) * 4;
#pragma GCC unroll 4
          for (int r = 0; r < NR; ++r)
#pragma GCC unroll 3
            for (int p = 0; p < kParts; ++p) multiply_add(sums[r][p], codes, quad + 4 * r + p);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) store(logits + r * stride + t, joined(sums[r], q.step[r]) + splat(offset[r]));
  }
}

// Dot products of NR rows of the tile's scaled_q with the bare codes of a block's head, plus an offset per row: logits
// [NR, width].
template <int NR>
void code_logits(Tile& tile, const Keys& keys, int64_t row, bool high_only, const Folded& folded, float* logits,
                 int64_t width, Ahead* ahead) {
  const int64_t bytes = keys.dim * keys.hi_bits / 8, stride = padded(keys.dim);
  IntegerRows q{tile.q_bytes.data(), {}};
  q.cut<NR>(tile.scaled_q.data(), stride, stride, folded.most);
  const uint8_t* high = keys.high + row * bytes;
  const uint8_t* low = high_only || !keys.low ? nullptr : keys.low + row * bytes;
  with_planes(keys.hi_bits, low ? keys.lo_bits : 0, [&]<int Hi, int Lo>() {
    if constexpr (Hi < 8)
      integer_dots<NR, Hi, Lo>(q, high, low, keys.block_size, keys.dim, folded.offset, logits, width, ahead);
  });
}

// out [NR, dim] = out * fade + zero + weights times the bare codes of `tokens` rows, a multiple of four. In every run
// of 64 channels, out has them in the order of `swap_quads`.
template <int NR, int Bits>
[[gnu::noinline]] void integer_accumulate(const IntegerRows& weights, const uint8_t* codes, int64_t tokens, int64_t dim,
                                          const Update& update, float* out, Ahead* ahead) {
  constexpr int parts = 8 / Bits, vectors = 2 / parts;  // of packed codes at a time: two of codes
  const int64_t bytes = dim / parts;
  if (ahead) ahead->spread_over(bytes / 64 * (4 / vectors) * (tokens / 4));
  for (int64_t b = 0; b < bytes; b += 64)
#pragma GCC unroll 4
    for (int piece = 0; piece < 4; piece += vectors) {  // channels 4 * piece to 4 * (piece + vectors) of every sixteen
      __m512i sums[NR][2][kParts];
      for (int r = 0; r < NR; ++r)
        for (int i = 0; i < 2; ++i)
          for (int p = 0; p < kParts; ++p) sums[r][i][p] = _mm512_setzero_si512();
      for (int64_t t = 0; t < tokens; t += 4) {
        if (ahead) ahead->fetch();
        __m512i row[4];
        for (int j = 0; j < 4; ++j) row[j] = _mm512_loadu_si512(codes + (t + j) * bytes + b);
        const bool upper = piece >= 2;
        const __m512i a = upper ? _mm512_unpackhi_epi8(row[0], row[1]) : _mm512_unpacklo_epi8(row[0], row[1]);
        const __m512i c = upper ? _mm512_unpackhi_epi8(row[2], row[3]) : _mm512_unpacklo_epi8(row[2], row[3]);
        __m512i four[2];  // bytes of four tokens beside each other
        if constexpr (parts == 1) {
          four[0] = _mm512_unpacklo_epi16(a, c);
          four[1] = _mm512_unpackhi_epi16(a, c);
        } else {
          const __m512i packed = piece % 2 ? _mm512_unpackhi_epi16(a, c) : _mm512_unpacklo_epi16(a, c);
          four[0] = codes_of<Bits, 0>(packed, packed, 0);
          four[1] = codes_of<Bits, 0>(packed, packed, 1);
        }
        for (int r = 0; r < NR; ++r)
          for (int p = 0; p < kParts; ++p)
            for (int i = 0; i < 2; ++i)
              multiply_add(sums[r][i][p], four[i], weights.dwords + 4 * t + 4 * r + p);
      }
      for (int r = 0; r < NR; ++r)
        for (int i = 0; i < 2; ++i) {
          float* to = out + r * dim + b + (parts == 1 ? (piece + i) * 16 : i * bytes + piece * 16);
          store(to, load(to) * update.fade[r] + update.zero[r] + joined(sums[r][i], weights.step[r]));
        }
    }
}

// Between the channels' order and the one in which they are summed: in every run of 64, four times four quads of
// channels are transposed. Its own inverse.
void swap_quads(float* out, int64_t count) {
  for (int64_t c = 0; c < count; c += 64)
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < i; ++j) {
        float *a = out + c + 16 * i + 4 * j, *b = out + c + 16 * j + 4 * i;
        const __m128 held = _mm_loadu_ps(a);
        _mm_storeu_ps(a, _mm_loadu_ps(b));
        _mm_storeu_ps(b, held);
      }
}

// Whether `integer_accumulate` can read these values.
inline bool integer_codes(const Values& values) {
  return codes_in_place(values) && values.dim * values.bits / 8 % 64 == 0 && values.block_size % 4 == 0;
}

#endif

}  // namespace
}  // namespace pikv
