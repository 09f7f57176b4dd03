// project_queries: queries meet the bases of a low-rank part, all of them, before they meet tokens, so that a token
// costs `rank` products and not `dim`.

#include "warp.cuh"

namespace pikv::cuda {

// projected [bases, G, requests * R, rank] = softmax_scale * q B^T. Grid: its numbers, a warp each, then KV heads,
// bases.
__global__ void __launch_bounds__(kThreads)
    project_kernel(const float* q, int64_t requests, int64_t rows, float softmax_scale, int64_t groups, int64_t dim,
                   const float* basis, int64_t rank, float* projected) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id(), all = requests * rows;
  if (number >= all * rank) return;
  const int64_t row = number / rank, matrix = static_cast<int64_t>(blockIdx.z) * groups + blockIdx.y;
  const float* x = q + ((row / rows * groups + blockIdx.y) * rows + row % rows) * dim;
  const float* b = basis + (matrix * rank + number % rank) * dim;
  float sum = 0.0f;
  for (int64_t channel = lane_id(); channel < dim; channel += kLanes) sum = fmaf(x[channel], b[channel], sum);
  sum = lanes_sum(sum);
  if (lane_id() == 0) projected[matrix * all * rank + number] = sum * softmax_scale;
}

extern "C" int pikv_cuda_project_queries(const float* q, int64_t requests, int64_t rows, float softmax_scale,
                                         int64_t groups, int64_t dim, const LowRank* part, float* projected,
                                         void* stream) {
  const int64_t numbers = requests * rows * part->rank;
  if (numbers == 0 || groups == 0 || part->bases == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((numbers + kWarps - 1) / kWarps), static_cast<unsigned>(groups),
                  static_cast<unsigned>(part->bases));
  return launch(project_kernel, grid, kThreads, 0, static_cast<cudaStream_t>(stream), q, requests, rows, softmax_scale,
                groups, dim, part->basis, part->rank, projected);
}

}  // namespace pikv::cuda
