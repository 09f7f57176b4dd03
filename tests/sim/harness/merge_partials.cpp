#include <cmath>

#include "harness.h"

namespace {

void run(int64_t parts, int64_t rows, int64_t dim) {
  const std::vector<float> outs = harness::numbers(parts * rows * dim);
  std::vector<float> lses = harness::numbers(parts * rows, -5.0f, 5.0f);
  lses[0] = -INFINITY;
  std::vector<float> out = harness::unwritten(rows * dim), lse = harness::unwritten(rows), true_out = out,
                     true_lse = lse;
  for (int64_t row = 0; row < rows; ++row) {
    double total = 0;
    for (int64_t part = 0; part < parts; ++part)
      total += std::exp(static_cast<double>(lses[static_cast<size_t>(part * rows + row)]));
    true_lse[static_cast<size_t>(row)] = static_cast<float>(std::log(total));
    for (int64_t i = 0; i < dim; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part)
        sum += std::exp(static_cast<double>(lses[static_cast<size_t>(part * rows + row)])) *
               outs[static_cast<size_t>((part * rows + row) * dim + i)];
      true_out[static_cast<size_t>(row * dim + i)] = total > 0 ? static_cast<float>(sum / total) : 0.0f;
    }
  }
  harness::launched(pikv::cuda::pikv_cuda_merge_partials(outs.data(), lses.data(), parts, rows, dim, out.data(),
                                                         lse.data(), nullptr));
  harness::near("out", out, true_out, 1e-5f);
  harness::near("lse", lse, true_lse, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(1, 3, 64);
  run(35, 6, 80);
}
