"""The raw tokens of a layer: sinks, window, and what has not been sealed yet, in the model's dtype on the request's
home rank.

`WindowBuffer` is one layer's memory for all request slots, allocated once. `LayerWindow` is one request's part of it.
A buffer holds sinks + window + block_size tokens: in decode a token is written in place, and when block_size tokens
have left the window they are taken off its front. A prompt chunk that does not fit waits beside the buffer, whole,
until it has been attended to and labelled, since its own attention reads raw K/V; it is gone once its blocks are
sealed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.tiers.blocks import Field


class RawTokens(NamedTuple):
    """Raw tokens of one layer of one request, oldest first.

    k: [num_query_groups, tokens, head_dim], v: the same with v_head_dim; expert_ids (int64), weights (float32):
    [tokens, topk];
    importance: [tokens] float32, or None where no budget asks for it.
    """

    k: Tensor
    v: Tensor
    expert_ids: Tensor
    weights: Tensor
    importance: Tensor | None

    def slice(self, first: int, last: int) -> RawTokens:
        importance = None if self.importance is None else self.importance[first:last]
        return RawTokens(
            self.k[:, first:last],
            self.v[:, first:last],
            self.expert_ids[first:last],
            self.weights[first:last],
            importance,
        )

    def copy_(self, other: RawTokens) -> None:
        """Takes over the values of `other`, which has as many tokens."""
        for mine, theirs in zip(self, other, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)

    def clone(self) -> RawTokens:
        return RawTokens(*(None if t is None else t.clone() for t in self))  # type: ignore[arg-type]

    @property
    def tokens(self) -> int:
        return self.k.shape[1]


def concatenate(parts: list[RawTokens]) -> RawTokens:
    """Joins runs of tokens, oldest first; a single one stays a view."""
    if len(parts) == 1:
        return parts[0]
    importance = None if parts[0].importance is None else torch.cat([p.importance for p in parts])  # type: ignore[misc]
    return RawTokens(
        torch.cat([p.k for p in parts], 1),
        torch.cat([p.v for p in parts], 1),
        torch.cat([p.expert_ids for p in parts]),
        torch.cat([p.weights for p in parts]),
        importance,
    )


def raw_positions(tokens: int, sinks: int, sealed_end: int, device: torch.device) -> Tensor:
    """Positions [tokens] int64 of a layer's raw tokens: the sinks, then what follows the sealed blocks."""
    places = torch.arange(tokens, device=device)
    return torch.where(places < sinks, places, places - sinks + sealed_end)


def window_capacity(model: ModelConfig, runtime: RuntimeConfig, layer_id: int) -> int:
    """Raw tokens that a request has room for in a layer's buffer."""
    sliding = model.sliding_window(layer_id)
    reach = runtime.window + (runtime.sinks if sliding is None else sliding)
    return reach + runtime.block_size


def window_fields(model: ModelConfig, runtime: RuntimeConfig, layer_id: int) -> dict[str, Field]:
    """Name, shape and dtype of each tensor of one request's slot in a layer's buffer."""
    capacity, groups = window_capacity(model, runtime, layer_id), model.num_query_groups
    topk = model.topk if model.num_experts else 1
    fields = {
        "k": Field((groups, capacity, model.head_dim), model.torch_dtype),
        "v": Field((groups, capacity, model.value_dim), model.torch_dtype),
        "expert_ids": Field((capacity, topk), torch.int64),
        "weights": Field((capacity, topk), torch.float32),
    }
    if runtime.budget.policy != "none" and model.sliding_window(layer_id) is None:
        fields["importance"] = Field((capacity,), torch.float32)
    return fields


class WindowBuffer:
    """Raw-token memory of one layer: a slot per live request.

    A sliding-window layer has no sinks, and keeps what its window reaches beside the newest runtime.window tokens, so
    that those can be taken back (`PiKVCache.crop`).
    """

    def __init__(self, model: ModelConfig, runtime: RuntimeConfig, layer_id: int) -> None:
        self.sliding = model.sliding_window(layer_id)
        self.sinks = runtime.sinks if self.sliding is None else 0
        self.capacity, self._block_size = window_capacity(model, runtime, layer_id), runtime.block_size
        self._window = self.capacity - self.sinks - self._block_size
        slots = {
            name: torch.zeros(runtime.max_requests, *field.shape, dtype=field.dtype, device=runtime.torch_device)
            for name, field in window_fields(model, runtime, layer_id).items()
        }
        self.k, self.v, self.importance = slots["k"], slots["v"], slots.get("importance")
        self.expert_ids, self.weights = slots["expert_ids"], slots["weights"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {"k": self.k, "v": self.v, "expert_ids": self.expert_ids, "weights": self.weights}
        return named if self.importance is None else {**named, "importance": self.importance}

    def overflow(self, tokens: int) -> int:
        """Whole blocks that have left the window of a request with `tokens` raw tokens."""
        return max(0, (tokens - self.sinks - self._window) // self._block_size)

    def append_each(self, windows: list[LayerWindow], k: Tensor, v: Tensor) -> None:
        """Adds one token to each of different windows of this buffer, as LayerWindow.append does to one: k, v [windows,
        num_query_groups, channels].
        """
        places = torch.tensor([(w.index, w.take_place()) for w in windows]).to(k.device)
        slots, at = places.unbind(1)
        self.k[slots, :, at] = k
        self.v[slots, :, at] = v
        self.expert_ids[slots, at] = 0
        self.weights[slots, at] = 0.0
        if self.importance is not None:
            self.importance[slots, at] = 0.0

    def slot(self, index: int) -> RawTokens:
        importance = None if self.importance is None else self.importance[index]
        return RawTokens(self.k[index], self.v[index], self.expert_ids[index], self.weights[index], importance)


class LayerWindow:
    """One request's raw tokens in one layer. `tokens` counts them, waiting ones included."""

    def __init__(self, buffer: WindowBuffer, slot: int) -> None:
        self.index, self._buffer, self._slot = slot, buffer, buffer.slot(slot)
        self._capacity, self._sinks = buffer.capacity, buffer.sinks
        self._in_buffer = 0
        self._waiting: RawTokens | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the views of the buffer: pickle would make memory of their own of them."""
        return {name: value for name, value in vars(self).items() if name != "_slot"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._slot = self._buffer.slot(self.index)

    @property
    def topk(self) -> int:
        """Experts that a token is labelled with."""
        return self._slot.expert_ids.shape[1]

    @property
    def tokens(self) -> int:
        return self._in_buffer + (0 if self._waiting is None else self._waiting.tokens)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of a prompt chunk that waits to be sealed."""
        return 0 if self._waiting is None else sum(t.untyped_storage().nbytes() for t in self._waiting if t is not None)

    def take_place(self) -> int:
        """Where in the buffer the next token goes, which is then taken; nothing may be waiting."""
        assert self._waiting is None and self._in_buffer < self._capacity
        self._in_buffer += 1
        return self._in_buffer - 1

    def append(self, k: Tensor, v: Tensor) -> None:
        """Adds k, v [tokens, num_query_groups, channels]; nothing may be waiting. Expert 0, weight 0 for now."""
        assert self._waiting is None
        count = k.shape[0]
        if self._in_buffer + count <= self._capacity:
            new = self._slot.slice(self._in_buffer, self._in_buffer + count)
            self._in_buffer += count
        else:
            groups, topk = k.shape[1], self._slot.expert_ids.shape[1]
            new = RawTokens(
                k.new_empty(groups, count, k.shape[2]),
                v.new_empty(groups, count, v.shape[2]),
                self._slot.expert_ids.new_empty(count, topk),
                self._slot.weights.new_empty(count, topk),
                None if self._slot.importance is None else self._slot.importance.new_empty(count),
            )
            self._waiting = new
        new.k.copy_(k.transpose(0, 1))
        new.v.copy_(v.transpose(0, 1))
        new.expert_ids.zero_()
        new.weights.zero_()
        if new.importance is not None:
            new.importance.zero_()

    def read(self) -> RawTokens:
        """All raw tokens, oldest first: a view, or a copy where a chunk waits beside the buffer."""
        return self._part(0, self.tokens)

    def read_kv(self) -> tuple[Tensor, Tensor]:
        """k and v of `read`."""
        if self._waiting is None:
            return self._slot.k.narrow(1, 0, self._in_buffer), self._slot.v.narrow(1, 0, self._in_buffer)
        raw = self.read()
        return raw.k, raw.v

    def label_newest(self, expert_ids: Tensor, weights: Tensor) -> None:
        """Labels the newest tokens with expert_ids and weights [tokens, topk]; needs at most `tokens` of them."""
        count = expert_ids.shape[0]
        waiting = 0 if self._waiting is None else self._waiting.tokens
        late = min(count, waiting)
        if late and self._waiting is not None:
            self._waiting.expert_ids[waiting - late :].copy_(expert_ids[count - late :])
            self._waiting.weights[waiting - late :].copy_(weights[count - late :])
        early = count - late
        if early:
            self._slot.expert_ids[self._in_buffer - early : self._in_buffer].copy_(expert_ids[:early])
            self._slot.weights[self._in_buffer - early : self._in_buffer].copy_(weights[:early])

    def add_importance(self, importance: Tensor) -> None:
        """Adds importance [tokens] to that of all raw tokens, oldest first."""
        assert self._slot.importance is not None
        self._slot.importance[: self._in_buffer] += importance[: self._in_buffer]
        if self._waiting is not None and self._waiting.importance is not None:
            self._waiting.importance.add_(importance[self._in_buffer :])

    def copy_from(self, other: LayerWindow) -> None:
        """Takes over what another window of the same buffer holds."""
        self._in_buffer = other._in_buffer
        self._slot.slice(0, self._in_buffer).copy_(other._slot.slice(0, self._in_buffer))
        self._waiting = None if other._waiting is None else other._waiting.clone()

    def keep(self, tokens: int) -> None:
        """Forgets all but the oldest `tokens` tokens; nothing may be waiting."""
        assert self._waiting is None and tokens <= self._in_buffer
        self._in_buffer = tokens

    def extend(self, raw: RawTokens) -> None:
        """Adds tokens as they are, labels and importance included; they must fit the buffer, nothing may be waiting."""
        assert self._waiting is None and self._in_buffer + raw.tokens <= self._capacity
        self._slot.slice(self._in_buffer, self._in_buffer + raw.tokens).copy_(raw)
        self._in_buffer += raw.tokens

    def oldest(self, tokens: int) -> RawTokens:
        """The oldest `tokens` tokens after the sinks, until `drop`."""
        return self._part(self._sinks, self._sinks + tokens)

    def drop(self, tokens: int) -> None:
        """Forgets what `oldest` gives; what stays fits the buffer again, and is moved to its front."""
        sinks, kept = self._part(0, self._sinks), self._part(self._sinks + tokens, self.tokens).clone()
        self._in_buffer, self._waiting = self._sinks + kept.tokens, None
        self._slot.slice(0, self._sinks).copy_(sinks)
        self._slot.slice(self._sinks, self._in_buffer).copy_(kept)

    def _part(self, first: int, last: int) -> RawTokens:
        """Tokens `first` up to `last` of all raw tokens: a view, or a copy of what is in two places."""
        held = self._slot.slice(min(first, self._in_buffer), min(last, self._in_buffer))
        if self._waiting is None:
            return held
        late = self._waiting.slice(max(0, first - self._in_buffer), max(0, last - self._in_buffer))
        return concatenate([part for part in (held, late) if part.tokens] or [late])
