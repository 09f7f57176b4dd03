#include <cmath>

#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, int64_t count) {
  const std::vector<float> coarse = harness::numbers(groups * rows * count), raw_lse = harness::numbers(groups * rows);
  std::vector<float> workspace = harness::unwritten(groups * rows), rank = harness::unwritten(groups * count), expected;
  expected.resize(rank.size());
  for (int64_t row = 0; row < groups * rows; ++row) {
    const float* logits = coarse.data() + row * count;
    double total = std::exp(static_cast<double>(raw_lse[static_cast<size_t>(row)]));
    for (int64_t i = 0; i < count; ++i) total += std::exp(static_cast<double>(logits[i]));
    for (int64_t i = 0; i < count; ++i)
      expected[static_cast<size_t>(row / rows * count + i)] +=
          static_cast<float>(std::exp(static_cast<double>(logits[i])) / total);
  }
  harness::launched(pikv::cuda::pikv_cuda_rank_tokens(coarse.data(), raw_lse.data(), groups, rows, count,
                                                      workspace.data(), rank.data(), nullptr));
  harness::near("rank", rank, expected, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 3, 300);
  run(1, 1, 7);
}
