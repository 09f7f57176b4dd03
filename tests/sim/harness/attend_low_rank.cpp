#include <cmath>
#include <memory>

#include "harness.h"

namespace {

enum class Over { kBlocks, kRagged, kTokens, kRaggedTokens };

struct Shape {
  int64_t groups, rows, block_size, dim, value_dim;
  int hi_bits, lo_bits, bits;
  int64_t rank_k, rank_v, bases;  // rank 0: no part
  Over over;
  int64_t count;  // of blocks or, for each KV head, of tokens
  int splits;
};

// Stored rows with their part: [block, KV head] matrices.
template <class Stored>
std::vector<std::vector<float>> with_part(const Stored& stored, const harness::StoredPart* part, int64_t groups) {
  std::vector<std::vector<float>> all;
  for (int64_t matrix = 0; matrix < harness::kBlocks * groups; ++matrix) {
    all.push_back(stored.decoded(matrix));
    if (!part) continue;
    const std::vector<float> added = part->decoded(matrix / groups, matrix % groups);
    for (size_t i = 0; i < added.size(); ++i) all.back()[i] += added[i];
  }
  return all;
}

void run(const Shape& s) {
  const harness::StoredKeys keys(s.groups, s.block_size, s.dim, s.hi_bits, s.lo_bits);
  const harness::StoredValues values(s.groups, s.block_size, s.value_dim, s.bits);
  const auto part_of = [&s](int64_t channels, int64_t rank) {
    return rank ? std::make_unique<harness::StoredPart>(s.groups, s.block_size, channels, rank, s.bases) : nullptr;
  };
  const auto of_keys = part_of(s.dim, s.rank_k), of_values = part_of(s.value_dim, s.rank_v);
  const bool tokens = s.over == Over::kTokens || s.over == Over::kRaggedTokens, causal = s.over == Over::kBlocks;
  const int64_t requests = s.over == Over::kRagged || s.over == Over::kRaggedTokens ? 3 : 1;
  const int64_t listed = tokens ? s.groups * s.count : s.count;
  const float scale = 0.05f;
  const std::vector<float> q = harness::numbers(requests * s.groups * s.rows * s.dim);
  const std::vector<int64_t> first{0, s.count / 3, s.count / 3, s.count},
      ids = harness::indices(listed, harness::kBlocks), offsets = harness::indices(listed, s.block_size),
      chosen = harness::indices(listed, 3), key_positions = harness::indices(s.count * s.block_size, 100),
      query_positions = harness::indices(s.rows, 100);
  const auto read = std::make_unique<bool[]>(chosen.size());
  for (size_t i = 0; i < chosen.size(); ++i) read[i] = chosen[i] != 0;

  const auto k = with_part(keys, of_keys.get(), s.groups), v = with_part(values, of_values.get(), s.groups);
  std::vector<float> expected, expected_lse;
  for (int64_t place = 0; place < requests * s.groups; ++place) {
    const int64_t head = place % s.groups, request = place / s.groups;
    const int64_t begin = requests > 1 ? first[static_cast<size_t>(request)] : 0;
    const int64_t end = requests > 1 ? first[static_cast<size_t>(request + 1)] : s.count;
    for (int64_t row = 0; row < s.rows; ++row) {
      const float* query = q.data() + (place * s.rows + row) * s.dim;
      std::vector<double> sum(static_cast<size_t>(s.value_dim));
      double total = 0;
      for (int64_t i = begin * (tokens ? 1 : s.block_size); i < end * (tokens ? 1 : s.block_size); ++i) {
        const size_t at = static_cast<size_t>(tokens ? head * s.count + i : i / s.block_size);
        if (tokens ? !read[at]
                   : causal && key_positions[static_cast<size_t>(i)] > query_positions[static_cast<size_t>(row)])
          continue;
        const int64_t offset = tokens ? offsets[at] : i % s.block_size;
        const size_t matrix = static_cast<size_t>(ids[at] * s.groups + head);
        double logit = 0;
        for (int64_t d = 0; d < s.dim; ++d)
          logit += static_cast<double>(query[d]) * k[matrix][static_cast<size_t>(offset * s.dim + d)] * scale;
        total += std::exp(logit);
        for (int64_t d = 0; d < s.value_dim; ++d)
          sum[static_cast<size_t>(d)] +=
              std::exp(logit) * v[matrix][static_cast<size_t>(offset * s.value_dim + d)];
      }
      for (const double x : sum) expected.push_back(static_cast<float>(total > 0 ? x / total : 0));
      expected_lse.push_back(static_cast<float>(std::log(total)));
    }
  }

  pikv::Keys stored_keys = keys.keys;
  pikv::Values stored_values = values.values;
  std::vector<float> projected;
  if (of_keys) {
    projected = of_keys->projected(q, requests, s.rows, scale);
    of_keys->part.projected = projected.data();
    stored_keys.low_rank = &of_keys->part;
  }
  if (of_values) stored_values.low_rank = &of_values->part;
  pikv::cuda::Places places{.ids = ids.data(), .count = s.count};
  if (requests > 1) places.first = first.data();
  if (tokens) places.offsets = offsets.data(), places.read = read.get();
  if (causal) places.key_positions = key_positions.data(), places.query_positions = query_positions.data();
  const int64_t rows = requests * s.groups * s.rows;
  std::vector<float> out = harness::unwritten(rows * s.value_dim), lse = harness::unwritten(rows),
                     workspace = harness::unwritten(pikv::cuda::attend_workspace(rows, s.value_dim, s.splits));
  harness::launched(pikv::cuda::pikv_cuda_attend_low_rank(q.data(), requests, s.rows, scale, &stored_keys,
                                                          &stored_values, &places, s.splits, workspace.data(),
                                                          out.data(), lse.data(), nullptr));
  harness::near("out", out, expected, 1e-5f);
  harness::near("lse", lse, expected_lse, 1e-5f);
}

}  // namespace

void harness::cases() {
  // groups, rows, block_size, dim, value_dim, bits of keys and values, ranks, bases, which tokens, count, splits
  run({2, 5, 16, 64, 80, 4, 4, 8, 16, 5, 3, Over::kBlocks, 17, 2});
  run({2, 1, 32, 80, 48, 2, 2, 4, 1, 33, 2, Over::kRagged, 13, 3});
  run({2, 3, 16, 96, 144, 0, 0, 0, 0, 16, 4, Over::kTokens, 300, 1});
  run({1, 2, 64, 64, 64, 2, 0, 2, 64, 0, 2, Over::kRaggedTokens, 200, 1});
  run({1, 1, 16, 64, 64, 4, 4, 8, 8, 8, 1, Over::kTokens, 3, 4});
}
