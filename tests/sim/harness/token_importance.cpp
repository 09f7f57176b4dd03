#include <cmath>

#include "harness.h"

namespace {

constexpr float kScale = 0.05f;

void run(int64_t groups, int64_t rows, int64_t block_size, int64_t dim, int hi_bits, int lo_bits, int64_t count) {
  const harness::StoredKeys keys(groups, block_size, dim, hi_bits, lo_bits);
  const std::vector<float> q = harness::numbers(groups * rows * dim), lse = harness::numbers(groups * rows, 0.0f, 3.0f);
  const std::vector<int64_t> ids = harness::indices(count, harness::kBlocks);
  std::vector<float> importance = harness::unwritten(count * block_size), expected;
  for (const int64_t id : ids) {
    std::vector<double> sums(static_cast<size_t>(block_size));
    for (int64_t head = 0; head < groups; ++head) {
      const auto logits =
          harness::products(q.data() + head * rows * dim, rows, keys.decoded(id * groups + head), dim, kScale);
      for (size_t i = 0; i < logits.size(); ++i)
        sums[i % sums.size()] += std::exp(logits[i] - lse[static_cast<size_t>(head * rows) + i / sums.size()]);
    }
    expected.insert(expected.end(), sums.begin(), sums.end());
  }
  harness::launched(pikv::cuda::pikv_cuda_token_importance(q.data(), lse.data(), rows, kScale, &keys.keys, ids.data(),
                                                           count, importance.data(), nullptr));
  harness::near("importance", importance, expected, 1e-5f);
}

// `tokens` raw keys whose newest are the queries' own, of two KV heads that lie `head_rows` rows apart; two heads of
// queries each.
void run_window(int64_t tokens, int64_t head_rows, int64_t query_tokens, int64_t dim) {
  const int64_t groups = 2, rows = 2 * query_tokens;
  const std::vector<float> raw = harness::numbers((head_rows + tokens) * dim),
                           q = harness::numbers(groups * rows * dim);
  const std::vector<float> lse = harness::numbers(groups * rows, 0.0f, 3.0f);
  const pikv::Keys keys = {.raw = raw.data(),
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
  std::vector<float> importance = harness::unwritten(tokens), expected(static_cast<size_t>(tokens));
  for (int64_t head = 0; head < groups; ++head) {
    const auto first = raw.begin() + head * head_rows * dim;
    const auto logits =
        harness::products(q.data() + head * rows * dim, rows, {first, first + tokens * dim}, dim, kScale);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t token = 0; token <= tokens - query_tokens + row % query_tokens; ++token)
        expected[static_cast<size_t>(token)] += static_cast<float>(
            std::exp(logits[static_cast<size_t>(row * tokens + token)] - lse[static_cast<size_t>(head * rows + row)]));
  }
  harness::launched(pikv::cuda::pikv_cuda_window_importance(q.data(), lse.data(), rows, kScale, &keys, head_rows,
                                                            query_tokens, importance.data(), nullptr));
  harness::near("window importance", importance, expected, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 6, 16, 64, 4, 4, 5);
  run(1, 3, 64, 80, 0, 0, 3);
  run_window(45, 50, 3, 64);
}
