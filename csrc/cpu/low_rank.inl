// The low-rank part of keys and values, never made dense: logits get (q B^T) A^T, and what the values' factors sum up
// to meets their basis once, at the end. Included by kernels.inl.

// Factors of tokens as floats: a [tokens, padded(rank)]; basis [tokens] of each; same: all have the first one's.
struct Factors {
  const float* a;
  const int64_t* basis;
  bool same;
  int64_t head;
};

// Factors of `count` tokens of a block's head, from `first` on, decoded to a.
void factor_rows(const LowRank& part, int64_t groups, int64_t size, int64_t id, int64_t head, int64_t first,
                 int64_t count, Tile& tile, float* a) {
  const int64_t rank = part.rank, stride = padded(rank), at = id * groups + head;
  if (static_cast<int64_t>(tile.factor_scale.size()) < 2 * stride) tile.factor_scale.resize(2 * stride);
  float *scale = tile.factor_scale.data(), *zero = scale + stride;
  to_float(part.scale, Dtype::kFloat16, at * rank, rank, scale);
  to_float(part.zero, Dtype::kFloat16, at * rank, rank, zero);
  for (int64_t t = 0; t < count; ++t) {
    const uint8_t* codes = part.codes + (at * size + first + t) * rank;
    for (int64_t j = 0; j < rank; ++j) a[t * stride + j] = codes[j] * scale[j] + zero[j];
    for (int64_t j = rank; j < stride; ++j) a[t * stride + j] = 0.0f;
  }
}

// Room for the factors and bases of so many tokens.
void fit_factors(const LowRank* part, int64_t tokens, std::vector<float>& a, std::vector<int64_t>& basis) {
  if (!part) return;
  const size_t floats = padded(tokens) * padded(part->rank);
  if (a.size() < floats) a.resize(floats);
  if (static_cast<int64_t>(basis.size()) < tokens) basis.resize(tokens);
}

// logits [NR, width] of rows first .. of `rows` of a head += (q B^T) A^T.
template <int NR>
void add_factor_logits(const LowRank& part, const Factors& factors, int64_t groups, int64_t rows, int64_t first,
                       Tile& tile, int64_t count, float* logits, int64_t width) {
  const int64_t stride = padded(part.rank);
  auto projected = [&](int64_t t) {
    return part.projected + ((factors.basis[t] * groups + factors.head) * rows + first) * stride;
  };
  if (factors.same) {
    if (static_cast<int64_t>(tile.factor_logits.size()) < 4 * width) tile.factor_logits.resize(4 * width);
    float* added = tile.factor_logits.data();
    dots<NR>(projected(0), stride, factors.a, width, stride, added, width, nullptr);
    for (int64_t i = 0; i < NR * width; ++i) logits[i] += added[i];
    return;
  }
  for (int64_t t = 0; t < count; ++t) {
    const float *q = projected(t), *a = factors.a + t * stride;
    for (int r = 0; r < NR; ++r) {
      Vec total{};
      for (int64_t j = 0; j < stride; j += W) total += load(q + r * stride + j) * load(a + j);
      logits[r * width + t] += sum(total);
    }
  }
}

// Weighted sums of the values' factors, per basis and row of a partial. When it goes, they are added to the partial's
// output. Sums of a basis stand beside the highest logit of when they were last touched.
class FactorSums {
 public:
  // rows of one head; the partial's first row is of first_head.
  FactorSums(const Values& values, int64_t rows, int64_t heads, int64_t first_head, Partial partial)
      : values_(values), partial_(partial), rows_(rows), all_(rows * heads), first_head_(first_head) {
    if (!values.low_rank) return;
    stride_ = padded(values.low_rank->rank);
    sums_.assign(values.low_rank->bases * all_ * stride_, 0.0f);
    highs_.assign(values.low_rank->bases * all_, kMinusInf);
  }
  FactorSums(const FactorSums&) = delete;
  FactorSums& operator=(const FactorSums&) = delete;
  ~FactorSums() {
    for (size_t i = 0; i < highs_.size(); ++i) {
      if (highs_[i] == kMinusInf) continue;
      const LowRank& part = *values_.low_rank;
      const int64_t basis = static_cast<int64_t>(i) / all_, r = static_cast<int64_t>(i) % all_, dim = values_.dim;
      const float* rows = part.basis + (basis * values_.groups + first_head_ + r / rows_) * part.rank * dim;
      const float share = std::exp(highs_[i] - partial_.high[r]);
      for (int64_t j = 0; j < part.rank; ++j) {
        const float factor = share * sums_[i * stride_ + j];
        for (int64_t e = 0; e < dim; ++e) partial_.out[r * dim + e] += factor * rows[j * dim + e];
      }
    }
  }

  // Adds tokens with shares [NR, width] of the softmax beside high [NR], which is where the rows' highs are.
  template <int NR>
  void add(const Factors& factors, const float* shares, int64_t width, int64_t count, const float* high) {
    const int64_t first = high - partial_.high;
    auto ready = [&](int64_t basis, int r) {  // the sums of a row, beside its high of now
      const int64_t at = basis * all_ + first + r;
      float *sums = sums_.data() + at * stride_, &then = highs_[at];
      if (then != high[r]) {
        const float fade = std::exp(then - high[r]);
        for (int64_t j = 0; j < stride_; ++j) sums[j] *= fade;
        then = high[r];
      }
      return sums;
    };
    if (factors.same) {
      for (int r = 0; r < NR; ++r)
        if (high[r] != kMinusInf) ready(factors.basis[0], r);
      accumulate<NR>(shares, width, factors.a, count, stride_,
                     sums_.data() + (factors.basis[0] * all_ + first) * stride_, nullptr);
      return;
    }
    for (int64_t t = 0; t < count; ++t)
      for (int r = 0; r < NR; ++r) {
        if (high[r] == kMinusInf) continue;
        float* sums = ready(factors.basis[t], r);
        const Vec share = splat(shares[r * width + t]);
        for (int64_t j = 0; j < stride_; j += W)
          store(sums + j, load(sums + j) + share * load(factors.a + t * stride_ + j));
      }
  }

 private:
  const Values& values_;
  Partial partial_;
  int64_t rows_, all_, first_head_, stride_ = 0;
  std::vector<float> sums_, highs_;
};
