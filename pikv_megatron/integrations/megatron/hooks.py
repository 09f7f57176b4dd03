"""The hooked layers: subclasses of Megatron-core's own that send keys, values and routing to a PiKV context.

There is one mechanism: `hooked(cls)` puts a hook in front of a host class. A spec names the subclass; `attach` gives it
to built layers through `__class__`. A hook acts only while its layer runs with a PiKV context; with any other context,
or none (training), the host's code runs as it is. Parameters, submodules and state dict keys are the host's.

A hooked transformer layer knows the context of its forward; what runs inside of it (attention, router, dispatcher)
finds it in `current`, which is set for the length of that layer's forward, in that thread. The first layer begins the
context's step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from pikv_megatron.cache.events import CollectiveKind
from pikv_megatron.config import ModelConfig, check_same_model
from pikv_megatron.integrations.megatron.contexts import PiKVContext, PiKVInferenceContext
from pikv_megatron.integrations.megatron.support import check_mask_type


@dataclass(frozen=True)
class Turn:
    """A transformer layer's turn in a forward pass with a PiKV context. layer_id: the attention layer whose tokens its
    router sees; None: there is none before it.
    """

    context: PiKVContext
    layer_id: int | None


class _Current(threading.local):
    turn: Turn | None = None
    """Set while a hooked transformer layer runs with a PiKV context."""


current = _Current()


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


class LayerHook(TransformerLayer):
    """Says which context its attention, router and dispatcher run with; the first layer begins the context's step."""

    pikv_layer_id: int | None = None
    """See Turn; None: as the layer is numbered."""
    pikv_first: bool | None = None
    """Whether it is the first of its model; None: as the layer is numbered."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before, current.turn = current.turn, None
        context = _context_of(args, kwargs)
        try:
            if isinstance(context, PiKVContext):
                if self.training:
                    raise RuntimeError("a PiKV context serves inference: call model.eval(), or train without a context")
                hidden: Tensor = args[0] if args else kwargs["hidden_states"]
                is_first = self.layer_number == 1 if self.pikv_first is None else self.pikv_first
                if is_first:
                    context.begin(hidden.shape[0], hidden.shape[1])
                layer_id = self.layer_number - 1 if self.pikv_layer_id is None else self.pikv_layer_id
                current.turn = Turn(context, layer_id if layer_id >= 0 else None)
            return super().forward(*args, **kwargs)
        except BaseException as error:
            if current.turn is not None:
                current.turn.context.abort(f"{type(error).__name__} in transformer layer {self.layer_number}: {error}")
            raise
        finally:
            current.turn = before


def _context_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The inference context among the arguments of TransformerLayer.forward, where it is the tenth."""
    for name in ("inference_context", "inference_params"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    return args[9] if len(args) > 9 else None


class AttentionHook(Attention):
    """Keys and values go to the context's cache, after RoPE, and attention is computed there."""

    pikv_layer_id: int | None = None
    """Zero-based among the model's attention layers; None: as the layer is numbered."""
    pikv_model_cfg: ModelConfig | None = None
    """What a cache for this model looks like; None: as the layer's own configuration says."""
    _pikv_step: tuple[PiKVContext, int] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        context = inference_context if inference_context is not None else kwargs.get("inference_params")
        run = functools.partial(
            super().forward, hidden_states, attention_mask, key_value_states, inference_context, *args, **kwargs
        )
        if not isinstance(context, PiKVContext):
            return run()
        layer_id = self.layer_number - 1 if self.pikv_layer_id is None else self.pikv_layer_id
        self._check(context, layer_id)
        if current.turn is None or current.turn.context is not context:
            raise RuntimeError(
                f"attention layer {self.layer_number}: the transformer layer around it is not hooked; build the model "
                "with layer_spec(config) or call attach(model)"
            )
        self._pikv_step = context, layer_id
        context.serving = True
        try:
            return run()
        finally:
            context.serving = False
            self._pikv_step = None

    def _check(self, context: PiKVContext, layer_id: int) -> None:
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
        context, layer_id = self._pikv_step or (None, 0)
        if isinstance(context, PiKVInferenceContext):
            return _CoreAttentionOnCache(context, layer_id)
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
        context = None if self._pikv_step is None else self._pikv_step[0]
        if not isinstance(context, PiKVInferenceContext):
            return super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        if rotary_pos_emb is not None:
            start = context.sequence_len_offset
            rotary_pos_emb = tuple(
                None if table is None else table[start : start + query.shape[0]] for table in rotary_pos_emb
            )
        return query, key, value, rotary_pos_emb, self.attn_mask_type, None

    def flash_decode_and_prefill(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Dynamic: q, k, v [tokens, 1, heads or groups, d] of the step, packed -> [tokens, 1, heads, d]."""
        if self._pikv_step is None:
            return super().flash_decode_and_prefill(q, k, v, *args, **kwargs)
        context, layer_id = self._pikv_step
        return context.attend(layer_id, q, k, v)


class RouterHook(TopKRouter):
    """Shows the cache which experts the router chose; the choice itself is the host's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        probs, routing = super().forward(*args, **kwargs)
        turn = current.turn
        if turn is not None and turn.layer_id is not None:
            if routing.dtype == torch.bool:  # probs and routing [tokens, num_experts]
                weights, expert_ids = probs.topk(self.topk, dim=-1)
            else:  # the inference-optimized router returns both dense, [tokens, topk]
                weights, expert_ids = probs, routing
            turn.context.observe(turn.layer_id, expert_ids, weights)
        return probs, routing


class MoELayerHook(MoELayer):
    """Hooks the dispatchers that it is built with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for dispatcher in dispatchers(self):
            hook(dispatcher)


class DispatcherHook(MoETokenDispatcher):
    """Tells the context's `collective_listeners` when tokens leave for their experts and come back."""

    def token_dispatch(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _collective("dispatch", hidden_states):
            return super().token_dispatch(hidden_states, *args, **kwargs)

    def token_combine(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _collective("combine", hidden_states):
            return super().token_combine(hidden_states, *args, **kwargs)


@contextmanager
def _collective(kind: CollectiveKind, handed: Tensor) -> Iterator[None]:
    """A collective of the layer whose turn it is. What raises within it has not finished."""
    turn = current.turn
    listeners = () if turn is None else turn.context.collective_listeners
    layer_id = -1 if turn is None or turn.layer_id is None else turn.layer_id
    for listener in listeners:
        listener.started(layer_id, kind, handed.numel() * handed.element_size())
    yield
    for listener in listeners:
        listener.finished(layer_id, kind)


_HOOKS: tuple[tuple[type, type], ...] = (
    (LayerHook, TransformerLayer),
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
    raise TypeError(
        "expected a class of Megatron's transformer layer, attention, router, MoE layer or dispatcher, got "
        f"{host.__name__}"
    )


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
