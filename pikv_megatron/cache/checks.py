"""What the cache refuses at its door: shapes, dtypes, devices, positions, values. Each error names the argument, what
it saw and what it expected; nothing has changed when it is raised.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pikv_megatron.config import ModelConfig, RuntimeConfig


class UnknownRequestError(KeyError):
    """A request that is not live."""

    def __str__(self) -> str:
        return str(self.args[0])


def check_layer(layer_id: int, model: ModelConfig) -> None:
    """Checks that layer_id is one of the model's."""
    if isinstance(layer_id, bool) or not isinstance(layer_id, int):
        raise TypeError(f"layer_id: expected an int, got {layer_id!r}")
    if not 0 <= layer_id < model.num_layers:
        raise IndexError(f"layer_id: expected 0 .. {model.num_layers - 1}, got {layer_id}")


def check_expert(expert_id: int, model: ModelConfig) -> None:
    """Checks that expert_id is one of the model's; a dense model's blocks are labelled 0."""
    if isinstance(expert_id, bool) or not isinstance(expert_id, int):
        raise TypeError(f"expert_id: expected an int, got {expert_id!r}")
    if not 0 <= expert_id < max(1, model.num_experts):
        raise IndexError(f"expert_id: expected 0 .. {max(1, model.num_experts) - 1}, got {expert_id}")


def check_request_id(request_id: int) -> None:
    """Checks that request_id is an int (it need not be live)."""
    if isinstance(request_id, bool) or not isinstance(request_id, int):
        raise TypeError(f"request_id: expected an int, got {request_id!r}")


def check_tensor(name: str, x: Tensor, tail: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> int:
    """Checks x: [tokens, *tail]; returns tokens (at least 1)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != 1 + len(tail) or tuple(x.shape[1:]) != tail or x.shape[0] < 1:
        expected = ", ".join(["tokens", *map(str, tail)])
        raise ValueError(f"{name}: expected shape [{expected}] with at least one token, got {list(x.shape)}")
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
    check_device(name, x, device)
    return x.shape[0]


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Checks that x is on `device`; one without an index stands for any of its type."""
    if x.device.type != device.type or (device.index is not None and x.device.index not in (None, device.index)):
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def check_kv(
    k: Tensor, v: Tensor, model: ModelConfig, runtime: RuntimeConfig, largest: float, prompt: bool | None = None
) -> int:
    """Checks k: [tokens, num_query_groups, head_dim] and v: the same with v_head_dim; returns tokens. prompt: see
    `check_finite`.
    """
    device = runtime.torch_device
    tokens = check_tensor("k", k, (model.num_query_groups, model.head_dim), model.torch_dtype, device)
    values = check_tensor("v", v, (model.num_query_groups, model.value_dim), model.torch_dtype, device)
    if tokens != values:
        raise ValueError(f"v: expected as many tokens as k ({tokens}), got {values}")
    check_finite("k", k, runtime, largest, prompt)
    check_finite("v", v, runtime, largest, prompt)
    return tokens


def check_finite(name: str, x: Tensor, runtime: RuntimeConfig, largest: float, prompt: bool | None = None) -> None:
    """Checks that x [tokens, ...] is finite and at most `largest` in magnitude, where runtime.check_finite asks.

    Args:
        prompt: whether a prompt is among the tokens, behind whose work the wait for a GPU is hidden; None: if there are
            several, since they are of one request.
    """
    mode, prompt = runtime.check_finite, x.shape[0] > 1 if prompt is None else prompt
    if mode == "always" or (mode == "auto" and (x.device.type == "cpu" or prompt)):
        seen = _magnitude(x)
        if not seen <= largest:
            raise ValueError(f"{name}: expected finite values of magnitude at most {largest:g}, got {seen:g}")


def _magnitude(x: Tensor) -> float:
    """Largest magnitude, nan where there is one. On a GPU this waits for the device; on CPU there is nothing to wait
    for.
    """
    low, high = torch.aminmax(x.detach())
    return max(-float(low.float().cpu().numpy()), float(high.float().cpu().numpy()))


def check_start(start: int | None, length: int, request_id: int, layer_id: int) -> None:
    """Checks that start, where given, is the position `length` that comes next."""
    if start is None:
        return
    if isinstance(start, bool) or not isinstance(start, int):
        raise TypeError(f"start: expected an int, got {start!r}")
    if start != length:
        verb = "go back" if start < length else "skip"
        raise ValueError(
            f"position: request {request_id}, layer {layer_id}: expected {length} next, got {start}; "
            f"positions may not {verb}"
        )


def check_queries(tokens: int, length: int, request_id: int, layer_id: int) -> None:
    """Checks that queries are of tokens that the layer has."""
    if tokens > length:
        raise ValueError(f"q: request {request_id}, layer {layer_id} has {length} tokens, got queries of {tokens}")


def first_position(token_id: int | Sequence[int] | Tensor, tokens: int) -> int:
    """The first of `tokens` consecutive positions, given as an int (one token) or a sequence of them."""
    if isinstance(token_id, int) and not isinstance(token_id, bool):
        positions = [token_id]
    elif isinstance(token_id, Tensor):
        positions = token_id.flatten().tolist()
    elif isinstance(token_id, Sequence) and not isinstance(token_id, str):
        positions = list(token_id)
    else:
        raise TypeError(f"token_id: expected an int or a sequence of ints, got {token_id!r}")
    if len(positions) != tokens:
        raise ValueError(f"token_id: expected {tokens} positions, one per token of k, got {len(positions)}")
    if any(isinstance(p, bool) or not isinstance(p, int) for p in positions):
        raise TypeError(f"token_id: expected ints, got {token_id!r}")
    for i, position in enumerate(positions):
        if position != positions[0] + i:
            raise ValueError(f"token_id: expected consecutive positions, got {position} after {positions[i - 1]}")
    return positions[0]


def check_has_experts(layer_id: int, model: ModelConfig) -> None:
    """Checks that the layer has a router of its own (or that the model has no experts, which check_routing refuses)."""
    if model.label_source(layer_id) not in (layer_id, None):
        raise ValueError(f"layer_id: layer {layer_id} has no experts, expected one of {model.moe_layers}")


def check_routing(expert_ids: Tensor, weights: Tensor, model: ModelConfig, device: torch.device, unsealed: int) -> int:
    """Checks expert_ids and weights: [tokens, topk], of at most `unsealed` tokens; returns tokens."""
    if not model.num_experts:
        raise ValueError("expert_ids: expected no routing, the model has num_experts 0")
    for name, x in (("expert_ids", expert_ids), ("weights", weights)):
        if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != model.topk or x.shape[0] < 1:
            raise ValueError(f"{name}: expected a tensor [tokens, {model.topk}], got {_shape(x)}")
        check_device(name, x, device)
    if expert_ids.shape != weights.shape:
        raise ValueError(f"weights: expected shape {list(expert_ids.shape)} like expert_ids, got {list(weights.shape)}")
    if expert_ids.dtype.is_floating_point or expert_ids.dtype == torch.bool:
        raise TypeError(f"expert_ids: expected integers, got {expert_ids.dtype}")
    if not weights.dtype.is_floating_point:
        raise TypeError(f"weights: expected floats, got {weights.dtype}")
    if expert_ids.shape[0] > unsealed:
        raise ValueError(
            f"expert_ids: expected at most the {unsealed} tokens that are not sealed yet, got {expert_ids.shape[0]}"
        )
    if expert_ids.device.type == "cpu":
        low, high = (int(x.numpy()) for x in torch.aminmax(expert_ids))
        if low < 0 or high >= model.num_experts:
            raise ValueError(f"expert_ids: expected 0 .. {model.num_experts - 1}, got {low if low < 0 else high}")
        if not _magnitude(weights) < float("inf"):
            raise ValueError(f"weights: expected finite values, got {_magnitude(weights):g}")
    return expert_ids.shape[0]


def _shape(x: object) -> object:
    return list(x.shape) if isinstance(x, Tensor) else x
