// select_mass: how far each row of a request must read in the order of ranks, then who is read. What is missed falls
// from token to token and what is read rises, so what a row needs is a beginning of the order: a thread block halves in
// on where it ends, every thread a share of what is left in doubt, so that no sum is a difference of larger ones.

#include "runs.cuh"

namespace pikv::cuda {

constexpr int kMassThreads = 512;
constexpr int kMassWarps = kMassThreads / kLanes;

// A sum of positive numbers, and what rounding has left out of it.
struct LongSum {
  float high = 0.0f, low = 0.0f;

  __device__ __forceinline__ void add(float x) {
    const float sum = high + x, added = sum - high;
    low += (high - (sum - added)) + (x - added);
    high = sum;
  }
  __device__ __forceinline__ void add(LongSum other) {
    add(other.high);
    low += other.low;
  }
  __device__ __forceinline__ float value() const { return high + low; }
};

struct MassShared {
  LongSum totals[2][kMassWarps];  // of what is not read, of what is
  float tops[kMassWarps];
  int needs[kMassWarps];
  int64_t begin, end;        // of what is left in doubt
  LongSum after, before;     // what is missed behind it, and read before it
};

// Of every lane the sum over the lanes behind it, or before it; `all` that over the whole warp.
template <bool BEHIND>
__device__ __forceinline__ LongSum others(LongSum mine, LongSum& all) {
  LongSum through = mine;
  for (int step = 1; step < kLanes; step *= 2) {
    LongSum other;
    other.high =
        BEHIND ? __shfl_down_sync(kAllLanes, through.high, step) : __shfl_up_sync(kAllLanes, through.high, step);
    other.low = BEHIND ? __shfl_down_sync(kAllLanes, through.low, step) : __shfl_up_sync(kAllLanes, through.low, step);
    if (BEHIND ? lane_id() + step < kLanes : lane_id() >= step) through.add(other);
  }
  all.high = __shfl_sync(kAllLanes, through.high, BEHIND ? 0 : kLanes - 1);
  all.low = __shfl_sync(kAllLanes, through.low, BEHIND ? 0 : kLanes - 1);
  LongSum rest;
  rest.high = BEHIND ? __shfl_down_sync(kAllLanes, through.high, 1) : __shfl_up_sync(kAllLanes, through.high, 1);
  rest.low = BEHIND ? __shfl_down_sync(kAllLanes, through.low, 1) : __shfl_up_sync(kAllLanes, through.low, 1);
  return lane_id() == (BEHIND ? kLanes - 1 : 0) ? LongSum{} : rest;
}

// needs [requests, groups, rows]: how many tokens of its request each row needs. Grid: rows of all KV heads, requests.
__global__ void __launch_bounds__(kMassThreads)
    mass_needs_kernel(const int64_t* order, const float* if_unread, const float* if_read, const float* raw_lse,
                      int64_t rows, Runs tokens, float epsilon, int32_t* needs) {
  PIKV_DYNAMIC_SHARED(memory);
  MassShared& shared = *reinterpret_cast<MassShared*>(memory);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id();
  const int64_t row = blockIdx.x, first = tokens.first[blockIdx.y], last = tokens.first[blockIdx.y + 1];
  const int64_t place = blockIdx.y * gridDim.x + row;
  order += row / rows * tokens.count;
  if_unread += row * tokens.count, if_read += row * tokens.count;

  float top = raw_lse[place];
  for (int64_t i = first + thread; i < last; i += kMassThreads)
    top = fmaxf(top, fmaxf(if_unread[order[i]], if_read[order[i]]));
  top = lanes_max(top);
  if (lane == 0) shared.tops[warp] = top;
  if (thread == 0) shared.begin = first, shared.end = last, shared.after = shared.before = LongSum{};
  __syncthreads();
  for (int w = 0; w < kMassWarps; ++w) top = fmaxf(top, shared.tops[w]);
  const float raw = expf(raw_lse[place] - top);  // where the top is -inf there is nothing at all
  while (shared.begin < shared.end) {
    const int64_t begin = shared.begin, left = shared.end - begin, each = (left + kMassThreads - 1) / kMassThreads;
    const int64_t from = begin + (thread * each < left ? thread * each : left),
                  to = begin + ((thread + 1) * each < left ? (thread + 1) * each : left);
    LongSum unread, read, missed = shared.after, seen = shared.before;
    for (int64_t i = to; i-- > from;) unread.add(expf(if_unread[order[i]] - top));
    for (int64_t i = from; i < to; ++i) read.add(expf(if_read[order[i]] - top));
    LongSum all_unread, all_read;
    const LongSum behind = others<true>(unread, all_unread), ahead = others<false>(read, all_read);
    if (lane == 0) shared.totals[0][warp] = all_unread, shared.totals[1][warp] = all_read;
    __syncthreads();
    for (int w = kMassWarps; w-- > warp + 1;) missed.add(shared.totals[0][w]);
    for (int w = 0; w < warp; ++w) seen.add(shared.totals[1][w]);
    missed.add(behind), seen.add(ahead);
    LongSum at_first = missed;  // missed if reading stops before this share
    at_first.add(unread);
    const float gone = at_first.value();
    const bool on = from < to && gone >= epsilon * (gone + seen.value() + raw);  // where both vanish, too
    const unsigned lanes_on = __ballot_sync(kAllLanes, on);
    if (lane == 0) shared.needs[warp] = __popc(lanes_on);
    __syncthreads();
    int count = 0;  // of shares that are begun: the last of them has the end in it
    for (int w = 0; w < kMassWarps; ++w) count += shared.needs[w];
    if (count == 0) {
      if (thread == 0) shared.end = begin;
    } else if (thread == count - 1) {
      shared.begin = from + 1, shared.end = to, shared.after = missed, shared.before = seen;
      shared.before.add(expf(if_read[order[from]] - top));
    }
    __syncthreads();
  }
  if (thread == 0) needs[place] = static_cast<int32_t>(shared.begin - first);
}

// Grid: pieces of kThreads tokens in their order, KV heads.
__global__ void __launch_bounds__(kThreads)
    mark_read_kernel(const int64_t* order, const int32_t* needs, int64_t rows, Runs tokens, bool* read) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, head = blockIdx.y;
  if (i >= tokens.count) return;
  const int64_t request = request_of(tokens, i);
  int most = 0;
  for (int64_t row = 0; row < rows; ++row) most = max(most, needs[(request * gridDim.y + head) * rows + row]);
  read[head * tokens.count + order[head * tokens.count + i]] = i - tokens.first[request] < most;
}

extern "C" int pikv_cuda_select_mass(const int64_t* order, const float* if_unread, const float* if_read,
                                     const float* raw_lse, int64_t groups, int64_t rows, const Runs* tokens,
                                     float epsilon, int32_t* workspace, bool* read, void* stream) {
  if (tokens->count > 0x7fffffff - kMassThreads) return cudaErrorInvalidValue;
  if (groups == 0 || tokens->count == 0) return cudaSuccess;
  const auto s = static_cast<cudaStream_t>(stream);
  if (rows > 0) {
    const dim3 grid(static_cast<unsigned>(groups * rows), static_cast<unsigned>(tokens->requests));
    const int error = launch(mass_needs_kernel, grid, kMassThreads, sizeof(MassShared), s, order, if_unread, if_read,
                             raw_lse, rows, *tokens, epsilon, workspace);
    if (error) return error;
  }
  const dim3 grid(static_cast<unsigned>((tokens->count + kThreads - 1) / kThreads), static_cast<unsigned>(groups));
  return launch(mark_read_kernel, grid, kThreads, 0, s, order, static_cast<const int32_t*>(workspace), rows, *tokens,
                read);
}

}  // namespace pikv::cuda
