"""The ops and readers of decode steps called for one request alone, n = 1: what most of their tests are about."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pikv_megatron.config.sections import AttentionConfig
from pikv_megatron.device_numbers import DeviceNumbers
from pikv_megatron.ops.reference import BlockScores, Keys, Partial, TokenScores, Values
from pikv_megatron.reading import READERS
from pikv_megatron.reading.reader import Reading, Source


def run_of(count: int) -> Tensor:
    """Where the only run of a packed list begins and ends."""
    return torch.tensor([0, count])


def in_buffer(*raw: Tensor) -> tuple[Tensor, ...]:
    """Raw k [G, S, D] and what else is there (v) in a buffer of three slots, with NaN around them; and where they are:
    slots, raw_first, raw_last.
    """
    tokens = raw[0].shape[1]
    buffers = []
    for x in raw:
        buffer = x.new_full((3, x.shape[0], tokens + 5, x.shape[2]), torch.nan)
        buffer[1, :, 2 : 2 + tokens] = x
        buffers.append(buffer)
    return *buffers, torch.tensor([1]), torch.tensor([2]), torch.tensor([2 + tokens])


def _alone(partial: Partial) -> Partial:
    return Partial(partial.out[0], partial.lse[0])


class OneRequest:
    """The ops of `ops`; those that take several requests take one: q [G, R, D], no list of where runs begin."""

    def __init__(self, ops: ModuleType | Any) -> None:
        self.ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def attend_decode(self, q, k, v, keys: Keys, values: Values, block_ids: Tensor, scale: float) -> Partial:
        """k, v: [G, S, channels], the request's raw tokens."""
        stored = (keys, values, block_ids, run_of(len(block_ids)))
        return _alone(self.ops.attend_decode(q.unsqueeze(0), *in_buffer(k, v), *stored, scale))

    def attend_windows(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
        """k, v: [G, S, channels], the request's raw tokens."""
        return _alone(self.ops.attend_windows(q.unsqueeze(0), *in_buffer(k, v), scale))

    def attend_tokens(self, q, keys: Keys, values: Values, block_ids: Tensor, offsets, scale: float, read=None):
        run = run_of(block_ids.shape[1])
        return _alone(self.ops.attend_tokens(q.unsqueeze(0), keys, values, block_ids, offsets, run, scale, read))

    def key_logits(self, q: Tensor, keys: Keys, block_ids: Tensor, scale: float) -> Tensor:
        return self.ops.key_logits(q.unsqueeze(0), keys, block_ids, run_of(len(block_ids)), scale)

    def score_blocks(self, q: Tensor, keys: Keys, block_ids: Tensor, scale: float) -> BlockScores:
        return self.ops.score_blocks(q.unsqueeze(0), keys, block_ids, run_of(len(block_ids)), scale)

    def score_tokens(self, q: Tensor, keys: Keys, block_ids: Tensor, scale: float) -> TokenScores:
        return self.ops.score_tokens(q.unsqueeze(0), keys, block_ids, run_of(block_ids.shape[-1]), scale)

    def rank_tokens(self, coarse: Tensor, raw_lse: Tensor) -> Tensor:
        return self.ops.rank_tokens(coarse, raw_lse.unsqueeze(0), run_of(coarse.shape[2]))

    def select_topk(self, scores: Tensor, count: int) -> Tensor:
        return self.ops.select_topk(scores, run_of(scores.shape[1]), run_of(count), count)

    def unread_mass(self, scores: TokenScores, slope: float, read: Tensor) -> list[Tensor]:
        return [x[0] for x in self.ops.unread_mass(scores, slope, read, run_of(scores.coarse.shape[2]))]

    def attend_mass(self, q, stored, scores, slope, raw_lse, epsilon: float, scale: float):
        """stored: (keys, values, block_ids) of every pool. Returns who was read of all pools one after another."""
        pools = [(*pool, run_of(len(pool[2]))) for pool in stored]
        partials, read = self.ops.attend_mass(
            q.unsqueeze(0), pools, scores, slope, raw_lse.unsqueeze(0), epsilon, scale
        )
        return [_alone(partial) for partial in partials], torch.cat(read, 1)

    def token_importance(self, q: Tensor, lse: Tensor, keys: Keys, block_ids: Tensor, scale: float) -> Tensor:
        run = run_of(len(block_ids))
        return self.ops.token_importance(q.unsqueeze(0), lse.unsqueeze(0), keys, block_ids, run, scale)

    def window_importance(self, q: Tensor, lse: Tensor, k: Tensor, scale: float) -> Tensor:
        """k: [G, S, D], the request's raw keys."""
        importance = self.ops.window_importance(q.unsqueeze(0), lse.unsqueeze(0), *in_buffer(k), scale)
        return importance[0, 2 : 2 + k.shape[1]]


def source_of(keys: Keys, values: Values, block_ids: Tensor, size: int) -> Source:
    """A request's blocks in one tier."""
    return Source(keys, values, block_ids, run_of(len(block_ids)), (len(block_ids),), size)


def read_one(q: Tensor, sources: list[Source], raw_lse: Tensor, section: AttentionConfig, scale: float) -> Reading:
    """What a section's reader reads of one request: q [G, R, D], raw_lse [G, R]. Its figures are [G, R], tokens [G]."""
    make = READERS.pick(section.mode)
    assert make is not None
    read = make(section).read(q.unsqueeze(0), sources, raw_lse.unsqueeze(0), scale, DeviceNumbers(q.device))
    figures = (read.estimate[0], read.certificate[0], read.tokens_read[0])
    return Reading([_alone(partial) for partial in read.partials], *figures, read.scores)
