// Attention of a few query rows over stored tokens, as the attend_*.cu do it (flash-decoding: the tokens are split over
// thread blocks, whose partials merge_partials.cu merges).
//
// A warp takes tiles of its own: while it works on one, the next is on its way to shared memory. A lane owns a token
// for the logits (or a part of it, where a tile has fewer than 32), and channels for the values. The warps of a thread
// block meet only at the end, to merge what they have.
#pragma once

#include "values.cuh"

namespace pikv::cuda {

// Where things lie in a thread block's shared memory, in bytes; from `folded` on within a warp's own part.
struct AttendLayout {
  int positions, highs, warps, weights, scales, rows, stages, warp_bytes, total;
};

struct AttendWork {
  const float* q;  // [requests, groups, rows, dim]
  int64_t requests, rows;
  float softmax_scale;
  Tile tile;
  AttendLayout at;
  Kind key_kind, value_kind;
  int groups, block_size, dim, value_dim;
  const uint16_t* value_scale;  // [blocks, groups, block_size], null for raw values
  const uint16_t* value_zero;
  bool raw;                // raw tokens, not those of ids
  const int64_t* ids;      // [count] blocks, or [groups, count] of tokens
  const int64_t* first;    // [requests + 1], where each request's ids begin; null: all are one request's
  int64_t count;           // of ids
  Windows windows;         // of raw tokens
  const int64_t* offsets;  // of tokens
  const bool* read;
  const int64_t* key_positions;  // [count, block_size]
  const int64_t* query_positions;
  float* out;  // [splits, requests * groups * rows, value_dim]
  float* lse;  // [splits, requests * groups * rows]
};

// What a thread block attends to: a request's ids, of blocks of `size` tokens where they are blocks'; or its raw tokens
// of one KV head, one block of `size` that begins in row `first`.
struct Run {
  int64_t first, count;
  int size;
};

template <bool SINGLE>
__device__ __forceinline__ Run run_of(const AttendWork& work, int64_t request, int64_t head) {
  Run run{0, work.count, work.block_size};
  if (SINGLE || !work.raw) {
    if (work.first) run.first = work.first[request], run.count = work.first[request + 1] - run.first;
  } else if (const Windows& windows = work.windows; windows.slots) {
    const int64_t first = windows.first[request];
    run.first = windows.slots[request] * windows.slot_rows + head * windows.head_rows + first;
    run.size = static_cast<int>(windows.last[request] - first);
    run.count = run.size > 0;
  } else {
    run.first = head * windows.head_rows;
    run.count = run.size > 0;
  }
  return run;
}

// This lane's token of a tile: its row in the pool and the matrix [block, KV head] that the row is in.
struct Place {
  int64_t row, matrix;
  int tokens;  // in the tile
  bool live;
};

// What a lane keeps of its token until the tile is worked on.
struct Token {
  float scale, zero;
  int64_t position;
  int tokens;
  bool live;
};

template <bool SINGLE>
__device__ __forceinline__ Place place_of(const AttendWork& work, const Run& run, int64_t tile, int64_t head) {
  const int token = lane_id() % work.tile.tokens;
  Place place;
  if constexpr (SINGLE) {
    const int64_t first = tile * work.tile.tokens, left = run.count - first;
    place.tokens = static_cast<int>(left < work.tile.tokens ? left : work.tile.tokens);
    const int64_t index = head * work.count + run.first + first + token;
    place.live = token < place.tokens && (!work.read || work.read[index]);
    place.matrix = place.live ? work.ids[index] * work.groups + head : head;  // what is not read is not fetched either
    place.row = place.matrix * work.block_size + (place.live ? work.offsets[index] : 0);
  } else {
    const int per_block = (run.size + work.tile.tokens - 1) / work.tile.tokens;
    const int64_t block = tile / per_block;
    const int first = static_cast<int>(tile - block * per_block) * work.tile.tokens;
    place.tokens = min(work.tile.tokens, run.size - first);
    place.live = token < place.tokens;
    place.matrix = work.raw ? 0 : work.ids[run.first + block] * work.groups + head;
    place.row = (work.raw ? run.first : place.matrix * run.size) + first + token;
  }
  return place;
}

// Starts the copies of a tile into a stage and loads what its lanes keep. rows: room for two numbers a token.
template <bool SINGLE>
__device__ __forceinline__ Token fetch(const AttendWork& work, const Run& run, const Place& place, int64_t tile,
                                       unsigned char* stage, int64_t* rows) {
  const Tile& t = work.tile;
  const int token = lane_id() % t.tokens;
  if constexpr (SINGLE) {
    __syncwarp();  // the rows of the tile before have been read
    if (lane_id() < t.tokens) rows[token] = place.row, rows[kLanes + token] = place.matrix;
    __syncwarp();
    const auto row_at = [rows](int row) { return rows[row]; };
    const auto matrix_at = [rows](int row) { return rows[kLanes + row]; };
    copy_rows(stage, t.high, place.tokens, row_at);
    copy_rows(stage, t.low, place.tokens, row_at);
    copy_rows(stage, t.scale, place.tokens, matrix_at);
    copy_rows(stage, t.zero, place.tokens, matrix_at);
    copy_rows(stage, t.values, place.tokens, row_at);
  } else {
    const int64_t first = place.row - token;
    const auto row_at = [first](int row) { return first + row; };
    const auto matrix_at = [&place](int) { return place.matrix; };
    copy_rows(stage, t.high, place.tokens, row_at);
    copy_rows(stage, t.low, place.tokens, row_at);
    copy_rows(stage, t.scale, 1, matrix_at);
    copy_rows(stage, t.zero, 1, matrix_at);
    copy_rows(stage, t.values, place.tokens, row_at);
  }
  copy_async_commit();
  Token kept{1.0f, 0.0f, 0, place.tokens, place.live};
  if (work.value_scale && place.live) {
    kept.scale = half_to_float(work.value_scale[place.row]);
    kept.zero = half_to_float(work.value_zero[place.row]);
  }
  if (!SINGLE && work.key_positions && place.live) {
    const int per_block = (run.size + t.tokens - 1) / t.tokens;
    const int64_t block = tile / per_block;
    kept.position = work.key_positions[block * run.size + (tile - block * per_block) * t.tokens + token];
  }
  return kept;
}

// Grid: splits, KV heads, requests with their pieces of ROWS rows.
template <int ROWS, int UNITS, bool SINGLE>
__global__ void __launch_bounds__(kThreads, ROWS * UNITS >= 8 ? 2 : 3) attend_kernel(AttendWork work) {
  PIKV_DYNAMIC_SHARED(shared);
  const int64_t head = blockIdx.y, pieces = (work.rows + ROWS - 1) / ROWS;
  const int64_t request = blockIdx.z / pieces, first_row = (blockIdx.z - request * pieces) * ROWS;
  const int64_t matrix = request * work.groups + head;  // of q
  const int dim = work.dim, lane = lane_id();
  float* q = reinterpret_cast<float*>(shared);
  int64_t* query_positions = reinterpret_cast<int64_t*>(shared + work.at.positions);
  unsigned char* mine = shared + work.at.warps + warp_id() * work.at.warp_bytes;
  float* folded = reinterpret_cast<float*>(mine);
  float* weights = reinterpret_cast<float*>(mine + work.at.weights);
  float2* scales = reinterpret_cast<float2*>(mine + work.at.scales);
  int64_t* place_rows = reinterpret_cast<int64_t*>(mine + work.at.rows);
  unsigned char* stages = mine + work.at.stages;

  load_queries<ROWS>(work.q + matrix * work.rows * dim, work.rows, first_row, dim, work.softmax_scale, q);
  const bool causal = !SINGLE && work.query_positions != nullptr;
  if (causal && threadIdx.x < ROWS)
    query_positions[threadIdx.x] =
        first_row + threadIdx.x < work.rows ? work.query_positions[first_row + threadIdx.x] : 0;
  __syncthreads();

  float high[ROWS], total[ROWS];  // total: this lane's tokens only
  float4 sum[ROWS][UNITS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    high[r] = -INFINITY, total[r] = 0.0f;
#pragma unroll
    for (int u = 0; u < UNITS; ++u) sum[r][u] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  const int per_tile = work.tile.tokens, token = lane % per_tile, part = lane / per_tile, parts = kLanes / per_tile;
  const Run run = run_of<SINGLE>(work, request, head);
  const int64_t tiles =
      SINGLE ? (run.count + per_tile - 1) / per_tile : run.count * ((run.size + per_tile - 1) / per_tile);
  const int64_t worker = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id(),
                workers = static_cast<int64_t>(gridDim.x) * kWarps;
  const int64_t begin = share_begin(tiles, worker, workers), end = share_begin(tiles, worker + 1, workers);
  const bool fold = !SINGLE && work.tile.scale.bytes > 0;
  const Ownership own(work.value_dim);

  Token now{}, next{};
  Place ahead{};
  int stage = 0;
  if (begin < end) {
    now = fetch<SINGLE>(work, run, place_of<SINGLE>(work, run, begin, head), begin, stages, place_rows);
    if (begin + 1 < end) ahead = place_of<SINGLE>(work, run, begin + 1, head);
  }
  for (int64_t tile = begin; tile < end; ++tile) {
    if (tile + 1 < end) {
      next = fetch<SINGLE>(work, run, ahead, tile + 1, stages + (stage ^ 1) * work.tile.bytes, place_rows);
      if (tile + 2 < end) ahead = place_of<SINGLE>(work, run, tile + 2, head);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncwarp();  // the other lanes' copies have arrived too
    const unsigned char* here = stages + stage * work.tile.bytes;

    float logit[ROWS];
    if (fold) {
      fold_scale<ROWS>(work.tile, here, q, dim, folded, logit);
      __syncwarp();
#pragma unroll
      for (int r = 0; r < ROWS; ++r) logit[r] = part == 0 ? logit[r] : 0.0f;
    } else {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) logit[r] = 0.0f;
    }
    if (now.live)
      dot_token<SINGLE, ROWS>(work.key_kind, work.tile, here, token, fold ? folded : q, dim, part, parts, logit);
    add_parts<ROWS>(logit, per_tile);

#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (!now.live || (causal && now.position > query_positions[r])) logit[r] = -INFINITY;
      const float highest = fmaxf(high[r], lanes_max(logit[r], per_tile));
      const float shift = highest == -INFINITY ? 0.0f : highest;
      const float fade = expf(high[r] - shift), weight = expf(logit[r] - shift);
      high[r] = highest;
      total[r] = fmaf(total[r], fade, part == 0 ? weight : 0.0f);
#pragma unroll
      for (int u = 0; u < UNITS; ++u)
        sum[r][u] = make_float4(sum[r][u].x * fade, sum[r][u].y * fade, sum[r][u].z * fade, sum[r][u].w * fade);
      if (part == 0) weights[token * ROWS + r] = weight;
    }
    if (part == 0) scales[token] = make_float2(now.scale, now.zero);
    const unsigned live = __ballot_sync(kAllLanes, now.live && part == 0);
    __syncwarp();
    add_values<ROWS, UNITS>(work.value_kind, here + work.tile.values.at, work.tile.values.stride, own, live, weights,
                            scales, sum);
    __syncwarp();  // before the stage and the weights are written again
    now = next;
    stage ^= 1;
  }

  // Merge the warps: their sums lie where the stages were.
  float* highs = reinterpret_cast<float*>(shared + work.at.highs);  // [kWarps, 2, ROWS]: high, total
  float4* sums = reinterpret_cast<float4*>(stages);                 // [ROWS, UNITS, kLanes]
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float all = lanes_sum(total[r]);
    if (lane == 0) highs[warp_id() * 2 * ROWS + r] = high[r], highs[(warp_id() * 2 + 1) * ROWS + r] = all;
#pragma unroll
    for (int u = 0; u < UNITS; ++u) sums[(r * UNITS + u) * kLanes + lane] = sum[r][u];
  }
  __syncthreads();
  const int64_t partial = (blockIdx.x * work.requests * work.groups + matrix) * work.rows;
  for (int i = static_cast<int>(threadIdx.x); i < ROWS * work.value_dim; i += kThreads) {
    const int r = i / work.value_dim, place = i - r * work.value_dim, unit = place / 4, j = place % 4;
    if (first_row + r >= work.rows) break;
    float highest = -INFINITY;
    for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, highs[w * 2 * ROWS + r]);
    float value = 0.0f, all = 0.0f;
    for (int w = 0; w < kWarps && highest > -INFINITY; ++w) {
      const float share = expf(highs[w * 2 * ROWS + r] - highest);
      const float* its =
          reinterpret_cast<const float*>(shared + work.at.warps + w * work.at.warp_bytes + work.at.stages);
      all = fmaf(share, highs[(w * 2 + 1) * ROWS + r], all);
      for (int g = 0; g < own.groups; ++g)
        value = fmaf(share, its[((r * UNITS + unit / kLanes) * kLanes + unit % kLanes + g * own.units) * 4 + j], value);
    }
    const int64_t row = partial + first_row + r;
    const int channel = value_channel(work.value_kind, unit, j, work.value_dim);
    work.out[row * work.value_dim + channel] = highest > -INFINITY ? value / all : 0.0f;
    if (place == 0) work.lse[row] = highest > -INFINITY ? highest + logf(all) : -INFINITY;
  }
}

template <int ROWS, int UNITS>
AttendLayout attend_layout(const AttendWork& work, bool single) {
  AttendLayout at{};
  const int rows_bytes = ROWS * work.dim * 4;
  at.positions = rows_bytes;
  at.highs = at.positions + (ROWS * 8 + 15) / 16 * 16;
  at.warps = at.highs + kWarps * 2 * ROWS * 4;
  at.weights = single || !work.tile.scale.bytes ? 0 : rows_bytes;
  at.scales = at.weights + kLanes * ROWS * 4;
  at.rows = at.scales + kLanes * 8;
  at.stages = at.rows + (single ? 2 * kLanes * 8 : 0);
  const int stages = 2 * work.tile.bytes, sums = ROWS * UNITS * kLanes * 16;
  at.warp_bytes = at.stages + (stages > sums ? stages : sums);
  at.total = at.warps + kWarps * at.warp_bytes;
  return at;
}

template <int ROWS, int UNITS, bool SINGLE>
int launch_attend(AttendWork work, int splits, cudaStream_t stream) {
  work.at = attend_layout<ROWS, UNITS>(work, SINGLE);
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(work.groups),
                  static_cast<unsigned>(work.requests * ((work.rows + ROWS - 1) / ROWS)));
  return launch(attend_kernel<ROWS, UNITS, SINGLE>, grid, kThreads, static_cast<size_t>(work.at.total), stream, work);
}

// Attends, split, and merges. Of `work` the caller sets q, requests, rows, softmax_scale, where the tokens are, and
// what its op has besides.
// SINGLE: over single tokens, not whole blocks.
template <bool SINGLE>
int attend(AttendWork work, const Keys& keys, const Values& values, int splits, float* workspace, float* out,
           float* lse, void* stream) {
  work.key_kind = kind_of(keys.raw, keys.dtype, keys.hi_bits, keys.lo_bits);
  work.value_kind = kind_of(values.raw, values.dtype, values.bits, 0);
  work.groups = static_cast<int>(keys.groups), work.block_size = static_cast<int>(keys.block_size);
  work.dim = static_cast<int>(keys.dim), work.value_dim = static_cast<int>(values.dim);
  if (work.key_kind == Kind::kUnknown || work.key_kind == Kind::kCodes80 || work.value_kind == Kind::kUnknown ||
      work.value_kind == Kind::kCodes44 || work.value_kind == Kind::kCodes22 || !dim_fits(keys.dim) ||
      !dim_fits(values.dim) || splits < 1)
    return cudaErrorInvalidValue;
  const int64_t rows = work.requests * keys.groups * work.rows;
  if (rows == 0) return cudaSuccess;
  work.value_scale = values.raw ? nullptr : values.scale;
  work.value_zero = values.raw ? nullptr : values.zero;
  work.tile = fit_tile(keys, &values, SINGLE ? kLanes : keys.block_size, SINGLE);
  work.out = workspace;
  work.lse = workspace + splits * rows * values.dim;
  const auto s = static_cast<cudaStream_t>(stream);
  const bool narrow = values.dim <= 4 * kLanes;
  int error;
  if (work.rows == 1)
    error = narrow ? launch_attend<1, 1, SINGLE>(work, splits, s) : launch_attend<1, 2, SINGLE>(work, splits, s);
  else if (work.rows <= 4)
    error = narrow ? launch_attend<4, 1, SINGLE>(work, splits, s) : launch_attend<4, 2, SINGLE>(work, splits, s);
  else
    error = narrow ? launch_attend<8, 1, SINGLE>(work, splits, s) : launch_attend<8, 2, SINGLE>(work, splits, s);
  return error ? error : pikv_cuda_merge_partials(work.out, work.lse, splits, rows, values.dim, out, lse, stream);
}

}  // namespace pikv::cuda
