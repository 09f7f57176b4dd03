"""rank_tokens, select_topk, unread_mass and attend_mass: by their definitions, token after token, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from stored import dense_rows, random_store, rows_of, store

CODECS = ("none", "int8", "int4", "int2")
SCALE = 0.25


@pytest.fixture(params=CODECS)
def codec(request):
    return request.param


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("tokens", [1, 7, 16, 100, 1000])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_rank_is_the_attention_expected(ops, tokens, spread):
    rng = _rng(1)
    coarse = spread * torch.randn(3, 5, tokens, generator=rng)
    raw_lse = spread * torch.randn(3, 5, generator=rng)
    raw_lse[0] = -torch.inf
    rank = ops.rank_tokens(coarse, raw_lse)
    every = torch.cat([coarse, raw_lse.unsqueeze(-1)], -1).double()
    expected = every.softmax(-1)[..., :-1].sum(1)
    torch.testing.assert_close(rank.double(), expected, rtol=1e-4, atol=1e-30 if spread == 1 else 1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 33, 1000, 5000])
def test_topk_is_the_best_in_order_of_place(ops, tokens):
    rng = _rng(2)
    kinds = [
        torch.randn(4, tokens, generator=rng),
        torch.randint(0, 5, (4, tokens), generator=rng).float() - 2,  # mostly ties
        torch.randn(4, tokens, generator=rng) * 10 ** torch.randint(-38, 38, (4, tokens), generator=rng).float(),
        torch.zeros(4, tokens).copysign(torch.randn(4, tokens, generator=rng)),
        torch.where(torch.rand(4, tokens, generator=rng) < 0.5, -torch.inf, torch.inf),
        (torch.rand(4, tokens, generator=rng) * 1e-3 + 1).float(),  # that differ in their last bits
    ]
    for scores in kinds:
        for count in {0, 1, tokens // 16, tokens // 2, tokens}:
            index = ops.select_topk(scores, count)
            order = sorted(range(tokens), key=lambda i, s=scores[1]: (-s[i].item(), i))
            assert index.shape == (4, count)
            assert index[1].tolist() == sorted(order[:count])
            best = scores.sort(-1, descending=True).values[:, :count]
            assert torch.equal(scores.gather(1, index).sort(-1, descending=True).values, best)


def test_topk_of_too_many_is_refused(ops):
    with pytest.raises(
        (ValueError, RuntimeError), match=r"first_chosen: expected at most 3 for (request 0|all requests), got 4"
    ):
        ops.select_topk(torch.zeros(2, 3), 4)


@pytest.mark.parametrize("size", [8, 16, 37])
def test_unread_mass(ops, size):
    rng = _rng(3)
    coarse = 20 * torch.randn(2, 3, 9, size, generator=rng)
    radius = 50 * torch.rand(2, 3, 9, generator=rng)
    scores = ops.TokenScores(coarse, radius, radius * torch.rand(2, 3, 9, generator=rng))
    for share in (0.0, 0.3, 0.98, 1.0):
        read = torch.rand(2, 9 * size, generator=rng) < share
        said = ops.unread_mass(scores, 0.9, read)
        for got, slope, extra in zip(said, (0.9, 1.0), (scores.spread, scores.radius), strict=True):
            logits = (slope * coarse.double() + extra.unsqueeze(-1)).flatten(2)
            expected = logits.masked_fill(read.unsqueeze(1), -torch.inf).logsumexp(-1)
            torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-5)


def _read_by_the_book(true, upper, coarse, raw_lse, epsilon):
    """Token after token: who is read [G, tokens]."""
    every = torch.cat([coarse, raw_lse.unsqueeze(-1)], -1).double()
    order = every.softmax(-1)[..., :-1].sum(1).argsort(dim=-1, descending=True, stable=True)
    read = torch.zeros_like(coarse[:, 0], dtype=torch.bool)
    for group in range(len(coarse)):
        for count in range(coarse.shape[-1] + 1):
            first, rest = order[group, :count], order[group, count:]
            seen = torch.cat([true[group, :, first], raw_lse[group].double().unsqueeze(-1)], -1).logsumexp(-1)
            missed = torch.sigmoid(upper[group, :, rest].double().logsumexp(-1) - seen)
            if not len(rest) or (missed <= epsilon).all():
                break
        read[group, order[group, :count]] = True
    return read


@pytest.mark.parametrize("slope", [None, 1.0, 0.9, 1.01])
@pytest.mark.parametrize(("blocks", "size"), [(1, 8), (40, 16), (30, 10)])
@pytest.mark.parametrize("strength", [1.0, 6.0])
def test_mass_reads_until_little_enough_is_missed(ops, codec, slope, blocks, size, strength):
    held = random_store(blocks, 2, size, 32, 16, codec, seed=4)
    rng = _rng(5)
    q = strength * torch.randn(2, 3, 32, generator=rng)
    block_ids = torch.randperm(blocks, generator=rng)
    k, v = rows_of(held, block_ids)
    true = torch.einsum("grd,gsd->grs", q.double(), k) * SCALE
    scores = ops.score_tokens(q, held.keys, block_ids, SCALE)
    extra = scores.radius if slope is None else scores.spread
    upper = ((slope or 1.0) * scores.coarse + extra.unsqueeze(-1)).flatten(2)
    stored = [(held.keys, held.values, block_ids)]
    for epsilon in (0.3, 0.02):
        for raw_lse in (torch.full((2, 3), -torch.inf), torch.logsumexp(true, -1).float() - 1):
            (partial,), read = ops.attend_mass(q, stored, [scores], slope, raw_lse, epsilon, SCALE)
            assert torch.equal(read, _read_by_the_book(true, upper, scores.coarse.flatten(2), raw_lse, epsilon))
            out, lse = dense_rows(q, k, v, SCALE, read.unsqueeze(1).expand(-1, 3, -1))
            assert (partial.out.double() - out).abs().max() <= 1e-5 * v.abs().max()
            torch.testing.assert_close(partial.lse.double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slope", [None, 0.9])
def test_mass_of_several_pools_is_that_of_one(ops, codec, slope):
    """Blocks that lie in two pools, one of them with other block ids than the order of its tokens."""
    held = random_store(30, 2, 16, 32, 16, codec, seed=11)
    q, ids = 3 * torch.randn(2, 3, 32, generator=_rng(12)), torch.randperm(30, generator=_rng(13))
    one, parts = ([(held.keys, held.values, some) for some in pools] for pools in ([ids], [ids[:7], ids[7:8], ids[8:]]))
    scores = [[ops.score_tokens(q, held.keys, some, SCALE) for _, _, some in pools] for pools in (one, parts)]
    for epsilon in (0.3, 0.02):
        raw_lse = torch.full((2, 3), -1.0)
        (whole,), read = ops.attend_mass(q, one, scores[0], slope, raw_lse, epsilon, SCALE)
        partials, read_apart = ops.attend_mass(q, parts, scores[1], slope, raw_lse, epsilon, SCALE)
        assert torch.equal(read_apart, read)
        assert 0 < read.sum() < read.numel()
        merged = ops.merge_partials(partials)
        assert (merged.out - whole.out).abs().max() <= 1e-5 * held.v.abs().max()
        torch.testing.assert_close(merged.lse, whole.lse, rtol=1e-5, atol=1e-5)


def test_mass_of_next_to_nothing_reads_everything(ops, codec):
    held = random_store(20, 2, 16, 32, 16, codec, seed=6)
    q = torch.randn(2, 3, 32, generator=_rng(7))
    ids = torch.arange(20)
    scores = ops.score_tokens(q, held.keys, ids, SCALE)
    nothing = torch.full((2, 3), -math.inf)
    _, read = ops.attend_mass(q, [(held.keys, held.values, ids)], [scores], None, nothing, 1e-13, SCALE)
    assert read.all()


def test_mass_reads_the_first_of_equals(ops):
    """All keys alike: what is read are the first tokens, in the order of the list."""
    held = store(torch.ones(20, 1, 16, 32), torch.randn(20, 1, 16, 16, generator=_rng(10)), "int8")
    q, ids = torch.ones(1, 2, 32), torch.arange(20)
    scores = ops.score_tokens(q, held.keys, ids, SCALE)
    nothing = torch.full((1, 2), -math.inf)
    _, read = ops.attend_mass(q, [(held.keys, held.values, ids)], [scores], 1.0, nothing, 0.5, SCALE)
    count = int(read.sum())
    assert 150 <= count <= 170
    assert read[0, :count].all()


def test_mass_finds_a_needle_and_stops(ops, codec):
    """One key in thousands has nearly all of the softmax: little is read, and it is among it."""
    k = 0.01 * torch.randn(300, 1, 16, 32, generator=_rng(8))
    k[123, 0, 5] = 10.0
    held = store(k, torch.randn(300, 1, 16, 16, generator=_rng(9)), codec)
    q, ids = torch.ones(1, 2, 32), torch.arange(300)
    scores = ops.score_tokens(q, held.keys, ids, SCALE)
    raw_lse = torch.zeros(1, 2)
    _, read = ops.attend_mass(q, [(held.keys, held.values, ids)], [scores], 1.0, raw_lse, 0.01, SCALE)
    assert read[0, 123 * 16 + 5]
    assert read.sum() < 5
