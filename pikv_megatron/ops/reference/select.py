"""Choosing tokens by their scores: ranks, the best of them, and reading until little enough is missed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pikv_megatron.ops.reference.attend import Partial, attend_masked, key_logits
from pikv_megatron.ops.reference.quantize import Keys, Values
from pikv_megatron.ops.reference.score import TokenScores


def rank_tokens(coarse: Tensor, raw_lse: Tensor) -> Tensor:
    """A token's expected attention summed over the query rows of its KV head: [G, tokens] float32.

    Args:
        coarse: [G, R, tokens] logits from the high plane. raw_lse: [G, R] log-sum-exp of the raw tokens' logits, so
            that a head that looks at its window has little say in what is read.
    """
    total = torch.logaddexp(torch.logsumexp(coarse, -1), raw_lse)
    return (coarse - total.unsqueeze(-1)).exp_().sum(1)


def select_topk(scores: Tensor, count: int) -> Tensor:
    """Where the `count` largest of scores [G, tokens] are: [G, count] int64, ascending; of equals the first is taken.

    No score is nan. Raises ValueError where there are fewer than `count`.
    """
    if count > scores.shape[1]:
        raise ValueError(f"count: expected at most {scores.shape[1]}, got {count}")
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return best.sort(dim=-1).values


def unread_mass(scores: TokenScores, slope: float, read: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits of the tokens that are not read, expected (slope * coarse + spread) and largest (coarse
    + radius).

    Args:
        read: [G, blocks * B] bool.

    Returns: [G, R] float32 each, -inf where everything is read.
    """
    by_spread, by_radius = (
        torch.logsumexp(logits.flatten(2).masked_fill(read.unsqueeze(1), -math.inf), dim=-1)
        for logits in (_logits(scores, slope), _logits(scores, None))
    )
    return by_spread, by_radius


def _logits(scores: TokenScores, slope: float | None) -> Tensor:
    """Of unread tokens [G, R, blocks, B]: slope * coarse + spread, or coarse + radius where slope is None."""
    extra = scores.radius if slope is None else scores.spread
    return (1.0 if slope is None else slope) * scores.coarse + extra.unsqueeze(-1)


def attend_mass(
    q: Tensor,
    stored: list[tuple[Keys, Values, Tensor]],
    scores: list[TokenScores],
    slope: float | None,
    raw_lse: Tensor,
    epsilon: float,
    softmax_scale: float,
) -> tuple[list[Partial], Tensor]:
    """Attention over tokens of whole blocks in rank order, until no query row of a KV head misses more than epsilon.

    What has been read is known exactly; what has not is taken at its expected or at its largest possible mass. The
    same set is found by reading token after token; here all are computed and the rest is masked.

    Args:
        q: [G, R, D]. stored: pools and their blocks [n], with the token scores of all of these.
        slope: unread logits are taken as expected (slope * coarse + spread); None: at their largest (coarse + radius).
        raw_lse: [G, R], log-sum-exp over what is read anyway.

    Returns: one partial per pool, and who was read: [G, tokens] bool, the pools' tokens one after another.
    """
    logits = [key_logits(q, keys, block_ids, softmax_scale) for keys, _, block_ids in stored]
    rank = rank_tokens(torch.cat([s.coarse.flatten(2) for s in scores], -1), raw_lse)
    read = select_mass(rank, scores, slope, torch.cat(logits, -1), raw_lse, epsilon)
    parts = zip(stored, logits, read.split([x.shape[-1] for x in logits], dim=-1), strict=True)
    return [attend_masked(x, mine, values, block_ids) for (_, values, block_ids), x, mine in parts], read


def select_mass(
    rank: Tensor, scores: list[TokenScores], slope: float | None, if_read: Tensor, raw_lse: Tensor, epsilon: float
) -> Tensor:
    """Which tokens attend_mass reads, where all their logits are known: [G, tokens] bool. Waits for no device.

    Args:
        rank: [G, tokens], by which the tokens are in order. if_read: [G, R, tokens], their logits. The rest as there.
    """
    if_unread = torch.cat([_logits(s, slope).flatten(2) for s in scores], -1)
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    index = order.unsqueeze(1).expand_as(if_read)
    top = torch.maximum(torch.maximum(if_unread.amax(-1), if_read.amax(-1)), raw_lse).unsqueeze(-1)
    unread = (if_unread - top).gather(-1, index).double().exp_()
    seen = (if_read - top).gather(-1, index).double().exp_()
    after = unread.flip(-1).cumsum_(-1).flip(-1)  # missed if reading stops before this token
    before = seen.cumsum(-1) - seen + (raw_lse.unsqueeze(-1) - top).double().exp_()
    needed = (after >= epsilon * (after + before)).any(1)  # where both vanish beside `top`, read on
    return torch.zeros_like(needed).scatter_(1, order, needed)
