// The CUDA kernels' launchers: raw device pointers and a stream, no torch and no CUDA header. Shapes and layouts as in
// kernels.h and pikv_megatron/ops/reference.
//
// Every function puts its work on the stream and returns at once: no allocation, no wait, fit for graph capture. The
// result is a cudaError_t as an int, 0 for success; what the kernels do not cover is cudaErrorInvalidValue (1).
// Channels are multiples of 16 and at most kMaxDim, ranks at most kMaxDim; pointers are aligned to 16 bytes; block ids,
// offsets and bases of blocks are trusted.
#pragma once

#include <cstdint>

#include "pikv/kernels.h"

namespace pikv::cuda {

constexpr int64_t kMaxDim = 256;
constexpr int kWarps = 4;  // of a thread block; each works on blocks of its own

// Floats of workspace that every attend_* needs for `rows` rows (of all KV heads) and `splits` parts.
constexpr int64_t attend_workspace(int64_t rows, int64_t value_dim, int64_t splits) {
  return splits * rows * (value_dim + 1);
}

// Blocks [count, G, B, channels] of raw numbers whose rows follow each other: the bytes from one block, and one KV
// head, to the next.
struct Blocks {
  const void* x;
  int64_t block_bytes, head_bytes;
};

// A packed list of `count` entries: request i has those from first[i] up to first[i + 1]. In device memory, as all
// lists are.
struct Runs {
  const int64_t* first;
  int64_t requests, count;
};

// Raw tokens outside pools, in a buffer of slots whose KV heads' rows follow each other: request i has the tokens from
// first[i] up to last[i] of slots[i]. slot_rows and head_rows are the rows from one slot, and from one KV head, to the
// next, of keys and of values alike. Without slots one request has all tokens of one slot.
struct Windows {
  const int64_t *slots, *first, *last;
  int64_t slot_rows, head_rows;
};

// The tokens that attention goes to; what is not said is null. Whole blocks ids [count], where there are several
// requests those of request i from first[i] on; key_positions [count, B] and query_positions [R]. With offsets single
// tokens, of every KV head its own: ids, offsets and read [G, count].
struct Places {
  const int64_t* ids;
  int64_t count;
  const int64_t *first, *offsets;
  const bool* read;
  const int64_t *key_positions, *query_positions;
};

extern "C" {

// Matrices x [matrices, rows, cols] to codes; per_channel: scale, zero [matrices, cols], else [matrices, rows].
int pikv_cuda_quantize_block(const void* x, Dtype dtype, int64_t matrices, int64_t rows, int64_t cols, int hi_bits,
                             int lo_bits, bool per_channel, uint8_t* high, uint8_t* low, uint16_t* scale,
                             uint16_t* zero, void* stream);

// Inverse; low null with lo_bits > 0: the middle of the high plane's interval. y [matrices, rows, cols].
int pikv_cuda_dequantize_block(const uint8_t* high, const uint8_t* low, const uint16_t* scale, const uint16_t* zero,
                               int64_t matrices, int64_t rows, int64_t cols, int hi_bits, int lo_bits, bool per_channel,
                               float* y, void* stream);

// Encodes k [count, G, B, D] and v [count, G, B, E] of one dtype into the pool's blocks ids [count]; every plane that
// keys and values have is written, raw ones as copies.
int pikv_cuda_append(const Blocks* k, const Blocks* v, Dtype dtype, const Keys* keys, const Values* values,
                     const int64_t* ids, int64_t count, void* stream);

// Attention of q [G, R, D] over blocks ids [count]; key_positions [count, B] and query_positions [R] may be null. The
// work is split over `splits` thread blocks per KV head; workspace: attend_workspace floats. out [G, R, E], lse [G, R].
int pikv_cuda_attend_blocks(const float* q, int64_t rows, float softmax_scale, const Keys* keys, const Values* values,
                            const int64_t* ids, int64_t count, const int64_t* key_positions,
                            const int64_t* query_positions, int splits, float* workspace, float* out, float* lse,
                            void* stream);

// The same for several requests, each over its own blocks: q [requests, G, R, D], out [requests, G, R, E], lse
// [requests, G, R].
int pikv_cuda_attend_ragged(const float* q, int64_t rows, float softmax_scale, const Keys* keys, const Values* values,
                            const int64_t* ids, const Runs* blocks, int splits, float* workspace, float* out,
                            float* lse, void* stream);

// The same over each request's raw tokens, in slots of block_size tokens, which keys and values say.
int pikv_cuda_attend_windows(const float* q, int64_t requests, int64_t rows, float softmax_scale, const Keys* keys,
                             const Values* values, const Windows* windows, int splits, float* workspace, float* out,
                             float* lse, void* stream);

// Of one request over raw keys [G, S, D] and values [G, S, E] outside pools, S the block_size that keys and values say,
// KV heads `head_rows` rows apart; key_positions [S] and query_positions [R] may be null.
int pikv_cuda_attend_at(const float* q, int64_t rows, float softmax_scale, const Keys* keys, const Values* values,
                        int64_t head_rows, const int64_t* key_positions, const int64_t* query_positions, int splits,
                        float* workspace, float* out, float* lse, void* stream);

// Of several requests over single tokens ids, offsets [G, count]; read [G, count] may be null.
int pikv_cuda_attend_tokens(const float* q, int64_t rows, float softmax_scale, const Keys* keys, const Values* values,
                            const int64_t* ids, const int64_t* offsets, const bool* read, const Runs* tokens,
                            int splits, float* workspace, float* out, float* lse, void* stream);

// attend_blocks, attend_ragged and attend_tokens where keys, values or both have a low-rank part; of keys with
// `projected`, see project_queries. q [requests, G, R, D].
int pikv_cuda_attend_low_rank(const float* q, int64_t requests, int64_t rows, float softmax_scale, const Keys* keys,
                              const Values* values, const Places* places, int splits, float* workspace, float* out,
                              float* lse, void* stream);

// Merges `parts` partials: outs [parts, rows, dim], lses [parts, rows] to out [rows, dim], lse [rows].
int pikv_cuda_merge_partials(const float* outs, const float* lses, int64_t parts, int64_t rows, int64_t dim, float* out,
                             float* lse, void* stream);

// Logits from the high plane of blocks ids [count], or [G, count] where per_head, with the rows of their requests in q
// [requests, G, R, D]: coarse [G, R, count, B], radius and spread [G, R, count].
int pikv_cuda_score_tokens(const float* q, int64_t rows, float softmax_scale, const Keys* keys, const int64_t* ids,
                           bool per_head, const Runs* blocks, float* coarse, float* radius, float* spread,
                           void* stream);

// Logits of blocks ids [count] from whole keys: logits [G, R, count * B].
int pikv_cuda_key_logits(const float* q, int64_t rows, float softmax_scale, const Keys* keys, const int64_t* ids,
                         const Runs* blocks, float* logits, void* stream);
// Adds to these what keys->low_rank adds to the keys, with `projected` as project_queries makes it.
int pikv_cuda_low_rank_logits(int64_t rows, const Keys* keys, const int64_t* ids, const Runs* blocks, float* logits,
                              void* stream);
// Of q [requests, G, R, D] what the launchers want as `projected` of the keys' part: softmax_scale * q B^T of every
// basis, [bases, G, requests * R, rank].
int pikv_cuda_project_queries(const float* q, int64_t requests, int64_t rows, float softmax_scale, int64_t groups,
                              int64_t dim, const LowRank* part, float* projected, void* stream);

// What bounds say of blocks ids [count]: bound, centre, spread [G, R, count]. Of keys: scale, zero, the bits, groups,
// dim.
int pikv_cuda_score_blocks(const float* q, int64_t rows, float softmax_scale, const Keys* keys, const int64_t* ids,
                           const Runs* blocks, float* bound, float* centre, float* spread, void* stream);

// Attention that tokens of blocks ids [count] receive from the rows of their requests, given lse [requests, G, R]:
// importance [count, B].
int pikv_cuda_token_importance(const float* q, const float* lse, int64_t rows, float softmax_scale, const Keys* keys,
                               const int64_t* ids, const Runs* blocks, float* importance, void* stream);

// The same for each request's raw tokens (see attend_windows): importance [requests, C], C the block_size that keys
// say, 0 where a request has none.
int pikv_cuda_window_importance(const float* q, const float* lse, int64_t requests, int64_t rows, float softmax_scale,
                                const Keys* keys, const Windows* windows, float* importance, void* stream);

// The same for one request's raw keys [G, S, D] (see attend_at), whose newest query_tokens are the queries' own; rows
// are heads times query_tokens: importance [S].
int pikv_cuda_prompt_importance(const float* q, const float* lse, int64_t rows, float softmax_scale, const Keys* keys,
                                int64_t head_rows, int64_t query_tokens, float* importance, void* stream);

// A token's share of its request's softmax over coarse [G, R, count] and what raw_lse [requests, G, R] stands for,
// summed over rows: rank [G, count]. workspace: requests * G * R floats.
int pikv_cuda_rank_tokens(const float* coarse, const float* raw_lse, int64_t groups, int64_t rows, const Runs* tokens,
                          float* workspace, float* rank, void* stream);

// Attention that tokens of blocks receive, given their logits [rows, count * B] of all KV heads and lse [requests,
// rows]: importance [count, B].
int pikv_cuda_logits_importance(const float* logits, const float* lse, int64_t rows, const Runs* blocks,
                                int64_t block_size, float* importance, void* stream);

// Log-sum-exp over each request's tokens that are not read [G, count * B] of slope * coarse [G, R, count, B] plus
// spread, and of coarse plus radius [G, R, count]: by_spread, by_radius [requests, G, R].
int pikv_cuda_unread_mass(const float* coarse, float slope, const float* spread, const float* radius, const bool* read,
                          int64_t groups, int64_t rows, const Runs* blocks, int64_t block_size, float* by_spread,
                          float* by_radius, void* stream);

// The largest of each request's scores [G, count] (no NaN) per KV head, the first of equals, as many as `chosen` says:
// their places in the list, indices [G, chosen->count], ascending.
int pikv_cuda_select_topk(const float* scores, int64_t groups, const Runs* tokens, const Runs* chosen, int64_t* indices,
                          void* stream);

// Which tokens are read until no row of a KV head misses more than epsilon: order [G, count] has the places of each
// request's tokens, the best first; if_unread, if_read [G, R, count] their logits; raw_lse [requests, G, R] of what is
// read anyway. read [G, count]. workspace: requests * G * R numbers.
int pikv_cuda_select_mass(const int64_t* order, const float* if_unread, const float* if_read, const float* raw_lse,
                          int64_t groups, int64_t rows, const Runs* tokens, float epsilon, int32_t* workspace,
                          bool* read, void* stream);

// Asks for rows ids [count] of `row_bytes` bytes each to be brought into L2.
int pikv_cuda_prefetch(const void* base, int64_t row_bytes, const int64_t* ids, int64_t count, void* stream);

}  // extern "C"

}  // namespace pikv::cuda
