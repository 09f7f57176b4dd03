// The CPU kernels, written once over vectors of PIKV_WIDTH floats and compiled once per instruction set: the including
// file sets PIKV_WIDTH, PIKV_KERNELS (the name of the table's function) and PIKV_NAME, under a `#pragma GCC target` of
// its own. Each file that is included here has one job and includes those that it needs.
#pragma once

#include "attend.inl"
#include "codes.inl"
#include "mass.inl"
#include "pikv/kernels.h"
#include "scores.inl"
#include "select.inl"

namespace pikv {
namespace {

const CpuKernels kTable{
    PIKV_NAME,        quantize,          dequantize,   attend_blocks, attend_tokens,
    attend_raw,       attend_mass,       score_tokens, score_blocks,  key_logits,
    token_importance, window_importance, rank_tokens,  select_topk,   unread_mass,
};

}  // namespace

const CpuKernels* PIKV_KERNELS() { return &kTable; }

}  // namespace pikv
