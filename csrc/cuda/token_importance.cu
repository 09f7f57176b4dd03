// token_importance: the attention that tokens of blocks receive, summed over query rows and KV heads in one order, so
// that equal input gives equal sums. A warp takes one tile and goes through the heads and rows. Over the same kernel
// window_importance, over raw tokens that are in no pool, the queries' own among them, as one block of each KV head.

#include "tile.cuh"

namespace pikv::cuda {

struct Importance {
  const float* q;    // [groups, rows, dim]
  const float* lse;  // [groups, rows]
  int64_t rows;
  float softmax_scale;
  Tile tile;
  Kind kind;
  int groups, block_size, dim;
  int64_t matrix_rows;     // of the pool from one matrix [block, KV head] to the next
  int64_t query_tokens;    // where not 0: the block's newest are the queries' own, which see what is not newer
  const int64_t* ids;      // null: block 0
  int64_t count;
  float* importance;  // [count, block_size]
  int at_warps, warp_bytes;
};

// Whether a query row sees a token of its own window.
__device__ __forceinline__ bool sees(const Importance& work, int64_t row, int64_t token) {
  return token <= work.block_size - work.query_tokens + row % work.query_tokens;
}

// Grid: pieces of kWarps tiles.
template <int ROWS>
__global__ void __launch_bounds__(kThreads, 4) importance_kernel(Importance work) {
  PIKV_DYNAMIC_SHARED(shared);
  const int dim = work.dim, lane = lane_id(), per_tile = work.tile.tokens;
  const int per_block = (work.block_size + per_tile - 1) / per_tile;
  const int token = lane % per_tile, part = lane / per_tile, parts = kLanes / per_tile;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id(), block = tile / per_block;
  const int first = static_cast<int>(tile - block * per_block) * per_tile;
  const bool working = block < work.count;
  const bool live = working && first + token < work.block_size;
  const int64_t id = working && work.ids ? work.ids[block] : 0;
  const bool fold = work.tile.scale.bytes > 0;
  float* q = reinterpret_cast<float*>(shared);
  float* folded = reinterpret_cast<float*>(shared + work.at_warps + warp_id() * work.warp_bytes);
  unsigned char* stage = reinterpret_cast<unsigned char*>(folded + (fold ? ROWS * dim : 0));

  float sum = 0.0f;
  for (int head = 0; head < work.groups; ++head) {
    const int64_t matrix = id * work.groups + head, row = matrix * work.matrix_rows + first;
    __syncwarp();  // the stage has been read
    if (working) {
      const int tokens = min(per_tile, work.block_size - first);
      copy_rows(stage, work.tile.high, tokens, [row](int i) { return row + i; });
      copy_rows(stage, work.tile.low, tokens, [row](int i) { return row + i; });
      copy_rows(stage, work.tile.scale, 1, [matrix](int) { return matrix; });
      copy_rows(stage, work.tile.zero, 1, [matrix](int) { return matrix; });
    }
    copy_async_commit();
    for (int64_t first_row = 0; first_row < work.rows; first_row += ROWS) {
      __syncthreads();  // q has been read
      load_queries<ROWS>(work.q + head * work.rows * dim, work.rows, first_row, dim, work.softmax_scale, q);
      copy_async_wait<0>();
      __syncthreads();
      float logit[ROWS] = {};
      if (fold && working) {
        fold_scale<ROWS>(work.tile, stage, q, dim, folded, logit);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) logit[r] = part == 0 ? logit[r] : 0.0f;
      }
      __syncwarp();
      if (live) dot_token<false, ROWS>(work.kind, work.tile, stage, token, fold ? folded : q, dim, part, parts, logit);
      add_parts<ROWS>(logit, per_tile);
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (first_row + r < work.rows && (!work.query_tokens || sees(work, first_row + r, first + token)))
          sum += expf(logit[r] - work.lse[head * work.rows + first_row + r]);
    }
  }
  if (live && part == 0) work.importance[block * work.block_size + first + token] = sum;
}

// Of `work` the caller sets q, lse, rows, softmax_scale, count, importance and what its op has besides.
inline int add_importance(Importance work, const Keys& keys, void* stream) {
  constexpr int kRows = 4;
  work.kind = kind_of(keys.raw, keys.dtype, keys.hi_bits, keys.lo_bits);
  if (work.kind == Kind::kUnknown || work.kind == Kind::kCodes80 || !dim_fits(keys.dim)) return cudaErrorInvalidValue;
  if (work.count == 0) return cudaSuccess;
  work.groups = static_cast<int>(keys.groups), work.block_size = static_cast<int>(keys.block_size);
  work.dim = static_cast<int>(keys.dim);
  if (work.matrix_rows == 0) work.matrix_rows = work.block_size;
  work.tile = fit_tile(keys, nullptr, keys.block_size, false);
  const int rows_bytes = kRows * work.dim * 4;
  work.at_warps = rows_bytes;
  work.warp_bytes = (work.tile.scale.bytes ? rows_bytes : 0) + work.tile.bytes;
  const int64_t tiles = work.count * ((work.block_size + work.tile.tokens - 1) / work.tile.tokens);
  return launch(importance_kernel<kRows>, dim3(static_cast<unsigned>((tiles + kWarps - 1) / kWarps)), kThreads,
                static_cast<size_t>(work.at_warps + kWarps * work.warp_bytes), static_cast<cudaStream_t>(stream), work);
}

extern "C" int pikv_cuda_token_importance(const float* q, const float* lse, int64_t rows, float softmax_scale,
                                          const Keys* keys, const int64_t* ids, int64_t count, float* importance,
                                          void* stream) {
  Importance work{};
  work.q = q, work.lse = lse, work.rows = rows, work.softmax_scale = softmax_scale;
  work.ids = ids, work.count = count, work.importance = importance;
  return add_importance(work, *keys, stream);
}

extern "C" int pikv_cuda_window_importance(const float* q, const float* lse, int64_t rows, float softmax_scale,
                                           const Keys* keys, int64_t head_rows, int64_t query_tokens, float* importance,
                                           void* stream) {
  if (query_tokens < 1 || query_tokens > keys->block_size || rows % query_tokens) return cudaErrorInvalidValue;
  Importance work{};
  work.q = q, work.lse = lse, work.rows = rows, work.softmax_scale = softmax_scale;
  work.matrix_rows = head_rows, work.query_tokens = query_tokens, work.count = 1, work.importance = importance;
  return add_importance(work, *keys, stream);
}

}  // namespace pikv::cuda
