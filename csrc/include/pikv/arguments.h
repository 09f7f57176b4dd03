// Checked tensor arguments as the kernels take them, for the CPU's and CUDA's bindings alike: dtypes, shapes and
// contiguous memory of stored keys and values. Of torch it needs the stable ABI alone.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "pikv/kernels.h"

// A pool's fields as an op's arguments, in the order of the schemas.
#define PIKV_KEY_ARGUMENTS                                                                                       \
  const MaybeTensor &k, const MaybeTensor &k_high, const MaybeTensor &k_low, const MaybeTensor &k_scale,         \
      const MaybeTensor &k_zero, int64_t hi_bits, int64_t lo_bits
#define PIKV_VALUE_ARGUMENTS                                                                               \
  const MaybeTensor &v, const MaybeTensor &v_codes, const MaybeTensor &v_scale, const MaybeTensor &v_zero, \
      int64_t v_bits

// A low-rank part: codes, scale, zero, basis, basis_of; or none.
#define PIKV_KEY_PART_ARGUMENT const std::vector<Tensor>&k_low_rank
#define PIKV_PART_ARGUMENTS PIKV_KEY_PART_ARGUMENT, const std::vector<Tensor>&v_low_rank

namespace pikv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline Dtype dtype_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
  return Dtype::kFloat32;
}

// Checks that x has this dtype, shape (-1: any) and contiguous memory.
inline void check(const char* name, const Tensor& x, ScalarType dtype, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, ": unexpected dtype");
  STD_TORCH_CHECK(x.is_contiguous(), name, ": expected a contiguous tensor");
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(shape.size()), name, ": expected ", shape.size(), " dimensions, got ",
                  x.dim());
  for (size_t i = 0; i < shape.size(); ++i)
    STD_TORCH_CHECK(shape[i] < 0 || x.size(i) == shape[i], name, ": expected size ", shape[i], " in dimension ", i,
                    ", got ", x.size(i));
}

// Whether the rows (last dimension) of x follow each other within its last two dimensions. Strides of a dimension of
// size 1 say nothing.
inline bool rows_follow(const Tensor& x) {
  const int64_t last = x.dim() - 1, channels = x.size(last);
  return x.numel() == 0 ||
         ((channels == 1 || x.stride(last) == 1) && (x.size(last - 1) == 1 || x.stride(last - 1) == channels));
}

// Checks the bits of planes that the kernels can read, and that rows of them are whole bytes.
inline void check_planes(const char* name, int64_t hi_bits, int64_t lo_bits, int64_t channels, int64_t widest) {
  STD_TORCH_CHECK((hi_bits == 2 || hi_bits == 4 || hi_bits == 8) && hi_bits <= widest &&
                      (lo_bits == 0 || (lo_bits == hi_bits && hi_bits < 8)),
                  name, ": no kernel has planes of ", hi_bits, " and ", lo_bits, " bits");
  STD_TORCH_CHECK(channels * hi_bits % 8 == 0, name, ": expected channels whose codes of ", hi_bits,
                  " bits fill bytes, got ", channels);
}

template <class T>
const T* data(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }
template <class T>
T* mutable_data(Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }

struct KeyArguments {
  const MaybeTensor &raw, &high, &low, &scale, &zero;
  int64_t hi_bits, lo_bits;

  Keys view(int64_t groups, int64_t dim) const {
    STD_TORCH_CHECK(raw || high, "keys: expected raw keys or codes");
    const Tensor& first = raw ? *raw : *high;
    STD_TORCH_CHECK(first.dim() == 4, "keys: expected [blocks, groups, block_size, channels]");
    const int64_t blocks = first.size(0), tokens = first.size(2);
    Keys keys{};
    keys.groups = groups, keys.block_size = tokens, keys.dim = dim;
    keys.hi_bits = static_cast<int>(hi_bits), keys.lo_bits = static_cast<int>(lo_bits);
    if (raw) {
      keys.dtype = dtype_of("k", *raw);
      check("k", *raw, raw->scalar_type(), {blocks, groups, tokens, dim});
      keys.raw = raw->const_data_ptr();
    }
    if (high) {
      check_planes("keys", hi_bits, lo_bits, dim, 4);
      check("k_high", *high, ScalarType::Byte, {blocks, groups, tokens, dim * hi_bits / 8});
      STD_TORCH_CHECK(scale && zero, "k_scale, k_zero: expected beside k_high");
      check("k_scale", *scale, ScalarType::Half, {blocks, groups, dim});
      check("k_zero", *zero, ScalarType::Half, {blocks, groups, dim});
      keys.high = data<uint8_t>(*high);
      keys.scale = data<uint16_t>(*scale);
      keys.zero = data<uint16_t>(*zero);
    }
    if (low) {
      check("k_low", *low, ScalarType::Byte, {blocks, groups, tokens, dim * lo_bits / 8});
      keys.low = data<uint8_t>(*low);
    }
    return keys;
  }
};

struct ValueArguments {
  const MaybeTensor &raw, &codes, &scale, &zero;
  int64_t bits;

  Values view(int64_t groups, int64_t tokens, int64_t dim) const {
    STD_TORCH_CHECK(raw || codes, "values: expected raw values or codes");
    Values values{};
    values.groups = groups, values.block_size = tokens, values.dim = dim, values.bits = static_cast<int>(bits);
    if (raw) {
      values.dtype = dtype_of("v", *raw);
      check("v", *raw, raw->scalar_type(), {-1, groups, tokens, dim});
      values.raw = raw->const_data_ptr();
    } else {
      check_planes("values", bits, 0, dim, 8);
      check("v_codes", *codes, ScalarType::Byte, {-1, groups, tokens, dim * bits / 8});
      STD_TORCH_CHECK(scale && zero, "v_scale, v_zero: expected beside v_codes");
      check("v_scale", *scale, ScalarType::Half, {-1, groups, tokens});
      check("v_zero", *zero, ScalarType::Half, {-1, groups, tokens});
      values.codes = data<uint8_t>(*codes);
      values.scale = data<uint16_t>(*scale);
      values.zero = data<uint16_t>(*zero);
    }
    return values;
  }
};

// A low-rank part (codes, scale, zero, basis, basis_of), not empty, of a pool's rows.
inline LowRank low_rank_of(const std::vector<Tensor>& x, int64_t groups, int64_t tokens, int64_t channels) {
  STD_TORCH_CHECK(x.size() == 5, "low-rank part: expected codes, scale, zero, basis, basis_of, got ", x.size(),
                  " tensors");
  STD_TORCH_CHECK(x[3].dim() == 4, "basis: expected [bases, groups, rank, channels]");
  const int64_t bases = x[3].size(0), rank = x[3].size(2), blocks = x[4].numel();
  check("basis", x[3], ScalarType::Float, {bases, groups, rank, channels});
  check("basis_of", x[4], ScalarType::Long, {blocks});
  check("factors", x[0], ScalarType::Byte, {blocks, groups, tokens, rank});
  check("factors' scale", x[1], ScalarType::Half, {blocks, groups, rank});
  check("factors' zero", x[2], ScalarType::Half, {blocks, groups, rank});
  return {data<uint8_t>(x[0]), data<uint16_t>(x[1]), data<uint16_t>(x[2]), data<float>(x[3]), data<int64_t>(x[4]),
          nullptr, rank, bases};
}

// New blocks [count, groups, tokens, channels] for blocks block_ids [count] of a pool, and the pool's fields, checked
// against each other.
struct NewBlocks {
  int64_t count, groups, tokens;
  Keys keys;
  Values values;

  NewBlocks(const Tensor& new_k, const Tensor& new_v, const Tensor& block_ids, PIKV_KEY_ARGUMENTS,
            PIKV_VALUE_ARGUMENTS) {
    check_blocks("new_k", new_k);
    check_blocks("new_v", new_v);
    count = new_k.size(0), groups = new_k.size(1), tokens = new_k.size(2);
    STD_TORCH_CHECK(new_v.size(0) == count && new_v.size(1) == groups && new_v.size(2) == tokens,
                    "new_v: expected the blocks, groups and block_size of new_k");
    keys = KeyArguments{k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}.view(groups, new_k.size(3));
    values = ValueArguments{v, v_codes, v_scale, v_zero, v_bits}.view(groups, tokens, new_v.size(3));
    STD_TORCH_CHECK(keys.block_size == tokens, "new_k: expected blocks of ", keys.block_size, " tokens, got ", tokens);
    STD_TORCH_CHECK(!k || k->scalar_type() == new_k.scalar_type(), "k: expected the dtype of new_k");
    STD_TORCH_CHECK(!v || v->scalar_type() == new_v.scalar_type(), "v: expected the dtype of new_v");
    STD_TORCH_CHECK(!k_high || lo_bits == 0 || k || k_low, "k_low: expected where lo_bits is not 0");
    check("block_ids", block_ids, ScalarType::Long, {count});
  }

 private:
  static void check_blocks(const char* name, const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 4 && rows_follow(x), name,
                    ": expected [blocks, groups, block_size, channels] whose rows follow each other");
  }
};

// The sizes of matrices x [..., tokens, channels] and of their codes, checked against each other. lo_bits: 0 where
// there is no low plane.
struct BlockCodes {
  int64_t rows, cols, matrices, scales, high_bytes, low_bytes;  // of one matrix, but for `matrices`

  BlockCodes(const Tensor& x, int64_t hi_bits, int64_t lo_bits, bool per_channel, const Tensor& high,
             const MaybeTensor& low, const Tensor& scale, const Tensor& zero) {
    STD_TORCH_CHECK(x.is_contiguous() && x.dim() >= 2, "x: expected a contiguous tensor [..., tokens, channels]");
    rows = x.size(x.dim() - 2), cols = x.size(x.dim() - 1), matrices = x.numel() / std::max<int64_t>(1, rows * cols);
    check_planes("x", hi_bits, lo_bits, cols, 8);
    scales = per_channel ? cols : rows;
    high_bytes = rows * cols * hi_bits / 8, low_bytes = rows * cols * lo_bits / 8;
    STD_TORCH_CHECK(high.scalar_type() == ScalarType::Byte && (!low || low->scalar_type() == ScalarType::Byte),
                    "high, low: expected uint8");
    STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Half && zero.scalar_type() == ScalarType::Half,
                    "scale, zero: expected float16");
    STD_TORCH_CHECK(high.is_contiguous() && high.numel() == matrices * high_bytes, "high: unexpected size");
    STD_TORCH_CHECK((lo_bits == 0) == !low, "low: expected exactly where lo_bits is not 0");
    STD_TORCH_CHECK(!low || (low->is_contiguous() && low->numel() == matrices * low_bytes), "low: unexpected size");
    STD_TORCH_CHECK(scale.is_contiguous() && zero.is_contiguous() && scale.numel() == matrices * scales &&
                        zero.numel() == matrices * scales,
                    "scale, zero: unexpected size");
  }
};

}  // namespace pikv
