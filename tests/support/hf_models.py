"""Small random models of the families that the Hugging Face tests run on, from their configs: grouped queries, MLA,
learnt sinks, sliding windows, shared experts and dense layers in front, as the published models have them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 128
SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MLA = {
    "num_key_value_heads": 8,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
GROUPED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {**LOCAL, "sliding_window": None},
    "Qwen3Moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "DeepseekV2": {**MLA, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "DeepseekV3": {**MLA, "q_lora_rank": 24, "n_group": 2, "topk_group": 1},
    "GraniteMoe": {**LOCAL, "attention_multiplier": 0.2},
    "Phimoe": {**LOCAL, "sliding_window": None},
    "GptOss": {**LOCAL, "head_dim": 16, "sliding_window": 12},
    "Llama": {},
    "Mistral": {"sliding_window": 20},
    "Qwen3": {"head_dim": 16},
}
PER_LAYER = {
    "head_dim": 16,
    "sliding_window": 12,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "Afmoe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_dense_layers": 1,
        "head_dim": 16,
        "sliding_window": 12,
    },
    "Cohere2": {"sliding_window": 12},
    "Dbrx": {
        "d_model": 64,
        "n_heads": 8,
        "n_layers": 3,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"moe_num_experts": 8, "moe_top_k": 2, "ffn_hidden_size": 64},
    },
    "Dots1": {**GROUPED, "head_dim": 16},
    "Ernie4_5_Moe": {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32},
    "Exaone4": {"sliding_window": 12},
    "FlexOlmo": {"num_experts": 8, "num_experts_per_tok": 2},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 12},
    "Gemma3nText": {**PER_LAYER, "num_kv_shared_layers": 0, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 3},
    "Gemma4Text": {**PER_LAYER, "num_kv_shared_layers": 0, "global_head_dim": 16},
    "Glm4Moe": {**GROUPED, "head_dim": 16},
    "Glm4MoeLite": {**MLA, "q_lora_rank": 24, "n_group": 1, "topk_group": 1},
    "HunYuanMoEV1": {"num_experts": 8, "moe_topk": 2, "head_dim": 16},
    "LongcatFlash": {
        **{key: value for key, value in MLA.items() if key.endswith(("dim", "rank", "heads"))},
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 8,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "q_lora_rank": 24,
        "v_head_dim": 16,
        "head_dim": 8,
    },
    "MiniMaxM2": {**LOCAL, "head_dim": 16, "rotary_dim": 8},
    "Mistral4": {**MLA, "q_lora_rank": 24, "n_group": 1, "topk_group": 1},
    "Olmo3": {"sliding_window": 12},
    "Phi3": {},
    "Qwen2": {},
    "Qwen2Moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "SmolLM3": {},
}
"""Families beside those that every test runs on."""


def make(family: str, **changes: Any) -> PreTrainedModel:
    """A random model of a family, in eval mode, with weights large enough that attention has something to choose."""
    torch.manual_seed(0)
    keys = {**SHARED, **(FAMILIES | MORE_FAMILIES)[family], **changes}
    if "num_layers" in keys:
        del keys["num_hidden_layers"]  # LongCat counts its layers otherwise
    config = getattr(transformers, f"{family}Config")(**keys)
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.generation_config.pad_token_id = 0
    return model


def prompts(rows: int = 3, columns: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, columns] and a mask that pads every row but the last on the left, by different lengths."""
    ids = torch.randint(1, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        mask[row, : columns // 2 - 7 * row] = 0
    return ids * mask, mask
