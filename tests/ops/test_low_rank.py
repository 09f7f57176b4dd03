"""Attention and logits with a low-rank part beside stored keys and values, against float64: ranks, codecs, query heads
and several bases within a request.
"""

from __future__ import annotations

import pytest
import torch
from one_request import OneRequest
from stored import dense_rows, random_store, rows_of, with_parts

from pikv_megatron.ops import reference

CASES = [  # rank of keys, of values, codec, head_dim, v_head_dim, query heads per KV head, block size
    (8, 8, "int8", 128, 128, 4, 32),
    (16, 16, "int8", 128, 128, 4, 32),
    (16, 0, "int8", 64, 64, 1, 16),
    (0, 16, "int4", 128, 64, 7, 32),
    (1, 32, "int4", 80, 96, 2, 16),
    (32, 1, "none", 64, 32, 4, 64),
    (5, 16, "none", 48, 64, 3, 16),
    (32, 32, "int2", 128, 128, 8, 32),
    (16, 8, "int8", 192, 128, 5, 64),
    (8, 5, "int4", 96, 80, 1, 48),
]
GROUPS, BLOCKS, BASES = 2, 24, 3


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request):
    rank_k, rank_v, codec, dim, value_dim, heads, size = request.param
    held = with_parts(random_store(BLOCKS, GROUPS, size, dim, value_dim, codec), rank_k, rank_v, BASES)
    rng = torch.Generator().manual_seed(rank_k + dim)
    return held, torch.randn(2, GROUPS, heads, dim, generator=rng), torch.randperm(BLOCKS, generator=rng), dim**-0.5


def _close(partial, expected) -> None:
    out, lse = expected
    assert (partial.out.double() - out).abs().max() <= 1e-5 * out.abs().max()
    assert ((partial.lse.double() - lse).abs() <= 1e-5 * lse.abs().clamp(min=1)).all()


def test_whole_blocks(ops, case):
    held, (q, _), ids, scale = case
    part = held.keys.low_rank or held.values.low_rank
    assert len(part.basis_of[ids].unique()) == BASES
    _close(ops.attend_blocks(q, held.keys, held.values, ids, scale), dense_rows(q, *rows_of(held, ids), scale))


def test_raw_tokens_beside(ops, case):
    held, (q, _), ids, scale = case
    k, v = torch.randn(GROUPS, 20, held.k.shape[3]), torch.randn(GROUPS, 20, held.v.shape[3])
    expected = [torch.cat([raw.double(), stored], 1) for raw, stored in zip((k, v), rows_of(held, ids), strict=True)]
    _close(ops.attend_decode(q, k, v, held.keys, held.values, ids, scale), dense_rows(q, *expected, scale))


def test_several_requests(ops, case):
    held, (q, other), ids, scale = case
    both = ops.attend_ragged(
        torch.stack([q, other]), held.keys, held.values, ids, torch.tensor([0, 5, len(ids)]), scale
    )
    _close(ops.Partial(both.out[0], both.lse[0]), dense_rows(q, *rows_of(held, ids[:5]), scale))
    _close(ops.Partial(both.out[1], both.lse[1]), dense_rows(other, *rows_of(held, ids[5:]), scale))


def test_single_tokens(ops, case):
    held, (q, _), ids, scale = case
    size = held.k.shape[2]
    rng = torch.Generator().manual_seed(5)
    places = torch.stack([torch.randperm(len(ids) * size, generator=rng)[:100] for _ in range(GROUPS)])
    read = torch.rand(places.shape, generator=rng) < 0.7
    partial = ops.attend_tokens(q, held.keys, held.values, ids[places // size], places % size, scale, read)
    seen = torch.zeros(GROUPS, len(ids) * size, dtype=torch.bool).scatter_(1, places, read)
    _close(partial, dense_rows(q, *rows_of(held, ids), scale, seen.unsqueeze(1)))


def test_logits_and_importance(ops, case):
    held, (q, _), ids, scale = case
    k, v = rows_of(held, ids)
    logits = torch.einsum("grd,gsd->grs", q.double(), k) * scale
    assert (ops.key_logits(q, held.keys, ids, scale) - logits).abs().max() <= 1e-5 * logits.abs().max()
    _, lse = dense_rows(q, k, v, scale)
    received = (logits - lse.unsqueeze(-1)).exp().sum((0, 1)).view(len(ids), -1)
    given = ops.token_importance(q, lse.float(), held.keys, ids, scale)
    assert (given - received).abs().max() <= 1e-5 * received.max()


def test_positions(ops):
    """Queries that see no key, a part, and all; the value part is of what each row saw."""
    held = with_parts(random_store(BLOCKS, GROUPS, 16, 64, 64, "int8"), 16, 16, BASES)
    q = torch.randn(GROUPS, 4, 64, generator=torch.Generator().manual_seed(8))
    ids = torch.arange(BLOCKS)
    at, queries = torch.arange(BLOCKS * 16).view(BLOCKS, 16), torch.tensor([-1, 3, 200, BLOCKS * 16])
    partial = ops.attend_blocks(q, held.keys, held.values, ids, 0.125, at, queries)
    out, lse = dense_rows(q, *rows_of(held, ids), 0.125, at.flatten() <= queries.unsqueeze(1))
    assert (partial.out[:, 0] == 0).all() and (partial.lse[:, 0] == -torch.inf).all()
    _close(ops.Partial(partial.out[:, 1:], partial.lse[:, 1:]), (out[:, 1:], lse[:, 1:]))


@pytest.mark.parametrize(("rank_k", "rank_v"), [(16, 0), (0, 16), (5, 8)])
def test_mass(ops, rank_k, rank_v):
    """Scores are of the codes alone; with a radius that reaches as far as the part does, the promise holds."""
    bare = random_store(BLOCKS, GROUPS, 16, 64, 64, "int8")
    held = with_parts(bare, rank_k, rank_v, BASES)
    rng = torch.Generator().manual_seed(9)
    q, ids = 4 * torch.randn(GROUPS, 3, 64, generator=rng), torch.randperm(BLOCKS, generator=rng)
    k, v = rows_of(held, ids)
    logits = torch.einsum("grd,gsd->grs", q.double(), k) * 0.125
    scores = ops.score_tokens(q, bare.keys, ids, 0.125)
    off = (logits.view_as(scores.coarse) - scores.coarse).abs().amax(-1)
    scores = scores._replace(radius=1.01 * off.float())
    for epsilon in (0.3, 0.02):
        nothing = torch.full((GROUPS, 3), -torch.inf)
        stored = [(held.keys, held.values, ids)]
        (partial,), read = ops.attend_mass(q, stored, [scores], None, nothing, epsilon, 0.125)
        _, expected = OneRequest(reference).attend_mass(q, stored, [scores], None, nothing, epsilon, 0.125)
        assert torch.equal(read.sum(-1), expected.sum(-1))
        assert 0 < read.sum() < read.numel()
        out, lse = dense_rows(q, k, v, 0.125, read.unsqueeze(1))
        assert (1 - (lse - logits.logsumexp(-1)).exp() <= epsilon).all()
        _close(partial, (out, lse))


def test_scores_refuse_a_part(ops):
    """Neither the bounds nor the high plane know of it."""
    held = with_parts(random_store(BLOCKS, GROUPS, 16, 64, 64, "int8"), 16, 16, BASES)
    q, ids = torch.randn(GROUPS, 4, 64), torch.arange(BLOCKS)
    for score in (ops.score_blocks, ops.score_tokens):
        with pytest.raises(ValueError, match=r"keys.low_rank: .* expected keys without a low-rank part"):
            score(q, held.keys, ids, 0.125)
