"""Sealing: what happens to block_size tokens when they leave the window. They are labelled, encoded and placed; where
a layer is over its budget, its least important blocks are dropped or demoted to the next tier.

Memory is reserved when tokens are appended, so that sealing itself cannot fail. In decode one block at a time leaves a
window; those of all layers and requests of a step are sealed together (`seal_full`), and over budget each takes the
place of a block that was chosen when its memory was reserved. A prompt's blocks are sealed layer by layer (`prepare`),
into memory that nobody else reads, so that a step can be undone (`undo`) until `finish`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_megatron.budgets import budget
from pikv_megatron.cache.events import Blocks, CacheEvents
from pikv_megatron.cache.state import LayerState, Leaving, OnHost, Reservation, Sealed, Victim
from pikv_megatron.cache.window import RawTokens, WindowBuffer, WindowMemory
from pikv_megatron.codecs.compressor import Compressor
from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.device_numbers import on_device
from pikv_megatron.tiers import Tier
from pikv_megatron.tiers.blocks import ImportanceRows, PoolFullError


class Needed(NamedTuple):
    """What a seal of `blocks` blocks needs: free blocks on the device, by as many as its table will have grown then;
    claims to others in the place of shared ones there (`BlockPool.claims`); and free blocks in the tiers below it.
    """

    blocks: int
    device: int
    claims: int
    below: int


NOTHING = Needed(0, 0, 0, 0)


@dataclass(frozen=True)
class _New:
    """Blocks about to be encoded: k, v [blocks, num_query_groups, block_size, channels], start, label [blocks],
    importance [blocks, block_size] or None.
    """

    k: Tensor
    v: Tensor
    start: Tensor
    label: Tensor
    importance: Tensor | None

    def pick(self, index: list[int]) -> _New:
        """Some of them, or all, in the order of `index`."""
        if index == list(range(len(self.start))):
            return self
        at = on_device(index, self.k.device)
        importance = None if self.importance is None else self.importance[at]
        return _New(self.k[at], self.v[at], self.start[at], self.label[at], importance)


class Sealer:
    """Seals the tokens of LayerStates into the tiers' pools."""

    def __init__(
        self,
        model: ModelConfig,
        runtime: RuntimeConfig,
        compressor: Compressor,
        tiers: Sequence[Tier],
        windows: list[WindowBuffer],
        importance: ImportanceRows | None,
        listeners: Sequence[CacheEvents],
    ) -> None:
        self._windows, self._importance, self._listeners = windows, importance, listeners
        self._compressor, self._tiers = compressor, tiers
        self._experts, self._size = max(1, model.num_experts), runtime.block_size
        self._allowed = budget.allowed_blocks(model, runtime)
        self._demotes = runtime.budget.over_budget == "demote"
        self.dropped = self.demoted = 0
        """Blocks that budgets have dropped and demoted so far, over all requests."""

    # ---- memory

    def needed(self, layer_id: int, state: LayerState | None, tokens: int) -> Needed:
        """What to reserve when `tokens` more are appended to a layer; state None: of a new request."""
        buffer = self._windows[layer_id]
        raw = 0 if state is None else state.window.tokens
        waiting = buffer.overflow(raw)  # has its reserved blocks, so that sealing it changes no pool's free count
        count = buffer.overflow(raw - waiting * self._size + tokens)
        if not count or buffer.sliding is not None:
            return NOTHING
        if self._allowed is None:
            return Needed(count, count, 0, 0)
        held = shared = 0
        if state is not None:
            table = state.tables[0]
            held = len(table) + (state.reserved.grows if state.reserved else 0)
            if table.pool.shared_blocks:
                shared = sum(map(table.pool.is_shared, table.ids))
        grows = min(count, max(0, self._allowed[layer_id] - held))
        over = count - grows
        return Needed(count, grows, min(over, shared), over if self._demotes else 0)

    def check_room(self, needed: Iterable[Needed], what: str, owners: int = 0) -> None:
        """Raises PoolFullError where there is not all of that on the device, with so many more owners of blocks there,
        or in the tiers below it.
        """
        _, device, claims, below = (sum(column) for column in zip(NOTHING, *needed, strict=True))
        self._tiers[0].check_free(device, what, claims, owners)
        lower = self._tiers[1:]
        free = sum(pool.free_blocks for pool in lower)
        if below > free:
            if len(lower) == 1:
                lower[0].check_free(below, what)
            kinds = ", ".join(pool.kind for pool in lower)
            raise PoolFullError(
                f"{what}: needs {below} blocks of {self._size} tokens in the tiers below the device ({kinds}), {free} "
                "are free; release requests or raise tiers[].bytes"
            )

    def reserve(self, wanted: Sequence[tuple[LayerState, Needed]]) -> None:
        """Takes the memory that the next seal of each of these states needs. There must be room."""
        choose = []
        for state, needed in wanted:
            state.reserved = None
            if needed.blocks:
                device, below = self._tiers[0].allocate(needed.device), self.allocate_below(needed.below)
                self._tiers[0].claims += needed.claims
                state.reserved = Reservation(device, needed.claims, below)
                if needed.blocks == 1 and not needed.device and len(state.tables[0]):
                    choose.append(state)
        for state, victim in zip(choose, self._victims(choose), strict=True):
            assert state.reserved is not None
            state.reserved.victim = victim

    def allocate_below(self, blocks: int) -> list[tuple[int, int]]:
        """Blocks of the highest tiers below the device that have some, as (tier, block id)."""
        found: list[tuple[int, int]] = []
        for tier, pool in enumerate(self._tiers[1:], 1):
            count = min(blocks - len(found), pool.free_blocks)
            found += [(tier, block_id) for block_id in pool.allocate(count)]
        return found

    def _victims(self, states: Sequence[LayerState]) -> list[Victim]:
        """The least important entry of each state's device table; of equals the first."""
        if not states:
            return []
        assert self._importance is not None
        rows = torch.nn.utils.rnn.pad_sequence(
            [state.tables[0].row_tensor for state in states], batch_first=True, padding_value=-1
        )
        received = self._importance.tensor[rows.clamp(min=0)].sum(-1)
        chosen = OnHost(received.masked_fill_(rows < 0, torch.inf).argmin(1))
        return [Victim(chosen, i) for i in range(len(states))]

    def give_back(self, state: LayerState) -> None:
        """Frees what was reserved for a seal that will not come."""
        reserved, state.reserved = state.reserved, None
        if reserved is not None:
            self._tiers[0].free(reserved.device)
            self._tiers[0].claims -= reserved.claims
            self._free_below(reserved.below)

    def _free_below(self, places: Sequence[tuple[int, int]]) -> None:
        for tier, block_id in places:
            self._tiers[tier].free([block_id])

    # ---- outside of a step

    def make_room(self, state: LayerState, tokens: int) -> None:
        """Seals what has left the window already, and reserves what sealing will need once `tokens` more have been
        appended. Raises PoolFullError; nothing was sealed or reserved then.
        """
        needed = self.needed(state.layer_id, state, tokens)
        self.check_room([needed], f"request {state.request_id}, layer {state.layer_id}")
        self.seal(state)
        self.reserve([(state, needed)])

    def seal(self, state: LayerState) -> None:
        """Seals every whole block that has left the window, into the memory reserved for it; a sliding-window layer
        forgets it.
        """
        count = self._windows[state.layer_id].overflow(state.window.tokens)
        if not count:
            return
        if state.window.is_waiting:
            self.prepare(state, None)
            self.finish(state)
        else:
            self.seal_full([state], None)

    # ---- a prompt's blocks

    def prepare(self, state: LayerState, step_id: int | None) -> None:
        """Seals what has left a window with a chunk waiting beside it, so that `undo` can take it back."""
        count = self._windows[state.layer_id].overflow(state.window.tokens)
        state.sealed = Sealed([len(table) for table in state.tables], state.sealed_end, None)
        if count and state.sliding is None:
            new = self._new(state.window.oldest(count * self._size), state.sealed_end)
            state.sealed.leaving = self._place_prompt(state, new, step_id)
        state.window.settle(count * self._size)
        state.sealed_end += count * self._size

    def _place_prompt(self, state: LayerState, new: _New, step_id: int | None) -> Leaving | None:
        """Writes new blocks where nothing is; returns what must wait until the step is committed."""
        reserved, state.reserved = state.reserved, None
        assert reserved is not None
        count, table = len(new.start), state.tables[0]
        if reserved.grows == count:
            self._place(state, 0, new, reserved.device, step_id)
            return None
        held, over = len(table), count - reserved.grows
        if reserved.victim is not None:
            losers = [reserved.victim.read()]
        elif held == 0 and count == over:
            losers = list(range(count))
        else:
            assert self._importance is not None and new.importance is not None
            competing = torch.cat([self._importance.tensor.index_select(0, table.row_tensor), new.importance])
            losers = budget.least_important(competing, over).tolist()
        old = sorted(i for i in losers if i < held)
        lost = sorted(i - held for i in losers if i >= held)
        come = sorted(set(range(count)).difference(lost))
        now, late = come[: reserved.grows], come[reserved.grows :]
        if now:
            self._place(state, 0, new.pick(now), reserved.device, step_id)
        for tier, places in _by_tier(reserved.below[len(old) :]).items():
            self._place(state, tier, new.pick([lost[i] for i, _ in places]), [b for _, b in places], step_id)
        comes = new.pick(late)
        fields = self._compressor.encode(comes.k, comes.v) if late else {}
        importance = comes.k.new_zeros(0) if comes.importance is None else comes.importance.clone()
        below = reserved.below[: len(old)]
        return Leaving(len(lost), old, below, reserved.claims, fields, comes.start, comes.label, importance)

    def finish(self, state: LayerState) -> None:
        """Makes a seal final."""
        sealed, state.sealed = state.sealed, None
        state.window.commit()
        if sealed is None or sealed.leaving is None:
            return
        leaving, table = sealed.leaving, state.tables[0]
        self._count(leaving.lost)
        targets: Sequence[tuple[int, int] | None] = leaving.below or [None] * len(leaving.entries)
        gone = [(state, entry, below) for entry, below in zip(leaving.entries, targets, strict=True)]
        ids = self._displace(gone, leaving.claims)
        if len(ids):
            at = on_device(ids, table.pool.device)
            for name, encoded in leaving.fields.items():
                table.pool.fields[name].index_copy_(0, at, encoded)
            table.pool.describe(at, leaving.start, leaving.label)
            self._enter(state, 0, ids, leaving.importance, None)

    def undo(self, state: LayerState) -> None:
        """Takes back what a step has brought to a layer."""
        sealed, state.sealed = state.sealed, None
        if sealed is not None:
            for table, length in zip(state.tables, sealed.tables, strict=True):
                table.pool.free(table.remove(range(length, len(table))))
            state.sealed_end = sealed.sealed_end
            if sealed.leaving is not None:
                self._tiers[0].claims -= sealed.leaving.claims
                self._free_below(sealed.leaving.below)
        self.give_back(state)
        state.window.discard()
        state.staged = 0

    # ---- one block each

    def seal_full(self, states: Sequence[LayerState], step_id: int | None) -> None:
        """Seals the oldest block of each of these states, whose windows are full, all at once."""
        by_memory: dict[int, list[LayerState]] = defaultdict(list)
        for state in states:
            by_memory[id(state.window.buffer.memory)].append(state)
        for group in by_memory.values():
            memory = group[0].window.buffer.memory
            layers = on_device([state.window.buffer.index for state in group], memory.k.device)
            slots = on_device([state.window.index for state in group], memory.k.device)
            if memory.sliding is None:
                self._place_full(group, memory, layers, slots, step_id)
            memory.drop_block(layers, slots)
            for state in group:
                state.window.held -= self._size
                state.sealed_end += self._size

    def _place_full(
        self, states: list[LayerState], memory: WindowMemory, layers: Tensor, slots: Tensor, step_id: int | None
    ) -> None:
        raw = memory.at(layers, slots, memory.sinks, memory.sinks + self._size)
        starts = on_device([state.sealed_end for state in states], raw.k.device)
        new = _New(raw.k, raw.v, starts, self._label(raw.expert_ids, raw.weights), raw.importance)
        targets: dict[int, list[tuple[int, int]]] = defaultdict(list)  # tier: which of the states, block id
        displaced, claims = [], 0
        for i, state in enumerate(states):
            reserved, state.reserved = state.reserved, None
            assert reserved is not None
            if reserved.victim is not None:
                below = reserved.below[0] if reserved.below else None
                displaced.append((i, (state, reserved.victim.read(), below)))
                claims += reserved.claims
            elif reserved.grows:
                targets[0].append((i, reserved.device[0]))
            else:
                self._count(1)
                for tier, block_id in reserved.below:
                    targets[tier].append((i, block_id))
        if displaced:
            ids = self._displace([gone for _, gone in displaced], claims)
            targets[0] += [(i, block_id) for (i, _), block_id in zip(displaced, ids, strict=True)]
        for tier, found in targets.items():
            here = new.pick([i for i, _ in found])
            self._write(tier, here, [block_id for _, block_id in found])
            rows = [row for i, block_id in found for row in states[i].tables[tier].extend([block_id])]
            self._receive(rows, here.importance)
            for i, block_id in found:
                self._tell(states[i], tier, [block_id], step_id)

    # ---- placing

    def _displace(self, leaving: Sequence[tuple[LayerState, int, tuple[int, int] | None]], claims: int) -> list[int]:
        """Takes entries out of device tables, to a lower tier or away: (state, entry, where to). An entry of a state
        must be its only one here, or all of them ascend. claims: of all of them, which end here.

        Returns: a block of the device for what comes in the place of each: its own, or another where others share that.
        """
        pool = self._tiers[0]
        self._count(len(leaving))
        down: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)  # tier: ids and rows, from and to
        for state, entry, below in leaving:
            table = state.tables[0]
            source = Blocks(state.request_id, state.layer_id, (table.ids[entry],), pool)
            if below is None:
                for listener in self._listeners:
                    listener.evicted(source)
                continue
            tier, block_id = below
            rows = state.tables[tier].extend([block_id])
            down[tier].append((table.ids[entry], block_id, table.rows[entry], rows[0]))
        for tier, moves in down.items():
            source_ids, target_ids, source_rows, target_rows = torch.tensor(moves).unbind(1)
            self._tiers[tier].copy_from(target_ids, pool, source_ids)
            assert self._importance is not None
            received = self._importance.tensor
            received[target_rows.to(received.device)] = received[source_rows.to(received.device)]
        if self._listeners:
            for state, entry, below in leaving:
                if below is not None:
                    names = state.request_id, state.layer_id
                    source = Blocks(*names, (state.tables[0].ids[entry],), pool)
                    for listener in self._listeners:
                        listener.moved(source, Blocks(*names, (below[1],), self._tiers[below[0]]))
        pool.claims -= claims
        given = []
        for state, entry, _ in reversed(leaving):
            (block_id,) = state.tables[0].remove([entry])
            if pool.is_shared(block_id):
                pool.free([block_id])
                (block_id,) = pool.allocate(1)
            given.append(block_id)
        return given[::-1]

    def _place(self, state: LayerState, tier: int, new: _New, ids: list[int], step_id: int | None) -> None:
        """Writes new blocks to `ids` of a tier and enters them in the request's table."""
        self._write(tier, new, ids)
        self._enter(state, tier, ids, new.importance, step_id)

    def _write(self, tier: int, new: _New, ids: list[int]) -> None:
        pool = self._tiers[tier]
        at = on_device(ids, pool.device)
        self._compressor.write(pool.fields, at, new.k, new.v)
        pool.describe(at, new.start, new.label)

    def _enter(
        self, state: LayerState, tier: int, ids: list[int], importance: Tensor | None, step_id: int | None
    ) -> None:
        self._receive(state.tables[tier].extend(ids), importance)
        self._tell(state, tier, ids, step_id)

    def _receive(self, rows: list[int], importance: Tensor | None) -> None:
        """Writes the importance of new entries."""
        if self._importance is not None and importance is not None:
            self._importance.tensor.index_copy_(0, on_device(rows, self._importance.tensor.device), importance)

    def _tell(self, state: LayerState, tier: int, ids: list[int], step_id: int | None) -> None:
        for listener in self._listeners:
            listener.sealed(step_id, Blocks(state.request_id, state.layer_id, tuple(ids), self._tiers[tier]))

    def _new(self, raw: RawTokens, start: int) -> _New:
        count = raw.tokens // self._size
        k, v = (x.unflatten(1, (count, self._size)).transpose(0, 1) for x in (raw.k, raw.v))
        starts = torch.arange(start, start + raw.tokens, self._size, device=k.device)
        importance = None if raw.importance is None else raw.importance.unflatten(0, (count, self._size))
        ids, weights = (x.unflatten(0, (count, self._size)) for x in (raw.expert_ids, raw.weights))
        return _New(k, v, starts, self._label(ids, weights), importance)

    def _label(self, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """The expert with the largest gate weight summed over each block's tokens [blocks, block_size, topk]; 0 where
        nothing was observed.
        """
        votes = weights.new_zeros(weights.shape[0], self._experts)
        votes.scatter_add_(1, expert_ids.flatten(1), weights.flatten(1))
        return votes.argmax(1)

    def _count(self, blocks: int) -> None:
        if self._demotes:
            self.demoted += blocks
        else:
            self.dropped += blocks


def _by_tier(places: Sequence[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    """Places (tier, block id) as tier: (which of them, block id)."""
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for i, (tier, block_id) in enumerate(places):
        found[tier].append((i, block_id))
    return found
