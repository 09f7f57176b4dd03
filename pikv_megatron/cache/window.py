"""The raw tokens of a layer: sinks, window, and what has not been sealed yet, in the model's dtype on the request's
home rank.

`WindowMemory` is the memory of all layers of one shape, for all request slots, allocated once; `WindowBuffer` is one
layer's part of it, `LayerWindow` one request's part of that. A slot holds sinks + window + block_size tokens: in decode
a token is written in place, and when block_size tokens have left the window they are taken off its front. A prompt
chunk that does not fit waits beside the buffer, whole, until it has been attended to and labelled, since its own
attention reads raw K/V; it is gone once its blocks are sealed.

Within a step nothing that was committed is overwritten: new tokens are staged behind it or beside it, and what a window
will be once its step is committed is kept beside it, too (`settle`). `commit` keeps what is staged, `discard` forgets
it.
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


def window_capacity(runtime: RuntimeConfig, sliding: int | None) -> int:
    """Raw tokens that a request has room for in a layer; sliding: what the layer's window reaches, None for all."""
    return runtime.window + (runtime.sinks if sliding is None else sliding) + runtime.block_size


def window_fields(model: ModelConfig, runtime: RuntimeConfig, sliding: int | None) -> dict[str, Field]:
    """Name, shape and dtype of each tensor of one request's slot in one layer; sliding: as for `window_capacity`."""
    capacity, groups = window_capacity(runtime, sliding), model.num_query_groups
    topk = model.topk if model.num_experts else 1
    fields = {
        "k": Field((groups, capacity, model.head_dim), model.torch_dtype),
        "v": Field((groups, capacity, model.value_dim), model.torch_dtype),
        "expert_ids": Field((capacity, topk), torch.int64),
        "weights": Field((capacity, topk), torch.float32),
    }
    if runtime.budget.policy != "none" and sliding is None:
        fields["importance"] = Field((capacity,), torch.float32)
    return fields


class WindowMemory:
    """Raw-token memory of layers of one shape: tensors [layers, slots, ...].

    A sliding-window layer has no sinks, and keeps what its window reaches beside the newest runtime.window tokens, so
    that those can be taken back (`PiKVCache.crop`). Labels and importance beyond what a slot holds are zero.
    """

    def __init__(self, model: ModelConfig, runtime: RuntimeConfig, layers: int, sliding: int | None) -> None:
        self.sliding = sliding
        self.sinks = runtime.sinks if sliding is None else 0
        self.capacity, self.block_size = window_capacity(runtime, sliding), runtime.block_size
        self.window = self.capacity - self.sinks - self.block_size
        count, device = (layers, runtime.max_requests), runtime.torch_device
        slots = {
            name: torch.zeros(*count, *field.shape, dtype=field.dtype, device=device)
            for name, field in window_fields(model, runtime, sliding).items()
        }
        self.k, self.v, self.importance = slots["k"], slots["v"], slots.get("importance")
        self.expert_ids, self.weights = slots["expert_ids"], slots["weights"]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it, from the tensors' storage."""
        tensors = (self.k, self.v, self.expert_ids, self.weights, self.importance)
        return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)

    def at(self, layers: Tensor, slots: Tensor, first: int, last: int) -> RawTokens:
        """Copies of tokens `first` up to `last` of several slots: layers, slots [n]; a leading dimension of n."""
        importance = None if self.importance is None else self.importance[layers, slots, first:last]
        return RawTokens(
            self.k[layers, slots, :, first:last],
            self.v[layers, slots, :, first:last],
            self.expert_ids[layers, slots, first:last],
            self.weights[layers, slots, first:last],
            importance,
        )

    def drop_block(self, layers: Tensor, slots: Tensor) -> None:
        """Forgets the oldest block behind the sinks of several full slots: layers, slots [n]."""
        first, last = self.sinks, self.capacity - self.block_size
        kept = self.at(layers, slots, first + self.block_size, self.capacity)
        self.k[layers, slots, :, first:last] = kept.k
        self.v[layers, slots, :, first:last] = kept.v
        self.expert_ids[layers, slots, first:last] = kept.expert_ids
        self.weights[layers, slots, first:last] = kept.weights
        self.expert_ids[layers, slots, last:] = 0
        self.weights[layers, slots, last:] = 0.0
        if self.importance is not None and kept.importance is not None:
            self.importance[layers, slots, first:last] = kept.importance
            self.importance[layers, slots, last:] = 0.0

    def clear_labels(self, slot: int) -> None:
        """Forgets what a slot's last owner left of labels and importance."""
        self.expert_ids[:, slot].zero_()
        self.weights[:, slot].zero_()
        if self.importance is not None:
            self.importance[:, slot].zero_()


class WindowBuffer:
    """Raw-token memory of one layer: a slot per live request."""

    def __init__(self, memory: WindowMemory, index: int) -> None:
        self.memory, self.index = memory, index
        self.sliding, self.sinks, self.capacity = memory.sliding, memory.sinks, memory.capacity
        self._take_views()

    def _take_views(self) -> None:
        memory, index = self.memory, self.index
        self.k, self.v = memory.k[index], memory.v[index]
        self.expert_ids, self.weights = memory.expert_ids[index], memory.weights[index]
        self.importance = None if memory.importance is None else memory.importance[index]

    def __getstate__(self) -> dict[str, Any]:
        """Without the views: pickle would make memory of their own of them."""
        views = ("k", "v", "expert_ids", "weights", "importance")
        return {name: value for name, value in vars(self).items() if name not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._take_views()

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {"k": self.k, "v": self.v, "expert_ids": self.expert_ids, "weights": self.weights}
        return named if self.importance is None else {**named, "importance": self.importance}

    def overflow(self, tokens: int) -> int:
        """Whole blocks that have left the window of a request with `tokens` raw tokens."""
        return max(0, (tokens - self.sinks - self.memory.window) // self.memory.block_size)

    def append_each(self, windows: list[LayerWindow], k: Tensor, v: Tensor, slots: Tensor, places: Tensor) -> None:
        """Stages one token in each of several windows of this buffer: k, v, slots, places [windows, ..]; places are
        their `in_buffer`.
        """
        self.k[slots, :, places] = k
        self.v[slots, :, places] = v
        for window in windows:
            assert window.in_buffer < self.capacity and not window.is_waiting
            window.staged += 1

    def label_each(self, slots: Tensor, places: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """Labels one token in each of several slots: all [windows, ..]."""
        self.expert_ids[slots, places] = expert_ids.to(torch.int64)
        self.weights[slots, places] = weights.to(torch.float32)

    def slot(self, index: int) -> RawTokens:
        importance = None if self.importance is None else self.importance[index]
        return RawTokens(self.k[index], self.v[index], self.expert_ids[index], self.weights[index], importance)


def window_buffers(model: ModelConfig, runtime: RuntimeConfig) -> list[WindowBuffer]:
    """One buffer per layer of the model; layers of one shape lie in one memory."""
    windows = [model.sliding_window(layer_id) for layer_id in range(model.num_layers)]
    memories = {w: WindowMemory(model, runtime, windows.count(w), w) for w in dict.fromkeys(windows)}
    return [WindowBuffer(memories[w], windows[:layer_id].count(w)) for layer_id, w in enumerate(windows)]


class LayerWindow:
    """One request's raw tokens in one layer. `tokens` counts them, waiting ones included."""

    def __init__(self, buffer: WindowBuffer, slot: int) -> None:
        self.index, self.buffer, self._slot = slot, buffer, buffer.slot(slot)
        self._capacity, self._sinks = buffer.capacity, buffer.sinks
        self.held = 0
        """Tokens in the buffer that are there to stay."""
        self.staged = 0
        """Tokens behind them that a step has brought, until it is committed."""
        self._waiting: RawTokens | None = None
        self._after: RawTokens | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the views of the buffer: pickle would make memory of their own of them."""
        return {name: value for name, value in vars(self).items() if name != "_slot"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._slot = self.buffer.slot(self.index)

    @property
    def topk(self) -> int:
        """Experts that a token is labelled with."""
        return self._slot.expert_ids.shape[1]

    @property
    def tokens(self) -> int:
        if self._after is not None:
            return self._after.tokens
        return self.in_buffer + (0 if self._waiting is None else self._waiting.tokens)

    @property
    def in_buffer(self) -> int:
        return self.held + self.staged

    @property
    def is_waiting(self) -> bool:
        """Whether a prompt chunk waits beside the buffer."""
        return self._waiting is not None

    @property
    def beside(self) -> bool:
        """Whether there is anything beside the buffer."""
        return self._waiting is not None or self._after is not None

    @property
    def waiting_bytes(self) -> int:
        """Bytes beside the buffer: of a prompt chunk that waits to be sealed, of what the window will be after it."""
        beside = (*(self._waiting or ()), *(self._after or ()))
        return sum(t.untyped_storage().nbytes() for t in beside if t is not None)

    # ---- what a step has brought

    def settle(self, sealed: int) -> None:
        """Of all raw tokens, keeps beside the buffer what stays once the oldest `sealed` behind the sinks are gone."""
        sinks, kept = self._part(0, self._sinks), self._part(self._sinks + sealed, self.tokens)
        self._after = concatenate([sinks, kept]).clone()
        self._waiting = None

    def commit(self) -> None:
        """Keeps what is staged. A chunk that waits goes on waiting."""
        if self._after is None:
            self.held, self.staged = self.held + self.staged, 0
            return
        after = self._after
        self._slot.slice(0, after.tokens).copy_(after)
        self._clear_behind(after.tokens)
        self.held, self.staged, self._after = after.tokens, 0, None

    def discard(self) -> None:
        """Forgets what is staged, and what waits."""
        self._waiting = self._after = None
        self.staged = 0
        self._clear_behind(self.held)

    def _clear_behind(self, tokens: int) -> None:
        self._slot.expert_ids[tokens:].zero_()
        self._slot.weights[tokens:].zero_()
        if self._slot.importance is not None:
            self._slot.importance[tokens:].zero_()

    # ---- writing

    def append(self, k: Tensor, v: Tensor) -> None:
        """Stages k, v [tokens, num_query_groups, channels]; nothing may be waiting. Expert 0, weight 0 for now."""
        assert self._waiting is None and self._after is None
        count, first = k.shape[0], self.in_buffer
        if first + count <= self._capacity:
            self._slot.k[:, first : first + count].copy_(k.transpose(0, 1))
            self._slot.v[:, first : first + count].copy_(v.transpose(0, 1))
            self.staged += count
            return
        groups, topk = k.shape[1], self._slot.expert_ids.shape[1]
        self._waiting = new = RawTokens(
            k.new_empty(groups, count, k.shape[2]),
            v.new_empty(groups, count, v.shape[2]),
            self._slot.expert_ids.new_zeros(count, topk),
            self._slot.weights.new_zeros(count, topk),
            None if self._slot.importance is None else self._slot.importance.new_zeros(count),
        )
        new.k.copy_(k.transpose(0, 1))
        new.v.copy_(v.transpose(0, 1))

    def read(self) -> RawTokens:
        """All raw tokens, oldest first: a view, or a copy where a chunk waits beside the buffer."""
        return self._after if self._after is not None else self._part(0, self.tokens)

    def read_kv(self) -> tuple[Tensor, Tensor]:
        """k and v of `read`."""
        if self._waiting is None and self._after is None:
            return self._slot.k.narrow(1, 0, self.in_buffer), self._slot.v.narrow(1, 0, self.in_buffer)
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
        early, last = count - late, self.in_buffer
        if early:
            self._slot.expert_ids[last - early : last].copy_(expert_ids[:early])
            self._slot.weights[last - early : last].copy_(weights[:early])

    def add_importance(self, importance: Tensor) -> None:
        """Adds importance [tokens] to that of all raw tokens, oldest first."""
        if self._after is not None:
            assert self._after.importance is not None
            self._after.importance.add_(importance)
            return
        assert self._slot.importance is not None
        self._slot.importance[: self.in_buffer] += importance[: self.in_buffer]
        if self._waiting is not None and self._waiting.importance is not None:
            self._waiting.importance.add_(importance[self.in_buffer :])

    def copy_from(self, other: LayerWindow) -> None:
        """Takes over what another window of the same buffer holds, into a slot that is clear."""
        assert other._after is None and not other.staged
        self.held = other.held
        self._slot.slice(0, self.held).copy_(other._slot.slice(0, self.held))
        self._waiting = None if other._waiting is None else other._waiting.clone()

    def keep(self, tokens: int) -> None:
        """Forgets all but the oldest `tokens` tokens; nothing may be waiting."""
        assert self._waiting is None and self._after is None and not self.staged and tokens <= self.held
        if tokens < self.held:
            self._clear_behind(tokens)
        self.held = tokens

    def extend(self, raw: RawTokens) -> None:
        """Adds tokens as they are, labels and importance included; they must fit the buffer, nothing may be waiting."""
        assert self._waiting is None and self._after is None and not self.staged
        assert self.held + raw.tokens <= self._capacity
        self._slot.slice(self.held, self.held + raw.tokens).copy_(raw)
        self.held += raw.tokens

    def oldest(self, tokens: int) -> RawTokens:
        """The oldest `tokens` tokens after the sinks."""
        return self._part(self._sinks, self._sinks + tokens)

    def drop(self, tokens: int) -> None:
        """Forgets what `oldest` gives; what stays fits the buffer again, and is moved to its front."""
        self.settle(tokens)
        self.commit()

    def _part(self, first: int, last: int) -> RawTokens:
        """Tokens `first` up to `last` of all raw tokens: a view, or a copy of what is in two places."""
        count = self.in_buffer
        held = self._slot.slice(min(first, count), min(last, count))
        if self._waiting is None:
            return held
        late = self._waiting.slice(max(0, first - count), max(0, last - count))
        return concatenate([part for part in (held, late) if part.tokens] or [late])
