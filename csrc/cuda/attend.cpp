// The attention ops on CUDA.

#include "ops.h"

namespace pikv::cuda {
namespace {

void check_positions(const MaybeTensor& of_keys, const std::vector<int64_t>& shape, const MaybeTensor& of_queries,
                     int64_t rows) {
  STD_TORCH_CHECK(!of_keys == !of_queries, "key_positions, query_positions: expected both or neither");
  if (!of_keys) return;
  check("key_positions", *of_keys, ScalarType::Long, shape);
  check("query_positions", *of_queries, ScalarType::Long, {rows});
}

// Thread blocks per KV head: some two per processor in all, but none with less than a tile for each of its warps.
int splits_for(const Tensor& q, int64_t tokens) {
  const int64_t rows = q.size(q.dim() - 2);
  int64_t pieces = (rows + 7) / 8;  // of rows, for each KV head of each request
  for (int64_t i = 0; i + 2 < q.dim(); ++i) pieces *= q.size(i);
  const int64_t most = (tokens + 32 * kWarps - 1) / (32 * kWarps);
  return static_cast<int>(std::max<int64_t>(1, std::min(2 * processors(q) / std::max<int64_t>(1, pieces), most)));
}

Values raw_values(const char* name, const Tensor& v) {
  const int64_t at = v.dim() - 3;
  Values values{};
  values.raw = v.const_data_ptr(), values.dtype = dtype_of(name, v);
  values.groups = v.size(at), values.block_size = v.size(at + 1), values.dim = v.size(at + 2);
  return values;
}

// Where attention goes and what it needs on its way.
struct Output {
  int splits;
  Tensor workspace;
  float *out, *lse, *between;
  void* stream;

  // q [requests, G, R, D] or [G, R, D]; tokens: of one request.
  Output(const Tensor& q, int64_t tokens, int64_t value_dim, Tensor& to, Tensor& to_lse)
      : splits(splits_for(q, tokens)),
        workspace(torch::stable::new_empty(
            q, {attend_workspace(q.numel() / std::max<int64_t>(1, q.size(-1)), value_dim, splits)})) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i + 1 < q.dim(); ++i) shape.push_back(q.size(i));
    check("q", q, ScalarType::Float, std::vector<int64_t>(q.dim(), -1));
    check("lse", to_lse, ScalarType::Float, shape);
    shape.push_back(value_dim);
    check("out", to, ScalarType::Float, shape);
    check_places(q, to, to_lse);
    out = mutable_data<float>(to), lse = mutable_data<float>(to_lse), between = mutable_data<float>(workspace);
    stream = current_stream(q);
  }
};

// The stored values beside keys, for attention into out.
Values stored_values(const Tensor& q, PIKV_VALUE_ARGUMENTS, const Keys& keys, const Tensor& out) {
  check_wide_places(q, v, v_codes, v_scale, v_zero);
  return ValueArguments{v, v_codes, v_scale, v_zero, v_bits}.view(keys.groups, keys.block_size,
                                                                  out.size(out.dim() - 1));
}
#define PIKV_STORED_VALUES(q) stored_values(q, v, v_codes, v_scale, v_zero, v_bits, keys, out)

// Attends where keys, values or both have a low-rank part; false where none has.
bool attend_low_rank(const char* op, const Tensor& q, double softmax_scale, Keys keys,
                     const std::vector<Tensor>& k_low_rank, Values values, const std::vector<Tensor>& v_low_rank,
                     const Places& places, const Output& to) {
  if (k_low_rank.empty() && v_low_rank.empty()) return false;
  LowRank of_keys{}, of_values{};
  MaybeTensor projected;
  if (!k_low_rank.empty()) {
    of_keys = placed_part(q, k_low_rank, keys.groups, keys.block_size, keys.dim);
    projected = project_queries(op, q, softmax_scale, keys, of_keys);
    keys.low_rank = &of_keys;
  }
  if (!v_low_rank.empty()) {
    of_values = placed_part(q, v_low_rank, values.groups, values.block_size, values.dim);
    values.low_rank = &of_values;
  }
  check_launch(op, pikv_cuda_attend_low_rank(data<float>(q), q.dim() == 4 ? q.size(0) : 1, q.size(q.dim() - 2),
                                             static_cast<float>(softmax_scale), &keys, &values, &places, to.splits,
                                             to.between, to.out, to.lse, to.stream));
  return true;
}

}  // namespace

void attend_blocks(const Tensor& q, PIKV_STORED_ARGUMENTS, const Tensor& block_ids, double softmax_scale,
                   const MaybeTensor& key_positions, const MaybeTensor& query_positions, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(q.dim() == 3, "q: expected [groups, rows, channels]");
  const DeviceGuard guard(q.get_device_index());
  const Keys keys = PIKV_STORED_KEYS(q);
  const Values values = PIKV_STORED_VALUES(q);
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const int64_t count = block_ids.numel(), rows = q.size(1);
  check_positions(key_positions, {count, keys.block_size}, query_positions, rows);
  check_places(q, block_ids, key_positions, query_positions);
  const Output to(q, count * keys.block_size, values.dim, out, lse);
  Places places{};
  places.ids = data<int64_t>(block_ids), places.count = count;
  places.key_positions = data<int64_t>(key_positions), places.query_positions = data<int64_t>(query_positions);
  if (attend_low_rank("attend_blocks", q, softmax_scale, keys, k_low_rank, values, v_low_rank, places, to)) return;
  check_launch("attend_blocks", pikv_cuda_attend_blocks(data<float>(q), rows, static_cast<float>(softmax_scale), &keys,
                                                        &values, data<int64_t>(block_ids), count,
                                                        data<int64_t>(key_positions), data<int64_t>(query_positions),
                                                        to.splits, to.between, to.out, to.lse, to.stream));
}

void attend_decode(const Tensor& q, const Tensor& raw_k, const Tensor& raw_v, const Tensor& slots,
                   const Tensor& raw_first, const Tensor& raw_last, PIKV_STORED_ARGUMENTS, const Tensor& block_ids,
                   const Tensor& first_blocks, double softmax_scale, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(q.dim() == 4 && out.dim() == 4, "q, out: expected [requests, groups, rows, channels]");
  const DeviceGuard guard(q.get_device_index());
  const Tensor outs = torch::stable::new_empty(q, {2, q.size(0), q.size(1), q.size(2), out.size(3)});
  const Tensor lses = torch::stable::new_empty(q, {2, q.size(0), q.size(1), q.size(2)});
  const auto part = [](const Tensor& x, int64_t i) { return torch::stable::select(x, 0, i); };
  attend_windows(q, raw_k, raw_v, slots, raw_first, raw_last, softmax_scale, part(outs, 0), part(lses, 0));
  attend_ragged(q, k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits, v, v_codes, v_scale, v_zero, v_bits, k_low_rank,
                v_low_rank, block_ids, first_blocks, softmax_scale, part(outs, 1), part(lses, 1));
  merge_partials(outs, lses, out, lse);
}

void attend_ragged(const Tensor& q, PIKV_STORED_ARGUMENTS, const Tensor& block_ids, const Tensor& first_blocks,
                   double softmax_scale, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(q.dim() == 4 && out.dim() == 4, "q, out: expected [requests, groups, rows, channels]");
  const DeviceGuard guard(q.get_device_index());
  const Keys keys = PIKV_STORED_KEYS(q);
  const Values values = PIKV_STORED_VALUES(q);
  const int64_t requests = q.size(0);
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const Runs blocks = runs_of("first_blocks", q, first_blocks, requests, block_ids.numel());
  check_places(q, block_ids);
  const Output to(q, blocks.count * keys.block_size / std::max<int64_t>(1, requests), values.dim, out, lse);
  Places places{};
  places.ids = data<int64_t>(block_ids), places.count = blocks.count, places.first = blocks.first;
  if (attend_low_rank("attend_ragged", q, softmax_scale, keys, k_low_rank, values, v_low_rank, places, to)) return;
  check_launch("attend_ragged",
               pikv_cuda_attend_ragged(data<float>(q), q.size(2), static_cast<float>(softmax_scale), &keys, &values,
                                       data<int64_t>(block_ids), &blocks, to.splits, to.between, to.out, to.lse,
                                       to.stream));
}

void attend_windows(const Tensor& q, const Tensor& raw_k, const Tensor& raw_v, const Tensor& slots,
                    const Tensor& raw_first, const Tensor& raw_last, double softmax_scale, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(q.dim() == 4 && out.dim() == 4, "q, out: expected [requests, groups, rows, channels]");
  const DeviceGuard guard(q.get_device_index());
  check_raw("raw_k", raw_k, false, q.size(1), q.size(3));
  check_raw("raw_v", raw_v, false, q.size(1), out.size(3));
  STD_TORCH_CHECK(raw_v.size(0) == raw_k.size(0) && raw_v.size(2) == raw_k.size(2), "raw_v: expected the ",
                  raw_k.size(0), " slots of ", raw_k.size(2), " tokens of raw_k, got ", raw_v.size(0), " of ",
                  raw_v.size(2));
  STD_TORCH_CHECK(rows_apart(raw_v, 0) == rows_apart(raw_k, 0) && rows_apart(raw_v, 1) == rows_apart(raw_k, 1),
                  "raw_v: expected slots and KV heads as many rows apart as those of raw_k");
  check_wide_places(q, raw_k, raw_v);
  const Windows windows = windows_of(q, raw_k, slots, raw_first, raw_last);
  const Keys keys = raw_keys("raw_k", raw_k);
  const Values values = raw_values("raw_v", raw_v);
  const Output to(q, keys.block_size, values.dim, out, lse);
  check_launch("attend_windows",
               pikv_cuda_attend_windows(data<float>(q), q.size(0), q.size(2), static_cast<float>(softmax_scale), &keys,
                                        &values, &windows, to.splits, to.between, to.out, to.lse, to.stream));
}

void attend_at(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& key_positions,
               const MaybeTensor& query_positions, double softmax_scale, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(q.dim() == 3 && v.dim() == 3, "q, v: expected [groups, rows, channels]");
  const DeviceGuard guard(q.get_device_index());
  check_raw("k", k, true, q.size(0), q.size(2));
  check_raw("v", v, true, q.size(0), v.size(2));
  const int64_t tokens = k.size(1);
  STD_TORCH_CHECK(rows_apart(v, 0) == rows_apart(k, 0) && v.size(1) == tokens,
                  "v: expected the tokens of k, and KV heads as many rows apart");
  check_positions(key_positions, {tokens}, query_positions, q.size(1));
  check_wide_places(q, k, v);
  check_places(q, key_positions, query_positions);
  const Keys keys = raw_keys("k", k);
  const Values values = raw_values("v", v);
  const Output to(q, tokens, values.dim, out, lse);
  check_launch("attend_at",
               pikv_cuda_attend_at(data<float>(q), q.size(1), static_cast<float>(softmax_scale), &keys, &values,
                                   rows_apart(k, 0), data<int64_t>(key_positions), data<int64_t>(query_positions),
                                   to.splits, to.between, to.out, to.lse, to.stream));
}

void attend_tokens(const Tensor& q, PIKV_STORED_ARGUMENTS, const Tensor& block_ids, const Tensor& offsets,
                   const Tensor& first_tokens, double softmax_scale, const MaybeTensor& read, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(q.dim() == 4 && out.dim() == 4, "q, out: expected [requests, groups, rows, channels]");
  const DeviceGuard guard(q.get_device_index());
  const Keys keys = PIKV_STORED_KEYS(q);
  const Values values = PIKV_STORED_VALUES(q);
  check("block_ids", block_ids, ScalarType::Long, {keys.groups, -1});
  const int64_t count = block_ids.size(1), requests = q.size(0);
  check("offsets", offsets, ScalarType::Long, {keys.groups, count});
  if (read) check("read", *read, ScalarType::Bool, {keys.groups, count});
  const Runs tokens = runs_of("first_tokens", q, first_tokens, requests, count);
  check_places(q, block_ids, offsets, read);
  const Output to(q, count / std::max<int64_t>(1, requests), values.dim, out, lse);
  Places places{};
  places.ids = data<int64_t>(block_ids), places.count = count, places.first = tokens.first;
  places.offsets = data<int64_t>(offsets), places.read = data<bool>(read);
  if (attend_low_rank("attend_tokens", q, softmax_scale, keys, k_low_rank, values, v_low_rank, places, to)) return;
  check_launch("attend_tokens",
               pikv_cuda_attend_tokens(data<float>(q), q.size(2), static_cast<float>(softmax_scale), &keys, &values,
                                       data<int64_t>(block_ids), data<int64_t>(offsets), data<bool>(read), &tokens,
                                       to.splits, to.between, to.out, to.lse, to.stream));
}

void merge_partials(const Tensor& outs, const Tensor& lses, Tensor out, Tensor lse) {
  STD_TORCH_CHECK(outs.dim() >= 2 && outs.size(0) >= 1, "outs: expected [partials, ..., channels]");
  const DeviceGuard guard(outs.get_device_index());
  check("outs", outs, ScalarType::Float, std::vector<int64_t>(outs.dim(), -1));
  check("lses", lses, ScalarType::Float, std::vector<int64_t>(lses.dim(), -1));
  check("out", out, ScalarType::Float, std::vector<int64_t>(out.dim(), -1));
  check("lse", lse, ScalarType::Float, std::vector<int64_t>(lse.dim(), -1));
  const int64_t parts = outs.size(0), rows = lse.numel(), dim = outs.size(outs.dim() - 1);
  STD_TORCH_CHECK(outs.numel() == parts * rows * dim && lses.numel() == parts * rows && out.numel() == rows * dim,
                  "outs, lses, out: unexpected size");
  check_places(outs, lses, out, lse);
  check_launch("merge_partials", pikv_cuda_merge_partials(data<float>(outs), data<float>(lses), parts, rows, dim,
                                                          mutable_data<float>(out), mutable_data<float>(lse),
                                                          current_stream(outs)));
}

}  // namespace pikv::cuda
