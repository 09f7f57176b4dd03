// Reading until little enough is missed, and what is missed.

#include <cmath>

#include "ops/ops.h"
#include "ops/partials.h"

namespace pikv {

void attend_mass(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_VALUE_ARGUMENTS, const Tensor& block_ids,
                 const Tensor& first_blocks, const Tensor& coarse, double slope, const Tensor& extra,
                 const Tensor& raw_lse, double epsilon, double softmax_scale, Tensor out, Tensor lse, Tensor read) {
  const Queries queries(q, false, softmax_scale);
  const Output to(queries, false, out, lse);
  const std::vector<Tensor> k_low_rank, v_low_rank;
  const Stored stored(PIKV_STORED_OF(queries, to.value_dim));
  const int64_t requests = queries.requests, groups = queries.groups, rows = queries.rows;
  check("block_ids", block_ids, ScalarType::Long, {-1});
  const int64_t total = block_ids.numel(), size = stored.keys.block_size;
  check("coarse", coarse, ScalarType::Float, {groups, rows, total, size});
  check("extra", extra, ScalarType::Float, {groups, rows, total});
  check("raw_lse", raw_lse, ScalarType::Float, {requests, groups, rows});
  check("read", read, ScalarType::Bool, {groups, total * size});
  const Runs runs("first_blocks", first_blocks, requests, total);
  check_ids("block_ids", data<int64_t>(block_ids), total, stored.blocks);
  const CpuKernels& set = kernels();
  std::vector<PartialMemory> partials = partial_memory(requests, groups * rows, to.value_dim);
  torch::stable::parallel_for(0, requests * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t request = i / groups, head = i % groups, first = runs.begin(request),
                    at = head * rows * total + first;
      set.attend_mass(queries.of(request, head), rows, stored.keys, stored.values, data<int64_t>(block_ids) + first,
                      runs.count(request), head, data<float>(coarse) + at * size, static_cast<float>(slope),
                      data<float>(extra) + at, total, data<float>(raw_lse) + i * rows, epsilon,
                      mutable_data<bool>(read) + (head * total + first) * size,
                      partials[request].at(head * rows, to.value_dim));
    }
  });
  std::vector<int64_t> first(requests + 1);
  for (int64_t i = 0; i <= requests; ++i) first[i] = i;
  merge(partials, first, groups * rows, to.value_dim, to.out, to.lse);
}

void select_mass(const Tensor& order, const Tensor& if_unread, const Tensor& if_read, const Tensor& raw_lse,
                 const Tensor& first_tokens, double epsilon, Tensor read) {
  check("if_read", if_read, ScalarType::Float, {-1, -1, -1});
  const int64_t groups = if_read.size(0), rows = if_read.size(1), total = if_read.size(2);
  check("if_unread", if_unread, ScalarType::Float, {groups, rows, total});
  check("order", order, ScalarType::Long, {groups, total});
  check("raw_lse", raw_lse, ScalarType::Float, {-1, groups, rows});
  check("read", read, ScalarType::Bool, {groups, total});
  const int64_t requests = raw_lse.size(0);
  const Runs runs("first_tokens", first_tokens, requests, total);
  check_ids("order", data<int64_t>(order), groups * total, total);
  torch::stable::parallel_for(0, requests * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t request = i / groups, head = i % groups, count = runs.count(request);
      const int64_t* its = data<int64_t>(order) + head * total + runs.begin(request);
      std::vector<double> after(count + 1);  // missed if reading stops before this token
      int64_t needed = 0;
      for (int64_t r = 0; r < rows; ++r) {
        const float *unread = data<float>(if_unread) + (head * rows + r) * total,
                    *seen = data<float>(if_read) + (head * rows + r) * total;
        const double raw = data<float>(raw_lse)[i * rows + r];
        double top = raw;
        for (int64_t t = 0; t < count; ++t)
          top = std::max(top, static_cast<double>(std::max(unread[its[t]], seen[its[t]])));
        for (int64_t t = count; t-- > 0;) after[t] = after[t + 1] + std::exp(unread[its[t]] - top);
        // Where both vanish beside `top`, read on. What is missed falls, what is read rises: it is a beginning.
        double before = std::exp(raw - top);
        for (int64_t t = 0; t < count && after[t] >= epsilon * (after[t] + before); ++t) {
          before += std::exp(seen[its[t]] - top);
          needed = std::max(needed, t + 1);
        }
      }
      for (int64_t t = 0; t < count; ++t) mutable_data<bool>(read)[head * total + its[t]] = t < needed;
    }
  });
}

void unread_mass(const Tensor& coarse, double slope, const Tensor& spread, const Tensor& radius, const Tensor& read,
                 const Tensor& first_blocks, Tensor by_spread, Tensor by_radius) {
  check("coarse", coarse, ScalarType::Float, {-1, -1, -1, -1});
  const int64_t groups = coarse.size(0), rows = coarse.size(1), total = coarse.size(2), size = coarse.size(3);
  check("spread", spread, ScalarType::Float, {groups, rows, total});
  check("radius", radius, ScalarType::Float, {groups, rows, total});
  check("read", read, ScalarType::Bool, {groups, total * size});
  check("by_spread", by_spread, ScalarType::Float, {-1, groups, rows});
  const int64_t requests = by_spread.size(0);
  check("by_radius", by_radius, ScalarType::Float, {requests, groups, rows});
  const Runs runs("first_blocks", first_blocks, requests, total);
  const CpuKernels& set = kernels();
  torch::stable::parallel_for(0, requests * groups * rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t request = i / (groups * rows), row = i % (groups * rows), first = runs.begin(request),
                    at = row * total + first;
      set.unread_mass(data<float>(coarse) + at * size, static_cast<float>(slope), data<float>(spread) + at,
                      data<float>(radius) + at, data<bool>(read) + (row / rows * total + first) * size,
                      runs.count(request), size, mutable_data<float>(by_spread) + i,
                      mutable_data<float>(by_radius) + i);
    }
  });
}

}  // namespace pikv
