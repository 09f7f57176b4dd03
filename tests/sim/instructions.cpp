// A launcher whose kernel exists in PTX alone, which test_sim_instructions.py writes by hand: no nvcc is needed.

#define PIKV_SIM_PTX
#include "pikv/portable.cuh"

namespace pikv::trial {

__global__ void instructions_kernel(const unsigned*, unsigned*) {}

extern "C" int trial_instructions(const unsigned* operands, unsigned* results) {
  return launch(instructions_kernel, dim3(1), 1, 0, nullptr, operands, results);
}

}  // namespace pikv::trial
