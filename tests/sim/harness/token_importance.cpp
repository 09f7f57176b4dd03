#include <cmath>

#include "harness.h"

namespace {

constexpr float kScale = 0.05f;

void run(int64_t groups, int64_t rows, int64_t block_size, int64_t dim, int hi_bits, int lo_bits,
         const std::vector<int64_t>& lengths) {
  const harness::StoredKeys keys(groups, block_size, dim, hi_bits, lo_bits);
  const harness::List blocks(lengths);
  const int64_t all = blocks.requests() * groups * rows;
  const std::vector<float> q = harness::numbers(all * dim), lse = harness::numbers(all, 0.0f, 3.0f);
  const std::vector<int64_t> ids = harness::indices(blocks.count(), harness::kBlocks);
  std::vector<float> importance = harness::unwritten(blocks.count() * block_size), expected;
  for (int64_t request = 0; request < blocks.requests(); ++request)
    for (int64_t block = blocks.begin(request); block < blocks.begin(request + 1); ++block) {
      std::vector<double> sums(static_cast<size_t>(block_size));
      for (int64_t head = 0; head < groups; ++head) {
        const int64_t first_row = (request * groups + head) * rows;
        const auto logits = harness::products(q.data() + first_row * dim, rows,
                                              keys.decoded(ids[static_cast<size_t>(block)] * groups + head), dim,
                                              kScale);
        for (size_t i = 0; i < logits.size(); ++i)
          sums[i % sums.size()] += std::exp(logits[i] - lse[static_cast<size_t>(first_row) + i / sums.size()]);
      }
      expected.insert(expected.end(), sums.begin(), sums.end());
    }
  harness::launched(pikv::cuda::pikv_cuda_token_importance(q.data(), lse.data(), rows, kScale, &keys.keys, ids.data(),
                                                           &blocks.runs, importance.data(), nullptr));
  harness::near("importance", importance, expected, 1e-5f);
}

// Raw float32 keys of `tokens` rows a KV head.
pikv::Keys raw_keys(const std::vector<float>& k, int64_t groups, int64_t tokens, int64_t dim) {
  pikv::Keys keys{};
  keys.raw = k.data(), keys.groups = groups, keys.block_size = tokens, keys.dim = dim;
  return keys;
}

// Adds to sums [tokens] what the rows of q give raw keys k [tokens, dim]; row r sees those up to
// tokens - own + r % own.
void add_shares(const float* q, const float* lse, int64_t rows, const float* k, int64_t tokens, int64_t own,
                int64_t dim, float* sums) {
  const auto logits = harness::products(q, rows, {k, k + tokens * dim}, dim, kScale);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t token = 0; token <= tokens - own + row % own; ++token)
      sums[token] += static_cast<float>(std::exp(logits[static_cast<size_t>(row * tokens + token)] - lse[row]));
}

// `tokens` raw keys whose newest are the queries' own, of two KV heads that lie `head_rows` rows apart; two heads of
// queries each.
void run_prompt(int64_t tokens, int64_t head_rows, int64_t query_tokens, int64_t dim) {
  const int64_t groups = 2, rows = 2 * query_tokens;
  const std::vector<float> raw = harness::numbers((head_rows + tokens) * dim),
                           q = harness::numbers(groups * rows * dim);
  const std::vector<float> lse = harness::numbers(groups * rows, 0.0f, 3.0f);
  const pikv::Keys keys = raw_keys(raw, groups, tokens, dim);
  std::vector<float> importance = harness::unwritten(tokens), expected(static_cast<size_t>(tokens));
  for (int64_t head = 0; head < groups; ++head)
    add_shares(q.data() + head * rows * dim, lse.data() + head * rows, rows, raw.data() + head * head_rows * dim,
               tokens, query_tokens, dim, expected.data());
  harness::launched(pikv::cuda::pikv_cuda_prompt_importance(q.data(), lse.data(), rows, kScale, &keys, head_rows,
                                                            query_tokens, importance.data(), nullptr));
  harness::near("prompt importance", importance, expected, 1e-5f);
}

// Three requests' raw tokens in a buffer of four slots, one of them with none.
void run_windows(int64_t capacity, int64_t dim) {
  const int64_t groups = 2, rows = 5, requests = 3, head_rows = capacity + 4, slot_rows = 2 * head_rows + 3;
  const std::vector<int64_t> slots = {3, 0, 1}, first = {4, 7, 0}, last = {capacity, 7, 33};
  const std::vector<float> raw = harness::numbers(4 * slot_rows * dim),
                           q = harness::numbers(requests * groups * rows * dim);
  const std::vector<float> lse = harness::numbers(requests * groups * rows, 0.0f, 3.0f);
  const pikv::Keys keys = raw_keys(raw, groups, capacity, dim);
  const pikv::cuda::Windows windows{slots.data(), first.data(), last.data(), slot_rows, head_rows};
  std::vector<float> importance = harness::unwritten(requests * capacity), expected(importance.size());
  for (int64_t i = 0; i < requests * groups; ++i) {
    const size_t request = static_cast<size_t>(i / groups);
    const int64_t at = slots[request] * slot_rows + i % groups * head_rows + first[request];
    add_shares(q.data() + i * rows * dim, lse.data() + i * rows, rows, raw.data() + at * dim,
               last[request] - first[request], 1, dim, expected.data() + i / groups * capacity + first[request]);
  }
  harness::launched(pikv::cuda::pikv_cuda_window_importance(q.data(), lse.data(), requests, rows, kScale, &keys,
                                                            &windows, importance.data(), nullptr));
  harness::near("window importance", importance, expected, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 6, 16, 64, 4, 4, {5});
  run(1, 3, 64, 80, 0, 0, {0, 1, 2});
  run(1, 2, 16, 64, 2, 2, {2, 0, 1, 3});
  run_prompt(45, 50, 3, 64);
  run_windows(45, 64);
}
