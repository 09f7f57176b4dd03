// What the high plane and the bounds say about logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attend.inl"

namespace pikv {
namespace {

// Relative rounding of a float32 dot product over dim channels, so that bounds on logits hold as computed.
inline float rounding_of(int64_t dim) {
  return 4.0f * static_cast<float>(dim) * std::numeric_limits<float>::epsilon();
}

// Dot products of NR rows of the tile's scaled_q with a block's high plane, read in place or from the tile, plus an
// offset.
template <int NR>
void coarse_logits(Tile& tile, const Keys& keys, int64_t row, bool in_place, const Folded& folded, float* logits,
                   int64_t width, Ahead* ahead) {
#if PIKV_WIDTH > 1
  if (in_place) return code_logits<NR>(tile, keys, row, true, folded, logits, width, ahead);
#else
  (void)in_place, (void)row;
#endif
  const int64_t stride = padded(keys.dim);
  dots<NR>(tile.scaled_q.data(), stride, tile.k.data(), width, stride, logits, width, ahead);
  for (int r = 0; r < NR; ++r)
    for (int64_t t = 0; t < keys.block_size; ++t) logits[r * width + t] += folded.offset[r];
}

void score_tokens(const float* q, int64_t rows, const Keys& keys, const int64_t* ids, int64_t count, int64_t head,
                  float* coarse, float* radius, float* spread, int64_t stride) {
  const int64_t tokens = keys.block_size, dim = keys.dim, q_stride = padded(dim), width = padded(tokens);
  Tile& tile = scratch(tokens, dim, 1);
  const int lo_bits = keys.raw ? 0 : keys.lo_bits;
  const float step = static_cast<float>(1 << lo_bits), middle = (step - 1) / 2;
  const float half_width = keys.raw ? 0.5f : middle;  // with raw keys the plane is a rounding of them
  const float half_variance = (keys.raw ? 1.0f : step * step - 1) / (24 * step * step);  // in steps of the high plane
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
      const int64_t next_scales = (ids[i + 1] * keys.groups + head) * dim;
      ahead.add(reinterpret_cast<const char*>(keys.scale + next_scales), dim * 2);
      ahead.add(reinterpret_cast<const char*>(keys.zero + next_scales), dim * 2);
      ahead.add(reinterpret_cast<const char*>(keys.high) + next, tokens * high_bytes);
    }
    if (!in_place)
      for (int64_t t = 0; t < tokens; ++t)
        unpack_row(keys.high + (row + t) * high_bytes, nullptr, dim, keys.hi_bits, 0, tile.k.data() + t * q_stride);
    const float *scale = tile.k_scale.data(), *zero = tile.k_zero.data();
    // What does not depend on the query: the plane's middle, and how far from it a key may be.
    float *middles = tile.k_middle.data(), *reaches = tile.k_reach.data();
    for (int64_t d = 0; d < q_stride; d += W) {
      const Vec s = load(scale + d), z = load(zero + d);
      store(middles + d, z + s * middle);
      store(reaches + d, s * half_width + larger(absolute(z), absolute(z + s * levels)) * rounding);
    }
    by_rows(rows, [&]<int NR>(int64_t first) {
      Folded fold;
      float farthest[4], squares[4], *logits = tile.weights.data();
      Vec at[4] = {}, reach[4] = {}, square[4] = {}, largest_of[4] = {};
      for (int64_t d = 0; d < q_stride; d += W) {  // behind dim, query and scales are zero
        const Vec s = load(scale + d) * step, m = load(middles + d), w = load(reaches + d);
        for (int r = 0; r < NR; ++r) {
          const Vec x = load(q + (first + r) * q_stride + d), folded = x * s;
          at[r] += x * m;
          reach[r] += absolute(x) * w;
          square[r] += folded * folded;
          largest_of[r] = larger(absolute(folded), largest_of[r]);
          store(tile.scaled_q.data() + r * q_stride + d, folded);
        }
      }
      sum4(at, fold.offset), sum4(reach, farthest), sum4(square, squares);
      for (int r = 0; r < NR; ++r) {
        fold.most[r] = largest(largest_of[r]);
        radius[(first + r) * stride + i] = farthest[r];
        spread[(first + r) * stride + i] = std::min(half_variance * squares[r], farthest[r]);  // no error exceeds it
      }
      coarse_logits<NR>(tile, keys, row, in_place, fold, logits, width, &ahead);
      for (int r = 0; r < NR; ++r) {
        float* to = coarse + ((first + r) * stride + i) * tokens;
        std::memcpy(to, logits + r * width, tokens * sizeof(float));
        for (int64_t t = 0; t < tokens; t += 16)
          __builtin_prefetch(to + 4 * tokens + t, 1);  // where later blocks' will go
      }
    });
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
    if (const int64_t next = i + 4; next < count) {
      fetch(keys.scale, ids[next] * keys.groups + head, dim * 2);
      fetch(keys.zero, ids[next] * keys.groups + head, dim * 2);
    }
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

// ---- logits themselves

// Calls take(row, logits [block_size]) for every query row and the whole keys of one block's head.
template <class Take>
void each_logit_row(const float* q, int64_t rows, const Keys& keys, int64_t id, int64_t head, Tile& tile, Take take) {
  const int64_t tokens = keys.block_size, q_stride = padded(keys.dim), width = padded(tokens);
  const Values none{};
  const float* k = ready_keys(keys, id, head, tile);
  const Tokens block{k, nullptr, keys, none, (id * keys.groups + head) * tokens, tokens, nullptr, nullptr};
  fit_factors(keys.low_rank, tokens, tile.k_factors, tile.k_basis);
  Factors factors{};
  if (keys.low_rank)
    factors = block_factors(*keys.low_rank, keys.groups, tokens, id, head, tile, tile.k_factors.data());
  by_rows(rows, [&]<int NR>(int64_t first) {
    logits_of<NR>(q + first * q_stride, q_stride, tile, block, tile.weights.data(), width);
    if (keys.low_rank)
      add_factor_logits<NR>(*keys.low_rank, factors, keys.groups, rows, first, tile, tokens, tile.weights.data(),
                            width);
    for (int r = 0; r < NR; ++r) take(first + r, tile.weights.data() + r * width);
  });
}

void key_logits(const float* q, int64_t rows, const Keys& keys, const int64_t* ids, int64_t count, int64_t head,
                float* logits, int64_t stride) {
  const int64_t tokens = keys.block_size;
  Tile& tile = scratch(tokens, keys.dim, 1);
  for (int64_t i = 0; i < count; ++i)
    each_logit_row(q, rows, keys, ids[i], head, tile, [&](int64_t r, const float* from) {
      std::memcpy(logits + r * stride + i * tokens, from, tokens * sizeof(float));
    });
}

// sums [count] += e^(logits - lse), for a row; what lies behind in either is not touched.
inline void add_weights(const float* logits, float lse, int64_t count, float* sums) {
  int64_t t = 0;
  for (; t + W <= count; t += W) store(sums + t, load(sums + t) + exp_negative(load(logits + t) - splat(lse)));
  for (; t < count; ++t) sums[t] += std::exp(logits[t] - lse);
}

void token_importance(const float* q, int64_t rows, const float* lse, const Keys& keys, const int64_t* ids,
                      int64_t count, float* importance) {
  const int64_t tokens = keys.block_size;
  Tile& tile = scratch(tokens, keys.dim, 1);
  std::fill(importance, importance + count * tokens, 0.0f);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t head = 0; head < keys.groups; ++head)
      each_logit_row(q + head * rows * padded(keys.dim), rows, keys, ids[i], head, tile,
                     [&](int64_t r, const float* from) {
                       add_weights(from, lse[head * rows + r], tokens, importance + i * tokens);
                     });
}

// Of raw tokens of one head, the newest query_tokens of them the queries' own; rows are heads times query tokens.
void window_importance(const float* q, int64_t rows, const float* lse, const Keys& keys, int64_t query_tokens,
                       float* importance) {
  const int64_t count = keys.block_size, q_stride = padded(keys.dim);
  Tile& tile = scratch(kTokens, keys.dim, 1);
  for (int64_t first = 0; first < count; first += kTokens) {
    const int64_t here = std::min(kTokens, count - first), width = padded(here);
    for (int64_t t = 0; t < here; ++t) key_row(keys, first + t, nullptr, nullptr, tile.k.data() + t * q_stride);
    clear_behind(tile, here, keys.dim);
    by_rows(rows, [&]<int NR>(int64_t r) {
      dots<NR>(q + r * q_stride, q_stride, tile.k.data(), width, q_stride, tile.weights.data(), width, nullptr);
      for (int j = 0; j < NR; ++j) {
        const int64_t seen = count - query_tokens + (r + j) % query_tokens + 1 - first;
        if (seen > 0)
          add_weights(tile.weights.data() + j * width, lse[r + j], std::min(here, seen), importance + first);
      }
    });
  }
}

}  // namespace
}  // namespace pikv
