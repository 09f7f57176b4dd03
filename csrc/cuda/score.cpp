// The ops on CUDA that say what to read.

#include "ops.h"

namespace pikv::cuda {

void score_tokens(const Tensor& q, const MaybeTensor& k, const Tensor& k_high, const Tensor& k_scale,
                  const Tensor& k_zero, int64_t hi_bits, int64_t lo_bits, const Tensor& block_ids,
                  const Tensor& first_blocks, double softmax_scale, Tensor coarse, Tensor radius, Tensor spread) {
  const DeviceGuard guard(q.get_device_index());
  check("q", q, ScalarType::Float, {-1, -1, -1, -1});
  const int64_t groups = q.size(1), rows = q.size(2);
  const MaybeTensor high = k_high, scale = k_scale, zero = k_zero, none;
  const Keys keys = KeyArguments{k, high, none, scale, zero, hi_bits, lo_bits}.view(groups, q.size(3));
  const bool per_head = block_ids.dim() == 2;
  const int64_t count = block_ids.size(block_ids.dim() - 1);
  check("block_ids", block_ids, ScalarType::Long,
        per_head ? std::vector<int64_t>{groups, count} : std::vector<int64_t>{count});
  check("coarse", coarse, ScalarType::Float, {groups, rows, count, keys.block_size});
  check("radius", radius, ScalarType::Float, {groups, rows, count});
  check("spread", spread, ScalarType::Float, {groups, rows, count});
  const Runs blocks = runs_of("first_blocks", q, first_blocks, q.size(0), count);
  check_wide_places(q, high, scale, zero);
  check_places(q, k, block_ids, coarse, radius, spread);
  check_launch("score_tokens",
               pikv_cuda_score_tokens(data<float>(q), rows, static_cast<float>(softmax_scale), &keys,
                                      data<int64_t>(block_ids), per_head, &blocks, mutable_data<float>(coarse),
                                      mutable_data<float>(radius), mutable_data<float>(spread), current_stream(q)));
}

void score_blocks(const Tensor& q, const Tensor& k_scale, const Tensor& k_zero, int64_t bits, const Tensor& block_ids,
                  const Tensor& first_blocks, double softmax_scale, Tensor bound, Tensor centre, Tensor spread) {
  const DeviceGuard guard(q.get_device_index());
  check("q", q, ScalarType::Float, {-1, -1, -1, -1});
  const int64_t groups = q.size(1), rows = q.size(2), dim = q.size(3);
  check("k_scale", k_scale, ScalarType::Half, {-1, groups, dim});
  check("k_zero", k_zero, ScalarType::Half, {k_scale.size(0), groups, dim});
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const int64_t count = block_ids.numel();
  check("bound", bound, ScalarType::Float, {groups, rows, count});
  check("centre", centre, ScalarType::Float, {groups, rows, count});
  check("spread", spread, ScalarType::Float, {groups, rows, count});
  const Runs blocks = runs_of("first_blocks", q, first_blocks, q.size(0), count);
  check_wide_places(q, k_scale, k_zero);
  check_places(q, block_ids, bound, centre, spread);
  Keys keys{};
  keys.scale = data<uint16_t>(k_scale), keys.zero = data<uint16_t>(k_zero);
  keys.hi_bits = static_cast<int>(bits), keys.groups = groups, keys.dim = dim;
  check_launch("score_blocks",
               pikv_cuda_score_blocks(data<float>(q), rows, static_cast<float>(softmax_scale), &keys,
                                      data<int64_t>(block_ids), &blocks, mutable_data<float>(bound),
                                      mutable_data<float>(centre), mutable_data<float>(spread), current_stream(q)));
}

Tensor project_queries(const char* op, const Tensor& q, double softmax_scale, const Keys& keys, LowRank& part) {
  const int64_t requests = q.dim() == 4 ? q.size(0) : 1, rows = q.size(q.dim() - 2);
  Tensor projected = torch::stable::new_empty(q, {part.bases * keys.groups * requests * rows * part.rank});
  part.projected = mutable_data<float>(projected);
  check_launch(op, pikv_cuda_project_queries(data<float>(q), requests, rows, static_cast<float>(softmax_scale),
                                             keys.groups, keys.dim, &part, mutable_data<float>(projected),
                                             current_stream(q)));
  return projected;
}

void put_logits(const char* op, const Tensor& q, double softmax_scale, Keys keys, const std::vector<Tensor>& low_rank,
                const Tensor& block_ids, const Runs& blocks, float* logits) {
  const int64_t rows = q.size(2);
  check_launch(op, pikv_cuda_key_logits(data<float>(q), rows, static_cast<float>(softmax_scale), &keys,
                                        data<int64_t>(block_ids), &blocks, logits, current_stream(q)));
  if (low_rank.empty()) return;
  LowRank part = placed_part(q, low_rank, keys.groups, keys.block_size, keys.dim);
  const Tensor projected = project_queries(op, q, softmax_scale, keys, part);
  keys.low_rank = &part;
  check_launch(op,
               pikv_cuda_low_rank_logits(rows, &keys, data<int64_t>(block_ids), &blocks, logits, current_stream(q)));
}

void key_logits(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_KEY_PART_ARGUMENT, const Tensor& block_ids,
                const Tensor& first_blocks, double softmax_scale, Tensor logits) {
  check("q", q, ScalarType::Float, {-1, -1, -1, -1});
  const DeviceGuard guard(q.get_device_index());
  const Keys keys = PIKV_STORED_KEYS(q);
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const Runs blocks = runs_of("first_blocks", q, first_blocks, q.size(0), block_ids.numel());
  check("logits", logits, ScalarType::Float, {keys.groups, q.size(2), blocks.count * keys.block_size});
  check_places(q, block_ids, logits);
  put_logits("key_logits", q, softmax_scale, keys, k_low_rank, block_ids, blocks, mutable_data<float>(logits));
}

void token_importance(const Tensor& q, const Tensor& lse, PIKV_KEY_ARGUMENTS, PIKV_KEY_PART_ARGUMENT,
                      const Tensor& block_ids, const Tensor& first_blocks, double softmax_scale, Tensor importance) {
  check("q", q, ScalarType::Float, {-1, -1, -1, -1});
  const DeviceGuard guard(q.get_device_index());
  const Keys keys = PIKV_STORED_KEYS(q);
  const int64_t requests = q.size(0), rows = q.size(2), size = keys.block_size;
  check("lse", lse, ScalarType::Float, {requests, keys.groups, rows});
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const Runs blocks = runs_of("first_blocks", q, first_blocks, requests, block_ids.numel());
  check("importance", importance, ScalarType::Float, {blocks.count, size});
  check_places(q, lse, block_ids, importance);
  float* to = mutable_data<float>(importance);
  if (k_low_rank.empty()) {
    check_launch("token_importance",
                 pikv_cuda_token_importance(data<float>(q), data<float>(lse), rows, static_cast<float>(softmax_scale),
                                            &keys, data<int64_t>(block_ids), &blocks, to, current_stream(q)));
    return;
  }
  Tensor logits = torch::stable::new_empty(q, {keys.groups * rows * blocks.count * size});
  put_logits("token_importance", q, softmax_scale, keys, k_low_rank, block_ids, blocks, mutable_data<float>(logits));
  check_launch("token_importance",
               pikv_cuda_logits_importance(data<float>(logits), data<float>(lse), keys.groups * rows, &blocks, size, to,
                                           current_stream(q)));
}

void window_importance(const Tensor& q, const Tensor& lse, const Tensor& raw_k, const Tensor& slots,
                       const Tensor& raw_first, const Tensor& raw_last, double softmax_scale, Tensor importance) {
  check("q", q, ScalarType::Float, {-1, -1, -1, -1});
  const DeviceGuard guard(q.get_device_index());
  const int64_t requests = q.size(0), rows = q.size(2);
  check_raw("raw_k", raw_k, false, q.size(1), q.size(3));
  const Windows windows = windows_of(q, raw_k, slots, raw_first, raw_last);
  const Keys keys = raw_keys("raw_k", raw_k);
  check("lse", lse, ScalarType::Float, {requests, keys.groups, rows});
  check("importance", importance, ScalarType::Float, {requests, keys.block_size});
  check_wide_places(q, raw_k);
  check_places(q, lse, importance);
  check_launch("window_importance",
               pikv_cuda_window_importance(data<float>(q), data<float>(lse), requests, rows,
                                           static_cast<float>(softmax_scale), &keys, &windows,
                                           mutable_data<float>(importance), current_stream(q)));
}

void prompt_importance(const Tensor& q, const Tensor& lse, const Tensor& k, int64_t query_tokens, double softmax_scale,
                       Tensor importance) {
  check("q", q, ScalarType::Float, {-1, -1, -1});
  const DeviceGuard guard(q.get_device_index());
  check_raw("k", k, true, q.size(0), q.size(2));
  const int64_t rows = q.size(1);
  STD_TORCH_CHECK(query_tokens >= 1 && rows % query_tokens == 0 && query_tokens <= k.size(1),
                  "query_tokens: expected a divisor of the rows and at most ", k.size(1), ", got ", query_tokens);
  const Keys keys = raw_keys("k", k);
  check("lse", lse, ScalarType::Float, {keys.groups, rows});
  check("importance", importance, ScalarType::Float, {k.size(1)});
  check_wide_places(q, k);
  check_places(q, lse, importance);
  check_launch("prompt_importance",
               pikv_cuda_prompt_importance(data<float>(q), data<float>(lse), rows, static_cast<float>(softmax_scale),
                                           &keys, rows_apart(k, 0), query_tokens, mutable_data<float>(importance),
                                           current_stream(q)));
}

void rank_tokens(const Tensor& coarse, const Tensor& raw_lse, const Tensor& first_tokens, Tensor rank) {
  check("coarse", coarse, ScalarType::Float, {-1, -1, -1});
  const DeviceGuard guard(coarse.get_device_index());
  const int64_t groups = coarse.size(0), rows = coarse.size(1), count = coarse.size(2);
  check("raw_lse", raw_lse, ScalarType::Float, {-1, groups, rows});
  check("rank", rank, ScalarType::Float, {groups, count});
  const Runs tokens = runs_of("first_tokens", coarse, first_tokens, raw_lse.size(0), count);
  check_places(coarse, raw_lse, rank);
  Tensor workspace = torch::stable::new_empty(coarse, {raw_lse.numel()});
  check_launch("rank_tokens", pikv_cuda_rank_tokens(data<float>(coarse), data<float>(raw_lse), groups, rows, &tokens,
                                                    mutable_data<float>(workspace), mutable_data<float>(rank),
                                                    current_stream(coarse)));
}

void select_topk(const Tensor& scores, const Tensor& first_tokens, const Tensor& first_chosen, Tensor indices) {
  check("scores", scores, ScalarType::Float, {-1, -1});
  const DeviceGuard guard(scores.get_device_index());
  check("indices", indices, ScalarType::Long, {scores.size(0), -1});
  STD_TORCH_CHECK(first_tokens.dim() == 1 && first_tokens.size(0) >= 1, "first_tokens: expected [requests + 1]");
  const int64_t requests = first_tokens.size(0) - 1, count = scores.size(1), best = indices.size(1);
  const Runs tokens = runs_of("first_tokens", scores, first_tokens, requests, count),
             chosen = runs_of("first_chosen", scores, first_chosen, requests, best);
  STD_TORCH_CHECK(best <= count, "first_chosen: expected at most ", count, " for all requests, got ", best);
  check_places(scores, indices);
  check_launch("select_topk", pikv_cuda_select_topk(data<float>(scores), scores.size(0), &tokens, &chosen,
                                                    mutable_data<int64_t>(indices), current_stream(scores)));
}

void select_mass(const Tensor& order, const Tensor& if_unread, const Tensor& if_read, const Tensor& raw_lse,
                 const Tensor& first_tokens, double epsilon, Tensor read) {
  check("if_read", if_read, ScalarType::Float, {-1, -1, -1});
  const DeviceGuard guard(if_read.get_device_index());
  const int64_t groups = if_read.size(0), rows = if_read.size(1), count = if_read.size(2);
  check("if_unread", if_unread, ScalarType::Float, {groups, rows, count});
  check("order", order, ScalarType::Long, {groups, count});
  check("raw_lse", raw_lse, ScalarType::Float, {-1, groups, rows});
  check("read", read, ScalarType::Bool, {groups, count});
  const Runs tokens = runs_of("first_tokens", if_read, first_tokens, raw_lse.size(0), count);
  check_places(if_read, if_unread, order, raw_lse, read);
  Tensor workspace = torch::stable::new_empty(if_read, {raw_lse.numel()}, ScalarType::Int);
  check_launch("select_mass",
               pikv_cuda_select_mass(data<int64_t>(order), data<float>(if_unread), data<float>(if_read),
                                     data<float>(raw_lse), groups, rows, &tokens, static_cast<float>(epsilon),
                                     mutable_data<int32_t>(workspace), mutable_data<bool>(read),
                                     current_stream(if_read)));
}

void unread_mass(const Tensor& coarse, double slope, const Tensor& spread, const Tensor& radius, const Tensor& read,
                 const Tensor& first_blocks, Tensor by_spread, Tensor by_radius) {
  check("coarse", coarse, ScalarType::Float, {-1, -1, -1, -1});
  const DeviceGuard guard(coarse.get_device_index());
  const int64_t groups = coarse.size(0), rows = coarse.size(1), count = coarse.size(2), size = coarse.size(3);
  check("spread", spread, ScalarType::Float, {groups, rows, count});
  check("radius", radius, ScalarType::Float, {groups, rows, count});
  check("read", read, ScalarType::Bool, {groups, count * size});
  check("by_spread", by_spread, ScalarType::Float, {-1, groups, rows});
  check("by_radius", by_radius, ScalarType::Float, {by_spread.size(0), groups, rows});
  const Runs blocks = runs_of("first_blocks", coarse, first_blocks, by_spread.size(0), count);
  check_places(coarse, spread, radius, read, by_spread, by_radius);
  check_launch("unread_mass", pikv_cuda_unread_mass(data<float>(coarse), static_cast<float>(slope), data<float>(spread),
                                                    data<float>(radius), data<bool>(read), groups, rows, &blocks, size,
                                                    mutable_data<float>(by_spread), mutable_data<float>(by_radius),
                                                    current_stream(coarse)));
}

}  // namespace pikv::cuda
