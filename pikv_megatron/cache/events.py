"""What a cache tells its listeners (`CacheEvents`), and a host's collectives theirs (`CollectiveEvents`): the two
interfaces that a streamer, a sharder and an overlap listen to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from pikv_megatron.tiers.blocks import BlockPool, Place

if TYPE_CHECKING:
    from pikv_megatron.cache.step import Step


@dataclass(frozen=True)
class Blocks:
    """Blocks of one layer of one request that are in one place, as they are stored there. Good until the call that
    hands them over returns; `fields` copies what is to be kept.
    """

    request_id: int
    layer_id: int
    ids: tuple[int, ...]
    pool: BlockPool

    @property
    def place(self) -> Place:
        return self.pool.place

    @property
    def start(self) -> Tensor:
        """Position of each block's first token: [blocks] int64."""
        return self.pool.start[list(self.ids)]

    @property
    def label(self) -> Tensor:
        """Each block's expert: [blocks] int64."""
        return self.pool.label[list(self.ids)]

    def fields(self) -> dict[str, Tensor]:
        """The encoded rows, by the names of `Compressor.fields`, with a leading dimension of blocks: copies."""
        return {name: tensor[list(self.ids)] for name, tensor in self.pool.fields.items()}


class CacheEvents:
    """A listener to a cache, which hears nothing it does not override. None of these may raise: what they hear has
    happened.

    What is appended and sealed under a step_id is provisional until `committed`, and void when `aborted`. Calls outside
    of a step (`PiKVCache.append` and its like) have step_id None and are final at once.
    """

    def appended(self, step_id: int | None, layer_id: int, step: Step, k: Tensor, v: Tensor) -> None:
        """New tokens of a layer, in the packed order of the step: k, v [tokens, num_query_groups, channels]."""

    def sealed(self, step_id: int | None, blocks: Blocks) -> None:
        """Blocks were written. What a budget forgets at once is never written, and not told."""

    def committed(self, step_id: int) -> None:
        """The step stays."""

    def aborted(self, step_id: int) -> None:
        """The step has not happened."""

    def moved(self, blocks: Blocks, target: Blocks) -> None:
        """Blocks are in another place now; `target` names as many there, in the same order."""

    def evicted(self, blocks: Blocks) -> None:
        """A budget forgets blocks: the request no longer has them. Called before their memory is used again."""

    def released(self, request_id: int) -> None:
        """The request is over."""

    def forked(self, source: int, target: int) -> None:
        """Request `target` has begun with all that `source` holds."""

    def reordered(self, request_ids: Sequence[int], sources: Sequence[int]) -> None:
        """Each of these requests goes on from what the request beside it in `sources` held."""

    def cropped(self, request_id: int, length: int) -> None:
        """The request's tokens from position `length` on are forgotten."""


CollectiveKind = Literal["dispatch", "combine"]


class CollectiveEvents(Protocol):
    """A listener to the all-to-all (or all-gather) of a host's MoE layers."""

    def started(self, layer_id: int, kind: CollectiveKind, nbytes: int) -> None:
        """Tokens leave for their experts (dispatch), or come back (combine); nbytes: what this rank hands over."""

    def finished(self, layer_id: int, kind: CollectiveKind) -> None:
        """They have arrived."""
