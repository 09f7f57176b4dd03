"""What stored blocks say about logits before they are read: bounds, the high plane, and the attention they received."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_megatron.ops.reference.attend import CHUNK_BYTES, raw_logits, runs
from pikv_megatron.ops.reference.quantize import Keys, decode_keys, unpack


def block_bounds(scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Element-wise lower and upper bound of a block's keys [blocks, G, D] float32 (Quest's min and max, arXiv
    2406.10774).

    They follow from the codes' own scale and zero, so they cost no storage; they hold for the decoded and for the raw
    keys.
    """
    lower = zero.float()
    levels = (2**bits - 1) * (1 + 2**-22)  # a hair more: the scale comes from a division rounded in float32
    return lower, lower + scale.float() * levels


class BlockScores(NamedTuple):
    """Logits known from a block's bounds alone, each [G, R, T] float32.

    bound: Quest's upper bound sum_d max(q_d lower_d, q_d upper_d), plus what float32 can lose of it. centre: the
    logit of the box's centre. spread: half the variance of the logit of a key taken as uniform in the box.
    """

    bound: Tensor
    centre: Tensor
    spread: Tensor


def refuse_low_rank(keys: Keys) -> None:
    """Raises ValueError for keys with a low-rank part, of which neither bounds nor planes know."""
    if keys.low_rank is not None:
        raise ValueError("keys.low_rank: scores are of the codes alone, expected keys without a low-rank part")


def score_blocks(q: Tensor, keys: Keys, block_ids: Tensor, first_blocks: Tensor, softmax_scale: float) -> BlockScores:
    """Scores blocks by their bounds, each for the rows of its request.

    Args:
        q: [n, G, R, D]. block_ids: [T]. first_blocks: [n + 1], where each request's run of them begins, and T.

    Raises ValueError: keys have a low-rank part.
    """
    refuse_low_rank(keys)
    ends = runs(first_blocks, len(block_ids))
    parts = [_score_blocks(rows, keys, block_ids[a:b], softmax_scale) for rows, (a, b) in zip(q, ends, strict=True)]
    return BlockScores(*(torch.cat(part, 2) for part in zip(*parts, strict=True)))


def _score_blocks(q: Tensor, keys: Keys, block_ids: Tensor, softmax_scale: float) -> BlockScores:
    assert keys.scale is not None and keys.zero is not None
    scale, zero = keys.scale.index_select(0, block_ids), keys.zero.index_select(0, block_ids)
    lower, upper = block_bounds(scale, zero, keys.hi_bits + keys.lo_bits)
    q = q.float() * softmax_scale
    centre = torch.matmul(q, (lower + upper).mul_(0.5).permute(1, 2, 0))
    half_width = (upper - lower).mul_(0.5)
    reach = half_width + torch.maximum(lower.abs(), upper.abs()) * _rounding(q.shape[-1])
    bound = centre + torch.matmul(q.abs(), reach.permute(1, 2, 0))
    spread = torch.matmul(q.square(), half_width.square_().permute(1, 2, 0)) / 6
    return BlockScores(bound, centre, spread)


def _rounding(dim: int) -> float:
    """Relative rounding of a float32 dot product over `dim` channels, so that bounds on logits hold as computed."""
    return 4 * dim * torch.finfo(torch.float32).eps


class TokenScores(NamedTuple):
    """Logits known from the high plane alone, float32.

    coarse: [G, R, T, B], q . k_high * softmax_scale. radius: [G, R, T], |true logit - coarse| never exceeds it.
    spread: [G, R, T], half the variance of the logit if the unread low bits are uniform: log E[exp(error)] to second
    order, and at most the radius, which no error exceeds.
    """

    coarse: Tensor
    radius: Tensor
    spread: Tensor


def score_tokens(q: Tensor, keys: Keys, block_ids: Tensor, first_blocks: Tensor, softmax_scale: float) -> TokenScores:
    """Scores tokens by the high plane of their keys, each for the rows of its request.

    Args:
        q: [n, G, R, D]. block_ids: [T] or, a list per KV head, [G, T]. first_blocks: [n + 1], where each request's run
            of them begins, and T.

    Raises ValueError: keys have a low-rank part.
    """
    refuse_low_rank(keys)
    ends = runs(first_blocks, block_ids.shape[-1])
    parts = [
        _score_tokens(rows, keys, block_ids[..., a:b], softmax_scale) for rows, (a, b) in zip(q, ends, strict=True)
    ]
    return TokenScores(*(torch.cat(part, 2) for part in zip(*parts, strict=True)))


def _score_tokens(q: Tensor, keys: Keys, block_ids: Tensor, softmax_scale: float) -> TokenScores:
    assert keys.high is not None and keys.scale is not None and keys.zero is not None
    q = q.float()
    pick = _picker(block_ids, q.shape[0])
    scale, zero = pick(keys.scale).float(), pick(keys.zero).float()  # [G, n, D]
    lo_bits = 0 if keys.raw is not None else keys.lo_bits
    codes = unpack(pick(keys.high), keys.hi_bits).float()  # [G, n, B, D]
    scaled_q = q.unsqueeze(1) * scale.unsqueeze(2)  # [G, n, R, D]: the block's scale folds into q
    logits = torch.matmul(scaled_q, codes.transpose(-1, -2)).mul_(1 << lo_bits)  # [G, n, R, B]
    offset = scaled_q.sum(-1) * (((1 << lo_bits) - 1) / 2) + torch.matmul(zero, q.transpose(-1, -2))  # [G, n, R]
    coarse = (logits + offset.unsqueeze(-1)).mul_(softmax_scale).transpose(1, 2)
    if keys.raw is None:
        half_width, variance = ((1 << lo_bits) - 1) / 2, (4**lo_bits - 1) / 12
    else:
        half_width, variance = 0.5, 1 / 12  # the index plane is a rounding of the raw key
    largest = torch.maximum(zero.abs(), (zero + scale * (2 ** (keys.hi_bits + lo_bits) - 1)).abs())
    reach = scale * half_width + largest * _rounding(q.shape[-1])
    radius = torch.matmul(q.abs(), reach.transpose(-1, -2)) * softmax_scale
    spread = torch.matmul(q * q, (scale * scale).transpose(-1, -2)) * (0.5 * variance * softmax_scale**2)
    return TokenScores(coarse, radius, torch.minimum(spread, radius))


def _picker(block_ids: Tensor, groups: int):  # type: ignore[no-untyped-def]
    """Gathers rows of a [blocks, G, ...] tensor as [G, n, ...], for one list of ids or one per KV head."""
    if block_ids.dim() == 1:
        return lambda x: x.index_select(0, block_ids).transpose(0, 1)
    heads = torch.arange(groups, device=block_ids.device).unsqueeze(1)
    return lambda x: x[block_ids, heads]


def token_importance(
    q: Tensor, lse: Tensor, keys: Keys, block_ids: Tensor, first_blocks: Tensor, softmax_scale: float
) -> Tensor:
    """Attention that the tokens of blocks receive from the rows of their request, summed over rows and KV heads:
    I_t = sum_h softmax(Q_h K_t / sqrt(d)).

    Args:
        q: [n, G, R, D]; lse: [n, G, R] over *all* keys that those rows see. Every key of a request must be visible to
            all of its rows. block_ids: [T]; first_blocks: [n + 1].

    Returns: [T, B] float32.
    """
    q = q.float() * softmax_scale
    per_chunk = max(1, CHUNK_BYTES // (4 * q.shape[1] * 32 * max(q.shape[2:])))
    parts = [
        (torch.matmul(rows, decode_keys(keys, ids).transpose(-1, -2)) - its.unsqueeze(-1)).exp_().sum((1, 2))
        for rows, its, (a, b) in zip(q, lse, runs(first_blocks, len(block_ids)), strict=True)
        for ids in block_ids[a:b].split(per_chunk)
    ]
    return torch.cat(parts)


def window_importance(
    q: Tensor,
    lse: Tensor,
    raw_k: Tensor,
    slots: Tensor,
    raw_first: Tensor,
    raw_last: Tensor,
    softmax_scale: float,
) -> Tensor:
    """As token_importance, over the raw tokens of each request in a buffer, as attend_windows takes them: [n, C]
    float32, zero where a request has none.
    """
    logits, seen = raw_logits(q, raw_k, slots, raw_first, raw_last, softmax_scale)
    weights = logits.sub_(lse.unsqueeze(-1)).exp_().masked_fill_(~seen[:, None, None], 0.0)
    return weights.sum((1, 2))


def prompt_importance(q: Tensor, lse: Tensor, k: Tensor, query_tokens: int, softmax_scale: float) -> Tensor:
    """As token_importance, of a prompt's query tokens over raw keys k [G, S, D], the newest of them their own: [S].

    Args:
        q: [G, R, D], R = heads_per_group * query_tokens, tokens fastest; a query sees no key newer than itself.
    """
    groups, rows, _ = q.shape
    weights = (torch.matmul(q.float() * softmax_scale, k.float().transpose(-1, -2)) - lse.unsqueeze(-1)).exp_()
    if query_tokens > 1:
        places = torch.arange(k.shape[1], device=k.device)
        seen = places <= places[-query_tokens:, None]  # [T, S]
        weights = weights.view(groups, rows // query_tokens, query_tokens, -1).mul_(seen)
    return weights.flatten(0, -2).sum(0)
