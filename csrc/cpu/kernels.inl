// The CPU kernels, written once over vectors of PIKV_WIDTH floats and compiled once per instruction set: the including
// file sets PIKV_WIDTH, PIKV_KERNELS (the name of the table's function) and PIKV_NAME, under a `#pragma GCC target` of
// its own. Each part below has one job and needs only those above it.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#if PIKV_WIDTH > 1
#include <immintrin.h>
#endif

#include "pikv/kernels.h"

namespace pikv {
namespace {

#include "vec.inl"
#include "codes.inl"
#include "tile.inl"
#if PIKV_WIDTH > 1
#include "fused.inl"
#else
inline bool codes_in_place(const Keys&) { return false; }
inline bool codes_in_place(const Values&) { return false; }
#endif
#if PIKV_WIDTH == 16
#include "integer.inl"
#endif
#include "low_rank.inl"
#include "attend.inl"
#include "scores.inl"
#include "select.inl"
#include "mass.inl"

const CpuKernels kTable{
    PIKV_NAME,        quantize,          dequantize,   attend_blocks, attend_tokens,
    attend_raw,       attend_mass,       score_tokens, score_blocks,  key_logits,
    token_importance, window_importance, rank_tokens,  select_topk,   unread_mass,
};

}  // namespace

const CpuKernels* PIKV_KERNELS() { return &kTable; }

}  // namespace pikv
