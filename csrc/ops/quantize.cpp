// Codes: quantising, dequantising and appending blocks, and fetching them ahead.

#include <cstring>
#include <utility>

#include "ops/ops.h"

namespace pikv {

void quantize_block(const Tensor& x, int64_t hi_bits, int64_t lo_bits, bool per_channel, Tensor high, MaybeTensor low,
                    Tensor scale, Tensor zero) {
  const Dtype dtype = dtype_of("x", x);
  STD_TORCH_CHECK(x.is_contiguous() && x.dim() >= 2, "x: expected a contiguous tensor [..., tokens, channels]");
  const int64_t rows = x.size(x.dim() - 2), cols = x.size(x.dim() - 1), matrices = x.numel() / (rows * cols);
  const int64_t high_bytes = rows * cols * hi_bits / 8, low_bytes = rows * cols * lo_bits / 8;
  const int64_t scales = per_channel ? cols : rows;
  STD_TORCH_CHECK(high.is_contiguous() && high.numel() == matrices * high_bytes, "high: unexpected size");
  STD_TORCH_CHECK((lo_bits == 0) == !low, "low: expected exactly where lo_bits is not 0");
  STD_TORCH_CHECK(!low || (low->is_contiguous() && low->numel() == matrices * low_bytes), "low: unexpected size");
  STD_TORCH_CHECK(scale.numel() == matrices * scales && zero.numel() == matrices * scales, "scale, zero: unexpected size");
  const CpuKernels& set = kernels();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  const int64_t bytes = rows * cols * (dtype == Dtype::kFloat32 ? 4 : 2);
  auto* high_to = mutable_data<uint8_t>(high);
  auto* low_to = low ? mutable_data<uint8_t>(*low) : nullptr;
  auto *scale_to = mutable_data<uint16_t>(scale), *zero_to = mutable_data<uint16_t>(zero);
  torch::stable::parallel_for(0, matrices, std::max<int64_t>(1, 32768 / (rows * cols)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      set.quantize(from + i * bytes, dtype, rows, cols, cols, static_cast<int>(hi_bits), static_cast<int>(lo_bits), per_channel,
                   high_to + i * high_bytes, low_to ? low_to + i * low_bytes : nullptr, scale_to + i * scales,
                   zero_to + i * scales);
  });
}

void dequantize_block(const Tensor& high, const MaybeTensor& low, const Tensor& scale, const Tensor& zero, int64_t hi_bits,
                      int64_t lo_bits, bool per_channel, Tensor y) {
  check("y", y, ScalarType::Float, std::vector<int64_t>(y.dim(), -1));
  const int64_t rows = y.size(y.dim() - 2), cols = y.size(y.dim() - 1), matrices = y.numel() / (rows * cols);
  const int64_t high_bytes = rows * cols * hi_bits / 8, low_bytes = rows * cols * lo_bits / 8;
  const int64_t scales = per_channel ? cols : rows;
  STD_TORCH_CHECK(high.is_contiguous() && high.numel() == matrices * high_bytes, "high: unexpected size");
  STD_TORCH_CHECK(!low || (low->is_contiguous() && low->numel() == matrices * low_bytes), "low: unexpected size");
  STD_TORCH_CHECK(scale.is_contiguous() && zero.is_contiguous() && scale.numel() == matrices * scales &&
                      zero.numel() == matrices * scales,
                  "scale, zero: unexpected size");
  const bool streamed = y.numel() * 4 > (int64_t{1} << 22);  // larger than a cache: nobody will find it there
  const CpuKernels& set = kernels();
  torch::stable::parallel_for(0, matrices, std::max<int64_t>(1, 32768 / (rows * cols)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      set.dequantize(data<uint8_t>(high) + i * high_bytes, low ? data<uint8_t>(*low) + i * low_bytes : nullptr,
                     data<uint16_t>(scale) + i * scales, data<uint16_t>(zero) + i * scales, rows, cols,
                     static_cast<int>(hi_bits), static_cast<int>(lo_bits), per_channel, streamed,
                     mutable_data<float>(y) + i * rows * cols);
  });
}

// Encodes new blocks and writes them to the pool's blocks block_ids [n]: a block at a time, while it is in the cache.
void append(const Tensor& new_k, const Tensor& new_v, const Tensor& block_ids, MaybeTensor k, MaybeTensor k_high,
            MaybeTensor k_low, MaybeTensor k_scale, MaybeTensor k_zero, int64_t hi_bits, int64_t lo_bits, MaybeTensor v,
            MaybeTensor v_codes, MaybeTensor v_scale, MaybeTensor v_zero, int64_t v_bits) {
  const Dtype k_dtype = dtype_of("new_k", new_k), v_dtype = dtype_of("new_v", new_v);
  for (const auto& [name, x] : {std::pair{"new_k", &new_k}, std::pair{"new_v", &new_v}})
    STD_TORCH_CHECK(x->dim() == 4 && rows_follow(*x), name,
                    ": expected [blocks, groups, block_size, channels] whose rows follow each other");
  const int64_t count = new_k.size(0), groups = new_k.size(1), tokens = new_k.size(2), dim = new_k.size(3);
  const int64_t value_dim = new_v.size(3);
  STD_TORCH_CHECK(new_v.size(0) == count && new_v.size(1) == groups && new_v.size(2) == tokens,
                  "new_v: expected the blocks, groups and block_size of new_k");
  const Keys keys = KeyArguments{k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}.view(groups, dim);
  const Values values = ValueArguments{v, v_codes, v_scale, v_zero, v_bits}.view(groups, tokens, value_dim);
  STD_TORCH_CHECK(keys.block_size == tokens, "new_k: expected blocks of ", keys.block_size, " tokens, got ", tokens);
  STD_TORCH_CHECK(!k || k->scalar_type() == new_k.scalar_type(), "k: expected the dtype of new_k");
  STD_TORCH_CHECK(!v || v->scalar_type() == new_v.scalar_type(), "v: expected the dtype of new_v");
  STD_TORCH_CHECK(!k_high || (lo_bits == 0 || k || k_low), "k_low: expected where lo_bits is not 0");
  check("block_ids", block_ids, ScalarType::Long, {count});
  const int64_t* ids = data<int64_t>(block_ids);
  check_ids("block_ids", ids, count, std::min(blocks_of(k, k_high), blocks_of(v, v_codes)));
  const CpuKernels& set = kernels();
  const int64_t k_size = k_dtype == Dtype::kFloat32 ? 4 : 2, v_size = v_dtype == Dtype::kFloat32 ? 4 : 2;
  auto bytes = [](MaybeTensor& x, int64_t row, int64_t width) {
    return x ? static_cast<uint8_t*>(x->mutable_data_ptr()) + row * width : nullptr;
  };
  auto halves = [](MaybeTensor& x, int64_t at) { return static_cast<uint16_t*>(x->mutable_data_ptr()) + at; };
  torch::stable::parallel_for(0, count * groups, std::max<int64_t>(1, 32768 / (tokens * dim)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / groups, head = i % groups, at = ids[block] * groups + head, row = at * tokens;
      const char* from_k = static_cast<const char*>(new_k.const_data_ptr()) +
                           (block * new_k.stride(0) + head * new_k.stride(1)) * k_size;
      const char* from_v = static_cast<const char*>(new_v.const_data_ptr()) +
                           (block * new_v.stride(0) + head * new_v.stride(1)) * v_size;
      if (k) std::memcpy(bytes(k, row, dim * k_size), from_k, tokens * dim * k_size);
      if (k_high)
        set.quantize(from_k, k_dtype, tokens, dim, dim, keys.hi_bits, keys.lo_bits, true, bytes(k_high, row, dim * hi_bits / 8),
                     bytes(k_low, row, dim * lo_bits / 8), halves(k_scale, at * dim), halves(k_zero, at * dim));
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
