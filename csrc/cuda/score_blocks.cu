// score_blocks: what bounds say of blocks. A warp brings the scales and zeros of 32 blocks to shared memory; then every
// lane sums over the channels of one of them.

#include "runs.cuh"
#include "tile.cuh"

namespace pikv::cuda {

struct BlockScoring {
  const float* q;  // [requests, groups, rows, dim]
  int64_t rows;
  float softmax_scale;
  Plane scale, zero;
  int stage_bytes, groups, dim;
  const int64_t* ids;
  Runs blocks;
  float levels, rounding;
  float* bound;
  float* centre;
  float* spread;
};

// By one lane: its block in the list, whose scales and zeros are in row lane_id() of the stage.
template <int ROWS>
__device__ __forceinline__ void score_block(const BlockScoring& work, const unsigned char* stage, const float* q,
                                            int64_t head, int64_t first_row, int64_t block) {
  const int dim = work.dim, lane = lane_id();
  float centre[ROWS], reach[ROWS], spread[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) centre[r] = reach[r] = spread[r] = 0.0f;
  for (int channel = 0; channel < dim; channel += 4) {
    const float4 scale = load_four<Dtype::kFloat16>(stage + work.scale.at + lane * work.scale.stride, channel);
    const float4 zero = load_four<Dtype::kFloat16>(stage + work.zero.at + lane * work.zero.stride, channel);
    const float lower[4] = {zero.x, zero.y, zero.z, zero.w}, step[4] = {scale.x, scale.y, scale.z, scale.w};
    float middle[4], half[4], whole[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float upper = lower[j] + step[j] * work.levels;
      middle[j] = 0.5f * (lower[j] + upper);
      half[j] = 0.5f * (upper - lower[j]);
      whole[j] = fmaf(fmaxf(fabsf(lower[j]), fabsf(upper)), work.rounding, half[j]);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float4 four = load<float4>(q + r * dim + channel);
      const float x[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        centre[r] = fmaf(x[j], middle[j], centre[r]);
        reach[r] = fmaf(fabsf(x[j]), whole[j], reach[r]);
        spread[r] = fmaf(x[j] * half[j], x[j] * half[j], spread[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (first_row + r >= work.rows) break;
    const int64_t place = (head * work.rows + first_row + r) * work.blocks.count + block;
    work.bound[place] = centre[r] + reach[r];
    work.centre[place] = centre[r];
    work.spread[place] = spread[r] / 6.0f;
  }
}

// Grid: pieces of kThreads blocks, KV heads, pieces of ROWS rows. A thread block goes through the requests of its
// piece: their queries come to shared memory, and the lanes whose blocks are theirs take them.
template <int ROWS>
__global__ void __launch_bounds__(kThreads, 4) score_blocks_kernel(BlockScoring work) {
  PIKV_DYNAMIC_SHARED(shared);
  const int64_t head = blockIdx.y, first_row = static_cast<int64_t>(blockIdx.z) * ROWS;
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kThreads, first = piece + warp_id() * kLanes,
                left = work.blocks.count - first;
  const int dim = work.dim, lane = lane_id(), blocks = static_cast<int>(left < 0 ? 0 : left < kLanes ? left : kLanes);
  float* q = reinterpret_cast<float*>(shared);
  unsigned char* stage = shared + ROWS * dim * 4 + warp_id() * work.stage_bytes;
  const auto row_at = [&](int i) { return work.ids[first + i] * work.groups + head; };
  copy_rows(stage, work.scale, blocks, row_at);
  copy_rows(stage, work.zero, blocks, row_at);
  copy_async_commit();
  const int64_t end = piece + kThreads < work.blocks.count ? piece + kThreads : work.blocks.count;
  const int64_t mine = lane < blocks ? first + lane : -1;  // of no request
  int64_t from = piece;
  for (int64_t request = request_of(work.blocks, from); from < end && request < work.blocks.requests; ++request) {
    const int64_t its_end = work.blocks.first[request + 1], to = its_end < end ? its_end : end;
    if (from == to) continue;  // it has no blocks
    __syncthreads();           // q has been read
    load_queries<ROWS>(work.q + (request * work.groups + head) * work.rows * dim, work.rows, first_row, dim,
                       work.softmax_scale, q);
    copy_async_wait<0>();
    __syncthreads();
    if (mine >= from && mine < to) score_block<ROWS>(work, stage, q, head, first_row, mine);
    from = to;
  }
}

template <int ROWS>
int launch_score_blocks(const BlockScoring& work, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((work.blocks.count + kThreads - 1) / kThreads),
                  static_cast<unsigned>(work.groups), static_cast<unsigned>((work.rows + ROWS - 1) / ROWS));
  return launch(score_blocks_kernel<ROWS>, grid, kThreads,
                static_cast<size_t>(ROWS * work.dim * 4 + kWarps * work.stage_bytes), stream, work);
}

extern "C" int pikv_cuda_score_blocks(const float* q, int64_t rows, float softmax_scale, const Keys* keys,
                                      const int64_t* ids, const Runs* blocks, float* bound, float* centre,
                                      float* spread, void* stream) {
  if (!keys->scale || !keys->zero || !dim_fits(keys->dim)) return cudaErrorInvalidValue;
  if (rows == 0 || blocks->count == 0) return cudaSuccess;
  BlockScoring work{};
  work.q = q, work.rows = rows, work.softmax_scale = softmax_scale;
  work.groups = static_cast<int>(keys->groups), work.dim = static_cast<int>(keys->dim);
  work.scale = place_plane(keys->scale, 2 * keys->dim, kLanes, work.stage_bytes);
  work.zero = place_plane(keys->zero, 2 * keys->dim, kLanes, work.stage_bytes);
  work.ids = ids, work.blocks = *blocks;
  // A hair more than the codes' levels: the scale comes from a division that float32 has rounded (reference
  // block_bounds).
  work.levels = static_cast<float>(((1 << (keys->hi_bits + keys->lo_bits)) - 1) * (1 + 0x1p-22));
  work.rounding = static_cast<float>(4.0 * keys->dim * 0x1p-23);
  work.bound = bound, work.centre = centre, work.spread = spread;
  const auto s = static_cast<cudaStream_t>(stream);
  if (rows == 1) return launch_score_blocks<1>(work, s);
  return rows <= 4 ? launch_score_blocks<4>(work, s) : launch_score_blocks<8>(work, s);
}

}  // namespace pikv::cuda
