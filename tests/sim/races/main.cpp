// Arguments: which kernel of races.cu, 1 for its race, the simulator's seed.

#include <cstdlib>
#include <vector>

#include "simulator.h"

extern "C" int trial_race(int which, bool racy, const int* x, int* y);

int main(int, char** arguments) {
  pikv_sim_set_seed(std::strtoull(arguments[3], nullptr, 10));
  std::vector<int> x(64), y(64);
  return trial_race(std::atoi(arguments[1]), arguments[2][0] == '1', x.data(), y.data());
}
