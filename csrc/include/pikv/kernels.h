// What a CPU kernel set offers, in plain pointers: no torch header here, so kernels compile once and can be tested
// alone.
//
// Shapes as in pikv_megatron/ops/reference: blocks of B tokens, G KV heads, D key and E value channels, R query rows of
// one KV head. Every tensor is contiguous with a leading dimension of blocks. A table entry is a set of functions that
// work on a range of the work they are given; who splits it over threads is the caller (csrc/bindings.cpp).
#pragma once

#include <cstdint>

namespace pikv {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

// What is added to decoded rows: A B. Factors A are 8-bit codes [blocks, G, B, rank] with scale and zero [blocks, G,
// rank] float16; basis B [bases, G, rank, channels]; basis_of [blocks]. projected: of keys, q B^T [bases, G, R,
// padded(rank)] of the bases that are read; on CUDA as project_queries makes it.
struct LowRank {
  const uint8_t* codes;
  const uint16_t* scale;
  const uint16_t* zero;
  const float* basis;
  const int64_t* basis_of;
  const float* projected;
  int64_t rank, bases;
};

// Stored keys. raw [blocks, G, B, D] or null (then the codes are the keys); high [blocks, G, B, D*hi_bits/8]; low
// likewise or null; scale, zero [blocks, G, D] float16, or null where there are no codes.
struct Keys {
  const void* raw;
  const uint8_t* high;
  const uint8_t* low;
  const uint16_t* scale;
  const uint16_t* zero;
  Dtype dtype;  // of raw
  int hi_bits, lo_bits;
  int64_t groups, block_size, dim;
  const LowRank* low_rank;  // or null
};

// Stored values. raw [blocks, G, B, E] or null; codes [blocks, G, B, E*bits/8]; scale, zero [blocks, G, B] float16.
struct Values {
  const void* raw;
  const uint8_t* codes;
  const uint16_t* scale;
  const uint16_t* zero;
  Dtype dtype;
  int bits;
  int64_t groups, block_size, dim;
  const LowRank* low_rank;
};

// Running softmax of R rows over the keys seen so far: out [R, E] not yet divided by total; high, total [R].
struct Partial {
  float* out;
  float* high;
  float* total;
};

// Rows of q and of scratch are padded with zeros to whole vectors.
constexpr int64_t kPad = 16;
constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

struct CpuKernels {
  const char* name;

  // One matrix x [rows, cols] to packed codes. per_channel: scale, zero [cols], else [rows].
  void (*quantize)(const void* x, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int hi_bits, int lo_bits,
                   bool per_channel, uint8_t* high, uint8_t* low, uint16_t* scale, uint16_t* zero);

  // Inverse; low null with lo_bits > 0: the middle of the high plane's interval. y [rows, cols] float32; streamed:
  // written past the caches where its alignment allows it.
  void (*dequantize)(const uint8_t* high, const uint8_t* low, const uint16_t* scale, const uint16_t* zero, int64_t rows,
                     int64_t cols, int hi_bits, int lo_bits, bool per_channel, bool streamed, float* y);

  // Adds blocks ids[0, count) of every KV head to the heads' partials. q [G, R, padded(D)] with the softmax scale
  // folded in and zeros behind D; partial of head h starts at row h * R. key_positions [count, B] and query_positions
  // [R] may be null; where given, a row sees keys at its own position or before.
  void (*attend_blocks)(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* ids,
                        int64_t count, const int64_t* key_positions, const int64_t* query_positions, Partial partial);

  // Adds single tokens (ids[i], offsets[i]) of one KV head to its partial. q [R, padded(D)] as above. read may be null:
  // all are read.
  void (*attend_tokens)(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* ids,
                        const int64_t* offsets, const bool* read, int64_t count, int64_t head, Partial partial);

  // Adds raw tokens of one KV head, given as one block of it, to its partial. q [R, padded(D)]; positions as above, for
  // each token.
  void (*attend_raw)(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* key_positions,
                     const int64_t* query_positions, Partial partial);

  // Adds tokens of blocks ids[0, blocks) of one KV head to its partial, the highest ranks first, until no row misses
  // more than epsilon of its softmax. An unread token's logit is slope * coarse [R, blocks, B] + extra [R, blocks],
  // rows `stride` blocks apart; raw_lse [R] of what is read anyway. read [blocks, B] says which were read; returns how
  // many.
  int64_t (*attend_mass)(const float* q, int64_t rows, const Keys& keys, const Values& values, const int64_t* ids,
                         int64_t blocks, int64_t head, const float* coarse, float slope, const float* extra,
                         int64_t stride, const float* raw_lse, double epsilon, bool* read, Partial partial);

  // Logits of blocks ids[0, count) of one KV head from the high plane: coarse [R, count, B], radius and spread [R,
  // count], rows `stride` blocks apart. q [R, padded(D)], softmax scale folded in.
  void (*score_tokens)(const float* q, int64_t rows, const Keys& keys, const int64_t* ids, int64_t count, int64_t head,
                       float* coarse, float* radius, float* spread, int64_t stride);

  // What bounds say of blocks ids[0, count) of one KV head: bound, centre, spread [R, count], rows `stride` blocks
  // apart. q as above.
  void (*score_blocks)(const float* q, int64_t rows, const Keys& keys, const int64_t* ids, int64_t count, int64_t head,
                       float* bound, float* centre, float* spread, int64_t stride);

  // Logits of blocks ids[0, count) of one KV head, [R, count * B] with rows `stride` apart. q as above.
  void (*key_logits)(const float* q, int64_t rows, const Keys& keys, const int64_t* ids, int64_t count, int64_t head,
                     float* logits, int64_t stride);

  // Attention that tokens of blocks ids[0, count) receive from all heads' rows: importance [count, B]. q [G, R,
  // padded(D)].
  void (*token_importance)(const float* q, int64_t rows, const float* lse, const Keys& keys, const int64_t* ids,
                           int64_t count, float* importance);

  // Adds what raw tokens of one KV head, given as one block of it, receive to importance [tokens]; rows are heads times
  // query_tokens, whose own tokens are the newest.
  void (*window_importance)(const float* q, int64_t rows, const float* lse, const Keys& keys, int64_t query_tokens,
                            float* importance);

  // A token's share of the softmax, summed over rows: coarse [R, tokens], rows `stride` apart; raw_lse [R]; rank
  // [tokens].
  void (*rank_tokens)(const float* coarse, int64_t rows, int64_t tokens, int64_t stride, const float* raw_lse,
                      float* rank);

  // Where the `best` largest of `count` scores are, ascending; of equals the first.
  void (*select_topk)(const float* scores, int64_t count, int64_t best, int64_t* indices);

  // Log-sum-exp over the tokens [blocks, tokens] of one row that are not read, of slope * coarse plus the block's
  // spread, and of coarse plus its radius.
  void (*unread_mass)(const float* coarse, float slope, const float* spread, const float* radius, const bool* read,
                      int64_t blocks, int64_t tokens, float* by_spread, float* by_radius);
};

const CpuKernels* scalar_kernels();
const CpuKernels* avx2_kernels();    // null where the compiler could not build them
const CpuKernels* avx512_kernels();  // likewise
// The set of that name (scalar, avx2, avx512), for a null name the widest that this processor has; null where there is
// none.
const CpuKernels* choose_kernels(const char* name);

}  // namespace pikv
