"""The compiled ops `torch.ops.pikv.*_out` under the names and signatures of their references."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_megatron.ops.reference import BlockScores, Keys, Partial, TokenScores, Values

OUT_OPS = ("quantize_block", "dequantize_block", "score_blocks", "score_tokens", "attend_blocks", "attend_tokens")


def register_fakes() -> None:
    """For tensors without memory (meta, fake): the ops write into what they are given, so there is nothing to do."""
    for name in OUT_OPS:
        torch.library.register_fake(f"pikv::{name}_out", lambda *args: None)


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


def score_blocks(q: Tensor, keys: Keys, block_ids: Tensor, softmax_scale: float) -> BlockScores:
    """See reference.score_blocks."""
    q = q.float().contiguous()
    bound = q.new_empty(*q.shape[:2], block_ids.shape[0])
    scores = BlockScores(bound, torch.empty_like(bound), torch.empty_like(bound))
    _, _, _, scale, zero, *_ = _flat(keys)
    bits = keys.hi_bits + keys.lo_bits
    torch.ops.pikv.score_blocks_out(q, scale, zero, bits, block_ids, softmax_scale, *scores)
    return scores


def score_tokens(q: Tensor, keys: Keys, block_ids: Tensor, softmax_scale: float) -> TokenScores:
    """See reference.score_tokens."""
    raw, high, _, scale, zero, hi_bits, lo_bits = _flat(keys)
    assert keys.high is not None
    q, block_ids = q.float().contiguous(), block_ids.contiguous()
    coarse = q.new_empty(*q.shape[:2], block_ids.shape[-1], keys.high.shape[2])
    radius = q.new_empty(coarse.shape[:3])
    spread = torch.empty_like(radius)
    torch.ops.pikv.score_tokens_out(
        q,
        raw,
        high,
        scale,
        zero,
        hi_bits,
        lo_bits,
        block_ids,
        softmax_scale,
        coarse,
        radius,
        spread,
    )
    return TokenScores(coarse, radius, spread)


def _flat(fields: Keys | Values) -> list[Tensor | int | None]:
    """The fields as the ops take them; a pool's tensors are contiguous and pass as they are."""
    return [field.contiguous() if isinstance(field, Tensor) else field for field in fields]


def _value_dim(values: Values) -> int:
    if values.raw is not None:
        return values.raw.shape[3]
    assert values.codes is not None
    return values.codes.shape[3] * 8 // values.bits


def _empty_partial(q: Tensor, values: Values) -> Partial:
    return Partial(q.new_empty(*q.shape[:2], _value_dim(values)), q.new_empty(q.shape[:2]))


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
    partial = _empty_partial(q, values)
    torch.ops.pikv.attend_blocks_out(
        q, *_flat(keys), *_flat(values), block_ids, softmax_scale, key_positions, query_positions, *partial
    )
    return partial


def attend_tokens(
    q: Tensor,
    keys: Keys,
    values: Values,
    block_ids: Tensor,
    offsets: Tensor,
    softmax_scale: float,
    read: Tensor | None = None,
) -> Partial:
    """See reference.attend_tokens."""
    q, block_ids, offsets = q.float().contiguous(), block_ids.contiguous(), offsets.contiguous()
    read = None if read is None else read.contiguous()
    partial = _empty_partial(q, values)
    torch.ops.pikv.attend_tokens_out(q, *_flat(keys), *_flat(values), block_ids, offsets, softmax_scale, read, *partial)
    return partial
