// The CUDA side of torch.ops.pikv.*: csrc/bindings.cpp has the schemas, ops.h what is registered here. Built against
// torch's stable ABI and CUDA's runtime alone, so that it loads under any torch, one without CUDA too. The ops take the
// current stream and wait for nothing: block ids are not looked at. Workspace comes from torch's caching allocator.

#include <torch/csrc/stable/library.h>

#include "ops.h"

#define PIKV_IMPLEMENT(key) STABLE_TORCH_LIBRARY_IMPL(pikv, key, m)

PIKV_IMPLEMENT(PIKV_DISPATCH_KEY) {
  m.impl("quantize_block_out", TORCH_BOX(&pikv::cuda::quantize_block));
  m.impl("dequantize_block_out", TORCH_BOX(&pikv::cuda::dequantize_block));
  m.impl("append_out", TORCH_BOX(&pikv::cuda::append));
  m.impl("prefetch", TORCH_BOX(&pikv::cuda::prefetch));
  m.impl("attend_blocks_out", TORCH_BOX(&pikv::cuda::attend_blocks));
  m.impl("attend_ragged_out", TORCH_BOX(&pikv::cuda::attend_ragged));
  m.impl("attend_decode_out", TORCH_BOX(&pikv::cuda::attend_decode));
  m.impl("attend_tokens_out", TORCH_BOX(&pikv::cuda::attend_tokens));
  m.impl("merge_partials_out", TORCH_BOX(&pikv::cuda::merge_partials));
  m.impl("attend_at_out", TORCH_BOX(&pikv::cuda::attend_at));
  m.impl("attend_windows_out", TORCH_BOX(&pikv::cuda::attend_windows));
  m.impl("window_importance_out", TORCH_BOX(&pikv::cuda::window_importance));
  m.impl("prompt_importance_out", TORCH_BOX(&pikv::cuda::prompt_importance));
  m.impl("score_tokens_out", TORCH_BOX(&pikv::cuda::score_tokens));
  m.impl("score_blocks_out", TORCH_BOX(&pikv::cuda::score_blocks));
  m.impl("key_logits_out", TORCH_BOX(&pikv::cuda::key_logits));
  m.impl("token_importance_out", TORCH_BOX(&pikv::cuda::token_importance));
  m.impl("rank_tokens_out", TORCH_BOX(&pikv::cuda::rank_tokens));
  m.impl("select_topk_out", TORCH_BOX(&pikv::cuda::select_topk));
  m.impl("select_mass_out", TORCH_BOX(&pikv::cuda::select_mass));
  m.impl("unread_mass_out", TORCH_BOX(&pikv::cuda::unread_mass));
}
