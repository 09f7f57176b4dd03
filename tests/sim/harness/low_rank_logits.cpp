#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, int64_t block_size, int64_t dim, int64_t rank, int64_t bases,
         const std::vector<int64_t>& lengths) {
  harness::StoredPart stored(groups, block_size, dim, rank, bases);
  const harness::List blocks(lengths);
  const int64_t count = blocks.count();
  const std::vector<float> q = harness::numbers(blocks.requests() * groups * rows * dim);
  const std::vector<int64_t> ids = harness::indices(count, harness::kBlocks);
  const float scale = 0.05f;
  const std::vector<float> projected = stored.projected(q, blocks.requests(), rows, scale);
  stored.part.projected = projected.data();
  const pikv::Keys keys{.groups = groups, .block_size = block_size, .dim = dim, .low_rank = &stored.part};
  std::vector<float> logits = harness::numbers(groups * rows * count * block_size), expected = logits;
  for (int64_t place = 0; place < blocks.requests() * groups; ++place)
    for (int64_t i = blocks.begin(place / groups); i < blocks.begin(place / groups + 1); ++i) {
      const int64_t head = place % groups;
      const std::vector<float> k = stored.decoded(ids[static_cast<size_t>(i)], head);
      const auto its = harness::products(q.data() + place * rows * dim, rows, k, dim, scale);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t token = 0; token < block_size; ++token)
          expected[static_cast<size_t>(((head * rows + row) * count + i) * block_size + token)] +=
              static_cast<float>(its[static_cast<size_t>(row * block_size + token)]);
    }
  harness::launched(
      pikv::cuda::pikv_cuda_low_rank_logits(rows, &keys, ids.data(), &blocks.runs, logits.data(), nullptr));
  harness::near("logits", logits, expected, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 3, 16, 64, 16, 3, {11});
  run(1, 1, 32, 80, 1, 1, {2, 0, 3});
  run(2, 9, 64, 96, 33, 2, {1, 2});
}
