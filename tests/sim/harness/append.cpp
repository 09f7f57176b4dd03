#include <algorithm>

#include "harness.h"

namespace {

// Keys of `hi_bits` + `lo_bits` (0: raw with an index plane), values of `bits` (0: raw), to blocks 4, 1, 3 of the pool.
void run(int64_t groups, int64_t block_size, int64_t dim, int64_t value_dim, int hi_bits, int lo_bits, int bits) {
  const std::vector<int64_t> ids = {4, 1, 3};
  const int64_t count = static_cast<int64_t>(ids.size()), key_size = block_size * dim,
                value_size = block_size * value_dim;
  harness::StoredKeys keys(groups, block_size, dim, hi_bits, lo_bits);
  harness::StoredValues values(groups, block_size, value_dim, bits);
  harness::StoredKeys true_keys = keys;
  harness::StoredValues true_values = values;
  const std::vector<float> k = harness::numbers(count * groups * key_size),
                           v = harness::numbers(count * groups * value_size);
  for (int64_t i = 0; i < count * groups; ++i) {
    const int64_t to = ids[static_cast<size_t>(i / groups)] * groups + i % groups;
    const float *from_k = k.data() + i * key_size, *from_v = v.data() + i * value_size;
    if (hi_bits == 0) std::copy_n(from_k, key_size, true_keys.raw.begin() + to * key_size);
    if (bits == 0) std::copy_n(from_v, value_size, true_values.raw.begin() + to * value_size);
    pikv::scalar_kernels()->quantize(from_k, pikv::Dtype::kFloat32, block_size, dim, dim, keys.keys.hi_bits, lo_bits,
                                     true, true_keys.high.data() + to * key_size * keys.keys.hi_bits / 8,
                                     lo_bits ? true_keys.low.data() + to * key_size * lo_bits / 8 : nullptr,
                                     true_keys.scale.data() + to * dim, true_keys.zero.data() + to * dim);
    if (bits)
      pikv::scalar_kernels()->quantize(from_v, pikv::Dtype::kFloat32, block_size, value_dim, value_dim, bits, 0, false,
                                       true_values.codes.data() + to * value_size * bits / 8, nullptr,
                                       true_values.scale.data() + to * block_size,
                                       true_values.zero.data() + to * block_size);
  }
  const pikv::cuda::Blocks k_blocks{k.data(), groups * key_size * 4, key_size * 4};
  const pikv::cuda::Blocks v_blocks{v.data(), groups * value_size * 4, value_size * 4};
  harness::launched(pikv::cuda::pikv_cuda_append(&k_blocks, &v_blocks, pikv::Dtype::kFloat32, &keys.keys,
                                                 &values.values, ids.data(), count, nullptr));
  harness::equal("raw keys", keys.raw, true_keys.raw);
  harness::equal("high", keys.high, true_keys.high);
  harness::equal("low", keys.low, true_keys.low);
  harness::equal("key scale", keys.scale, true_keys.scale);
  harness::equal("key zero", keys.zero, true_keys.zero);
  harness::equal("raw values", values.raw, true_values.raw);
  harness::equal("codes", values.codes, true_values.codes);
  harness::equal("value scale", values.scale, true_values.scale);
  harness::equal("value zero", values.zero, true_values.zero);
}

}  // namespace

void harness::cases() {
  run(2, 16, 64, 80, 4, 4, 8);
  run(1, 32, 96, 64, 0, 0, 0);
  run(2, 16, 64, 64, 2, 2, 4);
}
