// rank_tokens: first the log-sum-exp of every row, then each token's shares, summed over the rows of its KV head. The
// second alone, over all rows, is token_importance of logits that are there already.

#include "log_sum.cuh"

namespace pikv::cuda {

// Grid: rows of all KV heads.
__global__ void __launch_bounds__(kThreads)
    row_totals_kernel(const float* coarse, const float* raw_lse, int64_t count, float* totals) {
  PIKV_DYNAMIC_SHARED(shared);
  const int64_t row = blockIdx.x;
  LogSum sum;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum.add(coarse[row * count + i]);
  sum = sum_of_block(sum, reinterpret_cast<LogSum*>(shared));
  sum.add(raw_lse[row]);
  if (threadIdx.x == 0) totals[row] = sum.log();
}

// Grid: pieces of kThreads tokens, KV heads.
__global__ void __launch_bounds__(kThreads)
    rank_tokens_kernel(const float* coarse, const float* totals, int64_t rows, int64_t count, float* rank) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, head = blockIdx.y;
  if (token >= count) return;
  float sum = 0.0f;
  for (int64_t row = head * rows; row < (head + 1) * rows; ++row)
    sum += expf(coarse[row * count + token] - totals[row]);
  rank[head * count + token] = sum;
}

extern "C" int pikv_cuda_rank_tokens(const float* coarse, const float* raw_lse, int64_t groups, int64_t rows,
                                     int64_t count, float* workspace, float* rank, void* stream) {
  if (groups == 0 || count == 0) return cudaSuccess;
  const auto s = static_cast<cudaStream_t>(stream);
  if (rows > 0) {
    const int error = launch(row_totals_kernel, dim3(static_cast<unsigned>(groups * rows)), kThreads,
                             kWarps * sizeof(LogSum), s, coarse, raw_lse, count, workspace);
    if (error) return error;
  }
  const dim3 grid(static_cast<unsigned>((count + kThreads - 1) / kThreads), static_cast<unsigned>(groups));
  return launch(rank_tokens_kernel, grid, kThreads, 0, s, coarse, static_cast<const float*>(workspace), rows, count,
                rank);
}

extern "C" int pikv_cuda_logits_importance(const float* logits, const float* lse, int64_t rows, int64_t count,
                                           float* importance, void* stream) {
  if (count == 0) return cudaSuccess;
  return launch(rank_tokens_kernel, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), kThreads, 0,
                static_cast<cudaStream_t>(stream), logits, lse, rows, count, importance);
}

}  // namespace pikv::cuda
