"""Attention over one layer's state: raw tokens and sealed blocks of every tier, merged; and the importance it gives.

The raw tokens are attended to in full. Of the sealed ones, a decode token reads what `attention.mode` says, a prompt's
tokens read everything.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_megatron import ops
from pikv_megatron.cache.sealing import LayerState
from pikv_megatron.cache.stats import ReadMeter
from pikv_megatron.cache.window import raw_positions
from pikv_megatron.codecs.compressor import Compressor
from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.reading.selection import Reading, Source, one_run, read_selected
from pikv_megatron.tiers.blocks import BlockTable
from pikv_megatron.tiers.tiers import resident


class Attended(NamedTuple):
    """Merged attention, and the missed mass of a selective read ([G, R] each) or None where everything was read."""

    partial: ops.Partial
    missed: tuple[Tensor, Tensor] | None


class Attention:
    """Attends to LayerStates. Rows are [G, R, D] as in `ops`, R = heads_per_group * tokens, tokens fastest."""

    def __init__(self, model: ModelConfig, runtime: RuntimeConfig, compressor: Compressor, meter: ReadMeter) -> None:
        self._model, self._runtime, self._compressor, self._meter = model, runtime, compressor, meter

    def attend(self, state: LayerState, rows: Tensor, tokens: int) -> Attended:
        """Attention of the newest `tokens` tokens of a request, causal by position. With a budget, what they looked at
        gains importance.
        """
        if state.sliding is not None:
            return Attended(self._attend_sliding(state, state.sliding, rows, tokens), None)
        scale, config = self._model.scale, self._runtime.attention
        sealed = [table for table in state.tables if len(table)]
        sources = [self._source(table) for table in sealed]
        if state.newest_is_sealed(tokens):
            return Attended(self._attend_by_position(state, rows, tokens, sealed, sources), None)
        k, v = state.window.read_kv()
        reading = None
        if not sealed or config.mode == "exact" or tokens > 1:
            if tokens == 1 and len(sources) == 1:
                s = sources[0]
                slot, first, last = torch.tensor([[0], [0], [k.shape[1]]]).to(rows.device)
                out, lse = ops.attend_decode(
                    rows.unsqueeze(0),
                    k.unsqueeze(0),
                    v.unsqueeze(0),
                    slot,
                    first,
                    last,
                    s.keys,
                    s.values,
                    s.block_ids,
                    one_run(len(s.block_ids), rows.device),
                    scale,
                )
                merged = ops.Partial(out[0], lse[0])
            else:
                parts = [ops.attend_blocks(rows, s.keys, s.values, s.block_ids, scale) for s in sources]
                merged = ops.merge_partials([ops.attend_window(rows, k, v, tokens, scale), *parts])
        else:
            window = ops.attend_window(rows, k, v, 1, scale)
            reading = read_selected(rows, sources, window.lse, config, scale)
            self._meter.add(state.layer_id, reading, sum(len(table) for table in sealed) * self._runtime.block_size)
            merged = ops.merge_partials([window, *reading.partials])
        if self._runtime.budget.policy != "none":
            lse = merged.lse if reading is None else self._full_lse(rows, window.lse, merged, sources, reading)
            self._add_importance(state, rows, tokens, lse, k, sealed, sources, reading and reading.scores)
        return Attended(merged, None if reading is None else (reading.estimate, reading.certificate))

    def attend_each(self, states: list[LayerState], rows: Tensor) -> ops.Partial:
        """Attention of one decode token of each of several requests, rows [requests, G, R, D], over everything they
        hold, in mode exact without a budget: the sealed blocks of all of them by one op.
        """
        if states[0].sliding is not None:
            parts = [self.attend(state, q, 1).partial for state, q in zip(states, rows, strict=True)]
            return ops.Partial(*(torch.stack(part) for part in zip(*parts, strict=True)))
        scale, raw = self._model.scale, [state.window.read_kv() for state in states]
        windows = [ops.attend_window(q, k, v, 1, scale) for q, (k, v) in zip(rows, raw, strict=True)]
        window = ops.Partial(*(torch.stack(part) for part in zip(*windows, strict=True)))
        tables = [state.tables[0] for state in states]
        pool = tables[0].pool
        first_blocks = torch.tensor([0, *itertools.accumulate(map(len, tables))]).to(rows.device)
        sealed = ops.attend_ragged(
            rows,
            self._compressor.keys(pool.fields),
            self._compressor.values(pool.fields),
            torch.cat([table.tensor for table in tables]),
            first_blocks,
            scale,
        )
        return ops.merge_partials([window, sealed])

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

    def _source(self, table: BlockTable) -> Source:
        fields, ids = resident(table.pool, table.tensor, self._runtime.torch_device)
        return Source(self._compressor.keys(fields), self._compressor.values(fields), ids, self._runtime.block_size)

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
        if self._runtime.budget.policy == "none":
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
            assert table.pool.importance is not None
            received = share(self._key_logits(rows, s), at.flatten()).view_as(at)
            table.pool.importance.index_add_(0, table.tensor, received.to(table.pool.device))
        return merged

    def _key_logits(self, rows: Tensor, source: Source) -> Tensor:
        """Logits [G, R, tokens] of all tokens of a source."""
        run = one_run(len(source.block_ids), rows.device)
        logits: Tensor = ops.key_logits(rows.unsqueeze(0), source.keys, source.block_ids, run, self._model.scale)
        return logits

    def _full_lse(
        self, rows: Tensor, window_lse: Tensor, merged: ops.Partial, sources: list[Source], reading: Reading
    ) -> Tensor:
        """Log-sum-exp over every key after a selective read: by the estimate, or, where not every token was scored
        (Quest, pruned blocks), from the keys.
        """
        if reading.scores is not None:
            return merged.lse - torch.log1p(-reading.estimate)
        logits = [self._key_logits(rows, s) for s in sources]
        return torch.logsumexp(torch.cat([window_lse.unsqueeze(-1), *logits], -1), -1)

    def _add_importance(
        self,
        state: LayerState,
        rows: Tensor,
        tokens: int,
        lse: Tensor,
        raw_k: Tensor,
        sealed: list[BlockTable],
        sources: list[Source],
        scores: list[ops.TokenScores] | None,
    ) -> None:
        """Adds the attention of these queries (of a prompt's last observation_window) to what they looked at.

        Args:
            lse: [G, R] over every key.
            scores: where given, shares are those that the high plane expects, and no further key is read.
        """
        seen = min(tokens, self._runtime.budget.observation_window)
        groups, per_group = rows.shape[0], rows.shape[1] // tokens
        rows = rows.view(groups, per_group, tokens, -1)[:, :, -seen:].flatten(1, 2)
        lse = lse.view(groups, per_group, tokens)[:, :, -seen:].flatten(1, 2)
        state.window.add_importance(ops.prompt_importance(rows, lse, raw_k, seen, self._model.scale))
        for i, (table, s) in enumerate(zip(sealed, sources, strict=True)):
            assert table.pool.importance is not None
            if scores is None:
                run = one_run(len(s.block_ids), rows.device)
                share = ops.token_importance(
                    rows.unsqueeze(0), lse.unsqueeze(0), s.keys, s.block_ids, run, self._model.scale
                )
            else:
                share = (scores[i].coarse - lse[..., None, None]).exp_().sum((0, 1))
            table.pool.importance.index_add_(0, table.tensor, share.to(table.pool.device))
