// token_importance: the attention that tokens of blocks receive, summed over query rows and KV heads in one order, so
// that equal input gives equal sums. A warp takes one tile and goes through the heads and rows. Over the same kernel
// window_importance and prompt_importance, over raw tokens that are in no pool, as one block of each KV head.

#include "runs.cuh"
#include "tile.cuh"

namespace pikv::cuda {

struct Importance {
  const float* q;    // [requests, groups, rows, dim]
  const float* lse;  // [requests, groups, rows]
  int64_t rows;
  float softmax_scale;
  Tile tile;
  Kind kind;
  int groups, block_size, dim;
  bool raw;              // raw tokens, a block of each request, not those of ids
  const int64_t* ids;    // [count]
  Runs blocks;           // whose they are; of raw tokens `first` is null
  Windows windows;       // of raw tokens
  int64_t query_tokens;  // where not 0: the newest tokens are the queries' own, which see what is not newer
  float* importance;     // [count, block_size]
  int at_warps, warp_bytes;
};

// The tile of a warp, tokens from `first` on of a block: its request, where the block is (its matrix [block, KV head]
// of the first head; of raw tokens the slot's first row), and which of its tokens count.
struct ImportanceTile {
  int64_t block, at;
  int request, first, begin, end;
  bool there;
};

__device__ __forceinline__ ImportanceTile tile_of(const Importance& work, int64_t tile) {
  const int per_block = (work.block_size + work.tile.tokens - 1) / work.tile.tokens;
  ImportanceTile its{};
  its.block = work.raw ? blockIdx.y : tile / per_block;
  its.first = static_cast<int>(work.raw ? tile : tile - its.block * per_block) * work.tile.tokens;
  its.there = its.block < work.blocks.count && its.first < work.block_size;
  its.end = work.block_size;
  if (!its.there) return its;
  if (!work.raw) {
    its.request = static_cast<int>(request_of(work.blocks, its.block));
    its.at = work.ids[its.block] * work.groups;
  } else {
    its.request = static_cast<int>(its.block);
    if (!work.windows.slots) return its;
    its.at = work.windows.slots[its.block] * work.windows.slot_rows;
    its.begin = static_cast<int>(work.windows.first[its.block]);
    its.end = static_cast<int>(work.windows.last[its.block]);
  }
  return its;
}

// Whether a query row sees a token of its own window.
__device__ __forceinline__ bool sees(const Importance& work, int64_t row, int64_t token) {
  return token <= work.block_size - work.query_tokens + row % work.query_tokens;
}

// Grid: pieces of kWarps tiles, of raw tokens those of one request, and the requests. The thread block goes through the
// requests that its tiles are of, mostly one.
template <int ROWS>
__global__ void __launch_bounds__(kThreads, 4) importance_kernel(Importance work) {
  PIKV_DYNAMIC_SHARED(shared);
  const int dim = work.dim, lane = lane_id(), per_tile = work.tile.tokens;
  const int token = lane % per_tile, part = lane / per_tile, parts = kLanes / per_tile;
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kWarps;
  const ImportanceTile tile = tile_of(work, piece + warp_id());
  const int tokens = min(per_tile, work.block_size - tile.first), place = tile.first + token;
  const bool live = tile.there && place >= tile.begin && place < tile.end;
  const bool fold = work.tile.scale.bytes > 0;
  float* q = reinterpret_cast<float*>(shared);
  float* folded = reinterpret_cast<float*>(shared + work.at_warps + warp_id() * work.warp_bytes);
  unsigned char* stage = reinterpret_cast<unsigned char*>(folded + (fold ? ROWS * dim : 0));

  int request = static_cast<int>(blockIdx.y), last = request;
  if (!work.raw) {
    const int per_block = (work.block_size + per_tile - 1) / per_tile;
    const int64_t newest = (piece + kWarps - 1) / per_block;
    request = static_cast<int>(request_of(work.blocks, piece / per_block));
    last = static_cast<int>(request_of(work.blocks, newest < work.blocks.count ? newest : work.blocks.count - 1));
  }
  float sum = 0.0f;
  for (; request <= last; ++request) {
    const bool working = tile.there && tile.request == request;
    for (int head = 0; head < work.groups; ++head) {
      __syncwarp();  // the stage has been read
      if (working) {
        const int64_t matrix = tile.at + head;
        const int64_t row =
            tile.first + (work.raw ? tile.at + head * work.windows.head_rows : matrix * work.block_size);
        copy_rows(stage, work.tile.high, tokens, [row](int i) { return row + i; });
        copy_rows(stage, work.tile.low, tokens, [row](int i) { return row + i; });
        copy_rows(stage, work.tile.scale, 1, [matrix](int) { return matrix; });
        copy_rows(stage, work.tile.zero, 1, [matrix](int) { return matrix; });
      }
      copy_async_commit();
      const int64_t rows_before = (static_cast<int64_t>(request) * work.groups + head) * work.rows;
      for (int64_t first_row = 0; first_row < work.rows; first_row += ROWS) {
        __syncthreads();  // q has been read
        load_queries<ROWS>(work.q + rows_before * dim, work.rows, first_row, dim, work.softmax_scale, q);
        copy_async_wait<0>();
        __syncthreads();
        float logit[ROWS] = {};
        if (fold && working) {
          fold_scale<ROWS>(work.tile, stage, q, dim, folded, logit);
#pragma unroll
          for (int r = 0; r < ROWS; ++r) logit[r] = part == 0 ? logit[r] : 0.0f;
        }
        __syncwarp();
        if (working && live)
          dot_token<false, ROWS>(work.kind, work.tile, stage, token, fold ? folded : q, dim, part, parts, logit);
        add_parts<ROWS>(logit, per_tile);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
          if (working && first_row + r < work.rows && (!work.query_tokens || sees(work, first_row + r, place)))
            sum += expf(logit[r] - work.lse[rows_before + first_row + r]);
      }
    }
  }
  if (tile.there && token < tokens && part == 0)
    work.importance[tile.block * work.block_size + place] = live ? sum : 0.0f;
}

// Of `work` the caller sets q, lse, rows, softmax_scale, importance and where the tokens are.
inline int add_importance(Importance work, const Keys& keys, void* stream) {
  constexpr int kRows = 4;
  work.kind = kind_of(keys.raw, keys.dtype, keys.hi_bits, keys.lo_bits);
  if (work.kind == Kind::kUnknown || work.kind == Kind::kCodes80 || !dim_fits(keys.dim)) return cudaErrorInvalidValue;
  if (work.blocks.count == 0 || keys.block_size == 0) return cudaSuccess;
  work.groups = static_cast<int>(keys.groups), work.block_size = static_cast<int>(keys.block_size);
  work.dim = static_cast<int>(keys.dim);
  work.tile = fit_tile(keys, nullptr, keys.block_size, false);
  const int rows_bytes = kRows * work.dim * 4;
  work.at_warps = rows_bytes;
  work.warp_bytes = (work.tile.scale.bytes ? rows_bytes : 0) + work.tile.bytes;
  const int64_t per_block = (work.block_size + work.tile.tokens - 1) / work.tile.tokens;
  const int64_t tiles = work.raw ? per_block : work.blocks.count * per_block;
  const dim3 grid(static_cast<unsigned>((tiles + kWarps - 1) / kWarps),
                  static_cast<unsigned>(work.raw ? work.blocks.count : 1));
  return launch(importance_kernel<kRows>, grid, kThreads,
                static_cast<size_t>(work.at_warps + kWarps * work.warp_bytes), static_cast<cudaStream_t>(stream), work);
}

extern "C" int pikv_cuda_token_importance(const float* q, const float* lse, int64_t rows, float softmax_scale,
                                          const Keys* keys, const int64_t* ids, const Runs* blocks, float* importance,
                                          void* stream) {
  Importance work{};
  work.q = q, work.lse = lse, work.rows = rows, work.softmax_scale = softmax_scale;
  work.ids = ids, work.blocks = *blocks, work.importance = importance;
  return add_importance(work, *keys, stream);
}

extern "C" int pikv_cuda_window_importance(const float* q, const float* lse, int64_t requests, int64_t rows,
                                           float softmax_scale, const Keys* keys, const Windows* windows,
                                           float* importance, void* stream) {
  Importance work{};
  work.q = q, work.lse = lse, work.rows = rows, work.softmax_scale = softmax_scale;
  work.raw = true, work.windows = *windows, work.blocks = {nullptr, requests, requests}, work.importance = importance;
  return add_importance(work, *keys, stream);
}

extern "C" int pikv_cuda_prompt_importance(const float* q, const float* lse, int64_t rows, float softmax_scale,
                                           const Keys* keys, int64_t head_rows, int64_t query_tokens, float* importance,
                                           void* stream) {
  if (query_tokens < 1 || query_tokens > keys->block_size || rows % query_tokens) return cudaErrorInvalidValue;
  Importance work{};
  work.q = q, work.lse = lse, work.rows = rows, work.softmax_scale = softmax_scale;
  work.raw = true, work.windows.head_rows = head_rows, work.blocks = {nullptr, 1, 1};
  work.query_tokens = query_tokens, work.importance = importance;
  return add_importance(work, *keys, stream);
}

}  // namespace pikv::cuda
