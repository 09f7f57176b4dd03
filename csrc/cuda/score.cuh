// Logits of whole blocks, as score_tokens takes them from the high plane of the keys and key_logits from whole keys. A
// warp takes tiles of its own, as in attend.cuh; the sums over channels that radius and spread need come with folding
// the block's scale into q.
#pragma once

#include "runs.cuh"
#include "tile.cuh"

namespace pikv::cuda {

struct Scoring {
  const float* q;  // [requests, groups, rows, dim]
  int64_t rows;
  float softmax_scale;
  Tile tile;
  Kind kind;
  int groups, block_size, dim;
  const int64_t* ids;  // [count], or [groups, count] where per_head
  bool per_head;
  Runs blocks;
  // The rest is of the high plane alone.
  float factor;    // of a code of the high plane: 2**lo_bits
  float middle;    // of what the low plane may add to a code
  float width;     // half the width of what is not known, in steps
  float variance;  // half the variance of it, in steps
  float rounding;  // of a dot product, relative
  float levels;
  float* logits;  // [groups, rows, count, block_size]
  float* radius;  // [groups, rows, count]
  float* spread;
  int at_warps, warp_bytes;  // shared memory: q, then each warp's folded q and stages
};

// Sums over the channels of a block, a row of q each.
template <int ROWS>
struct BlockSums {
  float offset[ROWS], reach[ROWS], squares[ROWS];
};

template <int ROWS>
__device__ __forceinline__ void fold_and_sum(const Scoring& work, const unsigned char* stage, const float* q,
                                             float* folded, BlockSums<ROWS>& sums) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) sums.offset[r] = sums.reach[r] = sums.squares[r] = 0.0f;
  for (int channel = lane_id(); channel < work.dim; channel += kLanes) {
    const float scale = half_to_float(load<uint16_t>(stage + work.tile.scale.at + 2 * channel));
    const float zero = half_to_float(load<uint16_t>(stage + work.tile.zero.at + 2 * channel));
    const float largest = fmaxf(fabsf(zero), fabsf(fmaf(scale, work.levels, zero)));
    const float reach = fmaf(scale, work.width, largest * work.rounding);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float x = q[r * work.dim + channel], scaled = x * scale;
      folded[r * work.dim + channel] = scaled * work.factor;
      sums.offset[r] = fmaf(scaled, work.middle, fmaf(x, zero, sums.offset[r]));
      sums.reach[r] = fmaf(fabsf(x), reach, sums.reach[r]);
      sums.squares[r] = fmaf(scaled, scaled, sums.squares[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    sums.offset[r] = lanes_sum(sums.offset[r]);
    sums.reach[r] = lanes_sum(sums.reach[r]);
    sums.squares[r] = lanes_sum(sums.squares[r]);
  }
}

// Grid: shares of the blocks, KV heads, pieces of ROWS rows. A thread block takes its share request by request, since
// they have other queries; mostly there is one. WHOLE: whole keys, no radius and spread.
template <int ROWS, bool WHOLE>
__global__ void __launch_bounds__(kThreads, ROWS == 8 ? 3 : 4) score_kernel(Scoring work) {
  PIKV_DYNAMIC_SHARED(shared);
  const int64_t head = blockIdx.y, first_row = static_cast<int64_t>(blockIdx.z) * ROWS;
  const int dim = work.dim, lane = lane_id();
  float* q = reinterpret_cast<float*>(shared);
  unsigned char* mine = shared + work.at_warps + warp_id() * work.warp_bytes;
  float* folded = reinterpret_cast<float*>(mine);
  unsigned char* stages = mine + ROWS * dim * 4;

  const int per_tile = work.tile.tokens, per_block = (work.block_size + per_tile - 1) / per_tile;
  const int token = lane % per_tile, part = lane / per_tile, parts = kLanes / per_tile;
  const bool fold = !WHOLE || work.tile.scale.bytes > 0;
  const int64_t* ids = work.ids + (work.per_head ? head * work.blocks.count : 0);

  // Starts the copies of a tile of the block with this id.
  const auto fetch = [&](int64_t id, int64_t tile, unsigned char* stage) {
    const int first = static_cast<int>(tile % per_block) * per_tile;
    const int64_t matrix = id * work.groups + head, row = matrix * work.block_size + first;
    const int tokens = min(per_tile, work.block_size - first);
    copy_rows(stage, work.tile.high, tokens, [row](int i) { return row + i; });
    if constexpr (WHOLE) copy_rows(stage, work.tile.low, tokens, [row](int i) { return row + i; });
    copy_rows(stage, work.tile.scale, 1, [matrix](int) { return matrix; });
    copy_rows(stage, work.tile.zero, 1, [matrix](int) { return matrix; });
    copy_async_commit();
  };

  int64_t from = share_begin(work.blocks.count, blockIdx.x, gridDim.x);
  const int64_t until = share_begin(work.blocks.count, blockIdx.x + 1, gridDim.x);
  for (int64_t request = request_of(work.blocks, from); from < until && request < work.blocks.requests; ++request) {
    const int64_t its_end = work.blocks.first[request + 1], to = its_end < until ? its_end : until;
    if (from == to) continue;  // it has no blocks
    __syncthreads();           // q has been read
    load_queries<ROWS>(work.q + (request * work.groups + head) * work.rows * dim, work.rows, first_row, dim,
                       work.softmax_scale, q);
    __syncthreads();
    const int64_t tiles = (to - from) * per_block, before = from * per_block;
    const int64_t begin = before + share_begin(tiles, warp_id(), kWarps),
                  end = before + share_begin(tiles, warp_id() + 1, kWarps);
    from = to;
    int stage = 0;
    int64_t ahead = 0;
    if (begin < end) {
      fetch(ids[begin / per_block], begin, stages);
      if (begin + 1 < end) ahead = ids[(begin + 1) / per_block];
    }
    for (int64_t tile = begin; tile < end; ++tile) {
      if (tile + 1 < end) {
        fetch(ahead, tile + 1, stages + (stage ^ 1) * work.tile.bytes);
        if (tile + 2 < end) ahead = ids[(tile + 2) / per_block];
        copy_async_wait<1>();
      } else {
        copy_async_wait<0>();
      }
      __syncwarp();
      const unsigned char* here = stages + stage * work.tile.bytes;
      BlockSums<ROWS> sums;
      if constexpr (!WHOLE) {
        fold_and_sum<ROWS>(work, here, q, folded, sums);
      } else if (fold) {
        fold_scale<ROWS>(work.tile, here, q, dim, folded, sums.offset);
      } else {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums.offset[r] = 0.0f;
      }
      __syncwarp();
      const int64_t block = tile / per_block;
      const int first = static_cast<int>(tile - block * per_block) * per_tile, at = first + token;
      float logit[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) logit[r] = part == 0 ? sums.offset[r] : 0.0f;
      if (at < work.block_size)
        dot_token<false, ROWS>(work.kind, work.tile, here, token, fold ? folded : q, dim, part, parts, logit);
      add_parts<ROWS>(logit, per_tile);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (first_row + r >= work.rows) break;
        const int64_t place = (head * work.rows + first_row + r) * work.blocks.count + block;
        if (part == 0 && at < work.block_size) work.logits[place * work.block_size + at] = logit[r];
        if (!WHOLE && lane == 0 && first == 0) {
          work.radius[place] = sums.reach[r];
          work.spread[place] = fminf(sums.squares[r] * work.variance, sums.reach[r]);
        }
      }
      __syncwarp();  // before the stage and the folded q are written again
      stage ^= 1;
    }
  }
}

template <int ROWS, bool WHOLE>
int launch_score(Scoring work, cudaStream_t stream) {
  work.at_warps = ROWS * work.dim * 4;
  work.warp_bytes = ROWS * work.dim * 4 + 2 * work.tile.bytes;
  const int64_t shares = (work.blocks.count + 4 * kWarps - 1) / (4 * kWarps);  // some four blocks a warp
  const dim3 grid(static_cast<unsigned>(shares < 1024 ? shares : 1024), static_cast<unsigned>(work.groups),
                  static_cast<unsigned>((work.rows + ROWS - 1) / ROWS));
  return launch(score_kernel<ROWS, WHOLE>, grid, kThreads,
                static_cast<size_t>(work.at_warps + kWarps * work.warp_bytes), stream, work);
}

// Of `work` the caller sets q, rows, softmax_scale, kind, ids, blocks, logits and what its op has besides.
template <bool WHOLE>
int score(Scoring work, const Keys& keys, void* stream) {
  if (work.kind == Kind::kUnknown || work.kind == Kind::kCodes80 || !dim_fits(keys.dim)) return cudaErrorInvalidValue;
  if (work.rows == 0 || work.blocks.count == 0) return cudaSuccess;
  work.groups = static_cast<int>(keys.groups), work.block_size = static_cast<int>(keys.block_size);
  work.dim = static_cast<int>(keys.dim);
  work.tile = fit_tile(keys, nullptr, keys.block_size, false);
  const auto s = static_cast<cudaStream_t>(stream);
  if (work.rows == 1) return launch_score<1, WHOLE>(work, s);
  return work.rows <= 4 ? launch_score<4, WHOLE>(work, s) : launch_score<8, WHOLE>(work, s);
}

}  // namespace pikv::cuda
