// Small kernels that between them use all that the simulators offer: what each computes is plain to see, and easy to
// break.

#include "pikv/portable.cuh"

namespace pikv::trial {

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;

// Sums [blocks, kThreads] over the threads of a block, by halves in shared memory.
__global__ void reduce_kernel(const float* x, int64_t count, float* sums) {
  PIKV_DYNAMIC_SHARED(shared);
  float* partial = reinterpret_cast<float*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread;
  partial[thread] = i < count ? x[i] : 0.0f;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) partial[thread] += partial[thread + half];
    __syncthreads();
  }
  if (thread == 0) sums[blockIdx.x] = partial[0];
}

// Transposes x [rows, cols] by tiles of 16 x 16; each tile's buffer is used again for the next.
__global__ void transpose_kernel(const float* x, int rows, int cols, float* y) {
  PIKV_DYNAMIC_SHARED(shared);
  float* tile = reinterpret_cast<float*>(shared);
  const int column = static_cast<int>(threadIdx.x) % 16, first = static_cast<int>(threadIdx.x) / 16;
  for (int left = 0; left < cols; left += 16) {
    for (int row = first; row < 16; row += kThreads / 16) {
      const int from = static_cast<int>(blockIdx.x) * 16 + row;
      if (from < rows && left + column < cols) tile[row * 17 + column] = x[from * cols + left + column];
    }
    __syncthreads();
    for (int row = first; row < 16; row += kThreads / 16) {
      const int to = static_cast<int>(blockIdx.x) * 16 + column;
      if (to < rows && left + row < cols) y[(left + row) * rows + to] = tile[column * 17 + row];
    }
    __syncthreads();
  }
}

// Running sums over each warp's 32 numbers, their maximum by butterfly, and how many are odd.
__global__ void scan_kernel(const int* x, int* running, int* greatest, int* odd) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x), lane = i & 31;
  int sum = x[i], most = x[i];
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAll, sum, static_cast<unsigned>(step));
    if (lane >= step) sum += before;
  }
  for (int step = 16; step > 0; step /= 2) most = max(most, __shfl_xor_sync(kAll, most, step));
  const unsigned votes = __ballot_sync(kAll, x[i] & 1);
  running[i] = sum;
  if (lane == 0) {
    greatest[i / 32] = most;
    odd[i / 32] = __popc(votes);
  }
}

// Adds up x [tiles, kThreads * 4] over the tiles, each brought by cp.async while the one before is added. Threads read
// what their neighbours have copied.
__global__ void stream_kernel(const float* x, int tiles, float* sums) {
  PIKV_DYNAMIC_SHARED(shared);
  float4* stages = reinterpret_cast<float4*>(shared);
  const int thread = static_cast<int>(threadIdx.x), other = (thread + 37) % kThreads;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int tile = 0; tile < 1 && tile < tiles; ++tile) copy_async<16>(&stages[thread], &x[thread * 4]);
  copy_async_commit();
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles)
      copy_async<16>(&stages[(tile + 1) % 2 * kThreads + thread], &x[((tile + 1) * kThreads + thread) * 4]);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    const float4 part = stages[tile % 2 * kThreads + other];
    sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    __syncthreads();
  }
  reinterpret_cast<float4*>(sums)[other] = sum;
}

// How often each of 16 values occurs in x [count]: counted in shared memory first.
__global__ void histogram_kernel(const int* x, int64_t count, int* bins) {
  PIKV_DYNAMIC_SHARED(shared);
  int* mine = reinterpret_cast<int*>(shared);
  if (threadIdx.x < 16) mine[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads)
    atomicAdd(&mine[x[i]], 1);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&bins[threadIdx.x], mine[threadIdx.x]);
}

// float16 to float32 (y), and float32 to float16 below (down) and above (up).
__global__ void halves_kernel(const uint16_t* half, const float* x, int count, float* y, uint16_t* down, uint16_t* up) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i >= count) return;
  y[i] = half_to_float(half[i]);
  down[i] = float_to_half_rd(x[i]);
  up[i] = float_to_half_ru(x[i]);
}

// Products of a [count, words] with b [words], signed bytes: one warp a row.
__global__ void dots_kernel(const int* a, const int* b, int words, int* sums) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = static_cast<int>(blockIdx.x) * (kThreads / 32) + warp;
  int sum = 0;
  for (int i = lane; i < words; i += 32) sum = __dp4a(a[row * words + i], b[i], sum);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(kAll, sum, static_cast<unsigned>(step));
  if (lane == 0) sums[row] = sum;
}

// Lanes pass numbers on through shared memory, one warp at a time.
__global__ void pass_on_kernel(const int* x, int rounds, int* y) {
  PIKV_DYNAMIC_SHARED(shared);
  int* mine = reinterpret_cast<int*>(shared) + threadIdx.x / 32 * 32;
  const int lane = static_cast<int>(threadIdx.x) % 32,
            i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  int value = x[i];
  for (int round = 0; round < rounds; ++round) {
    mine[lane] = value;
    __syncwarp();
    value = mine[(lane + 5) % 32] + 1;
    __syncwarp();
  }
  y[i] = value;
}

// What kernels do with numbers, one of each: whole [kWholes, count] and real [kReals, count].
constexpr int kWholes = 13, kReals = 7;
__global__ void numbers_kernel(const int* a, const int* b, const float* x, const float* y, int count, int64_t* whole,
                               float* real) {
  const int i = static_cast<int>(threadIdx.x);
  if (i >= count) return;
  const int p = a[i], q = b[i];
  const unsigned u = static_cast<unsigned>(p), v = static_cast<unsigned>(q);
  const float r = x[i], s = y[i];
  const int64_t wide = static_cast<int64_t>(p) * 1000003 + q;
  const int64_t wholes[kWholes] = {
      p / q,
      p % q,
      u / v,
      u % v,
      static_cast<int64_t>(p) * q,
      wide / q,
      wide % q,
      p >> (q & 31),
      (u >> (v & 31)) ^ (u << (v & 31)),
      __popc(u) * 10000 + __clz(p) * 100 + __ffs(p),
      __byte_perm(u, v, u & 0x7777u),
      (r < s) | (r <= s) << 1 | (r == s) << 2 | (r != s) << 3 | !(r < s) << 4 | !(r >= s) << 5 | !(r > s) << 6,
      static_cast<int64_t>(max(p, q)) - min(p, q) + static_cast<int>(r) + static_cast<int>(rintf(r)),
  };
  const float reals[kReals] = {expf(r),     logf(fabsf(r)),  sqrtf(fabsf(r)), fminf(r, s),
                               fmaxf(r, s), __fdiv_rn(r, s), floorf(r)};
  for (int k = 0; k < kWholes; ++k) whole[k * count + i] = wholes[k];
  for (int k = 0; k < kReals; ++k) real[k * count + i] = reals[k];
}

extern "C" {

int trial_numbers(const int* a, const int* b, const float* x, const float* y, int count, int64_t* whole, float* real) {
  return launch(numbers_kernel, dim3(1), 1024, 0, nullptr, a, b, x, y, count, whole, real);
}

int trial_reduce(const float* x, int64_t count, float* sums) {
  const unsigned blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  return launch(reduce_kernel, dim3(blocks), kThreads, kThreads * sizeof(float), nullptr, x, count, sums);
}

int trial_transpose(const float* x, int rows, int cols, float* y) {
  return launch(transpose_kernel, dim3(static_cast<unsigned>(rows + 15) / 16), kThreads, 16 * 17 * sizeof(float),
                nullptr, x, rows, cols, y);
}

int trial_scan(const int* x, int blocks, int* running, int* greatest, int* odd) {
  return launch(scan_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, 0, nullptr, x, running, greatest, odd);
}

int trial_stream(const float* x, int tiles, float* sums) {
  return launch(stream_kernel, dim3(1), kThreads, 2 * kThreads * sizeof(float4), nullptr, x, tiles, sums);
}

int trial_histogram(const int* x, int64_t count, int* bins) {
  return launch(histogram_kernel, dim3(3), kThreads, 16 * sizeof(int), nullptr, x, count, bins);
}

int trial_halves(const uint16_t* half, const float* x, int count, float* y, uint16_t* down, uint16_t* up) {
  return launch(halves_kernel, dim3(static_cast<unsigned>(count + kThreads - 1) / kThreads), kThreads, 0, nullptr, half,
                x, count, y, down, up);
}

int trial_dots(const int* a, const int* b, int rows, int words, int* sums) {
  return launch(dots_kernel, dim3(static_cast<unsigned>(rows) / (kThreads / 32)), kThreads, 0, nullptr, a, b, words,
                sums);
}

int trial_pass_on(const int* x, int blocks, int rounds, int* y) {
  return launch(pass_on_kernel, dim3(static_cast<unsigned>(blocks)), kThreads, kThreads * sizeof(int), nullptr, x,
                rounds, y);
}

}  // extern "C"

}  // namespace pikv::trial
