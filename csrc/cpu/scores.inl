// What the high plane and the bounds say about logits. Included by kernels.inl.

// Relative rounding of a float32 dot product over dim channels, so that bounds on logits hold as computed.
inline float rounding_of(int64_t dim) {
  return 4.0f * static_cast<float>(dim) * std::numeric_limits<float>::epsilon();
}

// Dot products of NR rows of the tile's scaled_q with a block's high plane, read in place or from the tile, plus an offset.
template <int NR>
void coarse_logits(Tile& tile, const Keys& keys, int64_t row, bool in_place, const float* offset, const float* most,
                   float* logits, int64_t width, Ahead* ahead) {
#if PIKV_WIDTH > 1
  if (in_place) return code_logits<NR>(tile, keys, row, true, offset, most, logits, width, ahead);
#else
  (void)in_place, (void)row, (void)most;
#endif
  const int64_t stride = padded(keys.dim);
  dots<NR>(tile.scaled_q.data(), stride, tile.k.data(), width, stride, logits, width, ahead);
  for (int r = 0; r < NR; ++r)
    for (int64_t t = 0; t < keys.block_size; ++t) logits[r * width + t] += offset[r];
}

void score_tokens(const float* q, int64_t rows, const Keys& keys, const int64_t* ids, int64_t count, int64_t head,
                  float* coarse, float* radius, float* spread, int64_t stride) {
  const int64_t tokens = keys.block_size, dim = keys.dim, q_stride = padded(dim), width = padded(tokens);
  Tile& tile = scratch(tokens, dim, 1);
  const int lo_bits = keys.raw ? 0 : keys.lo_bits;
  const float step = static_cast<float>(1 << lo_bits), middle = (step - 1) / 2;
  const float half_width = keys.raw ? 0.5f : middle;  // with raw keys the plane is a rounding of them
  const float variance = keys.raw ? 1.0f / 12 : (step * step - 1) / 12;
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
      ahead.add(reinterpret_cast<const char*>(keys.high) + next, tokens * high_bytes);
    }
    if (!in_place)
      for (int64_t t = 0; t < tokens; ++t)
        unpack_row(keys.high + (row + t) * high_bytes, nullptr, dim, keys.hi_bits, 0, tile.k.data() + t * q_stride);
    const float *scale = tile.k_scale.data(), *zero = tile.k_zero.data();
    for (int64_t first = 0; first < rows; first += 4) {
      const int64_t here = rows - first < 4 ? rows - first : 4;
      float offset[4], most[4];
      for (int64_t r = 0; r < here; ++r) {
        const float* query = q + (first + r) * q_stride;
        float* scaled = tile.scaled_q.data() + r * q_stride;
        Vec at{}, reach{}, square{}, largest_of{};
        for (int64_t d = 0; d < q_stride; d += W) {  // behind dim, query and scales are zero
          const Vec x = load(query + d), s = load(scale + d), z = load(zero + d);
          at += x * (z + s * middle);
          reach += absolute(x) * (s * half_width + larger(absolute(z), absolute(z + s * levels)) * rounding);
          square += (x * s) * (x * s);
          const Vec folded = x * s * step;
          largest_of = larger(absolute(folded), largest_of);
          store(scaled + d, folded);
        }
        offset[r] = sum(at), most[r] = largest(largest_of);
        const float farthest = sum(reach), half_variance = 0.5f * variance * sum(square);
        radius[(first + r) * stride + i] = farthest;
        spread[(first + r) * stride + i] = half_variance < farthest ? half_variance : farthest;  // no error exceeds it
      }
      float* logits = tile.weights.data();
      switch (here) {
        case 1: coarse_logits<1>(tile, keys, row, in_place, offset, most, logits, width, &ahead); break;
        case 2: coarse_logits<2>(tile, keys, row, in_place, offset, most, logits, width, &ahead); break;
        case 3: coarse_logits<3>(tile, keys, row, in_place, offset, most, logits, width, &ahead); break;
        default: coarse_logits<4>(tile, keys, row, in_place, offset, most, logits, width, &ahead);
      }
      for (int64_t r = 0; r < here; ++r) {
        float* out = coarse + ((first + r) * stride + i) * tokens;
        std::memcpy(out, logits + r * width, tokens * sizeof(float));
      }
    }
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
