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

template <int NR>
void logits_of(const float* q, int64_t q_stride, Tile& tile, const Tokens& tokens, float* logits, int64_t width) {
#if PIKV_WIDTH > 1
  if (!tokens.k) {  // the block's scale folds into q, its zero into a constant
    float offset[NR];
    for (int r = 0; r < NR; ++r) {
      Vec total{};
      for (int64_t d = 0; d < q_stride; d += W) {
        const Vec query = load(q + r * q_stride + d);
        total += query * load(tile.k_zero.data() + d);
        store(tile.scaled_q.data() + r * q_stride + d, query * load(tile.k_scale.data() + d));
      }
      offset[r] = sum(total);
    }
    dots_of_codes<NR>(tile.scaled_q.data(), q_stride, tokens.keys, tokens.row, logits, width, false, tokens.ahead);
    for (int r = 0; r < NR; ++r)
      for (int64_t t = 0; t < tokens.count; ++t) logits[r * width + t] += offset[r];
    return;
  }
#endif
  dots<NR>(q, q_stride, tokens.k, width, q_stride, logits, width, tokens.ahead);
}

template <int NR>
void weigh_values(const float* weights, int64_t width, const Tokens& tokens, float* out) {
#if PIKV_WIDTH > 1
  if (!tokens.v) {
    const Values& values = tokens.values;
    const uint8_t* codes = values.codes + tokens.row * (values.dim * values.bits / 8);
    values.bits == 8 ? accumulate_codes<NR, 8>(weights, width, codes, tokens.count, values.dim, out)
                     : accumulate_codes<NR, 4>(weights, width, codes, tokens.count, values.dim, out);
    return;
  }
#endif
  accumulate<NR>(weights, width, tokens.v, tokens.count, tokens.values.dim, out);
}

// Takes tokens into the partial of NR rows. The tile holds the scales of the values, where they are codes.
template <int NR>
void absorb(const float* q, int64_t q_stride, Tile& tile, const Tokens& tokens, const int64_t* query_positions,
            Partial partial) {
  const int64_t width = padded(tokens.count), value_dim = tokens.values.dim;
  float* weights = tile.weights.data();
  logits_of<NR>(q, q_stride, tile, tokens, weights, width);
  for (int r = 0; r < NR; ++r) {
    float* row = weights + r * width;
    for (int64_t t = tokens.count; t < width; ++t) row[t] = kMinusInf;
    if (tokens.positions)
      for (int64_t t = 0; t < tokens.count; ++t)
        if (tokens.positions[t] > query_positions[r]) row[t] = kMinusInf;
    Vec most = load(row);
    for (int64_t t = W; t < width; t += W) {
      const Vec x = load(row + t);
      most = x > most ? x : most;
    }
    float lanes[W], high = partial.high[r];
    store(lanes, most);
    for (float lane : lanes) high = lane > high ? lane : high;
    if (high == kMinusInf) {  // nothing seen yet, nothing to see here
      std::memset(row, 0, width * sizeof(float));
      continue;
    }
    const float fade = partial.high[r] == high ? 1.0f : std::exp(partial.high[r] - high);
    Vec total{};
    for (int64_t t = 0; t < width; t += W) {
      const Vec weight = exp_negative(load(row + t) - splat(high));
      total += weight;
      store(row + t, weight);
    }
    partial.high[r] = high;
    partial.total[r] = partial.total[r] * fade + sum(total);
    float* out = partial.out + r * value_dim;
    float zero = 0.0f;
    if (!tokens.values.raw) {
      Vec zeros{};
      for (int64_t t = 0; t < width; t += W) {
        const Vec weight = load(row + t);
        zeros += weight * load(tile.v_zero.data() + t);
        store(row + t, weight * load(tile.v_scale.data() + t));
      }
      zero = sum(zeros);
    }
    if (fade != 1.0f || zero != 0.0f)
      for (int64_t e = 0; e < value_dim; ++e) out[e] = out[e] * fade + zero;
  }
  weigh_values<NR>(weights, width, tokens, partial.out);
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
  ahead.spread_over(tokens);
}

void attend_blocks(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* ids,
                   int64_t count, const int64_t* key_positions, const int64_t* query_positions, Partial partial) {
  const int64_t tokens = keys.block_size, dim = keys.dim, value_dim = values.dim, groups = keys.groups;
  Tile& tile = scratch(tokens, dim, value_dim);
  Ahead ahead;
  // Rows that are whole vectors of float32 already are read where they lie, and so are codes where the kernels can.
  const bool raw_keys_in_place = keys.raw && keys.dtype == Dtype::kFloat32 && padded(dim) == dim && padded(tokens) == tokens;
  const bool raw_values_in_place = values.raw && values.dtype == Dtype::kFloat32 && padded(value_dim) == value_dim;
  const bool key_codes_in_place = !keys.raw && codes_in_place(keys), value_codes_in_place = codes_in_place(values);
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
