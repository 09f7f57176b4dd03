#include "harness.h"

namespace {

struct Shape {
  int64_t groups, rows, block_size, dim, value_dim;
  int hi_bits, lo_bits, bits;
  int64_t count;
  int splits;
  bool causal;
};

void run(const Shape& s) {
  const harness::StoredKeys keys(s.groups, s.block_size, s.dim, s.hi_bits, s.lo_bits);
  const harness::StoredValues values(s.groups, s.block_size, s.value_dim, s.bits);
  const std::vector<float> q = harness::numbers(s.groups * s.rows * s.dim);
  const std::vector<int64_t> ids = harness::indices(s.count, harness::kBlocks);
  const std::vector<int64_t> key_positions = harness::indices(s.count * s.block_size, 100),
                             positions = harness::indices(s.rows, 100);
  const int64_t *keys_at = s.causal ? key_positions.data() : nullptr,
                *queries_at = s.causal ? positions.data() : nullptr;
  const float scale = 0.05f;
  harness::Softmax expected(s.groups * s.rows, s.value_dim);
  pikv::scalar_kernels()->attend_blocks(harness::padded_queries(q, s.groups * s.rows, s.dim, scale).data(), s.rows,
                                        keys.keys, values.values, ids.data(), s.count, keys_at, queries_at,
                                        expected.from(0));
  expected.finish();
  std::vector<float> out = harness::unwritten(s.groups * s.rows * s.value_dim),
                     lse = harness::unwritten(s.groups * s.rows);
  std::vector<float> workspace =
      harness::unwritten(pikv::cuda::attend_workspace(s.groups * s.rows, s.value_dim, s.splits));
  harness::launched(pikv::cuda::pikv_cuda_attend_blocks(q.data(), s.rows, scale, &keys.keys, &values.values, ids.data(),
                                                        s.count, keys_at, queries_at, s.splits, workspace.data(),
                                                        out.data(), lse.data(), nullptr));
  harness::near("out", out, expected.out, 1e-5f);
  harness::near("lse", lse, expected.lse, 1e-5f);
}

// Three requests with blocks of their own, one of them with none.
void run_ragged() {
  const int64_t groups = 2, rows = 2, dim = 64;
  const harness::StoredKeys keys(groups, 16, dim, 4, 4);
  const harness::StoredValues values(groups, 16, dim, 8);
  const std::vector<int64_t> first_blocks = {0, 5, 5, 12}, ids = harness::indices(12, harness::kBlocks);
  const int64_t requests = 3, size = groups * rows * dim;
  const int splits = 2;
  const std::vector<float> q = harness::numbers(requests * size);
  const float scale = 0.05f;
  harness::Softmax expected(requests * groups * rows, dim);
  for (int64_t i = 0; i < requests; ++i) {
    const std::vector<float> its(q.begin() + i * size, q.begin() + (i + 1) * size);
    const int64_t first = first_blocks[static_cast<size_t>(i)],
                  count = first_blocks[static_cast<size_t>(i) + 1] - first;
    pikv::scalar_kernels()->attend_blocks(harness::padded_queries(its, groups * rows, dim, scale).data(), rows,
                                          keys.keys, values.values, ids.data() + first, count, nullptr, nullptr,
                                          expected.from(i * groups * rows));
  }
  expected.finish();
  std::vector<float> out = harness::unwritten(requests * size), lse = harness::unwritten(requests * groups * rows);
  std::vector<float> workspace =
      harness::unwritten(pikv::cuda::attend_workspace(requests * groups * rows, dim, splits));
  harness::launched(pikv::cuda::pikv_cuda_attend_ragged(q.data(), requests, rows, scale, &keys.keys, &values.values,
                                                        ids.data(), first_blocks.data(), splits, workspace.data(),
                                                        out.data(), lse.data(), nullptr));
  harness::near("ragged out", out, expected.out, 1e-5f);
  harness::near("ragged lse", lse, expected.lse, 1e-5f);
}

// `tokens` raw tokens of two KV heads that lie `head_rows` rows apart.
void run_at(int64_t tokens, int64_t head_rows) {
  const int64_t groups = 2, rows = 3, dim = 64;
  const int splits = 2;
  const auto heads = [&](const std::vector<float>& x) {  // the same rows without what lies between
    std::vector<float> y(x.begin(), x.begin() + tokens * dim);
    y.insert(y.end(), x.begin() + head_rows * dim, x.begin() + (head_rows + tokens) * dim);
    return y;
  };
  const std::vector<float> k = harness::numbers((head_rows + tokens) * dim),
                           v = harness::numbers((head_rows + tokens) * dim);
  const std::vector<float> close_k = heads(k), close_v = heads(v), q = harness::numbers(groups * rows * dim);
  const std::vector<int64_t> key_positions = harness::indices(tokens, 100), positions = harness::indices(rows, 100),
                             ids = {0};
  pikv::Keys keys = {.raw = close_k.data(),
                     .high = nullptr,
                     .low = nullptr,
                     .scale = nullptr,
                     .zero = nullptr,
                     .dtype = pikv::Dtype::kFloat32,
                     .hi_bits = 0,
                     .lo_bits = 0,
                     .groups = groups,
                     .block_size = tokens,
                     .dim = dim};
  pikv::Values values = {.raw = close_v.data(),
                         .codes = nullptr,
                         .scale = nullptr,
                         .zero = nullptr,
                         .dtype = pikv::Dtype::kFloat32,
                         .bits = 0,
                         .groups = groups,
                         .block_size = tokens,
                         .dim = dim};
  const float scale = 0.05f;
  harness::Softmax expected(groups * rows, dim);
  pikv::scalar_kernels()->attend_blocks(harness::padded_queries(q, groups * rows, dim, scale).data(), rows, keys,
                                        values, ids.data(), 1, key_positions.data(), positions.data(),
                                        expected.from(0));
  expected.finish();
  keys.raw = k.data(), values.raw = v.data();
  std::vector<float> out = harness::unwritten(groups * rows * dim), lse = harness::unwritten(groups * rows);
  std::vector<float> workspace = harness::unwritten(pikv::cuda::attend_workspace(groups * rows, dim, splits));
  harness::launched(pikv::cuda::pikv_cuda_attend_at(q.data(), rows, scale, &keys, &values, head_rows,
                                                    key_positions.data(), positions.data(), splits, workspace.data(),
                                                    out.data(), lse.data(), nullptr));
  harness::near("window out", out, expected.out, 1e-5f);
  harness::near("window lse", lse, expected.lse, 1e-5f);
}

}  // namespace

void harness::cases() {
  run_ragged();
  run_at(45, 50);
  run({.groups = 2,
       .rows = 3,
       .block_size = 16,
       .dim = 64,
       .value_dim = 80,
       .hi_bits = 4,
       .lo_bits = 4,
       .bits = 8,
       .count = 13,
       .splits = 2,
       .causal = false});
  run({.groups = 1,
       .rows = 1,
       .block_size = 32,
       .dim = 96,
       .value_dim = 64,
       .hi_bits = 0,
       .lo_bits = 0,
       .bits = 0,
       .count = 17,
       .splits = 1,
       .causal = false});
  run({.groups = 1,
       .rows = 9,
       .block_size = 64,
       .dim = 80,
       .value_dim = 192,
       .hi_bits = 2,
       .lo_bits = 2,
       .bits = 4,
       .count = 5,
       .splits = 1,
       .causal = true});
  run({.groups = 2,
       .rows = 2,
       .block_size = 16,
       .dim = 64,
       .value_dim = 64,
       .hi_bits = 2,
       .lo_bits = 0,
       .bits = 2,
       .count = 0,
       .splits = 2,
       .causal = false});
}
