"""Ops of a decode step for several requests at once: what they give is what each request alone is given, and what plain
torch gives; some requests have nothing. The other tests of ops are about one request.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from one_request import OneRequest
from steps import CAPACITY, GROUPS, HEADS, SCALE, SIZE, Step, step_of
from stored import dense_rows, rows_of

from pikv_megatron.ops import reference

STORED = [  # codec, dtype of q, of the window, and where the codec is none of the blocks
    ("none", torch.float32),
    ("none", torch.bfloat16),
    ("none", torch.float16),
    ("int8", torch.float32),
    ("int4", torch.bfloat16),
    ("int2", torch.float16),
]


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=[1, 3, 16])
def requests_(request):
    return request.param


@pytest.fixture(params=STORED, ids=lambda x: f"{x[0]}-{str(x[1])[6:]}")
def step(request, requests_):
    return step_of(requests_, *request.param)


def _close(got, expected, relative: float = 1e-5) -> None:
    """Within `relative` of the largest number; infinities where they are expected."""
    assert got.shape == expected.shape
    here = expected.isfinite()
    assert torch.equal(got[~here], expected[~here].to(got.dtype))
    if here.any():
        error = (got[here].double() - expected[here].double()).abs().max()
        assert error <= relative * max(1.0, expected[here].abs().max().item()), error


def _check_partial(partial, step: Step, windows: bool, blocks: bool) -> None:
    for i, (a, b) in enumerate(step.runs()):
        parts = [step.raw_rows(i)] if windows else []
        parts += [rows_of(step.held, step.ids[a:b])] if blocks else []
        k, v = (torch.cat([x.double() for x in of], 1) for of in zip(*parts, strict=True))
        out, lse = dense_rows(step.q[i], k, v, SCALE)
        _close(partial.out[i], out)
        _close(partial.lse[i], lse)


def test_attention_to_blocks_to_windows_and_to_both(every, step):
    stored = (step.held.keys, step.held.values, step.ids, step.first)
    raw = (step.raw_k, step.raw_v, *step.window)
    _check_partial(every.attend_ragged(step.q, *stored, SCALE), step, windows=False, blocks=True)
    _check_partial(every.attend_windows(step.q, *raw, SCALE), step, windows=True, blocks=False)
    _check_partial(every.attend_decode(step.q, *raw, *stored, SCALE), step, windows=True, blocks=True)


def _same(got: tuple, alone: list[tuple], plain: tuple, dim: int, relative: float = 1e-5) -> None:
    """Tensors of all requests along dim, as each request's alone and as plain torch's."""
    for x, parts, truth in zip(got, zip(*alone, strict=True), plain, strict=True):
        _close(x, torch.cat(parts, dim), relative)
        _close(x, truth, relative)


@pytest.mark.parametrize("per_head", [False, True])
def test_scores(every, step, per_head):
    one, ids = OneRequest(every), step.ids
    if per_head:
        ids = torch.stack([ids, ids.flip(0)])
    runs = [(q, slice(a, b)) for q, (a, b) in zip(step.q, step.runs(), strict=True)]
    alone = [one.score_tokens(q, step.held.keys, ids[..., run], SCALE) for q, run in runs]
    arguments = (step.q, step.held.keys, ids, step.first, SCALE)
    _same(every.score_tokens(*arguments), alone, reference.score_tokens(*arguments), 2)
    if not per_head:
        alone = [one.score_blocks(q, step.held.keys, ids[run], SCALE) for q, run in runs]
        _same(every.score_blocks(*arguments), alone, reference.score_blocks(*arguments), 2)
        alone = [(one.key_logits(q, step.held.keys, ids[run], SCALE),) for q, run in runs]
        _same((every.key_logits(*arguments),), alone, (reference.key_logits(*arguments),), 2)


def test_ranks_choices_and_attention_to_the_chosen(every, step, requests_):
    keys, values = step.held.keys, step.held.values
    one, rng = OneRequest(every), _rng(5)
    coarse = reference.score_tokens(step.q, keys, step.ids, step.first, SCALE).coarse.flatten(2)
    raw_lse = 3 * torch.randn(requests_, GROUPS, HEADS, generator=rng)
    first, runs = step.first * SIZE, step.runs(SIZE)
    rank = every.rank_tokens(coarse, raw_lse, first)
    alone = [(one.rank_tokens(coarse[..., a:b], raw_lse[i]),) for i, (a, b) in enumerate(runs)]
    _same((rank,), alone, (reference.rank_tokens(coarse, raw_lse, first),), 1)

    counts = [0 if i % 5 == 2 else -(-(b - a) // 7) for i, (a, b) in enumerate(runs)]
    first_chosen = torch.tensor([0, *counts]).cumsum(0)
    chosen = every.select_topk(rank, first, first_chosen, sum(counts))
    assert torch.equal(chosen, reference.select_topk(rank, first, first_chosen, sum(counts)))
    for i, (a, b) in enumerate(runs):
        its = chosen[:, first_chosen[i] : first_chosen[i + 1]]
        assert torch.equal(its, one.select_topk(rank[:, a:b], counts[i]) + a)

    read = torch.rand(GROUPS, sum(counts), generator=rng) < 0.8
    for mask in (None, read):
        partial = every.attend_tokens(
            step.q, keys, values, step.ids[chosen // SIZE], chosen % SIZE, first_chosen, SCALE, mask
        )
        for i, (a, b) in enumerate(itertools.pairwise(first_chosen)):
            k, v = rows_of(step.held, step.ids)
            at = chosen[:, a:b].unsqueeze(-1)
            k, v = (x.gather(1, at.expand(-1, -1, x.shape[2])) for x in (k, v))
            seen = None if mask is None else mask[:, None, a:b]
            out, lse = dense_rows(step.q[i], k, v, SCALE, seen)
            _close(partial.out[i], out)
            _close(partial.lse[i], lse)


def test_what_is_not_read(every, step):
    one, scores = OneRequest(every), reference.score_tokens(step.q, step.held.keys, step.ids, step.first, SCALE)
    read = torch.rand(GROUPS, len(step.ids) * SIZE, generator=_rng(6)) < 0.5
    read[0, : SIZE * int(step.first[1])] = True  # of the first request everything
    alone = []
    for a, b in step.runs():
        its = reference.TokenScores(*(x[:, :, a:b] for x in scores))
        alone.append([x.unsqueeze(0) for x in one.unread_mass(its, 0.9, read[:, a * SIZE : b * SIZE])])
    got = every.unread_mass(scores, 0.9, read, step.first)
    _same(got, alone, reference.unread_mass(scores, 0.9, read, step.first), 0)


@pytest.mark.parametrize("slope", [None, 0.9])
@pytest.mark.parametrize("pools", [1, 3])
def test_mass(every, step, requests_, slope, pools):
    """Of blocks in one pool, and spread over several, where some requests have none in some."""
    one, rng = OneRequest(every), _rng(7)
    raw_lse = torch.randn(requests_, GROUPS, HEADS, generator=rng)
    pool_of = torch.randint(0, pools, (len(step.ids),), generator=rng)
    stored, scores = [], []
    for pool in range(pools):
        first = torch.stack([(pool_of[:end] == pool).sum() for end in step.first.tolist()])
        stored.append((step.held.keys, step.held.values, step.ids[pool_of == pool], first))
        scores.append(reference.score_tokens(step.q, step.held.keys, *stored[-1][2:], SCALE))
    for epsilon in (0.3, 0.02):
        partials, reads = every.attend_mass(step.q, stored, scores, slope, raw_lse, epsilon, SCALE)
        truth, expected = reference.attend_mass(step.q, stored, scores, slope, raw_lse, epsilon, SCALE)
        for partial, read, plain, its in zip(partials, reads, truth, expected, strict=True):
            assert torch.equal(read, its)
            _close(partial.out, plain.out)
            _close(partial.lse, plain.lse)
        for i in range(requests_):
            runs = [slice(int(first[i]), int(first[i + 1])) for *_, first in stored]
            its = [(k, v, ids[run]) for (k, v, ids, _), run in zip(stored, runs, strict=True)]
            of_it = [reference.TokenScores(*(x[:, :, run] for x in s)) for s, run in zip(scores, runs, strict=True)]
            _, alone = one.attend_mass(step.q[i], its, of_it, slope, raw_lse[i], epsilon, SCALE)
            mine = [x[:, run.start * SIZE : run.stop * SIZE] for x, run in zip(reads, runs, strict=True)]
            assert torch.equal(torch.cat(mine, 1), alone)


def test_importance(every, step):
    keys, (slots, first, last) = step.held.keys, step.window
    one, stored = OneRequest(every), (keys, step.ids, step.first)
    _, lse = reference.attend_decode(
        step.q, step.raw_k, step.raw_v, *step.window, keys, step.held.values, *stored[1:], SCALE
    )
    lse = lse.nan_to_num(neginf=0.0)  # of a request that has nothing
    runs = list(zip(step.q, lse, step.runs(), strict=True))
    alone = [(one.token_importance(q, its, keys, step.ids[a:b], SCALE),) for q, its, (a, b) in runs]
    arguments = (step.q, lse, *stored, SCALE)
    _same((every.token_importance(*arguments),), alone, (reference.token_importance(*arguments),), 0)
    importance = every.window_importance(step.q, lse, step.raw_k, *step.window, SCALE)
    assert importance.dtype == torch.float32
    expected = torch.zeros(len(step.q), CAPACITY, dtype=torch.float64)
    for i, (a, b) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        logits = torch.einsum("grd,gsd->grs", step.q[i].double(), step.raw_k[slots[i], :, a:b].double()) * SCALE
        expected[i, a:b] = (logits - lse[i].double().unsqueeze(-1)).exp().sum((0, 1))
    _close(importance, expected)
