"""The steps of a cache: beginning one, and what becomes of the one before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pikv_megatron.cache import checks
from pikv_megatron.cache.attention import Attention
from pikv_megatron.cache.events import CacheEvents
from pikv_megatron.cache.interrupts import uninterrupted
from pikv_megatron.cache.requests import Requests
from pikv_megatron.cache.sealing import Needed, Sealer
from pikv_megatron.cache.step import ActiveStep, Step
from pikv_megatron.codecs.compressor import Compressor
from pikv_megatron.config import ModelConfig, RuntimeConfig
from pikv_megatron.device_numbers import DeviceNumbers
from pikv_megatron.torch_mode import keeps_tensors


class Steps:
    """Begins steps, commits and discards them. What a step needs of the cache, it finds here."""

    def __init__(
        self,
        model: ModelConfig,
        runtime: RuntimeConfig,
        compressor: Compressor,
        table: Requests,
        sealer: Sealer,
        attention: Attention,
        numbers: DeviceNumbers,
        listeners: Sequence[CacheEvents],
    ) -> None:
        self.model, self.runtime, self.compressor = model, runtime, compressor
        self.sealer, self.attention, self.numbers, self.listeners = sealer, attention, numbers, listeners
        self.active: ActiveStep | None = None
        """The step that has begun last, until it is committed or discarded."""
        self._table, self._begun = table, 0

    def begin(self, step: Step) -> ActiveStep:
        """See PiKVCache.begin."""
        self._settle_before(step)
        tokens: dict[int, int] = {}
        for segment in step.segments:
            request = self._table.live.get(segment.request_id)
            for layer_id in range(self.model.num_layers) if request else ():
                length = request.layers[layer_id].length if request else 0
                checks.check_start(segment.start, length, segment.request_id, layer_id)
            if request is None:
                checks.check_start(segment.start, 0, segment.request_id, 0)
            tokens[segment.request_id] = segment.tokens
        needed = self.check_room(tokens, range(self.model.num_layers), "in every layer")
        created = [request_id for request_id in tokens if request_id not in self._table.live]
        for request_id in created:
            self._table.create(request_id)
        requests = [self._table.live[request_id] for request_id in tokens]
        states = [state for request in requests for state in request.layers]
        for state in states:
            if state.reserved is not None or state.sliding is not None:
                self.sealer.seal(state)  # what calls outside of steps have left over
        self.sealer.reserve(list(zip(states, needed, strict=True)))
        self._begun += 1
        self.active = ActiveStep(self, self._begun, step, requests, created)
        return self.active

    def _settle_before(self, step: Step) -> None:
        """Commits or discards the step before `step`."""
        active = self.active
        if active is None:
            return
        starts = {segment.request_id: segment.start for segment in step.segments}
        again = any(starts.get(segment.request_id) == segment.start for segment in active.step.segments)
        if active.complete and not again:
            self._commit(active)
        else:
            self._discard(active)

    def settle(self, changes: bool = False) -> None:
        """Before a call outside of the step: commits it if it has reached its end, discards it if it was aborted. One
        that is running is discarded by what changes the cache, and left alone by what reads it.
        """
        active = self.active
        if active is None:
            return
        if active.complete:
            self._commit(active)
        elif changes or not active.running:
            self._discard(active)

    @keeps_tensors
    def _commit(self, active: ActiveStep) -> None:
        with uninterrupted():
            active.close()
            self.active = None
            full = []
            for request in active.requests:
                for state in request.layers:
                    self.sealer.finish(state)
                    state.committed, state.staged = state.committed + state.staged, 0
                    if state.window.held == state.window.buffer.capacity:
                        full.append(state)
            if full:
                self.sealer.seal_full(full, active.step_id)
            for listener in self.listeners:
                listener.committed(active.step_id)

    @keeps_tensors
    def _discard(self, active: ActiveStep) -> None:
        with uninterrupted():
            self.active = None
            for undo in reversed(active.undo):
                undo()
            for request in active.requests:
                for state in request.layers:
                    self.sealer.undo(state)
            for request_id in active.created:
                self._table.forget(request_id)
            for listener in self.listeners:
                listener.aborted(active.step_id)

    def check_room(self, tokens: Mapping[int, int], layers: Sequence[int], where: str) -> list[Needed]:
        """Checks that so many tokens of each request fit these layers. Returns what each layer of each request needs.

        Raises PoolFullError: they do not.
        """
        self._table.check_slots([request_id for request_id in tokens if request_id not in self._table.live])
        needed = []
        for request_id, count in tokens.items():
            request = self._table.live.get(request_id)
            for layer_id in layers:
                state = None if request is None else request.layers[layer_id]
                needed.append(self.sealer.needed(layer_id, state, count))
        what = f"{sum(tokens.values())} tokens of {len(tokens)} requests {where}"
        self.sealer.check_room(needed, what)
        return needed
