"""Megatron-core on PiKV: hooked layer specs, `attach` and `detach` for built models, and the inference contexts.

    model = GPTModel(config, layer_spec(config), ...)            # or: attach(model, "pikv.yaml") on a built one
    context = PiKVInferenceContext(model_config(config), "pikv.yaml")
    logits = model(tokens, positions, None, inference_context=context)

How a hooked layer works is in `hooks`, what a context does in `contexts`, what is refused in
`support`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

from megatron.core.inference.config import InferenceConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, TransformerLayer
from torch import nn

from pikv_megatron.cache.events import CollectiveEvents
from pikv_megatron.config import ModelConfig, RuntimeConfig, resolve
from pikv_megatron.integrations.megatron.contexts import (
    PiKVDynamicInferenceContext,
    PiKVInferenceContext,
    RuntimeSource,
)
from pikv_megatron.integrations.megatron.hooks import (
    AttentionHook,
    LayerHook,
    dispatchers,
    hook,
    hooked,
    is_hooked,
    unhook,
)
from pikv_megatron.integrations.megatron.support import check_attention, check_config, check_mask_type

__all__ = [
    "Attachment",
    "CollectiveEvents",
    "PiKVDynamicInferenceContext",
    "PiKVInferenceContext",
    "attach",
    "detach",
    "hook_spec",
    "layer_spec",
    "model_config",
]

Spec = TypeVar("Spec")
Model = nn.Module | Sequence[nn.Module]
"""A model, or Megatron's list of the chunks of it that a rank has: one, without a pipeline."""


def layer_spec(config: TransformerConfig) -> Any:
    """The stock local spec of `config`'s layers with hooked attention, router and MoE layer, for `GPTModel`.

    Returns:
        A `ModuleSpec` of one layer, or, where `moe_layer_freq` mixes dense and MoE layers, of the block.

    Raises:
        NotImplementedError: PiKV does not serve this model; the message names why.
    """
    check_config(config)
    if config.num_moe_experts and config.moe_layer_freq != 1:
        block = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
        )
        return hook_spec(block)
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    return hook_spec(spec)


def hook_spec(spec: Spec) -> Spec:
    """A copy of a layer's or a block's spec (local, Transformer Engine or your own) with hooked classes.

    Raises:
        NotImplementedError: attention or router are built by something that is not a class PiKV can hook.
    """
    if hasattr(spec, "layer_specs"):
        block: Any = copy.copy(spec)
        block.layer_specs = [hook_spec(layer) for layer in block.layer_specs]
        return block
    if not hasattr(getattr(spec, "submodules", None), "self_attention"):
        raise NotImplementedError(
            f"spec: expected a transformer layer's or a block's; attach(model) for others, got {spec!r}"
        )
    layer: Any = copy.copy(spec)
    around = getattr(layer, "module", None)
    if not (isinstance(around, type) and issubclass(around, TransformerLayer)):
        raise NotImplementedError(f"spec: expected a ModuleSpec of a TransformerLayer class, got {around!r}")
    layer.module = hooked(around)
    layer.submodules = copy.copy(layer.submodules)
    attention = layer.submodules.self_attention
    module = getattr(attention, "module", None)
    if not (isinstance(module, type) and issubclass(module, Attention)):
        raise NotImplementedError(f"self_attention: expected a ModuleSpec of an Attention class, got {attention!r}")
    check_attention("self_attention", module)
    layer.submodules.self_attention = dataclasses.replace(attention, module=hooked(module))
    layer.submodules.mlp = _hook_mlp(layer.submodules.mlp)
    return layer


def _hook_mlp(mlp: Any) -> Any:
    """Megatron-core 0.19 builds a MoE layer by `partial(MoELayer, submodules=...)`; a ModuleSpec does it as well."""
    build = mlp.func if isinstance(mlp, partial) else getattr(mlp, "module", None)
    if not (isinstance(build, type) and issubclass(build, MoELayer)):
        return mlp
    submodules = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    if not (isinstance(submodules.router, type) and issubclass(submodules.router, TopKRouter)):
        raise NotImplementedError(f"router: expected a TopKRouter class, got {submodules.router!r}")
    submodules = dataclasses.replace(submodules, router=hooked(submodules.router))
    moe_layer: Any = hooked(build)
    if isinstance(mlp, ModuleSpec):
        return dataclasses.replace(mlp, module=moe_layer, submodules=submodules)
    return partial(moe_layer, *mlp.args, **{**mlp.keywords, "submodules": submodules})


def model_config(source: TransformerConfig | Model) -> ModelConfig:
    """The cache's view of a model: its attention layers, counted from 0, and the experts behind them.

    Args:
        source: Megatron's `TransformerConfig`, or a built model (needed where not every layer has attention, as in
            `HybridModel`).

    Raises:
        NotImplementedError: PiKV does not serve this model; the message names why.
        TypeError: neither of both.
        ValueError: a built model without attention layers, or one of its layers.
    """
    if isinstance(source, TransformerConfig):
        check_config(source)
        return ModelConfig.from_megatron(source)
    model = _whole(source)
    layers, moe_layers = 0, set()
    config: Any = None
    for module in model.modules():
        if isinstance(module, Attention):
            layers, config = layers + 1, module.config
        elif isinstance(module, MoELayer) and layers:
            moe_layers.add(layers - 1)
    if config is None:
        raise ValueError(f"model: expected a Megatron-core model with attention layers, got {type(model).__name__}")
    check_config(config)
    return dataclasses.replace(
        ModelConfig.from_megatron(config),
        num_layers=layers,
        moe_layers=tuple(sorted(moe_layers)) if 0 < len(moe_layers) < layers else None,
    )


class Attachment:
    """A built model on PiKV, as `attach` leaves it."""

    def __init__(self, model: nn.Module, model_cfg: ModelConfig, runtime_cfg: RuntimeConfig) -> None:
        self.model = model
        self.model_cfg = model_cfg
        self.runtime_cfg = runtime_cfg

    def static_context(
        self, max_batch_size: int | None = None, max_sequence_length: int | None = None
    ) -> PiKVInferenceContext:
        """A context for static batching on this model."""
        return PiKVInferenceContext(self.model_cfg, self.runtime_cfg, max_batch_size, max_sequence_length)

    def dynamic_context(self, inference_config: InferenceConfig) -> PiKVDynamicInferenceContext:
        """A context for continuous batching on this model."""
        config = next(m.config for m in self.model.modules() if isinstance(m, Attention))
        return PiKVDynamicInferenceContext(config, inference_config, self.runtime_cfg, self.model_cfg)

    def detach(self) -> None:
        """Makes the model stock again."""
        detach(self.model)


def _whole(model: Model) -> nn.Module:
    """The one chunk of a list, and no part of a model.

    Raises:
        NotImplementedError: several chunks.
        TypeError, ValueError: no model, or a layer of one.
    """
    chunks = model if isinstance(model, list | tuple) else [model]
    if len(chunks) > 1:
        raise NotImplementedError(
            f"model: PiKV does not serve pipelines (virtual_pipeline_model_parallel_size), got {len(chunks)} chunks"
        )
    whole = chunks[0] if chunks else None
    if not isinstance(whole, nn.Module):
        found = "an empty list" if not chunks else "None" if whole is None else type(whole).__name__
        raise TypeError(f"model: expected a Megatron-core model, or a list of its one chunk, got {found}")
    if isinstance(whole, (BaseTransformerLayer, Attention)):
        raise ValueError(f"model: expected a whole Megatron-core model, got one layer of it ({type(whole).__name__})")
    return whole


def attach(model: Model, config: RuntimeSource = None) -> Attachment:
    """Hooks the attention, router and MoE layers of a built model in place; weights and state dict keys stay.

    Args:
        model: A Megatron-core model (`GPTModel`, `HybridModel`, wrapped or not), or a list of this one chunk.
        config: The runtime's configuration: `RuntimeConfig`, dict or YAML path; None for the defaults. If it has a
            section `model`, it must describe this model.

    Raises:
        RuntimeError: the model is hooked already.
        NotImplementedError: PiKV does not serve this model; the message names why.
        TypeError: `model` is none.
        ValueError: no attention layers, a layer in place of a model, or `config` is for another model.
    """
    model = _whole(model)
    layers = _layers(model)
    already = [name for name, layer in layers if is_hooked(layer)]
    if already:
        raise RuntimeError(f"model: already on PiKV ({already[0]} is hooked); detach(model) first")
    model_cfg = model_config(model)
    runtime_cfg = resolve(model_cfg, config)[1]
    for name, layer in layers:
        if isinstance(layer, Attention):
            check_attention(name, type(layer))
            check_mask_type(name, layer.attn_mask_type)
        elif isinstance(layer, MoELayer) and not isinstance(layer.router, TopKRouter):
            raise NotImplementedError(f"{name}.router: expected a TopKRouter, got {type(layer.router).__name__}")
    attention = {id(layer) for _, layer in layers if isinstance(layer, Attention)}
    around = [layer for _, layer in layers if isinstance(layer, TransformerLayer)]
    found = {id(module) for layer in around for module in layer.modules() if id(module) in attention}
    outside = [name for name, layer in layers if id(layer) in attention.difference(found)]
    if outside:
        raise NotImplementedError(f"{outside[0]}: expected a TransformerLayer around it, there is none")
    layer_id = -1
    for _, layer in layers:
        hook(layer)
        if isinstance(layer, LayerHook):
            layer.pikv_first = layer is around[0]
            has_attention = any(id(module) in attention for module in layer.modules())
            layer.pikv_layer_id = layer_id + 1 if has_attention else layer_id
        elif isinstance(layer, AttentionHook):
            layer_id += 1
            layer.pikv_layer_id, layer.pikv_model_cfg = layer_id, model_cfg
    return Attachment(model, model_cfg, runtime_cfg)


def detach(model: Model) -> None:
    """Makes a hooked model (attached, or built from a hooked spec) stock again.

    Raises:
        RuntimeError: no layer of the model is hooked.
    """
    layers = [layer for _, layer in _layers(_whole(model)) if is_hooked(layer)]
    if not layers:
        raise RuntimeError("model: not on PiKV, nothing to detach")
    for layer in layers:
        for name in ("pikv_layer_id", "pikv_model_cfg", "pikv_first"):
            vars(layer).pop(name, None)
        unhook(layer)


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """What has a hook, with its name: transformer layers, attention, MoE layers, their routers and dispatchers, in the
    model's order.
    """
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, (TransformerLayer, Attention, TopKRouter, MoELayer)):
            found.append((name, module))
        if isinstance(module, MoELayer):
            found.extend((f"{name}.{type(d).__name__}", d) for d in dispatchers(module))
    return found
