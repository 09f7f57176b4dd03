// Codes: quantising, dequantising and appending blocks, and fetching them ahead.

#include <algorithm>
#include <cstring>

#include "ops/ops.h"
#include "ops/shared.h"

namespace pikv {
namespace {

// How many matrices of that many numbers a thread takes at least.
int64_t grain(int64_t numbers) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, numbers)); }

}  // namespace

void quantize_block(const Tensor& x, int64_t hi_bits, int64_t lo_bits, bool per_channel, Tensor high, MaybeTensor low,
                    Tensor scale, Tensor zero) {
  const Dtype dtype = dtype_of("x", x);
  const BlockCodes codes(x, hi_bits, lo_bits, per_channel, high, low, scale, zero);
  const int64_t rows = codes.rows, cols = codes.cols;
  const CpuKernels& set = kernels();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  const int64_t bytes = rows * cols * (dtype == Dtype::kFloat32 ? 4 : 2);
  auto* high_to = mutable_data<uint8_t>(high);
  auto* low_to = low ? mutable_data<uint8_t>(*low) : nullptr;
  auto *scale_to = mutable_data<uint16_t>(scale), *zero_to = mutable_data<uint16_t>(zero);
  torch::stable::parallel_for(0, codes.matrices, grain(rows * cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      set.quantize(from + i * bytes, dtype, rows, cols, cols, static_cast<int>(hi_bits), static_cast<int>(lo_bits),
                   per_channel, high_to + i * codes.high_bytes, low_to ? low_to + i * codes.low_bytes : nullptr,
                   scale_to + i * codes.scales, zero_to + i * codes.scales);
  });
}

void dequantize_block(const Tensor& high, const MaybeTensor& low, const Tensor& scale, const Tensor& zero,
                      int64_t hi_bits, int64_t lo_bits, bool per_channel, Tensor y) {
  check("y", y, ScalarType::Float, std::vector<int64_t>(y.dim(), -1));
  const BlockCodes codes(y, hi_bits, low ? lo_bits : 0, per_channel, high, low, scale, zero);
  const int64_t rows = codes.rows, cols = codes.cols;
  const bool streamed = y.numel() * 4 > (int64_t{1} << 22);  // larger than a cache: nobody will find it there
  const CpuKernels& set = kernels();
  torch::stable::parallel_for(0, codes.matrices, grain(rows * cols), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      set.dequantize(data<uint8_t>(high) + i * codes.high_bytes,
                     low ? data<uint8_t>(*low) + i * codes.low_bytes : nullptr,
                     data<uint16_t>(scale) + i * codes.scales, data<uint16_t>(zero) + i * codes.scales, rows, cols,
                     static_cast<int>(hi_bits), static_cast<int>(lo_bits), per_channel, streamed,
                     mutable_data<float>(y) + i * rows * cols);
  });
}

// Encodes new blocks and writes them to the pool's blocks block_ids [n]: a block at a time, while it is in the cache.
void append(const Tensor& new_k, const Tensor& new_v, const Tensor& block_ids, MaybeTensor k, MaybeTensor k_high,
            MaybeTensor k_low, MaybeTensor k_scale, MaybeTensor k_zero, int64_t hi_bits, int64_t lo_bits, MaybeTensor v,
            MaybeTensor v_codes, MaybeTensor v_scale, MaybeTensor v_zero, int64_t v_bits) {
  const Dtype k_dtype = dtype_of("new_k", new_k), v_dtype = dtype_of("new_v", new_v);
  const auto [count, groups, tokens, keys, values] =
      NewBlocks(new_k, new_v, block_ids, k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits, v, v_codes, v_scale,
                v_zero, v_bits);
  const int64_t dim = keys.dim, value_dim = values.dim;
  const int64_t* ids = data<int64_t>(block_ids);
  check_ids("block_ids", ids, count, std::min(blocks_of(k, k_high), blocks_of(v, v_codes)));
  const CpuKernels& set = kernels();
  const int64_t k_size = k_dtype == Dtype::kFloat32 ? 4 : 2, v_size = v_dtype == Dtype::kFloat32 ? 4 : 2;
  auto bytes = [](MaybeTensor& x, int64_t row, int64_t width) {
    return x ? static_cast<uint8_t*>(x->mutable_data_ptr()) + row * width : nullptr;
  };
  auto halves = [](MaybeTensor& x, int64_t at) { return static_cast<uint16_t*>(x->mutable_data_ptr()) + at; };
  torch::stable::parallel_for(0, count * groups, grain(tokens * dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / groups, head = i % groups, at = ids[block] * groups + head, row = at * tokens;
      const char* from_k = static_cast<const char*>(new_k.const_data_ptr()) +
                           (block * new_k.stride(0) + head * new_k.stride(1)) * k_size;
      const char* from_v = static_cast<const char*>(new_v.const_data_ptr()) +
                           (block * new_v.stride(0) + head * new_v.stride(1)) * v_size;
      if (k) std::memcpy(bytes(k, row, dim * k_size), from_k, tokens * dim * k_size);
      if (k_high)
        set.quantize(from_k, k_dtype, tokens, dim, dim, keys.hi_bits, keys.lo_bits, true,
                     bytes(k_high, row, dim * hi_bits / 8), bytes(k_low, row, dim * lo_bits / 8),
                     halves(k_scale, at * dim), halves(k_zero, at * dim));
      if (v) std::memcpy(bytes(v, row, value_dim * v_size), from_v, tokens * value_dim * v_size);
      if (!v)
        set.quantize(from_v, v_dtype, tokens, value_dim, value_dim, values.bits, 0, false,
                     bytes(v_codes, row, value_dim * v_bits / 8), nullptr, halves(v_scale, row), halves(v_zero, row));
    }
  });
}

// Asks for the rows block_ids of one field of a pool to be brought into the second-level cache.
void prefetch(const Tensor& field, const Tensor& block_ids) {
  STD_TORCH_CHECK(field.is_contiguous() && field.dim() >= 1, "field: expected a contiguous tensor [blocks, ...]");
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const int64_t* ids = data<int64_t>(block_ids);
  check_ids("block_ids", ids, block_ids.numel(), field.size(0));
  const int64_t bytes = field.size(0) ? field.numel() / field.size(0) * field.element_size() : 0;
  const char* base = static_cast<const char*>(field.const_data_ptr());
  for (int64_t i = 0; i < block_ids.numel(); ++i)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(base + ids[i] * bytes + at, 0, 2);
}

}  // namespace pikv
