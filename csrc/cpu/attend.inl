// Attention over stored blocks and tokens with a running softmax. Scales of values are folded into the weights, so
// their tile holds bare codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "low_rank.inl"

namespace pikv {
namespace {

// Where the tokens to take in are: tiles of floats, or, where they are null, the pool's codes from `row` on.
struct Tokens {
  const float* k;
  const float* v;
  const Keys& keys;
  const Values& values;
  int64_t row, count;
  const int64_t* positions;  // [count] or null
  Ahead* ahead;              // or null
  const Factors *k_factors = nullptr, *v_factors = nullptr;  // where there is a low-rank part
  FactorSums* sums = nullptr;
};

// The block's scale folds into q, its zero into a constant: tile.scaled_q [NR, padded(D)].
template <int NR>
Folded fold_scales(const float* q, int64_t q_stride, Tile& tile) {
  Vec zeros[NR], largest_of[NR];
  for (int r = 0; r < NR; ++r) zeros[r] = largest_of[r] = Vec{};
  for (int64_t d = 0; d < q_stride; d += W) {
    const Vec zero = load(tile.k_zero.data() + d), scale = load(tile.k_scale.data() + d);
    for (int r = 0; r < NR; ++r) {
      const Vec query = load(q + r * q_stride + d), scaled = query * scale;
      zeros[r] += query * zero;
      largest_of[r] = larger(absolute(scaled), largest_of[r]);
      store(tile.scaled_q.data() + r * q_stride + d, scaled);
    }
  }
  Folded folded;
  for (int r = 0; r < NR; ++r) folded.offset[r] = sum(zeros[r]), folded.most[r] = largest(largest_of[r]);
  return folded;
}

template <int NR>
void logits_of(const float* q, int64_t q_stride, Tile& tile, const Tokens& tokens, float* logits, int64_t width) {
  if (tokens.k) return dots<NR>(q, q_stride, tokens.k, width, q_stride, logits, width, tokens.ahead);
#if PIKV_WIDTH > 1
  const Folded folded = fold_scales<NR>(q, q_stride, tile);
  code_logits<NR>(tile, tokens.keys, tokens.row, false, folded, logits, width, tokens.ahead);
#endif
}

// out [NR, E] = out * fade + zero + weights [NR, width] times the values.
template <int NR>
void weigh_values(Tile& tile, const Tokens& tokens, int64_t width, const Update& update, float* out) {
  const Values& values = tokens.values;
  const float* weights = tile.weights.data();
#if PIKV_WIDTH == 16
  if (!tokens.v && integer_codes(values)) {
    IntegerRows rows{tile.weight_bytes.data(), {}};
    rows.cut<NR>(weights, width, width, update.most);
    const uint8_t* codes = values.codes + tokens.row * (values.dim * values.bits / 8);
    values.bits == 8 ? integer_accumulate<NR, 8>(rows, codes, tokens.count, values.dim, update, out, tokens.ahead)
                     : integer_accumulate<NR, 4>(rows, codes, tokens.count, values.dim, update, out, tokens.ahead);
    return;
  }
#endif
  for (int r = 0; r < NR; ++r)
    if (const float fade = update.fade[r], zero = update.zero[r]; fade != 1.0f || zero != 0.0f)
      for (int64_t e = r * values.dim; e < (r + 1) * values.dim; ++e) out[e] = out[e] * fade + zero;
  if (tokens.v) return accumulate<NR>(weights, width, tokens.v, tokens.count, values.dim, out, tokens.ahead);
#if PIKV_WIDTH > 1
  const uint8_t* codes = values.codes + tokens.row * (values.dim * values.bits / 8);
  values.bits == 8 ? accumulate_codes<NR, 8>(weights, width, codes, tokens.count, values.dim, out, tokens.ahead)
                   : accumulate_codes<NR, 4>(weights, width, codes, tokens.count, values.dim, out, tokens.ahead);
#endif
}

// Takes tokens, whose logits are in the tile's weights [NR, padded(count)], into the partial of NR rows. The tile holds
// the scales of the values, where they are codes.
template <int NR>
void absorb_logits(Tile& tile, const Tokens& tokens, const int64_t* query_positions, Partial partial) {
  const int64_t width = padded(tokens.count);
  float* weights = tile.weights.data();
  Update update;
  if (tokens.v_factors && static_cast<int64_t>(tile.shares.size()) < 4 * width) tile.shares.resize(4 * width);
  for (int r = 0; r < NR; ++r) {
    float* row = weights + r * width;
    update.fade[r] = 1.0f, update.zero[r] = update.most[r] = 0.0f;
    for (int64_t t = tokens.count; t < width; ++t) row[t] = kMinusInf;
    if (tokens.positions)
      for (int64_t t = 0; t < tokens.count; ++t)
        if (tokens.positions[t] > query_positions[r]) row[t] = kMinusInf;
    Vec highest = load(row);
    for (int64_t t = W; t < width; t += W) highest = larger(load(row + t), highest);
    const float high = std::max(partial.high[r], largest(highest));
    if (high == kMinusInf) {  // nothing seen yet, nothing to see here
      std::memset(row, 0, width * sizeof(float));
      if (tokens.v_factors) std::memset(tile.shares.data() + r * width, 0, width * sizeof(float));
      continue;
    }
    if (partial.high[r] != high) update.fade[r] = std::exp(partial.high[r] - high);
    Vec total{}, zeros{}, heaviest{};
    for (int64_t t = 0; t < width; t += W) {
      Vec weight = exp_negative(load(row + t) - splat(high));
      total += weight;
      if (tokens.v_factors) store(tile.shares.data() + r * width + t, weight);
      if (!tokens.values.raw) {
        zeros += weight * load(tile.v_zero.data() + t);
        weight *= load(tile.v_scale.data() + t);
        heaviest = larger(weight, heaviest);
      }
      store(row + t, weight);
    }
    partial.high[r] = high;
    partial.total[r] = partial.total[r] * update.fade[r] + sum(total);
    update.zero[r] = sum(zeros), update.most[r] = largest(heaviest);
  }
  weigh_values<NR>(tile, tokens, width, update, partial.out);
  if (tokens.v_factors) tokens.sums->add<NR>(*tokens.v_factors, tile.shares.data(), width, tokens.count, partial.high);
}

// Calls f for four rows at a time: f<NR>(first).
template <class F>
inline void by_rows(int64_t rows, F f) {
  for (int64_t r = 0; r < rows; r += 4) switch (rows - r) {
      case 1: f.template operator()<1>(r); break;
      case 2: f.template operator()<2>(r); break;
      case 3: f.template operator()<3>(r); break;
      default: f.template operator()<4>(r);
    }
}

void absorb_rows(const float* q, int64_t rows, Tile& tile, const Tokens& tokens, const int64_t* query_positions,
                 Partial partial) {
  const int64_t q_stride = padded(tokens.keys.dim), value_dim = tokens.values.dim;
  by_rows(rows, [&]<int NR>(int64_t r) {
    logits_of<NR>(q + r * q_stride, q_stride, tile, tokens, tile.weights.data(), padded(tokens.count));
    if (tokens.k_factors)
      add_factor_logits<NR>(*tokens.keys.low_rank, *tokens.k_factors, tokens.keys.groups, rows, r, tile, tokens.count,
                            tile.weights.data(), padded(tokens.count));
    absorb_logits<NR>(tile, tokens, query_positions ? query_positions + r : nullptr,
                      {partial.out + r * value_dim, partial.high + r, partial.total + r});
  });
}

// Names the memory of one head of a block as what to fetch next.
void fetch_ahead(const Keys& keys, const Values& values, int64_t id, int64_t head, Ahead& ahead) {
  const int64_t row = (id * keys.groups + head) * keys.block_size, tokens = keys.block_size;
  ahead.clear();
  auto plane = [&](const void* base, int64_t row_bytes) {
    if (base) ahead.add(static_cast<const char*>(base) + row * row_bytes, tokens * row_bytes);
  };
  if (keys.raw) {
    plane(keys.raw, keys.dim * (keys.dtype == Dtype::kFloat32 ? 4 : 2));
  } else {
    plane(keys.high, keys.dim * keys.hi_bits / 8);
    plane(keys.low, keys.dim * keys.lo_bits / 8);
    const int64_t scales = (id * keys.groups + head) * keys.dim;
    ahead.add(reinterpret_cast<const char*>(keys.scale + scales), keys.dim * 2);
    ahead.add(reinterpret_cast<const char*>(keys.zero + scales), keys.dim * 2);
  }
  plane(values.raw, values.dim * (values.dtype == Dtype::kFloat32 ? 4 : 2));
  plane(values.codes, values.dim * values.bits / 8);
  plane(keys.low_rank ? keys.low_rank->codes : nullptr, keys.low_rank ? keys.low_rank->rank : 0);
  plane(values.low_rank ? values.low_rank->codes : nullptr, values.low_rank ? values.low_rank->rank : 0);
  ahead.values_follow();
}

// While it lives, partials are in the order in which integers are summed, where they are.
class OutOrder {
 public:
  OutOrder(const Values& values, float* out, int64_t rows) : out_(out), rows_(rows), dim_(values.dim) {
#if PIKV_WIDTH == 16
    swapped_ = integer_codes(values);
#endif
    swap();
  }
  ~OutOrder() { swap(); }
  OutOrder(const OutOrder&) = delete;
  OutOrder& operator=(const OutOrder&) = delete;

 private:
  void swap() {
#if PIKV_WIDTH == 16
    if (swapped_) swap_quads(out_, rows_ * dim_);
#endif
  }
  float* out_;
  int64_t rows_, dim_;
  bool swapped_ = false;
};

// Readies the keys of a block's head: null where its codes are read in place, else where its floats are.
const float* ready_keys(const Keys& keys, int64_t id, int64_t head, Tile& tile) {
  const int64_t dim = keys.dim, tokens = keys.block_size, row = (id * keys.groups + head) * tokens;
  // whole vectors already
  if (keys.raw && keys.dtype == Dtype::kFloat32 && padded(dim) == dim && padded(tokens) == tokens)
    return static_cast<const float*>(keys.raw) + row * dim;
  if (!keys.raw) {
    key_scales(keys, id, head, tile);
    if (codes_in_place(keys)) return nullptr;
  }
  for (int64_t t = 0; t < tokens; ++t)
    key_row(keys, row + t, tile.k_scale.data(), tile.k_zero.data(), tile.k.data() + t * padded(dim));
  return tile.k.data();
}

const float* ready_values(const Values& values, int64_t row, int64_t tokens, Tile& tile) {
  const int64_t dim = values.dim;
  if (values.raw && values.dtype == Dtype::kFloat32 && padded(dim) == dim)
    return static_cast<const float*>(values.raw) + row * dim;
  if (codes_in_place(values)) {
    to_float(values.scale, Dtype::kFloat16, row, tokens, tile.v_scale.data());
    to_float(values.zero, Dtype::kFloat16, row, tokens, tile.v_zero.data());
    return nullptr;
  }
  for (int64_t t = 0; t < tokens; ++t)
    value_row(values, row + t, tile.v.data() + t * padded(dim), tile.v_scale[t], tile.v_zero[t]);
  return tile.v.data();
}

void attend_blocks(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* ids,
                   int64_t count, const int64_t* key_positions, const int64_t* query_positions, Partial partial) {
  const int64_t tokens = keys.block_size, groups = keys.groups;
  Tile& tile = scratch(tokens, keys.dim, values.dim);
  Ahead ahead;
  FactorSums sums(values, rows, groups, 0, partial);  // goes last, when the output is in its own order again
  fit_factors(keys.low_rank, tokens, tile.k_factors, tile.k_basis);
  fit_factors(values.low_rank, tokens, tile.v_factors, tile.v_basis);
  const OutOrder order(values, partial.out, groups * rows);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t head = 0; head < groups; ++head) {
      const bool last_head = head + 1 == groups;
      if (!last_head || i + 1 < count) fetch_ahead(keys, values, ids[i + last_head], last_head ? 0 : head + 1, ahead);
      const int64_t row = (ids[i] * groups + head) * tokens;
      const float* k = ready_keys(keys, ids[i], head, tile);
      const float* v = ready_values(values, row, tokens, tile);
      Tokens block{k, v, keys, values, row, tokens, key_positions ? key_positions + i * tokens : nullptr, &ahead};
      Factors of_keys, of_values;
      if (keys.low_rank) {
        of_keys = block_factors(*keys.low_rank, groups, tokens, ids[i], head, tile, tile.k_factors.data());
        block.k_factors = &of_keys;
      }
      if (values.low_rank) {
        of_values = block_factors(*values.low_rank, groups, tokens, ids[i], head, tile, tile.v_factors.data());
        block.v_factors = &of_values, block.sums = &sums;
      }
      absorb_rows(q + head * rows * padded(keys.dim), rows, tile, block, query_positions,
                  {partial.out + head * rows * values.dim, partial.high + head * rows, partial.total + head * rows});
    }
}

constexpr int64_t kTokens = 64;  // single tokens that are taken in at a time

// Zeros behind `held` single tokens, whatever an earlier round left there.
void clear_behind(Tile& tile, int64_t held, int64_t dim) {
  for (int64_t t = held; t < padded(held); ++t) {
    std::memset(tile.k.data() + t * padded(dim), 0, padded(dim) * sizeof(float));
    tile.v_scale[t] = tile.v_zero[t] = 0.0f;
  }
}

inline void fetch(const void* base, int64_t at, int64_t bytes) {
  if (!base) return;
  const char* from = static_cast<const char*>(base) + at * bytes;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Fetches what key_row reads of a single token, unless its block is the one before's; and what value_row does.
inline void fetch_key(const Keys& keys, int64_t id, int64_t head, int64_t row, bool new_block) {
  if (keys.raw) return fetch(keys.raw, row, keys.dim * (keys.dtype == Dtype::kFloat32 ? 4 : 2));
  fetch(keys.high, row, keys.dim * keys.hi_bits / 8);
  fetch(keys.low, row, keys.dim * keys.lo_bits / 8);
  if (!new_block) return;
  fetch(keys.scale, id * keys.groups + head, keys.dim * 2);
  fetch(keys.zero, id * keys.groups + head, keys.dim * 2);
}
inline void fetch_value(const Values& values, int64_t row) {
  if (values.raw) return fetch(values.raw, row, values.dim * (values.dtype == Dtype::kFloat32 ? 4 : 2));
  fetch(values.codes, row, values.dim * values.bits / 8);
  fetch(values.scale, row, 2);
  fetch(values.zero, row, 2);
}
constexpr int64_t kTokensAhead = 16;

void attend_tokens(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* ids,
                   const int64_t* offsets, const bool* read, int64_t count, int64_t head, Partial partial) {
  const int64_t dim = keys.dim, value_dim = values.dim;
  Tile& tile = scratch(kTokens, dim, value_dim);
  int64_t held = 0, block = -1;
  FactorSums sums(values, rows, 1, head, partial);
  fit_factors(keys.low_rank, kTokens, tile.k_factors, tile.k_basis);
  fit_factors(values.low_rank, kTokens, tile.v_factors, tile.v_basis);
  const Factors of_keys{tile.k_factors.data(), tile.k_basis.data(), false, head, 0};
  const Factors of_values{tile.v_factors.data(), tile.v_basis.data(), false, head, 0};
  auto gather = [&](const LowRank* part, int64_t i, std::vector<float>& a, std::vector<int64_t>& basis) {
    if (!part) return;
    factor_rows(*part, keys.groups, keys.block_size, ids[i], head, offsets[i], 1, tile,
                a.data() + held * padded(part->rank));
    basis[held] = part->basis_of[ids[i]];
  };
  auto flush = [&] {
    clear_behind(tile, held, dim);
    const Tokens here{tile.k.data(), tile.v.data(), keys, values, 0, held, nullptr, nullptr,
                      keys.low_rank ? &of_keys : nullptr, values.low_rank ? &of_values : nullptr, &sums};
    absorb_rows(q, rows, tile, here, nullptr, partial);
    held = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (const int64_t next = i + kTokensAhead; next < count && !(read && !read[next])) {
      const int64_t row = (ids[next] * keys.groups + head) * keys.block_size + offsets[next];
      fetch_key(keys, ids[next], head, row, ids[next] != ids[next - 1]);
      fetch_value(values, row);
    }
    if (read && !read[i]) continue;
    const int64_t row = (ids[i] * keys.groups + head) * keys.block_size + offsets[i];
    if (!keys.raw && ids[i] != block) key_scales(keys, block = ids[i], head, tile);
    key_row(keys, row, tile.k_scale.data(), tile.k_zero.data(), tile.k.data() + held * padded(dim));
    value_row(values, row, tile.v.data() + held * padded(value_dim), tile.v_scale[held], tile.v_zero[held]);
    gather(keys.low_rank, i, tile.k_factors, tile.k_basis);
    gather(values.low_rank, i, tile.v_factors, tile.v_basis);
    if (++held == kTokens) flush();
  }
  if (held) flush();
}

// A run of raw tokens as one block of one head: k [tokens, D], v [tokens, E].
void attend_raw(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* key_positions,
                const int64_t* query_positions, Partial partial) {
  const int64_t count = keys.block_size;
  Tile& tile = scratch(kTokens, keys.dim, values.dim);
  for (int64_t first = 0; first < count; first += kTokens) {
    const int64_t here = std::min(kTokens, count - first);
    for (int64_t t = 0; t < here; ++t) {
      key_row(keys, first + t, nullptr, nullptr, tile.k.data() + t * padded(keys.dim));
      value_row(values, first + t, tile.v.data() + t * padded(values.dim), tile.v_scale[t], tile.v_zero[t]);
    }
    clear_behind(tile, here, keys.dim);
    const int64_t* positions = key_positions ? key_positions + first : nullptr;
    absorb_rows(q, rows, tile, {tile.k.data(), tile.v.data(), keys, values, 0, here, positions, nullptr},
                query_positions, partial);
  }
}

}  // namespace
}  // namespace pikv
