"""The hosts' own decode attention, for bench_attention.py: transformers' and stock Megatron-core's static context.

Each function takes q [G, heads, D] and K, V [1, G, S, D] and returns calls by name; None: the host is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

Calls = dict[str, Callable[[], object] | None]


def transformers_calls(q: Tensor, k: Tensor, v: Tensor) -> Calls:
    """The two attention functions that a Mixtral model chooses from, without a mask as in decode."""
    names = ("transformers, eager", "transformers, sdpa")
    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.models.mixtral.modeling_mixtral import eager_attention_forward
    except ImportError:
        return dict.fromkeys(names)
    groups, heads, dim = q.shape
    layer = SimpleNamespace(num_key_value_groups=heads, training=False, is_causal=True)
    query = q.view(1, groups * heads, 1, dim)

    def call(function: Callable) -> Tensor:
        return function(layer, query, k, v, None, scaling=dim**-0.5)[0]

    return {
        name: partial(call, f) for name, f in zip(names, (eager_attention_forward, sdpa_attention_forward), strict=True)
    }


def megatron_calls(q: Tensor, k: Tensor, v: Tensor) -> Calls:
    """One attention layer of a stock model, without its projections: what its static context does to K and V in a step
    (store, RoPE on every cached key) with its core attention, and that core attention alone.
    """
    names = ("Megatron static context", "Megatron core attention alone")
    try:
        layer, angles = _megatron_layer(*q.shape, k.shape[2], q.device)
        from megatron.core.inference.contexts import StaticInferenceContext
        from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    except ImportError:
        return dict.fromkeys(names)
    query = q.reshape(1, 1, -1, q.shape[2])  # [tokens, batch, heads, channels]
    keys, values = (x.permute(2, 0, 1, 3).contiguous() for x in (k, v))
    context = StaticInferenceContext(1, len(keys))
    context.key_value_memory_dict[layer.layer_number] = (keys, values)
    context.sequence_len_offset = len(keys) - 1
    newest = keys[-1:].clone(), values[-1:].clone()

    def step() -> Tensor:
        held = layer._adjust_key_value_for_inference(context, query, *newest, (angles, angles))
        turned = [
            apply_rotary_pos_emb(x, table, config=layer.config, cp_group=layer.pg_collection.cp)
            for x, table in zip(held[:2], held[3], strict=True)
        ]
        return layer.core_attention(*turned, held[2], None, attn_mask_type=held[4])

    return dict(zip(names, (step, partial(layer.core_attention, query, keys, values, None)), strict=True))


def _megatron_layer(
    groups: int, heads: int, dim: int, tokens: int, device: torch.device
) -> tuple[torch.nn.Module, Tensor]:
    """The attention of a small model's only layer, and RoPE's table for `tokens` tokens."""
    if not torch.cuda.is_available():
        from pikv_megatron.integrations import cpu_compat

        cpu_compat.install()
    from pikv_megatron.integrations import hf_weights
    from pikv_megatron.launch import init_megatron

    init_megatron()
    shape = {
        "model_type": "mixtral",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": groups * heads,
        "num_key_value_heads": groups,
        "head_dim": dim,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "vocab_size": 64,
        "max_position_embeddings": tokens,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    model = hf_weights.build_model(shape).to(device).eval()
    return model.decoder.layers[0].self_attention, model.rotary_pos_emb(tokens)
