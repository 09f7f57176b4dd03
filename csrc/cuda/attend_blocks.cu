// attend_blocks: whole blocks, the same ones for every KV head.

#include "attend.cuh"

namespace pikv::cuda {

extern "C" int pikv_cuda_attend_blocks(const float* q, int64_t rows, float softmax_scale, const Keys* keys, const Values* values,
                                       const int64_t* ids, int64_t count, const int64_t* key_positions,
                                       const int64_t* query_positions, int splits, float* workspace, float* out, float* lse,
                                       void* stream) {
  AttendWork work{};
  work.q = q, work.rows = rows, work.softmax_scale = softmax_scale;
  work.ids = ids, work.count = count;
  work.key_positions = key_positions, work.query_positions = query_positions;
  return attend<false>(work, *keys, *values, splits, workspace, out, lse, stream);
}

}  // namespace pikv::cuda
