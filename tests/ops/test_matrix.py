"""Every shape and dtype that is promised, against float64: dtype x codec x head_dim x query heads per KV head x block
size x length, and ranks of low-rank parts. By default each pair of values of two of them comes up at least once; all
products, but of the ranks, are slow.

Whatever the dtype of q, K and V, what is computed from them is float32: the same bounds hold.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from one_request import OneRequest
from stored import dense_rows, random_store, rows_of, with_parts

from pikv_megatron.ops import reference

AXES = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "codec": ("none", "int8", "int4", "int2"),
    "dim": (64, 80, 96, 128, 192, 256),
    "heads": (1, 2, 4, 7, 8),
    "size": (16, 32, 64),
    "length": ((0, 1), (1, 0), (1, 15), (3, 40), (9, 1)),  # blocks, tokens in the window
}
RANKS = ((1, 0), (0, 16), (16, 16), (64, 5), (33, 64))  # of keys and values
GROUPS, BASES = 2, 3


def _pairwise(axes: list[tuple]) -> list[tuple]:
    """Combinations in which every pair of values of two axes comes up, chosen greedily from random ones."""
    rng = random.Random(1)
    left = {
        (i, j, x, y)
        for i, j in itertools.combinations(range(len(axes)), 2)
        for x, y in itertools.product(axes[i], axes[j])
    }
    chosen = []
    while left:
        i, j, x, y = next(iter(sorted(left, key=str)))
        tried = []
        for _ in range(30):
            case = [rng.choice(axis) for axis in axes]
            case[i], case[j] = x, y
            covers = {(a, b, case[a], case[b]) for a, b in itertools.combinations(range(len(axes)), 2)} & left
            tried.append((len(covers), case, covers))
        _, case, covers = max(tried, key=lambda t: t[0])
        chosen.append(tuple(case))
        left -= covers
    return chosen


PAIRWISE = _pairwise(list(AXES.values()))
WITH_PARTS = _pairwise([*AXES.values(), RANKS])
REST = [case for case in itertools.product(*AXES.values()) if case not in set(PAIRWISE)]


def _name(case: tuple) -> str:
    dtype, codec, dim, heads, size, (blocks, raw), *ranks = case
    return "-".join(map(str, (str(dtype)[6:], codec, dim, heads, size, f"{blocks}+{raw}", *sum(ranks, ()))))


def _check(ops, case, ranks=(0, 0)) -> None:
    dtype, codec, dim, heads, size, (blocks, raw) = case
    rng = torch.Generator().manual_seed(dim + heads + size)
    held = random_store(blocks + 2, GROUPS, size, dim, dim, codec, seed=size, dtype=dtype)
    source = random_store(blocks + 2, GROUPS, size, dim, dim, "none", seed=size, dtype=dtype)
    q = (2 * torch.randn(GROUPS, heads, dim, generator=rng)).to(dtype)
    window_k, window_v = (torch.randn(GROUPS, raw, dim, generator=rng).to(dtype) for _ in range(2))
    ids, scale = torch.randperm(blocks + 2, generator=rng)[:blocks], dim**-0.5

    for x, planes, per_channel in ((source.keys.raw, held.keys[1:], True), (source.values.raw, held.values[1:], False)):
        if planes[0] is not None:
            hi, lo = (planes[4], planes[5]) if per_channel else (planes[3], 0)
            made = ops.quantize_block(x, hi, lo, per_channel=per_channel)
            for mine, truth in zip(made, reference.quantize_block(x, hi, lo, per_channel=per_channel), strict=True):
                assert (mine is None and truth is None) or torch.equal(mine, truth)

    parts, bare = [], held.keys
    held = with_parts(held, *ranks, BASES)
    if raw:
        parts.append(ops.attend_window(q, window_k, window_v, 1, scale))
    if blocks:
        parts.append(ops.attend_blocks(q, held.keys, held.values, ids, scale))
        places = torch.arange(blocks * size).expand(GROUPS, -1).contiguous()
        single = ops.attend_tokens(q, held.keys, held.values, ids[places // size], places % size, scale)
        _close(single, dense_rows(q, *rows_of(held, ids), scale))
        first = torch.tensor([0, blocks // 2, blocks])
        both = ops.attend_ragged(torch.stack([q, q]), held.keys, held.values, ids, first, scale)
        for i, run in enumerate((ids[: first[1]], ids[first[1] :])):
            _close(ops.Partial(both.out[i], both.lse[i]), dense_rows(q, *rows_of(held, run), scale))
        coarse = ops.score_tokens(q, bare, ids, scale).coarse
        truth = OneRequest(reference).score_tokens(q.double(), bare, ids, scale).coarse
        assert (coarse - truth).abs().max() <= 1e-5 * truth.abs().max()
    k, v = rows_of(held, ids)
    k, v = torch.cat([k, window_k.double()], 1), torch.cat([v, window_v.double()], 1)
    _close(ops.merge_partials(parts), dense_rows(q, k, v, scale))


def _close(partial, expected) -> None:
    out, lse = expected
    if (lse == -torch.inf).all():  # of no tokens
        assert (partial.out == 0).all() and (partial.lse == -torch.inf).all()
        return
    assert (partial.out.double() - out).abs().max() <= 1e-5 * out.abs().max()
    assert ((partial.lse.double() - lse).abs() <= 1e-5 * lse.abs().clamp(min=1)).all()


@pytest.mark.parametrize("case", PAIRWISE, ids=_name)
def test_pairs(ops, case):
    _check(ops, case)


@pytest.mark.parametrize("case", WITH_PARTS, ids=_name)
def test_pairs_with_low_rank_parts(ops, case):
    *case, ranks = case
    _check(ops, case, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_every_rank_with_all_pairs(ops, ranks):
    for case in PAIRWISE:
        try:
            _check(ops, case, ranks)
        except AssertionError as error:
            raise AssertionError(_name(case)) from error


@pytest.mark.slow
@pytest.mark.parametrize("dim", AXES["dim"])
@pytest.mark.parametrize("codec", AXES["codec"])
def test_all_products(ops, codec, dim):
    for case in REST:
        if case[1] == codec and case[2] == dim:
            try:
                _check(ops, case)
            except AssertionError as error:
                raise AssertionError(_name(case)) from error


@pytest.mark.parametrize("codec", ["none", "int8", "int4"])
def test_a_long_context(ops, codec):
    """128k tokens, half of it one request's and half another's; float32."""
    held = random_store(4096, 1, 32, 64, 64, codec, seed=3)
    rng = torch.Generator().manual_seed(4)
    q, ids = 3 * torch.randn(2, 1, 4, 64, generator=rng), torch.randperm(4096, generator=rng)
    _close(ops.attend_blocks(q[0], held.keys, held.values, ids, 0.125), dense_rows(q[0], *rows_of(held, ids), 0.125))
    out, lse = ops.attend_ragged(q, held.keys, held.values, ids, torch.tensor([0, 2048, 4096]), 0.125)
    for i, run in enumerate(ids.split(2048)):
        _close(ops.Partial(out[i], lse[i]), dense_rows(q[i], *rows_of(held, run), 0.125))
