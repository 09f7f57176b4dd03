#include <cmath>

#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, const std::vector<int64_t>& lengths) {
  const harness::List tokens(lengths);
  const int64_t count = tokens.count(), all = tokens.requests() * groups * rows;
  const std::vector<float> coarse = harness::numbers(groups * rows * count), raw_lse = harness::numbers(all);
  std::vector<float> workspace = harness::unwritten(all), rank = harness::unwritten(groups * count), expected;
  expected.resize(rank.size());
  for (int64_t i = 0; i < all; ++i) {
    const int64_t request = i / (groups * rows), row = i % (groups * rows);
    const int64_t begin = tokens.begin(request), end = tokens.begin(request + 1);
    const float* logits = coarse.data() + row * count;
    double total = std::exp(static_cast<double>(raw_lse[static_cast<size_t>(i)]));
    for (int64_t t = begin; t < end; ++t) total += std::exp(static_cast<double>(logits[t]));
    for (int64_t t = begin; t < end; ++t)
      expected[static_cast<size_t>(row / rows * count + t)] +=
          static_cast<float>(std::exp(static_cast<double>(logits[t])) / total);
  }
  harness::launched(pikv::cuda::pikv_cuda_rank_tokens(coarse.data(), raw_lse.data(), groups, rows, &tokens.runs,
                                                      workspace.data(), rank.data(), nullptr));
  harness::near("rank", rank, expected, 1e-5f);
}

// The same kernel over logits of blocks whose log-sums-exp are known.
void run_importance(int64_t rows, int64_t block_size, const std::vector<int64_t>& lengths) {
  const harness::List blocks(lengths);
  const int64_t count = blocks.count() * block_size;
  const std::vector<float> logits = harness::numbers(rows * count), lse = harness::numbers(blocks.requests() * rows);
  std::vector<float> importance = harness::unwritten(count), expected(importance.size());
  for (int64_t i = 0; i < blocks.requests() * rows; ++i)
    for (int64_t t = blocks.begin(i / rows) * block_size; t < blocks.begin(i / rows + 1) * block_size; ++t)
      expected[static_cast<size_t>(t)] +=
          std::exp(logits[static_cast<size_t>(i % rows * count + t)] - lse[static_cast<size_t>(i)]);
  harness::launched(pikv::cuda::pikv_cuda_logits_importance(logits.data(), lse.data(), rows, &blocks.runs, block_size,
                                                            importance.data(), nullptr));
  harness::near("importance", importance, expected, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 3, {300});
  run(2, 2, {7, 0, 140});
  run_importance(3, 16, {0, 5, 9});
}
