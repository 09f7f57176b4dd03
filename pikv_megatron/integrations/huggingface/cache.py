"""PiKVHFCache: transformers' `Cache` over one PiKVCache, a request per row of the batch.

transformers counts columns of the batch, pads included; PiKV holds real tokens only. A forward is one step of the
cache: the real columns of every row. Who computes attention, and how a cache comes to it, is in `attention`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from pikv_megatron.cache.cache import PiKVCache
from pikv_megatron.cache.step import ActiveStep, Segment, Step
from pikv_megatron.config import RuntimeConfig, Source
from pikv_megatron.integrations.huggingface.attach import advice, attach_once
from pikv_megatron.integrations.huggingface.current import NAME, current, eager
from pikv_megatron.integrations.huggingface.masks import warn_of_right_padding
from pikv_megatron.integrations.huggingface.mla import caches_latents
from pikv_megatron.integrations.huggingface.model import attention_layers, find_model, model_config
from pikv_megatron.tiers.blocks import PoolFullError


@dataclass
class Forward:
    """One forward over `columns` new columns of every row, behind `before` older ones; the layer whose turn it is."""

    before: int
    columns: int
    step: ActiveStep
    next_layer: int = 0


class PiKVHFCache(Cache):
    """A cache for `model.generate(..., past_key_values=cache)` and for forwards by hand.

    Args:
        source: the model (it is attached, if it is not yet), or its config (then the model must be attached).
        runtime: RuntimeConfig, dict or YAML path; None for the defaults.

    Raises:
        NotImplementedError: PiKV does not serve this model exactly; the message names why.
        ConfigError: a config that cannot be used.

    The batch is what the first forward brings; `reset` makes room for another one. Pads (attention_mask 0) are not
    stored; attention returns zeros for them.
    """

    attention = NAME
    """The attention that this cache is for."""

    def __init__(self, source: nn.Module | Any, runtime: RuntimeConfig | Source | None = None) -> None:
        if isinstance(source, nn.Module):
            model = find_model(source)
            self.cache = PiKVCache(model_config(model), runtime)
            self._config = model.config.get_text_config(decoder=True)
            self.latents = caches_latents(attention_layers(model)[0][1])
            attach_once(model)
        else:
            self._config = source.get_text_config(decoder=True)
            self.latents = False  # a config with MLA is refused
            self.cache = PiKVCache(model_config(source), runtime)
        super().__init__(layers=[_Layer(self, layer_id) for layer_id in range(self.cache.model.num_layers)])
        self.agreement: AbstractContextManager[None] = nullcontext()
        """Entered around what may refuse a step, before anything has changed: where ranks take steps together."""
        self._rows: list[int] = []
        self._next_id = 0
        self._mask: Tensor | None = None
        self._lengths = [0] * len(self.layers)
        self._forward: Forward | None = None
        self._awaiting: int | None = None
        self._given: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PiKVHFCache:
        made = memo[id(self)] = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "PiKVHFCache: cannot be pickled, nor copied but by copy.deepcopy: its memory is this process's; to go on "
            "elsewhere, make a cache there and feed it the tokens"
        )

    # ---- what a forward does

    @eager
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes note of a layer's turn; its tokens are stored by its attention, which follows.

        Returns:
            The arguments: PiKV's attention wants the new tokens only.

        Raises:
            RuntimeError: the model's attention is not PiKV's, or the last forward did not reach its end.
        """
        if layer_idx == 0 and self._config._attn_implementation != NAME:
            raise RuntimeError(
                f"attn_implementation: this cache needs {NAME!r}, the model has "
                f"{self._config._attn_implementation!r}; {advice(self._config)}"
            )
        if self._awaiting is not None:
            raise RuntimeError(
                f"layer {self._awaiting}: its attention did not run through PiKV; attach(model) the model that this "
                "cache is used with, and reset() the cache"
            )
        expected = 0 if self._forward is None else self._forward.next_layer
        if layer_idx != expected:
            raise RuntimeError(f"layer {layer_idx}: expected layer {expected} next, whose keys have not come")
        self._awaiting, self._given = layer_idx, (key_states, value_states)
        current.writing = current.cache = self
        return key_states, value_states

    def start(self, layer_id: int) -> tuple[Tensor, Tensor]:
        """A layer's attention has come. Returns what `update` was given for it."""
        given, self._given = self._given, None
        if self._awaiting != layer_id or given is None:
            raise RuntimeError(f"layer {layer_id}: its keys were not given to this cache, expected {self._awaiting}")
        self._awaiting = None
        return given

    def plan(self, layer_id: int, batch: int, columns: int, mask: Tensor | None) -> None:
        """Begins the forward's step at layer 0, where one that does not fit is refused whole."""
        if layer_id == 0:
            begun = None
            try:
                with self.agreement:
                    rows, mask, begun = self._begin(batch, columns, mask)
            except BaseException:
                if begun is not None:
                    begun.abort("another rank refused the step")
                raise
            self._rows, self._mask = rows, mask
            self._forward = Forward(self._lengths[0], columns, begun)

    def store(self, layer_id: int, key: Tensor, value: Tensor) -> None:
        """Stores a layer's real tokens: key, value [batch, KV heads, columns, channels]."""
        forward = self._forward
        assert forward is not None
        forward.step.append(layer_id, *(x.transpose(1, 2).flatten(0, 1) for x in (key, value)))
        self._lengths[layer_id] += forward.columns
        forward.next_layer = layer_id + 1

    def attend(self, layer_id: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of the step's real tokens to all that a layer holds: query [batch, heads, columns, head_dim].

        Returns:
            out [batch, columns, heads, v_head_dim] and lse [batch, columns, heads], zeros at pads.
        """
        assert self._forward is not None
        out, lse, *_ = self._forward.step.attend(layer_id, query.transpose(1, 2).flatten(0, 1))
        shape = query.shape[0], query.shape[2]
        return out.unflatten(0, shape), lse.unflatten(0, shape)

    def observe(self, layer_id: int, expert_ids: Tensor, weights: Tensor) -> None:
        """Labels the tokens that a layer stored last: expert_ids, weights [batch * columns, topk], pads included."""
        if self.cache.model.num_experts and self._forward is not None:
            self._forward.step.observe_routing(layer_id, expert_ids, weights)

    def finish(self, failed: bool) -> None:
        """Ends the forward; of one that has failed, or has not gone through every layer, nothing stays.

        Raises:
            RuntimeError: it has not failed but left layers out.
        """
        forward, self._forward = self._forward, None
        self._awaiting = self._given = None
        if forward is None:
            return
        if forward.step.complete:
            forward.step.end()
            return
        forward.step.abort("the forward ended early")
        self._lengths = [forward.before] * len(self.layers)
        if not failed:
            raise RuntimeError(
                f"layer {forward.next_layer}: the forward ended before it; PiKV needs every layer's keys, and has "
                "forgotten those of this forward"
            )

    def _begin(self, batch: int, columns: int, mask: Tensor | None) -> tuple[list[int], Tensor | None, ActiveStep]:
        """Rows and mask behind the next forward, and its step, which has begun; raises where it does not fit."""
        rows = self._rows or self._fresh(batch)
        if len(rows) != batch:
            raise ValueError(f"input_ids: expected a batch of {len(rows)} rows as before, got {batch}; or reset()")
        new, mask = self._read_mask(batch, columns, mask)
        counts = [columns] * batch if new is None else new.sum(1).tolist()
        live = set(self.cache.requests())
        self._check_rows(len(live.union(row for row, count in zip(rows, counts, strict=True) if count)))
        segments = [
            Segment(row, self.cache.length(0, row) if row in live else 0, count, "decode" if count == 1 else "prompt")
            for row, count in zip(rows, counts, strict=True)
            if count
        ]
        if new is None:
            step = Step(tuple(segments))
        else:
            step = Step(tuple(segments), new.flatten().nonzero().flatten(), batch * columns)
        return rows, mask, self.cache.begin(step)

    def _read_mask(self, batch: int, columns: int, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Which new columns are real, [batch, columns] bool, and the mask over all columns so far; None where there
        are no pads.
        """
        past = self._lengths[0]
        if mask is None:
            if self._mask is not None:
                raise ValueError("attention_mask: expected one, since this cache was filled with padded rows")
            return None, None
        if mask.dim() != 2 or mask.shape != (batch, past + columns):
            raise ValueError(
                f"attention_mask: expected shape [{batch}, {past + columns}] (cached and new columns), got "
                f"{list(mask.shape)}"
            )
        mask = mask.bool()
        if bool(mask.all()) and self._mask is None:
            return None, None
        before = torch.ones_like(mask[:, :past]) if self._mask is None else self._mask
        if not torch.equal(mask[:, :past], before):
            raise ValueError("attention_mask: its cached columns differ from those that the cache was filled with")
        if self.cache.model.sliding_windows is not None:
            _check_contiguous(mask)
        warn_of_right_padding(mask)
        new = mask[:, past:]
        return (None if bool(new.all()) else new), mask

    # ---- what transformers asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen by a layer, pads included."""
        return self._lengths[layer_idx]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of a mask for the next `query_length` ones, and the first of them."""
        return self._lengths[layer_idx] + query_length, 0

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first forward."""
        return len(self._rows) or -1

    def reset(self) -> None:
        """Forgets everything; the next forward may bring another batch."""
        for request_id in self.cache.requests():
            self.cache.release(request_id)
        self._rows, self._mask = [], None
        self._lengths = [0] * len(self.layers)
        self._forward = self._awaiting = self._given = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest columns: `tokens_to_remove` is minus their number, as in transformers.

        Raises:
            ValueError: a positive number, or tokens that a sliding window has already forgotten.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected minus a number of columns, got {tokens_to_remove}")
        self._check_at_rest()
        if not tokens_to_remove or not self._rows:
            return
        left = max(0, self._lengths[0] + tokens_to_remove)
        mask = None if self._mask is None else self._mask[:, :left]
        counts = [left] * len(self._rows) if mask is None else mask.sum(1).tolist()
        live = set(self.cache.requests())
        kept = {r: count for r, count in zip(self._rows, counts, strict=True) if r in live}
        for request_id, count in kept.items():
            if 0 < count < self.cache.shortest_crop(request_id):
                raise ValueError(
                    f"tokens_to_remove: request {request_id} would keep {count} tokens, of which its sliding-window "
                    f"layers have forgotten too many; expected to keep {self.cache.shortest_crop(request_id)} or more "
                    f"(never more than the longest it was, less runtime.window, {self.cache.runtime.window})"
                )
        for request_id, count in kept.items():
            if count:
                self.cache.crop(request_id, count)
            else:
                self.cache.release(request_id)
        self._mask = None if mask is None or bool(mask.all()) else mask
        self._lengths = [left] * len(self.layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i takes over what row beam_idx[i] holds; sealed blocks are shared, not copied."""
        self._check_at_rest()
        index = beam_idx.tolist()
        live = set(self.cache.requests())
        if live.issuperset(self._rows) and len(index) == len(self._rows):
            self.cache.reorder(self._rows, [self._rows[i] for i in index])
            self._mask = None if self._mask is None else self._mask[beam_idx.to(self._mask.device)]
        else:
            self._take(index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, beside each other."""
        self._check_at_rest()
        self._take([row for row in range(len(self._rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of `indices` (positions, or a mask over the rows), in this order."""
        self._check_at_rest()
        self._take(torch.arange(len(self._rows))[indices.cpu()].tolist())

    def _take(self, index: Sequence[int]) -> None:
        """Makes the batch of the rows in `index`: the first time a row is named it is kept, from then on forked."""
        live = set(self.cache.requests())
        self._check_rows(sum(self._rows[row] in live for row in index))
        rows: list[int] = []
        forked: list[int] = []
        try:
            for row in index:
                source = self._rows[row]
                if source not in rows:
                    rows.append(source)
                    continue
                rows += self._fresh(1)
                if source in live:
                    self.cache.fork(source, rows[-1])
                    forked.append(rows[-1])
        except PoolFullError:
            for request_id in forked:
                self.cache.release(request_id)
            raise
        for request_id in live.intersection(self._rows).difference(rows):
            self.cache.release(request_id)
        self._rows = rows
        self._mask = None if self._mask is None else self._mask[torch.tensor(index, device=self._mask.device)]

    def _check_rows(self, count: int) -> None:
        """Checks that so many rows with tokens can be held."""
        most = self.cache.runtime.max_requests
        if count > most:
            raise PoolFullError(
                f"runtime.max_requests: expected at most {most} rows in the batch, got {count}; generate has batch x "
                "num_beams of them, or batch x num_return_sequences"
            )

    def _fresh(self, count: int) -> list[int]:
        """Request ids that were never used."""
        self._next_id += count
        return list(range(self._next_id - count, self._next_id))

    def _check_at_rest(self) -> None:
        """Checks that no forward is half done."""
        if self._forward is not None or self._awaiting is not None:
            raise RuntimeError("cache: a forward is under way, or was not the attached model's; reset() the cache")

    @property
    def request_ids(self) -> list[int]:
        """The request of each row, in `cache`."""
        return list(self._rows)


def _check_contiguous(mask: Tensor) -> None:
    """Checks that no row of a mask has pads between its tokens: transformers counts them into a sliding window."""
    started, left = mask.cumsum(1) > 0, mask.flip(1).cumsum(1).flip(1) > 0
    if bool((started & left & ~mask).any()):
        raise ValueError("attention_mask: pads between tokens, which sliding windows would count; pad on the left")


class _Layer(CacheLayerMixin):
    """What transformers reads of one layer of a cache. It holds nothing; its reference to the cache is weak, so that
    the cache's memory goes with the last reference to it and not with a later garbage collection.
    """

    is_croppable = True
    is_sliding: bool

    def __init__(self, owner: PiKVHFCache, layer_id: int) -> None:
        self._weak_owner, self._layer_id = weakref.ref(owner), layer_id
        self.is_sliding = owner.cache.model.sliding_window(layer_id) is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Layer:
        """A layer is copied with its cache, whose copy is in `memo` by then."""
        layer = copy.copy(self)
        layer._weak_owner = weakref.ref(copy.deepcopy(self._owner, memo))
        return layer

    @property
    def _owner(self) -> PiKVHFCache:
        owner = self._weak_owner()
        assert owner is not None, "a layer is used through its cache"
        return owner

    @property
    def is_initialized(self) -> bool:
        return bool(self._owner.request_ids)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: memory was taken when the cache was made."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._owner.update(key_states, value_states, self._layer_id)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._owner.get_mask_sizes(query_length, self._layer_id)

    def get_seq_length(self) -> int:
        return self._owner.get_seq_length(self._layer_id)

    def get_max_length(self) -> int:
        """-1 where there is no limit but the cache's memory, as for a DynamicCache."""
        return self._owner.cache.model.sliding_window(self._layer_id) or -1
