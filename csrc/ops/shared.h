// What the CPU ops share: queries as the kernels take them, packed lists of several requests and the pieces that they
// are cut into, stored blocks with their low-rank parts, raw tokens.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "pikv/arguments.h"

namespace pikv {

// The set of kernels that runs.
const CpuKernels& kernels();

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// q [requests, G, R, D] float32, or of one request [G, R, D], as rows of padded(D) with the softmax scale folded in.
struct Queries {
  int64_t requests, groups, rows, dim, stride;
  std::vector<float> padded_rows;

  Queries(const Tensor& q, bool one_request, double softmax_scale) {
    const std::vector<int64_t> any(one_request ? 3 : 4, -1);
    check("q", q, ScalarType::Float, any);
    const int64_t last = q.dim() - 1;
    requests = one_request ? 1 : q.size(0);
    groups = q.size(last - 2), rows = q.size(last - 1), dim = q.size(last), stride = padded(dim);
    const int64_t all = requests * groups * rows;
    padded_rows.assign(all * stride, 0.0f);
    const float *from = data<float>(q), factor = static_cast<float>(softmax_scale);
    for (int64_t r = 0; r < all; ++r)
      for (int64_t d = 0; d < dim; ++d) padded_rows[r * stride + d] = from[r * dim + d] * factor;
  }

  const float* of(int64_t request, int64_t head = 0) const {
    return padded_rows.data() + (request * groups + head) * rows * stride;
  }
  // Rows of a request over all KV heads.
  int64_t rows_each() const { return groups * rows; }
};

inline void check_ids(const char* name, const int64_t* ids, int64_t count, int64_t blocks) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < blocks, name, ": expected 0 .. ", blocks - 1, ", got ", ids[i]);
}

// Whose what is in a packed list: request i has the entries from first[i] up to first[i + 1].
struct Runs {
  std::vector<int64_t> first;

  explicit Runs(int64_t total) : first{0, total} {}  // one request's
  Runs(const char* name, const Tensor& x, int64_t requests, int64_t total) {
    check(name, x, ScalarType::Long, {requests + 1});
    first.assign(data<int64_t>(x), data<int64_t>(x) + requests + 1);
    STD_TORCH_CHECK(first[0] == 0 && first[requests] == total && std::is_sorted(first.begin(), first.end()), name,
                    ": expected 0, ascending, to ", total);
  }
  int64_t requests() const { return static_cast<int64_t>(first.size()) - 1; }
  int64_t begin(int64_t request) const { return first[request]; }
  int64_t count(int64_t request) const { return first[request + 1] - first[request]; }
};

// The runs of some requests, [from, to), cut into pieces of at most `most` entries; an empty run is one empty piece.
struct Pieces {
  struct Piece {
    int64_t request, first, last;
    int64_t count() const { return last - first; }
  };
  std::vector<Piece> all;
  std::vector<int64_t> begin;  // where a request's pieces begin, and the last one's end: [to - from + 1]

  Pieces(const Runs& runs, int64_t from, int64_t to, int64_t most) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t count = runs.count(i), parts = std::max<int64_t>(1, (count + most - 1) / most);
      begin.push_back(size());
      for (int64_t p = 0; p < parts; ++p)
        all.push_back({i, runs.begin(i) + count * p / parts, runs.begin(i) + count * (p + 1) / parts});
    }
    begin.push_back(size());
  }
  Pieces(const Runs& runs, int64_t most) : Pieces(runs, 0, runs.requests(), most) {}
  int64_t size() const { return static_cast<int64_t>(all.size()); }
};

// Entries of a piece, for work of `total` entries whose pieces need memory of their own: some four pieces a thread,
// none of fewer than `least`; with one thread there is nothing to share.
inline int64_t entries_apiece(int64_t total, int64_t least) {
  const int64_t threads = thread_count();
  return threads == 1 ? std::max<int64_t>(1, total) : std::max(least, total / (4 * threads) + 1);
}

// Blocks of a piece, for work that goes head after head over the same blocks and needs no memory: few, since the heads
// of a block lie together.
constexpr int64_t kBlocksApiece = 16;

// A low-rank part as the kernels take it, and one request's queries against its bases.
class LowRankPart {
 public:
  LowRankPart(const std::vector<Tensor>& x, int64_t groups, int64_t tokens, int64_t channels) {
    if (x.empty()) return;
    part_ = low_rank_of(x, groups, tokens, channels);
    blocks_ = x[4].numel(), groups_ = groups, channels_ = channels;
  }
  LowRankPart(const LowRankPart&) = delete;
  LowRankPart& operator=(const LowRankPart&) = delete;

  // Checks the blocks that are read, `lists` lists of `count` ids that lie `apart` ids apart, and their bases; with q
  // [G, R, padded(channels)], projects it on these.
  void read(const int64_t* ids, int64_t count, int64_t lists, int64_t apart, const float* q, int64_t rows) {
    if (!part_.codes) return;
    std::vector<bool> used(part_.bases, false);
    for (int64_t i = 0; i < lists * count; ++i) {
      const int64_t id = ids[i / count * apart + i % count];
      STD_TORCH_CHECK(id < blocks_, "low-rank part: expected block ids below ", blocks_, ", got ", id);
      const int64_t basis = part_.basis_of[id];
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

// How many blocks the pool of these fields has.
inline int64_t blocks_of(const MaybeTensor& raw, const MaybeTensor& codes) { return (raw ? *raw : *codes).size(0); }

// The stored keys of an op, checked, and how many blocks there are.
struct StoredKeys {
  Keys keys;
  LowRankPart part;
  int64_t blocks;

  StoredKeys(const Queries& q, PIKV_KEY_ARGUMENTS, PIKV_KEY_PART_ARGUMENT)
      : keys(KeyArguments{k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits}.view(q.groups, q.dim)),
        part(k_low_rank, q.groups, keys.block_size, q.dim), blocks(blocks_of(k, k_high)) {
    keys.low_rank = part.get();
  }
};
#define PIKV_KEYS_OF(q) q, k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits, k_low_rank

// Stored keys and values.
struct Stored : StoredKeys {
  Values values;
  LowRankPart value_part;

  Stored(const Queries& q, int64_t value_dim, PIKV_KEY_ARGUMENTS, PIKV_VALUE_ARGUMENTS, PIKV_PART_ARGUMENTS)
      : StoredKeys(PIKV_KEYS_OF(q)),
        values(ValueArguments{v, v_codes, v_scale, v_zero, v_bits}.view(q.groups, keys.block_size, value_dim)),
        value_part(v_low_rank, q.groups, keys.block_size, value_dim) {
    blocks = std::min(blocks, blocks_of(v, v_codes));
    values.low_rank = value_part.get();
  }
};
#define PIKV_STORED_OF(q, value_dim)                                                                              \
  q, value_dim, k, k_high, k_low, k_scale, k_zero, hi_bits, lo_bits, v, v_codes, v_scale, v_zero, v_bits, k_low_rank, \
      v_low_rank

// Calls work(from, to) for requests that can be attended to together: all, or where there is a low-rank part, whose
// bases are met by one request's queries at a time, each alone.
template <class Work>
void together(int64_t requests, bool low_rank, Work work) {
  const int64_t step = low_rank ? 1 : std::max<int64_t>(1, requests);
  for (int64_t i = 0; i < requests; i += step) work(i, i + step);
}

// Raw keys and values of one KV head of a request, `tokens` of them, as one block.
inline Keys raw_keys(const void* rows, Dtype dtype, int64_t tokens, int64_t dim) {
  Keys keys{};
  keys.raw = rows, keys.dtype = dtype, keys.groups = 1, keys.block_size = tokens, keys.dim = dim;
  return keys;
}
inline Values raw_values(const void* rows, Dtype dtype, int64_t tokens, int64_t dim) {
  Values values{};
  values.raw = rows, values.dtype = dtype, values.groups = 1, values.block_size = tokens, values.dim = dim;
  return values;
}

// Raw tokens [slots, G, C, channels], or [G, C, channels] of one slot, whose rows follow each other.
struct RawRows {
  const char* base;
  Dtype dtype;
  int64_t slots, tokens, dim, slot_bytes, head_bytes, row_bytes;

  RawRows(const char* name, const Tensor& x, bool one_slot, int64_t groups, int64_t channels)
      : dtype(dtype_of(name, x)), dim(channels) {
    const int64_t dims = one_slot ? 3 : 4, at = dims - 3, bytes = dtype == Dtype::kFloat32 ? 4 : 2;
    STD_TORCH_CHECK(x.dim() == dims && x.size(at) == groups && x.size(at + 2) == channels, name, ": expected [",
                    one_slot ? "" : "slots, ", groups, ", tokens, ", channels, "]");
    STD_TORCH_CHECK(rows_follow(x), name, ": expected rows that follow each other");
    base = static_cast<const char*>(x.const_data_ptr());
    slots = one_slot ? 1 : x.size(0), tokens = x.size(at + 1);
    slot_bytes = one_slot ? 0 : x.stride(0) * bytes, head_bytes = x.stride(at) * bytes, row_bytes = channels * bytes;
  }
  const void* of(int64_t slot, int64_t head, int64_t token = 0) const {
    return base + slot * slot_bytes + head * head_bytes + token * row_bytes;
  }
};

// Which raw tokens of a buffer are each request's.
struct RawRuns {
  const int64_t *slots, *first, *last;

  RawRuns(const Tensor& slots_, const Tensor& raw_first, const Tensor& raw_last, int64_t requests, const RawRows& k)
      : slots(data<int64_t>(slots_)), first(data<int64_t>(raw_first)), last(data<int64_t>(raw_last)) {
    check("slots", slots_, ScalarType::Long, {requests});
    check("raw_first", raw_first, ScalarType::Long, {requests});
    check("raw_last", raw_last, ScalarType::Long, {requests});
    check_ids("slots", slots, requests, k.slots);
    for (int64_t i = 0; i < requests; ++i)
      STD_TORCH_CHECK(0 <= first[i] && first[i] <= last[i] && last[i] <= k.tokens,
                      "raw_first, raw_last: expected 0 <= first <= last <= ", k.tokens, ", got ", first[i], " and ",
                      last[i]);
  }
  int64_t count(int64_t request) const { return last[request] - first[request]; }
};

}  // namespace pikv
