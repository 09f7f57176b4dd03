// attend_logits: attention over whole blocks whose logits are there already, as where keys or values have a low-rank
// part. A thread block takes one row and a share of the blocks; a thread owns channels of the values, and factors of
// their part, which meet a basis once per run of blocks that have it.

#include "warp.cuh"

namespace pikv::cuda {

constexpr int kOwned = kMaxDim / kThreads;  // channels, and factors, of a thread

struct LogitsWork {
  const float* logits;  // [groups, rows, count * block_size]
  Values values;
  LowRank part;  // of the values; without codes: none
  const int64_t* ids;
  const int64_t* key_positions;
  const int64_t* query_positions;
  int64_t rows, count;
  float* out;  // [splits, groups * rows, dim]
  float* lse;
};

__device__ __forceinline__ float raw_number(const void* x, Dtype dtype, int64_t at) {
  if (dtype == Dtype::kFloat32) return load<float>(static_cast<const float*>(x) + at);
  const uint16_t bits = load<uint16_t>(static_cast<const uint16_t*>(x) + at);
  return dtype == Dtype::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

// Of one channel of the value at `row` [block, KV head, token] of the pool.
__device__ __forceinline__ float value_at(const Values& values, int64_t row, int channel) {
  if (values.raw) return raw_number(values.raw, values.dtype, row * values.dim + channel);
  const int bits = values.bits, span = static_cast<int>(values.dim) * bits / 8;  // bytes; codes are planar
  const int code = values.codes[row * span + channel % span] >> (bits * (channel / span)) & ((1 << bits) - 1);
  return fmaf(static_cast<float>(code), half_to_float(values.scale[row]), half_to_float(values.zero[row]));
}

// Grid: splits, KV heads, rows.
__global__ void __launch_bounds__(kThreads) attend_logits_kernel(LogitsWork work) {
  PIKV_DYNAMIC_SHARED(shared);
  float* highs = reinterpret_cast<float*>(shared);  // [kWarps]
  float* weights = highs + kWarps;                  // [block_size]
  float* factors = weights + work.values.block_size;  // [rank]
  const int64_t block_size = work.values.block_size, groups = work.values.groups, head = blockIdx.y, row = blockIdx.z;
  const int64_t rank = work.part.codes ? work.part.rank : 0;
  const int dim = static_cast<int>(work.values.dim), thread = static_cast<int>(threadIdx.x);
  const int64_t begin = work.count * blockIdx.x / gridDim.x, end = work.count * (blockIdx.x + 1) / gridDim.x;
  const float* logits = work.logits + (head * work.rows + row) * work.count * block_size;
  const auto seen = [&](int64_t i) {
    return !work.key_positions || work.key_positions[i] <= work.query_positions[row];
  };

  float high = -INFINITY;
  for (int64_t i = begin * block_size + thread; i < end * block_size; i += kThreads)
    if (seen(i)) high = fmaxf(high, logits[i]);
  high = lanes_max(high);
  if (lane_id() == 0) highs[warp_id()] = high;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) high = fmaxf(high, highs[w]);

  float sum[kOwned] = {}, factor[kOwned] = {}, total = 0.0f;
  for (int64_t block = begin; block < end && high > -INFINITY; ++block) {
    const int64_t matrix = work.ids[block] * groups + head, first = block * block_size;
    __syncthreads();  // the weights have been read
    for (int64_t t = thread; t < block_size; t += kThreads)
      weights[t] = seen(first + t) ? expf(logits[first + t] - high) : 0.0f;
    __syncthreads();
    float weight = 0.0f;
    for (int64_t t = 0; t < block_size; ++t) {
      weight += weights[t];
      for (int u = 0; u < kOwned; ++u) {
        const int channel = thread + u * kThreads;
        if (channel < dim)
          sum[u] = fmaf(weights[t], value_at(work.values, matrix * block_size + t, channel), sum[u]);
      }
    }
    total += weight;
    if (rank == 0) continue;
    for (int u = 0; u < kOwned; ++u) {
      const int64_t j = thread + u * kThreads;
      if (j >= rank) break;
      float its = 0.0f;
      for (int64_t t = 0; t < block_size; ++t)
        its = fmaf(weights[t], static_cast<float>(work.part.codes[(matrix * block_size + t) * rank + j]), its);
      factor[u] = fmaf(its, half_to_float(work.part.scale[matrix * rank + j]),
                       fmaf(weight, half_to_float(work.part.zero[matrix * rank + j]), factor[u]));
    }
    const int64_t basis = work.part.basis_of[work.ids[block]];
    if (block + 1 < end && work.part.basis_of[work.ids[block + 1]] == basis) continue;
    for (int u = 0; u < kOwned; ++u) {
      if (thread + u * kThreads < rank) factors[thread + u * kThreads] = factor[u];
      factor[u] = 0.0f;
    }
    __syncthreads();  // the next weights' first barrier comes before the factors are written again
    const float* from = work.part.basis + (basis * groups + head) * rank * dim;
    for (int u = 0; u < kOwned; ++u) {
      const int channel = thread + u * kThreads;
      for (int64_t j = 0; j < rank && channel < dim; ++j) sum[u] = fmaf(factors[j], from[j * dim + channel], sum[u]);
    }
  }

  const int64_t to = (blockIdx.x * groups + head) * work.rows + row;
  for (int u = 0; u < kOwned; ++u) {
    const int channel = thread + u * kThreads;
    if (channel < dim) work.out[to * dim + channel] = high > -INFINITY ? sum[u] / total : 0.0f;
  }
  if (thread == 0) work.lse[to] = high > -INFINITY ? high + logf(total) : -INFINITY;
}

extern "C" int pikv_cuda_attend_logits(const float* logits, int64_t rows, const Values* values, const int64_t* ids,
                                       int64_t count, const int64_t* key_positions, const int64_t* query_positions,
                                       int splits, float* workspace, float* out, float* lse, void* stream) {
  LogitsWork work{};
  work.logits = logits, work.rows = rows, work.values = *values, work.ids = ids, work.count = count;
  work.key_positions = key_positions, work.query_positions = query_positions;
  if (values->low_rank) work.part = *values->low_rank;
  const bool codes = values->bits == 8 || values->bits == 4 || values->bits == 2;
  if (splits < 1 || !dim_fits(values->dim) || !(values->raw || codes) || work.part.rank > kMaxDim || rows > 65535)
    return cudaErrorInvalidValue;
  if (rows == 0 || values->groups == 0) return cudaSuccess;
  const int64_t all = values->groups * rows;
  work.out = workspace, work.lse = workspace + splits * all * values->dim;
  const size_t shared = static_cast<size_t>(kWarps + values->block_size + work.part.rank) * sizeof(float);
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(values->groups), static_cast<unsigned>(rows));
  const int error = launch(attend_logits_kernel, grid, kThreads, shared, static_cast<cudaStream_t>(stream), work);
  return error ? error
               : pikv_cuda_merge_partials(work.out, work.lse, splits, all, values->dim, out, lse, stream);
}

}  // namespace pikv::cuda
