"""Mode top_k: the `read_fraction` of each request's sealed tokens that rank highest by the high plane of their keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pikv_megatron import ops
from pikv_megatron.config.io import ConfigError
from pikv_megatron.config.sections import AttentionConfig
from pikv_megatron.device_numbers import DeviceNumbers
from pikv_megatron.ops.reference import request_major
from pikv_megatron.reading.prune import prune
from pikv_megatron.reading.quest import read_blocks
from pikv_megatron.reading.reader import Reading, Source, count_of, expect, missed


class TopK:
    """Reads the tokens that rank highest, among the blocks that pruning leaves; with score quest, whole blocks."""

    def __init__(self, section: AttentionConfig) -> None:
        if section.score == "planes" and section.prune_fraction < section.read_fraction:
            raise ConfigError(
                f"runtime.attention.prune_fraction: expected at least read_fraction ({section.read_fraction}), since "
                f"tokens are chosen from the blocks it leaves, got {section.prune_fraction}"
            )
        self._section = section

    def read(
        self, q: Tensor, sources: Sequence[Source], raw_lse: Tensor, softmax_scale: float, numbers: DeviceNumbers
    ) -> Reading:
        """See `Reader.read`."""
        section = self._section
        if section.score == "quest":
            return read_blocks(q, sources, raw_lse, section.read_fraction, softmax_scale, numbers)
        kept = [prune(q, s, section.prune_fraction, softmax_scale, numbers, quest=False) for s in sources]
        firsts = [numbers.runs(found.counts) for found in kept]
        whole = section.prune_fraction >= 1.0
        scores = [
            ops.score_tokens(q, s.keys, s.block_ids if whole else found.block_ids, first, softmax_scale)
            for s, found, first in zip(sources, kept, firsts, strict=True)
        ]
        # A request's tokens of all tiers are ranked together.
        coarse, order = torch.cat([s.coarse.flatten(2) for s in scores], -1), None
        size = sources[0].block_size
        if len(sources) > 1:
            order, _ = request_major([s.coarse[0, 0].numel() for s in scores], [first * size for first in firsts])
            coarse = coarse[..., order]
        has = [size * sum(counts) for counts in zip(*(found.counts for found in kept), strict=True)]
        totals = [size * sum(counts) for counts in zip(*(s.counts for s in sources), strict=True)]
        chooses = [min(count_of(section.read_fraction, total), count) for total, count in zip(totals, has, strict=True)]
        first_chosen = numbers.runs(chooses)
        rank = ops.rank_tokens(coarse, raw_lse, numbers.runs(has))
        index = ops.select_topk(rank, numbers.runs(has), first_chosen, sum(chooses))
        index = index if order is None else order[index]

        partials, unread, first = [], [found.rest for found in kept if found.rest is not None], 0
        for s, found, score, first_blocks in zip(sources, kept, scores, firsts, strict=True):
            last = first + found.block_ids.shape[1] * size
            here = None if len(sources) == 1 else (index >= first) & (index < last)
            local = index if here is None else (index - first).clamp(0, last - first - 1)
            block_ids, offsets = found.block_ids.gather(1, local // size), local % size
            partials.append(
                ops.attend_tokens(q, s.keys, s.values, block_ids, offsets, first_chosen, softmax_scale, here)
            )
            marked = local if here is None else torch.where(here, local, last - first)  # beyond the end: elsewhere
            read = torch.zeros(len(local), last - first + 1, dtype=torch.bool, device=q.device)
            read = read.scatter_(1, marked, True)[:, :-1]
            unread.append(ops.unread_mass(*expect(score, s.keys), read, first_blocks))
            first = last
        estimate, certificate = missed(unread, partials, raw_lse)
        tokens = numbers.of(tuple(chooses)).unsqueeze(1).expand(-1, q.shape[1])
        return Reading(partials, estimate, certificate, tokens, scores if whole else None)
