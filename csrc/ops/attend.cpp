// Attention ops: pieces of the work become partials, which are merged.

#include <cmath>
#include <numeric>
#include <optional>

#include "ops/ops.h"

namespace pikv {
namespace {

// Partials of one piece of the work, for `rows` rows in all.
struct PartialMemory {
  std::vector<float> out, high, total;
  PartialMemory(int64_t rows, int64_t dim)
      : out(rows * dim, 0.0f), high(rows, -std::numeric_limits<float>::infinity()), total(rows, 0.0f) {}
  Partial at(int64_t row, int64_t dim) { return {out.data() + row * dim, high.data() + row, total.data() + row}; }
};

// Merges `count` pieces of rows [0, rows) into out [rows, dim] and lse [rows].
void merge(PartialMemory* pieces, int64_t count, int64_t rows, int64_t dim, float* out, float* lse) {
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float high = -std::numeric_limits<float>::infinity(), total = 0.0f;
      for (int64_t i = 0; i < count; ++i) high = std::max(high, pieces[i].high[r]);
      float* row = out + r * dim;
      std::fill(row, row + dim, 0.0f);
      if (std::isinf(high)) {
        lse[r] = high;
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        const float share = std::exp(pieces[i].high[r] - high), *from = pieces[i].out.data() + r * dim;
        total += share * pieces[i].total[r];
        for (int64_t e = 0; e < dim; ++e) row[e] += share * from[e];
      }
      for (int64_t e = 0; e < dim; ++e) row[e] /= total;
      lse[r] = high + std::log(total);
    }
  });
}

// Raw tokens beside stored ones.
struct RawTokens {
  RawRows k, v;
};

RawTokens raw_tokens(const Tensor& k, const Tensor& v, int64_t groups, int64_t dim, int64_t value_dim) {
  const RawTokens raw{RawRows("k", k, groups, dim), RawRows("v", v, groups, value_dim)};
  STD_TORCH_CHECK(raw.v.tokens == raw.k.tokens, "v: expected the ", raw.k.tokens, " tokens of k, got ", raw.v.tokens);
  return raw;
}

// Takes a head's raw tokens into the partials of its rows, q [rows, padded(D)].
void attend_raw_head(const float* q, int64_t rows, const RawTokens& raw, int64_t head, const int64_t* key_positions,
                     const int64_t* query_positions, Partial partial) {
  Values values{};
  values.raw = raw.v.of(head), values.dtype = raw.v.dtype;
  values.groups = 1, values.block_size = raw.v.tokens, values.dim = raw.v.dim;
  kernels().attend_raw(q, rows, raw.k.keys(head), values, key_positions, query_positions, partial);
}

// Attention of every request's rows over its run of blocks, ids[first[i]] to ids[first[i + 1]]: out [requests, G, R,
// E], lse. Raw tokens, where given, are of the only request.
void attend_runs(const float* queries, int64_t rows, const Keys& keys, const Values& values, const int64_t* ids,
                 const int64_t* first, int64_t requests, const int64_t* key_positions, const int64_t* query_positions,
                 const RawTokens* raw, float* out, float* lse) {
  struct Piece {
    int64_t request, first, last;
  };
  const int64_t threads = torch::stable::get_num_threads(), total = first[requests] - first[0],
                all_rows = keys.groups * rows;
  const int64_t most = threads == 1 ? std::max<int64_t>(1, total) : std::max<int64_t>(8, total / (4 * threads) + 1);
  std::vector<Piece> pieces;
  std::vector<int64_t> begin(requests + 1);  // of a request's pieces
  for (int64_t i = 0; i < requests; ++i) {
    const int64_t count = first[i + 1] - first[i], parts = std::max<int64_t>(1, (count + most - 1) / most);
    begin[i] = static_cast<int64_t>(pieces.size());
    for (int64_t p = 0; p < parts; ++p)
      pieces.push_back({i, first[i] + count * p / parts, first[i] + count * (p + 1) / parts});
  }
  begin[requests] = static_cast<int64_t>(pieces.size());
  std::vector<PartialMemory> partials(pieces.size(), PartialMemory(all_rows, values.dim));
  const CpuKernels& set = kernels();
  torch::stable::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const Piece& piece = pieces[i];
      if (raw && i == 0)
        for (int64_t head = 0; head < keys.groups; ++head)
          attend_raw_head(queries + head * rows * padded(keys.dim), rows, *raw, head, nullptr, nullptr,
                          partials[0].at(head * rows, values.dim));
      set.attend_blocks(queries + piece.request * all_rows * padded(keys.dim), rows, keys, values, ids + piece.first,
                        piece.last - piece.first,
                        key_positions ? key_positions + piece.first * keys.block_size : nullptr,
                        query_positions, partials[i].at(0, values.dim));
    }
  });
  for (int64_t i = 0; i < requests; ++i)
    merge(partials.data() + begin[i], begin[i + 1] - begin[i], all_rows, values.dim, out + i * all_rows * values.dim,
          lse + i * all_rows);
}

// attend_blocks, or with raw tokens (both or neither) attend_decode.
void attend_one(const Tensor& q, const MaybeTensor& raw_k, const MaybeTensor& raw_v, PIKV_KEY_ARGUMENTS,
                PIKV_VALUE_ARGUMENTS, PIKV_PART_ARGUMENTS, const Tensor& block_ids, double softmax_scale,
                const MaybeTensor& key_positions, const MaybeTensor& query_positions, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(q.dim() == 3 && out.dim() == 3, "q, out: expected [groups, rows, channels]");
  const std::vector<float> queries = padded_queries(q, static_cast<float>(softmax_scale));
  const int64_t groups = q.size(0), rows = q.size(1), value_dim = out.size(2);
  Keys keys = KeyArguments{k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}.view(groups, q.size(2));
  Values values = ValueArguments{v, v_codes, v_scale, v_zero, v_bits}.view(groups, keys.block_size, value_dim);
  LowRankPart k_part(k_low_rank, groups, keys.block_size, keys.dim);
  LowRankPart v_part(v_low_rank, groups, keys.block_size, value_dim);
  keys.low_rank = k_part.get(), values.low_rank = v_part.get();
  check("block_ids", block_ids, ScalarType::Long, {-1});
  check("out", out, ScalarType::Float, {groups, rows, value_dim});
  check("lse", lse, ScalarType::Float, {groups, rows});
  STD_TORCH_CHECK(!key_positions == !query_positions, "key_positions, query_positions: expected both or neither");
  const int64_t count = block_ids.numel(), first[] = {0, count};
  if (key_positions) {
    check("key_positions", *key_positions, ScalarType::Long, {count, keys.block_size});
    check("query_positions", *query_positions, ScalarType::Long, {rows});
  }
  check_ids("block_ids", data<int64_t>(block_ids), count, std::min(blocks_of(k, k_high), blocks_of(v, v_codes)));
  k_part.read(data<int64_t>(block_ids), count, queries.data(), rows);
  v_part.read(data<int64_t>(block_ids), count, nullptr, rows);
  std::optional<RawTokens> raw;
  if (raw_k) raw = raw_tokens(*raw_k, *raw_v, groups, keys.dim, value_dim);
  attend_runs(queries.data(), rows, keys, values, data<int64_t>(block_ids), first, 1,
              key_positions ? data<int64_t>(*key_positions) : nullptr,
              query_positions ? data<int64_t>(*query_positions) : nullptr, raw ? &*raw : nullptr,
              mutable_data<float>(out), mutable_data<float>(lse));
}

}  // namespace

void attend_blocks(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_VALUE_ARGUMENTS, PIKV_PART_ARGUMENTS,
                   const Tensor& block_ids, double softmax_scale,
                   const MaybeTensor& key_positions, const MaybeTensor& query_positions, Tensor out, Tensor lse) {
  attend_one(q, {}, {}, k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits, v, v_codes, v_scale, v_zero, v_bits,
             k_low_rank, v_low_rank, block_ids, softmax_scale, key_positions, query_positions, out, lse);
}

void attend_decode(const Tensor& q, const Tensor& raw_k, const Tensor& raw_v, PIKV_KEY_ARGUMENTS,
                   PIKV_VALUE_ARGUMENTS, PIKV_PART_ARGUMENTS, const Tensor& block_ids, double softmax_scale, Tensor out,
                   Tensor lse) {
  attend_one(q, raw_k, raw_v, k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits, v, v_codes, v_scale, v_zero, v_bits,
             k_low_rank, v_low_rank, block_ids, softmax_scale, {}, {}, out, lse);
}

void attend_ragged(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_VALUE_ARGUMENTS, PIKV_PART_ARGUMENTS,
                   const Tensor& block_ids, const Tensor& first_blocks, double softmax_scale, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(q.dim() == 4 && out.dim() == 4, "q, out: expected [requests, groups, rows, channels]");
  const std::vector<float> queries = padded_queries(q, static_cast<float>(softmax_scale));
  const int64_t requests = q.size(0), groups = q.size(1), rows = q.size(2), value_dim = out.size(3);
  Keys keys = KeyArguments{k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}.view(groups, q.size(3));
  Values values = ValueArguments{v, v_codes, v_scale, v_zero, v_bits}.view(groups, keys.block_size, value_dim);
  LowRankPart k_part(k_low_rank, groups, keys.block_size, keys.dim);
  LowRankPart v_part(v_low_rank, groups, keys.block_size, value_dim);
  keys.low_rank = k_part.get(), values.low_rank = v_part.get();
  check("block_ids", block_ids, ScalarType::Long, {-1});
  check("first_blocks", first_blocks, ScalarType::Long, {requests + 1});
  check("out", out, ScalarType::Float, {requests, groups, rows, value_dim});
  check("lse", lse, ScalarType::Float, {requests, groups, rows});
  const int64_t* first = data<int64_t>(first_blocks);
  STD_TORCH_CHECK(first[0] == 0 && first[requests] == block_ids.numel() && std::is_sorted(first, first + requests + 1),
                  "first_blocks: expected 0, ascending, to ", block_ids.numel());
  check_ids("block_ids", data<int64_t>(block_ids), block_ids.numel(),
            std::min(blocks_of(k, k_high), blocks_of(v, v_codes)));
  // Queries meet the bases request by request.
  const int64_t together = keys.low_rank || values.low_rank ? 1 : requests;
  for (int64_t i = 0; i < requests; i += together) {
    const float* q_here = queries.data() + i * groups * rows * padded(keys.dim);
    k_part.read(data<int64_t>(block_ids) + first[i], first[i + together] - first[i], q_here, rows);
    v_part.read(data<int64_t>(block_ids) + first[i], first[i + together] - first[i], nullptr, rows);
    attend_runs(q_here, rows, keys, values, data<int64_t>(block_ids), first + i, together, nullptr, nullptr, nullptr,
                mutable_data<float>(out) + i * groups * rows * value_dim, mutable_data<float>(lse) + i * groups * rows);
  }
}

void attend_tokens(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_VALUE_ARGUMENTS, PIKV_PART_ARGUMENTS,
                   const Tensor& block_ids, const Tensor& offsets,
                   double softmax_scale, const MaybeTensor& read, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(q.dim() == 3 && out.dim() == 3, "q, out: expected [groups, rows, channels]");
  const std::vector<float> queries = padded_queries(q, static_cast<float>(softmax_scale));
  const int64_t groups = q.size(0), rows = q.size(1), value_dim = out.size(2), stride = padded(q.size(2));
  Keys keys = KeyArguments{k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}.view(groups, q.size(2));
  Values values = ValueArguments{v, v_codes, v_scale, v_zero, v_bits}.view(groups, keys.block_size, value_dim);
  LowRankPart k_part(k_low_rank, groups, keys.block_size, keys.dim);
  LowRankPart v_part(v_low_rank, groups, keys.block_size, value_dim);
  keys.low_rank = k_part.get(), values.low_rank = v_part.get();
  check("block_ids", block_ids, ScalarType::Long, {groups, -1});
  const int64_t count = block_ids.size(1);
  check("offsets", offsets, ScalarType::Long, {groups, count});
  if (read) check("read", *read, ScalarType::Bool, {groups, count});
  check("out", out, ScalarType::Float, {groups, rows, value_dim});
  check("lse", lse, ScalarType::Float, {groups, rows});
  check_ids("block_ids", data<int64_t>(block_ids), groups * count,
            std::min(blocks_of(k, k_high), blocks_of(v, v_codes)));
  k_part.read(data<int64_t>(block_ids), groups * count, queries.data(), rows);
  v_part.read(data<int64_t>(block_ids), groups * count, nullptr, rows);
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
  merge(partials.data(), pieces, groups * rows, value_dim, mutable_data<float>(out), mutable_data<float>(lse));
}

void attend_mass(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_VALUE_ARGUMENTS, const Tensor& block_ids,
                 const Tensor& coarse, double slope, const Tensor& extra, const Tensor& raw_lse, double epsilon,
                 double softmax_scale, Tensor out, Tensor lse, Tensor read) {
  STD_TORCH_CHECK(q.dim() == 3 && out.dim() == 3, "q, out: expected [groups, rows, channels]");
  const std::vector<float> queries = padded_queries(q, static_cast<float>(softmax_scale));
  const int64_t groups = q.size(0), rows = q.size(1), value_dim = out.size(2), stride = padded(q.size(2));
  const Keys keys = KeyArguments{k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}.view(groups, q.size(2));
  const Values values = ValueArguments{v, v_codes, v_scale, v_zero, v_bits}.view(groups, keys.block_size, value_dim);
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const int64_t count = block_ids.numel(), tokens = count * keys.block_size;
  check("coarse", coarse, ScalarType::Float, {groups, rows, count, keys.block_size});
  check("extra", extra, ScalarType::Float, {groups, rows, count});
  check("raw_lse", raw_lse, ScalarType::Float, {groups, rows});
  check("read", read, ScalarType::Bool, {groups, tokens});
  check("out", out, ScalarType::Float, {groups, rows, value_dim});
  check("lse", lse, ScalarType::Float, {groups, rows});
  check_ids("block_ids", data<int64_t>(block_ids), count, std::min(blocks_of(k, k_high), blocks_of(v, v_codes)));
  const CpuKernels& set = kernels();
  PartialMemory partial(groups * rows, value_dim);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      set.attend_mass(queries.data() + head * rows * stride, rows, keys, values, data<int64_t>(block_ids), count, head,
                      data<float>(coarse) + head * rows * tokens, static_cast<float>(slope),
                      data<float>(extra) + head * rows * count, data<float>(raw_lse) + head * rows, epsilon,
                      mutable_data<bool>(read) + head * tokens, partial.at(head * rows, value_dim));
  });
  merge(&partial, 1, groups * rows, value_dim, mutable_data<float>(out), mutable_data<float>(lse));
}

void attend_at(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& key_positions,
               const MaybeTensor& query_positions, double softmax_scale, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(q.dim() == 3 && out.dim() == 3, "q, out: expected [groups, rows, channels]");
  const std::vector<float> queries = padded_queries(q, static_cast<float>(softmax_scale));
  const int64_t groups = q.size(0), rows = q.size(1), value_dim = out.size(2), stride = padded(q.size(2));
  const RawTokens raw = raw_tokens(k, v, groups, q.size(2), value_dim);
  const int64_t tokens = raw.k.tokens;
  STD_TORCH_CHECK(!key_positions == !query_positions, "key_positions, query_positions: expected both or neither");
  if (key_positions) {
    check("key_positions", *key_positions, ScalarType::Long, {tokens});
    check("query_positions", *query_positions, ScalarType::Long, {rows});
  }
  check("out", out, ScalarType::Float, {groups, rows, value_dim});
  check("lse", lse, ScalarType::Float, {groups, rows});
  PartialMemory partial(groups * rows, value_dim);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      attend_raw_head(queries.data() + head * rows * stride, rows, raw, head,
                      key_positions ? data<int64_t>(*key_positions) : nullptr,
                      query_positions ? data<int64_t>(*query_positions) : nullptr,
                      partial.at(head * rows, value_dim));
  });
  merge(&partial, 1, groups * rows, value_dim, mutable_data<float>(out), mutable_data<float>(lse));
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
