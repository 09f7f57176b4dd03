// Kernels for AVX-512 (F, BW, DQ, VL, VNNI), compiled wherever the compiler can; run only where the processor has it.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>
// GCC 12 takes the undefined operands inside its own intrinsics for a mistake (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#define PIKV_WIDTH 16
#define PIKV_NAME "avx512"
#define PIKV_KERNELS avx512_kernels
#include "kernels.inl"
#pragma GCC pop_options
#else
#include "pikv/kernels.h"
namespace pikv {
const CpuKernels* avx512_kernels() { return nullptr; }
}  // namespace pikv
#endif
