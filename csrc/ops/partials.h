// Attention in pieces: the partials of the pieces, and their merging. A piece has all rows of its request.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "ops/shared.h"

namespace pikv {

// Partials of one piece of the work, for `rows` rows in all.
struct PartialMemory {
  std::vector<float> out, high, total;
  PartialMemory(int64_t rows, int64_t dim)
      : out(rows * dim, 0.0f), high(rows, -std::numeric_limits<float>::infinity()), total(rows, 0.0f) {}
  Partial at(int64_t row, int64_t dim) { return {out.data() + row * dim, high.data() + row, total.data() + row}; }
};

inline std::vector<PartialMemory> partial_memory(int64_t pieces, int64_t rows, int64_t dim) {
  return std::vector<PartialMemory>(pieces, PartialMemory(rows, dim));
}

// Merges what requests [0, begin.size() - 1) have, request i the pieces from begin[i] up to begin[i + 1], of `rows`
// rows each: out [requests, rows, dim], lse [requests, rows].
inline void merge(const std::vector<PartialMemory>& pieces, const std::vector<int64_t>& begin, int64_t rows,
                  int64_t dim, float* out, float* lse) {
  const int64_t requests = static_cast<int64_t>(begin.size()) - 1;
  torch::stable::parallel_for(0, requests * rows, 16, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t r = i % rows, first = begin[i / rows], last = begin[i / rows + 1];
      float high = -std::numeric_limits<float>::infinity(), total = 0.0f;
      for (int64_t p = first; p < last; ++p) high = std::max(high, pieces[p].high[r]);
      float* row = out + i * dim;
      std::fill(row, row + dim, 0.0f);
      if (std::isinf(high)) {
        lse[i] = high;
        continue;
      }
      for (int64_t p = first; p < last; ++p) {
        const float share = std::exp(pieces[p].high[r] - high), *its = pieces[p].out.data() + r * dim;
        total += share * pieces[p].total[r];
        for (int64_t e = 0; e < dim; ++e) row[e] += share * its[e];
      }
      for (int64_t e = 0; e < dim; ++e) row[e] /= total;
      lse[i] = high + std::log(total);
    }
  });
}

// Where attention goes: out [requests, G, R, E], lse [requests, G, R], or of one request without the first dimension.
struct Output {
  int64_t value_dim;
  float *out, *lse;

  Output(const Queries& q, bool one_request, Tensor& to, Tensor& to_lse) {
    STD_TORCH_CHECK(to.dim() == (one_request ? 3 : 4), "out: expected ", one_request ? 3 : 4, " dimensions, got ",
                    to.dim());
    value_dim = to.size(to.dim() - 1);
    std::vector<int64_t> shape = {q.requests, q.groups, q.rows};
    if (one_request) shape.erase(shape.begin());
    check("lse", to_lse, ScalarType::Float, shape);
    shape.push_back(value_dim);
    check("out", to, ScalarType::Float, shape);
    out = mutable_data<float>(to), lse = mutable_data<float>(to_lse);
  }
  float* out_of(int64_t request, const Queries& q) const { return out + request * q.rows_each() * value_dim; }
  float* lse_of(int64_t request, const Queries& q) const { return lse + request * q.rows_each(); }
};

// Raw tokens of several requests, keys and values.
struct RawWindow {
  RawRows k, v;
  RawRuns runs;

  RawWindow(const Tensor& raw_k, const Tensor& raw_v, const Tensor& slots, const Tensor& raw_first,
            const Tensor& raw_last, const Queries& q, int64_t value_dim)
      : k("raw_k", raw_k, false, q.groups, q.dim), v("raw_v", raw_v, false, q.groups, value_dim),
        runs(slots, raw_first, raw_last, q.requests, k) {
    STD_TORCH_CHECK(v.slots == k.slots && v.tokens == k.tokens, "raw_v: expected the ", k.slots, " slots of ", k.tokens,
                    " tokens of raw_k, got ", v.slots, " of ", v.tokens);
  }

  // Takes a request's raw tokens into the partials of a KV head's rows.
  void attend(const Queries& q, int64_t request, int64_t head, Partial partial) const {
    const int64_t slot = runs.slots[request], first = runs.first[request], count = runs.count(request);
    kernels().attend_raw(q.of(request, head), q.rows, raw_keys(k.of(slot, head, first), k.dtype, count, k.dim),
                         raw_values(v.of(slot, head, first), v.dtype, count, v.dim), nullptr, nullptr, partial);
  }
};

}  // namespace pikv
