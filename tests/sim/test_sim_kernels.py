"""Small kernels give on both simulators, for every seed, what numpy gives."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import numpy as np
import pytest

from tools import simulate


def pointer(array):
    return array.ctypes.data_as(c_void_p)


@pytest.fixture
def run(kernels, seed):
    """run(name, arguments...): calls a launcher with arrays by their pointers."""

    def call(name, *arguments):
        converted = [pointer(x) if isinstance(x, np.ndarray) else x for x in arguments]
        simulate.check(kernels, getattr(kernels, f"trial_{name}")(*converted))

    return call


@pytest.mark.parametrize("count", [1, 128, 1000])
def test_reduction(run, count):
    x = np.random.default_rng(count).integers(-8, 8, count).astype(np.float32)
    sums = np.full((count + 127) // 128, np.nan, np.float32)
    run("reduce", x, c_int64(count), sums)
    padded = np.pad(x, (0, 128 * len(sums) - count)).reshape(-1, 128)
    np.testing.assert_array_equal(sums, padded.sum(1))


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (37, 50)])
def test_transpose(run, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    y = np.full(shape[::-1], np.nan, np.float32)
    run("transpose", x, *shape, y)
    np.testing.assert_array_equal(y, x.T)


def test_scan_maximum_and_vote(run):
    x = np.random.default_rng(1).integers(-1000, 1000, (3 * 4, 32)).astype(np.int32)
    running, greatest, odd = np.zeros_like(x), np.zeros(12, np.int32), np.zeros(12, np.int32)
    run("scan", x, 3, running, greatest, odd)
    np.testing.assert_array_equal(running, x.cumsum(1))
    np.testing.assert_array_equal(greatest, x.max(1))
    np.testing.assert_array_equal(odd, (x % 2 != 0).sum(1))


@pytest.mark.parametrize("tiles", [0, 1, 2, 7])
def test_double_buffer(run, tiles):
    x = np.random.default_rng(2).integers(-100, 100, (tiles, 512)).astype(np.float32)
    sums = np.full(512, np.nan, np.float32)
    run("stream", x, tiles, sums)
    np.testing.assert_array_equal(sums, x.sum(0))


def test_atomics(run):
    x = np.random.default_rng(3).integers(0, 16, 5000).astype(np.int32)
    bins = np.zeros(16, np.int32)
    run("histogram", x, c_int64(len(x)), bins)
    np.testing.assert_array_equal(bins, np.bincount(x, minlength=16))


def test_half_conversions_of_every_half_and_what_lies_between(run):
    half = np.arange(2**16, dtype=np.uint16)
    exact = half.view(np.float16).astype(np.float32)
    rng = np.random.default_rng(4)
    x = np.concatenate(
        [
            exact[: 2**15],  # every float16 itself
            rng.uniform(-70000, 70000, 2**13).astype(np.float32),
            np.ldexp(rng.uniform(-1, 1, 2**14), rng.integers(-30, 17, 2**14)).astype(np.float32),
            rng.integers(0, 2**32, 2**13, dtype=np.uint32).view(np.float32),  # all sizes, NaN and infinities too
        ]
    )
    y, down, up = np.empty(2**16, np.float32), np.empty(2**16, np.uint16), np.empty(2**16, np.uint16)
    run("halves", half, x, len(x), y, down, up)
    np.testing.assert_array_equal(y, exact)
    nan = np.isnan(x)
    below, above = down.view(np.float16), up.view(np.float16)
    assert np.isnan(below[nan]).all() and np.isnan(above[nan]).all()
    x, below, above = x[~nan], below[~nan], above[~nan]
    assert (below <= x).all() and (above >= x).all()
    is_half = np.isin(x, exact[np.isfinite(exact)]) | np.isinf(x)
    np.testing.assert_array_equal(below[is_half], x[is_half])
    np.testing.assert_array_equal(above[is_half], x[is_half])
    between = ~is_half
    with np.errstate(over="ignore"):  # the next after the greatest is infinity
        next_up = np.nextafter(below[between], np.float16(np.inf))
    np.testing.assert_array_equal(np.where(next_up == 0, 0, next_up), np.where(above[between] == 0, 0, above[between]))


def bits(x, start, count):
    return (x >> start) & ((1 << count) - 1)


def divided(a, b):
    """a / b towards zero, as C has it."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def whole_numbers(p, q, r, s):
    """What numbers_kernel does with two ints and two floats, in Python's own numbers."""
    u, v = p % 2**32, q % 2**32
    wide = p * 1000003 + q
    chosen = [bits(v << 32 | u, 8 * bits(u, 4 * i, 3), 8) for i in range(4)]
    return [
        divided(p, q),
        p - q * divided(p, q),
        u // v,
        u % v,
        p * q,
        divided(wide, q),
        wide - q * divided(wide, q),
        p >> (q & 31),
        (u >> (v & 31)) ^ (u << (v & 31)) % 2**32,
        u.bit_count() * 10000 + (32 - u.bit_length()) * 100 + (u & -u).bit_length(),
        sum(byte << 8 * i for i, byte in enumerate(chosen)),
        sum(truth << i for i, truth in enumerate([r < s, r <= s, r == s, r != s, not r < s, not r >= s, not r > s])),
        max(p, q) - min(p, q) + int(r) + round(r),
    ]


def test_numbers(run):
    rng = np.random.default_rng(7)
    count = 1000
    a, b = rng.integers(-(2**31), 2**31, (2, count)) >> rng.integers(0, 31, (2, count))
    a, b = a.astype(np.int32), np.where(b == 0, 7, b).astype(np.int32)
    x, y = rng.uniform(-50, 50, (2, count)).astype(np.float32)
    y[::7], y[::11], x[::13] = x[::7], np.nan, np.round(x[::13]) + 0.5
    whole, real = np.zeros((13, count), np.int64), np.zeros((7, count), np.float32)
    run("numbers", a, b, x, y, count, whole, real)
    expected = [whole_numbers(*numbers) for numbers in zip(a.tolist(), b.tolist(), x.tolist(), y.tolist(), strict=True)]
    np.testing.assert_array_equal(whole, np.array(expected, np.int64).T)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(real[0], np.exp(wide), rtol=2e-6)
    np.testing.assert_allclose(real[1], np.log(np.abs(wide)), rtol=1e-6, atol=1e-7)
    with np.errstate(invalid="ignore"):
        exact = [np.sqrt(np.abs(x)), np.fmin(x, y), np.fmax(x, y), x / y, np.floor(x)]
    np.testing.assert_array_equal(real[2:], np.array(exact))


def test_dp4a(run):
    rng = np.random.default_rng(5)
    a, b = rng.integers(-128, 128, (8, 4 * 45)).astype(np.int8), rng.integers(-128, 128, 4 * 45).astype(np.int8)
    sums = np.zeros(8, np.int32)
    run("dots", a, b, 8, 45, sums)
    np.testing.assert_array_equal(sums, a.astype(np.int32) @ b.astype(np.int32))


def test_warps_pass_on(run):
    x = np.random.default_rng(6).integers(0, 1000, (8, 32)).astype(np.int32)
    y = np.zeros_like(x)
    run("pass_on", x, 2, 9, y)
    np.testing.assert_array_equal(y, np.roll(x, -5 * 9, axis=1) + 9)
