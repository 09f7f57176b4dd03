"""Mode mass: tokens in rank order until no query head misses more than epsilon."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pikv_megatron import ops
from pikv_megatron.config.io import ConfigError
from pikv_megatron.config.sections import AttentionConfig
from pikv_megatron.device_numbers import DeviceNumbers
from pikv_megatron.reading.reader import Reading, Source, expect, missed


class Mass:
    """Stops by the estimate of what is unread, or by its certificate (`epsilon_by`), see ops.reference.attend_mass."""

    def __init__(self, section: AttentionConfig) -> None:
        if section.score == "quest":
            raise ConfigError("runtime.attention.score: mode mass ranks tokens, so it needs 'planes', got 'quest'")
        if section.prune_fraction != 1.0:
            raise ConfigError(
                "runtime.attention.prune_fraction: mode mass ranks every token, expected 1.0, "
                f"got {section.prune_fraction}"
            )
        self._section = section

    def read(
        self, q: Tensor, sources: Sequence[Source], raw_lse: Tensor, softmax_scale: float, numbers: DeviceNumbers
    ) -> Reading:
        """See `Reader.read`."""
        scores = [ops.score_tokens(q, s.keys, s.block_ids, s.first_blocks, softmax_scale) for s in sources]
        stored = [(s.keys, s.values, s.block_ids, s.first_blocks) for s in sources]
        expected = [expect(score, s.keys) for score, s in zip(scores, sources, strict=True)]
        slope = None if self._section.epsilon_by == "certificate" else expected[0][1]
        partials, reads = ops.attend_mass(
            q, stored, [score for score, _ in expected], slope, raw_lse, self._section.epsilon, softmax_scale
        )
        unread = [
            ops.unread_mass(score, slope_of, read, s.first_blocks)
            for (score, slope_of), read, s in zip(expected, reads, sources, strict=True)
        ]
        estimate, certificate = missed(unread, partials, raw_lse)
        return Reading(partials, estimate, certificate, _count(reads, sources, numbers), scores)


def _count(reads: Sequence[Tensor], sources: Sequence[Source], numbers: DeviceNumbers) -> Tensor:
    """Tokens read of each request, per KV head: [n, G]; reads [G, T * B] of each source."""
    total = None
    for read, s in zip(reads, sources, strict=True):
        ends = read.cumsum(1)  # int64
        before = torch.nn.functional.pad(ends, (1, 0))[:, s.first_blocks * s.block_size]
        counts = before.diff(dim=1).transpose(0, 1)
        total = counts if total is None else total + counts
    assert total is not None
    return total
