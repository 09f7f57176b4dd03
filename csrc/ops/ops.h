// The CPU ops behind torch.ops.pikv.*: what csrc/bindings.cpp registers, and what they share. Every op checks its
// arguments, splits the work over threads and calls the kernels; it writes into tensors that it is given and allocates
// only scratch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "pikv/arguments.h"

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

void attend_blocks(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_VALUE_ARGUMENTS, PIKV_PART_ARGUMENTS,
                   const Tensor& block_ids, double softmax_scale,
                   const MaybeTensor& key_positions, const MaybeTensor& query_positions, Tensor out, Tensor lse);
void attend_decode(const Tensor& q, const Tensor& raw_k, const Tensor& raw_v, PIKV_KEY_ARGUMENTS,
                   PIKV_VALUE_ARGUMENTS, PIKV_PART_ARGUMENTS, const Tensor& block_ids, double softmax_scale, Tensor out,
                   Tensor lse);
void attend_ragged(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_VALUE_ARGUMENTS, PIKV_PART_ARGUMENTS,
                   const Tensor& block_ids, const Tensor& first_blocks, double softmax_scale, Tensor out, Tensor lse);
void attend_tokens(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_VALUE_ARGUMENTS, PIKV_PART_ARGUMENTS,
                   const Tensor& block_ids, const Tensor& offsets,
                   double softmax_scale, const MaybeTensor& read, Tensor out, Tensor lse);
void attend_mass(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_VALUE_ARGUMENTS, const Tensor& block_ids,
                 const Tensor& coarse,
                 double slope, const Tensor& extra, const Tensor& raw_lse, double epsilon, double softmax_scale,
                     Tensor out, Tensor lse,
                 Tensor read);
void attend_at(const Tensor& q, const Tensor& k, const Tensor& v, const MaybeTensor& key_positions,
               const MaybeTensor& query_positions, double softmax_scale, Tensor out, Tensor lse);
void merge_partials(const Tensor& outs, const Tensor& lses, Tensor out, Tensor lse);

void score_tokens(const Tensor& q, const MaybeTensor& k, const Tensor& k_high, const Tensor& k_scale,
                  const Tensor& k_zero, int64_t hi_bits, int64_t lo_bits, const Tensor& block_ids, double softmax_scale,
                  Tensor coarse, Tensor radius, Tensor spread);
void score_blocks(const Tensor& q, const Tensor& k_scale, const Tensor& k_zero, int64_t bits, const Tensor& block_ids,
                  double softmax_scale, Tensor bound, Tensor centre, Tensor spread);
void key_logits(const Tensor& q, PIKV_KEY_ARGUMENTS, PIKV_KEY_PART_ARGUMENT, const Tensor& block_ids,
                double softmax_scale, Tensor logits);
void token_importance(const Tensor& q, const Tensor& lse, PIKV_KEY_ARGUMENTS, PIKV_KEY_PART_ARGUMENT,
                      const Tensor& block_ids, double softmax_scale, Tensor importance);
void window_importance(const Tensor& q, const Tensor& lse, const Tensor& k, int64_t query_tokens, double softmax_scale,
                       Tensor importance);
void rank_tokens(const Tensor& coarse, const Tensor& raw_lse, Tensor rank);
void select_topk(const Tensor& scores, Tensor indices);
void unread_mass(const Tensor& coarse, double slope, const Tensor& spread, const Tensor& radius, const Tensor& read,
                 Tensor by_spread, Tensor by_radius);

// ---- shared

// The set of kernels that runs.
const CpuKernels& kernels();

// q [..., G, R, D] float32 as rows of padded(D), times `factor`.
inline std::vector<float> padded_queries(const Tensor& q, float factor) {
  const int64_t last = q.dim() - 1;
  STD_TORCH_CHECK(last >= 2, "q: expected [..., groups, rows, channels]");
  check("q", q, ScalarType::Float, std::vector<int64_t>(last + 1, -1));
  const int64_t dim = q.size(last), rows = dim ? q.numel() / dim : 0, stride = padded(dim);
  std::vector<float> out(rows * stride, 0.0f);
  const float* from = data<float>(q);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < dim; ++d) out[r * stride + d] = from[r * dim + d] * factor;
  return out;
}

// A low-rank part as the kernels take it, and the queries against its bases.
class LowRankPart {
 public:
  LowRankPart(const std::vector<Tensor>& x, int64_t groups, int64_t tokens, int64_t channels) {
    if (x.empty()) return;
    part_ = low_rank_of(x, groups, tokens, channels);
    blocks_ = x[4].numel(), groups_ = groups, channels_ = channels;
  }

  // Checks the blocks that are read, and their bases; with q [G, R, padded(channels)], projects it on these.
  void read(const int64_t* ids, int64_t count, const float* q, int64_t rows) {
    if (!part_.codes) return;
    std::vector<bool> used(part_.bases, false);
    for (int64_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(ids[i] < blocks_, "low-rank part: expected block ids below ", blocks_, ", got ", ids[i]);
      const int64_t basis = part_.basis_of[ids[i]];
      STD_TORCH_CHECK(basis >= 0 && basis < part_.bases, "basis_of: expected 0 .. ", part_.bases - 1, ", got ", basis);
      used[basis] = true;
    }
    if (!q) return;
    const int64_t all = groups_ * rows, stride = padded(part_.rank), q_stride = padded(channels_);
    projected_.assign(part_.bases * all * stride, 0.0f);
    for (int64_t b = 0; b < part_.bases; ++b)
      for (int64_t r = 0; used[b] && r < all; ++r)
        for (int64_t j = 0; j < part_.rank; ++j) {
          const float* row = part_.basis + ((b * groups_ + r / rows) * part_.rank + j) * channels_;
          double total = 0.0;
          for (int64_t d = 0; d < channels_; ++d) total += static_cast<double>(row[d]) * q[r * q_stride + d];
          projected_[(b * all + r) * stride + j] = static_cast<float>(total);
        }
    part_.projected = projected_.data();
  }

  const LowRank* get() const { return part_.codes ? &part_ : nullptr; }

 private:
  LowRank part_{};
  int64_t blocks_ = 0, groups_ = 0, channels_ = 0;
  std::vector<float> projected_;
};

inline void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t blocks) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < blocks, name, ": expected 0 .. ", blocks - 1, ", got ", ids[i]);
}

// Raw tokens [G, tokens, channels] whose rows follow each other, one head at a time.
struct RawRows {
  const char* base;
  Dtype dtype;
  int64_t tokens, dim, head_bytes;

  RawRows(const char* name, const Tensor& x, int64_t groups, int64_t channels)
      : dtype(dtype_of(name, x)), dim(channels) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == groups && x.size(2) == channels, name, ": expected [", groups,
                    ", tokens, ", channels, "]");
    STD_TORCH_CHECK(rows_follow(x), name, ": expected rows that follow each other");
    base = static_cast<const char*>(x.const_data_ptr());
    tokens = x.size(1);
    head_bytes = x.stride(0) * (dtype == Dtype::kFloat32 ? 4 : 2);
  }
  const char* of(int64_t head) const { return base + head * head_bytes; }
  Keys keys(int64_t head) const {  // one block of one head
    Keys keys{};
    keys.raw = of(head), keys.dtype = dtype, keys.groups = 1, keys.block_size = tokens, keys.dim = dim;
    return keys;
  }
};

// How many blocks the pool of these fields has.
inline int64_t blocks_of(const MaybeTensor& raw, const MaybeTensor& codes) { return (raw ? *raw : *codes).size(0); }

inline int64_t pieces_for(int64_t work, int64_t least) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(work / least, threads == 1 ? 1 : 4 * threads));
}

// Pieces of a work that goes head after head over the same blocks: few blocks each, since the heads of a block lie
// together.
inline int64_t pieces_of_blocks(int64_t count) { return std::max<int64_t>(1, count / 16); }

}  // namespace pikv
