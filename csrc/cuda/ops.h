// What the CUDA side of torch.ops.pikv.* shares: places and streams of tensors, stored and raw keys and values as the
// launchers take them. csrc/cuda/bindings.cpp registers the ops that are declared here.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "device.h"
#include "pikv/arguments.h"
#include "pikv/cuda.h"

// The stored keys and values of an op, in the order of the schemas.
#define PIKV_STORED_ARGUMENTS PIKV_KEY_ARGUMENTS, PIKV_VALUE_ARGUMENTS, PIKV_PART_ARGUMENTS

namespace pikv::cuda {

void quantize_block(const Tensor& x, int64_t hi_bits, int64_t lo_bits, bool per_channel, Tensor high, MaybeTensor low,
                    Tensor scale, Tensor zero);
void dequantize_block(const Tensor& high, const MaybeTensor& low, const Tensor& scale, const Tensor& zero,
                      int64_t hi_bits, int64_t lo_bits, bool per_channel, Tensor y);
void append(const Tensor& new_k, const Tensor& new_v, const Tensor& block_ids, PIKV_KEY_ARGUMENTS,
            PIKV_VALUE_ARGUMENTS);
void prefetch(const Tensor& field, const Tensor& block_ids);

void attend_blocks(const Tensor& q, PIKV_STORED_ARGUMENTS, const Tensor& block_ids, double softmax_scale,
                   const MaybeTensor& key_positions, const MaybeTensor& query_positions, Tensor out, Tensor lse);
void attend_decode(const Tensor& q, const Tensor& raw_k, const Tensor& raw_v, const Tensor& slots,
                   const Tensor& raw_first, const Tensor& raw_last, PIKV_STORED_ARGUMENTS, const Tensor& block_ids,
                   const Tensor& first_blocks, double softmax_scale, Tensor out, Tensor lse);
void attend_ragged(const Tensor& q, PIKV_STORED_ARGUMENTS, const Tensor& block_ids, const Tensor& first_blocks,
                   double softmax_scale, Tensor out, Tensor lse);
void attend_tokens(const Tensor& q, PIKV_STORED_ARGUMENTS, const Tensor& block_ids, const Tensor& offsets,
                   const Tensor& first_tokens, double softmax_scale, const MaybeTensor& read, Tensor out, Tensor lse);
void merge_partials(const Tensor& outs, const Tensor& lses, Tensor out, Tensor lse);

void attend_at(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& key_positions,
               const MaybeTensor& query_positions, double softmax_scale, Tensor out, Tensor lse);
void attend_windows(const Tensor& q, const Tensor& raw_k, const Tensor& raw_v, const Tensor& slots,
                    const Tensor& raw_first, const Tensor& raw_last, double softmax_scale, Tensor out, Tensor lse);
void window_importance(const Tensor& q, const Tensor& lse, const Tensor& raw_k, const Tensor& slots,
                       const Tensor& raw_first, const Tensor& raw_last, double softmax_scale, Tensor importance);
void prompt_importance(const Tensor& q, const Tensor& lse, const Tensor& k, int64_t query_tokens, double softmax_scale,
                       Tensor importance);

void score_tokens(const Tensor& q, const MaybeTensor& k, const Tensor& k_high, const Tensor& k_scale,
                  const Tensor& k_zero, int64_t hi_bits, int64_t lo_bits, const Tensor& block_ids,
                  const Tensor& first_blocks, double softmax_scale, Tensor coarse, Tensor radius, Tensor spread);
void score_blocks(const Tensor& q, const Tensor& k_scale, const Tensor& k_zero, int64_t bits, const Tensor& block_ids,
                  const Tensor& first_blocks, double softmax_scale, Tensor bound, Tensor centre, Tensor spread);
void key_logits(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_KEY_PART_ARGUMENT, const Tensor& block_ids,
                const Tensor& first_blocks, double softmax_scale, Tensor logits);
void token_importance(const Tensor& q, const Tensor& lse, PIKV_KEY_ARGUMENTS, PIKV_KEY_PART_ARGUMENT,
                      const Tensor& block_ids, const Tensor& first_blocks, double softmax_scale, Tensor importance);
void rank_tokens(const Tensor& coarse, const Tensor& raw_lse, const Tensor& first_tokens, Tensor rank);
void select_topk(const Tensor& scores, const Tensor& first_tokens, const Tensor& first_chosen, Tensor indices);

void select_mass(const Tensor& order, const Tensor& if_unread, const Tensor& if_read, const Tensor& raw_lse,
                 const Tensor& first_tokens, double epsilon, Tensor read);
void unread_mass(const Tensor& coarse, double slope, const Tensor& spread, const Tensor& radius, const Tensor& read,
                 const Tensor& first_blocks, Tensor by_spread, Tensor by_radius);

// ---- shared

inline void check_launch(const char* op, int status) {
  STD_TORCH_CHECK(status != kInvalidValue, op, ": the CUDA kernels take channels in multiples of 16 up to ", kMaxDim,
                  " and codes of int8, int4 or int2");
  STD_TORCH_CHECK(status == 0, op, ": ", error_text(status));
}

inline void check_place(const Tensor& first, const Tensor& x) {
  STD_TORCH_CHECK(on_one_device(first, x), "expected all tensors on one CUDA device");
}
inline void check_place(const Tensor& first, const MaybeTensor& x) {
  if (x) check_place(first, *x);
}
// Checks that every tensor is on the device of the first.
template <class... Tensors>
void check_places(const Tensor& first, const Tensors&... others) {
  (check_place(first, others), ...);
}

inline void check_wide(const Tensor& x) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
                  "expected tensors that begin at a multiple of 16 bytes, as views into others may not");
}
inline void check_wide(const MaybeTensor& x) {
  if (x) check_wide(*x);
}
// Checks that tensors are on the device of the first and begin where 16 bytes can be read at once.
template <class... Tensors>
void check_wide_places(const Tensor& first, const Tensors&... others) {
  check_places(first, others...);
  (check_wide(others), ...);
}

// Checks raw tokens [G, S, channels] outside pools, or [slots, G, C, channels], whose rows follow each other.
inline void check_raw(const char* name, const Tensor& x, bool one_slot, int64_t groups, int64_t channels) {
  const int64_t dims = one_slot ? 3 : 4;
  STD_TORCH_CHECK(x.dim() == dims && x.size(dims - 3) == groups && x.size(dims - 1) == channels, name, ": expected [",
                  one_slot ? "" : "slots, ", groups, ", tokens, ", channels, "]");
  STD_TORCH_CHECK(rows_follow(x) && x.stride(0) % channels == 0 && x.stride(dims - 3) % channels == 0, name,
                  ": expected rows that follow each other");
}
// Rows from one entry of a dimension of raw tokens to the next.
inline int64_t rows_apart(const Tensor& x, int64_t dimension) {
  return x.stride(dimension) / std::max<int64_t>(1, x.size(x.dim() - 1));
}

inline Keys raw_keys(const char* name, const Tensor& k) {
  const int64_t at = k.dim() - 3;
  Keys keys{};
  keys.raw = k.const_data_ptr(), keys.dtype = dtype_of(name, k);
  keys.groups = k.size(at), keys.block_size = k.size(at + 1), keys.dim = k.size(at + 2);
  return keys;
}

// A packed list's runs, on q's device.
inline Runs runs_of(const char* name, const Tensor& q, const Tensor& first, int64_t requests, int64_t count) {
  check(name, first, ScalarType::Long, {requests + 1});
  check_place(q, first);
  return {data<int64_t>(first), requests, count};
}

// Which raw tokens of a buffer k [slots, G, C, channels] are each request's, on q's device.
inline Windows windows_of(const Tensor& q, const Tensor& k, const Tensor& slots, const Tensor& raw_first,
                          const Tensor& raw_last) {
  check("slots", slots, ScalarType::Long, {q.size(0)});
  check("raw_first", raw_first, ScalarType::Long, {q.size(0)});
  check("raw_last", raw_last, ScalarType::Long, {q.size(0)});
  check_places(q, slots, raw_first, raw_last);
  return {data<int64_t>(slots), data<int64_t>(raw_first), data<int64_t>(raw_last), rows_apart(k, 0),
          rows_apart(k, 1)};
}

// The stored keys of q's KV heads, of a pool on q's device.
inline Keys stored_keys(const Tensor& q, PIKV_KEY_ARGUMENTS) {
  check_wide_places(q, k, k_high, k_low, k_scale, k_zero);
  return KeyArguments{k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}.view(q.size(q.dim() - 3),
                                                                                q.size(q.dim() - 1));
}
#define PIKV_STORED_KEYS(q) stored_keys(q, k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits)

// A low-rank part, not empty, on q's device.
inline LowRank placed_part(const Tensor& q, const std::vector<Tensor>& x, int64_t groups, int64_t tokens,
                           int64_t channels) {
  const LowRank part = low_rank_of(x, groups, tokens, channels);
  STD_TORCH_CHECK(part.rank >= 1 && part.rank <= kMaxDim, "low-rank part: expected a rank of 1 .. ", kMaxDim, ", got ",
                  part.rank);
  for (const Tensor& field : x) check_place(q, field);
  return part;
}

// Brings q [requests, G, R, D], or [G, R, D], to the bases of the keys' part and says there where that is: in the
// tensor that it returns.
Tensor project_queries(const char* op, const Tensor& q, double softmax_scale, const Keys& keys, LowRank& part);

// Logits [G, R, count * B] of blocks from whole keys, with their low-rank part where there is one.
void put_logits(const char* op, const Tensor& q, double softmax_scale, Keys keys, const std::vector<Tensor>& low_rank,
                const Tensor& block_ids, const Runs& blocks, float* logits);

template <class T>
const T* data(const MaybeTensor& x) {
  return x ? pikv::data<T>(*x) : nullptr;
}
using pikv::data;

}  // namespace pikv::cuda
