#include <algorithm>
#include <numeric>

#include "harness.h"

namespace {

void run(int64_t groups, int64_t count, int64_t best, bool ties) {
  std::vector<float> scores = harness::numbers(groups * count, -3.0f, 3.0f);
  if (ties)
    for (float& x : scores) x = static_cast<float>(static_cast<int>(x));
  std::vector<int64_t> indices(static_cast<size_t>(groups * best), -1), expected;
  for (int64_t head = 0; head < groups; ++head) {
    const float* its = scores.data() + head * count;
    std::vector<int64_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [its](int64_t a, int64_t b) { return its[a] > its[b]; });
    std::sort(order.begin(), order.begin() + best);
    expected.insert(expected.end(), order.begin(), order.begin() + best);
  }
  harness::launched(pikv::cuda::pikv_cuda_select_topk(scores.data(), groups, count, best, indices.data(), nullptr));
  harness::equal("indices", indices, expected);
}

}  // namespace

void harness::cases() {
  run(2, 700, 50, false);
  run(1, 600, 300, true);
  run(1, 5, 5, false);
}
