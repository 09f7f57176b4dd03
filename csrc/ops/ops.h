// The CPU ops behind torch.ops.pikv.*: what csrc/bindings.cpp registers. Every op checks its arguments, splits the work
// over threads and calls the kernels; it writes into tensors that it is given and allocates only scratch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pikv/arguments.h"

// The stored keys and values of an op, in the order of the schemas.
#define PIKV_STORED_ARGUMENTS PIKV_KEY_ARGUMENTS, PIKV_VALUE_ARGUMENTS, PIKV_PART_ARGUMENTS

namespace pikv {

std::string use_kernels(std::string name);

void quantize_block(const Tensor& x, int64_t hi_bits, int64_t lo_bits, bool per_channel, Tensor high, MaybeTensor low,
                    Tensor scale, Tensor zero);
void dequantize_block(const Tensor& high, const MaybeTensor& low, const Tensor& scale, const Tensor& zero,
                      int64_t hi_bits, int64_t lo_bits, bool per_channel, Tensor y);
void append(const Tensor& new_k, const Tensor& new_v, const Tensor& block_ids, MaybeTensor k, MaybeTensor k_high,
            MaybeTensor k_low, MaybeTensor k_scale, MaybeTensor k_zero, int64_t hi_bits, int64_t lo_bits, MaybeTensor v,
            MaybeTensor v_codes, MaybeTensor v_scale, MaybeTensor v_zero, int64_t v_bits);
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

void attend_mass(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_VALUE_ARGUMENTS, const Tensor& block_ids,
                 const Tensor& first_blocks, const Tensor& coarse, double slope, const Tensor& extra,
                 const Tensor& raw_lse, double epsilon, double softmax_scale, Tensor out, Tensor lse, Tensor read);
void select_mass(const Tensor& order, const Tensor& if_unread, const Tensor& if_read, const Tensor& raw_lse,
                 const Tensor& first_tokens, double epsilon, Tensor read);
void unread_mass(const Tensor& coarse, double slope, const Tensor& spread, const Tensor& radius, const Tensor& read,
                 const Tensor& first_blocks, Tensor by_spread, Tensor by_radius);

}  // namespace pikv
