// Attention over stored blocks and tokens with a running softmax. Scales of values are folded into the weights, so their
// tile holds bare codes. Included by kernels.inl.

// Where the tokens to take in are: tiles of floats, or, where they are null, the pool's codes from `row` on.
struct Tokens {
  const float* k;
  const float* v;
  const Keys& keys;
  const Values& values;
  int64_t row, count;
  const int64_t* positions;  // [count] or null
  Ahead* ahead;              // or null
};

// The block's scale folds into q, its zero into a constant: tile.scaled_q [NR, padded(D)], offset [NR], and scaled_q's
// largest magnitudes, most [NR].
template <int NR>
void fold_scales(const float* q, int64_t q_stride, Tile& tile, float* offset, float* most) {
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
  for (int r = 0; r < NR; ++r) offset[r] = sum(zeros[r]), most[r] = largest(largest_of[r]);
}

template <int NR>
void logits_of(const float* q, int64_t q_stride, Tile& tile, const Tokens& tokens, float* logits, int64_t width) {
  if (tokens.k) return dots<NR>(q, q_stride, tokens.k, width, q_stride, logits, width, tokens.ahead);
#if PIKV_WIDTH > 1
  float offset[NR], most[NR];
  fold_scales<NR>(q, q_stride, tile, offset, most);
  code_logits<NR>(tile, tokens.keys, tokens.row, false, offset, most, logits, width, tokens.ahead);
#endif
}

// out [NR, E] = out * fade + zero + weights [NR, width], at most `most` [NR], times the values.
template <int NR>
void weigh_values(Tile& tile, const Tokens& tokens, int64_t width, const float* most, const float* fade, const float* zero,
                  float* out) {
  const Values& values = tokens.values;
  const float* weights = tile.weights.data();
  (void)most;
#if PIKV_WIDTH == 16
  if (!tokens.v && integer_codes(values)) {
    IntegerRows rows{tile.weight_bytes.data(), {}};
    rows.cut<NR>(weights, width, width, most);
    const uint8_t* codes = values.codes + tokens.row * (values.dim * values.bits / 8);
    values.bits == 8 ? integer_accumulate<NR, 8>(rows, codes, tokens.count, values.dim, fade, zero, out, tokens.ahead)
                     : integer_accumulate<NR, 4>(rows, codes, tokens.count, values.dim, fade, zero, out, tokens.ahead);
    return;
  }
#endif
  for (int r = 0; r < NR; ++r)
    if (fade[r] != 1.0f || zero[r] != 0.0f)
      for (int64_t e = r * values.dim; e < (r + 1) * values.dim; ++e) out[e] = out[e] * fade[r] + zero[r];
  if (tokens.v) return accumulate<NR>(weights, width, tokens.v, tokens.count, values.dim, out, tokens.ahead);
#if PIKV_WIDTH > 1
  const uint8_t* codes = values.codes + tokens.row * (values.dim * values.bits / 8);
  values.bits == 8 ? accumulate_codes<NR, 8>(weights, width, codes, tokens.count, values.dim, out, tokens.ahead)
                   : accumulate_codes<NR, 4>(weights, width, codes, tokens.count, values.dim, out, tokens.ahead);
#endif
}

// Takes tokens into the partial of NR rows. The tile holds the scales of the values, where they are codes.
template <int NR>
void absorb(const float* q, int64_t q_stride, Tile& tile, const Tokens& tokens, const int64_t* query_positions,
            Partial partial) {
  const int64_t width = padded(tokens.count);
  float* weights = tile.weights.data();
  float fade[NR], zero[NR], most[NR];
  logits_of<NR>(q, q_stride, tile, tokens, weights, width);
  for (int r = 0; r < NR; ++r) {
    float* row = weights + r * width;
    fade[r] = 1.0f, zero[r] = most[r] = 0.0f;
    for (int64_t t = tokens.count; t < width; ++t) row[t] = kMinusInf;
    if (tokens.positions)
      for (int64_t t = 0; t < tokens.count; ++t)
        if (tokens.positions[t] > query_positions[r]) row[t] = kMinusInf;
    Vec highest = load(row);
    for (int64_t t = W; t < width; t += W) highest = larger(load(row + t), highest);
    const float high = std::max(partial.high[r], largest(highest));
    if (high == kMinusInf) {  // nothing seen yet, nothing to see here
      std::memset(row, 0, width * sizeof(float));
      continue;
    }
    if (partial.high[r] != high) fade[r] = std::exp(partial.high[r] - high);
    Vec total{}, zeros{}, heaviest{};
    for (int64_t t = 0; t < width; t += W) {
      Vec weight = exp_negative(load(row + t) - splat(high));
      total += weight;
      if (!tokens.values.raw) {
        zeros += weight * load(tile.v_zero.data() + t);
        weight *= load(tile.v_scale.data() + t);
        heaviest = larger(weight, heaviest);
      }
      store(row + t, weight);
    }
    partial.high[r] = high;
    partial.total[r] = partial.total[r] * fade[r] + sum(total);
    zero[r] = sum(zeros), most[r] = largest(heaviest);
  }
  weigh_values<NR>(tile, tokens, width, most, fade, zero, partial.out);
}

void absorb_rows(const float* q, int64_t rows, Tile& tile, const Tokens& tokens, const int64_t* query_positions,
                 Partial partial) {
  const int64_t q_stride = padded(tokens.keys.dim), value_dim = tokens.values.dim;
  for (int64_t r = 0; r < rows; r += 4) {
    const Partial here{partial.out + r * value_dim, partial.high + r, partial.total + r};
    const float* at = q + r * q_stride;
    const int64_t* positions = query_positions ? query_positions + r : nullptr;
    switch (rows - r) {
      case 1: absorb<1>(at, q_stride, tile, tokens, positions, here); break;
      case 2: absorb<2>(at, q_stride, tile, tokens, positions, here); break;
      case 3: absorb<3>(at, q_stride, tile, tokens, positions, here); break;
      default: absorb<4>(at, q_stride, tile, tokens, positions, here);
    }
  }
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
  }
  plane(values.raw, values.dim * (values.dtype == Dtype::kFloat32 ? 4 : 2));
  plane(values.codes, values.dim * values.bits / 8);
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

void attend_blocks(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* ids,
                   int64_t count, const int64_t* key_positions, const int64_t* query_positions, Partial partial) {
  const int64_t tokens = keys.block_size, dim = keys.dim, value_dim = values.dim, groups = keys.groups;
  Tile& tile = scratch(tokens, dim, value_dim);
  Ahead ahead;
  // Rows that are whole vectors of float32 already are read where they lie, and so are codes where the kernels can.
  const bool raw_keys_in_place = keys.raw && keys.dtype == Dtype::kFloat32 && padded(dim) == dim && padded(tokens) == tokens;
  const bool raw_values_in_place = values.raw && values.dtype == Dtype::kFloat32 && padded(value_dim) == value_dim;
  const bool key_codes_in_place = !keys.raw && codes_in_place(keys), value_codes_in_place = codes_in_place(values);
  const OutOrder order(values, partial.out, groups * rows);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t head = 0; head < groups; ++head) {
      const bool last_head = head + 1 == groups;
      if (!last_head || i + 1 < count) fetch_ahead(keys, values, ids[i + last_head], last_head ? 0 : head + 1, ahead);
      const int64_t row = (ids[i] * groups + head) * tokens;
      if (!keys.raw) key_scales(keys, ids[i], head, tile);
      const float *k = tile.k.data(), *v = tile.v.data();
      if (raw_keys_in_place) {
        k = static_cast<const float*>(keys.raw) + row * dim;
      } else if (key_codes_in_place) {
        k = nullptr;
      } else {
        for (int64_t t = 0; t < tokens; ++t)
          key_row(keys, row + t, tile.k_scale.data(), tile.k_zero.data(), tile.k.data() + t * padded(dim));
      }
      if (raw_values_in_place) {
        v = static_cast<const float*>(values.raw) + row * value_dim;
      } else if (value_codes_in_place) {
        v = nullptr;
        to_float(values.scale, Dtype::kFloat16, row, tokens, tile.v_scale.data());
        to_float(values.zero, Dtype::kFloat16, row, tokens, tile.v_zero.data());
      } else {
        for (int64_t t = 0; t < tokens; ++t)
          value_row(values, row + t, tile.v.data() + t * padded(value_dim), tile.v_scale[t], tile.v_zero[t]);
      }
      const Partial here{partial.out + head * rows * value_dim, partial.high + head * rows, partial.total + head * rows};
      const Tokens block{k, v, keys, values, row, tokens, key_positions ? key_positions + i * tokens : nullptr, &ahead};
      absorb_rows(q + head * rows * padded(dim), rows, tile, block, query_positions, here);
    }
  }
}

void attend_tokens(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* ids,
                   const int64_t* offsets, const bool* read, int64_t count, int64_t head, Partial partial) {
  constexpr int64_t kTokens = 64;
  const int64_t dim = keys.dim, value_dim = values.dim;
  Tile& tile = scratch(kTokens, dim, value_dim);
  int64_t held = 0;
  auto flush = [&] {
    for (int64_t t = held; t < padded(held); ++t) {  // whatever an earlier round left there
      std::memset(tile.k.data() + t * padded(dim), 0, padded(dim) * sizeof(float));
      tile.v_scale[t] = tile.v_zero[t] = 0.0f;
    }
    absorb_rows(q, rows, tile, {tile.k.data(), tile.v.data(), keys, values, 0, held, nullptr, nullptr}, nullptr, partial);
    held = 0;
  };
  for (int64_t i = 0; i < count; ++i) {
    if (read && !read[i]) continue;
    const int64_t row = (ids[i] * keys.groups + head) * keys.block_size + offsets[i];
    if (!keys.raw) key_scales(keys, ids[i], head, tile);
    key_row(keys, row, tile.k_scale.data(), tile.k_zero.data(), tile.k.data() + held * padded(dim));
    value_row(values, row, tile.v.data() + held * padded(value_dim), tile.v_scale[held], tile.v_zero[held]);
    if (++held == kTokens) flush();
  }
  if (held) flush();
}
