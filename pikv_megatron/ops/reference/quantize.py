"""Codes of blocks: how they are made, packed, stored and decoded.

A code c of `hi_bits + lo_bits` bits stands for zero + scale * c. Keys are stored as two bit-planes: the high plane
alone is a coarse key, both together the full one. Planes are packed planar: with `m` codes per byte, byte j holds
channels j, j + D/m, j + 2D/m, ... from its least significant bits up. zero is rounded down and scale up to float16, so
that the codes cover the data: the error is at most scale / 2 everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24
"""float16's smallest positive number: the scale of a channel that is constant in its block."""


class LowRank(NamedTuple):
    """What is added to the decoded rows of a pool's blocks: A B, with factors A of r coefficients per token and head
    and a basis B that blocks share. A is 8-bit codes with a scale and a zero per coefficient of the block:
    codes [blocks, G, B, r] uint8; scale, zero [blocks, G, r] float16; basis [bases, G, r, channels] float32; basis_of
    [blocks] int64, the basis of each block.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    basis: Tensor
    basis_of: Tensor


class Keys(NamedTuple):
    """Stored keys of a pool. `raw` [blocks, G, B, D] or None (then codes are the keys); high [blocks, G, B,
    D*hi_bits/8] uint8, low likewise or None, scale and zero [blocks, G, D] float16: all None where the pool has no
    codes. low_rank is read by what attends and by the logits, not by scores and bounds.
    """

    raw: Tensor | None
    high: Tensor | None
    low: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    hi_bits: int
    lo_bits: int
    low_rank: LowRank | None = None


class Values(NamedTuple):
    """Stored values of a pool. `raw` [blocks, G, B, E] or None; codes [blocks, G, B, E*bits/8] uint8, scale and zero
    [blocks, G, B].
    """

    raw: Tensor | None
    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    bits: int
    low_rank: LowRank | None = None


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


def decode_keys(keys: Keys, block_ids: Tensor) -> Tensor:
    """Keys of the blocks `block_ids` [n]: [n, G, B, D] float32."""
    if keys.raw is not None:
        k = keys.raw.index_select(0, block_ids).float()
    else:
        high, low, scale, zero = (None if t is None else t.index_select(0, block_ids) for t in keys[1:5])
        k = dequantize_block(high, low, scale, zero, keys.hi_bits, keys.lo_bits, per_channel=True)  # type: ignore[arg-type]
    return k if keys.low_rank is None else k + decode_low_rank(keys.low_rank, block_ids)


def decode_values(values: Values, block_ids: Tensor) -> Tensor:
    """Values of the blocks `block_ids` [n]: [n, G, B, E] float32."""
    if values.raw is not None:
        v = values.raw.index_select(0, block_ids).float()
    else:
        codes, scale, zero = (t.index_select(0, block_ids) for t in values[1:4])  # type: ignore[union-attr]
        v = dequantize_block(codes, None, scale, zero, values.bits, 0, per_channel=False)
    return v if values.low_rank is None else v + decode_low_rank(values.low_rank, block_ids)


def decode_low_rank(part: LowRank, block_ids: Tensor) -> Tensor:
    """What the part adds to blocks `block_ids` [n]: [n, G, B, channels] float32."""
    codes, scale, zero = (t.index_select(0, block_ids) for t in part[:3])
    factors = dequantize_block(codes, None, scale, zero, 8, 0, per_channel=True)
    return torch.matmul(factors, part.basis[part.basis_of[block_ids]])


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
        v = at(values.raw).float()
    else:
        assert values.codes is not None and values.scale is not None and values.zero is not None
        v = dequantize_block(
            at(values.codes), None, at(values.scale), at(values.zero), values.bits, 0, per_channel=False
        )

    def added(part: LowRank) -> Tensor:
        factors = at(part.codes) * part.scale[block_ids, heads].float() + part.zero[block_ids, heads].float()
        return torch.einsum("gnr,gnrc->gnc", factors, part.basis[part.basis_of[block_ids], heads])

    return (
        k if keys.low_rank is None else k + added(keys.low_rank),
        v if values.low_rank is None else v + added(values.low_rank),
    )


def append(keys: Keys, values: Values, block_ids: Tensor, new_k: Tensor, new_v: Tensor) -> None:
    """Encodes new blocks and writes them to the blocks block_ids [n] of a pool, into every field that it has.

    Args:
        keys, values: the pool's fields, written to. new_k: [n, G, B, D]. new_v: [n, G, B, E]. Where the pool holds raw
            keys or values, of the pool's dtype.
    """
    if keys.raw is not None:
        keys.raw.index_copy_(0, block_ids, new_k)
    if keys.high is not None:
        planes = quantize_block(new_k, keys.hi_bits, keys.lo_bits, per_channel=True)
        for field, new in zip(keys[1:5], planes, strict=True):
            if field is not None and new is not None:
                field.index_copy_(0, block_ids, new)
    if values.raw is not None:
        values.raw.index_copy_(0, block_ids, new_v)
    if values.codes is not None:
        codes, _, scale, zero = quantize_block(new_v, values.bits, 0, per_channel=False)
        for field, new in zip(values[1:4], (codes, scale, zero), strict=True):
            assert field is not None
            field.index_copy_(0, block_ids, new)


def prefetch(field: Tensor, block_ids: Tensor) -> None:
    """Asks for rows block_ids [n] of a pool's field [blocks, ...] to be brought near the processor; a hint only."""
