#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, int64_t dim, int hi_bits, int lo_bits, int64_t count) {
  const harness::StoredKeys keys(groups, 16, dim, hi_bits, lo_bits);
  const std::vector<float> q = harness::numbers(groups * rows * dim);
  const std::vector<int64_t> ids = harness::indices(count, harness::kBlocks);
  const int64_t size = groups * rows * count;
  std::vector<float> bound = harness::unwritten(size), centre = bound, spread = bound;
  std::vector<float> true_bound = bound, true_centre = bound, true_spread = bound;
  const float scale = 0.05f;
  for (int64_t head = 0; head < groups; ++head) {
    const std::vector<float> its(q.begin() + head * rows * dim, q.begin() + (head + 1) * rows * dim);
    const int64_t at = head * rows * count;
    pikv::scalar_kernels()->score_blocks(harness::padded_queries(its, rows, dim, scale).data(), rows, keys.keys,
                                         ids.data(), count, head, true_bound.data() + at, true_centre.data() + at,
                                         true_spread.data() + at, count);
  }
  harness::launched(pikv::cuda::pikv_cuda_score_blocks(q.data(), rows, scale, &keys.keys, ids.data(), count,
                                                       bound.data(), centre.data(), spread.data(), nullptr));
  harness::near("bound", bound, true_bound, 1e-5f);
  harness::near("centre", centre, true_centre, 1e-5f);
  harness::near("spread", spread, true_spread, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 3, 64, 4, 4, 19);
  run(1, 8, 80, 2, 0, 5);
}
