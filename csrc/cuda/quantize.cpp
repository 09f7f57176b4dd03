// The ops on CUDA that encode, decode and move blocks.

#include "ops.h"

namespace pikv::cuda {

void quantize_block(const Tensor& x, int64_t hi_bits, int64_t lo_bits, bool per_channel, Tensor high, MaybeTensor low,
                    Tensor scale, Tensor zero) {
  const Dtype dtype = dtype_of("x", x);
  const BlockCodes codes(x, hi_bits, lo_bits, per_channel, high, low, scale, zero);
  check_wide_places(x, x, high, low, scale, zero);
  const DeviceGuard guard(x.get_device_index());
  check_launch("quantize_block", pikv_cuda_quantize_block(
                                     x.const_data_ptr(), dtype, codes.matrices, codes.rows, codes.cols,
                                     static_cast<int>(hi_bits), static_cast<int>(lo_bits), per_channel,
                                     mutable_data<uint8_t>(high), low ? mutable_data<uint8_t>(*low) : nullptr,
                                     mutable_data<uint16_t>(scale), mutable_data<uint16_t>(zero), current_stream(x)));
}

void dequantize_block(const Tensor& high, const MaybeTensor& low, const Tensor& scale, const Tensor& zero,
                      int64_t hi_bits, int64_t lo_bits, bool per_channel, Tensor y) {
  check("y", y, ScalarType::Float, std::vector<int64_t>(y.dim(), -1));
  const BlockCodes codes(y, hi_bits, low ? lo_bits : 0, per_channel, high, low, scale, zero);
  check_wide_places(y, y, high, low, scale, zero);
  const DeviceGuard guard(y.get_device_index());
  check_launch("dequantize_block",
               pikv_cuda_dequantize_block(data<uint8_t>(high), low ? data<uint8_t>(*low) : nullptr,
                                          data<uint16_t>(scale), data<uint16_t>(zero), codes.matrices, codes.rows,
                                          codes.cols, static_cast<int>(hi_bits), static_cast<int>(lo_bits), per_channel,
                                          mutable_data<float>(y), current_stream(y)));
}

void append(const Tensor& new_k, const Tensor& new_v, const Tensor& block_ids, PIKV_KEY_ARGUMENTS,
            PIKV_VALUE_ARGUMENTS) {
  const DeviceGuard guard(new_k.get_device_index());
  const NewBlocks blocks(new_k, new_v, block_ids, k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits, v, v_codes,
                         v_scale, v_zero, v_bits);
  const auto source_of = [](const char* name, const Tensor& x) {
    STD_TORCH_CHECK(x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0, name, ": expected blocks in steps of 8 numbers");
    const int64_t size = x.element_size();
    return Blocks{x.const_data_ptr(), x.stride(0) * size, x.stride(1) * size};
  };
  const Blocks from_k = source_of("new_k", new_k), from_v = source_of("new_v", new_v);
  const Dtype dtype = dtype_of("new_k", new_k);
  STD_TORCH_CHECK(new_v.scalar_type() == new_k.scalar_type(), "new_v: expected the dtype of new_k");
  check_places(new_k, block_ids);
  check_wide_places(new_k, new_k, new_v, k, k_high, k_low, k_scale, k_zero, v, v_codes, v_scale, v_zero);
  check_launch("append", pikv_cuda_append(&from_k, &from_v, dtype, &blocks.keys, &blocks.values,
                                          data<int64_t>(block_ids), blocks.count, current_stream(new_k)));
}

void prefetch(const Tensor& field, const Tensor& block_ids) {
  STD_TORCH_CHECK(field.is_contiguous() && field.dim() >= 1, "field: expected a contiguous tensor [blocks, ...]");
  check("block_ids", block_ids, ScalarType::Long, {-1});
  check_places(field, block_ids);
  const DeviceGuard guard(field.get_device_index());
  const int64_t row_bytes = field.size(0) ? field.numel() / field.size(0) * field.element_size() : 0;
  check_launch("prefetch", pikv_cuda_prefetch(field.const_data_ptr(), row_bytes, data<int64_t>(block_ids),
                                              block_ids.numel(), current_stream(field)));
}

}  // namespace pikv::cuda
