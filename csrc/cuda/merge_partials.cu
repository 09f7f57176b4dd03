// merge_partials: a warp per row weighs the parts by their log-sum-exp.

#include "warp.cuh"

namespace pikv::cuda {

__global__ void __launch_bounds__(kThreads) merge_partials_kernel(const float* outs, const float* lses, int64_t parts,
                                                                  int64_t rows, int64_t dim, float* out, float* lse) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp_id();
  if (row >= rows) return;
  const int lane = lane_id();
  float high = -INFINITY;
  for (int64_t part = lane; part < parts; part += kLanes) high = fmaxf(high, lses[part * rows + row]);
  high = lanes_max(high);
  const bool seen = high > -INFINITY;
  float total = 0.0f;
  for (int64_t part = lane; part < parts && seen; part += kLanes) total += expf(lses[part * rows + row] - high);
  total = lanes_sum(total);
  for (int64_t first = 0; first < dim; first += kLanes) {
    const int64_t channel = first + lane;
    float sum = 0.0f;
    for (int64_t begin = 0; begin < parts && seen; begin += kLanes) {
      const float share = begin + lane < parts ? expf(lses[(begin + lane) * rows + row] - high) : 0.0f;
      const int count = static_cast<int>(parts - begin < kLanes ? parts - begin : kLanes);
      for (int i = 0; i < count; ++i) {
        const float its = __shfl_sync(kAllLanes, share, i);
        if (channel < dim) sum = fmaf(its, outs[((begin + i) * rows + row) * dim + channel], sum);
      }
    }
    if (channel < dim) out[row * dim + channel] = seen ? sum / total : 0.0f;
  }
  if (lane == 0) lse[row] = seen ? high + logf(total) : -INFINITY;
}

extern "C" int pikv_cuda_merge_partials(const float* outs, const float* lses, int64_t parts, int64_t rows, int64_t dim,
                                        float* out, float* lse, void* stream) {
  if (parts < 1) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return launch(merge_partials_kernel, dim3(static_cast<unsigned>((rows + kWarps - 1) / kWarps)), kThreads, 0,
                static_cast<cudaStream_t>(stream), outs, lses, parts, rows, dim, out, lse);
}

}  // namespace pikv::cuda
