// Attention to raw tokens, and the attention that they receive.

#include "ops/ops.h"
#include "ops/partials.h"

namespace pikv {

void attend_at(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& key_positions,
               const MaybeTensor& query_positions, double softmax_scale, Tensor out, Tensor lse) {
  const Queries queries(q, true, softmax_scale);
  const Output to(queries, true, out, lse);
  const int64_t groups = queries.groups, rows = queries.rows;
  const RawRows k_rows("k", k, true, groups, queries.dim), v_rows("v", v, true, groups, to.value_dim);
  const int64_t tokens = k_rows.tokens;
  STD_TORCH_CHECK(v_rows.tokens == tokens, "v: expected the ", tokens, " tokens of k, got ", v_rows.tokens);
  STD_TORCH_CHECK(!key_positions == !query_positions, "key_positions, query_positions: expected both or neither");
  if (key_positions) {
    check("key_positions", *key_positions, ScalarType::Long, {tokens});
    check("query_positions", *query_positions, ScalarType::Long, {rows});
  }
  std::vector<PartialMemory> partials = partial_memory(1, groups * rows, to.value_dim);
  const CpuKernels& set = kernels();
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      set.attend_raw(queries.of(0, head), rows, raw_keys(k_rows.of(0, head), k_rows.dtype, tokens, k_rows.dim),
                     raw_values(v_rows.of(0, head), v_rows.dtype, tokens, v_rows.dim),
                     key_positions ? data<int64_t>(*key_positions) : nullptr,
                     query_positions ? data<int64_t>(*query_positions) : nullptr,
                     partials[0].at(head * rows, to.value_dim));
  });
  merge(partials, {0, 1}, groups * rows, to.value_dim, to.out, to.lse);
}

void attend_windows(const Tensor& q, const Tensor& raw_k, const Tensor& raw_v, const Tensor& slots,
                    const Tensor& raw_first, const Tensor& raw_last, double softmax_scale, Tensor out, Tensor lse) {
  const Queries queries(q, false, softmax_scale);
  const Output to(queries, false, out, lse);
  const RawWindow raw(raw_k, raw_v, slots, raw_first, raw_last, queries, to.value_dim);
  const int64_t groups = queries.groups, requests = queries.requests;
  std::vector<PartialMemory> partials = partial_memory(requests, queries.rows_each(), to.value_dim);
  torch::stable::parallel_for(0, requests * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      raw.attend(queries, i / groups, i % groups, partials[i / groups].at(i % groups * queries.rows, to.value_dim));
  });
  std::vector<int64_t> first(requests + 1);
  for (int64_t i = 0; i <= requests; ++i) first[i] = i;
  merge(partials, first, queries.rows_each(), to.value_dim, to.out, to.lse);
}

void window_importance(const Tensor& q, const Tensor& lse, const Tensor& raw_k, const Tensor& slots,
                       const Tensor& raw_first, const Tensor& raw_last, double softmax_scale, Tensor importance) {
  const Queries queries(q, false, softmax_scale);
  const int64_t requests = queries.requests, groups = queries.groups, rows = queries.rows;
  const RawRows k("raw_k", raw_k, false, groups, queries.dim);
  const RawRuns runs(slots, raw_first, raw_last, requests, k);
  check("lse", lse, ScalarType::Float, {requests, groups, rows});
  check("importance", importance, ScalarType::Float, {requests, k.tokens});
  const CpuKernels& set = kernels();
  torch::stable::parallel_for(0, requests, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* sums = mutable_data<float>(importance) + i * k.tokens;
      std::fill(sums, sums + k.tokens, 0.0f);
      for (int64_t head = 0; head < groups; ++head)
        set.window_importance(queries.of(i, head), rows, data<float>(lse) + (i * groups + head) * rows,
                              raw_keys(k.of(runs.slots[i], head, runs.first[i]), k.dtype, runs.count(i), k.dim), 1,
                              sums + runs.first[i]);
    }
  });
}

void prompt_importance(const Tensor& q, const Tensor& lse, const Tensor& k, int64_t query_tokens, double softmax_scale,
                       Tensor importance) {
  const Queries queries(q, true, softmax_scale);
  const int64_t groups = queries.groups, rows = queries.rows;
  const RawRows k_rows("k", k, true, groups, queries.dim);
  const int64_t tokens = k_rows.tokens;
  STD_TORCH_CHECK(query_tokens >= 1 && rows % query_tokens == 0 && query_tokens <= tokens,
                  "query_tokens: expected a divisor of the rows and at most ", tokens, ", got ", query_tokens);
  check("lse", lse, ScalarType::Float, {groups, rows});
  check("importance", importance, ScalarType::Float, {tokens});
  float* sums = mutable_data<float>(importance);
  std::fill(sums, sums + tokens, 0.0f);
  for (int64_t head = 0; head < groups; ++head)
    kernels().window_importance(queries.of(0, head), rows, data<float>(lse) + head * rows,
                                raw_keys(k_rows.of(0, head), k_rows.dtype, tokens, k_rows.dim), query_tokens, sums);
}

}  // namespace pikv
