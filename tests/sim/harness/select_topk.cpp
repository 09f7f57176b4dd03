#include <algorithm>
#include <numeric>

#include "harness.h"

namespace {

void run(int64_t groups, const std::vector<int64_t>& lengths, const std::vector<int64_t>& counts, bool ties) {
  const harness::List tokens(lengths), chosen(counts);
  std::vector<float> scores = harness::numbers(groups * tokens.count(), -3.0f, 3.0f);
  if (ties)
    for (float& x : scores) x = static_cast<float>(static_cast<int>(x));
  std::vector<int64_t> indices(static_cast<size_t>(groups * chosen.count()), -1), expected;
  for (int64_t i = 0; i < groups * tokens.requests(); ++i) {
    const int64_t request = i % tokens.requests();
    const float* its = scores.data() + i / tokens.requests() * tokens.count();
    std::vector<int64_t> order(static_cast<size_t>(tokens.length(request)));
    std::iota(order.begin(), order.end(), tokens.begin(request));
    std::stable_sort(order.begin(), order.end(), [its](int64_t a, int64_t b) { return its[a] > its[b]; });
    std::sort(order.begin(), order.begin() + chosen.length(request));
    expected.insert(expected.end(), order.begin(), order.begin() + chosen.length(request));
  }
  harness::launched(pikv::cuda::pikv_cuda_select_topk(scores.data(), groups, &tokens.runs, &chosen.runs,
                                                      indices.data(), nullptr));
  harness::equal("indices", indices, expected);
}

}  // namespace

void harness::cases() {
  run(2, {700}, {50}, false);
  run(1, {600}, {300}, true);
  run(2, {5, 0, 520, 9}, {5, 0, 7, 0}, false);
}
