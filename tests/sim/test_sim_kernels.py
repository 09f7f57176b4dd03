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
