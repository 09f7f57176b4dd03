"""The kernels that say what to read: scores, importance and selection against the reference, and prefetch."""

from __future__ import annotations

import pytest
import torch
from one_request import OneRequest
from pairs import every_case, every_pair, name_of
from stored import Stored, dense_rows, random_store, rows_of, with_parts

from pikv_megatron.ops import reference as plain
from pikv_megatron.ops.reference import Keys

reference = OneRequest(plain)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = {
    "codec": (*DTYPES, "int8", "int4", "int2"),
    "dim": (64, 80, 96, 128, 192, 256),
    "heads": (1, 2, 4, 7, 8, 19),
    "block_size": (16, 32, 64),
    "blocks": (0, 1, 5, 40),
    "per_head": (False, True),
}

# codec, heads, block size, blocks, bases
PARTS = [("float32", 1, 16, 5, 1), ("int8", 9, 32, 7, 3), ("int4", 4, 64, 2, 2), ("bfloat16", 2, 16, 0, 1)]


def _store(codec: str, blocks: int, block_size: int, dim: int) -> Stored:
    kind, dtype = ("none", DTYPES[codec]) if codec in DTYPES else (codec, torch.float32)
    return random_store(max(blocks, 3), 2, block_size, dim, 16, kind, dtype=dtype)


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _near(found, expected, names: tuple[str, ...], relative: float = 1e-5) -> None:
    """Each tensor within `relative` of its largest number."""
    for name, a, b in zip(names, found, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            assert (a - b).abs().max() <= relative * b.abs().max(), name


def _check_scores(cuda, codec, dim, heads, block_size, blocks, per_head):
    held = _store(codec, blocks, block_size, dim)
    q = torch.randn(2, heads, dim, generator=_rng(1))
    ids = torch.stack([torch.randperm(max(blocks, 3), generator=_rng(2 + g))[:blocks] for g in range(2)])
    tokens = cuda.score_tokens(q, held.keys, ids if per_head else ids[0], dim**-0.5)
    bounds = cuda.score_blocks(q, held.keys, ids[0], dim**-0.5)
    if blocks == 0:
        assert tokens.coarse.numel() == bounds.bound.numel() == 0
        return
    _near(tokens, reference.score_tokens(q, held.keys, ids if per_head else ids[0], dim**-0.5), tokens._fields)
    _near(bounds, reference.score_blocks(q, held.keys, ids[0], dim**-0.5), bounds._fields)
    if not per_head:  # what is called a bound is one
        true = torch.einsum("grd,ngbd->grnb", q.double(), held.k[ids[0]]) * dim**-0.5
        assert (true.amax(-1) <= bounds.bound.double()).all()
        assert ((true - tokens.coarse.double()).abs().amax(-1) <= tokens.radius.double()).all()


@pytest.mark.parametrize("case", every_pair(SHAPES), ids=name_of)
def test_scores(cuda, case):
    _check_scores(cuda, **case)


@pytest.mark.slow
@pytest.mark.parametrize("codec", SHAPES["codec"])
@pytest.mark.parametrize("dim", SHAPES["dim"])
def test_scores_in_every_case(cuda, codec, dim):
    for case in every_case({**SHAPES, "codec": [codec], "dim": [dim]}):
        _check_scores(cuda, **case)


def test_spread_is_no_more_than_the_radius(cuda):
    """Queries so long that half the variance of a logit exceeds what it can be off by."""
    held = random_store(5, 2, 16, 64, 16, "int8")
    q = 1000 * torch.randn(2, 3, 64, generator=_rng(18))
    scores, expected = (ops.score_tokens(q, held.keys, torch.arange(5), 0.125) for ops in (cuda, reference))
    assert (expected.spread == expected.radius).any()
    _near(scores, expected, scores._fields)


@pytest.mark.parametrize("blocks", [1, 129, 300])
def test_block_scores_of_many_blocks(cuda, blocks):
    """From their bounds alone: no other field of the keys is there."""
    held = random_store(blocks, 2, 16, 64, 16, "int8")
    bounds = Keys(None, None, None, held.keys.scale, held.keys.zero, 4, 4)
    q = torch.randn(2, 3, 64, generator=_rng(4))
    ids = torch.randperm(blocks, generator=_rng(5))
    scores = cuda.score_blocks(q, bounds, ids, 0.3)
    _near(scores, reference.score_blocks(q, bounds, ids, 0.3), scores._fields)


@pytest.mark.parametrize("case", every_pair({**SHAPES, "per_head": [False]}), ids=name_of)
def test_token_importance(cuda, case):
    codec, dim, heads, block_size, blocks, _ = case.values()
    held = _store(codec, blocks, block_size, dim)
    q = torch.randn(2, heads, dim, generator=_rng(6))
    ids = torch.randperm(max(blocks, 3), generator=_rng(7))[:blocks]
    k, v = rows_of(held, torch.arange(max(blocks, 3)))
    _, lse = dense_rows(q, k, v, dim**-0.5)
    importance = cuda.token_importance(q, lse.float(), held.keys, ids, dim**-0.5)
    logits = torch.einsum("grd,ngbd->grnb", q.double(), held.k[ids]) * dim**-0.5
    expected = (logits - lse[:, :, None, None]).exp().sum((0, 1))
    assert importance.shape == expected.shape
    if blocks:
        assert ((importance - expected).abs() <= 2e-5 * expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "query_tokens"), [(1, 1), (68, 1), (45, 7), (40, 40)])
def test_prompt_importance(cuda, tokens, query_tokens, dtype):
    k = torch.randn(2, 70, 64, generator=_rng(10)).to(DTYPES[dtype])[:, 1 : 1 + tokens]
    q = torch.randn(2, 3 * query_tokens, 64, generator=_rng(11))
    lse = 3 * torch.randn(2, 3 * query_tokens, generator=_rng(12)) + 5
    expected = reference.prompt_importance(q.double(), lse.double(), k, query_tokens, 0.125)
    _near([cuda.prompt_importance(q, lse, k, query_tokens, 0.125)], [expected], ("importance",))


@pytest.mark.parametrize("case", every_pair({**SHAPES, "per_head": [False]}), ids=name_of)
def test_key_logits(cuda, case):
    codec, dim, heads, block_size, blocks, _ = case.values()
    held = _store(codec, blocks, block_size, dim)
    q = torch.randn(2, heads, dim, generator=_rng(13))
    ids = torch.randperm(max(blocks, 3), generator=_rng(14))[:blocks]
    logits = cuda.key_logits(q, held.keys, ids, dim**-0.5)
    expected = torch.einsum("grd,gsd->grs", q.double(), rows_of(held, ids)[0]) * dim**-0.5
    _near([logits], [expected], ("logits",))


@pytest.mark.parametrize("rank", [1, 8, 16, 32, 33])
@pytest.mark.parametrize(("codec", "heads", "block_size", "blocks", "bases"), PARTS)
def test_logits_and_importance_with_a_low_rank_part(cuda, codec, heads, block_size, blocks, bases, rank):
    """Blocks of several bases, mixed; more rows than a thread block takes."""
    held = with_parts(_store(codec, blocks, block_size, 64), rank, 0, bases)
    q = torch.randn(2, heads, 64, generator=_rng(18))
    ids = torch.randperm(max(blocks, 3), generator=_rng(19))[:blocks]
    k, v = rows_of(held, torch.arange(max(blocks, 3)))
    _, lse = dense_rows(q, k, v, 0.125)
    expected = torch.einsum("grd,gsd->grs", q.double(), rows_of(held, ids)[0]) * 0.125
    _near([cuda.key_logits(q, held.keys, ids, 0.125)], [expected], ("logits",))
    importance = cuda.token_importance(q, lse.float(), held.keys, ids, 0.125)
    shares = (expected - lse.unsqueeze(-1)).exp().sum((0, 1)).view(blocks, block_size)
    assert importance.shape == shares.shape
    assert ((importance - shares).abs() <= 2e-5 * shares).all()


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (4, 1000), (9, 33), (2, 0)])
def test_rank_tokens(cuda, rows, count):
    coarse = 8 * torch.randn(3, rows, count, generator=_rng(15))
    raw_lse = 8 * torch.randn(3, rows, generator=_rng(16))
    raw_lse[1] = -torch.inf
    total = torch.logaddexp(torch.logsumexp(coarse.double(), -1), raw_lse.double())
    expected = (coarse.double() - total.unsqueeze(-1)).exp().sum(1)
    rank = cuda.rank_tokens(coarse, raw_lse)
    assert rank.shape == expected.shape
    assert ((rank - expected).abs() <= 1e-5 * expected).all()


@pytest.mark.parametrize(("blocks", "block_size"), [(1, 16), (9, 32), (40, 64)])
def test_unread_mass(cuda, blocks, block_size):
    """Some heads have read everything, some nothing."""
    rng = _rng(17)
    coarse = 10 * torch.randn(4, 3, blocks, block_size, generator=rng)
    radius, spread = 5 * torch.rand(4, 3, blocks, generator=rng), torch.rand(4, 3, blocks, generator=rng)
    read = torch.rand(4, blocks * block_size, generator=rng) < 0.5
    read[1], read[2] = True, False
    found = cuda.unread_mass(reference.TokenScores(coarse, radius, spread), 0.9, read)
    for mass, slope, extra in zip(found, (0.9, 1.0), (spread, radius), strict=True):
        logits = (slope * coarse + extra.unsqueeze(-1)).double().flatten(2).masked_fill(read.unsqueeze(1), -torch.inf)
        torch.testing.assert_close(mass.double(), torch.logsumexp(logits, -1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("best", [0, 1, 7, 512, 1023, 1500])
@pytest.mark.parametrize("kind", ["normal", "shares", "few values", "signs", "equal"])
def test_select_topk(cuda, kind, best):
    """The best of each row, of equals the first, in the order of their places."""
    rng = _rng(8)
    scores = torch.randn(3, 1500, generator=rng)
    scores = {
        "normal": scores,
        "shares": scores.mul(4).softmax(-1),
        "few values": scores.round(),
        "signs": scores.sign() * 0.0 + scores.round().clamp(-1, 0),  # zeros of both signs are equal
        "equal": torch.full_like(scores, 0.25),
    }[kind]
    found = cuda.select_topk(scores, best)
    order = (scores + 0.0).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(found, order[:, :best].sort(-1).values)


@pytest.mark.parametrize("count", [1, 31, 33, 511, 513])
def test_select_topk_of_any_count(cuda, count):
    scores = torch.randn(2, count, generator=_rng(9))
    for best in {1, (count + 1) // 2, count}:
        assert torch.equal(cuda.select_topk(scores, best), scores.topk(best).indices.sort(-1).values)


def test_select_topk_refuses_more_than_there_are(cuda):
    with pytest.raises((RuntimeError, ValueError), match=r"error 1$|at most 4 for all requests, got 5"):
        cuda.select_topk(torch.zeros(1, 4), 5)


def test_prefetch_changes_nothing(cuda):
    held = random_store(5, 2, 16, 64, 64, "int8")
    before = [None if x is None else x.clone() for x in held.keys[:5]]
    for field in held.keys[1:5]:
        cuda.prefetch(field, torch.tensor([4, 0, 4]))
        cuda.prefetch(field, torch.tensor([], dtype=torch.int64))
    for now, then in zip(held.keys[1:5], before[1:], strict=True):
        assert torch.equal(now, then)
