// token_importance: the attention that the tokens of blocks receive, summed over query rows and KV heads in one order, so that
// equal input gives equal sums. A warp takes one tile and goes through the heads and rows.

#include "tile.cuh"

namespace pikv::cuda {

constexpr int kImportanceRows = 4;

struct Importance {
  const float* q;    // [groups, rows, dim]
  const float* lse;  // [groups, rows]
  int64_t rows;
  float softmax_scale;
  Tile tile;
  Kind kind;
  int groups, block_size, dim;
  const int64_t* ids;
  int64_t count;
  float* importance;  // [count, block_size]
  int at_warps, warp_bytes;
};

// Grid: pieces of kWarps tiles.
__global__ void __launch_bounds__(kThreads, 4) token_importance_kernel(Importance work) {
  PIKV_DYNAMIC_SHARED(shared);
  const int dim = work.dim, lane = lane_id(), per_tile = work.tile.tokens;
  const int per_block = (work.block_size + per_tile - 1) / per_tile;
  const int token = lane % per_tile, part = lane / per_tile, parts = kLanes / per_tile;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id(), block = tile / per_block;
  const int first = static_cast<int>(tile - block * per_block) * per_tile;
  const bool working = block < work.count;
  const bool live = working && first + token < work.block_size;
  const int64_t id = working ? work.ids[block] : 0;
  const bool fold = work.tile.scale.bytes > 0;
  float* q = reinterpret_cast<float*>(shared);
  float* folded = reinterpret_cast<float*>(shared + work.at_warps + warp_id() * work.warp_bytes);
  unsigned char* stage = reinterpret_cast<unsigned char*>(folded + (fold ? kImportanceRows * dim : 0));

  float sum = 0.0f;
  for (int head = 0; head < work.groups; ++head) {
    const int64_t matrix = id * work.groups + head, row = matrix * work.block_size + first;
    __syncwarp();  // the stage has been read
    if (working) {
      const int tokens = min(per_tile, work.block_size - first);
      copy_rows(stage, work.tile.high, tokens, [row](int i) { return row + i; });
      copy_rows(stage, work.tile.low, tokens, [row](int i) { return row + i; });
      copy_rows(stage, work.tile.scale, 1, [matrix](int) { return matrix; });
      copy_rows(stage, work.tile.zero, 1, [matrix](int) { return matrix; });
    }
    copy_async_commit();
    for (int64_t first_row = 0; first_row < work.rows; first_row += kImportanceRows) {
      __syncthreads();  // q has been read
      load_queries<kImportanceRows>(work.q + head * work.rows * dim, work.rows, first_row, dim, work.softmax_scale, q);
      copy_async_wait<0>();
      __syncthreads();
      float logit[kImportanceRows] = {};
      if (fold && working) {
        fold_scale<kImportanceRows>(work.tile, stage, q, dim, folded, logit);
#pragma unroll
        for (int r = 0; r < kImportanceRows; ++r) logit[r] = part == 0 ? logit[r] : 0.0f;
      }
      __syncwarp();
      if (live) dot_token<false, kImportanceRows>(work.kind, work.tile, stage, token, fold ? folded : q, dim, part, parts, logit);
      add_parts<kImportanceRows>(logit, per_tile);
#pragma unroll
      for (int r = 0; r < kImportanceRows; ++r)
        if (first_row + r < work.rows) sum += expf(logit[r] - work.lse[head * work.rows + first_row + r]);
    }
  }
  if (live && part == 0) work.importance[block * work.block_size + first + token] = sum;
}

extern "C" int pikv_cuda_token_importance(const float* q, const float* lse, int64_t rows, float softmax_scale, const Keys* keys,
                                          const int64_t* ids, int64_t count, float* importance, void* stream) {
  Importance work{};
  work.kind = kind_of(keys->raw, keys->dtype, keys->hi_bits, keys->lo_bits);
  if (work.kind == Kind::kUnknown || work.kind == Kind::kCodes80 || !dim_fits(keys->dim)) return cudaErrorInvalidValue;
  if (count == 0) return cudaSuccess;
  work.q = q, work.lse = lse, work.rows = rows, work.softmax_scale = softmax_scale;
  work.groups = static_cast<int>(keys->groups), work.block_size = static_cast<int>(keys->block_size);
  work.dim = static_cast<int>(keys->dim);
  work.tile = fit_tile(*keys, nullptr, keys->block_size, false);
  work.ids = ids, work.count = count, work.importance = importance;
  const int rows_bytes = kImportanceRows * work.dim * 4;
  work.at_warps = rows_bytes;
  work.warp_bytes = (work.tile.scale.bytes ? rows_bytes : 0) + work.tile.bytes;
  const int64_t tiles = count * ((work.block_size + work.tile.tokens - 1) / work.tile.tokens);
  return launch(token_importance_kernel, dim3(static_cast<unsigned>((tiles + kWarps - 1) / kWarps)), kThreads,
                static_cast<size_t>(work.at_warps + kWarps * work.warp_bytes), static_cast<cudaStream_t>(stream), work);
}

}  // namespace pikv::cuda
