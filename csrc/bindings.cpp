// torch.ops.pikv.*: checks arguments, splits the work over threads, calls the kernels. Built against torch's stable ABI, so
// one library serves every later torch. Every op writes into tensors that it is given and allocates only small scratch.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "pikv/arguments.h"
#include "pikv/kernels.h"

namespace pikv {
namespace {

std::atomic<const CpuKernels*> chosen{nullptr};

const CpuKernels& kernels() {
  const CpuKernels* set = chosen.load();
  if (!set) chosen.store(set = choose_kernels(nullptr));
  return *set;
}

// Makes the named kernel set run from now on ("auto": the widest this processor has); returns its name.
std::string use_kernels(std::string name) {
  const CpuKernels* set = choose_kernels(name == "auto" ? nullptr : name.c_str());
  STD_TORCH_CHECK(set, "kernel set: this processor or build has no '", name, "', expected auto, scalar, avx2 or avx512");
  chosen.store(set);
  return set->name;
}

// q [G, R, D] float32 as rows of padded(D), times `factor`.
std::vector<float> padded_queries(const Tensor& q, float factor) {
  check("q", q, ScalarType::Float, {-1, -1, -1});
  const int64_t rows = q.size(0) * q.size(1), dim = q.size(2), stride = padded(dim);
  std::vector<float> out(rows * stride, 0.0f);
  const float* from = data<float>(q);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < dim; ++d) out[r * stride + d] = from[r * dim + d] * factor;
  return out;
}

void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t blocks) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < blocks, name, ": expected 0 .. ", blocks - 1, ", got ", ids[i]);
}

// Partials of one piece of the work, for `rows` rows in all.
struct PartialMemory {
  std::vector<float> out, high, total;
  PartialMemory(int64_t rows, int64_t dim)
      : out(rows * dim, 0.0f), high(rows, -std::numeric_limits<float>::infinity()), total(rows, 0.0f) {}
  Partial at(int64_t row, int64_t dim) { return {out.data() + row * dim, high.data() + row, total.data() + row}; }
};

// Merges pieces of rows [0, rows) into out [rows, dim] and lse [rows].
void merge(std::vector<PartialMemory>& pieces, int64_t rows, int64_t dim, float* out, float* lse) {
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float high = -std::numeric_limits<float>::infinity(), total = 0.0f;
      for (const PartialMemory& piece : pieces) high = std::max(high, piece.high[r]);
      float* row = out + r * dim;
      std::fill(row, row + dim, 0.0f);
      if (std::isinf(high)) {
        lse[r] = high;
        continue;
      }
      for (const PartialMemory& piece : pieces) {
        const float share = std::exp(piece.high[r] - high);
        total += share * piece.total[r];
        for (int64_t e = 0; e < dim; ++e) row[e] += share * piece.out[r * dim + e];
      }
      for (int64_t e = 0; e < dim; ++e) row[e] /= total;
      lse[r] = high + std::log(total);
    }
  });
}

int64_t pieces_for(int64_t work, int64_t least) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(work / least, threads == 1 ? 1 : 4 * threads));
}

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

void attend_blocks(const Tensor& q, const MaybeTensor& k, const MaybeTensor& k_high, const MaybeTensor& k_low,
                   const MaybeTensor& k_scale, const MaybeTensor& k_zero, int64_t hi_bits, int64_t lo_bits,
                   const MaybeTensor& v, const MaybeTensor& v_codes, const MaybeTensor& v_scale, const MaybeTensor& v_zero,
                   int64_t v_bits, const Tensor& block_ids, double softmax_scale, const MaybeTensor& key_positions,
                   const MaybeTensor& query_positions, Tensor out, Tensor lse) {
  const std::vector<float> queries = padded_queries(q, static_cast<float>(softmax_scale));
  const int64_t groups = q.size(0), rows = q.size(1), value_dim = out.size(2);
  const Keys keys = KeyArguments{k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}.view(groups, q.size(2));
  const Values values = ValueArguments{v, v_codes, v_scale, v_zero, v_bits}.view(groups, keys.block_size, value_dim);
  check("block_ids", block_ids, ScalarType::Long, {-1});
  check("out", out, ScalarType::Float, {groups, rows, value_dim});
  check("lse", lse, ScalarType::Float, {groups, rows});
  STD_TORCH_CHECK(!key_positions == !query_positions, "key_positions, query_positions: expected both or neither");
  const int64_t count = block_ids.numel();
  if (key_positions) {
    check("key_positions", *key_positions, ScalarType::Long, {count, keys.block_size});
    check("query_positions", *query_positions, ScalarType::Long, {rows});
  }
  const int64_t* ids = data<int64_t>(block_ids);
  check_ids("block_ids", ids, count, (k ? *k : *k_high).size(0));
  const CpuKernels& set = kernels();
  const int64_t pieces = pieces_for(count, 8);
  std::vector<PartialMemory> partials(pieces, PartialMemory(groups * rows, value_dim));
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = count * i / pieces, last = count * (i + 1) / pieces;
      set.attend_blocks(queries.data(), rows, keys, values, ids + first, last - first,
                        key_positions ? data<int64_t>(*key_positions) + first * keys.block_size : nullptr,
                        query_positions ? data<int64_t>(*query_positions) : nullptr, partials[i].at(0, value_dim));
    }
  });
  merge(partials, groups * rows, value_dim, mutable_data<float>(out), mutable_data<float>(lse));
}

void attend_tokens(const Tensor& q, const MaybeTensor& k, const MaybeTensor& k_high, const MaybeTensor& k_low,
                   const MaybeTensor& k_scale, const MaybeTensor& k_zero, int64_t hi_bits, int64_t lo_bits,
                   const MaybeTensor& v, const MaybeTensor& v_codes, const MaybeTensor& v_scale, const MaybeTensor& v_zero,
                   int64_t v_bits, const Tensor& block_ids, const Tensor& offsets, double softmax_scale,
                   const MaybeTensor& read, Tensor out, Tensor lse) {
  const std::vector<float> queries = padded_queries(q, static_cast<float>(softmax_scale));
  const int64_t groups = q.size(0), rows = q.size(1), value_dim = out.size(2), stride = padded(q.size(2));
  const Keys keys = KeyArguments{k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}.view(groups, q.size(2));
  const Values values = ValueArguments{v, v_codes, v_scale, v_zero, v_bits}.view(groups, keys.block_size, value_dim);
  check("block_ids", block_ids, ScalarType::Long, {groups, -1});
  const int64_t count = block_ids.size(1);
  check("offsets", offsets, ScalarType::Long, {groups, count});
  if (read) check("read", *read, ScalarType::Bool, {groups, count});
  check("out", out, ScalarType::Float, {groups, rows, value_dim});
  check("lse", lse, ScalarType::Float, {groups, rows});
  check_ids("block_ids", data<int64_t>(block_ids), groups * count, (k ? *k : *k_high).size(0));
  check_ids("offsets", data<int64_t>(offsets), groups * count, keys.block_size);
  const CpuKernels& set = kernels();
  const int64_t pieces = pieces_for(count, 128);
  std::vector<PartialMemory> partials(pieces, PartialMemory(groups * rows, value_dim));
  torch::stable::parallel_for(0, pieces * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i % groups, piece = i / groups;
      const int64_t first = count * piece / pieces, last = count * (piece + 1) / pieces, at = head * count + first;
      set.attend_tokens(queries.data() + head * rows * stride, rows, keys, values, data<int64_t>(block_ids) + at,
                        data<int64_t>(offsets) + at, read ? data<bool>(*read) + at : nullptr, last - first, head,
                        partials[piece].at(head * rows, value_dim));
    }
  });
  merge(partials, groups * rows, value_dim, mutable_data<float>(out), mutable_data<float>(lse));
}

void score_tokens(const Tensor& q, const MaybeTensor& k, const Tensor& k_high, const Tensor& k_scale, const Tensor& k_zero,
                  int64_t hi_bits, int64_t lo_bits, const Tensor& block_ids, double softmax_scale, Tensor coarse,
                  Tensor radius, Tensor spread) {
  const std::vector<float> queries = padded_queries(q, static_cast<float>(softmax_scale));
  const int64_t groups = q.size(0), rows = q.size(1), stride = padded(q.size(2));
  const MaybeTensor high = k_high, scale = k_scale, zero = k_zero, none;
  const Keys keys = KeyArguments{k, high, none, scale, zero, hi_bits, lo_bits}.view(groups, q.size(2));
  const bool per_head = block_ids.dim() == 2;
  const int64_t count = block_ids.size(block_ids.dim() - 1);
  check("block_ids", block_ids, ScalarType::Long, per_head ? std::vector<int64_t>{groups, count} : std::vector<int64_t>{count});
  check("coarse", coarse, ScalarType::Float, {groups, rows, count, keys.block_size});
  check("radius", radius, ScalarType::Float, {groups, rows, count});
  check("spread", spread, ScalarType::Float, {groups, rows, count});
  const int64_t* ids = data<int64_t>(block_ids);
  check_ids("block_ids", ids, block_ids.numel(), k_high.size(0));
  const CpuKernels& set = kernels();
  const int64_t pieces = pieces_for(count, 8);
  torch::stable::parallel_for(0, pieces * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i % groups, piece = i / groups;
      const int64_t first = count * piece / pieces, last = count * (piece + 1) / pieces;
      const int64_t at = head * rows * count + first;
      set.score_tokens(queries.data() + head * rows * stride, rows, keys, ids + (per_head ? head * count : 0) + first,
                       last - first, head, mutable_data<float>(coarse) + at * keys.block_size,
                       mutable_data<float>(radius) + at, mutable_data<float>(spread) + at, count);
    }
  });
}

void score_blocks(const Tensor& q, const Tensor& k_scale, const Tensor& k_zero, int64_t bits, const Tensor& block_ids,
                  double softmax_scale, Tensor bound, Tensor centre, Tensor spread) {
  const std::vector<float> queries = padded_queries(q, static_cast<float>(softmax_scale));
  const int64_t groups = q.size(0), rows = q.size(1), dim = q.size(2), stride = padded(dim);
  check("k_scale", k_scale, ScalarType::Half, {-1, groups, dim});
  check("k_zero", k_zero, ScalarType::Half, {k_scale.size(0), groups, dim});
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const int64_t count = block_ids.numel();
  check("bound", bound, ScalarType::Float, {groups, rows, count});
  check("centre", centre, ScalarType::Float, {groups, rows, count});
  check("spread", spread, ScalarType::Float, {groups, rows, count});
  check_ids("block_ids", data<int64_t>(block_ids), count, k_scale.size(0));
  Keys keys{};
  keys.scale = data<uint16_t>(k_scale), keys.zero = data<uint16_t>(k_zero);
  keys.hi_bits = static_cast<int>(bits), keys.groups = groups, keys.dim = dim;
  const CpuKernels& set = kernels();
  const int64_t pieces = pieces_for(count, 64);
  torch::stable::parallel_for(0, pieces * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i % groups, piece = i / groups;
      const int64_t first = count * piece / pieces, last = count * (piece + 1) / pieces;
      set.score_blocks(queries.data() + head * rows * stride, rows, keys, data<int64_t>(block_ids) + first, last - first, head,
                       mutable_data<float>(bound) + head * rows * count + first,
                       mutable_data<float>(centre) + head * rows * count + first,
                       mutable_data<float>(spread) + head * rows * count + first, count);
    }
  });
}

}  // namespace
}  // namespace pikv

#define PIKV_KEYS "Tensor? k, Tensor? k_high, Tensor? k_low, Tensor? k_scale, Tensor? k_zero, int hi_bits, int lo_bits"
#define PIKV_VALUES "Tensor? v, Tensor? v_codes, Tensor? v_scale, Tensor? v_zero, int v_bits"

STABLE_TORCH_LIBRARY(pikv, m) {
  m.def("use_kernels(str name) -> str");
  m.def("quantize_block_out(Tensor x, int hi_bits, int lo_bits, bool per_channel, Tensor(a!) high, Tensor(b!)? low, "
        "Tensor(c!) scale, Tensor(d!) zero) -> ()");
  m.def("dequantize_block_out(Tensor high, Tensor? low, Tensor scale, Tensor zero, int hi_bits, int lo_bits, "
        "bool per_channel, Tensor(a!) y) -> ()");
  m.def("attend_blocks_out(Tensor q, " PIKV_KEYS ", " PIKV_VALUES ", Tensor block_ids, float softmax_scale, "
        "Tensor? key_positions, Tensor? query_positions, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("attend_tokens_out(Tensor q, " PIKV_KEYS ", " PIKV_VALUES ", Tensor block_ids, Tensor offsets, "
        "float softmax_scale, Tensor? read, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("score_tokens_out(Tensor q, Tensor? k, Tensor k_high, Tensor k_scale, Tensor k_zero, int hi_bits, int lo_bits, "
        "Tensor block_ids, float softmax_scale, Tensor(a!) coarse, Tensor(b!) radius, Tensor(c!) spread) -> ()");
  m.def("score_blocks_out(Tensor q, Tensor k_scale, Tensor k_zero, int bits, Tensor block_ids, float softmax_scale, "
        "Tensor(a!) bound, Tensor(b!) centre, Tensor(c!) spread) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pikv, CompositeExplicitAutograd, m) { m.impl("use_kernels", TORCH_BOX(&pikv::use_kernels)); }

STABLE_TORCH_LIBRARY_IMPL(pikv, CPU, m) {
  m.impl("quantize_block_out", TORCH_BOX(&pikv::quantize_block));
  m.impl("dequantize_block_out", TORCH_BOX(&pikv::dequantize_block));
  m.impl("attend_blocks_out", TORCH_BOX(&pikv::attend_blocks));
  m.impl("attend_tokens_out", TORCH_BOX(&pikv::attend_tokens));
  m.impl("score_tokens_out", TORCH_BOX(&pikv::score_tokens));
  m.impl("score_blocks_out", TORCH_BOX(&pikv::score_blocks));
}
