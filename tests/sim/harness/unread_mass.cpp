#include <cmath>
#include <memory>

#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, int64_t block_size, const std::vector<int64_t>& lengths) {
  const harness::List blocks(lengths);
  const int64_t listed = blocks.count(), count = listed * block_size, all = blocks.requests() * groups * rows;
  const std::vector<float> coarse = harness::numbers(groups * rows * count),
                           spread = harness::numbers(groups * rows * listed, 0.0f, 1.0f);
  const std::vector<float> radius = harness::numbers(groups * rows * listed, 0.0f, 2.0f);
  const std::vector<int64_t> chosen = harness::indices(groups * count, 2);
  const auto read = std::make_unique<bool[]>(chosen.size());
  for (size_t i = 0; i < chosen.size(); ++i) read[i] = chosen[i] != 0;
  std::vector<float> by_spread = harness::unwritten(all), by_radius = by_spread, true_spread, true_radius;
  for (int64_t place = 0; place < all; ++place) {
    const int64_t request = place / (groups * rows), row = place % (groups * rows);
    double expected = 0, largest = 0;
    for (int64_t i = blocks.begin(request) * block_size; i < blocks.begin(request + 1) * block_size; ++i) {
      if (read[static_cast<size_t>(row / rows * count + i)]) continue;
      const double logit = coarse[static_cast<size_t>(row * count + i)];
      const size_t block = static_cast<size_t>(row * listed + i / block_size);
      expected += std::exp(0.9 * logit + spread[block]);
      largest += std::exp(logit + radius[block]);
    }
    true_spread.push_back(static_cast<float>(std::log(expected)));
    true_radius.push_back(static_cast<float>(std::log(largest)));
  }
  harness::launched(pikv::cuda::pikv_cuda_unread_mass(coarse.data(), 0.9f, spread.data(), radius.data(), read.get(),
                                                      groups, rows, &blocks.runs, block_size, by_spread.data(),
                                                      by_radius.data(), nullptr));
  harness::near("by_spread", by_spread, true_spread, 1e-5f);
  harness::near("by_radius", by_radius, true_radius, 1e-5f);
}

}  // namespace

void harness::cases() {
  run(2, 3, 16, {9});
  run(1, 2, 32, {1, 0, 4});
}
