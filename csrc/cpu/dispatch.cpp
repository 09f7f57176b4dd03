// Which kernel set runs: the one that was asked for, else the widest that this processor has.
#include <cstring>

#include "pikv/kernels.h"

namespace pikv {

const CpuKernels* choose_kernels(const char* name) {
  bool avx2 = false, avx512 = false;
#if defined(__x86_64__)
  avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
#endif
  const CpuKernels* sets[] = {avx512 ? avx512_kernels() : nullptr, avx2 ? avx2_kernels() : nullptr, scalar_kernels()};
  for (const CpuKernels* set : sets)
    if (set && (!name || std::strcmp(set->name, name) == 0)) return set;
  return nullptr;
}

}  // namespace pikv
