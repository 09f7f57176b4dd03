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
  const std::vector<int64_t> key_positions = harness::indices(s.count * s.block_size, 100), positions = harness::indices(s.rows, 100);
  const int64_t *keys_at = s.causal ? key_positions.data() : nullptr, *queries_at = s.causal ? positions.data() : nullptr;
  const float scale = 0.05f;
  harness::Softmax expected(s.groups * s.rows, s.value_dim);
  pikv::scalar_kernels()->attend_blocks(harness::padded_queries(q, s.groups * s.rows, s.dim, scale).data(), s.rows, keys.keys,
                                        values.values, ids.data(), s.count, keys_at, queries_at, expected.from(0));
  expected.finish();
  std::vector<float> out = harness::unwritten(s.groups * s.rows * s.value_dim), lse = harness::unwritten(s.groups * s.rows);
  std::vector<float> workspace = harness::unwritten(pikv::cuda::attend_workspace(s.groups * s.rows, s.value_dim, s.splits));
  harness::launched(pikv::cuda::pikv_cuda_attend_blocks(q.data(), s.rows, scale, &keys.keys, &values.values, ids.data(), s.count,
                                                        keys_at, queries_at, s.splits, workspace.data(), out.data(), lse.data(),
                                                        nullptr));
  harness::near("out", out, expected.out, 1e-5f);
  harness::near("lse", lse, expected.lse, 1e-5f);
}

}  // namespace

void harness::cases() {
  run({.groups = 2, .rows = 3, .block_size = 16, .dim = 64, .value_dim = 80, .hi_bits = 4, .lo_bits = 4, .bits = 8, .count = 13,
       .splits = 2, .causal = false});
  run({.groups = 1, .rows = 1, .block_size = 32, .dim = 96, .value_dim = 64, .hi_bits = 0, .lo_bits = 0, .bits = 0, .count = 17,
       .splits = 1, .causal = false});
  run({.groups = 1, .rows = 9, .block_size = 64, .dim = 80, .value_dim = 192, .hi_bits = 2, .lo_bits = 2, .bits = 4, .count = 5,
       .splits = 1, .causal = true});
  run({.groups = 2, .rows = 2, .block_size = 16, .dim = 64, .value_dim = 64, .hi_bits = 2, .lo_bits = 0, .bits = 2, .count = 0,
       .splits = 2, .causal = false});
}
