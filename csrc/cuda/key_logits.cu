// key_logits: logits of whole blocks from whole keys.

#include "score.cuh"

namespace pikv::cuda {

extern "C" int pikv_cuda_key_logits(const float* q, int64_t rows, float softmax_scale, const Keys* keys,
                                    const int64_t* ids, const Runs* blocks, float* logits, void* stream) {
  Scoring work{};
  work.q = q, work.rows = rows, work.softmax_scale = softmax_scale;
  work.kind = kind_of(keys->raw, keys->dtype, keys->hi_bits, keys->lo_bits);
  work.ids = ids, work.blocks = *blocks, work.logits = logits;
  return score<true>(work, *keys, stream);
}

}  // namespace pikv::cuda
