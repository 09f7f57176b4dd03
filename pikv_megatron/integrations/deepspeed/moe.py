"""Hooks on models built from `deepspeed.moe.layer.MoE`: who listens learns where each layer's tokens were routed, and
when their all-to-all starts and ends. What the layers compute, their gradients included, is left as it is.

`hook_moe` is what users call; AutoEP's layers, which are of another kind, are not handled here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from deepspeed.moe import sharded_moe
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from pikv_megatron.integrations.deepspeed.support import check_parameters

ROUTES = 7
"""Length of what the gate returns: l_aux, capacity, experts, indices, locations, weights, counts."""


class MoEListener(Protocol):
    """Told of each forward pass of a hooked layer, in this order. `layer_id` is as `hook_moe` was told."""

    def routed(self, layer_id: int, expert_ids: Tensor, weights: Tensor) -> None:
        """expert_ids [tokens, k] int64, weights [tokens, k] detached; a dropped route has expert 0 and weight 0."""

    def dispatch_launched(self, layer_id: int) -> None:
        """This layer's tokens leave for their experts' ranks (ep_size above 1 only)."""

    def dispatch_finished(self, layer_id: int) -> None:
        """They have arrived."""


class _AllToAllHook:
    """Stands for `sharded_moe._AllToAll`; only the layer that is at its dispatch tells its listener."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.dispatching: list[tuple[MoEListener, int]] = []
        """Filled by a layer's gate, emptied by the all-to-all behind it."""
        self.users = 0

    def apply(self, group: Any, x: Tensor) -> Tensor:
        told, self.dispatching = self.dispatching, []  # none: the way back from the experts, or a backward pass
        for listener, layer_id in told:
            listener.dispatch_launched(layer_id)
        arrived = self.host.apply(group, x)
        for listener, layer_id in told:
            listener.dispatch_finished(layer_id)
        return arrived


class MoEHooks:
    """The hooks of one `hook_moe`: `remove()` takes them away; as a context manager it does so at its end."""

    def __init__(self, layers: Sequence[tuple[int, MoE]], listener: MoEListener) -> None:
        self._all_to_all = _enter_all_to_all()
        self._handles: list[Any] = []
        for layer_id, layer in layers:
            self._handles.append(
                layer.deepspeed_moe.gate.register_forward_hook(self._on_gate(layer_id, layer, listener))
            )
            self._handles.append(layer.register_forward_hook(self._on_end, always_call=True))

    def _on_gate(self, layer_id: int, layer: MoE, listener: MoEListener) -> Any:
        def observe(gate: nn.Module, args: tuple[Any, ...], routes: Any) -> None:
            if not isinstance(routes, tuple) or len(routes) != ROUTES:
                raise RuntimeError(
                    f"deepspeed.moe: the gate of MoE layer {layer_id} returned {type(routes).__name__} of "
                    f"{len(routes) if isinstance(routes, tuple) else 1}, expected a tuple of {ROUTES}: PiKV does not "
                    "know this version"
                )
            indices, weights = routes[3], routes[5].detach()
            kept = indices >= 0  # a route over an expert's capacity has index -1 and weight 0
            listener.routed(layer_id, torch.where(kept, indices, 0).t().long(), weights.t())
            if layer.ep_size > 1:
                self._all_to_all.dispatching.append((listener, layer_id))

        return observe

    def _on_end(self, *_: Any) -> None:
        self._all_to_all.dispatching.clear()  # left over where the forward pass failed on its way

    def remove(self) -> None:
        """Takes the hooks away. A second call does nothing."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _leave_all_to_all()

    def __enter__(self) -> MoEHooks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def hook_moe(model: nn.Module, listener: MoEListener, layer_ids: Sequence[int] | None = None) -> MoEHooks:
    """Hooks every `deepspeed.moe.layer.MoE` of a model.

    Args:
        model: holds the layers, at any ep_size, in training or in eval mode.
        listener: is told of each forward pass, a recomputed one (activation checkpointing) included.
        layer_ids: one per MoE layer, in the order of `model.modules()`; None: 0, 1, ...

    Returns:
        A handle with `remove()`, which is a context manager too.

    Raises:
        ValueError: no such layer, or another number of layer_ids.
        RuntimeError: a DeepSpeed whose gate or all-to-all is not known. Nothing is hooked then.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise ValueError(f"model: expected deepspeed.moe.layer.MoE layers, {type(model).__name__} has none")
    ids = range(len(layers)) if layer_ids is None else layer_ids
    if len(ids) != len(layers):
        raise ValueError(f"layer_ids: expected {len(layers)}, one per MoE layer, got {len(ids)}")
    check_parameters(
        "deepspeed.moe.sharded_moe.TopKGate.forward",
        sharded_moe.TopKGate.forward,
        ["self", "input", "used_token", "sparse_routes", "use_tutel"],
    )
    return MoEHooks(list(zip(ids, layers, strict=True)), listener)


def _enter_all_to_all() -> _AllToAllHook:
    """Puts the one hook in front of `sharded_moe._AllToAll`, unless it stands there already."""
    present = sharded_moe._AllToAll
    if not isinstance(present, _AllToAllHook):
        check_parameters("deepspeed.moe.sharded_moe._AllToAll.forward", present.forward, ["ctx", "group", "input"])
        sharded_moe._AllToAll = present = _AllToAllHook(present)
    present.users += 1
    return present


def _leave_all_to_all() -> None:
    hook = sharded_moe._AllToAll
    hook.users -= 1
    if not hook.users:
        sharded_moe._AllToAll = hook.host
