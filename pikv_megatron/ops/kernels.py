"""The compiled ops `torch.ops.pikv.*_out` under the names and signatures of their references."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_megatron.ops import reference
from pikv_megatron.ops.reference import BlockScores, Keys, Partial, TokenScores, Values
from pikv_megatron.ops.reference.score import refuse_low_rank

OUT_OPS = (
    "quantize_block",
    "dequantize_block",
    "append",
    "attend_blocks",
    "attend_decode",
    "attend_ragged",
    "attend_tokens",
    "attend_mass",
    "attend_at",
    "attend_windows",
    "merge_partials",
    "score_blocks",
    "score_tokens",
    "key_logits",
    "token_importance",
    "window_importance",
    "prompt_importance",
    "rank_tokens",
    "select_topk",
    "select_mass",
    "unread_mass",
)

MOST_WINDOW_TOKENS = 16
"""Query tokens up to which attend_window is our kernel; a prompt's many go to torch's fused attention."""


def register_fakes() -> None:
    """For tensors without memory (meta, fake): the ops write into what they are given, so there is nothing to do."""
    for name in (*(f"{op}_out" for op in OUT_OPS), "prefetch"):
        torch.library.register_fake(f"pikv::{name}", lambda *args: None)


def quantize_block(
    x: Tensor, hi_bits: int, lo_bits: int, per_channel: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See reference.quantize_block."""
    x = x.contiguous()
    *lead, rows, cols = x.shape
    high = x.new_empty(*lead, rows, cols * hi_bits // 8, dtype=torch.uint8)
    low = x.new_empty(*lead, rows, cols * lo_bits // 8, dtype=torch.uint8) if lo_bits else None
    scale = x.new_empty(*lead, cols if per_channel else rows, dtype=torch.float16)
    zero = torch.empty_like(scale)
    torch.ops.pikv.quantize_block_out(x, hi_bits, lo_bits, per_channel, high, low, scale, zero)
    return high, low, scale, zero


def dequantize_block(
    high: Tensor, low: Tensor | None, scale: Tensor, zero: Tensor, hi_bits: int, lo_bits: int, per_channel: bool
) -> Tensor:
    """See reference.dequantize_block."""
    y = high.new_empty(*high.shape[:-1], high.shape[-1] * 8 // hi_bits, dtype=torch.float32)
    parts = (None if t is None else t.contiguous() for t in (high, low, scale, zero))
    torch.ops.pikv.dequantize_block_out(*parts, hi_bits, lo_bits, per_channel, y)
    return y


def score_blocks(q: Tensor, keys: Keys, block_ids: Tensor, first_blocks: Tensor, softmax_scale: float) -> BlockScores:
    """See reference.score_blocks."""
    refuse_low_rank(keys)
    q = q.float().contiguous()
    bound = q.new_empty(*q.shape[1:3], block_ids.shape[0])
    scores = BlockScores(bound, torch.empty_like(bound), torch.empty_like(bound))
    _, _, _, scale, zero, *_ = _flat(keys)
    bits = keys.hi_bits + keys.lo_bits
    torch.ops.pikv.score_blocks_out(q, scale, zero, bits, block_ids, first_blocks, softmax_scale, *scores)
    return scores


def score_tokens(q: Tensor, keys: Keys, block_ids: Tensor, first_blocks: Tensor, softmax_scale: float) -> TokenScores:
    """See reference.score_tokens."""
    refuse_low_rank(keys)
    raw, high, _, scale, zero, hi_bits, lo_bits = _flat(keys)
    assert keys.high is not None
    q, block_ids = q.float().contiguous(), block_ids.contiguous()
    coarse = q.new_empty(*q.shape[1:3], block_ids.shape[-1], keys.high.shape[2])
    radius = q.new_empty(coarse.shape[:3])
    scores = TokenScores(coarse, radius, torch.empty_like(radius))
    planes = (raw, high, scale, zero, hi_bits, lo_bits)
    torch.ops.pikv.score_tokens_out(q, *planes, block_ids, first_blocks, softmax_scale, *scores)
    return scores


def _flat(fields: Keys | Values) -> list[Tensor | int | None]:
    """The fields but the low-rank part, as the ops take them; a pool's tensors are contiguous and pass as they are."""
    return [field.contiguous() if isinstance(field, Tensor) else field for field in fields[:-1]]


def _low_rank(*stored: Keys | Values) -> list[list[Tensor]]:
    """The low-rank parts as the ops take them: none is an empty list."""
    return [[field.contiguous() for field in x.low_rank or ()] for x in stored]


def _value_dim(values: Values) -> int:
    if values.raw is not None:
        return values.raw.shape[3]
    assert values.codes is not None
    return values.codes.shape[3] * 8 // values.bits


def _empty_partial(q: Tensor, value_dim: int) -> Partial:
    return Partial(q.new_empty(*q.shape[:-1], value_dim), q.new_empty(q.shape[:-1]))


def attend_blocks(
    q: Tensor,
    keys: Keys,
    values: Values,
    block_ids: Tensor,
    softmax_scale: float,
    key_positions: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> Partial:
    """See reference.attend_blocks."""
    q = q.float().contiguous()
    partial = _empty_partial(q, _value_dim(values))
    torch.ops.pikv.attend_blocks_out(
        q,
        *_flat(keys),
        *_flat(values),
        *_low_rank(keys, values),
        block_ids,
        softmax_scale,
        key_positions,
        query_positions,
        *partial,
    )
    return partial


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
    """See reference.attend_decode."""
    q = q.float().contiguous()
    partial = _empty_partial(q, raw_v.shape[-1])
    raw = (_rows(raw_k), _rows(raw_v), slots, raw_first, raw_last)
    stored = (*_flat(keys), *_flat(values), *_low_rank(keys, values))
    torch.ops.pikv.attend_decode_out(q, *raw, *stored, block_ids, first_blocks, softmax_scale, *partial)
    return partial


def attend_windows(
    q: Tensor, raw_k: Tensor, raw_v: Tensor, slots: Tensor, raw_first: Tensor, raw_last: Tensor, softmax_scale: float
) -> Partial:
    """See reference.attend_windows."""
    q = q.float().contiguous()
    partial = _empty_partial(q, raw_v.shape[-1])
    raw = (_rows(raw_k), _rows(raw_v), slots, raw_first, raw_last)
    torch.ops.pikv.attend_windows_out(q, *raw, softmax_scale, *partial)
    return partial


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
    """See reference.attend_tokens."""
    q, block_ids, offsets = q.float().contiguous(), block_ids.contiguous(), offsets.contiguous()
    read = None if read is None else read.contiguous()
    partial = _empty_partial(q, _value_dim(values))
    stored = (*_flat(keys), *_flat(values), *_low_rank(keys, values))
    torch.ops.pikv.attend_tokens_out(q, *stored, block_ids, offsets, first_tokens, softmax_scale, read, *partial)
    return partial


def append(keys: Keys, values: Values, block_ids: Tensor, new_k: Tensor, new_v: Tensor) -> None:
    """See reference.append."""
    torch.ops.pikv.append_out(_rows(new_k), _rows(new_v), block_ids, *keys[:-1], *values[:-1])


def prefetch(field: Tensor, block_ids: Tensor) -> None:
    """See reference.prefetch."""
    torch.ops.pikv.prefetch(field, block_ids)


def attend_ragged(
    q: Tensor, keys: Keys, values: Values, block_ids: Tensor, first_blocks: Tensor, softmax_scale: float
) -> Partial:
    """See reference.attend_ragged."""
    q = q.float().contiguous()
    partial = _empty_partial(q, _value_dim(values))
    stored = (*_flat(keys), *_flat(values), *_low_rank(keys, values))
    torch.ops.pikv.attend_ragged_out(q, *stored, block_ids, first_blocks, softmax_scale, *partial)
    return partial


def attend_mass(
    q: Tensor,
    stored: list[tuple[Keys, Values, Tensor, Tensor]],
    scores: list[TokenScores],
    slope: float | None,
    raw_lse: Tensor,
    epsilon: float,
    softmax_scale: float,
) -> tuple[list[Partial], list[Tensor]]:
    """See reference.attend_mass. On CPU, of one pool without a low-rank part, little is read beyond what is needed;
    else every key is, and the values of the tokens that are needed: reading until it is enough would keep most of a GPU
    waiting.
    """
    low_rank = any(keys.low_rank or values.low_rank for keys, values, *_ in stored)
    if len(stored) == 1 and not q.is_cuda and not low_rank:
        partial, read = _attend_mass_of_one(q, stored[0], scores[0], slope, raw_lse, epsilon, softmax_scale)
        return [partial], [read]
    logits = [key_logits(q, keys, ids, first, softmax_scale) for keys, _, ids, first in stored]
    reads = reference.read_until_enough(stored, scores, slope, logits, raw_lse, epsilon, rank_tokens, select_mass)
    partials = []
    for (keys, values, block_ids, first), score, read in zip(stored, scores, reads, strict=True):
        size = score.coarse.shape[-1]
        tokens = block_ids.repeat_interleave(size).expand(q.shape[1], -1)
        offsets = torch.arange(size, device=q.device).repeat(len(block_ids)).expand_as(tokens)
        partials.append(attend_tokens(q, keys, values, tokens, offsets, first * size, softmax_scale, read))
    return partials, reads


def _attend_mass_of_one(
    q: Tensor,
    pool: tuple[Keys, Values, Tensor, Tensor],
    score: TokenScores,
    slope: float | None,
    raw_lse: Tensor,
    epsilon: float,
    softmax_scale: float,
) -> tuple[Partial, Tensor]:
    keys, values, block_ids, first_blocks = pool
    q = q.float().contiguous()
    partial = _empty_partial(q, _value_dim(values))
    coarse, extra = score.coarse.contiguous(), (score.radius if slope is None else score.spread).contiguous()
    read = q.new_empty(q.shape[1], coarse.shape[2] * coarse.shape[3], dtype=torch.bool)
    torch.ops.pikv.attend_mass_out(
        q,
        *_flat(keys),
        *_flat(values),
        block_ids,
        first_blocks,
        coarse,
        1.0 if slope is None else slope,
        extra,
        raw_lse.contiguous(),
        epsilon,
        softmax_scale,
        *partial,
        read,
    )
    return partial, read


def select_mass(
    order: Tensor, if_unread: Tensor, if_read: Tensor, raw_lse: Tensor, first_tokens: Tensor, epsilon: float
) -> Tensor:
    """See reference.select_mass."""
    order, if_unread, if_read, raw_lse = (x.contiguous() for x in (order, if_unread, if_read, raw_lse))
    read = torch.empty_like(order, dtype=torch.bool)
    torch.ops.pikv.select_mass_out(order, if_unread, if_read, raw_lse, first_tokens, epsilon, read)
    return read


def attend_window(q: Tensor, k: Tensor, v: Tensor, query_tokens: int, softmax_scale: float) -> Partial:
    """See reference.attend_window."""
    if query_tokens > MOST_WINDOW_TOKENS:
        return reference.attend_window(q, k, v, query_tokens, softmax_scale)
    if query_tokens == 1:
        return _attend_raw(q, k, v, None, None, softmax_scale)
    places = torch.arange(k.shape[1], device=k.device)
    queries = places[-query_tokens:].repeat(q.shape[1] // query_tokens)
    return _attend_raw(q, k, v, places, queries, softmax_scale)


def attend_at(
    q: Tensor, k: Tensor, v: Tensor, key_positions: Tensor, query_positions: Tensor, softmax_scale: float
) -> Partial:
    """See reference.attend_at."""
    return _attend_raw(q, k, v, key_positions.contiguous(), query_positions.contiguous(), softmax_scale)


def _attend_raw(
    q: Tensor, k: Tensor, v: Tensor, key_positions: Tensor | None, query_positions: Tensor | None, softmax_scale: float
) -> Partial:
    q = q.float().contiguous()
    partial = _empty_partial(q, v.shape[-1])
    torch.ops.pikv.attend_at_out(q, _rows(k), _rows(v), key_positions, query_positions, softmax_scale, *partial)
    return partial


def _rows(x: Tensor) -> Tensor:
    """x [..., tokens, channels] whose rows follow each other, as they do in a slice of a buffer."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def merge_partials(partials: list[Partial]) -> Partial:
    """See reference.merge_partials."""
    if len(partials) == 1:
        return partials[0]
    outs, lses = torch.stack([p.out for p in partials]), torch.stack([p.lse for p in partials])
    merged = Partial(torch.empty_like(outs[0]), torch.empty_like(lses[0]))
    torch.ops.pikv.merge_partials_out(outs, lses, *merged)
    return merged


def key_logits(q: Tensor, keys: Keys, block_ids: Tensor, first_blocks: Tensor, softmax_scale: float) -> Tensor:
    """See reference.key_logits."""
    q = q.float().contiguous()
    held = keys.raw if keys.raw is not None else keys.high
    assert held is not None
    logits = q.new_empty(*q.shape[1:3], block_ids.shape[0] * held.shape[2])
    stored = (*_flat(keys), *_low_rank(keys))
    torch.ops.pikv.key_logits_out(q, *stored, block_ids, first_blocks, softmax_scale, logits)
    return logits


def token_importance(
    q: Tensor, lse: Tensor, keys: Keys, block_ids: Tensor, first_blocks: Tensor, softmax_scale: float
) -> Tensor:
    """See reference.token_importance."""
    q = q.float().contiguous()
    held = keys.raw if keys.raw is not None else keys.high
    assert held is not None
    importance = q.new_empty(block_ids.shape[0], held.shape[2])
    stored = (*_flat(keys), *_low_rank(keys), block_ids, first_blocks)
    torch.ops.pikv.token_importance_out(q, lse.contiguous(), *stored, softmax_scale, importance)
    return importance


def window_importance(
    q: Tensor,
    lse: Tensor,
    raw_k: Tensor,
    slots: Tensor,
    raw_first: Tensor,
    raw_last: Tensor,
    softmax_scale: float,
) -> Tensor:
    """See reference.window_importance."""
    q = q.float().contiguous()
    importance = q.new_empty(q.shape[0], raw_k.shape[2])
    raw = (_rows(raw_k), slots, raw_first, raw_last)
    torch.ops.pikv.window_importance_out(q, lse.contiguous(), *raw, softmax_scale, importance)
    return importance


def prompt_importance(q: Tensor, lse: Tensor, k: Tensor, query_tokens: int, softmax_scale: float) -> Tensor:
    """See reference.prompt_importance."""
    q = q.float().contiguous()
    importance = q.new_empty(k.shape[1])
    torch.ops.pikv.prompt_importance_out(q, lse.contiguous(), _rows(k), query_tokens, softmax_scale, importance)
    return importance


def rank_tokens(coarse: Tensor, raw_lse: Tensor, first_tokens: Tensor) -> Tensor:
    """See reference.rank_tokens."""
    rank = coarse.new_empty(coarse.shape[0], coarse.shape[2])
    torch.ops.pikv.rank_tokens_out(coarse.contiguous(), raw_lse.contiguous(), first_tokens, rank)
    return rank


def select_topk(scores: Tensor, first_tokens: Tensor, first_chosen: Tensor, total_chosen: int) -> Tensor:
    """See reference.select_topk. Counts are looked at on CPU alone."""
    indices = scores.new_empty(scores.shape[0], total_chosen, dtype=torch.int64)
    torch.ops.pikv.select_topk_out(scores.contiguous(), first_tokens, first_chosen, indices)
    return indices


def unread_mass(scores: TokenScores, slope: float, read: Tensor, first_blocks: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.unread_mass."""
    coarse, radius, spread = (t.contiguous() for t in scores)
    by_spread = coarse.new_empty(len(first_blocks) - 1, *coarse.shape[:2])
    by_radius = torch.empty_like(by_spread)
    of_blocks = (coarse, slope, spread, radius, read.contiguous(), first_blocks)
    torch.ops.pikv.unread_mass_out(*of_blocks, by_spread, by_radius)
    return by_spread, by_radius
