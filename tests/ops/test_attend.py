"""The attention ops against float64: attend_blocks, attend_decode, attend_tokens, attend_masked, attend_window,
attend_at, key_logits and merge_partials.
"""

from __future__ import annotations

import pytest
import torch
from stored import dense_rows, random_store, rows_of

CODECS = ("none", "int8", "int4", "int2")
SHAPES = {  # groups, heads per group, head_dim, v_head_dim
    "mha 32": (4, 1, 32, 32),
    "gqa 2, 64": (2, 2, 64, 64),
    "gqa 4, 128": (2, 4, 128, 128),
    "wide keys": (2, 2, 64, 32),
    "wide values": (1, 4, 32, 64),
}


@pytest.fixture(params=CODECS)
def codec(request):
    return request.param


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _close(partial, expected, relative: float = 1e-5) -> None:
    """Within `relative` of the largest output; lse likewise; rows that see nothing equal."""
    out, lse = expected
    assert partial.out.dtype == partial.lse.dtype == torch.float32
    assert partial.out.shape == out.shape
    assert (partial.out.double() - out).abs().max() <= relative * out.abs().max()
    blind = lse == -torch.inf
    assert torch.equal(partial.lse == -torch.inf, blind)
    assert (partial.out[blind] == 0).all()
    seen = ~blind
    assert ((partial.lse.double() - lse)[seen].abs() <= relative * lse[seen].abs().clamp(min=1)).all()


def test_attend_blocks(ops, codec, shape):
    groups, heads, dim, value_dim = shape
    held = random_store(9, groups, 16, dim, value_dim, codec)
    q = torch.randn(groups, heads, dim, generator=_rng(1))
    block_ids = torch.tensor([7, 0, 3, 8])
    partial = ops.attend_blocks(q, held.keys, held.values, block_ids, dim**-0.5)
    _close(partial, dense_rows(q, *rows_of(held, block_ids), dim**-0.5))


def test_attend_blocks_over_many_chunks(ops, codec):
    held = random_store(150, 2, 32, 64, 64, codec)
    assert held.k.numel() * 4 > 2 * ops.CHUNK_BYTES
    q = 3 * torch.randn(2, 8, 64, generator=_rng(2))
    block_ids = torch.randperm(150, generator=_rng(3))
    partial = ops.attend_blocks(q, held.keys, held.values, block_ids, 64**-0.5)
    _close(partial, dense_rows(q, *rows_of(held, block_ids), 64**-0.5))


def test_attend_blocks_sees_only_what_is_not_newer(ops, codec):
    """Blocks out of order; the first query is older than every key, the second than all but one block's part."""
    held = random_store(140, 2, 32, 64, 32, codec)
    block_ids = torch.randperm(140, generator=_rng(4))
    starts = 32 * torch.randperm(140, generator=_rng(5)) + 1
    key_positions = starts.unsqueeze(1) + torch.arange(32)
    query_positions = torch.tensor([0, 17, 900, 32 * 140])
    q = torch.randn(2, 4, 64, generator=_rng(6))
    partial = ops.attend_blocks(q, held.keys, held.values, block_ids, 0.125, key_positions, query_positions)
    seen = key_positions.flatten() <= query_positions.unsqueeze(1)
    assert seen.sum(1).tolist() == [0, 17, 900, 32 * 140]
    _close(partial, dense_rows(q, *rows_of(held, block_ids), 0.125, seen))


@pytest.mark.parametrize(("blocks", "raw"), [(0, 1), (3, 1), (4, 70)])
def test_attend_decode(ops, codec, shape, blocks, raw):
    """Raw tokens and blocks in one softmax; raw tokens may be a part of a longer buffer, and of narrower numbers."""
    groups, heads, dim, value_dim = shape
    held = random_store(9, groups, 16, dim, value_dim, codec)
    q = 2 * torch.randn(groups, heads, dim, generator=_rng(21))
    block_ids = torch.tensor([7, 0, 3, 8])[:blocks]
    k, v = (torch.randn(groups, 80, x, generator=_rng(x)).to(torch.bfloat16)[:, :raw] for x in (dim, value_dim))
    partial = ops.attend_decode(q, k, v, held.keys, held.values, block_ids, dim**-0.5)
    stored_k, stored_v = rows_of(held, block_ids)
    expected = dense_rows(q, torch.cat([k.double(), stored_k], 1), torch.cat([v.double(), stored_v], 1), dim**-0.5)
    _close(partial, expected)


def test_attend_ragged(ops, codec, shape):
    """Several requests at once equal each alone; one of them has no block, one has one, two share theirs."""
    groups, heads, dim, value_dim = shape
    held = random_store(40, groups, 16, dim, value_dim, codec)
    q = torch.randn(5, groups, heads, dim, generator=_rng(20))
    runs = [torch.tensor(x) for x in ([3, 1, 7], [], [12], list(range(39, 5, -1)), [12])]
    first = torch.tensor([0, *(len(run) for run in runs)]).cumsum(0)
    out, lse = ops.attend_ragged(q, held.keys, held.values, torch.cat(runs).long(), first, dim**-0.5)
    assert out.shape == (5, groups, heads, value_dim)
    for i, run in enumerate(runs):
        if len(run):
            _close(ops.Partial(out[i], lse[i]), dense_rows(q[i], *rows_of(held, run), dim**-0.5))
        else:
            assert (out[i] == 0).all()
            assert (lse[i] == -torch.inf).all()


def test_attend_blocks_of_large_logits(ops):
    """Logits in the thousands and of both signs: nothing overflows and the largest key wins."""
    held = random_store(40, 2, 32, 64, 64, "none")
    q = 2000 * torch.randn(2, 4, 64, generator=_rng(7))
    out, lse = dense_rows(q, *rows_of(held, torch.arange(40)), 0.125)
    partial = ops.attend_blocks(q, held.keys, held.values, torch.arange(40), 0.125)
    assert partial.out.isfinite().all()
    torch.testing.assert_close(partial.lse.double(), lse, rtol=1e-6, atol=0)
    assert ((partial.out.double() - out).abs().amax(-1) < 0.02).double().mean() > 0.7  # near ties may fall otherwise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_computed_in_float32(ops, dtype):
    held = random_store(9, 2, 16, 64, 64, "none", dtype=dtype)
    q = torch.randn(2, 4, 64, generator=_rng(8)).to(dtype)
    partial = ops.attend_blocks(q, held.keys, held.values, torch.arange(9), 0.125)
    _close(partial, dense_rows(q, *rows_of(held, torch.arange(9)), 0.125))


def test_attend_tokens(ops, codec, shape):
    groups, heads, dim, value_dim = shape
    held = random_store(9, groups, 16, dim, value_dim, codec)
    q = torch.randn(groups, heads, dim, generator=_rng(9))
    places = torch.stack([torch.randperm(9 * 16, generator=_rng(g))[:23] for g in range(groups)])
    block_ids, offsets = places // 16, places % 16
    k, v = (x.transpose(0, 1).flatten(1, 2) for x in (held.k, held.v))
    k, v = (torch.stack([x[g, places[g]] for g in range(groups)]) for x in (k, v))
    partial = ops.attend_tokens(q, held.keys, held.values, block_ids, offsets, dim**-0.5)
    _close(partial, dense_rows(q, k, v, dim**-0.5))

    read = torch.rand(groups, 23, generator=_rng(10)) < 0.5
    read[0] = False
    partial = ops.attend_tokens(q, held.keys, held.values, block_ids, offsets, dim**-0.5, read)
    _close(partial, dense_rows(q, k, v, dim**-0.5, read.unsqueeze(1).expand(-1, heads, -1)))
    assert (partial.lse[0] == -torch.inf).all()


def test_key_logits_and_attend_masked(ops, codec, shape):
    groups, heads, dim, value_dim = shape
    held = random_store(9, groups, 16, dim, value_dim, codec)
    q = torch.randn(groups, heads, dim, generator=_rng(11))
    block_ids = torch.tensor([2, 8, 5])
    k, v = rows_of(held, block_ids)
    logits = ops.key_logits(q, held.keys, block_ids, dim**-0.5)
    expected = torch.einsum("grd,gsd->grs", q.double(), k) * dim**-0.5
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    read = torch.rand(groups, 48, generator=_rng(12)) < 0.3
    read[-1] = False
    partial = ops.attend_masked(logits, read, held.values, block_ids)
    _close(partial, dense_rows(q, k, v, dim**-0.5, read.unsqueeze(1).expand(-1, heads, -1)))


@pytest.mark.parametrize(("keys", "query_tokens"), [(40, 1), (40, 7), (40, 40), (1, 1), (150, 16), (700, 600)])
def test_attend_window(ops, shape, keys, query_tokens):
    groups, heads, dim, value_dim = shape
    rng = _rng(13)
    q = torch.randn(groups, heads * query_tokens, dim, generator=rng)
    k, v = torch.randn(groups, keys, dim, generator=rng), torch.randn(groups, keys, value_dim, generator=rng)
    places = torch.arange(keys)
    seen = (places <= places[keys - query_tokens :, None]).repeat(heads, 1)
    partial = ops.attend_window(q, k, v, query_tokens, dim**-0.5)
    _close(partial, dense_rows(q, k, v, dim**-0.5, seen))


def test_attend_window_of_rows_that_are_not_contiguous(ops):
    """As group_rows gives them where a KV head has one query head."""
    rng = _rng(14)
    q = torch.randn(12, 3, 32, generator=rng).transpose(0, 1)
    k, v = (torch.randn(30, 3, 32, generator=rng).transpose(0, 1) for _ in range(2))
    places = torch.arange(30)
    seen = places <= places[18:, None]
    _close(ops.attend_window(q, k, v, 12, 0.2), dense_rows(q, k, v, 0.2, seen))


@pytest.mark.parametrize("value_dim", [64, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attend_window_of_narrow_dtypes(ops, dtype, value_dim):
    rng = _rng(15)
    q, k = (torch.randn(2, n, 64, generator=rng).to(dtype) for n in (2 * 20, 50))
    v = torch.randn(2, 50, value_dim, generator=rng).to(dtype)
    places = torch.arange(50)
    seen = (places <= places[30:, None]).repeat(2, 1)
    _close(ops.attend_window(q, k, v, 20, 0.125), dense_rows(q, k, v, 0.125, seen), relative=1e-2)


def test_attend_at(ops, shape):
    """Keys with a gap in their positions; the oldest query sees only the first keys, one sees none."""
    groups, heads, dim, value_dim = shape
    rng = _rng(16)
    key_positions = torch.tensor([2, 3, 40, 41, 42, 43])
    query_positions = torch.tensor([1, 20, 41, 43]).repeat(heads)
    q = torch.randn(groups, 4 * heads, dim, generator=rng)
    k, v = torch.randn(groups, 6, dim, generator=rng), torch.randn(groups, 6, value_dim, generator=rng)
    seen = key_positions <= query_positions.unsqueeze(1)
    assert seen[:4].sum(1).tolist() == [0, 2, 4, 6]
    partial = ops.attend_at(q, k, v, key_positions, query_positions, dim**-0.5)
    _close(partial, dense_rows(q, k, v, dim**-0.5, seen))


def test_attend_at_of_many_keys(ops, shape):
    """More than are taken in at a time, in no order: every query's newest keys lie all over."""
    groups, heads, dim, value_dim = shape
    rng = _rng(21)
    key_positions = torch.randperm(200, generator=rng)
    query_positions = torch.tensor([0, 90, 199]).repeat(heads)
    q = torch.randn(groups, 3 * heads, dim, generator=rng)
    k, v = torch.randn(groups, 200, dim, generator=rng), torch.randn(groups, 200, value_dim, generator=rng)
    seen = key_positions <= query_positions.unsqueeze(1)
    partial = ops.attend_at(q, k, v, key_positions, query_positions, dim**-0.5)
    _close(partial, dense_rows(q, k, v, dim**-0.5, seen))


def test_partials_merge_to_the_whole(ops):
    """Uneven parts, one of them invisible to some rows and one to all; the order does not matter."""
    rng = _rng(17)
    q = 4 * torch.randn(2, 5, 32, generator=rng)
    k, v = torch.randn(2, 90, 32, generator=rng), torch.randn(2, 90, 24, generator=rng)
    positions = torch.arange(90)
    queries = torch.tensor([0, 10, 35, 60, 89])
    edges = [(0, 3), (3, 40), (40, 41), (41, 90)]
    parts = [ops.attend_at(q, k[:, a:b], v[:, a:b], positions[a:b], queries, 0.3) for a, b in edges]
    parts.append(ops.attend_at(q, k[:, :4], v[:, :4], positions[:4] + 100, queries, 0.3))
    whole = dense_rows(q, k, v, 0.3, positions <= queries.unsqueeze(1))
    _close(ops.merge_partials(parts), whole)
    _close(ops.merge_partials(parts[::-1]), whole)
    _close(ops.merge_partials([ops.merge_partials(parts[:2]), ops.merge_partials(parts[2:])]), whole)


def test_partials_that_see_nothing_merge_to_nothing(ops):
    nothing = ops.Partial(torch.zeros(2, 3, 8), torch.full((2, 3), -torch.inf))
    merged = ops.merge_partials([nothing, nothing])
    assert (merged.lse == -torch.inf).all()
    assert (merged.out == 0).all()
    one = ops.merge_partials([nothing])
    assert torch.equal(one.out, nothing.out)


def test_inputs_are_left_as_they_were(ops, codec):
    held = random_store(5, 2, 16, 32, 32, codec)
    q, window = torch.randn(2, 4, 32), torch.randn(2, 9, 32)
    tensors = [t for t in (*held.keys[:5], *held.values[:4], q, window) if t is not None]
    before = [t.clone() for t in tensors]
    ids, per_head = torch.arange(5), torch.zeros(2, 3, dtype=torch.int64)
    partial = ops.attend_blocks(q, held.keys, held.values, ids, 0.2)
    ops.attend_tokens(q, held.keys, held.values, per_head, per_head, 0.2, torch.ones(2, 3, dtype=torch.bool))
    ops.attend_masked(ops.key_logits(q, held.keys, ids, 0.2), torch.ones(2, 80, dtype=torch.bool), held.values, ids)
    ops.attend_window(q, window, window, 2, 0.2)
    ops.score_tokens(q, held.keys, ids, 0.2)
    ops.token_importance(q, partial.lse, held.keys, ids, 0.2)
    ops.window_importance(q, partial.lse, window, 0.2)
    ops.prompt_importance(q, partial.lse, window, 2, 0.2)
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now, then)
