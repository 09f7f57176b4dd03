"""The kernels that encode and decode blocks: codes bit-equal to the reference's."""

from __future__ import annotations

import pytest
import torch
from pairs import every_case, every_pair, name_of
from torch import Tensor

from pikv_megatron.ops import reference
from pikv_megatron.ops.reference import Keys, Values

REFUSED = r"error 1$|multiples of 16"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = {"float32": 65504, "bfloat16": 65280, "float16": 65504}  # that fits float16 too
CODES = {
    "dtype": tuple(DTYPES),
    "planes": ((4, 4), (2, 2), (2, 0), (4, 0), (8, 0)),
    "per_channel": (True, False),
    "dim": (16, 64, 80, 96, 128, 192, 256),
    "block_size": (1, 16, 32, 64),
    "blocks": (1, 3),
    "kind": (
        "normal",
        "large",
        "far",
        "tiny",
        "subnormal",
        "constant",
        "zero",
        "negative zero",
        "extreme",
        "one sided",
    ),
}
POOLS = {
    "dtype": tuple(DTYPES),
    "keys": ("none", "index", "int8", "int4", "int2"),
    "values": ("none", "int8", "int4", "int2"),
    "dim": (64, 80, 96, 128, 192, 256),
    "value_dim": (64, 128, 256),
    "block_size": (16, 32, 64),
    "count": (0, 1, 4),
}
PLANES = {"none": (0, 0), "index": (2, 0), "int8": (4, 4), "int4": (2, 2), "int2": (2, 0)}
VALUE_BITS = {"none": 0, "int8": 8, "int4": 4, "int2": 2}


def _blocks(kind: str, shape: tuple[int, ...]) -> Tensor:
    """float32 blocks that are easy or hard to quantise."""
    rng = torch.Generator().manual_seed(1)
    normal, offset = torch.randn(shape, generator=rng), torch.randn(*shape[:2], 1, shape[3], generator=rng)
    made = {
        "normal": normal + 2 * offset,
        "large": normal * 2e4,
        "far": 0.01 * normal + 30000 * offset,
        "tiny": normal * 1e-7,
        "subnormal": normal * 1e-40,
        "constant": offset.expand(shape),
        "zero": torch.zeros(shape),
        "negative zero": torch.where(normal > 0, 0.0, -0.0),
        "extreme": torch.where(normal > 0, 1e9, -1e9),
        "one sided": normal.abs() * 3e-5,
    }
    return made[kind]


def _equal(found, expected, names=("high", "low", "scale", "zero")) -> None:
    """Bit for bit, the sign of zero included."""
    for name, a, b in zip(names, found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.equal(*(x.view(torch.int16) if x.dtype == torch.float16 else x for x in (a, b))), name


def _check_codes(cuda, dtype, planes, per_channel, dim, block_size, blocks, kind):
    x = _blocks(kind, (blocks, 2, block_size, dim)).clamp(-LARGEST[dtype], LARGEST[dtype]).to(DTYPES[dtype])
    expected = reference.quantize_block(x, *planes, per_channel=per_channel)
    _equal(cuda.quantize_block(x.contiguous(), *planes, per_channel), expected)
    for low in (expected[1], None):
        parts = (expected[0], low, *expected[2:], *planes, per_channel)
        decoded, wanted = cuda.dequantize_block(*parts), reference.dequantize_block(*parts)
        largest = wanted.abs().amax(-1, keepdim=True) + expected[3].float().abs().max()
        assert ((decoded - wanted).abs() <= 2.0**-23 * largest).all()  # one rounding less than the reference has


@pytest.mark.parametrize("case", every_pair(CODES), ids=name_of)
def test_codes(cuda, case):
    _check_codes(cuda, **case)


@pytest.mark.slow
@pytest.mark.parametrize("planes", CODES["planes"])
@pytest.mark.parametrize("dim", CODES["dim"])
def test_codes_in_every_case(cuda, planes, dim):
    for case in every_case({**CODES, "planes": [planes], "dim": [dim], "blocks": [2]}):
        _check_codes(cuda, **case)


def _pool(blocks: int, dtype, keys, values, dim, value_dim, block_size) -> tuple[Keys, Values]:
    """Storage of two KV heads, all bytes set, so that what is not to be written shows."""

    def field(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        size = torch.empty(0, dtype=dtype).element_size()
        return torch.full((blocks, 2, *shape[:-1], shape[-1] * size), 0x5A, dtype=torch.uint8).view(dtype)

    hi, lo = PLANES[keys]
    bits, half = VALUE_BITS[values], torch.float16
    raw_k = field(block_size, dim, dtype=DTYPES[dtype]) if keys in ("none", "index") else None
    coded_k = (
        field(block_size, dim * hi // 8) if hi else None,
        field(block_size, dim * lo // 8) if lo else None,
        *([field(dim, dtype=half), field(dim, dtype=half)] if hi else [None, None]),
    )
    if bits == 0:
        return Keys(raw_k, *coded_k, hi, lo), Values(
            field(block_size, value_dim, dtype=DTYPES[dtype]), None, None, None, 0
        )
    scales = (field(block_size, dtype=half), field(block_size, dtype=half))
    return Keys(raw_k, *coded_k, hi, lo), Values(None, field(block_size, value_dim * bits // 8), *scales, bits)


def _check_append(cuda, dtype, keys, values, dim, value_dim, block_size, count):
    pool = _pool(7, dtype, keys, values, dim, value_dim, block_size)
    before = [[None if x is None else x.clone() for x in part[:5] if not isinstance(x, int)] for part in pool]
    rng = torch.Generator().manual_seed(2)
    ids = torch.randperm(7, generator=rng)[:count]
    k, v = (torch.randn(count, 2, block_size, n, generator=rng).to(DTYPES[dtype]) for n in (dim, value_dim))
    cuda.append(*pool, ids, k, v)

    encoded_k = (
        reference.quantize_block(k, *PLANES[keys], per_channel=True) if PLANES[keys][0] and count else (None,) * 4
    )
    bits = VALUE_BITS[values]
    encoded_v = reference.quantize_block(v, bits, 0, per_channel=False) if bits and count else (None,) * 4
    wanted = [[k, *encoded_k], [v, encoded_v[0], *encoded_v[2:]]]
    for fields, old, new in zip(pool, before, wanted, strict=True):
        for found, then, written in zip(fields, old, new, strict=False):
            if found is not None:
                if count:
                    then[ids] = written
                assert torch.equal(found.view(torch.uint8), then.view(torch.uint8))


@pytest.mark.parametrize("case", every_pair(POOLS), ids=name_of)
def test_append(cuda, case):
    _check_append(cuda, **case)


def test_append_of_blocks_that_are_apart(cuda):
    """New blocks as slices of a larger buffer, KV heads first: only a token's channels lie together."""
    keys, values = _pool(4, "float32", "index", "int4", 64, 32, 16)
    buffer_k, buffer_v = (torch.randn(2, 5, 16, n, generator=torch.Generator().manual_seed(3)) for n in (64, 32))
    k, v = (x.transpose(0, 1)[1:4] for x in (buffer_k, buffer_v))
    assert not k.is_contiguous()
    cuda.append(keys, values, torch.tensor([3, 0, 2]), k, v)
    assert torch.equal(keys.raw[[3, 0, 2]], k)
    high, _, scale, zero = reference.quantize_block(k, 2, 0, per_channel=True)
    _equal(
        tuple(x[[3, 0, 2]] for x in (keys.high, keys.scale, keys.zero)), (high, scale, zero), ("high", "scale", "zero")
    )
    codes, _, scale, zero = reference.quantize_block(v, 4, 0, per_channel=False)
    _equal(tuple(x[[3, 0, 2]] for x in values[1:4]), (codes, scale, zero), ("codes", "scale", "zero"))


@pytest.mark.slow
@pytest.mark.parametrize("keys", POOLS["keys"])
@pytest.mark.parametrize("values", POOLS["values"])
def test_append_in_every_case(cuda, keys, values):
    for case in every_case({**POOLS, "keys": [keys], "values": [values]}):
        _check_append(cuda, **case)


@pytest.mark.parametrize("planes", [(6, 2), (2, 4), (8, 8), (3, 0)])
def test_other_planes_are_refused(cuda, planes):
    with pytest.raises(RuntimeError, match=REFUSED):
        cuda.quantize_block(torch.zeros(1, 16, 64), *planes, True)


def test_other_channels_are_refused(cuda):
    with pytest.raises(RuntimeError, match=REFUSED):
        cuda.quantize_block(torch.zeros(1, 16, 272), 4, 4, True)
    with pytest.raises(RuntimeError, match=REFUSED):
        cuda.quantize_block(torch.zeros(1, 16, 40), 4, 4, True)
