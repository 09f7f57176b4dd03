#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, int64_t dim, int hi_bits, int lo_bits, const std::vector<int64_t>& lengths) {
  const harness::StoredKeys keys(groups, 16, dim, hi_bits, lo_bits);
  const harness::List blocks(lengths);
  const int64_t count = blocks.count(), size = groups * rows * count;
  const std::vector<float> q = harness::numbers(blocks.requests() * groups * rows * dim);
  const std::vector<int64_t> ids = harness::indices(count, harness::kBlocks);
  std::vector<float> bound = harness::unwritten(size), centre = bound, spread = bound;
  std::vector<float> true_bound = bound, true_centre = bound, true_spread = bound;
  const float scale = 0.05f;
  for (int64_t i = 0; i < blocks.requests() * groups; ++i) {
    const int64_t request = i / groups, head = i % groups, at = head * rows * count + blocks.begin(request);
    pikv::scalar_kernels()->score_blocks(harness::padded_queries(q.data() + i * rows * dim, rows, dim, scale).data(),
                                         rows, keys.keys, ids.data() + blocks.begin(request), blocks.length(request),
                                         head, true_bound.data() + at, true_centre.data() + at, true_spread.data() + at,
                                         count);
  }
  harness::launched(pikv::cuda::pikv_cuda_score_blocks(q.data(), rows, scale, &keys.keys, ids.data(), &blocks.runs,
                                                       bound.data(), centre.data(), spread.data(), nullptr));
  harness::near("bound", bound, true_bound, 1e-5f);
  harness::near("centre", centre, true_centre, 1e-5f);
  harness::near("spread", spread, true_spread, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 3, 64, 4, 4, {19});
  run(1, 8, 80, 2, 0, {0, 3, 100, 0, 40});
}
