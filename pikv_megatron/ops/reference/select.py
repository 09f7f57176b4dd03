"""Choosing tokens by their scores: ranks, the best of them, and reading until little enough is missed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pikv_megatron.ops.reference.attend import Partial, attend_masked, key_logits, runs
from pikv_megatron.ops.reference.quantize import Keys, Values
from pikv_megatron.ops.reference.score import TokenScores


def rank_tokens(coarse: Tensor, raw_lse: Tensor, first_tokens: Tensor) -> Tensor:
    """A token's expected share of its request's attention, summed over the query rows of its KV head: [G, N] float32.

    Args:
        coarse: [G, R, N] logits from the high plane, the requests' tokens one after another.
        raw_lse: [n, G, R] log-sum-exp of the raw tokens' logits, so that a head that looks at its window has little
            say in what is read.
        first_tokens: [n + 1], where each request's tokens begin, and N.
    """
    parts = []
    for raw, (a, b) in zip(raw_lse, runs(first_tokens, coarse.shape[2]), strict=True):
        total = torch.logaddexp(torch.logsumexp(coarse[:, :, a:b], -1), raw)
        parts.append((coarse[:, :, a:b] - total.unsqueeze(-1)).exp_().sum(1))
    return torch.cat(parts, -1)


def select_topk(scores: Tensor, first_tokens: Tensor, first_chosen: Tensor, total_chosen: int) -> Tensor:
    """Where the largest scores of each request's tokens are; of equals the first are taken.

    Args:
        scores: [G, N], none of them nan. first_tokens: [n + 1], where each request's tokens begin, and N.
        first_chosen: [n + 1], where each request's chosen begin, and total_chosen: of request i as many are chosen as
            lie between. No request may choose more than it has.

    Returns: [G, total_chosen] int64, places in N, ascending within a request.

    Raises ValueError: a request chooses more than it has.
    """
    parts = []
    has, chooses = runs(first_tokens, scores.shape[1]), runs(first_chosen, total_chosen)
    for i, ((a, b), (first, last)) in enumerate(zip(has, chooses, strict=True)):
        if last - first > b - a:
            raise ValueError(f"first_chosen: expected at most {b - a} for request {i}, got {last - first}")
        best = scores[:, a:b].sort(dim=-1, descending=True, stable=True).indices[:, : last - first]
        parts.append(best.sort(dim=-1).values + a)
    return torch.cat(parts, -1)


def unread_mass(scores: TokenScores, slope: float, read: Tensor, first_blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits of each request's tokens that are not read, expected (slope * coarse + spread) and
    largest (coarse + radius).

    Args:
        read: [G, T * B] bool. first_blocks: [n + 1], where each request's blocks begin in the scores, and T.

    Returns: [n, G, R] float32 each, -inf where everything is read.
    """
    size = scores.coarse.shape[3]
    ends = runs(first_blocks, scores.coarse.shape[2])
    by_spread, by_radius = (
        torch.stack([torch.logsumexp(unread[..., a * size : b * size], -1) for a, b in ends])
        for unread in (_logits(scores, x).flatten(2).masked_fill(read.unsqueeze(1), -math.inf) for x in (slope, None))
    )
    return by_spread, by_radius


def _logits(scores: TokenScores, slope: float | None) -> Tensor:
    """Of unread tokens [G, R, blocks, B]: slope * coarse + spread, or coarse + radius where slope is None."""
    extra = scores.radius if slope is None else scores.spread
    return (1.0 if slope is None else slope) * scores.coarse + extra.unsqueeze(-1)


def attend_mass(
    q: Tensor,
    stored: list[tuple[Keys, Values, Tensor, Tensor]],
    scores: list[TokenScores],
    slope: float | None,
    raw_lse: Tensor,
    epsilon: float,
    softmax_scale: float,
) -> tuple[list[Partial], list[Tensor]]:
    """Attention over tokens of whole blocks in rank order, until no query row of a KV head misses more than epsilon.

    What has been read is known exactly; what has not is taken at its expected or at its largest possible mass. The
    same set is found by reading token after token; here all are computed and the rest is masked. A request's tokens of
    all pools are in one order, where they are equal the first pool's come first.

    Args:
        q: [n, G, R, D]. stored: pools, their blocks [T] and where each request's begin [n + 1], with the token scores
            of all of these.
        slope: unread logits are taken as expected (slope * coarse + spread); None: at their largest (coarse + radius).
        raw_lse: [n, G, R], log-sum-exp over what is read anyway.

    Returns: one partial per pool, and who was read of it: [G, T * B] bool.
    """
    logits = [key_logits(q, keys, ids, first, softmax_scale) for keys, _, ids, first in stored]
    reads = read_until_enough(stored, scores, slope, logits, raw_lse, epsilon, rank_tokens, select_mass)
    partials = []
    for (_, values, ids, first), score, x, read in zip(stored, scores, logits, reads, strict=True):
        size = score.coarse.shape[3]
        parts = [
            attend_masked(x[..., a * size : b * size], read[:, a * size : b * size], values, ids[a:b])
            for a, b in runs(first, len(ids))
        ]
        partials.append(Partial(*(torch.stack(part) for part in zip(*parts, strict=True))))
    return partials, reads


def read_until_enough(
    stored: list[tuple[Keys, Values, Tensor, Tensor]],
    scores: list[TokenScores],
    slope: float | None,
    logits: list[Tensor],
    raw_lse: Tensor,
    epsilon: float,
    rank_tokens: Callable[..., Tensor],
    select_mass: Callable[..., Tensor],
) -> list[Tensor]:
    """Which tokens attend_mass reads of each pool, where the logits of all of them are known: [G, T * B] bool.

    Waits for no device where the two ops do not.
    """
    if_unread = [_logits(s, slope).flatten(2) for s in scores]
    coarse, at_most, true = (torch.cat(x, -1) for x in ([s.coarse.flatten(2) for s in scores], if_unread, logits))
    firsts = [first * s.coarse.shape[3] for s, (*_, first) in zip(scores, stored, strict=True)]
    if len(stored) == 1:
        rank = rank_tokens(coarse, raw_lse, firsts[0])
        return [select_mass(in_rank_order(rank, firsts[0]), at_most, true, raw_lse, firsts[0], epsilon)]
    together, first_tokens = request_major([x.shape[-1] for x in logits], firsts)
    rank = rank_tokens(coarse[..., together], raw_lse, first_tokens)
    order = together[in_rank_order(rank, first_tokens)]
    return list(
        select_mass(order, at_most, true, raw_lse, first_tokens, epsilon).split([x.shape[-1] for x in logits], -1)
    )


def request_major(totals: list[int], firsts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The order in which the tokens of several pools, one pool after another, are each request's together, and where
    each request's begin: [N] and [n + 1] int64. Waits for no device.

    Args:
        totals: each pool's tokens. firsts: [n + 1], where each request's begin in it.
    """
    requests = [requests_of(total, first) for total, first in zip(totals, firsts, strict=True)]
    return torch.cat(requests).argsort(stable=True), torch.stack(firsts).sum(0)


def requests_of(total: int, first: Tensor) -> Tensor:
    """Whose each entry of a packed list is: [total] int64, from first [n + 1]. Waits for no device."""
    return torch.bucketize(torch.arange(total, device=first.device), first[1:], right=True)


def in_rank_order(rank: Tensor, first_tokens: Tensor) -> Tensor:
    """Places in N of each request's tokens, the best first and the first of equals: [G, N]. Waits for no device."""
    best = rank.sort(dim=-1, descending=True, stable=True).indices
    if len(first_tokens) == 2:
        return best
    return best.gather(1, requests_of(rank.shape[1], first_tokens)[best].sort(dim=-1, stable=True).indices)


def select_mass(
    order: Tensor, if_unread: Tensor, if_read: Tensor, raw_lse: Tensor, first_tokens: Tensor, epsilon: float
) -> Tensor:
    """Which tokens attend_mass reads, where all their logits are known: [G, N] bool.

    Args:
        order: [G, N], places in N: each request's tokens, the best first. first_tokens: where each request's begin in
            it. if_unread, if_read: [G, R, N], logits of a token that is not read, and of one that is. The rest as in
            attend_mass.
    """
    read = torch.zeros_like(order, dtype=torch.bool)
    for raw, (a, b) in zip(raw_lse, runs(first_tokens, order.shape[1]), strict=True):
        if a == b:
            continue
        run = order[:, a:b]
        index = run.unsqueeze(1).expand(-1, if_read.shape[1], -1)
        at_most, true = if_unread.gather(-1, index), if_read.gather(-1, index)
        top = torch.maximum(torch.maximum(at_most.amax(-1), true.amax(-1)), raw).unsqueeze(-1)
        unread, seen = (at_most - top).double().exp_(), (true - top).double().exp_()
        after = unread.flip(-1).cumsum_(-1).flip(-1)  # missed if reading stops before this token
        before = seen.cumsum(-1) - seen + (raw.unsqueeze(-1) - top).double().exp_()
        needed = (after >= epsilon * (after + before)).any(1)  # where both vanish beside `top`, read on
        read.scatter_(1, run, needed)
    return read
