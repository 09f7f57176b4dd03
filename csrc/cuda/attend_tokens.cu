// attend_tokens: single tokens, of every KV head its own.

#include "attend.cuh"

namespace pikv::cuda {

extern "C" int pikv_cuda_attend_tokens(const float* q, int64_t rows, float softmax_scale, const Keys* keys,
                                       const Values* values, const int64_t* ids, const int64_t* offsets,
                                       const bool* read, const Runs* tokens, int splits, float* workspace, float* out,
                                       float* lse, void* stream) {
  AttendWork work{};
  work.q = q, work.requests = tokens->requests, work.rows = rows, work.softmax_scale = softmax_scale;
  work.ids = ids, work.offsets = offsets, work.read = read, work.count = tokens->count, work.first = tokens->first;
  return attend<true>(work, *keys, *values, splits, workspace, out, lse, stream);
}

}  // namespace pikv::cuda
