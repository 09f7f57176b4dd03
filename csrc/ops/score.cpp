// Ops on logits: scores, importance, ranks, and what is chosen by them.

#include "ops/ops.h"
#include "ops/shared.h"

namespace pikv {
namespace {

// Calls work(piece, head) for every piece of the runs and every KV head, head after head over the same blocks.
template <class Work>
void each_head(const Pieces& pieces, int64_t groups, Work work) {
  torch::stable::parallel_for(0, pieces.size() * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(pieces.all[i / groups], i % groups);
  });
}

}  // namespace

void score_tokens(const Tensor& q, const MaybeTensor& k, const Tensor& k_high, const Tensor& k_scale,
                  const Tensor& k_zero, int64_t hi_bits, int64_t lo_bits, const Tensor& block_ids,
                  const Tensor& first_blocks, double softmax_scale, Tensor coarse, Tensor radius, Tensor spread) {
  const Queries queries(q, false, softmax_scale);
  const int64_t groups = queries.groups, rows = queries.rows;
  const MaybeTensor high = k_high, scale = k_scale, zero = k_zero, none;
  const Keys keys = KeyArguments{k, high, none, scale, zero, hi_bits, lo_bits}.view(groups, queries.dim);
  const bool per_head = block_ids.dim() == 2;
  const int64_t total = block_ids.size(block_ids.dim() - 1);
  check("block_ids", block_ids, ScalarType::Long,
        per_head ? std::vector<int64_t>{groups, total} : std::vector<int64_t>{total});
  check("coarse", coarse, ScalarType::Float, {groups, rows, total, keys.block_size});
  check("radius", radius, ScalarType::Float, {groups, rows, total});
  check("spread", spread, ScalarType::Float, {groups, rows, total});
  const Runs runs("first_blocks", first_blocks, queries.requests, total);
  const int64_t* ids = data<int64_t>(block_ids);
  check_ids("block_ids", ids, block_ids.numel(), k_high.size(0));
  const CpuKernels& set = kernels();
  each_head(Pieces(runs, kBlocksApiece), groups, [&](const Pieces::Piece& piece, int64_t head) {
    const int64_t at = head * rows * total + piece.first;
    set.score_tokens(queries.of(piece.request, head), rows, keys, ids + (per_head ? head * total : 0) + piece.first,
                     piece.count(), head, mutable_data<float>(coarse) + at * keys.block_size,
                     mutable_data<float>(radius) + at, mutable_data<float>(spread) + at, total);
  });
}

void score_blocks(const Tensor& q, const Tensor& k_scale, const Tensor& k_zero, int64_t bits, const Tensor& block_ids,
                  const Tensor& first_blocks, double softmax_scale, Tensor bound, Tensor centre, Tensor spread) {
  STD_TORCH_CHECK(bits == 2 || bits == 4 || bits == 8, "bits: expected 2, 4 or 8, got ", bits);
  const Queries queries(q, false, softmax_scale);
  const int64_t groups = queries.groups, rows = queries.rows, dim = queries.dim;
  check("k_scale", k_scale, ScalarType::Half, {-1, groups, dim});
  check("k_zero", k_zero, ScalarType::Half, {k_scale.size(0), groups, dim});
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const int64_t total = block_ids.numel();
  check("bound", bound, ScalarType::Float, {groups, rows, total});
  check("centre", centre, ScalarType::Float, {groups, rows, total});
  check("spread", spread, ScalarType::Float, {groups, rows, total});
  const Runs runs("first_blocks", first_blocks, queries.requests, total);
  check_ids("block_ids", data<int64_t>(block_ids), total, k_scale.size(0));
  Keys keys{};
  keys.scale = data<uint16_t>(k_scale), keys.zero = data<uint16_t>(k_zero);
  keys.hi_bits = static_cast<int>(bits), keys.groups = groups, keys.dim = dim;
  const CpuKernels& set = kernels();
  each_head(Pieces(runs, kBlocksApiece), groups, [&](const Pieces::Piece& piece, int64_t head) {
    const int64_t at = head * rows * total + piece.first;
    set.score_blocks(queries.of(piece.request, head), rows, keys, data<int64_t>(block_ids) + piece.first, piece.count(),
                     head, mutable_data<float>(bound) + at, mutable_data<float>(centre) + at,
                     mutable_data<float>(spread) + at, total);
  });
}

void key_logits(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_KEY_PART_ARGUMENT, const Tensor& block_ids,
                const Tensor& first_blocks, double softmax_scale, Tensor logits) {
  const Queries queries(q, false, softmax_scale);
  StoredKeys stored(PIKV_KEYS_OF(queries));
  const int64_t groups = queries.groups, rows = queries.rows, size = stored.keys.block_size;
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const int64_t total = block_ids.numel(), *ids = data<int64_t>(block_ids);
  check("logits", logits, ScalarType::Float, {groups, rows, total * size});
  const Runs runs("first_blocks", first_blocks, queries.requests, total);
  check_ids("block_ids", ids, total, stored.blocks);
  const CpuKernels& set = kernels();
  together(queries.requests, stored.keys.low_rank, [&](int64_t from, int64_t end) {
    const int64_t count = runs.begin(end) - runs.begin(from);
    stored.part.read(ids + runs.begin(from), count, 1, count, queries.of(from), rows);
    each_head(Pieces(runs, from, end, kBlocksApiece), groups, [&](const Pieces::Piece& piece, int64_t head) {
      set.key_logits(queries.of(piece.request, head), rows, stored.keys, ids + piece.first, piece.count(), head,
                     mutable_data<float>(logits) + (head * rows * total + piece.first) * size, total * size);
    });
  });
}

void token_importance(const Tensor& q, const Tensor& lse, PIKV_KEY_ARGUMENTS, PIKV_KEY_PART_ARGUMENT,
                      const Tensor& block_ids, const Tensor& first_blocks, double softmax_scale, Tensor importance) {
  const Queries queries(q, false, softmax_scale);
  StoredKeys stored(PIKV_KEYS_OF(queries));
  const int64_t size = stored.keys.block_size;
  check("lse", lse, ScalarType::Float, {queries.requests, queries.groups, queries.rows});
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const int64_t total = block_ids.numel(), *ids = data<int64_t>(block_ids);
  check("importance", importance, ScalarType::Float, {total, size});
  const Runs runs("first_blocks", first_blocks, queries.requests, total);
  check_ids("block_ids", ids, total, stored.blocks);
  const CpuKernels& set = kernels();
  together(queries.requests, stored.keys.low_rank, [&](int64_t from, int64_t end) {
    const int64_t count = runs.begin(end) - runs.begin(from);
    stored.part.read(ids + runs.begin(from), count, 1, count, queries.of(from), queries.rows);
    const Pieces pieces(runs, from, end, entries_apiece(count, 8));
    torch::stable::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t last) {
      for (int64_t i = begin; i < last; ++i) {
        const Pieces::Piece& piece = pieces.all[i];
        set.token_importance(queries.of(piece.request), queries.rows,
                             data<float>(lse) + piece.request * queries.rows_each(), stored.keys, ids + piece.first,
                             piece.count(), mutable_data<float>(importance) + piece.first * size);
      }
    });
  });
}

void rank_tokens(const Tensor& coarse, const Tensor& raw_lse, const Tensor& first_tokens, Tensor rank) {
  check("coarse", coarse, ScalarType::Float, {-1, -1, -1});
  check("raw_lse", raw_lse, ScalarType::Float, {-1, coarse.size(0), coarse.size(1)});
  const int64_t requests = raw_lse.size(0), groups = coarse.size(0), rows = coarse.size(1), total = coarse.size(2);
  check("rank", rank, ScalarType::Float, {groups, total});
  const Runs runs("first_tokens", first_tokens, requests, total);
  const CpuKernels& set = kernels();
  torch::stable::parallel_for(0, requests * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t request = i / groups, head = i % groups, first = runs.begin(request);
      set.rank_tokens(data<float>(coarse) + head * rows * total + first, rows, runs.count(request), total,
                      data<float>(raw_lse) + i * rows, mutable_data<float>(rank) + head * total + first);
    }
  });
}

void select_topk(const Tensor& scores, const Tensor& first_tokens, const Tensor& first_chosen, Tensor indices) {
  check("scores", scores, ScalarType::Float, {-1, -1});
  check("indices", indices, ScalarType::Long, {scores.size(0), -1});
  const int64_t groups = scores.size(0), total = scores.size(1), chosen = indices.size(1);
  STD_TORCH_CHECK(first_tokens.dim() == 1 && first_tokens.size(0) >= 1, "first_tokens: expected [requests + 1]");
  const int64_t requests = first_tokens.size(0) - 1;
  const Runs runs("first_tokens", first_tokens, requests, total), best("first_chosen", first_chosen, requests, chosen);
  for (int64_t i = 0; i < requests; ++i)
    STD_TORCH_CHECK(best.count(i) <= runs.count(i), "first_chosen: expected at most ", runs.count(i), " for request ",
                    i, ", got ", best.count(i));
  const CpuKernels& set = kernels();
  torch::stable::parallel_for(0, requests * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t request = i / groups, head = i % groups, first = runs.begin(request), count = best.count(request);
      int64_t* to = mutable_data<int64_t>(indices) + head * chosen + best.begin(request);
      if (count) set.select_topk(data<float>(scores) + head * total + first, runs.count(request), count, to);
      for (int64_t j = 0; j < count; ++j) to[j] += first;
    }
  });
}

}  // namespace pikv
