#include "harness.h"

namespace {

void run(int64_t requests, int64_t groups, int64_t rows, int64_t dim, int64_t rank, int64_t bases) {
  const harness::StoredPart stored(groups, 16, dim, rank, bases);
  const std::vector<float> q = harness::numbers(requests * groups * rows * dim);
  std::vector<float> projected = harness::unwritten(bases * groups * requests * rows * rank);
  harness::launched(pikv::cuda::pikv_cuda_project_queries(q.data(), requests, rows, 0.05f, groups, dim, &stored.part,
                                                          projected.data(), nullptr));
  harness::near("projected", projected, stored.projected(q, requests, rows, 0.05f), 1e-5f);
}

}  // namespace

void harness::cases() {
  run(1, 2, 3, 64, 16, 3);
  run(3, 2, 2, 80, 1, 2);
  run(1, 1, 9, 96, 33, 1);
}
