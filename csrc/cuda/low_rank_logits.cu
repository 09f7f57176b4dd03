// low_rank_logits: what a low-rank part adds to the logits of whole blocks, of queries that project_queries has brought
// to the bases.

#include "runs.cuh"

namespace pikv::cuda {

constexpr int kPartRows = 8;  // that a thread block takes

// Grid: blocks, KV heads, pieces of kPartRows rows. The factors' scale folds into the projected queries, as the keys'
// does into q.
__global__ void __launch_bounds__(kThreads)
    low_rank_logits_kernel(LowRank part, int64_t rows, int64_t groups, int64_t block_size, const int64_t* ids,
                           Runs blocks, float* logits) {
  PIKV_DYNAMIC_SHARED(shared);
  float* folded = reinterpret_cast<float*>(shared);  // [kPartRows, rank]
  float* offsets = folded + kPartRows * part.rank;   // [kPartRows]
  const int64_t id = ids[blockIdx.x], matrix = id * groups + blockIdx.y, rank = part.rank;
  const int64_t first_row = static_cast<int64_t>(blockIdx.z) * kPartRows;
  const int64_t left = rows - first_row, mine = left < kPartRows ? left : kPartRows;
  const int64_t row_of_all = request_of(blocks, blockIdx.x) * rows + first_row;
  const float* its =
      part.projected + ((part.basis_of[id] * groups + blockIdx.y) * blocks.requests * rows + row_of_all) * rank;
  const uint16_t* scale = part.scale + matrix * rank;
  const uint16_t* zero = part.zero + matrix * rank;
  for (int64_t row = warp_id(); row < mine; row += kWarps) {
    float offset = 0.0f;
    for (int64_t j = lane_id(); j < rank; j += kLanes) {
      const float x = its[row * rank + j];
      folded[row * rank + j] = x * half_to_float(scale[j]);
      offset = fmaf(x, half_to_float(zero[j]), offset);
    }
    offset = lanes_sum(offset);
    if (lane_id() == 0) offsets[row] = offset;
  }
  __syncthreads();
  const uint8_t* codes = part.codes + matrix * block_size * rank;
  for (int64_t i = threadIdx.x; i < mine * block_size; i += kThreads) {
    const int64_t row = i / block_size, token = i - row * block_size;
    float sum = offsets[row];
    for (int64_t j = 0; j < rank; ++j)
      sum = fmaf(folded[row * rank + j], static_cast<float>(codes[token * rank + j]), sum);
    logits[((blockIdx.y * rows + first_row + row) * blocks.count + blockIdx.x) * block_size + token] += sum;
  }
}

extern "C" int pikv_cuda_low_rank_logits(int64_t rows, const Keys* keys, const int64_t* ids, const Runs* blocks,
                                         float* logits, void* stream) {
  const LowRank& part = *keys->low_rank;
  if (part.rank < 1 || part.rank > kMaxDim) return cudaErrorInvalidValue;
  if (blocks->count == 0 || rows == 0 || keys->groups == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks->count), static_cast<unsigned>(keys->groups),
                  static_cast<unsigned>((rows + kPartRows - 1) / kPartRows));
  const size_t shared = static_cast<size_t>(kPartRows * (part.rank + 1)) * sizeof(float);
  return launch(low_rank_logits_kernel, grid, kThreads, shared, static_cast<cudaStream_t>(stream), part, rows,
                keys->groups, keys->block_size, ids, *blocks, logits);
}

}  // namespace pikv::cuda
