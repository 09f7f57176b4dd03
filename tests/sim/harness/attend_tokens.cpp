#include <memory>

#include "harness.h"

namespace {

struct Shape {
  int64_t groups, rows, block_size, dim, value_dim;
  int hi_bits, lo_bits, bits;
  std::vector<int64_t> lengths;
  int splits;
  bool masked;
};

void run(const Shape& s) {
  const harness::StoredKeys keys(s.groups, s.block_size, s.dim, s.hi_bits, s.lo_bits);
  const harness::StoredValues values(s.groups, s.block_size, s.value_dim, s.bits);
  const harness::List tokens(s.lengths);
  const int64_t count = tokens.count(), rows = tokens.requests() * s.groups * s.rows;
  const std::vector<float> q = harness::numbers(rows * s.dim);
  const std::vector<int64_t> ids = harness::indices(s.groups * count, harness::kBlocks);
  const std::vector<int64_t> offsets = harness::indices(s.groups * count, s.block_size),
                             chosen = harness::indices(s.groups * count, 2);
  const auto read = std::make_unique<bool[]>(chosen.size());
  for (size_t i = 0; i < chosen.size(); ++i) read[i] = chosen[i] != 0;
  const float scale = 0.05f;
  harness::Softmax expected(rows, s.value_dim);
  for (int64_t i = 0; i < tokens.requests() * s.groups; ++i) {
    const int64_t request = i / s.groups, head = i % s.groups, at = head * count + tokens.begin(request);
    pikv::scalar_kernels()->attend_tokens(
        harness::padded_queries(q.data() + i * s.rows * s.dim, s.rows, s.dim, scale).data(), s.rows, keys.keys,
        values.values, ids.data() + at, offsets.data() + at, s.masked ? read.get() + at : nullptr,
        tokens.length(request), head, expected.from(i * s.rows));
  }
  expected.finish();
  std::vector<float> out = harness::unwritten(rows * s.value_dim), lse = harness::unwritten(rows);
  std::vector<float> workspace = harness::unwritten(pikv::cuda::attend_workspace(rows, s.value_dim, s.splits));
  harness::launched(pikv::cuda::pikv_cuda_attend_tokens(q.data(), s.rows, scale, &keys.keys, &values.values, ids.data(),
                                                        offsets.data(), s.masked ? read.get() : nullptr, &tokens.runs,
                                                        s.splits, workspace.data(), out.data(), lse.data(), nullptr));
  harness::near("out", out, expected.out, 1e-5f);
  harness::near("lse", lse, expected.lse, 1e-5f);
}

}  // namespace

void harness::cases() {
  run({.groups = 2,
       .rows = 3,
       .block_size = 16,
       .dim = 64,
       .value_dim = 80,
       .hi_bits = 4,
       .lo_bits = 4,
       .bits = 8,
       .lengths = {300},
       .splits = 2,
       .masked = false});
  run({.groups = 1,
       .rows = 1,
       .block_size = 32,
       .dim = 96,
       .value_dim = 64,
       .hi_bits = 0,
       .lo_bits = 0,
       .bits = 0,
       .lengths = {40, 0, 37},
       .splits = 1,
       .masked = true});
}
