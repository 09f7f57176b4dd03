// score_blocks: what bounds say of blocks. A warp brings the scales and zeros of 32 blocks to shared memory; then every
// lane sums over the channels of one of them.

#include "tile.cuh"

namespace pikv::cuda {

struct BlockScoring {
  const float* q;  // [groups, rows, dim]
  int64_t rows;
  float softmax_scale;
  Plane scale, zero;
  int stage_bytes, groups, dim;
  const int64_t* ids;
  int64_t count;
  float levels, rounding;
  float* bound;
  float* centre;
  float* spread;
};

// Grid: pieces of kThreads blocks, KV heads, pieces of ROWS rows.
template <int ROWS>
__global__ void __launch_bounds__(kThreads, 4) score_blocks_kernel(BlockScoring work) {
  PIKV_DYNAMIC_SHARED(shared);
  const int64_t head = blockIdx.y, first_row = static_cast<int64_t>(blockIdx.z) * ROWS;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + warp_id() * kLanes, left = work.count - first;
  const int dim = work.dim, lane = lane_id(), blocks = static_cast<int>(left < 0 ? 0 : left < kLanes ? left : kLanes);
  float* q = reinterpret_cast<float*>(shared);
  unsigned char* stage = shared + ROWS * dim * 4 + warp_id() * work.stage_bytes;
  const auto row_at = [&](int i) { return work.ids[first + i] * work.groups + head; };
  copy_rows(stage, work.scale, blocks, row_at);
  copy_rows(stage, work.zero, blocks, row_at);
  copy_async_commit();
  load_queries<ROWS>(work.q + head * work.rows * dim, work.rows, first_row, dim, work.softmax_scale, q);
  copy_async_wait<0>();
  __syncthreads();
  if (lane >= blocks) return;

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
    const int64_t place = (head * work.rows + first_row + r) * work.count + first + lane;
    work.bound[place] = centre[r] + reach[r];
    work.centre[place] = centre[r];
    work.spread[place] = spread[r] / 6.0f;
  }
}

template <int ROWS>
int launch_score_blocks(const BlockScoring& work, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((work.count + kThreads - 1) / kThreads), static_cast<unsigned>(work.groups),
                  static_cast<unsigned>((work.rows + ROWS - 1) / ROWS));
  return launch(score_blocks_kernel<ROWS>, grid, kThreads,
                static_cast<size_t>(ROWS * work.dim * 4 + kWarps * work.stage_bytes), stream, work);
}

extern "C" int pikv_cuda_score_blocks(const float* q, int64_t rows, float softmax_scale, const Keys* keys,
                                      const int64_t* ids, int64_t count, float* bound, float* centre, float* spread,
                                      void* stream) {
  if (!keys->scale || !keys->zero || !dim_fits(keys->dim)) return cudaErrorInvalidValue;
  if (rows == 0 || count == 0) return cudaSuccess;
  BlockScoring work{};
  work.q = q, work.rows = rows, work.softmax_scale = softmax_scale;
  work.groups = static_cast<int>(keys->groups), work.dim = static_cast<int>(keys->dim);
  work.scale = place_plane(keys->scale, 2 * keys->dim, kLanes, work.stage_bytes);
  work.zero = place_plane(keys->zero, 2 * keys->dim, kLanes, work.stage_bytes);
  work.ids = ids, work.count = count;
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
