// Choosing tokens by their scores: ranks, the best of them, and reading until little enough is missed. One KV head at a time.
// Included by kernels.inl.

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

// Log-sum-exp of what unread tokens are expected to have, slope * coarse + spread [blocks], and of what they have at most, coarse
// + radius [blocks].
void unread_mass(const float* coarse, float slope, const float* spread, const float* radius, const bool* read, int64_t blocks,
                 int64_t tokens, float* by_spread, float* by_radius) {
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

// ---- until little enough is missed

// Tokens in the order of their ranks (none negative), the first of equals first: by buckets of like ranks, which are sorted
// when they are reached.
class RankOrder {
 public:
  RankOrder(const float* rank, int64_t count) : rank_(rank), begin_(kBuckets + 1, 0), order_(count) {
    for (int64_t i = 0; i < count; ++i) ++begin_[bucket(i) + 1];
    for (int64_t b = 0; b < kBuckets; ++b) begin_[b + 1] += begin_[b];
    std::vector<int32_t> at(begin_.begin(), begin_.end() - 1);
    for (int64_t i = 0; i < count; ++i) order_[at[bucket(i)]++] = static_cast<int32_t>(i);
  }
  // The next tokens, at least `least` of them where so many are left.
  std::pair<const int32_t*, int64_t> next(int64_t least) {
    const int64_t first = done_;
    while (done_ - first < least && next_ < kBuckets) {
      const auto from = order_.begin() + done_, to = order_.begin() + begin_[++next_];
      std::stable_sort(from, to, [this](int32_t a, int32_t b) { return rank_[a] > rank_[b]; });
      done_ = to - order_.begin();
    }
    return {order_.data() + first, done_ - first};
  }

 private:
  static constexpr int64_t kBuckets = 1 << 15;
  int64_t bucket(int64_t i) const { return kBuckets - 1 - (bit_cast<uint32_t>(rank_[i]) >> 16); }
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

inline float exp_one(float x) {
  float lanes[W] = {x};
  store(lanes, exp_negative(load(lanes)));
  return lanes[0];
}

// x [count] = e^(x - top), the same whatever stands beside it, for numbers that are not above top; in double where float32 would lose them.
void masses_of(double* x, int64_t count, float top) {
  for (int64_t i = 0; i < count; i += W) {
    float here[W] = {};
    const int64_t held = std::min<int64_t>(W, count - i);
    float least = 0.0f;
    for (int64_t j = 0; j < held; ++j) here[j] = static_cast<float>(x[i + j] - top), least = std::min(least, here[j]);
    if (least > -80.0f) {
      store(here, exp_negative(load(here)));
      for (int64_t j = 0; j < held; ++j) x[i + j] = here[j];
    } else {
      for (int64_t j = 0; j < held; ++j) x[i + j] = here[j] > -80.0f ? exp_one(here[j]) : std::exp(static_cast<double>(here[j]));
    }
  }
}

// The tokens of one head, as a mass-bounded read sees them.
struct Unread {
  const float* coarse;  // [R, blocks, size]
  float slope;
  const float* extra;  // [R, blocks]
  const bool* read;
  int64_t blocks, size;

  float at_most(int64_t r, int64_t token) const {
    return slope * coarse[r * blocks * size + token] + extra[r * blocks + token / size];
  }
  // Of a row: the largest of those unread (or `least` where that is more), and their mass beside it.
  std::pair<float, double> mass(int64_t r, float least) const {
    thread_local std::vector<double> rest;
    rest.clear();
    float top = least;
    for (int64_t i = 0; i < blocks * size; ++i)
      if (!read[i]) {
        rest.push_back(at_most(r, i));
        top = std::max(top, at_most(r, i));
      }
    masses_of(rest.data(), static_cast<int64_t>(rest.size()), top);
    double total = 0.0;
    for (double mass : rest) total += mass;
    return {top, total};
  }
};

// Logits [R, count] of single tokens of one head.
void logits_of_tokens(const float* q, int64_t rows, const Keys& keys, const int64_t* ids, const int32_t* tokens, int64_t count,
                      int64_t head, Tile& tile, float* logits) {
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

// How many of the chosen tokens are read, the best first: until the row misses at most epsilon. logits [count] in the order
// of the tokens' places, place[token] where a token's is.
int64_t needed(const Unread& tokens, int64_t r, const int32_t* chosen, int64_t count, const float* logits,
               const int32_t* place, double epsilon, bool* read, Masses& mass) {
  thread_local std::vector<double> at_most, in_order, after;
  at_most.resize(count), in_order.resize(count), after.resize(count);
  for (int64_t i = 0; i < count; ++i) at_most[i] = tokens.at_most(r, chosen[i]), in_order[i] = logits[place[chosen[i]]];
  mass.raise(static_cast<float>(*std::max_element(in_order.begin(), in_order.end())));
  masses_of(at_most.data(), count, mass.top);
  masses_of(in_order.data(), count, mass.top);
  double here = 0.0;
  for (int64_t i = count; i-- > 0;) after[i] = here += at_most[i];
  mass.unread -= here;
  if (mass.unread < 1e-6 * mass.counted) {  // little is left of the difference but rounding
    for (int64_t i = 0; i < count; ++i) read[chosen[i]] = true;
    const auto [top, rest] = tokens.mass(r, kMinusInf);
    mass.counted = mass.unread = rest > 0.0 ? rest * std::exp(static_cast<double>(top) - mass.top) : 0.0;
    for (int64_t i = 0; i < count; ++i) read[chosen[i]] = false;
  }
  int64_t needs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double missed = after[i] + mass.unread;
    if (needs == i && missed >= epsilon * (missed + mass.read)) ++needs;
    mass.read += in_order[i];
  }
  return needs;
}

int64_t attend_mass(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* ids, int64_t blocks,
                    int64_t head, const float* coarse, float slope, const float* extra, const float* raw_lse, double epsilon,
                    bool* read, Partial partial) {
  constexpr int64_t kAtOnce = 128;
  const int64_t size = keys.block_size, count = blocks * size;
  Tile& tile = scratch(kTokens, keys.dim, values.dim);
  std::vector<float> rank(count), logits, taken_logits(rows * kTokens);
  std::vector<int32_t> by_place, place(count);
  rank_tokens(coarse, rows, count, count, raw_lse, rank.data());
  RankOrder order(rank.data(), count);
  std::fill(read, read + count, false);
  const Unread tokens{coarse, slope, extra, read, blocks, size};
  std::vector<Masses> masses(rows);
  for (int64_t r = 0; r < rows; ++r) {
    const auto [top, mass] = tokens.mass(r, raw_lse[r]);
    masses[r] = {top, mass, mass, std::exp(static_cast<double>(raw_lse[r]) - top)};
  }
  int64_t tokens_read = 0;
  for (bool enough = false; !enough;) {
    const auto [chosen, held] = order.next(kAtOnce);
    if (held == 0) break;
    by_place.assign(chosen, chosen + held);  // as they lie in memory
    std::sort(by_place.begin(), by_place.end());
    for (int64_t i = 0; i < held; ++i) place[by_place[i]] = static_cast<int32_t>(i);
    logits.resize(rows * held);
    logits_of_tokens(q, rows, keys, ids, by_place.data(), held, head, tile, logits.data());
    int64_t needs = 0;
    for (int64_t r = 0; r < rows; ++r)
      needs = std::max(needs, needed(tokens, r, chosen, held, logits.data() + r * held, place.data(), epsilon, read, masses[r]));
    enough = needs < held;
    for (int64_t i = 0; i < needs; ++i) read[chosen[i]] = true;
    tokens_read += needs;
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
    for (int64_t i = 0; i < held; ++i) {
      const int64_t token = by_place[i];
      if (!read[token]) continue;
      value_row(values, (ids[token / size] * keys.groups + head) * size + token % size,
                tile.v.data() + taken * padded(values.dim), tile.v_scale[taken], tile.v_zero[taken]);
      for (int64_t r = 0; r < rows; ++r) taken_logits[r * kTokens + taken] = logits[r * held + i];
      if (++taken == kTokens) flush();
    }
    if (taken) flush();
  }
  return tokens_read;
}
