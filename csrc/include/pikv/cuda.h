// The CUDA kernels' launchers: raw device pointers and a stream, no torch and no CUDA header. Shapes and layouts as in
// kernels.h and pikv_megatron/ops/reference.
//
// Every function puts its work on the stream and returns at once: no allocation, no wait, fit for graph capture. The result
// is a cudaError_t as an int, 0 for success; what the kernels do not cover is cudaErrorInvalidValue (1). Channels are multiples
// of 16 and at most kMaxDim; pointers are aligned to 16 bytes; block ids and offsets are trusted.
#pragma once

#include <cstdint>

#include "pikv/kernels.h"

namespace pikv::cuda {

constexpr int64_t kMaxDim = 256;
constexpr int kWarps = 4;  // of a thread block; each works on blocks of its own

// Floats of workspace that attend_blocks and attend_tokens need for `rows` rows (of all KV heads) and `splits` parts.
constexpr int64_t attend_workspace(int64_t rows, int64_t value_dim, int64_t splits) { return splits * rows * (value_dim + 1); }

extern "C" {

// Matrices x [matrices, rows, cols] to codes; per_channel: scale, zero [matrices, cols], else [matrices, rows].
int pikv_cuda_quantize_block(const void* x, Dtype dtype, int64_t matrices, int64_t rows, int64_t cols, int hi_bits, int lo_bits,
                             bool per_channel, uint8_t* high, uint8_t* low, uint16_t* scale, uint16_t* zero, void* stream);

// Inverse; low null with lo_bits > 0: the middle of the high plane's interval. y [matrices, rows, cols].
int pikv_cuda_dequantize_block(const uint8_t* high, const uint8_t* low, const uint16_t* scale, const uint16_t* zero,
                               int64_t matrices, int64_t rows, int64_t cols, int hi_bits, int lo_bits, bool per_channel, float* y,
                               void* stream);

// Encodes k [count, G, B, D] and v [count, G, B, E] of one dtype into the pool's blocks ids [count]; every plane that keys and
// values have is written, raw ones as copies.
int pikv_cuda_append(const void* k, const void* v, Dtype dtype, const Keys* keys, const Values* values, const int64_t* ids,
                     int64_t count, void* stream);

// Attention of q [G, R, D] over blocks ids [count]; key_positions [count, B] and query_positions [R] may be null. The work is
// split over `splits` thread blocks per KV head; workspace: attend_workspace floats. out [G, R, E], lse [G, R].
int pikv_cuda_attend_blocks(const float* q, int64_t rows, float softmax_scale, const Keys* keys, const Values* values,
                            const int64_t* ids, int64_t count, const int64_t* key_positions, const int64_t* query_positions,
                            int splits, float* workspace, float* out, float* lse, void* stream);

// The same over single tokens ids, offsets [G, count]; read [G, count] may be null.
int pikv_cuda_attend_tokens(const float* q, int64_t rows, float softmax_scale, const Keys* keys, const Values* values,
                            const int64_t* ids, const int64_t* offsets, const bool* read, int64_t count, int splits,
                            float* workspace, float* out, float* lse, void* stream);

// Merges `parts` partials: outs [parts, rows, dim], lses [parts, rows] to out [rows, dim], lse [rows].
int pikv_cuda_merge_partials(const float* outs, const float* lses, int64_t parts, int64_t rows, int64_t dim, float* out,
                             float* lse, void* stream);

// Logits from the high plane of blocks ids [count], or [G, count] where per_head: coarse [G, R, count, B], radius and spread
// [G, R, count].
int pikv_cuda_score_tokens(const float* q, int64_t rows, float softmax_scale, const Keys* keys, const int64_t* ids, bool per_head,
                           int64_t count, float* coarse, float* radius, float* spread, void* stream);

// What bounds say of blocks ids [count]: bound, centre, spread [G, R, count]. Of keys: scale, zero, the bits, groups, dim.
int pikv_cuda_score_blocks(const float* q, int64_t rows, float softmax_scale, const Keys* keys, const int64_t* ids,
                           int64_t count, float* bound, float* centre, float* spread, void* stream);

// Attention that tokens of blocks ids [count] receive, given lse [G, R]: importance [count, B].
int pikv_cuda_token_importance(const float* q, const float* lse, int64_t rows, float softmax_scale, const Keys* keys,
                               const int64_t* ids, int64_t count, float* importance, void* stream);

// The `best` largest of scores [G, count] (no NaN) per KV head, the first of equals: indices [G, best], ascending.
int pikv_cuda_select_topk(const float* scores, int64_t groups, int64_t count, int64_t best, int64_t* indices, void* stream);

// Asks for rows ids [count] of `row_bytes` bytes each to be brought into L2.
int pikv_cuda_prefetch(const void* base, int64_t row_bytes, const int64_t* ids, int64_t count, void* stream);

}  // extern "C"

}  // namespace pikv::cuda
