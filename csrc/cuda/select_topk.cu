// select_topk: one thread block per KV head and request finds the smallest score that is still among the best, a byte
// at a time from the most significant (radix select), then writes the places of the chosen in order.

#include "warp.cuh"

namespace pikv::cuda {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / kLanes;
constexpr int kBins = 256;

struct SelectShared {
  int bins[kBins];
  int totals[kSelectWarps][2];  // of a piece, by warp: above the threshold, equal to it
  unsigned digit;
  int left;
};

// Bits that order as the numbers do.
__device__ __forceinline__ unsigned ordered_bits(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Counts a digit. Scores lie close, so most lanes often have the same one: those of the first lane's digit count as
// one.
__device__ __forceinline__ void count_digit(int* bins, bool counts, unsigned digit) {
  const unsigned counting = __ballot_sync(kAllLanes, counts);
  if (counting == 0) return;
  const int leader = __ffs(static_cast<int>(counting)) - 1;
  const unsigned common = __shfl_sync(kAllLanes, digit, leader);
  const unsigned same = __ballot_sync(kAllLanes, counts && digit == common);
  if (lane_id() == leader)
    atomicAdd(&bins[common], __popc(same));
  else if (counts && digit != common)
    atomicAdd(&bins[digit], 1);
}

// By the first warp: the bin in which the `left`-th largest lies, and which of that bin's it is.
__device__ __forceinline__ void find_digit(SelectShared& shared, int left) {
  constexpr int kEach = kBins / kLanes;
  const int top = kBins - 1 - kEach * lane_id();  // lane 0 has the largest digits
  int sum = 0;
  for (int i = 0; i < kEach; ++i) sum += shared.bins[top - i];
  int through = sum;
  for (int step = 1; step < kLanes; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, through, step);
    if (lane_id() >= step) through += other;
  }
  int before = through - sum;
  if (before >= left || through < left) return;
  int bin = top;
  while (before + shared.bins[bin] < left) before += shared.bins[bin--];
  shared.digit = static_cast<unsigned>(bin);
  shared.left = left - before;
}

// Grid: KV heads, requests.
__global__ void __launch_bounds__(kSelectThreads)
    select_topk_kernel(const float* scores, Runs tokens, Runs chosen, int64_t* indices) {
  PIKV_DYNAMIC_SHARED(memory);
  SelectShared& shared = *reinterpret_cast<SelectShared*>(memory);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t begin = tokens.first[blockIdx.y], to = chosen.first[blockIdx.y];
  const int count = static_cast<int>(tokens.first[blockIdx.y + 1] - begin);
  const int best = static_cast<int>(chosen.first[blockIdx.y + 1] - to);
  if (best <= 0) return;
  scores += static_cast<int64_t>(blockIdx.x) * tokens.count + begin;
  indices += static_cast<int64_t>(blockIdx.x) * chosen.count + to;

  unsigned threshold = 0, known = 0;
  int left = best;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (thread < kBins) shared.bins[thread] = 0;
    __syncthreads();
    for (int first = 0; first < count; first += kSelectThreads) {
      const int i = first + thread;
      const unsigned bits = i < count ? ordered_bits(scores[i]) : 0;
      count_digit(shared.bins, i < count && (bits & known) == threshold, bits >> shift & 0xffu);
    }
    __syncthreads();
    if (thread < kLanes) find_digit(shared, left);
    __syncthreads();
    threshold |= shared.digit << shift;
    known |= 0xffu << shift;
    left = shared.left;  // of those that equal the threshold as far as it is known
  }

  int above_before = 0, equal_before = 0;  // before this piece
  for (int first = 0; first < count; first += kSelectThreads) {
    const int i = first + thread, lane = lane_id();
    const unsigned bits = i < count ? ordered_bits(scores[i]) : 0;
    const bool above = i < count && bits > threshold, equal = i < count && bits == threshold;
    const unsigned all_above = __ballot_sync(kAllLanes, above), all_equal = __ballot_sync(kAllLanes, equal);
    if (lane == 0) shared.totals[warp_id()][0] = __popc(all_above), shared.totals[warp_id()][1] = __popc(all_equal);
    __syncthreads();
    const unsigned earlier = (1u << lane) - 1;
    int my_above = above_before + __popc(all_above & earlier), my_equal = equal_before + __popc(all_equal & earlier);
    for (int w = 0; w < kSelectWarps; ++w) {
      if (w < warp_id()) my_above += shared.totals[w][0], my_equal += shared.totals[w][1];
      above_before += shared.totals[w][0], equal_before += shared.totals[w][1];
    }
    if (above || (equal && my_equal < left)) indices[my_above + min(my_equal, left)] = begin + i;
    __syncthreads();
  }
}

extern "C" int pikv_cuda_select_topk(const float* scores, int64_t groups, const Runs* tokens, const Runs* chosen,
                                     int64_t* indices, void* stream) {
  if (chosen->count < 0 || chosen->count > tokens->count || chosen->requests != tokens->requests ||
      tokens->count > 0x7fffffff - kSelectThreads)
    return cudaErrorInvalidValue;
  if (groups == 0 || chosen->count == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(groups), static_cast<unsigned>(tokens->requests));
  return launch(select_topk_kernel, grid, kSelectThreads, sizeof(SelectShared), static_cast<cudaStream_t>(stream),
                scores, *tokens, *chosen, indices);
}

}  // namespace pikv::cuda
