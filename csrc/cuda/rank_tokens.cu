// rank_tokens: first the log-sum-exp of every row over its request's tokens, then each token's shares, summed over the
// rows of its KV head. The second alone, over all rows, is token_importance of logits that are there already.

#include "log_sum.cuh"
#include "runs.cuh"

namespace pikv::cuda {

// totals [requests, rows of all KV heads]. Grid: these rows, requests.
__global__ void __launch_bounds__(kThreads)
    row_totals_kernel(const float* coarse, const float* raw_lse, Runs tokens, float* totals) {
  PIKV_DYNAMIC_SHARED(shared);
  const int64_t row = blockIdx.x, end = tokens.first[blockIdx.y + 1], place = blockIdx.y * gridDim.x + row;
  LogSum sum;
  for (int64_t i = tokens.first[blockIdx.y] + threadIdx.x; i < end; i += kThreads)
    sum.add(coarse[row * tokens.count + i]);
  sum = sum_of_block(sum, reinterpret_cast<LogSum*>(shared));
  sum.add(raw_lse[place]);
  if (threadIdx.x == 0) totals[place] = sum.log();
}

// Runs of entries of `each` tokens. Grid: pieces of kThreads tokens, KV heads.
__global__ void __launch_bounds__(kThreads)
    rank_tokens_kernel(const float* coarse, const float* totals, int64_t rows, Runs runs, int64_t each, float* rank) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, head = blockIdx.y;
  const int64_t count = runs.count * each;
  if (token >= count) return;
  const float* its = totals + request_of(runs, token / each) * gridDim.y * rows;
  float sum = 0.0f;
  for (int64_t row = head * rows; row < (head + 1) * rows; ++row) sum += expf(coarse[row * count + token] - its[row]);
  rank[head * count + token] = sum;
}

extern "C" int pikv_cuda_rank_tokens(const float* coarse, const float* raw_lse, int64_t groups, int64_t rows,
                                     const Runs* tokens, float* workspace, float* rank, void* stream) {
  if (groups == 0 || tokens->count == 0) return cudaSuccess;
  const auto s = static_cast<cudaStream_t>(stream);
  if (rows > 0) {
    const dim3 grid(static_cast<unsigned>(groups * rows), static_cast<unsigned>(tokens->requests));
    const int error = launch(row_totals_kernel, grid, kThreads, kWarps * sizeof(LogSum), s, coarse, raw_lse, *tokens,
                             workspace);
    if (error) return error;
  }
  const dim3 grid(static_cast<unsigned>((tokens->count + kThreads - 1) / kThreads), static_cast<unsigned>(groups));
  return launch(rank_tokens_kernel, grid, kThreads, 0, s, coarse, static_cast<const float*>(workspace), rows, *tokens,
                int64_t{1}, rank);
}

extern "C" int pikv_cuda_logits_importance(const float* logits, const float* lse, int64_t rows, const Runs* blocks,
                                           int64_t block_size, float* importance, void* stream) {
  const int64_t count = blocks->count * block_size;
  if (count == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((count + kThreads - 1) / kThreads));
  return launch(rank_tokens_kernel, grid, kThreads, 0, static_cast<cudaStream_t>(stream), logits, lse, rows, *blocks,
                block_size, importance);
}

}  // namespace pikv::cuda
