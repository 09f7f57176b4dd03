"""Decode steps of several requests for the tests of ops: some have no blocks, some no raw tokens."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from stored import Stored, random_store

GROUPS, HEADS, SIZE, DIM, VALUE_DIM, BLOCKS, CAPACITY, SCALE = 2, 3, 16, 32, 48, 24, 21, 0.2
LENGTHS = {1: [5], 3: [3, 0, 9], 16: [0, 4, 4, 1, 0, 0, 20, 2, 7, 1, 3, 0, 12, 5, 1, 0]}
RAW = {1: [(0, 21)], 3: [(2, 9), (20, 21), (0, 1)], 16: [(i, i + (5 * i) % 7) for i in range(16)]}


class Step(NamedTuple):
    """A decode step: q [n, G, R, D], packed lists of blocks, and a buffer of raw tokens."""

    held: Stored
    q: torch.Tensor
    ids: torch.Tensor
    first: torch.Tensor
    raw_k: torch.Tensor
    raw_v: torch.Tensor
    window: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def raw_rows(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Request i's raw tokens: k, v [G, S, channels]."""
        slot, a, b = (int(x[i]) for x in self.window)
        return self.raw_k[slot, :, a:b], self.raw_v[slot, :, a:b]

    def runs(self, per_block: int = 1) -> list[tuple[int, int]]:
        """Where each request's run begins and ends, in entries of which a block has `per_block`."""
        ends = (self.first * per_block).tolist()
        return list(itertools.pairwise(ends))


def step_of(requests: int, codec: str, dtype: torch.dtype) -> Step:
    """A step of 1, 3 or 16 requests; dtype: of q, of the window, and where the codec is none of the blocks."""
    held = random_store(BLOCKS, GROUPS, SIZE, DIM, VALUE_DIM, codec, dtype=dtype)
    rng = torch.Generator().manual_seed(requests)
    lengths = torch.tensor(LENGTHS[requests])
    ids = torch.randint(0, BLOCKS, (int(lengths.sum()),), generator=rng)
    q = 3 * torch.randn(requests, GROUPS, HEADS, DIM, generator=rng).to(dtype)
    slots = torch.randperm(requests + 2, generator=rng)[:requests]
    first, last = torch.tensor(RAW[requests]).t().contiguous()
    buffers = [  # views of a longer buffer, with NaN where no request has a token
        torch.full((requests + 2, GROUPS, CAPACITY + 3, channels), torch.nan, dtype=dtype)[:, :, 1:-2]
        for channels in (DIM, VALUE_DIM)
    ]
    for slot, a, b in zip(slots.tolist(), first.tolist(), last.tolist(), strict=True):
        for x in buffers:
            x[slot, :, a:b] = torch.randn(GROUPS, b - a, x.shape[3], generator=rng).to(dtype)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return Step(held, q, ids, ends, *buffers, (slots, first, last))
