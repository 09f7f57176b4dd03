"""Plain-torch truth of every op: what a kernel of the same name must compute. Written for clarity first, then for CPU
speed.

Shapes, used throughout (DESIGN 2): `blocks` stored blocks of `B` tokens; `G` KV heads (num_query_groups); `D` key and
`E` value channels; `R` query rows of one KV head: heads_per_group x query tokens, so that GQA's query heads are rows
of one matrix. A partial is (output normalised over the keys it saw, log-sum-exp of its logits), both float32.

Codes. A code c of `hi_bits + lo_bits` bits stands for zero + scale * c. Keys are stored as two bit-planes: the high
plane alone is a coarse key, both together the full one. Planes are packed planar: with `m` codes per byte, byte j
holds channels j, j + D/m, j + 2D/m, ... from its least significant bits up. zero is rounded down and scale up to
float16, so that the
codes cover the data: the error is at most scale / 2 everywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20
"""Decoded keys handled at a time in attend_blocks: small enough to stay in a core's L2 cache."""
SMALLEST_SCALE = 2.0**-24
"""float16's smallest positive number: the scale of a channel that is constant in its block."""


class Partial(NamedTuple):
    """Attention over a subset of the keys; partials over disjoint subsets merge exactly."""

    out: Tensor
    lse: Tensor


class Keys(NamedTuple):
    """Stored keys of a pool. `raw` [blocks, G, B, D] or None (then codes are the keys); high [blocks, G, B,
    D*hi_bits/8] uint8, low likewise or None, scale and zero [blocks, G, D] float16: all None where the pool has no
    codes.
    """

    raw: Tensor | None
    high: Tensor | None
    low: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    hi_bits: int
    lo_bits: int


class Values(NamedTuple):
    """Stored values of a pool. `raw` [blocks, G, B, E] or None; codes [blocks, G, B, E*bits/8] uint8, scale and zero
    [blocks, G, B].
    """

    raw: Tensor | None
    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    bits: int


def round_half_down(x: Tensor) -> Tensor:
    """float32 to the nearest float16 that is not above it (CUDA's __float2half_rd)."""
    half = x.half()
    bits = half.view(torch.int16).int()
    ordered = torch.where(bits < 0, -(bits & 0x7FFF), bits) - (half.float() > x).int()
    return torch.where(ordered < 0, -ordered | -0x8000, ordered).to(torch.int16).view(torch.float16)


def round_half_up(x: Tensor) -> Tensor:
    """float32 to the nearest float16 that is not below it."""
    return -round_half_down(-x)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., C] below 2**bits to planar bytes [..., C*bits/8]."""
    if bits == 8:
        return codes
    parts = codes.chunk(8 // bits, dim=-1)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], start=1):
        packed |= part << (i * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Planar bytes [..., C*bits/8] to uint8 codes [..., C]."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    return torch.cat([(packed >> (i * bits)) & mask for i in range(8 // bits)], dim=-1)


def quantize_block(
    x: Tensor, hi_bits: int, lo_bits: int, per_channel: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Quantises blocks asymmetrically (KIVI, arXiv 2402.02750: keys per channel, values per token).

    Args:
        x: [..., B, C], any float dtype, |x| <= 65504.
        per_channel: one scale per channel of the block, else one per token.

    Returns:
        high plane [..., B, C*hi_bits/8], low plane or None where lo_bits is 0, scale and zero: [..., C] per channel,
        [..., B] per token.
    """
    x = x.float()
    dim = -2 if per_channel else -1
    levels = 2 ** (hi_bits + lo_bits) - 1
    zero = round_half_down(x.amin(dim))
    span = x.amax(dim) - zero.float()
    scale = round_half_up(torch.div(span, levels)).clamp_(min=SMALLEST_SCALE)
    codes = (x - zero.float().unsqueeze(dim)).div_(scale.float().unsqueeze(dim)).round_().to(torch.uint8)
    if lo_bits == 0:
        return pack(codes, hi_bits), None, scale, zero
    return pack(codes >> lo_bits, hi_bits), pack(codes & ((1 << lo_bits) - 1), lo_bits), scale, zero


def dequantize_block(
    high: Tensor,
    low: Tensor | None,
    scale: Tensor,
    zero: Tensor,
    hi_bits: int,
    lo_bits: int,
    per_channel: bool,
) -> Tensor:
    """Inverse of quantize_block: [..., B, C] float32. With `low` None and lo_bits > 0, the middle of the high plane's
    interval.
    """
    codes = unpack(high, hi_bits).float()
    if low is not None:
        codes = codes.mul_(1 << lo_bits).add_(unpack(low, lo_bits))
    elif lo_bits:
        codes = codes.mul_(1 << lo_bits).add_(((1 << lo_bits) - 1) / 2)
    dim = -2 if per_channel else -1
    return codes.mul_(scale.float().unsqueeze(dim)).add_(zero.float().unsqueeze(dim))


def block_bounds(scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Element-wise lower and upper bound of a block's keys [blocks, G, D] float32 (Quest's min and max, arXiv
    2406.10774).

    They follow from the codes' own scale and zero, so they cost no storage; they hold for the decoded and for the raw
    keys.
    """
    lower = zero.float()
    return lower, lower + scale.float() * (2**bits - 1)


def score_blocks(q: Tensor, lower: Tensor, upper: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """What a block's bounds say about the logits of its tokens.

    Args:
        q: [G, R, D]. lower, upper: [blocks, G, D].

    Returns:
        bound [G, R, blocks]: Quest's upper bound sum_d max(q_d lower_d, q_d upper_d); centre: q . (lower + upper) /
        2. Both float32, times softmax_scale.
    """
    q = q.float() * softmax_scale
    middle = torch.matmul(q, (lower + upper).mul_(0.5).permute(1, 2, 0))
    reach = torch.matmul(q.abs(), (upper - lower).mul_(0.5).permute(1, 2, 0))
    return middle + reach, middle


class TokenScores(NamedTuple):
    """Logits known from the high plane alone, float32.

    coarse: [G, R, blocks, B], q . k_high * softmax_scale. radius: [G, R, blocks], |true logit - coarse| never exceeds
    it.
    spread: [G, R, blocks], half the variance of the logit if the unread low bits are uniform: log E[exp(error)] to
    second order.
    """

    coarse: Tensor
    radius: Tensor
    spread: Tensor


def score_tokens(q: Tensor, keys: Keys, block_ids: Tensor, softmax_scale: float) -> TokenScores:
    """Scores tokens by the high plane of their keys. q: [G, R, D]; block_ids: [n] or, a list per KV head, [G, n]."""
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
    # Rounding of the two dot products themselves, so that the bound also holds in float32.
    largest = torch.maximum(zero.abs(), (zero + scale * (2 ** (keys.hi_bits + lo_bits) - 1)).abs())
    rounding = 4 * q.shape[-1] * torch.finfo(torch.float32).eps
    radius = torch.matmul(q.abs(), (scale * half_width + largest * rounding).transpose(-1, -2)) * softmax_scale
    spread = torch.matmul(q * q, (scale * scale).transpose(-1, -2)) * (0.5 * variance * softmax_scale**2)
    return TokenScores(coarse, radius, spread)


def _picker(block_ids: Tensor, groups: int):  # type: ignore[no-untyped-def]
    """Gathers rows of a [blocks, G, ...] tensor as [G, n, ...], for one list of ids or one per KV head."""
    if block_ids.dim() == 1:
        return lambda x: x.index_select(0, block_ids).transpose(0, 1)
    heads = torch.arange(groups, device=block_ids.device).unsqueeze(1)
    return lambda x: x[block_ids, heads]


def decode_keys(keys: Keys, block_ids: Tensor) -> Tensor:
    """Keys of the blocks `block_ids` [n]: [n, G, B, D] float32."""
    if keys.raw is not None:
        return keys.raw.index_select(0, block_ids).float()
    high, low, scale, zero = (None if t is None else t.index_select(0, block_ids) for t in keys[1:5])
    return dequantize_block(high, low, scale, zero, keys.hi_bits, keys.lo_bits, per_channel=True)  # type: ignore[arg-type]


def decode_values(values: Values, block_ids: Tensor) -> Tensor:
    """Values of the blocks `block_ids` [n]: [n, G, B, E] float32."""
    if values.raw is not None:
        return values.raw.index_select(0, block_ids).float()
    codes, scale, zero = (t.index_select(0, block_ids) for t in values[1:4])  # type: ignore[union-attr]
    return dequantize_block(codes, None, scale, zero, values.bits, 0, per_channel=False)


def attend_blocks(
    q: Tensor,
    keys: Keys,
    values: Values,
    block_ids: Tensor,
    softmax_scale: float,
    key_positions: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> Partial:
    """Attention of q over whole blocks, in chunks that stay in cache, with a running softmax.

    Args:
        q: [G, R, D]. block_ids: [n], n >= 1.
        key_positions: [n, B] and query_positions [R]: where given, a query sees keys at its own position or before.

    Returns:
        out [G, R, E], lse [G, R]; a row that sees no key has out 0 and lse -inf.
    """
    q = q.float() * softmax_scale
    groups, rows, dim = q.shape
    sample = values.raw if values.raw is not None else values.codes
    assert sample is not None
    block_size = sample.shape[2]
    value_dim = sample.shape[3] if values.raw is not None else sample.shape[3] * 8 // values.bits
    per_chunk = max(1, CHUNK_BYTES // (4 * groups * block_size * max(dim, rows)))
    high = q.new_full((groups, rows), -math.inf)
    total = q.new_zeros(groups, rows)
    out = q.new_zeros(groups, rows, value_dim)
    for first in range(0, block_ids.shape[0], per_chunk):
        ids = block_ids[first : first + per_chunk]
        logits = torch.matmul(q, decode_keys(keys, ids).transpose(-1, -2))  # [n, G, R, B]
        if key_positions is not None and query_positions is not None:
            hidden = key_positions[first : first + per_chunk, None, :] > query_positions[:, None]  # [n, R, B]
            logits.masked_fill_(hidden.unsqueeze(1), -math.inf)
        new_high = torch.maximum(high, logits.amax((0, 3)))
        shift = new_high.masked_fill(new_high == -math.inf, 0.0)
        weights = logits.sub_(shift.unsqueeze(-1)).exp_()
        fade = (high - shift).exp_()
        total = total.mul_(fade).add_(weights.sum((0, 3)))
        out = out.mul_(fade.unsqueeze(-1)).add_(torch.matmul(weights, decode_values(values, ids)).sum(0))
        high = new_high
    return _finish(out, total, high)


def _finish(out: Tensor, total: Tensor, high: Tensor) -> Partial:
    return Partial(out / total.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1), high + total.log())


def key_logits(q: Tensor, keys: Keys, block_ids: Tensor, softmax_scale: float) -> Tensor:
    """Logits of whole blocks: q [G, R, D], block_ids [n] -> [G, R, n * B] float32."""
    logits = torch.matmul(q.float() * softmax_scale, decode_keys(keys, block_ids).transpose(-1, -2))
    return logits.permute(1, 2, 0, 3).flatten(2)


def attend_masked(logits: Tensor, read: Tensor, values: Values, block_ids: Tensor) -> Partial:
    """Softmax of those logits [G, R, n * B] that are read ([G, n * B] bool) over the values of whole blocks [n]."""
    v = decode_values(values, block_ids).transpose(0, 1).flatten(1, 2)
    return attend_logits(logits.masked_fill(~read.unsqueeze(1), -math.inf), v)


def attend_tokens(
    q: Tensor,
    keys: Keys,
    values: Values,
    block_ids: Tensor,
    offsets: Tensor,
    softmax_scale: float,
    read: Tensor | None = None,
) -> Partial:
    """Attention of q over single tokens of blocks.

    Args:
        q: [G, R, D]. block_ids, offsets: [G, n], the token's block and its place in it.
        read: [G, n] bool; tokens where it is False are left out.
    """
    k, v = gather_tokens(keys, values, block_ids, offsets)
    logits = torch.matmul(q.float() * softmax_scale, k.transpose(-1, -2))
    if read is not None:
        logits.masked_fill_(~read.unsqueeze(1), -math.inf)
    return attend_logits(logits, v)


def attend_logits(logits: Tensor, v: Tensor) -> Partial:
    """Softmax of logits [G, R, n] over v [G, n, E]; a row of -inf has out 0 and lse -inf."""
    high = logits.amax(-1)
    weights = (logits - high.masked_fill(high == -math.inf, 0.0).unsqueeze(-1)).exp_()
    return _finish(torch.matmul(weights, v.float()), weights.sum(-1), high)


def gather_tokens(keys: Keys, values: Values, block_ids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Decoded keys [G, n, D] and values [G, n, E], float32, of single tokens (block_ids, offsets: [G, n])."""
    heads = torch.arange(block_ids.shape[0], device=block_ids.device).unsqueeze(1)

    def at(x: Tensor) -> Tensor:
        return x[block_ids, heads, offsets]

    if keys.raw is not None:
        k = at(keys.raw).float()
    else:
        assert keys.high is not None and keys.scale is not None and keys.zero is not None
        codes = unpack(at(keys.high), keys.hi_bits).float()
        if keys.low is not None:
            codes = codes.mul_(1 << keys.lo_bits).add_(unpack(at(keys.low), keys.lo_bits))
        k = codes * keys.scale[block_ids, heads].float() + keys.zero[block_ids, heads].float()
    if values.raw is not None:
        return k, at(values.raw).float()
    assert values.codes is not None and values.scale is not None and values.zero is not None
    return k, dequantize_block(
        at(values.codes), None, at(values.scale), at(values.zero), values.bits, 0, per_channel=False
    )


def attend_window(q: Tensor, k: Tensor, v: Tensor, query_tokens: int, softmax_scale: float) -> Partial:
    """Causal attention over raw keys whose newest `query_tokens` tokens are the queries' own.

    Args:
        q: [G, R, D], R = heads_per_group * query_tokens, tokens fastest. k: [G, S, D]. v: [G, S, E].
    """
    if query_tokens == 1:
        return attend_logits(torch.matmul(q.float() * softmax_scale, k.float().transpose(-1, -2)), v)
    groups, rows, dim = q.shape
    seen_by_all = k.shape[1] - query_tokens
    q4 = q.view(groups, rows // query_tokens, query_tokens, dim)
    own = _causal_square(q4, k[:, seen_by_all:], v[:, seen_by_all:], softmax_scale)
    if seen_by_all == 0:
        return own
    return merge_partials([_dense(q, k[:, :seen_by_all], v[:, :seen_by_all], softmax_scale), own])


def attend_at(
    q: Tensor, k: Tensor, v: Tensor, key_positions: Tensor, query_positions: Tensor, softmax_scale: float
) -> Partial:
    """As attend_window for queries whose own tokens are partly sealed: causal by explicit positions [S] and [R]."""
    logits = torch.matmul(q.float() * softmax_scale, k.float().transpose(-1, -2))
    return attend_logits(logits.masked_fill_(key_positions > query_positions[:, None], -math.inf), v)


_QUERY_CHUNK = 512
"""Query rows handled at a time where attention is written out in plain torch: bounds the logits held."""


def _dense(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Partial:
    kt = k.float().transpose(-1, -2)
    parts = [attend_logits(torch.matmul(rows.float() * softmax_scale, kt), v) for rows in q.split(_QUERY_CHUNK, dim=1)]
    return Partial(torch.cat([p.out for p in parts], 1), torch.cat([p.lse for p in parts], 1))


def _causal_square(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Partial:
    """q [G, heads, T, D] over k [G, T, D], v [G, T, E], causal."""
    groups, heads, tokens, dim = q.shape
    if q.device.type == "cpu" and v.shape[-1] == dim:
        kx, vx = (t.unsqueeze(1).expand(-1, heads, -1, -1) for t in (k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, kx, vx, 0.0, True, scale=softmax_scale)
        return Partial(out.float().reshape(groups, heads * tokens, -1), lse.float().reshape(groups, heads * tokens))
    outs, lses = [], []
    step = max(1, _QUERY_CHUNK // heads)
    for first in range(0, tokens, step):
        rows = q[:, :, first : first + step].float()
        last = first + rows.shape[2]
        logits = torch.matmul(rows * softmax_scale, k[:, None, :last].float().transpose(-1, -2))
        places = torch.arange(last, device=q.device)
        logits.masked_fill_(places > places[first:last, None], -math.inf)
        part = attend_logits(logits, v[:, None, :last])
        outs.append(part.out)
        lses.append(part.lse)
    out, lse = torch.cat(outs, 2), torch.cat(lses, 2)
    return Partial(out.flatten(1, 2), lse.flatten(1, 2))


def merge_partials(partials: list[Partial]) -> Partial:
    """Merges partials over disjoint keys by their log-sum-exp; exact up to rounding."""
    if len(partials) == 1:
        return partials[0]
    lses = torch.stack([p.lse for p in partials])
    lse = torch.logsumexp(lses, 0)
    shares = (lses - lse.masked_fill(lse == -math.inf, 0.0)).exp_()
    out = torch.stack([p.out for p in partials]).mul_(shares.unsqueeze(-1)).sum(0)
    return Partial(out, lse)


def token_importance(q: Tensor, lse: Tensor, keys: Keys, block_ids: Tensor, softmax_scale: float) -> Tensor:
    """Attention that the tokens of blocks receive, summed over query rows and KV heads: I_t = sum_h softmax(Q_h K_t /
    sqrt(d)).

    Args:
        q: [G, R, D]; lse: [G, R] over *all* keys those queries see. Every key must be visible to every query.

    Returns: [n, B] float32.
    """
    q = q.float() * softmax_scale
    per_chunk = max(1, CHUNK_BYTES // (4 * q.shape[0] * 32 * max(q.shape[1:])))
    parts = [
        (torch.matmul(q, decode_keys(keys, ids).transpose(-1, -2)) - lse.unsqueeze(-1)).exp_().sum((1, 2))
        for ids in block_ids.split(per_chunk)
    ]
    return torch.cat(parts)


def window_importance(q: Tensor, lse: Tensor, k: Tensor, query_tokens: int, softmax_scale: float) -> Tensor:
    """As token_importance, over raw keys k [G, S, D] whose newest `query_tokens` are the queries' own (causal): [S]."""
    groups, rows, _ = q.shape
    weights = (torch.matmul(q.float() * softmax_scale, k.float().transpose(-1, -2)) - lse.unsqueeze(-1)).exp_()
    if query_tokens > 1:
        places = torch.arange(k.shape[1], device=k.device)
        seen = places <= places[-query_tokens:, None]  # [T, S]
        weights = weights.view(groups, rows // query_tokens, query_tokens, -1).mul_(seen)
    return weights.flatten(0, -2).sum(0)
