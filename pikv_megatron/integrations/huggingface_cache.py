"""PiKVHFCache: transformers' `Cache` over one PiKVCache, a request per row of the batch.

transformers counts columns of the batch, pads included; PiKV holds real tokens only. `Step` is the plan of one forward:
which of its columns are real, per row. Who computes attention, and how a cache comes to it, is in
`huggingface_attention`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from pikv_megatron.cache import PiKVCache
from pikv_megatron.config import RuntimeConfig, Source
from pikv_megatron.integrations.huggingface_attach import attach, is_attached
from pikv_megatron.integrations.huggingface_current import NAME, current
from pikv_megatron.integrations.huggingface_model import find_model, model_config


@dataclass
class Step:
    """One forward over `columns` new columns of every row.

    picks: per row, the columns that hold real tokens (int64 indices), or None for all of them.
    each: one real token for every row, all of them live already: they are served together.
    next_layer: the layer whose turn it is.
    """

    columns: int
    picks: list[Tensor | None]
    each: bool
    next_layer: int = 0

    def count(self, row: int) -> int:
        pick = self.picks[row]
        return self.columns if pick is None else len(pick)


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

    def __init__(self, source: nn.Module | Any, runtime: RuntimeConfig | Source | None = None) -> None:
        if isinstance(source, nn.Module):
            model = find_model(source)
            self.cache = PiKVCache(model_config(model), runtime)
            self._config = model.config.get_text_config(decoder=True)
            if not is_attached(model):
                attach(model)
        else:
            self._config = source.get_text_config(decoder=True)
            self.cache = PiKVCache(model_config(source), runtime)
        super().__init__(layers=[_Layer(self, layer_id) for layer_id in range(self.cache.model.num_layers)])
        self._new_ids = itertools.count()
        self._rows: list[int] = []
        self._mask: Tensor | None = None
        self._lengths = [0] * len(self.layers)
        self._step: Step | None = None
        self._awaiting: int | None = None

    # ---- what a forward does

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes note of a layer's turn; its tokens are stored by its attention, which follows.

        Returns:
            The arguments: PiKV's attention wants the new tokens only.

        Raises:
            RuntimeError: the model's attention is not PiKV's, or the last forward did not reach its end.
        """
        if self._config._attn_implementation != NAME:
            raise RuntimeError(
                f"attn_implementation: this cache needs {NAME!r}, the model has "
                f"{self._config._attn_implementation!r}; call pikv_megatron.integrations.huggingface.attach(model)"
            )
        if self._awaiting is not None:
            raise RuntimeError(
                f"layer {self._awaiting}: its attention did not run through PiKV; attach(model) the model that this "
                "cache is used with, and reset() the cache"
            )
        expected = 0 if self._step is None else self._step.next_layer
        if layer_idx != expected:
            raise RuntimeError(
                f"layer {layer_idx}: expected layer {expected} next; the last forward ended early or layers were "
                "skipped, reset() the cache"
            )
        self._awaiting = layer_idx
        current.writing = self
        return key_states, value_states

    def start(self, layer_id: int) -> None:
        """A layer's attention has come."""
        if self._awaiting != layer_id:
            raise RuntimeError(f"layer {layer_id}: its keys were not given to this cache, expected {self._awaiting}")
        self._awaiting = None

    def plan(self, layer_id: int, batch: int, columns: int, mask: Tensor | None) -> Step:
        """The step that a layer is in; made at layer 0, where one that does not fit is refused whole."""
        if self._step is None:
            self._step = self._plan(batch, columns, mask)
        return self._step

    def attend(self, layer_id: int, step: Step, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a layer's real tokens and attends to all that it holds.

        Args:
            query: [batch, heads, columns, head_dim]. key, value: the same of the KV heads.

        Returns:
            out [batch, columns, heads, v_head_dim] and lse [batch, columns, heads], zeros at pads.
        """
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if step.each:
            self.cache.append_each(layer_id, k[:, 0], v[:, 0], self._rows)
            out, lse = (x.unsqueeze(1) for x in self.cache.attend_each(layer_id, q[:, 0], self._rows))
        else:
            out = q.new_zeros(*q.shape[:3], v.shape[3])
            lse = q.new_zeros(q.shape[:3], dtype=torch.float32)
            for row, (request_id, pick) in enumerate(zip(self._rows, step.picks, strict=True)):
                if not step.count(row):
                    continue
                at = slice(None) if pick is None else pick
                self.cache.append(layer_id, k[row, at], v[row, at], request_id)
                out[row, at], lse[row, at] = self.cache.attend(layer_id, q[row, at], request_id)
        self._lengths[layer_id] += step.columns
        step.next_layer += 1
        if step.next_layer == len(self.layers):
            self._step = None
        return out, lse

    def observe(self, layer_id: int, step: Step, expert_ids: Tensor, weights: Tensor) -> None:
        """Labels the tokens that a layer stored last: expert_ids, weights [batch * columns, topk], pads included."""
        if not self.cache.model.num_experts:
            return
        if step.each:
            self.cache.observe_each(layer_id, expert_ids, weights, self._rows)
            return
        ids, gates = (x.unflatten(0, (-1, step.columns)) for x in (expert_ids, weights))
        for row, (request_id, pick) in enumerate(zip(self._rows, step.picks, strict=True)):
            if step.count(row):
                at = slice(None) if pick is None else pick
                self.cache.observe_routing(layer_id, ids[row, at], gates[row, at], request_id)

    def _plan(self, batch: int, columns: int, mask: Tensor | None) -> Step:
        rows = self._rows or [next(self._new_ids) for _ in range(batch)]
        if len(rows) != batch:
            raise ValueError(f"input_ids: expected a batch of {len(rows)} rows as before, got {batch}; or reset()")
        picks, mask = self._read_mask(batch, columns, mask)
        live = set(self.cache.requests())
        each = columns == 1 and batch > 1 and live.issuperset(rows) and all(pick is None for pick in picks)
        step = Step(columns, picks, each)
        self.cache.check_room({rows[i]: step.count(i) for i in range(batch) if step.count(i)})
        self._rows, self._mask = rows, mask
        return step

    def _read_mask(self, batch: int, columns: int, mask: Tensor | None) -> tuple[list[Tensor | None], Tensor | None]:
        """Real columns per row, and the mask over all columns so far (None where there are no pads)."""
        past = self._lengths[0]
        if mask is None:
            if self._mask is not None:
                raise ValueError("attention_mask: expected one, since this cache was filled with padded rows")
            return [None] * batch, None
        if mask.dim() != 2 or mask.shape != (batch, past + columns):
            raise ValueError(
                f"attention_mask: expected shape [{batch}, {past + columns}] (cached and new columns), got "
                f"{list(mask.shape)}"
            )
        mask = mask.bool()
        if bool(mask.all()) and self._mask is None:
            return [None] * batch, None
        before = torch.ones_like(mask[:, :past]) if self._mask is None else self._mask
        if not torch.equal(mask[:, :past], before):
            raise ValueError("attention_mask: its cached columns differ from those that the cache was filled with")
        new = mask[:, past:]
        full = new.all(1).tolist()
        picks = [None if full[i] else new[i].nonzero().flatten() for i in range(batch)]
        return picks, mask

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
        self._step = self._awaiting = None

    @property
    def request_ids(self) -> list[int]:
        """The request of each row, in `cache`."""
        return list(self._rows)


class _Layer(CacheLayerMixin):
    """What transformers reads of one layer of a cache. It holds nothing."""

    is_croppable = True

    def __init__(self, owner: PiKVHFCache, layer_id: int) -> None:
        self._owner, self._layer_id = owner, layer_id

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
        return -1
