#include "harness.h"

namespace {

void run(pikv::Dtype dtype, int64_t matrices, int64_t rows, int64_t cols, int hi_bits, int lo_bits, bool per_channel) {
  const int64_t size = rows * cols, scales = per_channel ? cols : rows;
  const std::vector<float> x = harness::numbers(matrices * size);
  const std::vector<uint16_t> narrow = harness::halves(x);
  const auto* from = dtype == pikv::Dtype::kFloat32 ? reinterpret_cast<const char*>(x.data())
                                                    : reinterpret_cast<const char*>(narrow.data());
  const int64_t element = dtype == pikv::Dtype::kFloat32 ? 4 : 2;
  const auto planes = [&](int64_t bits) {
    return std::vector<uint8_t>(static_cast<size_t>(matrices * size * bits / 8), 0xa5);
  };
  const auto numbers = [&] { return std::vector<uint16_t>(static_cast<size_t>(matrices * scales), 0x7e00); };
  std::vector<uint8_t> high = planes(hi_bits), low = planes(lo_bits), true_high = high, true_low = low;
  std::vector<uint16_t> scale = numbers(), zero = numbers(), true_scale = scale, true_zero = zero;
  for (int64_t i = 0; i < matrices; ++i)
    pikv::scalar_kernels()->quantize(from + i * size * element, dtype, rows, cols, cols, hi_bits, lo_bits, per_channel,
                                     true_high.data() + i * size * hi_bits / 8,
                                     lo_bits ? true_low.data() + i * size * lo_bits / 8 : nullptr,
                                     true_scale.data() + i * scales, true_zero.data() + i * scales);
  harness::launched(pikv::cuda::pikv_cuda_quantize_block(from, dtype, matrices, rows, cols, hi_bits, lo_bits,
                                                         per_channel, high.data(), lo_bits ? low.data() : nullptr,
                                                         scale.data(), zero.data(), nullptr));
  harness::equal("zero", zero, true_zero);
  harness::equal("scale", scale, true_scale);
  harness::equal("high", high, true_high);
  harness::equal("low", low, true_low);
}

}  // namespace

void harness::cases() {
  run(pikv::Dtype::kFloat32, 2, 32, 64, 4, 4, true);
  run(pikv::Dtype::kFloat16, 2, 16, 80, 2, 2, true);
  run(pikv::Dtype::kFloat32, 1, 13, 192, 2, 0, true);
  run(pikv::Dtype::kFloat32, 2, 13, 64, 8, 0, false);
  run(pikv::Dtype::kFloat16, 1, 32, 96, 4, 0, false);
}
