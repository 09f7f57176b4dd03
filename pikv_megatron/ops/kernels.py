"""The compiled ops `torch.ops.pikv.*_out` under the names and signatures of their references."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_megatron.ops import reference
from pikv_megatron.ops.reference import Keys, Partial, Values

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
    "merge_partials",
    "score_blocks",
    "score_tokens",
    "key_logits",
    "token_importance",
    "window_importance",
    "rank_tokens",
    "select_topk",
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


def prompt_importance(q: Tensor, lse: Tensor, k: Tensor, query_tokens: int, softmax_scale: float) -> Tensor:
    """See reference.prompt_importance."""
    q = q.float().contiguous()
    importance = q.new_empty(k.shape[1])
    torch.ops.pikv.window_importance_out(q, lse.contiguous(), _rows(k), query_tokens, softmax_scale, importance)
    return importance
