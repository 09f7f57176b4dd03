#include <cmath>

#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, int64_t block_size, int64_t dim, int hi_bits, int lo_bits, int64_t count) {
  const harness::StoredKeys keys(groups, block_size, dim, hi_bits, lo_bits);
  const std::vector<float> q = harness::numbers(groups * rows * dim), lse = harness::numbers(groups * rows, 0.0f, 3.0f);
  const std::vector<int64_t> ids = harness::indices(count, harness::kBlocks);
  std::vector<float> importance = harness::unwritten(count * block_size), expected;
  const float scale = 0.05f;
  for (int64_t i = 0; i < count; ++i) {
    std::vector<double> sums(static_cast<size_t>(block_size));
    for (int64_t head = 0; head < groups; ++head) {
      const int64_t matrix = ids[static_cast<size_t>(i)] * groups + head, size = block_size * dim;
      std::vector<float> k(keys.raw.begin() + (hi_bits ? 0 : matrix * size), keys.raw.begin() + (hi_bits ? 0 : (matrix + 1) * size));
      k.resize(static_cast<size_t>(size));
      if (hi_bits)
        pikv::scalar_kernels()->dequantize(keys.high.data() + matrix * size * hi_bits / 8,
                                           lo_bits ? keys.low.data() + matrix * size * lo_bits / 8 : nullptr,
                                           keys.scale.data() + matrix * dim, keys.zero.data() + matrix * dim, block_size, dim, hi_bits,
                                           lo_bits, true, k.data());
      for (int64_t row = head * rows; row < (head + 1) * rows; ++row)
        for (int64_t token = 0; token < block_size; ++token) {
          double logit = 0;
          for (int64_t d = 0; d < dim; ++d)
            logit += static_cast<double>(q[static_cast<size_t>(row * dim + d)]) * scale * k[static_cast<size_t>(token * dim + d)];
          sums[static_cast<size_t>(token)] += std::exp(logit - lse[static_cast<size_t>(row)]);
        }
    }
    for (const double sum : sums) expected.push_back(static_cast<float>(sum));
  }
  harness::launched(pikv::cuda::pikv_cuda_token_importance(q.data(), lse.data(), rows, scale, &keys.keys, ids.data(), count,
                                                           importance.data(), nullptr));
  harness::near("importance", importance, expected, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 6, 16, 64, 4, 4, 5);
  run(1, 3, 64, 80, 0, 0, 3);
}
