// Reading tokens in the order of their ranks until no query row misses more than a given share of its softmax. One KV
// head at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "select.inl"

namespace pikv {
namespace {

// Tokens in the order of their ranks (none negative): runs of them, each below those before it. Ranks are compared by
// their bits, which order NaN like any other number: it has no place, but it must do no harm.
class RankOrder {
 public:
  RankOrder(const float* rank, int64_t count) : rank_(rank), begin_(kBuckets + 1, 0), order_(count) {
    for (int64_t i = 0; i < count; ++i) ++begin_[bucket(i) + 1];
    for (int64_t b = 0; b < kBuckets; ++b) begin_[b + 1] += begin_[b];
    std::vector<int32_t> at(begin_.begin(), begin_.end() - 1);
    for (int64_t i = 0; i < count; ++i) order_[at[bucket(i)]++] = static_cast<int32_t>(i);
  }
  // The next run, of at least `least` tokens where so many are left; in itself it is in no order.
  std::pair<int32_t*, int64_t> next(int64_t least) {
    const int64_t first = done_;
    while (done_ - first < least && next_ < kBuckets) done_ = begin_[++next_];
    return {order_.data() + first, done_ - first};
  }
  // The best first, and the first of equals.
  void sort(int32_t* tokens, int64_t count) const {
    std::sort(tokens, tokens + count, [this](int32_t a, int32_t b) {
      return bits(a) != bits(b) ? bits(a) > bits(b) : a < b;
    });
  }

 private:
  static constexpr int64_t kBuckets = 1 << 15;
  uint32_t bits(int64_t i) const { return bit_cast<uint32_t>(rank_[i]) & 0x7fffffffu; }
  int64_t bucket(int64_t i) const { return kBuckets - 1 - (bits(i) >> 16); }
  const float* rank_;
  std::vector<int32_t> begin_, order_;
  int64_t done_ = 0, next_ = 0;
};

// Masses of one query row beside e^top: of what is unread, when that was last counted, and of what was read.
struct Masses {
  float top;
  double unread, counted, read;
  void raise(float to) {
    if (to <= top) return;
    const double factor = std::exp(static_cast<double>(top) - to);
    unread *= factor, counted *= factor, read *= factor, top = to;
  }
};

// Sum of e^(x - top) over x [count]; W more numbers behind them may be written to.
double mass_of(float* x, int64_t count, float top) {
  std::fill_n(x + count, W, kMinusInf);
  double total[W] = {}, all = 0.0;
  for (int64_t i = 0; i < count; i += W) {
    float here[W];
    store(here, exp_negative(load(x + i) - splat(top)));
    for (int j = 0; j < W; ++j) total[j] += here[j];
  }
  for (double part : total) all += part;
  return all;
}

float highest_of(const float* x, int64_t count, float least) {
  for (int64_t i = 0; i < count; ++i) least = std::max(least, x[i]);
  return least;
}

// The tokens of one head, as a mass-bounded read sees them.
struct Unread {
  const float* coarse;  // [R, blocks, size], rows `stride` blocks apart
  float slope;
  const float* extra;  // [R, blocks], likewise
  const bool* read;
  int64_t blocks, size, stride;

  float at_most(int64_t r, int64_t token, int64_t block) const {
    return slope * coarse[r * stride * size + token] + extra[r * stride + block];
  }
  // Of a row: the largest of those unread (or `least` where that is more), and their mass beside it.
  std::pair<float, double> mass(int64_t r, float least) const {
    thread_local std::vector<float> rest;
    rest.resize(blocks * size + W);
    int64_t held = 0;
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t t = b * size; t < (b + 1) * size; ++t) {
        rest[held] = at_most(r, t, b);
        held += !read[t];
      }
    const float top = highest_of(rest.data(), held, least);
    return {top, top == kMinusInf ? 0.0 : mass_of(rest.data(), held, top)};
  }
};

// Logits [R, count] of single tokens of one head.
void logits_of_tokens(const float* q, int64_t rows, const Keys& keys, const int64_t* ids, const int32_t* tokens,
                      int64_t count, int64_t head, Tile& tile, float* logits) {
  const int64_t dim = keys.dim, q_stride = padded(dim), size = keys.block_size;
  int64_t block = -1;
  for (int64_t first = 0; first < count; first += kTokens) {
    const int64_t here = std::min(kTokens, count - first), width = padded(here);
    for (int64_t t = 0; t < here; ++t) {
      const int64_t token = tokens[first + t], id = ids[token / size];
      if (!keys.raw && id != block) key_scales(keys, block = id, head, tile);
      key_row(keys, (id * keys.groups + head) * size + token % size, tile.k_scale.data(), tile.k_zero.data(),
              tile.k.data() + t * q_stride);
    }
    clear_behind(tile, here, dim);
    by_rows(rows, [&]<int NR>(int64_t r) {
      float* to = tile.weights.data();
      dots<NR>(q + r * q_stride, q_stride, tile.k.data(), width, q_stride, to, width, nullptr);
      for (int j = 0; j < NR; ++j) std::memcpy(logits + (r + j) * count + first, to + j * width, here * sizeof(float));
    });
  }
}

// The stopping rule: masses of every row, and how far to read a run.
class Stop {
 public:
  Stop(const Unread& tokens, const RankOrder& order, const float* raw_lse, int64_t rows, double epsilon, bool* read)
      : tokens_(tokens), order_(order), epsilon_(epsilon), read_(read), masses_(rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const auto [top, mass] = tokens.mass(r, raw_lse[r]);
      masses_[r] = {top, mass, mass, std::exp(static_cast<double>(raw_lse[r]) - top)};
    }
  }

  // Marks those of a run as read that are needed; returns how many. The logit of a token in row r is
  // logits[r * stride + place[token]], or with place null logits[r * stride + token].
  int64_t take(int32_t* run, int64_t count, const float* logits, int64_t stride, const int32_t* place) {
    const int64_t rows = static_cast<int64_t>(masses_.size());
    block_.resize(count), at_most_.resize(count + W), true_.resize(count + W);
    for (int64_t i = 0; i < count; ++i) block_[i] = run[i] / static_cast<int32_t>(tokens_.size);
    const std::vector<Masses> before = masses_;
    for (int64_t i = 0; i < count; ++i) read_[run[i]] = true;
    bool all = false;  // whether some row needs what comes after the run, so all of it
    for (int64_t r = 0; r < rows; ++r) {
      Masses& mass = masses_[r];
      for (int64_t i = 0; i < count; ++i) {
        at_most_[i] = tokens_.at_most(r, run[i], block_[i]);
        true_[i] = logits[r * stride + (place ? place[run[i]] : run[i])];
      }
      mass.raise(highest_of(true_.data(), count, mass.top));
      mass.unread -= mass_of(at_most_.data(), count, mass.top);
      mass.read += mass_of(true_.data(), count, mass.top);
      if (mass.unread < 1e-6 * mass.counted) {  // little is left of the difference but rounding
        const auto [top, rest] = tokens_.mass(r, kMinusInf);
        mass.counted = mass.unread = rest > 0.0 ? rest * std::exp(static_cast<double>(top) - mass.top) : 0.0;
      }
      all = all || (mass.unread > 0.0 && needs_more(mass.unread, mass.read));
    }
    if (all) return count;
    for (int64_t i = 0; i < count; ++i) read_[run[i]] = false;
    order_.sort(run, count);
    int64_t needs = 0;
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<double> after(count + 1, masses_[r].unread);
      const double top = masses_[r].top;
      for (int64_t i = count; i-- > 0;)
        after[i] = after[i + 1] + std::exp(tokens_.at_most(r, run[i], run[i] / tokens_.size) - top);
      double read = before[r].read * std::exp(before[r].top - top);
      for (int64_t i = 0; i < count && needs_more(after[i], read); ++i) {
        read += std::exp(logits[r * stride + (place ? place[run[i]] : run[i])] - top);
        needs = std::max(needs, i + 1);
      }
    }
    for (int64_t i = 0; i < needs; ++i) read_[run[i]] = true;
    return needs;
  }

 private:
  // True where both vanish, too.
  bool needs_more(double missed, double read) const { return missed >= epsilon_ * (missed + read); }

  const Unread& tokens_;
  const RankOrder& order_;
  double epsilon_;
  bool* read_;
  std::vector<Masses> masses_;
  std::vector<int32_t> block_;
  std::vector<float> at_most_, true_;
};

// Takes single tokens, by their places in memory, into the partial; logits [R, stride] by the same order.
void absorb_tokens(int64_t rows, const Keys& keys, const Values& values, const int64_t* ids, const int32_t* tokens,
                   int64_t count, const bool* read, int64_t head, const float* logits, int64_t stride,
                   Partial partial) {
  const int64_t size = keys.block_size;
  Tile& tile = scratch(kTokens, keys.dim, values.dim);
  std::vector<float> taken_logits(rows * kTokens);
  int64_t taken = 0;
  auto flush = [&] {
    const Tokens here{nullptr, tile.v.data(), keys, values, 0, taken, nullptr, nullptr};
    const int64_t width = padded(taken);
    for (int64_t t = taken; t < width; ++t) tile.v_scale[t] = tile.v_zero[t] = 0.0f;
    by_rows(rows, [&]<int NR>(int64_t r) {
      for (int j = 0; j < NR; ++j)
        std::memcpy(tile.weights.data() + j * width, &taken_logits[(r + j) * kTokens], taken * sizeof(float));
      absorb_logits<NR>(tile, here, nullptr, {partial.out + r * values.dim, partial.high + r, partial.total + r});
    });
    taken = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = tokens[i];
    if (!read[token]) continue;
    value_row(values, (ids[token / size] * keys.groups + head) * size + token % size,
              tile.v.data() + taken * padded(values.dim), tile.v_scale[taken], tile.v_zero[taken]);
    for (int64_t r = 0; r < rows; ++r) taken_logits[r * kTokens + taken] = logits[r * stride + i];
    if (++taken == kTokens) flush();
  }
  if (taken) flush();
}

// Takes those tokens of whole blocks that `taken` says into the partial; logits [R, blocks * size].
void absorb_masked(int64_t rows, const Keys& keys, const Values& values, const int64_t* ids, int64_t blocks,
                   const bool* taken, int64_t head, const float* logits, Partial partial) {
  const int64_t size = keys.block_size, width = padded(size);
  Tile& tile = scratch(size, keys.dim, values.dim);
  const OutOrder order(values, partial.out, rows);
  for (int64_t b = 0; b < blocks; ++b) {
    const bool* here = taken + b * size;
    if (std::find(here, here + size, true) == here + size) continue;
    const int64_t row = (ids[b] * keys.groups + head) * size;
    const Tokens block{nullptr, ready_values(values, row, size, tile), keys, values, row, size, nullptr, nullptr};
    by_rows(rows, [&]<int NR>(int64_t r) {
      for (int j = 0; j < NR; ++j) {
        const float* from = logits + ((r + j) * blocks + b) * size;
        for (int64_t t = 0; t < size; ++t) tile.weights[j * width + t] = here[t] ? from[t] : kMinusInf;
      }
      absorb_logits<NR>(tile, block, nullptr, {partial.out + r * values.dim, partial.high + r, partial.total + r});
    });
  }
}

int64_t attend_mass(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* ids,
                    int64_t blocks, int64_t head, const float* coarse, float slope, const float* extra,
                    int64_t stride, const float* raw_lse, double epsilon, bool* read, Partial partial) {
  const int64_t size = keys.block_size, count = blocks * size, few = count / 16;  // above it whole blocks are cheaper
  std::vector<float> rank(count), logits;
  std::vector<int32_t> by_place, place(count);
  rank_tokens(coarse, rows, count, stride * size, raw_lse, rank.data());
  RankOrder order(rank.data(), count);
  std::fill(read, read + count, false);
  const Unread tokens{coarse, slope, extra, read, blocks, size, stride};
  Stop stop(tokens, order, raw_lse, rows, epsilon, read);
  int64_t tokens_read = 0;
  while (tokens_read < few) {  // token after token, only those that are needed
    const auto [chosen, held] = order.next(128);
    if (held == 0) return tokens_read;
    by_place.assign(chosen, chosen + held);  // as they lie in memory
    std::sort(by_place.begin(), by_place.end());
    for (int64_t i = 0; i < held; ++i) place[by_place[i]] = static_cast<int32_t>(i);
    logits.resize(rows * held);
    logits_of_tokens(q, rows, keys, ids, by_place.data(), held, head, scratch(kTokens, keys.dim, values.dim),
                     logits.data());
    const int64_t needs = stop.take(chosen, held, logits.data(), held, place.data());
    absorb_tokens(rows, keys, values, ids, by_place.data(), held, read, head, logits.data(), held, partial);
    tokens_read += needs;
    if (needs < held) return tokens_read;
  }
  // Many: the logits of all of them at once, and the values of the rest block after block.
  logits.resize(rows * count);
  key_logits(q, rows, keys, ids, blocks, head, logits.data(), count);
  std::vector<uint8_t> before(read, read + count);
  for (bool enough = false; !enough;) {
    const auto [chosen, held] = order.next(1024);
    const int64_t needs = held ? stop.take(chosen, held, logits.data(), count, nullptr) : 0;
    tokens_read += needs;
    enough = needs < held || held == 0;
  }
  for (int64_t i = 0; i < count; ++i) before[i] = read[i] && !before[i];
  absorb_masked(rows, keys, values, ids, blocks, reinterpret_cast<const bool*>(before.data()), head, logits.data(),
                partial);
  return tokens_read;
}

}  // namespace
}  // namespace pikv
