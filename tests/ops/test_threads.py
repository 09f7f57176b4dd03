"""What is split over threads is put together again: every op that splits its work, with several threads, against plain
torch. (The other tests run with one thread, where an attention is a single piece.)
"""

from __future__ import annotations

import pytest
import torch
from one_request import OneRequest
from stored import random_store

from pikv_megatron.ops import reference as plain

GROUPS, HEADS, SIZE, DIM, VALUE_DIM, BLOCKS = 3, 5, 16, 64, 32, 70
SCALE = DIM**-0.5
reference = OneRequest(plain)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["none", "int8", "int2"])
def held(request):
    return random_store(BLOCKS, GROUPS, SIZE, DIM, VALUE_DIM, request.param, seed=1)


@pytest.fixture
def q():
    return 4 * torch.randn(GROUPS, HEADS, DIM, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def ids():
    return torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(3))


def _equal(mine, truth) -> None:
    """Up to float32 rounding of sums in another order; -inf where it is -inf."""
    for got, expected in zip(mine, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * max(1.0, _size(expected)))


def _size(x: torch.Tensor) -> float:
    return x.where(x.isfinite(), 0.0).abs().max().item()


def test_attention_over_blocks(ops, held, q, ids):
    arguments = (q, held.keys, held.values, ids, SCALE)
    _equal(ops.attend_blocks(*arguments), reference.attend_blocks(*arguments))


def test_attention_over_blocks_by_position(ops, held, q, ids):
    """The oldest query sees a part of one piece, so the other pieces have nothing to say about it."""
    key_positions = (ids * SIZE).unsqueeze(1) + torch.arange(SIZE)
    query_positions = torch.tensor([5, 100, 500, 900, BLOCKS * SIZE])
    arguments = (q, held.keys, held.values, ids, SCALE, key_positions, query_positions)
    _equal(ops.attend_blocks(*arguments), reference.attend_blocks(*arguments))


def test_several_requests(every, held, ids):
    """Runs of very different lengths, one of them empty."""
    rng = torch.Generator().manual_seed(4)
    q, raw_lse = 4 * torch.randn(4, GROUPS, HEADS, DIM, generator=rng), torch.randn(4, GROUPS, HEADS, generator=rng)
    first = torch.tensor([0, 3, 3, 60, BLOCKS])
    buffers = [torch.randn(6, GROUPS, 40, channels, generator=rng) for channels in (DIM, VALUE_DIM)]
    window = (torch.tensor([5, 0, 3, 2]), torch.tensor([0, 3, 7, 10]), torch.tensor([40, 3, 9, 30]))
    raw, stored = (*buffers, *window), (held.keys, held.values, ids, first)

    def both(name: str, *arguments) -> object:
        mine, truth = (getattr(lib, name)(*arguments) for lib in (every, plain))
        of_several = isinstance(truth, tuple)
        _equal(mine if of_several else [mine], truth if of_several else [truth])
        return truth

    both("attend_ragged", q, *stored, SCALE)
    both("attend_windows", q, *raw, SCALE)
    _, lse = both("attend_decode", q, *raw, *stored, SCALE)
    scored = (q, held.keys, ids, first, SCALE)
    both("score_blocks", *scored)
    both("key_logits", *scored)
    scores = both("score_tokens", *scored)
    lse = lse.nan_to_num(neginf=0.0)
    both("token_importance", q, lse, *scored[1:])
    both("window_importance", q, lse, buffers[0], *window, SCALE)
    rank = both("rank_tokens", scores.coarse.flatten(2), raw_lse, first * SIZE)
    first_chosen = torch.tensor([0, 40, 40, 500, 530])
    chosen = both("select_topk", rank, first * SIZE, first_chosen, 530)
    both("attend_tokens", q, *stored[:2], ids[chosen // SIZE], chosen % SIZE, first_chosen, SCALE)
    (partial,), (read,) = every.attend_mass(q, [stored], [scores], 0.9, raw_lse, 0.05, SCALE)
    (truth,), (expected,) = plain.attend_mass(q, [stored], [scores], 0.9, raw_lse, 0.05, SCALE)
    assert torch.equal(read, expected)
    _equal(partial, truth)
    both("unread_mass", scores, 0.9, read, first)


def test_attention_over_tokens(ops, held, q):
    rng = torch.Generator().manual_seed(5)
    places = torch.stack([torch.randperm(BLOCKS * SIZE, generator=rng)[:1000] for _ in range(GROUPS)])
    for read in (None, torch.rand(GROUPS, 1000, generator=rng) < 0.3):
        arguments = (q, held.keys, held.values, places // SIZE, places % SIZE, SCALE, read)
        _equal(ops.attend_tokens(*arguments), reference.attend_tokens(*arguments))


def test_scores_logits_and_importance(ops, held, q, ids):
    lists = torch.stack([ids, ids.flip(0), ids.roll(5)])
    for chosen in (ids, lists):
        arguments = (q, held.keys, chosen, SCALE)
        _equal(ops.score_tokens(*arguments), reference.score_tokens(*arguments))
    arguments = (q, held.keys, ids, SCALE)
    _equal(ops.score_blocks(*arguments), reference.score_blocks(*arguments))
    logits = reference.key_logits(*arguments)
    _equal([ops.key_logits(*arguments)], [logits])
    lse = logits.logsumexp(-1)
    importance = [x.token_importance(q, lse, held.keys, ids, SCALE) for x in (ops, reference)]
    torch.testing.assert_close(*importance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes(ops, dtype):
    x = torch.randn(50, GROUPS, 32, 128, generator=torch.Generator().manual_seed(6)).to(dtype)
    for hi, lo, per_channel in ((4, 4, True), (2, 2, True), (8, 0, False)):
        planes, truth = (lib.quantize_block(x, hi, lo, per_channel=per_channel) for lib in (ops, reference))
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(planes, truth, strict=True))
        decoded = [lib.dequantize_block(*truth, hi, lo, per_channel=per_channel) for lib in (ops, reference)]
        torch.testing.assert_close(*decoded, rtol=1e-6, atol=1e-6)


def test_append(ops, ids):
    rng = torch.Generator().manual_seed(7)
    pools = [random_store(BLOCKS, GROUPS, SIZE, DIM, VALUE_DIM, "int8", seed=8) for _ in range(2)]
    new_k = torch.randn(60, GROUPS, SIZE, DIM, generator=rng)
    new_v = torch.randn(60, GROUPS, SIZE, VALUE_DIM, generator=rng)
    for lib, pool in zip((ops, reference), pools, strict=True):
        lib.append(pool.keys, pool.values, ids[:60], new_k, new_v)
    mine, truth = ((*pool.keys[1:5], *pool.values[1:4]) for pool in pools)
    assert all(torch.equal(a, b) for a, b in zip(mine, truth, strict=True))
