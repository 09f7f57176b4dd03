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
  const harness::List blocks({5, 0, 7});
  const std::vector<int64_t> ids = harness::indices(blocks.count(), harness::kBlocks);
  const int64_t all = blocks.requests() * groups * rows;
  const int splits = 2;
  const std::vector<float> q = harness::numbers(all * dim);
  const float scale = 0.05f;
  harness::Softmax expected(all, dim);
  for (int64_t i = 0; i < blocks.requests(); ++i)
    pikv::scalar_kernels()->attend_blocks(
        harness::padded_queries(q.data() + i * groups * rows * dim, groups * rows, dim, scale).data(), rows, keys.keys,
        values.values, ids.data() + blocks.begin(i), blocks.length(i), nullptr, nullptr,
        expected.from(i * groups * rows));
  expected.finish();
  std::vector<float> out = harness::unwritten(all * dim), lse = harness::unwritten(all);
  std::vector<float> workspace = harness::unwritten(pikv::cuda::attend_workspace(all, dim, splits));
  harness::launched(pikv::cuda::pikv_cuda_attend_ragged(q.data(), rows, scale, &keys.keys, &values.values, ids.data(),
                                                        &blocks.runs, splits, workspace.data(), out.data(), lse.data(),
                                                        nullptr));
  harness::near("ragged out", out, expected.out, 1e-5f);
  harness::near("ragged lse", lse, expected.lse, 1e-5f);
}

pikv::Keys raw_keys(const std::vector<float>& k, int64_t groups, int64_t tokens, int64_t dim) {
  return {.raw = k.data(),
          .high = nullptr,
          .low = nullptr,
          .scale = nullptr,
          .zero = nullptr,
          .dtype = pikv::Dtype::kFloat32,
          .hi_bits = 0,
          .lo_bits = 0,
          .groups = groups,
          .block_size = tokens,
          .dim = dim,
          .low_rank = nullptr};
}
pikv::Values raw_values(const std::vector<float>& v, int64_t groups, int64_t tokens, int64_t dim) {
  return {.raw = v.data(),
          .codes = nullptr,
          .scale = nullptr,
          .zero = nullptr,
          .dtype = pikv::Dtype::kFloat32,
          .bits = 0,
          .groups = groups,
          .block_size = tokens,
          .dim = dim,
          .low_rank = nullptr};
}

// Three requests' raw tokens in a buffer of four slots, one of them with none.
void run_windows() {
  const int64_t groups = 2, rows = 3, dim = 64, capacity = 45, head_rows = 50, slot_rows = 2 * head_rows + 3;
  const std::vector<int64_t> slots = {3, 0, 1}, first = {4, 7, 0}, last = {45, 7, 33};
  const std::vector<float> k = harness::numbers(4 * slot_rows * dim), v = harness::numbers(4 * slot_rows * dim);
  const int64_t requests = 3, all = requests * groups * rows;
  const int splits = 2;
  const std::vector<float> q = harness::numbers(all * dim);
  const float scale = 0.05f;
  harness::Softmax expected(all, dim);
  for (int64_t i = 0; i < requests * groups; ++i) {
    const size_t request = static_cast<size_t>(i / groups);
    const int64_t at = (slots[request] * slot_rows + i % groups * head_rows + first[request]) * dim;
    const int64_t tokens = last[request] - first[request];
    const std::vector<float> its_k(k.begin() + at, k.begin() + at + tokens * dim),
        its_v(v.begin() + at, v.begin() + at + tokens * dim);
    pikv::scalar_kernels()->attend_raw(harness::padded_queries(q.data() + i * rows * dim, rows, dim, scale).data(),
                                       rows, raw_keys(its_k, 1, tokens, dim), raw_values(its_v, 1, tokens, dim),
                                       nullptr, nullptr, expected.from(i * rows));
  }
  expected.finish();
  const pikv::Keys keys = raw_keys(k, groups, capacity, dim);
  const pikv::Values values = raw_values(v, groups, capacity, dim);
  const pikv::cuda::Windows windows{slots.data(), first.data(), last.data(), slot_rows, head_rows};
  std::vector<float> out = harness::unwritten(all * dim), lse = harness::unwritten(all);
  std::vector<float> workspace = harness::unwritten(pikv::cuda::attend_workspace(all, dim, splits));
  harness::launched(pikv::cuda::pikv_cuda_attend_windows(q.data(), requests, rows, scale, &keys, &values, &windows,
                                                         splits, workspace.data(), out.data(), lse.data(), nullptr));
  harness::near("windows out", out, expected.out, 1e-5f);
  harness::near("windows lse", lse, expected.lse, 1e-5f);
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
  pikv::Keys keys = raw_keys(close_k, groups, tokens, dim);
  pikv::Values values = raw_values(close_v, groups, tokens, dim);
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
  run_windows();
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
