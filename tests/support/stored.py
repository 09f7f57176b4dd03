"""Random stored blocks for the tests of the ops, beside what they decode to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_megatron.codecs import CODECS
from pikv_megatron.ops import reference
from pikv_megatron.ops.reference import Keys, LowRank, Values


class Stored(NamedTuple):
    """Pools as the ops take them, and what they hold: k [blocks, G, B, D], v [blocks, G, B, E], float64."""

    keys: Keys
    values: Values
    k: Tensor
    v: Tensor


def store(k: Tensor, v: Tensor, codec: str) -> Stored:
    """Blocks of raw k [blocks, G, B, D] and v [blocks, G, B, E] (float32 or narrower); codec none keeps an index."""
    hi, lo = CODECS.pick(codec).key_planes
    high, low, scale, zero = reference.quantize_block(k, hi, lo, per_channel=True)
    raw = codec == "none"
    keys = Keys(k if raw else None, high, low, scale, zero, hi, lo)
    decoded_k = k if raw else reference.dequantize_block(high, low, scale, zero, hi, lo, per_channel=True)
    if raw:
        return Stored(keys, Values(v, None, None, None, 0), decoded_k.double(), v.double())
    bits = CODECS.pick(codec).value_bits
    codes, _, v_scale, v_zero = reference.quantize_block(v, bits, 0, per_channel=False)
    decoded_v = reference.dequantize_block(codes, None, v_scale, v_zero, bits, 0, per_channel=False)
    return Stored(keys, Values(None, codes, v_scale, v_zero, bits), decoded_k.double(), decoded_v.double())


def random_store(
    blocks: int, groups: int, size: int, dim: int, value_dim: int, codec: str, seed: int = 0, dtype=torch.float32
) -> Stored:
    """Normal K with an offset per channel, as real keys have, and normal V."""
    rng = torch.Generator().manual_seed(seed)
    k = torch.randn(blocks, groups, size, dim, generator=rng) + 2 * torch.randn(1, groups, 1, dim, generator=rng)
    v = torch.randn(blocks, groups, size, value_dim, generator=rng)
    return store(k.to(dtype), v.to(dtype), codec)


def random_part(blocks: int, groups: int, size: int, channels: int, rank: int, bases: int, seed: int = 0) -> LowRank:
    """A low-rank part of normal factors and small bases, which blocks have at random."""
    rng = torch.Generator().manual_seed(seed)
    factors = torch.randn(blocks, groups, size, rank, generator=rng)
    codes, _, scale, zero = reference.quantize_block(factors, 8, 0, per_channel=True)
    basis = 0.3 * torch.randn(bases, groups, rank, channels, generator=rng)
    return LowRank(codes, scale, zero, basis, torch.randint(0, bases, (blocks,), generator=rng))


def with_parts(held: Stored, rank_k: int, rank_v: int, bases: int) -> Stored:
    """The same blocks with a low-rank part beside keys and values; of rank 0 there is none."""
    blocks, groups, size, dim = held.k.shape
    keys, values, k, v = held
    if rank_k:
        part = random_part(blocks, groups, size, dim, rank_k, bases, seed=1)
        keys, k = keys._replace(low_rank=part), k + _added(part)
    if rank_v:
        part = random_part(blocks, groups, size, held.v.shape[-1], rank_v, bases, seed=2)
        values, v = values._replace(low_rank=part), v + _added(part)
    return Stored(keys, values, k, v)


def _added(part: LowRank) -> Tensor:
    factors = part.codes.double() * part.scale.double().unsqueeze(2) + part.zero.double().unsqueeze(2)
    return torch.einsum("ngbr,ngrc->ngbc", factors, part.basis[part.basis_of].double())


def rows_of(stored: Stored, block_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The decoded tokens of block_ids [n] as [G, n * B, channels], float64."""
    return tuple(x[block_ids].transpose(0, 1).flatten(1, 2) for x in (stored.k, stored.v))


def dense_rows(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Float64 attention of q [G, R, D] over k [G, S, D], v [G, S, E]; seen [R, S] or [G, R, S] bool."""
    logits = torch.einsum("grd,gsd->grs", q.double(), k.double()) * scale
    if seen is not None:
        logits = logits.masked_fill(~seen.expand_as(logits), -torch.inf)
    lse = torch.logsumexp(logits, -1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return torch.einsum("grs,gse->gre", weights, v.double()), lse
