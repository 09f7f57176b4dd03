"""Labels of raw tokens: a layer's own routing, and what dense layers inherit of it. Blocks get theirs from these when
they are sealed.
"""

from __future__ import annotations

from torch import Tensor

from pikv_megatron.cache.state import LayerState, Routing
from pikv_megatron.config import ModelConfig


def observe(model: ModelConfig, routing: Routing, state: LayerState, expert_ids: Tensor, weights: Tensor) -> None:
    """Labels a layer's newest tokens, and keeps the labels for the dense layers behind it.

    Args:
        expert_ids, weights: [tokens, topk].
    """
    state.window.label_newest(expert_ids, weights)
    if model.moe_layers is not None:
        routing[state.layer_id] = (state.length, expert_ids.clone(), weights.clone())


def inherit(model: ModelConfig, routing: Routing, state: LayerState, tokens: int) -> None:
    """A dense layer's newest tokens take the labels of the last MoE layer before it, which has already seen them."""
    source = model.label_source(state.layer_id)
    if source is None or source == state.layer_id or source not in routing:
        return
    length, expert_ids, weights = routing[source]
    if length == state.length:
        count = min(tokens, expert_ids.shape[0])
        state.window.label_newest(expert_ids[-count:], weights[-count:])
