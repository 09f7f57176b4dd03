#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, int64_t block_size, int64_t dim, int hi_bits, int lo_bits,
         const std::vector<int64_t>& lengths, bool per_head) {
  const harness::StoredKeys keys(groups, block_size, dim, hi_bits, lo_bits);
  const harness::List blocks(lengths);
  const int64_t count = blocks.count();
  const std::vector<float> q = harness::numbers(blocks.requests() * groups * rows * dim);
  const std::vector<int64_t> ids = harness::indices((per_head ? groups : 1) * count, harness::kBlocks);
  const int64_t size = groups * rows * count;
  std::vector<float> coarse = harness::unwritten(size * block_size), radius = harness::unwritten(size), spread = radius;
  std::vector<float> true_coarse = coarse, true_radius = radius, true_spread = spread;
  const float scale = 0.05f;
  for (int64_t i = 0; i < blocks.requests() * groups; ++i) {
    const int64_t request = i / groups, head = i % groups, first = blocks.begin(request);
    const int64_t at = head * rows * count + first;
    pikv::scalar_kernels()->score_tokens(harness::padded_queries(q.data() + i * rows * dim, rows, dim, scale).data(),
                                         rows, keys.keys, ids.data() + (per_head ? head * count : 0) + first,
                                         blocks.length(request), head, true_coarse.data() + at * block_size,
                                         true_radius.data() + at, true_spread.data() + at, count);
  }
  harness::launched(pikv::cuda::pikv_cuda_score_tokens(q.data(), rows, scale, &keys.keys, ids.data(), per_head,
                                                       &blocks.runs, coarse.data(), radius.data(), spread.data(),
                                                       nullptr));
  harness::near("coarse", coarse, true_coarse, 1e-5f);
  harness::near("radius", radius, true_radius, 1e-5f);
  harness::near("spread", spread, true_spread, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 3, 16, 64, 4, 4, {11}, false);
  run(2, 1, 32, 80, 2, 2, {0, 3, 0, 1, 13, 0}, true);
  run(1, 7, 64, 64, 0, 0, {2, 1}, false);
}
