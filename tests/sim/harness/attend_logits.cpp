#include <cmath>

#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, int64_t block_size, int64_t dim, int bits, int64_t rank, int64_t bases,
         int64_t count, int splits) {
  const harness::StoredValues stored(groups, block_size, dim, bits);
  const harness::StoredKeys factors(groups, block_size, rank, 8, 0);  // 8-bit codes, scale and zero per column
  const std::vector<float> basis = harness::numbers(bases * groups * rank * dim, -0.3f, 0.3f),
                           logits = harness::numbers(groups * rows * count * block_size);
  const std::vector<int64_t> ids = harness::indices(count, harness::kBlocks),
                             basis_of = harness::indices(harness::kBlocks, bases);
  const pikv::LowRank part{.codes = factors.keys.high, .scale = factors.keys.scale, .zero = factors.keys.zero,
                           .basis = basis.data(), .basis_of = basis_of.data(), .projected = nullptr, .rank = rank,
                           .bases = bases};
  pikv::Values values = stored.values;
  values.low_rank = &part;
  std::vector<float> out = harness::unwritten(groups * rows * dim), lse = harness::unwritten(groups * rows),
                     expected = out, expected_lse = lse;
  for (int64_t head = 0; head < groups; ++head)
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<double> sum(static_cast<size_t>(dim));
      double total = 0.0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t id = ids[static_cast<size_t>(i)], matrix = id * groups + head;
        const std::vector<float> a = factors.decoded(matrix);
        std::vector<float> v(static_cast<size_t>(block_size * dim));
        if (bits)
          pikv::scalar_kernels()->dequantize(values.codes + matrix * block_size * dim * bits / 8, nullptr,
                                             values.scale + matrix * block_size, values.zero + matrix * block_size,
                                             block_size, dim, bits, 0, false, false, v.data());
        else
          v.assign(stored.raw.begin() + matrix * block_size * dim,
                   stored.raw.begin() + (matrix + 1) * block_size * dim);
        const float* b = basis.data() + (basis_of[static_cast<size_t>(id)] * groups + head) * rank * dim;
        for (int64_t token = 0; token < block_size; ++token) {
          const double weight =
              std::exp(logits[static_cast<size_t>(((head * rows + row) * count + i) * block_size + token)]);
          total += weight;
          for (int64_t d = 0; d < dim; ++d) {
            double value = v[static_cast<size_t>(token * dim + d)];
            for (int64_t j = 0; j < rank; ++j) value += a[static_cast<size_t>(token * rank + j)] * b[j * dim + d];
            sum[static_cast<size_t>(d)] += weight * value;
          }
        }
      }
      for (int64_t d = 0; d < dim; ++d)
        expected[static_cast<size_t>((head * rows + row) * dim + d)] =
            static_cast<float>(sum[static_cast<size_t>(d)] / total);
      expected_lse[static_cast<size_t>(head * rows + row)] = static_cast<float>(std::log(total));
    }
  std::vector<float> workspace = harness::unwritten(pikv::cuda::attend_workspace(groups * rows, dim, splits));
  harness::launched(pikv::cuda::pikv_cuda_attend_logits(logits.data(), rows, &values, ids.data(), count, nullptr,
                                                        nullptr, splits, workspace.data(), out.data(), lse.data(),
                                                        nullptr));
  harness::near("out", out, expected, 1e-5f);
  harness::near("lse", lse, expected_lse, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 3, 16, 64, 8, 16, 3, 7, 2);
  run(1, 1, 32, 144, 4, 1, 1, 5, 3);
  run(2, 2, 16, 80, 0, 130, 2, 3, 1);
  run(1, 2, 64, 48, 2, 33, 2, 2, 4);
}
