"""Attention over raw tokens, whole blocks and single tokens of blocks, as partials that merge exactly."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_megatron.ops.reference.quantize import Keys, Values, decode_keys, decode_values, gather_tokens

CHUNK_BYTES = 1 << 20
"""Decoded keys handled at a time in attend_blocks: small enough to stay in a core's L2 cache."""


class Partial(NamedTuple):
    """Attention over a subset of the keys; partials over disjoint subsets merge exactly."""

    out: Tensor
    lse: Tensor


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
    block_size, value_dim = sample.shape[2], _value_dim(values)
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


def attend_decode(
    q: Tensor,
    raw_k: Tensor,
    raw_v: Tensor,
    slots: Tensor,
    raw_first: Tensor,
    raw_last: Tensor,
    keys: Keys,
    values: Values,
    block_ids: Tensor,
    first_blocks: Tensor,
    softmax_scale: float,
) -> Partial:
    """Attention of one decode token of each request to its raw tokens and to its blocks of one pool, together.

    Args: as in attend_windows and attend_ragged.
    """
    raw = attend_windows(q, raw_k, raw_v, slots, raw_first, raw_last, softmax_scale)
    return merge_partials([raw, attend_ragged(q, keys, values, block_ids, first_blocks, softmax_scale)])


def attend_windows(
    q: Tensor, raw_k: Tensor, raw_v: Tensor, slots: Tensor, raw_first: Tensor, raw_last: Tensor, softmax_scale: float
) -> Partial:
    """Attention of one decode token of each request to its raw tokens, which lie in one buffer for all.

    Args:
        q: [n, G, R, D]. raw_k: [slots, G, C, D], raw_v: [slots, G, C, E], in the model's dtype.
        slots, raw_first, raw_last: [n] int64; request i has the tokens raw_first[i] up to raw_last[i] of slots[i].

    Returns:
        out [n, G, R, E], lse [n, G, R]; a request without raw tokens has out 0 and lse -inf.
    """
    logits, seen = raw_logits(q, raw_k, slots, raw_first, raw_last, softmax_scale)
    v = raw_v.index_select(0, slots).float().masked_fill_(~seen[:, None, :, None], 0.0)
    return attend_logits(logits.masked_fill_(~seen[:, None, None], -math.inf), v)


def raw_logits(
    q: Tensor, raw_k: Tensor, slots: Tensor, raw_first: Tensor, raw_last: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Logits [n, G, R, C] of each request's slot of the buffer, and which of its tokens are the request's: [n, C]."""
    places = torch.arange(raw_k.shape[2], device=q.device)
    seen = (places >= raw_first.unsqueeze(1)) & (places < raw_last.unsqueeze(1))
    return torch.matmul(q.float() * softmax_scale, raw_k.index_select(0, slots).float().transpose(-1, -2)), seen


def runs(first: Tensor, total: int) -> list[tuple[int, int]]:
    """Where each request's run of a packed list of `total` begins and ends, from first [n + 1]. Of one request it is
    the whole list; of several, the tensor is read, which waits for a device.
    """
    return [(0, total)] if len(first) == 2 else list(itertools.pairwise(first.tolist()))


def attend_ragged(
    q: Tensor, keys: Keys, values: Values, block_ids: Tensor, first_blocks: Tensor, softmax_scale: float
) -> Partial:
    """Attention of several requests at once, each over its own run of whole blocks.

    Args:
        q: [n, G, R, D]. block_ids: [T], the requests' blocks one after another.
        first_blocks: [n + 1], where each request's run begins, and T; a run may be empty.

    Returns:
        out [n, G, R, E], lse [n, G, R]; a request without blocks has out 0 and lse -inf.
    """
    ends = runs(first_blocks, len(block_ids))
    parts = [
        attend_blocks(rows, keys, values, block_ids[a:b], softmax_scale) for rows, (a, b) in zip(q, ends, strict=True)
    ]
    return _stacked(parts)


def _stacked(parts: list[Partial]) -> Partial:
    """Partials of one request each as one of all of them."""
    return Partial(*(torch.stack(part) for part in zip(*parts, strict=True)))


def _value_dim(values: Values) -> int:
    if values.raw is not None:
        return values.raw.shape[3]
    assert values.codes is not None
    return values.codes.shape[3] * 8 // values.bits


def _finish(out: Tensor, total: Tensor, high: Tensor) -> Partial:
    return Partial(out / total.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1), high + total.log())


def key_logits(q: Tensor, keys: Keys, block_ids: Tensor, first_blocks: Tensor, softmax_scale: float) -> Tensor:
    """Logits of whole blocks with the rows of their request: [G, R, T * B] float32. Arguments as in attend_ragged."""
    q = q.float() * softmax_scale
    parts = [
        torch.matmul(rows, decode_keys(keys, block_ids[a:b]).transpose(-1, -2)).permute(1, 2, 0, 3).flatten(2)
        for rows, (a, b) in zip(q, runs(first_blocks, len(block_ids)), strict=True)
    ]
    return torch.cat(parts, -1)


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
    first_tokens: Tensor,
    softmax_scale: float,
    read: Tensor | None = None,
) -> Partial:
    """Attention of each request's rows over single tokens of blocks.

    Args:
        q: [n, G, R, D]. block_ids, offsets: [G, M], the token's block and its place in it, the requests' tokens one
            after another. first_tokens: [n + 1], where each request's begin, and M.
        read: [G, M] bool; tokens where it is False are left out.

    Returns:
        out [n, G, R, E], lse [n, G, R]; where nothing is read out is 0 and lse -inf.
    """
    k, v = gather_tokens(keys, values, block_ids, offsets)
    parts = []
    for rows, (a, b) in zip(q, runs(first_tokens, block_ids.shape[1]), strict=True):
        logits = torch.matmul(rows.float() * softmax_scale, k[:, a:b].transpose(-1, -2))
        if read is not None:
            logits.masked_fill_(~read[:, a:b].unsqueeze(1), -math.inf)
        parts.append(attend_logits(logits, v[:, a:b]))
    return _stacked(parts)


def attend_logits(logits: Tensor, v: Tensor) -> Partial:
    """Softmax of logits [..., R, S] over v [..., S, E]; a row of -inf, or of nothing, has out 0 and lse -inf."""
    high = logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -math.inf)
    weights = (logits - high.masked_fill(high == -math.inf, 0.0).unsqueeze(-1)).exp_()
    return _finish(torch.matmul(weights, v.float()), weights.sum(-1), high)


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


def attend_sliding(q: Tensor, k: Tensor, v: Tensor, query_tokens: int, window: int, softmax_scale: float) -> Partial:
    """As attend_window, where a query sees only the newest `window` keys up to its own."""
    groups, rows, dim = q.shape
    heads, keys = rows // query_tokens, k.shape[1]
    q4 = q.float().view(groups, heads, query_tokens, dim) * softmax_scale
    out, lse = q4.new_empty(groups, heads, query_tokens, v.shape[2]), q4.new_empty(groups, heads, query_tokens)
    step = max(1, _QUERY_CHUNK // heads)
    for first in range(0, query_tokens, step):
        last = min(first + step, query_tokens)
        at, end = keys - query_tokens + first, keys - query_tokens + last
        begin = max(0, at - window + 1)
        own, places = torch.arange(at, end, device=q.device)[:, None], torch.arange(begin, end, device=q.device)
        logits = torch.matmul(q4[:, :, first:last], k[:, None, begin:end].float().transpose(-1, -2))
        logits.masked_fill_((places > own) | (places <= own - window), -math.inf)
        part = attend_logits(logits, v[:, None, begin:end])
        out[:, :, first:last], lse[:, :, first:last] = part.out, part.lse
    return Partial(out.flatten(1, 2), lse.flatten(1, 2))


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
