"""The attention kernels against float64: attend_blocks, attend_tokens, merge_partials."""

from __future__ import annotations

import pytest
import torch
from pairs import every_case, every_pair, name_of
from stored import Stored, dense_rows, random_store, rows_of, with_parts

from pikv_megatron.ops import reference

REFUSED = r"error 1$|multiples of 16"
RAW = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODECS = (
    *RAW,
    "int8",
    "int4",
    "int2",
    "int8 keys, int4 values",
    "float32 keys, int8 values",
    "int2 keys, bfloat16 values",
)
BLOCKS = {
    "codec": CODECS,
    "dim": (64, 80, 96, 128, 192, 256),
    "value_dim": (None, 48, 128, 256),
    "heads": (1, 2, 4, 7, 8),
    "block_size": (16, 32, 64),
    "blocks": (0, 1, 5, 13),
    "causal": (False, True),
    "splits": (1, 3),
}
# What the full product keeps to one value.
ONE_OF_BLOCKS = {"value_dim": [None], "causal": [True], "splits": [1]}
ONE_OF_TOKENS = {"value_dim": [None], "some": [True], "splits": [1]}
TOKENS = {
    "codec": CODECS,
    "dim": (64, 80, 96, 128, 192, 256),
    "value_dim": (None, 48, 128, 256),
    "heads": (1, 2, 4, 7, 8),
    "block_size": (16, 32, 64),
    "tokens": (0, 1, 31, 33, 390),
    "some": (False, True),
    "splits": (1, 3),
}


def _store(codec: str, blocks: int, block_size: int, dim: int, value_dim: int) -> Stored:
    """Two KV heads; "A keys, B values" takes keys of one codec and values of another."""

    def one(name: str) -> Stored:
        kind, dtype = ("none", RAW[name]) if name in RAW else (name, torch.float32)
        return random_store(blocks, 2, block_size, dim, value_dim, kind, dtype=dtype)

    keys, _, values = codec.partition(" keys, ")
    of_keys, of_values = one(keys), one(values.removesuffix(" values") or keys)
    return Stored(of_keys.keys, of_values.values, of_keys.k, of_values.v)


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(partial: reference.Partial, expected: tuple[torch.Tensor, torch.Tensor], relative: float = 1e-5) -> None:
    """Within `relative` of the largest output; lse likewise; rows that see nothing equal."""
    out, lse = expected
    blind = lse == -torch.inf
    assert torch.equal(partial.lse == -torch.inf, blind)
    assert (partial.out[blind] == 0).all()
    if blind.all():
        return
    error = (partial.out.double() - out).abs().max()
    assert error <= relative * out.abs().max(), f"{error / out.abs().max():.1e} of the largest output"
    assert ((partial.lse.double() - lse)[~blind].abs() <= relative * lse[~blind].abs().clamp(min=1)).all()


def check_blocks(cuda, codec, dim, value_dim, heads, block_size, blocks, causal, splits, rank_k=0, rank_v=0, bases=1):
    cuda.splits = splits
    value_dim = value_dim or dim
    held = with_parts(_store(codec, max(blocks, 3), block_size, dim, value_dim), rank_k, rank_v, bases)
    ids = torch.randperm(max(blocks, 3), generator=_rng(1))[:blocks]
    q = torch.randn(2, heads, dim, generator=_rng(2))
    k, v = rows_of(held, ids)
    positions, seen = (None, None), None
    if causal:  # the first query is older than every key, the others see more and more
        starts = block_size * torch.randperm(blocks, generator=_rng(3)).unsqueeze(1) + 1
        key_positions = starts + torch.arange(block_size)
        query_positions = torch.arange(heads) * (blocks * block_size) // heads
        positions = key_positions, query_positions
        seen = key_positions.flatten() <= query_positions.unsqueeze(1)
    partial = cuda.attend_blocks(q, held.keys, held.values, ids, dim**-0.5, *positions)
    close(partial, dense_rows(q, k, v, dim**-0.5, seen))


@pytest.mark.parametrize("case", every_pair(BLOCKS), ids=name_of)
def test_attend_blocks(cuda, case):
    check_blocks(cuda, **case)


@pytest.mark.slow
@pytest.mark.parametrize("dim", BLOCKS["dim"])
@pytest.mark.parametrize("codec", CODECS)
def test_attend_blocks_in_every_case(cuda, codec, dim):
    for case in every_case({**BLOCKS, **ONE_OF_BLOCKS, "codec": [codec], "dim": [dim]}):
        check_blocks(cuda, **case)


def check_tokens(cuda, codec, dim, value_dim, heads, block_size, tokens, some, splits, rank_k=0, rank_v=0, bases=1):
    cuda.splits = splits
    value_dim = value_dim or dim
    blocks = tokens // block_size + 2
    held = with_parts(_store(codec, blocks, block_size, dim, value_dim), rank_k, rank_v, bases)
    q = torch.randn(2, heads, dim, generator=_rng(4))
    places = torch.stack([torch.randperm(blocks * block_size, generator=_rng(5 + g))[:tokens] for g in range(2)])
    k, v = (x.transpose(0, 1).flatten(1, 2) for x in (held.k, held.v))
    k, v = (torch.stack([x[g, places[g]] for g in range(2)]) for x in (k, v))
    read = seen = None
    if some:
        read = torch.rand(2, tokens, generator=_rng(7)) < 0.5
        read[0] = False
        seen = read.unsqueeze(1).expand(-1, heads, -1)
    ids, offsets = places // block_size, places % block_size
    partial = cuda.attend_tokens(q, held.keys, held.values, ids, offsets, dim**-0.5, read)
    close(partial, dense_rows(q, k, v, dim**-0.5, seen))


@pytest.mark.parametrize("case", every_pair(TOKENS), ids=name_of)
def test_attend_tokens(cuda, case):
    check_tokens(cuda, **case)


@pytest.mark.slow
@pytest.mark.parametrize("dim", TOKENS["dim"])
@pytest.mark.parametrize("codec", CODECS)
def test_attend_tokens_in_every_case(cuda, codec, dim):
    for case in every_case({**TOKENS, **ONE_OF_TOKENS, "codec": [codec], "dim": [dim]}):
        check_tokens(cuda, **case)


@pytest.mark.parametrize("heads", [1, 3, 9])
@pytest.mark.parametrize("codec", ["bfloat16", "int8", "int2"])
def test_attend_ragged(cuda, codec, heads):
    """Requests of many lengths, none among them, and blocks that several share."""
    lengths = (3, 0, 1, 11, 0)
    held = _store(codec, 9, 32, 80, 64)
    q = torch.randn(len(lengths), 2, heads, 80, generator=_rng(17))
    ids = torch.randint(9, (sum(lengths),), generator=_rng(18))
    first = torch.tensor([0, *lengths]).cumsum(0)
    partial = cuda.attend_ragged(q, held.keys, held.values, ids, first, 0.1)
    for i in range(len(lengths)):
        expected = dense_rows(q[i], *rows_of(held, ids[first[i] : first[i + 1]]), 0.1)
        close(reference.Partial(partial.out[i], partial.lse[i]), expected)


@pytest.mark.parametrize("dtype", RAW)
@pytest.mark.parametrize(("tokens", "query_tokens"), [(1, 1), (68, 1), (45, 7), (300, 16)])
def test_attend_at(cuda, tokens, query_tokens, dtype):
    """Raw tokens as slices of a longer buffer, with a gap in their positions; all seen where there are none."""
    k, v = (torch.randn(2, 310, n, generator=_rng(19 + n)).to(RAW[dtype])[:, 4 : 4 + tokens] for n in (64, 96))
    q = torch.randn(2, 3 * query_tokens, 64, generator=_rng(20))
    key_positions = torch.arange(tokens) + torch.where(torch.arange(tokens) < 4, 0, 100)
    query_positions = key_positions[-query_tokens:].repeat(3)
    query_positions[0] -= 1000  # sees nothing
    seen = key_positions <= query_positions.unsqueeze(1)
    close(cuda.attend_at(q, k, v, key_positions, query_positions, 0.125), dense_rows(q, k, v, 0.125, seen))
    close(cuda.attend_at(q, k, v, None, None, 0.125), dense_rows(q, k, v, 0.125))


@pytest.mark.parametrize("splits", [1, 2, 7, 40])
def test_any_split_gives_the_same(cuda, splits):
    """More splits than blocks too: some have nothing to do."""
    held = random_store(9, 2, 16, 64, 64, "int8")
    q = torch.randn(2, 4, 64, generator=_rng(8))
    ids = torch.randperm(9, generator=_rng(9))
    cuda.splits = splits
    partial = cuda.attend_blocks(q, held.keys, held.values, ids, 0.125)
    close(partial, dense_rows(q, *rows_of(held, ids), 0.125))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_of_threads_does_not_matter(cuda, seed):
    held = random_store(9, 2, 32, 64, 96, "int4")
    q = torch.randn(2, 8, 64, generator=_rng(10))
    ids, offsets = torch.randint(9, (2, 70), generator=_rng(11)), torch.randint(32, (2, 70), generator=_rng(12))
    results = []
    for order in (0, seed):
        cuda.set_seed(order)
        results += [
            cuda.attend_blocks(q, held.keys, held.values, torch.arange(9), 0.125),
            cuda.attend_tokens(q, held.keys, held.values, ids, offsets, 0.125),
        ]
    for first, second in zip(results[:2], results[2:], strict=True):
        assert torch.equal(first.out, second.out)
        assert torch.equal(first.lse, second.lse)


def test_large_logits(cuda):
    """In the thousands and of both signs: nothing overflows and the largest key wins."""
    held = random_store(20, 2, 32, 64, 64, "none")
    q = 2000 * torch.randn(2, 4, 64, generator=_rng(13))
    out, lse = dense_rows(q, *rows_of(held, torch.arange(20)), 0.125)
    partial = cuda.attend_blocks(q, held.keys, held.values, torch.arange(20), 0.125)
    assert partial.out.isfinite().all()
    torch.testing.assert_close(partial.lse.double(), lse, rtol=1e-6, atol=0)
    assert ((partial.out.double() - out).abs().amax(-1) < 0.02).double().mean() > 0.7  # near ties may fall otherwise


@pytest.mark.parametrize("codec", ["float32", "int8", "int4"])
@pytest.mark.parametrize("blocks", [256, pytest.param(4096, marks=pytest.mark.slow)])
def test_a_long_context(cuda, blocks, codec):
    """8,192 and 131,072 tokens whose values average to little: what is lost to rounding must not show beside it."""
    held = _store(codec, blocks, 32, 64, 64)
    q = 0.1 * torch.randn(2, 4, 64, generator=_rng(14))
    ids = torch.randperm(blocks, generator=_rng(15))
    expected = dense_rows(q, *rows_of(held, ids), 0.125)
    assert expected[0].abs().max() < 0.1
    cuda.splits = 1
    close(cuda.attend_blocks(q, held.keys, held.values, ids, 0.125), expected)


@pytest.mark.parametrize("parts", [1, 2, 33, 70])
def test_merge_partials(cuda, parts):
    """Some rows of some parts have seen nothing, one row of all."""
    rng = _rng(16)
    outs, lses = torch.randn(parts, 3, 5, 40, generator=rng), 20 * torch.randn(parts, 3, 5, generator=rng)
    lses[torch.rand(parts, 3, 5, generator=rng) < 0.2] = -torch.inf
    lses[:, 1, 2] = -torch.inf
    outs[lses == -torch.inf] = 0
    partials = [reference.Partial(out, lse) for out, lse in zip(outs, lses, strict=True)]
    doubles = [reference.Partial(out.double(), lse.double()) for out, lse in zip(outs, lses, strict=True)]
    close(cuda.merge_partials(partials), reference.merge_partials(doubles))


def test_what_the_kernels_do_not_cover_is_refused(cuda):
    held = random_store(3, 2, 16, 40, 64, "none")
    q = torch.randn(2, 2, 40)
    with pytest.raises(RuntimeError, match=REFUSED):
        cuda.attend_blocks(q, held.keys, held.values, torch.arange(3), 0.1)
