#include <cmath>
#include <memory>

#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, int64_t blocks, int64_t block_size) {
  const int64_t count = blocks * block_size;
  const std::vector<float> coarse = harness::numbers(groups * rows * count),
                           spread = harness::numbers(groups * rows * blocks, 0.0f, 1.0f);
  const std::vector<float> radius = harness::numbers(groups * rows * blocks, 0.0f, 2.0f);
  const std::vector<int64_t> chosen = harness::indices(groups * count, 2);
  const auto read = std::make_unique<bool[]>(chosen.size());
  for (size_t i = 0; i < chosen.size(); ++i) read[i] = chosen[i] != 0;
  std::vector<float> by_spread = harness::unwritten(groups * rows), by_radius = by_spread, true_spread, true_radius;
  for (int64_t row = 0; row < groups * rows; ++row) {
    double expected = 0, largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (read[static_cast<size_t>(row / rows * count + i)]) continue;
      const double logit = coarse[static_cast<size_t>(row * count + i)];
      const size_t block = static_cast<size_t>(row * blocks + i / block_size);
      expected += std::exp(0.9 * logit + spread[block]);
      largest += std::exp(logit + radius[block]);
    }
    true_spread.push_back(static_cast<float>(std::log(expected)));
    true_radius.push_back(static_cast<float>(std::log(largest)));
  }
  harness::launched(pikv::cuda::pikv_cuda_unread_mass(coarse.data(), 0.9f, spread.data(), radius.data(), read.get(),
                                                      groups, rows, blocks, block_size, by_spread.data(),
                                                      by_radius.data(), nullptr));
  harness::near("by_spread", by_spread, true_spread, 1e-5f);
  harness::near("by_radius", by_radius, true_radius, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 3, 9, 16);
  run(1, 2, 1, 32);
}
