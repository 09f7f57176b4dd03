"""Where sealed blocks are: `BlockPool` (the memory of one tier, allocated and touched once, with a free list) and
`BlockTable` (which blocks of a pool belong to one layer of one request). Neither knows what a block's bytes mean;
`Compressor` does.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pikv_megatron.device_numbers import on_device


class Place(NamedTuple):
    """Where a block is: the rank of the expert-parallel group, the tier's kind there, and the format it is stored in.
    There is one pool for each place.
    """

    rank: int
    tier: str
    format: str


class Field(NamedTuple):
    """One tensor of a stored block, without the leading dimension of blocks (of a request's window, without slots)."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


BOOKKEEPING_BYTES = 48
"""What a pool's Python lists take in host memory for each block: an int in that of free blocks, and two references."""
ROW_BOOKKEEPING_BYTES = 40
"""The same for a row of importance: an int in the list of free rows, and its reference."""


def whole_block(fields: Mapping[str, Field]) -> dict[str, Field]:
    """Every tensor that a BlockPool keeps for a block: the encoded `fields`, and what describes them."""
    return {**fields, "start": Field((), torch.int64), "label": Field((), torch.int64)}


def importance_row(block_size: int) -> Field:
    """What ImportanceRows keeps for an entry of a table."""
    return Field((block_size,), torch.float32)


class PoolFullError(RuntimeError):
    """A pool has fewer free blocks than are needed. Nothing was changed."""


@dataclass(frozen=True)
class Pending:
    """Blocks that are on their way to where they can be read.

    fields: the pool's own, or a copy of these blocks. ids: [blocks] int64, where the blocks are in `fields`.
    """

    fields: Mapping[str, Tensor]
    ids: Tensor

    def wait(self) -> tuple[Mapping[str, Tensor], Tensor]:
        """Fields and ids. Work that is put on the device's stream behind this call finds the blocks there."""
        return self.fields, self.ids


class BlockPool:
    """Fixed memory for `num_blocks` blocks, one tensor per field, and their labels.

    Beside the encoded fields each block has `start` (position of its first token) and `label` (its expert).
    """

    def __init__(
        self,
        place: Place,
        num_blocks: int,
        block_size: int,
        fields: Mapping[str, Field],
        device: torch.device,
        pinned: bool = False,
    ) -> None:
        self.place, self.num_blocks, self.block_size, self.device = place, num_blocks, block_size, device
        touched = {
            name: torch.zeros(num_blocks, *field.shape, dtype=field.dtype, device=device, pin_memory=pinned)
            for name, field in whole_block(fields).items()
        }
        self.fields = {name: touched[name] for name in fields}
        self.start, self.label = touched["start"], touched["label"]
        self._free = list(range(num_blocks))  # a heap: the lowest id is taken first
        self._references = [0] * num_blocks
        self.shared_blocks = 0
        """Blocks with more than one owner."""
        self.more_owners = 0
        """Owners of blocks beside the first of each."""
        self.claims = 0
        """For how many of their blocks owners may ask for others, since nobody writes to one that is shared."""
        self.generation = 0
        """Grows whenever a block is written, shared or freed, or its request gets another name: what was known of the
        pool's blocks before may not be so now.
        """

    @property
    def kind(self) -> str:
        """The tier's kind."""
        return self.place.tier

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the pool by name, labels included."""
        return {**self.fields, "start": self.start, "label": self.label}

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def used_blocks(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, summed over the storage of its rows."""
        return sum(t[0].numel() * t.element_size() for t in self.tensors.values())

    @property
    def allocated_bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())

    def _claimed(self, claims: int = 0, owners: int = 0) -> int:
        """Free blocks that are kept for claims, if there were so many more claims and owners. No more can be asked for
        than there are owners beside the first: the last one writes where it is.
        """
        return min(self.claims + claims, self.more_owners + owners)

    def check_free(self, blocks: int, what: str, claims: int = 0, owners: int = 0) -> None:
        """Raises PoolFullError where `blocks` and so many more claims, with so many more owners, are too much."""
        needed = blocks + self._claimed(claims, owners) - self._claimed()
        free = len(self._free) - self._claimed()
        if needed > free:
            raise PoolFullError(
                f"{what}: needs {needed} blocks of {self.block_size} tokens in the {self.kind} tier, "
                f"{free} of {self.num_blocks} are free; release requests or raise max_tokens "
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
            self.more_owners += 1
            self.shared_blocks += self._references[block_id] == 2

    def free(self, ids: Iterable[int]) -> None:
        """Gives blocks back; one with several owners is free when the last has given it back.

        Raises ValueError for one that is not allocated; those before it are given back then.
        """
        self.generation += 1
        for block_id in ids:
            if not 0 <= block_id < self.num_blocks or not self._references[block_id]:
                raise ValueError(f"block {block_id} of the {self.kind} tier is not allocated")
            self._references[block_id] -= 1
            self.shared_blocks -= self._references[block_id] == 1
            if self._references[block_id]:
                self.more_owners -= 1
            else:
                heapq.heappush(self._free, block_id)

    def is_shared(self, block_id: int) -> bool:
        """Whether a block has more than one owner."""
        return self._references[block_id] > 1

    def freed_by(self, ids: Iterable[int]) -> int:
        """How many blocks would be free if these were given back (one that is named twice, twice)."""
        return sum(count == self._references[block_id] for block_id, count in Counter(ids).items())

    def describe(self, ids: Tensor, start: Tensor, label: Tensor) -> None:
        """Says what the n blocks `ids` [n] hold, whose fields the caller writes: start, label [n]."""
        self.generation += 1
        self.start.index_copy_(0, ids, start.to(self.device))
        self.label.index_copy_(0, ids, label.to(self.device))

    def copy_from(self, ids: Tensor, other: BlockPool, other_ids: Tensor) -> None:
        """Copies blocks `other_ids` [n] of `other` to `ids` [n], labels included."""
        self.generation += 1
        for name, tensor in self.tensors.items():
            source = other.tensors[name].index_select(0, other_ids.to(other.device))
            tensor.index_copy_(0, ids.to(self.device), source.to(self.device))

    def get(self, ids: Tensor, device: torch.device) -> Pending:
        """Blocks `ids` [blocks], to be read by `device`.

        Memory that the device reads directly is used in place; from any other, the blocks are copied.
        """
        if self.device.type == device.type:
            return Pending(self.fields, ids)
        copied = {
            name: tensor.index_select(0, ids).to(device, non_blocking=True) for name, tensor in self.fields.items()
        }
        return Pending(copied, torch.arange(len(ids), device=device))


class ImportanceRows:
    """The importance of sealed tokens, as requests have seen them: a row [block_size] for each entry of a table.

    It belongs to the entry and not to the block, so that requests that share a block keep importance of their own.
    Rows are kept in one tensor, so that a step adds to those of all its requests at once. There is one for each block
    of the pools to begin with; sharing can ask for more, then the tensor grows.
    """

    def __init__(self, rows: int, block_size: int, device: torch.device) -> None:
        field = importance_row(block_size)
        self.tensor = torch.zeros(rows, *field.shape, dtype=field.dtype, device=device)
        self._free = list(range(rows))  # a heap, as a pool's

    @property
    def used(self) -> int:
        return self.tensor.shape[0] - len(self._free)

    def allocate(self, rows: int) -> list[int]:
        """Takes rows, which hold what their last owner left."""
        missing = rows - len(self._free)
        if missing > 0:
            before = self.tensor.shape[0]
            grown = self.tensor.new_zeros(before + max(missing, before), self.tensor.shape[1])
            grown[:before] = self.tensor
            self.tensor = grown
            self._free += range(before, grown.shape[0])  # larger than all that are free, so it stays a heap
        return [heapq.heappop(self._free) for _ in range(rows)]

    def free(self, rows: Iterable[int]) -> None:
        for row in rows:
            heapq.heappush(self._free, row)


class BlockTable:
    """The blocks of one layer of one request in one pool, oldest seal first: ids for the host as a list, for the ops
    as a tensor that follows when it is asked for.

    Args:
        importance: where each entry has a row; None: there is no budget.
    """

    def __init__(self, pool: BlockPool, importance: ImportanceRows | None = None) -> None:
        self.pool, self.importance = pool, importance
        self.ids: list[int] = []
        self.rows: list[int] = []
        """The row of each entry; empty where there is no importance."""
        self._tensors = _Mirror(pool.device), _Mirror(pool.device if importance is None else importance.tensor.device)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tensor(self) -> Tensor:
        """Block ids [len(self)], int64, on the pool's device."""
        return self._tensors[0].of(self.ids)

    @property
    def row_tensor(self) -> Tensor:
        """Rows of importance [len(self)], int64, on the rows' device."""
        return self._tensors[1].of(self.rows)

    def extend(self, ids: Sequence[int]) -> list[int]:
        """Adds blocks; their importance is the caller's to write. Returns their rows."""
        rows = [] if self.importance is None else self.importance.allocate(len(ids))
        self.ids += ids
        self.rows += rows
        return rows

    def replace(self, entry: int, block_id: int) -> None:
        """Names another block in an entry's place; its row of importance stays."""
        self.ids[entry] = block_id
        self._tensors[0].changed(entry)

    def remove(self, entries: Iterable[int]) -> list[int]:
        """Takes entries out, by their places. Returns their block ids, which are the caller's to free."""
        gone = sorted(set(entries))
        if not gone:
            return []
        ids = [self.ids[i] for i in gone]
        if self.importance is not None:
            self.importance.free(self.rows[i] for i in gone)
        for i in reversed(gone):
            del self.ids[i]
            if self.rows:
                del self.rows[i]
        for mirror in self._tensors:
            mirror.changed(gone[0])
        return ids

    def clear(self) -> list[int]:
        return self.remove(range(len(self.ids)))


class _Mirror:
    """A list of ints as a tensor, copied when it is asked for and only from where it has changed."""

    def __init__(self, device: torch.device) -> None:
        self._tensor = self._view = torch.zeros(0, dtype=torch.int64, device=device)
        self._same = 0

    def changed(self, first: int) -> None:
        """Everything from place `first` on may be another; what is added at the end need not be said."""
        self._same = min(self._same, first)

    def of(self, values: list[int]) -> Tensor:
        count = len(values)
        if self._same < count:
            if count > self._tensor.shape[0]:
                grown = self._tensor.new_zeros(max(64, count, 2 * self._tensor.shape[0]))
                grown[: self._same] = self._tensor[: self._same]
                self._tensor = grown
            self._tensor[self._same : count] = on_device(values[self._same :], self._tensor.device)
            self._same = count
            self._view = self._tensor[:count]
        elif count != self._view.shape[0]:
            self._view = self._tensor[:count]
        return self._view

    def __getstate__(self) -> dict[str, Any]:
        """Without the view: pickle would make memory of its own of it."""
        return {"_tensor": self._tensor, "_same": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._view = self._tensor[:0]
