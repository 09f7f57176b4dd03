#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "harness.h"

namespace {

void run(int64_t groups, int64_t rows, const std::vector<int64_t>& lengths, float epsilon) {
  const harness::List tokens(lengths);
  const int64_t count = tokens.count(), all = tokens.requests() * groups * rows;
  const std::vector<float> if_unread = harness::numbers(groups * rows * count, -6.0f, 6.0f),
                           if_read = harness::numbers(groups * rows * count, -6.0f, 6.0f),
                           raw_lse = harness::numbers(all), keys = harness::numbers(groups * count);
  std::vector<int64_t> order(static_cast<size_t>(groups * count));
  std::vector<uint8_t> expected(order.size());
  for (int64_t i = 0; i < groups * tokens.requests(); ++i) {
    const int64_t request = i / groups, head = i % groups, length = tokens.length(request);
    int64_t* its = order.data() + head * count + tokens.begin(request);
    std::iota(its, its + length, tokens.begin(request));
    const float* key = keys.data() + head * count;
    std::sort(its, its + length, [key](int64_t a, int64_t b) { return key[a] > key[b]; });
    int64_t needed = 0;
    for (int64_t row = head * rows; row < (head + 1) * rows; ++row) {
      const float *unread = if_unread.data() + row * count, *read = if_read.data() + row * count;
      std::vector<double> after(static_cast<size_t>(length) + 1);
      for (size_t t = after.size() - 1; t-- > 0;)
        after[t] = after[t + 1] + std::exp(static_cast<double>(unread[its[t]]));
      double before = std::exp(static_cast<double>(raw_lse[static_cast<size_t>(request * groups * rows + row)]));
      for (int64_t t = 0; t < length; ++t) {
        const double missed = after[static_cast<size_t>(t)];
        if (missed < epsilon * (missed + before)) break;
        before += std::exp(static_cast<double>(read[its[t]]));
        needed = std::max(needed, t + 1);
      }
    }
    for (int64_t t = 0; t < needed; ++t) expected[static_cast<size_t>(head * count + its[t])] = 1;
  }
  std::vector<int32_t> workspace(static_cast<size_t>(all), 1 << 30);
  const auto read = std::make_unique<bool[]>(expected.size());
  harness::launched(pikv::cuda::pikv_cuda_select_mass(order.data(), if_unread.data(), if_read.data(), raw_lse.data(),
                                                      groups, rows, &tokens.runs, epsilon, workspace.data(), read.get(),
                                                      nullptr));
  harness::equal("read", read.get(), expected.data(), expected.size());
}

}  // namespace

void harness::cases() {
  run(2, 3, {700}, 0.02f);
  run(1, 2, {5, 0, 1100, 9}, 0.2f);
  run(1, 1, {300, 40}, 1e-6f);
}
