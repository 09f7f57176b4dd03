// The CUDA side of torch.ops.pikv.*: checks arguments, takes the current stream, calls the launchers. Built against torch's
// stable ABI and CUDA's runtime alone, so that it loads under any torch, one without CUDA too. The schemas are those of
// csrc/bindings.cpp. Nothing waits for the device: block ids are not looked at. Workspace comes from torch's caching allocator.

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "pikv/arguments.h"
#include "pikv/cuda.h"

namespace pikv::cuda {
namespace {

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

void* current_stream(const Tensor& x) {
  StreamHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_stream(x.get_device_index(), &handle));
  void* stream = nullptr;
  const auto status = torch_stream_native_handle(handle, &stream);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_delete_stream(handle));
  STABLE_TORCH_ERROR_CODE_CHECK(status);
  return stream;
}

void check_launch(const char* op, int status) {
  STD_TORCH_CHECK(status != cudaErrorInvalidValue, op, ": the CUDA kernels take channels in multiples of 16 up to ", kMaxDim,
                  " and codes of int8, int4 or int2");
  STD_TORCH_CHECK(status == cudaSuccess, op, ": ", cudaGetErrorString(static_cast<cudaError_t>(status)));
}

// Checks that every tensor is on the device of the first and begins at an address that 16 divides, as wide loads need.
void check_place(const Tensor& first, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == first.get_device_index(), "expected all tensors on one CUDA device");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
                  "expected tensors that begin at a multiple of 16 bytes: views into others may not");
}
void check_place(const Tensor& first, const MaybeTensor& x) {
  if (x) check_place(first, *x);
}
template <class... Tensors>
void check_places(const Tensor& first, const Tensors&... others) {
  check_place(first, first);
  (check_place(first, others), ...);
}

// Thread blocks per KV head: some two per processor in all, but none with less than a tile for each of its warps.
int splits_for(const Tensor& q, int64_t tokens) {
  int processors = 0;
  check_launch("attend", cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, q.get_device_index()));
  const int64_t pieces = q.size(0) * ((q.size(1) + 7) / 8);  // of KV heads and rows
  const int64_t most = (tokens + 32 * kWarps - 1) / (32 * kWarps);
  return static_cast<int>(std::max<int64_t>(1, std::min(2 * processors / std::max<int64_t>(1, pieces), most)));
}

void quantize_block(const Tensor& x, int64_t hi_bits, int64_t lo_bits, bool per_channel, Tensor high, MaybeTensor low,
                    Tensor scale, Tensor zero) {
  const Dtype dtype = dtype_of("x", x);
  const BlockCodes codes(x, hi_bits, lo_bits, per_channel, high, low, scale, zero);
  check_places(x, high, low, scale, zero);
  const DeviceGuard guard(x.get_device_index());
  check_launch("quantize_block",
               pikv_cuda_quantize_block(x.const_data_ptr(), dtype, codes.matrices, codes.rows, codes.cols,
                                        static_cast<int>(hi_bits), static_cast<int>(lo_bits), per_channel,
                                        mutable_data<uint8_t>(high), low ? mutable_data<uint8_t>(*low) : nullptr,
                                        mutable_data<uint16_t>(scale), mutable_data<uint16_t>(zero), current_stream(x)));
}

void dequantize_block(const Tensor& high, const MaybeTensor& low, const Tensor& scale, const Tensor& zero, int64_t hi_bits,
                      int64_t lo_bits, bool per_channel, Tensor y) {
  check("y", y, ScalarType::Float, std::vector<int64_t>(y.dim(), -1));
  const BlockCodes codes(y, hi_bits, low ? lo_bits : 0, per_channel, high, low, scale, zero);
  check_places(y, high, low, scale, zero);
  const DeviceGuard guard(y.get_device_index());
  check_launch("dequantize_block",
               pikv_cuda_dequantize_block(data<uint8_t>(high), low ? data<uint8_t>(*low) : nullptr, data<uint16_t>(scale),
                                          data<uint16_t>(zero), codes.matrices, codes.rows, codes.cols,
                                          static_cast<int>(hi_bits), static_cast<int>(lo_bits), per_channel,
                                          mutable_data<float>(y), current_stream(y)));
}

// What both attention ops are given and check alike.
struct Attention {
  int64_t groups, rows;
  Keys keys;
  Values values;
  int splits;
  Tensor workspace;

  // count: of whole blocks, or of single tokens.
  Attention(const Tensor& q, const KeyArguments& k, const ValueArguments& v, int64_t count, bool whole, const Tensor& out,
            const Tensor& lse)
      : groups(q.size(0)), rows(q.size(1)), keys(k.view(groups, q.size(2))),
        values(v.view(groups, keys.block_size, out.size(2))), splits(splits_for(q, whole ? count * keys.block_size : count)),
        workspace(torch::stable::new_empty(q, {attend_workspace(groups * rows, values.dim, splits)})) {
    check("q", q, ScalarType::Float, {-1, -1, -1});
    check("out", out, ScalarType::Float, {groups, rows, values.dim});
    check("lse", lse, ScalarType::Float, {groups, rows});
    check_places(q, k.raw, k.high, k.low, k.scale, k.zero, v.raw, v.codes, v.scale, v.zero, out, lse);
  }
};

void attend_blocks(const Tensor& q, const MaybeTensor& k, const MaybeTensor& k_high, const MaybeTensor& k_low,
                   const MaybeTensor& k_scale, const MaybeTensor& k_zero, int64_t hi_bits, int64_t lo_bits,
                   const MaybeTensor& v, const MaybeTensor& v_codes, const MaybeTensor& v_scale, const MaybeTensor& v_zero,
                   int64_t v_bits, const Tensor& block_ids, double softmax_scale, const MaybeTensor& key_positions,
                   const MaybeTensor& query_positions, Tensor out, Tensor lse) {
  const DeviceGuard guard(q.get_device_index());
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const int64_t count = block_ids.numel();
  Attention at(q, {k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}, {v, v_codes, v_scale, v_zero, v_bits}, count, true, out,
               lse);
  STD_TORCH_CHECK(!key_positions == !query_positions, "key_positions, query_positions: expected both or neither");
  if (key_positions) {
    check("key_positions", *key_positions, ScalarType::Long, {count, at.keys.block_size});
    check("query_positions", *query_positions, ScalarType::Long, {at.rows});
  }
  check_places(q, block_ids, key_positions, query_positions);
  check_launch("attend_blocks",
               pikv_cuda_attend_blocks(data<float>(q), at.rows, static_cast<float>(softmax_scale), &at.keys, &at.values,
                                       data<int64_t>(block_ids), count, key_positions ? data<int64_t>(*key_positions) : nullptr,
                                       query_positions ? data<int64_t>(*query_positions) : nullptr, at.splits,
                                       mutable_data<float>(at.workspace), mutable_data<float>(out), mutable_data<float>(lse),
                                       current_stream(q)));
}

void attend_tokens(const Tensor& q, const MaybeTensor& k, const MaybeTensor& k_high, const MaybeTensor& k_low,
                   const MaybeTensor& k_scale, const MaybeTensor& k_zero, int64_t hi_bits, int64_t lo_bits,
                   const MaybeTensor& v, const MaybeTensor& v_codes, const MaybeTensor& v_scale, const MaybeTensor& v_zero,
                   int64_t v_bits, const Tensor& block_ids, const Tensor& offsets, double softmax_scale,
                   const MaybeTensor& read, Tensor out, Tensor lse) {
  const DeviceGuard guard(q.get_device_index());
  check("block_ids", block_ids, ScalarType::Long, {q.size(0), -1});
  const int64_t count = block_ids.size(1);
  check("offsets", offsets, ScalarType::Long, {q.size(0), count});
  if (read) check("read", *read, ScalarType::Bool, {q.size(0), count});
  Attention at(q, {k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}, {v, v_codes, v_scale, v_zero, v_bits}, count, false, out,
               lse);
  check_places(q, block_ids, offsets, read);
  check_launch("attend_tokens",
               pikv_cuda_attend_tokens(data<float>(q), at.rows, static_cast<float>(softmax_scale), &at.keys, &at.values,
                                       data<int64_t>(block_ids), data<int64_t>(offsets), read ? data<bool>(*read) : nullptr,
                                       count, at.splits, mutable_data<float>(at.workspace), mutable_data<float>(out),
                                       mutable_data<float>(lse), current_stream(q)));
}

void score_tokens(const Tensor& q, const MaybeTensor& k, const Tensor& k_high, const Tensor& k_scale, const Tensor& k_zero,
                  int64_t hi_bits, int64_t lo_bits, const Tensor& block_ids, double softmax_scale, Tensor coarse,
                  Tensor radius, Tensor spread) {
  const DeviceGuard guard(q.get_device_index());
  check("q", q, ScalarType::Float, {-1, -1, -1});
  const int64_t groups = q.size(0), rows = q.size(1);
  const MaybeTensor high = k_high, scale = k_scale, zero = k_zero, none;
  const Keys keys = KeyArguments{k, high, none, scale, zero, hi_bits, lo_bits}.view(groups, q.size(2));
  const bool per_head = block_ids.dim() == 2;
  const int64_t count = block_ids.size(block_ids.dim() - 1);
  check("block_ids", block_ids, ScalarType::Long, per_head ? std::vector<int64_t>{groups, count} : std::vector<int64_t>{count});
  check("coarse", coarse, ScalarType::Float, {groups, rows, count, keys.block_size});
  check("radius", radius, ScalarType::Float, {groups, rows, count});
  check("spread", spread, ScalarType::Float, {groups, rows, count});
  check_places(q, k, high, scale, zero, block_ids, coarse, radius, spread);
  check_launch("score_tokens",
               pikv_cuda_score_tokens(data<float>(q), rows, static_cast<float>(softmax_scale), &keys, data<int64_t>(block_ids),
                                      per_head, count, mutable_data<float>(coarse), mutable_data<float>(radius),
                                      mutable_data<float>(spread), current_stream(q)));
}

void score_blocks(const Tensor& q, const Tensor& k_scale, const Tensor& k_zero, int64_t bits, const Tensor& block_ids,
                  double softmax_scale, Tensor bound, Tensor centre, Tensor spread) {
  const DeviceGuard guard(q.get_device_index());
  check("q", q, ScalarType::Float, {-1, -1, -1});
  const int64_t groups = q.size(0), rows = q.size(1), dim = q.size(2);
  check("k_scale", k_scale, ScalarType::Half, {-1, groups, dim});
  check("k_zero", k_zero, ScalarType::Half, {k_scale.size(0), groups, dim});
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const int64_t count = block_ids.numel();
  check("bound", bound, ScalarType::Float, {groups, rows, count});
  check("centre", centre, ScalarType::Float, {groups, rows, count});
  check("spread", spread, ScalarType::Float, {groups, rows, count});
  check_places(q, k_scale, k_zero, block_ids, bound, centre, spread);
  Keys keys{};
  keys.scale = data<uint16_t>(k_scale), keys.zero = data<uint16_t>(k_zero);
  keys.hi_bits = static_cast<int>(bits), keys.groups = groups, keys.dim = dim;
  check_launch("score_blocks",
               pikv_cuda_score_blocks(data<float>(q), rows, static_cast<float>(softmax_scale), &keys, data<int64_t>(block_ids),
                                      count, mutable_data<float>(bound), mutable_data<float>(centre),
                                      mutable_data<float>(spread), current_stream(q)));
}

}  // namespace
}  // namespace pikv::cuda

STABLE_TORCH_LIBRARY_IMPL(pikv, CUDA, m) {
  m.impl("quantize_block_out", TORCH_BOX(&pikv::cuda::quantize_block));
  m.impl("dequantize_block_out", TORCH_BOX(&pikv::cuda::dequantize_block));
  m.impl("attend_blocks_out", TORCH_BOX(&pikv::cuda::attend_blocks));
  m.impl("attend_tokens_out", TORCH_BOX(&pikv::cuda::attend_tokens));
  m.impl("score_tokens_out", TORCH_BOX(&pikv::cuda::score_tokens));
  m.impl("score_blocks_out", TORCH_BOX(&pikv::cuda::score_blocks));
}
