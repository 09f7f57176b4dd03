"""The hooked layers: subclasses of Megatron-core's own that send keys, values and routing to a PiKV context.

There is one mechanism: `hooked(cls)` puts a hook in front of a host class. A spec names the subclass; `attach` gives it
to built layers through `__class__`. A hook acts only while its layer runs with a PiKV context; with any other context,
or none (training), the host's code runs as it is. Parameters, submodules and state dict keys are the host's.

Attention comes before its layer's router, so attention leaves a note of (context, layer) for the MoE layer behind it.
One thread runs hooked models at a time, as it is with Megatron's own dispatchers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor, nn

from pikv_megatron.config import ModelConfig, check_same_model
from pikv_megatron.integrations.megatron.contexts import PiKVContext, PiKVInferenceContext
from pikv_megatron.integrations.megatron.support import check_mask_type


@dataclass(frozen=True)
class _Step:
    """One layer's turn in a forward pass with a PiKV context."""

    context: PiKVContext
    layer_id: int


class _Flow:
    attended: _Step | None = None
    """Left by attention, taken by the MoE layer that follows."""
    routed: _Step | None = None
    """Set while a MoE layer runs, for its router and dispatcher."""


_flow = _Flow()


class _CoreAttentionOnCache(nn.Module):
    """Stands in for a layer's core attention during one call with a static context; Megatron wants a Module here."""

    def __init__(self, context: PiKVInferenceContext, layer_id: int) -> None:
        super().__init__()
        self.context = context
        self.layer_id = layer_id

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Query [s, b, heads, d], key and value [s, b, groups, d] of the step, after RoPE -> [s, b, heads * d]."""
        for name, given in (("attention_bias", attention_bias), ("packed_seq_params", packed_seq_params)):
            if given is not None:
                raise NotImplementedError(f"{name}: not served with a PiKV context, expected None")
        self.context.check_mask(attention_mask, query.shape[0])
        return self.context.attend(self.layer_id, query, key, value).flatten(2)


class AttentionHook(Attention):
    """Keys and values go to the context's cache, after RoPE, and attention is computed there."""

    pikv_layer_id: int | None = None
    """Zero-based among the model's attention layers; None: as the layer is numbered."""
    pikv_model_cfg: ModelConfig | None = None
    """What a cache for this model looks like; None: as the layer's own configuration says."""
    _pikv_step: _Step | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        _flow.attended = None
        context = inference_context if inference_context is not None else kwargs.get("inference_params")
        run = functools.partial(
            super().forward, hidden_states, attention_mask, key_value_states, inference_context, *args, **kwargs
        )
        if not isinstance(context, PiKVContext):
            return run()
        layer_id = self.layer_number - 1 if self.pikv_layer_id is None else self.pikv_layer_id
        self._check(context, layer_id)
        self._pikv_step = _Step(context, layer_id)
        context.serving = True
        try:
            out = run()
        finally:
            context.serving = False
            self._pikv_step = None
        _flow.attended = _Step(context, layer_id)
        return out

    def _check(self, context: PiKVContext, layer_id: int) -> None:
        if self.training:
            raise RuntimeError("a PiKV context serves inference: call model.eval(), or train without a context")
        check_mask_type(f"attention layer {self.layer_number}", self.attn_mask_type)
        if layer_id == 0:  # before any layer has taken a token
            if self.pikv_model_cfg is None:
                self.pikv_model_cfg = ModelConfig.from_megatron(self.config)
            ours = dataclasses.replace(context.model_cfg, softmax_scale=self.pikv_model_cfg.softmax_scale)
            check_same_model(ours, self.pikv_model_cfg, "context: its cache")
        scale = self.config.softmax_scale or self.hidden_size_per_attention_head**-0.5
        if not math.isclose(scale, context.model_cfg.scale, rel_tol=1e-6):
            raise ValueError(
                f"model.softmax_scale: the cache was made for {context.model_cfg.scale:g}, attention layer "
                f"{self.layer_number} has {scale:g}"
            )

    @property
    def core_attention(self) -> Any:
        """The host's submodule, or the cache in its place while a static PiKV context is served."""
        if self._pikv_step is not None and isinstance(self._pikv_step.context, PiKVInferenceContext):
            return _CoreAttentionOnCache(self._pikv_step.context, self._pikv_step.layer_id)
        return super().__getattr__("core_attention")

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Static: nothing is stored yet; both rotary tables are cut to the step, and the host turns the new keys."""
        if self._pikv_step is None or not isinstance(self._pikv_step.context, PiKVInferenceContext):
            return super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        self._pikv_step.context.segments(query.shape[0], query.shape[1])  # a step that is too long ends here
        if rotary_pos_emb is not None:
            start = self._pikv_step.context.sequence_len_offset
            rotary_pos_emb = tuple(
                None if table is None else table[start : start + query.shape[0]] for table in rotary_pos_emb
            )
        return query, key, value, rotary_pos_emb, self.attn_mask_type, None

    def flash_decode_and_prefill(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Dynamic: q, k, v [tokens, 1, heads or groups, d] of the step, packed -> [tokens, 1, heads, d]."""
        if self._pikv_step is None:
            return super().flash_decode_and_prefill(q, k, v, *args, **kwargs)
        return self._pikv_step.context.attend(self._pikv_step.layer_id, q, k, v)


class RouterHook(TopKRouter):
    """Shows the cache which experts the router chose; the choice itself is the host's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        probs, routing = super().forward(*args, **kwargs)
        step = _flow.routed
        if step is not None:
            if routing.dtype == torch.bool:  # probs and routing [tokens, num_experts]
                weights, expert_ids = probs.topk(self.topk, dim=-1)
            else:  # the inference-optimized router returns both dense, [tokens, topk]
                weights, expert_ids = probs, routing
            step.context.observe(step.layer_id, expert_ids, weights)
        return probs, routing


class MoELayerHook(MoELayer):
    """Gives its router and dispatcher the step that attention left, and only for the length of its forward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for dispatcher in dispatchers(self):
            hook(dispatcher)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        _flow.routed, _flow.attended = _flow.attended, None
        try:
            return super().forward(*args, **kwargs)
        finally:
            _flow.routed = None


class DispatcherHook(MoETokenDispatcher):
    """Tells the context's `dispatch_listeners` when tokens leave for their experts and when they have arrived."""

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> Any:
        step = _flow.routed
        listeners = step.context.dispatch_listeners if step is not None else ()
        layer_id = step.layer_id if step is not None else -1
        for listener in listeners:
            listener.dispatch_launched(layer_id)
        dispatched = super().token_dispatch(hidden_states, probs)
        for listener in listeners:
            listener.dispatch_finished(layer_id)
        return dispatched


_HOOKS: tuple[tuple[type, type], ...] = (
    (AttentionHook, Attention),
    (RouterHook, TopKRouter),
    (MoELayerHook, MoELayer),
    (DispatcherHook, MoETokenDispatcher),
)
_hooked_classes: dict[type, type[Any]] = {}


def hooked(host: type[Any]) -> type[Any]:
    """The subclass of a Megatron class that serves PiKV contexts: its hook in front of it. One per class.

    Raises:
        TypeError: there is no hook for this class, or it is a hooked one already.
    """
    if host in _hooked_classes:
        return _hooked_classes[host]
    for hook_class, base in _HOOKS:
        if issubclass(host, base) and not issubclass(host, hook_class):
            namespace = {"__module__": __name__, "__doc__": hook_class.__doc__}
            _hooked_classes[host] = type(f"PiKV{host.__name__}", (hook_class, host), namespace)
            return _hooked_classes[host]
    raise TypeError(f"expected a class of Megatron's attention, router, MoE layer or dispatcher, got {host.__name__}")


def is_hooked(layer: Any) -> bool:
    """Whether this layer (or dispatcher) has its hook."""
    return isinstance(layer, tuple(hook_class for hook_class, _ in _HOOKS))


def hook(layer: Any) -> None:
    """Hooks a built layer (or dispatcher) in place."""
    layer.__class__ = hooked(type(layer))


def unhook(layer: Any) -> None:
    """Gives a hooked layer its host's class back."""
    layer.__class__ = type(layer).__bases__[1]


def dispatchers(layer: MoELayer) -> list[MoETokenDispatcher]:
    """A MoE layer's dispatchers: one, or with `transformer_impl="inference_optimized"` a second one for inference."""
    names = ("token_dispatcher", "_training_token_dispatcher", "_inference_token_dispatcher")
    found = {id(d): d for name in names if (d := getattr(layer, name, None)) is not None}
    return list(found.values())
