"""Attaching a Hugging Face model: its attention is switched to PiKV's, its routers are watched; and back."""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from pikv_megatron.config import ModelConfig
from pikv_megatron.integrations.huggingface import attention as huggingface_attention  # noqa: F401 - registers what attach switches to
from pikv_megatron.integrations.huggingface.current import NAME, current, eager
from pikv_megatron.integrations.huggingface.longrope import keep_cache, undo
from pikv_megatron.integrations.huggingface.model import (
    Router,
    config_experts,
    decoder_of,
    find_model,
    model_config,
    read_routing,
    routers,
)

log = logging.getLogger(__name__)


@dataclass
class _Attached:
    implementation: str
    hooks: list[RemovableHandle]


_attached: weakref.WeakKeyDictionary[PreTrainedModel, _Attached] = weakref.WeakKeyDictionary()
_changing = threading.RLock()
"""Held while a model is attached or detached."""


def is_attached(model: nn.Module) -> bool:
    """Whether `attach` has been called on the model."""
    return find_model(model) in _attached


def attach_once(model: nn.Module) -> None:
    """`attach`, unless the model is attached already; several threads may do so at the same time."""
    with _changing:
        if not is_attached(model):
            attach(model)


def advice(config: Any) -> str:
    """What to do where the model of this decoder's config does not run on PiKV's attention."""
    if any(model.config.get_text_config(decoder=True) is config for model in list(_attached)):
        return (
            "a forward of this model without a PiKVHFCache is under way, in another thread, where it runs on its "
            "former attention; run one after the other, or give both a PiKVHFCache"
        )
    return "call pikv_megatron.integrations.huggingface.attach(model)"


def attach(model: nn.Module) -> None:
    """Switches a model's attention to PiKV and watches its routers; weights and state dict keys stay.

    Forwards without a `PiKVHFCache` go on with the former attention. `detach` undoes it.

    Raises:
        RuntimeError: the model is attached already, or is the copy of an attached one, or shares its config.
        NotImplementedError: PiKV does not serve this model exactly; the message names why.
    """
    with _changing:
        _attach(find_model(model))


def _attach(hf_model: PreTrainedModel) -> None:
    if hf_model in _attached:
        raise RuntimeError(f"model: {type(hf_model).__name__} is on PiKV already; detach(model) first")
    served = model_config(hf_model)
    found, config = routers(hf_model), hf_model.config.get_text_config(decoder=True)
    implementation = config._attn_implementation
    if implementation == NAME:
        raise RuntimeError(
            f"attn_implementation: {type(hf_model).__name__} has {NAME!r} without being attached, as the copy of an "
            "attached model or by sharing its config; copy before attaching, and give each model a config of its own"
        )
    if not found and config_experts(config):
        name, experts = type(hf_model).__name__, config_experts(config)
        log.warning("%s: no router found for its %d experts, all blocks get the label 0", name, experts)
    hf_model.set_attn_implementation(NAME)
    decoder = decoder_of(hf_model)
    hooks = [
        decoder.register_forward_pre_hook(partial(_before, config, implementation, served), with_kwargs=True),
        decoder.register_forward_hook(partial(_after, config), always_call=True),
    ]
    hooks += [router.gate.register_forward_hook(partial(_observe, router)) for router in found]
    keep_cache(hf_model)
    _attached[hf_model] = _Attached(implementation, hooks)


def detach(model: nn.Module) -> None:
    """Undoes `attach`.

    Raises:
        RuntimeError: the model is not attached.
    """
    hf_model = find_model(model)
    with _changing:
        if hf_model not in _attached:
            raise RuntimeError(f"model: {type(hf_model).__name__} is not on PiKV, nothing to detach")
        attached = _attached.pop(hf_model)
        for hook in attached.hooks:
            hook.remove()
        undo(hf_model)
        hf_model.set_attn_implementation(attached.implementation)


@eager
def _before(
    config: Any,
    implementation: str,
    served: ModelConfig,
    decoder: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Checks that a cache of ours fits; gives a forward without one the model's former attention, masks and all."""
    given = (kwargs.get("past_key_values"), *args)  # by name or by position
    cache: Any = next((x for x in given if getattr(x, "attention", None) == NAME), None)
    if cache is None:
        config._attn_implementation = implementation
        return
    for name in ("num_layers", "num_experts", "sliding_windows"):
        made, expected = getattr(cache.cache.model, name), getattr(served, name)
        if made != expected:
            raise ValueError(
                f"past_key_values: made for another model, its {name} is {made}, {config.model_type} has {expected}"
            )
    config._attn_implementation = NAME  # whatever was set since
    current.serving = True


@eager
def _after(config: Any, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Ends a forward, a failed one (output None) too: no reference to its cache stays."""
    cache, current.cache = current.cache, None
    config._attn_implementation = NAME
    current.writing = current.routed = None
    current.serving = False
    if cache is not None:
        cache.finish(failed=output is None)


@eager
def _observe(router: Router, gate: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Tells the cache which experts the tokens went to whose attention has just run."""
    routed = current.routed
    if routed is None or routed.layer_id != router.layer_id:
        return
    current.routed = None
    routing = read_routing(output, router)
    if routing is None:
        raise RuntimeError(
            f"layer {router.layer_id}: expected {type(gate).__name__} to return expert ids and weights, or logits of "
            f"{router.num_experts} experts"
        )
    routed.cache.observe(routed.layer_id, *routing)
