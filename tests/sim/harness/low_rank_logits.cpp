#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, int64_t block_size, int64_t dim, int64_t rank, int64_t bases, int64_t count) {
  // 8-bit codes with a scale and a zero per column and block, as keys have them.
  harness::StoredKeys factors(groups, block_size, rank, 8, 0);
  const std::vector<float> q = harness::numbers(groups * rows * dim),
                           basis = harness::numbers(bases * groups * rank * dim, -0.3f, 0.3f);
  const std::vector<int64_t> ids = harness::indices(count, harness::kBlocks),
                             basis_of = harness::indices(harness::kBlocks, bases);
  const pikv::LowRank part{.codes = factors.keys.high, .scale = factors.keys.scale, .zero = factors.keys.zero,
                           .basis = basis.data(), .basis_of = basis_of.data(), .projected = nullptr, .rank = rank,
                           .bases = bases};
  const pikv::Keys keys{.groups = groups, .block_size = block_size, .dim = dim, .low_rank = &part};
  std::vector<float> workspace = harness::unwritten(bases * groups * rows * rank);
  std::vector<float> logits = harness::numbers(groups * rows * count * block_size), expected = logits;
  const float scale = 0.05f;
  for (int64_t head = 0; head < groups; ++head)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = ids[static_cast<size_t>(i)];
      const std::vector<float> a = factors.decoded(id * groups + head);
      const float* b = basis.data() + (basis_of[static_cast<size_t>(id)] * groups + head) * rank * dim;
      std::vector<float> k(static_cast<size_t>(block_size * dim));
      for (int64_t token = 0; token < block_size; ++token)
        for (int64_t j = 0; j < rank; ++j)
          for (int64_t d = 0; d < dim; ++d)
            k[static_cast<size_t>(token * dim + d)] += a[static_cast<size_t>(token * rank + j)] * b[j * dim + d];
      const auto its = harness::products(q.data() + head * rows * dim, rows, k, dim, scale);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t token = 0; token < block_size; ++token)
          expected[static_cast<size_t>(((head * rows + row) * count + i) * block_size + token)] +=
              static_cast<float>(its[static_cast<size_t>(row * block_size + token)]);
    }
  harness::launched(pikv::cuda::pikv_cuda_low_rank_logits(q.data(), rows, scale, &keys, ids.data(), count,
                                                          workspace.data(), logits.data(), nullptr));
  harness::near("logits", logits, expected, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 3, 16, 64, 16, 3, 11);
  run(1, 1, 32, 80, 1, 1, 5);
  run(2, 9, 64, 96, 33, 2, 3);
}
