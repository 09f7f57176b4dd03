// attend_blocks: whole blocks, the same ones for every KV head. Over the same kernels attend_ragged, every request with
// blocks of its own, and attend_windows and attend_at, over raw tokens that are in no pool.

#include "attend.cuh"

namespace pikv::cuda {

extern "C" int pikv_cuda_attend_blocks(const float* q, int64_t rows, float softmax_scale, const Keys* keys,
                                       const Values* values, const int64_t* ids, int64_t count,
                                       const int64_t* key_positions, const int64_t* query_positions, int splits,
                                       float* workspace, float* out, float* lse, void* stream) {
  AttendWork work{};
  work.q = q, work.requests = 1, work.rows = rows, work.softmax_scale = softmax_scale;
  work.ids = ids, work.count = count;
  work.key_positions = key_positions, work.query_positions = query_positions;
  return attend<false>(work, *keys, *values, splits, workspace, out, lse, stream);
}

extern "C" int pikv_cuda_attend_ragged(const float* q, int64_t rows, float softmax_scale, const Keys* keys,
                                       const Values* values, const int64_t* ids, const Runs* blocks, int splits,
                                       float* workspace, float* out, float* lse, void* stream) {
  AttendWork work{};
  work.q = q, work.requests = blocks->requests, work.rows = rows, work.softmax_scale = softmax_scale;
  work.ids = ids, work.count = blocks->count, work.first = blocks->first;
  return attend<false>(work, *keys, *values, splits, workspace, out, lse, stream);
}

extern "C" int pikv_cuda_attend_windows(const float* q, int64_t requests, int64_t rows, float softmax_scale,
                                        const Keys* keys, const Values* values, const Windows* windows, int splits,
                                        float* workspace, float* out, float* lse, void* stream) {
  AttendWork work{};
  work.q = q, work.requests = requests, work.rows = rows, work.softmax_scale = softmax_scale;
  work.raw = true, work.windows = *windows;
  return attend<false>(work, *keys, *values, splits, workspace, out, lse, stream);
}

extern "C" int pikv_cuda_attend_at(const float* q, int64_t rows, float softmax_scale, const Keys* keys,
                                   const Values* values, int64_t head_rows, const int64_t* key_positions,
                                   const int64_t* query_positions, int splits, float* workspace, float* out, float* lse,
                                   void* stream) {
  AttendWork work{};
  work.q = q, work.requests = 1, work.rows = rows, work.softmax_scale = softmax_scale;
  work.raw = true, work.windows.head_rows = head_rows;
  work.key_positions = key_positions, work.query_positions = query_positions;
  return attend<false>(work, *keys, *values, splits, workspace, out, lse, stream);
}

}  // namespace pikv::cuda
