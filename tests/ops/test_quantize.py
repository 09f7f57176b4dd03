"""quantize_block, dequantize_block, pack and unpack: every code within half a step, scale and zero rounded outwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pikv_megatron.ops import reference
from pikv_megatron.ops.reference import SMALLEST_SCALE, pack, round_half_down, round_half_up, unpack

PLANES = {"int8": (4, 4), "int4": (2, 2), "int2": (2, 0), "values int8": (8, 0), "values int4": (4, 0)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _kinds() -> dict[str, torch.Tensor]:
    """Blocks [20, 2, 8, 16] that are easy or hard to quantise."""
    rng = torch.Generator().manual_seed(1)
    normal = torch.randn(20, 2, 8, 16, generator=rng)
    offset = torch.randn(20, 2, 1, 16, generator=rng)
    extreme = torch.where(normal > 0, 65504.0, -65504.0)
    return {
        "normal": normal,
        "tiny": normal * 1e-7,
        "large": (normal * 2e4).clamp(-65504, 65504),
        "offset": normal + 1000 * offset,
        "far": (0.01 * normal + 30000 * offset).clamp(-65504, 65504),
        "constant": offset.expand_as(normal).clone(),
        "zero": torch.zeros_like(normal),
        "extreme": extreme,
        "almost constant": torch.where(normal > 2, offset * 1.0001, offset.expand_as(normal)),
        "subnormal": normal * 1e-40,
        "one sided": normal.abs() * 3e-5,
    }


KINDS = _kinds()


@pytest.fixture(params=PLANES)
def planes(request):
    return PLANES[request.param]


@pytest.fixture(params=KINDS)
def data(request):
    return KINDS[request.param]


def _finite_halves() -> torch.Tensor:
    """Every finite float16 number once, ascending, as float32."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    return every[every.isfinite()].unique()


def test_directed_rounding_at_and_around_every_half():
    halves = _finite_halves()
    low, high = halves[:-1], halves[1:]
    assert torch.equal(round_half_down(halves).float(), halves)
    assert torch.equal(round_half_up(halves).float(), halves)
    inside = torch.stack([torch.nextafter(low, high), (low + high) / 2, torch.nextafter(high, low)])
    assert torch.equal(round_half_down(inside).float(), low.expand_as(inside))
    assert torch.equal(round_half_up(inside).float(), high.expand_as(inside))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack_is_planar_and_unpack_its_inverse(bits):
    per_byte = 8 // bits
    channels = torch.arange(4 * per_byte)
    codes = ((channels * 7 + torch.arange(64).unsqueeze(1)) % 2**bits).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (64, 4)
    for channel in range(4 * per_byte):
        place = packed[:, channel % 4] >> (channel // 4 * bits)
        assert torch.equal(place & (2**bits - 1), codes[:, channel])
    assert torch.equal(unpack(packed, bits), codes)
    every_byte = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    assert torch.equal(pack(unpack(every_byte, bits), bits), every_byte)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_channel", [True, False])
def test_error_is_at_most_half_a_step(ops, planes, data, per_channel, dtype):
    largest = 65280 if dtype == torch.bfloat16 else 65504  # the largest that fits float16 too
    x = data.clamp(-largest, largest).to(dtype)
    high, low, scale, zero = ops.quantize_block(x, *planes, per_channel=per_channel)
    decoded = ops.dequantize_block(high, low, scale, zero, *planes, per_channel=per_channel)
    assert decoded.dtype == torch.float32
    dim = -2 if per_channel else -1
    step = scale.double().unsqueeze(dim)
    x = x.double()
    # float32's own rounding: of the code before it is cut to an integer, and of the decoded number.
    rounding = step * 2 ** (sum(planes) - 22) + torch.maximum(x.abs(), decoded.abs()) * 2.0**-23
    assert ((decoded - x).abs() <= step / 2 + rounding).all()


@pytest.mark.parametrize("per_channel", [True, False])
def test_zero_is_the_half_below_and_scale_the_half_above(ops, planes, data, per_channel):
    levels = 2 ** sum(planes) - 1
    _, _, scale, zero = ops.quantize_block(data, *planes, per_channel=per_channel)
    dim = -2 if per_channel else -1
    least, zero = data.amin(dim).numpy(), zero.numpy()
    assert (zero.astype(np.float32) <= least).all()
    with np.errstate(over="ignore"):  # above the largest half comes infinity
        assert (np.nextafter(zero, np.float16(np.inf)).astype(np.float32) > least).all()
    wanted = (data.amax(dim).double() - torch.from_numpy(zero).double()).numpy() / levels
    scale = scale.numpy()
    assert (scale.astype(np.float64) >= wanted * (1 - 2**-22)).all()
    below = np.nextafter(scale, np.float16(0)).astype(np.float64)
    assert ((below < wanted * (1 + 2**-22)) | (scale == np.float16(SMALLEST_SCALE))).all()


def test_constant_channels_come_back_exactly(ops, planes):
    x = torch.tensor([0.0, 1.0, -3.5, 1024.0, -65504.0, 65504.0, 2.0**-24, -(2.0**-14)]).repeat(2)
    x = x.expand(3, 1, 8, 16).contiguous()
    high, low, scale, zero = ops.quantize_block(x, *planes, per_channel=True)
    assert (scale == SMALLEST_SCALE).all()
    assert torch.equal(ops.dequantize_block(high, low, scale, zero, *planes, per_channel=True), x)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_the_high_plane_alone_is_a_coarse_key(ops, data, codec):
    hi, lo = PLANES[codec]
    high, low, scale, zero = ops.quantize_block(data, hi, lo, per_channel=True)
    coarse = ops.dequantize_block(high, None, scale, zero, hi, lo, per_channel=True)
    full = ops.dequantize_block(high, low, scale, zero, hi, lo, per_channel=True)
    step = scale.double().unsqueeze(-2)
    rounding = torch.maximum(coarse.abs(), full.abs()).double() * 2.0**-22
    assert ((coarse - full).double().abs() <= step * (2**lo - 1) / 2 + rounding).all()
    assert (coarse - full).abs().max() > 0 or (scale == SMALLEST_SCALE).all()


def test_planes_hold_the_bits_of_one_code(ops, data):
    nested_high, nested_low, scale, zero = ops.quantize_block(data, 4, 4, per_channel=True)
    codes, nothing, whole_scale, whole_zero = ops.quantize_block(data, 8, 0, per_channel=True)
    assert nothing is None
    assert torch.equal(scale, whole_scale)
    assert torch.equal(zero, whole_zero)
    assert torch.equal((unpack(nested_high, 4) << 4) | unpack(nested_low, 4), codes)


def test_shapes_and_bytes(ops):
    x = torch.randn(3, 2, 8, 24)
    high, low, scale, zero = ops.quantize_block(x, 2, 2, per_channel=True)
    assert high.shape == low.shape == (3, 2, 8, 6)
    assert high.dtype == low.dtype == torch.uint8
    assert scale.shape == zero.shape == (3, 2, 24)
    assert scale.dtype == zero.dtype == torch.float16
    codes, _, scale, _ = ops.quantize_block(x, 4, 0, per_channel=False)
    assert codes.shape == (3, 2, 8, 12)
    assert scale.shape == (3, 2, 8)


def _near_ties(levels: int, per_channel: bool) -> torch.Tensor:
    """Blocks [60, 1, 20, 100] whose numbers lie on, just below and just above the middle between two codes."""
    rng = torch.Generator().manual_seed(2)
    shape = (60, 1, 20, 100)
    groups = (60, 1, 1, 100) if per_channel else (60, 1, 20, 1)
    step = torch.exp2(torch.randint(-12, 6, groups, generator=rng).float())
    step = step * (1 + torch.randint(0, 1024, groups, generator=rng) / 1024)
    codes = torch.randint(0, levels, shape, generator=rng) + 0.5
    if per_channel:
        codes[..., 0, :], codes[..., 1, :] = 0, levels
    else:
        codes[..., 0], codes[..., 1] = 0, levels
    off = torch.randint(-3, 4, shape, generator=rng).float()
    x = codes * step
    return x + off * (torch.nextafter(x, torch.tensor(torch.inf)) - x)


@pytest.mark.parametrize("per_channel", [True, False])
def test_codes_are_bit_equal_to_the_references(ops, planes, per_channel):
    kinds = [*KINDS.values(), _near_ties(2 ** sum(planes) - 1, per_channel)]
    for x in kinds:
        got = ops.quantize_block(x, *planes, per_channel=per_channel)
        for mine, truth in zip(got, reference.quantize_block(x, *planes, per_channel=per_channel), strict=True):
            assert (mine is None and truth is None) or torch.equal(mine, truth)


def test_what_is_written_past_the_caches_is_the_same(ops):
    """Decoding is in pieces of its own where the result is larger than a cache."""
    x = torch.randn(300, 2, 32, 128, generator=torch.Generator().manual_seed(3))
    for hi, lo, per_channel in ((4, 4, True), (2, 2, True), (8, 0, False), (4, 0, False)):
        planes = ops.quantize_block(x, hi, lo, per_channel=per_channel)
        whole = ops.dequantize_block(*planes, hi, lo, per_channel=per_channel)
        parts = [None if t is None else t.split(7) for t in planes]
        for i, expected in enumerate(whole.split(7)):
            piece = ops.dequantize_block(*(p and p[i] for p in parts), hi, lo, per_channel=per_channel)
            assert torch.equal(piece, expected)
