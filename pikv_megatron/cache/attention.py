"""Attention over the layers of a step's requests: raw tokens and sealed blocks of every tier, merged; and the
importance that it gives.

The raw tokens are attended to in full. Of the sealed ones, decode tokens read what `attention.mode` says, those of all
requests at once; a prompt's tokens read everything, one request after another, since each is a large product by
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pikv_megatron import ops
from pikv_megatron.cache.state import LayerState
from pikv_megatron.cache.stats import ReadMeter
from pikv_megatron.cache.window import raw_positions
from pikv_megatron.codecs.compressor import Compressor
from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.device_numbers import DeviceNumbers
from pikv_megatron.reading import READERS
from pikv_megatron.reading.reader import Reading, Source
from pikv_megatron.tiers import Tier
from pikv_megatron.tiers.blocks import BlockTable, ImportanceRows

Undo = list[Callable[[], object]]
"""What takes importance back that a step has given, newest last."""


class Attended(NamedTuple):
    """Merged attention, and the missed mass of a selective read, expected and largest, or None where everything was
    read. Of decode tokens [n, G, R, ..], of a prompt [G, R, ..].
    """

    partial: ops.Partial
    missed: tuple[Tensor, Tensor] | None


class _Raw(NamedTuple):
    """Raw tokens of requests in one layer's buffer [slots, G, C, ..]: slot, first and last token of each, [n]."""

    k: Tensor
    v: Tensor
    slots: Tensor
    first: Tensor
    last: Tensor


class Attention:
    """Attends to LayerStates. Rows are [G, R, D] as in `ops`, R = heads_per_group * tokens, tokens fastest."""

    def __init__(
        self,
        model: ModelConfig,
        runtime: RuntimeConfig,
        compressor: Compressor,
        tiers: Sequence[Tier],
        importance: ImportanceRows | None,
        meter: ReadMeter,
        numbers: DeviceNumbers,
    ) -> None:
        self._model, self._runtime, self._compressor = model, runtime, compressor
        self._tiers, self._importance, self._meter, self._numbers = tiers, importance, meter, numbers
        self._device = runtime.torch_device
        self._in_place: dict[int, tuple[ops.Keys, ops.Values]] = {}
        """Of tiers whose pools the device reads in place, what the ops take of them."""
        reader = READERS.pick(runtime.attention.mode)
        self._reader = None if reader is None else reader(runtime.attention)

    def __getstate__(self) -> dict[str, Any]:
        """Without what stands for the pools' own memory: a copy has others."""
        return {**vars(self), "_in_place": {}}

    # ---- decode tokens

    def attend_decode(self, states: Sequence[LayerState], rows: Tensor, undo: Undo | None = None) -> Attended:
        """Attention of the newest token of each of several requests in one layer: rows [n, G, R, D]. With a budget,
        what they looked at gains importance; `undo` learns how to take that back.
        """
        scale, raw = self._model.scale, self._raw(states)
        if states[0].sliding is not None:
            return Attended(ops.attend_windows(rows, *raw, scale), None)
        tables = [[state.tables[tier] for state in states] for tier in range(len(self._tiers))]
        held = [(tier, found) for tier, found in enumerate(tables) if any(map(len, found))]
        sources = [self._source(tier, found) for tier, found in held]
        reading = None
        if not sources:
            merged = ops.attend_windows(rows, *raw, scale)
        elif self._reader is None:
            s, *others = sources
            merged = ops.attend_decode(rows, *raw, s.keys, s.values, s.block_ids, s.first_blocks, scale)
            if others:
                parts = [ops.attend_ragged(rows, s.keys, s.values, s.block_ids, s.first_blocks, scale) for s in others]
                merged = ops.merge_partials([merged, *parts])
        else:
            window = ops.attend_windows(rows, *raw, scale)
            reading = self._reader.read(rows, sources, window.lse, scale, self._numbers)
            self._meter.add(states[0].layer_id, reading, sources, self._numbers)
            merged = ops.merge_partials([window, *reading.partials])
        if self._importance is not None:
            lse = merged.lse if reading is None else self._full_lse(rows, window.lse, merged, sources, reading)
            self._give_importance(states, rows, lse, raw, held, sources, reading and reading.scores, undo)
        return Attended(merged, None if reading is None else (reading.estimate, reading.certificate))

    def _raw(self, states: Sequence[LayerState]) -> _Raw:
        buffer, sliding = states[0].window.buffer, states[0].sliding
        if states[0].window.beside:  # outside of a step: what is raw lies in two places, so it is copied together
            (state,) = states
            k, v = state.window.read_kv()
            ends = (0,), (0 if sliding is None else max(0, k.shape[1] - sliding),), (k.shape[1],)
            return _Raw(k.unsqueeze(0), v.unsqueeze(0), *(self._numbers.of(x) for x in ends))
        slots = tuple(state.window.index for state in states)
        last = tuple(state.window.in_buffer for state in states)
        first = tuple(0 if sliding is None else max(0, end - sliding) for end in last)
        return _Raw(buffer.k, buffer.v, *(self._numbers.of(x) for x in (slots, first, last)))

    def _source(self, tier: int, tables: Sequence[BlockTable]) -> Source:
        ids = tables[0].tensor if len(tables) == 1 else torch.cat([table.tensor for table in tables])
        pool = self._tiers[tier]
        fields, ids = pool.get(ids, self._device).wait()
        counts = tuple(map(len, tables))
        if fields is not pool.fields:
            keys, values = self._compressor.keys(fields), self._compressor.values(fields)
        elif tier in self._in_place:
            keys, values = self._in_place[tier]
        else:
            keys, values = self._in_place[tier] = self._compressor.keys(fields), self._compressor.values(fields)
        return Source(keys, values, ids, self._numbers.runs(counts), counts, self._runtime.block_size)

    def _full_lse(
        self, rows: Tensor, window_lse: Tensor, merged: ops.Partial, sources: Sequence[Source], reading: Reading
    ) -> Tensor:
        """Log-sum-exp over every key after a selective read: by the estimate, or, where not every token was scored
        (Quest, pruned blocks), from the keys.
        """
        if reading.scores is not None:
            return merged.lse - torch.log1p(-reading.estimate)
        parts = [
            ops.attend_ragged(rows, s.keys, s.values, s.block_ids, s.first_blocks, self._model.scale).lse
            for s in sources
        ]
        return torch.logsumexp(torch.stack([window_lse, *parts]), 0)

    def _give_importance(
        self,
        states: Sequence[LayerState],
        rows: Tensor,
        lse: Tensor,
        raw: _Raw,
        held: Sequence[tuple[int, Sequence[BlockTable]]],
        sources: Sequence[Source],
        scores: list[ops.TokenScores] | None,
        undo: Undo | None,
    ) -> None:
        """Adds the attention of decode tokens to what they looked at.

        Args:
            lse: [n, G, R] over every key. scores: where given, shares are those that the high plane expects, and no
                further key is read.
        """
        assert self._importance is not None
        scale, received = self._model.scale, states[0].window.buffer.importance
        assert received is not None
        share = ops.window_importance(rows, lse, raw.k, raw.slots, raw.first, raw.last, scale)
        if states[0].window.beside:
            states[0].window.add_importance(share[0])
        else:
            _add(received, raw.slots, share, undo)
        for i, ((_, tables), s) in enumerate(zip(held, sources, strict=True)):
            if scores is None:
                share = ops.token_importance(rows, lse, s.keys, s.block_ids, s.first_blocks, scale)
            else:
                counts = self._numbers.of(s.counts)
                of_block = lse.repeat_interleave(counts, 0, output_size=sum(s.counts)).permute(1, 2, 0)  # [G, R, T]
                share = (scores[i].coarse - of_block.unsqueeze(-1)).exp_().sum((0, 1))
            self._add_to_rows(tables, share, undo)

    def _add_to_rows(self, tables: Sequence[BlockTable], share: Tensor, undo: Undo | None) -> None:
        """Adds share [T, block_size] to the importance of the tables' blocks, one table's after another's."""
        assert self._importance is not None
        rows = tables[0].row_tensor if len(tables) == 1 else torch.cat([table.row_tensor for table in tables])
        importance = self._importance
        if undo is not None:
            rows, before = rows.clone(), importance.tensor.index_select(0, rows)
            undo.append(lambda: importance.tensor.index_copy_(0, rows, before))
        importance.tensor.index_add_(0, rows, share.to(rows.device))

    # ---- a prompt's tokens

    def attend_prompt(self, state: LayerState, rows: Tensor, tokens: int, undo: Undo | None = None) -> Attended:
        """Attention of the newest `tokens` tokens of a request, causal by position, over everything. With a budget,
        what the last of them looked at gains importance.
        """
        if state.sliding is not None:
            return Attended(self._attend_sliding(state, state.sliding, rows, tokens), None)
        scale = self._model.scale
        held = [(tier, table) for tier, table in enumerate(state.tables) if len(table)]
        tables = [table for _, table in held]
        sources = [self._source(tier, [table]) for tier, table in held]
        if state.newest_is_sealed(tokens):
            return Attended(self._attend_by_position(state, rows, tokens, tables, sources), None)
        k, v = state.window.read_kv()
        parts = [ops.attend_blocks(rows, s.keys, s.values, s.block_ids, scale) for s in sources]
        merged = ops.merge_partials([ops.attend_window(rows, k, v, tokens, scale), *parts])
        if self._importance is not None:
            self._add_importance(state, rows, tokens, merged.lse, k, tables, sources, undo)
        return Attended(merged, None)

    def _attend_sliding(self, state: LayerState, window: int, rows: Tensor, tokens: int) -> ops.Partial:
        """Of a sliding-window layer: everything that its queries see is raw."""
        (k, v), scale = state.window.read_kv(), self._model.scale
        if state.sealed_end and state.length - tokens - window + 1 < state.sealed_end:
            raise ValueError(
                f"q: request {state.request_id}, layer {state.layer_id}: the first of these {tokens} queries sees "
                "tokens that the sliding window has forgotten; attend before observe_routing and before the next append"
            )
        if tokens == 1:
            return ops.attend_window(rows, k[:, -window:], v[:, -window:], 1, scale)
        if k.shape[1] <= window:
            return ops.attend_window(rows, k, v, tokens, scale)
        return ops.attend_sliding(rows, k, v, tokens, window, scale)

    def _attend_by_position(
        self, state: LayerState, rows: Tensor, tokens: int, sealed: list[BlockTable], sources: list[Source]
    ) -> ops.Partial:
        """Queries whose own tokens were partly sealed already: everything is read, causal by explicit positions."""
        device, (k, v), scale = rows.device, state.window.read_kv(), self._model.scale
        keys_at = raw_positions(k.shape[1], state.sinks, state.sealed_end, device)
        queries_at = torch.arange(state.length - tokens, state.length, device=device).repeat(rows.shape[1] // tokens)
        parts = [ops.attend_at(rows, k, v, keys_at, queries_at, scale)]
        blocks_at = []
        for table, s in zip(sealed, sources, strict=True):
            starts = table.pool.start.index_select(0, table.tensor).to(device)
            blocks_at.append(starts.unsqueeze(1) + torch.arange(s.block_size, device=device))
            parts.append(ops.attend_blocks(rows, s.keys, s.values, s.block_ids, scale, blocks_at[-1], queries_at))
        merged = ops.merge_partials(parts)
        if self._importance is None:
            return merged
        if self._runtime.budget.over_budget == "drop" and bool(torch.isinf(merged.lse).any()):
            raise ValueError(
                f"q: request {state.request_id}, layer {state.layer_id}: the budget has dropped all that one of these "
                f"{tokens} queries may see; attend before observe_routing and before the next append"
            )
        seen = min(tokens, self._runtime.budget.observation_window)

        def share(logits: Tensor, keys_at: Tensor) -> Tensor:
            """Attention that keys [S] at these positions receive from the newest `seen` tokens: logits [G, R, S]."""
            weights = (logits - merged.lse.unsqueeze(-1)).exp_().masked_fill_(keys_at > queries_at[:, None], 0.0)
            return weights.unflatten(1, (-1, tokens))[:, :, -seen:].sum((0, 1, 2))

        state.window.add_importance(share(torch.matmul(rows.float() * scale, k.float().transpose(-1, -2)), keys_at))
        for table, s, at in zip(sealed, sources, blocks_at, strict=True):
            logits = ops.key_logits(rows.unsqueeze(0), s.keys, s.block_ids, s.first_blocks, scale)
            self._add_to_rows([table], share(logits, at.flatten()).view_as(at), None)
        return merged

    def _add_importance(
        self,
        state: LayerState,
        rows: Tensor,
        tokens: int,
        lse: Tensor,
        raw_k: Tensor,
        tables: Sequence[BlockTable],
        sources: Sequence[Source],
        undo: Undo | None,
    ) -> None:
        """Adds the attention of a prompt's last observation_window queries to what they looked at; lse [G, R]."""
        seen = min(tokens, self._runtime.budget.observation_window)
        groups, per_group = rows.shape[0], rows.shape[1] // tokens
        rows = rows.view(groups, per_group, tokens, -1)[:, :, -seen:].flatten(1, 2)
        lse = lse.view(groups, per_group, tokens)[:, :, -seen:].flatten(1, 2)
        window, scale = state.window, self._model.scale
        if undo is not None and window.buffer.importance is not None:
            received = window.buffer.importance[window.index]
            before = received.clone()
            undo.append(lambda: received.copy_(before))
        window.add_importance(ops.prompt_importance(rows, lse, raw_k, seen, scale))
        for table, s in zip(tables, sources, strict=True):
            share = ops.token_importance(
                rows.unsqueeze(0), lse.unsqueeze(0), s.keys, s.block_ids, s.first_blocks, scale
            )
            self._add_to_rows([table], share, undo)


def _add(received: Tensor, slots: Tensor, share: Tensor, undo: Undo | None) -> None:
    """Adds share [n, C] to rows `slots` of received [slots, C]."""
    if undo is not None:
        before = received.index_select(0, slots)
        undo.append(lambda: received.index_copy_(0, slots, before))
    received.index_add_(0, slots, share)
