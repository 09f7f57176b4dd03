"""Where sealed blocks are: `BlockPool` (the memory of one tier, allocated and touched once, with a free list) and
`BlockTable` (which blocks of a pool belong to one layer of one request). Neither knows what a block's bytes mean;
`Compressor` does.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def keeps_tensors(method: Callable[P, R]) -> Callable[P, R]:
    """For methods that keep tensors: no gradients, and no inference tensors, which could not be written to outside of
    inference mode. A host may be in it in one call and not in the next.
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)  # as it should be: a decode step spares itself the context managers
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return call


class Field(NamedTuple):
    """One tensor of a stored block, without the leading dimension of blocks (of a request's window, without slots)."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


BOOKKEEPING_BYTES = 48
"""What a pool's Python lists take in host memory for each block: an int in that of free blocks, and two references."""


def whole_block(fields: Mapping[str, Field], block_size: int, importance: bool) -> dict[str, Field]:
    """Every tensor that a BlockPool keeps for a block: the encoded `fields`, and what describes them."""
    extra = {"start": Field((), torch.int64), "label": Field((), torch.int64)}
    if importance:
        extra["importance"] = Field((block_size,), torch.float32)
    return {**fields, **extra}


class PoolFullError(RuntimeError):
    """A pool has fewer free blocks than are needed. Nothing was changed."""


class BlockPool:
    """Fixed memory for `num_blocks` blocks, one tensor per field, and their labels.

    Beside the encoded fields each block has `start` (position of its first token), `label` (its expert) and, where
    `importance` is asked for, the accumulated importance of its tokens.
    """

    def __init__(
        self,
        kind: str,
        num_blocks: int,
        block_size: int,
        fields: Mapping[str, Field],
        device: torch.device,
        importance: bool,
    ) -> None:
        self.kind, self.num_blocks, self.block_size, self.device = kind, num_blocks, block_size, device
        pinned = kind == "host" and torch.cuda.is_available()
        touched = {
            name: torch.zeros(num_blocks, *field.shape, dtype=field.dtype, device=device, pin_memory=pinned)
            for name, field in whole_block(fields, block_size, importance).items()
        }
        self.fields = {name: touched[name] for name in fields}
        self.start, self.label, self.importance = touched["start"], touched["label"], touched.get("importance")
        self._free = list(range(num_blocks))  # a heap: the lowest id is taken first
        self._references = [0] * num_blocks
        self.generation = 0
        """Grows whenever a block is written, shared or freed, or its request gets another name: what was known of the
        pool's blocks before may not be so now.
        """

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the pool by name, labels included."""
        extra = {"start": self.start, "label": self.label}
        if self.importance is not None:
            extra["importance"] = self.importance
        return {**self.fields, **extra}

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def used_blocks(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def shared_blocks(self) -> int:
        """Blocks with more than one owner."""
        return sum(references > 1 for references in self._references)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, summed over the storage of its rows."""
        return sum(t[0].numel() * t.element_size() for t in self.tensors.values())

    @property
    def allocated_bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())

    def check_free(self, blocks: int, what: str) -> None:
        """Raises PoolFullError where fewer than `blocks` are free."""
        if blocks > len(self._free):
            raise PoolFullError(
                f"{what}: needs {blocks} blocks of {self.block_size} tokens in the {self.kind} tier, "
                f"{len(self._free)} of {self.num_blocks} are free; release requests or raise max_tokens "
                "(tiers[].bytes, where it is set)"
            )

    def allocate(self, blocks: int) -> list[int]:
        """Takes `blocks` ids, lowest first, so that what is sealed together lies together."""
        self.check_free(blocks, "allocate")
        ids = [heapq.heappop(self._free) for _ in range(blocks)]
        for block_id in ids:
            self._references[block_id] = 1
        return ids

    def share(self, ids: Iterable[int]) -> None:
        """Counts one more owner of each of these blocks, which all must be allocated. Nobody may write to them then."""
        self.generation += 1
        for block_id in ids:
            self._references[block_id] += 1

    def free(self, ids: Iterable[int]) -> None:
        """Gives blocks back; one with several owners is free when the last has given it back.

        Raises ValueError for one that is not allocated; those before it are given back then.
        """
        self.generation += 1
        for block_id in ids:
            if not 0 <= block_id < self.num_blocks or not self._references[block_id]:
                raise ValueError(f"block {block_id} of the {self.kind} tier is not allocated")
            self._references[block_id] -= 1
            if not self._references[block_id]:
                heapq.heappush(self._free, block_id)

    def freed_by(self, ids: Iterable[int]) -> int:
        """How many blocks would be free if these were given back (one that is named twice, twice)."""
        return sum(count == self._references[block_id] for block_id, count in Counter(ids).items())

    def describe(self, ids: Tensor, start: Tensor, label: Tensor, importance: Tensor | None) -> None:
        """Says what the n blocks `ids` [n] hold, whose fields the caller writes: start, label [n], importance [n,
        block_size] or None.
        """
        self.generation += 1
        self.start.index_copy_(0, ids, start.to(self.device))
        self.label.index_copy_(0, ids, label.to(self.device))
        if self.importance is not None and importance is not None:
            self.importance.index_copy_(0, ids, importance.to(self.device))

    def copy_from(self, ids: Tensor, other: BlockPool, other_ids: Tensor) -> None:
        """Copies blocks `other_ids` [n] of `other` to `ids` [n], labels included."""
        self.generation += 1
        for name, tensor in self.tensors.items():
            source = other.tensors[name].index_select(0, other_ids.to(other.device))
            tensor.index_copy_(0, ids.to(self.device), source.to(self.device))


class BlockTable:
    """The blocks of one layer of one request in one pool: ids as a list for the host, as a tensor for the ops.

    The two always agree: a block whose contents are replaced in place keeps its id.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.ids: list[int] = []
        self._tensor = torch.zeros(min(pool.num_blocks, 64), dtype=torch.int64, device=pool.device)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tensor(self) -> Tensor:
        """Block ids [len(self)], int64."""
        return self._tensor[: len(self.ids)]

    def extend(self, ids: list[int]) -> None:
        first, last = len(self.ids), len(self.ids) + len(ids)
        if last > self._tensor.shape[0]:
            grown = self._tensor.new_zeros(max(last, 2 * self._tensor.shape[0]))
            grown[:first] = self._tensor[:first]
            self._tensor = grown
        if len(ids) == 1:
            self._tensor[first] = ids[0]
        elif ids:
            self._tensor[first:last] = torch.tensor(ids, dtype=torch.int64).to(self._tensor.device)
        self.ids.extend(ids)

    def remove(self, ids: set[int]) -> None:
        """Forgets `ids` (the caller frees them in the pool)."""
        kept = [block_id for block_id in self.ids if block_id not in ids]
        self.ids = []
        self.extend(kept)

    def clear(self) -> list[int]:
        ids, self.ids = self.ids, []
        return ids
