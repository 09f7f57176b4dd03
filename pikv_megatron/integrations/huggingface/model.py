"""What a Hugging Face model is made of, found by structure and not by class name: its attention layers with their
shapes, and the router of each layer's experts.

A model gives the shapes as they are on this rank (tensor parallelism changes weights, not configs); a config alone
gives those of the whole model.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from pikv_megatron.config import ModelConfig
from pikv_megatron.config.io import ConfigError
from pikv_megatron.integrations.huggingface.mla import caches_latents, latent_shapes
from pikv_megatron.integrations.huggingface.support import check_config, check_model


class Router(NamedTuple):
    """The gate of one layer's experts: the module to watch, the layer that it labels, and what it chooses of."""

    layer_id: int
    gate: nn.Module
    num_experts: int
    topk: int


def find_model(source: nn.Module) -> PreTrainedModel:
    """The transformers model in `source`, which may wrap it (an engine, DDP)."""
    for module in source.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"model: expected a transformers model or a wrapper of one, got {type(source).__name__}")


def attention_layers(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """The model's self-attention modules with their names, one per layer, in order.

    Raises:
        NotImplementedError: a layer without one, or with several.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and all(hasattr(module, key) for key in ("scaling", "is_causal", "num_key_value_groups"))
    ]
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    per_layer = Counter(module.layer_idx for _, module in found)
    if per_layer != Counter(range(layers)):
        raise NotImplementedError(
            f"{type(model).__name__}: expected one self-attention module in each of {layers} layers (with layer_idx, "
            f"scaling, is_causal, num_key_value_groups), found {dict(sorted(per_layer.items()))}"
        )
    return sorted(found, key=lambda item: item[1].layer_idx)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that runs the decoder's layers, whoever calls it: the parent of their list."""
    path = attention_layers(model)[0][0].split(".")
    for depth in range(len(path)):
        if isinstance(model.get_submodule(".".join(path[: depth + 1])), nn.ModuleList):
            return model.get_submodule(".".join(path[:depth]))
    raise NotImplementedError(f"{type(model).__name__}: expected its layers in a ModuleList, found {'.'.join(path)}")


def routers(model: PreTrainedModel) -> list[Router]:
    """The routers of the model's MoE layers, in the layers' order.

    A router is a module in a layer, beside its attention, with `top_k`, `num_experts` and a weight [num_experts,
    hidden_size]; or a linear layer of that shape in a module that has these two.
    """
    found = []
    for name, attention in attention_layers(model):
        layer = model.get_submodule(name.rpartition(".")[0])
        gates = [router for module in layer.modules() if (router := _router(attention.layer_idx, module)) is not None]
        if len({id(router.gate) for router in gates}) > 1:
            raise NotImplementedError(f"{name}: expected one router beside it, found {len(gates)}")
        found += gates[:1]
    return found


def _router(layer_id: int, module: nn.Module) -> Router | None:
    topk, num_experts = getattr(module, "top_k", None), getattr(module, "num_experts", None)
    if not isinstance(topk, int) or not isinstance(num_experts, int):
        return None
    for gate in (module, *module.children()):
        weight = getattr(gate, "weight", None)
        shape: Any = getattr(weight, "ds_shape", getattr(weight, "shape", None))  # ZeRO-3's: what it takes away
        if isinstance(weight, Tensor) and len(shape) == 2 and shape[0] == num_experts:
            alone = list(module.children()) == [gate]  # a router around its gate, as AutoEP's, which does the choosing
            return Router(layer_id, module if alone else gate, num_experts, topk)
    return None


def read_routing(output: Any, router: Router) -> tuple[Tensor, Tensor] | None:
    """expert_ids and weights, [tokens, topk] each, of what a gate returned: a tuple that holds them (transformers 5),
    or its logits [..., num_experts]; None where it has neither.
    """
    parts = [part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, Tensor)]
    chosen = [p for p in parts if p.dtype in (torch.int64, torch.int32) and p.shape[-1] == router.topk]
    if chosen:
        expert_ids = chosen[0].reshape(-1, router.topk)
        weighed = [p for p in parts if p.is_floating_point() and p.shape == chosen[0].shape]
        if weighed:
            return expert_ids, weighed[-1].reshape(-1, router.topk).float()
    logits = [p for p in parts if p.is_floating_point() and p.shape[-1] == router.num_experts]
    if not logits:
        return None
    weights, expert_ids = logits[0].reshape(-1, router.num_experts).float().softmax(-1).topk(router.topk, -1)
    return expert_ids, weights


def model_config(source: PreTrainedModel | Any) -> ModelConfig:
    """The cache's view of a model.

    Args:
        source: a transformers model (wrapped or not), or a config.

    Raises:
        NotImplementedError: PiKV does not serve this model exactly; the message names why.
    """
    if not isinstance(source, nn.Module):
        config = source.get_text_config(decoder=True)
        check_config(source)
        check_config(config)
        return _from_config(config)
    model = find_model(source)
    check_model(model)
    config, gates = model.config.get_text_config(decoder=True), routers(model)
    kinds = {(router.num_experts, router.topk) for router in gates}
    if len(kinds) > 1:
        raise NotImplementedError(f"{type(model).__name__}: expected routers alike in every layer, found {kinds}")
    layers = [module for _, module in attention_layers(model)]
    num_experts, topk = kinds.pop() if kinds else (0, 1)
    shapes = {_shapes(module, config) for module in layers}
    if len(shapes) > 1:
        raise NotImplementedError(f"{type(model).__name__}: expected the same heads in every layer, found {shapes}")
    heads, groups, head_dim, v_head_dim, scale = shapes.pop()
    return ModelConfig(
        num_layers=len(layers),
        hidden_size=config.hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        num_experts=num_experts,
        topk=topk,
        dtype=_dtype(model.dtype),
        moe_layers=tuple(r.layer_id for r in gates) if 0 < len(gates) < len(layers) else None,
        softmax_scale=None if scale == head_dim**-0.5 else scale,
        sliding_windows=tuple(options.get("sliding_window") for options in get_layer_types_and_kwargs(config)[1]),
    )


def _shapes(module: Any, config: Any) -> tuple[int, int, int, int, float]:
    """Query heads, KV heads, channels of a key and of a value, softmax scale of one attention module."""
    if caches_latents(module):
        return latent_shapes(module)
    if hasattr(module, "kv_lora_rank"):  # MLA whose model caches expanded keys and values of every head
        heads = _rows(module, "kv_b_proj") // (module.qk_nope_head_dim + module.v_head_dim)
        return heads, heads, module.qk_head_dim, module.v_head_dim, float(module.scaling)
    head_dim = module.head_dim
    groups = _rows(module, "k_proj") // head_dim if hasattr(module, "k_proj") else config.num_key_value_heads
    return groups * module.num_key_value_groups, groups, head_dim, head_dim, float(module.scaling)


def _rows(module: Any, projection: str) -> int:
    """Output channels, on this rank, of a projection of an attention module.

    Raises:
        NotImplementedError: it is no linear layer.
    """
    linear = getattr(module, projection)
    weight = getattr(linear, "weight", None)
    if weight is None:
        raise NotImplementedError(
            f"{type(module).__name__}: {projection} is a {type(linear).__name__} without a weight; expected a linear "
            "layer, whose rows say how many KV heads there are"
        )
    return int(weight.shape[0] if weight.dim() == 2 and weight.is_floating_point() else linear.out_features)


def _from_config(config: Any) -> ModelConfig:
    if getattr(config, "kv_lora_rank", None):
        raise ConfigError("model: kv_lora_rank is set (MLA), whose shapes depend on more; pass the model itself")
    return ModelConfig.from_huggingface(config)


def config_experts(config: Any) -> int:
    """Routed experts that a config names, or DBRX's config of its feed-forward layers; 0 for a dense model."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    parts = (config, getattr(config, "ffn_config", None))
    return next((count for part in parts for key in keys if (count := getattr(part, key, None))), 0)


def _dtype(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")
