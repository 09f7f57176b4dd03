"""Pruning: which blocks are worth a look, by their bounds alone (Quest, arXiv 2406.10774)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_megatron import ops
from pikv_megatron.device_numbers import DeviceNumbers
from pikv_megatron.reading.reader import Source, count_of


class Kept(NamedTuple):
    """Blocks that survive.

    block_ids: [G, K], the requests' one after another. counts: how many each request has, n of them. rest: log-sum-exp
    of the others' logits, expected and largest, [n, G, R] each; None where there are none.
    """

    block_ids: Tensor
    counts: tuple[int, ...]
    rest: tuple[Tensor, Tensor] | None


def prune(
    q: Tensor, source: Source, fraction: float, softmax_scale: float, numbers: DeviceNumbers, quest: bool
) -> Kept:
    """Keeps the best `fraction` of each request's blocks, per KV head.

    Quest ranks by its bound, summed over the query heads of a group; we rank by the softmax over a request's blocks of
    the mean of bound and centre, summed over the group. q: [n, G, R, D].
    """
    groups = q.shape[1]
    if fraction >= 1.0:
        return Kept(source.block_ids.expand(groups, -1), source.counts, None)
    bound, centre, spread = ops.score_blocks(q, source.keys, source.block_ids, source.first_blocks, softmax_scale)
    if quest:
        ranked = bound.sum(1)
    else:
        nothing = bound.new_full(q.shape[:3], -math.inf)
        ranked = ops.rank_tokens(0.5 * (bound + centre), nothing, source.first_blocks)
    counts = tuple(count_of(fraction, count) for count in source.counts)
    chosen = ops.select_topk(ranked, source.first_blocks, numbers.runs(counts), sum(counts))
    kept = torch.zeros_like(ranked, dtype=torch.bool).scatter_(1, chosen, True)
    # The bound stands where coarse logits do, so that it is summed as it is; what is expected lies below it.
    lower = torch.minimum(centre + spread - bound, torch.zeros_like(bound))
    scores = ops.TokenScores(bound.unsqueeze(-1), torch.zeros_like(bound), lower)
    rest = ops.unread_mass(scores, 1.0, kept, source.first_blocks)
    expected, largest = (lse + math.log(source.block_size) for lse in rest)
    return Kept(source.block_ids[chosen], counts, (expected, largest))
