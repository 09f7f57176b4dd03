#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, int64_t block_size, int64_t dim, int64_t rank, int64_t bases, int64_t count) {
  harness::StoredPart stored(groups, block_size, dim, rank, bases);
  const std::vector<float> q = harness::numbers(groups * rows * dim);
  const std::vector<int64_t> ids = harness::indices(count, harness::kBlocks);
  const float scale = 0.05f;
  const std::vector<float> projected = stored.projected(q, 1, rows, scale);
  stored.part.projected = projected.data();
  const pikv::Keys keys{.groups = groups, .block_size = block_size, .dim = dim, .low_rank = &stored.part};
  std::vector<float> logits = harness::numbers(groups * rows * count * block_size), expected = logits;
  for (int64_t head = 0; head < groups; ++head)
    for (int64_t i = 0; i < count; ++i) {
      const std::vector<float> k = stored.decoded(ids[static_cast<size_t>(i)], head);
      const auto its = harness::products(q.data() + head * rows * dim, rows, k, dim, scale);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t token = 0; token < block_size; ++token)
          expected[static_cast<size_t>(((head * rows + row) * count + i) * block_size + token)] +=
              static_cast<float>(its[static_cast<size_t>(row * block_size + token)]);
    }
  harness::launched(pikv::cuda::pikv_cuda_low_rank_logits(rows, &keys, ids.data(), count, logits.data(), nullptr));
  harness::near("logits", logits, expected, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 3, 16, 64, 16, 3, 11);
  run(1, 1, 32, 80, 1, 1, 5);
  run(2, 9, 64, 96, 33, 2, 3);
}
