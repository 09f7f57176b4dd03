// torch.ops.pikv.*: the ops' schemas and their CPU implementations (csrc/ops). Built against torch's stable ABI, so one
// library serves every later torch.

#include <torch/csrc/stable/library.h>

#include <atomic>

#include "ops/ops.h"
#include "ops/shared.h"

namespace pikv {
namespace {

std::atomic<const CpuKernels*> chosen{nullptr};

}  // namespace

const CpuKernels& kernels() {
  const CpuKernels* set = chosen.load();
  if (!set) chosen.store(set = choose_kernels(nullptr));
  return *set;
}

// Makes the named kernel set run from now on ("auto": the widest this processor has); returns its name.
std::string use_kernels(std::string name) {
  const CpuKernels* set = choose_kernels(name == "auto" ? nullptr : name.c_str());
  STD_TORCH_CHECK(set, "kernel set: this processor or build has no '", name,
                  "', expected auto, scalar, avx2 or avx512");
  chosen.store(set);
  return set->name;
}

}  // namespace pikv

#define PIKV_KEYS "Tensor? k, Tensor? k_high, Tensor? k_low, Tensor? k_scale, Tensor? k_zero, int hi_bits, int lo_bits"
#define PIKV_KEY_PART "Tensor[] k_low_rank"
#define PIKV_VALUES "Tensor? v, Tensor? v_codes, Tensor? v_scale, Tensor? v_zero, int v_bits"
#define PIKV_STORED PIKV_KEYS ", " PIKV_VALUES ", " PIKV_KEY_PART ", Tensor[] v_low_rank"
#define PIKV_RAW_RUNS "Tensor slots, Tensor raw_first, Tensor raw_last"
#define PIKV_RAW "Tensor raw_k, Tensor raw_v, " PIKV_RAW_RUNS
#define PIKV_PARTIAL "Tensor(a!) out, Tensor(b!) lse"

STABLE_TORCH_LIBRARY(pikv, m) {
  m.def("use_kernels(str name) -> str");
  m.def("quantize_block_out(Tensor x, int hi_bits, int lo_bits, bool per_channel, Tensor(a!) high, Tensor(b!)? low, "
        "Tensor(c!) scale, Tensor(d!) zero) -> ()");
  m.def("dequantize_block_out(Tensor high, Tensor? low, Tensor scale, Tensor zero, int hi_bits, int lo_bits, "
        "bool per_channel, Tensor(a!) y) -> ()");
  m.def("append_out(Tensor new_k, Tensor new_v, Tensor block_ids, Tensor(a!)? k, Tensor(b!)? k_high, "
        "Tensor(c!)? k_low, Tensor(d!)? k_scale, Tensor(e!)? k_zero, int hi_bits, int lo_bits, Tensor(f!)? v, "
        "Tensor(g!)? v_codes, Tensor(h!)? v_scale, Tensor(i!)? v_zero, int v_bits) -> ()");
  m.def("prefetch(Tensor field, Tensor block_ids) -> ()");
  m.def("attend_blocks_out(Tensor q, " PIKV_STORED ", Tensor block_ids, float softmax_scale, "
        "Tensor? key_positions, Tensor? query_positions, " PIKV_PARTIAL ") -> ()");
  m.def("attend_ragged_out(Tensor q, " PIKV_STORED ", Tensor block_ids, Tensor first_blocks, "
        "float softmax_scale, " PIKV_PARTIAL ") -> ()");
  m.def("attend_decode_out(Tensor q, " PIKV_RAW ", " PIKV_STORED ", Tensor block_ids, Tensor first_blocks, "
        "float softmax_scale, " PIKV_PARTIAL ") -> ()");
  m.def("attend_tokens_out(Tensor q, " PIKV_STORED ", Tensor block_ids, Tensor offsets, Tensor first_tokens, "
        "float softmax_scale, Tensor? read, " PIKV_PARTIAL ") -> ()");
  m.def("merge_partials_out(Tensor outs, Tensor lses, " PIKV_PARTIAL ") -> ()");
  m.def("attend_at_out(Tensor q, Tensor k, Tensor v, Tensor? key_positions, Tensor? query_positions, "
        "float softmax_scale, " PIKV_PARTIAL ") -> ()");
  m.def("attend_windows_out(Tensor q, " PIKV_RAW ", float softmax_scale, " PIKV_PARTIAL ") -> ()");
  m.def("window_importance_out(Tensor q, Tensor lse, Tensor raw_k, " PIKV_RAW_RUNS ", float softmax_scale, "
        "Tensor(a!) importance) -> ()");
  m.def("prompt_importance_out(Tensor q, Tensor lse, Tensor k, int query_tokens, float softmax_scale, "
        "Tensor(a!) importance) -> ()");
  m.def("score_tokens_out(Tensor q, Tensor? k, Tensor k_high, Tensor k_scale, Tensor k_zero, int hi_bits, int lo_bits, "
        "Tensor block_ids, Tensor first_blocks, float softmax_scale, "
        "Tensor(a!) coarse, Tensor(b!) radius, Tensor(c!) spread) -> ()");
  m.def("score_blocks_out(Tensor q, Tensor k_scale, Tensor k_zero, int bits, Tensor block_ids, Tensor first_blocks, "
        "float softmax_scale, Tensor(a!) bound, Tensor(b!) centre, Tensor(c!) spread) -> ()");
  m.def("key_logits_out(Tensor q, " PIKV_KEYS ", " PIKV_KEY_PART ", Tensor block_ids, Tensor first_blocks, "
        "float softmax_scale, Tensor(a!) logits) -> ()");
  m.def("token_importance_out(Tensor q, Tensor lse, " PIKV_KEYS ", " PIKV_KEY_PART ", Tensor block_ids, "
        "Tensor first_blocks, float softmax_scale, Tensor(a!) importance) -> ()");
  m.def("rank_tokens_out(Tensor coarse, Tensor raw_lse, Tensor first_tokens, Tensor(a!) rank) -> ()");
  m.def("select_topk_out(Tensor scores, Tensor first_tokens, Tensor first_chosen, Tensor(a!) indices) -> ()");
  m.def("attend_mass_out(Tensor q, " PIKV_KEYS ", " PIKV_VALUES ", Tensor block_ids, Tensor first_blocks, "
        "Tensor coarse, float slope, Tensor extra, Tensor raw_lse, float epsilon, float softmax_scale, "
        PIKV_PARTIAL ", Tensor(c!) read) -> ()");
  m.def("select_mass_out(Tensor order, Tensor if_unread, Tensor if_read, Tensor raw_lse, Tensor first_tokens, "
        "float epsilon, Tensor(a!) read) -> ()");
  m.def("unread_mass_out(Tensor coarse, float slope, Tensor spread, Tensor radius, Tensor read, Tensor first_blocks, "
        "Tensor(a!) by_spread, Tensor(b!) by_radius) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pikv, CompositeExplicitAutograd, m) { m.impl("use_kernels", TORCH_BOX(&pikv::use_kernels)); }

STABLE_TORCH_LIBRARY_IMPL(pikv, CPU, m) {
  m.impl("quantize_block_out", TORCH_BOX(&pikv::quantize_block));
  m.impl("dequantize_block_out", TORCH_BOX(&pikv::dequantize_block));
  m.impl("append_out", TORCH_BOX(&pikv::append));
  m.impl("prefetch", TORCH_BOX(&pikv::prefetch));
  m.impl("attend_blocks_out", TORCH_BOX(&pikv::attend_blocks));
  m.impl("attend_ragged_out", TORCH_BOX(&pikv::attend_ragged));
  m.impl("attend_decode_out", TORCH_BOX(&pikv::attend_decode));
  m.impl("attend_tokens_out", TORCH_BOX(&pikv::attend_tokens));
  m.impl("merge_partials_out", TORCH_BOX(&pikv::merge_partials));
  m.impl("attend_at_out", TORCH_BOX(&pikv::attend_at));
  m.impl("attend_windows_out", TORCH_BOX(&pikv::attend_windows));
  m.impl("window_importance_out", TORCH_BOX(&pikv::window_importance));
  m.impl("prompt_importance_out", TORCH_BOX(&pikv::prompt_importance));
  m.impl("score_tokens_out", TORCH_BOX(&pikv::score_tokens));
  m.impl("score_blocks_out", TORCH_BOX(&pikv::score_blocks));
  m.impl("key_logits_out", TORCH_BOX(&pikv::key_logits));
  m.impl("token_importance_out", TORCH_BOX(&pikv::token_importance));
  m.impl("rank_tokens_out", TORCH_BOX(&pikv::rank_tokens));
  m.impl("select_topk_out", TORCH_BOX(&pikv::select_topk));
  m.impl("attend_mass_out", TORCH_BOX(&pikv::attend_mass));
  m.impl("select_mass_out", TORCH_BOX(&pikv::select_mass));
  m.impl("unread_mass_out", TORCH_BOX(&pikv::unread_mass));
}
