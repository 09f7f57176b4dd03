"""Sealing: what happens to block_size tokens when they leave the window. They are labelled, encoded and placed; where
a layer is over its budget, its least important blocks are dropped or demoted to the next tier.

Memory is reserved when tokens are appended, so that sealing itself cannot fail. In decode one block is sealed at a
time and nothing is copied to the host: over budget, the new block takes the place of the least important one, found
and overwritten on the device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pikv_megatron.budgets import budget
from pikv_megatron.cache.window import LayerWindow, RawTokens, WindowBuffer
from pikv_megatron.codecs.compressor import Compressor
from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.streamer.streamer import Streamer
from pikv_megatron.tiers.blocks import BlockPool, BlockTable


@dataclass
class LayerState:
    """One layer of one request: its raw tokens, its blocks in each tier, and the blocks reserved for the next seal."""

    request_id: int
    layer_id: int
    window: LayerWindow
    tables: list[BlockTable]
    sinks: int
    """First tokens, which stay raw."""
    sliding: int | None
    """W of a sliding-window layer: nothing is sealed, what is out of reach is forgotten."""
    sealed_end: int
    """Positions from the sinks up to here have been sealed, or forgotten."""
    length: int = 0
    """Positions appended so far."""
    reserved: list[list[int]] = field(default_factory=list)
    """Blocks per tier for the next seal; always as many as `overflow` will seal, less what a budget drops."""

    def newest_is_sealed(self, tokens: int = 1) -> bool:
        """Whether some of the newest `tokens` tokens are in blocks already."""
        return self.sinks < self.sealed_end and self.length - tokens < self.sealed_end


@dataclass(frozen=True)
class _Blocks:
    """Blocks about to be encoded into their places: k, v [blocks, num_query_groups, block_size, channels], start,
    label, importance (or None), each with a leading dimension of blocks.
    """

    k: Tensor
    v: Tensor
    start: Tensor
    label: Tensor
    importance: Tensor | None

    def pick(self, index: Tensor) -> _Blocks:
        importance = None if self.importance is None else self.importance[index]
        return _Blocks(self.k[index], self.v[index], self.start[index], self.label[index], importance)


class Sealer:
    """Seals the tokens of LayerStates into the tiers' pools."""

    def __init__(
        self,
        model: ModelConfig,
        runtime: RuntimeConfig,
        compressor: Compressor,
        tiers: list[BlockPool],
        windows: list[WindowBuffer],
        streamer: Streamer,
    ) -> None:
        self._windows = windows
        self._model, self._runtime, self._compressor = model, runtime, compressor
        self._tiers, self._streamer = tiers, streamer
        self._allowed = budget.allowed_blocks(model, runtime)
        self.dropped = self.demoted = 0
        """Blocks that budgets have dropped and demoted so far, over all requests."""

    def needed(self, layer_id: int, state: LayerState | None, tokens: int) -> list[int]:
        """Blocks of each tier to reserve when `tokens` more are appended to a layer; state None: of a new request."""
        buffer = self._windows[layer_id]
        if buffer.sliding is not None:
            return [0] * len(self._tiers)
        raw, held = 0, 0
        if state is not None:
            raw, held = state.window.tokens, len(state.tables[0]) + (len(state.reserved[0]) if state.reserved else 0)
        waiting = buffer.overflow(raw)  # has its reserved blocks, so that sealing it changes no pool's free count
        needed = [buffer.overflow(raw - waiting * self._runtime.block_size + tokens)] + [0] * (len(self._tiers) - 1)
        if self._allowed is not None:
            over = max(0, needed[0] - max(0, self._allowed[layer_id] - held))
            needed[0] -= over
            if self._runtime.budget.over_budget == "demote":
                needed[1] = over
        return needed

    def check_room(self, needed: list[int], what: str) -> None:
        """Raises PoolFullError where a tier has fewer free blocks than `needed`."""
        for pool, blocks in zip(self._tiers, needed, strict=True):
            pool.check_free(blocks, what)

    def make_room(self, state: LayerState, tokens: int) -> None:
        """Seals what has left the window already, and reserves what sealing will need once `tokens` more have been
        appended. Raises PoolFullError; nothing was sealed or reserved then.
        """
        needed = self.needed(state.layer_id, state, tokens)
        self.check_room(needed, f"request {state.request_id}, layer {state.layer_id}")
        self.seal(state)
        state.reserved = [pool.allocate(blocks) for pool, blocks in zip(self._tiers, needed, strict=True)]

    def seal(self, state: LayerState) -> None:
        """Seals every whole block that has left the window, into the memory reserved for it; a sliding-window layer
        forgets it.
        """
        count = self._windows[state.layer_id].overflow(state.window.tokens)
        if not count:
            return
        tokens = count * self._runtime.block_size
        if state.sliding is not None:
            state.window.drop(tokens)
            state.sealed_end += tokens
            return
        blocks = self._blocks(state.window.oldest(tokens), state.sealed_end)
        reserved, state.reserved = state.reserved, []
        if len(reserved[0]) == count:
            self._place(state, 0, blocks, reserved[0])
        elif count == 1:
            self._displace_one(state, blocks, reserved)
        else:
            self._displace(state, blocks, reserved)
        encode = functools.partial(self._compressor.encode, blocks.k, blocks.v)
        self._streamer.sealed(state.request_id, state.layer_id, state.sealed_end, encode, blocks.label)
        state.window.drop(tokens)  # `blocks` may be views of what this overwrites
        state.sealed_end += tokens

    def _blocks(self, raw: RawTokens, start: int) -> _Blocks:
        size = self._runtime.block_size
        count = raw.tokens // size
        k, v = (x.unflatten(1, (count, size)).transpose(0, 1) for x in (raw.k, raw.v))
        starts = torch.arange(start, start + raw.tokens, size, device=k.device)
        importance = None if raw.importance is None else raw.importance.unflatten(0, (count, size))
        return _Blocks(k, v, starts, self._label(raw, count), importance)

    def _label(self, raw: RawTokens, count: int) -> Tensor:
        """The expert with the largest gate weight summed over each block's tokens; 0 where nothing was observed."""
        votes = raw.weights.new_zeros(count, max(1, self._model.num_experts))
        votes.scatter_add_(1, raw.expert_ids.reshape(count, -1), raw.weights.reshape(count, -1))
        return votes.argmax(1)

    def _write(self, blocks: _Blocks, pool: BlockPool, ids: Tensor) -> None:
        self._compressor.write(pool.fields, ids, blocks.k, blocks.v)
        pool.describe(ids, blocks.start, blocks.label, blocks.importance)

    def _place(self, state: LayerState, tier: int, blocks: _Blocks, ids: list[int]) -> None:
        """Writes new blocks to `ids` of a tier and enters them in the request's table."""
        table = state.tables[tier]
        first = len(table)
        table.extend(ids)
        self._write(blocks, table.pool, table.tensor[first:])

    def _left(self, blocks: int) -> None:
        if self._runtime.budget.over_budget == "demote":
            self.demoted += blocks
        else:
            self.dropped += blocks

    def _displace_one(self, state: LayerState, block: _Blocks, reserved: list[list[int]]) -> None:
        """Decode, over budget: the block takes the place of the layer's least important one."""
        device = state.tables[0]
        demote = self._runtime.budget.over_budget == "demote"
        if not len(device):  # no sealed block is allowed here at all
            if demote:
                self._place(state, 1, block, reserved[1])
        else:
            assert device.pool.importance is not None
            ids = device.tensor
            victim = ids[budget.least_important(device.pool.importance.index_select(0, ids), 1)]
            if demote:
                below = state.tables[1]
                below.extend(reserved[1])
                below.pool.copy_from(below.tensor[-1:], device.pool, victim)
            self._write(block, device.pool, victim)
        self._left(1)

    def _displace(self, state: LayerState, blocks: _Blocks, reserved: list[list[int]]) -> None:
        """Prefill, over budget: old and new blocks compete; the least important ones leave or are never written."""
        device, held = state.tables[0], list(state.tables[0].ids)
        pool, count = device.pool, len(blocks.start)
        assert pool.importance is not None and blocks.importance is not None
        over = count - len(reserved[0])
        competing = torch.cat([pool.importance.index_select(0, device.tensor), blocks.importance])
        losers = budget.least_important(competing, over).tolist()
        old = [held[i] for i in losers if i < len(held)]
        new_losers = torch.tensor(
            sorted(i - len(held) for i in losers if i >= len(held)), dtype=torch.int64, device=pool.device
        )
        stays = torch.ones(count, dtype=torch.bool, device=pool.device)
        stays[new_losers] = False
        if self._runtime.budget.over_budget == "demote":
            below = state.tables[1]
            first = len(below)
            below.extend(reserved[1])
            moved = below.tensor[first : first + len(old)]
            if old:
                below.pool.copy_from(moved, pool, torch.tensor(old, device=pool.device))
            self._write(blocks.pick(new_losers), below.pool, below.tensor[first + len(old) :])
        self._left(over)
        device.remove(set(old))
        self._place(state, 0, blocks.pick(stays.nonzero().flatten()), old + reserved[0])
