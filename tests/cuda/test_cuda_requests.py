"""The kernels of a decode step for several requests at once, against plain torch: requests of many lengths, some with
no blocks or no raw tokens. The other tests of kernels are about one request.
"""

from __future__ import annotations

import pytest
import torch
from launchers import Launchers
from steps import GROUPS, HEADS, SCALE, SIZE, step_of
from stored import with_parts

from pikv_megatron.ops import reference


@pytest.fixture(params=[("none", torch.bfloat16), ("int8", torch.float32)], ids=["none-bfloat16", "int8-float32"])
def codec(request):
    return request.param


@pytest.fixture(params=[3, 16])
def step(request, codec):
    step = step_of(request.param, *codec)
    return step._replace(q=step.q.float())


def _check(every, name: str, *arguments, relative: float = 1e-5):
    """Within `relative` of the largest number; infinities where they are expected. Returns plain torch's."""
    found, truth = getattr(every, name)(*arguments), getattr(reference, name)(*arguments)
    pairs = [(found, truth)] if isinstance(truth, torch.Tensor) else zip(found, truth, strict=True)
    for got, expected in pairs:
        assert got.shape == expected.shape
        here = expected.isfinite()
        assert torch.equal(got[~here], expected[~here])
        assert ((got - expected)[here].abs() <= relative * expected[here].abs().max().clamp(min=1)).all(), name
    return truth


@pytest.mark.parametrize("splits", [1, 4])
def test_attention(every, step, splits):
    every.splits = splits
    raw, stored = (step.raw_k, step.raw_v, *step.window), (step.held.keys, step.held.values, step.ids, step.first)
    if not isinstance(every, Launchers):
        _check(every, "attend_decode", step.q, *raw, *stored, SCALE)
    _check(every, "attend_windows", step.q, *raw, SCALE)
    _check(every, "attend_ragged", step.q, *stored, SCALE)


@pytest.mark.parametrize("seed", [0, 5])
def test_scores_choices_and_attention_to_the_chosen(every, step, seed):
    every.set_seed(seed)
    keys, values = step.held.keys, step.held.values
    scored = (keys, step.ids, step.first, SCALE)
    rng = torch.Generator().manual_seed(1)
    raw_lse = 3 * torch.randn(len(step.q), GROUPS, HEADS, generator=rng)
    _check(every, "score_blocks", step.q, *scored)
    logits = _check(every, "key_logits", step.q, *scored)
    _check(every, "score_tokens", step.q, keys, torch.stack([step.ids, step.ids.flip(0)]), *scored[2:])
    scores = _check(every, "score_tokens", step.q, *scored)
    coarse, first = scores.coarse.flatten(2), step.first * SIZE
    rank = _check(every, "rank_tokens", coarse, raw_lse, first)

    counts = [0 if i % 5 == 2 else -(-(b - a) // 7) for i, (a, b) in enumerate(step.runs(SIZE))]
    first_chosen = torch.tensor([0, *counts]).cumsum(0)
    chosen = _check(every, "select_topk", rank, first, first_chosen, sum(counts))
    ids, offsets = step.ids[chosen // SIZE], chosen % SIZE
    for read in (None, torch.rand(chosen.shape, generator=rng) < 0.7):
        _check(every, "attend_tokens", step.q, keys, values, ids, offsets, first_chosen, SCALE, read)
    read = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, chosen, True)
    read[:, : int(first[1])] = True  # of the first request everything
    _check(every, "unread_mass", scores, 0.9, read, step.first)

    order, at_most = reference.in_rank_order(rank, first), coarse + scores.radius.repeat_interleave(SIZE, -1)
    for epsilon in (0.3, 0.01, 1e-9):
        mine, truth = (x.select_mass(order, at_most, logits, raw_lse, first, epsilon) for x in (every, reference))
        assert torch.equal(mine, truth)


def test_importance(every, step):
    raw, stored = (step.raw_k, step.raw_v, *step.window), (step.held.keys, step.ids, step.first)
    lse = reference.attend_decode(step.q, *raw, stored[0], step.held.values, *stored[1:], SCALE).lse
    lse = lse.nan_to_num(neginf=0.0)  # of a request that has nothing
    _check(every, "token_importance", step.q, lse, *stored, SCALE)
    _check(every, "window_importance", step.q, lse, step.raw_k, *step.window, SCALE)


@pytest.mark.parametrize(("count", "epsilon"), [(1, 0.1), (511, 0.1), (513, 0.01), (5000, 0.003), (5000, 1e-7)])
def test_how_far_a_row_reads(every, count, epsilon):
    """Of more tokens than a thread block has threads, in one run and in several."""
    rng = torch.Generator().manual_seed(count)
    if_unread, if_read = (4 * torch.randn(2, 3, count, generator=rng) for _ in range(2))
    order = torch.stack([torch.randperm(count, generator=rng) for _ in range(2)])
    raw_lse = torch.randn(1, 2, 3, generator=rng)
    raw_lse[0, 1, 2] = -torch.inf
    first = torch.tensor([0, count])
    arguments = (order, if_unread, if_read, raw_lse, first, epsilon)
    assert torch.equal(every.select_mass(*arguments), reference.select_mass(*arguments))


def test_low_rank_parts(every):
    """Queries of every request meet the bases; blocks are shared."""
    step = step_of(3, "int8", torch.float32)
    held = with_parts(step.held, 9, 16, 4)
    lists = (step.ids, step.first)
    _check(every, "attend_ragged", step.q, held.keys, held.values, *lists, SCALE)
    _, lse = reference.attend_ragged(step.q, held.keys, held.values, *lists, SCALE)
    _check(every, "key_logits", step.q, held.keys, *lists, SCALE)
    _check(every, "token_importance", step.q, lse.nan_to_num(neginf=0.0), held.keys, *lists, SCALE)
    rng = torch.Generator().manual_seed(2)
    tokens, offsets = torch.randint(24, (GROUPS, 170), generator=rng), torch.randint(SIZE, (GROUPS, 170), generator=rng)
    first = torch.tensor([0, 150, 150, 170])
    _check(every, "attend_tokens", step.q, held.keys, held.values, tokens, offsets, first, SCALE)
