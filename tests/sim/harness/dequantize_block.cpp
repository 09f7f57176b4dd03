#include "harness.h"

namespace {

void run(int64_t matrices, int64_t rows, int64_t cols, int hi_bits, int lo_bits, bool per_channel, bool has_low) {
  const int64_t size = rows * cols, scales = per_channel ? cols : rows;
  const std::vector<uint8_t> high = harness::bytes(matrices * size * hi_bits / 8),
                             low = harness::bytes(matrices * size * lo_bits / 8);
  const std::vector<uint16_t> scale = harness::halves(harness::numbers(matrices * scales, 0.01f, 0.2f));
  const std::vector<uint16_t> zero = harness::halves(harness::numbers(matrices * scales));
  std::vector<float> y = harness::unwritten(matrices * size), expected = y;
  const auto at = [&](const std::vector<uint8_t>& plane, int64_t i, int bits) {
    return plane.data() + i * size * bits / 8;
  };
  for (int64_t i = 0; i < matrices; ++i)
    pikv::scalar_kernels()->dequantize(at(high, i, hi_bits), has_low ? at(low, i, lo_bits) : nullptr,
                                       scale.data() + i * scales, zero.data() + i * scales, rows, cols, hi_bits,
                                       lo_bits, per_channel, false, expected.data() + i * size);
  harness::launched(pikv::cuda::pikv_cuda_dequantize_block(high.data(), has_low ? low.data() : nullptr, scale.data(),
                                                           zero.data(), matrices, rows, cols, hi_bits, lo_bits,
                                                           per_channel, y.data(), nullptr));
  harness::near("y", y, expected, 1e-6f);
}

}  // namespace

void harness::cases() {
  run(3, 13, 64, 4, 4, true, true);
  run(2, 16, 80, 2, 2, true, false);
  run(2, 16, 96, 8, 0, false, false);
}
