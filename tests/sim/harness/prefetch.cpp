#include "harness.h"

// It computes nothing: that it touches no memory is all there is to see.
void harness::cases() {
  const std::vector<uint8_t> base = harness::bytes(harness::kBlocks * 300);
  const std::vector<int64_t> ids = harness::indices(9, harness::kBlocks);
  harness::launched(pikv::cuda::pikv_cuda_prefetch(base.data(), 300, ids.data(), 9, nullptr));
}
