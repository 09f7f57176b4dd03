"""What readers share: their interface, and the two figures that go with everything they leave unread.

A reader serves the decode tokens of all requests of a step at once, with a handful of tensor ops over all their
blocks; nothing is copied to the host. Shapes as in `ops.reference`: n requests, G KV heads, R query rows per KV head
(heads_per_group), D and E channels, B tokens of a block; packed lists have the requests' blocks (or tokens) one after
another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pikv_megatron import ops
from pikv_megatron.config.sections import AttentionConfig
from pikv_megatron.device_numbers import DeviceNumbers
from pikv_megatron.reading.plane_error import plane_error


class Source(NamedTuple):
    """Sealed blocks of a step's requests in one tier.

    block_ids: [T], the requests' blocks one after another. first_blocks: [n + 1], where each request's begin, and T.
    counts: how many each has, n of them, on the host.
    """

    keys: ops.Keys
    values: ops.Values
    block_ids: Tensor
    first_blocks: Tensor
    counts: tuple[int, ...]
    block_size: int


class Reading(NamedTuple):
    """What a selective read gives.

    partials: attention over the tokens read, one per source. estimate, certificate: [n, G, R] float32, the share of
    each query head's softmax that unread tokens would have had: expected, and never exceeded. tokens_read: [n, G].
    scores: the token scores, one per source, where every sealed token was scored, else None.
    """

    partials: list[ops.Partial]
    estimate: Tensor
    certificate: Tensor
    tokens_read: Tensor
    scores: list[ops.TokenScores] | None


class Reader(Protocol):
    """Chooses what a decode token reads. Made of its section, which it checks (ConfigError)."""

    def __init__(self, section: AttentionConfig) -> None: ...

    def read(
        self, q: Tensor, sources: Sequence[Source], raw_lse: Tensor, softmax_scale: float, numbers: DeviceNumbers
    ) -> Reading:
        """Attends to sealed tokens.

        Args:
            q: [n, G, R, D], a decode token of each request. sources: at least one.
            raw_lse: [n, G, R], log-sum-exp over the raw tokens (sinks and window), which are always read.
        """


def count_of(fraction: float, total: int) -> int:
    """How many of `total` a fraction stands for: rounded up, at least one of any."""
    return min(total, max(1, math.ceil(fraction * total - 1e-9)))


def read_lse(partials: Sequence[ops.Partial], raw_lse: Tensor) -> Tensor:
    """Log-sum-exp over all that was read: [n, G, R]."""
    return torch.logsumexp(torch.stack([raw_lse, *(p.lse for p in partials)]), 0)


def expect(scores: ops.TokenScores, keys: ops.Keys) -> tuple[ops.TokenScores, float]:
    """What is expected of a token whose high plane alone is known: log E[exp(logit)] = slope * coarse + spread.

    A token is expected nearer to its block's mean than the plane says, see `plane_error`; that counts where reading
    stops by the estimate.

    Returns: the scores with a spread that says so, and slope.
    """
    slope, variance = plane_error(keys.raw is not None, keys.hi_bits, keys.lo_bits, scores.coarse.shape[-1])
    return scores._replace(spread=variance * scores.spread + (1 - slope) * scores.coarse.mean(-1)), slope


def missed(
    unread: Sequence[tuple[Tensor, Tensor]], partials: Sequence[ops.Partial], raw_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax share of what was not read, expected and largest: [n, G, R] each.

    Args:
        unread: log-sum-exp of parts of what was not read, expected and largest, [n, G, R] each.
    """
    expected, largest = (torch.logsumexp(torch.stack(parts), 0) for parts in zip(*unread, strict=True))
    read = read_lse(partials, raw_lse)
    certificate = torch.sigmoid(largest - read)
    return torch.minimum(torch.sigmoid(expected - read), certificate), certificate
