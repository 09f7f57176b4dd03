#include "ptx_kernels.h"

#include <map>
#include <string>

namespace pikv::sim {
namespace {

std::map<std::string, PtxKernel>& kernels() {
  static std::map<std::string, PtxKernel> all;
  return all;
}

}  // namespace

PtxRegistration::PtxRegistration(const PtxKernel& kernel) { kernels().emplace(kernel.symbol, kernel); }

cudaError_t run_ptx(Launch launch, const PtxParameters& parameters) {
  const std::string symbol = symbol_of(launch.kernel);
  const auto found = kernels().find(symbol);
  if (found == kernels().end()) return refuse("there is no translated PTX of kernel \"" + symbol + "\"");
  if (found->second.parameter_bytes != parameters.size())
    return refuse("kernel " + symbol + " takes " + std::to_string(found->second.parameter_bytes) +
                  " bytes of parameters in PTX and " + std::to_string(parameters.size()) + " in C++");
  launch.body = found->second.body;
  launch.parameters = parameters.bytes();
  return run(launch);
}

}  // namespace pikv::sim
