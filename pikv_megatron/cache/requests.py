"""The live requests of a cache: which slot, windows and blocks each has; making, copying, cutting and ending them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

from pikv_megatron.cache import checks
from pikv_megatron.cache.events import CacheEvents
from pikv_megatron.cache.layout import gather_decoded
from pikv_megatron.cache.sealing import Needed, Sealer
from pikv_megatron.cache.state import LayerState, Request, Reservation
from pikv_megatron.cache.window import LayerWindow, RawTokens, WindowBuffer
from pikv_megatron.codecs.compressor import Compressor
from pikv_megatron.config import RuntimeConfig
from pikv_megatron.tiers import Tier
from pikv_megatron.tiers.blocks import BlockTable, ImportanceRows, PoolFullError


class Requests:
    """The table of live requests by id."""

    def __init__(
        self,
        runtime: RuntimeConfig,
        compressor: Compressor,
        tiers: Sequence[Tier],
        windows: list[WindowBuffer],
        sealer: Sealer,
        importance: ImportanceRows | None,
        listeners: Sequence[CacheEvents],
    ) -> None:
        self._runtime, self._compressor, self._importance = runtime, compressor, importance
        self._tiers, self._windows, self._sealer, self._listeners = tiers, windows, sealer, listeners
        self.live: dict[int, Request] = {}
        self._free_slots = list(range(runtime.max_requests))  # a heap: the lowest is taken first

    # ---- finding and making

    def get(self, request_id: int) -> Request:
        """A live request; raises UnknownRequestError."""
        checks.check_request_id(request_id)
        if request_id not in self.live:
            raise checks.UnknownRequestError(f"request {request_id} does not exist; live requests: {sorted(self.live)}")
        return self.live[request_id]

    def get_each(self, request_ids: Sequence[int], tokens: int) -> list[Request]:
        """Distinct live requests, one per token."""
        if len(request_ids) != tokens or len(set(request_ids)) != tokens:
            raise ValueError(f"request_ids: expected {tokens} different ones, one per token, got {list(request_ids)}")
        return [self.get(request_id) for request_id in request_ids]

    def check_slots(self, new: Sequence[int]) -> None:
        """Raises PoolFullError where there are not slots enough for these new requests."""
        if len(new) > len(self._free_slots):
            names = ", ".join(map(str, new))
            raise PoolFullError(
                f"max_requests: {len(self.live)} of {self._runtime.max_requests} requests are live, no room for "
                f"request {names}"
            )

    def create(self, request_id: int) -> Request:
        """A new request without tokens; raises PoolFullError where there is no slot."""
        self.check_slots([request_id])
        slot = heapq.heappop(self._free_slots)
        for memory in {id(window.memory): window.memory for window in self._windows}.values():
            memory.clear_labels(slot)
        layers = [
            LayerState(
                request_id,
                layer_id,
                LayerWindow(window, slot),
                [BlockTable(pool, self._importance) for pool in self._tiers],
                window.sinks,
                window.sliding,
                sealed_end=window.sinks,
            )
            for layer_id, window in enumerate(self._windows)
        ]
        self.live[request_id] = Request(slot, layers)
        return self.live[request_id]

    # ---- ending

    def release(self, request_id: int) -> None:
        """Ends a request and frees its memory."""
        self.forget(request_id)
        for listener in self._listeners:
            listener.released(request_id)

    def forget(self, request_id: int) -> None:
        """`release` of a request that nobody has heard of yet."""
        self._drop(self.get(request_id))
        del self.live[request_id]

    def _drop(self, request: Request) -> None:
        for state in request.layers:
            self._sealer.give_back(state)
            for table in state.tables:
                table.pool.free(table.clear())
        heapq.heappush(self._free_slots, request.slot)

    def _blocks_of(self, request: Request, tier: int) -> list[int]:
        """A request's blocks in a tier, reserved ones included."""
        reserved = [state.reserved for state in request.layers if state.reserved]
        ids = [block_id for state in request.layers for block_id in state.tables[tier].ids]
        if tier == 0:
            return ids + [block_id for r in reserved for block_id in r.device]
        return ids + [block_id for r in reserved for at, block_id in r.below if at == tier]

    # ---- copying

    def fork(self, source: int, target: int) -> None:
        """See PiKVCache.fork."""
        original = self.get(source)
        checks.check_request_id(target)
        if target in self.live:
            raise ValueError(f"target: expected a request that does not exist yet, {target} is live")
        self.check_slots([target])
        self._sealer.check_room([self._copied(original, 1)], f"fork of request {source}", self._owned(original))
        self._copy(original, target)
        for listener in self._listeners:
            listener.forked(source, target)

    def reorder(self, request_ids: Sequence[int], sources: Sequence[int]) -> None:
        """See PiKVCache.reorder."""
        requests = dict(zip(request_ids, self.get_each(request_ids, len(request_ids)), strict=True))
        if len(sources) != len(request_ids) or not requests.keys() >= set(sources):
            raise ValueError(f"sources: expected one of {list(request_ids)} for each of them, got {list(sources)}")
        for source in sources:
            checks.check_request_id(source)
        goes_to = {source: [t for t, s in zip(request_ids, sources, strict=True) if s == source] for source in sources}
        unused = [requests[r] for r in request_ids if r not in goes_to]
        needed = [self._copied(requests[s], len(to) - 1) for s, to in goes_to.items()]
        owners = sum((len(to) - 1) * self._owned(requests[s]) for s, to in goes_to.items())
        for tier, pool in enumerate(self._tiers):
            given = [block_id for request in unused for block_id in self._blocks_of(request, tier)]
            freed = pool.freed_by(given)
            if tier == 0:
                claims = sum(state.reserved.claims for r in unused for state in r.layers if state.reserved)
                needed.append(Needed(0, -freed, -claims, 0))
                owners -= len(given) - freed
            else:
                needed.append(Needed(0, 0, 0, -freed))
        self._sealer.check_room(needed, f"reorder of requests {list(request_ids)}", owners)
        for request in unused:
            self._drop(request)
        for request_id in request_ids:
            del self.live[request_id]
        for source, targets in goes_to.items():
            keeper = source if source in targets else targets[0]
            self.live[keeper] = requests[source]
            for state in requests[source].layers:
                state.request_id = keeper
        for source, targets in goes_to.items():
            for target in targets:
                if target not in self.live:
                    self._copy(requests[source], target)
        for pool in self._tiers:
            pool.generation += 1
        for listener in self._listeners:
            listener.reordered(request_ids, sources)

    def _copied(self, request: Request, copies: int) -> Needed:
        """What copies of a request need for the seals that wait: what is reserved for it, and claims of it and of each
        copy to others in the place of the blocks that they will share.
        """
        device = claims = below = 0
        for state in request.layers:
            if copies and (reserved := state.reserved) is not None:
                device += copies * len(reserved.device)
                claims += (copies + 1) * self._replaced(state) - reserved.claims
                below += copies * len(reserved.below)
        return Needed(0, device, claims, below)

    def _owned(self, request: Request) -> int:
        """Blocks on the device that a copy of a request will share with it."""
        return sum(len(state.tables[0]) for state in request.layers)

    def _replaced(self, state: LayerState) -> int:
        """Entries of the device's table whose places the next seal may take."""
        count = self._windows[state.layer_id].overflow(state.window.tokens)
        assert state.reserved is not None
        return min(count - state.reserved.grows, len(state.tables[0]))

    def _copy(self, original: Request, request_id: int) -> None:
        copy = self.create(request_id)
        copy.routing = {i: (n, ids.clone(), weights.clone()) for i, (n, ids, weights) in original.routing.items()}
        for ours, theirs in zip(copy.layers, original.layers, strict=True):
            ours.window.copy_from(theirs.window)
            ours.committed, ours.sealed_end = theirs.committed, theirs.sealed_end
            if (reserved := theirs.reserved) is not None:
                device = self._tiers[0].allocate(reserved.grows)
                below = self._sealer.allocate_below(len(reserved.below))
                claims = self._replaced(theirs)
                self._tiers[0].claims += 2 * claims - reserved.claims
                reserved.claims = claims
                ours.reserved = Reservation(device, claims, below, reserved.victim)
            for mine, table in zip(ours.tables, theirs.tables, strict=True):
                table.pool.share(table.ids)
                rows = mine.extend(table.ids)
                if self._importance is not None and rows:
                    received = self._importance.tensor
                    received[torch.tensor(rows)] = received[torch.tensor(table.rows)]

    # ---- cutting

    def shortest_crop(self, request_id: int) -> int:
        """See PiKVCache.shortest_crop."""
        least = 1
        for state in self.get(request_id).layers:
            if state.sliding is not None:
                leaving = self._windows[state.layer_id].overflow(state.window.tokens) * self._runtime.block_size
                first = state.sealed_end + leaving  # the oldest position that is held once these are forgotten
                least = max(least, first + state.sliding) if first else least
        return least

    def crop(self, request_id: int, length: int) -> None:
        """See PiKVCache.crop."""
        request = self.get(request_id)
        longest, least = min(state.length for state in request.layers), self.shortest_crop(request_id)
        if isinstance(length, bool) or not isinstance(length, int) or not least <= length <= longest:
            raise ValueError(
                f"length: expected {least} .. {longest} for request {request_id} (what its sliding-window layers still "
                f"reach, and what every layer has), got {length!r}"
            )
        for state in request.layers:
            if length < state.length:
                self._crop_layer(state, length)
        request.routing.clear()  # no layer has tokens to come that were observed already
        for listener in self._listeners:
            listener.cropped(request_id, length)

    def _crop_layer(self, state: LayerState, length: int) -> None:
        self._sealer.seal(state)  # nothing waits then, and nothing is reserved
        if length >= state.sealed_end:
            state.window.keep(state.window.tokens - (state.length - length))
        else:
            state.window.keep(min(length, state.sinks))
            state.sealed_end = self._cut_blocks(state, max(length, state.sinks))
        state.committed = length

    def _cut_blocks(self, state: LayerState, end: int) -> int:
        """Frees the blocks that reach beyond position `end`. One that begins before it goes back to the window.

        Returns: the position where the window goes on.
        """
        size, goes_on = self._runtime.block_size, end
        for table in state.tables:
            starts = table.pool.start[table.tensor].tolist()
            leaving = [entry for entry, start in enumerate(starts) if start + size > end]
            for entry in leaving:
                if starts[entry] < end:
                    self._reopen(state.window, table, entry, end - starts[entry])
                    goes_on = starts[entry]
            table.pool.free(table.remove(leaving))
        return goes_on

    def _reopen(self, window: LayerWindow, table: BlockTable, entry: int, count: int) -> None:
        """Decodes the first `count` tokens of a table's block into a window."""
        pool, block_id = table.pool, table.ids[entry]
        block = BlockTable(pool)
        block.extend([block_id])
        device = self._runtime.torch_device
        k, v, _ = (x[:count] for x in gather_decoded([block], self._compressor, device))
        expert_ids = pool.label[block_id].to(device).expand(count, window.topk)
        weights = torch.zeros(count, window.topk, device=device)
        weights[:, 0] = 1.0
        received = None if table.importance is None else table.importance.tensor[table.rows[entry], :count]
        window.extend(RawTokens(k.transpose(0, 1), v.transpose(0, 1), expert_ids, weights, received))
