// Ops on logits: scores, importance, ranks, and what is chosen by them.

#include "ops/ops.h"

namespace pikv {

void score_tokens(const Tensor& q, const MaybeTensor& k, const Tensor& k_high, const Tensor& k_scale,
                  const Tensor& k_zero, int64_t hi_bits, int64_t lo_bits, const Tensor& block_ids, double softmax_scale,
                  Tensor coarse, Tensor radius, Tensor spread) {
  const std::vector<float> queries = padded_queries(q, static_cast<float>(softmax_scale));
  const int64_t groups = q.size(0), rows = q.size(1), stride = padded(q.size(2));
  const MaybeTensor high = k_high, scale = k_scale, zero = k_zero, none;
  const Keys keys = KeyArguments{k, high, none, scale, zero, hi_bits, lo_bits}.view(groups, q.size(2));
  const bool per_head = block_ids.dim() == 2;
  const int64_t count = block_ids.size(block_ids.dim() - 1);
  check("block_ids", block_ids, ScalarType::Long,
        per_head ? std::vector<int64_t>{groups, count} : std::vector<int64_t>{count});
  check("coarse", coarse, ScalarType::Float, {groups, rows, count, keys.block_size});
  check("radius", radius, ScalarType::Float, {groups, rows, count});
  check("spread", spread, ScalarType::Float, {groups, rows, count});
  const int64_t* ids = data<int64_t>(block_ids);
  check_ids("block_ids", ids, block_ids.numel(), k_high.size(0));
  const CpuKernels& set = kernels();
  const int64_t pieces = pieces_of_blocks(count);
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
  STD_TORCH_CHECK(bits == 2 || bits == 4 || bits == 8, "bits: expected 2, 4 or 8, got ", bits);
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
  const int64_t pieces = pieces_of_blocks(count);
  torch::stable::parallel_for(0, pieces * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i % groups, piece = i / groups;
      const int64_t first = count * piece / pieces, last = count * (piece + 1) / pieces;
      set.score_blocks(queries.data() + head * rows * stride, rows, keys, data<int64_t>(block_ids) + first,
                       last - first, head, mutable_data<float>(bound) + head * rows * count + first,
                       mutable_data<float>(centre) + head * rows * count + first,
                       mutable_data<float>(spread) + head * rows * count + first, count);
    }
  });
}

void key_logits(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_KEY_PART_ARGUMENT, const Tensor& block_ids,
                double softmax_scale, Tensor logits) {
  STD_TORCH_CHECK(q.dim() == 3, "q: expected [groups, rows, channels]");
  const std::vector<float> queries = padded_queries(q, static_cast<float>(softmax_scale));
  const int64_t groups = q.size(0), rows = q.size(1), stride = padded(q.size(2));
  Keys keys = KeyArguments{k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}.view(groups, q.size(2));
  LowRankPart part(k_low_rank, groups, keys.block_size, keys.dim);
  keys.low_rank = part.get();
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const int64_t count = block_ids.numel(), tokens = count * keys.block_size;
  check("logits", logits, ScalarType::Float, {groups, rows, tokens});
  check_ids("block_ids", data<int64_t>(block_ids), count, blocks_of(k, k_high));
  part.read(data<int64_t>(block_ids), count, queries.data(), rows);
  const CpuKernels& set = kernels();
  const int64_t pieces = pieces_of_blocks(count);
  torch::stable::parallel_for(0, pieces * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i % groups, piece = i / groups, first = count * piece / pieces,
                    last = count * (piece + 1) / pieces;
      set.key_logits(queries.data() + head * rows * stride, rows, keys, data<int64_t>(block_ids) + first, last - first,
                     head, mutable_data<float>(logits) + head * rows * tokens + first * keys.block_size, tokens);
    }
  });
}

void token_importance(const Tensor& q, const Tensor& lse, PIKV_KEY_ARGUMENTS, PIKV_KEY_PART_ARGUMENT,
                      const Tensor& block_ids, double softmax_scale, Tensor importance) {
  STD_TORCH_CHECK(q.dim() == 3, "q: expected [groups, rows, channels]");
  const std::vector<float> queries = padded_queries(q, static_cast<float>(softmax_scale));
  const int64_t groups = q.size(0), rows = q.size(1);
  Keys keys = KeyArguments{k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}.view(groups, q.size(2));
  LowRankPart part(k_low_rank, groups, keys.block_size, keys.dim);
  keys.low_rank = part.get();
  check("lse", lse, ScalarType::Float, {groups, rows});
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const int64_t count = block_ids.numel();
  check("importance", importance, ScalarType::Float, {count, keys.block_size});
  check_ids("block_ids", data<int64_t>(block_ids), count, blocks_of(k, k_high));
  part.read(data<int64_t>(block_ids), count, queries.data(), rows);
  const CpuKernels& set = kernels();
  torch::stable::parallel_for(0, count, 8, [&](int64_t begin, int64_t end) {
    set.token_importance(queries.data(), rows, data<float>(lse), keys, data<int64_t>(block_ids) + begin, end - begin,
                         mutable_data<float>(importance) + begin * keys.block_size);
  });
}

void window_importance(const Tensor& q, const Tensor& lse, const Tensor& k, int64_t query_tokens, double softmax_scale,
                       Tensor importance) {
  STD_TORCH_CHECK(q.dim() == 3, "q: expected [groups, rows, channels]");
  const std::vector<float> queries = padded_queries(q, static_cast<float>(softmax_scale));
  const int64_t groups = q.size(0), rows = q.size(1), stride = padded(q.size(2));
  const RawRows k_rows("k", k, groups, q.size(2));
  STD_TORCH_CHECK(query_tokens >= 1 && rows % query_tokens == 0 && query_tokens <= k_rows.tokens,
                  "query_tokens: expected a divisor of the rows and at most ", k_rows.tokens, ", got ", query_tokens);
  check("lse", lse, ScalarType::Float, {groups, rows});
  check("importance", importance, ScalarType::Float, {k_rows.tokens});
  float* sums = mutable_data<float>(importance);
  std::fill(sums, sums + k_rows.tokens, 0.0f);
  for (int64_t head = 0; head < groups; ++head)
    kernels().window_importance(queries.data() + head * rows * stride, rows, data<float>(lse) + head * rows,
                                k_rows.keys(head), query_tokens, sums);
}

void rank_tokens(const Tensor& coarse, const Tensor& raw_lse, Tensor rank) {
  STD_TORCH_CHECK(coarse.dim() == 3, "coarse: expected [groups, rows, tokens]");
  check("coarse", coarse, ScalarType::Float, {-1, -1, -1});
  const int64_t groups = coarse.size(0), rows = coarse.size(1), tokens = coarse.size(2);
  check("raw_lse", raw_lse, ScalarType::Float, {groups, rows});
  check("rank", rank, ScalarType::Float, {groups, tokens});
  const CpuKernels& set = kernels();
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      set.rank_tokens(data<float>(coarse) + head * rows * tokens, rows, tokens, tokens,
                      data<float>(raw_lse) + head * rows, mutable_data<float>(rank) + head * tokens);
  });
}

void select_topk(const Tensor& scores, Tensor indices) {
  check("scores", scores, ScalarType::Float, {-1, -1});
  check("indices", indices, ScalarType::Long, {scores.size(0), -1});
  const int64_t count = scores.size(1), best = indices.size(1);
  STD_TORCH_CHECK(best <= count, "indices: expected at most ", count, " a row, got ", best);
  if (best == 0) return;
  const CpuKernels& set = kernels();
  torch::stable::parallel_for(0, scores.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      set.select_topk(data<float>(scores) + i * count, count, best, mutable_data<int64_t>(indices) + i * best);
  });
}

void unread_mass(const Tensor& coarse, double slope, const Tensor& spread, const Tensor& radius, const Tensor& read,
                 Tensor by_spread, Tensor by_radius) {
  STD_TORCH_CHECK(coarse.dim() == 4, "coarse: expected [groups, rows, blocks, block_size]");
  check("coarse", coarse, ScalarType::Float, {-1, -1, -1, -1});
  const int64_t groups = coarse.size(0), rows = coarse.size(1), blocks = coarse.size(2), tokens = coarse.size(3);
  check("spread", spread, ScalarType::Float, {groups, rows, blocks});
  check("radius", radius, ScalarType::Float, {groups, rows, blocks});
  check("read", read, ScalarType::Bool, {groups, blocks * tokens});
  check("by_spread", by_spread, ScalarType::Float, {groups, rows});
  check("by_radius", by_radius, ScalarType::Float, {groups, rows});
  const CpuKernels& set = kernels();
  torch::stable::parallel_for(0, groups * rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      set.unread_mass(data<float>(coarse) + i * blocks * tokens, static_cast<float>(slope),
                      data<float>(spread) + i * blocks, data<float>(radius) + i * blocks,
                      data<bool>(read) + i / rows * blocks * tokens, blocks, tokens, mutable_data<float>(by_spread) + i,
                      mutable_data<float>(by_radius) + i);
  });
}

}  // namespace pikv
