// Attention to stored blocks and tokens: pieces of the work become partials, which are merged.

#include <cmath>
#include <optional>

#include "ops/ops.h"
#include "ops/partials.h"

namespace pikv {
namespace {

// Attention of every request's rows over its run of blocks, and to its raw tokens where there are any.
struct BlockAttention {
  const Queries& q;
  Stored& stored;
  const int64_t* ids;
  const Runs& runs;
  const int64_t *key_positions, *query_positions;  // or null
  const RawWindow* raw;                            // or null
  const Output& to;

  void run() {
    check_ids("block_ids", ids, runs.begin(runs.requests()), stored.blocks);
    together(runs.requests(), stored.keys.low_rank || stored.values.low_rank, [&](int64_t from, int64_t end) {
      const int64_t count = runs.begin(end) - runs.begin(from);
      stored.part.read(ids + runs.begin(from), count, 1, count, q.of(from), q.rows);
      stored.value_part.read(ids + runs.begin(from), count, 1, count, nullptr, q.rows);
      some(from, end);
    });
  }

 private:
  void some(int64_t from, int64_t end) {
    const Keys& keys = stored.keys;
    const Pieces pieces(runs, from, end, entries_apiece(runs.begin(end) - runs.begin(from), 8));
    std::vector<PartialMemory> partials = partial_memory(pieces.size(), q.rows_each(), to.value_dim);
    const CpuKernels& set = kernels();
    torch::stable::parallel_for(0, pieces.size(), 1, [&](int64_t begin, int64_t last) {
      for (int64_t i = begin; i < last; ++i) {
        const Pieces::Piece& piece = pieces.all[i];
        if (raw && pieces.begin[piece.request - from] == i)
          for (int64_t head = 0; head < q.groups; ++head)
            raw->attend(q, piece.request, head, partials[i].at(head * q.rows, to.value_dim));
        set.attend_blocks(q.of(piece.request), q.rows, keys, stored.values, ids + piece.first, piece.count(),
                          key_positions ? key_positions + piece.first * keys.block_size : nullptr, query_positions,
                          partials[i].at(0, to.value_dim));
      }
    });
    merge(partials, pieces.begin, q.rows_each(), to.value_dim, to.out_of(from, q), to.lse_of(from, q));
  }
};

}  // namespace

void attend_blocks(const Tensor& q, PIKV_STORED_ARGUMENTS, const Tensor& block_ids, double softmax_scale,
                   const MaybeTensor& key_positions, const MaybeTensor& query_positions, Tensor out, Tensor lse) {
  const Queries queries(q, true, softmax_scale);
  const Output to(queries, true, out, lse);
  Stored stored(PIKV_STORED_OF(queries, to.value_dim));
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const Runs runs(block_ids.numel());
  STD_TORCH_CHECK(!key_positions == !query_positions, "key_positions, query_positions: expected both or neither");
  if (key_positions) {
    check("key_positions", *key_positions, ScalarType::Long, {block_ids.numel(), stored.keys.block_size});
    check("query_positions", *query_positions, ScalarType::Long, {queries.rows});
  }
  BlockAttention{queries,
                 stored,
                 data<int64_t>(block_ids),
                 runs,
                 key_positions ? data<int64_t>(*key_positions) : nullptr,
                 query_positions ? data<int64_t>(*query_positions) : nullptr,
                 nullptr,
                 to}
      .run();
}

void attend_decode(const Tensor& q, const Tensor& raw_k, const Tensor& raw_v, const Tensor& slots,
                   const Tensor& raw_first, const Tensor& raw_last, PIKV_STORED_ARGUMENTS, const Tensor& block_ids,
                   const Tensor& first_blocks, double softmax_scale, Tensor out, Tensor lse) {
  const Queries queries(q, false, softmax_scale);
  const Output to(queries, false, out, lse);
  Stored stored(PIKV_STORED_OF(queries, to.value_dim));
  const RawWindow raw(raw_k, raw_v, slots, raw_first, raw_last, queries, to.value_dim);
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const Runs runs("first_blocks", first_blocks, queries.requests, block_ids.numel());
  BlockAttention{queries, stored, data<int64_t>(block_ids), runs, nullptr, nullptr, &raw, to}.run();
}

void attend_ragged(const Tensor& q, PIKV_STORED_ARGUMENTS, const Tensor& block_ids, const Tensor& first_blocks,
                   double softmax_scale, Tensor out, Tensor lse) {
  const Queries queries(q, false, softmax_scale);
  const Output to(queries, false, out, lse);
  Stored stored(PIKV_STORED_OF(queries, to.value_dim));
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const Runs runs("first_blocks", first_blocks, queries.requests, block_ids.numel());
  BlockAttention{queries, stored, data<int64_t>(block_ids), runs, nullptr, nullptr, nullptr, to}.run();
}

void attend_tokens(const Tensor& q, PIKV_STORED_ARGUMENTS, const Tensor& block_ids, const Tensor& offsets,
                   const Tensor& first_tokens, double softmax_scale, const MaybeTensor& read, Tensor out, Tensor lse) {
  const Queries queries(q, false, softmax_scale);
  const Output to(queries, false, out, lse);
  Stored stored(PIKV_STORED_OF(queries, to.value_dim));
  const int64_t groups = queries.groups, rows = queries.rows;
  check("block_ids", block_ids, ScalarType::Long, {groups, -1});
  const int64_t total = block_ids.size(1);
  check("offsets", offsets, ScalarType::Long, {groups, total});
  if (read) check("read", *read, ScalarType::Bool, {groups, total});
  const Runs runs("first_tokens", first_tokens, queries.requests, total);
  const int64_t *ids = data<int64_t>(block_ids), *places = data<int64_t>(offsets);
  check_ids("block_ids", ids, groups * total, stored.blocks);
  check_ids("offsets", places, groups * total, stored.keys.block_size);
  const CpuKernels& set = kernels();
  together(queries.requests, stored.keys.low_rank || stored.values.low_rank, [&](int64_t from, int64_t end) {
    const int64_t first = runs.begin(from), count = runs.begin(end) - first;
    stored.part.read(ids + first, count, groups, total, queries.of(from), rows);
    stored.value_part.read(ids + first, count, groups, total, nullptr, rows);
    const Pieces pieces(runs, from, end, entries_apiece(count, 128));
    std::vector<PartialMemory> partials = partial_memory(pieces.size(), groups * rows, to.value_dim);
    torch::stable::parallel_for(0, pieces.size() * groups, 1, [&](int64_t begin, int64_t last) {
      for (int64_t i = begin; i < last; ++i) {
        const Pieces::Piece& piece = pieces.all[i / groups];
        const int64_t head = i % groups, at = head * total + piece.first;
        set.attend_tokens(queries.of(piece.request, head), rows, stored.keys, stored.values, ids + at, places + at,
                          read ? data<bool>(*read) + at : nullptr, piece.count(), head,
                          partials[i / groups].at(head * rows, to.value_dim));
      }
    });
    merge(partials, pieces.begin, groups * rows, to.value_dim, to.out_of(from, queries), to.lse_of(from, queries));
  });
}

void merge_partials(const Tensor& outs, const Tensor& lses, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(outs.dim() >= 2, "outs: expected [partials, ..., channels]");
  check("outs", outs, ScalarType::Float, std::vector<int64_t>(outs.dim(), -1));
  const int64_t count = outs.size(0), dim = outs.size(outs.dim() - 1);
  const int64_t rows = outs.numel() == 0 ? 0 : outs.numel() / (count * dim);
  check("lses", lses, ScalarType::Float, std::vector<int64_t>(lses.dim(), -1));
  check("out", out, ScalarType::Float, std::vector<int64_t>(out.dim(), -1));
  check("lse", lse, ScalarType::Float, std::vector<int64_t>(lse.dim(), -1));
  STD_TORCH_CHECK(lses.numel() == count * rows && out.numel() == rows * dim && lse.numel() == rows,
                  "lses, out, lse: unexpected size");
  const float *from = data<float>(outs), *from_lse = data<float>(lses);
  float *to = mutable_data<float>(out), *to_lse = mutable_data<float>(lse);
  for (int64_t r = 0; r < rows; ++r) {
    float high = -std::numeric_limits<float>::infinity(), total = 0.0f;
    for (int64_t i = 0; i < count; ++i) high = std::max(high, from_lse[i * rows + r]);
    const float shift = std::isinf(high) ? 0.0f : high;
    for (int64_t i = 0; i < count; ++i) total += std::exp(from_lse[i * rows + r] - shift);
    to_lse[r] = shift + std::log(total);
    std::fill(to + r * dim, to + (r + 1) * dim, 0.0f);
    for (int64_t i = 0; i < count && total > 0.0f; ++i) {
      const float share = std::exp(from_lse[i * rows + r] - shift) / total, *row = from + (i * rows + r) * dim;
      for (int64_t e = 0; e < dim; ++e) to[r * dim + e] += share * row[e];
    }
  }
}

}  // namespace pikv
