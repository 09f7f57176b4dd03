"""What a cache holds of one request: `Request`, and `LayerState`, its raw tokens and sealed blocks in one layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_megatron.cache.window import LayerWindow
from pikv_megatron.tiers.blocks import BlockTable

Routing = dict[int, tuple[int, Tensor, Tensor]]
"""Of one request, per MoE layer: length when it was observed, expert_ids and weights of the newest tokens then."""


class OnHost:
    """Numbers [n] that are computed on the device and wanted on the host later: nothing waits until they are read."""

    def __init__(self, numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._copy.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._copy = numbers

    def read(self) -> list[int]:
        """The numbers. On a GPU this waits for them, if it comes early."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()

    def __reduce__(self) -> tuple[type[OnHost], tuple[Tensor]]:
        return OnHost, (torch.tensor(self.read()),)


class Victim(NamedTuple):
    """An entry of a table, one of those that were chosen together."""

    chosen: OnHost
    which: int

    def read(self) -> int:
        return self.chosen.read()[self.which]


@dataclass
class Reservation:
    """Memory for the next seal of a layer of a request.

    device: blocks there for the entries that the device's table will grow by. claims: in the place of how many of its
    blocks it may ask for others, since they are shared. below: where what leaves the device goes, as (tier, block id).
    victim: the entry of the device's table that a single new block takes the place of.
    """

    device: list[int]
    claims: int
    below: list[tuple[int, int]]
    victim: Victim | None = None

    @property
    def grows(self) -> int:
        return len(self.device)


@dataclass
class Leaving:
    """What sealing does to blocks that a step must not touch before it is committed.

    lost: new blocks that did not stay on the device. entries: of the device's table, that leave. below: where they go,
    as (tier, block id); empty: nowhere. claims: as in `Reservation`. The rest are the blocks that come: encoded fields
    with start, label, importance [n], n = 0 where none comes.
    """

    lost: int
    entries: list[int]
    below: list[tuple[int, int]]
    claims: int
    fields: dict[str, Tensor]
    start: Tensor
    label: Tensor
    importance: Tensor


@dataclass
class Sealed:
    """A seal that is not committed: how long each table was before it, and what is to leave."""

    tables: list[int]
    sealed_end: int
    leaving: Leaving | None


@dataclass
class LayerState:
    """One layer of one request: its raw tokens and its blocks in each tier."""

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
    committed: int = 0
    """Positions appended so far, without those of a step that is not committed."""
    staged: int = 0
    """Positions that a step has appended, until it is committed."""
    reserved: Reservation | None = None
    sealed: Sealed | None = None
    """A seal that the step has made, until it is committed."""

    @property
    def waiting_bytes(self) -> int:
        """Bytes of what waits, raw or sealed, beside the window's buffer and the tiers."""
        leaving = self.sealed.leaving if self.sealed else None
        come = () if leaving is None else (*leaving.fields.values(), leaving.start, leaving.label, leaving.importance)
        return self.window.waiting_bytes + sum(t.untyped_storage().nbytes() for t in come)

    @property
    def length(self) -> int:
        """Positions appended so far."""
        return self.committed + self.staged

    def newest_is_sealed(self, tokens: int = 1) -> bool:
        """Whether some of the newest `tokens` tokens are in blocks already."""
        return self.sinks < self.sealed_end and self.length - tokens < self.sealed_end


@dataclass
class Request:
    """One request: its slot in every layer's window buffer, and its state in each layer."""

    slot: int
    layers: list[LayerState]
    routing: Routing = field(default_factory=dict)
