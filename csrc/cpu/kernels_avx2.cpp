// Kernels for AVX2, FMA and F16C.
#if defined(__x86_64__)
// Headers first: their functions keep the baseline target, so that no code for AVX2 leaks into what others link with.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define PIKV_WIDTH 8
#define PIKV_NAME "avx2"
#define PIKV_KERNELS avx2_kernels
#include "kernels.inl"
#pragma GCC pop_options
#else
#include "pikv/kernels.h"
namespace pikv {
const CpuKernels* avx2_kernels() { return nullptr; }
}  // namespace pikv
#endif
