"""Score quest: whole blocks by their bounds (Quest, arXiv 2406.10774), the baseline of mode top_k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pikv_megatron import ops
from pikv_megatron.device_numbers import DeviceNumbers
from pikv_megatron.reading.prune import prune
from pikv_megatron.reading.reader import Reading, Source, missed


def read_blocks(
    q: Tensor, sources: Sequence[Source], raw_lse: Tensor, fraction: float, softmax_scale: float, numbers: DeviceNumbers
) -> Reading:
    """Attends to the best `fraction` of each request's blocks; arguments as in `Reader.read`."""
    groups, partials, unread = q.shape[1], [], []
    tokens = [0] * len(q)
    for s in sources:
        kept = prune(q, s, fraction, softmax_scale, numbers, quest=True)
        size = s.block_size
        counts = [count * size for count in kept.counts]
        block_ids = kept.block_ids.repeat_interleave(size, 1)
        offsets = torch.arange(size, device=q.device).repeat(kept.block_ids.shape[1]).expand(groups, -1)
        first = numbers.runs(counts)
        partials.append(ops.attend_tokens(q, s.keys, s.values, block_ids, offsets, first, softmax_scale))
        tokens = [a + b for a, b in zip(tokens, counts, strict=True)]
        if kept.rest is not None:
            unread.append(kept.rest)
    if not unread:
        zero = torch.zeros_like(raw_lse)
        return Reading(partials, zero, zero, numbers.of(tuple(tokens)).unsqueeze(1).expand(-1, groups), None)
    estimate, certificate = missed(unread, partials, raw_lse)
    return Reading(partials, estimate, certificate, numbers.of(tuple(tokens)).unsqueeze(1).expand(-1, groups), None)
