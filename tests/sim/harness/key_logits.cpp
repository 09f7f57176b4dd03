#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, int64_t block_size, int64_t dim, int hi_bits, int lo_bits,
         const std::vector<int64_t>& lengths) {
  const harness::StoredKeys keys(groups, block_size, dim, hi_bits, lo_bits);
  const harness::List blocks(lengths);
  const int64_t count = blocks.count();
  const std::vector<float> q = harness::numbers(blocks.requests() * groups * rows * dim);
  const std::vector<int64_t> ids = harness::indices(count, harness::kBlocks);
  std::vector<float> logits = harness::unwritten(groups * rows * count * block_size), expected = logits;
  const float scale = 0.05f;
  for (int64_t place = 0; place < blocks.requests() * groups; ++place)
    for (int64_t i = blocks.begin(place / groups); i < blocks.begin(place / groups + 1); ++i) {
      const int64_t head = place % groups;
      const std::vector<float> k = keys.decoded(ids[static_cast<size_t>(i)] * groups + head);
      const auto its = harness::products(q.data() + place * rows * dim, rows, k, dim, scale);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t token = 0; token < block_size; ++token)
          expected[static_cast<size_t>(((head * rows + row) * count + i) * block_size + token)] =
              static_cast<float>(its[static_cast<size_t>(row * block_size + token)]);
    }
  harness::launched(pikv::cuda::pikv_cuda_key_logits(q.data(), rows, scale, &keys.keys, ids.data(), &blocks.runs,
                                                     logits.data(), nullptr));
  harness::near("logits", logits, expected, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 3, 16, 64, 4, 4, {11});
  run(1, 1, 32, 80, 0, 0, {2, 0, 3});
  run(1, 5, 64, 96, 2, 2, {1, 2});
}
