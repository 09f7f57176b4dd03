"""Selection: which sealed tokens one decode query attends to, and how much of its softmax the others would have had.

Everything is read from what blocks store anyway. Blocks are scored by their bounds (Quest, arXiv 2406.10774, or half
of that bound plus half of the centre's logit), tokens by the high bit-plane of their keys. Per call a handful of
tensor ops over all tokens; nothing is copied to the host. Shapes as in `ops.reference`: G KV heads, R query rows per
KV head (one decode token: heads_per_group).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_megatron import ops
from pikv_megatron.config.sections import AttentionConfig
from pikv_megatron.reading.plane_error import plane_error


class Source(NamedTuple):
    """Sealed blocks of one request in one tier: pool tensors and block ids [n]."""

    keys: ops.Keys
    values: ops.Values
    block_ids: Tensor
    block_size: int


class Reading(NamedTuple):
    """What a selective read gives.

    partials: attention over the tokens read, one per source. estimate, certificate: [G, R] float32, the share of each
    query head's softmax that unread tokens would have had: expected, and never exceeded. tokens_read: [G]. scores:
    the token scores, one per source, where every sealed token was scored, else None.
    """

    partials: list[ops.Partial]
    estimate: Tensor
    certificate: Tensor
    tokens_read: Tensor
    scores: list[ops.TokenScores] | None


class _Kept(NamedTuple):
    """Blocks that survive pruning, per KV head [G, kept], and log-sum-exp of the others' logits [G, R]: expected and
    largest.
    """

    block_ids: Tensor
    rest_estimate: Tensor
    rest_certificate: Tensor


def count_of(fraction: float, total: int) -> int:
    """How many of `total` a fraction stands for: rounded up, at least one."""
    return max(1, math.ceil(fraction * total - 1e-9))


def one_run(count: int, device: torch.device) -> Tensor:
    """Where the runs of a packed list begin and end that is one request's: [2] int64."""
    return torch.tensor([0, count]).to(device)


def read_selected(
    q: Tensor, sources: list[Source], raw_lse: Tensor, config: AttentionConfig, softmax_scale: float
) -> Reading:
    """Attends to the best sealed tokens.

    Args:
        q: [G, R, D], one decode token. sources: at least one, none empty.
        raw_lse: [G, R], log-sum-exp over the raw tokens (sinks and window), which are always read.
    """
    if config.mode == "mass":
        return _read_mass(q, sources, raw_lse, config, softmax_scale)
    if config.score == "quest":
        return _read_blocks(q, sources, raw_lse, config.read_fraction, softmax_scale)
    return _read_top_k(q, sources, raw_lse, config, softmax_scale)


def _read_blocks(q: Tensor, sources: list[Source], raw_lse: Tensor, fraction: float, softmax_scale: float) -> Reading:
    """Quest: whole blocks by their bounds."""
    kept = [_prune(q, source, fraction, softmax_scale, quest=True) for source in sources]
    partials = [_attend_whole(q, s, found.block_ids, softmax_scale) for s, found in zip(sources, kept, strict=True)]
    read_lse = _read_lse(partials, raw_lse)
    estimate, certificate = (torch.sigmoid(lse - read_lse) for lse in _rest(kept))
    tokens = sum(found.block_ids.shape[1] * s.block_size for s, found in zip(sources, kept, strict=True))
    return Reading(partials, estimate, certificate, _constant(tokens, q), None)


def _read_top_k(
    q: Tensor, sources: list[Source], raw_lse: Tensor, config: AttentionConfig, softmax_scale: float
) -> Reading:
    """The read_fraction of all sealed tokens that rank highest by their high plane, in the blocks left by pruning."""
    whole = config.prune_fraction >= 1.0
    kept = [_prune(q, source, config.prune_fraction, softmax_scale, quest=False) for source in sources]
    scores = [
        _score_tokens(q, source, source.block_ids if whole else found.block_ids, softmax_scale)
        for source, found in zip(sources, kept, strict=True)
    ]
    joined = _join(scores)
    coarse = joined.coarse.flatten(2)
    total = sum(len(source.block_ids) * source.block_size for source in sources)
    count = min(count_of(config.read_fraction, total), coarse.shape[-1])
    first_tokens, first_chosen = one_run(coarse.shape[-1], q.device), one_run(count, q.device)
    rank = ops.rank_tokens(coarse, raw_lse.unsqueeze(0), first_tokens)
    index = ops.select_topk(rank, first_tokens, first_chosen, count)

    partials, first = [], 0
    for source, found in zip(sources, kept, strict=True):
        last = first + found.block_ids.shape[1] * source.block_size
        here = None if len(sources) == 1 else (index >= first) & (index < last)
        local = index if here is None else (index - first).clamp(0, last - first - 1)
        block_ids = found.block_ids.gather(1, local // source.block_size)
        offsets = local % source.block_size
        partials.append(_attend_tokens(q, source, block_ids, offsets, softmax_scale, here))
        first = last

    read = torch.zeros_like(coarse[:, 0], dtype=torch.bool).scatter_(1, index, True)
    estimate, certificate = _missed(*expect(joined, sources[0].keys), read, _rest(kept), _read_lse(partials, raw_lse))
    return Reading(partials, estimate, certificate, _constant(count, q), scores if whole else None)


def _read_mass(
    q: Tensor, sources: list[Source], raw_lse: Tensor, config: AttentionConfig, softmax_scale: float
) -> Reading:
    """Tokens in rank order until no query head of the group misses more than epsilon, see ops.reference.attend_mass."""
    scores = [_score_tokens(q, s, s.block_ids, softmax_scale) for s in sources]
    stored = [(s.keys, s.values, s.block_ids, one_run(len(s.block_ids), q.device)) for s in sources]
    unread = [expect(s, source.keys) for s, source in zip(scores, sources, strict=True)]
    slope = None if config.epsilon_by == "certificate" else unread[0][1]
    partials, reads = ops.attend_mass(
        q.unsqueeze(0),
        stored,
        [s for s, _ in unread],
        slope,
        raw_lse.unsqueeze(0),
        config.epsilon,
        softmax_scale,
    )
    partials, read = [_first(p) for p in partials], torch.cat(reads, 1)
    nothing = torch.full_like(raw_lse, -math.inf)
    estimate, certificate = _missed(
        _join([s for s, _ in unread]), unread[0][1], read, [nothing, nothing], _read_lse(partials, raw_lse)
    )
    return Reading(partials, estimate, certificate, read.sum(-1), scores)


def _score_tokens(q: Tensor, source: Source, block_ids: Tensor, softmax_scale: float) -> ops.TokenScores:
    run = one_run(block_ids.shape[-1], q.device)
    scores: ops.TokenScores = ops.score_tokens(q.unsqueeze(0), source.keys, block_ids, run, softmax_scale)
    return scores


def _attend_tokens(
    q: Tensor, source: Source, block_ids: Tensor, offsets: Tensor, softmax_scale: float, read: Tensor | None = None
) -> ops.Partial:
    run = one_run(block_ids.shape[1], q.device)
    return _first(
        ops.attend_tokens(q.unsqueeze(0), source.keys, source.values, block_ids, offsets, run, softmax_scale, read)
    )


def _first(partial: ops.Partial) -> ops.Partial:
    """The partial of the only request."""
    return ops.Partial(partial.out[0], partial.lse[0])


def _constant(tokens: int, q: Tensor) -> Tensor:
    return torch.full((q.shape[0],), tokens, dtype=torch.int64, device=q.device)


def _prune(q: Tensor, source: Source, fraction: float, softmax_scale: float, quest: bool) -> _Kept:
    """Keeps the best `fraction` of a source's blocks, per KV head.

    Quest ranks by its bound, summed over the query heads of a group; we rank by the softmax over blocks of the mean
    of bound and centre, summed over the group.
    """
    groups, rows, _ = q.shape
    nothing = q.new_full((groups, rows), -math.inf, dtype=torch.float32)
    if fraction >= 1.0:
        return _Kept(source.block_ids.expand(groups, -1), nothing, nothing)
    run = one_run(len(source.block_ids), q.device)
    bound, centre, spread = ops.score_blocks(q.unsqueeze(0), source.keys, source.block_ids, run, softmax_scale)
    ranked = bound.sum(1) if quest else (0.5 * (bound + centre)).softmax(-1).sum(1)
    chosen = ranked.topk(count_of(fraction, ranked.shape[-1]), dim=-1).indices
    pruned = torch.ones_like(ranked, dtype=torch.bool).scatter_(1, chosen, False).unsqueeze(1)
    expected = torch.minimum(centre + spread, bound)
    rest = [
        torch.logsumexp(logits.masked_fill(~pruned, -math.inf), -1) + math.log(source.block_size)
        for logits in (expected, bound)
    ]
    return _Kept(source.block_ids[chosen], *rest)


def _attend_whole(q: Tensor, source: Source, block_ids: Tensor, softmax_scale: float) -> ops.Partial:
    """Attention over every token of the blocks block_ids [G, n]."""
    offsets = torch.arange(source.block_size, device=q.device).repeat(block_ids.shape[1]).expand(block_ids.shape[0], -1)
    tokens = block_ids.repeat_interleave(source.block_size, 1)
    return _attend_tokens(q, source, tokens, offsets, softmax_scale)


def _join(scores: list[ops.TokenScores]) -> ops.TokenScores:
    if len(scores) == 1:
        return scores[0]
    return ops.TokenScores(*(torch.cat(list(part), dim=2) for part in zip(*scores, strict=True)))


def _rest(kept: list[_Kept]) -> list[Tensor]:
    """Log-sum-exp over all pruned blocks: expected and largest, [G, R] each."""
    parts = ([k.rest_estimate for k in kept], [k.rest_certificate for k in kept])
    return [torch.logsumexp(torch.stack(part), 0) for part in parts]


def _read_lse(partials: list[ops.Partial], raw_lse: Tensor) -> Tensor:
    return torch.logsumexp(torch.stack([raw_lse, *(p.lse for p in partials)]), 0)


def expect(scores: ops.TokenScores, keys: ops.Keys) -> tuple[ops.TokenScores, float]:
    """What is expected of a token whose high plane alone is known: log E[exp(logit)] = slope * coarse + spread.

    A token is expected nearer to its block's mean than the plane says, see `plane_error`; that counts where reading
    stops by the estimate.

    Returns: the scores with a spread that says so, and slope.
    """
    slope, variance = plane_error(keys.raw is not None, keys.hi_bits, keys.lo_bits, scores.coarse.shape[-1])
    return scores._replace(spread=variance * scores.spread + (1 - slope) * scores.coarse.mean(-1)), slope


def _missed(
    scores: ops.TokenScores, slope: float, read: Tensor, rest: list[Tensor], read_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax share of what was not read, expected and largest: read [G, tokens] bool, rest and read_lse [G, R]."""
    unread = [x[0] for x in ops.unread_mass(scores, slope, read, one_run(scores.coarse.shape[2], read.device))]
    expected, largest = (torch.sigmoid(torch.logaddexp(x, y) - read_lse) for x, y in zip(unread, rest, strict=True))
    return torch.minimum(expected, largest), largest
