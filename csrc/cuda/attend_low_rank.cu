// attend_low_rank: attention where keys, values or both have a low-rank part, over whole blocks or single tokens. A
// thread block goes through its tokens in chunks, whatever blocks they are of: lanes share a token for its logit, then
// a thread owns channels of the values. What the values' factors of a chunk sum up to meets each of its bases once.

#include "tile.cuh"

namespace pikv::cuda {

constexpr int kChunk = kThreads;            // tokens, which a thread each finds
constexpr int kSharing = 8;                 // lanes that share a token
constexpr int kOwned = kMaxDim / kThreads;  // channels of a thread
constexpr int64_t kNotRead = -1;

struct LowRankWork {
  const float* q;  // [requests, groups, rows, dim]
  int64_t requests, rows;
  float softmax_scale;
  Kind kind;
  Keys keys;
  Values values;
  LowRank of_keys, of_values;  // without codes: none
  Places places;
  float* out;  // [splits, requests * groups * rows, value_dim]
  float* lse;
};

// A chunk in shared memory, and what else the threads of a thread block tell each other.
template <int ROWS>
struct alignas(16) Chunk {
  int64_t ids[kChunk], rows[kChunk];  // blocks, and rows in the pool or kNotRead
  int64_t bases[kChunk];              // of the values' part
  bool leads[kChunk];                 // whether no token before has its basis
  float weights[kChunk][ROWS];        // first the logits
  float fades[ROWS], highs[ROWS], totals[ROWS];
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

// Factor j of a token: its row in the pool and the matrix [block, KV head] that the row is in.
__device__ __forceinline__ float factor_at(const LowRank& part, int64_t row, int64_t matrix, int64_t j) {
  return fmaf(static_cast<float>(part.codes[row * part.rank + j]), half_to_float(part.scale[matrix * part.rank + j]),
              half_to_float(part.zero[matrix * part.rank + j]));
}

// This lane's share of a token's products with the queries q [ROWS, dim], of which `mine` are there, from first_row of
// all requests' on, and of its factors with the projected ones.
template <int ROWS>
__device__ __forceinline__ void dot_with_part(const LowRankWork& work, int64_t id, int64_t row, int64_t first_row,
                                              int64_t mine, const float* q, float (&logit)[ROWS]) {
  const Keys& keys = work.keys;
  const int64_t matrix = id * keys.groups + blockIdx.y;
  const int part = lane_id() % kSharing;
  const int64_t bits = !keys.raw ? keys.hi_bits : keys.dtype == Dtype::kFloat32 ? 32 : 16;
  const auto* high = static_cast<const unsigned char*>(keys.raw ? keys.raw : keys.high) + row * (keys.dim * bits / 8);
  const int64_t of_block = keys.raw ? 0 : matrix * keys.dim;
  const auto* scale = reinterpret_cast<const unsigned char*>(keys.scale + of_block);
  const auto* zero = reinterpret_cast<const unsigned char*>(keys.zero + of_block);
  dot_planes<true, ROWS>(work.kind, false, high, keys.low + row * (keys.dim * keys.lo_bits / 8), scale, zero, q,
                         static_cast<int>(keys.dim), part, kSharing, logit);
  if (!work.of_keys.codes) return;
  const int64_t rank = work.of_keys.rank;
  const int64_t matrix_of_basis = work.of_keys.basis_of[id] * keys.groups + blockIdx.y;
  const float* its = work.of_keys.projected + (matrix_of_basis * work.requests * work.rows + first_row) * rank;
  for (int64_t j = part; j < rank; j += kSharing) {
    const float factor = factor_at(work.of_keys, row, matrix, j);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      if (r < mine) logit[r] = fmaf(its[r * rank + j], factor, logit[r]);
  }
}

// Grid: splits, KV heads, requests with their pieces of ROWS rows.
template <int ROWS>
__global__ void __launch_bounds__(kThreads, ROWS == 1 ? 4 : 3) attend_low_rank_kernel(LowRankWork work) {
  static_assert(ROWS <= kWarps, "a warp takes the softmax of a row");
  PIKV_DYNAMIC_SHARED(shared);
  Chunk<ROWS>& chunk = *reinterpret_cast<Chunk<ROWS>*>(shared);
  float* q = reinterpret_cast<float*>(shared + sizeof(Chunk<ROWS>));  // [ROWS, dim]
  float* factors = q + ROWS * work.keys.dim;                          // [ROWS, rank]
  const Places& places = work.places;
  const int64_t groups = work.keys.groups, block_size = work.keys.block_size, head = blockIdx.y;
  const int64_t pieces = (work.rows + ROWS - 1) / ROWS, request = blockIdx.z / pieces;
  const int64_t first_row = (blockIdx.z - request * pieces) * ROWS, matrix_of_q = request * groups + head;
  const int64_t mine = work.rows - first_row < ROWS ? work.rows - first_row : ROWS;
  const int64_t rank = work.of_values.codes ? work.of_values.rank : 0;
  const int dim = static_cast<int>(work.values.dim), thread = static_cast<int>(threadIdx.x), warp = warp_id();

  load_queries<ROWS>(work.q + matrix_of_q * work.rows * work.keys.dim, work.rows, first_row,
                     static_cast<int>(work.keys.dim), work.softmax_scale, q);
  int64_t tokens = places.offsets ? places.count : places.count * block_size, begin = 0;
  if (places.first) {
    const int64_t each = places.offsets ? 1 : block_size;
    begin = places.first[request] * each, tokens = places.first[request + 1] * each - begin;
  }
  const int64_t end = begin + share_begin(tokens, blockIdx.x + 1, gridDim.x);
  begin += share_begin(tokens, blockIdx.x, gridDim.x);

  float sum[ROWS][kOwned] = {};
  float high = -INFINITY, total = 0.0f;  // of row number `warp`
  for (int64_t first = begin; first < end; first += kChunk) {
    const int count = static_cast<int>(end - first < kChunk ? end - first : kChunk);
    __syncthreads();  // the chunk before has been read
    if (thread < count) {
      const int64_t index = first + thread, at = head * places.count + index, block = index / block_size;
      const bool read = !places.read || places.read[at];
      const int64_t id = read ? places.ids[places.offsets ? at : block] : 0;
      const int64_t offset = !read ? 0 : places.offsets ? places.offsets[at] : index - block * block_size;
      chunk.ids[thread] = id;
      chunk.rows[thread] = read ? (id * groups + head) * block_size + offset : kNotRead;
      chunk.bases[thread] = read && rank ? work.of_values.basis_of[id] : kNotRead;
    }
    __syncthreads();
    if (thread < count && rank) {
      bool leads = chunk.rows[thread] != kNotRead;
      for (int t = 0; t < thread && leads; ++t) leads = chunk.bases[t] != chunk.bases[thread];
      chunk.leads[thread] = leads;
    }
    for (int t = thread / kSharing; t - thread / kSharing < count; t += kThreads / kSharing) {
      const bool live = t < count && chunk.rows[t] != kNotRead;
      float logit[ROWS] = {};
      if (live) dot_with_part<ROWS>(work, chunk.ids[t], chunk.rows[t], request * work.rows + first_row, mine, q, logit);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        logit[r] = lanes_sum(logit[r], kSharing);
        bool seen = live && r < mine;
        if (seen && places.key_positions)
          seen = places.key_positions[first + t] <= places.query_positions[first_row + r];
        if (t < count && lane_id() % kSharing == 0) chunk.weights[t][r] = seen ? logit[r] : -INFINITY;
      }
    }
    __syncthreads();
    if (warp < ROWS) {
      float highest = high, its = 0.0f;
      for (int t = lane_id(); t < count; t += kLanes) highest = fmaxf(highest, chunk.weights[t][warp]);
      highest = lanes_max(highest);
      const float shift = highest == -INFINITY ? 0.0f : highest, fade = expf(high - shift);
      for (int t = lane_id(); t < count; t += kLanes) {
        const float weight = expf(chunk.weights[t][warp] - shift);
        chunk.weights[t][warp] = weight;
        its += weight;
      }
      total = fmaf(total, fade, lanes_sum(its)), high = highest;
      if (lane_id() == 0) chunk.fades[warp] = fade;
    }
    __syncthreads();

    float added[ROWS][kOwned] = {};  // of this chunk: a long sum in float32 loses less in parts
#pragma unroll
    for (int u = 0; u < kOwned; ++u) {
      const int channel = thread + u * kThreads;
      if (channel >= dim) break;
      for (int t = 0; t < count; ++t) {
        if (chunk.rows[t] == kNotRead) continue;
        const float value = value_at(work.values, chunk.rows[t], channel);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) added[r][u] = fmaf(chunk.weights[t][r], value, added[r][u]);
      }
    }
    for (int lead = 0; lead < count && rank; ++lead) {
      if (!chunk.leads[lead]) continue;
      const int64_t basis = chunk.bases[lead];
      for (int64_t i = thread; i < ROWS * rank; i += kThreads) {
        const int64_t r = i / rank, j = i - r * rank;
        float weighed = 0.0f;
        for (int t = lead; t < count; ++t)
          if (chunk.bases[t] == basis)
            weighed = fmaf(chunk.weights[t][r],
                           factor_at(work.of_values, chunk.rows[t], chunk.ids[t] * groups + head, j), weighed);
        factors[i] = weighed;
      }
      __syncthreads();
      const float* from = work.of_values.basis + (basis * groups + head) * rank * dim;
#pragma unroll
      for (int u = 0; u < kOwned; ++u) {
        const int channel = thread + u * kThreads;
        for (int64_t j = 0; j < rank && channel < dim; ++j) {
          const float base = from[j * dim + channel];
#pragma unroll
          for (int r = 0; r < ROWS; ++r) added[r][u] = fmaf(factors[r * rank + j], base, added[r][u]);
        }
      }
      __syncthreads();  // the factors have been read
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int u = 0; u < kOwned; ++u) sum[r][u] = fmaf(sum[r][u], chunk.fades[r], added[r][u]);
  }

  if (warp < ROWS && lane_id() == 0) chunk.highs[warp] = high, chunk.totals[warp] = total;
  __syncthreads();
  const int64_t to = (static_cast<int64_t>(blockIdx.x) * work.requests * groups + matrix_of_q) * work.rows + first_row;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    if (r >= mine) break;
    const bool seen = chunk.highs[r] > -INFINITY;
#pragma unroll
    for (int u = 0; u < kOwned; ++u) {
      const int channel = thread + u * kThreads;
      if (channel < dim) work.out[(to + r) * dim + channel] = seen ? sum[r][u] / chunk.totals[r] : 0.0f;
    }
    if (thread == 0) work.lse[to + r] = seen ? chunk.highs[r] + logf(chunk.totals[r]) : -INFINITY;
  }
}

template <int ROWS>
int launch_low_rank(const LowRankWork& work, int splits, cudaStream_t stream) {
  const int64_t rank = work.of_values.codes ? work.of_values.rank : 0;
  const size_t shared = sizeof(Chunk<ROWS>) + ROWS * static_cast<size_t>(work.keys.dim + rank) * sizeof(float);
  const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(work.keys.groups),
                  static_cast<unsigned>(work.requests * ((work.rows + ROWS - 1) / ROWS)));
  return launch(attend_low_rank_kernel<ROWS>, grid, kThreads, shared, stream, work);
}

extern "C" int pikv_cuda_attend_low_rank(const float* q, int64_t requests, int64_t rows, float softmax_scale,
                                         const Keys* keys, const Values* values, const Places* places, int splits,
                                         float* workspace, float* out, float* lse, void* stream) {
  LowRankWork work{};
  work.q = q, work.requests = requests, work.rows = rows, work.softmax_scale = softmax_scale;
  work.kind = kind_of(keys->raw, keys->dtype, keys->hi_bits, keys->lo_bits);
  work.keys = *keys, work.values = *values, work.places = *places;
  if (keys->low_rank) work.of_keys = *keys->low_rank;
  if (values->low_rank) work.of_values = *values->low_rank;
  const bool codes = values->bits == 8 || values->bits == 4 || values->bits == 2;
  if (work.kind == Kind::kUnknown || work.kind == Kind::kCodes80 || !(values->raw || codes) || !dim_fits(keys->dim) ||
      !dim_fits(values->dim) || work.of_keys.rank > kMaxDim || work.of_values.rank > kMaxDim || splits < 1)
    return cudaErrorInvalidValue;
  const int64_t all = requests * keys->groups * rows;
  if (all == 0) return cudaSuccess;
  work.out = workspace, work.lse = workspace + splits * all * values->dim;
  const auto s = static_cast<cudaStream_t>(stream);
  const int error = rows == 1 ? launch_low_rank<1>(work, splits, s) : launch_low_rank<kWarps>(work, splits, s);
  return error ? error : pikv_cuda_merge_partials(work.out, work.lse, splits, all, values->dim, out, lse, stream);
}

}  // namespace pikv::cuda
