// score_tokens: logits of whole blocks from the high plane of their keys, and how far they may be off.

#include "score.cuh"

namespace pikv::cuda {

extern "C" int pikv_cuda_score_tokens(const float* q, int64_t rows, float softmax_scale, const Keys* keys,
                                      const int64_t* ids, bool per_head, const Runs* blocks, float* coarse,
                                      float* radius, float* spread, void* stream) {
  if (!keys->high) return cudaErrorInvalidValue;
  Keys plane = *keys;  // what is read: the high plane alone
  const bool raw = keys->raw != nullptr;
  plane.raw = nullptr, plane.low = nullptr;
  const int lo_bits = raw ? 0 : keys->lo_bits;
  Scoring work{};
  work.q = q, work.rows = rows, work.softmax_scale = softmax_scale;
  work.kind = kind_of(false, keys->dtype, keys->hi_bits, 0);
  work.ids = ids, work.per_head = per_head, work.blocks = *blocks;
  work.factor = static_cast<float>(1 << lo_bits);
  work.middle = static_cast<float>((1 << lo_bits) - 1) / 2;
  work.width = raw ? 0.5f : work.middle;  // the index plane of raw keys is a rounding of them
  work.variance = static_cast<float>((raw ? 1.0 / 12 : ((1 << 2 * lo_bits) - 1) / 12.0) / 2);
  work.rounding = static_cast<float>(4.0 * keys->dim * 0x1p-23);
  work.levels = static_cast<float>((1 << (keys->hi_bits + lo_bits)) - 1);
  work.logits = coarse, work.radius = radius, work.spread = spread;
  return score<false>(work, plane, stream);
}

}  // namespace pikv::cuda
